"""The page of `cossl report`: what is on it, that it says so of damage and shows no markup of anybody else's."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import chromium
import finished_sweeps
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from cossl.models.flags import flatten
from cossl.slurm.collect import as_markdown, write
from cossl.tools import cli, report_page
from cossl.tools.report import report_main, runs_report, sweep_report
from cossl.tools.report_charts import DRAWN, Line, chart, ticks
from cossl.tools.report_page import escape, shown, table
from cossl.tools.report_sweep import collect_command, markdown
from cossl.train import PRESETS

DEMO = {"preset": "demo"} | flatten(PRESETS["demo"]())
PROTOCOL = {"knn_k": 20, "pixels_grid": 12, "eval_px": 72}
RESULTS = {
    "linear_top1": {"trained": 77.25, "untrained": 65.5, "pixels": 32.75},
    "knn_top1": {"trained": 63.0, "untrained": 34.0, "pixels": 45.75},
    "images_per_s": 22.8, "seconds": 350.9, "protocol": PROTOCOL, "device": "cpu", "std": 0.94, "rank": 25.5, "collapsed": False,
}  # fmt: skip
START = {
    "time": "2026-01-01T12:00:00+00:00", "command": ["cossl", "train", "demo", "--run-dir", "a b"],
    "host": "node7", "cpu": "EPYC", "cpu_count": 2,
    "gpus": [], "versions": {"python": "3.11.7", "torch": "2.15.0"},
    "code": {"version": "0.1.0+gabc", "commit": "abc", "diff": "-old\n+new\n"},
}  # fmt: skip


def record(step: int, **more: Any) -> dict[str, Any]:
    terms = {"loss": 5 - step / 100, "global": 4 - step / 50, "local_to_global": 4.0, "global_to_local": 4.1}
    rest = {"std": 0.9, "rank": 40.0, "lr": 1e-3 / step, "images_per_s": 30.0, "probe_top1": step / 10}
    return {"step": step, "epoch": step / 50} | terms | rest | more


def result(title: str = "Weighted kNN", rows: list[Any] | None = None, **more: Any) -> dict[str, Any]:
    """As `opened.write_result` writes it."""
    stamp = {
        "protocol": {"k": [10, 20], "crop_px": 224},
        "run": "a",
        "time": "2026-01-02",
        "code_version": "0.1.0",
        "versions": {"torch": "2.15"},
    }
    return {"title": title, "table": {"columns": ["features", "top-1"], "rows": rows or [["global", 61.25]]}, "figures": []} | stamp | more


def picture(path: Path, colour: str = "red", size: tuple[int, int] = (60, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, "PNG")


def make_run(path: Path, **files: Any) -> Path:
    """A finished run; `files` are JSON, text or bytes by name, as in eval__knn="...", None for one that is not there."""
    lines = "".join(json.dumps(record(step)) + "\n" for step in range(10, 110, 10)) + '{"step": 100, "epoch": 2.0, "knn_top1": 55.5}\n'
    there = {"config": DEMO | {"epochs": 2, "run_dir": str(path)}, "results": RESULTS, "environment": [START], "metrics": lines}
    for name, content in (there | {"eval__knn": result()} | files).items():
        if content is not None:
            file = path / (name.replace("__", "/") + (".jsonl" if name == "metrics" else ".json"))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(
                content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode()
            )
    picture(path / "batch.png")
    (path / "train.log").write_text("2026-01-01 12:00:00  finished\n")
    return path


class Page(HTMLParser):
    """What stands in a page: elements with their attributes in order, and the text of each."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in report_page.VOID:
            self.open.append(tag)
            self.texts.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1], data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(text for tag, text in self.texts if tag != "style")


def one(folder: Path, **files: Any) -> Page:
    return Page(runs_report([make_run(folder / "a", **files)]))


# ------------------------------------------------------------------------------------------------- what is on it


def test_a_page_is_whole_asks_for_nothing_and_can_be_heard(tmp_path: Path) -> None:
    page = one(tmp_path, locality__cosine=result("Cosine", figures=["map.png"]), eval__knn=result(figures=["k.png"]))
    addresses = [
        value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href", "action", "data")
    ]
    assert addresses
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert not page.all("script")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert any("default-src 'none'" in meta.get("content", "") for meta in page.all("meta"))
    assert len(page.all("h1")) == 1
    assert (
        len(page.all("table")) == len(page.all("caption")) == len([box for box in page.all("div") if box.get("class", "")[:6] == "scroll"])
    )
    assert all(head["scope"] in ("col", "row") for head in page.all("th"))
    assert all(image["alt"] and image["width"] for image in page.all("img"))
    assert all(drawing.get("aria-label") or drawing.get("aria-hidden") for drawing in page.all("svg"))
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {link["href"][1:] for link in page.all("a")} == ids


@pytest.mark.parametrize(
    "words",
    [
        "finished", "77.2 %", "63.0 %", "untrained 65.5 %", "20-NN", "12 x 12 pixels", "eval_px 72",  # state, results and their protocol
        "Set otherwise than in the preset demo setting this run preset epochs 2 8", "all settings (76)", "model.receptive_field 29",
        "Weighted kNN", "global 61.2", "k 10 20", "code_version 0.1.0", "knn_top1 55.5", "local_to_global 4",
        "start 1 of 1", "node7", "torch 2.15.0", "+new", "cossl train demo --run-dir 'a b'",
    ],
)  # fmt: skip
def test_what_the_folder_holds_is_on_the_page(tmp_path: Path, words: str) -> None:
    assert words in " ".join(one(tmp_path).text.split())


def test_pictures_are_in_the_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", robustness__pgd=result("PGD", figures=["pgd.png"]))
    picture(folder / "robustness" / "pgd.png", "blue", (300, 50))
    page = Page(runs_report([folder]))
    assert [(image["width"], image["src"][:22]) for image in page.all("img")] == [(w, "data:image/png;base64,") for w in ("300", "60")]


@pytest.mark.parametrize(("std", "said"), [(0.9, False), (0.01, True)])
def test_a_collapse_is_said_loudly(tmp_path: Path, std: float, said: bool) -> None:
    page = one(tmp_path, results=RESULTS | {"collapsed": std < 0.1, "std": std})
    assert (f"spread {std}, effective rank 25.5" in page.text) is said
    assert ({"class": "warning", "role": "note"} in page.all("div")) is said


def test_a_run_without_results_and_of_an_unknown_preset(tmp_path: Path) -> None:
    page = one(tmp_path, results=None, config={"preset": "old", "epochs": 2})
    assert "No results yet" in page.text
    assert "The preset old is not one of this version" in page.text
    assert "55.5 %" in page.text


def test_settings_of_another_version_are_differences(tmp_path: Path) -> None:
    config = {key: value for key, value in DEMO.items() if key != "seed"} | {"old.flag": 3}
    text = " ".join(one(tmp_path, config=config).text.split())
    assert "old.flag 3 not in this version" in text
    assert "seed not recorded 0" in text


# ------------------------------------------------------------------------------------------------- several runs


def two(folder: Path, **files: Any) -> Page:
    """Beside a run as it is by default."""
    make_run(folder / "a", robustness__pgd=result("PGD"))
    return Page(runs_report([folder / "a", make_run(folder / "b", **files)]))


def test_runs_side_by_side(tmp_path: Path) -> None:
    page = two(
        tmp_path,
        config=DEMO | {"epochs": 4, "seed": 1},
        results=RESULTS | {"linear_top1": {"trained": 11.5}},
        robustness__pgd=result("PGD"),
    )
    text = " ".join(page.text.split())
    assert "setting a b epochs 2 4 seed 0 1 " in text
    assert "linear, trained 77.2 % 11.5 % linear, untrained 65.5 % — " in text
    assert "run features top-1 a global 61.25 b global 61.25" in text
    assert "Protocols differ" not in text
    charts = [drawing for drawing in page.all("svg") if drawing.get("role") == "img"]
    assert len(charts) == 10
    assert all("a ends at" in drawing["aria-label"] and "b ends at" in drawing["aria-label"] for drawing in charts)


def test_a_run_has_the_same_colour_in_every_panel() -> None:
    drawn = Page(chart("kNN", [Line("a", []), Line("b", [(1, 2.0), (2, 3.0)])]))
    assert {"mark c0", "dot c0"}.isdisjoint(path.get("class") for path in [*drawn.all("circle"), *drawn.all("path")] if path.get("d"))
    assert "dot c1" in [dot["class"] for dot in drawn.all("circle")]


def test_protocols_that_differ_are_said_loudly(tmp_path: Path) -> None:
    text = " ".join(two(tmp_path, results=RESULTS | {"protocol": PROTOCOL | {"eval_px": 32}}).text.split())
    assert "Protocols differ: do not compare these numbers with one another eval_px: a 72, b 32" in text


def test_another_network_is_no_other_protocol(tmp_path: Path) -> None:
    make_run(tmp_path / "a", eval__knn=result(protocol={"k": 10, "step": 400, "weights_sha256": "aaaa"}))
    other = make_run(tmp_path / "b", eval__knn=result(protocol={"k": 10, "step": 900, "weights_sha256": "bbbb"}))
    text = " ".join(Page(runs_report([tmp_path / "a", other])).text.split())
    assert "Protocols differ" not in text
    assert "protocol k 10 a, measured step 400 weights_sha256 aaaa" in text


def test_tables_of_other_columns_are_not_joined(tmp_path: Path) -> None:
    other = result() | {"table": {"columns": ["k", "top-1"], "rows": [[20, 60.5]]}}
    captions = [text for tag, text in two(tmp_path, eval__knn=other).texts if tag == "span"]
    assert {"a: Weighted kNN", "b: Weighted kNN"} <= set(captions)


def test_runs_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / grid / "seed0") for grid in ("x", "y")]
    assert "x/seed0 · y/seed0" in Page(runs_report(folders)).text


# ------------------------------------------------------------------------------------------------- hostile and damaged

HOSTILE = (
    '"><script>alert(1)</script><img src=x onerror=alert(1)>', "' onmouseover='alert(1)", "</style></svg><b>", "javascript:alert(1)",
    "\u202egnp.exe\u2066", "\x00\x1b[31m\ud800", "</table></details><iframe src='https://a.example'>", "&lt;&#x3c;<!--", "]]>{{x}}${y}",
)  # fmt: skip


def filled(folder: Path, word: str) -> Path:
    """A run in which every string that may be anything is that word."""
    start = {"time": word, "command": [word], "host": word, "cpu": word, "gpus": [word], "versions": {"torch": word, word: word}}
    code = {"version": word, "commit": word, "diff": word, "new_files": [word]}
    odd = result(word, [[word, {word: word}]], protocol={word: [word]}, versions={word: word}, time=word, figures=[word], device=word)
    odd["table"]["columns"] = [word, 3]
    config = DEMO | {"model.local_head": word, word: word, "model.method": word}
    results = RESULTS | {"device": word, "torch": word, "protocol": PROTOCOL | {word: word, "knn_k": word}}
    return make_run(folder, config=config, results=results, environment=[start | {"code": code}], eval__knn=odd)


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


# ------------------------------------------------------------------------------------------------- pieces


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


# ------------------------------------------------------------------------------------------------- a sweep


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Folders with sweeps/ as they are after `cossl sweep collect`; the second one's of nasty names."""
    folders = {}
    for nasty, sweep in ((False, finished_sweeps.crossed_sweep), (True, finished_sweeps.nasty_sweep)):
        folders[nasty] = tmp_path_factory.mktemp("sweeps")
        found = sweep(folders[nasty])
        folder = folders[nasty] / "sweeps" / found.grid
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sweep.json").write_text(json.dumps({"points": [outcome.point._asdict() for outcome in found.outcomes]}))
        write(found, folder)
    return folders


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


# ------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def pages(collected: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of every kind as a file."""
    folder, figures = tmp_path_factory.mktemp("pages"), ["wide.png"]
    run = make_run(
        folder / "a", robustness__pgd=result("PGD", [["l" * 60, *range(30)]] * 40, figures=figures), locality__cosine=result("Cosine")
    )
    picture(run / "robustness" / "wide.png", "blue", (2000, 300))
    other = make_run(folder / ("b" * 200), config=DEMO | {"epochs": 4}, results=RESULTS | {"protocol": {"eval_px": 32}})
    texts = {
        "run": runs_report([run]),
        "runs": runs_report([run, other]),
        "sweep": sweep_report(collected[False] / "sweeps" / "ablation_plan"),
    }
    texts["hostile"] = runs_report([filled(folder / "hostile", HOSTILE[0] + "long" * 300)])
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text)
    return {name: folder / f"{name}.html" for name in texts}


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Tab]:
    """A tab of a real browser. Skips where there is none, and fails instead where COSSL_REQUIRE_BROWSER is set."""
    if chromium.found() is None:
        why = "NO BROWSER HERE, so no report was looked at: `make test-browser` installs Chromium as root on Debian"
        (pytest.fail if os.environ.get("COSSL_REQUIRE_BROWSER") else pytest.skip)(why)
    with chromium.browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


WINDOWS = {"desktop": (1200, 900), "telephone": (360, 740)}
WIDER_THAN = """[...document.querySelectorAll("body *")].filter(one => {
    const box = one.getBoundingClientRect(), inside = one.closest(".scroll, .wide, pre");
    return (!inside || inside === one) && (box.right > %d + 0.5 || box.left < -0.5) && !one.closest(".quiet");
}).map(one => one.outerHTML.slice(0, 200))"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", ["run", "runs", "sweep", "hostile"])
def test_in_a_browser(tab: chromium.Tab, pages: dict[str, Path], tmp_path: Path, name: str, window: str, dark: bool) -> None:
    tab.messages.clear()
    tab.requests.clear()
    width, height = WINDOWS[window]
    tab.open(pages[name], width, height, dark)
    shot = Image.open(tab.screenshot(tmp_path / "shot.png", whole=True)).convert("RGB")
    tab.js("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert tab.messages == []
    assert {request.partition(":")[0] for request in tab.requests} <= {"file", "data"}
    assert tab.js("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    assert tab.js(WIDER_THAN % width) == []
    assert tab.js("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
    tables = tab.js(
        "[...document.querySelectorAll('section > .scroll table, .beside table')].map(one => one.checkVisibility() && one.rows.length)"
    )
    assert len(tables) >= 2
    assert min(tables) >= 2
    assert shot.width == width
    assert shot.height > height
    assert len(shot.getcolors(1 << 24) or []) > 50
    ground = shot.getpixel((2, shot.height // 2))
    assert (max(ground) < 60) is dark
    assert (min(ground) > 230) is not dark


def test_the_browser_would_tell(tab: chromium.Tab, tmp_path: Path) -> None:
    """The checks of the test above see what they look for."""
    tab.messages.clear()
    wide = "<meta name='viewport' content='width=device-width, initial-scale=1'><p style='width: 500px'>wide</p>"
    broken = "<script>console.warn('told')</script><img src='data:image/png;base64,xx'><img src='none.png'>"
    (tmp_path / "bad.html").write_text(wide + broken)
    tab.open(tmp_path / "bad.html", 360, 740)
    assert tab.js("document.documentElement.scrollWidth") > 360
    assert len(tab.js(WIDER_THAN % 360)) == 1
    assert not tab.js("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
    assert any("told" in message for message in tab.messages)
    assert any("ERR_FILE_NOT_FOUND" in message for message in tab.messages)
