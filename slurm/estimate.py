"""What a sweep will cost: GPU-hours from a benchmark of the same GPU, which is one measured number times the pictures to come."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cossl.slurm.folder import Point

RESULTS = Path(__file__).resolve().parent.parent / "tools" / "results"
# Training pictures of ILSVRC 2012, of its 100 classes that CMC chose (`cossl convert --classes imagenet100`), and so on.
PICTURES = {"in1k": 1_281_167, "in100": 126_689, "tiny": 100_000, "imagenette": 9_469, "demo": 2_400}


class Rate(NamedTuple):
    """Pictures a second of one GPU."""

    images_per_s: float | None
    source: str
    """Where the number is from, or why there is none."""
    config: dict[str, Any] | None = None
    """The flat config that it was measured with; None = it was given, for all."""


DECIDES = ("model.backbone", "model.receptive_field", "model.width", "model.small_image_stem", "model.joint_views", "views.")
"""What has to be as it was measured; heads and method, which cost little beside it, need not."""


def rate_of(gpu: str, given: float, file: Path | None) -> Rate:
    """What was given on the command line, else what a benchmark file says, else nothing and how to have it.

    Without a file the newest of tools/results whose name has the GPU's. ValueError if the file holds no such measurement.
    """
    if given:
        return Rate(given, "as given, not measured")
    files = [file] if file else sorted(RESULTS.glob(f"gpu-*{gpu.lower()}*.json"), key=lambda path: path.name[-15:]) if gpu else []
    if not files:
        what = f"no benchmark of a {gpu} in tools/results" if gpu else "the cluster's record names no gpu"
        return Rate(None, f"{what}: run `make gpu-report` on one, or give --images-per-s")
    best, config = _fastest(files[-1])
    return Rate(best, f"{files[-1].name}: step and loader on one GPU, measured with {config['model.local_head']} heads", config)


def _fastest(path: Path) -> tuple[float, dict[str, Any]]:
    """Images/s of our own step with the real loader, and the config that it had."""
    try:
        report = json.loads(path.read_text())
        steps = [part["result"] for part in report["parts"] if part["name"] == "step" and part["result"]] if "parts" in report else [report]
        rows = [(row["images_per_s"], step) for step in steps for row in step["rows"] if (row["name"], row["source"]) == ("ours", "loader")]
        best, step = max(rows, key=lambda row: row[0])
        return float(best), dict(step["settings"]["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no step of ours with a loader ({error}): give one of cossl bench step --json") from None


def _applies(rate: Rate, point: Point) -> bool:
    decisive = [key for key in point.config if key.startswith(DECIDES)]
    return rate.config is None or all(point.config[key] == rate.config.get(key) for key in decisive)


def pictures_of(point: Point) -> int | None:
    """Training pictures of a point: its manifest's, else those of the set that its preset is named after."""
    data = point.config.get("data")
    manifest = Path(str(data)) / "train.beton.json"
    if data and manifest.exists():
        try:
            return int(json.loads(manifest.read_text())["num_rows"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{manifest} is no manifest that can be read ({error}): see cossl verify") from None
    return next((count for name, count in PICTURES.items() if point.preset.startswith(name)), None)


def gpu_hours(point: Point, rate: Rate) -> float | None:
    """Of the training alone; None where the speed of such a network or the number of pictures is not known."""
    pictures = pictures_of(point)
    if rate.images_per_s is None or pictures is None or not _applies(rate, point):
        return None
    return point.config["epochs"] * pictures / rate.images_per_s / 3600


def table(points: Sequence[Point], states: Mapping[str, str], rate: Rate, gpus: int) -> Iterator[str]:
    """A line for each setting, one for all, and what the estimate rests on."""
    settings: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for point in points:
        settings[point.preset, point.name].append(point)
    width = max(len(name) for _, name in settings)
    yield f"{'preset':<16}{'setting':<{width}}  {'seeds':<12}{'epochs':>7}{'GPU-hours':>11}  state"
    for (preset, name), group in settings.items():
        hours = [gpu_hours(point, rate) for point in group]
        counts = Counter(states[point.identity] for point in group)
        seeds, state = ",".join(str(point.seed) for point in group), ", ".join(f"{n} {word}" for word, n in counts.items())
        yield f"{preset:<16}{name:<{width}}  {seeds:<12}{group[0].config['epochs']:>7}{_sum(hours):>11}  {state}"
    every = {point.identity: gpu_hours(point, rate) for point in points}
    waiting = [hours for identity, hours in every.items() if states[identity] != "done"]
    yield f"{len(points)} points, {_sum(list(every.values()))} GPU-hours; not done: {len(waiting)}, {_sum(waiting)} GPU-hours"
    yield (
        f"GPU-hours: {rate.source}"
        if rate.images_per_s is None
        else f"GPU-hours at {rate.images_per_s:,.0f} images/s a GPU ({rate.source})"
    )
    if gpus > 1:
        yield f"a point has {gpus} GPUs: its hours are a {gpus}th of that where the speed grows with their number"


def _sum(hours: Sequence[float | None]) -> str:
    known = [one for one in hours if one is not None]
    return f"{sum(known):,.1f}" if known and len(known) == len(hours) else "-"
