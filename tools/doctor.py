"""`cossl doctor`: where a picture's time goes on this machine, which stage limits, and which knob to turn.

Every stage is measured alone, for a few seconds, with the views and the model of a preset: reading from storage, decoding and
cutting (the loader), moving to the GPU, augmenting, and one optimizer step. Then the packages that are missing.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from cossl.models.checkpoint import State
from cossl.models.co_ssl import CoSsl
from cossl.models.flags import parse_flags
from cossl.models.optim import make_optimizer
from cossl.models.probe import OnlineProbe
from cossl.pipelines import choose_backend, find_split, make_loader
from cossl.pipelines.augment import augment
from cossl.pipelines.batch import Batch, LoaderSpec
from cossl.pipelines.beton import Beton, list_image_folder
from cossl.pipelines.dali_loader import INSTALL_DALI
from cossl.pipelines.demo_set import cache_dir
from cossl.pipelines.ffcv_stock import INSTALL_FFCV
from cossl.pipelines.views import evaluation
from cossl.tools.bench import Stopwatch, installed, machine, num_cores, progress
from cossl.tools.bench_pictures import LARGEST_SET, prepare
from cossl.train import PRESETS, Config, build, position_specs, step_

INSTALL_LOG = "pip install -c constraints.txt -e '.[log]'"
OPTIONAL = {  # package: what it is for, the line that installs it
    "ffcv": ("the benchmark's peer and its floor", INSTALL_FFCV),
    "nvidia.dali": ("the DALI loader", INSTALL_DALI),
    "matplotlib": ("curves.png", INSTALL_LOG),
    "tensorboard": ("TensorBoard logs", INSTALL_LOG),
}
STAGE_S, READS, HEADROOM = 2.0, 256, 1.5
SCREEN_COLUMNS = 100
SMALL_SHM_BYTES = 1 << 30  # the torch loader's processes hand their batches over in /dev/shm


@dataclass(frozen=True)
class DoctorArgs:
    """The command line of `cossl doctor`; each field's text is its help."""

    data: Path | None = None
    """Folder with train.beton or train/; default: generated pictures, 500 x 375 px."""

    preset: Literal["auto", "demo", "imagenette", "in1k"] = "auto"
    """Whose views and model: auto is in1k with a GPU and demo without one."""

    workers: int = field(default_factory=num_cores)
    """Threads or processes of the loader (default: one per core)."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"--workers {self.workers}: expected 1 or more")


class Stage(NamedTuple):
    """A stage, pictures/s it can sustain (None: there is nothing to do), what was seen, and the knob for when it limits."""

    name: str
    rate: float | None
    seen: str
    knob: str


# ---- the stages -------------------------------------------------------------------------------------------------------------------


def _places(source: Path) -> list[tuple[Path, int, int]]:
    """(file, offset, bytes) of READS pictures, at random: whole files, or pieces of the beton as large as its pictures are on average."""
    draw = random.Random(0)
    if source.is_dir():
        files = list_image_folder(source)[0]
        return [(file, 0, file.stat().st_size) for file in draw.sample(files, min(READS, len(files)))]
    total, mean = source.stat().st_size, int(Beton(source).sizes.mean())
    return [(source, draw.randrange(max(1, total - mean)), mean) for _ in range(READS)]


def _read(place: tuple[Path, int, int], drop: bool = False) -> int:
    """Reads the bytes, or makes the page cache forget them; returns how many."""
    path, offset, length = place
    handle = os.open(path, os.O_RDONLY)
    try:
        if not drop:
            return len(os.pread(handle, length, offset))
        os.fsync(handle)  # what was written just now could not be forgotten
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, offset, length, os.POSIX_FADV_DONTNEED)
        return 0
    finally:
        os.close(handle)


def storage(source: Path, workers: int) -> Stage:
    """Random reads of whole pictures by `workers` threads, first from the disk, then from the page cache. Only those pages are dropped."""
    places, rates, cold = _places(source), [], 0.0
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda place: _read(place, drop=True), places))
        for _ in ("cold", "warm"):
            began, read, done = time.perf_counter(), 0, 0
            for i in range(0, len(places), 4 * workers):
                part = places[i : i + 4 * workers]
                read, done = read + sum(pool.map(_read, part)), done + len(part)
                if time.perf_counter() - began > STAGE_S:
                    break
            seconds = max(time.perf_counter() - began, 1e-9)
            cold = cold or done / seconds
            rates.append(read / seconds / 1e6)
    seen = f"random reads {rates[0]:,.0f} MB/s cold, {rates[1]:,.0f} MB/s warm"
    if rates[0] > 0.7 * rates[1]:
        seen += " (the cache could not be emptied, or the disk is memory)"
    knob = "copy the data to a local disk or to /dev/shm; smaller files: cossl convert --max-side-px 500"
    return Stage("storage, cold", cold, seen, knob)


def _cost(backend: str, source: Path, spec: LoaderSpec) -> tuple[float, Batch]:
    """CPU-ms per picture of a loader alone, and its first batch, which is not counted: it compiles, and starts threads or processes."""
    loader = make_loader(backend, source, spec)
    try:
        batches = (batch for epoch in range(1_000_000) for batch in loader.epoch(epoch))
        first = next(batches)
        pictures = 0
        with Stopwatch() as watch:
            began = time.perf_counter()
            while not pictures or time.perf_counter() - began < STAGE_S / 2:
                pictures += len(next(batches).index)
        batches.close()
    finally:
        loader.close()
    return 1e3 * watch.cpu_s / pictures, first


def loading(backend: str, source: Path, spec: LoaderSpec) -> tuple[Stage, float, Batch]:
    """The loader alone: its stage, CPU-ms per picture, and a batch. How that divides, one and four equal views of the middle tell."""
    cost, batch = _cost(backend, source, spec)
    middle, size = evaluation(spec.recipe[0].size_px, centre_frac=1.0), spec.recipe[0].size_px
    one, four = (_cost(backend, source, replace(spec, recipe=middle * copies, positions=()))[0] for copies in (1, 4))
    cut = max(four - one, 0) / 3
    seen = f"{cost:.2f} CPU-ms a picture (of its middle: decoding {max(one - cut, 0):.2f}, each cut to {size} px {cut:.2f})"
    knob = f"--loader.workers {num_cores()} (one per core); fewer pixels: cossl convert --max-side-px 400; less decoding: --mode proportion"
    if source.is_dir():
        knob = "cossl convert the folder to a beton, whose loader needs fewer cores; " + knob
    return Stage("decode and cut", 1e3 * min(spec.workers, num_cores()) / cost, seen, knob), cost, batch


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the best of as many as fit into the stage's time, at least one; the very first is not counted."""
    step()
    best, began, calls = math.inf, time.perf_counter(), 0
    while not calls or time.perf_counter() - began < STAGE_S:
        before = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best, calls = min(best, time.perf_counter() - before), calls + 1
    return best


def transfer(batch: Batch, device: torch.device) -> Stage:
    """A batch from pinned memory to the GPU."""
    if device.type == "cpu":
        return Stage("transfer", None, "no GPU: nothing to move", "")
    pinned = batch.pin_memory()
    seconds, size = _seconds(lambda: pinned.to(device), device), sum(view.nbytes for view in batch.views)
    knob = "the link is slow: look at nvidia-smi -q (PCIe generation and width), and keep processes on the GPU's own socket"
    return Stage("transfer", len(batch.index) / seconds, f"{size / seconds / 1e9:.1f} GB/s from pinned memory", knob)


def augmenting(batch: Batch, device: torch.device) -> tuple[Stage, float]:
    """The photometric augmentation of all views; its stage, and seconds per batch."""
    views = list(enumerate(batch.split()))
    seconds = _seconds(lambda: [augment(view, batch.photometry[:, v]) for v, view in views], device)
    seen = f"{1e3 * seconds / len(batch.index) / len(views):.3f} ms a view on {device}"
    knob = "smaller views (--views.size-px)" + ("" if device.type == "cuda" else "; or a GPU")
    return Stage("augment", len(batch.index) / seconds, seen, knob), seconds


def stepping(config: Config, model: CoSsl, batch: Batch, device: torch.device, augment_s: float) -> Stage:
    """Forward, backward and optimizer of the preset, without its augmentation and without torch.compile."""
    optimizer, scaler = make_optimizer(model.online.named_parameters(), config.optim), torch.amp.GradScaler(device.type, enabled=False)
    state = State(model, optimizer, scaler, OnlineProbe(model.online.backbone.out_channels, int(batch.label.max()) + 2).to(device))
    seconds = _seconds(lambda: step_(state, model, batch, config, 1e-4, 0.99, 0), device)
    alone = max(seconds - augment_s, 1e-9)
    seen = f"{1e3 * alone:,.1f} ms a step of {len(batch.index)} pictures, {config.precision}, not compiled"
    faster = "a larger --batch-size, a faster GPU" if device.type == "cuda" else "a GPU, a smaller --model.width"
    halved = "" if config.precision == "bf16" else "--precision bf16, "
    knob = f"this is the model's own speed, and the loader keeps up: {halved}{faster}"
    return Stage("step", len(batch.index) / alone, seen, knob)


# ---- the check-up -----------------------------------------------------------------------------------------------------------------


def measure(args: DoctorArgs, scratch: Path) -> tuple[list[str], list[Stage], float]:
    """What was measured on, the stages, and the loader's CPU-ms per picture."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preset = args.preset if args.preset != "auto" else ("in1k" if device.type == "cuda" else "demo")
    config = PRESETS[preset]()
    source, what = args.data, str(args.data)
    if source is None:
        progress("preparing pictures")
        pictures = prepare(None, LARGEST_SET, cache_dir(), scratch, with_beton=True)
        source, what = pictures.beton or pictures.folder, pictures.source
    else:
        source = find_split(source, "train")
    backend = choose_backend("auto", source)
    views, model = config.views.specs(), build(config, device)
    # A step on a CPU must not take the whole half minute: 32 pictures of demo's size, 4 of in1k's.
    batch_size = 64 if device.type == "cuda" else max(4, min(32, 32 * 32**2 // config.views.size_px**2))
    spec = LoaderSpec(views, batch_size, positions=position_specs(config, model), workers=args.workers)
    where = [
        f"pictures   {what}, {backend} loader, {args.workers} worker{'s' if args.workers > 1 else ''}",
        f"preset     {preset}: {len(views)} x {config.views.size_px} px, {config.model.backbone}",
    ]
    progress("storage, then the loader")
    stages = [storage(source, args.workers)]
    loaded, cost, batch = loading(backend, source, spec)
    progress("augmentation, then the step")
    moved, batch = transfer(batch, device), batch.to(device)
    augmented, seconds = augmenting(batch, device)
    return where, [*stages, loaded, moved, augmented, stepping(config, model, batch, device, seconds)], cost


def _shown(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


def verdict(stages: Sequence[Stage], cost_ms: float, gpu: bool) -> list[str]:
    """The stage that limits and its knob, the rate to expect, and how many workers that takes."""
    rates = {stage.name: stage.rate for stage in stages if stage.rate is not None}
    slowest = min((stage for stage in stages if stage.rate is not None), key=lambda stage: stage.rate or 0)
    device = 1 / (1 / rates["augment"] + 1 / rates["step"])
    if gpu:  # the GPU's work runs beside the loader's
        expected = min(device, *(rate for name, rate in rates.items() if name not in ("augment", "step")))
    else:  # the cores do everything
        expected = min(rates["storage, cold"], 1 / (1 / device + 1 / rates["decode and cut"]))
    workers = math.ceil(HEADROOM * device * cost_ms / 1e3)
    fed, sharing = ("the GPU", "the GPU works beside the loader") if gpu else ("the model", "the cores share all stages")
    feeding = f"--loader.workers {workers} is enough to keep {fed} fed, with {HEADROOM:g}x to spare"
    if workers > num_cores():
        feeding = f"keeping {fed} fed would take {workers} cores, and there are {num_cores()}"
    return [
        f"limit      {slowest.name}: {_shown(slowest.rate)} pictures/s",
        f"knob       {slowest.knob}",
        f"expect     about {_shown(expected)} pictures/s in training: {sharing}",
        f"workers    {feeding}",
    ]


def check_up() -> list[str]:
    """The machine, the packages that are there, and for those missing what they are for and the line that installs them."""
    seen = machine()
    cores = f"{num_cores()} of {os.cpu_count()} cores" if num_cores() != os.cpu_count() else f"{num_cores()} cores"
    lines = [f"machine    {seen['cpu']}, {cores}, {seen['memory_gib']} GiB, {seen['gpu'] or 'no GPU'}"]
    present = [f"{name} {seen[name]}" for name in ("torch", "torchvision", "numba", "ffcv", "nvidia-dali-cuda130") if name in seen]
    lines.append(f"packages   Python {seen['python']}, {', '.join(present)}")
    for package, (purpose, install) in OPTIONAL.items():
        if not installed(package):
            lines.append(f"missing    {package}, for {purpose}: {install}")
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > 2 * num_cores():
        lines.append(f"warning    load average {load:.1f} on {num_cores()} cores: others use them, and what follows looks slower")
    shm = Path("/dev/shm")
    if shm.is_dir() and shutil.disk_usage(shm).total < SMALL_SHM_BYTES:
        size = shutil.disk_usage(shm).total / 2**20
        lines.append(f"warning    /dev/shm has {size:,.0f} MiB: the torch loader may run out of it (docker run --shm-size 2g)")
    return lines


def _fitted(lines: Sequence[str], indent: int) -> list[str]:
    """The lines, those too long for the screen in several, all but the first of these indented."""
    fit = textwrap.TextWrapper(SCREEN_COLUMNS, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False)
    return [part for line in lines for part in fit.wrap(line)]


def doctor_main(argv: Sequence[str]) -> None:
    """`cossl doctor [--data DIR]`. Raises ValueError or OSError for a user's mistake."""
    args = parse_flags(DoctorArgs, argv, "cossl doctor", __doc__ or "")
    with tempfile.TemporaryDirectory(prefix="cossl-doctor-") as scratch:
        where, stages, cost = measure(args, Path(scratch))
    print("\n".join([*_fitted([*check_up(), *where], 11), ""]))
    seen = [f"{stage.name:<16}{_shown(stage.rate):>12}   {stage.seen}" for stage in stages]
    print("\n".join([f"{'stage':<16}{'pictures/s':>12}   seen", *_fitted(seen, 31), ""]))
    print("\n".join(_fitted(verdict(stages, cost, torch.cuda.is_available()), 11)))
