"""Backbones and heads."""

import pytest
import torch
import torchvision
from torch import Tensor, nn

from cossl.models.heads import HEADS, gather_positions, mlp, transfer_state
from cossl.models.rf_resnet import BACKBONES, make_backbone, position_grid, rf_resnet18, rf_resnet50


def own_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("fc.")}


@pytest.mark.parametrize("name", BACKBONES)
def test_state_has_torchvisions_names(name: str) -> None:
    reference = own_state(getattr(torchvision.models, name.removeprefix("rf_"))(weights=None))
    with torch.device("meta"):
        state = make_backbone(name, None, 64, small_image_stem=False).state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in reference.items()}


@pytest.mark.parametrize("name", ["rf_resnet18", "resnet18"])
def test_unrestricted_resnet18_computes_what_torchvisions_does(name: str) -> None:
    reference = torchvision.models.resnet18(weights=None).eval()
    backbone = make_backbone(name, None, 64, small_image_stem=False).eval()
    backbone.load_state_dict(own_state(reference))
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(reference.fc(backbone(x).mean((2, 3))), reference(x))


def test_initial_weights_follow_fan_out() -> None:
    for backbone in (rf_resnet18(29, width=32), make_backbone("resnet18", None, 64, small_image_stem=True)):
        for conv in (backbone.conv1, backbone.layer2[0].conv2):
            fan_out = conv.out_channels * conv.kernel_size[0] ** 2
            assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


def test_width_scales_every_stage() -> None:
    backbone = rf_resnet50(99, width=16)
    assert backbone.out_channels == 512
    assert [stage[0].conv1.out_channels for stage in backbone.stages] == [16, 32, 64, 128]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in rf_resnet50(99).parameters())
    assert parameters == 23_508_032 - 9_437_184  # torchvision's, less what the 3x3 of stages 3 and 4 lose


def test_map_of_channels_last_pictures_stays_channels_last() -> None:
    backbone = rf_resnet18(29, width=8).to(memory_format=torch.channels_last)
    y = backbone(torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last))
    assert y.shape == (2, 64, 4, 4)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet51", None, 64, None), "backbone='resnet51' is unknown; choose one of rf_resnet50"),
        (("resnet50", 99, 64, None), "receptive_field=99 px is not possible for resnet50, whose receptive field is 427 px"),
        (("resnet50", None, 16, None), "width=16 is not possible for resnet50"),
        (("rf_resnet18", 29, 0, None), "width=0"),
        (("rf_resnet18", 29, 64, False), "ImageNet stem; choose one of 11, 19"),
    ],
)
def test_impossible_backbone_says_what_is_possible(arguments: tuple[str, int | None, int, bool | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_backbone(*arguments)


def test_plain_backbone_takes_its_true_receptive_field() -> None:
    assert position_grid(make_backbone("resnet18", 435, 64, None), 64).receptive_field_px == 435


def test_gather_reads_row_times_n_plus_column() -> None:
    y = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4).float()
    row, column = 2, 1
    gathered = gather_positions(y, torch.tensor([[row * 4 + column, -1], [15, 0]]))
    assert torch.equal(gathered[0, 0], y[0, :, row, column])
    assert torch.equal(gathered[0, 1], y[0, :, 0, 0])
    assert torch.equal(gathered[1, 0], y[1, :, 3, 3])


@pytest.mark.parametrize("name", HEADS)
def test_head_shapes(name: str) -> None:
    head = HEADS[name](6, 8, 4, False)
    positions = torch.tensor([[0, 3, -1], [8, 8, 2]])
    assert head(torch.randn(2, 6, 3, 3), positions).shape == (2, 3, 4)
    assert head.vectors(torch.randn(2, 6)).shape == (2, 4)
    assert head.vectors(torch.randn(2, 5, 6)).shape == (2, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(torch.randn(2, 6, 3, 3), positions).dtype == torch.bfloat16


@pytest.mark.parametrize("name", HEADS)
def test_head_gives_the_same_at_a_position_and_on_its_vector(name: str) -> None:
    head = HEADS[name](6, 8, 4, False).double().eval()
    y = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(head(y, torch.tensor([[4], [7]]))[1, 0], head.vectors(y[:, :, 2, 1])[1])


@pytest.mark.parametrize("other", sorted(HEADS.keys() - {"conv1x1"}))
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("output_norm", [False, True])
def test_conv1x1_is_a_per_position_mlp(other: str, channels_last: bool, output_norm: bool) -> None:
    """All positions, equal weights, train mode: equal outputs, gradients and running statistics."""
    conv, per_position = HEADS["conv1x1"](6, 8, 4, output_norm).double(), HEADS[other](6, 8, 4, output_norm).double()
    nn.init.normal_(conv.layers[1].weight)
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
        torch.testing.assert_close(ours.flatten(), theirs.flatten(), rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(conv.buffers(), per_position.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_only_mlp2_takes_its_statistics_from_the_sampled_positions() -> None:
    y = torch.randn(4, 6, 3, 3)
    changed = y.clone()
    changed[:, :, 2, 2] += 100
    positions = torch.tensor([[0, 1, 4]]).expand(4, 3)
    for name, same in (("conv1x1", False), ("mlp2", True)):
        head = HEADS[name](6, 8, 4, False)
        assert torch.allclose(head(y, positions), head(changed, positions), atol=1e-4) == same


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
