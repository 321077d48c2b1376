"""CO-SSL on every method: its loss against the method written out, its moving average, its switches."""

import copy
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cossl.models import co_ssl, optim
from cossl.models.co_ssl import CoSsl, LossConfig, ModelConfig, Network
from cossl.models.heads import HEADS
from cossl.models.objectives import OBJECTIVES
from cossl.models.rf_resnet import BACKBONES
from cossl.models.run_status import has_collapsed

TINY = ModelConfig(backbone="rf_resnet18", receptive_field=29, width=4, mlp_after_pool=2, hidden_dim=24, out_dim=6, prototypes=10)


def make(loss: LossConfig, seed: int = 0, **changes: Any) -> CoSsl:
    """A tiny model in float64 whose target differs from the online network."""
    torch.manual_seed(seed)
    model = CoSsl(ModelConfig(**(vars(TINY) | changes)), loss).double()
    for parameter in model.target.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def batch(small_views: int = 0) -> tuple[list[Tensor], Tensor]:
    """Four pictures in two views of 16 px (maps of 2 x 2) and small ones of 8 px (1 x 1), with two slots for positions."""
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(4, 3, size, size, dtype=torch.float64, generator=generator) for size in [16, 16] + [8] * small_views]
    positions = torch.tensor([[[0, 3], [1, 1]], [[2, -1], [3, 2]], [[-1, -1], [0, 2]], [[1, 2], [-1, 0]]])
    small = torch.tensor([[[0, -1]], [[0, -1]], [[-1, -1]], [[0, -1]]]).expand(-1, small_views, -1)
    return views, torch.cat([positions, small], 1)


def sharpened(z: Tensor, temperature: float) -> Tensor:
    return (z / temperature).exp() / (z / temperature).exp().sum(-1, keepdim=True)


def distance(method: str, p: Tensor, goals: Tensor, i: int) -> Tensor:
    """Of the prediction p [d] from goal i of [b d]; DINO's centres are zero in the first step."""
    if method == "dino":
        return -(sharpened(goals[i], 0.04) * sharpened(p, 0.1).log()).sum()
    cosines = (goals * p).sum(-1) / (p.norm() * goals.norm(dim=-1))
    if method == "byol":
        return 2 - 2 * cosines[i]
    return 2 * 0.5 * ((cosines / 0.5).exp().sum().log() - cosines[i] / 0.5)  # InfoNCE at temperature 0.5


def outputs(network: Network, x: Tensor, view: int, local: bool) -> Tensor:
    predictors = network.local_predictors if local else network.predictors
    return predictors[min(view // 2, len(predictors) - 1)].vectors(x) if predictors else x


def reference(model: CoSsl, method: str, views: list[Tensor], positions: Tensor) -> dict[str, Tensor]:
    """The method of the docstring, pair by pair, picture by picture, position by position; all networks in train mode."""
    online, target, config, b = model.online, model.target, model.loss, len(views[0])
    scale = 1 if method == "dino" else 2
    g2, g2_target = online.local_projector, target.local_projector
    terms: dict[str, list[Tensor]] = {"global": [], "local_to_global": [], "global_to_local": []}
    for v, w in [(v, w) for v in range(len(views)) for w in (0, 1)]:
        maps, maps_target = online.backbone.maps(views[v]), [y.detach() for y in target.backbone.maps(views[w])]
        pooled, pooled_target = online.pool(maps[-1]), target.pool(maps_target[-1]).detach()
        z, z_target = online.projector.vectors(pooled), target.projector.vectors(pooled_target).detach()
        goals = outputs(target, z_target, w, local=False).detach()
        if v != w:
            p = outputs(online, z, v, local=False)
            terms["global"].append(torch.stack([distance(method, p[i], goals, i) for i in range(b)]).mean())
        if (v == w) != (config.local_views == "same") or (v > 1 and not config.small_views):
            continue
        y, y_target = (F.avg_pool2d(m[online.stage - 1], 2, 1) if online.grid else m[online.stage - 1] for m in (maps, maps_target))
        if config.local_target == "local_head":
            goals = outputs(target, g2_target.vectors(pooled_target), w, local=True).detach()
        own, other = (positions[:, view, : m.shape[-1] ** 2] for view, m in ((v, y), (w, y_target)))
        p_local = outputs(online, g2(y, own), v, local=True)
        p_pooled = outputs(online, g2.vectors(pooled) if online.stage == 4 else z, v, local=True)
        goals_local = outputs(target, g2_target(y_target, other), w, local=True).detach()
        to_global, to_local = [], []
        for i in range(b):
            mine = [distance(method, p_local[i, k], goals, i) for k in range(own.shape[1]) if own[i, k] >= 0]
            to_global += [torch.stack(mine).mean()] if mine else []
            slots = [k for k in range(other.shape[1]) if other[i, k] >= 0]
            among = {k: [j for j in range(b) if other[j, k] >= 0] for k in slots}  # the keys of slot k
            theirs = [distance(method, p_pooled[i], goals_local[among[k], k], among[k].index(i)) for k in slots]
            to_local += [torch.stack(theirs).mean()] if theirs else []
        terms["local_to_global"].append(torch.stack(to_global).mean())
        terms["global_to_local"].append(torch.stack(to_local).mean())
    ours = {name: scale * sum(pairs) / len(pairs) for name, pairs in terms.items()}
    a, weight = config.local_to_global, config.local_weight
    local = 2 * (a * ours["local_to_global"] + (1 - a) * ours["global_to_local"])
    ours["loss"] = (1 - weight) * ours["global"] + weight * local if config.combine == "convex" else ours["global"] + weight * local
    return ours


CASES: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [  # method, small views, loss, model
    ("byol", 0, {}, {}),
    ("byol", 0, {"local_target": "local_head", "local_to_global": 0.2}, {"local_head": "mlp2"}),
    ("byol", 0, {"combine": "additive", "local_weight": 0.5, "local_to_global": 0.8}, {"mlp_after_pool": 0}),
    ("byol", 0, {"local_target": "local_head"}, {"shared_heads": True, "mlp_after_pool": 1}),
    ("byol", 0, {"local_views": "same", "local_to_global": 0.2}, {"local_head": "mlp3", "head_norm": "layer"}),
    ("byol", 0, {"local_views": "same", "local_target": "local_head"}, {"local_head": "conv1x1_deep"}),
    ("byol", 0, {}, {"local_stage": 3, "local_grid": 3}),
    ("byol", 2, {}, {"predictors": "per_size"}),
    ("byol", 1, {"small_views": False}, {}),
    ("dino", 0, {}, {"head_norm": "none"}),
    ("dino", 2, {"local_target": "local_head", "local_to_global": 0.2}, {"head_norm": "none"}),
    ("mocov3", 0, {"temperature": 0.5}, {"output_norm": True}),
    ("mocov3", 1, {"temperature": 0.5, "local_target": "local_head", "local_to_global": 0.8}, {"predictors": "per_size"}),
]


@pytest.mark.parametrize(("method", "small_views", "loss", "changes"), CASES)
def test_loss_and_gradients_equal_the_method(method: str, small_views: int, loss: dict[str, Any], changes: dict[str, Any]) -> None:
    model = make(LossConfig(**loss), method=method, **changes)
    views, positions = batch(small_views=small_views)
    twin = copy.deepcopy(model)
    expected, ours = reference(twin, method, views, positions), model(views, positions)
    assert {name: ours[name].item() for name in expected} == pytest.approx({name: term.item() for name, term in expected.items()})
    gradients = torch.autograd.grad(expected["loss"], list(twin.online.parameters()))
    torch.testing.assert_close(torch.autograd.grad(ours["loss"], list(model.online.parameters())), gradients)


@pytest.mark.parametrize("method", OBJECTIVES)
def test_swapping_the_views_changes_nothing(method: str) -> None:
    model = make(LossConfig(), method=method)
    views, positions = batch()
    ours, swapped = copy.deepcopy(model)(views, positions), model(views[::-1], positions.flip(1))
    swapped["features"] = swapped["features"].flip(0)
    torch.testing.assert_close(ours, swapped)


@pytest.mark.parametrize("method", OBJECTIVES)
def test_joint_views_are_the_same_function_where_norms_do_not_follow_the_batch(method: str) -> None:
    views, positions = batch(small_views=2)
    one_by_one, joint = (make(LossConfig(), method=method, joint_views=joint).eval() for joint in (False, True))
    torch.testing.assert_close(one_by_one(views, positions), joint(views, positions))
    joint.train()(views, positions)
    assert (joint.online.backbone.bn1.num_batches_tracked, joint.target.backbone.bn1.num_batches_tracked) == (2, 1)


def test_dinos_centres_follow_each_kind_of_output() -> None:
    """Each by its own valid outputs alone: after one step from 0 the centre is 0.1 times their mean."""
    model = make(LossConfig(local_target="local_head"), method="dino", head_norm="none")
    views, positions = batch()
    seen = [model.target.pool(model.target.backbone(x)) for x in views]
    maps = [model.target.backbone(x) for x in views]
    prototypes, local = model.target.predictors[0], model.target.local_predictors[0]
    of_global = torch.cat([prototypes.vectors(model.target.projector.vectors(Y)) for Y in seen])
    of_pooled = torch.cat([local.vectors(model.target.local_projector.vectors(Y)) for Y in seen])
    at = [positions[:, v] for v in (0, 1)]
    of_local = torch.cat([local.vectors(model.target.local_projector(maps[v], at[v]))[at[v] >= 0] for v in (0, 1)])
    model(views, positions)
    means = torch.stack([each.mean(0) for each in (of_global, of_local, of_pooled)])
    torch.testing.assert_close(model.objective.centre, 0.1 * means)
    before = model.objective.centre.clone()
    first = model(views, positions)["global"]
    model.objective.centre[0] += 1  # the same for all prototypes: a softmax does not see it
    torch.testing.assert_close(model.objective.centre[0], 0.9 * before[0] + 0.1 * means[0] + 1)
    model.objective.centre.copy_(before)
    model.objective.centre[0, 0] += 1
    assert model(views, positions)["global"].item() != pytest.approx(first.item())


def test_terms_are_summed_over_views_not_averaged() -> None:
    """Both views equal and both networks equal but for the predictor: each view gives the same term, so the sum is twice one."""
    model = make(LossConfig())
    views, positions = batch()
    views, positions = [views[0], views[0]], positions[:, :1].expand(-1, 2, -1)
    one = model.online.predictors[0].vectors(model.online.projector.vectors(model.represent(views[0])))
    z = model.target.projector.vectors(model.target.pool(model.target.backbone(views[0])))
    assert model(views, positions)["global"].item() == pytest.approx(
        2 * torch.stack([distance("byol", one[i], z, i) for i in range(4)]).mean().item()
    )


def test_plain_byol_has_no_local_heads_and_ignores_positions() -> None:
    model = make(LossConfig(local_weight=0.0))
    assert model.online.local_projector is None
    assert not [name for name, _ in model.named_parameters() if "local" in name]
    views, positions = batch()
    terms = model(views, positions)
    assert set(terms) == {"loss", "global", "std", "covariance", "features"}
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
    expected = reference(make(LossConfig(local_to_global=share)), "byol", views, positions)
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
        for predictors in (model.online.predictors, model.online.local_predictors):
            assert not hasattr(predictors[0].layers[-1], "running_mean")


def test_shared_heads_are_one_module_in_both_networks() -> None:
    model = make(LossConfig(), shared_heads=True)
    assert model.online.local_projector is model.online.projector
    assert model.online.local_predictors is model.online.predictors
    assert model.target.local_projector is model.target.projector
    assert model.target.projector is not model.online.projector


def test_target_starts_as_the_online_network_without_predictors() -> None:
    model = CoSsl(TINY, LossConfig())
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
    assert not any(terms[name].requires_grad for name in ("std", "covariance", "features"))
    assert {name for name, term in terms.items() if term.ndim} == {"covariance", "features"}


@pytest.mark.parametrize("directions", [1, 2, 5])
def test_effective_rank_counts_directions(directions: int) -> None:
    z = torch.randn(4000, directions).sign() @ torch.linalg.qr(torch.randn(16, directions))[0].T
    assert co_ssl.effective_rank(co_ssl.covariance(z)) == pytest.approx(directions, rel=0.02)
    narrow = z + 0.002 * torch.randn(4000, 16)
    assert has_collapsed(1.0, co_ssl.effective_rank(co_ssl.covariance(narrow))) == (directions == 1)
    assert has_collapsed(co_ssl.spread(5 + 0.1 * torch.randn(4000, 16)).item(), 16)


def test_represent_is_the_pooled_vector_of_the_online_network() -> None:
    model = make(LossConfig(), mlp_after_pool=0).eval()
    (x, _), _ = batch()
    torch.testing.assert_close(model.represent(x), model.online.backbone(x).mean((2, 3)))
    assert not torch.equal(make(LossConfig()).eval().represent(x), model.represent(x))


def test_a_few_steps_lower_the_loss() -> None:
    torch.manual_seed(0)
    model = CoSsl(TINY, LossConfig())
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


COMPILED = [("byol", head, 0, True) for head in HEADS] + [
    ("byol", "conv1x1", 1, False),
    ("dino", "mlp2", 1, True),
    ("mocov3", "mlp2", 0, True),
]


@pytest.mark.parametrize(("method", "head", "small_views", "short"), COMPILED)
def test_forward_and_loss_compile_to_one_graph_once(method: str, head: str, small_views: int, short: bool) -> None:
    torch._dynamo.reset()
    model = make(LossConfig(local_target="local_head"), method=method, local_head=head)
    for backbone in (model.online.backbone, model.target.backbone):  # tracing blocks is what takes the time
        for stage in (1, 2, 3, 4):
            small = nn.Conv2d(backbone.channels(max(1, stage - 1)), backbone.channels(stage), 1, 1 if stage == 1 else 2).double()
            setattr(backbone, f"layer{stage}", small if short else getattr(backbone, f"layer{stage}")[:1])
    views, positions = batch(small_views)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="eager" if short else "aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            expected, ours = model(views, positions), compiled(views, positions)
            torch.testing.assert_close(ours, expected)
            for each, terms in ((model, expected), (twin, ours)):
                terms["loss"].backward()
                each.update_target_(0.9)
        gradients = [[p.grad for p in each.online.parameters()] for each in (model, twin)]
        torch.testing.assert_close(*gradients)


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


@pytest.mark.parametrize("method", OBJECTIVES)
def test_terms_and_covariance_are_single_precision_under_autocast(method: str) -> None:
    """In bf16 a line's effective rank would be 16 instead of 2, and sums over a window would lose their last digits."""
    torch.manual_seed(0)
    model = CoSsl(ModelConfig(**(vars(TINY) | {"method": method, "width": 16, "out_dim": 16})), LossConfig())
    views, positions = batch()
    with torch.autocast("cpu", torch.bfloat16):
        terms = model([view.float() for view in views], positions)
        line = co_ssl.covariance(torch.randn(64, 1) * torch.randn(1, 16) + 0.002 * torch.randn(64, 16))
    assert {name: term.dtype for name, term in terms.items() if name != "features"} == {
        name: torch.float32 for name in terms if name != "features"
    }
    assert co_ssl.effective_rank(line) < 4
    p, z = torch.randn(8, 1, 16), torch.randn(8, 1, 16)
    with torch.autocast("cpu", torch.bfloat16):
        low = model.objective(p, z, torch.ones(8, 1, dtype=torch.bool))
    torch.testing.assert_close(low, model.objective(p, z, torch.ones(8, 1, dtype=torch.bool)), rtol=0, atol=0)
