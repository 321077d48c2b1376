"""A run opened for evaluation: its network, its pictures, and where results go."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from tqdm import tqdm

from cossl.models import load as loading
from cossl.models.flags import flatten, read_object, replace_text, unflatten
from cossl.models.launch import choose_device, say
from cossl.models.run_folder import code_version, versions
from cossl.pipelines import find_split, make_loader
from cossl.pipelines.augment import normalize
from cossl.pipelines.batch import Loader, LoaderSpec
from cossl.pipelines.demo_set import demo_data
from cossl.pipelines.views import evaluation
from cossl.train import EVAL_BATCH, PRESETS, RESUME_MAY_CHANGE, Config

Pictures = tuple[UInt8[Tensor, "b 3 s s"], Float[Tensor, "b 3 s s"], Int[Tensor, " b"]]


class Opened(NamedTuple):
    """A run that can be asked."""

    run_dir: Path
    preset: str
    config: Config
    encoder: loading.Encoder
    """Frozen, in eval mode, on the device."""
    device: torch.device
    weights: str
    """`digest` of the encoder."""

    @property
    def checkpoint(self) -> str:
        """Name of the file that the encoder was read from."""
        return self.encoder.source.partition(",")[0]


def open_run(run_dir: Path, device: str = "auto", checkpoint: str = "") -> Opened:
    """The run in a folder, as its newest whole checkpoint has it, or one of its others (`epoch-0010.pt`).

    ValueError of one line for a folder that holds no run, a damaged file, or a config of another version.
    """
    try:
        flat = read_object(run_dir / "config.json")
        preset = flat.pop("preset", None)
        if preset not in list(PRESETS):  # in a dict a list could not be looked up
            raise ValueError(f"preset {preset!r:.80} is unknown")
        config = unflatten(Config, flat)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{run_dir} is no run's folder of this version: its config.json is missing or damaged ({why})") from None
    where = choose_device(device)
    encoder = loading.load(run_dir / checkpoint if checkpoint else run_dir, where)
    if ", as " in encoder.source:
        say(f"{run_dir}: {encoder.source}", sys.stderr)
    ours, theirs = flatten(config), flatten(unflatten(Config, encoder.config))
    if changed := [key for key in ours if ours[key] != theirs[key] and key not in RESUME_MAY_CHANGE]:
        said = f"--{changed[0].replace('_', '-')} {ours[changed[0]]!r:.80}, its checkpoint {theirs[changed[0]]!r:.80}"
        raise ValueError(f"{run_dir}: config.json says {said}: one of them is damaged, or of another run")
    return Opened(run_dir, preset, config, encoder, where, encoder.digest())


def data_of(run: Opened, data: Path | None) -> Path:
    """The pictures asked for, else those that the run was trained on. ValueError if they are not there any more."""
    found = data or run.config.data or (demo_data() if run.preset == "demo" else None)
    if found is None or not found.exists():
        raise ValueError(f"{run.run_dir} was trained on {found or 'random pixels'}, which is not here: give --data")
    return found


def open_split(
    run: Opened,
    data: Path,
    split: str,
    px: int = 0,
    workers: int = 0,
    centre_frac: float = 224 / 256,
    subset: Int[np.ndarray, " n"] | None = None,
) -> Loader:
    """A split, or a subset of it, in order, the central square resized to px (0 = the run's --eval-px), as in training's own evaluation."""
    how = run.config.loader
    backend = "auto" if how.backend == "synthetic" else how.backend
    views = evaluation(px or run.config.eval_px, centre_frac)
    spec = LoaderSpec(views, EVAL_BATCH, workers=workers or how.workers, shuffle=False, subset=subset)
    return make_loader(backend, find_split(data, split, backend), spec)


def pictures(loader: Loader, device: torch.device, what: str) -> Iterator[Pictures]:
    """(pictures, the same normalized, labels) of every batch, on the device, with a bar."""
    for batch in tqdm(loader.epoch(0), total=len(loader), desc=what, disable=not sys.stderr.isatty(), leave=False):
        (images,) = (view.to(device) for view in batch.split())
        yield images, normalize(images), batch.label.to(device)


def stamp(run: Opened, **protocol: Any) -> dict[str, Any]:
    """What a result is worth nothing without: protocol, run, code and library versions, when."""
    code = {"code_version": code_version(), "versions": versions("numpy", "torch"), "device": str(run.device)}
    return {"protocol": protocol, "run": run.run_dir.name, "time": datetime.now().astimezone().isoformat(timespec="seconds"), **code}


def write_result(run: Opened, folder: str, name: str, result: dict[str, Any], out: Path | None = None) -> Path:
    """Writes `<run>/<folder>/<name>.json` (or `<out>/<name>.json`), whole or not at all, and returns its path.

    A report shows any result that has `title`, `table` ({"columns": [...], "rows": [[...]]}), `figures` (names of PNG files beside it) and
    what `stamp` gives; what else is in it is its own affair.
    """
    path = (out or run.run_dir / folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(result, indent=1))
    return path


def open_runs(run_dirs: Sequence[Path], device: str = "auto") -> list[Opened]:
    """Several, of which each has another name. ValueError otherwise: a figure could not tell them apart."""
    names = [path.resolve().name for path in run_dirs]
    if len(set(names)) < len(names):
        raise ValueError(f"two runs are called {max(names, key=names.count)}: rename a folder, or give them one at a time")
    return [open_run(path, device)._replace(run_dir=path.resolve()) for path in run_dirs]
