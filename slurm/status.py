"""How far a sweep is: from its folders first, then from one squeue, and one sacct if something is still to be explained.

States: new, never submitted; pending; running; done, with its results; failed, its program said why or Slurm did; lost, its job is over and
nobody said how (a node died, a time limit was reached without a requeue); cancelled; unknown, while Slurm does not answer.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from cossl.models.run_status import FAILED, Run, flocked_inodes, is_running, last_words, read_run
from cossl.slurm.folder import Job, Point, Sweep, results_of
from cossl.slurm.point import CANCELLED, record_of

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


def standings(sweep: Sweep) -> list[Standing]:
    """Every point's, in the grid's order."""
    locked, last = flocked_inodes(), sweep.last_jobs()
    found = []
    for point in sweep.points:
        run_dir, job = sweep.run_dir(point), last.get(point.identity)
        log = sweep.folder.parent / job.grid / job.log if job else None
        found.append(Standing(point, "new", read_run(run_dir, point.run, locked), job, log=log))
        if results_of(run_dir, point) is not None:
            found[-1].state = "done"
        elif is_running(run_dir / "lock", locked):
            found[-1].state = "running"
    open_ = [(one, one.job) for one in found if one.state not in ("done", "running") and one.job is not None]
    at_slurm = [job.job for _, job in open_ if not job.is_local]
    queue = squeue() if at_slurm else Queue({})
    unexplained = [job for job in at_slurm if job not in queue.states]
    history = sacct(unexplained) if unexplained and not queue.error else {}
    for one, job in open_:
        _judge(one, job, sweep, queue, history)
    return found


def _judge(one: Standing, job: Job, sweep: Sweep, queue: Queue, history: dict[str, str]) -> None:
    """Sets state and detail of a point that was submitted, is not done, and holds no lock that can be seen from here."""
    state, reason = queue.states.get(job.job, ("", ""))
    if job.is_local and is_sweeping(int(job.job.split("-")[1])):
        one.state, one.detail = "pending", "starting"
    elif queue.error and not job.is_local:
        one.state, one.detail = "unknown", queue.error
    elif state and state not in OVER:
        one.state, one.detail = ("running", "") if state in RUNNING else ("pending", reason)
    else:
        _explain(one, job, sweep, state or history.get(job.job, ""))


def _explain(one: Standing, job: Job, sweep: Sweep, over: str) -> None:
    """The state of a point whose job is over, without results; `over` is Slurm's word for it, "" if it has none any more."""
    folder, run_dir = sweep.folder.parent / job.grid, sweep.run_dir(one.point)
    record, words = record_of(folder, job.job), last_words(run_dir / "train.log")
    if record.get("why") == CANCELLED or over == "CANCELLED":
        one.state, one.detail = "cancelled", ""
    elif record.get("code") == 0:
        one.state, one.detail = "failed", f"ended with code 0, but {run_dir / 'results.json'} is not this point's whole results"
    elif isinstance(record.get("code"), int) or over in ITS_OWN_FAULT or words.startswith(FAILED):
        one.state = "failed"
        one.detail = record.get("why") or error_of(folder / job.log, words) or over.lower() or f"exit code {record.get('code')}"
    else:
        one.state, one.detail = "lost", over.lower().replace("_", " ") or "its job is over and left no word"


def error_of(log: Path, words: str) -> str:
    """The last line of the error: of the task that Slurm names as the first to fail, else of train.log, else of the first task."""
    said = tail(log.with_suffix(".err"))
    first = re.search(r"srun: error: \S+: tasks? (\d+).*: (?:Exited with exit code|Segmentation|Killed|Out Of Memory|Aborted)", said)
    own = [line for line in said.splitlines() if line.strip() and not line.startswith(("srun: ", "slurmstepd: ", "cossl sweep: "))]
    if first and first[1] != "0":
        theirs = tail(log.with_name(log.name.replace("_0_log.out", f"_{first[1]}_log.err"))).strip().splitlines()
        return f"task {first[1]}: {theirs[-1]}" if theirs else f"task {first[1]} said nothing"
    return words.removeprefix(FAILED) if words.startswith(FAILED) else own[-1].strip() if own else ""


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
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
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
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    rows = [line.split("|") for line in done.stdout.splitlines()] if not done.returncode else []
    return {row[0]: row[1].split()[0] for row in rows if len(row) == 2 and row[1]}  # "CANCELLED by 1000"


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
