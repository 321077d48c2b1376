"""Everything that touches ffcv 1.0.2: its JPEG decoder, and the loader built on it.

This is the only file of the project that imports ffcv, inside functions, so that the rest runs where ffcv is not installed.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cossl.pipelines.batch import Batch, LoaderSpec, assemble
from cossl.pipelines.beton import Beton
from cossl.pipelines.cut import cut
from cossl.pipelines.geometry import box_fractions, sample_views

INSTALL_FFCV = "sudo apt-get install pkg-config libturbojpeg0-dev libopencv-dev && pip install -c constraints.txt -e '.[ffcv]'"
BATCHES_AHEAD = 3


class FfcvMissing(ImportError):
    """ffcv cannot be imported; the message holds the line that installs it."""


def require_ffcv() -> Any:
    """The ffcv module. Raises FfcvMissing with the one line that installs it.

    Importing ffcv sets torch to one thread for the whole process; the count is put back here. ffcv also keeps two names in a numba typed
    Dict that only plain Python reads; compiling that dict is most of the import (4.5 of 6 s of CPU), so it gets an ordinary one instead.
    """
    import numba.typed

    threads, typed_dict = torch.get_num_threads(), numba.typed.Dict
    try:
        with warnings.catch_warnings():
            # ffcv 1.0.2 imports distutils (gone in Python 3.12) and has invalid escapes in docstrings; neither touches its results.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", SyntaxWarning)
            numba.typed.Dict = dict
            import ffcv
    except ImportError as error:
        raise FfcvMissing(f"ffcv is not installed ({error}); install it with: {INSTALL_FFCV}") from error
    finally:
        numba.typed.Dict = typed_dict
        torch.set_num_threads(threads)
    return ffcv


Decode = Callable[[NDArray[np.uint8], int, int, NDArray[np.uint8]], bool]


def decode_function() -> Decode:
    """decode(payload, height, width, out) -> True when the JPEG decoded cleanly into out, C-contiguous uint8 [height, width, 3].

    libffcv's imdecode: TurboJPEG with the fast DCT, a few grey levels from Pillow's slow one. False for a damaged payload *and* for one
    that libjpeg only warns about (out is then filled as far as it came). ctypes drops the GIL for the call: threads decode in parallel.
    Trap: TurboJPEG handles live as long as the process, one per thread that ever decoded: use a fixed pool of threads.
    """
    require_ffcv()
    from ffcv.libffcv import ctypes_imdecode

    def decode(payload: NDArray[np.uint8], height: int, width: int, out: NDArray[np.uint8]) -> bool:
        # The C code writes height * width * 3 bytes at out, whatever out is.
        if out.nbytes < height * width * 3 or not out.flags.c_contiguous or not payload.flags.c_contiguous:
            raise ValueError(f"decode needs C-contiguous arrays and {height * width * 3} bytes of room, got {out.nbytes}")
        source, target = payload.ctypes.data, out.ctypes.data
        status: int = ctypes_imdecode(source, payload.size, height, width, target, height, width, 0, 0, 1, 1, False, False)
        return status == 0

    return decode


# ---- the loader -------------------------------------------------------------------------------------------------------------------


class FfcvLoader:
    """`Loader` over a beton: one decode by ffcv's TurboJPEG for all views of a picture, boxes cut out without the GIL.

    `spec.workers` threads render, up to `BATCHES_AHEAD` batches wait. Every batch owns its memory (pinned where there is a GPU), so a
    batch may be kept; an epoch left half-way leaves nothing behind but threads that wait for the next one. Stock ffcv's Loader is not
    used: it compiles for 6 to 17 s each time, leaks a thread per abandoned epoch, and draws random numbers that nobody can repeat.
    """

    def __init__(self, path: Path, spec: LoaderSpec) -> None:
        self.beton, self.spec = Beton(path), spec
        self.class_names = tuple(self.beton.class_names)
        self._decode, self._local = decode_function(), threading.local()
        self._rows = np.stack([view.row() for view in spec.recipe])
        self._pin = torch.cuda.is_available()
        self._pool = ThreadPoolExecutor(max(1, spec.workers), thread_name_prefix="cossl-ffcv")
        len(self)

    def __len__(self) -> int:
        return self.spec.steps(len(self.beton))

    @property
    def num_samples(self) -> int:
        return len(self.beton)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        waiting: deque[tuple[list[Future[None]], Callable[[], Batch]]] = deque()
        try:
            for index in self.spec.batches(self.num_samples, epoch, start_step):
                waiting.append(self._start(epoch, index))
                if len(waiting) > BATCHES_AHEAD:
                    yield self._finish_batch(*waiting.popleft())
            while waiting:
                yield self._finish_batch(*waiting.popleft())
        finally:
            for futures, _ in waiting:
                for future in futures:
                    future.cancel()

    def _start(self, epoch: int, index: NDArray[np.int64]) -> tuple[list[Future[None]], Callable[[], Batch]]:
        heights, widths = self.beton.heights[index], self.beton.widths[index]
        boxes, flips, photometry = sample_views(self.spec.seed, epoch, index, heights, widths, self._rows)
        groups, views = self.spec.buffers(len(index), pin=self._pin)
        share = -(-len(index) // (4 * max(1, self.spec.workers)))  # four pieces a thread, so that threads end together
        pieces = [range(i, min(i + share, len(index))) for i in range(0, len(index), share)]
        futures = [self._pool.submit(self._render, piece, index, boxes, flips, views) for piece in pieces]
        fractions, labels = box_fractions(boxes, heights, widths), self.beton.labels[index]
        return futures, lambda: assemble(self.spec, epoch, groups, fractions, flips, photometry, index, labels)

    def _finish_batch(self, futures: list[Future[None]], batch: Callable[[], Batch]) -> Batch:
        for future in futures:
            future.result()
        return batch()

    def _render(self, piece: range, index: NDArray[Any], boxes: NDArray[Any], flips: NDArray[Any], views: list[NDArray[np.uint8]]) -> None:
        for b in piece:
            picture = self._decoded(int(index[b]))
            for v, view in enumerate(views):
                top, left, height, width = boxes[b, v]
                cut(picture, top, left, height, width, flips[b, v], view[b])

    def _decoded(self, index: int) -> NDArray[np.uint8]:
        """The whole picture, in memory that the same thread's next call overwrites."""
        height, width, payload = int(self.beton.heights[index]), int(self.beton.widths[index]), self.beton.payload(index)
        if self.beton.mode(index) == "raw":
            return payload.reshape(height, width, 3)
        room = getattr(self._local, "room", None)
        if room is None or room.size < height * width * 3:
            room = self._local.room = np.empty(height * width * 3, np.uint8)
        out: NDArray[np.uint8] = room[: height * width * 3].reshape(height, width, 3)
        if not self._decode(payload, height, width, out):
            # TurboJPEG also reports mere warnings, which Pillow reads over: the slow decoder is the judge.
            out[:] = np.asarray(self.beton.open(index))
        return out

    def picture(self, index: int) -> NDArray[np.uint8]:
        return self._decoded(index).copy()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
