"""`cossl bench parity`: every loader renders the same views of the same pictures, and is compared with the PIL reference."""

from __future__ import annotations

import json
import math
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from cossl.models.flags import parse_flags, replace_text
from cossl.pipelines import make_loader
from cossl.pipelines.batch import Batch, LoaderSpec
from cossl.pipelines.demo_set import cache_dir
from cossl.pipelines.picture import draw_side_by_side
from cossl.pipelines.views import ViewSpec, byol, multi_crop
from cossl.tools.bench import installed, machine, progress, require_folder_of, spread
from cossl.tools.bench_pictures import default_source, prepare

RECIPES: dict[str, tuple[ViewSpec, ...]] = {"2x224": byol(), "2x224+6x96": multi_crop()}
LOADERS: dict[str, tuple[str, str]] = {  # row: backend, what it reads
    "torch (reference)": ("torch", "folder"),
    "torch, beton": ("torch", "beton"),
    "ffcv": ("ffcv", "beton"),
    "dali": ("dali", "folder"),
}
SAME = ("boxes", "flips", "photometry", "index", "label")
BATCH_SIZE, DRAWN = 50, 3


@dataclass(frozen=True)
class ParityArgs:
    """The command line of `cossl bench parity`; each field's text is its help."""

    source: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")] = None
    """Image folder SRC/<class>/<picture>; shrunk to 500 px at quality 90 first. Default: $COSSL_DATA/imagenet-sample/train if it is there,
    else generated pictures."""

    images: int = 300
    """How many pictures, evenly spread over the folder; compared in whole batches of 50."""

    picture: Path | None = None
    """Write a PNG here: the first three samples by each loader, side by side."""

    json: Path | None = None
    """Write the table here."""

    def __post_init__(self) -> None:
        if self.images < BATCH_SIZE:
            raise ValueError(f"--images {self.images}: expected at least {BATCH_SIZE}")
        require_folder_of("--picture", self.picture)
        require_folder_of("--json", self.json)


def compare(ours: Batch, reference: Batch) -> list[float]:
    """PSNR in dB of each view of each sample, infinite where every pixel is the same.

    Raises RuntimeError where anything but pixels differs: that is a defect, not a matter of degree.
    """
    for name in SAME:
        if not torch.equal(getattr(ours, name), getattr(reference, name)):
            raise RuntimeError(f"the {name} of two loaders differ")
    errors = [(a.float() - b.float()).square().mean((1, 2, 3)) for a, b in zip(ours.split(), reference.split(), strict=True)]
    return [10 * math.log10(255**2 / error) if error else math.inf for error in torch.cat(errors).tolist()]


def measure(folder: Path, beton: Path, recipe: tuple[ViewSpec, ...], picture: Path | None) -> list[dict[str, Any]]:
    """A row for each loader that is installed: views, how many equal the reference bit for bit, PSNR of the others."""
    spec = LoaderSpec(recipe, BATCH_SIZE, workers=1)
    loaders = {
        name: make_loader(backend, folder if reads == "folder" else beton, spec)
        for name, (backend, reads) in LOADERS.items()
        if backend != "dali" or installed("nvidia.dali")
    }
    reference, *others = loaders
    ratios: dict[str, list[float]] = {name: [] for name in others}
    for step, batches in enumerate(zip(*(loader.epoch(0) for loader in loaders.values()), strict=True)):
        for name, batch in zip(others, batches[1:], strict=True):
            ratios[name] += compare(batch, batches[0])
        if step == 0 and picture is not None:
            shown = {name: batch for name, batch in zip(loaders, batches, strict=True) if name != "torch, beton"}
            draw_side_by_side(picture, shown, loaders[reference].picture, DRAWN)
    for loader in loaders.values():
        loader.close()
    return [_row(name, values) for name, values in ratios.items()]


def _row(name: str, ratios: list[float]) -> dict[str, Any]:
    finite = [ratio for ratio in ratios if math.isfinite(ratio)]
    psnr = spread(finite) if finite else None
    row = {"loader": name, "n_views": len(ratios), "identical_views": len(ratios) - len(finite)}
    return row | {"psnr_min_db": psnr and round(psnr.low, 1), "psnr_median_db": psnr and round(psnr.median, 1)}


def parity_main(argv: Sequence[str]) -> None:
    """`cossl bench parity [SRC]`. Raises ValueError or OSError for a user's mistake."""
    args = parse_flags(ParityArgs, argv, "cossl bench parity", __doc__ or "")
    rows = []
    with tempfile.TemporaryDirectory(prefix="cossl-parity-") as scratch:
        pictures = prepare(args.source or default_source(), args.images, cache_dir(), Path(scratch), True)
        assert pictures.beton is not None
        for views, recipe in RECIPES.items():
            progress(f"{views} of {pictures.count} pictures, {pictures.source}")
            drawn = args.picture if views == "2x224" else None
            rows += [{"views": views} | row for row in measure(pictures.folder, pictures.beton, recipe, drawn)]
    print(f"{'loader':<16}{'views':<14}{'n':>7}{'identical':>11}{'PSNR min':>12}{'median':>9}")
    for row in rows:
        psnr = "" if row["psnr_min_db"] is None else f"{row['psnr_min_db']:>9.1f} dB{row['psnr_median_db']:>6.1f} dB"
        print(f"{row['loader']:<16}{row['views']:<14}{row['n_views']:>7}{row['identical_views']:>11}{psnr}")
    if args.json is not None:
        report = {
            "machine": machine(),
            "command": shlex.join(["cossl", "bench", "parity", *argv]),
            "pictures": pictures.source,
            "rows": rows,
        }
        replace_text(args.json, json.dumps(report, indent=1))
