"""The loader of betons: decoder and cuts of our own, on threads, without the GIL. ffcv's format, without ffcv."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cossl.pipelines.batch import WINDOW_PAGES, Batch, Blocks, LoaderSpec, fill
from cossl.pipelines.beton import RAW, Beton
from cossl.pipelines.cut import LANES, cut, planes_of
from cossl.pipelines.cut import workspace as cut_workspace
from cossl.pipelines.geometry import box_fractions, sample_views
from cossl.pipelines.jpeg import DECLINED, OK, decode_box
from cossl.pipelines.jpeg import workspace as jpeg_workspace
from cossl.pipelines.simd import compiled


@compiled
def _cut_views(planes, union, boxes, flips, sizes, targets, b, space):  # type: ignore[no-untyped-def]
    for v in range(len(sizes)):
        top, left, height, width = boxes[v]
        out = targets[v] + 3 * sizes[v] * sizes[v] * b
        cut(planes, union[3] - union[1], top - union[1], left - union[0], height, width, flips[v], out, sizes[v], space)


@compiled
def _render(data, rows, boxes, flips, sizes, targets, first, last, planes, spaces, outcome):  # type: ignore[no-untyped-def]
    """Samples first .. last - 1 of a batch: the union of each one's boxes decoded once, every view cut from that.

    rows [b, 5] holds where each payload starts in data, its bytes, whether it is raw pixels, height and width; targets are the addresses
    of the views' memory. A sample whose JPEG is of a kind left to Pillow is marked in `outcome`.
    """
    for b in range(first, last):
        start, size, raw, height, width = rows[b]
        top, left, bottom, right = boxes[b, :, 0], boxes[b, :, 1], boxes[b, :, 0] + boxes[b, :, 2], boxes[b, :, 1] + boxes[b, :, 3]
        union = (left.min(), top.min(), right.max(), bottom.max())
        payload = data[start : start + size]
        outcome[b] = OK
        if raw:
            planes_of(payload, width, union, planes)
        elif decode_box(payload, height, width, union, planes, spaces[0]) != OK:
            outcome[b] = DECLINED
            continue
        _cut_views(planes, union, boxes[b], flips[b], sizes, targets, b, spaces[1])


@compiled
def _render_pixels(pixels, height, width, boxes, flips, sizes, targets, b, planes, space):  # type: ignore[no-untyped-def]
    """One sample from pixels that Pillow decoded."""
    union = (0, 0, width, height)
    planes_of(pixels, width, union, planes)
    _cut_views(planes, union, boxes, flips, sizes, targets, b, space)


class _Workspace(threading.local):
    """One thread's memory, for the largest picture it has met."""

    pixels = longest = payload = 0

    def fit(self, rows: NDArray[np.int64], largest_view: int) -> None:
        """Makes room for pictures of `rows`, as in `_render`."""
        pixels, longest, payload = int((rows[:, 3] * rows[:, 4]).max()), int(rows[:, 3:].max()), int(rows[:, 1].max())
        if pixels > self.pixels or longest > self.longest or payload > self.payload:
            pixels, longest, payload = max(pixels, self.pixels), max(longest, self.longest), max(payload, self.payload)
            self.planes = np.empty(3 * (pixels + LANES * longest) + LANES, np.uint8)
            self.spaces = jpeg_workspace(pixels, longest, payload), cut_workspace(longest, largest_view)
            self.pixels, self.longest, self.payload = pixels, longest, payload  # last: the kernels trust these, and memory may be refused


class FfcvLoader:
    """`Loader` over a beton: the union of a picture's boxes is decoded once, and every view cut from that, by `spec.workers` threads.

    ffcv itself is not needed. The decoder and the cuts are the project's own (`jpeg.py`, `cut.py`), run without the GIL and give Pillow's
    pixels; JPEGs of a rare kind are decoded by Pillow itself. Nothing below the last row that is needed is read, so damage there goes
    unseen: that is for `cossl verify`. Up to `spec.batches_ahead` batches wait. A batch may be kept; its memory is
    used again once nothing refers to it. An epoch left half-way leaves nothing behind but threads that wait for the next one.
    """

    def __init__(self, path: Path, spec: LoaderSpec) -> None:
        self.beton, self.spec = Beton(path), spec
        self.class_names = tuple(self.beton.class_names)
        beton = self.beton
        self._rows = np.stack([beton.starts, beton.sizes, beton.modes == RAW, beton.heights, beton.widths], 1).astype(np.int64)
        self._recipe = np.stack([view.row() for view in spec.recipe])
        self._sizes = np.array([view.size_px for view in spec.recipe])
        self._space, self._blocks = _Workspace(), Blocks(spec.batches_ahead + 2)
        self._pool = ThreadPoolExecutor(max(1, spec.workers), thread_name_prefix="cossl-ffcv")
        len(self)

    def __len__(self) -> int:
        return self.spec.steps(len(self.beton), self.beton.pages)

    @property
    def num_samples(self) -> int:
        return len(self.beton)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        waiting: deque[tuple[list[Future[None]], Batch]] = deque()
        steps = self.spec.batches(self.num_samples, epoch, start_step, self.beton.pages)
        try:
            for index in steps if self.spec.os_cache or not self.spec.shuffle else self._read_ahead(list(steps)):
                waiting.append(self._start(epoch, index))
                if len(waiting) > self.spec.batches_ahead:
                    yield self._finish(*waiting.popleft())
            while waiting:
                yield self._finish(*waiting.popleft())
        finally:
            for futures, _ in waiting:
                for future in futures:
                    future.cancel()

    def _read_ahead(self, steps: list[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
        """The same steps; the kernel is told which pages of the file come within a window, and which will not be needed again."""
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for step, index in enumerate(steps):
            for page in np.unique(self.beton.pages[index]).tolist():
                first.setdefault(page, step)
                last[page] = step
        coming, going = sorted(first, key=first.__getitem__, reverse=True), sorted(last, key=last.__getitem__, reverse=True)
        held = 0
        for step, index in enumerate(steps):
            while going and last[going[-1]] < step - self.spec.batches_ahead:
                self.beton.let_go(going.pop())
                held -= 1
            while coming and (held < WINDOW_PAGES or first[coming[-1]] <= step):
                self.beton.ask_for(coming.pop())
                held += 1
            yield index

    def _start(self, epoch: int, index: NDArray[np.int64]) -> tuple[list[Future[None]], Batch]:
        rows = self._rows[index]
        boxes, flips, photometry = sample_views(self.spec.seed, epoch, index, rows[:, 3], rows[:, 4], self._recipe)
        batch = self.spec.allocate(len(index), self._blocks)
        share = -(-len(index) // (4 * max(1, self.spec.workers)))  # four pieces a thread, so that threads end together
        pieces = [(i, min(i + share, len(index))) for i in range(0, len(index), share)]
        futures = [self._pool.submit(self._render, piece, index, rows, boxes, flips, batch) for piece in pieces]
        fractions = box_fractions(boxes, rows[:, 3], rows[:, 4])
        return futures, fill(batch, self.spec, epoch, index, self.beton.labels[index], fractions, flips, photometry)

    def _finish(self, futures: list[Future[None]], batch: Batch) -> Batch:
        for future in futures:
            future.result()
        return batch

    def _render(
        self, piece: tuple[int, int], index: NDArray[Any], rows: NDArray[Any], boxes: NDArray[Any], flips: NDArray[Any], batch: Batch
    ) -> None:
        space, outcome = self._space, np.empty(len(index), np.int8)
        space.fit(rows[piece[0] : piece[1]], int(self._sizes.max()))
        targets = np.array([view.data_ptr() for view in batch.split()])
        _render(self.beton.bytes, rows, boxes, flips, self._sizes, targets, *piece, space.planes, space.spaces, outcome)
        for b in range(*piece):
            if outcome[b] == DECLINED:
                pixels = np.asarray(self.beton.open(int(index[b])))
                height, width, _ = pixels.shape
                flat = pixels.reshape(-1)
                _render_pixels(flat, height, width, boxes[b], flips[b], self._sizes, targets, b, space.planes, space.spaces[1])

    def picture(self, index: int) -> NDArray[np.uint8]:
        return np.asarray(self.beton.open(index))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
