"""CO-BYOL: its loss against the method written out, its moving average, its switches."""

import copy
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from cossl.models import co_ssl, optim
from cossl.models.co_ssl import CoByol, LossConfig, ModelConfig
from cossl.models.heads import HEADS
from cossl.models.rf_resnet import BACKBONES

TINY = ModelConfig(backbone="rf_resnet18", receptive_field=29, width=4, mlp_after_pool=2, hidden_dim=24, out_dim=6)


def make(loss: LossConfig, seed: int = 0, **changes: Any) -> CoByol:
    """A tiny CO-BYOL in float64 whose target differs from the online network."""
    torch.manual_seed(seed)
    model = CoByol(ModelConfig(**(vars(TINY) | changes)), loss).double()
    for parameter in model.target.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def batch(seed: int = 1) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=generator) for _ in range(2)]
    return views, torch.tensor([[[0, 3], [1, 1]], [[2, -1], [3, 2]], [[-1, -1], [0, 2]], [[1, 2], [-1, 0]]])


def distance(p: Tensor, z: Tensor) -> Tensor:
    return 2 - 2 * (p * z).sum(-1) / (p.norm(dim=-1) * z.norm(dim=-1))


def reference(model: CoByol, views: list[Tensor], positions: Tensor) -> dict[str, Tensor]:
    """The method of the docstring, position by position; all networks in train mode, sums over both views."""
    online, target, config = model.online, model.target, model.loss
    g, q, g2, q2 = online.projector, online.predictor, online.local_projector, online.local_predictor
    terms = {"global": torch.zeros(()), "local_to_global": torch.zeros(()), "global_to_local": torch.zeros(())}
    assert q is not None
    assert g2 is not None
    assert q2 is not None
    assert target.local_projector is not None
    for v, w in ((0, 1), (1, 0)):
        y, y_target = online.backbone(views[v]), target.backbone(views[w]).detach()
        pooled, pooled_target = online.after_pool(y.mean((2, 3))), target.after_pool(y_target.mean((2, 3))).detach()
        z = target.projector.vectors(pooled_target).detach()
        terms["global"] = terms["global"] + distance(q.vectors(g.vectors(pooled)), z).mean()
        if config.local_views == "same":
            w = v
            y_target = target.backbone(views[v]).detach()
            pooled_target = target.after_pool(y_target.mean((2, 3))).detach()
            z = target.projector.vectors(pooled_target).detach()
        goal = z if config.local_target == "global_head" else target.local_projector.vectors(pooled_target).detach()
        p_local = q2.vectors(g2(y, positions[:, v]))
        p_pooled = q2.vectors(g2.vectors(pooled))
        z_local = target.local_projector(y_target, positions[:, w]).detach()
        to_global, to_local = [], []
        for i in range(len(positions)):
            own = [k for k, at in enumerate(positions[i, v].tolist()) if at >= 0]
            other = [k for k, at in enumerate(positions[i, w].tolist()) if at >= 0]
            if own:
                to_global.append(distance(p_local[i, own], goal[i]).mean())
            if other:
                to_local.append(distance(p_pooled[i], z_local[i, other]).mean())
        terms["local_to_global"] = terms["local_to_global"] + torch.stack(to_global).mean()
        terms["global_to_local"] = terms["global_to_local"] + torch.stack(to_local).mean()
    a, weight = config.local_to_global, config.local_weight
    local = 2 * (a * terms["local_to_global"] + (1 - a) * terms["global_to_local"])
    terms["loss"] = (1 - weight) * terms["global"] + weight * local if config.combine == "convex" else terms["global"] + weight * local
    return terms


@pytest.mark.parametrize(
    ("loss", "changes"),
    [
        (LossConfig(), {}),
        (LossConfig(local_target="local_head", local_to_global=0.2), {"local_head": "mlp2"}),
        (LossConfig(combine="additive", local_weight=0.5, local_to_global=0.8), {"mlp_after_pool": 0}),
        (LossConfig(local_target="local_head"), {"shared_heads": True, "mlp_after_pool": 1}),
        (LossConfig(local_views="same", local_to_global=0.2), {"local_head": "mlp3", "head_norm": "layer"}),
        (LossConfig(local_views="same", local_target="local_head"), {"local_head": "conv1x1_deep"}),
    ],
)
def test_loss_and_gradients_equal_the_method(loss: LossConfig, changes: dict[str, Any]) -> None:
    model = make(loss, **changes)
    views, positions = batch()
    parameters = list(model.online.parameters())
    expected = reference(copy.deepcopy(model), views, positions)
    ours = model(views, positions)
    assert {k: v.item() for k, v in ours.items() if k != "std"} == pytest.approx({k: v.item() for k, v in expected.items()})
    twin = copy.deepcopy(model)
    gradients = torch.autograd.grad(reference(twin, views, positions)["loss"], list(twin.online.parameters()))
    torch.testing.assert_close(torch.autograd.grad(ours["loss"], parameters), gradients)


def test_terms_are_summed_over_views_not_averaged() -> None:
    """Both views equal and both networks equal but for the predictor: each view gives the same term, so the sum is twice one."""
    model = make(LossConfig())
    views, positions = batch()
    views, positions = [views[0], views[0]], positions[:, :1].expand(-1, 2, -1)
    one = model.online.predictor.vectors(model.online.projector.vectors(model.represent(views[0])))
    z = model.target.projector.vectors(model.target.pool(model.target.backbone(views[0])))
    assert model(views, positions)["global"].item() == pytest.approx(2 * distance(one, z).mean().item())


def test_plain_byol_has_no_local_heads_and_ignores_positions() -> None:
    model = make(LossConfig(local_weight=0.0))
    assert model.online.local_projector is None
    assert not [name for name, _ in model.named_parameters() if "local" in name]
    views, positions = batch()
    terms = model(views, positions)
    assert set(terms) == {"loss", "global", "std"}
    assert terms["loss"].item() == terms["global"].item()


@pytest.mark.parametrize(("share", "absent"), [(1.0, "global_to_local"), (0.0, "local_to_global")])
def test_a_direction_with_share_zero_is_not_computed(share: float, absent: str) -> None:
    model = make(LossConfig(local_to_global=share))
    views, positions = batch()
    calls: list[str] = []
    heads = {"online": model.online.local_projector, "target": model.target.local_projector}
    for name, head in heads.items():
        head.layers[1].register_forward_hook(lambda *_, name=name: calls.append(name))
    terms = model(views, positions)
    assert absent not in terms
    assert calls == (["online"] * 2 if share else ["target", "target", "online", "online"])
    expected = reference(make(LossConfig(local_to_global=share)), views, positions)
    assert terms["loss"].item() == pytest.approx(expected["loss"].item())


def test_every_online_parameter_learns_and_no_target_parameter_does() -> None:
    for loss in (LossConfig(), LossConfig(local_weight=0.0), LossConfig(local_to_global=1.0), LossConfig(local_to_global=0.0)):
        model = make(loss)
        model(*batch())["loss"].backward()
        assert [name for name, p in model.online.named_parameters() if p.grad is None] == []
        assert all(p.grad is None and not p.requires_grad for p in model.target.parameters())


@pytest.mark.parametrize("shared_heads", [False, True])
def test_output_norm_is_on_projectors_alone(shared_heads: bool) -> None:
    for output_norm in (False, True):
        model = make(LossConfig(), output_norm=output_norm, shared_heads=shared_heads)
        for network in (model.online, model.target):
            for projector in (network.projector, network.local_projector):
                assert projector is not None
                assert hasattr(projector.layers[-1], "running_mean") == output_norm
        for predictor in (model.online.predictor, model.online.local_predictor):
            assert predictor is not None
            assert not hasattr(predictor.layers[-1], "running_mean")


def test_shared_heads_are_one_module_in_both_networks() -> None:
    model = make(LossConfig(), shared_heads=True)
    assert model.online.local_projector is model.online.projector
    assert model.online.local_predictor is model.online.predictor
    assert model.target.local_projector is model.target.projector
    assert model.target.projector is not model.online.projector


def test_target_starts_as_the_online_network_without_predictors() -> None:
    model = CoByol(TINY, LossConfig())
    online = model.online.state_dict()
    target = model.target.state_dict()
    assert {name for name in online if "predictor" not in name} == set(target)
    assert all(torch.equal(online[name], tensor) for name, tensor in target.items())


def test_update_target_moves_parameters_and_leaves_buffers() -> None:
    model = make(LossConfig())
    model(*batch())
    parameters = {name: p.clone() for name, p in model.target.named_parameters()}
    buffers = {name: b.clone() for name, b in model.target.named_buffers()}
    online = dict(model.online.named_parameters())
    assert any(not torch.equal(b, dict(model.online.named_buffers())[name]) for name, b in buffers.items())
    model.update_target_(0.9)
    for name, after in model.target.named_parameters():
        torch.testing.assert_close(after, 0.9 * parameters[name] + 0.1 * online[name])
    assert all(torch.equal(b, buffers[name]) for name, b in model.target.named_buffers())


def test_both_networks_keep_their_own_running_statistics() -> None:
    model = make(LossConfig())
    model(*batch())
    for network in (model.online, model.target):
        assert network.backbone.bn1.num_batches_tracked == 2
    assert not torch.equal(model.online.backbone.bn1.running_mean, model.target.backbone.bn1.running_mean)


def test_std_tells_spread_from_collapse() -> None:
    assert co_ssl.spread(torch.randn(2000, 16)).item() == pytest.approx(1, abs=0.05)
    assert co_ssl.spread(torch.randn(1, 16).expand(50, 16)).item() == pytest.approx(0, abs=1e-6)
    terms = make(LossConfig())(*batch())
    assert not terms["std"].requires_grad
    assert all(term.ndim == 0 for term in terms.values())


def test_represent_is_the_pooled_vector_of_the_online_network() -> None:
    model = make(LossConfig(), mlp_after_pool=0).eval()
    (x, _), _ = batch()
    torch.testing.assert_close(model.represent(x), model.online.backbone(x).mean((2, 3)))
    assert not torch.equal(make(LossConfig()).eval().represent(x), model.represent(x))


def test_a_few_steps_lower_the_loss() -> None:
    torch.manual_seed(0)
    model = CoByol(TINY, LossConfig())
    optimizer = optim.make_optimizer(model.online.named_parameters(), optim.OptimConfig(optimizer="adamw", base_lr=3e-3))
    x = torch.randn(16, 3, 16, 16)
    views, positions = [x, x + 0.1 * torch.randn_like(x)], torch.arange(4).expand(16, 2, 4)
    history = []
    for _ in range(12):
        loss = model(views, positions)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target_(0.9)
        history.append(loss.item())
    assert history[-1] < 0.8 * history[0]


def test_forward_compiles_to_one_graph() -> None:
    model = make(LossConfig(local_target="local_head"))
    for network in (model.online, model.target):  # one block per stage: tracing is what takes the time
        backbone = network.backbone
        backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4 = (stage[:1] for stage in backbone.stages)
    views, positions = batch()
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    expected, ours = model(views, positions), compiled(views, positions)
    torch.testing.assert_close(ours, expected)


def test_choices_are_the_dicts() -> None:
    hints = get_type_hints(ModelConfig)
    assert get_args(hints["backbone"]) == tuple(BACKBONES)
    assert get_args(hints["local_head"]) == tuple(HEADS)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ModelConfig(receptive_field=100), "receptive_field=100 px cannot be reached.*99, 131"),
        (lambda: ModelConfig(backbone="vgg"), "backbone='vgg' is unknown; choose one of rf_resnet50"),
        (lambda: ModelConfig(local_head="mlp9"), "local_head='mlp9' is not possible; choose one of conv1x1, mlp2, mlp3"),
        (lambda: ModelConfig(mlp_after_pool=-1), "mlp_after_pool=-1"),
        (lambda: ModelConfig(hidden_dim=0), "hidden_dim=0"),
        (lambda: ModelConfig(out_dim=0), "out_dim=0"),
        (lambda: LossConfig(local_weight=1.5), "local_weight=1.5 is not possible; give 0 to 1"),
        (lambda: LossConfig(local_weight=-0.1, combine="additive"), "local_weight=-0.1 is not possible; give 0 or more"),
        (lambda: LossConfig(local_to_global=1.1), "local_to_global=1.1"),
        (lambda: LossConfig(combine="sum"), "combine='sum' is not possible; choose convex or additive"),  # type: ignore[arg-type]
        (lambda: LossConfig(local_target="both"), "local_target='both'"),  # type: ignore[arg-type]
        (lambda: LossConfig(local_weight=float("nan")), "local_weight=nan"),
    ],
)
def test_impossible_settings_name_value_and_fix(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
    assert LossConfig(local_weight=1.5, combine="additive").local_weight == 1.5
