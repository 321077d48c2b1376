"""Writes betons in plain numpy: the layout that ffcv 1.0.2 reads, by several processes, and after any kill from where it stood.

Layout   Header, field descriptors and the table of rows are ffcv's, version 2. Row i of it is the i-th picture kept, in the order given.
         The payloads lie in another, fixed pseudo-random order (`storage_order`): every page is a mix of classes, and pages read one
         after the other are a shuffled epoch. A payload lies inside one page; one that would cross a page's end starts the next.
Work     The storage order is cut into shards. A worker process prepares a shard, learns from the shard before it where it starts, says
         where it ends, and writes. So the place of every byte follows from the pictures alone: neither the number of workers nor a kill
         changes the file.
Safety   `beton_partial.py`: finished shards are journaled with their hashes, so that a resumed conversion goes on behind them.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import multiprocessing
import os
import signal
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cossl.pipelines.beton import ALLOCATION, FIELD, HEADER, IMAGE, Rows, digests
from cossl.pipelines.beton_partial import Partial, Shard

FIELDS = {"image": 2, "label": 1}  # name -> ffcv's type number
ROW = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
PAGE_BYTES = 1 << 23
HELD_BYTES = 1 << 27  # a worker waits for its place in the file rather than hold more
SEED = 0x636F73736C  # of the storage order
_ZEROS = bytes(PAGE_BYTES)


def storage_order(n: int) -> NDArray[np.int64]:
    """The numbers 0..n-1 in the order in which the payloads lie in the file; raw Philox words, so the same with every numpy."""
    return np.argsort(np.random.Philox(key=SEED).random_raw(n), kind="stable")


def shard_rows(n: int) -> int:
    """Rows of a shard: few enough that all workers end together, and that a kill loses little; many enough for a short manifest."""
    return min(256, max(16, n // 256))


def place(position: int, size: int) -> int:
    """Where `size` bytes go at or after `position`: into one aligned block of 8 MiB, or of the power of two that holds them.

    The page size of the file is the largest such block; the smaller ones divide it, so nothing crosses a page.
    """
    block = max(PAGE_BYTES, 1 << (size - 1).bit_length())
    return position if position % block + size <= block else -(-position // block) * block


def data_start(n: int) -> int:
    """Where the payloads of n rows begin: at the first page after the table."""
    return -(-(HEADER.itemsize + len(FIELDS) * FIELD.itemsize + n * ROW.itemsize) // PAGE_BYTES) * PAGE_BYTES


@dataclass
class Written:
    """Pictures left out (index -> reason), rows by how they were stored, and the SHA-256 of each stretch of the file, by its end."""

    left_out: dict[int, str] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)
    chunk_ends: list[int] = field(default_factory=list)
    chunk_sha256: list[str] = field(default_factory=list)


# ---- worker processes -------------------------------------------------------------------------------------------------------------


@dataclass
class _Job:
    """What the workers of one conversion share: the rows, the file, and in shared memory the next shard, the ends, and who is where."""

    rows: Rows
    order: NDArray[np.int64]
    file: int
    parent: int  # process id
    turn: Any  # the next shard that nobody has taken
    ends: Any  # ends[k]: where shard k starts, -1 until the shard before it has said so
    working_on: Any  # of each worker, the picture it is at

    def shard(self, number: int) -> NDArray[np.int64]:
        rows = shard_rows(len(self.rows))
        return self.order[number * rows : (number + 1) * rows]

    def take(self) -> int:
        with self.turn.get_lock():
            self.turn.value += 1
            return int(self.turn.value) - 1


class _Preparing:
    """A shard on its way into the file: `held` payloads are prepared and not yet written, `position` is where the next one may go."""

    def __init__(self, number: int) -> None:
        self.number, self.start, self.position, self.whole = number, -1, -1, False
        self.rows: list[Any] = []
        self.stored: Counter[str] = Counter()
        self.held: list[NDArray[np.uint8]] = []
        self._digest = hashlib.sha256()

    def write(self, job: _Job) -> None:
        """Writes what is held; first of all, if the shard is whole, it tells the next one where to start."""
        if self.start < 0:
            self.start = self.position = job.ends[self.number]
        places, end = [], self.position
        for payload in self.held:
            places.append(place(end, payload.size))
            end = places[-1] + payload.size
        if self.whole:
            job.ends[self.number + 1] = end
        for at, payload in zip(places, self.held, strict=True):
            while gap := min(at - self.position, PAGE_BYTES):  # left as a hole in the file, which reads as zeros
                self._digest.update(memoryview(_ZEROS)[:gap])
                self.position += gap
            rest = payload.data
            while rest:
                written = os.pwrite(job.file, rest, self.position + payload.size - len(rest))
                rest = rest[written:]
            self._digest.update(payload.data)
            self.position += payload.size
        self.held.clear()

    def finished(self) -> Shard:
        return Shard(self.start, self.position, self._digest.hexdigest(), self.rows, dict(self.stored))


class _Outbox:
    """The shards of one worker that wait for their place, first come first written."""

    def __init__(self, job: _Job, report: Connection) -> None:
        self._job, self._report = job, report
        self._shards: deque[_Preparing] = deque()
        self.held_bytes = 0

    def check_parent(self) -> None:
        if os.getppid() != self._job.parent:  # the command itself was killed
            os._exit(1)

    def open(self, number: int) -> _Preparing:
        self._shards.append(_Preparing(number))
        return self._shards[-1]

    def write(self, most_bytes: int) -> None:
        """Writes the whole shards whose start is known; while more than most_bytes are held, waits for more and writes the open one too."""
        while self._shards:
            shard = self._shards[0]
            if self.held_bytes <= most_bytes and (not shard.whole or self._job.ends[shard.number] < 0):
                return
            if self._job.ends[shard.number] < 0:
                self.check_parent()
                time.sleep(0.001)
                continue
            self.held_bytes -= sum(payload.size for payload in shard.held)
            shard.write(self._job)
            if not shard.whole:
                return
            self._report.send(("shard", (shard.number, shard.finished())))
            self._shards.popleft()


def _keep_freed_memory() -> None:
    """Tells glibc not to give freed payloads back to the kernel: taking the pages again costs a raw 224-px picture 60 us of 430."""
    with suppress(AttributeError, OSError):  # another C library
        mallopt, (trim_threshold, mmap_threshold) = ctypes.CDLL(None).mallopt, (-1, -3)
        mallopt(mmap_threshold, 1 << 25)  # the most that glibc takes
        mallopt(trim_threshold, 2 * HELD_BYTES)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """An interrupt waits until the end: a process forked here ignores it before it can hear it, and the parent knows of the process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(job: _Job, me: int, report: Connection) -> None:
    """One worker process: shard after shard until none is left. Reports each shard, then the end, or its one error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends this process
    _keep_freed_memory()
    gc.freeze()  # a collection would copy every page of the parent's memory that holds an object
    outbox = _Outbox(job, report)
    try:
        while len(picture_numbers := job.shard(number := job.take())):
            shard = outbox.open(number)
            for i in picture_numbers.tolist():
                outbox.check_parent()
                job.working_on[me] = i
                row = job.rows[i]
                if isinstance(row, str):
                    shard.rows.append(row)
                    continue
                shard.rows.append([row.mode, row.height, row.width, row.payload.size])
                shard.stored[row.stored] += 1
                shard.held.append(row.payload)
                outbox.held_bytes += row.payload.size
                if outbox.held_bytes > HELD_BYTES:
                    outbox.write(HELD_BYTES)
            shard.whole = True
            outbox.write(HELD_BYTES)
        outbox.write(-1)
        job.working_on[me] = -1
        report.send(("done", None))
    except Exception as error:
        report.send(("error", str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"))


def _collect(processes: dict[Connection, Any], job: _Job, partial: Partial, progress: Callable[[int], None]) -> None:
    """Journals the workers' shards, in order. Raises RuntimeError as soon as a worker reports an error or ends without a word.

    Each process holds the only writing end of its own pipe, so its death reads as end of file at once.
    """
    early: dict[int, Shard] = {}  # finished before a shard that lies before them
    pending = {pipe: (me, process) for me, (pipe, process) in enumerate(processes.items())}
    while pending:
        for pipe in wait(list(pending)):
            assert isinstance(pipe, Connection)
            me, process = pending[pipe]
            at = f" at {job.rows.name(job.working_on[me])}" if job.working_on[me] >= 0 else ""
            try:
                kind, content = pipe.recv()
            except (EOFError, OSError):
                process.join(5)
                hint = " (killed: out of memory?)" if process.exitcode == -signal.SIGKILL else f" (exit code {process.exitcode})"
                raise RuntimeError(f"a writer process died{at}{hint}") from None
            if kind == "error":
                raise RuntimeError(f"writing failed{at}: {content}")
            if kind == "done":
                del pending[pipe]
                continue
            number, early[number] = content
            progress(len(early[number].rows))
            while len(partial.shards) in early:
                partial.add(early.pop(len(partial.shards)))


def write_rows(
    partial: Partial, rows: Rows, labels: Sequence[int], *, num_workers: int, progress: Callable[[int], None] = lambda _: None
) -> Written:
    """Completes partial.beton: a row, fields `image` and `label`, for each of rows[0], rows[1], ... that is not left out.

    Raises RuntimeError when a worker fails (a source file is gone, the disk is full) or dies (out of memory), OSError when this process
    cannot write. Whatever it raises, no process is left and the shards journaled so far are good.
    """
    order, size = storage_order(len(rows)), shard_rows(len(rows))
    num_shards, done = -(-len(rows) // size), len(partial.shards)
    # fork: a spawned process would import numba and Pillow again. The children run Pillow, numpy and numba without its threads.
    context = multiprocessing.get_context("fork")
    ends = context.Array("q", [-1] * (num_shards + 1), lock=False)
    ends[done] = partial.shards[-1].end if done else data_start(len(rows))
    num_workers = min(num_workers, num_shards - done)
    processes: dict[Connection, Any] = {}
    with partial.beton.open("r+b", buffering=0) as file:
        working_on = context.Array("q", [-1] * num_workers, lock=False)
        job = _Job(rows, order, file.fileno(), os.getpid(), context.Value("q", done), ends, working_on)
        try:
            for me in range(num_workers):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(job, me, theirs), daemon=True)
                with warnings.catch_warnings(), _interrupts_held():
                    # Python 3.12 warns of any fork in a process with threads; see above for why this one is safe.
                    warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
                    process.start()
                    processes[ours] = process
                theirs.close()
            _collect(processes, job, partial, progress)
        finally:
            for process in processes.values():
                process.kill()
                process.join()
        written = _finish(file, partial.shards, order, np.asarray(labels))
        os.fsync(file.fileno())
    start, end, size = data_start(len(rows)), partial.shards[-1].end, written.chunk_ends[-1]
    written.chunk_sha256 = [
        *digests(partial.beton, 0, [start], 1),
        *(shard.sha256 for shard in partial.shards),
        *digests(partial.beton, end, [size], 1),
    ]
    return written


# ---- tables -----------------------------------------------------------------------------------------------------------------------


def _finish(file: BinaryIO, shards: list[Shard], order: NDArray[np.int64], labels: NDArray[Any]) -> Written:
    """Writes allocation table, row table and header around the payloads."""
    n, written, stored = len(order), Written(), Counter[str]()
    table, starts, sizes = np.zeros(n, ROW), np.zeros(n, np.int64), np.zeros(n, np.int64)
    table["label"] = labels
    for number, shard in enumerate(shards):
        stored.update(shard.stored)
        position, first = shard.start, number * shard_rows(n)
        for i, row in zip(order[first : first + len(shard.rows)].tolist(), shard.rows, strict=True):
            if isinstance(row, str):
                written.left_out[i] = row
                continue
            mode, height, width, sizes[i] = row
            starts[i] = place(position, row[3])
            position = int(starts[i]) + row[3]
            table["image"][i] = mode, width, height, starts[i]
    kept = np.flatnonzero(sizes)
    allocations = np.zeros(len(kept), ALLOCATION)
    allocations["sample_id"], allocations["ptr"], allocations["size"] = np.arange(len(kept)), starts[kept], sizes[kept]
    allocations = np.sort(allocations, order="ptr")  # ffcv's, too, follow the file
    page_bytes = max(PAGE_BYTES, 1 << (int(sizes.max()) - 1).bit_length())
    end = shards[-1].end
    table_at = -(-end // page_bytes) * page_bytes
    # As bytes: numpy's own indexing leaves what it likes in the padding of a row.
    head = _head(len(kept), page_bytes, table_at) + table.view(np.uint8).reshape(n, ROW.itemsize)[kept].tobytes()
    os.truncate(file.fileno(), table_at)
    for at, data in ((table_at, allocations.tobytes()), (0, head)):
        file.seek(at)
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
    written.stored, written.left_out = dict(sorted(stored.items())), dict(sorted(written.left_out.items()))
    written.chunk_ends = [data_start(n), *(shard.end for shard in shards), table_at + allocations.nbytes]
    return written


def _head(num_rows: int, page_bytes: int, table_at: int) -> bytes:
    """Header and field descriptors; ffcv's image and integer fields take no arguments, which are zeros then."""
    header, fields = np.zeros((), HEADER), np.zeros(len(FIELDS), FIELD)
    header["version"], header["num_fields"], header["page_size"] = 2, len(FIELDS), page_bytes
    header["num_samples"], header["alloc_table_ptr"] = num_rows, table_at
    for descriptor, (name, kind) in zip(fields, FIELDS.items(), strict=True):
        descriptor["type_id"] = kind
        descriptor["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    return header.tobytes() + fields.tobytes()
