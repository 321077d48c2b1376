"""How the step is timed: rows that take turns, the device's own clock, what a step computes and moves, and what the device could at best.

A row is a source of batches and what is done with each. In a turn it opens its source anew, goes through some batches untimed, so that
what was made ahead is used up, takes two steps, and then those that are timed. Nothing waits for the device between them.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

OURS, RAMP, MIB, CEILING_TURNS, PROFILED_STEPS, TOP = "ours", 2, 2**20, 10, 3, 10
PRODUCTS = ("convolution", "mm", "matmul", "linear")  # in the names of operations whose bytes no fusion of pointwise work saves
NO_TRAFFIC = ("empty", "detach", "lift")

# ---- time -------------------------------------------------------------------------------------------------------------------------


class Clock:
    """Moments on the device's own time line: events on a GPU, where the host is ahead of it, the host's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"

    def mark(self) -> Any:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: Any, second: Any) -> float:
        """From one mark to a later one, after `wait`."""
        return float(first.elapsed_time(second) / 1e3) if self.gpu else float(second - first)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.gpu:
            torch.cuda.synchronize()

    def forget_peak(self) -> None:
        """Peak memory is counted from here on."""
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the high-water mark (proc(5))

    def give_back(self) -> None:
        """Free memory goes back to the device, so that a row's peak is its own."""
        if self.gpu:
            torch.cuda.empty_cache()
        else:
            ctypes.CDLL(None).malloc_trim(0)

    def peak_mib(self) -> float:
        """On a GPU what its allocator had handed out at most, on a CPU the largest resident size of this process."""
        if self.gpu:
            return torch.cuda.max_memory_allocated() / MIB
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) / 1024 if found else math.nan


@dataclass(frozen=True)
class Turn:
    """One turn of a row: seconds from the end of one step to the beginning of the next (`waits`), and of each step (`works`)."""

    seconds: float
    waits: list[float]
    works: list[float]
    loop_wait_s: float
    """What the host spent in waiting for batches; on a GPU that may be while the device is busy, and then costs nothing."""
    peak_mib: float
    recompiled: int

    @property
    def periods(self) -> list[float]:
        return [wait + work for wait, work in zip(self.waits, self.works, strict=True)]


@dataclass
class Row:
    """A line of the table: whose step, on batches from where, eager or compiled; and its turns so far."""

    name: str
    source: str
    mode: str
    batch_size: int
    step: Callable[[Any], object]
    open: Callable[[], Iterator[Any]]
    ahead: int
    """Batches let go at the beginning of each turn: what the source had made before."""
    steps: int
    most_s: float = math.inf
    """A turn ends early, after a step, once it has taken so long."""
    ramp: int = RAMP
    """Untimed steps at the beginning of each turn."""
    turns: list[Turn] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.name}, {self.source}" + (f", {self.mode}" if self.mode != "-" else "")

    def begin(self) -> Iterator[Any]:
        """The source, opened anew and as it is in the middle of an epoch: nothing made ahead but during a step."""
        batches = self.open()
        for _ in range(self.ahead):
            next(batches)
        for _ in range(self.ramp):
            self.step(next(batches))
        return batches

    @property
    def rates(self) -> list[float]:
        """Pictures per second, by turn."""
        return [self.batch_size * len(turn.works) / turn.seconds for turn in self.turns]


def _graphs() -> int:
    """Graphs that torch.compile has made so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def take_turn(row: Row, clock: Clock) -> Turn:
    """One turn of the row."""
    clock.give_back()
    batches = row.begin()
    clock.wait()
    clock.forget_peak()
    graphs, loop_wait_s, began = _graphs(), 0.0, time.perf_counter()
    marks = [clock.mark()]
    for _ in range(row.steps):
        before = time.perf_counter()
        batch = next(batches)
        loop_wait_s += time.perf_counter() - before
        marks.append(clock.mark())
        row.step(batch)
        marks.append(clock.mark())
        if time.perf_counter() - began > row.most_s:
            break
    clock.wait()
    seconds, times = time.perf_counter() - began, [clock.seconds(*pair) for pair in itertools.pairwise(marks)]
    return Turn(seconds, times[::2], times[1::2], loop_wait_s, clock.peak_mib(), _graphs() - graphs)


# ---- work, and what the device could do at best -----------------------------------------------------------------------------------


class _Traffic(TorchDispatchMode):
    """Bytes that operations read and write if each goes through memory: all of them, and the matrix products and convolutions alone."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), str(func).removeprefix("aten.")
        if not func.is_view and not name.startswith(NO_TRAFFIC):
            moved = sum(x.nbytes for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
            self.all += moved
            self.products += moved if any(word in name for word in PRODUCTS) else 0
        return out


@dataclass(frozen=True)
class Work:
    """What one step computes and moves; bytes as `_Traffic` counts them."""

    flops: int
    all_bytes: int
    product_bytes: int


def count(step: Callable[[], object]) -> Work:
    """The work of one call, run eagerly. Kernels that torch does not know of (numba's augmentation on a CPU) are not seen.

    FLOPs are those of matrix products and convolutions, a multiplication and an addition being two (torch.utils.flop_counter).
    """
    traffic, flops = _Traffic(), FlopCounterMode(display=False)
    with torch.compiler.set_stance("force_eager"), flops, traffic:
        step()
    return Work(flops.get_total_flops(), traffic.all, traffic.products)


def ceilings(device: torch.device) -> dict[str, float]:
    """TFLOP/s of a square matrix product in bf16 and in float32 (with TF32 where the run allows it), GB/s read and written by a copy."""
    clock, side, size = Clock(device), 8192 if device.type == "cuda" else 1024, 2**30 if device.type == "cuda" else 2**26
    found = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a = torch.randn(side, side, device=device, dtype=dtype)
        found[f"matmul_{name}_tflops"] = 2 * side**3 / _median_s(clock, lambda a=a: a @ a) / 1e12  # type: ignore[misc]
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy_gb_per_s"] = 2 * size / _median_s(clock, lambda: target.copy_(source)) / 1e9
    return {name: round(value, 3) for name, value in found.items()}


def _median_s(clock: Clock, do: Callable[[], object]) -> float:
    for _ in range(3):
        do()
    marks = [clock.mark()]
    for _ in range(CEILING_TURNS):
        do()
        marks.append(clock.mark())
    clock.wait()
    return statistics.median(clock.seconds(*pair) for pair in itertools.pairwise(marks))


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


# ---- profile ----------------------------------------------------------------------------------------------------------------------


def write_profile(row: Row, clock: Clock, folder: Path) -> str:
    """A few steps of the row into folder/<row>.trace.json (chrome://tracing, Perfetto), and the costliest operations into <row>.txt."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if clock.gpu else [])]
    batches = row.begin()
    clock.wait()
    with profile(activities=activities) as seen:
        for _ in range(PROFILED_STEPS):
            row.step(next(batches))
        clock.wait()
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{row.name}-{row.source}-{row.mode}-b{row.batch_size}".replace(" ", "-")
    seen.export_chrome_trace(str(folder / f"{stem}.trace.json"))
    order = "self_device_time_total" if clock.gpu else "self_cpu_time_total"
    text = seen.key_averages().table(sort_by=order, row_limit=TOP, max_name_column_width=60)
    (folder / f"{stem}.txt").write_text(text)
    return text
