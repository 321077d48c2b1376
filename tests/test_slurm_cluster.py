"""The tests' own SLURM: what the other tests on it build on holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import slurm_cluster
from slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm
slurm = slurm_cluster.slurm


def processes_of(cluster: SlurmCluster) -> list[int]:
    """Those that carry the cluster's folder in their command line or environment."""
    needle, found = os.fsencode(cluster.folder), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if needle in (process / "cmdline").read_bytes() + (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def submit(slurm: SlurmCluster, script: str, *flags: str) -> str:
    return slurm.run("sbatch", "--parsable", f"--output={slurm.folder}/%j.txt", "--open-mode=append", *flags, "--wrap", script).strip()


def first_output(slurm: SlurmCluster, job: str) -> Path:
    """The log of a job, which has written something by now."""
    log = slurm.folder / f"{job}.txt"
    slurm.wait_for(lambda: log.exists() and log.read_text(), 30, f"output of job {job}")
    return log


def ended(slurm: SlurmCluster, job: str) -> None:
    slurm.wait_for(lambda: slurm.queue()[job] == "COMPLETED", 40, f"end of job {job}")


def test_a_job_of_two_nodes_runs_with_its_gpus(slurm: SlurmCluster) -> None:
    tell = "srun sh -c 'getent hosts $(hostname) && echo gpus $CUDA_VISIBLE_DEVICES'"
    job = submit(slurm, tell, "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2")
    ended(slurm, job)
    said = (slurm.folder / f"{job}.txt").read_text()
    assert said.count("127.0.0.1") == 2, said
    assert said.count("gpus 0,1") == 2, said


def test_an_array_runs_as_many_at_once_as_it_may(slurm: SlurmCluster) -> None:
    job = submit(slurm, "sleep 0.5; squeue -hr -t R -j $SLURM_ARRAY_JOB_ID | wc -l", "--array=0-5%2", f"--output={slurm.folder}/%A_%a.txt")
    elements = [f"{job}_{index}" for index in range(6)]
    for element in elements:
        ended(slurm, element)
    assert max(int((slurm.folder / f"{element}.txt").read_text()) for element in elements) <= 2


def test_without_accounting_sacct_fails(slurm: SlurmCluster) -> None:
    done = subprocess.run(["sacct"], env=os.environ | slurm.env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "accounting storage is disabled" in done.stderr


def test_a_power_cut_moves_a_job_to_another_node_and_the_node_returns(slurm: SlurmCluster) -> None:
    job = submit(slurm, "hostname; test ${SLURM_RESTART_COUNT:-0} = 1 || sleep 600", "--exclusive")
    log = first_output(slurm, job)
    node = log.read_text().strip()
    slurm.crash(node)
    slurm.mark_down(node)
    slurm.boost(job)
    ended(slurm, job)
    first, second = log.read_text().split()
    assert first == node != second
    slurm.boot(node)
    assert slurm.run("srun", f"--nodelist={node}", "hostname").strip() == node


@pytest.mark.parametrize("signalled", [True, False])
def test_a_preempted_job_gets_its_signal_where_the_site_sends_it(signalled: bool) -> None:
    with slurm_cluster.started(nodes=1, preempt_signal=signalled, kill_wait_s=1) as slurm:
        job = submit(slurm, "trap 'echo signalled; exit' USR2; echo; while :; do sleep 0.1; done", "--exclusive", "--signal=B:USR2@60")
        log = first_output(slurm, job)
        submit(slurm, "true", "--partition=high", "--exclusive")
        slurm.wait_for(lambda: slurm.queue()[job] == ("COMPLETED" if signalled else "PENDING"), 40, "preemption")
        assert ("signalled" in log.read_text()) == signalled


def test_a_job_of_a_living_node_marked_down_waits_for_the_end_of_its_predecessor() -> None:
    with slurm_cluster.started(nodes=1, kill_wait_s=1) as slurm:
        job = submit(slurm, "trap '' TERM; echo start; test ${SLURM_RESTART_COUNT:-0} = 1 || while :; do sleep 0.1; done")
        log = first_output(slurm, job)
        slurm.mark_down("n1")
        slurm.boost(job)
        ended(slurm, job)
        assert log.read_text().count("start") == 2


def test_a_stopped_controller_comes_back_with_its_jobs(slurm: SlurmCluster) -> None:
    job = submit(slurm, "sleep 2")
    slurm.wait_for(lambda: slurm.queue()[job] == "RUNNING", 30, "start of the job")
    slurm.stop_controller()
    slurm.start_controller()
    ended(slurm, job)
    assert slurm.queue()[job] == "COMPLETED"


def test_with_accounting_sacct_tells_what_became_of_a_job() -> None:
    with slurm_cluster.started(nodes=1, accounting="dbd") as slurm:
        job = submit(slurm, "exit 3")
        ask = ("sacct", "--noheader", "--parsable2", "--allocations", "--format=State,ExitCode", f"--jobs={job}")
        slurm.wait_for(lambda: "FAILED" in slurm.run(*ask), 30, "record of the failure")
        assert slurm.run(*ask) == "FAILED|3:0\n"


def test_stop_leaves_no_process_and_touches_no_other_cluster() -> None:
    with slurm_cluster.started(nodes=2, max_array_size=4) as one, slurm_cluster.started(nodes=1) as other:
        with pytest.raises(RuntimeError, match="Invalid job array specification"):
            submit(one, "true", "--array=0-4")
        with pytest.raises(RuntimeError, match="another cluster runs in"):
            SlurmCluster(one.folder).start()
        first_output(one, submit(one, "trap '' TERM; setsid sleep 600 & echo $!; while :; do sleep 0.1; done"))
        assert len(processes_of(one)) > 6  # munged, slurmctld, two nodes, the job
        one.stop()
        assert processes_of(one) == []
        ended(other, submit(other, "true"))
        other.processes["n1"].kill()
        answers = iter([False] * 50)  # five seconds of them
        with pytest.raises(RuntimeError, match="n1 died before the end"):
            other.wait_for(lambda: next(answers), 600, "end")
    assert processes_of(other) == []


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_cluster_ends_with_its_owner(end: signal.Signals) -> None:
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = SlurmCluster(Path(folder))
        command = [sys.executable, slurm_cluster.__file__, folder, "--nodes=1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
            assert owner.stdout is not None
            assert owner.stdout.readline() == f"export SLURM_CONF={folder}/slurm.conf\n"
            first_output(cluster, submit(cluster, "echo start; sleep 600"))
            assert len(processes_of(cluster)) > 4
            owner.send_signal(end)
        assert owner.returncode == (0 if end is signal.SIGTERM else -signal.SIGKILL)
        cluster.wait_for(lambda: processes_of(cluster) == [], 10, "end of every process")


def test_where_none_can_run_a_test_is_skipped_or_fails_where_one_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_cluster, "why_not", lambda accounting: "not here")
    skipped, failed = pytest.skip.Exception, pytest.fail.Exception
    outcomes = {("", "none"): skipped, ("none", "none"): failed, ("dbd", "none"): failed, ("none", "dbd"): skipped, ("dbd", "dbd"): failed}
    for (required, accounting), outcome in outcomes.items():
        monkeypatch.setenv("COSSL_REQUIRE_SLURM", required)
        with pytest.raises((skipped, failed), match="no SLURM: not here") as caught, slurm_cluster.started(accounting=accounting):
            pass
        assert caught.type is outcome, (required, accounting)


def test_settings_that_cannot_work_are_named() -> None:
    with pytest.raises(ValueError, match="at most 70 characters"):
        SlurmCluster(Path("/tmp") / ("long" * 20))
    with pytest.raises(ValueError, match="not one of none, dbd"):
        SlurmCluster(Path("/tmp/x"), accounting="jobcomp")
