"""A loader of some of the samples: which come, in which order, and that each is what it is among all."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cossl.pipelines import LOADERS, make_loader
from cossl.pipelines.batch import WINDOW_PAGES, Batch, LoaderSpec
from cossl.pipelines.positions import PositionSpec
from cossl.pipelines.views import byol, evaluation

GRID = PositionSpec("overlap", 4, size=4, stride_px=8, offset_px=0.5, receptive_field_px=9, view_px=32)
SPEC = LoaderSpec(byol(32, 0.3), batch_size=8, seed=2, positions=(GRID,), workers=1)
SOME = np.array([79, 3, 64, 17, 5, 40, 41, 8, 22, 0, 31, 50, 11, 77, 62, 29, 33, 1, 70])
BACKENDS = [name for name in LOADERS if name != "dali"]


def source(backend: str, pictures: Path, betons: Path, split: str = "train") -> Path:
    return betons / f"{split}.beton" if backend == "ffcv" else pictures / split


def samples(loader_batches: list[Batch]) -> dict[int, list[Tensor]]:
    """By index, all that the batches hold of a sample: its views first (synthetic pixels belong to a place in the batch, not to it)."""
    found: dict[int, list[Tensor]] = {}
    for batch in loader_batches:
        for b, index in enumerate(batch.index.tolist()):
            rest = [getattr(batch, f.name)[b] for f in fields(Batch) if f.name not in ("memory", "views")]
            assert index not in found
            found[index] = [view[b].clone() for view in batch.split()] + [part.clone() for part in rest]
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_of_a_subset_are_those_of_the_whole_set(backend: str, pictures: Path, betons: Path) -> None:
    path = source(backend, pictures, betons)
    some, whole = (make_loader(backend, path, replace(SPEC, subset=subset)) for subset in (SOME, None))
    assert (len(some), some.num_samples) == (2, whole.num_samples)
    for epoch in (0, 1):
        found, every = samples(list(some.epoch(epoch))), samples(list(whole.epoch(epoch)))
        assert len(found) == 16
        assert set(found) <= set(SOME.tolist())
        for index, parts in found.items():
            pixels = 2 if backend == "synthetic" else 0
            assert all(torch.equal(a, b) for a, b in zip(parts[pixels:], every[index][pixels:], strict=True)), index
    some.close()
    whole.close()


@pytest.mark.parametrize("backend", ["ffcv", "torch"])
def test_evaluation_is_in_file_order(backend: str, pictures: Path, betons: Path) -> None:
    spec = replace(SPEC, recipe=evaluation(32), positions=(), shuffle=False, subset=SOME)
    loader = make_loader(backend, source(backend, pictures, betons), spec)
    batches = list(loader.epoch(0))
    assert [len(batch.index) for batch in batches] == [8, 8, 3]
    assert len(loader) == 3
    index = torch.cat([batch.index for batch in batches])
    assert index.tolist() == sorted(SOME.tolist())
    labels = np.asarray(loader.pictures.labels if backend == "torch" else loader.beton.labels)  # type: ignore[attr-defined]
    assert torch.cat([batch.label for batch in batches]).tolist() == labels[index.numpy()].tolist()
    loader.close()


@pytest.mark.parametrize("order", ["random", "pages"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_deal_out_the_batches_of_one(order: str, shuffle: bool) -> None:
    pages = np.random.default_rng(0).integers(0, 300, 4000)
    some = np.random.default_rng(1).permutation(4000)[:1234]
    spec = replace(SPEC, batch_size=100, positions=(), order=order, shuffle=shuffle, subset=some)
    joint = list(spec.batches(4000, 3, 0, pages))
    assert len(joint) == spec.steps(4000, pages) == (12 if shuffle else 13)
    parts = [list(replace(spec, rank=rank, world_size=4).batches(4000, 3, 0, pages)) for rank in range(4)]
    for step, whole in enumerate(joint):
        np.testing.assert_array_equal(np.concatenate([part[step] for part in parts]), whole)
    seen = np.concatenate(joint)
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(some)
    for same in (spec, replace(spec, subset=np.sort(some))):
        np.testing.assert_array_equal(joint[5], next(same.batches(4000, 3, 5, pages)))
    if shuffle:
        assert not np.array_equal(spec.order_of(4000, 0, pages), spec.order_of(4000, 1, pages))


def test_pages_of_a_subset_have_their_turn_in_windows() -> None:
    """Every fifth page has samples of it: windows are of those pages, so that as much is read ahead as of a whole set."""
    pages = np.arange(4000) // 8
    some = np.flatnonzero(pages % 5 == 0)
    found = replace(SPEC, positions=(), order="pages", subset=some).order_of(4000, 0, pages)
    assert np.array_equal(np.sort(found), some)
    windows = [set(part) for part in np.split(pages[found], [8 * WINDOW_PAGES])]
    assert [len(window) for window in windows] == [WINDOW_PAGES, 100 - WINDOW_PAGES]
    assert not windows[0] & windows[1]


def test_a_subset_streams_past_the_cache(pictures: Path, betons: Path) -> None:
    """The pages that are asked for ahead are those of the subset."""
    spec = replace(SPEC, order="pages", subset=SOME)
    loaders = [make_loader("ffcv", betons / "train.beton", replace(spec, os_cache=os_cache)) for os_cache in (True, False)]
    one, other = (samples(list(loader.epoch(2))) for loader in loaders)
    assert list(one) == list(other)
    assert all(torch.equal(a, b) for index in one for a, b in zip(one[index], other[index], strict=True))
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        ([], "no sample, expected at least one; None loads all"),
        ([3, -1], "sample -1, expected 0 or more"),
        ([3, 80], "sample 80 of a set of 80 pictures, expected 0 to 79"),
        ([3, 5, 3, 7, 3], "sample 3 stands there 3 times, expected once"),
        ([[1, 2]], "2 axes of int64, expected the indices of samples in one"),
        ([True, False], "1 axes of bool, expected the indices of samples in one"),
    ],
)
def test_a_bad_subset_is_one_line(subset: list[int], message: str, pictures: Path) -> None:
    given = np.array(subset, np.int64) if not subset else np.array(subset)
    with pytest.raises(ValueError, match=f"^subset: {message}$"):
        make_loader("torch", pictures / "train", replace(SPEC, batch_size=1, subset=given))


def test_a_batch_larger_than_the_subset_is_one_line() -> None:
    with pytest.raises(ValueError, match="batch size 20 is larger than the set of 19 pictures: use --batch-size 19 or less"):
        replace(SPEC, batch_size=20, subset=SOME).steps(80)
