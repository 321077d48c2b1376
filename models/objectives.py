"""What tells BYOL, DINO and MoCo v3 apart: what a target's outputs become, and how far a prediction is from them.

The same objective serves the global and the local terms. Predictions are [b i d] and goals [b j d] with i or j equal to 1: one vector
per picture against k positions, or k positions against one vector, or one against one.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cossl.models import losses
from cossl.models.parallel import Ranks

if TYPE_CHECKING:
    from cossl.models.co_ssl import LossConfig

# Which outputs of the target network: of its global head, or of its local head at positions or for the pooled vector.
Kind = Literal["global", "local", "local_pooled"]
KINDS: tuple[Kind, ...] = ("global", "local", "local_pooled")


class Objective(nn.Module):
    """One member of the family. `dim` is the width of what is compared; `ranks` are the processes that share the batch."""

    global_head = "mlp2"
    """The kind of the global projector and, if there is one, predictor."""
    has_predictor = True
    """The online network predicts the target's projections; else both networks compare their projections with prototypes."""
    num_terms = 2.0
    """The loss is the mean over pairs of views times this: 2 is the sum over the two views, which BYOL and MoCo v3 take."""
    own_temperature: float | None = None
    """Where the config leaves it open; None if there is no temperature."""

    def __init__(self, config: "LossConfig", dim: int, ranks: Ranks) -> None:
        super().__init__()
        if config.temperature is not None and self.own_temperature is None:
            raise ValueError(
                f"temperature={config.temperature} is not possible: this method has none; leave it out, or take dino or mocov3"
            )
        self.temperature = config.temperature or self.own_temperature or 1.0
        self.ranks = ranks

    def goals(self, outputs: Sequence[Float[Tensor, "b j d"]], valid: Sequence[Bool[Tensor, "b j"]], kind: Kind) -> list[Tensor]:
        """What predictions are compared with, for each view of the target; outputs that are not valid count for nothing."""
        return list(outputs)

    def forward(self, p: Float[Tensor, "b i d"], goal: Float[Tensor, "b j d"], valid: Bool[Tensor, "b j"]) -> Float[Tensor, "b k"]:
        """The distance of each prediction from its goal, k = max(i, j)."""
        raise NotImplementedError


class Byol(Objective):
    """Squared distance of unit vectors (Grill et al. 2020, arXiv 2006.07733, eq. 2)."""

    def forward(self, p: Float[Tensor, "b i d"], goal: Float[Tensor, "b j d"], valid: Bool[Tensor, "b j"]) -> Float[Tensor, "b k"]:
        return losses.cosine_distance(p, goal)


class MocoV3(Objective):
    """InfoNCE against the keys of the whole batch, over all processes (Chen et al. 2021, arXiv 2104.02057, algorithm 1), temperature 1.

    Reading for the local terms, which nobody has published: a position predicts its picture's global key among the global keys of the
    batch; a picture predicts its key in slot j among the keys in slot j. Memory: b k B logits, B pictures over all processes.
    """

    own_temperature = 1.0

    def forward(self, p: Float[Tensor, "b i d"], goal: Float[Tensor, "b j d"], valid: Bool[Tensor, "b j"]) -> Float[Tensor, "b k"]:
        keys, usable = self.ranks.gather(goal), self.ranks.gather(valid)
        return losses.info_nce(p, keys, usable, self.ranks.rank * len(p), self.temperature)


class Dino(Objective):
    """Cross-entropy of distributions over prototypes (Caron et al. 2021, arXiv 2104.14294, eq. 2 and 4), student temperature 0.1.

    Each kind of target output has a centre of its own, a moving average over processes and views that is subtracted before the softmax, so
    that local distributions, which are of another kind, do not shift the global ones. The centres are buffers: they travel with the state.
    """

    global_head = "mlp3"
    has_predictor = False
    num_terms = 1.0  # its public code takes the mean over pairs, and its learning rates go with that
    own_temperature = 0.1

    def __init__(self, config: "LossConfig", dim: int, ranks: Ranks) -> None:
        super().__init__(config, dim, ranks)
        self.target_temperature, self.momentum = config.target_temperature, config.centre_momentum
        self.centre: Tensor
        self.register_buffer("centre", torch.zeros(len(KINDS), dim))

    @torch.no_grad()
    def goals(self, outputs: Sequence[Float[Tensor, "b j d"]], valid: Sequence[Bool[Tensor, "b j"]], kind: Kind) -> list[Tensor]:
        """Distributions over prototypes; then the centre of this kind moves, as in the public code after its use."""
        centre = self.centre[KINDS.index(kind)].clone()
        goals = [losses.sharpened(z, centre, self.target_temperature) for z in outputs]
        weights = [each[..., None].to(centre.dtype) for each in valid]
        total = torch.stack([(z.to(centre.dtype) * w).sum((0, 1)) for z, w in zip(outputs, weights, strict=True)]).sum(0)
        count = torch.stack([w.sum() for w in weights]).sum()
        total, count = self.ranks.gather(total[None]).sum(0), self.ranks.gather(count[None]).sum()
        mean = torch.where(count > 0, total / count.clamp(min=1), centre)
        self.centre[KINDS.index(kind)] = self.momentum * centre + (1 - self.momentum) * mean
        return goals

    def forward(self, p: Float[Tensor, "b i d"], goal: Float[Tensor, "b j d"], valid: Bool[Tensor, "b j"]) -> Float[Tensor, "b k"]:
        return losses.prototype_cross_entropy(p, goal, self.temperature)


OBJECTIVES: dict[str, type[Objective]] = {"byol": Byol, "dino": Dino, "mocov3": MocoV3}
