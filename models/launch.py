"""The processes that a launcher started for one run: torchrun's, or a SLURM step's; how they meet, and how they agree."""

import os
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TextIO, TypeVar

import torch
from torch import distributed

from cossl.models.parallel import Ranks, current_ranks

T = TypeVar("T")
# Others wait for what the first rank does alone: an evaluation, a checkpoint on a slow disk.
PATIENCE = timedelta(hours=1)


def choose_device(name: str) -> torch.device:
    """cpu, or the GPU of this process: the one of its number on its node, or the only one it can see. ValueError where there is none.

    On a GPU cuDNN tries its algorithms out, and float32 products are TF32's.
    """
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ValueError("--device cuda: no GPU is visible to torch; use --device cpu, or mend the driver")
    if name == "cpu" or not found:
        return torch.device("cpu")
    environment = _environment()
    device = torch.device("cuda", int(environment.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32
    return device


def join(device: torch.device) -> Ranks:
    """This process among those of its launch, once all are there; alone where nothing but this process was started.

    torchrun says who is who in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. In a SLURM step (srun) of several tasks they are
    made from SLURM's own variables; the first node of the step is the master, and the port follows from the job's number.
    Trap: a batch script is no step: without srun in front of the command a job of many tasks is one process.
    """
    environment = _environment()
    if int(environment.get("WORLD_SIZE", 1)) > 1 and not distributed.is_initialized():
        os.environ.update(environment)
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return current_ranks()


def _environment() -> dict[str, str]:
    """torchrun's variables, as they are or as a SLURM step has them; empty outside both."""
    have = os.environ
    if "RANK" in have and "WORLD_SIZE" in have:
        return {name: have[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name in have}
    if int(have.get("SLURM_STEP_NUM_TASKS", 1)) <= 1 or "SLURM_PROCID" not in have:
        return {}
    one_node = have.get("SLURM_STEP_NUM_NODES", "1") == "1"
    port = 20_000 + (31 * int(have["SLURM_JOB_ID"]) + int(have.get("SLURM_STEP_ID", 0))) % 20_000
    return {
        "RANK": have["SLURM_PROCID"],
        "WORLD_SIZE": have["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": have.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": "127.0.0.1" if one_node else first_host(have["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": have.get("MASTER_PORT", str(port)),
    }


def first_host(nodes: str) -> str:
    """The first of SLURM's compressed list of nodes: `gpu[007-012,20],login1` is gpu007. ValueError for what is no such list."""
    found = re.match(r"([\w.-]+)(?:\[(\w+)[^\]]*\]([\w.-]*))?(?:,|$)", nodes)
    if found is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes!r} is no list of nodes that can be read: set MASTER_ADDR and torchrun's variables")
    return "".join(part or "" for part in found.groups())


def first_rank(task: Callable[[], T]) -> T:
    """What `task` returns on the first rank, on all of them. Where it raises there, the others leave with code 2 and say nothing."""
    ranks = current_ranks()
    if ranks.world_size == 1:
        return task()
    answer: list[Any] = [False, None]
    if ranks.rank == 0:
        try:
            answer = [True, task()]
        finally:
            distributed.broadcast_object_list(answer)
    else:
        distributed.broadcast_object_list(answer)
        if not answer[0]:
            raise SystemExit(2)
    return answer[1]


def say(line: str, file: TextIO | None = None) -> None:
    """Prints it, on stdout unless told otherwise, once for all ranks: they know theirs before they meet."""
    if int(_environment().get("RANK", 0)) == 0:
        print(line, file=file, flush=True)


def any_rank(flag: bool) -> bool:
    """Whether it is set on any of them: all get the same answer at the same step. Over the hosts, so that no device is waited for."""
    if current_ranks().world_size == 1:
        return flag
    flags = torch.tensor([flag], dtype=torch.uint8)
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return bool(flags[0])


def leave() -> None:
    """Ends the meeting: each process goes its own way from here. All have to come here, or the others' last words are complaints."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
