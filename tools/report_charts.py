"""Line charts of a report, as SVG inside the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from cossl.tools.report_page import Html, join, shown, tag

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 36  # margins inside the frame, for the axes' words
COLOURS, DASHES = 7, 4  # classes c0 to c6 and d1 to d3 of the page's style: 28 different lines
DRAWN = 400
"""Of a line with more points, the lowest and the highest of every stretch are drawn, so that a spike is not lost."""


class Line(NamedTuple):
    """What is drawn in one colour."""

    label: str
    points: list[tuple[float, float | None]]
    """(x, y) by rising x; None interrupts the line: the value was not finite."""


def chart(title: str, lines: Sequence[Line], x_label: str = "epoch", from_zero: bool = False) -> Html:
    """A figure with axes, and above it each line's name and last value. `from_zero`: the y axis begins at 0. Nothing without points.

    A line's colour is by its place in `lines`, so that it is the same in all panels, whichever have it.
    """
    last = {i: next((y for _, y in reversed(line.points) if y is not None), None) for i, line in enumerate(lines)}
    ends = {i: (line.label, shown(float(y))) for i, line in enumerate(lines) if (y := last[i]) is not None}
    if not ends:
        return Html()
    names = [f"{label} ends at {end}" for label, end in ends.values()]
    keys = (tag("li", _sample(i), tag("span", label, " ", tag("b", end))) for i, (label, end) in ends.items())
    drawing = _draw(lines, x_label, from_zero)
    picture = tag("svg", drawing, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title} by {x_label}: {'; '.join(names)}")
    return tag("figure", tag("figcaption", title), tag("ul", *keys), picture, class_="chart")


def _look(which: int) -> str:
    return f"c{which % COLOURS}" + (f" d{which // COLOURS % DASHES}" if which // COLOURS % DASHES else "")


def _sample(which: int) -> Html:
    return tag("svg", tag("path", d="M1 5H27", class_=f"mark {_look(which)}"), viewBox="0 0 28 10", aria_hidden="true")


def _draw(lines: Sequence[Line], x_label: str, from_zero: bool) -> Html:
    xs = [x for line in lines for x, y in line.points if y is not None]
    ys = [y for line in lines for _, y in line.points if y is not None]
    x_ticks, y_ticks = ticks(min(0.0, *xs), max(xs), 5), ticks(min(0.0, *ys) if from_zero else min(ys), max(ys), 4)
    x_low = min(0.0, *xs)
    x_high = max(max(xs), x_low + 1e-9 * max(1.0, -x_low))  # where all are one number, which may be a damaged line's
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        right, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return round(LEFT + right * (WIDTH - LEFT - RIGHT), 1), round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1)

    parts: list[Html] = []
    for y, word in zip(y_ticks, _words(y_ticks), strict=True):
        height = place(x_low, y)[1]
        parts.append(tag("path", d=f"M{LEFT} {height}H{WIDTH - RIGHT}", class_="rule"))
        parts.append(tag("text", word, x=LEFT - 6, y=f"{height + 4:.1f}", text_anchor="end"))
    for x, word in zip(x_ticks, _words(x_ticks), strict=True):
        if x_low <= x <= x_high:
            parts.append(tag("text", word, x=str(place(x, y_low)[0]), y=HEIGHT - BOTTOM + 16, text_anchor="middle"))
    parts.append(tag("text", x_label, x=(LEFT + WIDTH - RIGHT) // 2, y=HEIGHT - 4, text_anchor="middle"))
    for i, line in enumerate(lines):
        runs = [[place(x, y) for x, y in run] for run in _unbroken(_thinned(line.points))]
        path = "".join("M" + "L".join(f"{x:g} {y:g}" for x, y in run) for run in runs if len(run) > 1)
        parts.append(tag("path", d=Html(path), class_=f"mark {_look(i)}"))
        dots = [point for run in runs for point in run] if sum(map(len, runs)) <= 24 else [run[0] for run in runs if len(run) == 1]
        parts += [tag("circle", cx=f"{x:g}", cy=f"{y:g}", r="2.6", class_=f"dot {_look(i)}") for x, y in dots]
    return join(parts)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About so many round numbers, of which the first is at most `low` and the last at least `high`; two at least."""
    biggest = max(abs(low), abs(high))
    if high - low <= max(1e-9 * biggest, 1e-30):  # below that, its own tenth may be 0
        room = biggest / 10 if biggest > 1e-30 else 1.0
        low, high = low - room, high + room
    rough = (high - low) / count
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * step for step in (1, 2, 2.5, 5, 10) if size * step >= rough * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [i * step for i in range(first, last + 1)]


def _words(values: Sequence[float]) -> list[str]:
    """Each as short as it may be without two being equal."""
    biggest, step = max(map(abs, values)), values[1] - values[0]
    if 1e-2 <= biggest < 1e6:
        decimals = next(n for n in range(20) if abs(round(step, n) - step) < step / 1000)
        return [f"{value:,.{decimals}f}" for value in values]
    digits = next(n for n in range(2, 20) if len({f"{value:.{n}e}" for value in values}) == len(values))
    parts = [f"{value:.{digits}e}".split("e") for value in values]
    return [f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}" if float(mantissa) else "0" for mantissa, exponent in parts]


def _unbroken(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]


def _thinned(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    if len(points) <= DRAWN:
        return list(points)
    stretch, kept = math.ceil(2 * len(points) / DRAWN), []
    for first in range(0, len(points), stretch):
        of = [(y, i) for i, (_, y) in enumerate(points[first : first + stretch], first) if y is not None]
        gap = [i for i, (_, y) in enumerate(points[first : first + stretch], first) if y is None][:1]
        kept += sorted({min(of)[1], max(of)[1], *gap} if of else set(gap))
    return [points[i] for i in kept]
