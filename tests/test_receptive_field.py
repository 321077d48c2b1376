"""The receptive field of a position, by recurrence and by which pixels its gradient reaches."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cossl.models.rf_resnet import (
    BACKBONES,
    ResNet,
    bagnet,
    pool_to,
    position_grid,
    reachable_fields,
    rf_resnet18,
    rf_resnet34,
    rf_resnet50,
    rf_resnet101,
    torchvision_resnet18,
    torchvision_resnet50,
)

RF50 = [11, 19, 27, 35, 51, 67, 83, 99, 131, 163, 195, 227, 259, 291, 355, 419, 483]
RF18 = [3, 5, 7, 9, 11, 13, 17, 21, 25, 29, 37, 45, 53, 61, 77, 93, 109]


def reached(backbone: ResNet, view_px: int, position: int, stage: int = 4, side: int = 0) -> Tensor:
    """Which pixels [s s] the position (position, position) reads: those its gradient reaches where nothing can cancel or block it."""
    backbone = backbone.double().eval()
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    if isinstance(backbone.maxpool, nn.MaxPool2d):  # a maximum passes the gradient of one pixel alone
        backbone.maxpool = nn.AvgPool2d(3, 2, padding=1)
    x = torch.ones(1, 3, view_px, view_px, dtype=torch.float64, requires_grad=True)
    pool_to(backbone.maps(x)[stage - 1], side)[0, :, position, position].sum().backward()
    assert x.grad is not None
    return x.grad[0].sum(0) != 0


def box(backbone: ResNet, view_px: int, position: int, stage: int = 4, side: int = 0) -> Tensor:
    """The pixels [s s] of the position's receptive field as the position grid states it."""
    grid = position_grid(backbone, view_px, stage, side)
    centre = grid.offset_px + position * grid.stride_px
    first, last = centre - grid.receptive_field_px / 2, centre + grid.receptive_field_px / 2
    assert 0 <= first < last <= view_px, "the test wants a position away from the border"
    inside = torch.zeros(view_px, view_px, dtype=torch.bool)
    inside[int(first) : int(last), int(first) : int(last)] = True
    return inside


@pytest.mark.parametrize("receptive_field", RF50)
def test_recurrence_gives_the_asked_field_resnet50(receptive_field: int) -> None:
    assert position_grid(rf_resnet50(receptive_field, width=4), 224) == (7, 32, receptive_field, 0.5, 224)


@pytest.mark.parametrize("receptive_field", RF18)
def test_recurrence_gives_the_asked_field_resnet18(receptive_field: int) -> None:
    assert position_grid(rf_resnet18(receptive_field, width=4), 64) == (8, 8, receptive_field, 0.5, 64)


@pytest.mark.parametrize("name", ["rf_resnet18", "rf_resnet34", "rf_resnet50", "rf_resnet101", "bagnet"])
def test_every_field_that_is_said_to_be_reachable_is(name: str) -> None:
    fields = reachable_fields(name)
    for field in fields:
        with torch.device("meta"):
            assert position_grid(BACKBONES[name](field, width=4), 224).receptive_field_px == field
    assert fields == {"rf_resnet18": RF18, "rf_resnet50": RF50, "bagnet": [3, 5, 9, 17, 33]}.get(name, fields)
    assert not reachable_fields("resnet50")


def test_deeper_networks_have_the_fields_of_their_docstrings() -> None:
    stages = list(range(3, 16, 2)), list(range(17, 46, 4)), list(range(49, 138, 8)), [145, 161, 177, 193, 209, 225]
    assert reachable_fields("rf_resnet34") == [field for stage in stages for field in stage]
    stages = [11, 19, 27], list(range(35, 84, 16)), list(range(99, 836, 32)), [899, 963, 1027]
    assert reachable_fields("rf_resnet101") == [field for stage in stages for field in stage]


def test_unrestricted_and_plain_networks_have_their_published_fields() -> None:
    assert position_grid(torchvision_resnet50(), 224).receptive_field_px == 427
    assert position_grid(torchvision_resnet18(), 224).receptive_field_px == 435
    assert position_grid(torchvision_resnet18(small_image_stem=True), 64) == (8, 8, 109, 0.5, 64)
    with torch.device("meta"):
        for name, field in {"resnet34": 899, "resnet101": 971, "rf_resnet101": 1027}.items():
            assert position_grid(BACKBONES[name](0), 224).receptive_field_px == field
    for unrestricted in (None, 0):
        assert position_grid(rf_resnet50(unrestricted, width=4), 224).receptive_field_px == 483


@pytest.mark.parametrize(
    ("build", "receptive_field", "small_image_stem", "view_px", "position"),
    [
        (rf_resnet50, 99, False, 224, 3),
        (rf_resnet50, 11, False, 96, 1),
        (rf_resnet50, 131, False, 256, 4),
        (rf_resnet18, 29, True, 64, 4),
        (rf_resnet18, 13, True, 64, 3),
        (rf_resnet18, 99, False, 224, 3),
        (rf_resnet18, 109, True, 128, 8),
        (rf_resnet34, 29, True, 64, 4),
        (rf_resnet34, 99, False, 224, 3),
        (rf_resnet101, 99, False, 224, 3),
        (rf_resnet101, 131, False, 256, 4),
        (bagnet, 9, True, 64, 4),
        (bagnet, 17, True, 64, 4),
        (bagnet, 33, True, 64, 4),
    ],
)
def test_gradient_reaches_every_pixel_of_the_field_and_no_other(
    build: Callable[..., ResNet], receptive_field: int, small_image_stem: bool, view_px: int, position: int
) -> None:
    backbone = build(receptive_field, width=4, small_image_stem=small_image_stem)
    expected = box(backbone, view_px, position)
    assert int(expected.sum()) == receptive_field**2
    assert torch.equal(reached(backbone, view_px, position), expected)


@pytest.mark.parametrize(
    ("build", "receptive_field", "view_px", "stage", "side", "position", "expected"),
    [
        (rf_resnet50, 99, 256, 2, 0, 15, 99),  # stage 2 is where 99 px are reached
        (rf_resnet50, 99, 256, 1, 0, 20, 35),
        (rf_resnet50, 67, 224, 4, 6, 2, 67 + 32),  # 7 positions in windows of 2: 6
        (rf_resnet50, 67, 224, 4, 3, 1, 67 + 2 * 32),  # windows of 3, two apart
        (rf_resnet18, 29, 64, 3, 4, 1, 29 + 3 * 4),  # 16 positions in windows of 4
    ],
)
def test_an_earlier_stage_or_a_pooled_grid_sees_what_its_grid_says(
    build: Callable[..., ResNet], receptive_field: int, view_px: int, stage: int, side: int, position: int, expected: int
) -> None:
    backbone = build(receptive_field, width=4)
    field = box(backbone, view_px, position, stage, side)
    assert int(field.sum()) == expected**2
    assert torch.equal(reached(backbone, view_px, position, stage, side), field)


@pytest.mark.parametrize("n", [1, 3, 7, 8])
def test_pooled_grids_have_the_asked_side_and_cover_the_map(n: int) -> None:
    for side in range(n + 2):
        y = torch.ones(1, 2, n, n, requires_grad=True)
        pooled = pool_to(y, side)
        assert pooled.shape[-1] == (n if side == 0 else min(side, n))
        pooled.sum().backward()
        assert y.grad is not None
        assert (y.grad > 0).all()
        torch.testing.assert_close(pooled, torch.ones_like(pooled))


def test_kept_kernels_override_the_receptive_field() -> None:
    # BagNet-like, from method.md A.4: (3, 2, 1, 0) kept per stage gives 99 as well; then one that leaves holes in its field.
    kept = (True,) * 3 + (True, True, False, False) + (True,) + (False,) * 5 + (False,) * 3
    assert position_grid(rf_resnet50(11, width=4, kept_kernels=kept), 224).receptive_field_px == 99
    backbone = rf_resnet18(3, width=4, kept_kernels=(False,) * 15 + (True,))
    assert position_grid(backbone, 64).receptive_field_px == 3 + 2 * 8
    rows = reached(backbone, 64, 3).any(1).nonzero()
    assert (int(rows.min()), int(rows.max())) == (24 - 9, 24 + 9)
    with pytest.raises(ValueError, match="17 entries; rf_resnet50 has 16"):
        rf_resnet50(99, width=4, kept_kernels=(*kept, False))


@pytest.mark.parametrize(("build", "view_px"), [(rf_resnet50, 224), (rf_resnet50, 97), (rf_resnet18, 64), (rf_resnet18, 35), (bagnet, 61)])
def test_grid_size_is_the_size_of_the_map(build: Callable[..., ResNet], view_px: int) -> None:
    backbone = build(width=4).eval()
    y = backbone(torch.zeros(1, 3, view_px, view_px))
    assert y.shape[1:] == (backbone.out_channels, *[position_grid(backbone, view_px).size] * 2)


@pytest.mark.parametrize("asked", [100, 1, 484, -1])
def test_unreachable_field_lists_the_reachable(asked: int) -> None:
    with pytest.raises(ValueError, match=f"receptive_field={asked} px cannot be reached by rf_resnet50.*83, 99, 131"):
        rf_resnet50(asked)
    for build, listed in ((rf_resnet18, "25, 29, 37"), (rf_resnet34, "29, 33, 37"), (bagnet, "9, 17, 33")):
        with pytest.raises(ValueError, match=rf"small-image stem.*{listed}"):
            build(asked)
    with pytest.raises(ValueError, match=r"rf_resnet101 with the ImageNet stem.*899, 963, 1027"):
        rf_resnet101(asked)
