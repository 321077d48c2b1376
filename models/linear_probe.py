"""Linear classifiers on frozen vectors: many learning rates and weight decays side by side, in one pass over the data.

Legend: p places of a picture (1 for its global vector, n * n for the positions of its map), h heads at each, m classes, c features,
b pictures. Every head is trained by itself, as if there were no others; they only share the reading of the data and two matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from cossl.models.parallel import ALONE, Ranks

MOMENTUM = 0.9

Batch = tuple[dict[str, Float[Tensor, "p b c"]], Int[Tensor, " b"]]
"""The vectors of b pictures by the name of the feature, and their labels."""


class Grid(NamedTuple):
    """What is tried for one feature: h pairs of learning rate and weight decay at each of p places."""

    lr: Float[Tensor, "p h"]
    weight_decay: Float[Tensor, "p h"]
    classes: int
    features: int

    def part(self, heads: slice) -> Grid:
        """Some of the pairs."""
        return self._replace(lr=self.lr[:, heads], weight_decay=self.weight_decay[:, heads])

    def best(self, best: Int[Tensor, " p"]) -> Grid:
        """The best pair of each place alone."""
        lr, decay = (value.gather(1, _wide(best, value)) for value in (self.lr, self.weight_decay))
        return self._replace(lr=lr, weight_decay=decay)


class Heads(nn.Module):
    """h softmax classifiers at each of p places, each with its own learning rate and weight decay, starting at zero: those of a `Grid`.

    Each takes the steps of `torch.optim.SGD(nn.Linear(c, m).parameters(), lr, MOMENTUM, weight_decay=...)` on its own cross-entropy, biases
    decaying too. The gradient is written down instead of differentiated, and added to the momentum by the product that makes it, so there
    is never more than weights, momenta and one batch of logits. A head that diverges becomes NaN and leaves the others alone.
    """

    weight: Float[Tensor, "p h m c"]
    bias: Float[Tensor, "p h m"]
    weight_momentum: Float[Tensor, "p h m c"]
    bias_momentum: Float[Tensor, "p h m"]
    lr: Float[Tensor, "p h"]
    weight_decay: Float[Tensor, "p h"]

    def __init__(self, lr: Float[Tensor, "p h"], weight_decay: Float[Tensor, "p h"], classes: int, features: int) -> None:
        super().__init__()
        for name, shape in {"weight": (classes, features), "bias": (classes,)}.items():
            self.register_buffer(name, lr.new_zeros(*lr.shape, *shape))
            self.register_buffer(f"{name}_momentum", lr.new_zeros(*lr.shape, *shape))
        self.register_buffer("lr", lr)
        self.register_buffer("weight_decay", weight_decay)
        self._decays = bool((weight_decay != 0).any())

    def logits(self, x: Float[Tensor, "p b c"]) -> Float[Tensor, "p b h m"]:
        """Of every head."""
        p, h, m, c = self.weight.shape
        flat = torch.baddbmm(self.bias.view(p, 1, h * m), x, self.weight.view(p, h * m, c).transpose(1, 2))
        return flat.view(p, x.shape[1], h, m)

    @torch.no_grad()
    def step_(self, x: Float[Tensor, "p b c"], y: Int[Tensor, " b"], rate: float) -> None:
        """One step of every head at `rate` times its learning rate. Does not wait for the device."""
        p, h, m, c = self.weight.shape
        logits, share = self.logits(x), 1 / len(y)
        error = logits.sub_(logits.amax(3, keepdim=True)).exp_()
        error.div_(error.sum(3, keepdim=True))
        error.scatter_add_(3, y.view(1, -1, 1, 1).expand(p, -1, h, 1), error.new_full((1, 1, 1, 1), -1.0).expand(p, len(y), h, 1))
        flat = error.view(p, len(y), h * m)
        self.weight_momentum.view(p, h * m, c).baddbmm_(flat.transpose(1, 2), x, beta=MOMENTUM, alpha=share)
        self.bias_momentum.mul_(MOMENTUM).add_(error.sum(1), alpha=share)
        for value, momentum in ((self.weight, self.weight_momentum), (self.bias, self.bias_momentum)):
            wide = (p, h, *[1] * (value.ndim - 2))
            if self._decays:
                momentum.addcmul_(value, self.weight_decay.view(wide))
            value.addcmul_(momentum, self.lr.view(wide), value=-rate)


def _wide(best: Int[Tensor, " p"], like: Tensor) -> Tensor:
    return best.view(-1, *[1] * (like.ndim - 1)).expand(-1, 1, *like.shape[2:])


def grid_of(lrs: Sequence[float], weight_decays: Sequence[float]) -> Float[Tensor, "2 h"]:
    """Learning rates and weight decays of the heads: every pair."""
    return torch.tensor([(lr, decay) for lr in lrs for decay in weight_decays], dtype=torch.float64).T.contiguous()


# ------------------------------------------------------------------------------------------------- training and scores


class Keeper(Protocol):
    """Where heads under training are kept, so that a killed search goes on."""

    def get(self, stage: str) -> tuple[int, dict[str, Any]] | None:
        """(epochs done, state of each feature's heads) of a stage that was begun."""

    def put(self, stage: str, epochs: int, state: Callable[[], dict[str, Any]], last: bool) -> None:
        """After each epoch; the state is asked for where it is kept, which may be more seldom, but at the last."""


class Feed(NamedTuple):
    """The data of a search. `held_out` is a part of train that `epoch` never gives; `val` serves for nothing but the last number."""

    steps: int
    """Batches of an epoch."""
    epoch: Callable[[int], Iterator[Batch]]
    held_out: Callable[[], Iterator[Batch]]
    val: Callable[[], Iterator[Batch]]


def fit(heads: Mapping[str, Heads], feed: Feed, epochs: int, stage: str, keeper: Keeper | None = None) -> None:
    """Trains the heads of all features in the same passes; the learning rate goes to 0 along a cosine, step by step, without warm-up."""
    begun = keeper.get(stage) if keeper is not None else None
    first, total = 0, epochs * feed.steps
    if begun is not None:
        first = begun[0]
        for name, state in begun[1].items():
            heads[name].load_state_dict(state)
    for epoch in range(first, epochs):
        for step, (x, y) in enumerate(feed.epoch(epoch), epoch * feed.steps):
            rate = (1 + math.cos(math.pi * step / total)) / 2
            for name, some in heads.items():
                some.step_(x[name], y, rate)
        if keeper is not None:
            keeper.put(stage, epoch + 1, lambda: {name: some.state_dict() for name, some in heads.items()}, epoch + 1 == epochs)


class Score(NamedTuple):
    """Of every head: percent right at once and among five, mean cross-entropy in nats, counts [true, said] where it is one head."""

    top1: Float[Tensor, "p h"]
    top5: Float[Tensor, "p h"]
    cross_entropy: Float[Tensor, "p h"]
    confusion: Int[Tensor, "m m"] | None


@torch.no_grad()
def score(heads: Mapping[str, Heads], batches: Iterator[Batch]) -> dict[str, Score]:
    """How good all heads are on these pictures, on the CPU."""
    sums: dict[str, list[Tensor]] = {}
    confusions: dict[str, Tensor] = {}
    count = 0
    for x, y in batches:
        count += len(y)
        for name, some in heads.items():
            logits = some.logits(x[name])
            p, b, h, m = logits.shape
            said, truth = logits.topk(min(5, m), dim=3).indices, y.view(1, -1, 1).expand(p, -1, h)
            right = said == truth[..., None]
            loss = F.cross_entropy(logits.reshape(-1, m), truth.reshape(-1), reduction="none").view(p, b, h)
            parts = [right[..., 0].sum(1).double(), right.any(3).sum(1).double(), loss.sum(1).double()]
            sums[name] = [a + b for a, b in zip(sums[name], parts, strict=True)] if name in sums else parts
            if p == h == 1:
                pairs = torch.bincount(y * m + said[0, :, 0, 0], minlength=m * m).view(m, m)
                confusions[name] = confusions.get(name, 0) + pairs
    if not count:
        raise ValueError("no pictures to score")
    means = {name: [(value / count).cpu() for value in values] for name, values in sums.items()}
    return {n: Score(100 * a, 100 * b, loss, confusions[n].cpu() if n in confusions else None) for n, (a, b, loss) in means.items()}


def choose(held: Score, by: str = "top1") -> Int[Tensor, " p"]:
    """The best head of each place: by top-1, of equal ones the lowest cross-entropy; or by the latter alone.

    A head that diverged is never chosen. ValueError if all did.
    """
    fine = held.cross_entropy.isfinite()
    if not fine.any(1).all():
        raise ValueError("all heads diverged: give lower --base-lrs")
    loss = held.cross_entropy.where(fine, torch.inf)
    top = held.top1.where(fine, -1.0) if by == "top1" else torch.zeros_like(loss)
    return loss.where(top == top.amax(1, keepdim=True), torch.inf).argmin(1)


class Found(NamedTuple):
    """What a search found for one feature: the chosen heads (p of one each), how good they were held out and how good they are on val."""

    heads: Heads
    held: Score
    """Of all heads of the grid."""
    best: Int[Tensor, " p"]
    val: Score


class _OfAllRanks:
    """A keeper of whole grids for ranks that train a part of them each."""

    def __init__(self, keeper: Keeper, ranks: Ranks, grids: Mapping[str, Grid]) -> None:
        self.keeper, self.ranks, self.heads = keeper, ranks, {name: grid.lr.shape[1] for name, grid in grids.items()}

    def get(self, stage: str) -> tuple[int, dict[str, Any]] | None:
        found = self.keeper.get(stage)
        if found is None:
            return None
        mine = {name: share_of(self.ranks, h) for name, h in self.heads.items()}
        return found[0], {name: {key: value[:, mine[name]] for key, value in state.items()} for name, state in found[1].items()}

    def put(self, stage: str, epochs: int, state: Callable[[], dict[str, Any]], last: bool) -> None:
        def whole() -> dict[str, Any]:
            return {name: _whole(part, self.ranks, self.heads[name]) for name, part in state().items()}

        self.keeper.put(stage, epochs, whole, last)


def share_of(ranks: Ranks, heads: int) -> slice:
    """Which heads of a grid this rank trains: a run of them, none where there are more ranks than heads."""
    first, end = (rank * heads // ranks.world_size for rank in (ranks.rank, ranks.rank + 1))
    return slice(first, end)


def _whole(part: Mapping[str, Tensor], ranks: Ranks, heads: int) -> dict[str, Tensor]:
    """[p heads ...] of each [p share ...]. Every rank has to call it."""
    return {key: joined(value, ranks, heads) for key, value in part.items()}


def joined(part: Float[Tensor, "p share *n"], ranks: Ranks, heads: int) -> Float[Tensor, "p heads *n"]:
    """What all ranks have of their heads, in order. Every rank has to call it."""
    if ranks.world_size == 1:
        return part
    padded = part.new_zeros(1, part.shape[0], -(-heads // ranks.world_size), *part.shape[2:])
    padded[0, :, : part.shape[1]] = part
    shares = (share_of(replace(ranks, rank=rank), heads) for rank in range(ranks.world_size))
    return torch.cat([each[:, : share.stop - share.start] for each, share in zip(ranks.gather(padded), shares, strict=True)], 1)


def search(
    feed: Feed,
    whole: Feed | None,
    grids: Mapping[str, Grid],
    epochs: int,
    by: str = "top1",
    keeper: Keeper | None = None,
    stage: str = "",
    ranks: Ranks = ALONE,
) -> dict[str, Found]:
    """Trains all heads, chooses the best of each place by `feed.held_out`, and only then looks at val.

    whole: the same with nothing held out; on it the chosen ones are trained again from the start. None: they stay as they are.
    Of several ranks, to each of which the feeds give the same whole batches, every one trains a part of the heads; the chosen ones are
    trained by all of them alike. Every rank has to call it and has the result.
    """
    mine = {name: Heads(*grid.part(share_of(ranks, grid.lr.shape[1]))) for name, grid in grids.items()}
    fit(mine, feed, epochs, f"{stage}grid", None if keeper is None else _OfAllRanks(keeper, ranks, grids))
    held = {name: _of_all_ranks(each, ranks, grids[name].lr.shape[1]) for name, each in score(mine, feed.held_out()).items()}
    best = {name: choose(each, by) for name, each in held.items()}
    at = {name: best[name].to(grid.lr.device) for name, grid in grids.items()}
    chosen = {name: Heads(*grid.best(at[name])) for name, grid in grids.items()}
    if whole is not None:
        fit(chosen, whole, epochs, f"{stage}again", keeper)
    for name, heads in chosen.items() if whole is None else ():
        state = _whole(mine[name].state_dict(), ranks, grids[name].lr.shape[1])
        heads.load_state_dict({key: value.gather(1, _wide(at[name], value)) for key, value in state.items()})
    val = score(chosen, feed.val())
    return {name: Found(chosen[name], held[name], best[name], val[name]) for name in grids}


def _of_all_ranks(score: Score, ranks: Ranks, heads: int) -> Score:
    """That of all heads; counts stay as they are."""
    top1, top5, loss = (joined(value, ranks, heads) for value in score[:3])
    return Score(top1, top5, loss, score.confusion)


# ------------------------------------------------------------------------------------------------- which pictures, and their scale


def held_out(labels: Int[Tensor, " n"], frac: float, seed: int) -> Bool[Tensor, " n"]:
    """A random part of every class, at least one of it and never all: of a class of one picture nothing."""
    counts = torch.bincount(labels)
    return _some_of_each(labels, _share(counts, frac).minimum(counts - 1), seed)


def few_shot(labels: Int[Tensor, " n"], frac: float, seed: int) -> Bool[Tensor, " n"]:
    """A random part of every class, at least one picture of it."""
    return _some_of_each(labels, _share(torch.bincount(labels), frac), seed)


def _share(counts: Int[Tensor, " m"], frac: float) -> Int[Tensor, " m"]:
    if not 0 < frac < 1:
        raise ValueError(f"a fraction of {frac} of each class: expected more than 0 and less than 1")
    return (counts * frac + 0.5).long().clamp(min=1).minimum(counts)


def _some_of_each(labels: Int[Tensor, " n"], wanted: Int[Tensor, " m"], seed: int) -> Bool[Tensor, " n"]:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[torch.argsort(labels[order], stable=True)]
    counts = torch.bincount(labels)
    turn = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[by_class] = turn < wanted[labels[by_class]]
    return chosen


class Scale(NamedTuple):
    """Brings vectors to zero mean and a mean square length of 1, every feature with an equal share of it: (x - mean) * factor.

    So one grid of learning rates suits vectors of any network, size and unit. It changes no linear classifier, but how fast it is found.
    """

    mean: Float[Tensor, "p 1 c"]
    factor: Float[Tensor, "p 1 c"]

    @classmethod
    def of(cls, parts: Iterable[Float[Tensor, "p b c"]]) -> Scale:
        """That of these vectors, which come a part at a time; a feature that never changes becomes 0."""
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for x in parts:
            wide = x.double()
            count, total, squares = count + x.shape[1], total + wide.sum(1, keepdim=True), squares + wide.square().sum(1, keepdim=True)
        mean = total / count
        deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
        live = deviation > 1e-6 * mean.abs()
        factor = torch.where(live, deviation.clamp(min=1e-12).reciprocal() * mean.shape[2] ** -0.5, 0.0)
        return cls(mean.float(), factor.float())

    def __call__(self, x: Float[Tensor, "p b c"]) -> Float[Tensor, "p b c"]:
        return (x.float() - self.mean) * self.factor

    def to(self, device: torch.device) -> Scale:
        return Scale(self.mean.to(device), self.factor.to(device))

    def part(self, places: slice) -> Scale:
        """That of some of the places."""
        return Scale(self.mean[places], self.factor[places])

    def folded(self, heads: Heads) -> tuple[Float[Tensor, "p m c"], Float[Tensor, "p m"]]:
        """Weights and biases for vectors as they come from the network, of heads that are one at each place."""
        weight = heads.weight[:, 0] * self.factor
        return weight, heads.bias[:, 0] - (weight * self.mean).sum(2)
