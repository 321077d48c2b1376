"""`cossl sweep retry`, `cancel`, `logs`, with stand-ins for Slurm's commands and for what submits."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_slurm import LOG, RESULTS, FakeSlurm, errors, made, run_of, shown, submitted

from cossl.models import run_folder
from cossl.slurm import point as at_point
from cossl.slurm import sweep
from cossl.slurm.folder import Job, add_points, read_sweep, record_jobs
from cossl.slurm.status import Standing, standings


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "fake", monkeypatch)


# ------------------------------------------------------------------------------------------------- retry, cancel, logs


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str, list[int]]]]:
    """What is submitted instead of being submitted: how, to which cluster, the seeds."""
    from cossl.slurm import submit

    found: list[tuple[str, str, list[int]]] = []
    for how in ("submit_slurm", "run_local"):
        monkeypatch.setattr(
            submit,
            how,
            lambda own, points, cluster, *_, how=how: found.append((how, cluster.name, [point.seed for point in points])),
        )
    monkeypatch.setattr(submit, "queue_local", lambda own, points, cluster, say, new_code: points)
    monkeypatch.setattr(
        submit, "run_debug", lambda own, points, say: found.append(("run_debug", "debug", [point.seed for point in points]))
    )
    monkeypatch.setattr(sweep, "LOOK_AGAIN_S", 0.0)
    return found


@pytest.fixture
def clusters(tmp_path: Path) -> list[str]:
    (tmp_path / "clusters.toml").write_text('[ours]\npartition = "gpu"\n[theirs]\nqos = "x"\n')
    return ["--cluster-file", str(tmp_path / "clusters.toml")]


Sent = list[tuple[str, str, list[int]]]


def test_retry_takes_what_is_asked_to_where_it_was(
    tmp_path: Path, fake: FakeSlurm, sent: Sent, clusters: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    own = submitted(made(tmp_path, 6), [f"7_{i}" for i in range(6)])
    record_jobs(
        own.folder, [Job(own.points[5].identity, "local-1-1-0", "heads", "local", "0" * 12, "logs/x.out", time.time(), platform.node())]
    )
    fake.says("squeue", "7_0|FAILED|x\n7_1|NODE_FAIL|x\n7_2|RUNNING|x\n7_3|CANCELLED|x\n7_4|FAILED|x\n")
    shown(own, capsys, "--failed", *clusters, verb="retry")
    assert sent == [("submit_slurm", "ours", [0, 4])]
    sent.clear()
    shown(own, capsys, "--lost", *clusters, verb="retry")
    assert sent == [("submit_slurm", "ours", [1]), ("run_local", "local", [5])]
    sent.clear()
    shown(own, capsys, "--failed", "--lost", "--cluster", "theirs", *clusters, verb="retry")
    assert sent == [("submit_slurm", "theirs", [0, 1, 4, 5])]
    sent.clear()
    shown(own, capsys, "--lost", "--cluster", "debug", *clusters, verb="retry")
    assert sent == [("run_debug", "debug", [1, 5])]
    with pytest.raises(ValueError, match=r"^retry what\? Give --failed, --lost, or both$"):
        shown(own, capsys, *clusters, verb="retry")


def test_retry_looks_again_before_it_believes_in_a_loss(
    tmp_path: Path, fake: FakeSlurm, sent: Sent, clusters: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm says NODE_FAIL for a second before it queues the job again."""
    own = submitted(made(tmp_path, 1), ["7_0"])
    fake.says("squeue", "7_0|NODE_FAIL|None\n")
    monkeypatch.setattr(sweep, "time", SimpleNamespace(sleep=lambda seconds: fake.says("squeue", "7_0|PENDING|BeginTime\n")))
    assert shown(own, capsys, "--lost", *clusters, verb="retry") == "nothing lost\n"
    assert sent == []


def test_of_two_retries_the_second_finds_it_submitted(
    tmp_path: Path, fake: FakeSlurm, sent: Sent, clusters: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, real = submitted(made(tmp_path, 1), ["7_0"]), sweep.held
    fake.says("squeue", "7_0|FAILED|x\n8_0|PENDING|x\n")

    def after_another(root: Path, wait_s: float = 60) -> Any:
        submitted(own, ["8_0"])
        return real(root, wait_s)

    monkeypatch.setattr(sweep, "held", after_another)
    assert shown(own, capsys, "--failed", *clusters, verb="retry") == "nothing failed\n"
    assert sent == []


def test_an_unknown_cluster_at_a_retry_submits_nothing(
    tmp_path: Path, fake: FakeSlurm, sent: Sent, capsys: pytest.CaptureFixture[str]
) -> None:
    own = submitted(made(tmp_path, 1), ["7_0"])
    at_point.record(own.folder, "7_0", 1, "")
    (tmp_path / "none.toml").write_text("")
    with pytest.raises(ValueError, match=r"^unknown cluster 'ours' in "):
        shown(own, capsys, "--failed", "--cluster-file", str(tmp_path / "none.toml"), verb="retry")
    assert sent == []


def test_cancel_stops_what_is_on_its_way_and_records_it_first(tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    own = submitted(made(tmp_path, 5), [f"7_{i}" for i in range(4)])
    fake.says("squeue", "7_0|RUNNING|x\n7_1|PENDING|x\n7_2|FAILED|x\n")
    run_of(own, own.points[3], results=RESULTS)
    assert shown(own, capsys, verb="cancel") == "2 jobs cancelled; cossl sweep submit starts them again, from their checkpoints\n"
    assert fake.calls("scancel") == ["scancel 7_0 7_1"]
    assert [at_point.record_of(own.folder, f"7_{i}").get("why") for i in range(4)] == ["cancelled", "cancelled", None, None]
    for job in ("7_0", "7_1"):
        assert at_point.begin(own, own.points[0], job) == "the sweep was cancelled"
    fake.says("squeue", "7_0|CANCELLED|x\n")
    assert [one.state for one in standings(own)] == ["cancelled", "cancelled", "lost", "done", "new"]


def test_cancel_says_what_scancel_says(tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    own = submitted(made(tmp_path, 1), ["7_0"])
    fake.says("squeue", "7_0|RUNNING|x\n")
    fake.says("scancel", "", 1, "scancel: error: Kill job error on job id 7_0: Access denied\n")
    with pytest.raises(RuntimeError, match=r"^scancel: scancel: error: Kill job error on job id 7_0: Access denied$"):
        shown(own, capsys, verb="cancel")


def test_cancel_in_parts_of_a_command_line(tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    own = submitted(made(tmp_path, 501), [f"7_{i}" for i in range(501)])
    fake.says("squeue", "".join(f"7_{i}|PENDING|x\n" for i in range(501)))
    shown(own, capsys, verb="cancel")
    assert [len(line.split()) for line in fake.calls("scancel")] == [501, 2]


def test_cancel_leaves_another_grids_jobs_alone(tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    own = submitted(made(tmp_path, 2), ["7_0", "7_1"])
    other = add_points(read_sweep(own.folder.parent / "weighting"), own.points[:1])
    submitted(other, ["9"])
    fake.says("squeue", "7_1|PENDING|x\n9|PENDING|x\n")
    shown(own, capsys, verb="cancel")
    assert fake.calls("scancel") == ["scancel 7_1"]


def test_cancel_on_this_machine_signals_the_sweep(tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    sweeping = subprocess.Popen([sys.executable, "-c", "input()", "sweep"], stdin=subprocess.PIPE)
    own = submitted(made(tmp_path, 2), [f"local-{sweeping.pid}-{i}-0" for i in range(2)])
    shown(own, capsys, verb="cancel")
    assert sweeping.wait() == -15
    sweeping.communicate()
    assert fake.calls() == []
    assert [one.state for one in standings(own)] == ["cancelled", "cancelled"]


def test_cancel_signals_no_process_that_is_no_sweep(tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    """A run whose sweep was killed goes on; the number of that process may be another's by now."""
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    own = submitted(made(tmp_path, 1), [f"local-{other.pid}-1-0"])
    with run_folder.lock(run_of(own, own.points[0])):
        assert shown(own, capsys, verb="cancel").startswith(f"process {other.pid} of {platform.node()}, which started some, is not")
    other.communicate(b"\n")
    assert other.returncode == 0


def test_logs_of_a_point(tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    own = submitted(made(tmp_path, 12), ["7_0"])
    run_dir = run_of(own, own.points[0], log="".join(f"{LOG}line {i}\n" for i in range(100)))
    errors(own, "7_0", 0, "wrong\n")
    log = own.folder / "logs" / "7" / "7_0_0_log.out"
    lines = shown(own, capsys, "setting 0", "--lines", "2", verb="logs").splitlines()
    assert lines == [
        f"== {run_dir}/train.log",
        f"{LOG}line 98",
        f"{LOG}line 99",
        f"== {log}: not there",
        f"== {log.with_suffix('.err')}",
        "wrong",
    ]
    for word in (own.points[0].run, own.points[0].identity):
        assert shown(own, capsys, word, verb="logs").startswith(f"== {run_dir}/train.log")
    assert shown(own, capsys, "setting 1", verb="logs").startswith(f"== {run_of(own, own.points[1])}/train.log")  # and not settings 10, 11
    for word, message in (
        ("ting 1", "3 points have 'ting 1' in name, run folder or identity: "),
        ("no", "0 points have 'no' in .*, [.]{3}$"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            shown(own, capsys, word, verb="logs")


def test_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"]):
        sweep.main(argv)
        assert capsys.readouterr().out.startswith("`cossl sweep VERB GRID`")
    for verb, hint in (("stat", "did you mean status?"), ("zzz", "expected one of plan, submit, status, retry, cancel, logs, collect")):
        with pytest.raises(ValueError, match=r"^unknown verb") as caught:
            sweep.main([verb])
        assert str(caught.value) == f"unknown verb {verb!r}: {hint}"


def test_a_standing_is_plain() -> None:
    assert Standing.__dataclass_fields__.keys() == {"point", "state", "run", "job", "detail", "log", "live"}
