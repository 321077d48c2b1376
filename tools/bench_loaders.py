"""`cossl bench loaders`: what a picture costs in our loaders and in their peers', on the same pictures, in one run.

Each row runs in a process of its own. The processes of one view set and worker count are opened one after the other (the first batch is
timed, from constructing the loader on, imports before), then take turns: row A, B, C, ..., and again, so that whatever slows the machine
slows all of them. A turn is some batches from the middle of one long epoch. Ratios are taken turn by turn, and the median ratio is shown.
CPU time counts all threads and worker processes.
"""

from __future__ import annotations

import json
import select
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from cossl.models.flags import parse_flags, replace_text
from cossl.pipelines.demo_set import cache_dir
from cossl.tools.bench import did_you_mean, installed, machine, num_cores, progress, require_folder_of, spread
from cossl.tools.bench_kernels import Kernel, measure_kernels
from cossl.tools.bench_pictures import Pictures, default_source, prepare
from cossl.tools.bench_rows import RAMP_BATCHES, ROWS, SPARE_BATCHES, VIEWS, Job, as_argument

OURS = "ours-ffcv"
IMAGES, QUICK_IMAGES, TURNS, QUICK_TURNS = 384, 192, 7, 3
PATIENCE_S = 300.0  # stock ffcv compiles for half a minute at its first batch


class Goal(NamedTuple):
    """At these views `peer` costs at least `factor` times what ours does; for a floor, ours costs at most `factor` times the floor."""

    views: str
    peer: str
    factor: float


GOALS = (
    Goal("2x224", "stock-ffcv", 2.5),
    Goal("2x224", "torchvision-pil", 3.0),
    Goal("2x224", "floor-decode", 1.25),
    Goal("2x224+6x96", "stock-ffcv", 4.0),
    Goal("2x224+6x96", "floor-decode", 1.25),
)


@dataclass(frozen=True)
class LoadersArgs:
    """The command line of `cossl bench loaders`; each field's text is its help."""

    source: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")] = None
    """Image folder SRC/<class>/<picture>; shrunk to 500 px at quality 90 first. Default: $COSSL_DATA/imagenet-sample/train if it is there,
    else generated pictures."""

    rows: tuple[str, ...] = tuple(name for name in ROWS if name != "floor-turbojpeg")
    """Which loaders, and which floors (decode and cut, no loader)."""

    views: tuple[str, ...] = tuple(VIEWS)
    """Which view sets: 2x224, and 2x224+6x96 (multi-crop)."""

    workers: tuple[int, ...] = (1, 2)
    """Threads or processes of each loader; the floors always have one."""

    images: int | None = None
    """Pictures per turn, in whole batches (default: 384; 192 with --quick)."""

    repeats: int | None = None
    """Turns of each row (default: 7; 3 with --quick)."""

    batch_size: int = 32
    """Pictures per batch, at most --images."""

    quick: bool = False
    """Fewer pictures and repeats: at most 5 minutes on 2 cores."""

    json: Path | None = None
    """Write everything to this file."""

    def __post_init__(self) -> None:
        for flag, chosen, known in (("--rows", self.rows, ROWS), ("--views", self.views, VIEWS)):
            for word in chosen:
                if word not in known:
                    raise ValueError(f"{flag} {word}{did_you_mean(word, known)}")
        for flag, number in (("--images", self.images), ("--repeats", self.repeats), ("--batch-size", self.batch_size)):
            if number is not None and number < 1:
                raise ValueError(f"{flag} {number}: expected 1 or more")
        if not self.rows or not self.views or not self.workers or min(self.workers) < 1:
            raise ValueError("--rows, --views and --workers each need a value, and workers are 1 or more")
        require_folder_of("--json", self.json)


# ---- the processes that measure ---------------------------------------------------------------------------------------------------


class RowFailed(RuntimeError):
    """A row's process said no; the message is the last line of what it said."""


class Process:
    """The process of one row, and what it has answered so far."""

    def __init__(self, job: Job, stack: ExitStack):
        self.job, self.answers = job, list[dict[str, float]]()
        self._errors = stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115 (the stack closes it)
        command = [sys.executable, "-m", "cossl.tools.bench_rows", as_argument(job)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True)
        stack.callback(self._close)

    def answer(self) -> dict[str, float]:
        """Waits for the next line. Raises RowFailed when the process ends instead, or says nothing for PATIENCE_S."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], PATIENCE_S)[0]:
            self._process.kill()
            raise RowFailed(f"no answer within {PATIENCE_S:g} s")
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines() or [f"exit code {self._process.returncode}"]
            raise RowFailed(said[-1])
        answer: dict[str, float] = json.loads(line)
        return answer

    def ask(self, command: str) -> dict[str, float]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` says why
        return self.answer()

    def _close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(10)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@dataclass
class Results:
    """Finished rows, rows whose package is missing (with the line that installs it), and rows that failed (with the reason)."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    missing: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)


def _missing(name: str) -> bool:
    package = ROWS[name].package
    return package is not None and not installed(package)


def measure_group(jobs: list[Job], turns: int, results: Results) -> None:
    """Measures the jobs in turns and adds their rows to `results`, those that fail as failed."""

    def attempt(process: Process, command: str | None) -> dict[str, float] | None:
        try:
            return process.ask(command) if command else process.answer()
        except RowFailed as error:
            job = process.job
            results.failed.append({"name": job.name, "views": job.views, "workers": job.workers, "reason": str(error)})
            progress(f"{job.name} failed: {error}")
            return None

    with ExitStack() as stack:
        processes = [Process(job, stack) for job in jobs]
        processes = [process for process in processes if attempt(process, None) is not None]
        opened = []
        for process in processes:
            if first := attempt(process, "first"):
                process.answers.append(first)
                opened.append(process)
                progress(f"{_where(process.job)}: {process.job.name} gave its first batch after {first['first_batch_s']:.2f} s")
        for turn in range(turns):
            for process in list(opened):
                if timed := attempt(process, "repeat"):
                    process.answers.append(timed)
                else:
                    opened.remove(process)
            costs = ", ".join(f"{process.job.name} {process.answers[-1]['cpu_ms_per_image']:.2f}" for process in opened)
            progress(f"{_where(jobs[0])}: turn {turn + 1} of {turns}, CPU-ms per picture: {costs}")
        results.rows += [_row(process) for process in opened]


def _where(job: Job) -> str:
    return f"{job.views}, {job.workers} worker{'s' if job.workers > 1 else ''}"


def _row(process: Process) -> dict[str, Any]:
    """The row of the JSON. `turns` holds every repeat's CPU cost, in turn."""
    job, (first, *timed) = process.job, process.answers
    rates, costs = ([answer[key] for answer in timed] for key in ("images_per_s", "cpu_ms_per_image"))
    rate, cost = spread(rates), spread(costs)
    return {
        "name": job.name,
        "views": job.views,
        "workers": job.workers,
        "images_per_s": round(rate.median, 1),
        "cpu_ms_per_image": round(cost.median, 4),
        "first_batch_s": round(first["first_batch_s"], 3),
        "peak_rss_mib": round(max(answer["peak_rss_mib"] for answer in timed), 1),
        "n": len(timed),
        "spread": {
            "images_per_s": [round(rate.low, 1), round(rate.high, 1)],
            "cpu_ms_per_image": [round(cost.low, 4), round(cost.high, 4)],
        },
        "turns": [round(value, 4) for value in costs],
    }


@dataclass(frozen=True)
class Plan:
    """How much is measured: turns of `batches` batches."""

    turns: int
    batches: int
    batch_size: int

    @property
    def epoch_images(self) -> int:
        """Pictures that the one epoch needs."""
        return self.batch_size * (1 + RAMP_BATCHES + self.turns * self.batches + SPARE_BATCHES)


def planned(args: LoadersArgs) -> Plan:
    images = args.images or (QUICK_IMAGES if args.quick else IMAGES)
    batch_size = min(args.batch_size, images)
    return Plan(args.repeats or (QUICK_TURNS if args.quick else TURNS), images // batch_size, batch_size)


def compile_ours(args: LoadersArgs, pictures: Pictures, plan: Plan) -> float | None:
    """Seconds to the first batch of ours-ffcv in a process that is used for nothing else: with an empty cache it compiles, once for all.

    So `first_batch_s` of the rows is that of every start but the first on a machine. None when that row is not asked for, or fails.
    """
    if OURS not in args.rows:
        return None
    job = Job(OURS, args.views[0], min(args.workers), plan.batch_size, plan.batches, str(pictures.folder), str(pictures.beton))
    with ExitStack() as stack:
        process = Process(job, stack)
        try:
            process.answer()
            seconds = process.ask("first")["first_batch_s"]
        except RowFailed:  # its row will say so
            return None
    progress(f"{OURS} gave its first batch after {seconds:.1f} s, compiling what was not compiled before")
    return round(seconds, 2)


def measure(args: LoadersArgs, pictures: Pictures, plan: Plan) -> Results:
    """All rows at all views and worker counts. The floors run once per view set, beside the smallest worker count."""
    results = Results()
    for views in args.views:
        for workers in args.workers:
            names = [name for name in args.rows if not (ROWS[name].floor and workers != min(args.workers))]
            for name in filter(_missing, names):
                results.missing.append({"name": name, "views": views, "workers": workers, "install": ROWS[name].install})
            beton = str(pictures.beton) if pictures.beton else None
            jobs = [
                Job(name, views, 1 if ROWS[name].floor else workers, plan.batch_size, plan.batches, str(pictures.folder), beton)
                for name in names
                if not _missing(name)
            ]
            if jobs:
                measure_group(jobs, plan.turns, results)
    return results


# ---- ratios, goals, the table -----------------------------------------------------------------------------------------------------


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """`ratio_to_ours`: the median over the turns of this row's CPU cost over that of ours-ffcv in the same turn; None without it."""
    ours = {(row["views"], row["workers"]): row["turns"] for row in rows if row["name"] == OURS}
    for row in rows:
        reference = ours.get((row["views"], row["workers"]))
        row["ratio_to_ours"] = None
        if reference:
            row["ratio_to_ours"] = round(spread([a / b for a, b in zip(row["turns"], reference, strict=False)]).median, 3)


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal at each worker count where both rows were measured: the figure, what was asked, and whether it is met."""
    verdicts = []
    for goal in GOALS:
        for row in rows:
            if (row["name"], row["views"]) != (goal.peer, goal.views) or row["ratio_to_ours"] is None:
                continue
            floor = ROWS[goal.peer].floor
            figure = round(1 / row["ratio_to_ours"] if floor else row["ratio_to_ours"], 2)
            verdicts.append(
                {
                    "goal": f"{'at most' if floor else 'at least'} {goal.factor:g}x {'of' if floor else 'better than'} {goal.peer}",
                    "views": goal.views,
                    "workers": row["workers"],
                    "figure": figure,
                    "met": figure <= goal.factor if floor else figure >= goal.factor,
                }
            )
    return verdicts


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report for people, line by line."""
    for views, workers in dict.fromkeys((row["views"], row["workers"]) for row in report["rows"]):
        yield f"\n{views}, {workers} worker{'s' if workers > 1 else ''}"
        yield f"  {'':<18}{'CPU-ms/picture':>15}{'from':>8}{'to':>8}{'of ours':>9}{'pictures/s':>12}{'first batch':>13}{'peak MiB':>10}"
        for row in report["rows"]:
            if (row["views"], row["workers"]) == (views, workers):
                low, high = row["spread"]["cpu_ms_per_image"]
                ratio = f"{row['ratio_to_ours']:.2f}x" if row["ratio_to_ours"] else "-"
                yield (
                    f"  {row['name']:<18}{row['cpu_ms_per_image']:>15.3f}{low:>8.3f}{high:>8.3f}{ratio:>9}"
                    f"{row['images_per_s']:>12,.0f}{row['first_batch_s']:>11.2f} s{row['peak_rss_mib']:>10,.0f}"
                )
    for name, install in {entry["name"]: entry["install"] for entry in report["missing"]}.items():
        yield f"  {name:<18} missing: {install}"
    for entry in report["failed"]:
        yield f"  {entry['name']:<18} failed at {entry['views']}, {entry['workers']} worker(s): {entry['reason']}"
    if report["goals"]:
        yield "\ngoals (CPU time, ours-ffcv, median of the turns)"
    for goal in report["goals"]:
        where = f"{goal['views']}, {goal['workers']} worker{'s' if goal['workers'] > 1 else ''}"
        yield f"  {where:<24}{goal['goal']:<40}{goal['figure']:>6.2f}x  {'met' if goal['met'] else 'not met'}"
    yield "\nkernels"
    for kernel in report["kernels"]:
        yield f"  {Kernel(**kernel)}"
    machine, settings, shown = report["machine"], report["settings"], report["pictures"]
    yield f"\n{shown['count']} pictures ({shown['different']} different), {shown['source']}, {shown['mean_kb']} KB each"
    if report["first_start_s"]:
        yield f"first batch of {OURS} in the first process of this run (it compiles if it never ran here): {report['first_start_s']:.1f} s"
    yield f"{settings['turns']} turns of {settings['batches']} batches of {settings['batch_size']}; {report['seconds']:.0f} s in all"
    yield f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}: $ {report['command']}"


# ---- the command ------------------------------------------------------------------------------------------------------------------


def loaders_main(argv: Sequence[str]) -> None:
    """`cossl bench loaders [SRC]`. Raises ValueError or OSError for a user's mistake; exits with 1 when a row failed."""
    args = parse_flags(LoadersArgs, argv, "cossl bench loaders", __doc__ or "")
    began, source = time.perf_counter(), args.source or default_source()
    plan = planned(args)
    needs_beton = any(ROWS[name].reads == "beton" and not _missing(name) for name in args.rows)
    progress(f"{len(args.rows)} rows on {num_cores()} cores, {plan.turns} turns of {plan.batches * plan.batch_size} pictures")
    with tempfile.TemporaryDirectory(prefix="cossl-bench-") as scratch:
        pictures = prepare(source, plan.epoch_images, cache_dir(), Path(scratch), needs_beton)
        progress(f"{pictures.count} pictures, {pictures.source}, {pictures.mean_bytes / 1e3:.1f} KB each")
        first_start_s = compile_ours(args, pictures, plan)
        results = measure(args, pictures, plan)
    add_ratios(results.rows)
    report: dict[str, Any] = {
        "machine": machine(),
        "command": shlex.join(["cossl", "bench", "loaders", *argv]),
        "pictures": {
            "source": pictures.source,
            "count": pictures.count,
            "different": pictures.different,
            "mean_kb": round(pictures.mean_bytes / 1e3, 1),
        },
        "settings": {**asdict(plan), "views": {name: VIEWS[name] for name in args.views}},
        "first_start_s": first_start_s,
        "rows": results.rows,
        "missing": results.missing,
        "failed": results.failed,
        "goals": judged(results.rows),
        "kernels": [kernel._asdict() for kernel in measure_kernels()],
        "seconds": round(time.perf_counter() - began, 1),
    }
    if args.json is not None:
        replace_text(args.json, json.dumps(report, indent=1))
    print("\n".join(table(report)))
    if results.failed:
        raise SystemExit(1)
