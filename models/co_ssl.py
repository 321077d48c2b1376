"""CO-SSL on BYOL, DINO or MoCo v3: an online and a target network, views in, named loss terms out.

Symbols: y = feature map, Y = pooled global vector (after the optional MLP), g q = global projector and predictor,
g2 q2 = the local ones, primed (here: target) = moving average, v = a view, w = one of the two global views, d = the objective's distance.
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from cossl.models import losses
from cossl.models.heads import HEADS, NORMS, Head, Prototypes, mlp, predictor_kind
from cossl.models.objectives import OBJECTIVES
from cossl.models.parallel import ALONE, Ranks
from cossl.models.rf_resnet import BACKBONES, PositionGrid, make_backbone, pool_to, position_grid

if TYPE_CHECKING:
    BackboneName = str
    HeadName = str
    MethodName = str
    NormName = str
else:
    # The command line offers what the dicts hold, so a new entry there is all that a new variant needs.
    BackboneName, HeadName, MethodName, NormName = (Literal[tuple(names)] for names in (BACKBONES, HEADS, OBJECTIVES, NORMS))

TARGET_VIEWS = (0, 1)  # the two global views; views after them are small ones, which only the online network sees


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

    method: MethodName = "byol"
    """byol, dino or mocov3: what the global terms are; with --loss.local-weight 0 the method alone, else CO-BYOL, CO-DINO, CO-MoCo v3."""
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
    predictor_hidden_dim: int = 0
    """Hidden width of predictors; 0 = hidden_dim."""
    out_dim: int = 256
    """Width of the vectors that are compared."""
    local_head: HeadName = "conv1x1"
    """Architecture of the local projector and predictor. conv1x1 (2 layers), conv1x1_deep (4): on the whole map, before the positions
    are sampled. linear, mlp2, mlp3: on the sampled ones. conv3x3: sees the neighbours too, which breaks the bounded receptive field."""
    head_norm: NormName = "batch"
    """Norm between the layers of all projectors and predictors: batch (BYOL's), layer (does not look at other pictures), none (DINO's)."""
    shared_heads: bool = False
    """One projector and one predictor (of the kind local_head) for global and local vectors, instead of two each."""
    output_norm: bool = False
    """Batch norm without weight and bias on what the projectors return: MoCo v3's habit, BYOL has none. Short runs collapse less."""
    prototypes: int = 65536
    """Prototypes of each of DINO's heads; the other methods have none."""
    predictors: Literal["shared", "per_size"] = "shared"
    """shared: one global and one local predictor for all views. per_size: small views have their own; without them multi-crop BYOL falls
    behind (70.7 against 74.7 on ImageNet, the MULAN paper). DINO has no predictors."""
    local_stage: int = 4
    """Stage of the backbone, 1 to 4, whose map gives the local vectors. Before 4 the global vector enters the local space by g, not g2."""
    local_grid: int = 0
    """Local vectors per side: the map is averaged to n x n equal windows first; 0 leaves it as it is, and so do maps smaller than that."""
    joint_views: bool = False
    """Pass views of one size through the backbone together, so that batch norms see them all (DINO's code); else one after the other."""

    def __post_init__(self) -> None:
        _check("local_head", self.local_head, self.local_head in HEADS, f"choose one of {', '.join(HEADS)}")
        _check("head_norm", self.head_norm, self.head_norm in NORMS, f"choose one of {', '.join(NORMS)}")
        _check("method", self.method, self.method in OBJECTIVES, f"choose one of {', '.join(OBJECTIVES)}")
        _check("predictors", self.predictors, self.predictors in ("shared", "per_size"), "choose shared or per_size")
        own = self.predictors == "shared" or OBJECTIVES[self.method].has_predictor
        _check("predictors", self.predictors, own, f"{self.method} has no predictors; use shared")
        _check("prototypes", self.prototypes, self.prototypes >= 2, "give at least 2")
        _check("local_stage", self.local_stage, 1 <= self.local_stage <= 4, "give 1 to 4")
        _check("local_grid", self.local_grid, self.local_grid >= 0, "give a number of positions per side, 0 for the map as it is")
        _check(
            "shared_heads", self.shared_heads, not self.shared_heads or self.local_stage == 4, "heads can be shared at local_stage 4 alone"
        )
        _check("mlp_after_pool", self.mlp_after_pool, self.mlp_after_pool >= 0, "give a number of layers, 0 for none")
        _check("hidden_dim", self.hidden_dim, self.hidden_dim >= 1, "give at least 1")
        _check("predictor_hidden_dim", self.predictor_hidden_dim, self.predictor_hidden_dim >= 0, "give at least 1, or 0 for hidden_dim")
        _check("out_dim", self.out_dim, self.out_dim >= 1, "give at least 1")
        _check_backbone(self.backbone, self.receptive_field, self.width, self.small_image_stem)


@dataclass(frozen=True)
class LossConfig:
    """The terms of the loss and their weights."""

    local_weight: float = 0.3
    """Weight w_s of the local term; 0 = the plain method, without local heads. With "convex" at most 1."""
    local_to_global: float = 0.5
    """Share of local-to-global in the local term, 0 to 1; global-to-local gets the rest. A direction with share 0 is not computed."""
    combine: Literal["convex", "additive"] = "convex"
    """convex: (1 - w_s) global + w_s local. additive: global + w_s local."""
    local_target: Literal["global_head", "local_head"] = "global_head"
    """Which projector of the target network makes the global vector that positions are drawn to."""
    local_views: Literal["cross", "same"] = "cross"
    """cross: the local terms compare one view with the other, as the paper's. same: each global view with itself, seen by the target."""
    small_views: bool = True
    """Small views (multi_crop's) take part in the local terms as they do in the global one."""
    temperature: float | None = None
    """Of MoCo v3's logits (its own: 1.0) or of DINO's student (0.1); None = the method's own. BYOL has none."""
    target_temperature: float = 0.04
    """Of DINO's teacher."""
    centre_momentum: float = 0.9
    """Share of DINO's centres that a step keeps."""

    def __post_init__(self) -> None:
        _check("combine", self.combine, self.combine in ("convex", "additive"), "choose convex or additive")
        _check("local_views", self.local_views, self.local_views in ("cross", "same"), "choose cross or same")
        _check("local_target", self.local_target, self.local_target in ("global_head", "local_head"), "choose global_head or local_head")
        _check("temperature", self.temperature, self.temperature is None or self.temperature > 0, "give a number above 0")
        _check("target_temperature", self.target_temperature, self.target_temperature > 0, "give a number above 0")
        _check("centre_momentum", self.centre_momentum, 0 <= self.centre_momentum <= 1, "give 0 to 1")
        most = 1.0 if self.combine == "convex" else float("inf")
        fix = "give 0 to 1" if self.combine == "convex" else "give 0 or more"
        _check(
            "local_weight", self.local_weight, 0 <= self.local_weight <= most, f"{fix} (0.2 to 0.5 is usual) when combine is {self.combine}"
        )
        _check("local_to_global", self.local_to_global, 0 <= self.local_to_global <= 1, "give 0 to 1 (0.5 weighs both directions alike)")

    @property
    def small_locals(self) -> bool:
        """Whether small views take part in the local terms; a small view has no target of its own to be compared with."""
        return self.small_views and self.local_views == "cross"


class Seen(NamedTuple):
    """What a network makes of one view: the map that local vectors are taken from, Y, and g(Y)."""

    y: Float[Tensor, "b c n n"]
    pooled: Float[Tensor, "b c"]
    projected: Float[Tensor, "b d"]


class Network(nn.Module):
    """Backbone, pooling, projectors, and what follows them: predictors (BYOL, MoCo v3: online network alone) or prototypes (DINO: both).

    Without a local term there are no local heads.
    """

    def __init__(self, model: ModelConfig, local: bool, small_locals: bool = True) -> None:
        """`small_locals`: small views take part in the local terms too."""
        super().__init__()
        self.backbone = make_backbone(model.backbone, model.receptive_field, model.width, model.small_image_stem)
        self.stage, self.grid, self.joint_views = model.local_stage, model.local_grid, model.joint_views
        c, hidden, out, norm = self.backbone.out_channels, model.hidden_dim, model.out_dim, model.head_norm
        self.after_pool = mlp(c, c, c, model.mlp_after_pool) if model.mlp_after_pool else nn.Identity()
        # The methods' own heads are MLPs on the pooled vector; a shared one has to serve maps too, so it is of the local kind.
        kind = model.local_head if model.shared_heads and local else OBJECTIVES[model.method].global_head
        self.projector: Head = HEADS[kind](c, hidden, out, model.output_norm, norm)
        self.predictors = _predictors(model, kind, True)
        self.local_projector: Head | None = None
        self.local_predictors: nn.ModuleList | None = None
        if local:
            g = HEADS[model.local_head]
            c_local = self.backbone.channels(self.stage)
            self.local_projector = self.projector if model.shared_heads else g(c_local, hidden, out, model.output_norm, norm)
            self.local_predictors = self.predictors if model.shared_heads else _predictors(model, model.local_head, small_locals)

    def pool(self, y: Float[Tensor, "b c n n"]) -> Float[Tensor, "b c"]:
        """The global vector Y of the last feature map. As a mean of vectors: `y.mean((2, 3))` would make its gradient in another layout."""
        return self.after_pool(y.flatten(2).transpose(1, 2).mean(1))

    def forward(self, views: Sequence[Float[Tensor, "b 3 s s"]]) -> list[Seen]:
        """Each view as the network sees it: one after the other, or (`joint_views`) all of one size in one pass through the backbone."""
        return [self._seen(maps) for maps in self._maps(views)]

    def _seen(self, maps: list[Tensor]) -> Seen:
        pooled = self.pool(maps[-1])
        return Seen(pool_to(maps[self.stage - 1], self.grid), pooled, self.projector.vectors(pooled))

    def _maps(self, views: Sequence[Float[Tensor, "b 3 s s"]]) -> list[list[Tensor]]:
        if not self.joint_views:
            return [self.backbone.maps(x) for x in views]
        sizes = list(dict.fromkeys(x.shape[-1] for x in views))
        groups = [[x for x in views if x.shape[-1] == size] for size in sizes]
        joint = [[y.chunk(len(group)) for y in self.backbone.maps(torch.cat(group))] for group in groups]
        return [[y[i] for y in maps] for group, maps in zip(groups, joint, strict=True) for i in range(len(group))]


def _predictors(model: ModelConfig, kind: str, small_views: bool) -> nn.ModuleList:
    """One for all views, or a second one for small views if there are any; for DINO its prototypes."""
    if not OBJECTIVES[model.method].has_predictor:
        return nn.ModuleList([Prototypes(model.out_dim, model.prototypes)])
    q, hidden, out = HEADS[predictor_kind(kind)], model.predictor_hidden_dim or model.hidden_dim, model.out_dim
    return nn.ModuleList(
        q(out, hidden, out, False, model.head_norm) for _ in range(2 if small_views and model.predictors == "per_size" else 1)
    )


def _outputs(predictors: nn.ModuleList | None, x: Float[Tensor, "*b d"], view: int = 0) -> Tensor:
    """What follows the projector, for this view; nothing does in the target network of BYOL and MoCo v3."""
    if not predictors:
        return x
    head = predictors[-1 if view not in TARGET_VIEWS else 0]
    return head.vectors(x)  # type: ignore[operator]


class CoSsl(nn.Module):
    """CO-SSL (arXiv 2501.02860) on BYOL, DINO or MoCo v3: views and their positions in, named loss terms out.

    Both networks stay in train mode while training: the target's batch norms use the batch's statistics, as in BYOL's public code.
    The target has no gradient and moves only by `update_target_`. `ranks` are the processes that share each batch.
    Trap: q2 works on the positions that g2 returns, so its batch norm sees the sampled positions for every kind of head.
    """

    def __init__(self, model: ModelConfig, loss: LossConfig, ranks: Ranks = ALONE) -> None:
        super().__init__()
        if loss.local_target == "local_head" and model.local_stage < 4:
            raise ValueError(f"local_target='local_head' needs local_stage 4, not {model.local_stage}: g2 takes no global vector there")
        if loss.local_weight > 0 and loss.local_to_global == 0 and model.local_stage < 4:
            raise ValueError(f"local_to_global=0 needs local_stage 4, not {model.local_stage}: nothing would train g2 there")
        self.loss, self.ranks, objective = loss, ranks, OBJECTIVES[model.method]
        self.online = Network(model, loss.local_weight > 0, loss.small_locals)
        self.target = copy.deepcopy(self.online)
        if objective.has_predictor:
            self.target.predictors = self.target.local_predictors = nn.ModuleList()
        self.target.requires_grad_(False)
        self.objective = objective(loss, model.out_dim if objective.has_predictor else model.prototypes, ranks)

    def forward(self, views: Sequence[Float[Tensor, "b 3 s s"]], positions: Int[Tensor, "b v k"]) -> dict[str, Tensor]:
        """Scalars loss, global, the local directions in use, std; covariance [d d]; features Y [2 b c] of the global views, the first two.

        Each term is the mean over its pairs of views (v, w), v any view and w another one of the global two, and over the batch, times the
        objective's `num_terms`: with two views and BYOL or MoCo v3 the SUM over both. Averaging instead would halve the step.
        std is 1 for global projections spread evenly over all directions and 0 for collapsed ones; `effective_rank` of the covariance, of
        the same unit vectors, is how many directions they use. Neither has a gradient.
        """
        online = self.online(views)
        with torch.no_grad():
            target = self.target([views[w] for w in TARGET_VIEWS])
            every = [torch.ones(len(seen.projected), 1, dtype=torch.bool, device=positions.device) for seen in target]
            goals = self.objective.goals([_outputs(self.target.predictors, seen.projected)[:, None] for seen in target], every, "global")
        p = [_outputs(self.online.predictors, seen.projected, v)[:, None] for v, seen in enumerate(online)]
        pairs = [(v, w) for v in range(len(views)) for w in TARGET_VIEWS if v != w]
        terms = {"global": self._term([self.objective(p[v], goals[w], every[w]).mean() for v, w in pairs])}
        local: Tensor | float = 0.0
        if self.loss.local_weight > 0:
            terms |= self._local(online, target, goals, every, positions)
            local = losses.local_term(terms.get("local_to_global", 0.0), terms.get("global_to_local", 0.0), self.loss.local_to_global)
        loss = losses.total(terms["global"], local, self.loss.local_weight, self.loss.combine)
        projected = [online[v].projected for v in TARGET_VIEWS]
        shape = {"std": self._mean([spread(z) for z in projected]), "covariance": torch.stack([covariance(z) for z in projected]).mean(0)}
        features = torch.stack([online[v].pooled for v in TARGET_VIEWS]).detach()
        return {"loss": loss, **terms, **shape, "features": features}

    def _local(
        self, online: list[Seen], target: list[Seen], goals: list[Tensor], every: list[Tensor], positions: Int[Tensor, "b v k"]
    ) -> dict[str, Tensor]:
        """The local directions whose share is not 0. Positions of -1 are left out of the means; `goals` are those of the global head."""
        g2, q2, g2_target, q2_target = *_local_heads(self.online), *_local_heads(self.target)
        share, terms, same = self.loss.local_to_global, {}, self.loss.local_views == "same"
        views = range(len(online)) if self.loss.small_locals else TARGET_VIEWS
        pairs = [(v, w) for v in views for w in TARGET_VIEWS if (v == w) == same]
        at = {v: positions[:, v, : online[v].y.shape[-1] ** 2] for v in views}  # a small map has fewer positions than the batch has slots
        valid = {v: at[v] >= 0 for v in views}
        if share > 0:
            with torch.no_grad():
                if self.loss.local_target == "local_head":
                    pooled = [_outputs(q2_target, g2_target.vectors(seen.pooled))[:, None] for seen in target]
                    goals = self.objective.goals(pooled, every, "local_pooled")
            p = {v: _outputs(q2, g2(online[v].y, at[v]), v) for v in views}
            terms["local_to_global"] = self._term([self._masked_mean(self.objective(p[v], goals[w], every[w]), valid[v]) for v, w in pairs])
        if share < 1:
            with torch.no_grad():
                outputs = [_outputs(q2_target, g2_target(target[w].y, at[w])) for w in TARGET_VIEWS]
                goals = self.objective.goals(outputs, [valid[w] for w in TARGET_VIEWS], "local")
            last = self.online.stage == 4
            p = {v: _outputs(q2, g2.vectors(online[v].pooled) if last else online[v].projected, v)[:, None] for v in views}
            terms["global_to_local"] = self._term([self._masked_mean(self.objective(p[v], goals[w], valid[w]), valid[w]) for v, w in pairs])
        return terms

    def _term(self, pairs: Sequence[Tensor]) -> Tensor:
        return self.objective.num_terms * self._mean(pairs)

    @staticmethod
    def _mean(values: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(values)).mean()

    def _masked_mean(self, distance: Float[Tensor, "b k"], valid: Bool[Tensor, "b k"]) -> Tensor:
        """Over the pictures of all processes that have a valid position, whichever process they are on."""
        samples = self.ranks.gather(valid.any(1).sum()[None].to(distance.dtype)).mean()
        return losses.masked_mean(distance, valid, samples)

    def position_grid(self, view_px: int) -> PositionGrid:
        """Where the positions of a view of this size lie: those of the map that local vectors are taken from."""
        return position_grid(self.online.backbone, view_px, self.online.stage, self.online.grid)

    def represent(self, x: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b c"]:
        """The online network's global vector Y, what probes read. Call eval() first, or the batch norms follow the pictures."""
        return self.online.pool(self.online.backbone(x))

    @torch.no_grad()
    def update_target_(self, tau: float) -> None:
        """target <- tau * target + (1 - tau) * online, for parameters.

        Buffers are left alone: each network keeps the running statistics of its own batch norms, as in BYOL's public code (DINO's and MoCo
        v3's do the same), and DINO's centres belong to neither network.
        """
        online = dict(self.online.named_parameters())
        targets, sources = zip(*((parameter, online[name]) for name, parameter in self.target.named_parameters()), strict=True)
        torch._foreach_lerp_(list(targets), list(sources), 1 - tau)


def _local_heads(network: Network) -> tuple[Head, nn.ModuleList]:
    assert network.local_projector is not None
    assert network.local_predictors is not None
    return network.local_projector, network.local_predictors


@torch.no_grad()
def spread(z: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Mean over dimensions of the standard deviation of unit vectors, times sqrt(d): 1 = spread evenly, 0 = collapsed.

    The measure of SimSiam (Chen and He 2021, arXiv 2011.10566, section 4.1). Over the local batch only.
    """
    return F.normalize(z.float(), dim=-1).std(0, correction=0).mean() * z.shape[-1] ** 0.5


@torch.no_grad()
def covariance(z: Float[Tensor, "b d"]) -> Float[Tensor, "d d"]:
    """Of the unit vectors, over the local batch."""
    x = F.normalize(z.float(), dim=-1)
    x = x - x.mean(0)
    with losses.full_precision(z):  # in bf16 the small eigenvalues would be rounding
        return x.T @ x / len(x)


def effective_rank(covariance: Float[Tensor, "d d"]) -> float:
    """How many directions vectors of this covariance use, 1 to d: exp(- sum of p log p), p = each one's share of all standard deviations.

    Roy and Vetterli 2007; RankMe (Garrido et al. 2023, arXiv 2210.02885) without its mean. nan where nothing varies.
    Trap: it decomposes a matrix, so the host waits for the device.
    """
    deviations = torch.linalg.eigvalsh(covariance.double().cpu()).clamp(min=0).sqrt()
    return torch.exp(torch.special.entr(deviations / deviations.sum()).sum()).item()
