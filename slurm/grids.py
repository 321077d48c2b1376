"""Which runs an ablation is made of. A grid is a generator of (name, config, seed) from a base config and seeds.

`GRIDS` holds those of the project. A grid of one's own needs no code, only a TOML file in the place of its name:

    presets = ["in1k"]
    seeds = [0, 1, 2]
    [base]                                  # flags of every point
    "optim.base_lr" = 0.3
    [product]                               # every combination of these
    "model.local_head" = ["conv1x1", "mlp3"]
    [zip]                                   # and with each of them, these side by side
    "batch_size" = [2048, 4096]
    "optim.warmup_epochs" = [5, 10]
    [[list]]                                # and these, one after the other
    "loss.local_weight" = 0.5
    [[exclude]]                             # but none that has all of these
    "model.local_head" = "mlp3"
    "batch_size" = 2048
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cossl.models.flags import config_hash, flatten
from cossl.models.rf_resnet import reachable_fields
from cossl.slurm.clusters import read_toml
from cossl.slurm.folder import Point
from cossl.train import PRESETS, RESUME_MAY_CHANGE, Config, parse

Changes = dict[str, Any]
"""{"model.local_head": "mlp3"}: fields of a config by their place, and their values."""
Grid = Callable[[Config, Sequence[int]], Iterator[tuple[str, Config, int]]]

# ------------------------------------------------------------------------------------------------- how grids are put together


def product(axes: Mapping[str, Sequence[Any]]) -> list[Changes]:
    """Every combination, the last axis running fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def zipped(axes: Mapping[str, Sequence[Any]]) -> list[Changes]:
    """The first values of all axes, then the second ones, ... ValueError if they are not equally many."""
    if len({len(values) for values in axes.values()}) > 1:
        raise ValueError(f"zip: expected equally many values, not {', '.join(f'{len(v)} of {k}' for k, v in axes.items())}")
    return [dict(zip(axes, values, strict=True)) for values in zip(*axes.values(), strict=True)]


def excluding(settings: Iterable[Changes], excluded: Iterable[Changes]) -> list[Changes]:
    """Those settings that agree with none of the excluded ones in all that it names."""
    return [one for one in settings if not any(out and all(one.get(k) == v for k, v in out.items()) for out in excluded)]


def expand(base: Config, seeds: Sequence[int], settings: Iterable[Changes]) -> Iterator[tuple[str, Config, int]]:
    """Each setting with each seed; what it changes is its name, and `base` that of a setting that changes nothing."""
    for changes in settings:
        if "seed" in changes:
            raise ValueError("seed is no flag of a grid: give the seeds themselves, --seeds 0 1 2 or seeds = [0, 1, 2]")
        name = ", ".join(f"{key.rpartition('.')[2]} {_word(value)}" for key, value in changes.items()) or "base"
        for seed in seeds:
            yield name, changed(base, {**changes, "seed": seed}), seed


def changed(config: Any, changes: Changes) -> Any:
    """The config with other values in some places. ValueError for a place that there is not, or values that are impossible together."""
    names = {f.name: dataclasses.is_dataclass(getattr(config, f.name)) for f in dataclasses.fields(config)}
    parts: dict[str, dict[str, Any]] = {}
    for place, value in changes.items():
        name, _, rest = place.partition(".")
        if names.get(name) != bool(rest):
            near = difflib.get_close_matches(name, names, 1)
            raise ValueError(
                f"unknown flag {place!r} in a grid: " + (f"did you mean {near[0]}?" if near else "see cossl train in1k --help")
            )
        parts.setdefault(name, {})[rest] = value
    sections = {name: changed(getattr(config, name), part) if names[name] else part[""] for name, part in parts.items()}
    return dataclasses.replace(config, **sections)


# ------------------------------------------------------------------------------------------------- the project's own

LOCAL_HEADS = ("conv1x1", "mlp2", "mlp3", "conv1x1_deep")
WEIGHTS = (0.2, 0.5, 0.8)


def heads(base: Config, seeds: Sequence[int]) -> Iterator[tuple[str, Config, int]]:
    """Architecture of the local projection heads: the paper's 1x1 convolutions against MLPs of 2 and 3 layers and a deeper network."""
    yield from expand(base, seeds, product({"model.local_head": LOCAL_HEADS}))


def weighting(base: Config, seeds: Sequence[int]) -> Iterator[tuple[str, Config, int]]:
    """Local-to-global against global-to-local: 0.2/0.8, 0.5/0.5, 0.8/0.2."""
    yield from expand(base, seeds, product({"loss.local_to_global": WEIGHTS}))


def ablation_plan(base: Config, seeds: Sequence[int]) -> Iterator[tuple[str, Config, int]]:
    """Both of these crossed, so that each is seen under every value of the other."""
    yield from expand(base, seeds, product({"model.local_head": LOCAL_HEADS, "loss.local_to_global": WEIGHTS}))


def backbone(base: Config, seeds: Sequence[int]) -> Iterator[tuple[str, Config, int]]:
    """The network of bounded receptive field against torchvision's, which has no MLP after pooling; with and without the local loss."""
    plain: Changes = {"model.backbone": base.model.backbone.removeprefix("rf_"), "model.receptive_field": None, "model.mlp_after_pool": 0}
    weights = {"loss.local_weight": (0.0, base.loss.local_weight)}
    yield from expand(base, seeds, [one | weight for one in ({}, plain) for weight in product(weights)])


def receptive_field(base: Config, seeds: Sequence[int]) -> Iterator[tuple[str, Config, int]]:
    """Every other receptive field that the backbone can have, its present one among them."""
    fields = reachable_fields(base.model.backbone) if base.model.backbone.startswith(("rf_", "bagnet")) else []
    if base.model.receptive_field not in fields:
        raise ValueError(f"grid receptive_field: the receptive field of {base.model.backbone} is no argument; use an rf_* backbone")
    first = fields.index(base.model.receptive_field) % 2
    yield from expand(base, seeds, product({"model.receptive_field": fields[first::2]}))


def local_weight(base: Config, seeds: Sequence[int]) -> Iterator[tuple[str, Config, int]]:
    """The share w_s of the local loss, 0 (the plain method) to 0.5."""
    yield from expand(base, seeds, product({"loss.local_weight": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)}))


def positions(base: Config, seeds: Sequence[int]) -> Iterator[tuple[str, Config, int]]:
    """Number of co-occurrences: 1, 4, 16 positions of each view at random, and all of them."""
    some = [{"positions.strategy": "uniform", "positions.count": count} for count in (1, 4, 16)]
    yield from expand(base, seeds, [*some, {"positions.strategy": "all"}])


def crop_size(base: Config, seeds: Sequence[int]) -> Iterator[tuple[str, Config, int]]:
    """Smallest share of the picture's area that a view may show."""
    yield from expand(base, seeds, product({"views.crop_min": (0.05, 0.08, 0.14, 0.2, 0.3, 0.4)}))


GRIDS: dict[str, tuple[Grid, tuple[str, ...]]] = {  # name: the grid, and its presets unless others are asked for
    "heads": (heads, ("in1k",)),
    "weighting": (weighting, ("in1k",)),
    "ablation_plan": (ablation_plan, ("in1k", "in100")),
    "backbone": (backbone, ("in100",)),
    "receptive_field": (receptive_field, ("in100",)),
    "local_weight": (local_weight, ("in100",)),
    "positions": (positions, ("in100",)),
    "crop_size": (crop_size, ("in100",)),
}
SEEDS = (0, 1, 2)

# ------------------------------------------------------------------------------------------------- points

IDENTITY_IGNORES = set(RESUME_MAY_CHANGE) - {"data", "eval_px"}  # a path is the best name that a set of pictures has
OF_THE_SWEEP = {"run_dir": "is the point's", "resume": "is always on", "lock_wait_s": "is the job's", "seed": "comes from --seeds"}
_DEFAULTS = flatten(Config())


def points(grid: str, presets: Sequence[str], seeds: Sequence[int], data: Sequence[str], flags: Sequence[str]) -> list[Point]:
    """The points of a grid by name or TOML file, on each preset; `flags` are those of `cossl train` for every point.

    `presets` and `seeds` empty: the grid's own. `data`: a folder of pictures for all, or in1k=/data/in1k for each preset. ValueError for
    what cannot be, and for a grid that has the same point twice.
    """
    make, own_presets, own_seeds, own_flags = _read_grid(grid)
    found = []
    for preset in presets or own_presets:
        _, base = parse([preset, *own_flags, *flags, *_data_flags(preset, presets or own_presets, data)])
        for flag, why in OF_THE_SWEEP.items():
            if flatten(base)[flag] != _DEFAULTS[flag]:
                raise ValueError(f"--{flag.replace('_', '-')} {why} in a sweep: leave it out")
        if base.data is not None:
            base = dataclasses.replace(base, data=Path(os.path.normpath(base.data.absolute())))
        found += [_point(name, preset, config, seed) for name, config, seed in make(base, seeds or own_seeds)]
    twice = [a.name for a, b in itertools.pairwise(sorted(found, key=lambda p: p.identity)) if a.identity == b.identity]
    if twice:
        raise ValueError(f"grid {grid} has the point {twice[0]!r} twice: leave one out")
    return found


def _data_flags(preset: str, presets: Sequence[str], data: Sequence[str]) -> list[str]:
    named = dict(word.split("=", 1) for word in data if "=" in word and word.partition("=")[0] in PRESETS)
    strange = sorted(set(named) - set(presets))
    if strange or len(named) + 1 < len(data) or (named and len(named) < len(data)):
        raise ValueError(f"--data {' '.join(data)}: expected one folder, or <preset>=<folder> for each of {', '.join(presets)}")
    folder = named.get(preset) or (None if named else next(iter(data), None))
    return ["--data", folder] if folder else []


def _point(name: str, preset: str, config: Config, seed: int) -> Point:
    counts = {key: value for key, value in flatten(config).items() if key not in IDENTITY_IGNORES}
    counts, start = json.loads(json.dumps(counts)), json.loads(json.dumps(flatten(PRESETS[preset]())))
    described = {key: value for key, value in counts.items() if value != start[key] and key not in ("data", "seed")}
    words = "-".join(f"{key.rpartition('.')[2]}_{value}" for key, value in described.items())
    identity = config_hash({"preset": preset, **counts})
    run = re.sub(r"[^\w.=-]+", "_", f"{preset}-{words}")[:80].rstrip("-_") + f"-seed{seed}-{identity[:8]}"
    return Point(name, preset, seed, identity, run, flags_of(preset, config), counts)


def flags_of(preset: str, config: Config) -> list[str]:
    """The flags that make the config from its preset: `parse([preset, *flags])` gives it back."""
    flat, start = flatten(config), flatten(PRESETS[preset]())
    return [word for key, value in flat.items() if value != start[key] for word in _flag(key, value)]


def _flag(key: str, value: Any) -> list[str]:
    section, _, name = key.replace("_", "-").rpartition(".")
    prefix = f"--{section}." if section else "--"
    if isinstance(value, bool) and isinstance(_DEFAULTS.get(key), bool):  # not what may also be None: that takes True and False
        return [f"{prefix}{'' if value else 'no-'}{name}"]
    return [prefix + name, *([str(one) for one in value] if isinstance(value, list | tuple) else [str(value)])]


def _word(value: Any) -> str:
    """Short, and another one for another value: settings with one name would be taken for seeds of one setting."""
    return "none" if value is None else f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


# ------------------------------------------------------------------------------------------------- from a file


def _read_grid(grid: str) -> tuple[Grid, Sequence[str], Sequence[int], list[str]]:
    if grid in GRIDS:
        return *GRIDS[grid], SEEDS, []
    if not grid.endswith(".toml"):
        near = difflib.get_close_matches(grid, GRIDS, 1)
        raise ValueError(
            f"unknown grid {grid!r}: " + (f"did you mean {near[0]}?" if near else f"expected one of {', '.join(GRIDS)}, or a TOML file")
        )
    return _grid_of_file(Path(grid))


def _grid_of_file(path: Path) -> tuple[Grid, Sequence[str], Sequence[int], list[str]]:
    table = read_toml(path)
    shapes = {"presets": list, "seeds": list, "base": dict, "product": dict, "zip": dict, "list": list, "exclude": list}
    for key, value in table.items():
        if key not in shapes or not isinstance(value, shapes[key]):
            raise ValueError(f"{path}: {key!r} is unknown or of the wrong kind: expected {', '.join(shapes)}, see cossl sweep --help")
    presets, seeds = table.get("presets", ["in1k"]), table.get("seeds", SEEDS)
    if not presets or not all(isinstance(preset, str) and preset in PRESETS for preset in presets):
        raise ValueError(f"{path}: expected presets to be a list of some of {', '.join(PRESETS)}")
    if not seeds or not all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds):
        raise ValueError(f"{path}: expected seeds to be a list of whole numbers, 0 or more")
    if not all(isinstance(changes, dict) for changes in [*table.get("list", []), *table.get("exclude", [])]):
        raise ValueError(f"{path}: expected [[list]] and [[exclude]] to be tables of flags")
    try:
        base_flags = [word for key, value in _flat(table.get("base", {})).items() for word in _flag(key, value)]
        typed = [_typed([presets[0], *base_flags], changes) for changes in _settings(table)]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return lambda base, seeds: expand(base, seeds, typed), presets, seeds, base_flags


def _settings(table: Mapping[str, Any]) -> list[Changes]:
    """What a file's product, zip, list and exclude make together; one setting without changes where it has none of the first three."""
    shapes = {key: _flat(table.get(key, {})) for key in ("product", "zip")}
    axes = shapes["product"] | shapes["zip"]
    twice = shapes["product"].keys() & shapes["zip"].keys()
    if twice or not all(isinstance(values, list) for values in axes.values()):
        raise ValueError("expected a list of values for each flag of product and zip, and no flag in both")
    side_by_side = zipped(shapes["zip"]) if shapes["zip"] else [{}]
    crossed = [a | b for a in product(shapes["product"]) for b in side_by_side] if axes else []
    listed, excluded = ([_flat(changes) for changes in table.get(key, [])] for key in ("list", "exclude"))
    for key in (key for changes in excluded for key in changes):
        if not any(key in changes for changes in [*crossed, *listed]):
            raise ValueError(f"exclude names {key!r}, which no setting has: expected flags of product, zip and list")
    found = excluding([*crossed, *listed], excluded)
    if not found and {"product", "zip", "list"} & table.keys():
        raise ValueError("no setting is left: product, zip and list are empty, or exclude takes all")
    return found or [{}]


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model.local_head": ...}, also of `model.local_head = ...` without quotes, a table in a table to TOML, and of `model.local-head`."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        place = prefix + key.replace("-", "_")
        flat |= _flat(value, f"{place}.") if isinstance(value, dict) else {place: value}
    return flat


def _typed(base: Sequence[str], changes: Changes) -> Changes:
    """The values as the command line reads them, so that a wrong one is told in its words."""
    flat = flatten(parse([*base, *(word for key, value in changes.items() for word in _flag(key, value))])[1])
    return {key: flat[key] for key in changes}
