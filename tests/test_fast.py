"""A training step leaves the device alone: it waits for nothing, copies no map into another layout, and moves the target in one call."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cossl import train
from cossl.models.checkpoint import State
from cossl.models.co_ssl import CoSsl, LossConfig, ModelConfig
from cossl.models.heads import HEADS, NORMS
from cossl.models.objectives import OBJECTIVES
from cossl.models.optim import OPTIMIZERS, OptimConfig, adjust_gradients_, make_optimizer
from cossl.models.probe import OnlineProbe
from cossl.models.rf_resnet import BACKBONES
from cossl.pipelines.augment import augment_tensors
from cossl.pipelines.batch import LoaderSpec
from cossl.pipelines.synthetic import SyntheticLoader

BATCH = 2
SMALL: dict[str, Any] = {"backbone": "rf_resnet18", "receptive_field": 29, "width": 8, "hidden_dim": 16, "out_dim": 8, "prototypes": 12}
RECIPE = OptimConfig(lars_clip=True, clip_grad=3.0, freeze_prototypes_epochs=1)

# (model, loss) beside SMALL: every method with every head, then every other switch that changes what is computed.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{f"{method}, {head}": ({"method": method, "local_head": head}, {}) for method in OBJECTIVES for head in HEADS},
    **{f"{norm} norm, {head}": ({"head_norm": norm, "local_head": head}, {}) for norm in NORMS for head in ("conv1x1", "mlp2")},
    "shared heads": ({"shared_heads": True}, {}),
    "output norm": ({"output_norm": True}, {}),
    "predictors per size": ({"predictors": "per_size"}, {}),
    "third stage": ({"local_stage": 3}, {}),
    "pooled grid": ({"local_grid": 2}, {}),
    "joint views": ({"joint_views": True}, {}),
    "no MLP after pooling": ({"mlp_after_pool": 0}, {}),
    "local target": ({}, {"local_target": "local_head"}),
    "same view": ({}, {"local_views": "same"}),
    "global views alone": ({}, {"small_views": False}),
    "local to global alone": ({}, {"local_to_global": 1.0, "combine": "additive"}),
    "plain": ({}, {"local_weight": 0.0}),
}
# The deeper ones are made of the same blocks.
FAMILIES = [name for name in BACKBONES if not name.endswith(("34", "101"))]
RECEPTIVE_FIELDS = {"rf_resnet50": 99, "rf_resnet18": 29, "bagnet": 17}

# What makes the host wait for the device: bool() and item(), shapes that depend on values, constants that the host makes.
SYNCS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "repeat_interleave", "bincount", "lift_fresh"}


def is_map(x: Any) -> bool:
    """A feature map of at least 2 x 2 positions: pictures first, square, unlike kernels and maps with their channels moved."""
    return isinstance(x, Tensor) and x.ndim == 4 and x.shape[2] == x.shape[3] > 1 and x.shape[0] % BATCH == 0 and x.shape[0] <= 3 * BATCH


@dataclass
class Trace:
    syncs: list[str] = field(default_factory=list)
    other_layouts: list[str] = field(default_factory=list)
    num_maps: int = 0
    num_operations: int = 0


class Watch(TorchDispatchMode):
    """Every operation that runs inside, those of the backward pass and of optimizers included."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name, trace = func(*args, **(kwargs or {})), func.overloadpacket.__name__, self.trace
        masks = name.startswith("index") and any(x.dtype == torch.bool for x in tree_leaves(args[1:2]) if isinstance(x, Tensor))
        if name in SYNCS or masks:
            trace.syncs.append(name)
        maps = [x for x in tree_leaves(out) if is_map(x)]
        trace.other_layouts += [f"{name} {tuple(x.shape)}" for x in maps if not x.is_contiguous(memory_format=torch.channels_last)]
        if maps and name in ("clone", "copy_"):
            trace.other_layouts.append(name)
        trace.num_maps += len(maps)
        trace.num_operations += 1
        return out


def make(model: dict[str, Any], loss: dict[str, Any]) -> CoSsl:
    torch.manual_seed(0)
    return CoSsl(ModelConfig(**SMALL | model), LossConfig(**loss)).to(memory_format=torch.channels_last)


def pictures(*sizes: int) -> list[Tensor]:
    return [torch.randn(BATCH, 3, px, px).contiguous(memory_format=torch.channels_last) for px in sizes]


def step(model: CoSsl, optimizer: torch.optim.Optimizer, views: list[Tensor], positions: Tensor) -> None:
    model(views, positions)["loss"].backward()
    adjust_gradients_(model.online, RECIPE, 0.0)
    optimizer.step()
    model.update_target_(0.9)


@cache
def traced(name: str) -> Trace:
    """The second step of a variant, with two global views and a small one, in which some slots have no position."""
    model = make(*VARIANTS[name])
    optimizer, positions = make_optimizer(model.online.named_parameters(), RECIPE), torch.tensor([[[0, 3, -1]] * 3] * BATCH)
    optimizer.zero_grad()
    step(model, optimizer, pictures(32, 32, 24), positions)
    views = pictures(32, 32, 24)
    with Watch() as watch:
        step(model, optimizer, views, positions)
    assert watch.trace.num_operations > 500
    return watch.trace


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_waits_for_nothing(name: str) -> None:
    assert traced(name).syncs == []


@pytest.mark.parametrize("name", VARIANTS)
def test_no_map_of_a_step_is_copied_or_leaves_channels_last(name: str) -> None:
    trace = traced(name)
    assert trace.num_maps > 300
    assert trace.other_layouts == []


@pytest.mark.parametrize("name", FAMILIES)
def test_every_backbone_stays_in_channels_last(name: str) -> None:
    """Whatever a module returns, and whatever an operation does, forward and backward."""
    width = 16 if name in RECEPTIVE_FIELDS else 64  # at 8 torch 2.15 crashes (oneDNN; 1x1, stride 2, 8 to 16 channels, 64 px, backward)
    model = make({"backbone": name, "receptive_field": RECEPTIVE_FIELDS.get(name), "width": width}, {})
    views, layouts = pictures(64, 64), []
    for module in model.modules():
        module.register_forward_hook(
            lambda _, __, out: layouts.extend(x.is_contiguous(memory_format=torch.channels_last) for x in tree_leaves(out) if is_map(x))
        )
    with Watch() as watch:
        model(views, torch.zeros(BATCH, 2, 3, dtype=torch.int64))["loss"].backward()
    assert len(layouts) > 100
    assert all(layouts)
    assert watch.trace.other_layouts == []


def test_the_gradient_of_pooling_is_channels_last() -> None:
    network = make({"mlp_after_pool": 0}, {}).online
    y = torch.randn(BATCH, 64, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_(True)
    layouts: list[bool] = []
    y_again = y * 1
    y_again.register_hook(lambda gradient: layouts.append(gradient.is_contiguous(memory_format=torch.channels_last)))
    network.pool(y_again).sum().backward()
    assert layouts == [True]


class NoCrossing(TorchDispatchMode):
    """Refuses operations on tensors of more than one device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
        assert len(devices) < 2, f"{func} on {devices}"
        return out


@pytest.mark.parametrize(("method", "optimizer_name"), list(zip(OBJECTIVES, OPTIMIZERS, strict=True)))
def test_nothing_crosses_between_host_and_device(method: str, optimizer_name: str) -> None:
    """The meta device stands for an accelerator: its values cannot be read at all, and what the host makes has another device."""
    with torch.device("meta"):
        model = make({"method": method}, {})
        views, positions = pictures(32, 32), torch.zeros(BATCH, 2, 3, dtype=torch.int64)
    optimizer = make_optimizer(model.online.named_parameters(), OptimConfig(optimizer_name))
    with NoCrossing():
        step(model, optimizer, views, positions)
    trained = [p for p in model.online.parameters() if p.grad is not None]  # DINO's prototypes stand still in the first epoch
    assert len(trained) >= len(list(model.online.parameters())) - 2


@pytest.mark.parametrize("method", OBJECTIVES)
def test_the_target_moves_in_one_call(method: str) -> None:
    calls: list[tuple[str, int]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append((func.overloadpacket.__name__, len(args[0]) if isinstance(args[0], list) else 1))
            return func(*args, **(kwargs or {}))

    model = make({"method": method}, {})
    with Record():
        model.update_target_(0.9)
    assert calls == [("_foreach_lerp_", len(list(model.target.parameters())))]


@pytest.mark.parametrize("flags", [(), ("--device-batch-size", "4"), ("--model.method", "dino", "--model.prototypes", "32")])
def test_the_trainers_step_waits_for_nothing(monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]) -> None:
    """The GPU's augmentation, network, loss, optimizer, moving average, online probe and the sums for the log."""
    monkeypatch.setattr(train, "augment", augment_tensors)
    config = train.parse(["demo", "--batch-size", "8", "--optim.optimizer", "lars", *flags])[1]
    model = train.build(config, torch.device("cpu"))
    optimizer, scaler = make_optimizer(model.online.named_parameters(), config.optim), torch.amp.GradScaler("cpu", enabled=False)
    state = State(model, optimizer, scaler, OnlineProbe(model.online.backbone.out_channels, 10))
    batches = SyntheticLoader(None, LoaderSpec(config.views.specs(), 8, positions=train.position_specs(config, model))).epoch(0)
    train.step_(state, model, next(batches), config, 1e-3, 0.99, 0)
    batch = next(batches)
    with Watch() as watch:
        train.step_(state, model, batch, config, 1e-3, 0.99, 0)
    assert watch.trace.num_operations > 500
    assert watch.trace.syncs == []
