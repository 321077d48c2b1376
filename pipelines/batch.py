"""The contract of every loader: what a `Batch` holds, and in which order samples come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from cossl.pipelines.positions import PositionSpec, sample_positions
from cossl.pipelines.views import ViewSpec


@dataclass(frozen=True)
class Batch:
    """b samples in v views each, and the geometry they were cut with.

    `views` holds one tensor per view size, in the order of the recipe, each view a channels-last slice of
    it. Boxes are (left, top, right, bottom) as fractions of the source picture, flips are already rendered
    into the pixels, positions are row * n + column in the feature map (-1: no position qualified), and
    `photometry` holds the parameters that `augment` renders (columns: `cossl.pipelines.geometry.PHOTOMETRY`).
    """

    views: tuple[UInt8[Tensor, "v b 3 s s"], ...]
    boxes: Float[Tensor, "b v 4"]
    flips: Bool[Tensor, "b v"]
    positions: Int[Tensor, "b v k"]
    photometry: Float[Tensor, "b v 8"]
    index: Int[Tensor, " b"]
    label: Int[Tensor, " b"]

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; from pinned memory the copy does not wait."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self) if f.name != "views"}
        return replace(self, views=tuple(view.to(device, non_blocking=True) for view in self.views), **moved)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; torch's DataLoader calls this."""
        moved = {f.name: getattr(self, f.name).pin_memory() for f in fields(self) if f.name != "views"}
        return replace(self, views=tuple(view.pin_memory() for view in self.views), **moved)

    def split(self) -> list[UInt8[Tensor, "b 3 s s"]]:
        """Each view on its own, in the recipe's order; no copy."""
        return [view for same_size in self.views for view in same_size]


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
    positions: PositionSpec | None = None
    workers: int = 2
    shuffle: bool = True
    """Training: a new order every epoch, the last incomplete batch dropped. Else: file order, every picture once."""
    rank: int = 0
    world_size: int = 1
    """`batch_size` is that of all ranks together; rank r renders samples r, r + world_size, ... of every batch, so the ranks' batches
    are the joint one dealt out, whatever their number. In evaluation a rank may end one step early, when the last batch is shorter."""

    def __post_init__(self) -> None:
        sizes = [view.size_px for view in self.recipe]
        if sizes != [size for size, count in Counter(sizes).items() for _ in range(count)]:
            raise ValueError(f"views of {sizes} px: put views of one size next to each other, they share a tensor")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} of {self.world_size}: expected 0 to {self.world_size - 1}")
        if self.shuffle and self.batch_size % self.world_size:
            near = self.batch_size // self.world_size * self.world_size or self.world_size
            raise ValueError(f"batch size {self.batch_size} does not divide among {self.world_size} ranks: use --batch-size {near}")

    def steps(self, num_samples: int) -> int:
        if not num_samples:
            raise ValueError("the picture set is empty: nothing to load")
        if not self.shuffle:
            return -(-num_samples // self.batch_size)
        if self.batch_size > num_samples:
            raise ValueError(
                f"batch size {self.batch_size} is larger than the set of {num_samples} pictures: use --batch-size {num_samples} or less"
            )
        return num_samples // self.batch_size

    def buffers(self, count: int, pin: bool = False) -> tuple[list[UInt8[Tensor, "v b s s 3"]], list[UInt8[np.ndarray, "b s s 3"]]]:
        """Memory for the views of `count` samples: a tensor per view size, and each view's part of it, to be rendered into."""
        sizes = Counter(view.size_px for view in self.recipe)
        groups = [torch.empty((views, count, size, size, 3), dtype=torch.uint8, pin_memory=pin) for size, views in sizes.items()]
        return groups, [view.numpy() for group in groups for view in group]

    def order(self, num_samples: int, epoch: int) -> Int[np.ndarray, " n"]:
        """Sample indices in the order of this epoch: a function of (seed, epoch) alone."""
        if not self.shuffle:
            return np.arange(num_samples)
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(num_samples)

    def batches(self, num_samples: int, epoch: int, start_step: int) -> Iterator[Int[np.ndarray, " b"]]:
        """This rank's part of every batch from `start_step` on."""
        order = self.order(num_samples, epoch)
        for step in range(start_step, self.steps(num_samples)):
            part = order[step * self.batch_size : (step + 1) * self.batch_size][self.rank :: self.world_size]
            if len(part):
                yield part


def assemble(
    spec: LoaderSpec,
    epoch: int,
    views: list[UInt8[Tensor, "v b s s 3"]],
    boxes: Float[np.ndarray, "b v 4"],
    flips: Bool[np.ndarray, "b v"],
    photometry: Float[np.ndarray, "b v 8"],
    index: Int[np.ndarray, " b"],
    label: Int[np.ndarray, " b"],
) -> Batch:
    """A `Batch` from what a loader rendered into `spec.buffers`; boxes as in `Batch`."""
    positions = np.empty((*flips.shape, 0), np.int64)
    if spec.positions is not None:
        positions = sample_positions(spec.positions, spec.seed, epoch, index, boxes, flips)
    return Batch(
        views=tuple(view.permute(0, 1, 4, 2, 3) for view in views),
        boxes=torch.from_numpy(boxes),
        flips=torch.from_numpy(flips),
        positions=torch.from_numpy(positions),
        photometry=torch.from_numpy(photometry),
        index=torch.from_numpy(index.astype(np.int64)),
        label=torch.from_numpy(label.astype(np.int64)),
    )
