"""`cossl bench heads`: what each local head costs, forward and backward, by the number of positions that are sampled.

The local path of CO-BYOL alone: projector and predictor of each variant on a feature map as RF99-ResNet50 gives it (2048 channels, 7 x 7 at
224 px), one cosine loss at its end. Variants take turns, and `relative_step` is the median over the turns of forward plus backward against
`conv1x1` with all positions in the same turn. `peak_mib` is what the step needs beyond what was there before: on a GPU by its allocator,
on a CPU by the process's resident size (freed memory is given back before each measurement).

`tflops` is what the matrix products and convolutions of a step ask for, as torch.utils.flop_counter counts them (2 per multiply and add),
by its time. `gb_s` is the least that a step has to move by its time, counted too: parameters read and their gradients written, the gradient
of the map written, and what is kept for the backward pass written and read again (parameters and the map: only read again). What
operations read and write besides comes on top, and what stays in a cache does not move at all. `tflops_share` and `gb_s_share` compare
them with the ceilings that the same run found: the fastest product of two square matrices and the fastest copy (read and written) of any
turn.
"""

from __future__ import annotations

import ctypes
import json
import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from cossl.models.flags import parse_flags, replace_text
from cossl.models.heads import HEADS, Head, predictor_kind
from cossl.models.losses import cosine_distance
from cossl.tools.bench import machine, progress, spread

BASELINE, SIDE = "conv1x1", 7
POSITIONS = (4, 16, SIDE**2)
# What the ceilings are measured with: the side of the matrices and the size of the copy, large against every cache.
MATRIX_SIDE, COPY_MIB = {"cuda": 8192, "cpu": 1024}, {"cuda": 1024, "cpu": 256}


@dataclass(frozen=True)
class HeadsArgs:
    """The command line of `cossl bench heads`; each field's text is its help."""

    batch_size: int | None = None
    """Pictures per step (default: 256 on a GPU, 8 on a CPU)."""

    channels: int = 2048
    """Channels of the feature map."""

    hidden_dim: int = 4096
    """Hidden width of projector and predictor."""

    out_dim: int = 256
    """Width of the vectors that are compared."""

    repeats: int | None = None
    """Turns of each row (default: 7; 2 with --quick)."""

    quick: bool = False
    """Smaller batch and fewer turns: within three minutes on 2 cores."""

    json: Path | None = None
    """Write the table here."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "channels", "hidden_dim", "out_dim", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected 1 or more")
        if self.json is not None and not self.json.parent.is_dir():
            raise FileNotFoundError(f"--json {self.json}: there is no folder {self.json.parent}")


class LocalPath(nn.Module):
    """Projector, predictor and loss of one variant."""

    def __init__(self, name: str, args: HeadsArgs) -> None:
        super().__init__()
        self.projector: Head = HEADS[name](args.channels, args.hidden_dim, args.out_dim, False)
        self.predictor: Head = HEADS[predictor_kind(name)](args.out_dim, args.hidden_dim, args.out_dim, False)

    def forward(self, y: Tensor, positions: Tensor, goal: Tensor) -> Tensor:
        """In bfloat16 on a GPU."""
        with torch.autocast(y.device.type, torch.bfloat16, enabled=y.is_cuda):
            return cosine_distance(self.predictor.vectors(self.projector(y, positions)), goal[:, None]).mean()


class Work(NamedTuple):
    """What a step asks for, or what a machine does per second at most."""

    flops: float
    bytes: float


def count(path: LocalPath, y: Tensor, positions: Tensor, goal: Tensor) -> Work:
    """Floating-point operations of one step, and a lower bound of the bytes it moves; takes the step."""
    parameters = {p.untyped_storage().data_ptr(): p.nbytes for p in path.parameters()}
    there_before = {*parameters, y.untyped_storage().data_ptr()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() * (1 if storage.data_ptr() in there_before else 2)
        return x

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda x: x):
        path(y, positions, goal).backward()
    return Work(counter.get_total_flops(), 2 * sum(parameters.values()) + y.nbytes + sum(kept.values()))


def ceilings(device: torch.device) -> Work:
    """The most this device does per second just now: in one large product of matrices, in the heads' precision, and in one large copy."""
    side, mib = MATRIX_SIDE[device.type], COPY_MIB[device.type]
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    product = _fastest_s(lambda: a @ a, device)
    source = torch.ones(mib * 2**18, device=device)
    destination = torch.empty_like(source)
    copy = _fastest_s(lambda: destination.copy_(source), device)
    return Work(2 * side**3 / product, 2 * source.nbytes / copy)


def _fastest_s(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(6):
        began = _now(device)
        work()
        times.append(_now(device) - began)
    return min(times)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _resident_mib(key: str) -> float:
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


class Meter:
    """Milliseconds of forward and backward of one step, and its peak memory in MiB."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.gpu = device, device.type == "cuda"

    def _start_memory(self) -> float:
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() / 2**20
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the high-water mark (proc(5))
        return _resident_mib("VmRSS")

    def measure(self, path: LocalPath, y: Tensor, positions: Tensor, goal: Tensor) -> tuple[float, float, float]:
        before = self._start_memory()
        began = _now(self.device)
        loss = path(y, positions, goal)
        middle = _now(self.device)
        loss.backward()
        end = _now(self.device)
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.gpu else _resident_mib("VmHWM")
        return 1e3 * (middle - began), 1e3 * (end - middle), max(0.0, peak - before)


def measure(args: HeadsArgs, device: torch.device, batch_size: int, turns: int) -> tuple[list[dict[str, Any]], Work]:
    """A row per variant and number of positions; and the ceilings. The first turn warms up and counts."""
    torch.manual_seed(0)
    y = torch.randn(batch_size, args.channels, SIDE, SIDE, device=device).contiguous(memory_format=torch.channels_last).requires_grad_(True)
    goal = torch.randn(batch_size, args.out_dim, device=device)
    chosen = {k: torch.stack([torch.randperm(SIDE**2)[:k] for _ in range(batch_size)]).to(device) for k in POSITIONS}
    meter, work, most = Meter(device), {}, []
    taken: dict[tuple[str, int], list[tuple[float, float, float]]] = {(name, k): [] for name in HEADS for k in POSITIONS}
    for turn in range(turns + 1):
        for name in HEADS:
            path = LocalPath(name, args).to(device).to(memory_format=torch.channels_last)
            for k in POSITIONS:
                path.zero_grad(set_to_none=True)
                y.grad = None
                if turn == 0:
                    work[name, k] = count(path, y, chosen[k], goal)
                else:
                    taken[name, k].append(meter.measure(path, y, chosen[k], goal))
            del path
        if turn:
            most.append(ceilings(device))
        progress(f"heads: turn {turn} of {turns}" if turn else "heads: warmed up")
    ceiling = Work(*(max(column) for column in zip(*most, strict=True)))
    reference = [forward + backward for forward, backward, _ in taken[BASELINE, SIDE**2]]
    rows = [_row(name, k, values, reference) for (name, k), values in taken.items()]
    return [row | _rates(values, batch_size, work[key], ceiling) for row, (key, values) in zip(rows, taken.items(), strict=True)], ceiling


def _row(name: str, k: int, values: list[tuple[float, float, float]], reference: list[float]) -> dict[str, Any]:
    forward, backward, peak = (spread(column) for column in zip(*values, strict=True))
    relative = spread([(value[0] + value[1]) / base for value, base in zip(values, reference, strict=True)])
    return {
        "name": name,
        "k": k,
        "forward_ms": round(forward.median, 3),
        "backward_ms": round(backward.median, 3),
        "peak_mib": round(peak.median, 1),
        "relative_step": round(relative.median, 3),
        "n": len(values),
        "spread": {"relative_step": [round(relative.low, 3), round(relative.high, 3)]},
    }


def _rates(values: list[tuple[float, float, float]], batch_size: int, work: Work, ceiling: Work) -> dict[str, float]:
    """What the median step comes to per second, and its share of the ceilings."""
    step_s = spread([forward + backward for forward, backward, _ in values]).median / 1e3
    rates = {
        "images_per_s": batch_size / step_s,
        "tflops": work.flops / step_s / 1e12,
        "tflops_share": work.flops / step_s / ceiling.flops,
        "gb_s": work.bytes / step_s / 1e9,
        "gb_s_share": work.bytes / step_s / ceiling.bytes,
    }
    return {name: _short(rate) for name, rate in rates.items()}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _show(rows: list[dict[str, Any]]) -> None:
    times = f"{'forward ms':>11}{'backward ms':>12}{'peak MiB':>9}{'of conv1x1, all':>16}{'from':>6}{'to':>6}"
    print(f"{'head':<13}{'k':>3}{times}{'images/s':>10}{'TFLOP/s':>10}{'of most':>8}{'GB/s':>9}{'of most':>8}")
    for row in rows:
        low, high = row["spread"]["relative_step"]
        times = f"{row['forward_ms']:>11.2f}{row['backward_ms']:>12.2f}{row['peak_mib']:>9.0f}"
        times += f"{row['relative_step']:>15.2f}x{low:>6.2f}{high:>6.2f}{row['images_per_s']:>10.1f}"
        rates = f"{row['tflops']:>10.3g}{row['tflops_share']:>8.1%}{row['gb_s']:>9.3g}{row['gb_s_share']:>8.1%}"
        print(f"{row['name']:<13}{row['k']:>3}{times}{rates}")


def heads_main(argv: Sequence[str]) -> None:
    """`cossl bench heads`. Raises ValueError or OSError for a user's mistake."""
    args = parse_flags(HeadsArgs, argv, "cossl bench heads", f"Local heads beside each other.\n\n{__doc__}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = args.batch_size or (256 if device.type == "cuda" else 4 if args.quick else 8)
    turns = args.repeats or (2 if args.quick else 7)
    rows, ceiling = measure(args, device, batch_size, turns)
    tflops, gb_s = _short(ceiling.flops / 1e12), _short(ceiling.bytes / 1e9)
    side, mib, precision = MATRIX_SIDE[device.type], COPY_MIB[device.type], "bf16" if device.type == "cuda" else "fp32"
    _show(rows)
    where = torch.cuda.get_device_name() if device.type == "cuda" else machine()["cpu"]
    print(f"most: {tflops} TFLOP/s in a product of {side} x {side} matrices, {gb_s} GB/s in a copy of {mib} MiB")
    print(f"batch {batch_size}, {turns} turns, {precision}, {where}, torch {torch.__version__}")
    if args.json is not None:
        settings: dict[str, Any] = {"batch_size": batch_size, "turns": turns, "channels": args.channels, "hidden_dim": args.hidden_dim}
        settings |= {"out_dim": args.out_dim, "side": SIDE, "precision": precision}
        settings |= {"ceilings": {"tflops": tflops, "gb_s": gb_s, "matrix_side": side, "copy_mib": mib}}
        report = {"machine": machine(), "command": shlex.join(["cossl", "bench", "heads", *argv]), "settings": settings, "rows": rows}
        replace_text(args.json, json.dumps(report, indent=1))
