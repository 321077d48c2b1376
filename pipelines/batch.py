"""The contract of every loader: what a `Batch` holds, and in which order samples come."""

from __future__ import annotations

import itertools
import math
import mmap
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Protocol, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from cossl.pipelines import Order
from cossl.pipelines.geometry import PHOTOMETRY
from cossl.pipelines.positions import PositionSpec, sample_positions
from cossl.pipelines.views import ViewSpec

WINDOW_PAGES = 64  # of 8 MiB: half a GiB is read ahead, and mixes 10,000 pictures of 50 KB
ALIGNED_BYTES = 64  # where each tensor of a batch starts


@dataclass(frozen=True)
class Batch:
    """b samples in v views each, and the geometry they were cut with; all of it lies in one block of memory.

    Trap: who keeps one tensor of a batch keeps the whole block; clone what is to be kept.

    `views` holds one tensor per view size, in the order of the recipe, each view a channels-last slice of
    it. Boxes are (left, top, right, bottom) as fractions of the source picture, flips are already rendered
    into the pixels, positions are row * n + column in the feature map (-1: no position qualified), and
    `photometry` holds the parameters that `augment` renders (columns: `cossl.pipelines.geometry.PHOTOMETRY`).
    """

    memory: UInt8[Tensor, " bytes"]
    views: tuple[UInt8[Tensor, "v b 3 s s"], ...]
    boxes: Float[Tensor, "b v 4"]
    flips: Bool[Tensor, "b v"]
    positions: Int[Tensor, "b v k"]
    photometry: Float[Tensor, "b v 8"]
    index: Int[Tensor, " b"]
    label: Int[Tensor, " b"]

    def _over(self, memory: UInt8[Tensor, " bytes"]) -> Batch:
        """The same tensors over a copy of the block."""

        def there(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() != self.memory.untyped_storage().data_ptr():
                raise ValueError("a tensor of this batch does not lie in its memory: write into the batch instead of replacing its parts")
            start = tensor.storage_offset() * tensor.element_size() - self.memory.storage_offset()
            flat = memory[start : start + tensor.numel() * tensor.element_size()]
            return flat.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), flat.storage_offset() // tensor.element_size())

        rest = {f.name: there(getattr(self, f.name)) for f in fields(self) if f.name not in ("memory", "views")}
        return Batch(memory, tuple(there(view) for view in self.views), **rest)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`, in one copy; from pinned memory the copy does not wait."""
        return self._over(self.memory.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; torch's DataLoader calls this."""
        return self._over(self.memory.pin_memory())

    def split(self) -> list[UInt8[Tensor, "b 3 s s"]]:
        """Each view on its own, in the recipe's order; no copy."""
        return [view for same_size in self.views for view in same_size]

    def canvases(self) -> list[UInt8[np.ndarray, "b s s 3"]]:
        """Each view as an array to be rendered into; the batch must be on the CPU."""
        return [view.permute(0, 2, 3, 1).numpy() for view in self.split()]


class Loader(Protocol):
    """Batches of one picture set. `epoch` is a pure function of its arguments: workers, ranks and restarts change nothing."""

    class_names: tuple[str, ...]

    def __len__(self) -> int:
        """Steps in an epoch."""

    @property
    def num_samples(self) -> int:
        """Pictures in the set."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from `start_step` on."""

    def picture(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """The whole source picture, as boxes refer to it."""

    def close(self) -> None:
        """Give back threads, processes and files."""


@dataclass(frozen=True)
class LoaderSpec:
    """What a loader is asked for, whichever backend answers."""

    recipe: tuple[ViewSpec, ...]
    batch_size: int
    seed: int = 0
    positions: tuple[PositionSpec, ...] = ()
    """One for each view size whose feature map has positions to be sampled; views of other sizes get -1 throughout."""
    workers: int = 2
    batches_ahead: int = 3
    """Batches that are being rendered, or wait, while one is used (ffcv, dali; torch's DataLoader prefetches two a worker)."""
    shuffle: bool = True
    """Training: a new order every epoch, the last incomplete batch dropped. Else: file order, every picture once."""
    order: Order = "random"
    """random: any permutation. pages: WINDOW_PAGES pages of the beton at a time, in a new order every epoch, and any permutation of their
    pictures: a disk is read in long runs, once an epoch. `cossl convert` lays pictures down at random, so that windows mix classes."""
    os_cache: bool = True
    """False, for order "pages": the set is larger than memory, and its pages are asked for ahead of their turn and dropped behind it."""
    rank: int = 0
    world_size: int = 1
    """`batch_size` is that of all ranks together; every batch is cut into world_size equal runs, of which rank r renders number r, so the
    ranks' batches laid end to end are the joint one, whatever their number. In evaluation a rank may end one step early."""
    subset: Int[np.ndarray, " n"] | None = field(default=None, compare=False)
    """The samples that are loaded, in any order, by their index in the set, which `Batch.index` keeps; None is all of them. Crops and
    colours stay those that a sample has among all, in every epoch. Trap: two specs that differ in nothing else are equal."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not self.recipe:
            raise ValueError(f"{self.batch_size} samples of {len(self.recipe)} views: expected at least 1 of each")
        if self.batches_ahead < 0:
            raise ValueError(f"{self.batches_ahead} batches ahead: expected 0 or more")
        if self.order not in get_args(Order):
            raise ValueError(f"order {self.order!r}: expected one of {', '.join(get_args(Order))}")
        if self.shuffle and not self.os_cache and self.order != "pages":
            raise ValueError("os_cache False with a random order would read every page of the disk for every picture: use order pages")
        sizes = [view.size_px for view in self.recipe]
        if sizes != [size for size, count in Counter(sizes).items() for _ in range(count)]:
            raise ValueError(f"views of {sizes} px: put views of one size next to each other, they share a tensor")
        grids = [spec.view_px for spec in self.positions]
        if len(set(grids)) < len(grids) or not set(grids) <= set(sizes):
            raise ValueError(f"positions for views of {grids} px, but the views have {sorted(set(sizes))} px: give one spec for each size")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} of {self.world_size}: expected 0 to {self.world_size - 1}")
        if self.shuffle and self.batch_size % self.world_size:
            near = self.batch_size // self.world_size * self.world_size or self.world_size
            raise ValueError(f"batch size {self.batch_size} does not divide among {self.world_size} ranks: use --batch-size {near}")
        if self.subset is not None:
            _check_subset(self.subset)

    def steps(self, num_samples: int, pages: Int[np.ndarray, " n"] | None = None) -> int:
        """Steps of an epoch. `pages` are those of the samples in their file; an image folder has none."""
        if self.shuffle and self.order == "pages" and pages is None:
            raise ValueError("order 'pages' goes by the pages of a beton, and these pictures are none: convert them, or use order random")
        count = self._count(num_samples)
        if not count:
            raise ValueError("the picture set is empty: nothing to load")
        if not self.shuffle:
            return -(-count // self.batch_size)
        if self.batch_size > count:
            raise ValueError(f"batch size {self.batch_size} is larger than the set of {count} pictures: use --batch-size {count} or less")
        return count // self.batch_size

    def _count(self, num_samples: int) -> int:
        """How many are loaded."""
        if self.subset is None:
            return num_samples
        if (last := int(self.subset.max())) >= num_samples:
            raise ValueError(f"subset: sample {last} of a set of {num_samples} pictures, expected 0 to {num_samples - 1}")
        return len(self.subset)

    def allocate(self, count: int, block: Callable[[int], Tensor] | None = None) -> Batch:
        """A batch of `count` samples with nothing in it, in memory of `block(bytes)`, uint8."""
        views, k = len(self.recipe), max((spec.count for spec in self.positions), default=0)
        groups = Counter(view.size_px for view in self.recipe)
        kinds: list[tuple[tuple[int, ...], torch.dtype]] = [((n, count, s, s, 3), torch.uint8) for s, n in groups.items()]
        kinds += [((count, views, 4), torch.float32), ((count, views), torch.bool), ((count, views, k), torch.int64)]
        kinds += [((count, views, len(PHOTOMETRY)), torch.float32), ((count,), torch.int64), ((count,), torch.int64)]
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in kinds]
        starts = [0, *itertools.accumulate(-(-size // ALIGNED_BYTES) * ALIGNED_BYTES for size in sizes)]
        memory = torch.empty(starts[-1], dtype=torch.uint8) if block is None else block(starts[-1])
        parts = [memory[at : at + size].view(dtype).view(shape) for at, size, (shape, dtype) in zip(starts, sizes, kinds, strict=False)]
        pixels, rest = parts[: len(groups)], parts[len(groups) :]
        return Batch(memory, tuple(view.permute(0, 1, 4, 2, 3) for view in pixels), *rest)

    def order_of(self, num_samples: int, epoch: int, pages: Int[np.ndarray, " n"] | None = None) -> Int[np.ndarray, " n"]:
        """Sample indices in the order of this epoch: a function of (seed, epoch) and, for order "pages", of the page of each sample."""
        samples = np.arange(num_samples) if self.subset is None else np.sort(self.subset).astype(np.int64)
        if not self.shuffle:
            return samples
        random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        if pages is None or self.order == "random":
            return random.permutation(samples)
        _, page = np.unique(pages[samples], return_inverse=True)
        turn = random.permutation(page.max() + 1)[page]  # when each sample's page has its turn
        by_turn = np.lexsort((samples, turn))
        starts = np.searchsorted(turn[by_turn] // WINDOW_PAGES, np.arange(1, turn.max() // WINDOW_PAGES + 1))
        return samples[np.concatenate([random.permutation(window) for window in np.split(by_turn, starts)])]

    def batches(
        self, num_samples: int, epoch: int, start_step: int, pages: Int[np.ndarray, " n"] | None = None
    ) -> Iterator[Int[np.ndarray, " b"]]:
        """This rank's part of every batch from `start_step` on. With order "pages" a batch is sorted by page, so a rank touches few."""
        order = self.order_of(num_samples, epoch, pages)
        for step in range(start_step, self.steps(num_samples, pages)):
            joint = order[step * self.batch_size : (step + 1) * self.batch_size]
            if self.shuffle and self.order == "pages" and pages is not None:
                joint = joint[np.argsort(pages[joint], kind="stable")]
            part = joint[self.rank * len(joint) // self.world_size : (self.rank + 1) * len(joint) // self.world_size]
            if len(part):
                yield part


def _check_subset(subset: Int[np.ndarray, " n"]) -> None:
    if subset.ndim != 1 or subset.dtype.kind not in "iu":
        raise ValueError(f"subset: {subset.ndim} axes of {subset.dtype}, expected the indices of samples in one")
    if not len(subset):
        raise ValueError("subset: no sample, expected at least one; None loads all")
    if subset.min() < 0:
        raise ValueError(f"subset: sample {subset.min()}, expected 0 or more")
    found, counts = np.unique(subset, return_counts=True)
    if len(found) < len(subset):
        raise ValueError(f"subset: sample {found[counts.argmax()]} stands there {counts.max()} times, expected once")


def to_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on `device`. To a GPU each is copied on a stream of its own while the one before is used: one batch ahead."""
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copying, ready = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(copying):
            moved = batch.to(device)
            copied = copying.record_event()
        if ready is not None:
            yield _arrived(*ready)
        ready = moved, copied
    if ready is not None:
        yield _arrived(*ready)


def _arrived(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """The batch, once the current stream waits for its copy; its memory is not used again before that stream is done with it."""
    stream = torch.cuda.current_stream(batch.memory.device)
    stream.wait_event(copied)
    batch.memory.record_stream(stream)
    return batch


class Blocks:
    """Memory for batches, used again once no tensor refers to it: fresh pages cost the kernel a fault and a wipe for every 4 KiB.

    At most `keep` blocks wait for their next use. Page-locked by torch, which recycles it itself, where there is a GPU.
    """

    def __init__(self, keep: int) -> None:
        self._free: deque[mmap.mmap] = deque(maxlen=keep)

    def __call__(self, size: int) -> UInt8[Tensor, " bytes"]:
        if torch.cuda.is_available():
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        try:
            block = self._free.pop()
        except IndexError:
            block = self._fresh(size)
        if len(block) < size:  # the last batch of an evaluation is smaller, and the one after it is not
            block = self._fresh(size)
        array = np.frombuffer(block, np.uint8)
        weakref.finalize(array, self._free.append, block).atexit = False  # the tensor holds the array
        return torch.from_numpy(array)[:size]

    @staticmethod
    def _fresh(size: int) -> mmap.mmap:
        """Pages of this process alone: mmap's default shares them with its forks, and a page costs 1.9 microseconds at first, not 1.1."""
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def fill(
    batch: Batch,
    spec: LoaderSpec,
    epoch: int,
    index: Int[np.ndarray, " b"],
    label: Int[np.ndarray, " b"],
    boxes: Float[np.ndarray, "b v 4"],
    flips: Bool[np.ndarray, "b v"],
    photometry: Float[np.ndarray, "b v 8"],
) -> Batch:
    """The batch with everything but its pixels written into it, the positions drawn; boxes as in `Batch`."""
    values = {"index": index, "label": label, "boxes": boxes, "flips": flips, "photometry": photometry}
    if spec.positions:
        sizes = [view.size_px for view in spec.recipe]
        values["positions"] = sample_positions(spec.positions, sizes, spec.seed, epoch, index, boxes, flips)
    for name, value in values.items():
        getattr(batch, name).numpy()[...] = value
    return batch
