"""What positions of a feature map say, alone and together: likeness to the global vector, redundancy, receptive fields in use.

Symbols: y = feature map [b c n n], Y = pooled global vector after the optional MLP, g q = global projector and predictor, g2 q2 = the local
ones, p = n * n positions of a picture. Networks are in eval mode, so that no picture's vectors depend on others in its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from cossl.models.co_ssl import LossConfig, ModelConfig, Network, effective_rank
from cossl.models.objectives import OBJECTIVES
from cossl.models.rf_resnet import PositionGrid, pool_to, position_grid


class Vectors(NamedTuple):
    """Local and global vectors that lie in one space, so that their cosines mean something."""

    local: Float[Tensor, "b p c"]
    pooled: Float[Tensor, "b c"]


def spaces(model: ModelConfig, loss: LossConfig) -> dict[str, str]:
    """{space: what is compared there} of a run of this config, in the order in which a vector passes through them.

    DINO's two heads end in prototypes of their own, whose outputs lie in no common space: compared is what goes into the local ones, which
    a global vector reaches where it has as many channels as the local map (local_stage 4).
    """
    found = {"map": "y at a position with the mean of y, before any MLP"}
    if model.mlp_after_pool:
        found["mlp"] = "the MLP's output for y at a position with Y, its output for the mean of y"
    if loss.local_weight > 0 and OBJECTIVES[model.method].has_predictor:
        if loss.local_to_global > 0:
            found["heads"] = f"q2(g2(y)) at a position with {'g2' if loss.local_target == 'local_head' else 'g'}(Y), as the loss does"
        else:
            found["heads"] = "g2(y) at a position with q2(g2(Y)), as the loss does"
    elif loss.local_weight > 0 and model.local_stage == 4:
        found["heads"] = "g2(y) at a position with g2(Y), both before the prototypes"
    return found


def space_grids(network: Network, model: ModelConfig, loss: LossConfig, view_px: int) -> dict[str, PositionGrid]:
    """Where the positions of each space lie. Heads read the map that the run takes its local vectors from, all else the last one."""
    last = position_grid(network.backbone, view_px)
    found = dict.fromkeys(spaces(model, loss), last)
    if "heads" in found:
        grid = position_grid(network.backbone, view_px, network.stage, network.grid)
        wider = 2 * grid.stride_px if model.local_head == "conv3x3" else 0
        found["heads"] = grid._replace(receptive_field_px=grid.receptive_field_px + wider)
    return found


def local_vectors(network: Network, model: ModelConfig, loss: LossConfig, x: Float[Tensor, "b 3 s s"]) -> dict[str, Vectors]:
    """Local and global vectors of normalized pictures in each of `spaces`.

    Of the online network and one picture each: the loss compares with the target network's vectors of another view.
    Trap: the MLP's batch norms have learned the statistics of means, and positions vary more.
    """
    maps = network.backbone.maps(x)
    y = positions_first(maps[-1])
    pooled = network.pool(maps[-1])
    found = {"map": Vectors(y, y.mean(1)), "mlp": Vectors(network.after_pool(y.flatten(0, 1)).unflatten(0, y.shape[:2]), pooled)}
    wanted = spaces(model, loss)
    if "heads" in wanted:
        found["heads"] = _through_heads(network, model, loss, pool_to(maps[network.stage - 1], network.grid), pooled)
    return {name: found[name] for name in wanted}


def _through_heads(network: Network, model: ModelConfig, loss: LossConfig, y: Tensor, pooled: Tensor) -> Vectors:
    g2, q2 = network.local_projector, network.local_predictors
    assert g2 is not None
    assert q2 is not None
    every = torch.arange(y.shape[-1] ** 2, device=y.device).expand(len(y), -1)
    local = g2(y, every)
    if not OBJECTIVES[model.method].has_predictor:
        return Vectors(local, g2.vectors(pooled))
    predict: Callable[[Tensor], Tensor] = q2[0].vectors  # type: ignore[assignment]
    if loss.local_to_global > 0:
        return Vectors(predict(local), (g2 if loss.local_target == "local_head" else network.projector).vectors(pooled))
    return Vectors(local, predict(g2.vectors(pooled)))


def positions_first(y: Float[Tensor, "b c n n"]) -> Float[Tensor, "b p c"]:
    """The vectors of a map, position row * n + column."""
    return y.flatten(2).transpose(1, 2)


def _unit(x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
    """In float64, since ranks take square roots of what rounding leaves; vectors of length 0 stay as they are."""
    return F.normalize(x.double(), dim=-1)


class Likeness:
    """Cosines of local vectors with the global vector of their own picture, and with those of all others, added up over batches."""

    def __init__(self) -> None:
        self.own: list[Float[Tensor, "b p"]] = []
        self._local: Tensor | float = 0.0
        self._pooled: Tensor | float = 0.0

    @torch.no_grad()
    def add(self, vectors: Vectors) -> None:
        """A batch."""
        local, pooled = _unit(vectors.local), _unit(vectors.pooled)
        self.own.append((local * pooled[:, None]).sum(-1).cpu())
        self._local = self._local + local.sum((0, 1)).cpu()
        self._pooled = self._pooled + pooled.sum(0).cpu()

    def result(self) -> dict[str, float]:
        """Means over pictures: cosine (own picture), its deviation over a picture's positions, cosine_other (nan for one picture)."""
        own = torch.cat(self.own)
        others = own.numel() * (len(own) - 1)
        all_pairs = (torch.as_tensor(self._local) * torch.as_tensor(self._pooled)).sum()
        other = float(all_pairs - own.sum()) / others if others else float("nan")
        return {"cosine": float(own.mean()), "deviation": float(own.std(1, correction=0).mean()), "cosine_other": other}


def pairwise_cosine(vectors: Float[Tensor, "g p c"]) -> Float[Tensor, " g"]:
    """Mean cosine over the pairs of different vectors of each group, from -1 / (p - 1) to 1; nan where p is 1.

    From the length of the sum: it takes p * c multiplications and no p * p cosines.
    """
    u, p = _unit(vectors), vectors.shape[1]
    return (u.sum(1).square().sum(-1) - u.square().sum((1, 2))) / (p * (p - 1)) if p > 1 else u.new_full((len(u),), float("nan"))


def effective_ranks(vectors: Float[Tensor, "g p c"]) -> Float[Tensor, " g"]:
    """How many directions the unit vectors of each group use, 1 (all alike) to min(p, c): exp(entropy of the shares of singular values).

    Roy and Vetterli 2007, as `effective_rank`, here without taking the mean off: p equal vectors have rank 1. nan where all are zero.
    """
    u = _unit(vectors)
    gram = u @ u.mT if u.shape[1] <= u.shape[2] else u.mT @ u
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    return torch.special.entr(singular / singular.sum(-1, keepdim=True)).sum(-1).exp()


GROUPS = 16
"""Groups of positions of different pictures, for the baseline of the rank."""


class Redundancy:
    """How alike the positions of a picture are, beside positions of different pictures, added up over batches.

    The baseline of the rank is that of `GROUPS` groups of as many vectors as a picture has positions, each of another picture (of fewer
    pictures than positions: as evenly as they come), at places drawn by the seed picture by picture, so that batches do not matter.
    """

    def __init__(self, pictures: int, seed: int) -> None:
        """`pictures`: how many will be added."""
        self.pictures, self._generator = pictures, torch.Generator().manual_seed(seed)
        self._cosines: list[Tensor] = []
        self._ranks: list[Tensor] = []
        self._drawn: list[Tensor] = []
        self._sum: Tensor | float = 0.0
        self._moment: Tensor | float = 0.0
        self._squares, self._positions = 0.0, 0

    @torch.no_grad()
    def add(self, local: Float[Tensor, "b p c"]) -> None:
        """A batch."""
        u, p = _unit(local), local.shape[1]
        self._positions = p
        self._cosines.append(pairwise_cosine(u).cpu())
        self._ranks.append(effective_ranks(u).cpu())
        self._sum = self._sum + u.sum((0, 1)).cpu()
        self._squares += float(u.square().sum())
        flat = u.flatten(0, 1)
        self._moment = self._moment + (flat.mT @ flat).cpu()
        each = min(p, -(-p // self.pictures))
        places = torch.stack([torch.rand(GROUPS, p, generator=self._generator).argsort(1)[:, :each] for _ in u]).flatten(1)
        drawn = u.gather(1, places.to(u.device)[:, :, None].expand(-1, -1, u.shape[2]))
        self._drawn.append(drawn.float().cpu().unflatten(1, (GROUPS, each)))

    def result(self) -> dict[str, float]:
        """cosine_within, cosine_across; rank_within, rank_mixed (1 to `positions`), rank_all (1 to `width`); spreads over pictures."""
        cosines, ranks, drawn = torch.cat(self._cosines), torch.cat(self._ranks), torch.cat(self._drawn)
        total, moment = torch.as_tensor(self._sum), torch.as_tensor(self._moment)
        m, p = len(cosines), self._positions
        within = float(cosines.nan_to_num().sum()) * p * (p - 1)
        pairs = p * p * m * (m - 1)
        across = (float(total.square().sum()) - within - self._squares) / pairs if pairs else float("nan")
        groups = drawn.permute(1, 2, 0, 3).flatten(1, 2)[:, :p]
        return {
            "positions": p,
            "width": len(total),
            "cosine_within": float(cosines.mean()),
            "cosine_within_spread": float(cosines.std(correction=0)),
            "cosine_across": across,
            "rank_within": float(ranks.nanmean()),
            "rank_within_spread": float((ranks - ranks.nanmean()).square().nanmean().sqrt()),
            "rank_mixed": float(effective_ranks(groups).mean()),
            "rank_all": effective_rank(moment),
        }


def position_counts(positions: int) -> list[int]:
    """1, 2, 4, ... and all of them."""
    return [2**i for i in range((positions - 1).bit_length())] + [positions]


def random_orders(pictures: int, positions: int, seed: int, draw: int) -> Int[Tensor, "b p"]:
    """An order of the positions for each picture, the same whatever batches they come in. `draw` counts from 0."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + draw)
    return torch.rand(pictures, positions, generator=generator).argsort(1)


def first_means(local: Float[Tensor, "b p c"], order: Int[Tensor, "b p"], counts: Sequence[int]) -> Float[Tensor, "k b c"]:
    """The means of the first so many positions of each picture in its order; of all of them it is the mean of the map, to rounding."""
    sums = local.gather(1, order[:, :, None].expand_as(local)).cumsum(1)
    return torch.stack([sums[:, count - 1] / count for count in counts])


class Box(NamedTuple):
    """Whole pixels of a view, `last` excluded; the same ones across and down."""

    first: int
    last: int


class Field(NamedTuple):
    """How much of a gradient's energy lies where."""

    inside: float
    """Share in the theoretical receptive field, 0 to 1."""
    side95_px: float
    """Of the square around the position's centre that holds 95 %."""
    root_area_px: float
    """Square root of the number of pixels whose root mean square gradient exceeds 4.55 % of the largest: Luo et al.'s size."""


def central_position(grid: PositionGrid) -> int:
    """Row, and column, of the position whose field the border cuts least."""
    return grid.size // 2


def field_box(grid: PositionGrid, position: int) -> Box:
    """The pixels that this row (column) may see, as far as they lie in the view."""
    centre, half = grid.offset_px + position * grid.stride_px, grid.receptive_field_px / 2
    return Box(max(0, math.floor(centre - half)), min(grid.view_px, math.ceil(centre + half)))


def random_signs(pictures: int, projections: int, channels: int, seed: int) -> Float[Tensor, "b m c"]:
    """+1 or -1 for every channel: the projections of the outputs, picture by picture."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (pictures, projections, channels), generator=generator).float() * 2 - 1


def gradient_energy(
    maps: Callable[[Tensor], Tensor], x: Float[Tensor, "b 3 s s"], position: tuple[int, int], signs: Float[Tensor, "b m c"]
) -> Float[Tensor, "b s s"]:
    """Squared gradient of a position's output with respect to every pixel, summed over colours, a mean over random projections.

    Luo et al. 2016 (arXiv 1701.04128) for many channels: the expectation over +1 and -1 is the sum over channels of their squared gradients
    (Hutchinson), without one backward pass for each. `maps` takes pictures to a feature map.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        output = maps(x)[:, :, position[0], position[1]]
        energy, count = x.new_zeros(len(x), *x.shape[2:], dtype=torch.float64), signs.shape[1]
        for i in range(count):
            (gradient,) = torch.autograd.grad((output * signs[:, i].to(output)).sum(), x, retain_graph=i < count - 1)
            energy += gradient.double().square().sum(1) / count
    return energy


def mean_energy(energies: Float[Tensor, "b s s"]) -> Float[Tensor, "s s"]:
    """The mean over pictures of each one's shares, which sum to 1. Pictures without any gradient are left out; nan if all are."""
    totals = energies.sum((1, 2))
    shares = energies[totals > 0] / totals[totals > 0, None, None]
    return shares.mean(0)


def cumulative_energy(energy: Float[Tensor, "s s"], centre_px: tuple[float, float]) -> tuple[list[float], list[float]]:
    """(sides in px, shares of the energy) of the squares around a point, from the smallest that holds a whole pixel to the whole view."""
    s = energy.shape[0]
    at = torch.arange(s, dtype=torch.float64) + 0.5
    row, column = ((at - centre).abs() + 0.5 for centre in centre_px)
    reach, which = torch.maximum(row[:, None], column[None]).flatten().unique(return_inverse=True)
    held = torch.zeros(len(reach), dtype=torch.float64).index_add(0, which, energy.double().cpu().flatten())
    return (2 * reach).tolist(), (held.cumsum(0) / held.sum()).tolist()


def field_of(energy: Float[Tensor, "s s"], grid: PositionGrid, position: int) -> Field:
    """The sizes of the receptive field in use of the position (position, position)."""
    box, centre = field_box(grid, position), grid.offset_px + position * grid.stride_px
    inside = energy[box.first : box.last, box.first : box.last].sum() / energy.sum()
    sides, shares = cumulative_energy(energy, (centre, centre))
    side95 = next(side for side, share in zip(sides, shares, strict=True) if share >= 0.95 - 1e-12)
    gradient = energy.sqrt()
    return Field(float(inside), side95, float((gradient > 0.0455 * gradient.max()).sum()) ** 0.5)
