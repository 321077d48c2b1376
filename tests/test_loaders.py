"""Every loader keeps the contract of `Batch`, and all of them render the same boxes to nearly the same pixels."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded import encoded, picture, turned
from PIL import Image

from cossl.models.features import features
from cossl.pipelines import LOADERS, choose_backend, find_split, make_loader
from cossl.pipelines.batch import WINDOW_PAGES, Batch, Blocks, Loader, LoaderSpec, to_device
from cossl.pipelines.beton import JPG, RAW, Beton
from cossl.pipelines.convert import convert
from cossl.pipelines.cut import LANES, stride_of
from cossl.pipelines.ffcv_loader import _Workspace
from cossl.pipelines.positions import PositionSpec
from cossl.pipelines.views import ViewSpec, byol, evaluation, multi_crop
from cossl.train import pictures as evaluated

_MISSING = {"dali"} if find_spec("nvidia") is None or find_spec("nvidia.dali") is None else set()
BACKENDS = [pytest.param(name, marks=pytest.mark.skipif(name in _MISSING, reason="DALI is not installed")) for name in LOADERS]
GRID = PositionSpec("overlap", 9, size=6, stride_px=8, offset_px=0.5, receptive_field_px=17, view_px=48)
SPEC = LoaderSpec(byol(48, 0.3), batch_size=16, seed=2, positions=(GRID,), workers=1)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def open_loader(pictures: Path, request: pytest.FixtureRequest) -> Iterator:
    opened: list[Loader] = []

    def open_one(backend: str, spec: LoaderSpec = SPEC, split: str = "train", folder: bool = False) -> Loader:
        source = pictures / split
        if backend != "synthetic" and not folder:
            source = request.getfixturevalue("betons") / f"{split}.beton"
        opened.append(make_loader(backend, source, spec))
        return opened[-1]

    yield open_one
    for loader in opened:
        loader.close()


def assert_same(one: Batch, other: Batch) -> None:
    for field in fields(Batch)[1:]:  # between the tensors the memory holds anything
        a, b = getattr(one, field.name), getattr(other, field.name)
        for x, y in zip(a, b, strict=True) if field.name == "views" else [(a, b)]:
            assert x.dtype == y.dtype
            assert torch.equal(x, y), field.name


def test_shapes_types_and_memory(backend: str, open_loader) -> None:
    local = ViewSpec(32, area_frac=(0.1, 0.3))
    batch = next(iter(open_loader(backend, replace(SPEC, recipe=(*SPEC.recipe, local), positions=())).epoch(0)))
    assert [tuple(view.shape) for view in batch.views] == [(2, 16, 3, 48, 48), (1, 16, 3, 32, 32)]
    assert all(view.is_contiguous(memory_format=torch.channels_last) and view.dtype == torch.uint8 for view in batch.split())
    assert len(batch.split()) == 3
    assert batch.boxes.shape == (16, 3, 4)
    assert batch.boxes.dtype == torch.float32
    assert batch.flips.dtype == torch.bool
    assert batch.positions.shape == (16, 3, 0)
    assert batch.index.dtype == batch.label.dtype == torch.int64
    assert batch.photometry.shape == (16, 3, 8)


def test_workers_change_nothing(backend: str, open_loader) -> None:
    alone, many = (list(open_loader(backend, replace(SPEC, workers=n)).epoch(1)) for n in (0 if backend == "torch" else 1, 2))
    assert len(alone) == len(many) > 1
    for one, other in zip(alone, many, strict=True):
        assert_same(one, other)


def test_a_restart_continues_exactly(backend: str, open_loader) -> None:
    loader = open_loader(backend)
    whole = list(loader.epoch(2))
    for one, other in zip(whole[2:], loader.epoch(2, start_step=2), strict=True):
        assert_same(one, other)


def test_views_of_one_size_stand_together() -> None:
    small, large = ViewSpec(32), ViewSpec(48)
    replace(SPEC, recipe=(large, large, small, small))
    with pytest.raises(ValueError, match=r"\[48, 32, 48\] px: put views of one size next to each other"):
        replace(SPEC, recipe=(large, small, large))


def test_multi_crop_comes_with_positions_for_the_sizes_that_have_a_grid(backend: str, open_loader) -> None:
    recipe = multi_crop(48, local_px=32, local_crops_number=4)
    batch = next(iter(open_loader(backend, replace(SPEC, recipe=recipe)).epoch(0)))
    assert [tuple(view.shape) for view in batch.views] == [(2, 16, 3, 48, 48), (4, 16, 3, 32, 32)]
    assert (batch.positions[:, :2] >= 0).any()
    assert (batch.positions[:, 2:] == -1).all()
    area = (batch.boxes[..., 2] - batch.boxes[..., 0]) * (batch.boxes[..., 3] - batch.boxes[..., 1])
    assert area[:, :2].min() > 0.12
    assert area[:, 2:].max() < 0.16
    with pytest.raises(ValueError, match=r"positions for views of \[48\] px, but the views have \[32\] px"):
        replace(SPEC, recipe=(ViewSpec(32),))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_deal_out_the_joint_batch(backend: str, open_loader, world_size: int) -> None:
    joint = list(open_loader(backend).epoch(1, start_step=1))
    for rank in range(world_size):
        own = list(open_loader(backend, replace(SPEC, rank=rank, world_size=world_size)).epoch(1, start_step=1))
        assert len(own) == len(joint)
        for part, whole in zip(own, joint, strict=True):
            own_part = slice(rank * 16 // world_size, (rank + 1) * 16 // world_size)
            views = part.views if backend == "synthetic" else tuple(view[:, own_part] for view in whole.views)
            dealt = {f.name: getattr(whole, f.name)[own_part] for f in fields(Batch) if f.name not in ("memory", "views")}
            assert_same(part, Batch(memory=part.memory, views=views, **dealt))


def test_ranks_evaluate_every_picture_once(backend: str, open_loader) -> None:
    seen = []
    for rank in range(3):
        spec = LoaderSpec(evaluation(32), 13, workers=1, shuffle=False, rank=rank, world_size=3)
        loader = open_loader(backend, spec, split="val")
        seen.append(torch.cat([batch.index for batch in loader.epoch(0)]))
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(loader.num_samples))
    assert max(map(len, seen)) - min(map(len, seen)) <= len(loader)


@pytest.mark.parametrize(("rank", "world_size", "said"), [(0, 3, "--batch-size 15"), (0, 32, "--batch-size 32"), (2, 2, "0 to 1")])
def test_impossible_ranks_are_refused(rank: int, world_size: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(SPEC, rank=rank, world_size=world_size)


def test_epochs_draw_nothing_from_torchs_generator(backend: str, open_loader) -> None:
    """Else a resumed run, or one with another loader, would go on with other numbers than the first."""
    before = torch.get_rng_state()
    next(open_loader(backend).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_is_a_permutation_and_the_next_another(backend: str, open_loader) -> None:
    loader = open_loader(backend)
    first, second = (torch.cat([batch.index for batch in loader.epoch(e)]) for e in (0, 1))
    assert len(first.unique()) == len(first) == len(loader) * 16
    assert not torch.equal(first, second)


def test_evaluation_sees_every_picture_once_in_order(backend: str, open_loader) -> None:
    loader = open_loader(backend, LoaderSpec(evaluation(32), 24, workers=1, shuffle=False), split="val")
    index = torch.cat([batch.index for batch in loader.epoch(0)])
    assert torch.equal(index, torch.arange(loader.num_samples))


def test_batches_may_be_kept(backend: str, open_loader) -> None:
    if backend == "synthetic":
        pytest.skip("shows the same pixels again by design")
    kept = list(open_loader(backend).epoch(0))
    copies = [batch.views[0].clone() for batch in kept]
    for _ in open_loader(backend).epoch(1):
        pass
    assert all(torch.equal(batch.views[0], copy) for batch, copy in zip(kept, copies, strict=True))


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


PARITY = {"pair": byol(48, 0.3), "multi-crop": multi_crop(48, local_px=32, local_crops_number=3), "eval": evaluation(32)}


@pytest.mark.parametrize("recipe", PARITY.values(), ids=PARITY)
def test_ffcv_equals_the_reference_bit_for_bit(open_loader, recipe: tuple[ViewSpec, ...]) -> None:
    spec = replace(SPEC, recipe=recipe, positions=())
    for ours, expected in zip(open_loader("ffcv", spec).epoch(0), open_loader("torch", spec).epoch(0), strict=True):
        assert_same(ours, expected)


def test_raw_pixels_and_rare_jpegs_equal_the_reference_too(tmp_path: Path) -> None:
    """A mixed beton: raw rows to the last byte of the data, and JPEGs that our decoder leaves to Pillow among those that it reads."""
    (tmp_path / "pictures" / "class").mkdir(parents=True)
    for i in range(24):
        data = encoded(picture(i, width=30 + 3 * i, height=90 - 3 * i), progressive=i % 2 == 0)
        (tmp_path / "pictures" / "class" / f"{i:02}.jpg").write_bytes(data)
    convert(tmp_path / "pictures", tmp_path / "mixed.beton", mode="proportion", num_workers=1, progress=False)
    assert set(Beton(tmp_path / "mixed.beton").modes) == {JPG, RAW}
    spec = LoaderSpec(byol(32, 0.3), batch_size=24, workers=0, shuffle=False)
    ours, expected = (next(make_loader(name, tmp_path / "mixed.beton", spec).epoch(0)) for name in ("ffcv", "torch"))
    assert_same(ours, expected)


def test_folder_and_beton_are_the_same_pictures(open_loader) -> None:
    for one, other in zip(open_loader("torch", folder=True).epoch(0), open_loader("torch").epoch(0), strict=True):
        assert_same(one, other)


def test_labels_follow_the_class_folders(pictures: Path, open_loader) -> None:
    loader = open_loader("torch", LoaderSpec(evaluation(32), 80, workers=1, shuffle=False), folder=True)
    names = sorted(p.name for p in (pictures / "train").iterdir())
    files = [p for name in names for p in sorted((pictures / "train" / name).iterdir())]
    assert loader.class_names == tuple(names)
    batch = next(iter(loader.epoch(0)))
    assert [names[i] for i in batch.label] == [file.parent.name for file in files]
    with Image.open(files[5]) as picture:
        np.testing.assert_array_equal(loader.picture(5), np.asarray(picture.convert("RGB")))


def test_a_folder_is_read_upright(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    for name, orientation in (("a.jpg", 1), ("b.jpg", 6)):
        (tmp_path / "class" / name).write_bytes(turned(orientation))
    loader = make_loader("torch", tmp_path, LoaderSpec(evaluation(32), 2, workers=0, shuffle=False))
    np.testing.assert_array_equal(loader.picture(1), np.rot90(loader.picture(0), -1))


def test_a_broken_picture_in_a_folder_is_named(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / "class").mkdir(exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "class" / f"{i}.jpg")
    (tmp_path / "class" / "2.jpg").write_bytes(b"no picture")
    loader = make_loader("torch", tmp_path, LoaderSpec(evaluation(32), 4, workers=0, shuffle=False))
    with pytest.raises(RuntimeError, match=r"class/2\.jpg.*cossl convert"):
        next(iter(loader.epoch(0)))


def test_auto_takes_ffcv_for_a_beton(betons: Path, pictures: Path) -> None:
    assert choose_backend("auto", find_split(betons, "train")) == "ffcv"
    assert choose_backend("auto", find_split(pictures, "train")) == "torch"


def test_a_batch_of_foreign_parts_does_not_move(open_loader) -> None:
    batch = next(iter(open_loader("synthetic").epoch(0)))
    with pytest.raises(ValueError, match="does not lie in its memory"):
        replace(batch, label=batch.label.clone()).to(torch.device("cpu"))


@pytest.mark.parametrize("nothing", [{"batch_size": 0}, {"recipe": (), "positions": ()}])
def test_nothing_to_load_is_refused(nothing: dict) -> None:
    with pytest.raises(ValueError, match="expected at least 1 of each"):
        replace(SPEC, **nothing)


def test_what_is_kept_of_an_evaluation_is_not_its_pixels(betons: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels are copied out of their batches, which would hold every picture of the set: few blocks serve all twenty batches."""
    loader = make_loader("ffcv", betons / "val.beton", LoaderSpec(evaluation(64), 2, workers=1, shuffle=False))
    blocks, original = [], Blocks._fresh
    monkeypatch.setattr(Blocks, "_fresh", staticmethod(lambda size: blocks.append(size) or original(size)))
    _, labels = features({}, evaluated(loader, torch.device("cpu"), "val"))
    assert torch.equal(labels, torch.from_numpy(loader.beton.labels))
    assert 1 <= len(blocks) <= 7
    loader.close()
