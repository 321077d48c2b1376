"""Sweeps on a real SLURM of this machine: whatever becomes of the jobs, the table is that of an undisturbed sweep, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
import torch
from slurm_cluster import SlurmCluster

from cossl.models import checkpoint, run_folder
from cossl.models.run_status import flocked_inodes, is_running
from cossl.pipelines.demo_set import make_demo_set
from cossl.slurm import sweep
from cossl.slurm.folder import read_sweep
from cossl.slurm.status import Standing, standings

pytestmark = pytest.mark.slurm
slurm = slurm_cluster.slurm

POINT = """\
presets = ["demo"]
seeds = [0]
[base]
epochs = 5
batch_size = 8
log_every = 5
knn_every = 0
eval_px = 32
"model.width" = 8
"model.hidden_dim" = 32
"model.out_dim" = 16
"loader.workers" = 1
[product]
"""
CLUSTERS = """\
[cpu]
partition = "main"
gpus_per_node = 1
cpus_per_task = 1
time_min = 60
[impatient]
partition = "main"
gpus_per_node = 1
cpus_per_task = 1
time_min = 1
signal_before_end_s = 10
[two_nodes]
partition = "main"
nodes = 2
gpus_per_node = 2
cpus_per_task = 1
time_min = 60
[local_two]
kind = "local"
parallel = 2
"""


class Place:
    """Grids, clusters and pictures of a test, and its sweeps."""

    def __init__(self, folder: Path, pictures: Path) -> None:
        self.folder, self.pictures, self.root = folder, pictures, folder / "sweeps"
        folder.mkdir(exist_ok=True)
        (folder / "clusters.toml").write_text(CLUSTERS)

    def grid(self, product: str = '"model.local_head" = ["conv1x1"]', name: str = "grid") -> str:
        (self.folder / f"{name}.toml").write_text(POINT + product + "\n")
        return str(self.folder / f"{name}.toml")

    def submit(self, grid: str, cluster: str = "cpu", *flags: str) -> None:
        where = ["--cluster", cluster, "--cluster-file", str(self.folder / "clusters.toml"), "--root", str(self.root)]
        sweep.main(["submit", grid, *where, "--data", str(self.pictures), *flags])

    def call(self, verb: str, grid: str, *flags: str) -> None:
        sweep.main([verb, grid, "--root", str(self.root), *flags])

    def retry(self, grid: str, *flags: str) -> None:
        self.call("retry", grid, "--cluster-file", str(self.folder / "clusters.toml"), *flags)

    def standings(self, name: str = "grid") -> list[Standing]:
        return standings(read_sweep(self.root / name))

    def states(self, name: str = "grid") -> list[str]:
        return [one.state for one in self.standings(name)]

    def job(self, name: str = "grid") -> str:
        """The first point's last job, as scancel and scontrol take it."""
        job = self.standings(name)[0].job
        assert job is not None
        return job.job

    def run_dir(self, name: str = "grid") -> Path:
        return (folder := read_sweep(self.root / name)).run_dir(folder.points[0])

    def steps(self, name: str = "grid") -> int:
        """That the first point's metrics.jsonl has."""
        path = self.run_dir(name) / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last may be half there
        return int(json.loads(lines[-1])["step"]) if lines else 0


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo_set(tmp_path_factory.mktemp("pictures"), count=(400, 100))


@pytest.fixture
def place(tmp_path: Path, drawn: Path, slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Two of these never run at once, so that each has both cores."""
    use(slurm, monkeypatch)
    yield Place(tmp_path, drawn)
    slurm.run("scancel", "--user=root")
    slurm.wait_for(lambda: not slurm.run("squeue", "--noheader").strip(), 60, "end of all jobs")


def use(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that a disturbance could change: results, curves and weights, without times."""
    results = json.loads((run_dir / "results.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "results": {key: value for key, value in results.items() if key not in ("images_per_s", "seconds", "sha256")},
        "metrics": [{key: value for key, value in line.items() if key != "images_per_s"} for line in lines],
        "weights": {key: value.numpy().tobytes() for key, value in checkpoint.newest(run_dir)[0]["model"].items()},
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, drawn: Path) -> dict[str, Any]:
    """The point's outcome on this machine, without SLURM."""
    place = Place(tmp_path_factory.mktemp("undisturbed"), drawn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        place.submit(place.grid(), "local_two")
    assert place.states() == ["done"]
    return outcome(place.run_dir())


def started(place: Place, slurm: SlurmCluster, steps: int = 60) -> None:
    """Waits until the first point has a checkpoint and is in the middle of an epoch."""
    slurm.wait_for(lambda: place.steps() >= steps, 300, f"step {steps}")


def finished(place: Place, slurm: SlurmCluster, name: str = "grid") -> None:
    slurm.wait_for(lambda: set(place.states(name)) <= {"done", "failed", "lost", "cancelled"}, 600, "end of the sweep")
    assert set(place.states(name)) == {"done"}, [(one.state, one.detail) for one in place.standings(name)]


def starts(run_dir: Path) -> int:
    """Of the trainer, once it has the run's folder."""
    return len(json.loads((run_dir / "environment.json").read_text()))


def starts_of(place: Place, job: str) -> int:
    """Of the job, in its script."""
    return len((place.root / "grid" / "exits" / f"{job}.starts").read_text().splitlines())


# ------------------------------------------------------------------------------------------------- undisturbed


def test_heads_in_miniature_end_to_end(
    place: Place, slurm: SlurmCluster, undisturbed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    grid = place.grid('"model.local_head" = ["conv1x1", "mlp2", "mlp3", "conv1x1_deep"]')
    began = time.monotonic()
    place.submit(grid, "cpu", "--parallel", "2")
    assert time.monotonic() - began < 30, "submit waits for its jobs"
    assert set(place.states()) <= {"pending", "running"}
    place.submit(grid)  # nothing twice
    assert "nothing to submit" in capsys.readouterr().out
    assert len(read_sweep(place.root / "grid").jobs) == 4
    finished(place, slurm)
    assert outcome(place.run_dir()) == undisturbed
    capsys.readouterr()
    place.call("collect", grid)
    table = capsys.readouterr().out
    for head in ("conv1x1", "mlp2", "mlp3", "conv1x1_deep"):
        assert head in table
    written = [place.root / "grid" / name for name in ("results.csv", "table.md", "table.tex", "accuracy.png", "speed.png")]
    assert all(path.stat().st_size for path in written)
    place.call("logs", grid, "local_head mlp2")
    assert "5 epochs of 50 steps" in capsys.readouterr().out


def test_array_larger_than_the_site_allows(tmp_path: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with slurm_cluster.started(nodes=2, max_array_size=3) as small:
        use(small, monkeypatch)
        place = Place(tmp_path, drawn)
        place.submit(place.grid('"optim.base_lr" = [0.001, 0.002, 0.003, 0.004, 0.005]'), "cpu", "--parallel", "2", "--", "--epochs", "1")
        jobs = [job.job.split("_") for job in read_sweep(place.root / "grid").jobs]
        assert [int(index) for _, index in jobs] == [0, 1, 2, 0, 1]
        assert len({number for number, _ in jobs}) == 2
        finished(place, small)


# ------------------------------------------------------------------------------------------------- interrupted


def test_requeue_and_preemption(place: Place, slurm: SlurmCluster, undisturbed: dict[str, Any]) -> None:
    place.submit(place.grid())
    started(place, slurm)
    job = place.job()
    slurm.run("scontrol", "requeue", job)  # no signal of submitit's, no word to the task but SIGTERM
    slurm.boost(job)
    started(place, slurm, 120)
    high = slurm.run(
        "sbatch", "--parsable", "-p", "high", "-N", "4", "--exclusive", "-J", "vip", "-o", "/dev/null", "--wrap", "sleep 3"
    ).strip()
    slurm.wait_for(lambda: slurm.queue()[high] == "COMPLETED", 60, "end of the job that took the nodes")
    slurm.boost(job)
    finished(place, slurm)
    assert starts(place.run_dir()) == 3
    assert outcome(place.run_dir()) == undisturbed


def test_sigterm_alone_and_sigusr2(place: Place, slurm: SlurmCluster, undisturbed: dict[str, Any]) -> None:
    place.submit(place.grid())
    for name, steps in (("TERM", 60), ("USR2", 120)):
        started(place, slurm, steps)
        slurm.run("scancel", f"--signal={name}", place.job())
        slurm.boost(place.job())
    finished(place, slurm)
    assert starts(place.run_dir()) == 3
    assert outcome(place.run_dir()) == undisturbed


def test_time_limit_hit_twice(place: Place, slurm: SlurmCluster) -> None:
    place.submit(place.grid(), "impatient", "--", "--epochs", "60")
    for restarts in (1, 2):
        slurm.wait_for(lambda: slurm.run("squeue", "-h", "-r", "-j", place.job(), "-o", "%r").strip() == "BeginTime", 180, "time limit")
        reached = checkpoint.newest(place.run_dir())[0]["step"]
        assert place.states() == ["pending"]
        assert starts(place.run_dir()) == restarts
        slurm.boost(place.job())
    slurm.limit(place.job(), 60)
    started(place, slurm, reached + 100)
    assert "resumed at step" in (place.run_dir() / "train.log").read_text()


def test_node_power_cut(place: Place, slurm: SlurmCluster, undisturbed: dict[str, Any]) -> None:
    place.submit(place.grid())
    started(place, slurm)
    node = slurm.run("squeue", "-h", "-j", place.job(), "-o", "%N").strip()
    slurm.crash(node)
    slurm.mark_down(node)
    place.retry(place.grid(), "--lost")  # Slurm says NODE_FAIL for a second, which is not the end
    slurm.boost(place.job())
    finished(place, slurm)
    slurm.boot(node)
    assert len(read_sweep(place.root / "grid").jobs) == 1
    assert starts(place.run_dir()) == 2
    assert outcome(place.run_dir()) == undisturbed


def test_node_lost_for_good_then_retried(place: Place, slurm: SlurmCluster, undisturbed: dict[str, Any]) -> None:
    place.submit(place.grid())
    started(place, slurm)
    job = place.job()
    node = slurm.run("squeue", "-h", "-j", job, "-o", "%N").strip()
    slurm.run("scontrol", "update", f"JobId={job}", "Requeue=0")
    slurm.crash(node)
    slurm.mark_down(node)
    slurm.wait_for(lambda: place.states() == ["lost"], 60, "lost point")
    place.call("status", place.grid())
    place.retry(place.grid(), "--lost")
    finished(place, slurm)
    slurm.boot(node)
    assert outcome(place.run_dir()) == undisturbed


def test_cancelled_stays_so_and_goes_on_later(place: Place, slurm: SlurmCluster, undisturbed: dict[str, Any]) -> None:
    grid = place.grid()
    place.submit(grid)
    started(place, slurm)
    job = place.job()
    place.call("cancel", grid)
    slurm.wait_for(lambda: slurm.queue()[job] == "CANCELLED", 60, "cancelled job")
    time.sleep(3)
    assert slurm.queue()[job] == "CANCELLED"
    assert place.states() == ["cancelled"]
    place.submit(grid)
    started(place, slurm, 120)
    job = place.job()
    slurm.run("scancel", job)  # by hand, without our knowledge
    slurm.wait_for(lambda: place.states() == ["cancelled"], 60, "cancelled point")
    time.sleep(3)
    assert slurm.queue()[job] == "CANCELLED"
    place.submit(grid)
    finished(place, slurm)
    assert outcome(place.run_dir()) == undisturbed


# ------------------------------------------------------------------------------------------------- what goes wrong inside


def test_two_nodes_four_tasks_and_one_that_fails(place: Place, slurm: SlurmCluster, capsys: pytest.CaptureFixture[str]) -> None:
    """The first attempt loses its task 3 in the middle, the second is stopped on task 2; the third ends as a run of one process does."""
    grid, broken = place.grid(), place.folder / "broken"
    wrapper = place.folder / "python"
    fails = f"[ $SLURM_PROCID = 3 ] && [ -e {broken} ] && echo 'ECC error' >&2 && exit 9"
    wrapper.write_text(f'#!/bin/sh\n{fails}\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    broken.touch()
    file = place.folder / "clusters.toml"
    file.write_text(CLUSTERS.replace("[local_two]", f'python = "{wrapper}"\n[local_two]'))
    place.submit(grid, "two_nodes", "--", "--batch-size", "40", "--epochs", "2")  # of 10 steps: four tasks on two cores are slow
    slurm.wait_for(lambda: place.states() == ["failed"], 300, "failure")
    assert "task 3: ECC error" in place.standings()[0].detail
    broken.unlink()
    place.retry(grid, "--failed")
    started(place, slurm, 5)
    assert "batch 40 = 4 x 1 x 10" in (place.run_dir() / "train.log").read_text()
    slurm.run("scancel", "--signal=USR2", place.job())
    slurm.boost(place.job())
    finished(place, slurm)
    assert starts(place.run_dir()) == 2


def test_predecessor_still_dies(place: Place, slurm: SlurmCluster, undisturbed: dict[str, Any]) -> None:
    place.submit(place.grid())
    started(place, slurm)
    job = place.job()
    slurm.run("scontrol", "requeue", job)
    slurm.wait_for(lambda: slurm.queue()[job] == "PENDING" and not is_running(place.run_dir() / "lock", flocked_inodes()), 60, "requeue")
    with run_folder.lock(place.run_dir()):
        slurm.boost(job)
        slurm.wait_for(lambda: starts_of(place, job) == 2, 60, "second start")
        time.sleep(10)
        assert slurm.queue()[job] == "RUNNING"
        assert starts(place.run_dir()) == 1
    finished(place, slurm)
    assert outcome(place.run_dir()) == undisturbed


def test_a_full_disk(tmp_path: Path, drawn: Path, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "disk"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(small)], check=True)
    try:
        with slurm_cluster.started(nodes=1) as cluster:
            use(cluster, monkeypatch)
            place = Place(tmp_path / "disk" / "place", drawn)
            place.submit(place.grid())
            started(place, cluster)
            filler = small / "filler"
            with pytest.raises(OSError, match="No space"):
                filler.write_bytes(bytes(64 << 20))
            cluster.wait_for(lambda: place.states()[0] in ("failed", "lost"), 300, "failure")
            filler.unlink()
            place.retry(place.grid(), "--failed", "--lost")
            finished(place, cluster)
            assert outcome(place.run_dir()) == undisturbed
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


def test_status_without_accounting_and_without_a_controller(place: Place, slurm: SlurmCluster) -> None:
    assert subprocess.run(["sacct"], capture_output=True, env=os.environ | slurm.env).returncode != 0
    place.submit(place.grid())
    started(place, slurm)
    slurm.stop_controller()
    (one,) = place.standings()
    assert one.state in ("running", "unknown")  # running where the run's lock is seen
    slurm.start_controller()
    finished(place, slurm)
    assert torch.is_tensor(next(iter(checkpoint.newest(place.run_dir())[0]["model"].values())))
