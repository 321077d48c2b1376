"""`cossl bench heads`: what each local head costs, forward and backward, by the number of positions that are sampled.

The local path of CO-BYOL alone: projector and predictor of each variant on a feature map as RF99-ResNet50 gives it (2048 channels, 7 x 7 at
224 px), one cosine loss at its end. Variants take turns, and `relative_step` is the median over the turns of forward plus backward against
`conv1x1` with all positions in the same turn. `peak_mib` is what the step needs beyond what was there before: on a GPU by its allocator,
on a CPU by the process's resident size (freed memory is given back before each measurement).
"""

from __future__ import annotations

import ctypes
import json
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cossl.models.heads import HEADS, Head, predictor_kind
from cossl.models.losses import cosine_distance
from cossl.tools.bench import machine, progress, spread
from cossl.train import parse_flags, replace_text

BASELINE, SIDE = "conv1x1", 7
POSITIONS = (4, 16, SIDE**2)


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
    """Turns of each row (default: 7; 3 with --quick)."""

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
        return cosine_distance(self.predictor.vectors(self.projector(y, positions)), goal[:, None]).mean()


def _resident_mib(key: str) -> float:
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


class Meter:
    """Milliseconds of forward and backward of one step, and its peak memory in MiB."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"

    def _now(self) -> float:
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _start_memory(self) -> float:
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() / 2**20
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the high-water mark (proc(5))
        return _resident_mib("VmRSS")

    def measure(self, path: LocalPath, y: Tensor, positions: Tensor, goal: Tensor) -> tuple[float, float, float]:
        path.zero_grad(set_to_none=True)
        y.grad = None
        before = self._start_memory()
        began = self._now()
        with torch.autocast(y.device.type, torch.bfloat16, enabled=self.gpu):
            loss = path(y, positions, goal)
        middle = self._now()
        loss.backward()
        end = self._now()
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.gpu else _resident_mib("VmHWM")
        return 1e3 * (middle - began), 1e3 * (end - middle), max(0.0, peak - before)


def measure(args: HeadsArgs, device: torch.device, batch_size: int, turns: int) -> list[dict[str, Any]]:
    """A row per variant and number of positions."""
    torch.manual_seed(0)
    y = torch.randn(batch_size, args.channels, SIDE, SIDE, device=device).contiguous(memory_format=torch.channels_last).requires_grad_(True)
    goal = torch.randn(batch_size, args.out_dim, device=device)
    chosen = {k: torch.stack([torch.randperm(SIDE**2)[:k] for _ in range(batch_size)]).to(device) for k in POSITIONS}
    meter = Meter(device)
    taken: dict[tuple[str, int], list[tuple[float, float, float]]] = {(name, k): [] for name in HEADS for k in POSITIONS}
    for turn in range(-1, turns):  # the first one warms up
        for name in HEADS:
            path = LocalPath(name, args).to(device).to(memory_format=torch.channels_last)
            for k in POSITIONS:
                taken[name, k].append(meter.measure(path, y, chosen[k], goal))
            del path
        progress(f"heads: turn {turn + 1} of {turns}" if turn >= 0 else "heads: warmed up")
    timed = {key: values[1:] for key, values in taken.items()}
    reference = [forward + backward for forward, backward, _ in timed[BASELINE, SIDE**2]]
    return [_row(name, k, values, reference) for (name, k), values in timed.items()]


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


def heads_main(argv: Sequence[str]) -> None:
    """`cossl bench heads`. Raises ValueError or OSError for a user's mistake."""
    args = parse_flags(HeadsArgs, argv, "cossl bench heads", f"Local heads beside each other.\n\n{__doc__}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = args.batch_size or (256 if device.type == "cuda" else 4 if args.quick else 8)
    turns = args.repeats or (3 if args.quick else 7)
    rows = measure(args, device, batch_size, turns)
    print(f"{'head':<14}{'k':>4}{'forward ms':>12}{'backward ms':>13}{'peak MiB':>10}{'of conv1x1, all':>17}{'from':>8}{'to':>8}")
    for row in rows:
        low, high = row["spread"]["relative_step"]
        times = f"{row['forward_ms']:>12.2f}{row['backward_ms']:>13.2f}{row['peak_mib']:>10.0f}"
        print(f"{row['name']:<14}{row['k']:>4}{times}{row['relative_step']:>16.2f}x{low:>8.2f}{high:>8.2f}")
    where = torch.cuda.get_device_name() if device.type == "cuda" else machine()["cpu"]
    print(f"batch {batch_size}, {turns} turns, {'bf16' if device.type == 'cuda' else 'fp32'}, {where}, torch {torch.__version__}")
    if args.json is not None:
        settings = {"batch_size": batch_size, "turns": turns, "channels": args.channels, "hidden_dim": args.hidden_dim, "side": SIDE}
        report = {"machine": machine(), "command": shlex.join(["cossl", "bench", "heads", *argv]), "settings": settings, "rows": rows}
        replace_text(args.json, json.dumps(report, indent=1))
