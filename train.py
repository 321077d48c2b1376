"""Train CO-SSL, end to end: `cossl train PRESET [flags]` (`cossl train demo` needs nothing else).

Read top to bottom: what a run is (Config and presets), where its pictures come from, one step, the loop, the evaluation.
A run is a function of its config and seed. Everything it learns is in its folder: config.json, metrics.jsonl, last.pt,
batch.png (a batch as the network sees it), curves.png, results.json.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from cossl.models import checkpoint, probe
from cossl.models.co_ssl import CoByol, LossConfig, ModelConfig
from cossl.models.optim import OptimConfig, ema_tau, learning_rate, make_optimizer, peak_lr
from cossl.models.rf_resnet import position_grid
from cossl.pipelines import views as view_recipes
from cossl.pipelines.augment import augment, normalize
from cossl.pipelines.batch import Batch, Loader, LoaderSpec
from cossl.pipelines.demo_set import make_demo_set
from cossl.pipelines import Backend, choose_backend, find_split, make_loader
from cossl.pipelines.picture import draw_batch
from cossl.pipelines.positions import PositionSpec, Strategy

# ------------------------------------------------------------------------------------------------- what a run is


@dataclass(frozen=True)
class ViewsConfig:
    """The two views of a picture."""

    recipe: Literal["byol", "symmetric"] = "byol"
    """byol: one view always blurred, the other sometimes solarized. symmetric: both alike."""
    size_px: int = 224
    """Side of a view."""
    crop_min: float = 0.08
    """Smallest crop, as a fraction of the picture's area, in (0, 1]."""


@dataclass(frozen=True)
class PositionsConfig:
    """Which feature-map positions take part in the local loss."""

    strategy: Strategy = "all"
    """all, uniform (at random), or overlap (their centre lies in the other view's crop)."""
    count: int = 0
    """Positions per view; 0 means all of the n x n map."""


@dataclass(frozen=True)
class LoaderConfig:
    """How pictures are read."""

    backend: Backend = "auto"
    """auto: ffcv for a beton where ffcv is installed, else torch. synthetic: random pixels, for speed tests."""
    workers: int = 2
    """Threads (ffcv) or processes (torch) that decode; never changes a result."""


@dataclass(frozen=True)
class Config:
    """A run: the everyday flags here, the rest by section."""

    data: Path | None = None
    """Folder with train.beton and val.beton (see `cossl convert`), or with image folders train/ and val/."""
    epochs: int = 100
    """Passes over the training pictures."""
    batch_size: int = 4096
    """Pictures per optimizer step, over all devices."""
    seed: int = 0
    """Fixes the initial weights, the order of the pictures, every crop and every colour."""
    run_dir: Path | None = None
    """Where the run is written; default runs/<preset>-<date>-<time>."""
    resume: bool = False
    """Go on from <run-dir>/last.pt."""
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
        for name, low in [("epochs", 1), ("batch_size", 2), ("log_every", 1), ("checkpoint_every", 0), ("seed", 0), ("eval_px", 8)]:
            if getattr(self, name) < low:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {low} or more")

    def recipe(self) -> tuple[view_recipes.ViewSpec, ...]:
        return view_recipes.RECIPES[self.views.recipe](self.views.size_px, self.views.crop_min)


def demo() -> Config:
    """CO-BYOL on generated pictures whose class is which parts occur together: about two minutes on 2 CPU cores."""
    return small(epochs=30, size_px=64)


def imagenette() -> Config:
    """CO-BYOL on Imagenette at 64 px with a narrow network, sized for a few CPU cores; takes --data."""
    return small(epochs=40, size_px=64)


def small(epochs: int, size_px: int) -> Config:
    """What the two CPU presets share."""
    return Config(
        epochs=epochs,
        batch_size=128,
        precision="fp32",
        compile=False,
        log_every=10,
        eval_px=size_px,
        model=ModelConfig("rf_resnet18", receptive_field=29, width=16, mlp_after_pool=0, hidden_dim=512, out_dim=128),
        optim=OptimConfig("sgd", base_lr=0.1, weight_decay=1e-4, warmup_epochs=1, ema_tau=0.98),
        views=ViewsConfig("byol", size_px, crop_min=0.2),
    )


def in1k() -> Config:
    """The headline run: RF99-ResNet50, 100 epochs of ImageNet-1K, batch 4096, BYOL's 100-epoch recipe (needs GPUs)."""
    return Config()


PRESETS: dict[str, Callable[[], Config]] = {"demo": demo, "imagenette": imagenette, "in1k": in1k}

T = TypeVar("T")


def known_flags(config: Any, prefix: str = "") -> Iterator[str]:
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from known_flags(value, f"{prefix}{f.name.replace('_', '-')}.")
        else:
            yield f"--{prefix}{f.name.replace('_', '-')}"


def parse_flags(default: T, argv: Sequence[str], prog: str, description: str) -> T:
    """`default` with the flags in argv applied; an unknown flag is a ValueError that names the nearest known one."""
    parsed, unknown = tyro.cli(type(default), args=argv, default=default, prog=prog, description=description, return_unknown_args=True)
    for word in unknown:
        near = difflib.get_close_matches(word.split("=")[0], known_flags(default), 1, 0.4)
        raise ValueError(f"unknown {'flag' if word.startswith('-') else 'argument'} {word}" + (f": did you mean {near[0]}?" if near else "; see --help"))
    return parsed


def parse(argv: Sequence[str]) -> tuple[str, Config]:
    """Preset name and config of `cossl train PRESET [flags]`."""
    listing = "\n".join(f"  {name:<12}{preset.__doc__}" for name, preset in PRESETS.items())
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: cossl train PRESET [flags]\n\npresets:\n{listing}\n\nflags: cossl train PRESET --help")
        raise SystemExit(0 if argv else 2)
    name = argv[0]
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1)
        raise ValueError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}" + (f"; did you mean {near[0]}?" if near else ""))
    return name, parse_flags(PRESETS[name](), argv[1:], f"cossl train {name}", PRESETS[name].__doc__ or "")


# ------------------------------------------------------------------------------------------------- its pictures


def cache_dir() -> Path:
    """Where generated pictures are kept: $COSSL_CACHE, else ~/.cache/cossl."""
    return Path(os.environ.get("COSSL_CACHE") or "~/.cache/cossl").expanduser()


def demo_data() -> Path:
    """Folder of the demo pictures, generated and converted the first time. Without ffcv it holds no betons: the folders serve."""
    root = make_demo_set(cache_dir())
    if choose_backend("auto", root / "train.beton") == "ffcv" or (root / "train.beton").is_file():
        for split in ("train", "val"):
            if not (root / f"{split}.beton").is_file():
                convert(root / split, root / f"{split}.beton", num_workers=os.cpu_count() or 1)
    else:
        say(f"ffcv is not installed: the torch loader reads the pictures from {root}")
    return root


def open_loaders(config: Config, positions: PositionSpec) -> tuple[Loader, Loader, Loader]:
    """Loaders of the training views, and of train and val pictures as they are."""
    if config.data is None and config.loader.backend != "synthetic":
        raise ValueError("--data is missing: give a folder with train.beton and val.beton (see `cossl convert`), or with train/ and val/")
    data = config.data or Path()
    synthetic, backend, workers = config.loader.backend == "synthetic", config.loader.backend, config.loader.workers
    train, val = (data if synthetic else find_split(data, split, backend) for split in ("train", "val"))
    seen = LoaderSpec(config.recipe(), config.batch_size, config.seed, positions, workers)
    plain = LoaderSpec(view_recipes.evaluation(config.eval_px), 256, workers=workers, shuffle=False)
    loaders = tuple(make_loader(backend, source, spec) for source, spec in [(train, seen), (train, plain), (val, plain)])
    if loaders[1].class_names != loaders[2].class_names:
        raise ValueError(f"{train} and {val} have different classes: convert both from folders with the same class folders")
    say(f"loader: {choose_backend(backend, train)}, {loaders[0].num_samples:,} train and {loaders[2].num_samples:,} val pictures, {data}")
    return loaders[0], loaders[1], loaders[2]
