"""Stand-ins for Slurm's commands: shell scripts on PATH that write down how they were called and say what a test told them to."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import pytest

from cossl.models.flags import sealed
from cossl.slurm import sweep
from cossl.slurm.folder import Job, Point, Sweep, add_points, read_sweep, record_jobs

LOG = "2026-01-01 12:00:00  "
RESULTS = {"linear_top1": {"trained": 70.25}, "knn_top1": {"trained": 60.5}, "collapsed": False}
METRICS = {"step": 500, "epoch": 50.0, "images_per_s": 2700.0}
ANSWER = """#!/bin/sh
PATH=$PATH:/usr/bin:/bin
echo "{name} $*" >> '{folder}/calls'
env > '{folder}/{name}.env'
[ -f '{folder}/{name}.err' ] && cat '{folder}/{name}.err' >&2
[ -f '{folder}/{name}.out' ] && cat '{folder}/{name}.out'
exit "$(cat '{folder}/{name}.code' 2> /dev/null || echo 0)"
"""
SBATCH = """#!/bin/sh
PATH=$PATH:/usr/bin:/bin
echo "sbatch $*" >> '{folder}/calls'
env > '{folder}/sbatch.env'
number=$(($(cat '{folder}/number' 2> /dev/null || echo 100) + 1))
echo $number > '{folder}/number'
if [ -f '{folder}/refuse' ] && [ $number -ge "$(cat '{folder}/refuse')" ]; then
    echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2
    echo 'sbatch: error: Batch job submission failed' >&2
    exit 1
fi
cp "$1" '{folder}/'$number.sh
echo "Submitted batch job $number"
"""


class FakeSlurm:
    """squeue, sacct, scontrol, scancel, srun, sbatch; each says nothing and ends with 0 until told otherwise. sbatch counts from 101."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        (folder / "bin").mkdir(parents=True)
        for name in ("squeue", "sacct", "scontrol", "scancel", "srun", "sbatch"):
            path = folder / "bin" / name
            path.write_text((SBATCH if name == "sbatch" else ANSWER).format(name=name, folder=folder))
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def says(self, name: str, out: str = "", code: int = 0, err: str = "") -> None:
        """What a command prints from now on, and its exit code."""
        for what, text in (("out", out), ("code", str(code)), ("err", err)):
            (self.folder / f"{name}.{what}").write_text(text)

    def remove(self, name: str) -> None:
        """As on a machine that does not have it: from now on the others are all that is on PATH."""
        (self.folder / "bin" / name).unlink()
        self.monkeypatch.setenv("PATH", str(self.folder / "bin"))

    def refuse_from(self, number: int) -> None:
        """sbatch refuses that job and the ones after it."""
        (self.folder / "refuse").write_text(str(number))

    def calls(self, name: str = "") -> list[str]:
        """Command lines so far, of one command or of all."""
        path = self.folder / "calls"
        return [line for line in (path.read_text().splitlines() if path.exists() else []) if line.startswith(name)]

    def environment(self, name: str) -> dict[str, str]:
        """Of the last call."""
        pairs = (line.partition("=") for line in (self.folder / f"{name}.env").read_text().splitlines())
        return {key: value for key, _, value in pairs}

    def script(self, number: int) -> str:
        """What sbatch was given as that job."""
        return (self.folder / f"{number}.sh").read_text()


def some(count: int) -> list[Point]:
    """Points that nothing can be trained from."""
    identities = [f"{i:016x}" for i in range(count)]
    return [Point(f"setting {i}", "in1k", i, one, f"in1k-{one[-4:]}", [], {"data": None, "seed": i}) for i, one in enumerate(identities)]


def made(tmp_path: Path, count: int) -> Sweep:
    """A sweep of so many of them, on disk."""
    return add_points(read_sweep(tmp_path / "sweeps" / "heads"), some(count))


def submitted(own: Sweep, jobs: list[str], grid: str = "") -> Sweep:
    """The points, or the first of them, with these jobs."""
    logs = [f"logs/{job.partition('_')[0]}/{job}_0_log.out" for job in jobs]
    lines = [
        Job(point.identity, job, grid or own.grid, "ours", "0" * 12, log, time.time(), platform.node())
        for point, job, log in zip(own.points, jobs, logs, strict=False)
    ]
    record_jobs(own.folder.parent / (grid or own.grid), lines)
    return read_sweep(own.folder)


def run_of(own: Sweep, point: Point, **files: Any) -> Path:
    """The run folder of a point: config, sealed results, metrics as JSON; log as the text of train.log."""
    path = own.run_dir(point)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"preset": "in1k", "epochs": 100, "batch_size": 4096} | point.config))
    names = {"config": "config.json", "results": "results.json", "metrics": "metrics.jsonl", "log": "train.log"}
    for key, value in files.items():
        value = sealed(value) if key == "results" and isinstance(value, dict) else value
        (path / names[key]).write_text(value if isinstance(value, str) else json.dumps(value) + "\n")
    return path


def errors(own: Sweep, job: str, task: int, text: str) -> None:
    """What a task of a job has printed as errors."""
    path = own.folder / "logs" / job.partition("_")[0] / f"{job}_{task}_log.err"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def shown(own: Sweep, capsys: pytest.CaptureFixture[str], *flags: str, verb: str = "status") -> str:
    """What the command prints."""
    sweep.main([verb, own.grid, *flags, "--root", str(own.folder.parent)])
    return capsys.readouterr().out
