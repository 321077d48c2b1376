"""The pieces of a report's page: escaping, numbers, tables, charts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from report_pages import Page

from cossl.tools.report_charts import DRAWN, Line, chart, ticks
from cossl.tools.report_page import escape, shown, table


def test_escaping() -> None:
    assert escape("<a href='x'>&\"") == "&lt;a href=&#x27;x&#x27;&gt;&amp;&quot;"
    assert escape("a\u202eb\x07\nc\ufeff") == "a\\u202eb\\u0007\nc\\ufeff"
    assert escape("x" * 10, 3) == "xxx [cut: 10 characters]"


@pytest.mark.parametrize(
    ("values", "cells"),
    [
        ([61.25, 62.5, None, 50.0], ["61.25", "62.50", "—", "50.00"]),
        ([70.1, 50.0], ["70.1", "50.0"]),
        ([70.0, 50.0], ["70.0", "50.0"]),
        ([0.4312, 0.05], ["0.4312", "0.0500"]),
        ([0.4312, 1123.5], ["0.4312", "1124"]),
        ([1000, 20], ["1,000", "20"]),
        ([12345.6], ["12,345.6"]),
        ([1e-9, 0.0], ["1e-09", "0"]),
        (["a", 1.5], ["a", "1.5"]),
    ],
)
def test_numbers_of_a_column_stand_under_one_another(values: list[Any], cells: list[str]) -> None:
    page = Page(table("t", ["x", "y"], [[i, value] for i, value in enumerate(values)]))
    assert [text for tag, text in page.texts if tag == "td" and text] == cells


def test_values_as_words() -> None:
    values = [None, True, 3, 0.1234567, [1, [2.5]], {"a": 1}, "", float("nan"), [], 10**400]
    assert [shown(value) for value in values] == ["—", "true", "3", "0.1235", "1 2.5", "a 1", "", "nan", "none", "too large a number"]


@example(4e-323, 0.0, 5)
@example(0.0, 5e-324, 4)
@settings(deadline=None)
@given(st.floats(-1e12, 1e12), st.floats(0, 1e12), st.integers(2, 6))
def test_ticks_hold_the_data_and_are_few(low: float, width: float, count: int) -> None:
    values = ticks(low, low + width, count)
    step = values[1] - values[0]
    assert values[0] <= low + 1e-5 * step
    assert values[-1] >= low + width - 1e-5 * step
    assert 2 <= len(values) <= count + 3


def drawn(points: list[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """The unbroken parts of the line that is drawn of these points, in units of the drawing."""
    path = next(
        path["d"] for path in Page(chart("loss", [Line("loss", points)])).all("path") if path["class"] == "mark c0" and "H" not in path["d"]
    )
    return [[(float(x), float(y)) for x, y in (pair.split(" ") for pair in part.split("L"))] for part in path.split("M")[1:]]


def test_a_long_line_is_thinned_and_keeps_its_spikes() -> None:
    points: list[tuple[float, float | None]] = [(float(x), 1.0) for x in range(10_000)]
    points[5_000] = (5_000.0, 50.0)
    (line,) = drawn(points)
    assert len(line) <= DRAWN
    assert min(y for _, y in line) < 40 < 150 < max(y for _, y in line)


@pytest.mark.parametrize("length", [5, 10_000])
def test_a_line_is_interrupted_where_it_is_not_finite(length: int) -> None:
    points: list[tuple[float, float | None]] = [(float(x), 1.0 + x) for x in range(length)]
    points[length // 2] = (float(length // 2), None)
    assert len(drawn(points)) == 2
