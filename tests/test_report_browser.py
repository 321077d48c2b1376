"""The pages of `cossl report` in a real browser."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import chromium
import pytest
from PIL import Image
from report_pages import DEMO, HOSTILE, RESULTS, collected_sweeps, filled, make_run, picture, result

from cossl.tools.comparison import compare
from cossl.tools.report import runs_report, sweep_report


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    return collected_sweeps(tmp_path_factory)


@pytest.fixture(scope="module")
def pages(collected: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of every kind as a file."""
    folder, figures = tmp_path_factory.mktemp("pages"), ["wide.png"]
    run = make_run(
        folder / "a", robustness__pgd=result("PGD", [["l" * 60, *range(30)]] * 40, figures=figures), locality__cosine=result("Cosine")
    )
    picture(run / "robustness" / "wide.png", "blue", (2000, 300))
    odd = {"config": DEMO | {"epochs": 4}, "results": RESULTS | {"protocol": {"eval_px": 32}}}
    other = make_run(folder / ("b" * 200), robustness__pgd=result("PGD", run="b"), **odd)
    files = {one.name: one / "robustness" / "pgd.json" for one in (run, other)}
    assert compare(run / "robustness", "pgd", files, lambda path: picture(path, "green", (1500, 900)) or True)
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
    assert tab.js("[...document.images].some(one => one.naturalWidth === 1500)") is (name == "runs")
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
