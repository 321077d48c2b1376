"""`cossl runs`: what runs there are and how far each is, from their folders alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cossl.models import run_status
from cossl.models.flags import parse_flags
from cossl.models.run_status import Run, State, list_runs

Column = Literal["name", "preset", "method", "state", "epoch", "knn_top1", "linear_top1", "images_per_s", "idle_s"]


@dataclass(frozen=True)
class RunsArgs:
    """The command line of `cossl runs`; each field's text is its help."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = Path("runs")
    """Where to look, three folders deep; or one run's folder."""

    json: bool = False
    """Print a JSON list, with a field for every column, instead of the table."""

    state: tuple[State, ...] = ()
    """Show these alone, as in --state running stopped."""

    sort: Column = "name"
    """Column to sort by: words from a, numbers from the highest, idle_s from the lowest; what has no value comes last."""


def sort_key(run: Run, column: Column) -> tuple[bool, Any]:
    """None last; numbers from the highest, but time from the lowest."""
    value = getattr(run, column)
    return value is None, -value if isinstance(value, int | float) and column != "idle_s" else value


def table(runs: Sequence[Run]) -> Iterator[str]:
    """The runs for people, line by line."""
    width = max([len(run.name) for run in runs] + [4])
    yield f"{'name':<{width}}  {'preset':<15}{'method':<8}{'state':<14}{'epoch':>12}{'kNN %':>7}{'linear %':>10}{'images/s':>10}{'idle':>7}"
    for run in runs:
        epoch = f"{_shown(run.epoch, '.1f')} of {_shown(run.epochs, 'g')}"
        numbers = f"{_shown(run.knn_top1, '.1f'):>7}{_shown(run.linear_top1, '.1f'):>10}{_shown(run.images_per_s, ',.0f'):>10}"
        words = f"{_shown(run.preset, ''):<15}{_shown(run.method, ''):<8}{run.state:<14}"
        yield f"{run.name:<{width}}  {words}{epoch:>12}{numbers}{_span(run.idle_s):>7}  {'; '.join(run.notes)}".rstrip()


def _shown(value: Any, how: str) -> str:
    return "-" if value is None else format(value, how)


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    size, unit = next((size, unit) for size, unit in [(86400, "d"), (3600, "h"), (60, "min"), (0, "s")] if seconds >= size or not size)
    return f"{seconds / (size or 1):.0f} {unit}"


def runs_main(argv: Sequence[str]) -> None:
    """`cossl runs`. Raises ValueError or OSError for a user's mistake."""
    args = parse_flags(RunsArgs, argv, "cossl runs", f"{__doc__}\n\n{run_status.__doc__}")
    found = list_runs(args.folder)
    shown = sorted((run for run in found if not args.state or run.state in args.state), key=lambda run: sort_key(run, args.sort))
    if args.json:
        print(json.dumps([asdict(run) for run in shown], indent=1))
        return
    print("\n".join(table(shown)))
    print(f"{len(shown)} of {len(found)} runs in {args.folder}")
