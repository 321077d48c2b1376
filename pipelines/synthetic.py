"""The loader contract from resident tensors: no disk, no decode. The compute ceiling of every benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from cossl.pipelines.batch import Batch, LoaderSpec, fill
from cossl.pipelines.geometry import box_fractions, sample_views

NUM_SAMPLES, NUM_CLASSES, PICTURE_PX = 4096, 10, 256


class SyntheticLoader:
    """`Loader` of 4,096 pictures that do not exist: real geometry, one batch of random pixels used again and again."""

    def __init__(self, path: Path | None, spec: LoaderSpec):
        self.spec, self.class_names = spec, tuple(f"class-{i}" for i in range(NUM_CLASSES))
        self._rows = np.stack([view.row() for view in spec.recipe])
        random = np.random.Generator(np.random.Philox(key=[spec.seed, 0]))
        self._batch = spec.allocate(spec.batch_size)
        for canvas in self._batch.canvases():
            canvas[:] = random.integers(0, 256, canvas.shape, np.uint8)
        len(self)

    def __len__(self) -> int:
        return self.spec.steps(NUM_SAMPLES)

    @property
    def num_samples(self) -> int:
        return NUM_SAMPLES

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        for index in self.spec.batches(NUM_SAMPLES, epoch, start_step):
            sizes = np.full(len(index), PICTURE_PX), np.full(len(index), PICTURE_PX)
            boxes, flips, photometry = sample_views(self.spec.seed, epoch, index, *sizes, self._rows)
            batch = self.spec.allocate(len(index))
            for ours, resident in zip(batch.views, self._batch.views, strict=True):
                ours.copy_(resident[:, : len(index)])
            yield fill(batch, self.spec, epoch, index, index % NUM_CLASSES, box_fractions(boxes, *sizes), flips, photometry)

    def picture(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        return np.random.Generator(np.random.Philox(key=[self.spec.seed, index + 1])).integers(
            0, 256, (PICTURE_PX, PICTURE_PX, 3), np.uint8
        )

    def close(self) -> None:
        """Nothing is held."""
