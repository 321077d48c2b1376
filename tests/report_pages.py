"""Run folders by hand that have something of everything a report shows, and a page as the browser reads it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import finished_sweeps
import pytest
from PIL import Image

from cossl.models.flags import flatten, sealed
from cossl.slurm.collect import write
from cossl.tools import report_page
from cossl.tools.report import runs_report
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
        if name == "results" and isinstance(content, dict):
            content = sealed(content)
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


def collected_sweeps(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
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
