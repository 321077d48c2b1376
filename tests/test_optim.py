"""Optimizers, the list of parameters they leave alone, and the schedules."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cossl.models import optim
from cossl.models.co_ssl import LossConfig, ModelConfig, Network
from cossl.models.optim import OPTIMIZERS, OptimConfig, make_optimizer


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 4, 5)).double()


def reference_lars(w: Tensor, grad: Tensor, buffer: Tensor, lr: float, decay: float, momentum: float) -> tuple[Tensor, Tensor]:
    """One step of LARS: trust ratio 1e-3 |w| / (|gradient| + decay |w|), decay into the gradient, then momentum (You et al. 2017)."""
    if w.ndim > 1:
        grad = (grad + decay * w) * 1e-3 * w.norm() / (grad.norm() + decay * w.norm())
    buffer = momentum * buffer + grad
    return w - lr * buffer, buffer


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_steps_equal_the_rule(decay: float) -> None:
    model = small()
    optimizer = make_optimizer(model.named_parameters(), OptimConfig(weight_decay=decay, base_lr=0.7))
    expected = {name: (p.detach().clone(), torch.zeros_like(p)) for name, p in model.named_parameters()}
    for step in range(3):
        lr = 0.7 + step
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        model(torch.randn(6, 3, 4, 4, dtype=torch.float64)).square().sum().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            expected[name] = reference_lars(expected[name][0], p.grad.clone(), expected[name][1], lr, decay, 0.9)
        optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name][0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_biases_and_norms_are_left_alone_by_name(name: str) -> None:
    config = ModelConfig(backbone="rf_resnet18", receptive_field=29, width=4, hidden_dim=8, out_dim=6)
    named = dict(Network(config, local=LossConfig().local_weight > 0).named_parameters())
    optimizer = make_optimizer(named.items(), OptimConfig(optimizer=name, weight_decay=0.5))
    weights, excluded = optimizer.param_groups
    names = {id(p): n for n, p in named.items()}
    left_alone = {names[id(p)] for p in excluded["params"]}
    assert {names[id(p)] for p in weights["params"]} | left_alone == set(named)
    assert all(n.endswith(".bias") or n.endswith(".weight") for n in named)
    is_norm = {n for n in named if "bn" in n or "downsample.1" in n or "layers.1." in n or n.startswith("after_pool.1")}
    assert left_alone == is_norm | {n for n in named if n.endswith(".bias")}
    for example in ("backbone.layer2.0.downsample.1.weight", "local_predictors.0.layers.1.weight", "projector.layers.0.bias"):
        assert example in left_alone
    assert (weights["weight_decay"], excluded["weight_decay"]) == (0.5, 0.0)
    if name == "lars":
        assert (weights["always_adapt"], excluded["always_adapt"]) == (True, False)


def test_frozen_parameters_stay_out() -> None:
    model = small()
    model[0].requires_grad_(False)
    groups = make_optimizer(model.named_parameters(), OptimConfig()).param_groups
    assert [len(group["params"]) for group in groups] == [1, 3]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_survives_saving(name: str) -> None:
    """The second step after a reload equals the second step without: momentum is in the state."""
    runs = []
    for reload in (False, True):
        model = small()
        optimizer = make_optimizer(model.named_parameters(), OptimConfig(optimizer=name))
        for step in range(2):
            if reload and step == 1:
                state = optimizer.state_dict()
                optimizer = make_optimizer(model.named_parameters(), OptimConfig(optimizer=name))
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            model(torch.arange(96.0, dtype=torch.float64).reshape(2, 3, 4, 4)).square().sum().backward()
            optimizer.step()
        runs.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert not torch.equal(runs[0][0], small()[0].weight)


def test_peak_lr_is_byols() -> None:
    assert optim.peak_lr(0.45, 4096) == pytest.approx(7.2)
    assert optim.peak_lr(0.45, 256) == 0.45


def test_learning_rate_at_start_warmup_end_and_end() -> None:
    schedule = [optim.learning_rate(step, 100, 10, 7.2) for step in range(101)]
    assert schedule[0] == 0
    assert schedule[5] == pytest.approx(3.6)
    assert schedule[10] == pytest.approx(7.2)
    assert schedule[55] == pytest.approx(3.6)
    assert schedule[100] == pytest.approx(0, abs=1e-12)
    assert max(schedule) == schedule[10]
    assert all(a > b for a, b in pairwise(schedule[10:]))
    assert optim.learning_rate(0, 100, 0, 7.2) == 7.2
    assert optim.learning_rate(120, 100, 10, 7.2) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="warmup_steps=100 must be fewer than the run's 100 steps"):
        optim.learning_rate(0, 100, 100, 7.2)


def test_ema_tau_rises_from_base_to_one() -> None:
    assert optim.ema_tau(0, 100, 0.99) == pytest.approx(0.99)
    assert optim.ema_tau(50, 100, 0.99) == pytest.approx(0.995)
    assert optim.ema_tau(100, 100, 0.99) == 1
    assert optim.ema_tau(25, 100, 0.96) == pytest.approx(1 - 0.04 * (math.cos(math.pi / 4) + 1) / 2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer", "adam"),
        ("base_lr", 0.0),
        ("base_lr", math.inf),
        ("weight_decay", -1e-6),
        ("momentum", 1.0),
        ("warmup_epochs", -1.0),
        ("ema_tau", 1.01),
        ("ema_tau", math.nan),
    ],
)
def test_impossible_settings_name_value_and_fix(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field}={value!r} is not possible; (give|choose)"):
        OptimConfig(**{field: value})
