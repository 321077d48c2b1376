"""CO-SSL's loss terms as pure functions of (prediction, target).

Symbols: p = prediction of the online network, z = projection of the target network, d(p, z) = 2 - 2 cos(p, z),
w = weight of the local term, a = share of local-to-global in it.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

# BYOL's public code bounds the squared norm by 1e-12: a vector of zeros then has distance 2 and a finite gradient.
_MIN_NORM = 1e-6


def cosine_distance(p: Float[Tensor, "*#b d"], z: Float[Tensor, "*#b d"]) -> Float[Tensor, "*#b"]:
    """Squared distance of the two unit vectors, 2 - 2 cos(p, z), for each element; in [0, 4].

    BYOL eq. 2 (Grill et al. 2020, arXiv 2006.07733). Leading axes broadcast. At least float32 whatever comes in.
    Detaches z itself, so the target branch cannot receive a gradient whatever the caller does.
    """
    dtype = torch.promote_types(p.dtype, torch.float32)
    p = F.normalize(p.to(dtype), dim=-1, eps=_MIN_NORM)
    z = F.normalize(z.detach().to(dtype), dim=-1, eps=_MIN_NORM)
    return 2 - 2 * (p * z).sum(-1)


def masked_mean(distance: Float[Tensor, "b k"], valid: Bool[Tensor, "b k"]) -> Float[Tensor, ""]:
    """Mean over the valid positions of each sample, then over the samples that have any; 0 where no sample has.

    So each picture weighs the same however many positions it brings, and a batch in which many bring none
    (views without overlap, say) keeps the size of its loss.
    """
    weight = valid.to(distance.dtype)
    count = weight.sum(1)
    per_sample = torch.where(valid, distance, 0.0).sum(1) / count.clamp(min=1)
    return per_sample.sum() / (count > 0).sum().clamp(min=1)


def local_term(
    local_to_global: Float[Tensor, ""] | float, global_to_local: Float[Tensor, ""] | float, share: float
) -> Float[Tensor, ""] | float:
    """2 (a * local_to_global + (1 - a) * global_to_local): at a = 0.5 the plain sum of both directions.

    Reading of CO-SSL's symmetric local loss with the directions weighted; each term is already summed over the two views.
    """
    return 2 * (share * local_to_global + (1 - share) * global_to_local)


def total(
    global_: Float[Tensor, ""], local: Float[Tensor, ""] | float, weight: float, combine: Literal["convex", "additive"]
) -> Float[Tensor, ""]:
    """(1 - w) global + w local ("convex"), or global + w local ("additive"). Which one the paper means is not public."""
    return (1 - weight if combine == "convex" else 1.0) * global_ + weight * local
