"""Boxes, flips, colours and positions are pure functions of (seed, epoch, index, view), and mean what they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cossl.pipelines.geometry import box_fractions, sample_views, stream, uniform
from cossl.pipelines.positions import PositionSpec, sample_positions, source_points
from cossl.pipelines.views import RECIPES, ViewSpec, byol, evaluation

ROWS = np.stack([view.row() for view in byol(64, 0.2)])
GOLDEN_BOXES = [[[21, 2, 93, 86], [8, 1, 81, 80]], [[40, 15, 77, 62], [15, 19, 71, 65]]]
GOLDEN_FLIPS = [[False, False], [True, True], [True, True], [False, True]]
GOLDEN_COLOUR = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def draw(seed: int = 3, epoch: int = 5, index: list[int] | None = None, height: int = 120, width: int = 90) -> tuple[np.ndarray, ...]:
    which = np.array([7, 8, 9, 1_281_166] if index is None else index)
    return sample_views(seed, epoch, which, np.full(len(which), height), np.full(len(which), width), ROWS)


def test_the_numbers_never_change() -> None:
    """A change here means that every run of the past can no longer be repeated."""
    boxes, flips, photometry = draw()
    assert boxes[[0, 3]].tolist() == GOLDEN_BOXES
    assert flips.tolist() == GOLDEN_FLIPS
    assert photometry[3, 1].tolist() == pytest.approx(GOLDEN_COLOUR, abs=1e-6)


def test_a_sample_is_the_same_in_any_batch() -> None:
    together = draw()
    for i, index in enumerate([7, 8, 9, 1_281_166]):
        for whole, single in zip(together, draw(index=[index]), strict=True):
            np.testing.assert_array_equal(whole[i], single[0])


def test_every_part_of_the_key_matters() -> None:
    base = draw()[0]
    assert not np.array_equal(base, draw(seed=4)[0])
    assert not np.array_equal(base, draw(epoch=6)[0])
    assert not np.array_equal(base[0], base[1])
    assert not np.array_equal(base[:, 0], base[:, 1])


def test_draws_are_uniform_and_uncorrelated() -> None:
    draws = np.array([[uniform(np.uint64(stream(0, 0, i, 0, 0)), slot, 0.0, 1.0) for slot in range(4)] for i in range(4000)])
    assert np.abs(draws.mean(0) - 0.5).max() < 0.02
    assert np.abs(draws.var(0) - 1 / 12).max() < 0.005
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.06


@pytest.mark.parametrize("recipe", RECIPES)
def test_jitter_scales_the_colour_changes_alone(recipe: str) -> None:
    count = np.arange(500)
    drawn = {}
    for jitter in (0.0, 0.5, 1.0):
        rows = np.stack([view.row() for view in RECIPES[recipe](64, 0.2, jitter)])
        drawn[jitter] = sample_views(0, 0, count, np.full(500, 100), np.full(500, 100), rows)
    for boxes, flips, photometry in drawn.values():
        np.testing.assert_array_equal(boxes, drawn[1.0][0])
        np.testing.assert_array_equal(flips, drawn[1.0][1])
        np.testing.assert_array_equal(photometry[..., 4:], drawn[1.0][2][..., 4:])
    none, half, full = (np.abs(drawn[jitter][2][..., :4] - [1.0, 1.0, 1.0, 0.0]) for jitter in (0.0, 0.5, 1.0))
    assert none.max() == 0
    np.testing.assert_allclose(2 * half, full, atol=1e-6)
    np.testing.assert_allclose(full.max((0, 1)), [0.4, 0.4, 0.2, 0.1], rtol=0.02)


@pytest.mark.parametrize("crop_min", [0.05, 0.08, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("recipe", RECIPES)
def test_crops_cover_the_areas_of_the_ablation(recipe: str, crop_min: float) -> None:
    if recipe == "multi_crop" and crop_min == 0.05:
        with pytest.raises(ValueError, match="more than their smallest"):
            RECIPES[recipe](64, crop_min, 1.0)
        return
    views = RECIPES[recipe](64, crop_min, 1.0)
    boxes, _, _ = sample_views(0, 0, np.arange(400), np.full(400, 300), np.full(400, 300), np.stack([view.row() for view in views]))
    area = boxes[:, :, 2] * boxes[:, :, 3] / 300**2
    large = area[:, [view.size_px == 64 for view in views]]
    assert crop_min - 0.01 < large.min() < crop_min + 0.05
    assert large.max() > 0.93
    if recipe == "multi_crop":
        local = area[:, [view.size_px < 64 for view in views]]
        assert local.shape == (400, 6)
        assert 0.04 < local.min() < local.max() < crop_min + 0.01


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 700), width=st.integers(1, 700), seed=st.integers(0, 2**31))
def test_boxes_lie_inside_the_picture(height: int, width: int, seed: int) -> None:
    boxes, _, _ = draw(seed=seed, height=height, width=width)
    top, left, h, w = np.moveaxis(boxes, -1, 0)
    assert (h >= 1).all()
    assert (w >= 1).all()
    assert ((top >= 0) & (top + h <= height) & (left >= 0) & (left + w <= width)).all()
    fractions = box_fractions(boxes, np.full(4, height), np.full(4, width))
    assert ((fractions >= 0) & (fractions <= 1)).all()


def test_areas_aspects_and_flips_follow_the_recipe() -> None:
    boxes, flips, photometry = draw(index=list(range(3000)), height=400, width=400)
    area, aspect = boxes[..., 2] * boxes[..., 3] / 400**2, boxes[..., 3] / boxes[..., 2]
    assert 0.195 < area.min() < 0.22
    assert area.max() > 0.97
    assert 0.73 < aspect.min() < aspect.max() < 1.37
    assert abs(flips.mean() - 0.5) < 0.03
    assert abs((photometry[:, :, 5] > 0).mean() - 0.2) < 0.03
    assert (photometry[:, 0, 6] > 0).all()
    assert abs((photometry[:, 1, 6] > 0).mean() - 0.1) < 0.03
    assert abs((photometry[:, 1, 7] > 0).mean() - 0.2) < 0.03
    assert set(photometry[:, :, 4].astype(int).ravel()) == set(range(24))


def test_a_picture_too_flat_for_any_aspect_gets_the_central_box() -> None:
    boxes, _, _ = draw(index=[0], height=10, width=1000)
    top, left, h, w = boxes[0, 0]
    assert (top, h) == (0, 10)
    assert w == round(10 * 4 / 3)
    assert left == (1000 - w) // 2


@pytest.mark.parametrize(("height", "width", "aspect"), [(10, 1, (3.0, 4.0)), (1, 10, (0.2, 0.3))])
def test_a_box_is_never_empty(height: int, width: int, aspect: tuple[float, float]) -> None:
    rows = ViewSpec(32, aspect=aspect).row()[None]
    boxes, _, _ = sample_views(0, 0, np.arange(4), np.full(4, height), np.full(4, width), rows)
    assert boxes[..., 2:].min() == 1


def test_evaluation_takes_the_central_square_untouched() -> None:
    rows = np.stack([view.row() for view in evaluation(224)])
    boxes, flips, photometry = sample_views(0, 0, np.array([0]), np.array([256]), np.array([400]), rows)
    assert boxes[0, 0].tolist() == [16, 88, 224, 224]
    assert not flips.any()
    assert photometry[0, 0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


IMPOSSIBLE = [
    *({"area_frac": bad} for bad in [(0.0, 1.0), (0.5, 0.2), (0.5, 1.5), (float("nan"), 1.0)]),
    *({"aspect": bad} for bad in [(-1.0, -1.0), (0.0, 1.0), (4 / 3, 3 / 4), (float("nan"), 1.0), (0.5, float("inf"))]),
    *({"centre_frac": bad} for bad in [1.5, -0.1, float("nan")]),
    *({name: bad} for name in ("flip_p", "jitter_p", "grayscale_p", "blur_p", "solarize_p") for bad in (-0.1, 1.1)),
    {"size_px": 15},
]


@pytest.mark.parametrize("bad", IMPOSSIBLE)
def test_an_impossible_view_is_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        ViewSpec(**{"size_px": 64, **bad})


GRID = dict(size=5, stride_px=8.0, offset_px=0.5, receptive_field_px=17.0, view_px=40)
BOXES = np.array([[[0.1, 0.2, 0.6, 0.9], [0.4, 0.0, 1.0, 0.5]], [[0.0, 0.0, 0.2, 0.2], [0.7, 0.7, 1.0, 1.0]]], np.float32)
FLIPS = np.array([[False, True], [True, False]])


def positions(strategy: str, count: int, epoch: int = 0) -> np.ndarray:
    spec = PositionSpec(strategy, count, **GRID)  # type: ignore[arg-type]
    return sample_positions((spec,), (40, 40), 1, epoch, np.array([4, 5]), BOXES, FLIPS)


def test_all_is_every_position_in_order() -> None:
    assert (positions("all", 25) == np.arange(25)).all()


def test_uniform_takes_different_positions_and_in_time_all_of_them() -> None:
    seen = [positions("uniform", 7, epoch) for epoch in range(40)]
    assert all(len(set(row)) == 7 for drawn in seen for row in drawn.reshape(-1, 7))
    assert set(np.concatenate([s.ravel() for s in seen])) == set(range(25))
    assert not np.array_equal(seen[0][0], seen[0][1])


def test_overlap_is_exactly_the_positions_whose_centre_lies_in_the_other_crop() -> None:
    drawn = positions("overlap", 25)
    for view, other in ((0, 1), (1, 0)):
        expected = set()
        for p in range(25):
            x, y = (0.5 + 8 * (p % 5)) / 40, (0.5 + 8 * (p // 5)) / 40
            x = 1 - x if FLIPS[0, view] else x
            left, top, right, bottom = BOXES[0, view]
            x, y = left + x * (right - left), top + y * (bottom - top)
            left, top, right, bottom = BOXES[0, other]
            if left <= x < right and top <= y < bottom:
                expected.add(p)
        found = drawn[0, view][drawn[0, view] >= 0]
        assert set(found) == expected
        assert 0 < len(found) == len(expected) < 25
        assert (drawn[0, view][len(found) :] == -1).all()
    assert (drawn[1] == -1).all()  # crops that do not touch leave no position


def test_grid_is_evenly_spaced_and_takes_every_position_in_time() -> None:
    seen = np.concatenate([positions("grid", 9, epoch).reshape(-1, 9) for epoch in range(60)])
    for drawn in seen:
        rows, columns = drawn.reshape(3, 3) // 5, drawn.reshape(3, 3) % 5
        assert (rows == rows[:, :1]).all()
        assert (columns == columns[:1]).all()
        assert set(np.diff(rows[:, 0])) <= {1, 2}  # 5 / 3 apart
        assert set(np.diff(columns[0])) <= {1, 2}
    assert set(seen.ravel()) == set(range(25))
    assert (positions("grid", 25) == np.arange(25)).all()


SIDES = st.tuples(*[st.floats(0.05, 0.95)] * 4)


@settings(max_examples=100, deadline=None)
@given(st.lists(SIDES, min_size=2, max_size=3), st.lists(st.booleans(), min_size=3, max_size=3))
def test_disjoint_is_exactly_the_positions_that_see_nothing_of_another_crop(sides: list[tuple[float, ...]], flips: list[bool]) -> None:
    """Against a map of the source with a point every 1/400: which of a position's points also lie in another crop."""
    boxes = np.array([[min(a, c), min(b, d), max(a, c) + 0.04, max(b, d) + 0.04] for a, b, c, d in sides])
    spec = PositionSpec("disjoint", 25, **GRID)  # type: ignore[arg-type]
    drawn = sample_positions((spec,), [40] * len(boxes), 0, 0, np.array([0]), boxes[None], np.array([flips[: len(boxes)]]))[0]
    lattice = np.stack(np.meshgrid(np.arange(400), np.arange(400)), -1) / 400 + 1 / 800
    inside = [(lattice[..., 0] > b[0]) & (lattice[..., 0] < b[2]) & (lattice[..., 1] > b[1]) & (lattice[..., 1] < b[3]) for b in boxes]
    for view, box in enumerate(boxes):
        others = np.any([mask for other, mask in enumerate(inside) if other != view], 0)
        u, v = (lattice[..., 0] - box[0]) / (box[2] - box[0]), (lattice[..., 1] - box[1]) / (box[3] - box[1])
        u = 1 - u if flips[view] else u
        for position in range(25):
            x, y = 0.5 + 8 * (position % 5), 0.5 + 8 * (position // 5)
            shared = (np.abs(40 * u - x) < 8.5) & (np.abs(40 * v - y) < 8.5) & inside[view] & others
            chosen = position in drawn[view]
            assert not (chosen and shared.any())
            if not chosen:  # the lattice may miss an overlap thinner than its step
                assert shared.any() or 0 < _smallest_overlap(x, y, box, flips[view], np.delete(boxes, view, 0)) < 1 / 400


def _smallest_overlap(x: float, y: float, box: np.ndarray, flip: bool, others: np.ndarray) -> float:
    """Of the widths and heights of what a receptive field of 17 px shares with the other crops, the largest crop's smaller one."""
    low, high = np.clip((np.array([x, y]) - 8.5) / 40, 0, 1), np.clip((np.array([x, y]) + 8.5) / 40, 0, 1)
    if flip:
        low[0], high[0] = 1 - high[0], 1 - low[0]
    size = box[2:] - box[:2]
    low, high = box[:2] + low * size, box[:2] + high * size
    shared = np.minimum(high, others[:, 2:]) - np.maximum(low, others[:, :2])
    shared = shared.min(1)
    return float(shared[shared > 0].max(initial=0.0))


def test_each_view_size_has_its_own_grid() -> None:
    """Two specs: the views of each size are sampled by theirs, as if alone, and a size without one has no positions."""
    boxes, flips = np.repeat(BOXES, 2, 1)[:, :3], np.array([[False, True, True], [True, False, False]])
    large, small = PositionSpec("uniform", 9, **GRID), PositionSpec("all", 4, **GRID | {"size": 2, "view_px": 24})  # type: ignore[arg-type]
    both = sample_positions((large, small), (40, 24, 32), 0, 0, np.array([1, 2]), boxes, flips)
    assert both.shape == (2, 3, 9)
    np.testing.assert_array_equal(both[:, 0], sample_positions((large,), (40, 40, 40), 0, 0, np.array([1, 2]), boxes, flips)[:, 0])
    assert (both[:, 1] == [0, 1, 2, 3, -1, -1, -1, -1, -1]).all()
    assert (both[:, 2] == -1).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 24), st.booleans())
def test_a_position_in_the_source_comes_back_by_the_inverse_map(position: int, flip: bool) -> None:
    spec = PositionSpec("all", 25, **GRID)  # type: ignore[arg-type]
    box = np.array([0.25, 0.1, 0.75, 0.8])
    ((x, y),) = source_points(spec, np.array([position]), box, flip)
    u, v = (x - box[0]) / (box[2] - box[0]), (y - box[1]) / (box[3] - box[1])
    u = 1 - u if flip else u
    assert (u * 40 - 0.5) / 8 == pytest.approx(position % 5)
    assert (v * 40 - 0.5) / 8 == pytest.approx(position // 5)


@pytest.mark.parametrize(("strategy", "count"), [("uniform", 0), ("uniform", 26), ("all", 7), ("grid", 7), ("nearest", 5)])
def test_impossible_positions_are_refused(strategy: str, count: int) -> None:
    with pytest.raises(ValueError, match=r"position|takes all|try 4 or 9"):
        PositionSpec(strategy, count, **GRID)  # type: ignore[arg-type]
