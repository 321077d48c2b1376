"""What the folders of runs say of them. Imports no torch, so that a list of them comes at once.

States: running, a process has the folder's lock; finished, with its results; collapsed, finished or not, its projections say nothing;
failed, train.log ends with the error; stopped, to be gone on with by --resume; no-checkpoint, it ended before it wrote one.
"""

import contextlib
import fcntl
import json
import os
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cossl.models.flags import unsealed

State = Literal["running", "finished", "collapsed", "failed", "stopped", "no-checkpoint"]
FAILED = "failed: "
"""How the last line of train.log begins, after its time, when the run ended by an error."""
UNSEALED = "damaged, or of another version"
"""What is said of results.json without the hash of its content, or with another one: its numbers are not shown."""
REQUEUE_EXIT_CODE = 85
"""The run was asked to stop, has written a checkpoint and is not finished: start the same command again with --resume.

A job script tests for it and calls `scontrol requeue $SLURM_JOB_ID`. Any number would do that neither a shell, a signal (128 and above) nor
Python itself gives; trap: torchrun turns it into 1.
"""

DEPTH = 3  # of folders below the one that is looked into: runs/<grid>/<task>/<run>
TAIL_BYTES = 32_768  # of metrics.jsonl: about 60 lines, among which the last kNN is looked for


@dataclass
class Run:
    """A run as its folder shows it; None where the folder does not say."""

    name: str
    state: str = "no-checkpoint"
    preset: str | None = None
    method: str | None = None
    epoch: float | None = None
    epochs: int | None = None
    knn_top1: float | None = None
    """Percent, the last one."""
    linear_top1: float | None = None
    """Percent, of a finished run."""
    images_per_s: float | None = None
    left_s: float | None = None
    """Seconds of training that are left at this speed."""
    idle_s: float | None = None
    """Seconds since the last line of metrics.jsonl."""
    notes: list[str] = field(default_factory=list)
    """What is damaged, and why it failed."""


def checkpoints(run_dir: Path) -> Iterator[str]:
    """Names of the files from which the run can go on, be they whole or not, newest first: see `checkpoint`."""
    yield from (name for name in ("next.pt", "last.pt", "previous.pt") if (run_dir / name).exists())
    yield from sorted((path.name for path in run_dir.glob("epoch-*.pt")), key=lambda name: (len(name), name), reverse=True)


def has_collapsed(std: float, rank: float) -> bool:
    """Whether the projections say nothing of their picture any more: all nearly equal, or all on one line."""
    return std < 0.1 or rank < 2


# ------------------------------------------------------------------------------------------------- one folder


def read_run(path: Path, name: str, locked: frozenset[int] | None) -> Run:
    """What the folder says; `locked` is `flocked_inodes()`. Files that are missing, damaged or half-written become notes, never errors."""
    run = Run(name)
    config, results = _read_object(path / "config.json", run), _read_results(path / "results.json", run)
    last, knn = _last_lines(path / "metrics.jsonl", run)
    run.preset, run.method, run.epochs = _word(config.get("preset")), _word(config.get("model.method")), _number(config.get("epochs"))
    run.epoch, run.images_per_s = _number(last.get("epoch")), _number(last.get("images_per_s"))
    run.left_s = _left_s(run, _number(last.get("step")), _number(config.get("batch_size")))
    trained = {
        probe: _number(results[probe].get("trained")) for probe in ("knn_top1", "linear_top1") if isinstance(results.get(probe), dict)
    }
    run.knn_top1, run.linear_top1 = trained.get("knn_top1", knn), trained.get("linear_top1")
    collapsed = results["collapsed"] is True if "collapsed" in results else _collapsed(last)
    end = last_words(path / "train.log")
    if not results and is_running(path / "lock", locked):
        run.state = "running"
        run.notes += ["collapsed"] * collapsed
    elif collapsed:
        run.state = "collapsed"
    elif results:
        run.state = "finished"
    elif end.startswith(FAILED):
        run.state = "failed"
    elif any(checkpoints(path)):
        run.state = "stopped"
    if run.state not in ("running", "finished") and end.startswith(FAILED):
        run.notes.append(end.removeprefix(FAILED))
    return run


def _left_s(run: Run, step: float | None, batch_size: float | None) -> float | None:
    if not (run.epoch and run.epochs and run.images_per_s and step and batch_size):
        return None
    return max(0.0, (run.epochs - run.epoch) * step / run.epoch * batch_size / run.images_per_s)


def _read_object(path: Path, run: Run, missing: str = "missing") -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
        if isinstance(value, dict):
            return value
        trouble = "damaged"
    except FileNotFoundError:
        trouble = missing
    except OSError as error:
        trouble = f"unreadable ({error.strerror})"
    except (ValueError, RecursionError):
        trouble = "damaged"
    if trouble:
        run.notes.append(f"{path.name} {trouble}")
    return {}


def _read_results(path: Path, run: Run) -> dict[str, Any]:
    """What the trainer has written there and nobody has changed since."""
    value = _read_object(path, run, missing="")
    try:
        return unsealed(value) if value else {}
    except ValueError as error:
        run.notes.append(f"{path.name} {UNSEALED} ({error})")
        return {}


def _last_lines(path: Path, run: Run) -> tuple[dict[str, Any], float | None]:
    """The last whole line, and the last kNN near the end. Reads TAIL_BYTES and no more, whatever the length of the file."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            run.idle_s = round(time.time() - os.fstat(file.fileno()).st_mtime, 1)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read(TAIL_BYTES).split(b"\n")
    except OSError as error:
        run.notes += [] if isinstance(error, FileNotFoundError) else [f"metrics.jsonl unreadable ({error.strerror})"]
        return {}, None
    if size > TAIL_BYTES:
        del lines[0]  # which begins in the middle
    if lines and lines.pop():
        run.notes.append("metrics.jsonl ends in half a line")
    record = _parse(lines[-1]) if lines else {}
    if record is None or (size > TAIL_BYTES and not lines):
        run.notes.append("metrics.jsonl damaged")
    knn = next((line for line in reversed(lines) if b'"knn_top1"' in line), b"{}")
    return record or {}, _number((_parse(knn) or {}).get("knn_top1"))


def _parse(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(line)
        return value if isinstance(value, dict) else None
    return None


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: Any) -> Any:
    """None: no number, or one that arithmetic fails with: JSON's integers have any size."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30 else None


def _collapsed(last: dict[str, Any]) -> bool:
    std, rank = _number(last.get("std")), _number(last.get("rank"))
    return std is not None and rank is not None and has_collapsed(std, rank)


def last_words(path: Path) -> str:
    """The last line of train.log, without its time."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
        lines = file.read(4096).decode(errors="replace").splitlines()
        return lines[-1].partition("  ")[2] if lines else ""
    return ""


# ------------------------------------------------------------------------------------------------- who runs

_ASK = "qqihh" if sys.platform == "darwin" else "hhqqi"  # struct flock
_ANYONE = (0, 0, 0, fcntl.F_WRLCK, 0) if sys.platform == "darwin" else (fcntl.F_WRLCK, 0, 0, 0, 0)


def flocked_inodes() -> frozenset[int] | None:
    """Inodes that some process of this machine has flocked; None where the kernel's list is closed to us, and none where it has no list."""
    with contextlib.suppress(OSError):
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        return frozenset(int(words[5].rpartition(":")[2]) for words in locks if len(words) > 5 and words[1] == "FLOCK")
    return None if sys.platform == "linux" else frozenset()


def is_running(lock: Path, locked: frozenset[int] | None) -> bool:
    """Whether a process has this lock, asked so that a run that starts in the same moment is not refused.

    Linux lists its locks; only where the inode (of whichever disk) is in the list, or there is none, is the lock tried for, shared, and let
    go. A network file system keeps flocks of all machines as record locks, and so do BSDs: of those one can ask without taking one.
    Trap: what a file system tells to no other machine (NFS with `local_lock=flock`, Lustre with `localflock`) is not seen from there.
    """
    try:
        with open(lock, "rb") as file:
            if locked is None or os.fstat(file.fileno()).st_ino in locked:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            answer = struct.unpack(_ASK, fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(_ASK, *_ANYONE)))
            return answer[_ANYONE.index(fcntl.F_WRLCK)] != fcntl.F_UNLCK
    except BlockingIOError:
        return True
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------- all of them


def find_runs(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Folders of runs, `folder` itself or up to so many levels below, in order of name; not inside runs nor in hidden folders."""
    with contextlib.suppress(PermissionError, FileNotFoundError):
        entries = list(os.scandir(folder))
        if {"config.json", "lock", "metrics.jsonl"} & {entry.name for entry in entries}:
            yield folder
        elif depth:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir() and not entry.name.startswith("."):
                    yield from find_runs(Path(entry.path), depth - 1)


def list_runs(folder: Path) -> list[Run]:
    """Every run in or below the folder, by name."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the one that holds the runs, as in `cossl runs /path/to/runs`")
    locked = flocked_inodes()
    return [read_run(path, str(path.relative_to(folder)) if path != folder else path.name, locked) for path in find_runs(folder)]
