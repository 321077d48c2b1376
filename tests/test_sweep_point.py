"""What a job does for its point: whether it begins, how it ends, and from which source."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_slurm import LOG, RESULTS, FakeSlurm, made, run_of

from cossl.models.run_status import REQUEUE_EXIT_CODE
from cossl.slurm import point as at_point
from cossl.slurm.folder import Sweep, add_points, read_sweep
from cossl.slurm.point import CANCELLED, MOST_STARTS, begin, end, record, record_of, trainer
from cossl.slurm.submit import snapshot


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    return made(tmp_path, 3)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "fake", monkeypatch)


# ------------------------------------------------------------------------------------------------- which job, which point


def test_the_job_and_its_point(own: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "array.json").write_text(json.dumps([point.identity for point in reversed(own.points)]))
    with pytest.raises(ValueError, match=r"^not in a SLURM job: this is what a sweep's jobs call$"):
        at_point.job_name()
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    assert (at_point.job_name(), at_point.point_of(own, tmp_path / "array.json")) == ("9", own.points[2])
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert (at_point.job_name(), at_point.point_of(own, tmp_path / "array.json")) == ("7_2", own.points[0])


def test_a_record_that_cannot_be_read_is_none(own: Sweep) -> None:
    assert record_of(own.folder, "7_0") == {}
    record(own.folder, "7_0", 3, "why")
    assert record_of(own.folder, "7_0") == {"code": 3, "why": "why"}
    for text in ("", "{", "[]"):
        (own.folder / "exits" / "7_0").write_text(text)
        assert record_of(own.folder, "7_0") == {}


# ------------------------------------------------------------------------------------------------- begin


def test_a_point_that_is_done_is_not_started_again(own: Sweep) -> None:
    point = own.points[0]
    run_of(own, point, results=RESULTS)
    assert begin(own, point, "7_0") == f"{point.run} is done already"
    assert record_of(own.folder, "7_0") == {"code": 0, "why": "was done already"}
    assert begin(own, own.points[1], "7_1") == ""


def test_a_cancelled_job_that_is_queued_again_does_not_start(own: Sweep) -> None:
    record(own.folder, "7_0", None, CANCELLED)
    assert begin(own, own.points[0], "7_0") == "the sweep was cancelled"
    assert record_of(own.folder, "7_0")["why"] == CANCELLED
    assert begin(own, own.points[0], "8_0") == ""


def test_what_an_earlier_attempt_recorded_is_taken_back(own: Sweep) -> None:
    record(own.folder, "7_0", 137, "")
    record(own.folder, "7_1", 1, "another's")
    assert begin(own, own.points[0], "7_0") == ""
    assert record_of(own.folder, "7_0") == {}
    assert record_of(own.folder, "7_1") == {"code": 1, "why": "another's"}


def test_a_job_that_comes_no_further_is_given_up(own: Sweep) -> None:
    for _ in range(MOST_STARTS):
        assert begin(own, own.points[0], "7_0") == ""
    said = begin(own, own.points[0], "7_0")
    assert said.startswith(f"gave up: {MOST_STARTS} starts of job 7_0 in a row without a new checkpoint; ")
    assert record_of(own.folder, "7_0") == {"code": 1, "why": said}
    assert begin(own, own.points[0], "7_0") == said
    assert begin(own, own.points[0], "8_0") == ""  # a retry
    assert begin(own, own.points[1], "7_1") == ""


@pytest.mark.parametrize("name", ["last.pt", "next.pt"])
def test_a_job_with_a_newer_checkpoint_starts_as_often_as_it_likes(own: Sweep, name: str) -> None:
    checkpoint = run_of(own, own.points[0]) / name
    for start in range(4 * MOST_STARTS):
        if start % (MOST_STARTS - 1) == 0:
            checkpoint.touch()
            os.utime(checkpoint, ns=(10**18 + start, 10**18 + start))
        assert begin(own, own.points[0], "7_0") == ""
    for _ in range(MOST_STARTS - 4):
        assert begin(own, own.points[0], "7_0") == ""
    assert begin(own, own.points[0], "7_0").startswith("gave up")


def test_a_checkpoint_that_is_renamed_in_this_moment_is_no_error(own: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: self.suffix == ".pt" or real(self))
    assert begin(own, own.points[0], "7_0") == ""


# ------------------------------------------------------------------------------------------------- end


def silent(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(at_point, "time", SimpleNamespace(sleep=slept.append))
    return slept


@pytest.mark.parametrize(("code", "why"), [(0, "finished"), (1, ""), (2, ""), (137, ""), (139, "")])
def test_a_code_is_recorded_and_nobody_asked(own: Sweep, fake: FakeSlurm, code: int, why: str) -> None:
    end(own, own.points[0], "7_0", code)
    assert record_of(own.folder, "7_0") == {"code": code, "why": why}
    assert fake.calls() == []


@pytest.mark.parametrize("code", [REQUEUE_EXIT_CODE, 138, 140, 143])
def test_what_was_stopped_while_its_job_runs_is_queued_again_once(own: Sweep, fake: FakeSlurm, code: int) -> None:
    fake.says("squeue", "RUNNING\n")
    end(own, own.points[0], "7_0", code)
    assert fake.calls() == ["squeue --noheader --jobs 7_0 --format %T", "scontrol requeue 7_0"]
    assert record_of(own.folder, "7_0") == {}


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PREEMPTED", "TIMEOUT", "PENDING", ""])
def test_what_slurm_ends_or_queues_itself_is_left_to_it(
    own: Sweep, fake: FakeSlurm, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.says("squeue", f"{state}\n" if state else "")
    end(own, own.points[0], "7_0", REQUEUE_EXIT_CODE)
    assert fake.calls("scontrol") == []
    assert record_of(own.folder, "7_0") == {}
    assert capsys.readouterr().err == f"cossl sweep: stopped with code 85, job 7_0 is {state or 'over'}\n"


@pytest.mark.parametrize("code", [REQUEUE_EXIT_CODE, 137, 1])
def test_what_was_cancelled_stays_so(own: Sweep, fake: FakeSlurm, code: int) -> None:
    """It is not queued again, and a task that was killed before it could stop is no failure, which a retry would start again."""
    record(own.folder, "7_0", None, CANCELLED)
    fake.says("squeue", "RUNNING\n")
    end(own, own.points[0], "7_0", code)
    assert fake.calls() == []
    assert record_of(own.folder, "7_0")["why"] == CANCELLED


def test_what_was_cancelled_in_the_moment_of_its_end_is_finished(own: Sweep) -> None:
    record(own.folder, "7_0", None, CANCELLED)
    end(own, own.points[0], "7_0", 0)
    assert record_of(own.folder, "7_0") == {"code": 0, "why": "finished"}


def test_of_several_tasks_a_killed_one_says_nothing_of_a_stop(own: Sweep, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    end(own, own.points[0], "7_0", 143)
    assert record_of(own.folder, "7_0") == {"code": 143, "why": ""}
    assert fake.calls() == []


def test_of_several_tasks_one_that_was_slow_to_stop_has_stopped(own: Sweep, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    fake.says("squeue", "RUNNING\n")
    run_of(own, own.points[0], log=f"{LOG}stopped\n")
    os.utime(own.run_dir(own.points[0]) / "train.log", (1, 1))
    assert begin(own, own.points[0], "7_0") == ""
    end(own, own.points[0], "7_0", 143)  # as an attempt before has said, and not this one
    assert record_of(own.folder, "7_0") == {"code": 143, "why": ""}
    assert begin(own, own.points[0], "7_0") == ""
    run_of(own, own.points[0], log=f"{LOG}stopped\n")
    end(own, own.points[0], "7_0", 143)
    assert record_of(own.folder, "7_0") == {}
    assert fake.calls("scontrol") == ["scontrol requeue 7_0"]


def test_a_controller_that_does_not_answer_is_asked_three_times(own: Sweep, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the job is not queued again where its state cannot be told: it may be cancelled."""
    slept = silent(monkeypatch)
    fake.says("squeue", "", 1, "Unable to contact slurm controller\n")
    end(own, own.points[0], "7_0", REQUEUE_EXIT_CODE)
    assert [line.split()[0] for line in fake.calls()] == ["squeue"] * 3
    assert [seconds for seconds in slept if seconds] == [5, 5]
    assert record_of(own.folder, "7_0") == {"code": None, "why": "stopped with code 85 while Slurm did not answer"}


@pytest.mark.parametrize("missing", [True, False])
def test_a_node_that_cannot_queue_it_again_says_so(
    own: Sweep, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, missing: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    silent(monkeypatch)
    fake.says("squeue", "RUNNING\n")
    if missing:
        fake.remove("scontrol")
    else:
        fake.says("scontrol", "", 1, "Requested operation is presently disabled\n")
    end(own, own.points[0], "7_0", REQUEUE_EXIT_CODE)
    assert record_of(own.folder, "7_0") == {"code": None, "why": "stopped, and `scontrol requeue 7_0` failed on this node"}
    assert ("Requested operation is presently disabled" in capsys.readouterr().err) == (not missing)


# ------------------------------------------------------------------------------------------------- a task


def test_the_command_of_a_point(own: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    point = own.points[0]._replace(flags=["--epochs", "50", "--model.no-joint-views"])
    expected = [sys.executable, "-u", "-m", "cossl.train", "in1k", "--epochs", "50", "--model.no-joint-views"]
    expected += ["--run-dir", str(own.folder.parent / "points" / point.run), "--resume", "--lock-wait-s", "600"]
    assert trainer(own, point) == trainer(own, point, "/nowhere") == expected
    assert point.flags == ["--epochs", "50", "--model.no-joint-views"]


def test_a_task_becomes_the_trainer_of_its_point(
    own: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    array, became, reset = tmp_path / "array.json", list[tuple[str, list[str], str]](), list[int]()
    array.write_text(json.dumps([point.identity for point in own.points]))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setattr(os, "execve", lambda path, argv, env: became.append((path, argv, env["WANDB_RUN_ID"])))
    monkeypatch.setattr(signal, "signal", lambda number, handler: reset.append(number) if handler == signal.SIG_DFL else None)
    with pytest.raises(RuntimeError, match="this job runs"):  # no snapshot
        at_point.run(str(own.folder), str(array), "")
    monkeypatch.setattr(at_point, "require_snapshot", lambda folder: None)
    at_point.run(str(own.folder), str(array), "")
    assert {signal.SIGTERM, signal.SIGUSR2} <= set(reset)  # submitit's handlers
    assert became == [(sys.executable, trainer(own, own.points[1]), own.points[1].identity)]
    assert capsys.readouterr().err.startswith(f"cossl sweep: in1k --run-dir {own.run_dir(own.points[1])} --resume")


# ------------------------------------------------------------------------------------------------- from the job's script


Call = Callable[..., tuple[int, str]]


@pytest.fixture
def call(own: Sweep, tmp_path: Path) -> Call:
    """`python -m cossl.slurm.point VERB ...` as job 7_1, from the snapshot unless told otherwise: its code, and what it says."""
    source = own.folder / "code" / snapshot(own.folder)
    (tmp_path / "array.json").write_text(json.dumps([point.identity for point in own.points]))

    def run(*argv: str, cwd: Path = source, path: Path | None = source) -> tuple[int, str]:
        environment = os.environ | {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
        environment |= {"PYTHONPATH": str(path)} if path else {}
        command = [sys.executable, "-m", "cossl.slurm.point", argv[0], str(own.folder), str(tmp_path / "array.json"), *argv[1:]]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        return done.returncode, done.stderr

    return run


def test_the_script_s_two_calls(own: Sweep, call: Call, fake: FakeSlurm) -> None:
    assert call("begin") == (0, "")
    assert call("end", "1") == (0, "")
    assert record_of(own.folder, "7_1") == {"code": 1, "why": ""}
    fake.says("squeue", "RUNNING\n")
    assert call("begin") == (0, "")
    assert call("end", "85") == (0, "cossl sweep: stopped with code 85, queueing job 7_1 again\n")
    assert fake.calls("scontrol") == ["scontrol requeue 7_1"]
    run_of(own, own.points[1], results=RESULTS)
    assert call("begin") == (3, f"cossl sweep: {own.points[1].run} is done already\n")


def test_a_job_that_would_run_other_source_does_not(own: Sweep, call: Call, tmp_path: Path) -> None:
    code, said = call("begin", cwd=tmp_path, path=None)
    assert code == 1
    assert f"and not a snapshot of {own.folder}: see PYTHONPATH" in said
    with pytest.raises(RuntimeError, match=r"^this job runs .* and not a snapshot of .*: see PYTHONPATH"):
        at_point.require_snapshot(own.folder)
    assert not (own.folder / "exits").exists()


def test_a_sweep_that_is_reached_by_a_link_is_the_same(own: Sweep, call: Call, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(own.folder.parent)
    source = next((tmp_path / "link" / "heads" / "code").iterdir())
    assert call("begin", cwd=source, path=source) == (0, "")


def test_points_of_a_sweep_that_grew_keep_their_arrays(own: Sweep, tmp_path: Path) -> None:
    (tmp_path / "array.json").write_text(json.dumps([own.points[1].identity]))
    more = own.points[1]._replace(identity="f" * 16, run="in1k-more")
    grown = add_points(read_sweep(own.folder), [more])
    assert at_point.point_of(grown, tmp_path / "array.json") == own.points[1]
