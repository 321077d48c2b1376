"""What a report says of runs, one or several side by side, from their folders alone."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from cossl.models.flags import flatten
from cossl.models.run_status import Run
from cossl.tools.report_charts import Line, chart
from cossl.tools.report_page import Album, Html, as_set, folded, join, long_text, number, pairs, section, shown, table, tag, warning
from cossl.tools.report_read import Record, Told
from cossl.tools.report_results import protocols
from cossl.train import PRESETS

START_LIMIT = 100
PLACES = ("run_dir", "resume", "lock_wait_s")
"""Settings that are no difference between two runs."""

# ------------------------------------------------------------------------------------------------- at the top


def header(told: Sequence[Told]) -> Html:
    """Name, state and first numbers of a run, or the names of several."""
    if len(told) == 1:
        (one,) = told
        kind = " · ".join(filter(None, ["run", one.run.preset, one.run.method]))
        top = join([tag("p", kind, class_="kicker"), tag("h1", one.name), _tiles(one)])
    else:
        line = f"{len(told)} runs side by side. Where a setting is not named below, it is the same in all of them."
        top = join(
            [tag("p", "comparison", class_="kicker"), tag("h1", " · ".join(one.name for one in told)), tag("p", line, class_="lead")]
        )
    several = len(told) > 1
    bad = [f"{one.name}: {_collapse(one)}" if several else _collapse(one) for one in told if "collapsed" in (one.run.state, *one.run.notes)]
    notes = [f"{one.name}: {note}" if several else note for one in told for note in one.troubles if note != "collapsed"]
    return join([top, warning("Collapsed", bad), warning("Not as it should be", notes)])


def _collapse(one: Told) -> str:
    last = {key: value for record in one.metrics for key, value in record.items()} | one.results
    return (
        f"the projections say nothing of their picture any more (spread {shown(last.get('std'))}, effective rank {shown(last.get('rank'))})"
    )


def _tiles(one: Told) -> Html:
    run, tops = one.run, _tops(one)
    epoch = f"{run.epoch:.4g}" if number(run.epoch) is not None else "—"
    tiles = [("state", run.state, f"idle for {_span(run.idle_s)}" if run.state == "stopped" else _left(run))]
    tiles.append(("epoch", epoch, f"of {shown(run.epochs)}"))
    tiles += [(f"{name} top-1", f"{own:.1f} %", f"untrained {_percent(untrained)}") for name, own, untrained in tops]
    if not tops and number(run.knn_top1) is not None:
        tiles.append(("kNN top-1", f"{run.knn_top1:.1f} %", "the last one"))
    if number(run.images_per_s) is not None:
        tiles.append(("throughput", f"{run.images_per_s:,.0f}", "images/s"))
    if (seconds := number(one.results.get("seconds"))) is not None:
        tiles.append(("time", _span(seconds), "since its last start"))
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value, tag("small", below) if below else "")) for name, value, below in tiles),
               class_="tiles")  # fmt: skip


def _left(run: Run) -> str:
    return f"{_span(run.left_s)} left" if run.state == "running" and number(run.left_s) is not None else ""


def _tops(one: Told) -> list[tuple[str, float, float | None]]:
    """(linear or 20-NN, percent of the trained network, of the untrained one)"""
    probes = [(name, one.results.get(key)) for key, name in _probes([one]).items()]
    known = [(name, number(of.get("trained")), number(of.get("untrained"))) for name, of in probes if isinstance(of, dict)]
    return [(name, own, untrained) for name, own, untrained in known if own is not None]


def _probes(told: Sequence[Told]) -> dict[str, str]:
    ks = {of.get("knn_k") for one in told if isinstance(of := one.results.get("protocol"), dict)}
    k = ks.pop() if len(ks) == 1 else None
    return {"linear_top1": "linear", "knn_top1": f"{k}-NN" if isinstance(k, int) else "kNN"}


def _percent(value: Any) -> str:
    return "—" if number(value) is None else f"{value:.1f} %"


def _span(seconds: Any) -> str:
    if (known := number(seconds)) is None:
        return "—"
    unit, seconds_of = next((of for of in (("d", 86400), ("h", 3600), ("min", 60)) if known >= 2 * of[1]), ("s", 1))
    return f"{known / seconds_of:.3g} {unit}"


# ------------------------------------------------------------------------------------------------- results and settings


MEASURES = {"images_per_s": "images/s", "seconds": "seconds since the last start", "std": "spread of the projections",
            "rank": "effective rank of the projections", "device": "device", "torch": "torch"}  # fmt: skip


def results_section(told: Sequence[Told]) -> Html:
    """The trainer's own evaluation; several runs are columns."""
    if len(told) == 1 and not told[0].results:
        return section("Results", tag("p", "No results yet: the run is not finished, or results.json is damaged.", class_="note"))
    measures = {key: name for key, name in MEASURES.items() if any(key in one.results for one in told)}
    if len(told) == 1:
        results = told[0].results
        networks = _networks(told)
        tops = [[name, *(_percent(results[probe].get(network)) for network in networks)] for probe, name in _probes(told).items()
                if isinstance(results.get(probe), dict)]  # fmt: skip
        cost = [[name, shown(results.get(key))] for key, name in measures.items()]
        frozen = table("Top-1 of the frozen features", ["probe", *networks.values()], tops, [False, True, True, True])
        shown_tables = [frozen if tops else Html(), table("What it took", ["measure", "value"], cost, [False, True]) if cost else Html()]
    else:
        states = [
            ["state", *(one.run.state for one in told)],
            ["epoch", *(f"{shown(one.run.epoch)} of {shown(one.run.epochs)}" for one in told)],
        ]
        rows = [*states, *_top_rows(told), *([name, *(shown(one.results.get(key)) for one in told)] for key, name in measures.items())]
        heads = ["", *(one.name for one in told)]
        shown_tables = [table("Top-1 of the frozen features, and what it took", heads, rows, [False, *[True] * len(told)])]
    return section("Results", tag("div", *shown_tables, class_="beside"), protocols(told, [one.results for one in told]))


def _networks(told: Sequence[Told]) -> dict[str, str]:
    grids = {shown(of.get("pixels_grid")) for one in told if isinstance(of := one.results.get("protocol"), dict)}
    pixels = f"{next(iter(grids))} x {next(iter(grids))} pixels" if len(grids) == 1 and grids != {shown(None)} else "pixels"
    return {"trained": "trained", "untrained": "untrained", "pixels": pixels}


def _top_rows(told: Sequence[Told]) -> Iterator[list[str]]:
    for probe, name in _probes(told).items():
        found = [of if isinstance(of := one.results.get(probe), dict) else {} for one in told]
        if any(found):
            yield from ([f"{name}, {what}", *(_percent(of.get(network)) for of in found)] for network, what in _networks(told).items())


def settings_section(told: Sequence[Told]) -> Html:
    """What was set otherwise than in the preset, or what differs between the runs; the whole config folded."""
    top = _from_preset(told[0]) if len(told) == 1 else _between(told)
    wholes = [_whole_config(one, f"all settings of {one.name}" if len(told) > 1 else "all settings") for one in told if one.config]
    return section("Settings", top, *wholes)


def _from_preset(one: Told) -> Html:
    if (preset := one.run.preset) not in PRESETS:
        return tag("p", f"The preset {shown(preset)} is not one of this version.", class_="note")
    default = json.loads(json.dumps({"preset": preset} | flatten(PRESETS[preset]())))
    keys = [key for key in dict.fromkeys([*default, *one.config]) if key not in PLACES]
    changed = [key for key in keys if key not in default or key not in one.config or default[key] != one.config[key]]
    if not changed:
        return tag("p", f"As the preset {preset} has them.", class_="note")
    absent = "not in this version", "not recorded"
    rows = [
        [key, as_set(one.config[key]) if key in one.config else absent[1], as_set(default[key]) if key in default else absent[0]]
        for key in changed
    ]
    return table(f"Set otherwise than in the preset {preset}", ["setting", "this run", "preset"], rows, [False] * 3)


def _between(told: Sequence[Told]) -> Html:
    keys = [key for key in dict.fromkeys(key for one in told for key in one.config) if key not in PLACES]
    texts = {key: [as_set(one.config[key]) if key in one.config else "not recorded" for one in told] for key in keys}
    rows = [[key, *of] for key, of in texts.items() if len(set(of)) > 1]
    if not rows:
        return tag("p", "All settings are equal.", class_="note")
    return table("What differs between the runs", ["setting", *(one.name for one in told)], rows, [False] * (1 + len(told)))


def _whole_config(one: Told, summary: str) -> Html:
    rows = [[key, as_set(value)] for key, value in one.config.items()]
    return folded(f"{summary} ({len(rows)})", table("config.json", ["setting", "value"], rows, [False, False]))


# ------------------------------------------------------------------------------------------------- curves

PANELS: dict[str, tuple[tuple[str, ...], bool]] = {  # title: (names in metrics.jsonl, whether the axis begins at 0)
    "Loss terms": (("loss", "global", "local_to_global", "global_to_local"), False),
    "Top-1 while training, percent": (("knn_top1", "probe_top1"), True),
    "Images/s, mean of the run so far": (("images_per_s",), True),
    "Spread of the projections": (("std",), True),
    "Effective rank of the projections": (("rank",), True),
    "Learning rate": (("lr",), True),
}


def curves_section(told: Sequence[Told]) -> Html:
    """Of one run a line for each of the names; of several, a panel for each name and a line for each run."""
    charts = []
    for title, (names, from_zero) in PANELS.items():
        if len(told) == 1:
            charts.append(chart(title, [Line(name, _points(told[0], name)) for name in names], from_zero=from_zero))
        else:
            kinds = {name: f"{title}: {name}" if len(names) > 1 else title for name in names}
            charts += [chart(kinds[name], [Line(one.name, _points(one, name)) for one in told], from_zero=from_zero) for name in names]
    return section("Curves", tag("div", *charts, class_="grid")) if any(charts) else Html()


def _points(one: Told, name: str) -> list[tuple[float, float | None]]:
    return sorted(((float(record["epoch"]), number(record[name])) for record in one.metrics if name in record), key=lambda point: point[0])


# ------------------------------------------------------------------------------------------------- pictures and environment


def batch_section(told: Sequence[Told], album: Album) -> Html:
    """The pictures as the network sees them."""
    what = "a batch as the network sees it: the views after cropping, flipping and colour changes"
    return section("A batch as seen", *(album.figure(one.run_dir / "batch.png", f"{one.name}: {what}") for one in told))


def environment_section(told: Sequence[Told]) -> Html:
    """What every start ran on, each folded, the last one open if there is one run."""
    return section("Environment", *(part for one in told for part in _starts(one, len(told) > 1)))


def _starts(one: Told, several: bool) -> Iterator[Html]:
    shown_starts = [start for start in one.starts[-START_LIMIT:] if isinstance(start, dict)]
    if len(shown_starts) < len(one.starts):
        yield tag("p", f"{len(shown_starts)} of the {len(one.starts):,} starts in environment.json are shown", class_="note")
    for i, start in enumerate(shown_starts, 1):
        machine = shown(start["gpus"]) if start.get("gpus") else f"{shown(start.get('cpu'))}, {shown(start.get('cpu_count'))} cores"
        title = f"{f'{one.name}: ' if several else ''}start {i} of {len(shown_starts)}, {shown(start.get('time'))}, {machine}"
        yield folded(title, _start(start), open_=not several and i == len(shown_starts))


def _start(start: Record) -> Html:
    code: Record = start["code"] if isinstance(start.get("code"), dict) else {}
    versions: Record = start["versions"] if isinstance(start.get("versions"), dict) else {}
    own: Record = {key: start[key] for key in ("command", "host", "cpu", "cpu_count", "gpus", "driver", "slurm") if key in start}
    if isinstance(words := own.get("command"), list) and all(isinstance(word, str) for word in words):
        own["command"] = shlex.join(words)
    own |= {f"code {key}": code[key] for key in ("version", "commit", "dirty", "new_files") if key in code}
    rows = [[key, shown(value)] for key, value in own.items()]
    rows += [["versions", pairs((key, shown(value)) for key, value in versions.items())]] if versions else []
    diff = code.get("diff")
    changes = (
        folded(f"changes to the code since the commit ({len(diff.splitlines()):,} lines)", long_text(diff))
        if isinstance(diff, str) and diff
        else ""
    )
    return join([table("What it ran on", ["what", "value"], rows, [False, False]), changes])
