"""Parameter groups, optimizers, and schedules as pure functions of the step.

Symbols: k = step, K = steps in all, tau = share of the old target network that an update keeps.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from timm.optim.lars import Lars
from torch import nn

Groups = list[dict[str, Any]]


def _lars(groups: Groups, config: "OptimConfig") -> torch.optim.Optimizer:
    """LARS (You et al. 2017, arXiv 1708.03888), trust coefficient 1e-3 as in BYOL's public code.

    timm's ratio is that paper's, |w| / (|gradient| + decay |w|); BYOL's code has |gradient + decay w| below, the same to 1e-6 or so
    at a decay of 1e-6.
    Trap: timm adapts a group only where its weight decay is not 0 or `always_adapt` is set. So the weights get the flag,
    or a run without weight decay would silently be SGD, and the excluded group never gets it.
    """
    weights, excluded = groups
    adapted = [weights | {"always_adapt": True}, excluded | {"always_adapt": False}]
    return Lars(adapted, lr=config.base_lr, momentum=config.momentum, trust_coeff=1e-3)


def _sgd(groups: Groups, config: "OptimConfig") -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=config.base_lr, momentum=config.momentum)


def _adamw(groups: Groups, config: "OptimConfig") -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.base_lr, betas=(config.momentum, 0.999))


OPTIMIZERS: dict[str, Callable[[Groups, "OptimConfig"], torch.optim.Optimizer]] = {"lars": _lars, "sgd": _sgd, "adamw": _adamw}

if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedules; the defaults are BYOL's for 100 epochs of ImageNet."""

    optimizer: OptimizerName = "lars"
    """Update rule. Biases and norms get neither weight decay nor LARS's adaptation."""
    base_lr: float = 0.45
    """Peak learning rate per 256 pictures of the global batch."""
    weight_decay: float = 1e-6
    """Weight decay of all weights but biases and norms."""
    momentum: float = 0.9
    """Momentum, 0 up to but not 1; for adamw its first beta."""
    warmup_epochs: float = 10.0
    """Epochs of linear warm-up before the cosine to 0."""
    ema_tau: float = 0.99
    """Share of the target network that its first update keeps, 0 to 1; rises to 1 along a cosine."""

    def __post_init__(self) -> None:
        for name, allowed, fix in (
            ("optimizer", self.optimizer in OPTIMIZERS, f"choose one of {', '.join(OPTIMIZERS)}"),
            ("base_lr", 0 < self.base_lr < math.inf, "give a number above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "give 0 or more"),
            ("momentum", 0 <= self.momentum < 1, "give 0 up to but not 1"),
            ("warmup_epochs", 0 <= self.warmup_epochs < math.inf, "give 0 or more epochs"),
            ("ema_tau", 0 <= self.ema_tau <= 1, "give 0 to 1"),
        ):
            if not allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not possible; {fix}")


def is_excluded(parameter: nn.Parameter) -> bool:
    """Whether a parameter gets neither weight decay nor LARS's adaptation: biases and the weights of norms, all that have one axis.

    By shape, not by name: names miss the norms of the shortcuts and of the heads.
    """
    return parameter.ndim <= 1


def make_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters, in two groups: weights, then biases and norms.

    Set every group's lr before each step; it starts at `base_lr`, which is not yet scaled by the batch.
    """
    trainable = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    groups: Groups = [
        {"params": [p for p in trainable if not is_excluded(p)], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if is_excluded(p)], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[config.optimizer](groups, config)


def peak_lr(base_lr: float, batch_size: int) -> float:
    """The learning rate at the end of the warm-up: base_lr * batch_size / 256 (Goyal et al. 2017), batch_size being the global one."""
    return base_lr * batch_size / 256


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Learning rate of this step: linear from 0 to `peak` at `warmup_steps`, then a cosine that reaches 0 at `total_steps`.

    As in BYOL's public code. Trap: step 0 of a run with warm-up has rate 0.
    """
    if warmup_steps >= total_steps:
        raise ValueError(f"warmup_steps={warmup_steps} must be fewer than the run's {total_steps} steps; warm up shorter or train longer")
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min((step - warmup_steps) / (total_steps - warmup_steps), 1.0)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def ema_tau(step: int, total_steps: int, base: float) -> float:
    """tau = 1 - (1 - base) (cos(pi k / K) + 1) / 2: from `base` to 1 at the end of the run (BYOL, section 3.3)."""
    return 1 - (1 - base) * (math.cos(math.pi * step / total_steps) + 1) / 2
