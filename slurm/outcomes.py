"""What came of the points of a sweep, from their run folders alone: no scheduler, no torch.

A number is taken only of a point whose run is finished and its own (see `folder.results_of`); any other point is missing, by its state.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cossl.slurm.folder import Point, Sweep, damage_of, results_of

DONE, MISSING, DAMAGED = "done", "missing", "damaged"
PROBES = {"linear_top1": "linear", "knn_top1": "20-NN"}
NETWORKS = {"": "trained", "untrained_": "untrained", "pixels_": "pixels"}
FOUND = (
    "linear_top1 knn_top1 untrained_linear_top1 untrained_knn_top1 pixels_linear_top1 pixels_knn_top1 images_per_s seconds collapsed std"
    " rank device hardware torch code_version protocol"
).split()
"""What a run tells: percent, pictures/s, seconds since its last start; the protocol as JSON."""


class Outcome(NamedTuple):
    """A point and what came of it."""

    point: Point
    run_dir: Path
    words: tuple[str, ...]
    """Its value on each axis."""
    state: str
    """DONE, or what the missing one is called."""
    found: dict[str, Any]
    """Each of FOUND, None where the run does not say; empty if it is missing."""
    damage: str = ""
    """Why its results.json, if it has one, is not believed."""


class Axis(NamedTuple):
    """A key of the config that differs among the points of a preset."""

    key: str
    label: str
    """The last part of the key, or all of it where that is not unique."""
    words: dict[str, str]
    """What each value is called, by its JSON: numbers by size, others in the order of the points."""


class Setting(NamedTuple):
    """The points of a preset that agree in all but the seed."""

    preset: str
    words: tuple[str, ...]
    """Its value on each axis."""
    outcomes: list[Outcome]
    most: int
    """Points of the preset's largest setting."""

    def numbers(self, name: str) -> list[float]:
        """What of FOUND its points tell, as far as they do."""
        return [value for outcome in self.outcomes if (value := outcome.found.get(name)) is not None]

    def mean(self, name: str) -> float | None:
        """None: no point has a number."""
        return statistics.fmean(numbers) if (numbers := self.numbers(name)) else None

    def spread(self, name: str) -> float | None:
        """Sample standard deviation (divided by n - 1); None of fewer than two numbers."""
        return statistics.stdev(numbers) if len(numbers := self.numbers(name)) > 1 else None

    @property
    def done(self) -> int:
        """Points that have results."""
        return sum(outcome.state == DONE for outcome in self.outcomes)

    @property
    def tally(self) -> str:
        """Empty if it has all the results that a setting of its preset can have, else "2 of 3"."""
        return "" if self.done == self.most else f"{self.done} of {len(self.outcomes)}"


class Collected(NamedTuple):
    """A sweep's outcomes, and what of them belongs together."""

    grid: str
    axes: list[Axis]
    outcomes: list[Outcome]
    """In the order of the sweep."""
    settings: list[Setting]
    """By preset in the order of the sweep, then by axis, the last one fastest."""

    @property
    def presets(self) -> list[str]:
        """In the order of the sweep."""
        return list(dict.fromkeys(setting.preset for setting in self.settings))

    def of(self, preset: str) -> list[Setting]:
        """The settings of that preset."""
        return [setting for setting in self.settings if setting.preset == preset]

    def name(self, words: Sequence[str]) -> str:
        """local_head mlp3, local_to_global 0.2"""
        return ", ".join(f"{axis.label} {word}" for axis, word in zip(self.axes, words, strict=True)) or self.grid


def collect(sweep: Sweep, states: Mapping[str, str] = {}) -> Collected:
    """What came of every point; `states`, by identity, say what one without results is called. ValueError if there are no points."""
    if not sweep.points:
        raise ValueError(f"{sweep.folder} has no points: submit the grid first, or give the folder of a sweep")
    axes, presets = _axes(sweep.points), list(dict.fromkeys(point.preset for point in sweep.points))
    outcomes = []
    for point in sweep.points:
        found, words = _found(sweep.run_dir(point), point), tuple(axis.words[_text(point, axis.key)] for axis in axes)
        said = states.get(point.identity, MISSING)
        damage = "" if found else damage_of(sweep.run_dir(point))
        state = DONE if found else said if said not in (DONE, "finished", MISSING) else DAMAGED if damage else MISSING
        outcomes.append(Outcome(point, sweep.run_dir(point), words, state, found, damage))
    groups: dict[tuple[str, tuple[str, ...]], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.point.preset, outcome.words), []).append(outcome)
    ranks = [{word: rank for rank, word in enumerate(axis.words.values())} for axis in axes]
    order = sorted(groups, key=lambda group: (presets.index(group[0]), *(r[word] for r, word in zip(ranks, group[1], strict=True))))
    most = {preset: max(len(of) for group, of in groups.items() if group[0] == preset) for preset in presets}
    return Collected(sweep.grid, axes, outcomes, [Setting(*group, groups[group], most[group[0]]) for group in order])


def _found(run_dir: Path, point: Point) -> dict[str, Any]:
    results = results_of(run_dir, point)
    if results is None or not all(0 <= results[probe]["trained"] <= 100 for probe in PROBES):
        return {}
    numbers = {f"{prefix}{probe}": results[probe].get(name) for prefix, name in NETWORKS.items() for probe in PROBES}
    numbers |= {name: results.get(name) for name in ("images_per_s", "seconds", "std", "rank")}
    kinds = {"collapsed": bool, "device": str, "torch": str, "protocol": dict}
    told = {name: value if isinstance(value := results.get(name), kind) else None for name, kind in kinds.items()}
    protocol = told["protocol"] and json.dumps(told["protocol"], sort_keys=True)
    return {name: _number(value) for name, value in numbers.items()} | told | {"protocol": protocol} | _starts(run_dir)


def _number(value: Any) -> Any:
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf") else None


def _starts(run_dir: Path) -> dict[str, str | None]:
    """Hardware of the run's last start and the code versions of all its starts; None where environment.json does not say."""
    version = hardware = None
    with contextlib.suppress(OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        starts = json.loads((run_dir / "environment.json").read_bytes())
        start = starts[-1]
        hardware = ", ".join(f"{n} x {gpu}" for gpu, n in Counter(start["gpus"]).items()) or start["cpu"]
        version = " then ".join(dict.fromkeys(one["code"]["version"] for one in starts))
    return {name: value if isinstance(value, str) else None for name, value in {"hardware": hardware, "code_version": version}.items()}


# ------------------------------------------------------------------------------------------------- what varies


def _axes(points: Sequence[Point]) -> list[Axis]:
    """Neither the seed nor, unless a seed would then count twice, the folder of the pictures is one."""
    presets: dict[str, list[Point]] = {}
    for point in points:
        presets.setdefault(point.preset, []).append(point)
    keys = dict.fromkeys(key for point in points for key in point.config if key not in ("seed", "data"))
    varied = [key for key in keys if any(len({_text(point, key) for point in of}) > 1 for of in presets.values())]
    seeds = Counter((point.preset, point.seed, *(_text(point, key) for key in varied)) for point in points)
    if max(seeds.values()) > 1:
        varied.insert(0, "data")
    last = {key: key.rpartition(".")[2] for key in varied}
    labels = {key: name if list(last.values()).count(name) == 1 else key for key, name in last.items()}
    return [Axis(key, label, _words([_text(point, key) for point in points])) for key, label in labels.items()]


def _text(point: Point, key: str) -> str:
    return json.dumps(point.config[key], sort_keys=True) if key in point.config else '"(absent)"'


def _words(texts: Iterable[str]) -> dict[str, str]:
    values = {text: json.loads(text) for text in dict.fromkeys(texts)}
    if all(_number(value) is not None for value in values.values()):
        values = dict(sorted(values.items(), key=lambda item: item[1]))
    words = {text: _word(value) for text, value in values.items()}
    return words if len(set(words.values())) == len(words) else {text: text for text in words}


def _word(value: Any) -> str:
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    if isinstance(value, list):
        return " ".join(map(_word, value))
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
