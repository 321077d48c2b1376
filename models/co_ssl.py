"""CO-BYOL: an online and a target network, two views in, named loss terms out.

Symbols: y = feature map, Y = pooled global vector (after the optional MLP), g q = global projector and predictor,
g2 q2 = the local ones, primed (here: target) = moving average, v w = the two views, d(a, b) = 2 - 2 cos(a, b).
"""

import copy
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from cossl.models import losses
from cossl.models.heads import HEADS, NORMS, Head, mlp, predictor_kind
from cossl.models.rf_resnet import BACKBONES, make_backbone

if TYPE_CHECKING:
    BackboneName = str
    HeadName = str
    NormName = str
else:
    # The command line offers what the dicts hold, so a new entry there is all that a new variant needs.
    BackboneName = Literal[tuple(BACKBONES)]
    HeadName = Literal[tuple(HEADS)]
    NormName = Literal[tuple(NORMS)]


def _check(name: str, value: object, allowed: bool, fix: str) -> None:
    if not allowed:
        raise ValueError(f"{name}={value!r} is not possible; {fix}")


@functools.cache  # 0.1 s each time, and a grid makes hundreds of equal ones
def _check_backbone(name: str, receptive_field: int | None, width: int, small_image_stem: bool | None) -> None:
    with torch.device("meta"):  # nothing is allocated: this only lets an impossible backbone speak up at once
        make_backbone(name, receptive_field, width, small_image_stem)


@dataclass(frozen=True)
class ModelConfig:
    """The networks."""

    backbone: BackboneName = "rf_resnet50"
    """The network before pooling. rf_*, bagnet: the receptive field is an argument; the others are torchvision's. See `cossl models`."""
    receptive_field: int | None = 99
    """Pixels of a view that one position of the feature map sees; None or 0 = unrestricted. An impossible value lists the possible ones."""
    width: int = 64
    """Channels of the first stage, all others in proportion: 64 = the full network, 16 = a quarter of its width."""
    small_image_stem: bool | None = None
    """3x3 stem without stride and max-pool, for views of about 64 px; None = its own habit (yes: rf_resnet18, rf_resnet34, bagnet)."""
    mlp_after_pool: int = 2
    """Linear layers between the pooling and the global representation, as wide as the feature map; 0 = none."""
    hidden_dim: int = 4096
    """Hidden width of projectors and predictors."""
    out_dim: int = 256
    """Width of the vectors that are compared."""
    local_head: HeadName = "conv1x1"
    """Architecture of the local projector and predictor. conv1x1 (2 layers), conv1x1_deep (4): on the whole map, before the positions
    are sampled. linear, mlp2, mlp3: on the sampled ones. conv3x3: sees the neighbours too, which breaks the bounded receptive field."""
    head_norm: NormName = "batch"
    """Norm between the layers of all projectors and predictors: batch (BYOL's), or layer, which does not depend on other pictures."""
    shared_heads: bool = False
    """One projector and one predictor (of the kind local_head) for global and local vectors, instead of two each."""
    output_norm: bool = False
    """Batch norm without weight and bias on what the projectors return: MoCo v3's habit, BYOL has none. Short runs collapse less."""

    def __post_init__(self) -> None:
        _check("local_head", self.local_head, self.local_head in HEADS, f"choose one of {', '.join(HEADS)}")
        _check("head_norm", self.head_norm, self.head_norm in NORMS, f"choose one of {', '.join(NORMS)}")
        _check("mlp_after_pool", self.mlp_after_pool, self.mlp_after_pool >= 0, "give a number of layers, 0 for none")
        _check("hidden_dim", self.hidden_dim, self.hidden_dim >= 1, "give at least 1")
        _check("out_dim", self.out_dim, self.out_dim >= 1, "give at least 1")
        _check_backbone(self.backbone, self.receptive_field, self.width, self.small_image_stem)


@dataclass(frozen=True)
class LossConfig:
    """The terms of the loss and their weights."""

    local_weight: float = 0.3
    """Weight w_s of the local term; 0 = plain BYOL, without local heads. With "convex" at most 1."""
    local_to_global: float = 0.5
    """Share of local-to-global in the local term, 0 to 1; global-to-local gets the rest. A direction with share 0 is not computed."""
    combine: Literal["convex", "additive"] = "convex"
    """convex: (1 - w_s) global + w_s local. additive: global + w_s local."""
    local_target: Literal["global_head", "local_head"] = "global_head"
    """Which projector of the target network makes the global vector that positions are drawn to."""
    local_views: Literal["cross", "same"] = "cross"
    """cross: the local terms compare one view with the other, as the paper's. same: each view with itself, seen by the target network."""

    def __post_init__(self) -> None:
        _check("combine", self.combine, self.combine in ("convex", "additive"), "choose convex or additive")
        _check("local_views", self.local_views, self.local_views in ("cross", "same"), "choose cross or same")
        _check("local_target", self.local_target, self.local_target in ("global_head", "local_head"), "choose global_head or local_head")
        most = 1.0 if self.combine == "convex" else float("inf")
        fix = "give 0 to 1" if self.combine == "convex" else "give 0 or more"
        _check(
            "local_weight", self.local_weight, 0 <= self.local_weight <= most, f"{fix} (0.2 to 0.5 is usual) when combine is {self.combine}"
        )
        _check("local_to_global", self.local_to_global, 0 <= self.local_to_global <= 1, "give 0 to 1 (0.5 weighs both directions alike)")


class Network(nn.Module):
    """Backbone, pooling, projectors and predictors; the target network has no predictors, plain BYOL no local heads."""

    def __init__(self, model: ModelConfig, local: bool) -> None:
        super().__init__()
        self.backbone = make_backbone(model.backbone, model.receptive_field, model.width, model.small_image_stem)
        c, hidden, out = self.backbone.out_channels, model.hidden_dim, model.out_dim
        self.after_pool = mlp(c, c, c, model.mlp_after_pool) if model.mlp_after_pool else nn.Identity()
        # BYOL's heads are MLPs on the pooled vector; a shared one has to serve maps too, so it is of the local kind.
        kind, norm = model.local_head if model.shared_heads and local else "mlp2", model.head_norm
        self.projector: Head = HEADS[kind](c, hidden, out, model.output_norm, norm)
        self.predictor: Head | None = HEADS[predictor_kind(kind)](out, hidden, out, False, norm)
        self.local_projector: Head | None = None
        self.local_predictor: Head | None = None
        if local:
            g, q = HEADS[model.local_head], HEADS[predictor_kind(model.local_head)]
            self.local_projector = self.projector if model.shared_heads else g(c, hidden, out, model.output_norm, norm)
            self.local_predictor = self.predictor if model.shared_heads else q(out, hidden, out, False, norm)

    def pool(self, y: Float[Tensor, "b c n n"]) -> Float[Tensor, "b c"]:
        """The global vector Y of a feature map."""
        return self.after_pool(y.mean((2, 3)))


class CoByol(nn.Module):
    """CO-SSL on BYOL (arXiv 2501.02860 on arXiv 2006.07733): two views and their positions in, named loss terms out.

    Both networks stay in train mode while training: the target's batch norms use the batch's statistics, as in BYOL's public code.
    The target has no gradient and moves only by `update_target_`.
    Trap: q2 works on the positions that g2 returns, so its batch norm sees the sampled positions for every kind of head.
    """

    def __init__(self, model: ModelConfig, loss: LossConfig) -> None:
        super().__init__()
        self.loss = loss
        self.online = Network(model, local=loss.local_weight > 0)
        self.target = copy.deepcopy(self.online)
        self.target.predictor = self.target.local_predictor = None
        self.target.requires_grad_(False)

    def forward(self, views: Sequence[Float[Tensor, "b 3 s s"]], positions: Int[Tensor, "b 2 k"]) -> dict[str, Tensor]:
        """Scalars: loss, global, the local directions in use, and std. Terms are the SUM over both views and the mean over the batch.

        Averaging over the views instead would halve the step. Views pass one after the other, so batch statistics are per view.
        std is 1 for global projections spread evenly over all directions and 0 for collapsed ones; it has no gradient.
        """
        y = [self.online.backbone(x) for x in views]
        pooled = [self.online.pool(each) for each in y]
        projected = [self.online.projector.vectors(each) for each in pooled]
        with torch.no_grad():
            y_target = [self.target.backbone(x) for x in views]
            pooled_target = [self.target.pool(each) for each in y_target]
            z = [self.target.projector.vectors(each) for each in pooled_target]
        q = self.online.predictor
        assert q is not None
        cross = ((0, 1), (1, 0))
        terms = {"global": _sum(losses.cosine_distance(q.vectors(projected[v]), z[w]).mean() for v, w in cross)}
        local: Tensor | float = 0.0
        if self.loss.local_weight > 0:
            directions = self._local(y, pooled, y_target, pooled_target, z, positions)
            terms |= directions
            local = losses.local_term(
                directions.get("local_to_global", 0.0), directions.get("global_to_local", 0.0), self.loss.local_to_global
            )
        loss = losses.total(terms["global"], local, self.loss.local_weight, self.loss.combine)
        return {"loss": loss, **terms, "std": _sum(spread(each) for each in projected) / 2}

    def _local(
        self,
        y: list[Float[Tensor, "b c n n"]],
        pooled: list[Float[Tensor, "b c"]],
        y_target: list[Float[Tensor, "b c n n"]],
        pooled_target: list[Float[Tensor, "b c"]],
        z: list[Float[Tensor, "b d"]],
        positions: Int[Tensor, "b 2 k"],
    ) -> dict[str, Tensor]:
        """The local directions whose share is not 0. Positions of -1 are left out of the means."""
        g2, q2, g2_target = self.online.local_projector, self.online.local_predictor, self.target.local_projector
        assert g2 is not None
        assert q2 is not None
        assert g2_target is not None
        share, terms = self.loss.local_to_global, {}
        at = [positions[:, 0], positions[:, 1]]
        pairs = ((0, 1), (1, 0)) if self.loss.local_views == "cross" else ((0, 0), (1, 1))
        if share > 0:
            with torch.no_grad():
                goal = z if self.loss.local_target == "global_head" else [g2_target.vectors(each) for each in pooled_target]
            terms["local_to_global"] = _sum(
                losses.masked_mean(losses.cosine_distance(q2.vectors(g2(y[v], at[v])), goal[w][:, None]), at[v] >= 0) for v, w in pairs
            )
        if share < 1:
            with torch.no_grad():
                z_local = [g2_target(y_target[v], at[v]) for v in (0, 1)]
            terms["global_to_local"] = _sum(
                losses.masked_mean(losses.cosine_distance(q2.vectors(g2.vectors(pooled[v]))[:, None], z_local[w]), at[w] >= 0)
                for v, w in pairs
            )
        return terms

    def represent(self, x: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b c"]:
        """The online network's global vector Y, what probes read. Call eval() first, or the batch norms follow the pictures."""
        return self.online.pool(self.online.backbone(x))

    @torch.no_grad()
    def update_target_(self, tau: float) -> None:
        """target <- tau * target + (1 - tau) * online, for parameters.

        Buffers are left alone: each network keeps the running statistics of its own batch norms, as in BYOL's public code.
        """
        online = dict(self.online.named_parameters())
        targets, sources = zip(*((parameter, online[name]) for name, parameter in self.target.named_parameters()), strict=True)
        torch._foreach_lerp_(list(targets), list(sources), 1 - tau)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()


@torch.no_grad()
def spread(z: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Mean over dimensions of the standard deviation of unit vectors, times sqrt(d): 1 = spread evenly, 0 = collapsed.

    The measure of SimSiam (Chen and He 2021, arXiv 2011.10566, section 4.1). Over the local batch only.
    """
    return F.normalize(z.float(), dim=-1).std(0, correction=0).mean() * z.shape[-1] ** 0.5
