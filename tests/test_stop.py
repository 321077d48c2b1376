"""A request to stop is heard, and loses no step."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
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

# ------------------------------------------------------------------------------------------------- when it should stop


@pytest.fixture(autouse=True)
def handlers_of_before() -> Iterator[None]:
    """A run that stops leaves its process deaf to a second signal, for the rest of its life; this process has other tests to run."""
    before = {number: signal.getsignal(number) for number in run_folder.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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
