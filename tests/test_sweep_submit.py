"""What is submitted and with which source, by stand-ins for Slurm's commands: nothing of Slurm is needed.

golden/sbatch-*.txt are the whole scripts that sbatch gets. After a wanted change write them anew, and read the difference:

    COSSL_WRITE_GOLDEN=1 python -m pytest tests/test_sweep_submit.py -k golden; git diff tests/golden
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm, made

from cossl.slurm import folder, submit, sweep
from cossl.slurm import point as at_point
from cossl.slurm.clusters import Cluster
from cossl.slurm.folder import read_sweep
from cossl.slurm.submit import submit_slurm

GOLDEN = Path(__file__).parent / "golden"
CLUSTERS = {  # record, points, points at a time
    "cpus": ({"partition": "cpu", "gpus_per_node": 0, "tasks_per_node": 2, "cpus_per_task": 4, "time_min": 60}, 1, 0),
    "gpu": ({"partition": "gpu", "scratch": "$TMPDIR"}, 3, 0),
    "nodes": (
        {
            "partition": "gpu",
            "account": "vision",
            "qos": "long",
            "constraint": "ib&h200",
            "nodes": 2,
            "gpus_per_node": 8,
            "gpu": "h200",
            "cpus_per_task": 24,
            "mem_gib": 1.5,
            "time_min": 2880,
            "signal_before_end_s": 300,
            "setup": ("module load cuda", "export NCCL_SOCKET_IFNAME='ib 0'"),
            "python": "apptainer exec --nv 'my image.sif' python",
            "srun_args": ("--mpi=none", "--comment=two words"),
            "sbatch": {"reservation": "icml", "exclude": "n[7-9]", "wckey": "ssl"},
        },
        4,
        2,
    ),
}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH", "SUBMITIT"))]:
        monkeypatch.delenv(name)
    return FakeSlurm(tmp_path / "fake", monkeypatch)


@pytest.fixture
def no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "snapshot", lambda folder: "0123456789ab")


def quiet(line: str) -> None:
    pass


# ------------------------------------------------------------------------------------------------- the script


@pytest.mark.usefixtures("no_copy")
@pytest.mark.parametrize("name", CLUSTERS)
def test_the_script_is_the_golden_one(tmp_path: Path, fake: FakeSlurm, name: str) -> None:
    record, count, parallel = CLUSTERS[name]
    cluster, own = Cluster("ours", **record), made(tmp_path, count)
    submit_slurm(own, own.points, cluster, parallel, quiet)
    (array,) = (own.folder / "arrays").iterdir()
    paths = {array.stem: "<number>", "0123456789ab": "<hash>", str(own.folder): "<sweeps>/heads", sys.executable: "<python>"}
    text = fake.script(101)
    for path, word in paths.items():
        text = text.replace(path, word)
    assert str(tmp_path) not in text
    if os.environ.get("COSSL_WRITE_GOLDEN"):
        (GOLDEN / f"sbatch-{name}.txt").write_text(text)
    assert text == (GOLDEN / f"sbatch-{name}.txt").read_text()


@pytest.mark.usefixtures("no_copy")
@pytest.mark.parametrize("name", CLUSTERS)
def test_the_plan_shows_the_script_that_is_submitted(tmp_path: Path, fake: FakeSlurm, name: str) -> None:
    record, count, parallel = CLUSTERS[name]
    cluster, own = Cluster("ours", **record), made(tmp_path, count)
    planned = submit.script(own, cluster, count, parallel or count)
    assert not list(own.folder.glob("arrays")) + fake.calls()
    submit_slurm(own, own.points, cluster, parallel, quiet)
    (array,) = (own.folder / "arrays").iterdir()
    sent = fake.script(101).replace(array.stem, "<number>").replace("0123456789ab", "<hash>")
    assert planned.replace("'", "") == sent.replace("'", "")  # < and > are quoted


def test_the_script_is_one_that_bash_runs(tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """begin, srun, end, in this order and with this environment; nothing more if begin says that nothing is to be done."""
    interpreter = tmp_path / "it's python"
    interpreter.write_text(
        f'#!/bin/sh\necho "python $*" >> {fake.folder}/calls\nenv > {fake.folder}/python.env\n[ "$3" = begin ] && exit $CODE\n'
    )
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    monkeypatch.setattr(submit, "snapshot", lambda folder: "0123456789ab")
    own = made(tmp_path / "a folder", 1)
    (own.folder / "code" / "0123456789ab").mkdir(parents=True)
    submit_slurm(own, own.points, Cluster("ours", setup=("export MINE='a b'",)), 0, quiet)
    for code, ends in ((0, 7), (3, 0), (1, 1), (2, 1)):
        (fake.folder / "calls").unlink()
        fake.says("srun", code=7)
        environment = os.environ | {"CODE": str(code), "SLURM_CPUS_PER_TASK": "12", "PYTHONPATH": "/before"}
        assert subprocess.run(["bash", fake.folder / "101.sh"], env=environment, cwd=tmp_path).returncode == ends
        called = [line.split()[:2] if line.startswith("srun") else line.split(" ")[:4] for line in fake.calls()]
        start = [["python", "-m", "cossl.slurm.point", "begin"]]
        assert called == (start if code else [*start, ["srun", "--unbuffered"], ["python", "-m", "cossl.slurm.point", "end"]])
        if not code:
            assert fake.calls()[-1].endswith(" 7")
            seen, source = fake.environment("srun"), str(own.folder / "code" / "0123456789ab")
            assert (seen["MINE"], seen["SRUN_CPUS_PER_TASK"], seen["PWD"]) == ("a b", "12", source)
            assert seen["PYTHONPATH"] == f"{source}:/before"


def test_a_signal_to_the_script_does_not_keep_it_from_the_end(tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """bash waits for srun, then calls `end` with srun's code and not with that of the trap."""
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\necho "$3 $6" >> {fake.folder}/calls\n')
    interpreter.chmod(0o755)
    (fake.folder / "bin" / "srun").write_text(f"#!/bin/sh\necho srun >> {fake.folder}/calls\nsleep 0.5\nexit 85\n")
    monkeypatch.setattr(sys, "executable", str(interpreter))
    monkeypatch.setattr(submit, "snapshot", lambda folder: "0123456789ab")
    own = made(tmp_path, 1)
    (own.folder / "code" / "0123456789ab").mkdir(parents=True)
    submit_slurm(own, own.points, Cluster("ours"), 0, quiet)
    process = subprocess.Popen(["bash", fake.folder / "101.sh"])
    while "srun" not in fake.calls():
        time.sleep(0.01)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        process.send_signal(number)
    assert process.wait() == 85
    assert fake.calls()[-3:] == ["begin ", "srun", "end 85"]


# ------------------------------------------------------------------------------------------------- arrays


@pytest.mark.usefixtures("no_copy")
def test_arrays_are_split_and_recorded(tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.says("scontrol", "Configuration data as of now\nMaxArraySize            = 2\nMaxJobCount             = 10000\n")
    own, told = made(tmp_path, 5), list[str]()
    before = time.time()
    jobs = submit_slurm(own, own.points, Cluster("ours"), 0, told.append)
    assert fake.calls("scontrol") == ["scontrol show config"]
    assert [job.job for job in jobs] == ["101_0", "101_1", "102_0", "102_1", "103"]
    assert [job.log for job in jobs][1::3] == ["logs/101/101_1_0_log.out", "logs/103/103_0_log.out"]
    assert told == ["job 101: 2 points", "job 102: 2 points", "job 103: 1 points"]
    again = read_sweep(own.folder)
    assert again.jobs == jobs
    assert [job.point for job in jobs] == [point.identity for point in own.points]
    assert all(before <= job.time <= time.time() and job[2:5] == ("heads", "ours", "heads/code/0123456789ab") for job in jobs)
    arrays = sorted((own.folder / "arrays").iterdir(), key=lambda path: int(path.stem.rpartition("-")[2]))
    for number, array in zip((101, 102, 103), arrays, strict=True):
        assert f"begin {own.folder} {array} " in fake.script(number)
        assert ("#SBATCH --array=0-1%2\n" in fake.script(number)) == (number < 103)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert at_point.point_of(again, arrays[1]) == own.points[3]
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    assert at_point.point_of(again, arrays[2]) == own.points[4]


@pytest.mark.usefixtures("no_copy")
def test_what_a_task_unpickles_is_a_call_by_name(tmp_path: Path, fake: FakeSlurm) -> None:
    """So that the snapshot's `run` is called and nothing of the submitter's memory."""
    own = made(tmp_path, 2)
    submit_slurm(own, own.points, Cluster("ours", scratch="$TMPDIR"), 0, quiet)
    (array,) = (own.folder / "arrays").iterdir()
    for task in range(2):
        with open(own.folder / "logs" / "101" / f"101_{task}_submitted.pkl", "rb") as file:
            delayed = pickle.load(file)
        assert delayed.function is at_point.run
        assert delayed.args == (str(own.folder), str(array), "$TMPDIR")
        assert delayed.kwargs == {}


@pytest.mark.usefixtures("no_copy")
@pytest.mark.parametrize("parallel", [0, 1, 2])
def test_with_a_limit_an_array_waits_for_the_one_before(tmp_path: Path, fake: FakeSlurm, parallel: int) -> None:
    own = made(tmp_path, 6)
    submit_slurm(own, own.points, Cluster("ours", max_array_size=3), parallel, quiet)
    assert fake.calls("scontrol") == []
    assert all(f"#SBATCH --array=0-2%{parallel or 3}\n" in fake.script(number) for number in (101, 102))
    assert "--dependency" not in fake.script(101)
    assert ("#SBATCH --dependency=afterany:101\n" in fake.script(102)) == bool(parallel)


@pytest.mark.usefixtures("no_copy")
def test_what_was_submitted_before_a_refusal_is_recorded(tmp_path: Path, fake: FakeSlurm) -> None:
    own = made(tmp_path, 5)
    fake.refuse_from(102)
    with pytest.raises(RuntimeError) as caught:
        submit_slurm(own, own.points, Cluster("ours", max_array_size=2), 0, quiet)
    assert str(caught.value) == "2 of 5 points submitted, then: sbatch: error: QOSMaxSubmitJobPerUserLimit"
    assert [job.job for job in read_sweep(own.folder).jobs] == ["101_0", "101_1"]
    assert len(fake.calls("sbatch")) == 2


@pytest.mark.usefixtures("no_copy")
def test_the_job_that_the_submitter_is_in_is_not_handed_on(tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = {
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_JOB_ID": "9",
        "SLURMD_NODENAME": "n1",
        "SUBMITIT_EXECUTOR": "slurm",
        "SBATCH_NO_REQUEUE": "1",  # would win over the script
    }
    kept = {"SLURM_CONF": "/x/slurm.conf"}
    for name, value in (inside | kept).items():
        monkeypatch.setenv(name, value)
    own, told = made(tmp_path, 2), list[str]()
    jobs = submit_slurm(own, own.points, Cluster("ours"), 0, told.append)
    assert told[0] == "SBATCH_NO_REQUEUE in the environment: not used, a sweep's jobs are as the cluster's record says"
    assert [job.job for job in jobs] == ["101_0", "101_1"]
    seen = fake.environment("sbatch")
    assert not inside.keys() & seen.keys()
    assert kept.items() <= seen.items()
    assert (inside | kept).items() <= os.environ.items()


@pytest.mark.parametrize(
    ("said", "code", "expected"),
    [("MaxArraySize            = 4001\n", 0, 4001), ("MaxArraySize=0\n", 0, 1), ("", 0, 1001), ("MaxArraySize = 5\n", 1, 1001)],
)
def test_how_large_an_array_may_be(fake: FakeSlurm, said: str, code: int, expected: int) -> None:
    fake.says("scontrol", said, code)
    assert submit.max_array_size() == expected


def test_where_there_is_no_slurm_or_no_submitit_it_is_told(tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert submit.max_array_size() == 1001
    own = made(tmp_path, 1)
    with pytest.raises(RuntimeError, match=r"^no sbatch here: submit from a login node of the cluster, or use --cluster local$"):
        submit_slurm(own, own.points, Cluster("ours"), 0, quiet)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ImportError, match=r"^submitit is not installed: pip install -c constraints.txt -e '.\[slurm\]'$"):
        submit_slurm(own, own.points, Cluster("ours"), 0, quiet)
    assert [path.name for path in own.folder.iterdir()] == ["sweep.json"]


# ------------------------------------------------------------------------------------------------- cossl sweep submit


class Site:
    """A cluster file, a folder for pictures, and `cossl sweep` with them."""

    def __init__(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        self.root, self.file, self.capsys = tmp_path / "sweeps", tmp_path / "clusters.toml", capsys
        self.file.write_text('[ours]\npartition = "gpu"\nparallel = 8\nmax_array_size = 100\n')
        self.pictures = tmp_path / "pictures"
        self.pictures.mkdir()

    def __call__(self, verb: str, grid: str, *flags: str) -> list[str]:
        on = ["--cluster", "ours", "--cluster-file", str(self.file), "--data", str(self.pictures)] if verb in ("plan", "submit") else []
        sweep.main([verb, grid, *on, "--root", str(self.root), *flags])
        return self.capsys.readouterr().out.splitlines()

    def jobs(self, grid: str) -> list[str]:
        return [job.job for job in read_sweep(self.root / grid).jobs]


@pytest.fixture
def site(tmp_path: Path, capsys: pytest.CaptureFixture[str], no_copy: None) -> Site:
    return Site(tmp_path, capsys)


def pending(*jobs: str) -> str:
    return "".join(f"{job}|PENDING|Priority\n" for job in jobs)


def test_twice_submits_nothing_twice(fake: FakeSlurm, site: Site) -> None:
    assert site("submit", "weighting", "--seeds", "0", "1")[-2:] == [
        "job 101: 6 points",
        f"next: cossl sweep status weighting --root {site.root}",
    ]
    fake.says("squeue", pending(*site.jobs("weighting")))
    assert site("submit", "weighting", "--seeds", "0", "1") == ["6 of 6 points pending, left alone", "nothing to submit"]
    assert len(fake.calls("sbatch")) == 1
    fake.says("squeue", code=1, err="slurm_load_jobs error: Unable to contact slurm controller\n")
    assert site("submit", "weighting", "--seeds", "0", "1") == ["6 of 6 points unknown, left alone", "nothing to submit"]
    assert len(fake.calls("sbatch")) == 1


def test_what_is_new_is_submitted_and_the_rest_left_alone(fake: FakeSlurm, site: Site) -> None:
    site("submit", "weighting", "--seeds", "0")
    fake.says("squeue", pending(*site.jobs("weighting")))
    assert site("submit", "weighting", "--seeds", "0", "1")[:2] == ["3 of 6 points pending, left alone", "job 102: 3 points"]
    assert len(read_sweep(site.root / "weighting").points) == 6
    fake.says("squeue", pending(*site.jobs("weighting")))
    assert site("submit", "weighting", "--seeds", "0", "--", "--epochs", "50")[0] == "job 103: 3 points"
    assert len(read_sweep(site.root / "weighting").points) == 9


def test_a_point_of_another_grid_is_not_run_again(fake: FakeSlurm, site: Site) -> None:
    site("submit", "weighting", "--seeds", "0")
    fake.says("squeue", pending(*site.jobs("weighting")))
    assert site("submit", "heads", "--seeds", "0")[:2] == ["1 of 4 points pending, left alone", "job 102: 3 points"]
    assert site.jobs("heads") == ["101_1", "102_0", "102_1", "102_2"]


def test_two_that_submit_at_once_run_each_point_once(fake: FakeSlurm, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second has read its arguments and the sweep when the first submits."""
    real = folder.held

    @contextlib.contextmanager
    def after_another(root: Path, wait_s: float = 60) -> Iterator[None]:
        monkeypatch.setattr(sweep, "held", real)
        site("submit", "weighting", "--seeds", "0", "1")
        fake.says("squeue", pending(*site.jobs("weighting")))
        with real(root, wait_s):
            yield

    monkeypatch.setattr(sweep, "held", after_another)
    assert site("submit", "weighting", "--seeds", "1", "2")[:2] == ["3 of 6 points pending, left alone", "job 102: 3 points"]
    assert sorted(point.seed for point in read_sweep(site.root / "weighting").points) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(set(site.jobs("weighting"))) == 9


def test_while_another_submits_one_waits_and_then_says_so(site: Site, monkeypatch: pytest.MonkeyPatch, fake: FakeSlurm) -> None:
    monkeypatch.setattr(sweep, "held", lambda root: folder.held(root, wait_s=0.1))
    with folder.held(site.root), pytest.raises(ValueError, match=r"sweeps: another `cossl sweep` is submitting there: wait for it$"):
        site("submit", "weighting")
    assert fake.calls("sbatch") == []


def test_the_plan_submits_nothing_and_writes_nothing(fake: FakeSlurm, site: Site) -> None:
    said = site("plan", "ablation_plan", "--images-per-s", "1000")
    assert not site.root.exists()
    assert fake.calls("sbatch") == []
    assert "1 arrays of at most 100 elements; the script of the first:" in said
    assert "#SBATCH --array=0-71%8" in said
    assert any(line.startswith("72 points, 1,787.9 GPU-hours; not done: 72,") for line in said)
    assert any(line.startswith("GPU-hours at 1,000 images/s a GPU (as given, not measured)") for line in said)


def test_points_at_a_time_come_from_the_command_else_from_the_record(fake: FakeSlurm, site: Site) -> None:
    site("submit", "weighting", "--seeds", "0", "--parallel", "2")
    site("submit", "heads", "--presets", "in100")
    assert "#SBATCH --array=0-2%2" in fake.script(101)
    assert "#SBATCH --array=0-11%8" in fake.script(102)


def test_pictures_that_are_not_there_are_told_before_anything_is_submitted(fake: FakeSlurm, site: Site, tmp_path: Path) -> None:
    own = ["--cluster", "ours", "--cluster-file", str(site.file), "--root", str(site.root)]
    for flags, message in (
        ([], "in1k needs pictures: give --data in1k=<folder>, see cossl convert"),
        (["--data", str(tmp_path / "no")], f"--data {tmp_path / 'no'}: there is no such folder"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            sweep.main(["submit", "heads", *own, *flags])
    assert not site.root.exists()
    assert fake.calls() == []
