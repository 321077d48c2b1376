"""The record of a cluster: how it is read, what is refused and in which words, where its file is."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from cossl.slurm import clusters
from cossl.slurm.clusters import BUILT_IN, Cluster, default_file, load_cluster, read_clusters

FULL = """
[ours]
partition = "gpu"
account = "vision"
qos = "long"
constraint = "h200&ib"
nodes = 2
gpus_per_node = 8
gpu = "h200"
cpus_per_task = 24
mem_gib = 512
time_min = 2880
signal_before_end_s = 300
setup = ["module load cuda", "export X='a b'"]
python = "apptainer exec --nv image.sif python"
srun_args = ["--mpi=none"]
scratch = "$TMPDIR"
max_array_size = 500
parallel = 16
[ours.sbatch]
reservation = "icml"
exclude = "n7"

[cpus]
gpus_per_node = 0
tasks_per_node = 4

[workstation]
kind = "local"
parallel = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "clusters.toml").write_text(FULL)
    return tmp_path / "clusters.toml"


def test_a_record_is_read_whole(file: Path) -> None:
    assert load_cluster("ours", file) == Cluster(
        name="ours",
        partition="gpu",
        account="vision",
        qos="long",
        constraint="h200&ib",
        nodes=2,
        gpus_per_node=8,
        gpu="h200",
        cpus_per_task=24,
        mem_gib=512,
        time_min=2880,
        signal_before_end_s=300,
        setup=("module load cuda", "export X='a b'"),
        python="apptainer exec --nv image.sif python",
        srun_args=("--mpi=none",),
        scratch="$TMPDIR",
        max_array_size=500,
        parallel=16,
        sbatch={"reservation": "icml", "exclude": "n7"},
    )
    assert (load_cluster("ours", file).tasks, load_cluster("ours", file).gpus) == (8, 16)


def test_what_is_not_given_is_the_default(file: Path) -> None:
    assert load_cluster("cpus", file) == Cluster("cpus", gpus_per_node=0, tasks_per_node=4)
    assert (load_cluster("cpus", file).tasks, load_cluster("cpus", file).gpus) == (4, 0)
    assert (Cluster(gpus_per_node=0).tasks, Cluster().tasks) == (1, 1)
    workstation = load_cluster("workstation", file)
    assert (workstation.kind, workstation.parallel, workstation.gpus_per_node) == ("local", 3, 0)


def test_two_clusters_need_no_file_and_a_file_may_have_its_own(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "nothing here"))
    for name, kind in (("local", "local"), ("debug", "debug")):
        assert load_cluster(name) == load_cluster(name, file) == BUILT_IN[name]
        assert (BUILT_IN[name].kind, BUILT_IN[name].gpus) == (kind, 0)
    file.write_text('[local]\nkind = "local"\nparallel = 8\n')
    assert load_cluster("local", file).parallel == 8
    file.write_text('[local]\npartition = "gpu"\n')
    assert load_cluster("local", file).kind == "slurm"


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in (None, ""):
        monkeypatch.delenv("XDG_CONFIG_HOME", raising=False) if value is None else monkeypatch.setenv("XDG_CONFIG_HOME", value)
        assert default_file() == tmp_path / "home" / ".config" / "cossl" / "clusters.toml"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "cossl").mkdir()
    (tmp_path / "cossl" / "clusters.toml").write_text(FULL)
    assert load_cluster("cpus").tasks == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[a]\npartitions = "x"', "[a] has an unknown key 'partitions': did you mean partition?"),
        ("[a]\nzzz = 1", "[a] has an unknown key 'zzz': expected kind, partition, account, qos, .*"),
        ('[a]\nname = "b"', "[a] has an unknown key 'name': .*"),
        ("[a]\npartition = 3", "[a] partition = 3: expected a string"),
        ('[a]\nnodes = "2"', "[a] nodes = '2': expected a whole number"),
        ("[a]\nnodes = 2.0", "[a] nodes = 2.0: expected a whole number"),
        ("[a]\nnodes = true", "[a] nodes = True: expected a whole number"),
        ('[a]\nmem_gib = "64G"', "[a] mem_gib = '64G': expected a number"),
        ("[a]\nmem_gib = false", "[a] mem_gib = False: expected a number"),
        ('[a]\nsetup = "module load cuda"', "[a] setup = 'module load cuda': expected a list of strings"),
        ("[a]\nsrun_args = [1]", "[a] srun_args = [1]: expected a list of strings"),
        ("[a]\nsbatch = {exclude = 7}", "[a] sbatch = {'exclude': 7}: expected a table of strings"),
        ('[a]\nkind = "pbs"', "[a] kind = 'pbs': expected slurm or local or debug"),
        ('[a]\nkind = ["slurm"]', "[a] kind = ['slurm']: expected slurm or local or debug"),
        ("[a]\nnodes = 0", "cluster a: nodes = 0: expected 1 or more"),
        ("[a]\ngpus_per_node = -1", "cluster a: gpus_per_node = -1: expected 0 or more"),
        ("[a]\nparallel = -1", "cluster a: parallel = -1: expected 0 or more"),
        ("[a]\nmem_gib = nan", "cluster a: mem_gib = nan: expected 0 or more"),
        ("[a]\ngpus_per_node = 8\ntasks_per_node = 4", "cluster a: tasks_per_node = 4: each of the 8 GPUs of a node has one process, .*"),
        ("[a]\ntime_min = 3", "cluster a: signal_before_end_s = 180: expected less than the 180 s of time_min = 3"),
        ('[a]\nsbatch = {signal = "USR1@9"}', "cluster a: sbatch.signal is set by the sweep itself: leave it out"),
        ('[a]\nsbatch = {open_mode = "append"}', "cluster a: sbatch.open_mode is set by the sweep itself: leave it out"),
        ('[a]\nsbatch = {time = "1:00"}', "cluster a: sbatch.time has a key of its own: give time_min beside sbatch"),
        ('[a]\nsbatch = {ntasks_per_node = "2"}', "cluster a: sbatch.ntasks_per_node has a key .*: give tasks_per_node beside sbatch"),
        ('partition = "gpu"', "partition stands outside a table: put it under [<cluster>]"),
        ("[a", "is no TOML: .*"),
    ],
)
def test_a_wrong_record_is_one_line_that_names_file_table_and_key(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    expected = re.escape(message).replace(re.escape(".*"), ".*")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}:? {expected}$") as caught:
        load_cluster("a", file)
    assert "\n" not in str(caught.value)


def test_every_record_of_a_file_is_checked(file: Path) -> None:
    file.write_text(FULL + "\n[bad]\nnode = 1\n")
    with pytest.raises(ValueError, match=r"\[bad\] has an unknown key 'node': did you mean nodes\?$"):
        load_cluster("ours", file)


def test_an_unknown_cluster_is_told(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "nothing here"))
    for name, path, message in (
        ("our", file, f"unknown cluster 'our' in {file}: did you mean ours?"),
        ("x", file, f"unknown cluster 'x' in {file}: expected one of ours, cpus, workstation, local, debug, or add a table [x] there"),
        ("locla", None, f"unknown cluster 'locla' in {default_file()}: did you mean local?"),
        ("local", tmp_path / "no.toml", f"{tmp_path / 'no.toml'} does not exist: write it, or give another file"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            load_cluster(name, path)


def test_every_option_with_a_key_of_its_own_names_that_key() -> None:
    keys = set(Cluster.__dataclass_fields__)
    assert set(clusters.HAVE_A_KEY.values()) <= keys
    assert not set(clusters.HAVE_A_KEY) & set(clusters.SET_BY_THE_SWEEP)


def test_reading_clusters_leaves_the_environment_alone(file: Path) -> None:
    before = dict(os.environ)
    assert list(read_clusters(file)) == ["ours", "cpus", "workstation"]
    assert dict(os.environ) == before
