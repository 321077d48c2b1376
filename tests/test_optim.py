"""Optimizers, the list of parameters they leave alone, and the schedules."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from timm.optim.lars import Lars
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cossl.models import optim
from cossl.models.co_ssl import LossConfig, ModelConfig, Network
from cossl.models.optim import OPTIMIZERS, OptimConfig, adjust_gradients_, clip_gradients_, make_optimizer


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 4, 5)).double()


def reference_lars(w: Tensor, grad: Tensor, buffer: Tensor, lr: float, decay: float, eta: float, clip: bool) -> tuple[Tensor, Tensor]:
    """One step of LARS: trust ratio eta |w| / (|gradient| + decay |w|), decay into the gradient, then momentum (You et al. 2017).

    The clip is that of LARC: of the two learning rates, the weight's own and the schedule's, the smaller one.
    """
    if w.ndim > 1:
        ratio = eta * w.norm() / (grad.norm() + decay * w.norm())
        grad = (grad + decay * w) * (ratio.clamp(max=lr) / lr if clip else ratio)
    buffer = 0.9 * buffer + grad
    return w - lr * buffer, buffer


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("eta", "clip"), [(1e-3, False), (0.02, True), (1e4, True)])
def test_lars_steps_equal_the_rule_and_timms_loop(decay: float, eta: float, clip: bool) -> None:
    model, twin = small(), small()
    config = OptimConfig(weight_decay=decay, lars_eta=eta, lars_clip=clip)
    optimizer = make_optimizer(model.named_parameters(), config)
    weights = [p for p in twin.parameters() if p.ndim > 1]
    groups = [{"params": weights, "always_adapt": True, "weight_decay": decay}, {"params": [p for p in twin.parameters() if p.ndim == 1]}]
    loop = Lars(groups, momentum=0.9, trust_coeff=eta, trust_clip=clip, foreach=False)
    expected = {name: (p.detach().clone(), torch.zeros_like(p)) for name, p in model.named_parameters()}
    for step in range(4):
        lr = 0.7 + step
        for group in (*optimizer.param_groups, *loop.param_groups):
            group["lr"] = lr
        optimizer.zero_grad()
        model(torch.randn(6, 3, 4, 4, dtype=torch.float64)).square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
            expected[name] = reference_lars(*(expected[name][0], p.grad.clone(), expected[name][1]), lr, decay, eta, clip)
        optimizer.step()
        loop.step()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), expected[name][0], rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("clip", [False, True])
def test_lars_where_a_norm_is_zero(clip: bool) -> None:
    """Zero weights get SGD's step; zero gradients leave the weight, but for its decay."""
    model = nn.ParameterList([torch.zeros(2, 3), torch.ones(2, 3)])
    config = OptimConfig(base_lr=0.5, momentum=0.0, weight_decay=0.1, lars_clip=clip)
    zero_weight, zero_gradient = model
    zero_weight.grad, zero_gradient.grad = torch.full((2, 3), 2.0), torch.zeros(2, 3)
    make_optimizer(model.named_parameters(), config).step()
    torch.testing.assert_close(zero_weight.detach(), torch.full((2, 3), -1.0))
    torch.testing.assert_close(zero_gradient.detach(), torch.full((2, 3), 1 - 0.5 * 0.1))


class CountOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **kwargs or {})


def test_lars_and_clipping_work_on_lists() -> None:
    """As many operations for a large network as for a small one."""
    counts = []
    for depth in (2, 20):
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(depth)))
        optimizer = make_optimizer(model.named_parameters(), OptimConfig(lars_clip=True))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()  # makes the buffers
        with CountOperations() as counted:
            clip_gradients_(model.parameters(), 3.0)
            optimizer.step()
        counts.append(counted.count)
    assert counts[0] == counts[1]


def test_clipping_is_per_parameter() -> None:
    norms = (0.0, 2.9, 3.1, 300.0)
    parameters = [nn.Parameter(torch.zeros(5, 5)) for _ in (*norms, None)]
    gradients = [torch.randn(5, 5) for _ in norms]
    for p, gradient, norm in zip(parameters, gradients, norms, strict=False):
        p.grad = gradient * (norm / gradient.norm())
    clip_gradients_(iter(parameters), 3.0)
    assert parameters[-1].grad is None
    for p, gradient, norm in zip(parameters, gradients, norms, strict=False):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, gradient * (min(norm, 3.0) / gradient.norm()), rtol=1e-5, atol=1e-6)
    clip_gradients_([], 3.0)
    with pytest.raises(ValueError, match="max_norm=0 is not possible; give a number above 0"):
        clip_gradients_(parameters, 0)


@pytest.mark.parametrize(("epoch", "frozen"), [(0.0, True), (0.99, True), (1.0, False), (7.0, False)])
def test_frozen_prototypes_stay_bitwise_and_the_rest_is_clipped(epoch: float, frozen: bool) -> None:
    config = ModelConfig("dino", "rf_resnet18", 29, width=4, hidden_dim=8, out_dim=6, prototypes=12)
    network = Network(config, local=True)
    recipe = OptimConfig(optimizer="sgd", weight_decay=0.5, clip_grad=3.0, freeze_prototypes_epochs=1)
    optimizer, before = make_optimizer(network.named_parameters(), recipe), [p.detach().clone() for p in network.parameters()]
    for p in network.parameters():
        p.grad = torch.full_like(p, 10.0)
    adjust_gradients_(network, recipe, epoch)
    assert all(p.grad is None or p.grad.norm() < 3.0 + 1e-4 for p in network.parameters())
    optimizer.step()
    moved = {name for (name, p), old in zip(network.named_parameters(), before, strict=True) if not torch.equal(p, old)}
    prototypes = {"predictors.0.weight", "local_predictors.0.weight"}
    assert moved == {name for name, _ in network.named_parameters()} - (prototypes if frozen else set())


def test_gradients_stay_as_they_are_by_default() -> None:
    model = small()
    for p in model.parameters():
        p.grad = torch.full_like(p, 10.0)
    adjust_gradients_(model, OptimConfig(), 0.0)
    assert all(p.grad is not None and (p.grad == 10).all() for p in model.parameters())


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


def test_warmup_starts_where_it_is_told() -> None:
    schedule = [optim.learning_rate(step, 100, 10, 0.5, 3e-5) for step in range(101)]
    assert schedule[0] == 3e-5
    assert schedule[5] == pytest.approx((3e-5 + 0.5) / 2)
    assert schedule[10:] == [optim.learning_rate(step, 100, 10, 0.5) for step in range(10, 101)]
    assert optim.learning_rate(0, 100, 0, 0.5, 0.6) == 0.5
    with pytest.raises(ValueError, match=r"warmup_start_lr=0.6 must not be above the peak learning rate of 0.5"):
        optim.learning_rate(50, 100, 10, 0.5, 0.6)


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
        ("lars_eta", 0.0),
        ("warmup_epochs", -1.0),
        ("warmup_start_lr", -1e-5),
        ("warmup_start_lr", math.inf),
        ("clip_grad", -3.0),
        ("clip_grad", math.nan),
        ("freeze_prototypes_epochs", -1.0),
        ("ema_tau", 1.01),
        ("ema_tau", math.nan),
    ],
)
def test_impossible_settings_name_value_and_fix(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field}={value!r} is not possible; (give|choose)"):
        OptimConfig(**{field: value})
