"""CO-SSL's loss terms as pure functions of (prediction, target).

Symbols: p = prediction of the online network, z = projection of the target network, d(p, z) = 2 - 2 cos(p, z), T = temperature,
w = weight of the local term, a = share of local-to-global in it.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

# BYOL's public code bounds the squared norm by 1e-12: a vector of zeros then has distance 2 and a finite gradient.
_MIN_NORM = 1e-6


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """Inside, matrix products of float32 are float32's, whatever autocast says."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def cosine_distance(p: Float[Tensor, "*#b d"], z: Float[Tensor, "*#b d"]) -> Float[Tensor, "*#b"]:
    """Squared distance of the two unit vectors, 2 - 2 cos(p, z), for each element; in [0, 4].

    BYOL eq. 2 (Grill et al. 2020, arXiv 2006.07733). Leading axes broadcast. At least float32 whatever comes in.
    Detaches z itself, so the target branch cannot receive a gradient whatever the caller does.
    """
    dtype = torch.promote_types(p.dtype, torch.float32)
    p = F.normalize(p.to(dtype), dim=-1, eps=_MIN_NORM)
    z = F.normalize(z.detach().to(dtype), dim=-1, eps=_MIN_NORM)
    return 2 - 2 * (p * z).sum(-1)


def info_nce(
    p: Float[Tensor, "b i d"], keys: Float[Tensor, "n j d"], usable: Bool[Tensor, "n j"], first: int, temperature: float
) -> Float[Tensor, "b k"]:
    """2 T times the cross-entropy of p's cosines to all n keys over T, the right one being key `first` + row; k = max(i, j).

    MoCo v3 (Chen et al. 2021, arXiv 2104.02057, algorithm 1). i or j is 1: with j > 1 slot j has keys of its own, and those that are not
    usable are no negatives. Detaches the keys itself. At least float32 whatever comes in.
    """
    dtype = torch.promote_types(p.dtype, torch.float32)
    q = F.normalize(p.to(dtype), dim=-1, eps=_MIN_NORM).transpose(0, 1)
    k = F.normalize(keys.detach().to(dtype), dim=-1, eps=_MIN_NORM).permute(1, 2, 0)
    right = first + torch.arange(p.shape[0], device=p.device)
    own = torch.zeros(p.shape[0], keys.shape[0], dtype=torch.bool, device=p.device).scatter(1, right[:, None], True)
    # A picture's own key stays even where it is not usable: its loss is then masked, and has to be finite for its gradient to be 0.
    with full_precision(p):
        cosines = q @ k
    logits = torch.where(usable.T[:, None] | own, cosines / temperature, -torch.inf)
    right_logit = logits.gather(2, right[None, :, None].expand(logits.shape[0], -1, 1))[..., 0]
    return (2 * temperature * (logits.logsumexp(2) - right_logit)).T


def sharpened(z: Float[Tensor, "*b d"], centre: Float[Tensor, " d"], temperature: float) -> Float[Tensor, "*b d"]:
    """The target's distribution over prototypes, softmax((z - centre) / T), at least float32 (DINO, arXiv 2104.14294, section 3.1)."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    return ((z.to(dtype) - centre) / temperature).softmax(-1)


def prototype_cross_entropy(p: Float[Tensor, "b i d"], goal: Float[Tensor, "b j d"], temperature: float) -> Float[Tensor, "b k"]:
    """Cross-entropy of softmax(p / T) from the distribution `goal`; i or j is 1, k = max(i, j) (DINO, arXiv 2104.14294, eq. 2).

    Detaches the goal itself. As a matrix product: the product element by element would hold b k d numbers once more.
    """
    dtype = torch.promote_types(p.dtype, torch.float32)
    log_p = F.log_softmax(p.to(dtype) / temperature, dim=-1)
    with full_precision(p):
        return -(log_p @ goal.detach().to(dtype).transpose(1, 2)).flatten(1)


def masked_mean(distance: Float[Tensor, "b k"], valid: Bool[Tensor, "b k"], samples: Float[Tensor, ""] | None = None) -> Float[Tensor, ""]:
    """Mean over the valid positions of each sample, then over the samples that have any; 0 where no sample has.

    So each picture weighs the same however many positions it brings, and a batch in which many bring none
    (views without overlap, say) keeps the size of its loss. Where processes share a batch, `samples` is how many
    have any per process on average: the mean over the processes is then the mean over the joint batch.
    """
    count = valid.sum(1)
    per_sample = torch.where(valid, distance, 0.0).sum(1) / count.clamp(min=1)
    samples = (count > 0).sum().to(distance.dtype) if samples is None else samples
    return per_sample.sum() / samples.clamp(min=1e-6)  # where there are none the sum is 0


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
