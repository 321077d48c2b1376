"""States, figures and damage as folders of runs show them, thousands of them, and a lock that asking never takes."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cossl.models import run_folder
from cossl.models.flags import sealed
from cossl.models.run_status import Run, find_runs, flocked_inodes, is_running, list_runs, read_run

CONFIG = {"preset": "in1k", "model.method": "byol", "epochs": 100}
LAST = {"step": 500, "epoch": 50.0, "loss": 1.0, "std": 0.9, "rank": 80.0, "images_per_s": 2700.5}
RESULTS = {"linear_top1": {"trained": 70.25, "pixels": 1.0}, "knn_top1": {"trained": 60.5}, "collapsed": False}
LOG = "2026-01-01 12:00:00  "


def make(path: Path, **files: Any) -> Path:
    """A run of these files, JSON unless text or bytes, results sealed; `log` is the end of train.log, `checkpoint` a file's name."""
    path.mkdir(parents=True)
    names = {"config": "config.json", "results": "results.json", "metrics": "metrics.jsonl", "log": "train.log"}
    for key, value in ({"config": CONFIG, "metrics": json.dumps(LAST) + "\n"} | files).items():
        if key == "checkpoint":
            (path / value).touch()
        elif value is not None:
            value = sealed(value) if key == "results" and isinstance(value, dict) else value
            content = value if isinstance(value, str | bytes) else json.dumps(value)
            (path / names[key]).write_bytes(content.encode() if isinstance(content, str) else content)
    (path / "lock").write_text("process 1 on gpu7 since 2026-01-01 12:00:00\n")
    return path


def read(path: Path) -> Run:
    return read_run(path, path.name, flocked_inodes())


def collapsed(what: dict[str, Any]) -> str:
    return json.dumps(what | {"std": 0.01}) + "\n"


STATES: dict[str, tuple[str, list[str], dict[str, Any]]] = {  # name: state, notes, files
    "finished": ("finished", [], {"results": RESULTS, "checkpoint": "last.pt", "log": LOG + "finished\n"}),
    "stopped": ("stopped", [], {"checkpoint": "last.pt", "log": LOG + "stopped\n"}),
    "killed in its first checkpoint": ("stopped", [], {"checkpoint": "next.pt", "log": LOG + "epoch 3/100\n"}),
    "made room": ("stopped", [], {"checkpoint": "epoch-0010.pt", "log": LOG + "stopped\n"}),
    "killed": ("stopped", [], {"checkpoint": "previous.pt", "log": LOG + "epoch 3/100\n"}),
    "failed": ("failed", ["RuntimeError: loss"], {"checkpoint": "last.pt", "log": f"{LOG}a\n{LOG}failed: RuntimeError: loss\n"}),
    "failed then resumed and killed": ("stopped", [], {"checkpoint": "last.pt", "log": f"{LOG}failed: x\n{LOG}resumed\n"}),
    "failed at once": ("failed", ["x"], {"metrics": None, "log": LOG + "failed: x\n"}),
    "no checkpoint": ("no-checkpoint", [], {"metrics": None}),
    "empty": ("no-checkpoint", [], {"metrics": ""}),
    "collapsed": ("collapsed", [], {"metrics": collapsed(LAST), "checkpoint": "last.pt"}),
    "collapsed and finished": ("collapsed", [], {"results": RESULTS | {"collapsed": True}}),
    "config lost": ("stopped", ["config.json missing"], {"config": None, "checkpoint": "last.pt"}),
    "config half": ("stopped", ["config.json damaged"], {"config": '{"preset": "in', "checkpoint": "last.pt"}),
    "config a list": ("stopped", ["config.json damaged"], {"config": [1], "checkpoint": "last.pt"}),
    "config bytes": ("stopped", ["config.json damaged"], {"config": b"\x80\xff", "checkpoint": "last.pt"}),
    "results half": ("stopped", ["results.json damaged"], {"results": '{"linear', "checkpoint": "last.pt"}),
    "results unsealed": (
        "stopped",
        ["results.json damaged, or of another version (it has no sha256 of its content)"],
        {"results": json.dumps(RESULTS), "checkpoint": "last.pt"},
    ),
    "results changed": (
        "collapsed",
        ["results.json damaged, or of another version (it was changed, or cut off)"],
        {"results": json.dumps(sealed(RESULTS) | {"collapsed": True}), "metrics": collapsed(LAST)},
    ),
    "results odd": ("finished", [], {"results": {"linear_top1": 3, "knn_top1": {"trained": "x"}}}),
    "line half": ("stopped", ["metrics.jsonl ends in half a line"], {"metrics": json.dumps(LAST) + '\n{"st', "checkpoint": "last.pt"}),
    "line odd": ("stopped", ["metrics.jsonl damaged"], {"metrics": "[1]\n", "checkpoint": "last.pt"}),
    "line deep": ("stopped", ["metrics.jsonl damaged"], {"metrics": "[" * 30000 + "\n", "checkpoint": "last.pt"}),
    "line huge": (
        "stopped",
        [],
        {"config": CONFIG | {"batch_size": 8}, "metrics": json.dumps(dict.fromkeys(LAST, 10**400)) + "\n", "checkpoint": "last.pt"},
    ),
    "line endless": ("stopped", ["metrics.jsonl damaged"], {"metrics": b"\0" * 10**5, "checkpoint": "last.pt"}),
}


@pytest.mark.parametrize("name", STATES)
def test_states_and_notes(tmp_path: Path, name: str) -> None:
    state, notes, files = STATES[name]
    run = read(make(tmp_path / name, **files))
    assert (run.state, run.notes) == (state, notes)
    json.dumps(vars(run))


def test_figures_of_a_finished_and_of_a_training_run(tmp_path: Path) -> None:
    finished = read(make(tmp_path / "finished", results=RESULTS))
    assert (finished.preset, finished.method, finished.epoch, finished.epochs) == ("in1k", "byol", 50.0, 100)
    assert (finished.knn_top1, finished.linear_top1, finished.images_per_s) == (60.5, 70.25, 2700.5)
    unsealed = read(make(tmp_path / "unsealed", results=json.dumps(RESULTS)))
    assert (unsealed.knn_top1, unsealed.linear_top1) == (None, None)
    lines = [LAST | {"epoch": epoch} | ({"knn_top1": 10.0 * epoch} if epoch in (1, 2) else {}) for epoch in range(5)]
    path = make(tmp_path / "training", metrics="".join(json.dumps(line) + "\n" for line in lines))
    os.utime(path / "metrics.jsonl", (time.time() - 7200,) * 2)
    training = read(path)
    assert (training.epoch, training.knn_top1, training.linear_top1) == (4, 20.0, None)
    assert 7200 <= (training.idle_s or 0) < 7300


def test_numbers_that_are_none_are_not_shown(tmp_path: Path) -> None:
    odd = {"epoch": "three", "images_per_s": None, "std": [], "rank": True, "knn_top1": float("nan")}
    run = read(make(tmp_path / "odd", config={"preset": 3, "epochs": "many"}, metrics=json.dumps(odd) + "\n"))
    assert (run.preset, run.epochs, run.epoch, run.images_per_s, run.knn_top1) == (None, None, None, None, None)


def test_of_a_long_file_the_end_alone_is_read(tmp_path: Path) -> None:
    path = make(tmp_path / "long")
    with open(path / "metrics.jsonl", "r+b") as file:
        file.truncate(2**36)  # 64 GiB of nothing, in no blocks
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + json.dumps(LAST | {"epoch": 77}).encode() + b"\n")
    assert (read(path).epoch, read(path).notes) == (77, [])


# ------------------------------------------------------------------------------------------------- the lock


def test_a_run_with_its_lock_is_running_whatever_its_files_say(tmp_path: Path) -> None:
    path = make(tmp_path / "run", checkpoint="last.pt", log=LOG + "failed: x\n", metrics=collapsed(LAST))
    with run_folder.lock(path):
        assert (read(path).state, read(path).notes) == ("running", ["collapsed"])
        assert is_running(path / "lock", None)  # where the list is closed to us
    assert read(path).state == "collapsed"


def test_a_record_lock_as_of_another_machine_is_seen(tmp_path: Path) -> None:
    path = make(tmp_path / "run")
    hold = "import fcntl,sys; f=open(sys.argv[1],'r+'); fcntl.lockf(f,fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold, path / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        assert read(path).state == "running"
        owner.communicate()
    assert read(path).state == "no-checkpoint"


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="the kernel has no list of locks")
def test_asking_takes_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "run")
    before, tried, flock = (path / "lock").read_text(), [], fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda *how: (tried.append(how), flock(*how)))
    assert not is_running(path / "lock", flocked_inodes())
    assert tried == []
    assert not is_running(path / "lock", frozenset({(path / "lock").stat().st_ino}))  # that of a file on another disk
    assert len(tried) == 1
    with run_folder.lock(path):
        assert is_running(path / "lock", flocked_inodes())
        assert (path / "lock").read_text().startswith(f"process {os.getpid()} ")
    assert before != (path / "lock").read_text()


# ------------------------------------------------------------------------------------------------- all of them


def test_two_thousand_runs(tmp_path: Path, record_property: Any) -> None:
    kinds = ("finished", "stopped", "failed", "no checkpoint")
    for i in range(2000):
        make(tmp_path / f"grid{i % 10}" / f"{i:04}", **STATES[kinds[i % 4]][2])
    began = time.perf_counter()
    found = list_runs(tmp_path)
    record_property("seconds", time.perf_counter() - began)
    assert Counter(run.state for run in found) == dict.fromkeys(("finished", "stopped", "failed", "no-checkpoint"), 500)
    assert [run.name for run in found] == sorted(f"grid{i % 10}/{i:04}" for i in range(2000))


def test_where_runs_are_looked_for(tmp_path: Path) -> None:
    for name in ("a", "grid/b", "grid/deep/c", "grid/deep/deeper/d", ".hidden/e", "a/inside"):
        make(tmp_path / name)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "file").touch()
    assert [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path) if "loop" not in path.parts] == ["a", "grid/b", "grid/deep/c"]
    assert [run.name for run in list_runs(tmp_path / "a")] == ["a"]
