"""What makes a frozen classifier err: adversarial pictures, and damage to its feature map before pooling.

x: pictures in [0, 1]; y: a feature map; eps: the largest norm of what is added to a picture, in units of its range. Nothing is rounded to
8 bits. Every draw is a function of (seed, number of the picture), so neither batch size nor device changes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Norm = Literal["linf", "l2"]
Damage = Literal["mask", "noise"]
Predict = Callable[[Float[Tensor, "b 3 h w"]], Float[Tensor, "b m"]]
"""Pictures in [0, 1] to logits, differentiable; whatever normalization the network wants is inside."""


@dataclass(frozen=True)
class Attack:
    """How a picture is attacked; how far it may go, eps, is an argument of its own."""

    norm: Norm
    steps: int
    relative_step: float
    """Length of a step, as a share of eps: in each pixel for linf, of the whole picture for l2."""
    random_start: bool
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"{self.steps} steps of an attack: expected 1 or more")
        if not 0 < self.relative_step < math.inf:
            raise ValueError(f"a relative step of {self.relative_step}: expected more than 0")


def one_step(norm: Norm) -> Attack:
    """The fast gradient (sign) method: one step of length eps from the picture itself (Goodfellow et al. 2015, arXiv 1412.6572)."""
    return Attack(norm, steps=1, relative_step=1.0, random_start=False)


@torch.no_grad()
def pgd(
    predict: Predict, x: Float[Tensor, "b 3 h w"], label: Int[Tensor, " b"], index: Int[Tensor, " b"], eps: float, how: Attack
) -> Float[Tensor, "b 3 h w"]:
    """Pictures in [0, 1], each within eps of its original, that `predict` is led away from their labels by: the last iterate.

    Projected gradient descent on the cross-entropy, untargeted (Madry et al. 2018, arXiv 1706.06083). The random start is uniform in the
    ball of radius eps. Trap: the norm is eps up to the rounding of x + delta in float32, about 1e-7 in a pixel.
    """
    adversarial = x.clone()
    if how.random_start:
        adversarial = (x + eps * _in_unit_ball(how, index, x)).clamp(0, 1)
    for _ in range(how.steps):
        ahead = _steepest(_gradient(predict, adversarial, label), how.norm)
        # Within [0, 1] no pixel is farther from x than before, so that after this clamp the norm still holds.
        adversarial = (x + _projected(adversarial - x + how.relative_step * eps * ahead, eps, how.norm)).clamp(0, 1)
    return adversarial


def _gradient(predict: Predict, x: Float[Tensor, "b 3 h w"], label: Int[Tensor, " b"]) -> Float[Tensor, "b 3 h w"]:
    """The direction of the cross-entropy's gradient, picture by picture.

    Cross-entropy is log(1 + exp(lead)), where lead is the log-sum-exp of the other classes' logits less the label's. The gradient of the
    lead alone has its direction and does not vanish where the network is sure: 17 nats behind, cross-entropy's is 0 in float32.
    """
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        logits, own = predict(x), label[:, None]
        lead = logits.scatter(1, own, -math.inf).logsumexp(1) - logits.gather(1, own)[:, 0]
        (gradient,) = torch.autograd.grad(lead.sum(), x)
    return gradient


def _steepest(gradient: Float[Tensor, "b 3 h w"], norm: Norm) -> Float[Tensor, "b 3 h w"]:
    """The direction of norm 1 in which the loss rises fastest; 0 where it does not."""
    if norm == "linf":
        return gradient.sign()
    return gradient / _of_each(gradient.flatten(1).norm(dim=1).clamp(min=1e-12))


def _projected(delta: Float[Tensor, "b 3 h w"], eps: float, norm: Norm) -> Float[Tensor, "b 3 h w"]:
    if norm == "linf":
        return delta.clamp(-eps, eps)
    return delta * _of_each((eps / delta.flatten(1).norm(dim=1).clamp(min=1e-12)).clamp(max=1))


def _of_each(values: Float[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
    return values[:, None, None, None]


def _in_unit_ball(how: Attack, index: Int[Tensor, " b"], like: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    size = like[0].numel()
    if how.norm == "linf":
        return (2 * uniform(how.seed, index, _START, size) - 1).view(like.shape)
    direction = normal(how.seed, index, _START, size)
    radius = uniform(how.seed, index, _RADIUS, 1) ** (1 / size)
    return (direction * (radius / direction.norm(dim=1, keepdim=True))).view(like.shape)


# ------------------------------------------------------------------------------------------------- damage to a feature map


def num_damaged(share: float, positions: int) -> int:
    """How many of the positions a share of them is: to the nearest, halves up."""
    return int(share * positions + 0.5)


def damaged(
    y: Float[Tensor, "b c n m"], kind: Damage, shares: Sequence[float], index: Int[Tensor, " b"], seed: int
) -> Iterator[Float[Tensor, "b c n m"]]:
    """For each share the map with so many of its positions set to zero, or replaced by noise.

    Which ones is drawn for every picture; those of a smaller share are among those of a larger one. Noise is normal, with the mean and the
    deviation that the channel has over the positions of this picture's own map, drawn for each position and channel. A share of 0 gives
    the map itself.
    """
    positions = y.shape[2] * y.shape[3]
    turn = uniform(seed, index, _POSITIONS, positions).argsort(1).view(-1, 1, *y.shape[2:])
    filler: Tensor = y.new_zeros(())
    if kind == "noise":
        variance, mean = torch.var_mean(y, (2, 3), correction=0, keepdim=True)
        filler = mean + variance.sqrt() * normal(seed, index, _NOISE, y[0].numel()).view(y.shape)
    for share in shares:
        count = num_damaged(share, positions)
        yield torch.where(turn < count, filler, y) if count else y


# ------------------------------------------------------------------------------------------------- draws

# The finalizer of splitmix64 (Steele, Lea and Flood 2014) over a counter, in int64, whose products wrap around.
_GOLDEN, _MIX_1, _MIX_2 = (word - 2**64 for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_START, _RADIUS, _POSITIONS, _NOISE = range(4)  # purposes: one stream each


def uniform(seed: int, index: Int[Tensor, " b"], purpose: int, count: int) -> Float[Tensor, "b n"]:
    """Draws in [0, 1), multiples of 2^-24, on the device of `index`."""
    return _shifted(_bits(seed, index, purpose, count), 40).float() * 2.0**-24


def normal(seed: int, index: Int[Tensor, " b"], purpose: int, count: int) -> Float[Tensor, "b n"]:
    """Draws of mean 0 and deviation 1, none beyond 5.8 (Box and Muller's)."""
    u, v = uniform(seed, index, purpose, 2 * count).chunk(2, dim=1)
    return (-2 * torch.log(1 - u)).sqrt() * torch.cos(2 * math.pi * v)


def _bits(seed: int, index: Int[Tensor, " b"], purpose: int, count: int) -> Int[Tensor, "b n"]:
    key = torch.full_like(index, seed)
    for word in (index, purpose):
        key = _mixed(_mixed(key + _GOLDEN) ^ word)
    return _mixed(key[:, None] + torch.arange(1, count + 1, device=index.device) * _GOLDEN)


def _mixed(z: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    z = (z ^ _shifted(z, 30)) * _MIX_1
    z = (z ^ _shifted(z, 27)) * _MIX_2
    return z ^ _shifted(z, 31)


def _shifted(z: Int[Tensor, "..."], by: int) -> Int[Tensor, "..."]:
    """To the right, with zeros coming in: torch's own shift brings copies of the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)
