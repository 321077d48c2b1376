"""`cossl runs`: the table, what is shown of it and in which order, and that nothing heavy is loaded for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_run_status import CONFIG, LAST, RESULTS, STATES, make, read

from cossl.tools import cli, runs
from cossl.tools.runs import runs_main, table


@pytest.mark.parametrize("name", STATES)
def test_every_run_is_a_row(tmp_path: Path, name: str) -> None:
    run = read(make(tmp_path / name, **STATES[name][2]))
    assert len(list(table([run]))) == 2


def test_a_row(tmp_path: Path) -> None:
    path = make(tmp_path / "training", metrics=json.dumps(LAST | {"epoch": 4, "knn_top1": 20.0}) + "\n")
    os.utime(path / "metrics.jsonl", (time.time() - 7200,) * 2)
    head, row = table([read(path)])
    assert head.split() == "name preset method state epoch kNN % linear % images/s idle".split()
    assert row.split() == "training in1k byol no-checkpoint 4.0 of 100 20.0 - 2,700 2 h".split()


@pytest.mark.parametrize("start", ["import cossl.models.run_status", "from cossl.tools import cli; cli.main()"])
def test_reading_runs_loads_no_torch(three: Path, start: str) -> None:
    code = f"import sys; sys.argv = ['cossl', 'runs', {str(three)!r}]; {start}; print({{'torch', 'numpy', 'timm'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.fixture
def three(tmp_path: Path) -> Path:
    make(tmp_path / "a", results=RESULTS | {"knn_top1": {"trained": 50.0}})
    make(tmp_path / "b", checkpoint="last.pt")
    make(tmp_path / "c", results=RESULTS, config=CONFIG | {"preset": "demo"})
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("", "abc"),
        ("--sort knn_top1", "cab"),
        ("--sort preset", "cab"),
        ("--sort state", "acb"),
        ("--state stopped", "b"),
        ("--state finished stopped --sort linear_top1", "acb"),
        ("--state running", ""),
    ],
)
def test_sorted_and_chosen(three: Path, capsys: pytest.CaptureFixture[str], flags: str, names: str) -> None:
    runs_main([str(three), *flags.split()])
    _, *rows, count = capsys.readouterr().out.splitlines()
    assert [row[0] for row in rows] == list(names)
    assert count == f"{len(names)} of 3 runs in {three}"


def test_json_is_a_list_of_all_columns(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs_main([str(three), "--json", "--sort", "idle_s"])
    listed = json.loads(capsys.readouterr().out)
    assert {run["name"]: run["linear_top1"] for run in listed} == {"a": 70.25, "b": None, "c": 70.25}
    assert set(runs.Column.__args__) <= set(listed[0])
    assert [run["idle_s"] for run in listed] == sorted(run["idle_s"] for run in listed)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("nowhere", "nowhere: no such folder; give the one that holds the runs"),
        ("--state runing", "invalid choice 'runing' for argument '--state'. Expected one of ('running', "),
        ("--srot name", "Unrecognized options: --srot"),
    ],
)
def test_mistakes_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: str, said: str) -> None:
    monkeypatch.setattr(sys, "argv", ["cossl", "runs", *flags.split()])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    complaint = capsys.readouterr().err
    assert exit_.value.code == 2
    assert complaint.startswith("cossl runs: ")
    assert said in complaint
    assert complaint.count("\n") == 1
