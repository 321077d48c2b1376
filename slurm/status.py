"""How far a sweep is: from its folders first, then from one squeue, and one sacct if something is still to be explained.

States: new, never submitted; pending; running; done, with its results; failed, its program said why or Slurm did; lost, its job is over and
nobody said how (a node died, a time limit was reached without a requeue); cancelled; unknown, while Slurm does not answer.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from cossl.models.run_status import FAILED, Run, flocked_inodes, is_running, last_words, read_run
from cossl.slurm.folder import Job, Point, Sweep, damage_of, results_of
from cossl.slurm.point import CANCELLED, record_of, slurm_environment

State = Literal["new", "pending", "running", "done", "failed", "lost", "cancelled", "unknown"]
STATES: tuple[State, ...] = ("done", "running", "pending", "failed", "lost", "cancelled", "unknown", "new")
LIVE: tuple[State, ...] = ("pending", "running", "unknown")

# Of squeue and sacct (Slurm 22.05, job state codes); whatever is not here is not over.
RUNNING = {"RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"}
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "REVOKED"}
ITS_OWN_FAULT = {"FAILED", "OUT_OF_MEMORY"}


class Queue(NamedTuple):
    """What Slurm says."""

    states: dict[str, tuple[str, str]]
    """(state, reason) by job: 123_4."""
    error: str = ""
    """Why it said nothing."""


@dataclass
class Standing:
    """How far a point is."""

    point: Point
    state: State
    run: Run
    job: Job | None = None
    detail: str = ""
    """Why: a reason of Slurm's, or the last line of the error."""
    log: Path | None = None
    """Where more is said."""
    live: tuple[Job, ...] = ()
    """Those of its submissions that are on their way: more than one if it was submitted while Slurm could not be asked."""


def standings(sweep: Sweep) -> list[Standing]:
    """Every point's, in the grid's order."""
    locked, jobs = flocked_inodes(), sweep.jobs_of()
    found = [Standing(point, "new", read_run(sweep.run_dir(point), point.run, locked)) for point in sweep.points]
    for one in found:
        _look(one, sweep, locked)
        _name(one, sweep, next(iter(jobs[one.point.identity]), None))
    open_ = [(one, jobs[one.point.identity]) for one in found if one.state != "done" and one.job is not None]
    at_slurm = [job.job for _, of in open_ for job in of if not job.is_local]
    queue = squeue() if at_slurm else Queue({})
    unexplained = [job for job in at_slurm if job not in queue.states]
    history = sacct(unexplained) if unexplained and not queue.error else {}
    for one, of in open_:
        one.live = tuple(job for job in of if _is_live(job, queue))
        job = (one.live or of)[0]  # of several submissions it is the one that counts
        _name(one, sweep, job)
        if one.state != "running":
            _judge(one, job, sweep, queue, history)
    return found


def _look(one: Standing, sweep: Sweep, locked: frozenset[int] | None) -> None:
    """Sets the state if the run's folder says all: done, or running where its lock is seen."""
    run_dir = sweep.run_dir(one.point)
    if results_of(run_dir, one.point) is not None:
        one.state = "done"
    elif is_running(run_dir / "lock", locked):
        one.state = "running"
    else:
        one.detail = damage_of(run_dir)


def _name(one: Standing, sweep: Sweep, job: Job | None) -> None:
    one.job, one.log = job, sweep.folder.parent / job.grid / job.log if job else None


def _is_live(job: Job, queue: Queue) -> bool:
    if job.is_local:
        return job.host == platform.node() and is_sweeping(job.submitter)
    state, _ = queue.states.get(job.job, ("", ""))
    return bool(state) and state not in OVER


def _judge(one: Standing, job: Job, sweep: Sweep, queue: Queue, history: dict[str, str]) -> None:
    """Sets state and detail of a point that was submitted, is not done, and holds no lock that can be seen from here."""
    state, reason = queue.states.get(job.job, ("", ""))
    if _is_live(job, queue):
        running = state in RUNNING
        one.state, one.detail = "running" if running else "pending", "" if running else reason or "waits for its turn"
    elif queue.error and not job.is_local:
        one.state, one.detail = "unknown", queue.error
    elif job.is_local and job.host != platform.node() and not record_of(sweep.folder.parent / job.grid, job.job):
        one.state, one.detail = "unknown", f"ask on {job.host}, where it was started"
    else:
        _explain(one, job, sweep, state or history.get(job.job, ""))


def _explain(one: Standing, job: Job, sweep: Sweep, over: str) -> None:
    """The state of a point whose job is over, without results; `over` is Slurm's word for it, "" if it has none any more."""
    _look(one, sweep, flocked_inodes())  # again: it may have ended since, or another submission of it have begun
    if one.state != "new":
        return
    folder, run_dir = sweep.folder.parent / job.grid, sweep.run_dir(one.point)
    record, words = record_of(folder, job.job), _words_since(run_dir / "train.log", job.time)
    if record.get("why") == CANCELLED or over == "CANCELLED":
        one.state, one.detail = "cancelled", ""
    elif record.get("code") == 0:
        wrong = one.detail or "results.json is not this point's whole results"
        one.state, one.detail = "failed", f"ended with code 0, but {run_dir}/{wrong}"
    elif isinstance(record.get("code"), int) or over in ITS_OWN_FAULT or words.startswith(FAILED):
        one.state = "failed"
        one.detail = record.get("why") or error_of(folder / job.log, words) or over.lower() or f"exit code {record.get('code')}"
    else:
        why = record.get("why") or one.detail or over.lower().replace("_", " ")
        one.state, one.detail = "lost", why or "its job is over and left no word"


def _words_since(log: Path, start: float) -> str:
    """The last line of train.log, unless it is of an earlier submission."""
    with contextlib.suppress(FileNotFoundError):
        return last_words(log) if log.stat().st_mtime >= start else ""
    return ""


NOT_AN_ERROR = ("srun: ", "slurmstepd", "cossl sweep: ", "submitit ")


def error_of(log: Path, words: str) -> str:
    """The last line of the error: of the task that Slurm names as the first to fail, else of train.log, else of the first task."""
    said = tail(log.with_suffix(".err"))
    first = re.search(r"srun: error: \S+: tasks? (\d+).*: (?:Exited with exit code|Segmentation|Killed|Out Of Memory|Aborted)", said)
    if first and first[1] != "0":
        theirs = _last_line(tail(log.with_name(log.name.replace("_0_log.out", f"_{first[1]}_log.err"))))
        return f"task {first[1]}: {theirs or 'said nothing'}"
    return words.removeprefix(FAILED) if words.startswith(FAILED) else _last_line(said)


def _last_line(said: str) -> str:
    own = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith(NOT_AN_ERROR)]
    return own[-1] if own else ""


def tail(path: Path, most_bytes: int = 16_384) -> str:
    """The end of a text file; "" if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - most_bytes))
            return file.read(most_bytes).decode(errors="replace")
    except OSError:
        return ""


def is_sweeping(pid: int) -> bool:
    """Whether a process of that number runs here, which a sweep on this machine belongs to."""
    try:
        return b"sweep" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------- Slurm


def squeue() -> Queue:
    """All jobs of this user that the controller remembers, ended ones too, in one call."""
    user = str(os.getuid())
    command = ["squeue", "--noheader", "--array", "--states=all", f"--user={user}", "--format=%i|%T|%r"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=slurm_environment())
    except (OSError, subprocess.TimeoutExpired) as error:
        return Queue({}, f"squeue: {error.strerror if isinstance(error, OSError) else 'no answer within 120 s'}")
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["failed"])[-1]
        return Queue({}, f"squeue: {said.removeprefix('squeue: ')}")
    rows = [line.split("|", 2) for line in done.stdout.splitlines()]
    return Queue({row[0]: (row[1], row[2]) for row in rows if len(row) == 3})


def sacct(jobs: Sequence[str]) -> dict[str, str]:
    """How jobs ended that the controller has forgotten; {} where there is no accounting, which is no error."""
    arrays = sorted({job.partition("_")[0] for job in jobs}, key=int)
    command = ["sacct", "--allocations", "--noheader", "--parsable2", "--format=JobID,State", f"--jobs={','.join(arrays)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=slurm_environment())
    except (OSError, subprocess.TimeoutExpired):
        return {}
    rows = [line.split("|") for line in done.stdout.splitlines()] if not done.returncode else []
    return {row[0]: row[1].split()[0] for row in rows if len(row) == 2 and row[1]}  # "CANCELLED by 1000"


def scancel(jobs: Sequence[str]) -> None:
    """Cancels them. RuntimeError if Slurm does not."""
    for first in range(0, len(jobs), 500):
        some = jobs[first : first + 500]
        try:
            done = subprocess.run(["scancel", *some], capture_output=True, text=True, timeout=120, env=slurm_environment())
        except subprocess.TimeoutExpired:
            raise RuntimeError("scancel did not answer within 120 s: what is pending will not start; try again for what runs") from None
        if done.returncode:
            raise RuntimeError(f"scancel: {done.stderr.strip()}")


# ------------------------------------------------------------------------------------------------- for people


def table(found: Sequence[Standing]) -> Iterator[str]:
    """A line a point and one for all, for people."""
    width = max([len(one.point.name) for one in found] + [5])
    presets = max([len(one.point.preset) for one in found] + [6])
    numbers = f"{'epoch':>11}{'images/s':>10}{'left':>8}{'linear %':>10}"
    yield f"{'point':<{width}}  {'preset':<{presets}}  seed  {'state':<10}{'job':<12}{numbers}"
    for one in found:
        run, job = one.run, one.job.job if one.job else "-"
        epoch = f"{run.epoch:.1f}/{run.epochs:g}" if run.epoch is not None and run.epochs else "-"
        shown = f"{run.images_per_s:,.0f}" if run.images_per_s is not None else "-"
        top = f"{run.linear_top1:.1f}" if one.state == "done" and run.linear_top1 is not None else "-"
        left = span(run.left_s) if one.state == "running" else "-"
        words = f"{one.point.name:<{width}}  {one.point.preset:<{presets}}  {one.point.seed:>4}  {one.state:<10}{job[:11]:<12}"
        yield f"{words}{epoch:>11}{shown:>10}{left:>8}{top:>10}  {one.detail}".rstrip()
    counts = Counter(one.state for one in found)
    yield ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]) + f" of {len(found)} points"


def span(seconds: float | None) -> str:
    """ "3.2 h", "12 min", "-"."""
    if seconds is None:
        return "-"
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
