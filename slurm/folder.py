"""A sweep on disk, from which everything about it can be told without a scheduler, and without torch.

sweeps/<grid>/sweep.json     its points, as far as they were ever submitted
              jobs.jsonl     which job runs which point: a line for each submission of each
              code/<hash>/   the source that they run
              logs/          what the jobs print
              exits/<job>    how the last attempt of a job ended: its exit code
sweeps/points/<run>/         the run folders, shared by all sweeps: a point that two grids have is run once
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cossl.models.flags import read_object, replace_text, sealed, unsealed
from cossl.models.run_status import UNSEALED


class Point(NamedTuple):
    """One run of a grid."""

    name: str
    """What it is in its grid: "local_head mlp3"."""
    preset: str
    seed: int
    identity: str
    """16 hexadecimal digits, equal if and only if everything is that can change the result."""
    run: str
    """Name of its run folder, from the config alone, so that two grids share a point."""
    flags: list[str]
    """With which `cossl train PRESET` makes it, run folder aside."""
    config: dict[str, Any]
    """What its identity is the hash of, with the preset: the flat config, without what cannot change the result."""


class Job(NamedTuple):
    """A submission of a point."""

    point: str
    """Its identity."""
    job: str
    """SLURM's number, 123 or 123_4; of a run on one machine, local-<process of the sweep>-<number>."""
    grid: str
    """Name of the sweep that submitted it."""
    cluster: str
    code: str
    """The snapshot that it runs, from the folder of all sweeps: <grid>/code/<hash>."""
    log: str
    """File of what the first task prints, below its sweep's folder; its errors are beside it in .err."""
    time: float
    """Of the submission, seconds since 1970."""
    host: str = ""
    """Where it was submitted, or runs if it is local."""

    @property
    def is_local(self) -> bool:
        """Whether it is a process of the machine that submitted it."""
        return self.job.startswith("local-")

    @property
    def submitter(self) -> int:
        """Of a local one, the number of the sweep's process."""
        return int(self.job.split("-")[1])


class Sweep(NamedTuple):
    """What sweep.json and jobs.jsonl say."""

    folder: Path
    points: list[Point]
    jobs: list[Job]
    """Of its points, by whichever sweep, in order of submission."""

    @property
    def grid(self) -> str:
        return self.folder.name

    def run_dir(self, point: Point) -> Path:
        """Where the point's run is, or will be."""
        return self.folder.parent / "points" / point.run

    def jobs_of(self) -> dict[str, list[Job]]:
        """The submissions of each point, the last one first, by its identity."""
        found: dict[str, list[Job]] = {point.identity: [] for point in self.points}
        for job in reversed(self.jobs):
            if job.point in found:
                found[job.point].append(job)
        return found


def read_sweep(folder: Path) -> Sweep:
    """The sweep in a folder; empty if nothing was submitted there yet. ValueError naming the file if one is damaged."""
    path = folder / "sweep.json"
    try:
        points = [_checked(Point(**point)) for point in unsealed(read_object(path))["points"]] if path.exists() else []
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]:.200}): submit the grid again to another --root") from None
    return sweep_of(folder, points)


def _checked(point: Point) -> Point:
    """The point itself. ValueError if it is none, or its run would lie elsewhere than with the others."""
    texts = (point.name, point.preset, point.identity, point.run)
    if not all(isinstance(text, str) for text in texts) or type(point.seed) is not int:
        raise ValueError(f"a point's name, preset, identity, run or seed is of the wrong kind: {point.name!r:.80}")
    if not isinstance(point.flags, list) or not all(isinstance(flag, str) for flag in point.flags) or not isinstance(point.config, dict):
        raise ValueError(f"the flags or config of {point.name!r:.80} are of the wrong kind")
    if not re.fullmatch(r"[^/\0]+", point.run) or point.run in (".", ".."):
        raise ValueError(f"{point.run!r:.80} is no name of a run's folder")
    return point


def sweep_of(folder: Path, points: Sequence[Point]) -> Sweep:
    """The sweep as if it had these points: with all jobs of theirs, other grids' too."""
    own, jobs = {point.identity for point in points}, [job for path in folder.parent.glob("*/jobs.jsonl") for job in _jobs(path)]
    return Sweep(folder, list(points), sorted((job for job in jobs if job.point in own), key=lambda job: job.time))


def _jobs(path: Path) -> Iterator[Job]:
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        # Half a line: the submitter died; its job, if any, finds the point's lock taken.
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            job = Job(**json.loads(line))
            texts = [value for name, value in job._asdict().items() if name != "time"]
            if all(isinstance(text, str) for text in texts) and isinstance(job.time, int | float) and abs(job.time) < math.inf:
                yield job


def add_points(sweep: Sweep, points: Iterable[Point]) -> Sweep:
    """The sweep with these too, on disk, and with all that others have done by now.

    A point that it has already takes over the new flags: they make the same result, with other workers for one.
    """
    merged = {point.identity: point for point in [*read_sweep(sweep.folder).points, *points]}
    sweep.folder.mkdir(parents=True, exist_ok=True)
    replace_text(sweep.folder / "sweep.json", json.dumps(sealed({"points": [point._asdict() for point in merged.values()]}), indent=1))
    return sweep_of(sweep.folder, list(merged.values()))


def record_jobs(folder: Path, jobs: Iterable[Job]) -> None:
    """Appends them to jobs.jsonl, forced to the disk: what is lost here is a job that nobody knows of."""
    path = folder / "jobs.jsonl"
    cut_off = path.exists() and not path.read_bytes().endswith(b"\n")  # by a death in the middle of a line: the next one is not to join it
    with open(path, "a") as file:
        file.write("\n" * cut_off + "".join(json.dumps(job._asdict()) + "\n" for job in jobs))
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def held(root: Path, wait_s: float = 60) -> Iterator[None]:
    """Inside the block nobody else submits a sweep in `root`. ValueError if somebody does for so long."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "lock", "w") as file:
        end = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ValueError(f"{root}: another `cossl sweep` is submitting there: wait for it") from None
                time.sleep(0.5)
        yield


def results_of(run_dir: Path, point: Point) -> dict[str, Any] | None:
    """results.json, if the run is finished, its numbers are numbers, and its config.json is the point's but for where the pictures lie.

    None in every other case: a file that is missing, damaged, without the hash of its content, or of another run is no result.
    """
    try:
        results, config = unsealed(read_object(run_dir / "results.json")), read_object(run_dir / "config.json")
    except (OSError, ValueError):
        return None
    if any(config.get(k) != v for k, v in point.config.items() if k != "data"):
        return None
    tops = [results.get(probe, {}).get("trained") for probe in ("linear_top1", "knn_top1") if isinstance(results.get(probe), dict)]
    good = len(tops) == 2 and all(isinstance(top, int | float) and not isinstance(top, bool) and abs(top) < math.inf for top in tops)
    return results if good else None


def damage_of(run_dir: Path) -> str:
    """Why the results in a run's folder are not believed, whatever is in them; "" if they are, or if there are none."""
    try:
        unsealed(read_object(run_dir / "results.json"))
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        return f"results.json {UNSEALED} ({error.strerror if isinstance(error, OSError) else error})"
    return ""
