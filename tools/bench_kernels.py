"""Costs of the small steps beside decoding: geometry, position sampling and photometric augmentation."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch

from cossl.pipelines.augment import augment
from cossl.pipelines.geometry import box_fractions, sample_views
from cossl.pipelines.positions import STRATEGIES, PositionSpec, sample_positions
from cossl.pipelines.views import byol
from cossl.tools.bench import installed, spread

PICTURES, TURNS = 1024, 7
POSITIONS_GOAL_US = 20.0  # per picture, two views
# The position grid of RF99-ResNet50 on a 224-px view, as `position_grid` gives it.
SIZE, STRIDE_PX, FIELD_PX, OFFSET_PX, VIEW_PX = 7, 32, 99, 0.5, 224


class Kernel(NamedTuple):
    """One cost; `value` is None where it could not be measured, and `note` says why."""

    name: str
    value: float | None
    unit: str
    n: int = TURNS
    low: float | None = None
    high: float | None = None
    goal: float | None = None
    note: str = ""

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.name:<26}{self.note}"
        goal = f", goal under {self.goal:g}: {'met' if self.value < self.goal else 'not met'}" if self.goal is not None else ""
        return f"{self.name:<26}{self.value:>9.3f} {self.unit} (from {self.low:.3f} to {self.high:.3f}{goal}){' ' + self.note}".rstrip()


def _in_turns(steps: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each step in each turn, after one call to warm up: of CPU time over all threads, or with a GPU until its work is done."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(TURNS):
        for name, step in steps.items():
            _wait()
            began = clock()
            step()
            _wait()
            seconds[name].append(clock() - began)
    return seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _kernel(name: str, seconds: list[float], scale: float, unit: str, goal: float | None = None, note: str = "") -> Kernel:
    value, low, high = spread([scale * s for s in seconds])
    return Kernel(name, round(value, 4), unit, len(seconds), round(low, 4), round(high, 4), goal, note)


def sampling() -> list[Kernel]:
    """Microseconds per picture, two views, one thread: the views' geometry, and 49 positions of each strategy on a 7 x 7 map."""
    index, rows = np.arange(PICTURES), np.stack([view.row() for view in byol(VIEW_PX)])
    heights, widths = np.full(PICTURES, 375), np.full(PICTURES, 500)
    boxes, flips, _ = sample_views(0, 0, index, heights, widths, rows)
    fractions = box_fractions(boxes, heights, widths)
    steps: dict[str, Callable[[], object]] = {"geometry": lambda: sample_views(0, 0, index, heights, widths, rows)}
    for strategy in STRATEGIES:
        spec = PositionSpec(strategy, SIZE**2, SIZE, STRIDE_PX, FIELD_PX, OFFSET_PX, VIEW_PX)  # type: ignore[arg-type]
        steps[f"positions-{strategy}"] = lambda spec=spec: sample_positions((spec,), (VIEW_PX,) * 2, 0, 0, index, fractions, flips)  # type: ignore[misc]
    timed = _in_turns(steps)
    goals = {name: POSITIONS_GOAL_US if name.startswith("positions") else None for name in steps}
    return [_kernel(name, seconds, 1e6 / PICTURES, "us per picture", goals[name]) for name, seconds in timed.items()]


def _kornia(views: torch.Tensor) -> Callable[[], object]:
    """The same recipe by kornia, as stable-pretraining and others run it."""
    kornia: Any = import_module("kornia.augmentation")
    sequence = kornia.AugmentationSequential(
        kornia.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
        kornia.RandomGrayscale(p=0.2),
        kornia.RandomGaussianBlur((23, 23), (0.1, 2.0), p=1.0),
        kornia.RandomSolarize(p=0.0),
        kornia.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        data_keys=["input"],
    )
    return lambda: sequence(views.float() / 255)


def augmentation() -> list[Kernel]:
    """Milliseconds per 224-px view of BYOL's first view (always blurred) on the device at hand, and kornia's beside it."""
    cuda = torch.cuda.is_available()
    device, count = torch.device("cuda" if cuda else "cpu"), 256 if cuda else 16
    index, row = np.arange(count), np.stack([byol(VIEW_PX)[0].row()])
    photometry = torch.from_numpy(sample_views(0, 0, index, index * 0 + 375, index * 0 + 500, row)[2][:, 0]).to(device)
    random = torch.Generator().manual_seed(0)
    views = torch.randint(0, 256, (count, VIEW_PX, VIEW_PX, 3), dtype=torch.uint8, generator=random).to(device).permute(0, 3, 1, 2)
    steps: dict[str, Callable[[], object]] = {"augment": lambda: augment(views, photometry)}
    if installed("kornia"):
        steps["augment-kornia"] = _kornia(views)
    where = f"on {torch.cuda.get_device_name()}" if cuda else "of CPU time"
    done = [_kernel(name, seconds, 1e3 / count, "ms per view", note=where) for name, seconds in _in_turns(steps).items()]
    if not installed("kornia"):
        done.append(Kernel("augment-kornia", None, "ms per view", 0, note="missing: pip install kornia"))
    return done


def measure_kernels() -> list[Kernel]:
    return sampling() + augmentation()
