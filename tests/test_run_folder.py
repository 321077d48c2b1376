"""A run's folder is one process's alone, says what it ran on, and a request to stop loses no step."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import TINY, assert_same_run, complaint, finished, metrics, run  # noqa: F401  (finished is a fixture)

from cossl import train
from cossl.models import checkpoint, run_folder
from cossl.models.flags import config_hash
from cossl.models.run_status import REQUEUE_EXIT_CODE
from cossl.pipelines.batch import LoaderSpec
from cossl.pipelines.torch_loader import TorchLoader
from cossl.pipelines.views import byol

# ------------------------------------------------------------------------------------------------- the lock


def hold(run_dir: Path, heir: bool) -> tuple[int, int]:
    """(pid of a process that has the lock, pid of its child or 0)."""
    read, write = os.pipe()
    owner = os.fork()
    if owner == 0:
        with run_folder.lock(run_dir):
            child = os.fork() if heir else 0
            if child or not heir:
                os.write(write, str(child).encode())
            signal.pause()
            os._exit(1)
    return owner, int(os.read(read, 20))


def end(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_a_second_process_is_refused_with_the_owners_name(tmp_path: Path) -> None:
    owner, _ = hold(tmp_path / "run", heir=False)
    try:
        with (
            pytest.raises(ValueError, match=rf"run is in use by process {owner} on \S+ since 20\d\d-.*: wait"),
            run_folder.lock(tmp_path / "run"),
        ):
            pass
    finally:
        end(owner)


def test_the_lock_goes_with_its_owner_even_if_a_forked_worker_lives_on(tmp_path: Path) -> None:
    owner, heir = hold(tmp_path, heir=True)
    end(owner)
    try:
        os.kill(heir, 0)
        for _ in range(2):  # and is free again after the block
            with run_folder.lock(tmp_path):
                assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")
    finally:
        os.kill(heir, signal.SIGKILL)


def test_a_folder_with_nothing_but_a_lock_is_free(tmp_path: Path) -> None:
    with run_folder.lock(tmp_path):
        run_folder.check(tmp_path, False)
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match="holds something already"):
        run_folder.check(tmp_path, False)


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    class Now(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Now":
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(run_folder, "datetime", Now)
    made = [str(run_folder.make_default("demo")) for _ in range(3)]
    assert made == ["runs/demo-20260102-030405", "runs/demo-20260102-030405-2", "runs/demo-20260102-030405-3"]


# ------------------------------------------------------------------------------------------------- a lock that is waited for


def test_a_lock_is_waited_for_and_that_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    owner, _ = hold(tmp_path, heir=False)
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            end(owner)

    monkeypatch.setattr(time, "sleep", nap)
    with run_folder.lock(tmp_path, wait_s=60):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")
        assert (tmp_path / "lock").read_text().count("\n") == 1
    assert naps == [1, 1, 1]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{tmp_path} is in use by process {owner} on " in said
    assert "waiting up to 60 s" in said


def test_patience_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    owner, _ = hold(tmp_path, heir=False)
    try:
        with pytest.raises(ValueError, match=rf"is in use by process {owner} on "), run_folder.lock(tmp_path, wait_s=0.02):
            pass
    finally:
        end(owner)
    assert "waiting" in capsys.readouterr().err


@pytest.mark.parametrize("number", run_folder.STOP_SIGNALS)
def test_a_stop_signal_ends_the_wait(tmp_path: Path, number: signal.Signals) -> None:
    owner, _ = hold(tmp_path, heir=False)
    read, write = os.pipe()
    waiter = os.fork()
    if waiter == 0:
        os.dup2(write, 2)
        sys.stderr = os.fdopen(2, "w")
        with run_folder.lock(tmp_path, wait_s=600):
            os._exit(1)
    assert b"waiting" in os.read(read, 1000)
    os.kill(waiter, number)
    assert os.waitstatus_to_exitcode(os.waitpid(waiter, 0)[1]) == -number
    os.kill(owner, 0)
    end(owner)


@pytest.mark.parametrize("step", [1, 15])
def test_a_requeued_run_goes_on_from_what_its_dying_predecessor_wrote_last(
    capsys,
    finished: Path,  # noqa: F811
    pictures: Path,
    tmp_path: Path,
    monkeypatch,
    step: int,
) -> None:
    """It finds the folder locked, without a checkpoint; once it has the lock there is one, perhaps the last, and the results too."""
    before, run_dir = finished, tmp_path / "run"
    if step == 1:
        before = tmp_path / "before"
        monkeypatch.setenv("SLURM_JOB_END_TIME", "1")
        with pytest.raises(SystemExit, match=str(REQUEUE_EXIT_CODE)):
            run(pictures, before)
        monkeypatch.delenv("SLURM_JOB_END_TIME")
    owner, _ = hold(run_dir, heir=False)

    def nap(_: float) -> None:
        shutil.copytree(before, run_dir, dirs_exist_ok=True, ignore=shutil.ignore_patterns("lock"))
        end(owner)

    monkeypatch.setattr(run_folder.time, "sleep", nap)
    run(pictures, run_dir, "--resume", "--lock-wait-s", "60")
    assert f"resumed at step {step} of 15 from last.pt" in capsys.readouterr().out
    assert_same_run(finished, run_dir)


# ------------------------------------------------------------------------------------------------- what it ran on


def test_starts_are_listed_and_an_equal_diff_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    source = {"commit": "0123456789abcdef", "dirty": True, "diff": "one", "new_files": []}
    monkeypatch.setattr(run_folder, "_code", lambda root: source)
    for diff in ("one", "one", "two"):
        source["diff"] = diff
        run_folder.record_start(tmp_path)
    starts = json.loads((tmp_path / "environment.json").read_text())
    assert [start["code"].get("diff") for start in starts] == ["one", None, "two"]
    assert starts[0]["slurm"]["SLURM_JOB_ID"] == "17"
    assert starts[0]["versions"].keys() >= {"python", "torch", "numpy", "numba"}
    assert starts[0]["command"] == sys.orig_argv
    assert starts[0]["code"]["version"].endswith("+g0123456789ab.dirty")


def test_the_source_is_named_by_commit_and_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, uncached = tmp_path / "cossl", run_folder._code.__wrapped__
    root.mkdir()

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
        return subprocess.run(["git", "-C", root, *who, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    def code(where: Path = root) -> dict[str, Any]:
        return uncached(where)

    git("init", "-q")
    (root / "train.py").write_text("a = 1\n")
    git("add", "train.py")
    git("commit", "-qm", "first")
    (root / "notes.txt").write_text("no code")
    assert code() == {"commit": git("rev-parse", "HEAD"), "dirty": False, "diff": "", "new_files": []}
    (root / "new.py").touch()
    assert (code()["dirty"], code()["new_files"]) == (True, ["new.py"])
    (root / "new.py").unlink()
    (root / "train.py").write_text("a = 2\n")
    assert code()["dirty"]
    assert "-a = 1\n+a = 2\n" in code()["diff"]
    monkeypatch.setattr(run_folder, "DIFF_LIMIT", 10)
    assert code()["diff"].startswith("diff --git\n[cut: the diff has ")
    snapshot = root / "site" / "cossl"
    snapshot.mkdir(parents=True)
    assert code(snapshot)["commit"] is None, "a package inside another's checkout is not of that commit"
    for damaged in ("", "[]", '{"commit": "0"}'):
        (root / "site" / "code.json").write_text(damaged)
        assert code(snapshot)["commit"] is None
    (root / "site" / "code.json").write_text(json.dumps(code()))
    assert code(snapshot) == code(), "a snapshot is of the commit that it was taken from"
    monkeypatch.setattr(run_folder, "_code", lambda root: code(snapshot))
    assert run_folder.code_version().endswith(f"+g{git('rev-parse', 'HEAD')[:12]}.dirty")
    (tmp_path / "code.json").write_text(json.dumps(code() | {"commit": "0"}))
    assert code()["commit"] == git("rev-parse", "HEAD"), "a checkout speaks for itself"


# ------------------------------------------------------------------------------------------------- when it should stop


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """The stop signals that handlers of before the block have been called for."""
    calls: list[int] = []
    before = {number: signal.signal(number, lambda n, _: calls.append(n)) for number in run_folder.STOP_SIGNALS}
    yield calls
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", run_folder.STOP_SIGNALS)
def test_a_signal_is_a_flag_and_reaches_the_handler_of_before_at_the_end(heard: list[int], number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with run_folder.StopRequest() as stop:
        assert not stop
        for _ in range(2):
            signal.raise_signal(number)
        assert stop
        assert stop.reason == number.name
        assert heard == []
    assert heard == [number]
    assert signal.getsignal(number) is before


def test_default_and_ignored_signals_only_set_the_flag(heard: list[int]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with run_folder.StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert stop
    assert stop.reason == "SIGUSR1"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN


@pytest.mark.parametrize(
    ("told", "error", "code"),
    [
        (False, None, -signal.SIGTERM),  # it came after the last question
        (True, None, 0),
        (True, SystemExit(REQUEUE_EXIT_CODE), REQUEUE_EXIT_CODE),
        (False, SystemExit(REQUEUE_EXIT_CODE), REQUEUE_EXIT_CODE),  # another rank was told
        (False, RuntimeError("loss"), 1),
    ],
)
def test_a_signal_without_a_handler_is_lost_only_on_a_process_that_is_leaving(told: bool, error: BaseException | None, code: int) -> None:
    child = os.fork()
    if child == 0:
        end_with = 1
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            with run_folder.StopRequest() as stop:
                assert not stop
                signal.raise_signal(signal.SIGTERM)
                assert not told or stop
                if error is not None:
                    raise error
            end_with = 0
        except SystemExit as left:
            end_with = int(left.code or 0)
        finally:
            os._exit(end_with)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code


def test_the_time_limit_of_the_job_is_a_request_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert run_folder.deadline(60) is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000")
    assert run_folder.deadline(60) == 940
    monkeypatch.setenv("SLURM_JOB_START_TIME", "900")
    assert run_folder.deadline(60) == 975  # of a job of 100 s
    monkeypatch.delenv("SLURM_JOB_START_TIME")
    clock = iter([939.0, 940.0])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    stop = run_folder.StopRequest(run_folder.deadline(60))
    assert [bool(stop), bool(stop), bool(stop)] == [False, True, True]
    assert "time limit" in stop.reason


@pytest.mark.skipif(sys.platform == "darwin", reason="no sigwaitinfo")
def test_a_loader_worker_hears_of_its_parent_only(betons: Path) -> None:
    loader = TorchLoader(betons / "train.beton", LoaderSpec(byol(16), 8, workers=1))
    batches = loader.epoch(0)
    next(batches)
    (worker,) = multiprocessing.active_children()
    subprocess.run(["sh", "-c", "".join(f"kill -{number.name[3:]} {worker.pid};" for number in run_folder.STOP_SIGNALS)], check=True)
    assert len(list(batches)) == len(loader) - 1
    batches = loader.epoch(1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(20)
    code = worker.exitcode
    worker.kill()
    assert code == 0


# ------------------------------------------------------------------------------------------------- in a run


def test_a_stopped_run_ends_as_one_that_was_not(capfd, finished: Path, pictures: Path, tmp_path: Path) -> None:  # noqa: F811
    """SIGTERM in mid-run: the step is finished, the code is 85, the folder is locked until then, and --resume comes to the same end."""
    run_dir = tmp_path / "run"
    flags = ["demo", "--data", str(pictures), "--run-dir", str(run_dir), "--epochs", "3", "--loader.workers", "0", *TINY]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-m", "cossl.train", *flags, "--checkpoint-every", "1"], env=environment)
    until = time.monotonic() + 120
    while not (run_dir / "last.pt").exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    assert f"{run_dir} is in use by process {process.pid}" in complaint(capfd, [*flags, "--resume"])
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    assert process.wait(120) == REQUEUE_EXIT_CODE
    said = capfd.readouterr().out
    state = checkpoint.newest(run_dir)[0]
    assert f"stopped after step {state['step']} of 15 by SIGTERM" in said
    assert [r["step"] for r in metrics(run_dir)] == list(range(1, state["step"] + 1))
    run(pictures, run_dir, "--resume")
    assert_same_run(finished, run_dir)
    assert len(json.loads((run_dir / "environment.json").read_text())) == 2


def test_a_job_at_its_time_limit_goes_on_in_the_next(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    """Also where a line of metrics.jsonl is of steps of several jobs."""
    run(pictures, tmp_path / "whole", "--log-every", "4")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time())))
    for step, flags in enumerate(([], ["--resume"]), start=1):
        with pytest.raises(SystemExit) as stop:
            run(pictures, tmp_path / "run", "--log-every", "4", *flags)
        assert stop.value.code == REQUEUE_EXIT_CODE
        state, found = checkpoint.newest(tmp_path / "run")
        assert (state["step"], found) == (step, "last.pt")
        assert state["config_hash"] == config_hash(state["config"], train.RESUME_MAY_CHANGE)
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    run(pictures, tmp_path / "run", "--log-every", "4", "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_full_disk_stops_the_run_in_one_line_with_the_checkpoint_before(
    capsys,
    finished: Path,  # noqa: F811
    pictures: Path,
    tmp_path: Path,
    monkeypatch,
) -> None:
    run_dir, torch_save, left = tmp_path / "run", torch.save, iter([True, True, False])

    def save(state: Any, file: Any) -> None:
        torch_save(state, file)
        if not next(left):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(SystemExit) as stop:
        run(pictures, run_dir, "--checkpoint-every", "3")
    monkeypatch.undo()
    assert stop.value.code == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("cossl train: ")
    assert "No space left" in said
    assert checkpoint.newest(run_dir)[0]["step"] == 6
    run(pictures, run_dir, "--resume")
    assert_same_run(finished, run_dir)
