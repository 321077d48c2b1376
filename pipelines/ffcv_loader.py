"""Everything that touches ffcv 1.0.2: its writer under a supervisor, its JPEG decoder, and the loader built on them.

This is the only file of the project that imports ffcv, inside functions, so that the rest runs where ffcv is not installed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cossl.pipelines.batch import Batch, LoaderSpec, assemble
from cossl.pipelines.beton import Beton, Row, Rows
from cossl.pipelines.cut import cut
from cossl.pipelines.geometry import box_fractions, sample_views

INSTALL_FFCV = "sudo apt-get install pkg-config libturbojpeg0-dev libopencv-dev && pip install -c constraints.txt -e '.[ffcv]'"
CHUNK_ROWS = 32  # rows a writer takes at a time: small, so that two writers end together on 2,400 rows
BATCHES_AHEAD = 3
LARGEST_PAGE_BYTES = 1 << 31  # ffcv keeps a page size in 32 bits


class FfcvMissing(ImportError):
    """ffcv cannot be imported; the message holds the line that installs it."""


class PageTooSmall(RuntimeError):
    """A row needs `needed` bytes, more than one page of the beton holds."""

    def __init__(self, needed: int) -> None:
        super().__init__(f"a picture of {needed} bytes does not fit into a page of the beton")
        self.needed = needed


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


@dataclass
class Written:
    """Pictures left out (index -> reason), in order, and how many rows were stored in which way."""

    left_out: dict[int, str] = field(default_factory=dict)
    stored: Counter[str] = field(default_factory=Counter)


def _store_row(destination: NDArray[Any], row: Row, malloc: Callable[[int], tuple[int, NDArray[np.uint8]]]) -> None:
    """Writes one finished payload where ffcv's RGBImageField would write what it encodes itself."""
    destination["mode"], destination["height"], destination["width"] = row.mode, row.height, row.width
    destination["data_ptr"], storage = malloc(row.payload.size)
    storage[:] = row.payload


def _write_share(rows: Rows, writer: Any, allocator: Any, turn: Any, working_on: Any, me: int, report: Connection) -> None:
    """One writer process: takes chunks of row numbers until none is left. Reports progress, then its results, or its one error."""
    from ffcv.writer import handle_sample

    parent = os.getppid()
    metadata = np.frombuffer(writer.metadata_sm.buf, dtype=writer.metadata_type)
    left_out: dict[int, str] = {}
    stored: Counter[str] = Counter()
    try:
        with allocator:
            while True:
                with turn.get_lock():
                    start, turn.value = turn.value, turn.value + CHUNK_ROWS
                if start >= len(rows):
                    break
                chunk = range(start, min(start + CHUNK_ROWS, len(rows)))
                for i in chunk:
                    if os.getppid() != parent:  # the command itself was killed
                        os._exit(1)
                    working_on[me] = i
                    row = rows[i]
                    if isinstance(row, str):
                        left_out[i] = row
                        continue
                    if row.payload.size > allocator.page_size:
                        raise PageTooSmall(row.payload.size)
                    handle_sample((row, row.label), i, metadata.dtype.names, metadata, allocator, writer.fields)
                    stored[row.stored] += 1
                report.send(("progress", len(chunk)))
            working_on[me] = -1
        report.send(("done", (np.array(allocator.allocations, dtype=np.int64).reshape(-1, 3), left_out, stored)))
    except PageTooSmall as error:
        report.send(("page", error.needed))
    except Exception as error:
        report.send(("error", str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"))


def _collect(processes: dict[Connection, Any], rows: Rows, working_on: Any, progress: Callable[[int], None]) -> list[Any]:
    """The result of every writer process. Raises RuntimeError as soon as one reports an error or ends without a result.

    Each process holds the only writing end of its own pipe, so its death reads as end of file at once.
    """
    results: list[Any] = []
    pending = {pipe: (me, process) for me, (pipe, process) in enumerate(processes.items())}
    while pending:
        for pipe in wait(list(pending)):
            assert isinstance(pipe, Connection)
            me, process = pending[pipe]
            at = f" at {rows.name(working_on[me])}" if working_on[me] >= 0 else ""
            try:
                kind, content = pipe.recv()
            except (EOFError, OSError):
                process.join(5)
                hint = " (killed: out of memory?)" if process.exitcode == -9 else f" (exit code {process.exitcode})"
                raise RuntimeError(f"a writer process died{at}{hint}") from None
            if kind == "progress":
                progress(content)
            elif kind == "done":
                results.append(content)
                del pending[pipe]
            elif kind == "page":
                raise PageTooSmall(content)
            else:
                raise RuntimeError(f"writing failed{at}: {content}")
    return results


def _finish(writer: Any, results: list[Any], num_rows: int) -> Written:
    """Closes the gaps that left-out pictures made in ffcv's tables, then has ffcv write tables and header."""
    left_out = {i: reason for _, share, _ in results for i, reason in share.items()}
    kept = np.ones(num_rows, dtype=bool)
    kept[list(left_out)] = False
    table = np.frombuffer(writer.metadata_sm.buf, dtype=writer.metadata_type)
    packed = table[kept]
    table[:] = np.zeros(1, table.dtype)
    table[: len(packed)] = packed
    del table  # shared memory with a view on it cannot be closed
    allocations = np.concatenate([share for share, _, _ in results])
    allocations[:, 0] = (np.cumsum(kept) - 1)[allocations[:, 0]]
    writer.header["num_samples"] = len(packed)
    writer.finalize([tuple(allocation) for allocation in allocations.tolist()])
    return Written(dict(sorted(left_out.items())), sum((stored for _, _, stored in results), Counter()))


def write_rows(path: Path, rows: Rows, *, num_workers: int, page_bytes: int, progress: Callable[[int], None]) -> Written:
    """Writes rows[0], rows[1], ... to a new beton at path, fields `image` and `label`, in that order; left-out ones take no row number.

    ffcv's DatasetWriter, MemoryAllocator and tables, driven by our own loop: ffcv's own waits for ever once one of its processes is gone.
    Raises RuntimeError when a writer process dies or fails (full disk, out of memory), PageTooSmall when page_bytes (a power of two, at
    least 2 MiB) cannot hold a row. Whatever it raises, no process is left; the file at path is the caller's to remove.
    """
    require_ffcv()
    from ffcv.fields import IntField, RGBImageField
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import DatasetWriter

    image = RGBImageField()
    # Set on the instance: ffcv writes type 255 (unknown to its Loader) for a subclass.
    image.encode = _store_row
    writer = DatasetWriter(str(path), {"image": image, "label": IntField()}, page_size=page_bytes, num_workers=num_workers)
    writer.num_samples = len(rows)
    writer.prepare()
    # fork: a spawned process would import torch and ffcv again, 4 s each. The children run Pillow and numpy copies only, no OpenMP.
    context = multiprocessing.get_context("fork")
    processes: dict[Connection, Any] = {}
    try:
        allocator = MemoryAllocator(str(path), writer.data_region_start, page_bytes)
        turn, working_on = context.Value("q", 0), context.Array("q", [-1] * num_workers, lock=False)
        for me in range(num_workers):
            ours, theirs = context.Pipe(duplex=False)
            job = (rows, writer, allocator, turn, working_on, me, theirs)
            process = context.Process(target=_write_share, args=job, daemon=True)
            with warnings.catch_warnings():
                # Python 3.12 warns of any fork in a process with threads; see above for why this one is safe.
                warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
                process.start()
            processes[ours] = process
            theirs.close()
        results = _collect(processes, rows, working_on, progress)
        # ffcv appends its pages without looking at how much of one the disk took.
        pages = allocator.next_page_allocated.value
        if pages and path.stat().st_size != allocator.offset + pages * page_bytes:
            raise RuntimeError(f"writing {path.name} failed: the disk took only part of a page (full?)")
        return _finish(writer, results, len(rows))
    finally:
        for process in processes.values():
            process.kill()
            process.join()
        with contextlib.suppress(BufferError):
            writer.metadata_sm.close()
        writer.metadata_sm.unlink()


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
