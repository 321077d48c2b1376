"""The page of `cossl report` of a sweep, and the command."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import finished_sweeps
import pytest
from report_pages import Page, collected_sweeps, make_run

from cossl.slurm.collect import as_markdown
from cossl.tools import cli
from cossl.tools.report import report_main, sweep_report
from cossl.tools.report_sweep import collect_command, markdown


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    return collected_sweeps(tmp_path_factory)


@pytest.fixture
def swept(collected: dict[bool, Path], tmp_path: Path) -> Path:
    """A copy of the first one's folder of the sweep."""
    shutil.copytree(collected[False], tmp_path, dirs_exist_ok=True)
    return tmp_path / "sweeps" / "ablation_plan"


def test_a_sweep(swept: Path) -> None:
    page = Page(sweep_report(swept))
    text = " ".join(page.text.split())
    assert "48 points of in1k, in100: 42 done, 6 failed." in text
    assert "± is the sample standard deviation" in text
    assert "conv1x1 0.2 40.5 ± 0.7" in text
    assert page.all("strong")
    assert len(page.all("table")) == 5
    assert len(page.all("img")) == 2
    assert "Out of date" not in text
    assert "every point, as in results.csv (48)" in text


def test_tables_of_a_sweep_say_what_was_meant(tmp_path: Path) -> None:
    collected = finished_sweeps.nasty_sweep(tmp_path)
    page = Page("".join(markdown(as_markdown(collected))))
    names = [text for tag, text in page.texts if tag == "th" and text][: 3 + len(finished_sweeps.NASTY) * 2]
    words = [" ".join(name.split()) for name in finished_sweeps.NASTY]
    assert [name for name in names if name in words] == words
    assert {tag for tag, _ in page.elements} <= {
        "div",
        "table",
        "caption",
        "span",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "strong",
        "ul",
        "li",
    }


def test_markdown_that_is_not_ours_is_text() -> None:
    page = Page("".join(markdown("# title <b>\n| a | b\n|\n| \\\n**\n- x\n-\n| | |\n|--|\n[a](javascript:b)\n")))
    assert not {"a", "b", "h1"} & {tag for tag, _ in page.elements}
    assert "[a](javascript:b)" in page.text


@pytest.mark.parametrize("missing", ["results.csv", "table.md"])
def test_a_sweep_that_was_not_collected_says_how(swept: Path, missing: str) -> None:
    (swept / missing).unlink()
    assert f"{missing} not there yet: run `{collect_command(swept)}` first" in Page(sweep_report(swept)).text


def test_a_sweep_that_went_on_says_so(swept: Path) -> None:
    newest = next((swept.parent / "points").glob("*/results.json"))
    os.utime(newest, (time.time() + 60,) * 2)
    said = "1 of the points got results since the tables were collected: run `cossl sweep collect ablation_plan"
    assert said in Page(sweep_report(swept)).text


@pytest.mark.parametrize("name", ["sweep.json", "results.csv", "table.md"])
@pytest.mark.parametrize(
    "content", [b"", b"\xff\0\x80", b'{"points": [3, {"run": "../x", "config": 3}, {"run": "a\\u0000b"}]}', b'"' * 10**6]
)
def test_a_damaged_sweep_is_a_page(swept: Path, name: str, content: bytes) -> None:
    (swept / name).write_bytes(content)
    assert Page(sweep_report(swept)).all("h1")


def test_a_sweep_of_hostile_names(collected: dict[bool, Path]) -> None:
    page = Page(sweep_report(collected[True] / "sweeps" / "g_%|{"))
    assert not {"b", "script"} & {tag for tag, _ in page.elements}


# ------------------------------------------------------------------------------------------------- the command


def test_where_the_page_goes(tmp_path: Path, swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(make_run(tmp_path / name)) for name in "ab"]
    report_main(folders[:1])
    report_main(folders)
    report_main([*folders, "--out", str(tmp_path / "x.html")])
    report_main([str(swept)])
    written = ["a/report.html", "a/comparison.html", "x.html", "sweeps/ablation_plan/report.html"]
    assert [line.partition("  ")[0] for line in capsys.readouterr().out.splitlines()] == [str(tmp_path / name) for name in written]
    assert all((tmp_path / name).read_text().startswith("<!doctype html>") for name in written)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "report of what?"),
        ("nowhere", "nowhere is no folder of a run or a sweep"),
        ("{0}", "is no folder of a run or a sweep: it has neither"),
        ("{0}/a {0}/a", "is given twice"),
        ("{0}/a {0}/sweeps/ablation_plan", "is a sweep: give it alone"),
        ("{0}/a --out {0}/none/x.html", "there is no folder"),
        ("{0}/a --out {0}", "Is a directory"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, swept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    make_run(tmp_path / "a")
    monkeypatch.setattr(sys, "argv", ["cossl", "report", *words.format(tmp_path).split()])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    complaint = capsys.readouterr().err
    assert exit_.value.code == 2
    assert said in complaint
    assert complaint.count("\n") == 1
