"""A beton on its way: the folder beside the target in which a conversion grows, and from which it goes on after any kill.

`.<name>.partial` holds the beton, and a journal with one line per finished shard, in order, that holds the SHA-256 of the shard's bytes
and, in front, its own. A resumed conversion believes the lines for which both hold (a kill or a power failure may have torn the last ones)
and goes on behind them. The journal is locked while any process of a conversion lives: the lock dies with the last one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cossl.pipelines.beton import digests

LOCK_PATIENCE_S = 2.0  # the workers of a killed conversion end within a picture or so


class Shard(NamedTuple):
    """A finished shard, as the journal holds it: bytes start..end of the file, and for each picture its row or why it is left out."""

    start: int
    end: int
    sha256: str
    rows: list[Any]  # [mode, height, width, bytes], or the reason (str)
    stored: dict[str, int]


def partial_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


def _content(line: bytes) -> dict[str, Any]:
    """What a line of the journal says. Raises ValueError for one that is not as it was written."""
    digest, _, text = line.removesuffix(b"\n").partition(b" ")
    if digest != _digest(text):
        raise ValueError("a damaged line")
    content: dict[str, Any] = json.loads(text)
    return content


class Partial:
    """The folder `.<name>.partial` beside the target, locked: an unfinished beton and its journal."""

    def __init__(self, out: Path) -> None:
        self.folder = partial_folder(out)
        self.beton, self.manifest, self.journal = (self.folder / name for name in ("beton", "beton.json", "journal"))
        self.shards: list[Shard] = []
        self._file = self._lock()

    def _lock(self) -> BinaryIO:
        """The journal, opened and locked. Raises ValueError when a living process holds it."""
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while (file := self._try_lock()) is None:
            if time.monotonic() > deadline:
                raise ValueError(f"another conversion is at work in {self.folder}; wait for it, or stop it")
            time.sleep(0.05)
        return file

    def _try_lock(self) -> BinaryIO | None:
        """The locked journal; None while another process holds it, or has just finished and removed the folder."""
        with ExitStack() as opened, suppress(BlockingIOError, FileNotFoundError):
            self.folder.mkdir(exist_ok=True)
            file = opened.enter_context(self.journal.open("a+b", buffering=0))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                    raise
                print(f"{self.folder.parent} knows no locks: see to it that no other conversion writes the same beton", file=sys.stderr)
            if os.path.samestat(os.fstat(file.fileno()), self.journal.stat()):
                opened.pop_all()
                return file
        return None

    def begin(self, identity: dict[str, Any], start: int, *, resume: bool, restart: bool, num_threads: int) -> None:
        """Takes up what the journal proves done, or starts an empty one. Raises ValueError when what is there should not be lost."""
        lines = self._file_lines()
        if len(lines) > 1 and not restart:
            try:
                found = _content(lines[0])
            except ValueError:
                raise ValueError(f"{self.journal} does not say what was converted; --force starts again") from None
            if not resume:
                raise ValueError(f"{self.folder} holds an unfinished conversion; --resume goes on with it, --force starts again")
            if found != identity:
                changed = ", ".join(f"{key} {found.get(key)} is now {value}" for key, value in identity.items() if found.get(key) != value)
                raise ValueError(f"{self.folder} holds a conversion of other pictures or options ({changed}); --force starts again")
            self.shards = self._proved(lines[1:], start, num_threads)
        kept = sum(map(len, lines[: len(self.shards) + 1])) if self.shards else 0
        self._file.truncate(kept)
        if not kept:
            self._append(identity)
        self.manifest.unlink(missing_ok=True)
        with self.beton.open("ab") as file:
            file.truncate(self.shards[-1].end if self.shards else 0)

    def _file_lines(self) -> list[bytes]:
        """The whole lines of the journal; only its last write can have been torn."""
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]

    def _proved(self, lines: Sequence[bytes], start: int, num_threads: int) -> list[Shard]:
        """The shards at the head of the file whose bytes are those that the journal states."""
        shards: list[Shard] = []
        for line in lines:
            try:
                shard = Shard(**_content(line))
            except ValueError:
                break
            if shard.start != (shards[-1].end if shards else start):
                break
            shards.append(shard)
        if not self.beton.exists():
            return []
        ours = digests(self.beton, start, [shard.end for shard in shards], num_threads)
        good = next((i for i, (shard, digest) in enumerate(zip(shards, ours, strict=True)) if shard.sha256 != digest), len(shards))
        return shards[:good]

    def num_journaled(self) -> int:
        return max(0, len(self._file_lines()) - 1)

    def _append(self, content: dict[str, Any]) -> None:
        text = json.dumps(content, separators=(",", ":")).encode()
        line = memoryview(_digest(text) + b" " + text + b"\n")
        while line:
            line = line[self._file.write(line) :]

    def add(self, shard: Shard) -> None:
        self._append(shard._asdict())
        self.shards.append(shard)

    def close(self, *, remove: bool) -> None:
        """Gives the lock back, with or without the folder."""
        if remove:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._file.close()


@contextmanager
def partial_beton(out: Path, identity: dict[str, Any], start: int, *, resume: bool, restart: bool, num_threads: int) -> Iterator[Partial]:
    """The locked Partial of out, begun. It is removed at the end, unless the disk or a process failed and finished shards can be kept."""
    partial = Partial(out)
    try:
        partial.begin(identity, start, resume=resume, restart=restart, num_threads=num_threads)
    except BaseException:
        partial.close(remove=False)
        raise
    keep = False
    try:
        yield partial
    except (OSError, RuntimeError) as error:
        if keep := bool(partial.shards):
            done = sum(len(shard.rows) for shard in partial.shards)
            raise RuntimeError(f"{error}. {done:,} pictures are done and kept: put it right, then go on with --resume") from error
        raise
    except KeyboardInterrupt:
        keep = partial.num_journaled() > 0  # it may come between a line of the journal and all that follows
        raise
    finally:
        partial.close(remove=not keep)
