"""`cossl sweep VERB GRID`: an ablation grid as SLURM jobs, from the plan to the table.

  plan      the points, their GPU-hours, the job's script; submits nothing
  submit    those that are neither done nor on their way; returns at once
  status    how far each is
  retry     submits again what failed or was lost
  cancel    stops what is pending or running; its checkpoints stay
  logs      what a point has printed
  collect   tables and figures

GRID is heads, weighting, ablation_plan, backbone, receptive_field, local_weight, positions, crop_size, or a TOML file (see slurm/grids.py).
A point is what its config says: submitted twice it runs once, one value changed makes a new one.
Clusters are in ~/.config/cossl/clusters.toml (slurm/clusters.py); `--cluster local` is this machine, `--cluster debug` this process.
After `--` come flags of `cossl train` for every point: cossl sweep submit heads --cluster ours --data in1k=/data/in1k -- --epochs 50
"""

from __future__ import annotations

import difflib
import json
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from cossl.models.flags import parse_flags
from cossl.slurm import status
from cossl.slurm.clusters import Cluster, load_cluster
from cossl.slurm.folder import Job, Point, Sweep, add_points, held, read_sweep, sweep_of
from cossl.slurm.point import CANCELLED, record

Name = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="GRID", help="Name of a grid, or a TOML file.")]
OWN_GRIDS = "heads weighting ablation_plan backbone receptive_field local_weight positions crop_size".split()
Root = Annotated[Path, tyro.conf.arg(metavar="DIR")]


def say(line: str) -> None:
    """Prints it at once."""
    print(line, flush=True)


def folder_of(root: Path, grid: str) -> Path:
    """Where the sweep of a grid is. ValueError where sbatch or another sweep would take the name for something else."""
    stem = Path(grid).stem
    if "%" in str(root.absolute()):
        raise ValueError(f"--root {root}: sbatch puts numbers in the place of a % in the names of logs: choose a folder without")
    if grid.endswith(".toml") and stem in ("points", *OWN_GRIDS):
        raise ValueError(f"{grid}: {stem} is the name of {'the folder of all runs' if stem == 'points' else 'a grid of cossl'}: rename it")
    return root.absolute() / stem


def command(verb: str, sweep: Sweep, *flags: str) -> str:
    """What the user types next, as it runs."""
    root = sweep.folder.parent
    return shlex.join(["cossl", "sweep", verb, sweep.grid, *flags, *(["--root", str(root)] if root != Path("sweeps").absolute() else [])])


def opened(root: Path, grid: str) -> Sweep:
    """A sweep that was submitted. ValueError if there is none of that name."""
    sweep = read_sweep(folder_of(root, grid))
    if not sweep.points:
        others = sorted(path.parent.name for path in root.glob("*/sweep.json"))
        near = difflib.get_close_matches(Path(grid).stem, others, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(others)}" if others else f"cossl sweep submit {grid} makes it"
        raise ValueError(f"no sweep {Path(grid).stem!r} in {root}: {hint}")
    return sweep


# ------------------------------------------------------------------------------------------------- plan, submit


@dataclass(frozen=True)
class PlanArgs:
    """Which points, and where."""

    grid: Name
    cluster: str = "local"
    """Its name in the file of clusters; local; debug."""
    cluster_file: Path | None = None
    """Default ~/.config/cossl/clusters.toml."""
    presets: tuple[str, ...] = ()
    """Presets of `cossl train`; default the grid's own (ablation_plan: in1k in100)."""
    seeds: tuple[int, ...] = ()
    """Default 0 1 2."""
    data: tuple[str, ...] = ()
    """Folder of pictures: one for all, or one for each preset as in1k=/data/in1k in100=/data/in100."""
    parallel: int = 0
    """Points at a time; 0 = as the cluster's record says."""
    root: Root = Path("sweeps")
    """Folder of all sweeps; for SLURM it must be shared by the nodes."""
    new_code: bool = False
    """Go on with the present source; otherwise a run that has a checkpoint goes on with the source that it began with."""
    images_per_s: float = 0.0
    """Pictures a second of one GPU to estimate GPU-hours with; 0 = from the benchmark file of that GPU."""
    bench: Path | None = None
    """Benchmark file (cossl bench step --json, make gpu-report); default the newest of the cluster's `gpu` in tools/results."""


def planned(verb: str, argv: Sequence[str]) -> tuple[PlanArgs, Cluster, Sweep, list[Point]]:
    """What the command line asks for: nothing is written yet."""
    own, flags = (list(argv[: argv.index("--")]), list(argv[argv.index("--") + 1 :])) if "--" in argv else (list(argv), [])
    args = parse_flags(PlanArgs, own, f"cossl sweep {verb}", __doc__ or "")
    cluster = load_cluster(args.cluster, args.cluster_file)
    from cossl.slurm.grids import points  # with torch: three seconds that the other verbs do without

    found = points(args.grid, args.presets, args.seeds, args.data, flags)
    return args, cluster, read_sweep(folder_of(args.root, args.grid)), found


def plan(argv: Sequence[str]) -> None:
    """`cossl sweep plan`."""
    from cossl.slurm import estimate, submit

    args, cluster, sweep, points = planned("plan", argv)
    rate = estimate.rate_of(cluster.gpu, args.images_per_s, args.bench)
    standing = {one.point.identity: one.state for one in status.standings(sweep_of(sweep.folder, points))}
    say("\n".join(estimate.table(points, standing, rate, max(1, cluster.gpus))))
    waiting = sum(state in ("new", "cancelled") for state in standing.values())
    if cluster.kind == "slurm":
        largest = cluster.max_array_size or submit.max_array_size()
        count = min(largest, waiting or len(points))
        say(f"\n{-(-waiting // largest)} arrays of at most {largest} elements; the script of the first:\n")
        say(submit.script(sweep, cluster, count, args.parallel or cluster.parallel or count))
    else:
        say(f"\n{waiting} points to run, {args.parallel or cluster.parallel or 1} at a time, on this machine")


def submit(argv: Sequence[str]) -> None:
    """`cossl sweep submit`."""

    args, cluster, sweep, points = planned("submit", argv)
    require_pictures(points)
    with held(args.root.absolute()):
        sweep = add_points(sweep, points)
        asked = {point.identity for point in points}
        found = [one for one in status.standings(sweep) if one.point.identity in asked]
        start = [one.point for one in found if one.state in ("new", "cancelled")]
        for state in status.STATES:
            count = sum(one.state == state for one in found)
            if count and state not in ("new", "cancelled"):
                hint = f": {command('retry', sweep, f'--{state}')}" if state in ("failed", "lost") else ""
                say(f"{count} of {len(found)} points {state}, left alone{hint}")
        run_here = hand_over(sweep, start, cluster, args.parallel, args.new_code)
    run_here()


def require_pictures(points: Sequence[Point]) -> None:
    """ValueError where a point has no pictures, or none that can be seen from here."""
    for point in points:
        data = point.config["data"]
        if data is None and point.preset != "demo" and point.config["loader.backend"] != "synthetic":
            raise ValueError(f"{point.preset} needs pictures: give --data {point.preset}=<folder>, see cossl convert")
        if data is not None and not Path(data).is_dir():
            raise ValueError(f"--data {data}: there is no such folder")


def hand_over(sweep: Sweep, points: Sequence[Point], cluster: Cluster, parallel: int, new_code: bool) -> Callable[[], None]:
    """Submits the points, or records them as this process's, while nobody else can; returns what is left to do when others may again."""
    from cossl.slurm import submit as submission

    parallel = parallel or cluster.parallel
    if not points:
        say("nothing to submit")
    elif cluster.kind == "slurm":
        submission.submit_slurm(sweep, points, cluster, parallel, say, new_code)
        say(f"next: {command('status', sweep)}")
    elif cluster.kind == "local":
        jobs = submission.queue_local(sweep, points, cluster, say, new_code)
        return lambda: run_here(sweep, jobs, cluster, parallel)
    else:
        return lambda: submission.run_debug(sweep, points, say)
    return lambda: None


def run_here(sweep: Sweep, jobs: Sequence[Job], cluster: Cluster, parallel: int) -> None:
    """Runs them, and says what to do next, however it ends."""
    from cossl.slurm import submit as submission

    try:
        submission.run_local(sweep, jobs, cluster, parallel, say)
    except SystemExit as error:
        say(f"stopped; go on with: {command('retry', sweep, '--lost')}" if error.code == 130 else f"next: {command('status', sweep)}")
        raise
    say(f"next: {command('collect', sweep)}")


# ------------------------------------------------------------------------------------------------- status, retry, cancel, logs, collect


@dataclass(frozen=True)
class StatusArgs:
    """How far a sweep is."""

    grid: Name
    root: Root = Path("sweeps")
    """Folder of all sweeps."""
    watch: bool = False
    """Show it again every --every-s seconds, until nothing is on its way."""
    every_s: float = 30.0
    """Seconds between two looks; each is one squeue."""
    state: tuple[status.State, ...] = ()
    """Show these alone, as in --state failed lost."""
    json: bool = False
    """Print a JSON list instead of the table."""


def show_status(argv: Sequence[str]) -> None:
    """`cossl sweep status`."""
    args = parse_flags(StatusArgs, argv, "cossl sweep status", __doc__ or "")
    while True:
        sweep = opened(args.root, args.grid)
        found = status.standings(sweep)
        shown = [one for one in found if not args.state or one.state in args.state]
        if args.json:
            print(json.dumps([_as_json(one) for one in shown], indent=1))
        else:
            clear = "\x1b[H\x1b[2J" if args.watch and sys.stdout.isatty() else ""
            say(clear + "\n".join(status.table(shown)))
            for one in [one for one in shown if one.state in ("failed", "lost")][:5]:
                say(f"  {one.point.name}, seed {one.point.seed}: {one.log}")
            for state in ("failed", "lost"):
                if any(one.state == state for one in found):
                    say(f"next: {command('retry', sweep, f'--{state}')}")
        if not args.watch or not any(one.state in status.LIVE for one in found):
            return
        time.sleep(args.every_s)


def _as_json(one: status.Standing) -> dict[str, Any]:
    job, log = one.job.job if one.job else None, str(one.log) if one.log else None
    return one.point._asdict() | {"state": one.state, "detail": one.detail, "job": job, "log": log, "folder": asdict(one.run)}


@dataclass(frozen=True)
class RetryArgs:
    """What to submit again; it goes on from its checkpoint, if it has one."""

    grid: Name
    failed: bool = False
    """What failed."""
    lost: bool = False
    """What is over and left no word."""
    cluster: str = ""
    """Default the one that each point was submitted to."""
    cluster_file: Path | None = None
    """Default ~/.config/cossl/clusters.toml."""
    parallel: int = 0
    """Points at a time; 0 = as the cluster's record says."""
    new_code: bool = False
    """Go on with the present source; otherwise a run that has a checkpoint goes on with the source that it began with."""
    root: Root = Path("sweeps")
    """Folder of all sweeps."""


def retry(argv: Sequence[str]) -> None:
    """`cossl sweep retry`."""

    args = parse_flags(RetryArgs, argv, "cossl sweep retry", __doc__ or "")
    wanted = {state for state, asked in (("failed", args.failed), ("lost", args.lost)) if asked}
    if not wanted:
        raise ValueError("retry what? Give --failed, --lost, or both")
    opened(args.root, args.grid)
    chosen: dict[str, list[Point]] = {}
    with held(args.root.absolute()):
        sweep = opened(args.root, args.grid)  # as it is now: what another retry has submitted meanwhile is not lost any more
        again = [one for one in status.standings(sweep) if one.state in wanted]
        if again:  # Slurm calls a job NODE_FAIL for a second before it queues it again
            time.sleep(LOOK_AGAIN_S)
            again = [one for one in status.standings(sweep) if one.state in wanted]
        for one in again:
            chosen.setdefault(args.cluster or (one.job.cluster if one.job else "local"), []).append(one.point)
        clusters = {name: load_cluster(name, args.cluster_file) for name in chosen}
        left = [hand_over(sweep, points, clusters[name], args.parallel, args.new_code) for name, points in chosen.items()]
    for run_them in left:
        run_them()
    if not chosen:
        say(f"nothing {' or '.join(sorted(wanted))}")


LOOK_AGAIN_S = 3.0


@dataclass(frozen=True)
class CancelArgs:
    """What to stop: all of a sweep that is pending or running."""

    grid: Name
    root: Root = Path("sweeps")
    """Folder of all sweeps."""


def cancel(argv: Sequence[str]) -> None:
    """`cossl sweep cancel`."""
    args = parse_flags(CancelArgs, argv, "cossl sweep cancel", __doc__ or "")
    opened(args.root, args.grid)
    with held(args.root.absolute()):
        sweep = opened(args.root, args.grid)
        found = [one for one in status.standings(sweep) if one.state in status.LIVE and one.job is not None]
        jobs = [job for one in found for job in one.live or (one.job,) if job and job.grid == sweep.grid]
        for job in jobs:
            record(sweep.folder, job.job, None, CANCELLED)  # first: a job that is queued again in this moment does not start
        _stop_local(jobs)
        status.scancel([job.job for job in jobs if not job.is_local])
    say(f"{len(jobs)} jobs cancelled; cossl sweep submit starts them again, from their checkpoints")


def _stop_local(jobs: Sequence[Job]) -> None:
    for pid, host in {(job.submitter, job.host) for job in jobs if job.is_local}:
        if host == platform.node() and status.is_sweeping(pid):
            os.kill(pid, signal.SIGTERM)
        else:
            say(
                f"process {pid} of {host or 'a host'}, which started some, is not on this machine or no more: their lock files say who runs"
            )


@dataclass(frozen=True)
class LogsArgs:
    """What a point has printed."""

    grid: Name
    point: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="POINT")]
    """Its name, with ", seed 0" where there are several, its run folder or identity; a part of one will do."""
    lines: int = 40
    """Of each log, from its end."""
    root: Root = Path("sweeps")
    """Folder of all sweeps."""


def logs(argv: Sequence[str]) -> None:
    """`cossl sweep logs`."""
    args = parse_flags(LogsArgs, argv, "cossl sweep logs", __doc__ or "")
    sweep = opened(args.root, args.grid)
    texts = [(point, (point.name, f"{point.name}, seed {point.seed}", point.run, point.identity)) for point in sweep.points]
    exact = [point for point, words in texts if args.point in words]
    found = exact or [point for point, words in texts if any(args.point in word for word in words)]
    if len(found) != 1:
        some = "; ".join(point.run for point in (found or sweep.points)[:6])
        raise ValueError(
            f"{len(found)} points have {args.point!r} in name, run folder or identity: {some}{', ...' * (len(found or sweep.points) > 6)}"
        )
    (one,) = status.standings(sweep._replace(points=found))
    files = [sweep.run_dir(one.point) / "train.log", *([one.log, one.log.with_suffix(".err")] if one.log else [])]
    for path in files:
        say(f"== {path}{'' if path.exists() else ': not there'}")
        for line in status.tail(path, 1_000_000).splitlines()[-args.lines :]:
            say(line)


@dataclass(frozen=True)
class CollectArgs:
    """Tables and figures of a sweep, as far as it is."""

    grid: Name
    root: Root = Path("sweeps")
    """Folder of all sweeps."""
    out: Path | None = None
    """Folder for results.csv, table.md, table.tex, accuracy.png, speed.png; default the sweep's own."""


def show_collected(argv: Sequence[str]) -> None:
    """`cossl sweep collect`."""
    from cossl.slurm.collect import collect, write

    args = parse_flags(CollectArgs, argv, "cossl sweep collect", __doc__ or "")
    sweep = opened(args.root, args.grid)
    states: Mapping[str, str] = {one.point.identity: one.state for one in status.standings(sweep)}
    say(write(collect(sweep, states), args.out or sweep.folder))


# ------------------------------------------------------------------------------------------------- the command

VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "plan": plan,
    "submit": submit,
    "status": show_status,
    "retry": retry,
    "cancel": cancel,
    "logs": logs,
    "collect": show_collected,
}


def main(argv: Sequence[str]) -> None:
    """`cossl sweep VERB GRID [flags]`. Raises ValueError, OSError, ImportError or RuntimeError for what a user can mend."""
    if not argv or argv[0] in ("-h", "--help"):
        say((__doc__ or "").strip())
        return
    if argv[0] not in VERBS:
        near = difflib.get_close_matches(argv[0], VERBS, 1)
        raise ValueError(f"unknown verb {argv[0]!r}: " + (f"did you mean {near[0]}?" if near else f"expected one of {', '.join(VERBS)}"))
    VERBS[argv[0]](argv[1:])
