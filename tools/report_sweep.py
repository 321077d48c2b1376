"""What a report says of a sweep: the files that `cossl sweep collect` wrote into its folder, as a page."""

from __future__ import annotations

import csv
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cossl.tools.report_page import Album, Html, folded, join, read_bytes, read_json, section, shown, table, tag, warning

FIGURES = {
    "accuracy.png": "Linear top-1 of every run by setting, with mean and spread over seeds, and the untrained network",
    "speed.png": "Linear top-1 against images/s",
}
COLLECTED = ("results.csv", "table.md")


def sweep_page(folder: Path, album: Album) -> tuple[Html, list[Html]]:
    """(header, sections) of the sweep in that folder, as far as it was collected."""
    troubles: list[str] = []
    sweep = read_json(folder / "sweep.json", dict, "sweep.json", troubles)
    listed = sweep.get("points")
    points = [point for point in (listed if isinstance(listed, list) else []) if isinstance(point, dict)]
    text, rows = (_text(folder / name, troubles) for name in reversed(COLLECTED))
    stale = _stale(folder, points)
    lines = [f"{stale}: run `{collect_command(folder)}` first, then this report again"] if stale else []
    top = [tag("p", "ablation sweep", class_="kicker"), tag("h1", folder.name), tag("p", _standing(points, rows), class_="lead")]
    header = join([*top, warning("Out of date", lines), warning("Not as it should be", troubles)])
    figures = [album.figure(folder / name, caption) for name, caption in FIGURES.items()]
    sections = [section("Ablations", *markdown(text)), section("Accuracy and speed", *figures)]
    return header, [*sections, section("Points", _points(rows)), section("Settings", _shared(points))]


def _text(path: Path, troubles: list[str]) -> str:
    try:
        return read_bytes(path).decode(errors="replace")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        troubles.append(f"{path.name} unreadable ({error})")
        return ""


def _stale(folder: Path, points: list[dict[str, Any]]) -> str:
    """Why what was collected is not the sweep as it is now; empty if it is."""
    names = [point["run"] for point in points if isinstance(point.get("run"), str) and Path(point["run"]).name == point["run"]]
    times = [time for name in names if (time := _time(folder.parent / "points" / name / "results.json"))]
    written = [_time(folder / name) for name in COLLECTED]
    if None in written:
        return f"{' and '.join(name for name, time in zip(COLLECTED, written, strict=True) if time is None)} not there yet"
    newer = sum(time > min(time for time in written if time is not None) for time in times)
    return f"{newer} of the points got results since the tables were collected" if newer else ""


def _time(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except (OSError, ValueError):  # ValueError: a name with a zero byte
        return None


def collect_command(folder: Path) -> str:
    """The line that collects the sweep."""
    root = [] if folder.parent == Path("sweeps").absolute() else ["--root", str(folder.parent)]
    return shlex.join(["cossl", "sweep", "collect", folder.name, *root])


def _standing(points: list[dict[str, Any]], results: str) -> str:
    presets = ", ".join(dict.fromkeys(shown(point.get("preset")) for point in points))
    try:
        states = Counter(row.get("state") or "unknown" for row in csv.DictReader(results.splitlines()))
    except csv.Error:
        states = Counter()
    told = ", ".join(f"{n:,} {state}" for state, n in states.most_common()) or "not collected yet"
    return f"{len(points):,} points of {presets or 'no preset'}: {told}."


def _points(results: str) -> Html:
    try:
        rows = list(csv.reader(results.splitlines(keepends=True)))
    except csv.Error as error:
        return tag("p", f"results.csv damaged ({error})", class_="note")
    if not rows:
        return Html()
    right = [all(_is_number(row[i]) for row in rows[1:] if i < len(row) and row[i]) for i in range(len(rows[0]))]
    return folded(f"every point, as in results.csv ({len(rows) - 1:,})", table("results.csv", rows[0], rows[1:], right))


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", text) is not None


def _shared(points: list[dict[str, Any]]) -> Html:
    """What all points have in common."""
    configs = [point["config"] for point in points if isinstance(point.get("config"), dict)]
    if not configs:
        return Html()
    keys = [key for key, value in configs[0].items() if all(key in config and config[key] == value for config in configs)]
    rows = [[key, shown(configs[0][key])] for key in keys]
    return folded(
        f"settings that all points share ({len(rows)})", table("Settings of all points", ["setting", "value"], rows, [False, False])
    )


# ------------------------------------------------------------------------------------------------- table.md


def markdown(text: str) -> Iterator[Html]:
    """The tables, their titles and the notes of table.md: that much of Markdown, and whatever else there is as plain text."""
    caption, lines = "", text.splitlines()
    while lines:
        block = [lines.pop(0)]
        kind = block[0][:2] if block[0][:2] in ("| ", "- ") else ""
        while kind and lines and lines[0].startswith(kind):
            block.append(lines.pop(0))
        if kind == "| ":
            yield _table(caption, block)
            caption = ""
        elif kind:
            yield tag("ul", *(tag("li", plain(line[2:])) for line in block), class_="notes")
        elif _is_bold(block[0]):
            caption = plain(block[0][2:-2])
        elif block[0].strip():
            yield tag("p", plain(block[0]))


def _table(caption: str, lines: list[str]) -> Html:
    head, *rows = (_cells(line) for line in lines)
    rule = rows.pop(0) if rows and all(re.fullmatch(r":?-+:?", cell) for cell in rows[0]) else []
    right = [cell.endswith(":") for cell in rule]
    cells = [[tag("strong", plain(cell[2:-2])) if _is_bold(cell) else plain(cell) for cell in row] for row in rows]
    return table(caption, [plain(cell) for cell in head], cells, right + [False] * (len(head) - len(right)))


def _cells(line: str) -> list[str]:
    inner = line.strip().removeprefix("|").removesuffix("|")
    return [cell.strip() for cell in re.findall(r"((?:\\.|[^|\\])*)(?:\||$)", inner)][: inner.count("|") + 1]


def _is_bold(text: str) -> bool:
    """An asterisk that is meant as one has a backslash before it."""
    return len(text) > 4 and text.startswith("**") and text.endswith("**")


def plain(text: str) -> str:
    """Without the backslashes that Markdown needs."""
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text)
