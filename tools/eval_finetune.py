"""Fine-tuning for `cossl eval`: the whole network trained on labels, all or few of them (the semi-supervised protocol)."""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from tqdm import tqdm

from cossl.models.co_ssl import Network
from cossl.models.launch import any_rank, first_rank, say
from cossl.models.linear_probe import few_shot, held_out
from cossl.models.load import HEADS
from cossl.models.optim import learning_rate, peak_lr
from cossl.models.parallel import distribute
from cossl.pipelines.augment import normalize
from cossl.pipelines.batch import Batch, to_device
from cossl.tools import eval_figures
from cossl.tools.eval_features import DiskKeeper, Subject, keep
from cossl.tools.eval_linear import per_class
from cossl.train import AUTOCAST, EVAL_BATCH

MOMENTUM = 0.9
FEW_STEPS = 100
"""A training of fewer is told of: it is too short for a network to follow its labels."""


@dataclass(frozen=True)
class FinetuneArgs:
    """Fine-tuning: SGD with Nesterov momentum 0.9, a cosine to 0 without warm-up, random crops and flips.

    The defaults lie in the range of what is published for 1 and 10 % of ImageNet: Barlow Twins (its README and evaluate.py: 20 epochs,
    batch 256, cosine, no weight decay, 0.002 for the network and 0.5 for the head), SwAV (eval_semisup.py: 20 epochs, 256, 0.01 and 0.2),
    BYOL (appendix C: Nesterov momentum, no warm-up, no weight decay, the best of several rates).
    """

    epochs: int = 20
    """Passes over the labelled pictures."""

    batch_size: int = 256
    """Pictures per step, of all processes; of a smaller set all of it, which leaves few steps: give fewer there."""

    lrs: tuple[float, ...] = (0.002, 0.01, 0.05)
    """Learning rates of the network, per 256 pictures; each is trained by itself, from the start."""

    head_lr_factor: float = 20.0
    """The new linear layer learns so many times faster than the network: SwAV's 20, Barlow Twins has 250."""

    weight_decay: float = 0.0
    """Of all weights and biases."""

    def __post_init__(self) -> None:
        for name, low in {"epochs": 1, "batch_size": 2, "weight_decay": 0}.items():
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"--finetune.{name.replace('_', '-')} {getattr(self, name)}: expected {low} or more")
        if not self.lrs or len(set(self.lrs)) < len(self.lrs) or not all(0 < lr < math.inf for lr in self.lrs):
            raise ValueError(f"--finetune.lrs {self.lrs}: expected different numbers above 0")
        if not 0 < self.head_lr_factor < math.inf:
            raise ValueError(f"--finetune.head-lr-factor {self.head_lr_factor}: expected more than 0")


@dataclass(frozen=True)
class FinetuneSettings:
    """What a fine-tuning depends on beside its network and pictures."""

    how: FinetuneArgs
    held_out_frac: float
    refit: bool
    seed: int
    label_percent: int = 100

    def protocol(self) -> dict[str, Any]:
        """Plain values, and the rules that are no flags."""
        how = {"epochs": self.how.epochs, "batch_size": self.how.batch_size, "lrs": list(self.how.lrs), "lr": "lr * batch_size / 256"}
        how |= {"head": "linear on the global vector, zeros at first", "head_lr_factor": self.how.head_lr_factor}
        how |= {"momentum": f"{MOMENTUM}, Nesterov", "weight_decay": self.how.weight_decay, "schedule": "cosine to 0, no warm-up"}
        chosen = "held-out top-1, then cross-entropy; the latter on train where nothing can be held out"
        how |= {"train_view": "random crop of 8 to 100 %, flip", "batch_norms": "trained", "chosen_by": chosen}
        rest = {"held_out_frac": self.held_out_frac, "refit": self.refit, "seed": self.seed, "label_percent": self.label_percent}
        return how | rest | {"features": ["global"]}


class Parts(NamedTuple):
    """Indices of pictures of train."""

    trained: Int[np.ndarray, " n"]
    held: Int[np.ndarray, " n"]
    """What the rate is chosen on; empty where no class has two pictures."""
    whole: Int[np.ndarray, " n"]
    """Both together: all of train, or the few shots."""


def parts_of(labels: Int[Tensor, " n"], settings: FinetuneSettings) -> Parts:
    """Those that the linear probe with the same settings has."""
    rows = torch.arange(len(labels))
    if settings.label_percent < 100:
        rows = rows[few_shot(labels, settings.label_percent / 100, settings.seed)]
    out = held_out(labels[rows], settings.held_out_frac, settings.seed)
    return Parts(*(part.numpy() for part in (rows[~out], rows[out], rows)))


class Classifier(nn.Module):
    """Logits of m classes: a network's backbone, pooling and MLP after it, copied, and a linear layer on the global vector, all zeros."""

    def __init__(self, network: Network, classes: int) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(True)
        for name in HEADS:
            setattr(self.network, name, None)
        self.head = nn.Linear(network.backbone.out_channels, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b m"]:
        return self.head(self.network.pool(self.network.backbone(x)))


class Score(NamedTuple):
    """Percent right at once and among five, mean cross-entropy in nats, counts [true, said]."""

    top1: float
    top5: float
    cross_entropy: float
    confusion: Int[Tensor, "m m"]


class Trainer:
    """One network that is trained from the same start as often as asked, by all ranks. Every rank has to call all of it alike.

    Precision, compile, recompute are the run's own; batch norms are over all ranks, so that these take the steps of one process.
    """

    def __init__(self, subject: Subject, settings: FinetuneSettings, name: str) -> None:
        run, self.subject, self.settings, self.name = subject.run, subject, settings, name
        self.device, config = run.device, run.config
        self.classes = len(subject.pictures.class_names)
        self.network = Classifier(run.encoder.network, self.classes).to(self.device).to(memory_format=torch.channels_last)
        self.network.network.backbone.recompute = config.recompute
        self.start = {key: value.clone() for key, value in self.network.state_dict().items()}
        if config.compile and not config.recompute and self.device.type == "cuda":
            self.network.compile(fullgraph=True)
        self.forward: nn.Module = distribute(self.network) if subject.ranks.world_size > 1 else self.network
        self.dtype, self.scaled = AUTOCAST.get(config.precision), config.precision == "fp16"
        self.keeper = DiskKeeper(subject.cache, subject.key() | settings.protocol())

    def batch_size(self, count: int) -> int:
        """Pictures of a step where there are `count`: a multiple of the number of ranks. ValueError where there is none."""
        wanted, world = self.settings.how.batch_size, self.subject.ranks.world_size
        if wanted % world:
            raise ValueError(f"--finetune.batch-size {wanted} does not divide among {world} ranks: use {max(1, wanted // world) * world}")
        size = min(wanted, count // world * world)
        if size < 2:
            raise ValueError(f"{self.name}: {count} labelled pictures for {world} ranks are too few: batch norms need 2 or more in a step")
        return size

    def _optimizer(self) -> torch.optim.SGD:
        groups = [{"params": list(self.network.network.parameters())}, {"params": list(self.network.head.parameters())}]
        return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, nesterov=True, weight_decay=self.settings.how.weight_decay)

    def fit(self, lr: float, rows: Int[np.ndarray, " n"], stage: str) -> bool:
        """Trains from the start on these pictures; whether every loss was finite. A killed training goes on after its last kept epoch."""
        epochs, size = self.settings.how.epochs, self.batch_size(len(rows))
        optimizer, scaler = self._optimizer(), torch.amp.GradScaler(self.device.type, enabled=self.scaled)
        parts: dict[str, Any] = {"network": self.network, "optimizer": optimizer, "scaler": scaler}
        self.network.load_state_dict(self.start)
        first, saved = self.keeper.get(stage) or (0, {})
        for key in saved:
            parts[key].load_state_dict(saved[key])
        with contextlib.closing(self.subject.open("train", size, self.settings.seed, augment=True, subset=rows)) as loader:
            total = epochs * len(loader)
            with self._bar(total, f"{self.name}, lr {lr:g}", first * len(loader)) as bar:
                for epoch in range(first, epochs):
                    finite = torch.ones((), dtype=torch.bool, device=self.device)
                    for step, batch in enumerate(to_device(loader.epoch(epoch), self.device), epoch * len(loader)):
                        rate = learning_rate(step, total, 0, peak_lr(lr, size))
                        finite &= self._step(optimizer, scaler, rate, batch)
                        bar.update()
                    if any_rank(not bool(finite)):
                        return False
                    self.keeper.put(stage, epoch + 1, lambda: {key: part.state_dict() for key, part in parts.items()}, epoch + 1 == epochs)
        return True

    def _step(self, optimizer: torch.optim.SGD, scaler: torch.amp.GradScaler, rate: float, batch: Batch) -> Bool[Tensor, ""]:
        """One step; whether the loss was finite, on the device."""
        for group, factor in zip(optimizer.param_groups, (1.0, self.settings.how.head_lr_factor), strict=True):
            group["lr"] = rate * factor
        self.network.train()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self.forward(_seen(batch.split()[0]))
        loss = F.cross_entropy(logits.float(), batch.label)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach().isfinite()

    def _bar(self, total: int, what: str, done: int = 0) -> Any:
        silent = self.subject.ranks.rank > 0 or not sys.stderr.isatty()
        return tqdm(total=total, initial=done, desc=what, disable=silent, leave=False)

    @torch.no_grad()
    def score(self, split: str, rows: Int[np.ndarray, " n"] | None = None) -> Score:
        """How good the network is on these pictures, or on all of a split, in eval mode and float32 as frozen vectors are."""
        m, sums = self.classes, torch.zeros(3 + self.classes**2, dtype=torch.float64, device=self.device)
        self.network.eval()
        with contextlib.closing(self.subject.open(split, EVAL_BATCH, subset=rows)) as loader, self._bar(len(loader), self.name) as bar:
            for batch in to_device(loader.epoch(0), self.device):
                logits = self.network.forward(_seen(batch.split()[0]))  # as it is written: each size of a batch would be compiled anew
                said, loss = logits.topk(min(5, m)).indices, F.cross_entropy(logits, batch.label, reduction="sum")
                right = said == batch.label[:, None]
                sums[:3] += torch.stack([right[:, 0].sum(), right.any(1).sum(), loss])
                sums[3:] += torch.bincount(batch.label * m + said[:, 0], minlength=m * m)
                bar.update()
        sums = sums.cpu()
        if self.subject.ranks.world_size > 1:
            distributed.all_reduce(sums)
        top1, top5, cross_entropy = (sums[:3] / sums[3:].sum()).tolist()
        return Score(100 * top1, 100 * top5, cross_entropy, sums[3:].long().view(m, m))


def _seen(images: UInt8[Tensor, "b 3 s s"]) -> Float[Tensor, "b 3 s s"]:
    return normalize(images).contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------- the search


def choose(held: Sequence[Sequence[float]], lrs: Sequence[float], by: str) -> int:
    """Which of [top-1, top-5, cross-entropy] is best: by top-1, of equal ones the lowest cross-entropy; or by the latter alone.

    What diverged, whose cross-entropy is not finite, is never chosen. ValueError if all did.
    """
    fine = [i for i, each in enumerate(held) if math.isfinite(each[2])]
    if not fine:
        raise ValueError(f"fine-tuning diverged at every learning rate: give --finetune.lrs below {min(lrs):g}")
    return max(fine, key=lambda i: (held[i][0] if by == "top1" else 0.0, -held[i][2]))


class Tuned(NamedTuple):
    """What a search found: the score of every rate where it was chosen, which of them is best, and how good its network is on val."""

    held: list[list[float]]
    """[top-1, top-5, cross-entropy]."""
    best: int
    val: Score


def search(trainer: Trainer, parts: Parts) -> Tuned:
    """Trains at each rate, chooses on the held-out part, trains the best again on all if it is to be, and only then looks at val.

    `trainer.network` is the best one in the end. Without a held-out part the cross-entropy on what was trained chooses.
    """
    lrs, refit = trainer.settings.how.lrs, trainer.settings.refit
    by, judged = ("top1", parts.held) if len(parts.held) else ("cross_entropy", parts.trained)
    done = [_one_rate(trainer, lr, parts.trained, judged, f"lr{number}") for number, lr in enumerate(lrs)]
    held = [each["held"] for each in done]
    best = first_rank(lambda: choose(held, lrs, by))
    if not refit:
        trainer.network.load_state_dict(done[best]["network"])
        return Tuned(held, best, trainer.score("val"))
    fine = trainer.fit(lrs[best], parts.whole, f"again{best}-{trainer.batch_size(len(parts.whole))}")
    if not fine or not math.isfinite((val := trainer.score("val")).cross_entropy):
        raise ValueError(f"lr {lrs[best]:g} was best on the held-out part and diverged on all: give lower --finetune.lrs")
    return Tuned(held, best, val)


def _one_rate(trainer: Trainer, lr: float, rows: Int[np.ndarray, " n"], judged: Int[np.ndarray, " n"], stage: str) -> dict[str, Any]:
    """`held`: its score, from the cache if it was done before; `network`: its state, where that one is not trained again."""
    stage = f"{stage}-{trainer.batch_size(len(rows))}"
    _, before = trainer.keeper.get(stage) or (0, {})
    if "held" in before:
        return before
    fine = trainer.fit(lr, rows, stage)
    held = list(trainer.score("train", judged)[:3]) if fine else [0.0, 0.0, math.nan]
    found: dict[str, Any] = {"held": held}
    if not trainer.settings.refit:
        found["network"] = {key: value.cpu().clone() for key, value in trainer.network.state_dict().items()}
    trainer.keeper.put(stage, trainer.settings.how.epochs, lambda: found, True)
    return found


# ------------------------------------------------------------------------------------------------- what is told of it


def finetune(subject: Subject, settings: FinetuneSettings, name: str, out: Path) -> dict[str, Any]:
    """`table`, `figures` and content of the result `name`; the confusion figure and the network, as <name>.pt, are in `out`.

    The encoder of the run stays as it is. Every rank has to call it; the first alone writes.
    """
    parts = parts_of(subject.pictures.labels["train"], settings)
    trainer = Trainer(subject, settings, name)
    first_rank(lambda: [trainer.batch_size(len(part)) for part in (parts.trained, parts.whole)])
    _foretell(trainer, parts)
    found = search(trainer, parts)
    one = summary(found, parts, settings, subject.pictures.class_names)
    figures: list[str] = []
    one["weights"] = [f"{name}.pt"] * first_rank(lambda: keep(out / f"{name}.pt", {"finetuned": name}, weights(trainer, one)))
    if subject.ranks.rank == 0:
        figures = draw(found, one, subject.pictures.class_names, out, name)
        trainer.keeper.drop()
    if one["at_edge"] and settings.label_percent == 100:
        say(f"{name}: the best learning rate is at the edge of --finetune.lrs: try wider", sys.stderr)
    columns = ["network", "top-1 %", "top-5 %", "mean of classes %", "held-out top-1 %", "lr", "lr of the head"]
    numbers = [round(one[at], 2) for at in ("top1", "top5", "mean_of_classes", "held_out_top1")]
    row = ["fine-tuned", *numbers, one["lr"], one["head_lr"]]
    return {"table": {"columns": columns, "rows": [row]}, "figures": figures, "precision": subject.run.config.precision} | one


def _foretell(trainer: Trainer, parts: Parts) -> None:
    """Says what makes a result worth little before hours are spent on it."""
    size, epochs = trainer.batch_size(len(parts.trained)), trainer.settings.how.epochs
    if not len(parts.held):
        say(f"{len(parts.whole)} pictures, no class with two: none to hold out, so cross-entropy on these themselves chooses", sys.stderr)
    if (steps := epochs * (len(parts.trained) // size)) < FEW_STEPS:
        say(f"{trainer.name}: {steps} steps of {size} pictures are few: lower --finetune.batch-size or raise its epochs", sys.stderr)


def summary(found: Tuned, parts: Parts, settings: FinetuneSettings, names: Sequence[str]) -> dict[str, Any]:
    """The numbers, plain values."""
    lrs = settings.how.lrs
    lr, ends = lrs[found.best], {min(lrs), max(lrs)} if len(lrs) > 2 else set()
    grid = [
        {"lr": each, "top1": round(top1, 3), "cross_entropy": round(loss, 5)} if math.isfinite(loss) else {"lr": each, "diverged": True}
        for each, (top1, _, loss) in zip(lrs, found.held, strict=True)
    ]
    one: dict[str, Any] = {"top1": round(found.val.top1, 3), "top5": round(found.val.top5, 3)}
    one |= {"held_out_top1": round(found.held[found.best][0], 3), "lr": lr, "head_lr": lr * settings.how.head_lr_factor}
    one |= {"at_edge": lr in ends, "pictures": {name: len(part) for name, part in parts._asdict().items()}}
    return one | per_class(found.val.confusion, names) | {"grid_held_out": grid}


def weights(trainer: Trainer, one: dict[str, Any]) -> dict[str, Any]:
    """The network (keys as in the run's `cossl.load(run).network`, without heads) and the linear layer on its global vector."""
    network, head = (_on_cpu(part.state_dict()) for part in (trainer.network.network, trainer.network.head))
    names, step = list(trainer.subject.pictures.class_names), trainer.subject.run.encoder.step
    return {"network": network, "head": head, "class_names": names, "step": step, "lr": one["lr"]}


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu() for key, value in state.items()}


def draw(found: Tuned, one: dict[str, Any], names: Sequence[str], out: Path, stem: str) -> list[str]:
    """Names of the figures that could be drawn."""
    try:
        eval_figures.draw_confusion(out / f"{stem}-confusion.png", found.val.confusion, names, one["most_confused"])
        return [f"{stem}-confusion.png"]
    except ImportError:
        say("no figures: matplotlib is missing, pip install -c constraints.txt -e '.[log]'", sys.stderr)
        return []
