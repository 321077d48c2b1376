"""Projector and predictor variants: what they compute, what they look at, what they cost."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cossl.models.co_ssl import CoSsl, LossConfig, ModelConfig
from cossl.models.heads import HEADS, NORMS, MapHead, PositionHead, gather_positions, mlp, predictor_kind, transfer_state

WHOLE_MAP = {"conv1x1": True, "conv1x1_deep": True, "conv3x3": True, "mlp2": False, "mlp3": False, "linear": False}


def test_every_head_says_where_its_norms_look() -> None:
    assert WHOLE_MAP.keys() == HEADS.keys()


def test_gather_reads_row_times_n_plus_column() -> None:
    y = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4).float()
    row, column = 2, 1
    gathered = gather_positions(y, torch.tensor([[row * 4 + column, -1], [15, 0]]))
    assert torch.equal(gathered[0, 0], y[0, :, row, column])
    assert torch.equal(gathered[0, 1], y[0, :, 0, 0])
    assert torch.equal(gathered[1, 0], y[1, :, 3, 3])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", HEADS)
def test_head_shapes(name: str, norm: str) -> None:
    head = HEADS[name](6, 8, 4, False, norm)
    positions = torch.tensor([[0, 3, -1], [8, 8, 2]])
    assert head(torch.randn(2, 6, 3, 3), positions).shape == (2, 3, 4)
    assert head.vectors(torch.randn(2, 6)).shape == (2, 4)
    assert head.vectors(torch.randn(2, 5, 6)).shape == (2, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(torch.randn(2, 6, 3, 3), positions).dtype == torch.bfloat16


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", HEADS)
def test_head_gives_the_same_at_a_position_and_on_its_vector(name: str, norm: str) -> None:
    """All but the one that looks at the neighbours."""
    head = HEADS[name](6, 8, 4, False, norm).double().eval()
    y = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    at_position, on_vector = head(y, torch.tensor([[4], [7]]))[1, 0], head.vectors(y[:, :, 2, 1])[1]
    assert torch.allclose(at_position, on_vector) == (name != "conv3x3")


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("output_norm", [False, True])
def test_a_1x1_convolution_is_a_per_position_mlp(num_layers: int, norm: str, channels_last: bool, output_norm: bool) -> None:
    """All positions, equal weights, train mode: equal outputs, gradients and running statistics."""
    conv = MapHead(6, 8, 4, output_norm, norm, num_layers).double()
    per_position = PositionHead(6, 8, 4, output_norm, norm, num_layers).double()
    for parameter in conv.parameters():
        nn.init.normal_(parameter)
    transfer_state(conv, per_position)
    y = torch.randn(3, 6, 4, 4, dtype=torch.float64)
    if channels_last:
        y = y.contiguous(memory_format=torch.channels_last)
    positions = torch.arange(16).expand(3, 16)
    direction = torch.randn(3, 16, 4, dtype=torch.float64)
    gradients = []
    for head in (conv, per_position):
        x = y.clone().requires_grad_(True)
        out = head(x, positions)
        gradients.append((out, *torch.autograd.grad((out * direction).sum(), [x, *head.parameters()])))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.flatten(), theirs.flatten(), rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(conv.buffers(), per_position.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_the_variants_of_the_ablation_are_what_their_names_say() -> None:
    layers = {name: [type(layer).__name__ for layer in HEADS[name](6, 8, 4, False, "batch").layers] for name in HEADS}
    conv, dense = ["Conv2d", "BatchNorm2d", "ReLU"], ["Linear", "BatchNorm1d", "ReLU"]
    assert layers["conv1x1"] == layers["conv3x3"] == [*conv, "Conv2d"]
    assert layers["conv1x1_deep"] == conv * 3 + ["Conv2d"]
    assert layers["mlp2"] == [*dense, "Linear"]
    assert layers["mlp3"] == dense * 2 + ["Linear"]
    assert layers["linear"] == ["Linear"]
    assert [tuple(p.shape) for p in HEADS["conv3x3"](6, 8, 4, False, "batch").parameters() if p.ndim == 4] == [(8, 6, 3, 3), (4, 8, 1, 1)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", HEADS)
def test_what_the_output_depends_on(name: str, norm: str) -> None:
    """Batch norms of heads on the whole map see positions that were not sampled; layer norms see no other position at all."""
    y = torch.randn(4, 6, 3, 3)
    changed = y.clone()
    changed[:, :, 2, 2] += 100
    positions = torch.tensor([[0, 1, 3]]).expand(4, 3)  # none of them touches the changed one
    head = HEADS[name](6, 8, 4, False, norm)
    looks_elsewhere = WHOLE_MAP[name] and norm == "batch"
    assert torch.allclose(head(y, positions), head(changed, positions), atol=1e-4) == (not looks_elsewhere)


@pytest.mark.parametrize("name", HEADS)
def test_what_a_position_sees(name: str) -> None:
    """By the gradient: the position alone, or it and its neighbours."""
    y = torch.randn(1, 6, 5, 5, requires_grad=True)
    HEADS[name](6, 8, 4, False, "layer")(y, torch.tensor([[12]])).sum().backward()
    seen = (y.grad.abs().sum(1)[0] > 0).int()
    expected = torch.zeros(5, 5, dtype=torch.int)
    reach = 1 if name == "conv3x3" else 0
    expected[2 - reach : 3 + reach, 2 - reach : 3 + reach] = 1
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("name", HEADS)
def test_sampling_before_projecting_costs_its_share(name: str) -> None:
    """16 of 49 positions: 16/49 of the work where the head comes after the gather, all of it where it works on the map."""
    head, y = HEADS[name](64, 128, 32, False, "batch"), torch.randn(2, 64, 7, 7)
    work = []
    for positions in (torch.arange(49).expand(2, 49), torch.arange(16).expand(2, 16)):
        with FlopCounterMode(display=False) as counter:
            head(y, positions)
        work.append(counter.get_total_flops())
    assert work[1] / work[0] == pytest.approx(1 if WHOLE_MAP[name] else 16 / 49)


@pytest.mark.parametrize("name", [name for name in HEADS if WHOLE_MAP[name]])
@pytest.mark.parametrize("norm", NORMS)
def test_maps_stay_channels_last(name: str, norm: str) -> None:
    head = HEADS[name](8, 16, 8, True, norm).to(memory_format=torch.channels_last)
    layouts = []
    for layer in head.layers:
        layer.register_forward_hook(lambda module, _, y: layouts.append(y.is_contiguous(memory_format=torch.channels_last)))
    head(torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last), torch.zeros(2, 1, dtype=torch.int64))
    assert len(layouts) == len(head.layers)
    assert all(layouts)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("shared_heads", [False, True])
def test_every_parameter_of_every_variant_learns(name: str, norm: str, shared_heads: bool) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        backbone="rf_resnet18",
        receptive_field=29,
        width=8,
        mlp_after_pool=0,
        hidden_dim=16,
        out_dim=8,
        local_head=name,
        head_norm=norm,
        shared_heads=shared_heads,
    )
    model = CoSsl(config, LossConfig())
    positions = torch.tensor([[[0, 5, 9]] * 2] * 4)
    terms = model([torch.randn(4, 3, 32, 32) for _ in range(2)], positions)
    terms["loss"].backward()
    assert torch.isfinite(terms["loss"])
    for part in (model.online.local_projector, model.online.local_predictors, model.online.projector, model.online.predictors):
        for parameter_name, parameter in part.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", HEADS)
def test_every_variant_compiles_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    head = HEADS[name](6, 8, 4, True, "batch")
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    y = torch.randn(2, 6, 3, 3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for positions in (torch.tensor([[0, 3, -1], [8, 8, 2]]), torch.tensor([[1, 1, 1], [-1, -1, 4]])):
            torch.testing.assert_close(compiled(y, positions), head(y, positions))


def test_a_predictor_has_no_neighbours_to_look_at() -> None:
    assert predictor_kind("conv3x3") == "conv1x1"
    assert all(predictor_kind(name) == name for name in HEADS if name != "conv3x3")


@pytest.mark.parametrize("name", HEADS)
def test_output_norm_centres_and_scales_each_dimension(name: str) -> None:
    y, positions = torch.randn(8, 6, 3, 3), torch.arange(9).expand(8, 9)
    plain, normed = (HEADS[name](6, 8, 4, output_norm)(y, positions).flatten(0, 1) for output_norm in (False, True))
    assert not torch.allclose(plain.mean(0), torch.zeros(4), atol=1e-3)
    torch.testing.assert_close(normed.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(normed.var(0, correction=0), torch.ones(4), atol=1e-3, rtol=0)


def test_mlp_is_byols() -> None:
    linear, norm, relu, last = mlp(5, 7, 3)
    assert (linear.in_features, linear.out_features, norm.num_features, last.out_features) == (5, 7, 7, 3)
    assert linear.bias is not None
    assert isinstance(relu, nn.ReLU)
    assert last.bias is None
    assert [type(layer) for layer in mlp(5, 7, 3, 3)] == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear]
    assert [tuple(p.shape) for p in mlp(5, 7, 3, 1).parameters()] == [(3, 5)]
