"""Train CO-SSL, end to end: `cossl train PRESET [flags]` (`cossl train demo` needs nothing else).

Read top to bottom: what a run is (Config and presets), where its pictures come from, one step, the loop, the evaluation.
A run is a function of its config and seed. Everything it learns is in its folder: config.json, environment.json, metrics.jsonl, train.log,
last.pt and previous.pt, batch.png (a batch as the network sees it), curves.png, results.json.
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from cossl.models import checkpoint, probe, run_folder
from cossl.models.checkpoint import State
from cossl.models.co_ssl import TARGET_VIEWS, CoSsl, LossConfig, ModelConfig
from cossl.models.features import features, probes
from cossl.models.flags import flatten, parse_flags, replace_text, sealed
from cossl.models.launch import any_rank, choose_device, first_rank, join, leave, say
from cossl.models.optim import OptimConfig, adjust_gradients_, all_finite, make_optimizer, peak_lr, schedule
from cossl.models.parallel import ALONE, Ranks, distribute
from cossl.models.probe import OnlineProbe, knn_top1
from cossl.models.progress import Log, Meter, manual_gc
from cossl.models.run_status import REQUEUE_EXIT_CODE, has_collapsed
from cossl.models.tracking import TrackingConfig, Write, track, train_log
from cossl.pipelines import LoaderConfig, Loaders, open_splits
from cossl.pipelines.augment import augment, normalize
from cossl.pipelines.batch import Batch, Loader, LoaderSpec, to_device
from cossl.pipelines.demo_set import demo_data
from cossl.pipelines.picture import draw_batch, draw_curves
from cossl.pipelines.positions import PositionsConfig, PositionSpec
from cossl.pipelines.torch_loader import UnreadablePicture
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
    Batch norms and MoCo v3's keys then see so many, and DINO's centres move once for each."""
    seed: int = 0
    """Fixes the initial weights, the order of the pictures, every crop and every colour."""
    run_dir: Path | None = None
    """Where the run is written; default runs/<preset>-<date>-<time>."""
    resume: bool = False
    """Go on from the last checkpoint in --run-dir, or start there if there is none yet."""
    lock_wait_s: float = 0
    """Seconds to wait for a run folder that another process still holds, as a requeued job may find it."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """bf16 autocast, fp16 autocast with a loss scaler (it waits for the device at every step), or float32 (on a GPU with TF32 products)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU if there is one."""
    compile: bool = True
    """torch.compile the model on a GPU; on a CPU it gains nothing and is left out."""
    recompute: bool = False
    """Compute the backbone's activations again in the backward pass instead of keeping them: less memory, about a third more work."""
    sync_norms: bool = True
    """Batch norms over all devices. False: each over its own pictures, and a checkpoint holds the statistics of the first device."""
    norm_group: int = 0
    """Devices whose batch norms go together, with --sync-norms; 0 means all."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss that is not finite stops the run within --log-every steps; or the step is left out and counted, which waits for the device."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl, which is also how often the host waits for the device."""
    checkpoint_every: int = 0
    """Steps between two checkpoints; 0 means once an epoch. The last two are kept."""
    keep_every: int = 0
    """Epochs between two checkpoints that are kept for good, as epoch-0010.pt; 0 keeps none."""
    eval_px: int = 224
    """Side of the pictures on which the frozen features are tested."""
    knn_every: int = 10
    """Epochs between two tests of the frozen features by 20-NN while the run goes on; 0 means none before its end."""
    knn_pictures: int = 20_000
    """Pictures of train and of val, at most, in such a test: the same random ones every time."""
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    positions: PositionsConfig = field(default_factory=PositionsConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        lows = dict.fromkeys("device_batch_size checkpoint_every keep_every knn_every norm_group seed lock_wait_s".split(), 0)
        for name, low in (lows | {"epochs": 1, "batch_size": 2, "log_every": 1, "knn_pictures": 2}).items():
            if getattr(self, name) < low:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {low} or more")
        if self.model.predictors == "per_size" and self.views.recipe != "multi_crop":
            raise ValueError("--model.predictors per_size is for small views, which only --views.recipe multi_crop has: use shared")
        if self.on_nonfinite == "skip" and self.precision == "fp16":
            raise ValueError("--on-nonfinite skip: the loss scaler of --precision fp16 skips such steps itself; leave it at stop")
        if self.recompute and self.compile and self.device != "cpu":
            raise ValueError("--recompute works on the model as it is written: add --no-compile")
        if self.device_batch_size and (self.device_batch_size < 2 or self.batch_size % self.device_batch_size):
            fits = [n for n in range(2, min(self.batch_size, 2**20) + 1) if self.batch_size % n == 0]
            near = min(fits, key=lambda n: abs(n - self.device_batch_size))
            raise ValueError(f"--device-batch-size {self.device_batch_size} does not divide --batch-size {self.batch_size}: try {near}")
        if self.optim.warmup_epochs >= self.epochs:
            raise ValueError(f"--optim.warmup-epochs {self.optim.warmup_epochs}: expected fewer than --epochs {self.epochs}")
        if self.model.width < 8:  # 2, 4, 5, 6 and 7 channels ended in "free(): invalid size" in a backward pass of torch 2.15 on a CPU
            raise ValueError(f"--model.width {self.model.width}: expected 8 or more, torch's channels-last convolutions crash below that")


def demo() -> Config:
    """CO-BYOL on generated pictures whose class is which parts occur together: about three minutes on 2 CPU cores."""
    model = ModelConfig("byol", "rf_resnet18", 29, width=16, mlp_after_pool=0, hidden_dim=512, out_dim=128, output_norm=True)
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
    return Config()  # deepmind-research/byol, configs/byol.py: LARS 0.45, weight decay 1e-6, tau 0.99, warm-up 10, 4096/256


def in1k_dino() -> Config:
    """CO-DINO: RF99-ResNet50, 100 epochs of ImageNet-1K, 2 x 224 + 8 x 96, the recipe of DINO's README for ResNet-50."""
    # facebookresearch/dino, README (sgd, lr, decay, crops) and main_dino.py. Deviations: ReLU, there GELU; rate to 0, there to 1e-6.
    model = ModelConfig(method="dino", hidden_dim=2048, head_norm="none", joint_views=True)
    sgd = OptimConfig("sgd", base_lr=0.03, weight_decay=1e-4, ema_tau=0.996, clip_grad=3.0, freeze_prototypes_epochs=1.0)
    return Config(batch_size=512, model=model, optim=sgd, views=ViewsConfig("multi_crop", crop_min=0.14, local_crops_number=8))


def in1k_mocov3() -> Config:
    """CO-MoCo v3: RF99-ResNet50, 100 epochs of ImageNet-1K, batch 4096, MoCo v3's 100-epoch recipe."""
    # facebookresearch/moco-v3, README and main_moco.py: LARS 0.6, 1e-6, m 0.99, T 1.0, crop-min 0.2, 4096/256, norm on the projections.
    return Config(model=ModelConfig(method="mocov3", output_norm=True), optim=OptimConfig(base_lr=0.6), views=ViewsConfig(crop_min=0.2))


def in100() -> Config:
    """CO-BYOL: RF99-ResNet50, 400 epochs of ImageNet-100, batch 256, solo-learn's recipe for BYOL."""
    # vturrisi/solo-learn, imagenet-100/byol.yaml: LARS 0.5, eta 0.02, clip_lr, 1e-6, warm-up 10 from 3e-5, predictor 8192, tau 0.99.
    optim = OptimConfig(base_lr=0.5, lars_eta=0.02, lars_clip=True, warmup_start_lr=3e-5)
    return Config(epochs=400, batch_size=256, model=ModelConfig(predictor_hidden_dim=8192), optim=optim)


def in100_resnet18() -> Config:
    """CO-BYOL: torchvision's ResNet-18, 400 epochs of ImageNet-100, batch 256: solo-learn's own BYOL has 80.3 there."""
    return replace(in100(), model=replace(in100().model, backbone="resnet18", receptive_field=None, mlp_after_pool=0))


def tiny_imagenet() -> Config:
    """CO-BYOL: RF29-ResNet18 on 64 px of Tiny-ImageNet, with the optimizer of in100: a reading, no recipe is published."""
    model = replace(in100().model, backbone="rf_resnet18", receptive_field=29)
    return replace(in100(), eval_px=64, model=model, views=ViewsConfig(size_px=64, crop_min=0.2))


_PRESETS = (demo, imagenette, in1k, in1k_dino, in1k_mocov3, in100, in100_resnet18, tiny_imagenet)
PRESETS: dict[str, Callable[[], Config]] = {preset.__name__.replace("_", "-"): preset for preset in _PRESETS}


def parse(argv: Sequence[str]) -> tuple[str, Config]:
    """Preset name and config of `cossl train PRESET [flags]`."""
    listing = "\n".join(f"  {name:<16}{preset.__doc__}" for name, preset in PRESETS.items())
    if not argv or argv[0] in ("-h", "--help"):
        say(f"usage: cossl train PRESET [flags]\n\npresets:\n{listing}\n\nflags: cossl train PRESET --help")
        raise SystemExit(0 if argv else 2)
    name = argv[0]
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1)
        raise ValueError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}" + (f"; did you mean {near[0]}?" if near else ""))
    config = parse_flags(Config, argv[1:], f"cossl train {name}", PRESETS[name].__doc__ or "", default=PRESETS[name]())
    return name, replace(config, data=config.data and config.data.absolute())  # config.json is read from anywhere


# ------------------------------------------------------------------------------------------------- its pictures


def position_specs(config: Config, model: CoSsl) -> tuple[PositionSpec, ...]:
    """For each view size what positions its map has and which are drawn, the global views' first; none for small views left out."""
    sizes = dict.fromkeys(view.size_px for view in config.views.specs())
    small = {px: px != config.views.size_px for px in sizes}
    used = [px for px in sizes if config.loss.small_locals or not small[px]]
    return tuple(config.positions.spec(*model.position_grid(px), small=small[px]) for px in used)


def open_loaders(config: Config, positions: tuple[PositionSpec, ...], ranks: Ranks = ALONE) -> Loaders:
    """All of a run's loaders; the sample's only on the first rank, where a 20-NN is due before the end."""
    how = config.loader
    ahead, part = (how.batches_ahead, True, how.order, how.os_cache), (ranks.rank, ranks.world_size)
    views = LoaderSpec(config.views.specs(), config.batch_size, config.seed, positions, how.workers, *ahead, *part)
    whole = LoaderSpec(evaluation(config.eval_px), EVAL_BATCH, workers=how.workers, shuffle=False)
    return open_splits(config.data, how.backend, views, whole, ranks.rank == 0 and 0 < config.knn_every < config.epochs)


# ------------------------------------------------------------------------------------------------- its folder

EVAL_BATCH = 256  # pictures without a gradient at once
RESUME_MAY_CHANGE = (
    "data run_dir resume lock_wait_s eval_px knn_every knn_pictures log_every checkpoint_every keep_every recompute loader.workers"
    " loader.batches_ahead loader.os_cache tracking.tensorboard tracking.wandb tracking.wandb_project"
).split()


def load_checkpoint(run_dir: Path, config: Config, num_samples: int) -> tuple[dict[str, Any], str]:
    """(newest whole state, where it was found). ValueError if there is none, or it is of another config or picture set."""
    state, found = checkpoint.newest(run_dir)
    checkpoint.require_config(state, flatten(config), RESUME_MAY_CHANGE, run_dir / found.split(",")[0])
    if state["num_samples"] != num_samples:
        raise ValueError(f"{run_dir} was trained on {state['num_samples']} pictures, --data has {num_samples}")
    return state, found


# ------------------------------------------------------------------------------------------------- one step

Forward = Callable[[list[Tensor], Tensor], dict[str, Tensor]]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def step_(state: State, forward: Forward, batch: Batch, config: Config, lr: float, tau: float, epoch: float) -> None:
    """One optimizer step and one target update; adds the model's terms to the window, on the device.

    `forward` is the model, perhaps compiled and distributed. A batch larger than `device_batch_size` passes in parts, whose gradients
    add up to those of their mean loss. Beside the terms: positions per view that take part, the share of views that have none, the
    online probe's, and 1 for a step that counts.
    """
    model, device = state.model, batch.index.device
    size, before = config.device_batch_size or len(batch.index), None
    if config.on_nonfinite == "skip":
        before = [buffer.clone() for buffer in model.buffers()]  # a forward pass has moved the running statistics by the time one knows
    parts = [slice(first, first + size) for first in range(0, len(batch.index), size)]
    state.optimizer.zero_grad(set_to_none=True)
    every = []
    for part in parts:
        with contextlib.nullcontext() if part is parts[-1] else getattr(forward, "no_sync", contextlib.nullcontext)():
            views = [augment(view[part], batch.photometry[part, v]) for v, view in enumerate(batch.split())]
            with torch.autocast(device.type, AUTOCAST.get(config.precision), enabled=config.precision in AUTOCAST):
                terms = forward(views, batch.positions[part])
            state.scaler.scale(terms["loss"] / len(parts)).backward()
        every.append({name: term.detach() for name, term in terms.items()})
    drawn = batch.positions[:, : None if config.loss.small_locals else len(TARGET_VIEWS)] >= 0
    positions = {"positions": drawn.sum(2).float().mean(), "views_without_position": 1 - drawn.any(2).float().mean()}
    features = torch.cat([terms.pop("features") for terms in every], 1)
    terms = {name: torch.stack([terms[name] for terms in every]).mean(0) for name in every[0]} | positions
    terms |= state.probe.step_(features, batch.label)
    state.step += 1
    if before is not None and not all_finite(p.grad for p in model.parameters()):
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
        terms = {name: torch.zeros_like(term) for name, term in terms.items()}
        terms |= {"steps": torch.zeros((), device=device), "skipped": torch.ones((), device=device)}
    else:
        update_(state, config, lr, epoch)
        model.update_target_(tau)
        terms |= {"steps": torch.ones((), device=device), "skipped": torch.zeros((), device=device)}
    state.window = {name: state.window[name] + term if name in state.window else term for name, term in terms.items()}


def update_(state: State, config: Config, lr: float, epoch: float) -> None:
    """The optimizer's step by the gradients at hand."""
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.scaler.unscale_(state.optimizer)
    adjust_gradients_(state.model.online, config.optim, epoch)
    state.scaler.step(state.optimizer)
    state.scaler.update()


# ------------------------------------------------------------------------------------------------- the loop


def begin(config: Config, model: CoSsl, loader: Loader, device: torch.device, run_dir: Path) -> tuple[State, Any]:
    """The state to train from, that of the last checkpoint if resuming, and the model's forward, compiled and distributed."""
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    classes = max(2, len(loader.class_names))  # pictures without labels are of one class
    online_probe = OnlineProbe(model.online.backbone.out_channels, classes, model.ranks).to(device)
    state = State(model, make_optimizer(model.online.named_parameters(), config.optim), scaler, online_probe)
    model.online.backbone.recompute = config.recompute
    if config.compile and device.type == "cuda":
        model.compile(fullgraph=True)  # before DDP wraps it, which cannot be traced
    forward = distribute(model, config.sync_norms, config.norm_group or None) if model.ranks.world_size > 1 else model
    if config.resume:
        saved, found = load_checkpoint(run_dir, config, loader.num_samples)
        state.load(saved, device)
        say(f"resumed at step {state.step:,} of {config.epochs * len(loader):,} from {found}")
    if model.ranks.rank == 0:
        run_folder.keep_metrics(run_dir / "metrics.jsonl", state.step)
    return state, forward


def train(config: Config, model: CoSsl, loaders: Loaders, device: torch.device, run_dir: Path, writers: list[Write]) -> float:
    """Trains to the end; returns pictures per second. What the first rank alone does the others wait for, and leave if it fails."""
    state, forward = begin(config, model, loaders.views, device, run_dir)
    per_epoch, total = len(loaders.views), config.epochs * len(loaders.views)
    rates, log = schedule(config.optim, config.epochs, per_epoch, config.batch_size), Log(writers, per_epoch, model.ranks)
    meter = Meter(total, state.step, state.timed, config.batch_size, model.ranks.rank > 0)
    with contextlib.ExitStack() as held:
        stop = held.enter_context(run_folder.StopRequest(run_folder.deadline()))
        held.enter_context(manual_gc())
        held.callback(meter.close)
        while state.step < total:
            batches = to_device(loaders.views.epoch(*divmod(state.step, per_epoch)), device)
            batches = itertools.chain([next(batches)], batches)  # the loader reads ahead from here on
            if state.step and state.step % per_epoch == 0:
                first_rank(lambda: between_epochs(state, config, loaders, device, run_dir, log))
                meter.pause()
            for batch in batches:
                epoch, (lr, tau) = state.step / per_epoch, rates(state.step)
                step_(state, forward, batch, config, lr, tau, epoch)
                meter.tick()
                if state.step % config.log_every == 0 or state.step == total:
                    shown = {"lr": lr, "ema_tau": tau, "images_per_s": round(meter.rate(), 1)}
                    meter.report(log.write(state.window, state.step, shown), state.step, int(epoch), config.epochs)
                    state.window = {}
                stopping = any_rank(bool(stop))
                if stopping or state.step == total or state.step % (config.checkpoint_every or per_epoch) == 0:
                    save(state, config, loaders.views, run_dir)
                if stopping:
                    say(f"stopped after step {state.step:,} of {total:,} by {stop.reason or 'another rank'}; go on with --resume")
                    raise SystemExit(REQUEUE_EXIT_CODE)
    return meter.rate()


def between_epochs(state: State, config: Config, loaders: Loaders, device: torch.device, run_dir: Path, log: Log) -> None:
    """20-NN on a sample if it is due, and the curves, while the training loader reads ahead. A run resumed here does it (again)."""
    if loaders.sample and state.step // len(loaders.views) % config.knn_every == 0:
        n = config.knn_pictures
        some = [itertools.islice(pictures(loader, device, "kNN"), -(-n // EVAL_BATCH)) for loader in loaders.sample]
        (train_x, train_y), (val_x, val_y) = (features({"knn": state.model}, batches) for batches in some)
        state.model.train()
        log.note(state.step, {"knn_top1": round(knn_top1(train_x["knn"][:n], train_y[:n], val_x["knn"][:n], val_y[:n]), 2)})
    draw_curves(run_dir / "metrics.jsonl", run_dir / "curves.png")


def save(state: State, config: Config, loader: Loader, run_dir: Path) -> None:
    """A checkpoint, by the first rank, for which the others wait. RuntimeError, and the ones before stay, if the state is not finite."""
    gc.collect()
    if not all_finite(tensor for tensor in state.model.state_dict().values() if tensor.is_floating_point()):
        raise RuntimeError(f"weights not finite at step {state.step}, the last checkpoints are whole; lower --optim.base-lr")
    epoch, rest = divmod(state.step, len(loader))
    kept = epoch if config.keep_every and not rest and epoch % config.keep_every == 0 else None
    stamp = run_folder.stamp(flatten(config), RESUME_MAY_CHANGE) | {"num_samples": loader.num_samples}
    first_rank(lambda: checkpoint.save(run_dir, state.save() | stamp, kept))


# ------------------------------------------------------------------------------------------------- the evaluation


def pictures(loader: Loader, device: torch.device, what: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(pictures, the same normalized, labels) of every batch, with a bar."""
    for batch in tqdm(loader.epoch(0), total=len(loader), desc=what, disable=not sys.stderr.isatty(), leave=False):
        (images,) = (view.to(device) for view in batch.split())
        yield images, normalize(images), batch.label


def show(results: dict[str, Any]) -> None:
    say(f"\n{'top-1, percent':<26}{'linear':>8}{'20-NN':>8}")
    for key, name in [("trained", "trained"), ("untrained", "same network, untrained"), ("pixels", "12 x 12 pixels")]:
        say(f"{name:<26}{results['linear_top1'][key]:>8.1f}{results['knn_top1'][key]:>8.1f}")
    if results["collapsed"]:
        say(f"collapsed: the projections' spread is {results['std']:.2f} and their effective rank {results['rank']:.1f}")
    say("protocol: " + ", ".join(f"{k} {v}" for k, v in results["protocol"].items()))


# ------------------------------------------------------------------------------------------------- end to end


def build(config: Config, device: torch.device, ranks: Ranks = ALONE) -> CoSsl:
    """The model as the seed makes it."""
    torch.manual_seed(config.seed)
    return CoSsl(config.model, config.loss, ranks).to(device).to(memory_format=torch.channels_last)


Ready = tuple[Config, Path, torch.device, dict[str, CoSsl], tuple[PositionSpec, ...], Loaders, list[Write]]


def setup(preset: str, config: Config, held: contextlib.ExitStack) -> Ready:
    """Everything that a wrong flag, path or file can spoil, before anything is trained; what must last as long as the run is `held`."""
    device = choose_device(config.device)
    ranks = join(device)
    held.callback(leave)
    share = config.batch_size // ranks.world_size
    if config.device_batch_size and share % config.device_batch_size:
        raise ValueError(f"--device-batch-size {config.device_batch_size} does not divide the {share} pictures of each device")
    if config.norm_group and (not config.sync_norms or ranks.world_size % config.norm_group):
        raise ValueError(f"--norm-group {config.norm_group}: expected 0, or a divisor of the {ranks.world_size} devices and --sync-norms")
    first_rank(lambda: run_folder.check(config.run_dir, config.resume))
    networks = {"trained": build(config, device, ranks), "untrained": build(config, device)}
    positions = position_specs(config, networks["trained"])
    if preset == "demo" and config.data is None and config.loader.backend != "synthetic":
        config = replace(config, data=first_rank(demo_data))
    loaders = open_loaders(config, positions, ranks)
    for loader in (*loaders[:3], *loaders.sample):
        held.callback(loader.close)
    schedule(config.optim, config.epochs, len(loaders.views), config.batch_size)(0)
    writers: list[Write] = []

    def take() -> tuple[Path, bool]:
        run_dir = config.run_dir or run_folder.make_default(preset)
        held.enter_context(run_folder.lock(run_dir, config.lock_wait_s))
        run_folder.check(run_dir, config.resume)  # what it was before the lock it may not be now
        known = config.resume and checkpoint.exists(run_dir)
        if known:
            load_checkpoint(run_dir, config, loaders.views.num_samples)
        held.enter_context(train_log(run_dir))
        writers.append(held.enter_context(track(run_dir, config.tracking, flatten(config))))
        return run_dir, known

    run_dir, known = first_rank(take)
    if config.resume and not known:
        say(f"no checkpoint in {run_dir} yet: starting at step 0")
    return replace(config, resume=known), run_dir, device, networks, positions, loaders, writers


def describe(preset: str, ready: Ready) -> None:
    """Says what the run is, and writes it into its folder."""
    config, run_dir, device, networks, positions, loaders, _ = ready
    backbone, ranks, (train, val) = networks["trained"].online.backbone, networks["trained"].ranks, (loaders.train, loaders.val)
    say(f"{config.data or 'random pixels'}: {train.num_samples:,} train and {val.num_samples:,} val pictures, {type(train).__name__}")
    grids = ", ".join(f"{p.size} x {p.size} positions that see {p.receptive_field_px:.0f} px each of {p.view_px}" for p in positions)
    say(f"{config.model.method}, {config.model.backbone}: {sum(p.numel() for p in backbone.parameters()) / 1e6:.2f} M parameters, {grids}")
    share, steps = config.batch_size // ranks.world_size, len(loaders.views)
    at_once, peak = config.device_batch_size or share, peak_lr(config.optim.base_lr, config.batch_size)
    parts = f"{ranks.world_size} x {share // at_once} x {at_once} (devices, accumulated, at once)"
    say(f"batch {config.batch_size} = {parts}; {config.optim.optimizer}, learning rate to {peak:g}")
    say(f"{config.epochs} epochs of {steps:,} steps = {config.epochs * steps:,} steps, {device.type}, {config.precision} -> {run_dir}")
    replace_text(run_dir / "config.json", json.dumps({"preset": preset} | flatten(config), indent=2))
    run_folder.record_start(run_dir)
    draw_batch(run_dir / "batch.png", next(iter(loaders.views.epoch(0))), loaders.views.picture, positions[0])


def run(preset: str, ready: Ready) -> None:
    """Trains, evaluates, writes results.json; what `setup` returned is `ready`. After the training the first rank goes on alone."""
    config, run_dir, device, networks, _, loaders, writers = ready
    began, model = time.perf_counter(), networks["trained"]
    first_rank(lambda: describe(preset, ready))
    rate = train(config, model, loaders, device, run_dir, writers)
    leave()
    if model.ranks.rank:
        return
    with run_folder.leave_on_stop():
        train_x, val_x = (features(networks, pictures(loader, device, "features")) for loader in (loaders.train, loaders.val))
        results: dict[str, Any] = probes(train_x, val_x, device)
    results |= {"images_per_s": round(rate, 1), "protocol": probe.PROTOCOL | {"eval_px": config.eval_px, "features": "pooled, eval mode"}}
    results |= {"seconds": round(time.perf_counter() - began, 1), "torch": torch.__version__, "device": str(device)}
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    results |= {"std": last["std"], "rank": last["rank"], "collapsed": has_collapsed(last["std"], last["rank"])}
    draw_curves(run_dir / "metrics.jsonl", run_dir / "curves.png")
    replace_text(run_dir / "results.json", json.dumps(sealed(results), indent=2))
    show(results)
    print(run_dir)


def main(argv: Sequence[str] | None = None) -> None:
    """`cossl train PRESET [flags]`. A user's mistake ends in one line and exit code 2, a request to stop in code 85."""
    with contextlib.ExitStack() as held:
        preset = ""
        try:
            preset, config = parse(sys.argv[1:] if argv is None else argv)
            ready = setup(preset, config, held)
        except (BrokenPipeError, KeyboardInterrupt) as error:  # `cossl train demo --help | head`
            raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1) from None
        except (ValueError, OSError, ImportError) as error:
            (print if preset else say)(f"cossl train: {error}", file=sys.stderr)  # a flag is wrong on all ranks, a path perhaps on one
            raise SystemExit(2) from None
        try:
            run(preset, ready)
        except KeyboardInterrupt:
            print(f"stopped; go on with: cossl train {preset} <the same flags> --resume --run-dir {ready[1]}", file=sys.stderr)
            raise SystemExit(130) from None
        except OSError as error:  # a full disk: the checkpoint before is whole; a picture less would be another set, where none goes on
            code, then = (2, "or replace it and") if isinstance(error, UnreadablePicture) else (1, "then")
            print(f"cossl train: {error}; {then} go on with --resume --run-dir {ready[1]}", file=sys.stderr)
            raise SystemExit(code) from None


if __name__ == "__main__":
    from cossl.train import main as installed_main  # so that no class lives in __main__

    installed_main()
