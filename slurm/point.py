"""What a job does for its point, beside training: whether to begin, betons to the node's own disk, whether to be queued again.

A job's script calls `begin`, starts the tasks by srun, and calls `end` with their exit code:

    python -m cossl.slurm.point begin SWEEP ARRAY     exit code 0: start; 3: nothing is to be done, for a reason that it prints
    srun ... (each task: `run`, which becomes `cossl train` by exec)
    python -m cossl.slurm.point end SWEEP ARRAY CODE

So nothing of submitit is alive in the tasks: no handler that requeues before there is a checkpoint, or ignores SIGTERM, no pickled result
that tells of an attempt which is long over. Requeueing is the batch script's alone: it outlives the tasks and exists once.
No torch here: what is slow to import is imported once, by the trainer.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cossl.models.flags import replace_text
from cossl.models.run_status import REQUEUE_EXIT_CODE, last_words
from cossl.slurm.folder import Point, Sweep, read_sweep, results_of

NOTHING_TO_DO = 3
STOPPED_CODES = (REQUEUE_EXIT_CODE, 128 + 10, 128 + 12)
"""Of the trainer: 85 with a checkpoint; killed by SIGUSR1 or SIGUSR2 where they came before it could catch them."""
KILLED_CODE = 128 + 15
"""Killed by SIGTERM: of several tasks it may be what became of the rest when one failed, as srun gives the highest code of all."""
LOCK_WAIT_S = 600
"""How long a requeued run waits for the lock of its dying predecessor; a server of network files may keep it for a minute or two."""
MOST_STARTS = 5
"""Starts of one job in a row that find no newer checkpoint than the one before: then it is not queued again."""

# ------------------------------------------------------------------------------------------------- which job, which point


def job_name() -> str:
    """123 or 123_4: the SLURM job that this process is in. ValueError outside one."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        return f"{array}_{task}"
    if "SLURM_JOB_ID" not in os.environ:
        raise ValueError("not in a SLURM job: this is what a sweep's jobs call")
    return os.environ["SLURM_JOB_ID"]


def point_of(sweep: Sweep, array: Path) -> Point:
    """The point of this element of the array, whose file lists identities."""
    identity = json.loads(array.read_text())[int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))]
    return next(point for point in sweep.points if point.identity == identity)


def record_of(folder: Path, job: str) -> dict[str, Any]:
    """{"code": 1, "why": "..."}: how the job ended, as it said itself; {} if it did not. `folder` is the sweep's."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((folder / "exits" / job).read_text())
        return record if isinstance(record, dict) else {}
    return {}


def record(folder: Path, job: str, code: int | None, why: str) -> None:
    """Writes what `record_of` reads."""
    (folder / "exits").mkdir(exist_ok=True)
    replace_text(folder / "exits" / job, json.dumps({"code": code, "why": why}))


CANCELLED = "cancelled"

# ------------------------------------------------------------------------------------------------- before the tasks


def begin(sweep: Sweep, point: Point, job: str) -> str:
    """Why the point is not to be started now, "" if it is. Takes back what an earlier attempt of the same job recorded."""
    if record_of(sweep.folder, job).get("why") == CANCELLED:
        return "the sweep was cancelled"  # and its job queued again in the same moment
    if results_of(sweep.run_dir(point), point) is not None:
        record(sweep.folder, job, 0, "was done already")
        return f"{point.run} is done already"
    starts = sweep.folder / "exits" / f"{job}.starts"
    starts.parent.mkdir(exist_ok=True)
    before = starts.read_text().splitlines() if starts.exists() else []
    now = _progress(sweep.run_dir(point))
    if len(before) >= MOST_STARTS and set(before[-MOST_STARTS:]) == {now}:
        why = (
            f"gave up: {MOST_STARTS} starts of job {job} in a row without a new checkpoint; see its log, then `cossl sweep retry --failed`"
        )
        record(sweep.folder, job, 1, why)
        return why
    with open(starts, "a") as file:
        file.write(now + "\n")
    if record_of(sweep.folder, job).get("why") != CANCELLED:
        (sweep.folder / "exits" / job).unlink(missing_ok=True)
    return ""


def _progress(run_dir: Path) -> str:
    times = [0]
    for name in ("next.pt", "last.pt"):
        with contextlib.suppress(FileNotFoundError):  # renamed in this moment by a predecessor that still dies
            times.append((run_dir / name).stat().st_mtime_ns)
    return str(max(times))


# ------------------------------------------------------------------------------------------------- a task


def run(folder: str, array: str, scratch: str) -> NoReturn:
    """Becomes the trainer, in a task of a job. What a pickle of submitit calls: folder of the sweep, file of the array, Cluster.scratch."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT):  # submitit's handlers, while betons are copied
        signal.signal(number, signal.SIG_DFL)
    require_snapshot(Path(folder))
    sweep = read_sweep(Path(folder))
    become_trainer(sweep, point_of(sweep, Path(array)), scratch)


def become_trainer(sweep: Sweep, point: Point, scratch: str = "") -> NoReturn:
    """`cossl train` in the place of this process, by the same interpreter and from the same source as this file."""
    command = trainer(sweep, point, scratch)
    print(f"cossl sweep: {shlex.join(command[4:])}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os.execve(command[0], command, os.environ | tracker_id(point))


def tracker_id(point: Point) -> dict[str, str]:
    """The variable by which wandb knows a run again, wherever it goes on."""
    return {"WANDB_RUN_ID": point.identity}


def trainer(sweep: Sweep, point: Point, scratch: str = "") -> list[str]:
    """The command that starts the point or goes on with it."""
    flags = list(point.flags)
    if scratch and "--data" in flags:
        at = flags.index("--data") + 1
        flags[at] = str(staged(Path(flags[at]), Path(os.path.expandvars(scratch))))
    place = ["--run-dir", str(sweep.run_dir(point)), "--resume", "--lock-wait-s", str(LOCK_WAIT_S)]
    return [sys.executable, "-u", "-m", "cossl.train", point.preset, *flags, *place]


def require_snapshot(folder: Path) -> None:
    """RuntimeError unless this file is of a sweep's code/: an editable install or the working folder can get in between."""
    root, here = folder.resolve().parent, Path(__file__).resolve()
    if not any(parent.name == "code" and parent.parent.parent == root for parent in here.parents):
        raise RuntimeError(
            f"this job runs {here.parent.parent} and not a snapshot of {folder}: see PYTHONPATH, and `python` of the cluster"
        )


# ------------------------------------------------------------------------------------------------- betons to the node's own disk


def staged(data: Path, scratch: Path) -> Path:
    """The folder on this node's disk with copies of data's betons and manifests; `data` itself where they have no room, which is said.

    The first process on the node copies, the others wait for it, tasks of other jobs too; a copy that is there already, with the size and
    the time of the original, is used. A folder of pictures is not copied.
    """
    betons = sorted(data.glob("*.beton*")) if (data / "train.beton").exists() else []
    if not betons:
        return data
    if not scratch.is_absolute():  # else it would be a folder beside the code, on the shared disk
        print(f"cossl sweep: scratch {scratch}: no absolute path, or a variable that this node has not: reading {data}", file=sys.stderr)
        return data
    name = "-".join(data.absolute().parts[1:])
    target = scratch / f"cossl-{os.getuid()}" / name
    target.mkdir(parents=True, exist_ok=True)
    with open(target / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [path for path in betons if not _same(path, target / path.name)]
        need, free = sum(path.stat().st_size for path in missing), shutil.disk_usage(target).free
        if need > free:
            print(f"cossl sweep: {target} has {free / 2**30:.1f} GiB free, {need / 2**30:.1f} are needed: reading {data}", file=sys.stderr)
            return data
        for path in missing:
            part = target / (path.name + ".part")
            try:
                shutil.copy2(path, part)
            except OSError as error:  # another job has filled the disk meanwhile
                part.unlink(missing_ok=True)
                print(f"cossl sweep: {target}: {error.strerror}: reading {data}", file=sys.stderr)
                return data
            part.replace(target / path.name)
    return target


def _same(original: Path, copy: Path) -> bool:
    if not copy.exists():
        return False
    a, b = original.stat(), copy.stat()
    return a.st_size == b.st_size and int(a.st_mtime) == int(b.st_mtime)


# ------------------------------------------------------------------------------------------------- after the tasks


def end(sweep: Sweep, point: Point, job: str, code: int) -> None:
    """Records how the tasks ended, or has the job queued again if they were only stopped and Slurm itself does not do it."""
    if code and record_of(sweep.folder, job).get("why") == CANCELLED:
        return  # also where the tasks did not end before they were killed
    if not was_stopped(code, int(os.environ.get("SLURM_NTASKS", 1))) and not _said_stopped(sweep, point, job, code):
        record(sweep.folder, job, code, "" if code else "finished")
        return
    state = _ask(["squeue", "--noheader", "--jobs", job, "--format", "%T"])
    if state is None:  # it may be cancelled, which a requeue would undo
        record(sweep.folder, job, None, f"stopped with code {code} while Slurm did not answer")
        return
    if state != "RUNNING":  # cancelled, or being requeued by Slurm itself
        print(f"cossl sweep: stopped with code {code}, job {job} is {state or 'over'}", file=sys.stderr)
        return
    print(f"cossl sweep: stopped with code {code}, queueing job {job} again", file=sys.stderr, flush=True)
    if _ask(["scontrol", "requeue", job]) is None:
        record(sweep.folder, job, None, f"stopped, and `scontrol requeue {job}` failed on this node")


def was_stopped(code: int, tasks: int) -> bool:
    """Whether the trainer ended because it was asked to, and not because it failed."""
    return code in STOPPED_CODES or (code == KILLED_CODE and tasks == 1)


def _said_stopped(sweep: Sweep, point: Point, job: str, code: int) -> bool:
    """Whether tasks were killed that had stopped: by srun, as the first of them had left, or by who asked them and had no patience."""
    log, starts = sweep.run_dir(point) / "train.log", sweep.folder / "exits" / f"{job}.starts"
    with contextlib.suppress(FileNotFoundError):
        return code > 128 and last_words(log) == "stopped" and log.stat().st_mtime >= starts.stat().st_mtime
    return False


def slurm_environment() -> dict[str, str]:
    """Without the variables by which squeue, sacct, scancel and scontrol would answer another question, or ask another cluster."""
    others = ("SQUEUE_", "SACCT_", "SCANCEL_", "SLURM_CLUSTERS")
    return {name: value for name, value in os.environ.items() if not name.startswith(others)}


def _ask(command: Sequence[str]) -> str | None:
    """What the command prints; None, and its error is printed, if it fails three times, five seconds apart."""
    for attempt in range(3):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=slurm_environment())
            if done.returncode == 0:
                return done.stdout.strip()
            print(f"cossl sweep: {shlex.join(command)}: {done.stderr.strip()}", file=sys.stderr, flush=True)
        time.sleep(5 * (attempt < 2))
    return None


# ------------------------------------------------------------------------------------------------- the command


def main(argv: Sequence[str]) -> int:
    """begin and end, called by a job's script."""
    verb, folder, array, *rest = argv
    require_snapshot(Path(folder))
    sweep = read_sweep(Path(folder))
    point, job = point_of(sweep, Path(array)), job_name()
    verbs: dict[str, Callable[[], str | None]] = {
        "begin": lambda: begin(sweep, point, job),
        "end": lambda: end(sweep, point, job, int(rest[0])),
    }
    said = verbs[verb]()
    if said:
        print(f"cossl sweep: {said}", file=sys.stderr)
    return NOTHING_TO_DO if said else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
