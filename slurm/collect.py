"""A sweep's outcomes as files: results.csv, table.md, table.tex, accuracy.png and speed.png. Needs no scheduler and no torch."""

from __future__ import annotations

import csv
import functools
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cossl.models.flags import replace_text
from cossl.slurm.figures import draw_accuracy, draw_speed
from cossl.slurm.outcomes import DONE, FOUND, PROBES, Collected, Outcome, Setting, collect

__all__ = ["Collected", "collect", "write"]


def write(collected: Collected, folder: Path) -> str:
    """Writes each file whole or not at all; returns table.md, for people; where matplotlib is missing, with a line more, and no figures."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown = as_markdown(collected)
    replace_text(folder / "results.csv", as_csv(collected))
    replace_text(folder / "table.md", markdown)
    replace_text(folder / "table.tex", as_latex(collected))
    try:
        draw_accuracy(collected, folder / "accuracy.png")
        draw_speed(collected, folder / "speed.png")
    except ImportError:
        markdown += "\nno accuracy.png, no speed.png: matplotlib is missing, pip install -c constraints.txt -e '.[log]'\n"
    return markdown


def as_csv(collected: Collected) -> str:
    """A line a point, an empty cell for what is not known. An axis that is called like a column of ours is config.<key>."""
    ours = ["preset", "data", "seed", "state", *FOUND, "run", "identity"]
    axes = [axis.label if axis.label not in ours else f"config.{axis.key}" for axis in collected.axes]
    text = io.StringIO()
    lines = csv.DictWriter(text, [*ours[:2], *axes, *ours[2:]], lineterminator="\n")
    lines.writeheader()
    for point, run_dir, words, state, found, _ in collected.outcomes:
        own = {"preset": point.preset, "data": point.config.get("data"), "seed": point.seed, "state": state}
        lines.writerow(own | dict(zip(axes, words, strict=True)) | found | {"run": run_dir, "identity": point.identity})
    return text.getvalue()


# ------------------------------------------------------------------------------------------------- the tables


class Cell(NamedTuple):
    """Plain text, to be escaped for where it goes."""

    text: str
    best: bool = False


class Table(NamedTuple):
    """Rows under a head of two lines: groups of columns, and columns. The first columns, a group without a name, are names."""

    title: str
    groups: list[tuple[str, int]]
    """(name, number of columns)"""
    columns: list[str]
    rows: list[list[Cell]]


def tables(collected: Collected) -> Iterator[Table]:
    """Every setting under every preset; and if two keys vary, for each preset the linear top-1 by one and the other."""
    presets, axes = collected.presets, collected.axes
    cells = {(setting.preset, setting.words): row for preset in presets for setting, row in _preset_cells(collected, preset)}
    empty = [Cell("")] * (len(PROBES) + 1)
    ranks = [list(axis.words.values()) for axis in axes]
    ordered = sorted({s.words for s in collected.settings}, key=lambda words: [r.index(w) for r, w in zip(ranks, words, strict=True)])
    names = [axis.label for axis in axes] or ["grid"]
    yield Table(
        f"{collected.grid}: top-1, percent",
        [("", len(names)), *((preset, len(empty)) for preset in presets)],
        [*names, *[*PROBES.values(), "images/s"] * len(presets)],
        [
            [*map(Cell, words or [collected.grid]), *(cell for preset in presets for cell in cells.get((preset, words), empty))]
            for words in ordered
        ],
    )
    for preset in presets if len(axes) == 2 else ():
        used = [[w for w in axis if any(s.words[i] == w for s in collected.of(preset))] for i, axis in enumerate(ranks)]
        rows = [[Cell(first), *(cells.get((preset, (first, second)), empty)[0] for second in used[1])] for first in used[0]]
        groups = [("", 1), (axes[1].label, len(used[1]))]
        yield Table(f"{collected.grid}, {preset}: linear top-1, percent", groups, [axes[0].label, *used[1]], rows)


def _preset_cells(collected: Collected, preset: str) -> list[tuple[Setting, list[Cell]]]:
    """Of each setting linear and 20-NN top-1, and images/s. Best: see `notes`."""
    settings, protocols = collected.of(preset), _protocols(collected, preset)
    whole = [setting for setting in settings if not setting.tally]
    best = {probe: max((f"{setting.mean(probe):.1f}" for setting in whole), key=float, default="") for probe in PROBES}
    rows = []
    for setting in settings:
        marks = "†" * any(o.found.get("collapsed") is True for o in setting.outcomes)
        marks += "‡" * any(_is_odd(outcome, protocols) for outcome in setting.outcomes)
        shown = {probe: f"{mean:.1f}" if (mean := setting.mean(probe)) is not None else "" for probe in PROBES}
        good = {probe: not setting.tally and len(protocols) < 2 and text == best[probe] for probe, text in shown.items()}
        tops = [Cell(_number_cell(setting, probe, text, marks), good[probe]) for probe, text in shown.items()]
        rate = setting.mean("images_per_s")
        rows.append((setting, [*tops, Cell("—" if rate is None else f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}")]))
    return rows


def _number_cell(setting: Setting, probe: str, mean: str, marks: str) -> str:
    if not mean:
        return f"— {_missing(setting.outcomes)}"
    spread = setting.spread(probe)
    return mean + (f" ± {spread:.1f}" if spread is not None else "") + (f" ({setting.tally})" if setting.tally else "") + marks


def _missing(outcomes: Iterable[Outcome]) -> str:
    """failed, or 2 failed, 1 pending"""
    states = Counter(outcome.state for outcome in outcomes if outcome.state != DONE)
    return next(iter(states)) if len(states) == 1 else ", ".join(f"{n} {state}" for state, n in states.items())


def _protocols(collected: Collected, preset: str) -> list[str | None]:
    """How the preset's runs were measured, the usual way first."""
    done = [outcome.found["protocol"] for outcome in collected.outcomes if outcome.state == DONE and outcome.point.preset == preset]
    return [protocol for protocol, _ in Counter(done).most_common()]


def _is_odd(outcome: Outcome, protocols: Sequence[str | None]) -> bool:
    return outcome.state == DONE and outcome.found["protocol"] != protocols[0]


# ------------------------------------------------------------------------------------------------- what stands below them


def notes(collected: Collected) -> Iterator[str]:
    """What the numbers are, how they were measured, and what is wrong with which."""
    done = [outcome for outcome in collected.outcomes if outcome.state == DONE]
    missing = Counter(outcome.state for outcome in collected.outcomes if outcome.state != DONE)
    collapsed = [outcome for outcome in done if outcome.found["collapsed"]]
    seeds = _by_preset(collected, _seeds)
    yield f"± is the sample standard deviation over seeds (divided by n - 1); n = {seeds}, unless a cell says (n of N)"
    yield "bold: the best mean, as printed, of its column among the settings with all their seeds; several if they are equal"
    yield f"missing of {len(collected.outcomes):,} points: {', '.join(f'{n:,} {state}' for state, n in missing.items()) or 'none'}"
    for damage in dict.fromkeys(filter(None, (outcome.damage for outcome in collected.outcomes))):
        yield f"{damage}, its numbers are left out: {_named(collected, (one for one in collected.outcomes if one.damage == damage))}"
    if collapsed:
        yield f"† collapsed, the projections say nothing of their picture: {_named(collected, collapsed)}"
    if not done:
        return
    for network, name in (("untrained_", "the same network untrained"), ("pixels_", "12 x 12 pixels")):
        yield f"{name}, {' / '.join(PROBES.values())}: {_by_preset(collected, functools.partial(_floor, network))}"
    yield from _measured(collected)
    for preset in collected.presets:
        folders = [str(outcome.point.config.get("data")) for setting in collected.of(preset) for outcome in setting.outcomes]
        if len(set(folders)) > 1:
            yield f"PICTURES of {preset} were in several folders: {_counted(folders)}; means are of all, unless data is a column"
    yield f"code: {_counted(_told(outcome, 'code_version') for outcome in done)}"
    machines = [", ".join(_told(outcome, name) for name in ("device", "hardware")) for outcome in done]
    yield f"ran on: {_counted(machines)}{'; compare images/s only within one of them' if len(set(machines)) > 1 else ''}"
    yield f"torch: {_counted(_told(outcome, 'torch') for outcome in done)}"


def _by_preset(collected: Collected, text: Callable[[list[Setting]], str]) -> str:
    texts = {preset: text(collected.of(preset)) for preset in collected.presets}
    return next(iter(texts.values())) if len(set(texts.values())) == 1 else "; ".join(f"{one} in {preset}" for preset, one in texts.items())


def _seeds(settings: list[Setting]) -> str:
    seeds = sorted({outcome.point.seed for setting in settings for outcome in setting.outcomes})
    return f"{settings[0].most} (seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))})"


def _floor(network: str, settings: list[Setting]) -> str:
    """Lowest and highest of all points: it depends on the setting as far as the backbone does."""
    numbers = [[value for setting in settings for value in setting.numbers(network + probe)] for probe in PROBES]
    ends = [list(dict.fromkeys((f"{min(of):.1f}", f"{max(of):.1f}"))) if of else ["not recorded"] for of in numbers]
    return " / ".join(" to ".join(of) for of in ends)


def _measured(collected: Collected) -> Iterator[str]:
    """Each protocol once, and loudly where one preset has several."""
    protocols = {preset: _protocols(collected, preset) for preset in collected.presets}
    for one in dict.fromkeys(protocol for of in protocols.values() for protocol in of):
        users = [preset + " ‡" * (of.index(one) > 0) for preset, of in protocols.items() if one in of]
        yield f"protocol of {', '.join(users)}: " + (", ".join(f"{k} {v}" for k, v in json.loads(one).items()) if one else "not recorded")
    for preset, of in protocols.items():
        if len(of) > 1:
            known = [json.loads(one) if one else {} for one in of]
            keys = sorted(key for key in {k for one in known for k in one} if any(one.get(key) != known[0].get(key) for one in known))
            odd = [outcome for outcome in collected.outcomes if outcome.point.preset == preset and _is_odd(outcome, of)]
            yield (
                f"‡ PROTOCOLS DIFFER in {preset} ({', '.join(keys) or 'not recorded'}): these are measured otherwise than the most, do not"
                f" compare them with the others; nothing is bold in {preset}: {_named(collected, odd)}"
            )


def _named(collected: Collected, outcomes: Iterable[Outcome]) -> str:
    seeds: dict[str, list[str]] = {}
    for outcome in outcomes:
        seeds.setdefault(f"{outcome.point.preset}, {collected.name(outcome.words)}", []).append(str(outcome.point.seed))
    return "; ".join(f"{name} (seed {', '.join(of)})" for name, of in seeds.items())


def _told(outcome: Outcome, name: str) -> str:
    return outcome.found[name] or f"{name} not recorded"


def _counted(texts: Iterable[str]) -> str:
    counts = Counter(texts)
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{text} ({n:,} points)" for text, n in counts.most_common())


# ------------------------------------------------------------------------------------------------- in two languages


def as_markdown(collected: Collected) -> str:
    """The tables and the notes, in columns that a terminal shows straight."""
    parts = []
    for table in tables(collected):
        over = [name for name, width in table.groups for _ in range(width)]
        head = [_markdown(f"{group} {column}".strip()) for group, column in zip(over, table.columns, strict=True)]
        rows = [[f"**{_markdown(cell.text)}**" if cell.best else _markdown(cell.text) for cell in row] for row in table.rows]
        widths = [max(3, *map(len, column)) for column in zip(head, *rows, strict=True)]
        left = table.groups[0][1]

        def line(cells: Iterable[str], widths: list[int] = widths, left: int = left) -> str:
            padded = (cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True)))
            return f"| {' | '.join(padded)} |"

        rule = line("-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths))
        parts.append("\n".join([f"**{_markdown(table.title)}**", "", line(head), rule, *map(line, rows)]))
    parts.append("\n".join(f"- {_markdown(note)}" for note in notes(collected)))
    return "\n\n".join(parts) + "\n"


def _markdown(text: str) -> str:
    """Inside a word an underscore is one in GitHub's Markdown."""
    text = re.sub(r"[\\`*|<>\[\]~$]", r"\\\g<0>", " ".join(text.split()))
    text = re.sub(r"&(?=#?\w+;)", r"\&", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", text)


def as_latex(collected: Collected) -> str:
    """The same; each table, and the notes, to be put into a float of one's own."""
    parts = [r"% made by cossl sweep collect; needs \usepackage{booktabs}"]
    for table in tables(collected):
        (_, left), *groups = table.groups
        starts = [1 + left + sum(width for _, width in groups[:i]) for i in range(len(groups))]
        over = "".join(rf" & \multicolumn{{{width}}}{{c}}{{{_latex(name)}}}" for name, width in groups)
        rules = "".join(rf"\cmidrule(lr){{{start}-{start + width - 1}}}" for start, (_, width) in zip(starts, groups, strict=True))
        rows = [[rf"\textbf{{{_latex(cell.text)}}}" if cell.best else _latex(cell.text) for cell in row] for row in table.rows]
        lines = [
            f"% {' '.join(table.title.split())}",
            rf"\begin{{tabular}}{{{'l' * left}{'r' * (len(table.columns) - left)}}}",
            r"\toprule",
            rf"{' & ' * (left - 1)}{over} \\",
            rules,
            rf"{' & '.join(map(_latex, table.columns))} \\",
            r"\midrule",
            *(rf"{' & '.join(row)} \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
        ]
        parts.append("\n".join(lines))
    parts.append("\n".join([r"\begin{minipage}{\linewidth}\footnotesize", *(_latex(note) + r" \par" for note in notes(collected))]))
    return "\n\n".join(parts) + "\n\\end{minipage}\n"


LATEX = {character: "\\" + character for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # after the end of a row it would be a length, and a star an option
    "]": "{]}",
    "*": "{*}",
    "—": "---",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
}


def _latex(text: str) -> str:
    text = "".join(LATEX.get(character, character) for character in " ".join(text.split()))
    return text.replace("--", "-{}-") if "---" not in text else text
