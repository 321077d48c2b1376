"""`make gpu-report`: everything that has to be measured on a GPU, in one command of at most ten minutes, without network, ffcv or DALI.

    python -m cossl.tools.gpu_report        (where the package is only on PYTHONPATH: its folder, or a link to it, is named cossl)

One after the other, each in a process of its own that is stopped when its time is over: tests/test_gpu.py, `cossl bench heads`,
`cossl bench step in1k` (eager and compiled, bf16, two batch sizes that fit, and the peers that are installed), the augmentation alone,
`cossl bench loaders --quick`. Writes
tools/results/gpu-<card>-torch<version>-<date>.json and prints a Markdown table.

--device cpu --quick --out DIR tries the report itself where there is no GPU, with the demo's model and few repeats; its figures mean
nothing.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cossl.models.flags import parse_flags, replace_text
from cossl.tools.bench import machine

ROOT = Path(__file__).resolve().parent.parent
GIB_PER_PICTURE, MOST_OF_MEMORY = 0.1, 0.85  # activations of RF99-ResNet50, two views of 224 px in bf16: about 87 MB by count
SIZES = (32, 64, 128, 256, 512)
SMI_FIELDS = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
KERNELS = "import json; from cossl.tools.bench_kernels import augmentation as a; print(json.dumps([k._asdict() for k in a()]))"


@dataclass(frozen=True)
class ReportArgs:
    """The command line of `python -m cossl.tools.gpu_report`; each field's text is its help."""

    out: Path | None = None
    """Folder of the report (default: tools/results beside this file)."""

    minutes: float = 10.0
    """Time for all of it. What does not fit is stopped, and the report says so."""

    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: try the report itself, without a GPU. Needs --quick and --out."""

    quick: bool = False
    """Fewer steps and turns."""

    def __post_init__(self) -> None:
        if not 0 < self.minutes <= 120:
            raise ValueError(f"--minutes {self.minutes:g}: expected more than 0, at most 120")
        if self.device == "cpu" and not (self.quick and self.out):
            raise ValueError(
                "--device cpu only tries the report itself: add --quick and --out DIR, its figures do not belong among the results"
            )
        if self.out is not None and not self.out.is_dir():
            raise FileNotFoundError(f"--out {self.out}: there is no such folder; make it first")


class Part(NamedTuple):
    """A command and its longest time; `reads` says where its result is: the file that {json} names, its last line, or its exit code."""

    name: str
    command: list[str]
    most_s: float
    reads: Literal["json", "line", "code"] = "json"


def fitting(memory_gib: float) -> tuple[int, ...]:
    """Two batch sizes for a card of so much memory: the largest of SIZES that fits, and half of it."""
    return tuple(size for size in SIZES if size * GIB_PER_PICTURE < MOST_OF_MEMORY * memory_gib)[-2:] or SIZES[:1]


def parts(args: ReportArgs, memory_gib: float) -> list[Part]:
    """What is run, in order; on a GPU about ten minutes at most."""
    python, bench = [sys.executable], [sys.executable, "-m", "cossl.tools.cli", "bench"]
    gpu, out = args.device == "cuda", ["--json", "{json}"]
    heads, loaders = ["--quick"] if args.quick else [], ["--quick", "--views", "2x224"]
    step = ["in1k", "--peers", "--batch-sizes", ",".join(map(str, fitting(memory_gib))), "--steps", "10", "--repeats", "3"]
    step += ["--quick"] if args.quick else []
    if not gpu:
        heads = "--channels 64 --hidden-dim 64 --out-dim 16 --batch-size 2 --repeats 1".split()
        step = "demo --quick --device cpu --peers --batch-sizes 8 --steps 2 --repeats 2".split()
        loaders = "--views 2x224 --rows ours-ffcv ours-torch --workers 1 --images 8 --batch-size 8 --repeats 1".split()
    tests = ["-m", "pytest", str(ROOT / "tests" / "test_gpu.py"), "-rs", "-W", "default", "-p", "no:cacheprovider"]
    return [
        Part("tests", [*python, *tests], 150, "code"),
        Part("heads", [*bench, "heads", *heads, *out], 90),
        Part("step", [*bench, "step", *step, *out], 400),
        Part("augmentation", [*python, "-c", KERNELS], 60, "line"),
        Part("loaders", [*bench, "loaders", *loaders, *out], 300),
    ]


def run_part(part: Part, seconds: float, scratch: Path, environment: dict[str, str]) -> dict[str, Any]:
    """What became of it: command, seconds, exit code (None: stopped), its result and, if that is not all, the end of what it said."""
    written, began = scratch / f"{part.name}.json", time.perf_counter()
    command = [word.replace("{json}", str(written)) for word in part.command]
    said = scratch / f"{part.name}.txt"
    with said.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)  # its workers too
                process.wait()
    text = said.read_text(errors="replace")
    result = None
    if part.reads == "json" and written.exists():
        result = json.loads(written.read_text())
    elif part.reads == "line" and code == 0:
        result = json.loads(text.strip().splitlines()[-1])
    done = {"name": part.name, "command": shlex.join(part.command), "seconds": round(time.perf_counter() - began, 1), "exit_code": code}
    return done | {"result": result, "said": text[-3000:] if part.reads == "code" or code != 0 else ""}


def card(gpu: str | None) -> str:
    """ "NVIDIA H100 80GB HBM3 as h100-80gb-hbm3; no card as cpu."""
    return re.sub(r"[^a-z0-9]+", "-", (gpu or "cpu").lower().removeprefix("nvidia ")).strip("-")


def driver() -> dict[str, str]:
    """What nvidia-smi says of driver, clocks and power; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader", "--id=0"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    return dict(zip(SMI_FIELDS.split(","), (word.strip() for word in said.split(",")), strict=False))


def require_gpu(args: ReportArgs) -> float:
    """The memory of the first GPU in GiB, 0 for the stand-in. RuntimeError where torch sees none."""
    import torch

    if args.device == "cpu":
        return 0.0
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"no GPU here (torch {torch.__version__} sees none): run it on the machine that has one; "
            "--device cpu --quick --out DIR tries the report itself"
        )
    return float(torch.cuda.get_device_properties(0).total_memory / 2**30)


def markdown(report: dict[str, Any]) -> Iterator[str]:
    """The report for people, line by line."""
    done = {part["name"]: part for part in report["parts"]}
    seen = report["machine"]
    yield f"# {seen['gpu'] or seen['cpu']}, torch {seen['torch']}, Python {seen['python']}, {seen['date'][:10]}\n"
    yield "| part | seconds | outcome |"
    yield "|---|---:|---|"
    for part in done.values():
        yield f"| {part['name']} | {part['seconds']:.0f} | {outcome(part)} |"
    step = done["step"]["result"]
    if step is not None:
        yield "\n| batch | step | images/s | from | to | step ms | p95 | data wait | MFU | peak MiB |"
        yield "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|"
        yield from (_line(row) for row in step["rows"])
        yield from (f"| {entry['batch_size']} | {entry['name']} | missing: {entry['install']} |" for entry in step["missing"])
        yield "\n| batch | ratio | median | from | to |"
        yield "|---:|---|---:|---:|---:|"
        for ratio in step["ratios"]:
            low, high = ratio["spread"]
            yield f"| {ratio['batch_size']} | {ratio['name']}, {ratio['mode']} | {ratio['median']:.3f} | {low:.3f} | {high:.3f} |"
        for goal in step["goals"]:
            figure = "not measured" if goal["figure"] is None else f"{goal['figure']:.4g}, {'met' if goal['met'] else 'not met'}"
            yield f"\ngoal: {goal['goal']}: {figure}"
    for kernel in done["augmentation"]["result"] or ():
        if kernel["value"] is not None:
            yield f"\n{kernel['name']}: {kernel['value']:.4f} {kernel['unit']} ({kernel['low']:.4f} to {kernel['high']:.4f})"


def _line(row: dict[str, Any]) -> str:
    wait, mfu = ("-" if row[key] is None else f"{row[key]:.1%}" for key in ("data_wait_share", "mfu"))
    low, high = row["spread"]["images_per_s"]
    name = ", ".join(word for word in (row["name"], row["source"], row["mode"]) if word != "-")
    rates = f"{row['images_per_s']:,.1f} | {low:,.1f} | {high:,.1f} | {row['step_ms']:.2f} | {row['step_p95_ms']:.2f}"
    return f"| {row['batch_size']} | {name} | {rates} | {wait} | {mfu} | {row['peak_mib']:,.0f} |"


def outcome(part: dict[str, Any]) -> str:
    """In a few words: the tests' own summary, or what went wrong."""
    lines = part["said"].strip().splitlines()
    if part["exit_code"] is None:
        return "stopped, its time was over" + ("" if part["result"] is None else "; the batch sizes done by then are here")
    if part["exit_code"]:
        return f"exit code {part['exit_code']}: {lines[-1] if lines else 'said nothing'}".replace("|", "/")
    counted = [line.strip("= ") for line in lines if re.search(r"\d (passed|skipped)", line)]  # pytest's last line, or nearly
    return counted[-1] if counted else "done"


def report_main(argv: Sequence[str]) -> None:
    """`python -m cossl.tools.gpu_report`. Raises ValueError, OSError or RuntimeError for what a user can mend; exits 1 if a part failed."""
    args = parse_flags(ReportArgs, argv, "gpu-report", __doc__ or "")
    memory_gib, began = require_gpu(args), time.perf_counter()
    here = {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
    done: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="cossl-gpu-") as scratch:
        for part in parts(args, memory_gib):
            left = 60 * args.minutes - (time.perf_counter() - began)
            print(f"gpu-report: {part.name}, at most {max(1, min(part.most_s, left)):.0f} s", file=sys.stderr, flush=True)
            done.append(run_part(part, max(1, min(part.most_s, left)), Path(scratch), os.environ | here))
    seen = machine() | {"driver": driver()}
    report: dict[str, Any] = {"machine": seen, "command": shlex.join(["python", "-m", "cossl.tools.gpu_report", *argv]), "parts": done}
    report["settings"] = {"minutes": args.minutes, "device": args.device, "quick": args.quick}
    report["seconds"] = round(time.perf_counter() - began, 1)
    version = ".".join(importlib.metadata.version("torch").split(".")[:2])
    path = (args.out or ROOT / "tools" / "results") / f"gpu-{card(seen['gpu'])}-torch{version}-{datetime.now():%Y-%m-%d}.json"
    replace_text(path, json.dumps(report, indent=1))
    print("\n".join(markdown(report)))
    print(f"\n{path}")
    if any(part["exit_code"] != 0 for part in done):
        raise SystemExit(1)


def main() -> None:
    """What a user can mend ends in one line and exit code 2."""
    try:
        report_main(sys.argv[1:])
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"gpu-report: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
