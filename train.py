"""Train CO-SSL, end to end: `cossl train PRESET [flags]` (`cossl train demo` needs nothing else).

Read top to bottom: what a run is (Config and presets), where its pictures come from, one step, the loop, the evaluation.
A run is a function of its config and seed. Everything it learns is in its folder: config.json, metrics.jsonl, last.pt and previous.pt,
batch.png (a batch as the network sees it), curves.png, results.json.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from cossl.models import checkpoint, probe, run_folder
from cossl.models.co_ssl import TARGET_VIEWS, CoSsl, LossConfig, ModelConfig, effective_rank, has_collapsed
from cossl.models.optim import OptimConfig, ema_tau, learning_rate, make_optimizer, peak_lr
from cossl.models.run_folder import flatten
from cossl.models.run_folder import replace_text as replace_text
from cossl.pipelines import LoaderConfig, choose_backend, find_split, make_loader
from cossl.pipelines.augment import augment, normalize
from cossl.pipelines.batch import Batch, Loader, LoaderSpec, to_device
from cossl.pipelines.convert import convert
from cossl.pipelines.demo_set import make_demo_set
from cossl.pipelines.picture import draw_batch, draw_curves
from cossl.pipelines.positions import PositionsConfig, PositionSpec
from cossl.pipelines.views import ViewsConfig, evaluation

# ------------------------------------------------------------------------------------------------- what a run is


@dataclass(frozen=True)
class Config:
    """A run: the everyday flags here, the rest by section."""

    data: Path | None = None
    """Folder with train.beton and val.beton (see `cossl convert`), or with image folders train/ and val/."""
    epochs: int = 100
    """Passes over the training pictures."""
    batch_size: int = 4096
    """Pictures per optimizer step, over all devices."""
    device_batch_size: int = 0
    """Pictures that pass through the network at once on each device, 0 for its whole share; fewer means that gradients are accumulated.
    Batch norms, and MoCo v3's keys, then see so many."""
    seed: int = 0
    """Fixes the initial weights, the order of the pictures, every crop and every colour."""
    run_dir: Path | None = None
    """Where the run is written; default runs/<preset>-<date>-<time>."""
    resume: bool = False
    """Go on from the last checkpoint in --run-dir."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 autocast, or float32 throughout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU if there is one."""
    compile: bool = True
    """torch.compile the model on a GPU; on a CPU it gains nothing and is left out."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl, which is also how often the host waits for the device."""
    checkpoint_every: int = 0
    """Steps between two checkpoints; 0 means once an epoch."""
    eval_px: int = 224
    """Side of the pictures on which the frozen features are tested."""
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    positions: PositionsConfig = field(default_factory=PositionsConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        for name, low in [("epochs", 1), ("batch_size", 2), ("log_every", 1), ("checkpoint_every", 0), ("seed", 0), ("eval_px", 16)]:
            if getattr(self, name) < low:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {low} or more")
        if self.device_batch_size and (self.device_batch_size < 2 or self.batch_size % self.device_batch_size):
            fits = [n for n in range(2, self.batch_size + 1) if self.batch_size % n == 0]
            near = min(fits, key=lambda n: abs(n - self.device_batch_size))
            raise ValueError(f"--device-batch-size {self.device_batch_size} does not divide --batch-size {self.batch_size}: try {near}")
        if self.optim.warmup_epochs >= self.epochs:
            raise ValueError(f"--optim.warmup-epochs {self.optim.warmup_epochs}: expected fewer than --epochs {self.epochs}")
        if self.model.width < 8:
            # 2, 4, 5, 6 and 7 channels ended in "free(): invalid size" in the backward pass of torch 2.15 on a CPU; 8 and more ran.
            raise ValueError(f"--model.width {self.model.width}: expected 8 or more, torch's channels-last convolutions crash below that")


def demo() -> Config:
    """CO-BYOL on generated pictures whose class is which parts occur together: about three minutes on 2 CPU cores."""
    model = ModelConfig(
        backbone="rf_resnet18", receptive_field=29, width=16, mlp_after_pool=0, hidden_dim=512, out_dim=128, output_norm=True
    )
    optim = OptimConfig("adamw", base_lr=0.016, weight_decay=0.01, warmup_epochs=0.5, ema_tau=0.98)
    small = Config(epochs=8, batch_size=32, precision="fp32", compile=False, log_every=20, eval_px=72, model=model, optim=optim)
    return replace(small, views=ViewsConfig("symmetric", 32, crop_min=0.4, jitter=0.5))


def imagenette() -> Config:
    """CO-BYOL on Imagenette with a half-width ResNet-18 at 64 px: about half an hour on one CPU core; takes --data."""
    model = replace(demo().model, receptive_field=51, width=32, small_image_stem=False)
    optim = replace(demo().optim, base_lr=0.004, ema_tau=0.97)
    return replace(demo(), epochs=16, batch_size=64, eval_px=160, model=model, optim=optim, views=ViewsConfig("byol", 64, crop_min=0.2))


def in1k() -> Config:
    """The headline run: RF99-ResNet50, 100 epochs of ImageNet-1K, batch 4096, BYOL's 100-epoch recipe (needs GPUs)."""
    return Config()


PRESETS: dict[str, Callable[[], Config]] = {"demo": demo, "imagenette": imagenette, "in1k": in1k}

T = TypeVar("T")


def parse_flags(kind: type[T], argv: Sequence[str], prog: str, description: str, default: T | None = None) -> T:
    """What argv makes of a dataclass. A wrong flag or value is a ValueError of one line (tyro prints a box of several)."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            start = tyro.MISSING_NONPROP if default is None else default
            return tyro.cli(kind, args=argv, prog=prog, description=description, default=start, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as error:
        if not error.code:
            raise
        lines = [line.strip(" │") for line in box.getvalue().splitlines()]
        said = [line for line in lines if line and line[0] not in "╭╰─" and not line.startswith("For full helptext")]
        said = re.split(" Got errors: | Argument helptext: ", " ".join(said))[:1]  # what follows is tyro's own affair
        raise ValueError(f"{said[0]} (see {prog} --help)") from None


def parse(argv: Sequence[str]) -> tuple[str, Config]:
    """Preset name and config of `cossl train PRESET [flags]`."""
    listing = "\n".join(f"  {name:<12}{preset.__doc__}" for name, preset in PRESETS.items())
    if not argv or argv[0] in ("-h", "--help"):
        say(f"usage: cossl train PRESET [flags]\n\npresets:\n{listing}\n\nflags: cossl train PRESET --help")
        raise SystemExit(0 if argv else 2)
    name = argv[0]
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1)
        raise ValueError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}" + (f"; did you mean {near[0]}?" if near else ""))
    return name, parse_flags(Config, argv[1:], f"cossl train {name}", PRESETS[name].__doc__ or "", default=PRESETS[name]())


# ------------------------------------------------------------------------------------------------- its pictures


def cache_dir() -> Path:
    """Where generated pictures are kept: $COSSL_CACHE, else ~/.cache/cossl."""
    return Path(os.environ.get("COSSL_CACHE") or "~/.cache/cossl").expanduser()


def demo_data() -> Path:
    """Folder of the demo pictures, generated and converted the first time."""
    root = make_demo_set(cache_dir())
    for split in ("train", "val"):
        if not (root / f"{split}.beton").is_file():
            convert(root / split, root / f"{split}.beton", num_workers=os.cpu_count() or 1)
    return root


def position_specs(config: Config, model: CoSsl) -> tuple[PositionSpec, ...]:
    """For each view size what positions its map has and which are drawn, the global views' first; none for small views left out."""
    sizes = dict.fromkeys(view.size_px for view in config.views.specs())
    small = {px: px != config.views.size_px for px in sizes}
    used = [px for px in sizes if config.loss.small_views or not small[px]]
    return tuple(config.positions.spec(*model.position_grid(px), small=small[px]) for px in used)


def open_loaders(config: Config, positions: tuple[PositionSpec, ...]) -> tuple[Loader, Loader, Loader]:
    """Loaders of the training views, and of train and val pictures as they are."""
    how, backend, workers, data = config.loader, config.loader.backend, config.loader.workers, config.data or Path()
    synthetic = backend == "synthetic"
    if config.data is None and not synthetic:
        raise ValueError("--data is missing: give a folder with train.beton and val.beton (see `cossl convert`), or with train/ and val/")
    train, val = (data if synthetic else find_split(data, split, backend) for split in ("train", "val"))
    recipe = config.views.specs()
    seen = LoaderSpec(recipe, config.batch_size, config.seed, positions, workers, how.batches_ahead, True, how.order, how.os_cache)
    plain = LoaderSpec(evaluation(config.eval_px), 256, workers=workers, shuffle=False)
    loaders = [make_loader(backend, source, spec) for source, spec in [(train, seen), (train, plain), (val, plain)]]
    if loaders[1].class_names != loaders[2].class_names:
        raise ValueError(f"{train} and {val} have different classes: convert both from folders with the same class folders")
    say(f"loader: {choose_backend(backend, train)}, {loaders[0].num_samples:,} train and {loaders[2].num_samples:,} val pictures, {data}")
    return loaders[0], loaders[1], loaders[2]


# ------------------------------------------------------------------------------------------------- its folder

STOP_BEFORE_END_S = 120  # of a job with a known time limit: a step, a checkpoint, and what the site's clock is off
RESUME_MAY_CHANGE = "data run_dir resume eval_px log_every checkpoint_every loader.workers loader.batches_ahead loader.os_cache".split()


def say(line: str) -> None:
    print(line, flush=True)


def load_checkpoint(run_dir: Path, config: Config, num_samples: int) -> tuple[dict[str, Any], str]:
    """(newest whole state, where it was found). ValueError if there is none, or it is of another config or picture set."""
    state, found = checkpoint.newest(run_dir)
    checkpoint.require_config(state, flatten(config), RESUME_MAY_CHANGE, run_dir / found.split(",")[0])
    if state["num_samples"] != num_samples:
        raise ValueError(f"{run_dir} was trained on {state['num_samples']} pictures, --data has {num_samples}")
    return state, found


# ------------------------------------------------------------------------------------------------- one step

Forward = Callable[[list[Tensor], Tensor], dict[str, Tensor]]


def step_(
    model: CoSsl, forward: Forward, optimizer: torch.optim.Optimizer, batch: Batch, config: Config, lr: float, tau: float
) -> dict[str, Tensor]:
    """One optimizer step and one target update; the model's terms stay on the device. `forward` is the model, perhaps compiled.

    A batch larger than `device_batch_size` passes in parts, whose gradients add up to those of their mean loss.
    Beside the terms: positions per view that take part, and the share of views that have none.
    """
    size = config.device_batch_size or len(batch.index)
    parts = [slice(first, first + size) for first in range(0, len(batch.index), size)]
    optimizer.zero_grad(set_to_none=True)
    every = []
    for part in parts:
        views = [augment(view[part], batch.photometry[part, v]) for v, view in enumerate(batch.split())]
        with torch.autocast(batch.index.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            terms = forward(views, batch.positions[part])
        (terms["loss"] / len(parts)).backward()
        every.append({name: term.detach() for name, term in terms.items()})
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    model.update_target_(tau)
    drawn = batch.positions[:, : None if config.loss.small_views else len(TARGET_VIEWS)] >= 0
    positions = {"positions": drawn.sum(2).float().mean(), "views_without_position": 1 - drawn.any(2).float().mean()}
    return {name: torch.stack([terms[name] for terms in every]).mean(0) for name in every[0]} | positions


# ------------------------------------------------------------------------------------------------- the loop


def train(config: Config, model: CoSsl, loader: Loader, device: torch.device, run_dir: Path) -> float:
    """Trains to the end, from the checkpoint if resuming; returns pictures per second."""
    optimizer = make_optimizer(model.online.named_parameters(), config.optim)
    steps_per_epoch, total = len(loader), config.epochs * len(loader)
    warmup, peak = round(config.optim.warmup_epochs * steps_per_epoch), peak_lr(config.optim.base_lr, config.batch_size)
    step, window, timed = 0, {}, [0.0, 0.0]
    if config.resume:
        state, found = load_checkpoint(run_dir, config, loader.num_samples)
        step, window, timed = state["step"], {k: v.to(device) for k, v in state["window"].items()}, state["timed"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        run_folder.keep_metrics(run_dir / "metrics.jsonl", step)
        say(f"resumed at step {step:,} of {total:,} from {found}")
    forward = torch.compile(model) if config.compile and device.type == "cuda" else model
    meter, collapsed = Meter(total, step, config.batch_size, timed), False
    stop = run_folder.StopRequest(run_folder.deadline(STOP_BEFORE_END_S))
    with open(run_dir / "metrics.jsonl", "a") as metrics, stop:
        while step < total:
            epoch, first = divmod(step, steps_per_epoch)
            for batch in to_device(loader.epoch(epoch, first), device):
                lr, tau = learning_rate(step, total, warmup, peak), ema_tau(step, total, config.optim.ema_tau)
                terms = step_(model, forward, optimizer, batch, config, lr, tau)
                step += 1
                window = {k: window[k] + v if k in window else v.clone() for k, v in terms.items()}
                meter.tick()
                if step % config.log_every == 0 or step == total:
                    length = (step - 1) % config.log_every + 1
                    covariance = window.pop("covariance") / length
                    record = {k: v / length for k, v in zip(window, torch.stack(list(window.values())).tolist(), strict=True)}
                    window = {}
                    if not all(abs(v) < float("inf") for v in record.values()):
                        raise RuntimeError(f"loss not finite between steps {step - length} and {step}: {record}; lower --optim.base-lr")
                    record["rank"] = effective_rank(covariance)
                    line = {"step": step, "epoch": step / steps_per_epoch, **record, "lr": lr, "ema_tau": tau}
                    metrics.write(json.dumps(line | {"images_per_s": round(meter.rate(), 1)}) + "\n")
                    metrics.flush()
                    meter.report(step, record, epoch, config.epochs)
                    collapsed, before = has_collapsed(record["std"], record["rank"]), collapsed
                    if collapsed and not before:
                        shape = f"spread {record['std']:.2f}, rank {record['rank']:.1f}"
                        say(f"step {step:,}: the projections collapsed ({shape}); try --model.output-norm True, a lower --optim.base-lr")
                stopping = bool(stop)
                if stopping or step == total or step % (config.checkpoint_every or steps_per_epoch) == 0:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "window": window, "step": step}
                    state |= {"num_samples": loader.num_samples, "timed": meter.timed}
                    checkpoint.save(run_dir, state | run_folder.stamp(flatten(config), RESUME_MAY_CHANGE))
                if stopping:
                    meter.close()
                    say(f"stopped after step {step:,} of {total:,} by {stop.reason}; go on with --resume --run-dir {run_dir}")
                    raise SystemExit(run_folder.REQUEUE_EXIT_CODE)
    meter.close()
    return meter.rate()


class Meter:
    """Pictures per second, restarts included but not the first step after each (it compiles), and progress on stderr.

    `timed` is [steps, seconds] so far; it travels in the checkpoint. Progress is a bar, or a line every 15 s without a terminal.
    """

    def __init__(self, total: int, step: int, batch_size: int, timed: list[float]):
        self.batch_size, self.timed = batch_size, timed
        self.bar = tqdm(total=total, initial=step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self.last: float | None = None
        self.reported = time.perf_counter()

    def tick(self) -> None:
        now = time.perf_counter()
        if self.last is not None:
            self.timed = [self.timed[0] + 1, self.timed[1] + now - self.last]
        self.last = now
        self.bar.update()

    def rate(self) -> float:
        return self.timed[0] * self.batch_size / max(self.timed[1], 1e-9)

    def report(self, step: int, record: dict[str, float], epoch: int, epochs: int) -> None:
        text = f"epoch {epoch + 1}/{epochs}  loss {record['loss']:.3f}  spread {record['std']:.2f}  {self.rate():,.0f} pictures/s"
        if not self.bar.disable:
            self.bar.set_description(text)
        elif time.perf_counter() - self.reported > 15 or step == self.bar.total:
            self.reported = time.perf_counter()
            left = (self.bar.total - step) * self.batch_size / max(self.rate(), 1e-9)
            print(f"{text}  {left / 60:.1f} min left", file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.close()


# ------------------------------------------------------------------------------------------------- the evaluation


@torch.no_grad()
def features(networks: dict[str, CoSsl], loader: Loader, device: torch.device, what: str) -> tuple[dict[str, Tensor], Tensor]:
    """Each network's global vectors of every picture (eval mode), the 12 x 12 pixels beside them, and the labels."""
    rows: dict[str, list[Tensor]] = {name: [] for name in (*networks, "pixels")}
    labels = []
    for batch in tqdm(loader.epoch(0), total=len(loader), desc=f"features of {what}", disable=not sys.stderr.isatty(), leave=False):
        (images,) = (view.to(device) for view in batch.split())
        for name, network in networks.items():
            rows[name].append(network.eval().represent(normalize(images)).float().cpu())
        rows["pixels"].append(probe.pixels(images).cpu())
        labels.append(batch.label.clone())  # a part of a batch keeps all of its memory
    return {name: torch.cat(parts) for name, parts in rows.items()}, torch.cat(labels)


def evaluate(networks: dict[str, CoSsl], train_set: Loader, val_set: Loader, device: torch.device) -> dict[str, dict[str, float]]:
    """kNN and linear top-1 (percent) of each network's frozen features and of the pixels."""
    train_x, train_y = features(networks, train_set, device, "train")
    val_x, val_y = features(networks, val_set, device, "val")
    results: dict[str, dict[str, float]] = {"linear_top1": {}, "knn_top1": {}}
    for name in tqdm(train_x, desc="probes", disable=not sys.stderr.isatty(), leave=False):
        results["linear_top1"][name] = round(probe.linear_top1(train_x[name], train_y, val_x[name], val_y), 2)
        results["knn_top1"][name] = round(probe.knn_top1(train_x[name], train_y, val_x[name], val_y), 2)
    return results


def show(results: dict[str, Any]) -> None:
    say(f"\n{'top-1, percent':<26}{'linear':>8}{'20-NN':>8}")
    for key, name in [("trained", "trained"), ("untrained", "same network, untrained"), ("pixels", "12 x 12 pixels")]:
        say(f"{name:<26}{results['linear_top1'][key]:>8.1f}{results['knn_top1'][key]:>8.1f}")
    if results["collapsed"]:
        say(f"collapsed: the projections' spread is {results['std']:.2f} and their effective rank {results['rank']:.1f}")
    say("protocol: " + ", ".join(f"{k} {v}" for k, v in results["protocol"].items()))


# ------------------------------------------------------------------------------------------------- end to end


def build(config: Config, device: torch.device) -> CoSsl:
    """The model as the seed makes it."""
    torch.manual_seed(config.seed)
    return CoSsl(config.model, config.loss).to(device).to(memory_format=torch.channels_last)


Ready = tuple[Config, Path, torch.device, dict[str, CoSsl], tuple[PositionSpec, ...], tuple[Loader, Loader, Loader]]


def setup(preset: str, config: Config) -> Ready:
    """Everything that a wrong flag, path or file can spoil, before anything is trained."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU is visible to torch; use --device cpu, or mend the driver")
    device = torch.device("cuda" if config.device == "auto" and torch.cuda.is_available() else config.device.replace("auto", "cpu"))
    run_dir = run_folder.choose(config.run_dir, config.resume, preset)
    networks = {name: build(config, device) for name in ("trained", "untrained")}
    positions = position_specs(config, networks["trained"])
    if preset == "demo" and config.data is None and config.loader.backend != "synthetic":
        config = replace(config, data=demo_data())
    loaders = open_loaders(config, positions)
    if config.resume:
        load_checkpoint(run_dir, config, loaders[0].num_samples)
    return config, run_dir, device, networks, positions, loaders


def run(preset: str, ready: Ready) -> None:
    """Trains, evaluates, writes results.json; what `setup` returned is `ready`."""
    config, run_dir, device, networks, positions, loaders = ready
    began, model = time.perf_counter(), networks["trained"]
    replace_text(run_dir / "config.json", json.dumps({"preset": preset} | flatten(config), indent=2))
    run_folder.record_start(run_dir)
    size = sum(p.numel() for p in model.online.backbone.parameters()) / 1e6
    grids = ", ".join(f"{p.size} x {p.size} positions that see {p.receptive_field_px:.0f} px each of {p.view_px}" for p in positions)
    say(f"{config.model.method}, {config.model.backbone}: {size:.2f} M parameters, {grids}")
    share, steps, peak = config.device_batch_size or config.batch_size, len(loaders[0]), peak_lr(config.optim.base_lr, config.batch_size)
    say(f"batch {config.batch_size} = {config.batch_size // share} x {share} on 1 device, {config.optim.optimizer} to {peak:g}")
    say(f"{config.epochs} epochs of {steps:,} steps = {config.epochs * steps:,} steps, {device}, {config.precision} -> {run_dir}")
    draw_batch(run_dir / "batch.png", next(iter(loaders[0].epoch(0))), loaders[0].picture, positions[0])
    rate = train(config, model, loaders[0], device, run_dir)
    results: dict[str, Any] = evaluate(networks, loaders[1], loaders[2], device)
    results |= {"images_per_s": round(rate, 1), "protocol": probe.PROTOCOL | {"eval_px": config.eval_px, "features": "pooled, eval mode"}}
    results |= {"seconds": round(time.perf_counter() - began, 1), "torch": torch.__version__, "device": str(device)}
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    results |= {"std": last["std"], "rank": last["rank"], "collapsed": has_collapsed(last["std"], last["rank"])}
    draw_curves(run_dir / "metrics.jsonl", run_dir / "curves.png")
    replace_text(run_dir / "results.json", json.dumps(results, indent=2))
    show(results)
    for loader in loaders:
        loader.close()


def main(argv: Sequence[str] | None = None) -> None:
    """`cossl train PRESET [flags]`. A user's mistake ends in one line and exit code 2, a request to stop in code 85."""
    with contextlib.ExitStack() as held:
        try:
            preset, config = parse(sys.argv[1:] if argv is None else argv)
            ready = setup(preset, config)
            held.enter_context(run_folder.lock(ready[1]))
            run_folder.choose(ready[1], config.resume, preset)  # what was free before the lock may not be now
        except BrokenPipeError:  # `cossl train demo --help | head`
            raise SystemExit(1) from None
        except (ValueError, OSError, ImportError) as error:
            print(f"cossl train: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        try:
            run(preset, ready)
        except KeyboardInterrupt:
            print(f"stopped; go on with: cossl train {preset} <the same flags> --resume --run-dir {ready[1]}", file=sys.stderr)
            raise SystemExit(130) from None
        except OSError as error:  # a full disk: the checkpoint before is whole
            print(f"cossl train: {error}; then go on with --resume --run-dir {ready[1]}", file=sys.stderr)
            raise SystemExit(1) from None
    say(str(ready[1]))


if __name__ == "__main__":
    from cossl.train import main as installed_main  # so that no class lives in __main__

    installed_main()
