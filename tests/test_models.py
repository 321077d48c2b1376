"""Backbones and heads."""

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from cossl.models.rf_resnet import BACKBONES, bagnet, make_backbone, position_grid, rf_resnet18, rf_resnet50


def own_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("fc.")}


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "bagnet"])
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


def test_torchvisions_resnet50_state_loads_and_comes_back() -> None:
    reference = torchvision.models.resnet50(weights=None).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = reference(x)
    for name, same in (("resnet50", True), ("rf_resnet50", False)):  # rf_resnet50 has its strides in the 1x1, torchvision in the 3x3
        backbone = make_backbone(name, None, 64, small_image_stem=False).eval()
        backbone.load_state_dict(own_state(reference))
        y = reference.fc(backbone(x).mean((2, 3)))
        assert torch.allclose(y, expected, rtol=1e-4, atol=1e-5) == same
        back = torchvision.models.resnet50(weights=None)
        missing, unexpected = back.load_state_dict(backbone.state_dict(), strict=False)
        assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
        assert all(torch.equal(tensor, own_state(reference)[key]) for key, tensor in own_state(back).items())


@pytest.mark.parametrize(
    ("depth", "with_classifier", "features"), [(18, 11.69e6, 512), (34, 21.80e6, 512), (50, 25.56e6, 2048), (101, 44.55e6, 2048)]
)
def test_parameters_are_the_published_less_the_classifier(depth: int, with_classifier: float, features: int) -> None:
    for name in (f"resnet{depth}", f"rf_resnet{depth}"):
        with torch.device("meta"):
            backbone = make_backbone(name, None, 64, small_image_stem=False)
        assert sum(p.numel() for p in backbone.parameters()) + features * 1000 + 1000 == pytest.approx(with_classifier, abs=5e3)


@pytest.mark.parametrize(("receptive_field", "published"), [(9, 15_688_744), (17, 16_213_032), (33, 18_310_184)])
def test_bagnet_has_the_published_parameters_and_is_a_kept_kernels_tuple_of_rf_resnet50(receptive_field: int, published: int) -> None:
    with torch.device("meta"):  # published (github.com/osmr/imgclsmob): with a classifier, and a 1x1 and a 64 channel 3x3 as the stem
        parameters = sum(p.numel() for p in bagnet(receptive_field).parameters())
    assert parameters == published - (2048 * 1000 + 1000) - (3 * 64 + 64 * 64 * 9 - 3 * 64 * 9)
    stay = (0, 3, 7, 13)[: {9: 2, 17: 3, 33: 4}[receptive_field]]
    ours = bagnet(receptive_field, width=8).double().eval()
    same = rf_resnet50(width=8, small_image_stem=True, kept_kernels=tuple(i in stay for i in range(16))).double().eval()
    same.load_state_dict(ours.state_dict())
    assert position_grid(same, 61) == position_grid(ours, 61)
    x = torch.randn(1, 3, 61, 61, dtype=torch.float64)
    torch.testing.assert_close(ours(x), same(x))


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


def test_recomputing_activations_changes_nothing_but_memory() -> None:
    torch.manual_seed(0)
    plain = rf_resnet18(29, width=8)
    thrifty = copy.deepcopy(plain)
    thrifty.recompute = True
    kept = []
    for backbone in (plain, thrifty):
        x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        with saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes) or tensor, lambda tensor: tensor):
            y = backbone(x)
        kept.append(-1)
        y.square().mean().backward()
    for ours, theirs in zip(thrifty.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in thrifty.state_dict().items())
    middle = kept.index(-1)
    assert sum(kept[middle + 1 : -1]) < 0.3 * sum(kept[:middle])
