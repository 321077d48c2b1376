"""ResNets whose receptive field is an argument, and torchvision's own as baselines; every one returns its feature map.

Symbols: n = positions per side of the feature map, k = kernel size, s = stride, p = padding,
j = jump = distance of two neighbouring positions in view pixels.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from cossl.models.recompute import recomputed


class PositionGrid(NamedTuple):
    """Where the n x n positions of a feature map lie in the view, in plain numbers; pixel centres are at +0.5."""

    size: int
    stride_px: int
    receptive_field_px: int
    offset_px: float
    view_px: int


class ResNet(nn.Module):
    """A ResNet without its pooling and classifier: pictures in, feature map out.

    The parts and the state's names are torchvision's, so that its weights load wherever the layers coincide.
    """

    def __init__(self, conv1: nn.Module, bn1: nn.Module, maxpool: nn.Module, stages: Sequence[nn.Module], out_channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu, self.maxpool = conv1, bn1, nn.ReLU(inplace=True), maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.out_channels = out_channels
        self.recompute = False  # keep the maps between blocks alone: what lies within a block is computed again in the backward pass

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        return self.layer1, self.layer2, self.layer3, self.layer4

    def channels(self, stage: int) -> int:
        """Channels of the map after stage 1, 2, 3 or 4: they double from one to the next."""
        return self.out_channels // 2 ** (4 - stage)

    def maps(self, x: Float[Tensor, "b 3 s s"]) -> list[Tensor]:
        """The feature map after each of the four stages."""
        y, maps = self.maxpool(self.relu(self.bn1(self.conv1(x)))), []
        for stage in self.stages:
            y = recomputed(stage, y) if self.recompute and torch.is_grad_enabled() else stage(y)
            maps.append(y)
        return maps

    def forward(self, x: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b c n n"]:
        return self.maps(x)[-1]


class _Layout(NamedTuple):
    """What tells one family from another. A block has one spatial convolution (bottleneck) or two."""

    name: str
    depths: tuple[int, int, int, int]
    bottleneck: bool
    strides: tuple[int, int, int, int] = (1, 2, 2, 2)
    stride_in_spatial: bool = False  # a stage's stride sits in its first 3x3, else in the 1x1 before it
    one_per_stage: bool = False  # only the first block of a stage may keep its 3x3
    small_image_stem: bool = False  # where none is asked for

    @property
    def spatial_per_block(self) -> int:
        return 1 if self.bottleneck else 2

    @property
    def num_spatial(self) -> int:
        return sum(self.depths) * self.spatial_per_block


_RESNET18 = _Layout("rf_resnet18", (2, 2, 2, 2), bottleneck=False, stride_in_spatial=True, small_image_stem=True)
_RESNET34 = _Layout("rf_resnet34", (3, 4, 6, 3), bottleneck=False, stride_in_spatial=True, small_image_stem=True)
_RESNET50 = _Layout("rf_resnet50", (3, 4, 6, 3), bottleneck=True)
_RESNET101 = _Layout("rf_resnet101", (3, 4, 23, 3), bottleneck=True)
_BAGNET = _Layout(
    "bagnet", (3, 4, 6, 3), bottleneck=True, strides=(2, 2, 2, 1), stride_in_spatial=True, one_per_stage=True, small_image_stem=True
)
_LAYOUTS = {layout.name: layout for layout in (_RESNET18, _RESNET34, _RESNET50, _RESNET101, _BAGNET)}


def rf_resnet50(
    receptive_field: int | None = 99,
    width: int = 64,
    small_image_stem: bool | None = None,
    kept_kernels: tuple[bool, ...] | None = None,
) -> ResNet:
    """A ResNet-50 in which a position of the feature map sees `receptive_field` pixels: 11 19 27 35 51 67 83 99 131 ... 483.

    The idea is CO-SSL's RF-ResNet (arXiv 2501.02860); the stride sits in the first 1x1 of a block, as in He et al. 2015
    (arXiv 1512.03385), which is what puts 99 at the end of stage 2. None or 0 leaves the receptive field unrestricted (483).
    Deviation: the paper's own block layout (23.7 M parameters) is not public. Here the first k 3x3 convolutions in depth order stay
    and the others become 1x1 of the same width: 14.07 M at 99 px, 22.47 M with the two-layer MLP after pooling. `kept_kernels`
    (one bool per 3x3, in depth order) overrides `receptive_field` and reaches any other layout.
    """
    return _rf_resnet(_RESNET50, receptive_field, width, small_image_stem, kept_kernels)


def rf_resnet18(
    receptive_field: int | None = 29,
    width: int = 64,
    small_image_stem: bool | None = None,
    kept_kernels: tuple[bool, ...] | None = None,
) -> ResNet:
    """A ResNet-18 in which a position sees `receptive_field` pixels: 3 5 7 9 11 13 17 21 25 29 37 ... 109 with the small-image stem.

    That stem (3x3, stride 1, no max-pool) is the default, since 29 px cannot be reached with ImageNet's. The rest as in `rf_resnet50`.
    Deviation: here the stride sits in a 3x3. Where that one becomes 1x1 it keeps the stride, so it and the shortcut beside it read
    one position in four of the map below and drop the others; a pooling that reads them all would widen the receptive field.
    2.26 M parameters at 29 px, 11.17 M at 109. ImageNet's stem reaches 11 19 27 35 43 51 67 83 99 115 147 ... 435.
    """
    return _rf_resnet(_RESNET18, receptive_field, width, small_image_stem, kept_kernels)


def rf_resnet34(
    receptive_field: int | None = 29,
    width: int = 64,
    small_image_stem: bool | None = None,
    kept_kernels: tuple[bool, ...] | None = None,
) -> ResNet:
    """A ResNet-34 in which a position sees 3 5 7 ... 17 21 25 29 33 ... 49 57 65 ... 145 161 177 193 209 225 pixels.

    Those are with the small-image stem, the default; ImageNet's reaches 11 19 27 ... 67 83 99 115 ... 195 227 259 ... 579 643 707 ... 899.
    Strides and deviation as in `rf_resnet18`. 3.19 M parameters at 29 px, 21.28 M at 225.
    """
    return _rf_resnet(_RESNET34, receptive_field, width, small_image_stem, kept_kernels)


def rf_resnet101(
    receptive_field: int | None = 99,
    width: int = 64,
    small_image_stem: bool | None = None,
    kept_kernels: tuple[bool, ...] | None = None,
) -> ResNet:
    """A ResNet-101 in which a position sees 11 19 27 35 51 67 83 99 131 163 ... 835 899 963 1027 pixels.

    As `rf_resnet50` with 23 blocks in stage 3. 24.15 M parameters at 99 px, 42.50 M unrestricted (1027 px).
    """
    return _rf_resnet(_RESNET101, receptive_field, width, small_image_stem, kept_kernels)


def bagnet(receptive_field: int | None = 33, width: int = 64, small_image_stem: bool | None = None) -> ResNet:
    """A BagNet-9, -17 or -33 (Brendel and Bethge 2019, arXiv 1904.00760): a position sees 9, 17 or 33 pixels; stride 8.

    The public code's blocks and strides (2 2 2 1 per stage, in the 3x3). The 3x3 of the first block stays in the first 2, 3 or 4 stages;
    by the same rule 3 and 5 px can be had. 13.60, 14.13 and 16.23 M parameters; `layer1` to `layer4` have the public names and shapes.
    Those 3x3 are the 1st, 4th, 8th and 14th: rf_resnet50(small_image_stem=True, kept_kernels=...) with them is the same function where the
    norms do not follow the batch (a 1x1 may be computed before a stride or after it), at 2.3 times the work: its strides come later.
    Deviations: the public code pads nowhere (24 x 24 positions at 224 px, here 28 x 28), so its shortcuts, cropped at the bottom and right,
    add the top left pixel of each 3x3 and here the middle one: weights load, outputs differ. Its stem has a 1x1 to 64 channels before the
    3x3, nothing between, which folds into one 3x3 and is 35,328 parameters more; its stem's norm has momentum 0.001, here 0.1.
    """
    return _rf_resnet(_BAGNET, receptive_field, width, small_image_stem, None)


def _rf_resnet(
    layout: _Layout, receptive_field: int | None, width: int, small_image_stem: bool | None, kept_kernels: tuple[bool, ...] | None
) -> ResNet:
    if width < 1:
        raise ValueError(f"width={width} is no number of channels; give at least 1 (64 is the full network, 16 a quarter of its width)")
    small = layout.small_image_stem if small_image_stem is None else small_image_stem
    kept = kept_kernels if kept_kernels is not None else _first_kept(layout, receptive_field, small)
    if len(kept) != layout.num_spatial:
        raise ValueError(
            f"kept_kernels has {len(kept)} entries; {layout.name} has {layout.num_spatial} spatial convolutions: give one bool for each"
        )
    from torchvision.models.resnet import BasicBlock, Bottleneck  # here: it takes a second, for which no --help should wait

    kernels = iter(kept)
    expansion = Bottleneck.expansion if layout.bottleneck else BasicBlock.expansion
    stages, in_channels = [], width
    for stage, depth in enumerate(layout.depths):
        planes = width * 2**stage
        blocks = []
        for i in range(depth):
            stride = layout.strides[stage] if i == 0 else 1
            own = [next(kernels) for _ in range(layout.spatial_per_block)]
            blocks.append(_block(layout, in_channels, planes, stride, own))
            in_channels = planes * expansion
        stages.append(nn.Sequential(*blocks))
    conv1, maxpool = _stem(width, small)
    backbone = ResNet(conv1, nn.BatchNorm2d(width), maxpool, stages, in_channels)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone


def _may_stay(layout: _Layout, small_image_stem: bool) -> tuple[list[int], list[int]]:
    """Which spatial convolutions may stay 3x3, in depth order, and the receptive fields with the first 0, 1, 2 ... of them."""
    jump, field = (1, 3) if small_image_stem else (4, 11)
    indices, fields, before = [], [field], 0
    for depth, stride in zip(layout.depths, layout.strides, strict=True):
        count = depth * layout.spatial_per_block
        # A 3x3 that carries the stride has its taps still one lower jump apart.
        first, jump = jump if layout.stride_in_spatial else jump * stride, jump * stride
        for i in range(1 if layout.one_per_stage else count):
            indices.append(before + i)
            fields.append(fields[-1] + 2 * (first if i == 0 else jump))
        before += count
    return indices, fields


def _first_kept(layout: _Layout, receptive_field: int | None, small_image_stem: bool) -> tuple[bool, ...]:
    """Which spatial convolutions stay 3x3: the first k that may, k such that the receptive field is the one asked for."""
    indices, fields = _may_stay(layout, small_image_stem)
    if receptive_field and receptive_field not in fields:
        stem = "small-image" if small_image_stem else "ImageNet"
        raise ValueError(
            f"receptive_field={receptive_field} px cannot be reached by {layout.name} with the {stem} stem; "
            f"choose one of {', '.join(map(str, fields))}, or 0 for no restriction"
        )
    kept = set(indices[: fields.index(receptive_field)] if receptive_field else indices)
    return tuple(index in kept for index in range(layout.num_spatial))


def reachable_fields(name: str) -> list[int]:
    """The receptive fields in px that this backbone can be built with, on the stem that it has by itself; none for torchvision's."""
    return _may_stay(_LAYOUTS[name], _LAYOUTS[name].small_image_stem)[1] if name in _LAYOUTS else []


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


def _stem(width: int, small_image_stem: bool) -> tuple[nn.Conv2d, nn.Module]:
    if small_image_stem:
        return _conv(3, width, 3), nn.Identity()
    return _conv(3, width, 7, stride=2), nn.MaxPool2d(kernel_size=3, stride=2, padding=1)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


def _block(layout: _Layout, in_channels: int, planes: int, stride: int, kept: Sequence[bool]) -> nn.Module:
    """torchvision's block with each 3x3 perhaps a 1x1, and the stride where the layout has it."""
    from torchvision.models.resnet import BasicBlock, Bottleneck

    kernels = [3 if keep else 1 for keep in kept]
    if not layout.bottleneck:
        basic = BasicBlock(in_channels, planes, stride, _shortcut(in_channels, planes, stride))
        basic.conv1 = _conv(in_channels, planes, kernels[0], stride)
        basic.conv2 = _conv(planes, planes, kernels[1])
        return basic
    before, spatial = (1, stride) if layout.stride_in_spatial else (stride, 1)
    block = Bottleneck(in_channels, planes, stride, _shortcut(in_channels, planes * Bottleneck.expansion, stride))
    block.conv1 = _conv(in_channels, planes, 1, before)
    block.conv2 = _conv(planes, planes, kernels[0], spatial)
    return block


def torchvision_resnet50(receptive_field: int | None = None, width: int = 64, small_image_stem: bool | None = None) -> ResNet:
    """torchvision's ResNet-50 (v1.5: the stride in the 3x3), untrained, without pooling and classifier; receptive field 427 px."""
    return _torchvision("resnet50", receptive_field, width, bool(small_image_stem))


def torchvision_resnet18(receptive_field: int | None = None, width: int = 64, small_image_stem: bool | None = None) -> ResNet:
    """torchvision's ResNet-18, untrained, without pooling and classifier; receptive field 435 px (109 with the small-image stem)."""
    return _torchvision("resnet18", receptive_field, width, bool(small_image_stem))


def torchvision_resnet34(receptive_field: int | None = None, width: int = 64, small_image_stem: bool | None = None) -> ResNet:
    """torchvision's ResNet-34, untrained, without pooling and classifier; receptive field 899 px (225 with the small-image stem)."""
    return _torchvision("resnet34", receptive_field, width, bool(small_image_stem))


def torchvision_resnet101(receptive_field: int | None = None, width: int = 64, small_image_stem: bool | None = None) -> ResNet:
    """torchvision's ResNet-101 (v1.5), untrained, without pooling and classifier; receptive field 971 px."""
    return _torchvision("resnet101", receptive_field, width, bool(small_image_stem))


def _torchvision(name: str, receptive_field: int | None, width: int, small_image_stem: bool) -> ResNet:
    from torchvision import models

    if width != 64:
        raise ValueError(f"width={width} is not possible for {name}, which is torchvision's and 64 wide; use 64, or rf_{name}")
    model = getattr(models, name)(weights=None, zero_init_residual=False)
    conv1, maxpool = model.conv1, model.maxpool
    if small_image_stem:
        conv1, maxpool = _stem(width, small_image_stem)
        nn.init.kaiming_normal_(conv1.weight, mode="fan_out", nonlinearity="relu")
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    backbone = ResNet(conv1, model.bn1, maxpool, stages, model.fc.in_features)
    fixed = position_grid(backbone, 224).receptive_field_px
    if receptive_field and receptive_field != fixed:
        raise ValueError(
            f"receptive_field={receptive_field} px is not possible for {name}, whose receptive field is {fixed} px; "
            f"use 0, or rf_{name}, where it is an argument"
        )
    return backbone


BACKBONES: dict[str, Callable[..., ResNet]] = {
    "rf_resnet50": rf_resnet50,
    "rf_resnet18": rf_resnet18,
    "rf_resnet34": rf_resnet34,
    "rf_resnet101": rf_resnet101,
    "bagnet": bagnet,
    "resnet50": torchvision_resnet50,
    "resnet18": torchvision_resnet18,
    "resnet34": torchvision_resnet34,
    "resnet101": torchvision_resnet101,
}


def make_backbone(name: str, receptive_field: int | None, width: int, small_image_stem: bool | None) -> ResNet:
    """The backbone of that name; `small_image_stem` None is the architecture's default. ValueError for what cannot be built."""
    if name not in BACKBONES:
        raise ValueError(f"backbone={name!r} is unknown; choose one of {', '.join(BACKBONES)}")
    return BACKBONES[name](receptive_field=receptive_field, width=width, small_image_stem=small_image_stem)


class _Reach(NamedTuple):
    size: int
    jump: int
    field: int
    offset: float


def _through(reach: _Reach, layer: nn.Module) -> _Reach:
    """One step of the recurrence: field += (k - 1) j, jump *= s, and the centre moves by ((k - 1) / 2 - p) j."""
    if isinstance(layer, nn.Identity):
        return reach
    assert isinstance(layer, nn.Conv2d | nn.MaxPool2d), layer
    k, s, p = (v[0] if isinstance(v, tuple) else v for v in (layer.kernel_size, layer.stride, layer.padding))
    assert isinstance(k, int)
    assert isinstance(s, int)
    assert isinstance(p, int)
    size = (reach.size + 2 * p - k) // s + 1
    return _Reach(size, reach.jump * s, reach.field + (k - 1) * reach.jump, reach.offset + ((k - 1) / 2 - p) * reach.jump)


def pool_to(y: Float[Tensor, "b c n n"], side: int) -> Float[Tensor, "b c m m"]:
    """A map averaged to side x side windows, all of one size and evenly apart, that cover it; smaller maps and side 0 leave it as it is.

    Trap: windows overlap unless side divides n. Adaptive pooling would take windows of several sizes, hence of several receptive fields.
    """
    kernel, stride = pooling_window(y.shape[-1], side)
    return F.avg_pool2d(y, kernel, stride) if kernel > 1 else y


def pooling_window(n: int, side: int) -> tuple[int, int]:
    """Size and stride of the windows that take a map of n x n to side x side."""
    if side == 0 or side >= n:
        return 1, 1
    stride = n // side
    return n - (side - 1) * stride, stride


def position_grid(backbone: ResNet, view_px: int, stage: int = 4, side: int = 0) -> PositionGrid:
    """The position grid of this backbone for a square view of `view_px` pixels, after `stage` and `pool_to` side x side (0: as it is).

    Recurrence of Araujo, Norris, Sim 2019 (doi 10.23915/distill.00021), the maximum over the two paths of every block.
    The receptive field of a position near the border hangs over it: intersect it with the view.
    """
    reach = _Reach(view_px, 1, 1, 0.5)
    for layer in (backbone.conv1, backbone.maxpool):
        reach = _through(reach, layer)
    for layers in backbone.stages[:stage]:
        for block in layers.children():
            main = short = reach
            for name in ("conv1", "conv2", "conv3"):
                main = _through(main, getattr(block, name, nn.Identity()))
            for layer in (getattr(block, "downsample", None) or nn.Sequential()).children():
                short = short if isinstance(layer, _BatchNorm) else _through(short, layer)
            # Only paths whose positions share their centres have a union that is the larger of the two boxes.
            assert main._replace(field=0) == short._replace(field=0), (main, short)
            reach = main._replace(field=max(main.field, short.field))
    kernel, stride = pooling_window(reach.size, side)
    reach = _through(reach, nn.MaxPool2d(kernel, stride))
    return PositionGrid(reach.size, reach.jump, reach.field, reach.offset, view_px)
