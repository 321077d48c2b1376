"""Many linear classifiers at once: torch's own SGD head by head, sklearn, who is chosen by what, and what is held out."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from cossl.models.linear_probe import Batch, Feed, Grid, Heads, Scale, Score, choose, few_shot, fit, grid_of, held_out, score, search
from cossl.models.parallel import Ranks

T = TypeVar("T")
LRS, DECAYS = (0.03, 0.5, 3.0), (0.0, 1e-2)


def blobs(samples: int, seed: int = 0, classes: int = 4, spread: float = 1.0, features: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, features, generator=torch.Generator().manual_seed(99))
    y = torch.randint(0, classes, (samples,), generator=generator)
    return (centres[y] + spread * torch.randn(samples, features, generator=generator)).double(), y


def feed_of(x: Tensor, y: Tensor, batch: int, held: tuple[Tensor, Tensor] | None = None, val: tuple[Tensor, Tensor] | None = None) -> Feed:
    """Vectors [p n c] as feature "x"."""

    def epoch(number: int) -> Iterator[Batch]:
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(number))
        return (({"x": x[:, rows]}, y[rows]) for rows in order[: len(y) // batch * batch].split(batch))

    def whole(pair: tuple[Tensor, Tensor]) -> Callable[[], Iterator[Batch]]:
        return lambda: iter([({"x": pair[0]}, pair[1])])

    return Feed(len(y) // batch, epoch, whole(held or (x, y)), whole(val or (x, y)))


def tries(places: int, lrs: tuple[float, ...] = LRS, decays: tuple[float, ...] = DECAYS, classes: int = 4, features: int = 6) -> Grid:
    lr, decay = grid_of(lrs, decays)
    return Grid(lr.repeat(places, 1), decay.repeat(places, 1), classes, features)


def heads_of(*args: Any, **named: Any) -> Heads:
    return Heads(*tries(*args, **named))


@pytest.mark.parametrize("places", [1, 3])
def test_each_head_takes_the_steps_of_torchs_sgd_on_a_linear_layer(places: int) -> None:
    y = blobs(70)[1]
    x = torch.stack([blobs(70, seed)[0] for seed in range(places)])
    heads, epochs = heads_of(places), 6
    fit({"x": heads}, feed_of(x, y, 16), epochs, "")
    for p in range(places):
        for h in range(len(LRS) * len(DECAYS)):
            layer = nn.Linear(6, 4, dtype=torch.float64)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
            lr, decay = float(heads.lr[p, h]), float(heads.weight_decay[p, h])
            optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=0.9, weight_decay=decay)
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 4)
            for epoch in range(epochs):
                for some, label in feed_of(x, y, 16).epoch(epoch):
                    optimizer.zero_grad()
                    F.cross_entropy(layer(some["x"][p]), label).backward()
                    optimizer.step()
                    cosine.step()
            torch.testing.assert_close(heads.weight[p, h], layer.weight.detach(), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(heads.bias[p, h], layer.bias.detach(), rtol=1e-6, atol=1e-6)
    assert (heads.weight[0, 0] - heads.weight[0, 1]).abs().max() > 1e-3


def test_with_decay_a_head_finds_sklearns_regression() -> None:
    x, y = blobs(200)
    decay = 0.05
    heads = heads_of(1, (1.0,), (decay,))
    fit({"x": heads}, feed_of(x[None], y, 200), 400, "")
    augmented = torch.cat([x, torch.ones(200, 1)], 1).numpy()  # biases decay too, as one more weight
    oracle = LogisticRegression(C=1 / (decay * 200), fit_intercept=False, tol=1e-10, max_iter=5000).fit(augmented, y.numpy())
    ours = torch.softmax(heads.logits(x[None])[0, :, 0], 1)
    np.testing.assert_allclose(ours.numpy(), oracle.predict_proba(augmented), atol=1e-4)


def test_separable_classes_are_separated() -> None:
    (x, y), (val_x, val_y) = blobs(300, spread=0.05), blobs(300, seed=1, spread=0.05)
    found = search(feed_of(x[None], y, 50, val=(val_x[None], val_y)), None, {"x": tries(1)}, 20)["x"]
    assert found.val.top1.item() == 100
    assert found.val.confusion is not None
    assert torch.equal(found.val.confusion, torch.diag(torch.bincount(val_y, minlength=4)))


def test_scores_are_those_of_counting() -> None:
    x, y = blobs(500, classes=9, spread=2.0)
    heads = heads_of(1, (0.5,), (0.0,), classes=9)
    fit({"x": heads}, feed_of(x[None], y, 100), 3, "")
    halves = iter([({"x": x[None, :123]}, y[:123]), ({"x": x[None, 123:]}, y[123:])])
    found = score({"x": heads}, halves)["x"]
    logits = heads.logits(x[None])[0, :, 0]
    ranked = logits.argsort(1, descending=True)
    assert found.top1.item() == pytest.approx(100 * (ranked[:, 0] == y).double().mean().item())
    assert found.top5.item() == pytest.approx(100 * (ranked[:, :5] == y[:, None]).any(1).double().mean().item())
    assert found.cross_entropy.item() == pytest.approx(F.cross_entropy(logits, y).item())
    assert found.confusion is not None
    expected = torch.zeros(9, 9, dtype=torch.int64)
    for true, said in zip(y.tolist(), ranked[:, 0].tolist(), strict=True):
        expected[true, said] += 1
    assert torch.equal(found.confusion, expected)
    with pytest.raises(ValueError, match="no pictures to score"):
        score({"x": heads}, iter([]))


def test_best_is_chosen_by_what_is_held_out_and_never_by_val() -> None:
    """Labels of val as they are, permuted, and always wrong: other numbers, the same head."""
    (x, y), (held_x, held_y), (val_x, val_y) = blobs(60, spread=2.0), blobs(2000, 1, spread=2.0), blobs(300, 2, spread=2.0)
    found = []
    for labels in (val_y, val_y[torch.randperm(300, generator=torch.Generator().manual_seed(3))], (val_y + 1) % 4):
        feed = feed_of(x[None], y, 20, (held_x[None], held_y), (val_x[None], labels))
        found.append(search(feed, feed, {"x": tries(1, (1e-4, 0.1, 30.0), (0.0, 1.0))}, 30)["x"])
    assert len({each.best.item() for each in found}) == 1
    assert len({each.val.top1.item() for each in found}) == 3
    assert torch.equal(found[0].heads.weight, found[1].heads.weight)
    best = found[0].best.item()
    assert found[0].held.top1[0, best] == found[0].held.top1.max()
    other = feed_of(x[None], y, 20, (held_x[None], (held_y + 1) % 4), (val_x[None], val_y))
    assert search(other, None, {"x": tries(1, (1e-4, 0.1, 30.0), (0.0, 1.0))}, 30)["x"].best.item() != best


def test_chosen_head_is_trained_again_on_all_of_train_or_left_as_it_is() -> None:
    (x, y), (more_x, more_y) = blobs(60), blobs(90, 1)
    feed, whole = feed_of(x[None], y, 20), feed_of(more_x[None], more_y, 30)
    kept = search(feed, None, {"x": tries(1)}, 5)["x"]
    again = search(feed, whole, {"x": tries(1)}, 5)["x"]
    assert kept.best.item() == again.best.item()
    for found, expected in ((kept, feed), (again, whole)):
        alone = heads_of(1)
        fit({"x": alone}, expected, 5, "")
        torch.testing.assert_close(found.heads.weight[0, 0], alone.weight[0, found.best.item()], rtol=1e-9, atol=1e-12)


def test_each_place_has_a_choice_of_its_own() -> None:
    y = blobs(200)[1]
    x = torch.stack([blobs(200)[0], torch.randn(200, 6, generator=torch.Generator().manual_seed(5)).double() * 1e3])
    found = search(feed_of(x, y, 50), None, {"x": tries(2, (1e-6, 0.5), (0.0,))}, 20)["x"]
    assert found.val.top1.shape == (2, 1)
    assert found.val.top1[0, 0] > found.val.top1[1, 0] + 20
    best = torch.tensor([5, 1])
    grid = tries(2).best(best)
    pairs = [(lr, decay) for lr, decay in zip(grid.lr[:, 0].tolist(), grid.weight_decay[:, 0].tolist(), strict=True)]
    assert pairs == [(LRS[2], DECAYS[1]), (LRS[0], DECAYS[1])]


def scores(top1: list[float], loss: list[float]) -> Score:
    top = torch.tensor([top1], dtype=torch.float64)
    return Score(top, top, torch.tensor([loss], dtype=torch.float64), None)


@pytest.mark.parametrize(
    ("top1", "loss", "by", "best"),
    [
        ([10, 30, 20], [1, 3, 2], "top1", 1),
        ([10, 30, 20], [1, 3, 2], "cross_entropy", 0),
        ([30, 30, 30], [3, 2, 2.5], "top1", 1),
        ([10, 90, 20], [1, float("nan"), 2], "top1", 2),
        ([10, 90, 20], [1, float("inf"), 0.5], "cross_entropy", 2),
        ([0, 0, 0], [2, float("nan"), 1], "top1", 2),
    ],
)
def test_choice(top1: list[float], loss: list[float], by: str, best: int) -> None:
    assert choose(scores(top1, loss), by).tolist() == [best]


def test_a_head_that_diverges_harms_no_other_and_is_never_chosen() -> None:
    (x, y), one = blobs(200), torch.ones(1, 1, dtype=torch.float64)

    def grid(*pairs: tuple[float, float]) -> Grid:
        lr, decay = (torch.cat([value * one for value in values], 1) for values in zip(*pairs, strict=True))
        return Grid(lr, decay, 4, 6)

    fine, wild = (0.5, 0.0), (1e200, 10.0)
    alone, together = Heads(*grid(fine)), Heads(*grid(fine, wild))
    for some in (alone, together):
        fit({"x": some}, feed_of(x[None], y, 50), 5, "")
    assert not together.weight[0, 1].isfinite().any()
    torch.testing.assert_close(together.weight[0, 0], alone.weight[0, 0], rtol=1e-12, atol=1e-12)
    assert search(feed_of(x[None], y, 50), None, {"x": grid(wild, fine)}, 5)["x"].best.tolist() == [1]
    with pytest.raises(ValueError, match="all heads diverged: give lower --base-lrs"):
        search(feed_of(x[None], y, 50), None, {"x": grid(wild)}, 5)


class Memory:
    """A keeper that keeps every epoch, and dies after some."""

    def __init__(self, die_after: int) -> None:
        self.kept: dict[str, tuple[int, Any]] = {}
        self.left = die_after

    def get(self, stage: str) -> tuple[int, dict[str, Any]] | None:
        return self.kept.get(stage)

    def put(self, stage: str, epochs: int, state: Callable[[], dict[str, Any]], last: bool) -> None:
        self.kept[stage] = epochs, {name: {k: v.clone() for k, v in each.items()} for name, each in state().items()}
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("die_after", [1, 3, 4, 6])
def test_a_killed_search_goes_on_bitwise(die_after: int) -> None:
    x, y = blobs(100)
    feed = feed_of(x[None], y, 20)
    expected = search(feed, feed, {"x": tries(1)}, 4)["x"]
    keeper = Memory(die_after)
    with pytest.raises(KeyboardInterrupt):
        search(feed, feed, {"x": tries(1)}, 4, keeper=keeper)
    seen: list[int] = []
    watched = feed._replace(epoch=lambda number: [seen.append(number), feed.epoch(number)][1])
    found = search(watched, watched, {"x": tries(1)}, 4, keeper=keeper)["x"]
    assert torch.equal(found.heads.weight, expected.heads.weight)
    assert found.val.top1.item() == expected.val.top1.item()
    assert len(seen) == 8 - die_after


def at_once(world_size: int, work: Callable[[Ranks], T]) -> list[T]:
    """What `work` returns on each of several ranks, which are threads here."""
    slots, barrier = [torch.empty(0)] * world_size, threading.Barrier(world_size, timeout=60)

    def gather(rank: int, x: Tensor) -> Tensor:
        slots[rank] = x.clone()
        barrier.wait()
        everyone = torch.cat(slots)
        barrier.wait()
        return everyone

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(lambda rank: work(Ranks(rank, world_size, functools.partial(gather, rank))), range(world_size)))


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("world_size", [2, 4, 8])  # of 6 heads
def test_heads_shared_by_ranks_are_those_of_one(world_size: int, refit: bool) -> None:
    (x, y), (held_x, held_y) = blobs(100), blobs(50, 1, spread=2.0)
    x = torch.stack([x, x.flip(1) * 0.3])
    feed = feed_of(x, y, 20, (torch.stack([held_x, held_x.flip(1)]), held_y))
    tried = {"x": tries(2, (0.01, 0.1, 1.0), (0.0, 0.1))}
    expected = search(feed, feed if refit else None, tried, 3)["x"]
    for found in at_once(world_size, lambda ranks: search(feed, feed if refit else None, tried, 3, ranks=ranks)["x"]):
        torch.testing.assert_close(found.held, expected.held, rtol=1e-9, atol=1e-9)
        assert torch.equal(found.best, expected.best)
        torch.testing.assert_close(found.heads.state_dict(), expected.heads.state_dict(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.val, expected.val, rtol=1e-9, atol=1e-9)


def test_a_search_killed_on_some_ranks_goes_on_with_another_number_of_them() -> None:
    x, y = blobs(100)
    feed = feed_of(x[None], y, 20)
    expected = search(feed, feed, {"x": tries(1)}, 4)["x"]
    keepers = [Memory(3) for _ in range(3)]

    def killed(ranks: Ranks) -> None:
        with pytest.raises(KeyboardInterrupt):
            search(feed, feed, {"x": tries(1)}, 4, keeper=keepers[ranks.rank], ranks=ranks)

    at_once(3, killed)
    for ranks, keeper in zip((2, 1), keepers, strict=False):
        keeper.left = 100
        for found in at_once(ranks, lambda ranks, keeper=keeper: search(feed, feed, {"x": tries(1)}, 4, keeper=keeper, ranks=ranks)["x"]):
            torch.testing.assert_close(found.heads.weight, expected.heads.weight, rtol=1e-9, atol=1e-12)


def test_held_out_is_a_part_of_every_class() -> None:
    y = torch.arange(5).repeat_interleave(torch.tensor([1, 2, 3, 40, 100]))[torch.randperm(146, generator=torch.Generator().manual_seed(0))]
    held = held_out(y, 0.1, 0)
    assert torch.bincount(y[held], minlength=5).tolist() == [0, 1, 1, 4, 10]
    assert torch.equal(held, held_out(y, 0.1, 0))
    assert not torch.equal(held, held_out(y, 0.1, 1))
    assert torch.bincount(y[held_out(y, 0.999, 0)], minlength=5).tolist() == [0, 1, 2, 39, 99]
    assert not held_out(torch.arange(4), 0.5, 0).any()


@pytest.mark.parametrize(("frac", "counts"), [(0.01, [1, 1, 1, 4]), (0.1, [1, 1, 5, 40])])
def test_few_shots_are_balanced(frac: float, counts: list[int]) -> None:
    y = torch.arange(4).repeat_interleave(torch.tensor([3, 9, 50, 400]))
    few = few_shot(y, frac, 0)
    assert torch.bincount(y[few]).tolist() == counts
    assert torch.equal(few, few_shot(y, frac, 0))
    assert not torch.equal(few, few_shot(y, frac, 1))


@pytest.mark.parametrize("frac", [0.0, 1.0, -1.0, float("nan")])
def test_a_part_is_more_than_nothing_and_less_than_all(frac: float) -> None:
    with pytest.raises(ValueError, match=r"a fraction of .* of each class: expected more than 0 and less than 1"):
        held_out(torch.arange(4), frac, 0)


def test_scaled_vectors_have_mean_zero_and_length_one() -> None:
    x = torch.randn(2, 500, 8, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-2, 6) + 7
    x[1, :, 3] = torch.tensor(0.1)
    x[1, ::2, 3] = torch.tensor(0.1).nextafter(torch.tensor(1.0))  # rounding, and no signal
    scale = Scale.of(x.split(77, 1))
    y = scale(x)
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 8), atol=1e-4, rtol=0)
    torch.testing.assert_close(y[0].square().sum(1).mean(), torch.tensor(1.0), atol=1e-3, rtol=0)
    assert (y[1, :, 3] == 0).all()
    assert torch.equal(scale.part(slice(1, 2))(x[1:]), y[1:])


def test_folded_weights_take_vectors_as_they_are() -> None:
    x, y = blobs(100)
    x = x * 50 + 3
    scale = Scale.of([x[None]])
    scaled = scale(x[None])
    heads = heads_of(1, (0.5,), (0.0,))
    heads = heads.float()
    fit({"x": heads}, feed_of(scaled, y, 50), 5, "")
    weight, bias = scale.folded(heads)
    torch.testing.assert_close(x.float() @ weight[0].T + bias[0], heads.logits(scaled)[0, :, 0], rtol=1e-4, atol=1e-4)


def test_no_step_waits_for_the_device_or_makes_a_gradient() -> None:
    """On the meta device whatever needs a value fails."""
    heads = heads_of(2).to("meta")
    x, y = torch.zeros(2, 16, 6, dtype=torch.float64, device="meta"), torch.zeros(16, dtype=torch.int64, device="meta")
    x.requires_grad_()
    heads.step_(x, y, 0.5)
    assert x.grad is None
    assert not heads.weight.requires_grad
