"""Parameter groups, optimizers, and schedules as pure functions of the step.

Symbols: k = step, K = steps in all, tau = share of the old target network that an update keeps.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from cossl.models.heads import Prototypes

Groups = list[dict[str, Any]]


def _lars(groups: Groups, config: "OptimConfig") -> torch.optim.Optimizer:
    """LARS (You et al. 2017, arXiv 1708.03888), timm's, over lists of tensors instead of one tensor after the other.

    timm's ratio is that paper's, |w| / (|gradient| + decay |w|); BYOL's code has |gradient + decay w| below, the same to 1e-6 or so
    at a decay of 1e-6. Where a norm is 0 the ratio is 1, before a clip.
    Trap: timm adapts a group only where its weight decay is not 0 or `always_adapt` is set. So the weights get the flag,
    or a run without weight decay would silently be SGD, and the excluded group never gets it.
    """
    from timm.optim.lars import Lars  # here: all of timm comes with it

    weights, excluded = groups
    adapted = [weights | {"always_adapt": True}, excluded | {"always_adapt": False}]
    return Lars(
        adapted, lr=config.base_lr, momentum=config.momentum, trust_coeff=config.lars_eta, trust_clip=config.lars_clip, foreach=True
    )


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
    lars_eta: float = 1e-3
    """LARS's trust coefficient, above 0: 1e-3 in BYOL's and MoCo v3's public code, 0.02 in solo-learn's ImageNet-100 recipes."""
    lars_clip: bool = False
    """LARS never steps further than SGD would: its ratio becomes min(ratio / learning rate, 1), the clip of LARC (NVIDIA's Apex), which is
    solo-learn's clip_lr. While it binds, the learning rate of a weight is the schedule's; else lars_eta |w| / |gradient|, whatever the
    schedule says."""
    warmup_epochs: float = 10.0
    """Epochs of linear warm-up before the cosine to 0."""
    warmup_start_lr: float = 0.0
    """Learning rate at the first step of the warm-up, 0 or more, not scaled by the batch: 0 in BYOL's public code, 3e-5 in solo-learn."""
    clip_grad: float = 0.0
    """Largest norm of each parameter's gradient, 0 = no limit; 3 in DINO's public code. Per parameter, not over all of them."""
    freeze_prototypes_epochs: float = 0.0
    """Epochs at the start in which DINO's prototypes stay as they are, 0 or more; 1 in its public code (freeze_last_layer). The other
    methods have no prototypes."""
    ema_tau: float = 0.99
    """Share of the target network that its first update keeps, 0 to 1; rises to 1 along a cosine."""

    def __post_init__(self) -> None:
        for name, allowed, fix in (
            ("optimizer", self.optimizer in OPTIMIZERS, f"choose one of {', '.join(OPTIMIZERS)}"),
            ("base_lr", 0 < self.base_lr < math.inf, "give a number above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "give 0 or more"),
            ("momentum", 0 <= self.momentum < 1, "give 0 up to but not 1"),
            ("lars_eta", 0 < self.lars_eta < math.inf, "give a number above 0"),
            ("warmup_epochs", 0 <= self.warmup_epochs < math.inf, "give 0 or more epochs"),
            ("warmup_start_lr", 0 <= self.warmup_start_lr < math.inf, "give 0 or more"),
            ("clip_grad", 0 <= self.clip_grad < math.inf, "give a number above 0, or 0 for no limit"),
            ("freeze_prototypes_epochs", 0 <= self.freeze_prototypes_epochs < math.inf, "give 0 or more epochs"),
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


@torch.no_grad()
def clip_gradients_(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scales each gradient that is longer than `max_norm` to that length; the host waits for nothing.

    DINO's rule (github.com/facebookresearch/dino, utils.clip_gradients): gradient * min(max_norm / (|gradient| + 1e-6), 1). Parameters
    without a gradient are passed over. ValueError unless max_norm is above 0.
    Trap: not `torch.nn.utils.clip_grad_norm_`, which takes one norm over all parameters.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm} is not possible; give a number above 0, or do not clip")
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    factors = torch._foreach_norm(gradients)
    torch._foreach_add_(factors, 1e-6)
    torch._foreach_reciprocal_(factors)
    torch._foreach_mul_(factors, max_norm)
    torch._foreach_clamp_max_(factors, 1.0)
    torch._foreach_mul_(gradients, factors)


def adjust_gradients_(network: nn.Module, config: OptimConfig, epoch: float) -> None:
    """The gradients as the optimizer shall see them: clipped, and none for prototypes that are frozen in this epoch.

    For between the backward pass and the step; `epoch` = step / steps per epoch. A frozen parameter has no gradient instead of zeros, as
    in DINO's public code (utils.cancel_gradients_last_layer): zeros would still let weight decay and momentum move it.
    """
    if config.clip_grad:
        clip_gradients_(network.parameters(), config.clip_grad)
    if epoch < config.freeze_prototypes_epochs:
        for module in network.modules():
            if isinstance(module, Prototypes):
                module.weight.grad = None


def all_finite(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether no number in them is inf or nan. Trap: the host waits for the device."""
    norms = torch._foreach_norm([tensor for tensor in tensors if tensor is not None])
    return bool(torch.stack(norms).isfinite().all())


def peak_lr(base_lr: float, batch_size: int) -> float:
    """The learning rate at the end of the warm-up: base_lr * batch_size / 256 (Goyal et al. 2017), batch_size being the global one."""
    return base_lr * batch_size / 256


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float, start: float = 0.0) -> float:
    """Learning rate of this step: linear from `start` to `peak` at `warmup_steps`, then a cosine that reaches 0 at `total_steps`.

    As in BYOL's public code, whose start is 0. Without warm-up `start` means nothing. ValueError if the warm-up is no shorter than the
    run, or falls instead of rising. Trap: step 0 of a run with warm-up and a start of 0 changes nothing but the momentum.
    """
    if warmup_steps >= total_steps:
        raise ValueError(f"warmup_steps={warmup_steps} must be fewer than the run's {total_steps} steps; warm up shorter or train longer")
    if warmup_steps and start > peak:
        raise ValueError(f"warmup_start_lr={start:g} must not be above the peak learning rate of {peak:g}; give a smaller one")
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    progress = min((step - warmup_steps) / (total_steps - warmup_steps), 1.0)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def ema_tau(step: int, total_steps: int, base: float) -> float:
    """tau = 1 - (1 - base) (cos(pi k / K) + 1) / 2: from `base` to 1 at the end of the run (BYOL, section 3.3)."""
    return 1 - (1 - base) * (math.cos(math.pi * step / total_steps) + 1) / 2


def schedule(config: OptimConfig, epochs: int, steps_per_epoch: int, batch_size: int) -> Callable[[int], tuple[float, float]]:
    """(learning rate, tau) of a step of such a run. Its first call raises ValueError for a warm-up that is not possible."""
    total, warmup, peak = epochs * steps_per_epoch, round(config.warmup_epochs * steps_per_epoch), peak_lr(config.base_lr, batch_size)
    return lambda step: (learning_rate(step, total, warmup, peak, config.warmup_start_lr), ema_tau(step, total, config.ema_tau))
