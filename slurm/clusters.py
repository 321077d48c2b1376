"""What a cluster is to a sweep: a small record, read from a TOML file that holds nothing but such records.

`~/.config/cossl/clusters.toml`, or the file of --cluster-file, has a table for each cluster:

    [ours]
    partition = "gpu"
    account = "vision"
    gpus_per_node = 8
    time_min = 1440
    setup = ["module load cuda"]

Two clusters need no file: `local`, this machine, some points at a time; `debug`, this very process, one point after the other.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

Kind = Literal["slurm", "local", "debug"]
SET_BY_THE_SWEEP = "array output error open-mode signal requeue no-requeue job-name chdir".split()
HAVE_A_KEY = {name: name for name in ("partition", "account", "qos", "constraint", "nodes")} | {
    "ntasks-per-node": "tasks_per_node",
    "cpus-per-task": "cpus_per_task",
    "gpus-per-node": "gpus_per_node",
    "mem": "mem_gib",
    "time": "time_min",
}
"""Options of sbatch that would stand in the script twice, or change what the estimate rests on."""


@dataclass(frozen=True)
class Cluster:
    """Where the points of a sweep run, and what each of them gets. Only what is given reaches sbatch."""

    name: str = "local"
    kind: Kind = "slurm"
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    nodes: int = 1
    """Nodes of each point."""
    gpus_per_node: int = 1
    """GPUs, and so processes, of each point on each node. 0: a cluster of CPUs."""
    gpu: str = ""
    """Type of GPU as the site spells it (h200): asked for, and looked up among the benchmark files for the estimate of GPU-hours."""
    tasks_per_node: int = 0
    """Processes of a point on each node; 0 = one a GPU, or one where there are none."""
    cpus_per_task: int = 12
    mem_gib: float = 0.0
    """Memory of each node; 0 = the site's default."""
    time_min: int = 1440
    """Time limit of a job. Not of a point: a job that reaches it writes a checkpoint and is queued again."""
    signal_before_end_s: int = 180
    """SIGUSR2 so many seconds before the time limit (Slurm may send it up to 60 s early)."""
    setup: tuple[str, ...] = ()
    """Lines of shell before the program: modules, proxies."""
    python: str = ""
    """Command that starts Python in the tasks, where it is in a container; default the interpreter that submits."""
    srun_args: tuple[str, ...] = ()
    """Further arguments of srun, for a container for one."""
    scratch: str = ""
    """Folder on each node's own disk, in the node's words ($TMPDIR): betons are copied there first, once a node."""
    max_array_size: int = 0
    """Elements that one array may have; 0 = ask the controller (scontrol show config), 1,001 if it does not say."""
    parallel: int = 0
    """Points at a time: of each array, or on this machine; 0 = no limit, locally one."""
    sbatch: Mapping[str, str] = field(default_factory=dict)
    """Any further options of sbatch: {"reservation": "icml", "exclude": "n7"}."""

    def __post_init__(self) -> None:
        least = {"nodes": 1, "gpus_per_node": 0, "tasks_per_node": 0, "cpus_per_task": 1, "time_min": 1, "signal_before_end_s": 1}
        for name, low in (least | {"max_array_size": 0, "parallel": 0, "mem_gib": 0}).items():
            if not getattr(self, name) >= low:  # nan is not
                raise ValueError(f"cluster {self.name}: {name} = {getattr(self, name)}: expected {low} or more")
        if self.gpus_per_node and self.tasks_per_node not in (0, self.gpus_per_node):
            raise ValueError(
                f"cluster {self.name}: tasks_per_node = {self.tasks_per_node}: each of the {self.gpus_per_node} GPUs of a node has one"
                " process, so leave it at 0"
            )
        if self.signal_before_end_s >= 60 * self.time_min:
            raise ValueError(
                f"cluster {self.name}: signal_before_end_s = {self.signal_before_end_s}: expected less than the {60 * self.time_min} s"
                f" of time_min = {self.time_min}"
            )
        for option in self.sbatch:
            if option.replace("_", "-") in SET_BY_THE_SWEEP:
                raise ValueError(f"cluster {self.name}: sbatch.{option} is set by the sweep itself: leave it out")
            if option.replace("_", "-") in HAVE_A_KEY:
                key = HAVE_A_KEY[option.replace("_", "-")]
                raise ValueError(f"cluster {self.name}: sbatch.{option} has a key of its own: give {key} beside sbatch")

    @property
    def tasks(self) -> int:
        """Processes of a point on each node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def gpus(self) -> int:
        """GPUs of a point."""
        return self.nodes * self.gpus_per_node


BUILT_IN = {"local": Cluster("local", "local", gpus_per_node=0, parallel=1), "debug": Cluster("debug", "debug", gpus_per_node=0)}


def default_file() -> Path:
    """`~/.config/cossl/clusters.toml`, or below $XDG_CONFIG_HOME."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "cossl" / "clusters.toml"


def load_cluster(name: str, file: Path | None = None) -> Cluster:
    """The cluster of that name, from the file if it has one, else built in. ValueError for an unknown name, key, type or value."""
    path = file or default_file()
    known = read_clusters(path) if file is not None or path.exists() else {}
    if name in known:
        return known[name]
    if name in BUILT_IN:
        return BUILT_IN[name]
    near = difflib.get_close_matches(name, [*known, *BUILT_IN], 1)
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join([*known, *BUILT_IN])}, or add a table [{name}] there"
    raise ValueError(f"unknown cluster {name!r} in {path}: {hint}")


def read_clusters(path: Path) -> dict[str, Cluster]:
    """Every record of a file, each checked. ValueError naming file, table and key."""
    return {name: _cluster(name, table, path) for name, table in read_toml(path).items()}


def _cluster(name: str, table: Any, path: Path) -> Cluster:
    if not isinstance(table, dict):
        raise ValueError(f"{path}: {name} stands outside a table: put it under [<cluster>]")
    kinds = get_type_hints(Cluster)
    allowed = [f.name for f in fields(Cluster) if f.name != "name"]
    for key, value in table.items():
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, 1)
            raise ValueError(
                f"{path}: [{name}] has an unknown key {key!r}: "
                + (f"did you mean {near[0]}?" if near else f"expected {', '.join(allowed)}")
            )
        if not _fits(value, kinds[key]):
            raise ValueError(f"{path}: [{name}] {key} = {value!r}: expected {_called(kinds[key])}")
    start = replace(BUILT_IN.get(table.get("kind", "slurm"), Cluster()), name=name)
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    try:
        return replace(start, **values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is not None:
        return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())
    return isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)


def _called(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return "a list of strings"
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    return "a table of strings" if get_origin(kind) is not None else {str: "a string", int: "a whole number", float: "a number"}[kind]


def read_toml(path: Path) -> dict[str, Any]:
    """What the file says. ValueError of one line where there is none, or it is no TOML."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: write it, or give another file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from None
