"""Sweeps without a cluster: in this process and on this machine, tiny ones that train and ones whose points only wait."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from fake_slurm import made

from cossl.models import run_folder
from cossl.slurm import point as at_point
from cossl.slurm import submit, sweep
from cossl.slurm.clusters import Cluster
from cossl.slurm.folder import Sweep, read_sweep

TINY = """
presets = ["demo"]
seeds = [0]
[base]
epochs = 1
batch_size = 20
model.hidden_dim = 32
model.out_dim = 16
model.width = 8
optim.warmup_epochs = 0
views.size_px = 32
eval_px = 32
loader.workers = 1
"""


@pytest.fixture
def tiny(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "tiny.toml").write_text(TINY)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no clusters"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return ["submit", str(tmp_path / "tiny.toml"), "--data", str(pictures), "--root", str(tmp_path / "sweeps")]


def states(root: Path) -> list[str]:
    return [one.state for one in sweep.status.standings(read_sweep(root / "tiny"))]


def test_in_this_process(tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    sweep.main([*tiny, "--cluster", "debug"])
    assert states(tmp_path / "sweeps") == ["done"]
    capsys.readouterr()
    sweep.main([*tiny, "--cluster", "debug"])
    assert capsys.readouterr().out == "1 of 1 points done, left alone\nnothing to submit\n"
    with (tmp_path / "tiny.toml").open("a") as file:
        file.write('loss.local_weight = 0.4\n[[list]]\n"optim.base_lr" = 1e-30\n')
    with pytest.raises(SystemExit) as caught:
        sweep.main([*tiny[:3], str(tmp_path), *tiny[4:], "--cluster", "debug"])
    assert caught.value.code == 2
    assert "no train pictures in" in capsys.readouterr().err


def test_on_this_machine_from_the_snapshot(tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    sweep.main([*tiny, "--cluster", "local"])
    own = read_sweep(tmp_path / "sweeps" / "tiny")
    (point,), (job,) = own.points, own.jobs
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{point.run}: done (0 left)", f"next: cossl sweep collect tiny --root {tmp_path / 'sweeps'}"]
    assert states(tmp_path / "sweeps") == ["done"]
    assert job.is_local
    assert at_point.record_of(own.folder, job.job) == {"code": 0, "why": "finished"}
    assert "linear" in (own.folder / job.log).read_text()
    (start,) = json.loads((own.run_dir(point) / "environment.json").read_text())
    assert start["code"]["commit"] == run_folder.code()["commit"]
    sweep.main([*tiny, "--cluster", "local"])
    assert capsys.readouterr().out.splitlines() == ["1 of 1 points done, left alone", "nothing to submit"]


TRAINER = """#!/bin/sh
echo "$CUDA_VISIBLE_DEVICES $PWD $PYTHONPATH" >> {calls}
trap 'kill $!; exit 85' TERM
echo $$ >> {pids}
echo "of $*"
echo wrong >&2
case "$*" in *--seed*) sleep {seconds} & wait $!; exit 0;; esac
exit 3
"""


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float) -> tuple[Sweep, Path]:
    """A sweep whose points wait so long instead of training, but for the first, which fails; and who was called with which GPU."""
    own, path = made(tmp_path, 4), tmp_path / "trainer"
    own = own._replace(points=[point._replace(flags=["--seed", "1"] if i else []) for i, point in enumerate(own.points)])
    (own.folder / "code" / "0123456789ab").mkdir(parents=True)
    path.write_text(TRAINER.format(calls=tmp_path / "calls", pids=tmp_path / "pids", seconds=seconds))
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.setattr(submit, "snapshot", lambda folder: "0123456789ab")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return own, tmp_path / "calls"


def test_here_one_that_fails_stops_no_other_and_gpus_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, calls = stand_in(tmp_path, monkeypatch, 0.0)
    told = list[str]()
    here = Cluster("local", "local")
    with pytest.raises(SystemExit) as caught:
        submit.run_local(own, submit.queue_local(own, own.points, here, told.append), here, 2, told.append)
    assert caught.value.code == 1
    jobs = {job.point: job for job in read_sweep(own.folder).jobs}
    records = [at_point.record_of(own.folder, jobs[point.identity].job) for point in own.points]
    assert records == [{"code": 3, "why": ""}] + [{"code": 0, "why": "finished"}] * 3
    first = jobs[own.points[0].identity]
    assert [line for line in told if "ended with" in line] == [
        f"{own.points[0].run}: ended with code 3, see {own.folder / first.log} (3 left)"
    ]
    assert (own.folder / first.log).with_suffix(".err").read_text() == "wrong\n"
    assert f"--run-dir {own.run_dir(own.points[0])} --resume" in (own.folder / first.log).read_text()
    gpus, where, paths = zip(*(line.split() for line in calls.read_text().splitlines()), strict=True)
    assert set(gpus) == {"5", "7"}
    assert set(where) == set(paths) == {str(own.folder / "code" / "0123456789ab")}


def test_here_a_stop_is_passed_on_and_starts_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, _ = stand_in(tmp_path, monkeypatch, 60)
    pids, told, here = tmp_path / "pids", list[str](), Cluster("local", "local")

    def stop(line: str) -> None:
        told.append(line)
        if "ended with code 3" in line:  # the first failed, so two others run or are about to
            while len(pids.read_text().splitlines()) < 2:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in (*run_folder.STOP_SIGNALS, signal.SIGINT)}
    with pytest.raises(SystemExit) as caught:
        submit.run_local(own, submit.queue_local(own, own.points, here, stop), here, 2, stop)
    assert caught.value.code == 130
    jobs = read_sweep(own.folder).jobs
    assert len(jobs) == 4  # recorded before any was started
    assert len(pids.read_text().splitlines()) in (2, 3)
    assert [at_point.record_of(own.folder, job.job) for job in jobs[1:]] == [{}] * 3
    assert {number: signal.getsignal(number) for number in before} == before
    for pid in pids.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
