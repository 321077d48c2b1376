"""`cossl locality`: what single positions of the feature map say, of one run or of several side by side.

similarity: the cosine of every position with the global vector, drawn over pictures. redundancy: how alike the positions of a picture are,
and how many directions they use, beside positions of different pictures and the same network untrained. positions: accuracy of probes on
the mean of k random positions. receptive-field: which pixels the central position's output follows (Luo et al. 2016, arXiv 1701.04128),
against those it may see. Each part is <run>/locality/<part>.json with its figure, and is not measured again while it holds.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import tyro
from torch import Tensor

from cossl.models.flags import parse_flags
from cossl.models.probe import PROTOCOL
from cossl.tools import locality_figures as figures
from cossl.tools import locality_parts as parts
from cossl.tools.comparison import compare
from cossl.tools.eval_pictures import folder_set
from cossl.tools.locality_figures import NETWORKS
from cossl.tools.locality_parts import CENTRE_FRAC, Subject
from cossl.tools.opened import data_of, open_runs, stamp, write_result

Part = Literal["similarity", "redundancy", "positions", "receptive-field"]


@dataclass(frozen=True)
class LocalityArgs(parts.Measures):
    """The command line of `cossl locality`; each field's text is its help."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")] = ()
    """Folders of runs."""
    parts: tuple[Part, ...] = get_args(Part)
    """Measure these alone."""
    data: Path | None = None
    """Folder with train and val; default: that of the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU if there is one."""
    out: Path | None = None
    """Write to OUT/<run>/ instead of <run>/locality/, and figures of several runs to OUT instead of the first run's folder."""
    again: bool = False
    """Measure also what is there already."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise ValueError("no RUN: give the folder of a run, or of several")

    def folder(self, subject: Subject) -> Path:
        """Where the results of a run go."""
        return self.out / subject.name if self.out else subject.run.run_dir / "locality"


class Task(NamedTuple):
    """A part: how it is measured, and the arguments that its numbers depend on besides --px and --seed."""

    measure: Callable[[Subject], dict[str, Any]]
    depends_on: tuple[str, ...]


TASKS: dict[str, Task] = {
    "similarity": Task(parts.similarity, ("pictures", "sample")),
    "redundancy": Task(parts.redundancy, ("sample",)),
    "positions": Task(parts.positions, ("probe_pictures", "draws")),
    "receptive-field": Task(parts.receptive_field, ("field_pictures", "projections")),
}


def protocol(subject: Subject, part: str) -> dict[str, Any]:
    """What the part's numbers depend on; a result with another one is measured anew."""
    assert subject.pictures is not None
    seen = min(parts.NORM_PICTURES, subject.pictures["counts"]["train"])
    chosen = {name: getattr(subject.args, name) for name in TASKS[part].depends_on}
    probes = {name: value for name, value in PROTOCOL.items() if name.startswith(("knn", "linear"))} if part == "positions" else {}
    view: dict[str, Any] = {"data": str(subject.data.resolve()), "picture_set": subject.pictures}
    view["untrained"] = f"the seed's weights, batch norms' statistics of {seen} train pictures, as in training"
    view |= {"crop": f"central {CENTRE_FRAC:g} of the shorter side", "px": subject.px, "seed": subject.args.seed}
    return {**view, **chosen, **probes, "weights_sha256": subject.run.weights}


def result_of(subject: Subject, part: str, folder: Path, again: bool) -> dict[str, Any]:
    """The part's result, from its file if that holds, else measured; "energies" are in it but in a file of their own."""
    how, path = protocol(subject, part), folder / f"{part}.json"
    arrays = path.with_suffix(".npz")
    if not again and path.exists() and (part != "receptive-field" or arrays.exists()):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["protocol"] == how:
                if part == "receptive-field":
                    found["energies"] = _energies(arrays, subject.px)
                return {"figures": [], **found, "measured_before": True}
        except (ValueError, OSError, KeyError, TypeError, zipfile.BadZipFile):
            print(f"{path} cannot be read: it is measured again", file=sys.stderr)
    return {**plain(TASKS[part].measure(subject)), **stamp(subject.run, **how)}


def _energies(path: Path, px: int) -> dict[str, Tensor]:
    """{network: [px px]}. ValueError, KeyError, OSError or BadZipFile for a file that does not hold that; nothing in it is executed."""
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        if max(member.file_size for member in file.zip.infolist()) > 4 * px * px + 4096:
            raise ValueError(f"{path} holds more than maps of {px} x {px}")
        energies = {which: torch.from_numpy(file[which]) for which in NETWORKS}
    if any(energy.shape != (px, px) for energy in energies.values()):
        raise ValueError(f"{path} holds no maps of {px} x {px}")
    return energies


def plain(value: Any) -> Any:
    """With numbers of six digits, and None for nan, which JSON lacks."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def keep(subject: Subject, part: str, result: dict[str, Any], drawn: list[str], folder: Path) -> None:
    """Writes the result, and the energies beside it, whole or not at all; not if it stands there as it is."""
    if result.pop("measured_before", False) and result["figures"] == drawn:
        return
    if (energies := result.get("energies")) is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{part}.npz"
        with (part_of := path.with_name(path.name + ".part")).open("wb") as file:
            np.savez_compressed(file, **{which: energy.numpy() for which, energy in energies.items()})
        part_of.replace(path)
    own = {key: value for key, value in result.items() if key != "energies"}
    write_result(subject.run, "locality", part, own | {"figures": drawn}, folder)


def draw(part: str, path: Path, results: dict[str, dict[str, Any]], sheet: Callable[[], Tensor]) -> list[str]:
    """[its name] once the figure of these runs is drawn, nothing without matplotlib, which is said."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if part == "similarity":
            figures.draw_similarity(path, results, sheet())
        else:
            figures.FIGURES[part](path, results)
    except ImportError:
        print(f"no {path.name}: matplotlib is missing, pip install -c constraints.txt -e '.[log]'")
        return []
    return [path.name]


def show(part: str, results: dict[str, dict[str, Any]]) -> None:
    """The part's table, of all runs one after the other."""
    first = next(iter(results.values()))
    columns, rows = ["run", *first["table"]["columns"]], [[name, *row] for name, of in results.items() for row in of["table"]["rows"]]
    cells = [columns] + [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{first['title']}")
    for line in cells:
        print("  ".join(f"{cell:<{w}}" if i < 2 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip())
    hidden = ("weights", "picture_set", "knn", "linear")
    shown = {key: value for key, value in first["protocol"].items() if not key.startswith(hidden)}
    print("protocol: " + ", ".join(f"{key} {value}" for key, value in shown.items()))


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def locality_main(argv: Sequence[str]) -> None:
    """`cossl locality`. Raises ValueError, OSError or ImportError for a user's mistake."""
    args = parse_flags(LocalityArgs, argv, "cossl locality", __doc__ or "")
    subjects = [Subject(run, data_of(run, args.data), args) for run in open_runs(args.runs, args.device)]
    if len({subject.data.resolve() for subject in subjects}) > 1:
        raise ValueError("these runs were trained on different pictures: give --data, on which to compare them")
    identity = functools.cache(lambda data, how: folder_set(data, how).identity)
    subjects = [subject._replace(pictures=identity(subject.data, subject.run.config.loader)) for subject in subjects]

    @functools.cache
    def sheet() -> Tensor:
        _, batches = subjects[0].sample("val", args.pictures, "the pictures of the sheet")
        return torch.cat([images.cpu() for images, _, _ in batches])

    for part in args.parts:
        results = {}
        for subject in subjects:
            folder = args.folder(subject)
            result = results[subject.name] = result_of(subject, part, folder, args.again)
            if not (result.get("measured_before") and result["figures"] and all((folder / name).exists() for name in result["figures"])):
                keep(subject, part, result, draw(part, folder / f"{part}.png", {subject.name: result}, sheet), folder)
        show(part, results)
        written = [args.folder(subject) / f"{part}.json" for subject in subjects]
        if len(subjects) > 1:
            files = dict(zip(results, written, strict=True))
            figure = compare(args.out or args.folder(subjects[0]), part, files, functools.partial(draw, part, results=results, sheet=sheet))
            written += [figure] if figure else []
        print("written: " + ", ".join(map(str, written)))
