"""`cossl bench KIND`: finds the kind of measurement; and what every kind measures with: CPU time, memory, the machine.

CPU time counts every thread and every child process, by the kernel's own clocks: on a shared machine it repeats, wall time does not.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

KINDS: dict[str, tuple[str, str, str]] = {  # kind: module, function, what it measures
    "loaders": ("cossl.tools.bench_loaders", "loaders_main", "our loaders beside stock ffcv, torchvision and DALI: bench loaders [SRC]"),
    "heads": ("cossl.tools.bench_heads", "heads_main", "local heads, forward and backward, by positions sampled: bench heads"),
    "step": ("cossl.tools.bench_step", "step_main", "the training step: loader, compute, overlap, compiled, peers: bench step PRESET"),
    "parity": ("cossl.tools.bench_parity", "parity_main", "pixels of every loader against the PIL reference: bench parity [SRC]"),
}

DISTRIBUTIONS = ("torch", "torchvision", "numba", "numpy", "pillow", "ffcv", "opencv-python", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
POLL_S, QUIET_S, PATIENCE_S = 0.004, 0.05, 30.0


def main(argv: Sequence[str]) -> None:
    """`cossl bench KIND ...`; without a kind the list of them. Raises ValueError for an unknown one."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: cossl bench KIND ...\n")
        for name, (_, _, what) in KINDS.items():
            print(f"  {name:<10}{what}")
        print("\ncossl bench KIND --help says more.")
        return
    if argv[0] not in KINDS:
        raise ValueError(f"unknown kind {argv[0]!r}{did_you_mean(argv[0], KINDS)}")
    module, function, _ = KINDS[argv[0]]
    getattr(import_module(module), function)(argv[1:])


def require_folder_of(flag: str, path: Path | None) -> None:
    """Raises FileNotFoundError, before anything is measured, when the file that the flag names could not be written after it."""
    if path is not None and not path.parent.is_dir():
        raise FileNotFoundError(f"{flag} {path}: there is no folder {path.parent}; make it first")


def did_you_mean(word: str, known: Sequence[str] | dict[str, Any]) -> str:
    """The end of a message about an unknown word."""
    near = difflib.get_close_matches(word, known, 1)
    return f": did you mean {near[0]}?" if near else f": expected one of {', '.join(known)}"


# ---- CPU time ---------------------------------------------------------------------------------------------------------------------


def descendants() -> list[int]:
    """Process ids of the children of this process, their children and so on, those that ended and wait to be reaped included."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended just now
            continue
        children.setdefault(parent, []).append(int(folder.name))
    family = list(children.get(os.getpid(), ()))
    for pid in family:  # grows as it goes
        family += children.get(pid, ())
    return family


def _own_cpu_s() -> float:
    """Seconds of CPU, user and system, of all threads of this process and of the children it has reaped."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _living_cpu_s(pids: Sequence[int]) -> float:
    """The same of processes that live; `getrusage` only knows those that were reaped. Their clock has nanoseconds, /proc/PID/stat 10 ms."""
    total = 0.0
    for pid in pids:
        try:
            total += time.clock_gettime((~pid << 3) | 2)  # the clock that clock_getcpuclockid(3) names
        except OSError:  # it ended just now
            continue
    return total


class Stopwatch:
    """`with Stopwatch() as watch:` around the use of something that works ahead; then `watch.wall_s` and `watch.cpu_s`.

    Both begin and end when the process and its family are quiet, so that what was fetched ahead before is made up for afterwards: the
    times are those of as much work as was used. What the watching itself costs is not counted. Linux only (/proc).
    """

    wall_s = cpu_s = 0.0

    def __enter__(self) -> Stopwatch:
        if not Path("/proc/self/stat").exists():
            raise RuntimeError("the benchmark counts the CPU time of child processes by Linux's /proc, and there is none here")
        self._watching = 0.0
        self._settle()
        self._began, self._cpu, self._watching = time.perf_counter(), self._used, 0.0
        return self

    def __exit__(self, *error: object) -> None:
        self.wall_s = max(self._settle() - self._began, 1e-9)
        self.cpu_s = self._used - self._cpu - self._watching

    def _settle(self) -> float:
        """Waits until nothing has happened for QUIET_S, and returns when something last did. `_used` is then the CPU time of all."""
        mine, family = time.thread_time(), descendants()
        began = last = time.perf_counter()
        self._used = _own_cpu_s() + _living_cpu_s(family)
        while (now := time.perf_counter()) - last < QUIET_S and now - began < PATIENCE_S:
            time.sleep(POLL_S)
            before, self._used = self._used, _own_cpu_s() + _living_cpu_s(family)
            if self._used - before > POLL_S / 10:
                last = time.perf_counter()
        self._watching += time.thread_time() - mine
        return last


# ---- memory -----------------------------------------------------------------------------------------------------------------------


def peak_rss_mib() -> float:
    """Sum over this process and its living descendants of the largest resident size each ever had, in MiB.

    Pages that forked workers share count once in each, and so do mapped pages of a beton. (`ru_maxrss` would not do: a new process
    inherits its parent's.)
    """
    total = 0
    for pid in (os.getpid(), *descendants()):
        try:
            found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        except OSError:
            continue
        total += int(found[1]) if found else 0
    return total / 1024


# ---- the machine, and many numbers in one -----------------------------------------------------------------------------------------


def installed(package: str) -> bool:
    """Whether `import package` would find something; a dotted name too."""
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Version of each distribution that matters for speed; those not installed are left out."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What a number was measured on."""
    import torch

    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = {key: found[1] for key in ("model name", "cpu family", "model") if (found := re.search(rf"^{key}\s*:\s*(.+)$", cpuinfo, re.M))}
    return {
        "cpu": f"{cpu.get('model name', platform.processor())} (family {cpu.get('cpu family', '?')}, model {cpu.get('model', '?')})",
        "cores": num_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        **versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


class Spread(NamedTuple):
    """Median, smallest and largest of n repeats."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    ordered = sorted(values)
    half = len(ordered) // 2
    median = ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
    return Spread(median, ordered[0], ordered[-1])


def progress(line: str) -> None:
    """One line for whoever waits."""
    print(f"bench: {line}", file=sys.stderr, flush=True)
