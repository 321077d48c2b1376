"""Damaged files, made of whole ones by a seed, and a process to read them in that must come back."""

from __future__ import annotations

import json
import mmap
import os
import resource
import signal
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

ROOM_BYTES = 1 << 30  # beyond what the process has when it starts: far more than any of the files needs
CASE_CPU_S, CASE_S = 20, 200
EXTREMES = [b"\0" * 8, b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\x01" + b"\0" * 7, b"\0\0\0\0\x01\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80"]
HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.5, 1e308, -0.0, float("nan"), float("inf")),
    *("", "x", "../../x", "/etc/passwd", "\0", "\n", "\ud800", "9" * 5000, "byol", "x" * 100_000),
    *([], {}, [[]], [None], {"": ""}, [1, 2], [-1], ["a"] * 50, {"a": 1}, [[0] * 5] * 5, json.loads("[" * 500 + "]" * 500)),
]


def damaged(content: bytes, rng: np.random.Generator, within: int | None = None) -> bytes:
    """The same file after one to three mishaps, in its first `within` bytes; perhaps, by chance, unchanged."""
    for _ in range(rng.integers(1, 4)):
        content = _mishap(content, rng, min(within or len(content), len(content)))
    return content


def _mishap(content: bytes, rng: np.random.Generator, within: int) -> bytes:
    if not within:
        return content
    at = int(rng.integers(within))
    end = at + int(rng.integers(1, 2 ** int(rng.integers(1, 9))))
    noise = rng.bytes(end - at)
    span, other = content[at:end], int(rng.integers(within))
    match rng.integers(9):
        case 0 | 1:
            return content[:at] + bytes([content[at] ^ 1 << int(rng.integers(8))]) + content[at + 1 :]
        case 2:
            return content[:at]
        case 3:
            return content[:at] + content[end:]
        case 4:
            return content[:at] + noise + content[end:]
        case 5:
            return content[:at] + noise + content[at:]
        case 6:
            return content[:other] + span + content[other:]
        case 7:
            return content[:at] + bytes([int(rng.integers(256))]) + content[at + 1 :]
    extreme = EXTREMES[int(rng.integers(len(EXTREMES)))]
    return content[:at] + extreme + content[at + len(extreme) :]


def changed(value: Any, rng: np.random.Generator) -> Any:
    """A JSON value with one to three of its parts replaced by hostile ones, left out, doubled or under another name."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.integers(1, 4)):
        value = _changed_once(value, rng)
    return value


def _changed_once(value: Any, rng: np.random.Generator) -> Any:
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not keys or rng.random() < 0.02:
        return json.loads(json.dumps(HOSTILE[int(rng.integers(len(HOSTILE)))]))
    key = keys[int(rng.integers(len(keys)))]
    if isinstance(value[key], dict | list) and rng.random() < 0.8:
        value[key] = _changed_once(value[key], rng)
        return value
    match rng.integers(6):
        case 0:
            del value[key]
        case 1 if isinstance(value, dict):
            value[key + rng.choice([".", "x", ".x", "\0"])] = value.pop(key)
        case 1:
            value.insert(key, value[key])
        case 2:
            value[key] = json.loads(json.dumps(value[keys[int(rng.integers(len(keys)))]]))
        case 3 if isinstance(value[key], int | float):
            value[key] = value[key] * [2, -1, 1000, 10**12][int(rng.integers(4))]
        case _:
            value[key] = json.loads(json.dumps(HOSTILE[int(rng.integers(len(HOSTILE)))]))
    return value


def refusal_or(read: Callable[[], Any]) -> Any:
    """What is read; or, where it is refused, a ValueError or OSError of one line. Any other error goes on."""
    try:
        return read()
    except (ValueError, OSError) as error:
        refused = error
    text = str(refused)
    assert text, repr(refused)
    assert text.isprintable(), repr(text)
    assert len(text) < 2000, text
    return refused


def survive(case: Callable[[np.random.Generator], None], count: int, seed: int = 0) -> None:
    """Calls `case` with the generators of so many cases in a process with little room, which must neither die, hang, grow, nor raise."""
    where = mmap.mmap(-1, 1 << 16)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _run(case, count, seed, where)
            code = 0
        except BaseException:
            where[8:] = traceback.format_exc()[-60_000:].encode(errors="replace").ljust(len(where) - 8, b"\0")
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    number, said = int.from_bytes(where[:8], "little"), where[8:].rstrip(b"\0").decode()
    assert code == 0, f"case {number} of seed {seed} ended with {code}: {said or 'killed by that signal'}"


def _run(case: Callable[[np.random.Generator], None], count: int, seed: int, where: mmap.mmap) -> None:
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM_BYTES, size + ROOM_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        where[:8] = number.to_bytes(8, "little")
        signal.setitimer(signal.ITIMER_PROF, CASE_CPU_S)
        signal.setitimer(signal.ITIMER_REAL, CASE_S)
        case(np.random.default_rng((seed, number)))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 400 << 10, f"{grown / 1024:.0f} MiB were taken"
