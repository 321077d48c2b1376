"""The page of `cossl report` says so of damage, and shows no markup of anybody else's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_pages import DEMO, HOSTILE, RESULTS, START, Page, filled, make_run, one, picture, record, result

from cossl.models.flags import sealed
from cossl.tools import report_page
from cossl.tools.report import runs_report
from cossl.tools.report_charts import Line, chart


@pytest.mark.parametrize("word", HOSTILE)
def test_no_element_and_no_attribute_comes_from_the_data(tmp_path: Path, word: str) -> None:
    bad, good = (Page(runs_report([filled(tmp_path / name / "run", word)])) for name, word in (("bad", word), ("good", "harmless.word")))
    assert [(tag, list(attributes)) for tag, attributes in bad.elements] == [(tag, list(attributes)) for tag, attributes in good.elements]
    sign = [(a.get("src"), a.get("href"), a.get("style"), a.get("class")) for _, a in bad.elements]
    assert sign == [(a.get("src"), a.get("href"), a.get("style"), a.get("class")) for _, a in good.elements]
    assert not set(bad.text) & set("\u202e\u2066\x00\x1b\ud800")


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a\u202eb", "' x", "&amp;"])
def test_names_of_folders_are_text(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name.replace("/", "-")
    page = Page(runs_report([make_run(folder)]))
    assert not page.all("script")
    assert folder.name.replace("\u202e", "\\u202e") in page.text


def test_what_is_too_long_is_cut_with_a_note(tmp_path: Path) -> None:
    long = "x<" * 500_000
    text = runs_report([filled(tmp_path / "a", long), make_run(tmp_path / "b", eval__knn=result(rows=[["k", 1]] * 5000))])
    assert len(text) < 3_000_000
    assert "[cut: 1,000,000 characters]" in text
    assert "cut: 5,000 rows" in text
    assert text.count("<tr>") < report_page.ROW_LIMIT + 500


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {  # name: files, what is said
    "config half": ({"config": '{"preset": "de'}, "config.json damaged"),
    "config a list": ({"config": [1]}, "config.json damaged (expected a dictionary)"),
    "config gone": ({"config": None}, "config.json missing"),
    "config of odd values": ({"config": {"preset": 3, "epochs": {}, "batch_size": [], "model.method": None}}, "The preset — is not one"),
    "results half": ({"results": b'{"linear\xff'}, "results.json damaged"),
    "results unsealed": ({"results": json.dumps(RESULTS)}, "results.json damaged, or of another version (it has no sha256 of its content)"),
    "results changed": (
        {"results": json.dumps(sealed(RESULTS) | {"knn_top1": {"trained": 99.0}})},
        "results.json damaged, or of another version (it was changed, or cut off)",
    ),
    "results odd": ({"results": {"linear_top1": 3, "knn_top1": {"trained": "x"}, "protocol": 3}}, "protocol: not recorded"),
    "environment half": ({"environment": "[{"}, "environment.json damaged"),
    "environment odd": ({"environment": [3, {"code": 3, "versions": [], "gpus": 5}]}, "1 of the 2 starts"),
    "metrics half": ({"metrics": json.dumps(record(10)) + '\n{"st'}, "metrics.jsonl ends in half a line"),
    "metrics damaged": (
        {"metrics": f"{json.dumps(record(10))}\n[1]\n{{\n{json.dumps(record(20))}\n"},
        "metrics.jsonl damaged (2 of 4 lines",
    ),
    "metrics deep": ({"metrics": "[" * 30_000 + "\n"}, "metrics.jsonl damaged"),
    "metrics huge": (
        {"results": None, "metrics": json.dumps({k: 10**400 if v else v for k, v in record(10).items()}) + "\n"},
        "metrics.jsonl damaged",
    ),
    "metrics not finite": ({"metrics": '{"step": 1, "epoch": 1, "loss": NaN, "std": Infinity}\n'}, "finished"),
    "result half": ({"eval__knn": '{"title": "kN'}, "eval/knn.json damaged"),
    "result of the rows alone": ({"eval__knn": {"table": [[1]]}}, "eval/knn.json has no table"),
    "result of odd rows": ({"eval__knn": result(rows=[3])}, "eval/knn.json has no table"),
    "result deep": ({"eval__knn": "[" * 100_000}, "eval/knn.json damaged (RecursionError)"),
    "result of long digits": ({"eval__knn": '{"table": ' + "9" * 5000 + "}"}, "eval/knn.json damaged (ValueError)"),
    "result of odd numbers": (
        {"eval__knn": json.dumps(result(rows=[["a", 10**400, float("nan")], [], [1e-300, 5e300, 3]]))},
        "too large a number",
    ),
    "no figure": ({"eval__knn": result(figures=["gone.png"])}, "gone.png: not there"),
    "figure outside": ({"eval__knn": result(figures=["../batch.png"])}, "../batch.png: not shown"),
    "figure absolute": ({"eval__knn": result(figures=["/etc/passwd"])}, "/etc/passwd: not shown"),
    "figure no picture": ({"eval__knn": result(figures=["knn.json"])}, "knn.json: not shown (neither PNG nor JPEG)"),
    "figure of no name": ({"eval__knn": result(figures=[3, None, "", "a\0b", ".."])}, "3: not shown"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    files, said = DAMAGE[name]
    page = one(tmp_path, **files)
    assert said in page.text
    assert "Curves" in page.text or "metrics" in name


@pytest.mark.parametrize("several", [False, True])
def test_results_without_their_seal_give_no_number(tmp_path: Path, several: bool) -> None:
    """Neither a tile, nor a table, nor the state of the run."""
    odd = make_run(tmp_path / "a", results=json.dumps(RESULTS))
    text = Page(runs_report([odd, make_run(tmp_path / "b")] if several else [odd])).text
    assert [text.count(word) for word in ("77.2 %", "63.0 %", "350.9")] == ([1] * 3 if several else [0] * 3)
    assert text.count("results.json damaged, or of another version") == 1


def test_pictures_that_are_none(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", eval__knn=result(figures=["half.png", "pipe.png", "huge.png", "bomb.png", "folder.png"]))
    picture(folder / "eval" / "half.png", size=(600, 400))
    (folder / "eval" / "half.png").write_bytes((folder / "eval" / "half.png").read_bytes()[:300])
    os.mkfifo(folder / "eval" / "pipe.png")
    (folder / "eval" / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(report_page.PICTURE_LIMIT))
    picture(folder / "eval" / "bomb.png", size=(10_000, 5_001))
    (folder / "eval" / "folder.png").mkdir()
    page = Page(runs_report([folder]))
    assert len(page.all("img")) == 1
    for name, why in {"half": "", "pipe": "no file", "huge": "too large", "bomb": "10,000 x 5,001 pixels", "folder": ""}.items():
        assert f"{name}.png: not shown ({why}" in page.text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_the_files_hold_there_is_a_page(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    def changed(known: dict[str, Any]) -> dict[str, Any]:
        keys = data.draw(st.lists(st.sampled_from(sorted(known)), max_size=4))
        return known | {key: data.draw(VALUES) for key in keys}

    folder = tmp_path_factory.mktemp("any")
    lines = "".join(json.dumps(changed(record(step))) + "\n" for step in (10, 20))
    files = {
        "config": changed(DEMO),
        "results": changed(RESULTS),
        "environment": [changed(START)],
        "metrics": lines,
        "eval__knn": changed(result()),
    }
    runs = [make_run(folder / "a", **files), make_run(folder / "b")]
    Page(runs_report(runs[: data.draw(st.integers(1, 2))]))


@pytest.mark.parametrize("x", [-16777217.0, -1e300, 0.0, 1e300])
def test_a_line_of_one_point_anywhere_is_drawn(x: float) -> None:
    assert "circle" in chart("kNN", [Line("a", [(x, 1.0)])])
