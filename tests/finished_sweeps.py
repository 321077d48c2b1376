"""Sweeps by hand, and runs in them as the trainer leaves them, that several tests share."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from cossl.models.flags import sealed
from cossl.slurm.collect import Collected, as_csv, collect
from cossl.slurm.folder import Point, Sweep

PROTOCOL = {"knn_k": 20, "linear_l2_strengths": [1e-4, 1.0], "eval_px": 72, "features": "pooled, eval mode"}
HEADS, WEIGHTS = ("conv1x1", "mlp2", "mlp3", "conv1x1_deep"), (0.2, 0.5, 0.8)
CROSSED = [{"model.local_head": head, "loss.local_to_global": weight} for head in HEADS for weight in WEIGHTS]


def point(changes: dict[str, Any], seed: int = 0, preset: str = "demo") -> Point:
    config = {"data": f"/data/{preset}", "epochs": 8, "seed": seed, "model.local_head": "conv1x1", "loss.local_to_global": 0.5} | changes
    name = ", ".join(f"{key} {value}" for key, value in changes.items())
    run = re.sub(r"\W", "_", f"{preset} {name} {seed} {config['data']}")
    return Point(name, preset, seed, f"id of {run}", run, [], config)


def results(top: float = 50.0, knn: float = 40.0, **more: Any) -> dict[str, Any]:
    tops = {
        "linear_top1": {"trained": top, "untrained": 20.5, "pixels": 15.25},
        "knn_top1": {"trained": knn, "untrained": 14.0, "pixels": 13},
    }
    rest = {"images_per_s": 88.5, "protocol": PROTOCOL, "seconds": 170.2, "torch": "2.11.0", "device": "cpu", "std": 0.9, "rank": 30.0}
    return tops | rest | {"collapsed": False} | more


def finish(sweep: Sweep, one: Point, found: Any, version: str = "0.1.0+gabc") -> Path:
    """The run folder as the trainer leaves it; `found` is what results.json says, or its bytes."""
    folder = sweep.run_dir(one)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"preset": one.preset, "run_dir": str(folder)} | one.config))
    starts = [{"cpu": "old", "gpus": [], "code": {"version": version}}, {"cpu": "Xeon", "gpus": [], "code": {"version": version}}]
    (folder / "environment.json").write_text(json.dumps(starts))
    (folder / "results.json").write_bytes(found if isinstance(found, bytes) else json.dumps(sealed(found)).encode())
    return folder


def sweep_of(tmp_path: Path, *points: Point, grid: str = "heads") -> Sweep:
    return Sweep(tmp_path / "sweeps" / grid, list(points), [])


NASTY = ("a|b", "_x_", "100%", "a & b", "&amp;", "$5 and $6", "#1", "{}", "\\", "~^", "*[2pt]", "<b>", "--x", 'say "a", b', "two\nlines")


def crossed_sweep(tmp_path: Path) -> Collected:
    """Heads by weights by two seeds on two presets; no run of mlp3 0.5, one of mlp2 0.8."""
    points = [point(changes, seed, preset) for preset in ("in1k", "in100") for changes in CROSSED for seed in (0, 1)]
    sweep = sweep_of(tmp_path, *points, grid="ablation_plan")
    for i, one in enumerate(points):
        head, weight = one.config["model.local_head"], one.config["loss.local_to_global"]
        if (head, weight) != ("mlp3", 0.5) and (head, weight, one.seed) != ("mlp2", 0.8, 1):
            finish(sweep, one, results(40 + i % 24, images_per_s=2000.0 + HEADS.index(head)))
    return collect(sweep, {one.identity: "failed" for one in points})


def nasty_sweep(tmp_path: Path) -> Collected:
    """Settings called by NASTY, on two presets and of a grid that are called no better."""
    points = [point({"model.local_head": name}, 0, preset) for preset in ("p_1", "p&|2") for name in NASTY]
    sweep = sweep_of(tmp_path, *points, grid="g_%|{")
    for i, one in enumerate(points):
        one = one._replace(run=f"run{i}")
        points[i] = one
        finish(sweep, one, results(device="a_b|c%"))
    return collect(sweep._replace(points=points))


def rows_of(collected: Collected) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(as_csv(collected))))


def cells(markdown: str, *names: str) -> list[str]:
    """The cells of the first row of this name."""
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in markdown.splitlines() if line.startswith("| ")]
    return next(row[len(names) :] for row in rows if row[: len(names)] == list(names))
