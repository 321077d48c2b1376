"""The folder of a run: which one, what is in it as text, whose it is, and when the run should stop.

`config.json` is what the run is, `environment.json` what it ran on at each start, `lock` who runs it now.
"""

import contextlib
import fcntl
import functools
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from datetime import datetime
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from cossl.models import checkpoint
from cossl.models.flags import config_hash, replace_text
from cossl.models.run_status import REQUEUE_EXIT_CODE

# ------------------------------------------------------------------------------------------------- which one


def check(run_dir: Path | None, resume: bool) -> None:
    """ValueError if the folder holds another run, or, to resume, none. None is a default folder, which is yet to be made.

    To resume, a folder that is not there yet is right too, and one that a run left before its first checkpoint: a job that may be
    requeued at any moment has one command for its start and for going on.
    """
    if run_dir is None:
        if resume:
            raise ValueError("--resume needs --run-dir, the folder of the run to go on with")
    elif resume:
        if not checkpoint.exists(run_dir) and (run_dir / "results.json").exists():
            raise ValueError(f"{run_dir} holds a finished run without its checkpoints: put them back, or choose another --run-dir")
        known = checkpoint.exists(run_dir) or (run_dir / "config.json").exists() or not run_dir.exists()
        if not known and any(path.name not in ("lock", "train.log") for path in run_dir.iterdir()):
            raise ValueError(f"{run_dir} is no run's folder, it has no config.json: give the one of the run to go on with")
    elif run_dir.exists() and (not run_dir.is_dir() or any(path.name != "lock" for path in run_dir.iterdir())):
        raise ValueError(f"{run_dir} holds something already: go on with it by --resume, or choose another --run-dir")


def make_default(preset: str) -> Path:
    """A new folder runs/<preset>-<date>-<time>, or with -2, -3, ... after it for runs that start in the same second."""
    first = Path("runs") / f"{preset}-{datetime.now():%Y%m%d-%H%M%S}"
    first.parent.mkdir(exist_ok=True)
    run_dir, number = first, 1
    while True:
        with contextlib.suppress(FileExistsError):
            run_dir.mkdir()
            return run_dir
        number += 1
        run_dir = first.with_name(f"{first.name}-{number}")


def keep_metrics(path: Path, last_step: int) -> None:
    """Drops the lines of steps that the checkpoint does not know, one of its own step that comes after it, and one that a kill cut off."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            if record["step"] > last_step or (record["step"] == last_step and "knn_top1" in record):
                break
        except (ValueError, KeyError):
            break
        kept.append(line + "\n")
    replace_text(path, "".join(kept))


# ------------------------------------------------------------------------------------------------- whose it is

_held: set[int] = set()


@contextlib.contextmanager
def lock(run_dir: Path, wait_s: float = 0) -> Iterator[None]:
    """The folder, made if need be, is this process's alone inside the block. ValueError naming the owner if it is another's for `wait_s`.

    The kernel holds the lock (flock) and drops it when its owner ends, however it ends; the text of `<run_dir>/lock` only says who took it
    last, and stays. Forked loader workers do not inherit it, so they cannot outlive their owner with it. Of several ranks, one takes it.

    Trap: on NFS a lock holds between machines only if the mount passes locks to the server. With `nolock` or `local_lock=flock` two nodes
    can both have it; and a server may keep the lock of a node that crashed for its lease or grace time, a minute or two, in which a
    requeued run is refused.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    _forks_let_go()
    file = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(file)
    try:
        _take(file, run_dir, wait_s)
        yield
    finally:
        if file in _held:  # not in a forked child
            _held.remove(file)
            os.close(file)


def _take(file: int, run_dir: Path, wait_s: float) -> None:
    until, waiting = time.monotonic() + wait_s, False
    while not _try(file, run_dir):
        owner = os.pread(file, 1000, 0).decode(errors="replace").strip() or "another process"
        left_s = until - time.monotonic()
        if left_s <= 0:
            raise ValueError(f"{run_dir} is in use by {owner}: wait for it, stop it, or choose another --run-dir")
        if not waiting:
            print(f"{run_dir} is in use by {owner}: waiting up to {wait_s:g} s for it", file=sys.stderr, flush=True)
        waiting = True
        time.sleep(min(1, left_s))
    os.ftruncate(file, 0)
    os.write(file, f"process {os.getpid()} on {platform.node()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n".encode())


def _try(file: int, run_dir: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise OSError(f"{run_dir} cannot be locked ({error.strerror}): choose a --run-dir on a file system that has locks") from error
    return True


@functools.cache
def _forks_let_go() -> None:
    def let_go() -> None:
        while _held:
            os.close(_held.pop())

    os.register_at_fork(after_in_child=let_go)


# ------------------------------------------------------------------------------------------------- what it ran on

ROOT = Path(__file__).resolve().parent.parent
DIFF_LIMIT = 1_000_000


def record_start(run_dir: Path) -> None:
    """Appends this start to the list in environment.json: see `environment`. A diff equal to that of the start before is left out."""
    path = run_dir / "environment.json"
    starts = json.loads(path.read_text()) if path.exists() else []
    start, diffs = environment(), [s["code"]["diff"] for s in starts if "diff" in s["code"]]
    if diffs[-1:] == [start["code"]["diff"]]:
        del start["code"]["diff"]
    replace_text(path, json.dumps([*starts, start], indent=1))


def environment() -> dict[str, Any]:
    """What a start ran on: time, command, host, processors, GPUs and driver, versions, SLURM job, and the source with its changes."""
    cpuinfo, driver = Path("/proc/cpuinfo"), Path("/proc/driver/nvidia/version")
    models = [line.split(":")[1].strip() for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else []) if "model name" in line]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    packages = ("torch", "torchvision", "numpy", "numba", "timm", "pillow", "ffcv", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.orig_argv,
        "host": platform.node(),
        "pid": os.getpid(),
        "cpu": models[0] if models else platform.processor(),
        "cpu_count": os.cpu_count(),
        "gpus": gpus,
        "driver": driver.read_text().splitlines()[0] if driver.exists() else None,
        "versions": versions(*packages) | {"cuda": torch.version.cuda},
        "slurm": {name: value for name, value in os.environ.items() if name in SLURM_NAMES},
        "code": code() | {"version": code_version()},
    }


SLURM_NAMES = "SLURM_JOB_ID SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID SLURM_RESTART_COUNT SLURM_JOB_NODELIST SLURM_JOB_END_TIME".split()


def stamp(config: dict[str, Any], may_change: Collection[str] = ()) -> dict[str, Any]:
    """What a checkpoint says of its origin: the flat config, its hash without the keys that may change, code version, library versions."""
    identity = {"config": config, "config_hash": config_hash(config, may_change)}
    return identity | {"code_version": code_version(), "versions": versions("numpy", "torch")}


def versions(*packages: str) -> dict[str, str]:
    """{"python": "3.12.1", "torch": "2.11.0", ...}; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def code_version() -> str:
    """0.1.0+g<commit>, with .dirty where the source differs from the commit; the package's version alone outside a git checkout."""
    try:
        version = metadata.version("cossl")
    except metadata.PackageNotFoundError:
        version = "unknown"
    source = code()
    return version if source["commit"] is None else f"{version}+g{source['commit'][:12]}{'.dirty' if source['dirty'] else ''}"


def code() -> dict[str, Any]:
    """Commit of the source tree, whether it differs from it (tracked files, new .py files), and the diff, cut after 1 MB.

    Of a snapshot, `<somewhere>/cossl` with this function's answer of then in `<somewhere>/code.json`, it is that answer. commit None where
    the tree is neither that nor a git checkout of its own, or git cannot say. As it was when first asked: code is loaded once.
    """
    return dict(_code(ROOT))


@functools.cache
def _code(root: Path) -> dict[str, Any]:
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top.strip()).resolve() != root:
        return _noted(root.parent / "code.json") or {"commit": None, "dirty": None, "diff": None, "new_files": []}
    commit, diff = (_git(root, "rev-parse", "HEAD") or "").strip(), _git(root, "diff", "--no-ext-diff", "HEAD") or ""
    new_files = (_git(root, "ls-files", "--others", "--exclude-standard", "--", "*.py") or "").splitlines()
    cut = diff if len(diff) <= DIFF_LIMIT else f"{diff[:DIFF_LIMIT]}\n[cut: the diff has {len(diff):,} characters]\n"
    return {"commit": commit, "dirty": bool(diff or new_files), "diff": cut, "new_files": new_files}


def _noted(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        noted = json.loads(path.read_bytes())
        if isinstance(noted, dict) and noted.keys() == {"commit", "dirty", "diff", "new_files"}:
            return noted
    return None


def _git(root: Path, *arguments: str) -> str | None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}  # set where git itself runs us, for another tree
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


# ------------------------------------------------------------------------------------------------- when it should stop

STOP_BEFORE_END_S = 120  # of a job with a known time limit: a step, a checkpoint, and what the site's clock is off
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def leave_on_stop() -> Iterator[None]:
    """Inside the block a stop signal ends the process at once with REQUEUE_EXIT_CODE: for what comes after the last checkpoint."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(REQUEUE_EXIT_CODE)

    before = {number: signal.signal(number, leave) for number in STOP_SIGNALS if signal.getsignal(number) is not None}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """True once SIGTERM, SIGUSR1 or SIGUSR2 came inside the block, or the time `at` (seconds since 1970) is past; `reason` says which.

    The training loop asks between two steps, writes a checkpoint and leaves. A second signal changes nothing: only SIGKILL, or Ctrl-C,
    ends the step. At the end of the block the handlers of before are back, and those written in Python are then called for the signals
    that came: not earlier, because submitit's (SIGUSR2) requeues and exits on the spot, before there is a checkpoint. One that came after
    the last question and had no handler ends the process then, unless it is leaving by an exception anyway. Where that is the exit with
    REQUEUE_EXIT_CODE, signals without a handler are ignored from then on. One whose handler was set in C is left to it, since Python could
    not put it back.

    Main thread only (ValueError otherwise). Trap: ranks are told at different steps and must agree on one (all-reduce the flag).
    """

    def __init__(self, at: float | None = None):
        self.at, self.reason, self._told = at, "", False
        self._before: dict[signal.Signals, Any] = {}
        self._came: list[int] = []

    def __enter__(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not None:
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name
        self._came.append(number)

    def __bool__(self) -> bool:
        if not self.reason and self.at is not None and time.time() >= self.at:
            self.reason = "the job's time limit"
        self._told = bool(self.reason)
        return self._told

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        leaving = isinstance(error, SystemExit) and error.code == REQUEUE_EXIT_CODE
        for number, handler in self._before.items():
            # srun, or who asked, may send SIGTERM to a process that has stopped and is slow to end: it is not to look as if it had failed.
            signal.signal(number, signal.SIG_IGN if leaving and handler == signal.SIG_DFL else handler)
        came = {number: handler for number, handler in self._before.items() if number in self._came}
        for number in (number for number, handler in came.items() if callable(handler)):
            signal.raise_signal(number)
        for number in (number for number, handler in came.items() if handler == signal.SIG_DFL):
            if not self._told and error is None:
                signal.raise_signal(number)


def deadline(seconds_before_end: float = STOP_BEFORE_END_S) -> float | None:
    """When to stop (seconds since 1970) so as to be that long before the job's time limit; None outside a SLURM job or without a limit.

    In a short job a quarter of its time before its end, or it would stop as soon as it began. From SLURM_JOB_START_TIME and
    SLURM_JOB_END_TIME. Trap: a limit changed later (`scontrol update TimeLimit`) does not reach the running job.
    """
    start, end = (os.environ.get(f"SLURM_JOB_{name}_TIME", "") for name in ("START", "END"))
    if not end:
        return None
    return int(end) - min(seconds_before_end, (int(end) - int(start)) / 4 if start else seconds_before_end)
