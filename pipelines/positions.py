"""Spatial co-occurrence sampling: which feature-map positions of each view take part in the local loss.

A position is row * n + column of the n x n feature map. It looks at a square of `receptive_field_px` around its centre
`offset_px + stride_px * (column, row)`, in pixels of the view; the crop box and the flip carry it to the source picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from cossl.pipelines.geometry import POSITIONS, stream, uniform
from cossl.pipelines.simd import compiled

Strategy = Literal["all", "uniform", "grid", "overlap", "disjoint"]
STRATEGIES: dict[str, int] = {"all": 0, "uniform": 1, "grid": 2, "overlap": 3, "disjoint": 4}
_ALL, _UNIFORM, _GRID, _OVERLAP, _DISJOINT = STRATEGIES.values()


@dataclass(frozen=True)
class PositionSpec:
    """A strategy, how many positions per view, and the model's position grid in plain numbers.

    all: every position. uniform: `count` different ones at random. grid: `count` = m * m ones, evenly spaced over the map
    from a random start. overlap: `count` at random among those whose centre lies in another view's crop. disjoint: among
    those whose receptive field, as far as it lies in the view, shares no area with any other crop: what they see
    only occurs together with the other view. Where fewer qualify the rest is -1, and the loss leaves them out.
    """

    strategy: Strategy
    count: int
    size: int
    stride_px: float
    receptive_field_px: float
    offset_px: float
    view_px: int

    def __post_init__(self) -> None:
        side = math.isqrt(max(self.count, 0))
        if self.strategy not in STRATEGIES:
            raise ValueError(f"unknown position strategy {self.strategy!r}: expected one of {', '.join(STRATEGIES)}")
        if not 1 <= self.count <= self.size**2:
            raise ValueError(f"{self.count} positions asked for, but the {self.size} x {self.size} map has 1 to {self.size**2}")
        if self.strategy == "all" and self.count != self.size**2:
            raise ValueError(
                f"strategy 'all' takes all {self.size**2} positions, not {self.count}: leave the count at 0, or choose 'uniform'"
            )
        if self.strategy == "grid" and self.count != side**2:
            raise ValueError(f"strategy 'grid' takes a square number of positions, not {self.count}: try {side**2} or {(side + 1) ** 2}")


@dataclass(frozen=True)
class PositionsConfig:
    """Which feature-map positions take part in the local loss."""

    strategy: Strategy = "all"
    """all, uniform (at random), grid (evenly spaced), overlap (their centre lies in another view's crop), or disjoint
    (their receptive field shares nothing with any other view's crop)."""
    count: int = 0
    """Positions per view; 0 means all of the n x n map. Small views give as many as they have."""

    def spec(self, size: int, stride_px: float, receptive_field_px: float, offset_px: float, view_px: int, small: bool) -> PositionSpec:
        """The same for the views of one size, whose position grid this is."""
        count = min(self.count, size**2) if small and self.count else self.count or size**2
        return PositionSpec(self.strategy, count, size, stride_px, receptive_field_px, offset_px, view_px)


@compiled
def _source_point(x: float, y: float, box: np.ndarray, flip: bool) -> tuple[float, float]:
    if flip:
        x = 1.0 - x
    return box[0] + x * (box[2] - box[0]), box[1] + y * (box[3] - box[1])


@compiled
def _clipped(x: float) -> float:
    return min(max(x, 0.0), 1.0)


@compiled
def _qualifies(strategy: int, x: float, y: float, reach: float, boxes: np.ndarray, view: int, flip: bool) -> bool:
    """Whether the position at (x, y) that sees `reach` to each side, both as fractions of the view, may be drawn."""
    centre_x, centre_y = _source_point(x, y, boxes[view], flip)
    x_1, top = _source_point(_clipped(x - reach), _clipped(y - reach), boxes[view], flip)
    x_2, bottom = _source_point(_clipped(x + reach), _clipped(y + reach), boxes[view], flip)
    left, right = min(x_1, x_2), max(x_1, x_2)
    inside = touches = False
    for other in range(boxes.shape[0]):
        if other != view:
            box = boxes[other]
            inside |= box[0] <= centre_x < box[2] and box[1] <= centre_y < box[3]
            touches |= left < box[2] and box[0] < right and top < box[3] and box[1] < bottom
    return inside if strategy == _OVERLAP else not touches


@compiled
def _sample(strategy, size, stride, offset, reach, seed, epoch, index, boxes, flips, views, count, out):  # type: ignore[no-untyped-def]
    candidates = np.empty(size * size, np.int64)
    side = int(round(math.sqrt(count)))
    for b in range(boxes.shape[0]):
        for v in views:
            key = stream(seed, epoch, index[b], v, POSITIONS)
            if strategy == _GRID:
                shift_x, shift_y = uniform(key, 0, 0, 1), uniform(key, 1, 0, 1)
                for slot in range(count):
                    row, column = int((slot // side + shift_y) * size / side), int((slot % side + shift_x) * size / side)
                    out[b, v, slot] = min(row, size - 1) * size + min(column, size - 1)  # 6 + (1 - 2**-53) rounds to 7
                continue
            found = 0
            for position in range(size * size):
                x, y = offset + stride * (position % size), offset + stride * (position // size)
                if strategy <= _UNIFORM or _qualifies(strategy, x, y, reach, boxes[b], v, flips[b, v]):
                    candidates[found] = position
                    found += 1
            for slot in range(count):
                if slot >= found:
                    out[b, v, slot] = -1
                    continue
                if strategy != _ALL:  # Fisher and Yates, stopped after `count` draws
                    pick = slot + int(uniform(key, slot, 0, found - slot))
                    candidates[slot], candidates[pick] = candidates[pick], candidates[slot]
                out[b, v, slot] = candidates[slot]


def sample_positions(
    specs: Sequence[PositionSpec],
    sizes_px: Sequence[int],
    seed: int,
    epoch: int,
    index: Int[np.ndarray, " b"],
    boxes: Float[np.ndarray, "b v 4"],
    flips: Bool[np.ndarray, "b v"],
) -> Int[np.ndarray, "b v k"]:
    """Positions of each view, all different, -1 where no further one qualifies. Boxes as in `Batch`; k is the largest count.

    A view of sizes_px[v] pixels is sampled by the one of `specs` made for that size; a size without one gets no positions.
    """
    out = np.full((*flips.shape, max(spec.count for spec in specs)), -1, np.int64)
    for spec in specs:
        scale = 1 / spec.view_px
        grid = spec.size, spec.stride_px * scale, spec.offset_px * scale, spec.receptive_field_px / 2 * scale
        views = np.flatnonzero(np.asarray(sizes_px) == spec.view_px)
        keys = STRATEGIES[spec.strategy], *grid, seed, epoch, index.astype(np.int64)
        _sample(*keys, boxes.astype(np.float64), flips, views, spec.count, out)
    return out


def source_points(
    spec: PositionSpec, positions: Int[np.ndarray, " k"], box: Float[np.ndarray, "4"], flip: bool
) -> Float[np.ndarray, "k 2"]:
    """Centres (x, y) of the positions of one view as fractions of the source picture."""
    x = (spec.offset_px + spec.stride_px * (positions % spec.size)) / spec.view_px
    y = (spec.offset_px + spec.stride_px * (positions // spec.size)) / spec.view_px
    x = 1 - x if flip else x
    return np.stack([box[0] + x * (box[2] - box[0]), box[1] + y * (box[3] - box[1])], axis=-1)
