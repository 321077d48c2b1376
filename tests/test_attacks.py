"""Attacks against the worst case of a linear classifier and against one written in numpy; damaged maps position by position."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cossl.models import attacks
from cossl.models.attacks import Attack, Damage, Norm, damaged, num_damaged, one_step, pgd

NORMS: tuple[Norm, ...] = get_args(Norm)
SHAPE = 3, 4, 4
SIZE = math.prod(SHAPE)


def pictures(count: int, low: float = 0.0, high: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(x in [low, high], labels of two classes, indices), in float64 where the comparison is to be exact."""
    generator = torch.Generator().manual_seed(seed)
    x = low + (high - low) * torch.rand(count, *SHAPE, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 2, (count,), generator=generator), torch.arange(count) * 7 + 3


def linear(seed: int = 1, classes: int = 2) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    weight = torch.randn(classes, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return weight, lambda x: x.flatten(1) @ weight.T


def norm_of(delta: Tensor, norm: Norm) -> Tensor:
    return delta.flatten(1).abs().amax(1) if norm == "linf" else delta.flatten(1).norm(dim=1)


def margin(predict: Callable[[Tensor], Tensor], x: Tensor, label: Tensor) -> Tensor:
    """By how much the logit of the label leads."""
    logits = predict(x)
    return logits.gather(1, label[:, None])[:, 0] - logits.gather(1, 1 - label[:, None])[:, 0]


def worst_margin(weight: Tensor, x: Tensor, label: Tensor, eps: float, norm: Norm) -> Tensor:
    """The least that a picture in the ball and in [0, 1] can have: pixel by pixel for linf, by the Lagrange multiplier for l2."""
    w = (weight[label] - weight[1 - label]).view(x.shape)
    if norm == "linf":
        return torch.where(w > 0, w * (x - eps).clamp(0, 1), w * (x + eps).clamp(0, 1)).flatten(1).sum(1)
    low, high = torch.zeros(len(x), 1, 1, 1, dtype=x.dtype), torch.full((len(x), 1, 1, 1), 1e6, dtype=x.dtype)
    for _ in range(200):
        middle = (low + high) / 2
        too_far = norm_of((x - middle * w).clamp(0, 1) - x, norm).view(-1, 1, 1, 1) > eps
        low, high = torch.where(too_far, low, middle), torch.where(too_far, middle, high)
    return (w * (x - low * w).clamp(0, 1)).flatten(1).sum(1)


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_pgd_finds_the_worst_case_of_a_linear_classifier(norm: Norm, random_start: bool) -> None:
    weight, predict = linear()
    eps = {"linf": 0.05, "l2": 0.2}[norm]
    x, label, index = pictures(20, 0.3, 0.7)
    found = margin(predict, pgd(predict, x, label, index, eps, Attack(norm, 100, 0.1, random_start)), label)
    dual = (weight[label] - weight[1 - label]).norm(p=1 if norm == "linf" else 2, dim=1)
    torch.testing.assert_close(found, margin(predict, x, label) - eps * dual, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("norm", "relative_step", "atol"), [("linf", 0.1, 1e-9), ("l2", 0.02, 0.02)])
def test_pgd_finds_the_worst_case_at_the_edge_of_what_a_picture_can_be(norm: Norm, relative_step: float, atol: float) -> None:
    weight, predict = linear()
    eps = {"linf": 0.2, "l2": 1.0}[norm]
    x, label, index = pictures(20)
    adversarial = pgd(predict, x, label, index, eps, Attack(norm, 300, relative_step, True))
    worst, clean = worst_margin(weight, x, label, eps, norm), margin(predict, x, label)
    found = margin(predict, adversarial, label)
    assert ((found - worst) >= -1e-9).all()
    assert ((found - worst) / (clean - worst)).max() < atol
    dual = (weight[label] - weight[1 - label]).norm(p=1 if norm == "linf" else 2, dim=1)
    assert (worst > clean - eps * dual + 0.1).any()  # [0, 1] did matter


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [0.0, 0.003, 0.1, 3.0])
def test_pgd_stays_in_the_ball_and_in_the_range_of_pictures(norm: Norm, random_start: bool, eps: float) -> None:
    x, label, index = pictures(8)
    x[0, :, 0], x[1, :, 1] = 0, 1
    _, predict = linear()
    for steps, relative_step in ((1, 1.0), (1, 5.0), (5, 0.5)):
        adversarial = pgd(predict, x, label, index, eps, Attack(norm, steps, relative_step, random_start))
        assert norm_of(adversarial - x, norm).max() <= eps * (1 + 1e-9) + 1e-15
        assert 0 <= adversarial.min() <= adversarial.max() <= 1
        single = pgd(lambda x: predict(x.double()).float(), x.float(), label, index, eps, Attack(norm, steps, relative_step, random_start))
        assert norm_of(single - x.float(), norm).max() <= eps + 1e-6


class Numpy:
    """A classifier of one hidden layer, its gradient by hand, and the attack for one picture at a time as the papers have it."""

    def __init__(self, classes: int = 5) -> None:
        random = np.random.default_rng(0)
        self.a, self.b = random.normal(size=(16, SIZE)) * 0.5, random.normal(size=(classes, 16))

    def torch(self, x: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) @ torch.as_tensor(self.a).T) @ torch.as_tensor(self.b).T

    def gradient(self, x: np.ndarray, label: int) -> np.ndarray:
        hidden = np.tanh(self.a @ x)
        logits = self.b @ hidden
        p = np.exp(logits - logits.max())
        p /= p.sum()
        p[label] -= 1
        return self.a.T @ ((1 - hidden**2) * (self.b.T @ p))

    def attack(self, x: np.ndarray, label: int, start: np.ndarray, eps: float, norm: Norm, steps: int, step: float) -> np.ndarray:
        moved = np.clip(x + start, 0, 1)
        for _ in range(steps):
            g = self.gradient(moved, label)
            moved = moved + step * (np.sign(g) if norm == "linf" else g / np.sqrt((g**2).sum()))
            if norm == "linf":
                moved = np.minimum(np.maximum(moved, x - eps), x + eps)
            elif (length := np.sqrt(((moved - x) ** 2).sum())) > eps:
                moved = x + (moved - x) * eps / length
            moved = np.clip(moved, 0, 1)
        return moved


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_pgd_equals_the_same_in_numpy(norm: Norm, random_start: bool) -> None:
    network, eps, how = Numpy(), 0.3, Attack(norm, 7, 0.3, random_start, seed=5)
    x, _, index = pictures(12)
    label = torch.arange(12) % 5
    ours = pgd(network.torch, x, label, index, eps, how).flatten(1).numpy()
    starts = eps * attacks._in_unit_ball(how, index, x).double().flatten(1).numpy() * random_start
    for i in range(12):
        theirs = network.attack(x[i].flatten().numpy(), int(label[i]), starts[i], eps, norm, 7, 0.3 * eps)
        np.testing.assert_allclose(ours[i], theirs, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_one_step_is_the_fast_gradient_method(norm: Norm) -> None:
    network = Numpy()
    x, label, index = pictures(6)
    ours = pgd(network.torch, x, label, index, 0.1, one_step(norm))
    for i in range(6):
        g = network.gradient(x[i].flatten().numpy(), int(label[i]))
        step = np.sign(g) if norm == "linf" else g / np.linalg.norm(g)
        np.testing.assert_allclose(ours[i].flatten().numpy(), np.clip(x[i].flatten().numpy() + 0.1 * step, 0, 1), atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_more_eps_never_helps_the_classifier(norm: Norm) -> None:
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), *head).requires_grad_(False)
    x, _, index = pictures(60)
    x = x.float()
    label = network(x).argmax(1)
    losses, rights = [], []
    for eps in (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0):
        logits = network(pgd(network, x, label, index, eps, Attack(norm, 20, 0.1, True)))
        losses.append(float(F.cross_entropy(logits, label)))
        rights.append(int((logits.argmax(1) == label).sum()))
    assert losses == sorted(losses)
    assert rights == sorted(rights, reverse=True)
    assert rights[0] == 60 > rights[-1]
    assert network[0].weight.grad is None


@pytest.mark.parametrize("norm", NORMS)
def test_a_very_sure_classifier_is_attacked_too(norm: Norm) -> None:
    """Leads of 30 nats: in float32 the label's probability is 1, and the part of the gradient that the label has would be lost."""
    weight, plain = linear(classes=3)
    x, _, index = pictures(20, 0.4, 0.6)
    label = plain(x).argmax(1)
    offset = 30 * F.one_hot(label, 3)
    adversarial = pgd(lambda x: x.flatten(1) @ weight.float().T + offset, x.float(), label, index, 0.1, one_step(norm))
    others = plain(x).scatter(1, label[:, None], -math.inf).softmax(1)
    g = (others @ weight - weight[label]).view(x.shape)
    step = g.sign() if norm == "linf" else g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(adversarial - x.float(), 0.1 * step.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_the_start_is_the_pictures_own_whatever_the_batch(norm: Norm) -> None:
    _, predict = linear()
    x, label, index = pictures(9)

    def attacked(rows: list[int], seed: int = 0) -> Tensor:
        return pgd(predict, x[rows], label[rows], index[rows], 0.1, Attack(norm, 1, 1e-9, True, seed))

    whole = attacked(list(range(9)))
    torch.testing.assert_close(torch.cat([attacked([8, 2]), attacked([5])]), whole[[8, 2, 5]], rtol=0, atol=1e-12)
    assert (norm_of(attacked(list(range(9)), seed=1) - whole, norm) > 0.01).all()
    assert torch.pdist((whole - x).flatten(1)).min() > 0.01


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_fill_the_ball(norm: Norm) -> None:
    x = torch.zeros(4000, 3, 1, 1)
    start = attacks._in_unit_ball(Attack(norm, 1, 1.0, True), torch.arange(4000), x)
    radius = norm_of(start, norm)
    assert radius.max() <= 1 + 1e-6
    for share in (0.1, 0.5, 0.9):  # as volume goes
        assert (radius < share ** (1 / 3)).float().mean().item() == pytest.approx(share, abs=0.03)
    assert start.mean(0).abs().max() < 0.05


def test_an_attack_that_cannot_be_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="0 steps of an attack: expected 1 or more"):
        Attack("linf", 0, 0.1, True)
    with pytest.raises(ValueError, match=r"a relative step of -0\.1: expected more than 0"):
        Attack("linf", 1, -0.1, True)


# ------------------------------------------------------------------------------------------------- damage to a feature map


def maps(count: int = 5, channels: int = 32, n: int = 7) -> tuple[Tensor, Tensor]:
    noise = torch.randn(count, channels, n, n, generator=torch.Generator().manual_seed(3))
    y = 3 + 2 * noise * torch.arange(1, channels + 1).view(-1, 1, 1)
    return y.contiguous(memory_format=torch.channels_last), torch.arange(count) * 11


COUNTS = {0.0: 0, 0.1: 5, 0.25: 12, 0.5: 25, 0.9: 44, 1.0: 49}
"""Of 49 positions."""


@pytest.mark.parametrize("kind", get_args(Damage))
def test_the_share_asked_for_is_damaged_and_nothing_else(kind: Damage) -> None:
    y, index = maps()
    before: Tensor | None = None
    for share, other in zip(COUNTS, damaged(y, kind, list(COUNTS), index, 0), strict=True):
        changed = other != y
        assert torch.equal(changed.all(1), changed.any(1))
        where = changed.any(1).flatten(1)
        assert where.sum(1).tolist() == [COUNTS[share]] * 5
        assert before is None or (where | ~before).all()  # those of the smaller share among them
        before = where
        assert share > 0 or other is y
        if 0 < share < 1:
            assert len(torch.unique(where, dim=0)) == 5
        if kind == "mask":
            assert not other[changed].any()


def test_every_position_is_damaged_as_often() -> None:
    y = torch.ones(4000, 1, 4, 4)
    (some,) = damaged(y, "mask", [0.25], torch.arange(4000), 0)
    torch.testing.assert_close((some == 0).float().mean(0), torch.full((1, 4, 4), 0.25), rtol=0, atol=0.03)


def test_noise_has_the_maps_own_mean_and_deviation() -> None:
    y, index = maps(2, channels=8, n=60)
    (noise,) = damaged(y, "noise", [1.0], index, 0)
    deviation = y.std((2, 3), correction=0)
    torch.testing.assert_close((noise.mean((2, 3)) - y.mean((2, 3))) / deviation, torch.zeros(2, 8), rtol=0, atol=0.07)
    torch.testing.assert_close(noise.std((2, 3)) / deviation, torch.ones(2, 8), rtol=0, atol=0.05)
    standard = ((noise - y.mean((2, 3), keepdim=True)) / deviation[:, :, None, None]).flatten(0, 1).flatten(1)
    assert (torch.corrcoef(standard) - torch.eye(16)).abs().max() < 0.08


@pytest.mark.parametrize("kind", get_args(Damage))
def test_damage_is_the_pictures_own_whatever_the_batch(kind: Damage) -> None:
    y, index = maps()
    (whole,) = damaged(y, kind, [0.5], index, 0)
    (part,) = damaged(y[[3, 1]], kind, [0.5], index[[3, 1]], 0)
    torch.testing.assert_close(part, whole[[3, 1]])
    (other,) = damaged(y, kind, [0.5], index, 1)
    assert not torch.equal(other, whole)


@pytest.mark.parametrize(("share", "positions", "count"), [(0.5, 1, 1), (0.49, 1, 0), (0.1, 49, 5), (0.9, 49, 44), (0.5, 49, 25)])
def test_shares_are_rounded_to_whole_positions(share: float, positions: int, count: int) -> None:
    assert num_damaged(share, positions) == count


# ------------------------------------------------------------------------------------------------- draws


def test_draws_are_splitmixs() -> None:
    """By Python's own whole numbers."""
    mask = 2**64 - 1

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    golden, expected = 0x9E3779B97F4A7C15, []
    for index in (0, 5, 2**40):
        key = 123
        for word in (index, 2):
            key = mix(mix((key + golden) & mask) ^ word)
        expected.append([(mix((key + i * golden) & mask) >> 40) / 2**24 for i in range(1, 9)])
    assert attacks.uniform(123, torch.tensor([0, 5, 2**40]), 2, 8).tolist() == expected


def test_draws_are_uniform_and_normal() -> None:
    u = attacks.uniform(0, torch.arange(300), 0, 300)
    assert 0 <= u.min() <= u.max() < 1
    assert torch.histc(u, 10, 0, 1).div(9000).sub(1).abs().max() < 0.05
    n = attacks.normal(0, torch.arange(300), 0, 300)
    assert n.isfinite().all()
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert n.pow(power).mean().item() == pytest.approx(moment, abs=0.1)
    for rows in (u, u.T, n, n.T):
        assert (torch.corrcoef(rows) - torch.eye(300)).abs().max() < 0.35
