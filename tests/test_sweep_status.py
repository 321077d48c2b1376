"""Every state of a point, as its folder, its job's record and Slurm's commands together tell it; and what people are shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_slurm import LOG, METRICS, RESULTS, FakeSlurm, errors, made, run_of, shown, submitted

from cossl.models import run_folder
from cossl.models.run_status import REQUEUE_EXIT_CODE
from cossl.slurm import point as at_point
from cossl.slurm import status, sweep
from cossl.slurm.folder import Point, Sweep, add_points, read_sweep
from cossl.slurm.status import STATES, standings

SRUN = "srun: error: n2: task 1: Exited with exit code 1\nsrun: Terminating job step 7.0\nslurmstepd: error: *** STEP 7.0 CANCELLED\n"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "fake", monkeypatch)


# ------------------------------------------------------------------------------------------------- every state

Case = tuple[str, str, Callable[[FakeSlurm, Sweep, Point], None]]
"""State, the end of the detail, and what makes it: the point's job is 7_0."""


def squeue(state: str, reason: str = "None") -> Callable[[FakeSlurm, Sweep, Point], None]:
    return lambda fake, own, point: fake.says("squeue", f"6|RUNNING|None\n7_0|{state}|{reason}\n7_1|RUNNING|None\n")


def sacct(state: str) -> Callable[[FakeSlurm, Sweep, Point], None]:
    return lambda fake, own, point: fake.says("sacct", f"7_1|COMPLETED\n7_0|{state}\n")


def recorded(code: int | None, why: str = "") -> Callable[[FakeSlurm, Sweep, Point], None]:
    return lambda fake, own, point: at_point.record(own.folder, "7_0", code, why)


def said(task: int, text: str) -> Callable[[FakeSlurm, Sweep, Point], None]:
    return lambda fake, own, point: errors(own, "7_0", task, text)


def ran(**files: Any) -> Callable[[FakeSlurm, Sweep, Point], None]:
    return lambda fake, own, point: [run_of(own, point, **files)].clear()


def both(*what: Callable[[FakeSlurm, Sweep, Point], None]) -> Callable[[FakeSlurm, Sweep, Point], None]:
    return lambda fake, own, point: [one(fake, own, point) for one in what].clear()


CASES: dict[str, Case] = {
    "pending": ("pending", "Resources", squeue("PENDING", "Resources")),
    "pending with a reason that has a bar": ("pending", "a|b", squeue("PENDING", "a|b")),
    "being queued again": ("pending", "BeginTime", both(squeue("REQUEUED", "BeginTime"), recorded(137))),
    "held after a failed start": ("pending", "launch failed requeued held", squeue("REQUEUE_HOLD", "launch failed requeued held")),
    "starting": ("pending", "None", squeue("CONFIGURING")),
    "running": ("running", "", squeue("RUNNING")),
    "ending": ("running", "", squeue("COMPLETING")),
    "suspended": ("running", "", squeue("SUSPENDED")),
    "running, failed before": ("running", "", both(squeue("RUNNING"), ran(log=f"{LOG}failed: RuntimeError: x\n"))),
    "done": ("done", "", ran(results=RESULTS, log=f"{LOG}finished\n")),
    "done, and its job is being queued again": ("done", "", both(squeue("PENDING"), ran(results=RESULTS))),
    "failed by its record": ("failed", "exit code 1", recorded(1)),
    "gave up": ("failed", "gave up: 5 starts", both(recorded(1, "gave up: 5 starts"), ran(log=f"{LOG}resumed\n"))),
    "failed by train.log": ("failed", "ValueError: no", ran(log=f"{LOG}epoch 1\n{LOG}failed: ValueError: no\n")),
    "failed by its record, told by train.log": ("failed", "ValueError: no", both(recorded(1), ran(log=f"{LOG}failed: ValueError: no\n"))),
    "failed by what it printed": (
        "failed",
        "cossl train: no such preset",
        both(recorded(2), said(0, "x\ncossl train: no such preset\n\n")),
    ),
    "failed by Slurm's word": ("failed", "failed", both(squeue("FAILED"))),
    "out of memory by accounting": ("failed", "out_of_memory", sacct("OUT_OF_MEMORY")),
    "failed on one rank": (
        "failed",
        "task 1: RuntimeError: mine",
        both(
            recorded(1),
            ran(log=f"{LOG}failed: RuntimeError: gloo connection closed\n"),
            said(0, f"cossl sweep: in1k\nRuntimeError: gloo connection closed\n{SRUN}"),
            said(1, "Traceback:\nRuntimeError: mine\n"),
        ),
    ),
    "failed on one rank without a word": ("failed", "task 1: said nothing", both(recorded(1), said(0, SRUN))),
    "failed on the first rank": (
        "failed",
        "RuntimeError: mine",
        both(recorded(1), said(0, f"RuntimeError: mine\n{SRUN.replace('task 1', 'task 0')}")),
    ),
    "killed on several ranks": (
        "failed",
        "task 3: at step 9",
        both(recorded(137), said(0, "srun: error: n2: tasks 3-5: Killed\n"), said(3, "at step 9\n")),
    ),
    "a code of 0 without results": ("failed", "is not this point's whole results", recorded(0, "finished")),
    "a job of all tasks done without results": (
        "failed",
        "results.json damaged, or of another version (it holds a list)",
        both(recorded(0), ran(results="[]")),
    ),
    "lost, forgotten": ("lost", "its job is over and left no word", lambda fake, own, point: None),
    "lost with its node": ("lost", "node fail", squeue("NODE_FAIL", "None")),
    "lost at its time limit": ("lost", "timeout", sacct("TIMEOUT")),
    "lost, preempted for good": ("lost", "preempted", sacct("PREEMPTED")),
    "lost, completed without a word": ("lost", "completed", sacct("COMPLETED")),
    "cancelled by us": ("cancelled", "", both(recorded(None, at_point.CANCELLED), squeue("CANCELLED"))),
    "cancelled by us and stopped with a code": ("cancelled", "", both(recorded(None, at_point.CANCELLED), sacct("FAILED"))),
    "cancelled by hand": ("cancelled", "", squeue("CANCELLED")),
    "cancelled by hand, long ago": ("cancelled", "", sacct("CANCELLED by 1000")),
    "cancelled and ending": ("running", "", both(recorded(None, at_point.CANCELLED), squeue("COMPLETING"))),
    "unknown": (
        "unknown",
        "squeue: slurm_load_jobs error: no",
        lambda fake, own, point: fake.says("squeue", "", 1, "a\nslurm_load_jobs error: no\n"),
    ),
    "unknown, whatever is recorded": ("unknown", "squeue: failed", both(recorded(1), lambda fake, own, point: fake.says("squeue", "", 1))),
    "done, while Slurm says nothing": ("done", "", both(ran(results=RESULTS), lambda fake, own, point: fake.says("squeue", "", 1))),
    "no accounting": (
        "lost",
        "its job is over and left no word",
        lambda fake, own, point: fake.says("sacct", "", 1, "Slurm accounting storage is disabled\n"),
    ),
    "no accounting, but a word": (
        "failed",
        "exit code 9",
        both(recorded(9), lambda fake, own, point: fake.says("sacct", "7_0|COMPLETED\n", 1)),
    ),
    "nonsense of accounting": (
        "lost",
        "its job is over and left no word",
        lambda fake, own, point: fake.says("sacct", "\n7_0\n7_0|\n7_0|A|B\n"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_states(tmp_path: Path, fake: FakeSlurm, name: str) -> None:
    state, detail, make = CASES[name]
    own = submitted(made(tmp_path, 1), ["7_0"])
    make(fake, own, own.points[0])
    (one,) = standings(own)
    assert (
        (one.state, one.detail) == (state, detail)
        if not detail.startswith(("is not", "results.json"))
        else (one.state == state and one.detail.endswith(detail))
    )
    assert one.log == own.folder / "logs" / "7" / "7_0_0_log.out"
    assert len(fake.calls("squeue")) == (state != "done")
    assert len(fake.calls("sacct")) <= 1


def test_every_state_is_tried_here_and_shown_somewhere() -> None:
    assert {state for state, *_ in CASES.values()} | {"new"} == set(STATES)


def test_a_point_that_was_never_submitted_asks_nobody(tmp_path: Path, fake: FakeSlurm) -> None:
    own = made(tmp_path, 2)
    run_of(own, own.points[1], log=f"{LOG}failed: x\n")  # by hand, in its folder
    assert [one.state for one in standings(own)] == ["new", "new"]
    assert fake.calls() == []


def test_where_there_is_no_squeue_nothing_is_known(tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    own = submitted(made(tmp_path, 1), ["7_0"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [(one.state, one.detail) for one in standings(own)] == [("unknown", "squeue: No such file or directory")]


def test_the_last_job_counts_whichever_grid_submitted_it(tmp_path: Path, fake: FakeSlurm) -> None:
    own = made(tmp_path, 2)
    submitted(own, ["7_0", "7_1"])
    other = add_points(read_sweep(own.folder.parent / "weighting"), own.points[:1])
    submitted(other, ["9"])
    fake.says("squeue", "7_0|FAILED|x\n7_1|FAILED|x\n9|PENDING|Priority\n")
    first, second = standings(read_sweep(own.folder))
    assert (first.state, second.state) == ("pending", "failed")
    assert first.log == own.folder.parent / "weighting" / "logs" / "9" / "9_0_log.out"
    fake.says("squeue", "")
    at_point.record(other.folder, "9", 4, "of its own")
    at_point.record(own.folder, "9", 5, "of another sweep's job 9")
    assert standings(read_sweep(own.folder))[0].detail == "of its own"


def test_a_lock_says_that_it_runs_whatever_slurm_says(tmp_path: Path, fake: FakeSlurm) -> None:
    own = submitted(made(tmp_path, 1), ["7_0"])
    path = run_of(own, own.points[0], metrics=METRICS)
    for answer in ("7_0|PENDING|BeginTime\n", "7_0|NODE_FAIL|None\n", ""):
        fake.says("squeue", answer)
        with run_folder.lock(path):
            assert [one.state for one in standings(own)] == ["running"]
    assert [one.state for one in standings(own)] == ["lost"]


def test_results_of_another_config_are_none(tmp_path: Path, fake: FakeSlurm) -> None:
    """Not of another value, of one key less, of a text for a number; but pictures may have moved."""
    own = submitted(made(tmp_path, 1), ["7_0"])
    point = own.points[0]
    run_of(own, point, results=RESULTS)
    good = json.loads((own.run_dir(point) / "config.json").read_text())
    for config in (good | {"seed": 5}, {k: v for k, v in good.items() if k != "seed"}, good | {"seed": "0"}, [], "{"):
        run_of(own, point, results=RESULTS, config=config)
        assert standings(own)[0].state == "lost"
    run_of(own, point, results=RESULTS, config=good | {"data": "/moved", "loader.workers": 9})
    assert standings(own)[0].state == "done"
    bad = ({"trained": None}, {"trained": float("nan")}, {"trained": True}, {"trained": "70"}, {}, 70.25)
    for top in bad:
        run_of(own, point, results=RESULTS | {"linear_top1": top})
        assert standings(own)[0].state == "lost"
    for results in ("", '{"linear_top1', "[]", {"linear_top1": {"trained": 1.0}}):
        run_of(own, point, results=results)
        assert standings(own)[0].state == "lost"


def test_results_without_their_seal_are_none_and_it_says_so(tmp_path: Path, fake: FakeSlurm) -> None:
    own = submitted(made(tmp_path, 3), ["7_0", "7_1"])
    for point in own.points:
        run_of(own, point, results=json.dumps(RESULTS))
    at_point.record(own.folder, "7_1", 0, "")
    said = "results.json damaged, or of another version (it has no sha256 of its content)"
    found = [(one.state, one.detail) for one in standings(own)]
    assert found == [("lost", said), ("failed", f"ended with code 0, but {own.run_dir(own.points[1])}/{said}"), ("new", said)]
    for point in own.points:
        run_of(own, point, results=RESULTS)
    assert {(one.state, one.detail) for one in standings(own)} == {("done", "")}


# ------------------------------------------------------------------------------------------------- on this machine


def test_runs_of_this_machine_ask_no_slurm(tmp_path: Path, fake: FakeSlurm) -> None:
    sweeping = subprocess.Popen([sys.executable, "-c", "input()", "sweep"], stdin=subprocess.PIPE)
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        own = submitted(made(tmp_path, 3), [f"local-{process.pid}-1-0" for process in (sweeping, other, sweeping)])
        run_of(own, own.points[2], results=RESULTS)
        assert [(one.state, one.detail) for one in standings(own)] == [
            ("pending", "waits for its turn"),
            ("lost", "its job is over and left no word"),
            ("done", ""),
        ]
    finally:
        for process in (sweeping, other):
            process.communicate(b"\n")
    at_point.record(own.folder, own.jobs[1].job, REQUEUE_EXIT_CODE, "")
    assert [one.state for one in standings(own)] == ["lost", "failed", "done"]
    assert fake.calls() == []


# ------------------------------------------------------------------------------------------------- a thousand


@pytest.fixture
def thousand(tmp_path: Path, fake: FakeSlurm) -> Sweep:
    """Half of them running, a tenth forgotten by the controller, one failed, one lost, one done; of two arrays."""
    own = submitted(made(tmp_path, 1000), [f"{7 + (i >= 600)}_{i % 600}" for i in range(1000)])
    fake.says("squeue", "".join(f"{job.job}|{'RUNNING' if i % 2 else 'PENDING'}|None\n" for i, job in enumerate(own.jobs) if i >= 100))
    fake.says("sacct", "".join(f"7_{i}|CANCELLED by 0\n" for i in range(98)))
    at_point.record(own.folder, "7_98", 3, "")
    run_of(own, own.points[0], results=RESULTS)
    return own


def test_a_thousand_points_are_one_question_each(fake: FakeSlurm, thousand: Sweep) -> None:
    states = [one.state for one in standings(thousand)]
    assert {state: states.count(state) for state in STATES if state in states} == {
        "done": 1,
        "running": 450,
        "pending": 450,
        "failed": 1,
        "lost": 1,
        "cancelled": 97,
    }
    user = os.getuid()
    assert fake.calls() == [
        f"squeue --noheader --array --states=all --user={user} --format=%i|%T|%r",
        "sacct --allocations --noheader --parsable2 --format=JobID,State --jobs=7",
    ]


def test_status_imports_no_torch(thousand: Sweep) -> None:
    code = (
        "import sys; from cossl.tools.cli import main; main(); print([name for name in ('torch', 'numpy', 'numba') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, "sweep", "status", "heads", "--root", str(thousand.folder.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]"
    assert lines[1001] == "1 done, 450 running, 450 pending, 1 failed, 1 lost, 97 cancelled of 1000 points"
    root = f" --root {thousand.folder.parent}"
    assert lines[-3:-1] == [f"next: cossl sweep retry heads --failed{root}", f"next: cossl sweep retry heads --lost{root}"]


# ------------------------------------------------------------------------------------------------- what is shown


def test_the_table(tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    own = submitted(made(tmp_path, 4), ["7_0", "7_1", "7_2"])
    fake.says("squeue", "7_0|RUNNING|None\n7_1|PENDING|Priority\n")
    run_of(own, own.points[0], metrics=METRICS)
    run_of(own, own.points[2], metrics=METRICS | {"epoch": 100.0}, results=RESULTS)
    header, running, pending, done, new, total = shown(own, capsys).splitlines()
    assert header.split() == ["point", "preset", "seed", "state", "job", "epoch", "images/s", "left", "linear", "%"]
    left_min = 50 * (500 / 50) * 4096 / 2700 / 60
    assert running.split() == ["setting", "0", "in1k", "0", "running", "7_0", "50.0/100", "2,700", f"{left_min:.0f}", "min", "-"]
    assert pending.split() == ["setting", "1", "in1k", "1", "pending", "7_1", "-", "-", "-", "-", "Priority"]
    assert done.split()[5:] == ["7_2", "100.0/100", "2,700", "-", "70.2"]
    assert new.split()[4:] == ["new", "-", "-", "-", "-", "-"]
    assert total == "1 done, 1 running, 1 pending, 1 new of 4 points"
    assert len(shown(own, capsys, "--state", "done", "new").splitlines()) == 4


def test_failures_name_their_log_and_the_next_step(tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    own = submitted(made(tmp_path, 2), ["7_0", "7_1"])
    at_point.record(own.folder, "7_0", 1, "")
    errors(own, "7_0", 0, "ValueError: too wide\n")
    lines = shown(own, capsys).splitlines()
    assert lines[1].endswith("ValueError: too wide")
    assert lines[4:] == [
        f"  setting 0, seed 0: {own.folder}/logs/7/7_0_0_log.out",
        f"  setting 1, seed 1: {own.folder}/logs/7/7_1_0_log.out",
        f"next: cossl sweep retry heads --failed --root {own.folder.parent}",
        f"next: cossl sweep retry heads --lost --root {own.folder.parent}",
    ]
    failed, lost = json.loads(shown(own, capsys, "--json"))
    assert (failed["state"], failed["detail"], failed["job"]) == ("failed", "ValueError: too wide", "7_0")
    assert (lost["state"], lost["seed"], lost["folder"]["state"]) == ("lost", 1, "no-checkpoint")


def test_watching_ends_when_nothing_is_on_its_way(
    tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, slept = submitted(made(tmp_path, 1), ["7_0"]), list[float]()
    answers = iter([("", 1), ("7_0|PENDING|x\n", 0), ("7_0|RUNNING|x\n", 0), ("7_0|FAILED|x\n", 0)])
    fake.says("squeue", *next(answers))

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        fake.says("squeue", *next(answers))

    monkeypatch.setattr(sweep, "time", SimpleNamespace(sleep=sleep))
    text = shown(own, capsys, "--watch", "--every-s", "5")
    assert slept == [5.0] * 3
    assert [line.split()[1] for line in text.splitlines() if line.endswith("of 1 points")] == ["unknown", "pending", "running", "failed"]


def test_spans_of_time() -> None:
    assert [status.span(seconds) for seconds in (None, 0.0, 90.0, 3599.0, 3600.0, 86400.0)] == [
        "-",
        "0 min",
        "2 min",
        "60 min",
        "1.0 h",
        "24.0 h",
    ]


def test_a_sweep_that_was_never_submitted_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = made(tmp_path, 1)
    for grid, hint in (("head", "did you mean heads?"), ("zzz", "there are heads")):
        with pytest.raises(ValueError, match=r"^no sweep") as caught:
            sweep.main(["status", grid, "--root", str(own.folder.parent)])
        assert str(caught.value) == f"no sweep {grid!r} in {own.folder.parent}: {hint}"
    with pytest.raises(ValueError, match=r"^no sweep 'own' in .*: cossl sweep submit dir/own.toml makes it$"):
        sweep.main(["status", "dir/own.toml", "--root", str(tmp_path)])
    (own.folder / "sweep.json").write_text('{"points": [{"name": 1}]}')
    with pytest.raises(ValueError, match=r"sweep.json is damaged \(.*\): submit the grid again to another --root$"):
        read_sweep(own.folder)


def test_half_a_line_of_jobs_hides_no_other(tmp_path: Path) -> None:
    own = made(tmp_path, 3)
    submitted(own, ["7_0"])
    with open(own.folder / "jobs.jsonl", "a") as file:
        file.write('{"point": "0')
    assert [job.job for job in read_sweep(own.folder).jobs] == ["7_0"]
    assert [job.job for job in submitted(own, ["9_0", "9_1"]).jobs] == ["7_0", "9_0", "9_1"]
