"""What loaders hold: nothing of an abandoned epoch, memory that is used again, pages in a window of them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from opened_loaders import BACKENDS, SPEC, assert_same, opened_loaders

from cossl.pipelines.batch import WINDOW_PAGES, Batch, Blocks, LoaderSpec, to_device
from cossl.pipelines.beton import RAW
from cossl.pipelines.cut import LANES, stride_of
from cossl.pipelines.ffcv_loader import _Workspace
from cossl.pipelines.views import byol


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def open_loader(pictures: Path, request: pytest.FixtureRequest) -> Iterator:
    yield from opened_loaders(pictures, request)


def resources() -> tuple[int, int, int]:
    """Threads, open files and resident MiB of this process, once threads that were told to end have had a moment."""
    gc.collect()
    time.sleep(0.2)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), resident


def test_a_thousand_abandoned_epochs_leave_nothing_behind(backend: str, open_loader) -> None:
    """The torch loader without worker processes, which take 20 ms each to start; with them 30 epochs."""
    spec = LoaderSpec(byol(32, 0.3), batch_size=8, workers=0 if backend == "torch" else 2, positions=())
    loader = open_loader(backend, spec)
    for epoch in range(50):
        next(iter(loader.epoch(epoch)))
    before = resources()
    for epoch in range(1000):
        next(iter(loader.epoch(epoch)))
    after = resources()
    assert after[0] <= before[0]
    assert after[1] <= before[1]
    assert after[2] <= before[2] + 16


def test_abandoned_worker_processes_end(open_loader) -> None:
    loader = open_loader("torch", replace(SPEC, workers=1))
    next(iter(loader.epoch(0)))
    before = resources()
    for epoch in range(30):
        next(iter(loader.epoch(epoch)))
    assert not multiprocessing.active_children()
    after = resources()
    assert after[0] <= before[0]
    assert after[1] <= before[1]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of our own: with a GPU they are torch's, page-locked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_memory_is_used_again_only_when_nothing_refers_to_it() -> None:
    """Told by what it holds: a fresh block is zero, while its address may be that of one given back to the system."""
    blocks = Blocks(4)
    first = blocks(100).fill_(7)
    kept = first[:10]
    del first
    assert not blocks(100).any()
    del kept
    assert blocks(100).eq(7).all()
    assert blocks(200).shape == (200,)
    held = [blocks(100) for _ in range(9)]
    del held
    assert len(blocks._free) == 4


@pytest.mark.usefixtures("no_gpu")
def test_memory_is_this_process_alone() -> None:
    """A process forked from this one (a worker of another loader) may write into a batch that it inherited, to no effect here."""
    block = Blocks(1)(100).zero_()
    child = multiprocessing.get_context("fork").Process(target=block.fill_, args=(7,))
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert not block.any()


@pytest.mark.usefixtures("no_gpu")
def test_an_abandoned_epoch_keeps_its_memory_while_threads_render(open_loader, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, targets, go_on = open_loader("ffcv", replace(SPEC, batches_ahead=1)), [], threading.Event()

    def render(data, rows, boxes, flips, sizes, pointers, *rest) -> None:  # the first batch ends at once, the second when told to
        targets.append(int(pointers[0]))
        rest[-1][:] = 0
        assert len(set(targets)) == 1 or go_on.wait(20)

    monkeypatch.setattr("cossl.pipelines.ffcv_loader._render", render)
    epoch = loader.epoch(0)
    size = next(epoch).memory.numel()
    while len(set(targets)) == 1:
        time.sleep(0.01)
    epoch.close()
    del epoch
    gc.collect()
    taken = [loader._blocks(size) for _ in range(4)]
    assert targets[-1] not in [block.data_ptr() for block in taken]
    del taken
    go_on.set()
    loader.close()
    assert targets[-1] == loader._blocks(size).data_ptr()


def test_a_thread_whose_memory_could_not_grow_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels write to bare addresses: a thread must never believe in room that it was refused."""
    space, large = _Workspace(), np.array([[0, 3 * 200 * 300, RAW, 200, 300]])
    space.fit(np.array([[0, 3 * 10 * 10, RAW, 10, 10]]), 32)

    def refuse(*_: int) -> None:
        raise MemoryError

    with monkeypatch.context() as full:
        full.setattr("cossl.pipelines.ffcv_loader.cut_workspace", refuse)
        with pytest.raises(MemoryError):
            space.fit(large, 32)
    space.fit(large, 32)
    assert space.spaces[1][0].size > 300 * 32
    assert space.planes.size >= 3 * 300 * stride_of(200) + LANES


def test_a_batch_lies_in_one_block_and_moves_as_one(backend: str, open_loader) -> None:
    batch = next(iter(open_loader(backend).epoch(0)))
    start, end = batch.memory.data_ptr(), batch.memory.data_ptr() + batch.memory.numel()
    for f in fields(Batch)[2:]:
        assert start <= getattr(batch, f.name).data_ptr() < end
    copy = batch._over(batch.memory.clone())
    assert_same(copy, batch)
    assert copy.views[0].data_ptr() != batch.views[0].data_ptr()
    assert copy.split()[0].is_contiguous(memory_format=torch.channels_last)
    (arrived,) = to_device(iter([batch]), torch.device("cpu"))
    assert_same(arrived, batch)


def test_order_by_pages(betons: Path) -> None:
    """A window of pages at a time, every sample once, another order each epoch; ranks touch few pages and deal out the same batches."""
    pages = np.random.default_rng(0).integers(0, 300, 4000)
    spec = replace(SPEC, order="pages", batch_size=100, positions=())
    first, second = (spec.order_of(4000, epoch, pages) for epoch in (0, 1))
    assert not np.array_equal(first, second)
    for order in (first, second):
        assert np.array_equal(np.sort(order), np.arange(4000))
        done: set[int] = set()
        for window in np.split(pages[order], np.flatnonzero(np.diff([_window(order, pages, i) for i in range(4000)])) + 1):
            assert len(set(window)) <= WINDOW_PAGES
            assert not done & set(window)
            done |= set(window)
    joint = list(spec.batches(4000, 3, 5, pages))
    parts = [list(replace(spec, rank=rank, world_size=4).batches(4000, 3, 5, pages)) for rank in range(4)]
    touched = [len(np.unique(pages[np.concatenate(part[:5])])) for part in parts]
    assert max(touched) <= WINDOW_PAGES
    for step, whole in enumerate(joint):
        np.testing.assert_array_equal(np.concatenate([part[step] for part in parts]), whole)
        assert max(len(np.unique(pages[part[step]])) for part in parts) <= 26  # 25 samples each, of neighbouring pages


def _window(order: np.ndarray, pages: np.ndarray, place: int) -> int:
    """Which window a place of the order lies in: WINDOW_PAGES pages, in the order in which they first appear."""
    _, first = np.unique(pages[order], return_index=True)
    return int(np.searchsorted(np.sort(first), place, side="right") - 1) // WINDOW_PAGES


def test_a_set_larger_than_memory_streams_through_it(open_loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty pages of four pictures, windows of four pages: each is asked for before its first batch and dropped after its last."""
    spec, told = replace(SPEC, order="pages", batches_ahead=0, batch_size=8), []
    loaders = [open_loader("ffcv", spec), open_loader("ffcv", replace(spec, os_cache=False)), open_loader("torch", spec)]
    for module in ("batch", "ffcv_loader"):
        monkeypatch.setattr(f"cossl.pipelines.{module}.WINDOW_PAGES", 4)
    for loader in loaders:
        beton = loader.pictures.beton if hasattr(loader, "pictures") else loader.beton
        beton.pages = np.arange(80) // 4
        beton.ask_for, beton.let_go = lambda page: told.append((page, "ask")), lambda page: told.append((page, "let go"))
    loaders[2].pictures.pages = loaders[0].beton.pages
    held, most, left = set(), 0, set()
    for cached, streamed, pil in zip(*(loader.epoch(1) for loader in loaders), strict=True):
        assert_same(cached, streamed)
        assert_same(cached, pil)
        for page, advice in told:
            (held.add if advice == "ask" else held.remove)(page)
            left |= {page} if advice == "let go" else set()
        told.clear()
        pages = set((streamed.index // 4).tolist())
        assert pages <= held
        assert not pages & left
        most = max(most, len(held))
    assert most <= 2 * 4
    assert len(left) >= 12


def test_impossible_orders_are_refused(open_loader) -> None:
    with pytest.raises(ValueError, match="use order pages"):
        replace(SPEC, os_cache=False)
    with pytest.raises(ValueError, match="expected one of random, pages"):
        replace(SPEC, order="any")
    with pytest.raises(ValueError, match="these pictures are none"):
        open_loader("torch", replace(SPEC, order="pages"), folder=True)
