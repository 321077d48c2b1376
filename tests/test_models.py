"""Backbones and heads."""

import pytest
import torch
import torchvision
from torch import Tensor, nn

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
