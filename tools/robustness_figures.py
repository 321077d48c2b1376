"""The figures of `cossl robustness`: a panel for each curve of a family, a line for each run. matplotlib is imported only to draw them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cossl.pipelines.figure import save_figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, told apart by the colour-blind too; with the markers, 56 different looks."""
MARKERS = "osD^vPX*"
COLUMNS = 2


def curve(name: str, x_label: str, x: Sequence[float], top1: Sequence[float], log: bool = False, unchanged: float | None = None) -> Any:
    """What a result holds to be drawn: top-1 in percent against x, and where it is not on the curve, that of the unchanged pictures."""
    points = sorted(zip(x, top1, strict=True))
    own = {"x": [point[0] for point in points], "top1": [point[1] for point in points]}
    return {"name": name, "x_label": x_label, **own, "log": log, "unchanged_top1": unchanged}


def draw_curves(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Writes a PNG of the results of one family, by the name of their run. ImportError without matplotlib."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(one["name"] for result in results.values() for one in result["curves"]))
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.5 * rows + 0.3 * len(results) + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        _panel(axes, name, results)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    title = next(iter(results.values()))["title"]
    figure.suptitle(title, fontsize=12)
    figure.legend(handles=_legend(results), loc="outside lower center", ncols=1 if len(results) > 3 else len(results) + 2, frameon=False)
    save_figure(figure, path)


def _panel(axes: Any, name: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    highest = 1.0
    for which, result in enumerate(results.values()):
        for one in result["curves"]:
            if one["name"] != name:
                continue
            axes.plot(one["x"], one["top1"], **_look(which))
            axes.set_xlabel(one["x_label"])
            if one["log"]:
                axes.set_xscale("log")
                axes.set_xticks(one["x"], [f"{x:g}" for x in one["x"]])
                axes.set_xticks([], minor=True)
            if one["unchanged_top1"] is not None:
                axes.axhline(one["unchanged_top1"], color=COLOURS[which % len(COLOURS)], linestyle="dashed", linewidth=1)
            highest = max(highest, one["unchanged_top1"] or 0, *one["top1"])
        axes.axhline(100 / result["classes"], color="0.35", linestyle="dotted", linewidth=1.2)
    axes.set(title=name, ylabel="top-1, percent", ylim=(-0.03 * highest, 1.08 * highest))
    axes.title.set_fontsize(11)
    axes.grid(color="0.9", linewidth=0.6)


def _look(which: int) -> dict[str, Any]:
    return {"color": COLOURS[which % len(COLOURS)], "marker": MARKERS[which % len(MARKERS)], "markersize": 5, "linewidth": 1.6}


def _legend(results: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], label=name.replace("$", r"\$"), **_look(which)) for which, name in enumerate(results)]
    if any(one["unchanged_top1"] is not None for result in results.values() for one in result["curves"]):
        lines.append(Line2D([], [], color="0.35", linestyle="dashed", linewidth=1, label="unchanged pictures"))
    return [*lines, Line2D([], [], color="0.35", linestyle="dotted", linewidth=1.2, label="chance")]
