"""One run in several processes: torchrun's variables and SLURM's, one stop for all, another number of processes after it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cossl import train
from cossl.models import checkpoint, launch
from cossl.models.run_status import REQUEUE_EXIT_CODE

TINY = (
    "demo --epochs 3 --batch-size 16 --log-every 1 --views.size-px 16 --eval-px 16 --model.width 8 --model.receptive-field 9"
    " --model.hidden-dim 16 --model.out-dim 8 --optim.optimizer sgd --optim.base-lr 0.002 --optim.warmup-epochs 1"
    " --loader.backend torch --loader.workers 0 --device cpu"
).split()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(world_size: int, slurm: bool, *flags: str) -> list[subprocess.Popen[str]]:
    """The run in that many processes, as torchrun or as `srun` on one node would start them."""
    job, processes = free_port(), []
    for rank in range(world_size):
        step = {"SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(world_size), "SLURM_STEP_NUM_NODES": "1"}
        step |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "MASTER_PORT": job}
        torchrun = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
        own = step if slurm else torchrun | {"MASTER_PORT": job}
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | {"OMP_NUM_THREADS": "1"} | own
        command = [sys.executable, "-m", "cossl.train", *TINY, *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **pipes))  # type: ignore[call-overload]
    return processes


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    said = [process.communicate(timeout=200) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def losses(run_dir: Path) -> list[list[float]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [[r[name] for name in ("loss", "global", "local_to_global", "global_to_local")] for r in records]


def test_two_processes_stopped_and_resumed_by_one_take_the_steps_of_one(pictures: Path, tmp_path: Path) -> None:
    train.main([*TINY, "--data", str(pictures), "--run-dir", str(tmp_path / "one")])
    flags = ["--data", str(pictures), "--run-dir", str(tmp_path / "two")]
    both = start(2, False, *flags, "--checkpoint-every", "100")
    log, deadline = tmp_path / "two" / "metrics.jsonl", time.monotonic() + 150
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert both[0].poll() is None, both[0].communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    both[1].send_signal(signal.SIGTERM)  # one of them alone: they have to agree on the step
    first, second = ends(both)
    assert (first[0], second[0]) == (REQUEUE_EXIT_CODE, REQUEUE_EXIT_CODE), (first, second)
    assert "batch 16 = 2 x 1 x 8" in first[1]
    assert "another rank" in first[1]
    assert second[1] == ""
    assert "Warning" not in first[2] + second[2]
    stopped = checkpoint.load(tmp_path / "two" / "last.pt")["step"]
    assert 3 <= stopped < 15
    (again, silent) = ends(start(2, True, *flags, "--checkpoint-every", "100", "--resume"))
    assert (again[0], silent[:2]) == (0, (0, "")), (again, silent)
    assert f"resumed at step {stopped} of 15" in again[1]
    one, two = (torch.tensor(losses(tmp_path / name)) for name in ("one", "two"))
    torch.testing.assert_close(two[:5], one[:5], rtol=0, atol=1e-3)  # batch norms of a few values double a rounding error every step
    torch.testing.assert_close(two, one, rtol=0, atol=0.1)
    assert one.std(0).min() > 0.06  # other pictures would be other losses
    assert (tmp_path / "two" / "results.json").exists()


def test_a_mistake_on_the_first_rank_is_said_once(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "something").touch()
    first, second = ends(start(2, False, "--data", str(pictures), "--run-dir", str(tmp_path / "run")))
    assert (first[0], second[0]) == (2, 2)
    assert "holds something already" in first[2]
    assert "cossl train:" not in second[2]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("slurm", [True, False])
def test_a_wrong_flag_is_said_by_the_first_rank_alone(monkeypatch: pytest.MonkeyPatch, capsys, slurm: bool, rank: int) -> None:
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": str(rank)}
    for name, value in (step if slurm else {"RANK": str(rank), "WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    for flags in (["dmeo"], ["demo", "--epohcs", "3"], ["demo", "--epochs", "0"]):
        with pytest.raises(SystemExit) as stop:
            train.main(flags)
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("cossl train: ") == 1 - rank


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu7", "gpu7"), ("gpu[007-012,20],login1", "gpu007"), ("a-1.b,c[1-2]", "a-1.b"), ("n[3,5]-ib", "n3-ib")],
)
def test_first_host_of_slurms_lists(nodes: str, host: str) -> None:
    assert launch.first_host(nodes) == host


def test_a_batch_script_without_srun_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    assert launch.join(torch.device("cpu")).world_size == 1
    with pytest.raises(ValueError, match="no list of nodes"):
        launch.first_host("[]")
