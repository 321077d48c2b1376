"""A sweep's points to SLURM arrays by submitit, or to this machine: what is submitted, with which source, and the job's script.

The only file that imports submitit, which writes the script, numbers the array's elements and calls sbatch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from cossl.models.flags import replace_text
from cossl.models.run_folder import ROOT, STOP_SIGNALS, code
from cossl.models.run_status import checkpoints
from cossl.slurm import point as at_point
from cossl.slurm.clusters import Cluster
from cossl.slurm.folder import Job, Point, Sweep, record_jobs

INSTALL = "submitit is not installed: pip install -c constraints.txt -e '.[slurm]'"
DEFAULT_MAX_ARRAY_SIZE = 1001  # Slurm's own, where the controller does not say
FOLDERS = (".", "pipelines", "models", "slurm", "tools")

# ------------------------------------------------------------------------------------------------- the source


def snapshot(folder: Path, root: Path = ROOT) -> str:
    """Copies the package's source to `<folder>/code/<hash>/cossl` and returns the hash, of names and bytes; done once for each source.

    Beside it code.json says of which commit it is. Compiled kernels of numba come along, with the times by which numba knows them.
    """
    texts = {path: path.read_bytes() for part in FOLDERS for path in sorted((root / part).glob("*.py"))}
    digest = hashlib.sha256()
    for path, text in texts.items():
        digest.update(f"{path.relative_to(root)}\0{len(text)}\0".encode() + text)
    name = digest.hexdigest()[:12]
    target = folder / "code" / name
    if target.exists():
        return name
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    for path in [*texts, *(cache for folder_ in FOLDERS for cache in (root / folder_ / "__pycache__").glob("*.nb[ci]"))]:
        copy = part / "cossl" / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
        if path in texts and copy.read_bytes() != texts[path]:  # saved since: numba's kernels of it will be compiled anew
            copy.write_bytes(texts[path])
    replace_text(part / "code.json", json.dumps(code()))
    part.chmod(0o755)
    try:
        part.rename(target)
    except OSError:
        shutil.rmtree(part)
        if not target.exists():
            raise  # else another submitter was quicker
    return name


def by_source(sweep: Sweep, points: Sequence[Point], new_code: bool, say: Callable[[str], None]) -> dict[str, list[Point]]:
    """The points by the snapshot that they are to run, <grid>/code/<hash>: a run goes on with the source that it began with."""
    root, jobs, sources = sweep.folder.parent, sweep.jobs_of(), dict[str, list[Point]]()
    present = f"{sweep.grid}/code/{snapshot(sweep.folder)}"
    for point in points:
        own = next((job.code for job in jobs[point.identity] if (root / job.code / "cossl").is_dir()), present)
        sources.setdefault(own if any(checkpoints(sweep.run_dir(point))) and not new_code else present, []).append(point)
    for source, of in sources.items():
        if source != present:
            say(f"{len(of)} points go on with the source that they began with, {source}; --new-code takes the present one")
    return sources


# ------------------------------------------------------------------------------------------------- the job's script


def script_lines(sweep: Sweep, cluster: Cluster, source: Path, array: Path) -> tuple[list[str], list[str]]:
    """What the job's script does before and after srun."""
    call = f"{shlex.quote(sys.executable)} -m cossl.slurm.point"
    where = shlex.join([str(sweep.folder), str(array)])
    before = [
        *cluster.setup,
        # The folder named like the package wins over an editable install, and as working folder over a checkout that lies in another one.
        f"export PYTHONPATH={shlex.quote(str(source))}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"cd {shlex.quote(str(source))} || exit 1",
        "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not take it from sbatch since Slurm 22.05",
        "trap : TERM USR1 USR2  # the tasks have them too; this script goes on when they have ended",
        f"{call} begin {where} || exit $(( $? == {at_point.NOTHING_TO_DO} ? 0 : 1 ))",
    ]
    return before, ["code=$?", f"{call} end {where} $code", "exit $code"]


def sbatch_parameters(sweep: Sweep, cluster: Cluster, source: Path, array: Path, parallel: int) -> dict[str, Any]:
    """What submitit makes the script of."""
    before, after = script_lines(sweep, cluster, source, array)
    given: dict[str, str | int] = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
    }
    gpus = f"{cluster.gpu}:{cluster.gpus_per_node}" if cluster.gpu else cluster.gpus_per_node
    given |= {"gpus_per_node": gpus if cluster.gpus_per_node else "", "mem": f"{cluster.mem_gib * 1024:.0f}M" if cluster.mem_gib else ""}
    return {
        **{name: value for name, value in given.items() if value != ""},
        "job_name": f"cossl-{sweep.grid}",
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.tasks,
        "cpus_per_task": cluster.cpus_per_task,
        "time": cluster.time_min,
        "signal_delay_s": cluster.signal_before_end_s,
        "array_parallelism": parallel,
        "wckey": None,
        "additional_parameters": {"requeue": True, **cluster.sbatch},
        "setup": before,
        "teardown": after,
        # A task that fails takes the others of its step along, which would wait for it for an hour. One that is done does not, whatever
        # the site's WaitTime: the first evaluates alone.
        "srun_args": ["--kill-on-bad-exit=1", "--wait=0", *cluster.srun_args],
    }


def script(sweep: Sweep, cluster: Cluster, count: int, parallel: int) -> str:
    """The text that sbatch would get for an array of so many points."""
    slurm = _submitit().slurm.slurm
    parameters = sbatch_parameters(sweep, cluster, sweep.folder / "code" / "<hash>", sweep.folder / "arrays" / "<number>.json", parallel)
    command = f"{python(cluster)} -u -m submitit.core._submit {shlex.quote(str(_logs(sweep)))}"
    text: str = slurm._make_sbatch_string(command, _logs(sweep), map_count=count if count > 1 else None, **parameters)
    return text


def python(cluster: Cluster) -> str:
    """The command that starts Python in the tasks."""
    return cluster.python or shlex.quote(sys.executable)


def _logs(sweep: Sweep) -> Path:
    return sweep.folder / "logs" / "%A"


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise ImportError(INSTALL) from error
    return submitit


# ------------------------------------------------------------------------------------------------- to SLURM


def submit_slurm(
    sweep: Sweep, points: Sequence[Point], cluster: Cluster, parallel: int, say: Callable[[str], None], new_code: bool = False
) -> list[Job]:
    """Submits the points in arrays that the site allows, each recorded in jobs.jsonl as soon as it is submitted. Does not wait for any.

    parallel: points at a time, so that of several arrays each waits for the one before; 0 = no limit. RuntimeError saying how many were
    submitted, if sbatch refuses one.
    """
    submitit = _submitit()
    if shutil.which("sbatch") is None:
        raise RuntimeError("no sbatch here: submit from a login node of the cluster, or use --cluster local")
    largest, done = cluster.max_array_size or max_array_size(), list[Job]()
    sources = by_source(sweep, points, new_code, say)
    chunks = [(name, of[first : first + largest]) for name, of in sources.items() for first in range(0, len(of), largest)]
    (sweep.folder / "arrays").mkdir(exist_ok=True)
    for source, chunk in chunks:
        array = sweep.folder / "arrays" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{len(done)}.json"
        replace_text(array, json.dumps([point.identity for point in chunk]))
        parameters = sbatch_parameters(sweep, cluster, sweep.folder.parent / source, array, parallel or len(points))
        if parallel and done:
            parameters["dependency"] = f"afterany:{done[-1].job.partition('_')[0]}"
        with _plain_environment(say if chunk is chunks[0][1] else lambda line: None):
            executor = submitit.SlurmExecutor(_logs(sweep), python=python(cluster))
            executor.update_parameters(**parameters)
            try:
                jobs = executor.map_array(at_point.run, *zip(*[(str(sweep.folder), str(array), cluster.scratch)] * len(chunk), strict=True))
            except Exception as error:  # submitit's own kind, with sbatch's words in its text
                words = [line for line in str(error).splitlines() if "sbatch: error" in line] or [str(error).strip().splitlines()[-1]]
                raise RuntimeError(f"{len(done)} of {len(points)} points submitted, then: {words[0]}") from error
        place, now = (sweep.grid, cluster.name, source), time.time()
        new = [Job(p.identity, j.job_id, *place, _log(j.job_id), now, platform.node()) for p, j in zip(chunk, jobs, strict=True)]
        record_jobs(sweep.folder, new)
        done += new
        say(f"job {new[0].job.partition('_')[0]}: {len(new)} points")
    return done


def _log(job: str) -> str:
    return f"logs/{job.partition('_')[0]}/{job}_0_log.out"


def max_array_size() -> int:
    """Elements that an array may have, as the controller says; Slurm's default where it does not."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=60, check=True).stdout
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", said, re.MULTILINE)
        if found:
            return max(1, int(found[1]))
    return DEFAULT_MAX_ARRAY_SIZE


@contextlib.contextmanager
def _plain_environment(say: Callable[[str], None]) -> Iterator[None]:
    """Without the variables of the job that the submitter itself may be in, which submitit and sbatch would take for the new one's, and
    without SBATCH_*, which would win over the script."""
    names = [name for name in os.environ if name.startswith(("SLURM_", "SLURMD_", "SUBMITIT_", "SBATCH_")) and name != "SLURM_CONF"]
    unused = [name for name in names if name.startswith("SBATCH_")]
    if unused:
        say(f"{', '.join(unused)} in the environment: not used, a sweep's jobs are as the cluster's record says")
    inside = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(inside)


# ------------------------------------------------------------------------------------------------- to this machine


def queue_local(sweep: Sweep, points: Sequence[Point], cluster: Cluster, say: Callable[[str], None], new_code: bool = False) -> list[Job]:
    """Records the points as jobs of this process, before any is started, so that no other sweep takes them."""
    sources = [(source, point) for source, of in by_source(sweep, points, new_code, say).items() for point in of]
    names = [f"local-{os.getpid()}-{time.time_ns()}.{number}" for number in range(len(sources))]
    jobs = [
        Job(point.identity, name, sweep.grid, cluster.name, source, f"logs/{point.run}-{name}.out", time.time(), platform.node())
        for name, (source, point) in zip(names, sources, strict=True)
    ]
    record_jobs(sweep.folder, jobs)
    return jobs


def run_local(sweep: Sweep, jobs: Sequence[Job], cluster: Cluster, parallel: int, say: Callable[[str], None]) -> None:
    """Runs the jobs here, so many at a time, each in a process of its own, and waits for them; a failed one does not stop the others.

    Stop signals and Ctrl-C are passed on: every run writes a checkpoint. SystemExit with 130 then, and with 1 if one failed.
    """
    points, slots = {point.identity: point for point in sweep.points}, list(range(max(1, parallel)))
    queue, running = list(jobs), dict[subprocess.Popen[bytes], tuple[Job, int]]()
    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu] or _gpus()
    (sweep.folder / "logs").mkdir(exist_ok=True)
    stopped, told, failed = list[int](), False, 0
    with _signals(stopped):
        while running or (queue and not stopped):
            while queue and slots and not stopped:
                job, slot = queue.pop(0), slots.pop(0)
                running[_start(sweep, points[job.point], job, cluster, gpus[slot % len(gpus)] if gpus else "")] = job, slot
            if stopped and not told:
                told = True
                for process in running:
                    process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                job, slot = running.pop(process)
                slots.append(slot)
                ended = process.returncode if process.returncode >= 0 else 128 - process.returncode
                if not at_point.was_stopped(ended, 1):
                    at_point.record(sweep.folder, job.job, ended, "" if ended else "finished")
                    failed += bool(ended)
                how = f"ended with code {ended}, see {sweep.folder / job.log}" if ended else "done"
                say(f"{points[job.point].run}: {how} ({len(queue) + len(running)} left)")
    if stopped:
        raise SystemExit(130)
    if failed:
        raise SystemExit(1)


def _start(sweep: Sweep, point: Point, job: Job, cluster: Cluster, gpu: str) -> subprocess.Popen[bytes]:
    source, log = sweep.folder.parent / job.code, sweep.folder / job.log
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(source), *filter(None, [os.environ.get("PYTHONPATH")])])}
    environment |= at_point.tracker_id(point) | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
    with open(log, "ab") as out, open(log.with_suffix(".err"), "ab") as err:
        command = at_point.trainer(sweep, point, cluster.scratch)
        return subprocess.Popen(command, stdout=out, stderr=err, env=environment, cwd=source, start_new_session=True)


def _gpus() -> list[str]:
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


@contextlib.contextmanager
def _signals(came: list[int]) -> Iterator[None]:
    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, note) for number in (*STOP_SIGNALS, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_debug(sweep: Sweep, points: Sequence[Point], say: Callable[[str], None]) -> None:
    """Runs the points in this process, one after the other, from the source at hand; the first that fails ends it, with its traceback."""
    from cossl.train import main

    for number, point in enumerate(points):
        say(f"{number + 1} of {len(points)}: {point.run}")
        main(at_point.trainer(sweep, point)[4:])
