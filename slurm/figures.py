"""The figures of a sweep: accuracy by setting, and accuracy against images/s. matplotlib is imported only to draw them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cossl.pipelines.figure import plain, save_figure
from cossl.slurm.outcomes import MISSING, Collected, Setting

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, told apart by the colour-blind too; with the markers, 56 different looks."""
MARKERS = "osD^vPX*"
TOP = "linear_top1"
LABELLED = 24
"""Of more settings than this, the figure of the speeds names so many, the best, and says so."""


def draw_accuracy(collected: Collected, path: Path) -> None:
    """Writes a PNG with a panel for each preset: linear top-1 of every run, mean and spread of every setting, the untrained network.

    Of two varied keys the first is on the x axis, the second in colours; else the settings stand side by side. ImportError without
    matplotlib.
    """
    from matplotlib.figure import Figure

    groups, series = _groups(collected)
    slot = max(0.34 * len(series) + 0.3, 0.09 * max(len(line) for group in groups for line in group.split("\n")) + 0.2)
    width = min(100.0, max(4.0, slot * len(groups)) + 3.2)
    figure = Figure(figsize=(width, 4 * len(collected.presets)), layout="constrained")
    for axes, preset in zip(figure.subplots(len(collected.presets), 1, squeeze=False)[:, 0], collected.presets, strict=True):
        _accuracy_panel(axes, collected, preset)
    save_figure(figure, path)


def _groups(collected: Collected) -> tuple[list[str], list[str]]:
    """What stands on the x axis, and what has a colour each."""
    if len(collected.axes) == 2:
        first, second = (list(axis.words.values()) for axis in collected.axes)
        return first, second
    return list(dict.fromkeys("\n".join(setting.words) or collected.grid for setting in collected.settings)), [""]


def _place(setting: Setting, collected: Collected) -> tuple[int, int]:
    """Which of the groups, and which of the series."""
    groups, series = _groups(collected)
    if len(collected.axes) == 2:
        return groups.index(setting.words[0]), series.index(setting.words[1])
    return groups.index("\n".join(setting.words) or collected.grid), 0


def _accuracy_panel(axes: Any, collected: Collected, preset: str) -> None:
    groups, series = _groups(collected)
    step = 0.8 / len(series)
    settings = collected.of(preset)
    lowest, highest = _accuracy_limits(settings)
    for setting in settings:
        group, which = _place(setting, collected)
        x = group + (which - (len(series) - 1) / 2) * step
        _draw_setting(axes, x, step, setting, which)
    floor = _draw_untrained(axes, collected, preset, lowest)
    axes.set(ylim=(lowest, highest), xlim=(-0.5, len(groups) - 0.5), ylabel="linear top-1, percent", title=_title(collected, preset))
    axes.set_xticks(range(len(groups)), [plain(group) for group in groups])
    axes.set_xlabel(plain(collected.axes[0].label if len(series) > 1 else ", ".join(axis.label for axis in collected.axes)))
    axes.vlines([i + 0.5 for i in range(len(groups) - 1)], 0, 1, "0.85", linewidth=0.8, transform=axes.get_xaxis_transform())
    axes.legend(handles=_legend(collected, series, floor), loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def _look(which: int) -> dict[str, Any]:
    """Of the mean of a setting of this series."""
    return {"marker": MARKERS[which % len(MARKERS)], "color": COLOURS[which % len(COLOURS)], "linestyle": "", "markersize": 8}


def _draw_setting(axes: Any, x: float, step: float, setting: Setting, which: int) -> None:
    tops, mean, look = setting.numbers(TOP), setting.mean(TOP), _look(which)
    if mean is not None:
        axes.plot([x + min(0.22 * step, 0.08)] * len(tops), tops, ".", color=look["color"], markersize=6, alpha=0.7)
        axes.errorbar(x - min(0.1 * step, 0.04), mean, setting.spread(TOP), capsize=4, **look)
    if setting.tally:
        words = setting.tally if mean is not None else MISSING
        axes.text(x, 0.03, words, rotation=90, ha="center", va="bottom", fontsize=9, color="0.35", transform=axes.get_xaxis_transform())


def _accuracy_limits(settings: list[Setting]) -> tuple[float, float]:
    """So that all runs and spreads are seen; with room at the foot for the words of what is missing."""
    ends = [value for setting in settings for value in setting.numbers(TOP)]
    for setting in settings:
        if (mean := setting.mean(TOP)) is not None:
            ends += [mean - (setting.spread(TOP) or 0), mean + (setting.spread(TOP) or 0)]
    if not ends:
        return 0.0, 100.0
    lowest, highest = min(ends), max(ends)
    untrained = [mean for setting in settings if (mean := setting.mean(f"untrained_{TOP}")) is not None]
    size = max(highest - lowest, 1.0)
    if untrained and lowest - min(untrained) <= 3 * size:
        lowest = min(lowest, *untrained)
        size = max(highest - lowest, 1.0)
    foot = 0.3 if any(setting.tally for setting in settings) else 0.08
    return lowest - foot * size, highest + 0.08 * size


def _draw_untrained(axes: Any, collected: Collected, preset: str, lowest: float) -> str:
    """A dashed line across each group, at the mean of its runs; returns what the legend says of it."""
    by_group: dict[int, list[float]] = {}
    for setting in collected.of(preset):
        by_group.setdefault(_place(setting, collected)[0], []).extend(setting.numbers(f"untrained_{TOP}"))
    means = {group: sum(values) / len(values) for group, values in by_group.items() if values}
    if not means:
        return ""
    ends = " to ".join(dict.fromkeys(f"{end:.1f}" for end in (min(means.values()), max(means.values()))))
    shown = {group: mean for group, mean in means.items() if mean > lowest}
    axes.hlines(list(shown.values()), [g - 0.5 for g in shown], [g + 0.5 for g in shown], "0.35", "dashed", linewidth=1.2)
    return f"untrained network, {ends}" if len(shown) == len(means) else f"untrained network, {ends}:\nbelow what is shown"


def _legend(collected: Collected, series: list[str], floor: str) -> list[Any]:
    from matplotlib.lines import Line2D

    label = collected.axes[1].label if len(series) > 1 else ""
    found = [Line2D([], [], label=plain(f"{label} {word}"), **_look(which)) for which, word in enumerate(series) if label]
    found.append(
        Line2D([], [], color="0.35", marker="|", markersize=12, linestyle="", label="mean and sample standard\ndeviation over seeds")
    )
    found.append(Line2D([], [], color="0.35", marker=".", markersize=6, linestyle="", label="one run"))
    return found + ([Line2D([], [], color="0.35", linestyle="dashed", linewidth=1.2, label=floor)] if floor else [])


def draw_speed(collected: Collected, path: Path) -> None:
    """Writes a PNG with a panel for each preset: every setting's mean linear top-1 against its mean images/s. ImportError as above."""
    from matplotlib.figure import Figure

    drawn = {preset: _with_speed(collected.of(preset)) for preset in collected.presets}
    heights = [max(3.6, 0.19 * min(len(of), LABELLED) + 1.4) for of in drawn.values()]
    longest = max(len(_label(collected, setting)) for of in (*drawn.values(), collected.settings) for setting in of)
    figure = Figure(figsize=(5.5 + 0.085 * longest, sum(heights)), layout="constrained")
    panels = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, height, (preset, settings) in zip(panels, heights, drawn.items(), strict=True):
        _speed_panel(axes, height, collected, settings)
        cut = f" (named are the {LABELLED} best of {len(settings)})" if len(settings) > LABELLED else ""
        axes.set(xlabel=f"images/s{cut}", ylabel="linear top-1, percent", title=_title(collected, preset))
    save_figure(figure, path)


def _with_speed(settings: list[Setting]) -> list[Setting]:
    found = [setting for setting in settings if setting.mean(TOP) is not None and setting.mean("images_per_s") is not None]
    return sorted(found, key=lambda setting: setting.mean(TOP) or 0)


def _speed_panel(axes: Any, height_in: float, collected: Collected, settings: list[Setting]) -> None:
    """The names stand in a column at the right, as high as their points where there is room, each with a line to its own."""
    if not settings:
        axes.text(0.5, 0.5, "no results yet", ha="center", va="center", transform=axes.transAxes)
        return
    places = [(setting.mean("images_per_s") or 0.0, setting.mean(TOP) or 0.0) for setting in settings]
    lowest, highest = places[0][1], places[-1][1]
    margin = 0.08 * max(highest - lowest, 1.0)
    bottom, top = lowest - margin, highest + margin
    wanted = [(y - bottom) / (top - bottom) for _, y in places]
    at = spread_out(wanted[-LABELLED:], 0.19 / (height_in - 1.1))
    for i, (setting, place) in enumerate(zip(settings, places, strict=True)):
        which = _place(setting, collected)[1]
        look = _look(which)
        axes.plot(*place, **look)
        if (label := i - len(settings) + len(at)) >= 0:
            line = {
                "arrowstyle": "-",
                "color": look["color"],
                "linewidth": 0.7,
                "alpha": 0.6,
                "shrinkA": 0,
                "shrinkB": 5,
                "relpos": (0, 0.5),
            }
            name, where = plain(_label(collected, setting)), (1.04, at[label])
            axes.annotate(name, place, where, textcoords="axes fraction", va="center", fontsize=9, arrowprops=line)
    axes.set_ylim(bottom, top)
    axes.margins(x=0.08)


def spread_out(wanted: list[float], apart: float) -> list[float]:
    """Places in [0, 1], ascending like the wanted ones and near them, at least so far apart; less only where they do not fit."""
    apart = min(apart, 1 / max(1, len(wanted) - 1))
    places: list[float] = []
    for want in wanted:
        places.append(max(want, places[-1] + apart) if places else max(want, 0.0))
    end = 1.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], end)
        end = places[i] - apart
    return places


def _label(collected: Collected, setting: Setting) -> str:
    return (", ".join(setting.words) or collected.grid) + (f" ({setting.tally})" if setting.tally else "")


def _title(collected: Collected, preset: str) -> str:
    settings = collected.of(preset)
    missing = sum(len(setting.outcomes) - setting.done for setting in settings)
    total = sum(len(setting.outcomes) for setting in settings)
    most = settings[0].most
    return plain(
        f"{collected.grid}, {preset}: n = {most} seed{'s' * (most > 1)}" + (f", {missing} of {total} runs missing" if missing else "")
    )
