"""Photometric augmentation equals torchvision's, operation by operation, in each of its renderings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference

from cossl.pipelines.augment import (
    _ORDERS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    _orders,
    _render,
    augment,
    augment_tensors,
    blur_radius,
    normalize,
)
from cossl.pipelines.geometry import sample_views
from cossl.pipelines.views import byol

PLAIN = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0.0])


def images(count: int = 6, size: int = 40) -> torch.Tensor:
    """Random colours at random scales, with black, white and grey pixels among them."""
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels[:, :, :4], pixels[:, :, 4:8], pixels[:, :, 8:12] = 0, 255, 77
    return pixels.contiguous(memory_format=torch.channels_last)


def unnormalized(x: torch.Tensor) -> torch.Tensor:
    return x * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)


@pytest.mark.parametrize("render", [augment, augment_tensors])
@pytest.mark.parametrize(
    ("column", "value", "operation"),
    [
        (0, 1.4, lambda x: reference.adjust_brightness(x, 1.4)),
        (1, 0.6, lambda x: reference.adjust_contrast(x, 0.6)),
        (2, 1.2, lambda x: reference.adjust_saturation(x, 1.2)),
        (3, 0.1, lambda x: reference.adjust_hue(x, 0.1)),
        (3, -0.1, lambda x: reference.adjust_hue(x, -0.1)),
        (5, 1.0, lambda x: reference.rgb_to_grayscale(x, 3)),
        (6, 0.7, lambda x: reference.gaussian_blur(x, [2 * blur_radius(40) + 1] * 2, [0.7, 0.7])),
        (7, 1.0, lambda x: reference.solarize(x, 0.5)),
    ],
)
def test_each_operation_equals_torchvisions(render, column: int, value: float, operation) -> None:
    """To 2e-5 of the range [0, 1]."""
    parameters = PLAIN.repeat(6, 1)
    parameters[:, column] = value
    expected = operation(images().float() / 255)
    assert (unnormalized(render(images(), parameters)) - expected).abs().max() < 2e-5
    if column < 4:
        assert (expected - images().float() / 255).abs().max() > 0.02


def test_order_is_the_samples_own() -> None:
    functions = [reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation, reference.adjust_hue]
    factors = [1.3, 0.7, 1.2, 0.08]
    parameters = PLAIN.repeat(24, 1)
    parameters[:, :4], parameters[:, 4] = torch.tensor(factors), torch.arange(24)
    x = images(24)
    result = unnormalized(augment(x, parameters))
    for i in range(24):
        expected = x[i : i + 1].float() / 255
        for operation in _ORDERS[i]:
            expected = functions[operation](expected, factors[operation])
        assert (result[i] - expected[0]).abs().max() < 2e-4


def drawn(count: int, size: int = 40) -> list[torch.Tensor]:
    """Parameters that geometry draws, for view 1 and view 2."""
    index, sizes = np.arange(count), np.full(count, 100)
    rows = np.stack([view.row() for view in byol(size)])
    return [torch.from_numpy(row) for row in np.moveaxis(sample_views(0, 0, index, sizes, sizes, rows)[2], 1, 0).copy()]


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    """Hue jumps where two channels are equal to rounding, so a handful of pixels may differ by more."""
    assert one.is_contiguous(memory_format=torch.channels_last)
    assert one.shape == other.shape
    assert (one - other).abs().quantile(0.9999) < 1e-3


def test_both_renderings_agree_on_what_geometry_draws() -> None:
    for parameters in drawn(48):
        assert_close(augment(images(48), parameters), augment_tensors(images(48), parameters))


def test_it_compiles_whole_and_once_for_all_values() -> None:
    """The rendering that a GPU gets is one graph, and there is no second one for other parameters. (Inductor itself takes 30 s here.)"""
    torch._dynamo.reset()
    compiled = torch.compile(_render, backend="aot_eager", fullgraph=True, dynamic=False)
    views = images(6, 24)
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for parameters in drawn(6, 24):
            assert_close(compiled(views, parameters, _orders(views.device)), augment_tensors(views, parameters))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_without_parameters_it_only_normalizes() -> None:
    assert (augment(images(), PLAIN.repeat(6, 1)) - normalize(images())).abs().max() < 1e-5
