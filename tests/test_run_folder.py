"""A run's folder is one process's alone, and says what it ran on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from test_train import assert_same_run, finished, run  # noqa: F401  (finished is a fixture)

from cossl.models import run_folder
from cossl.models.run_status import REQUEUE_EXIT_CODE

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
