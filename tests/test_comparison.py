"""The figure of several runs that `cossl robustness` and `cossl locality` draw: a report shows it with these runs and with no others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from report_pages import Page, make_run, picture, result

from cossl.tools.comparison import compare
from cossl.tools.report import runs_report

FIGURE = "pgd-of-2-runs.png"


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    """Three, of which the first two were compared."""
    folders = {name: make_run(tmp_path / name, eval__knn=None, robustness__pgd=result("PGD", run=name)) for name in "abc"}
    assert drawn(folders["a"], folders["b"])
    return folders


def drawn(*folders: Path) -> Path | None:
    files = {folder.name: folder / "robustness" / "pgd.json" for folder in folders}
    return compare(folders[0] / "robustness", "pgd", files, lambda path: picture(path, "green", (300, 200)) or True)


def shown(*folders: Path) -> list[str]:
    """What stands below the figures of several runs in the report, which are all the pictures of that width."""
    page = Page(runs_report(folders))
    return [image["alt"] for image in page.all("img") if image["width"] == "300"]


def test_the_report_of_these_runs_shows_it_in_any_order(runs: dict[str, Path]) -> None:
    assert shown(runs["a"], runs["b"]) == [f"PGD: a, b ({FIGURE})"]
    assert shown(runs["b"], runs["a"]) == [f"PGD: b, a ({FIGURE})"]


def test_it_is_found_where_runs_were_moved_or_called_otherwise(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    moved = [shutil.move(runs[name], tmp_path / "x" / other) for name, other in (("a", "one"), ("b", "two"))]
    assert shown(*moved) == [f"PGD: one, two ({FIGURE})"]


def test_a_report_of_other_runs_does_not(runs: dict[str, Path]) -> None:
    assert shown(runs["a"]) == shown(runs["a"], runs["c"]) == shown(*runs.values()) == []
    text = Page(runs_report([runs["a"], runs["c"]])).text
    assert FIGURE not in text
    assert "of-2-runs" not in Page(runs_report([runs["a"]])).text
    assert drawn(*runs.values())
    assert shown(*runs.values()) == ["PGD: a, b, c (pgd-of-3-runs.png)"]
    assert shown(runs["a"], runs["b"]) == [f"PGD: a, b ({FIGURE})"]


def test_runs_without_such_a_result_are_beside_it(runs: dict[str, Path]) -> None:
    (runs["c"] / "robustness" / "pgd.json").unlink()
    assert shown(*runs.values()) == [f"PGD: a, b ({FIGURE})"]


def test_it_is_not_shown_with_results_that_came_after_it(runs: dict[str, Path]) -> None:
    path = runs["b"] / "robustness" / "pgd.json"
    path.write_text(json.dumps(result("PGD", rows=[["global", 1.0]], run="b")))
    assert shown(runs["a"], runs["b"]) == []
    said = (
        f"pgd-of-2-runs.png is not shown: it was drawn of other results of runs of these names; `cossl robustness {runs['a']} {runs['b']}`"
    )
    assert said in Page(runs_report([runs["a"], runs["b"]])).text
    assert drawn(runs["a"], runs["b"])
    assert shown(runs["a"], runs["b"])


def test_one_that_lies_in_the_other_runs_folder_is_found(runs: dict[str, Path]) -> None:
    (runs["a"] / "robustness" / "pgd-of-2-runs.json").unlink()
    assert shown(runs["a"], runs["b"]) == []
    assert drawn(runs["b"], runs["a"])
    assert shown(runs["a"], runs["b"]) == [f"PGD: a, b ({FIGURE})"]


def test_what_could_not_be_drawn_leaves_no_older_one(runs: dict[str, Path]) -> None:
    files = {name: runs[name] / "robustness" / "pgd.json" for name in "ab"}
    assert compare(runs["a"] / "robustness", "pgd", files, lambda path: path.exists()) is None
    assert [path.name for path in (runs["a"] / "robustness").iterdir()] == ["pgd.json"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"comparison_of": "pgd"}',
        '{"comparison_of": "pgd", "runs": [1]}',
        '{"comparison_of": "pgd", "runs": {"a": 1, "b": [{}]}}',
        '{"runs": {"a": null, "<b>": "x"}}',
    ],
)
def test_a_damaged_note_is_no_note(runs: dict[str, Path], content: str) -> None:
    (runs["a"] / "robustness" / "pgd-of-2-runs.json").write_text(content)
    assert shown(runs["a"], runs["b"]) == []
