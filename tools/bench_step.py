"""`cossl bench step PRESET`: how fast the training step is, what limits it, and what torch.compile and the peers make of the same work.

In one run and in turn, for each batch size, eager and compiled: `synthetic`, one resident batch (the compute ceiling); `loader`, the real
loader as in training; `cached`, some of its batches kept on the device (what a loader without cost would give). Beside them the loader
alone and the augmentation alone. Times are the device's own: events on a GPU. Ratios are taken turn by turn; their median is shown.

TFLOP/s are of the products and convolutions that torch counts in the step, MFU their share of a matrix product measured in this run. GB/s
of the eager step are what its operations read and write; compiled, at least what its products and convolutions do (the rest is fused).
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro

from cossl.models.checkpoint import State
from cossl.models.co_ssl import CoSsl
from cossl.models.flags import flatten, parse_flags, replace_text
from cossl.models.optim import make_optimizer
from cossl.models.probe import OnlineProbe
from cossl.models.progress import manual_gc
from cossl.models.run_folder import code_version
from cossl.pipelines import find_split, make_loader
from cossl.pipelines.augment import augment
from cossl.pipelines.batch import Batch, Loader, LoaderSpec, to_device
from cossl.pipelines.demo_set import cache_dir, demo_data
from cossl.pipelines.synthetic import NUM_CLASSES, NUM_SAMPLES, SyntheticLoader
from cossl.tools.bench import did_you_mean, installed, machine, num_cores, progress, require_folder_of
from cossl.tools.bench_figures import figures, judged, ratios, table
from cossl.tools.bench_peers import PEERS, Job
from cossl.tools.bench_pictures import LARGEST_SET, default_source, prepare
from cossl.tools.bench_turns import OURS, RAMP, Clock, Row, Turn, Work, ceilings, count, take_turn, write_profile
from cossl.train import PRESETS, Config, build, position_specs, step_

CACHED, MOST_PICTURES, QUICK_TURN_S = 8, 16384, 3.0
LR, TAU, EPOCH = 1e-4, 0.99, 2.0  # of every step: what they are costs nothing


def _sizes(words: list[str]) -> tuple[int, ...]:
    return tuple(int(number) for word in words for number in word.split(",") if number)


SIZES = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="N,N,...",
    instance_from_str=_sizes,
    is_instance=lambda value: isinstance(value, tuple),
    str_from_instance=lambda value: [",".join(map(str, value))],
)


@dataclass(frozen=True)
class StepArgs:
    """The command line of `cossl bench step PRESET`: its own flags, and those of `cossl train PRESET`."""

    run: Annotated[Config, tyro.conf.arg(name="")]
    batch_sizes: Annotated[tuple[int, ...], SIZES] = ()
    """Batch sizes, each measured by itself (default: the preset's, at most 256 on a GPU; what a CPU can do in a second or so)."""
    steps: int | None = None
    """Timed steps of a row in each turn (default: 40 on a GPU, 8 on a CPU; 10 and 5 with --quick)."""
    repeats: int | None = None
    """Turns of each row (default: 5; 3 with --quick)."""
    quick: bool = False
    """Fewer steps and turns: the demo within two minutes on 2 cores."""
    profile: Path | None = None
    """Folder for a trace of each row that trains on the real loader (chrome://tracing, Perfetto) and its ten costliest operations."""
    peers: bool = False
    """The same work by lightly and byol-pytorch, at the smallest batch size."""
    json: Path | None = None
    """Write everything to this file, anew after each batch size."""

    def __post_init__(self) -> None:
        for name in ("steps", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: expected 1 or more")
        if any(size < 2 for size in self.batch_sizes):
            raise ValueError(f"--batch-sizes {','.join(map(str, self.batch_sizes))}: expected 2 or more, as --batch-sizes 128,256")
        require_folder_of("--json", self.json)
        require_folder_of("--profile", self.profile)


def parse(argv: Sequence[str]) -> tuple[str, StepArgs]:
    """Preset and flags. The compiled step is measured by default where there is a GPU, with as many loader workers as there are cores."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: cossl bench step PRESET [flags]\n\npresets: {', '.join(PRESETS)}\n\nflags: cossl bench step PRESET --help")
        raise SystemExit(0 if argv else 2)
    name = argv[0]
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{did_you_mean(name, PRESETS)}")
    preset = PRESETS[name]()
    config = replace(preset, compile=torch.cuda.is_available(), loader=replace(preset.loader, workers=num_cores()))
    return name, parse_flags(StepArgs, argv[1:], f"cossl bench step {name}", __doc__ or "", default=StepArgs(config))


# ---- what is measured -------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How much of what is measured."""

    config: Config
    device: torch.device
    sizes: tuple[int, ...]
    turns: int
    steps: int
    most_s: float
    warmup: int


def planned(args: StepArgs) -> Plan:
    config = args.run
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; use --device cpu")
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    most = 256 if gpu else max(4, min(32, 32 * 32**2 // config.views.size_px**2))
    steps = args.steps or ((10 if args.quick else 40) if gpu else (5 if args.quick else 8))
    sizes = tuple(sorted(set(args.batch_sizes))) or (min(config.batch_size, most),)
    return Plan(
        config, device, sizes, args.repeats or (3 if args.quick else 5), steps, QUICK_TURN_S if args.quick else math.inf, 20 if gpu else 1
    )


class Source(NamedTuple):
    """The pictures: for our loader, and as an image folder for the peers (None: there is none)."""

    pictures: Path
    folder: Path | None
    what: str


def pictures(preset: str, plan: Plan, scratch: Path) -> Source:
    """--data, the demo's pictures, or a set of pictures as large as one epoch of a turn."""
    config, backend = plan.config, plan.config.loader.backend
    if backend == "synthetic":
        return Source(Path(), None, "random pixels")
    if config.data is not None or preset == "demo":
        data = config.data or demo_data()
        folder = data / "train"
        return Source(find_split(data, "train", backend), folder if folder.is_dir() else None, str(data))
    wanted = plan.sizes[-1] * (2 * _ahead(config) + RAMP + plan.steps + 1)
    found = prepare(default_source(), min(max(wanted, LARGEST_SET), MOST_PICTURES), cache_dir(), scratch, with_beton=True)
    assert found.beton is not None
    beton = backend in ("auto", "ffcv")
    return Source(found.beton if beton else found.folder, found.folder, f"{found.count} pictures, {found.source}")


def _ahead(config: Config) -> int:
    """Batches that the loader may have made before it is asked: they are let go at the beginning of a turn."""
    return 2 * config.loader.workers if config.loader.backend == "torch" else config.loader.batches_ahead + 1


def stepper(config: Config, model: CoSsl, device: torch.device, classes: int) -> Callable[[str, Batch], None]:
    """One step of the trainer: ("eager" or "compiled", batch) -> None."""
    model.online.backbone.recompute = config.recompute
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    probe = OnlineProbe(model.online.backbone.out_channels, classes).to(device)
    state = State(model, make_optimizer(model.online.named_parameters(), config.optim), scaler, probe)
    forwards: dict[str, Any] = {"eager": model, "compiled": torch.compile(model, fullgraph=True)}
    return lambda mode, batch: step_(state, forwards[mode], batch, config, LR, TAU, EPOCH)


def _epochs(loader: Loader, device: torch.device) -> Iterator[Batch]:
    """The loader's batches on the device, epoch after epoch: a new one every time this is called."""
    return to_device((batch for epoch in itertools.count() for batch in loader.epoch(epoch)), device)


def _augment(batch: Batch) -> None:
    for v, view in enumerate(batch.split()):
        augment(view, batch.photometry[:, v])


def our_rows(plan: Plan, config: Config, source: Source, held: ExitStack) -> tuple[list[Row], Work]:
    """Rows of our step at this config's batch size, and the work in one step. What they need is `held`."""
    device, size, steps = plan.device, config.batch_size, plan.steps
    model, how = build(config, device), config.loader
    spec = LoaderSpec(config.views.specs(), size, config.seed, position_specs(config, model), how.workers, how.batches_ahead)
    if size > NUM_SAMPLES:
        raise ValueError(f"--batch-sizes {size}: the synthetic batch has at most {NUM_SAMPLES}")
    loader = make_loader(how.backend, source.pictures, replace(spec, order=how.order, os_cache=how.os_cache))
    held.callback(loader.close)
    step = stepper(config, model, device, max(len(loader.class_names), NUM_CLASSES))
    resident = next(SyntheticLoader(None, spec).epoch(0)).to(device)
    cached = list(itertools.islice(_epochs(loader, device), CACHED))
    sources: dict[str, tuple[Callable[[], Iterator[Batch]], int]] = {
        "synthetic": (lambda: itertools.repeat(resident), 0),
        "loader": (lambda: _epochs(loader, device), _ahead(config)),
        "cached": (lambda: itertools.cycle(cached), 0),
    }
    rows = [
        Row(OURS, name, mode, size, lambda batch, mode=mode: step(mode, batch), batches, ahead, steps, plan.most_s)  # type: ignore[misc]
        for mode in ("eager", *(["compiled"] if config.compile else []))
        for name, (batches, ahead) in sources.items()
    ]
    rows.append(Row(OURS, "loader alone", "-", size, lambda batch: None, *sources["loader"], steps, plan.most_s))
    rows.append(Row(OURS, "augmentation alone", "-", size, _augment, *sources["synthetic"], steps, plan.most_s))
    seen, colours = count(lambda: step("eager", resident)), count(lambda: _augment(resident))
    ours = Work(seen.flops, max(seen.all_bytes - colours.all_bytes, 0), seen.product_bytes)  # compiled or numba: it is not what was counted
    return rows, ours


def peer_rows(plan: Plan, config: Config, source: Source, report: dict[str, Any]) -> list[Row]:
    """Rows of the peers that are installed; those that are not, or cannot start, go into the report."""
    rows = []
    for name, peer in PEERS.items():
        if not installed(peer.package):
            report["missing"].append({"name": name, "batch_size": config.batch_size, "install": peer.install})
            continue
        try:
            progress(f"starting {name}")
            running = peer.start(Job(config, plan.device, source.folder))
        except (ImportError, RuntimeError) as error:
            report["failed"].append(_failed(name, "start", "eager", config.batch_size, error))
            continue
        size, workers = config.batch_size, config.loader.workers
        resident = lambda r=running: itertools.repeat(r.resident)  # noqa: E731
        rows.append(Row(name, "synthetic", "eager", size, running.step, resident, 0, plan.steps, plan.most_s))
        if running.open is None:
            report["failed"].append(
                _failed(name, "loader", "eager", size, ValueError(f"needs an image folder, and {source.what} has none"))
            )
            continue
        # Each of its workers makes whole batches, so that they come in bursts of as many.
        rows.append(Row(name, "loader", "eager", size, running.step, running.open, workers, max(plan.steps, workers), plan.most_s))
    return rows


def _failed(name: str, source: str, mode: str, batch_size: int, error: Exception) -> dict[str, Any]:
    said = str(error).strip().splitlines() or [type(error).__name__]
    progress(f"{name}, {source}, {mode}, batch {batch_size} failed: {said[0]}")
    return {"name": name, "source": source, "mode": mode, "batch_size": batch_size, "reason": said[0]}


def measure_rows(rows: list[Row], plan: Plan, failed: list[dict[str, Any]]) -> list[Row]:
    """The rows, measured in turns; one that fails (out of memory, no compiler) costs no other row and goes to `failed`."""
    clock = Clock(plan.device)

    def attempt(row: Row, do: Callable[[], Turn]) -> Turn | None:
        try:
            return do()
        except RuntimeError as error:
            failed.append(_failed(row.name, row.source, row.mode, row.batch_size, error))
            return None

    for row in list(rows):
        progress(f"batch {row.batch_size}: warming up {row}")
        short = replace(row, ahead=0, ramp=plan.warmup if row.source == "synthetic" else 1, steps=1)
        if attempt(row, lambda short=short: take_turn(short, clock)) is None:  # type: ignore[misc]
            rows.remove(row)
    for turn in range(plan.turns):
        with manual_gc():  # as in training
            for row in list(rows):
                if (taken := attempt(row, lambda row=row: take_turn(row, clock))) is None:  # type: ignore[misc]
                    rows.remove(row)
                else:
                    row.turns.append(taken)
        said = ", ".join(f"{row} {row.rates[-1]:,.0f}" for row in rows)
        progress(f"batch {rows[0].batch_size if rows else '-'}: turn {turn + 1} of {plan.turns}, pictures/s: {said}")
    return rows


# ---- the command ------------------------------------------------------------------------------------------------------------------


def measure(preset: str, args: StepArgs, plan: Plan, report: dict[str, Any], finish: Callable[[], None]) -> None:
    """Adds the rows of every batch size to the report, and calls `finish` after each."""
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    report["ceilings"] = ceilings(plan.device)
    with tempfile.TemporaryDirectory(prefix="cossl-step-") as scratch:
        progress("preparing pictures")
        source = pictures(preset, plan, Path(scratch))
        report["settings"]["pictures"] = source.what
        for size in plan.sizes:
            torch.compiler.reset()  # or a second size would be compiled for any size, and training has one
            config = replace(plan.config, batch_size=size)
            with ExitStack() as held:
                try:
                    rows, work = our_rows(plan, config, source, held)
                except torch.OutOfMemoryError as error:
                    report["failed"].append(_failed(OURS, "start", "eager", size, error))
                    continue
                if args.peers and size == plan.sizes[0]:
                    rows += peer_rows(plan, config, source, report)
                rows = measure_rows(rows, plan, report["failed"])
                report["rows"] += [figures(row, work, report["ceilings"], config.precision) for row in rows]
                finish()
                for row in rows if args.profile else ():
                    if (row.name, row.source) == (OURS, "loader"):
                        assert args.profile is not None
                        print(write_profile(row, Clock(plan.device), args.profile))
            del rows


def step_main(argv: Sequence[str]) -> None:
    """`cossl bench step PRESET`. Raises ValueError or OSError for a user's mistake; exits with 1 when a row failed."""
    preset, args = parse(argv)
    plan, began = planned(args), time.perf_counter()
    settings = {"preset": preset, "batch_sizes": plan.sizes, "turns": plan.turns, "steps": plan.steps, "warmup": plan.warmup}
    settings |= {
        "device": plan.device.type,
        "views": len(plan.config.views.specs()),
        "config": flatten(plan.config),
        "code": code_version(),
    }
    report: dict[str, Any] = {"machine": machine(), "command": shlex.join(["cossl", "bench", "step", *argv]), "settings": settings}
    report |= {"ceilings": {}, "rows": [], "missing": [], "failed": [], "ratios": [], "goals": [], "seconds": 0.0}

    def finish() -> None:
        report["ratios"] = ratios(report["rows"])
        report["goals"] = judged(report)
        report["seconds"] = round(time.perf_counter() - began, 1)
        if args.json is not None:
            replace_text(args.json, json.dumps(report, indent=1))

    measure(preset, args, plan, report, finish)
    finish()
    print("\n".join(table(report)))
    if report["failed"]:
        raise SystemExit(1)
