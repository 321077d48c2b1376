"""The page of `cossl report` of one run and of several: what is on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_pages import DEMO, PROTOCOL, RESULTS, Page, make_run, one, picture, result

from cossl.tools.report import runs_report
from cossl.tools.report_charts import Line, chart

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


def test_a_head_on_another_network_is_no_other_protocol(tmp_path: Path) -> None:
    """As `cossl robustness` stamps its results."""
    folders = [make_run(tmp_path / name, eval__knn=result(protocol={"px": 32, "probe": {"weights": name * 4, "seed": 0}})) for name in "ab"]
    text = " ".join(Page(runs_report(folders)).text.split())
    assert "Protocols differ" not in text
    assert "a, measured weights aaaa" in text
    other = make_run(tmp_path / "c", eval__knn=result(protocol={"px": 32, "probe": {"weights": "cccc", "seed": 1}}))
    assert "Protocols differ" in Page(runs_report([folders[0], other])).text


def test_more_rows_are_no_other_protocol(tmp_path: Path) -> None:
    """As `cossl eval` stamps its results; what a head's features are is a protocol."""
    for name, features in (("a", ["global"]), ("b", ["global", "position"]), ("c", "pooled")):
        make_run(tmp_path / name, eval__knn=result(protocol={"k": 10, "features": features}))
    assert "Protocols differ" not in Page(runs_report([tmp_path / "a", tmp_path / "b"])).text
    assert "Protocols differ" in Page(runs_report([tmp_path / "a", tmp_path / "c"])).text


def test_tables_of_other_columns_are_not_joined(tmp_path: Path) -> None:
    other = result() | {"table": {"columns": ["k", "top-1"], "rows": [[20, 60.5]]}}
    captions = [text for tag, text in two(tmp_path, eval__knn=other).texts if tag == "span"]
    assert {"a: Weighted kNN", "b: Weighted kNN"} <= set(captions)


def test_runs_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / grid / "seed0") for grid in ("x", "y")]
    assert "x/seed0 · y/seed0" in Page(runs_report(folders)).text
