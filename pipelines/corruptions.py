"""The corruptions of ImageNet-C, a batch at a time on its device.

Hendrycks and Dietterich 2019 (arXiv 1903.12261), severities as in the script that made the published set; the code is our own. All lengths
are pixels, as published for pictures of 224 px, and stay the same for other sizes: a small picture is hurt more. Three things differ
from the published set: its pictures were stored as JPEGs of quality 85 after the corruption, which is left out; its random numbers
cannot be had again; it took frost from five of six photographs of its own, so here frost needs a folder of some.

On a CPU the pictures are treated one at a time: each stays in the cache, and the result does not depend on the batch. On a GPU the whole
batch is treated at once; the random numbers are the same, the arithmetic agrees to rounding.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from cossl.pipelines import corruption_blurs as blurs
from cossl.pipelines import corruption_weather as weather
from cossl.pipelines.corruption_draws import BITS, Draws
from cossl.pipelines.corruption_weather import Frost

SMALLEST_PX = 32

Pixels = Float[Tensor, "b 3 s s"]


# --------------------------------------------------------------------------------------------------------------- noise


def _gaussian_noise(x: Pixels, deviation: float, draws: Draws) -> Pixels:
    return x + deviation * draws.normal(0, *x.shape[1:])


def _speckle_noise(x: Pixels, deviation: float, draws: Draws) -> Pixels:
    return x + x * deviation * draws.normal(0, *x.shape[1:])


def _impulse_noise(x: Pixels, share: float, draws: Draws) -> Pixels:
    """A share of the values becomes 0 or 1, each half of the time; each channel on its own."""
    u = draws.uniform(0, *x.shape[1:])
    return torch.where(u < share / 2, 1.0, torch.where(u < share, 0.0, x))


COUNTS = 160  # of photons that are told apart: 60 are expected at most, and 128 never come


@cache
def _poisson_table(photons: float, device: torch.device) -> Int[Tensor, " n"]:
    """For each of 256 levels the chances of at most 0, 1, ... photons, in units of 2 ** -BITS, plus the level: one ascending list."""
    rate = np.arange(256)[:, None] / 255 * photons
    count = np.arange(COUNTS)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_chance = np.where(rate > 0, count * np.log(rate) - rate, np.where(count, -np.inf, 0.0))
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, COUNTS)))])
    table = np.exp(log_chance - log_factorial).cumsum(1).clip(0, 1)
    whole = np.floor(table * 2**BITS).astype(np.int64) + (np.arange(256, dtype=np.int64)[:, None] << BITS)
    return torch.from_numpy(whole.ravel()).to(device)


def _shot_noise(x: Pixels, photons: float, draws: Draws) -> Pixels:
    """Poisson noise: a white pixel expects so many photons. By inversion of the distribution function of the pixel's level."""
    level = (x * 255).round_().long()
    wanted = (level << BITS) + draws.integers(0, *x.shape[1:])
    found = torch.searchsorted(_poisson_table(photons, x.device), wanted.contiguous(), right=True)
    return (found - level * COUNTS).float() / photons


# -------------------------------------------------------------------------------------------------------------- colours


def _brightness(x: Pixels, more: float, draws: Draws) -> Pixels:
    """The value of HSV raised: hue and saturation stay, so all three channels grow by the same factor, and black becomes grey."""
    value = x.amax(1, keepdim=True)
    raised = (value + more).clamp_(max=1)
    return torch.where(value > 0, x * (raised / value.clamp(min=1e-9)), raised)


def _saturate(x: Pixels, how: tuple[float, float], draws: Draws) -> Pixels:
    """The saturation of HSV times one number plus another. Trap: grey has the hue of red there, so a saturation above 0 tints it red."""
    factor, more = how
    value, lowest = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    saturation = (value - lowest) / value.clamp(min=1e-9)
    wanted = (saturation * factor + more).clamp_(0, 1)
    away = torch.where(saturation > 0, (value - x) / saturation.clamp(min=1e-9), value * x.new_tensor((0, 1, 1)).view(3, 1, 1))
    return value - away * wanted


def _contrast(x: Pixels, factor: float, draws: Draws) -> Pixels:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean


# ----------------------------------------------------------------------------------------------------------- the digital


@cache
def _boxes(size: int, small: int, device: torch.device) -> Float[Tensor, "small size"]:
    """Pillow's box filter as a matrix: each pixel is the mean of the whole source pixels whose centres lie in its span."""
    at = (np.arange(small)[:, None] + 0.5) * (size / small)
    half = max(size / small, 1) / 2
    first, last = np.floor(at - half + 0.5), np.floor(at + half + 0.5)
    source = np.arange(size)
    inside = (source >= first) & (source < last)
    return torch.from_numpy(inside / inside.sum(1, keepdims=True)).to(device, torch.float32)


def _pixelate(x: Pixels, share: float, draws: Draws) -> Pixels:
    """Box-filtered to a share of its side and back; rounded to bytes after each pass, the width first, as Pillow does it."""
    size = x.shape[-1]
    small = int(size * share)
    levels = x * 255
    for weights in (_boxes(size, small, x.device), _boxes(small, size, x.device)):
        levels = torch.floor(levels @ weights.T + 0.5)
        levels = torch.floor(weights @ levels + 0.5)
    return levels / 255


def _jpeg(picture: UInt8[np.ndarray, "s s 3"], quality: int) -> UInt8[np.ndarray, "s s 3"]:
    memory = io.BytesIO()
    Image.fromarray(picture).save(memory, "JPEG", quality=quality)
    with Image.open(memory) as stored:
        return np.asarray(stored)


def _jpeg_compression(x: Pixels, quality: int, draws: Draws) -> Pixels:
    """Through Pillow's JPEG, on the host, whatever the device: there and back is a copy of a byte a value."""
    pictures = (x * 255).round_().byte().permute(0, 2, 3, 1).cpu().numpy()
    if len(pictures) == 1:
        stored = [_jpeg(pictures[0], quality)]
    else:
        with ThreadPoolExecutor(min(16, len(pictures))) as pool:
            stored = list(pool.map(_jpeg, pictures, [quality] * len(pictures)))
    return torch.from_numpy(np.stack(stored)).to(x.device).permute(0, 3, 1, 2).float() / 255


# --------------------------------------------------------------------------------------------------------- the whole of it


# In units of 244 px: a slip for 224 in the published script, and so a fact of the published pictures.
_ELASTIC = ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))


class Corruption(NamedTuple):
    """How a corruption is done, and with what parameter at each severity."""

    family: str
    render: Callable[..., Pixels]
    severities: tuple[Any, ...]


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption("noise", _gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": Corruption("noise", _shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": Corruption("noise", _impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": Corruption("blur", blurs.defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "glass_blur": Corruption("blur", blurs.glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": Corruption("blur", blurs.motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": Corruption("blur", blurs.zoom_blur, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))),
    "snow": Corruption("weather", weather.snow, weather.SNOW),
    "frost": Corruption("weather", weather.frost, ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),
    "fog": Corruption("weather", weather.fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": Corruption("weather", _brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": Corruption("digital", _contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": Corruption("digital", blurs.elastic_transform, tuple(tuple(244 * part for part in how) for how in _ELASTIC)),
    "pixelate": Corruption("digital", _pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": Corruption("digital", _jpeg_compression, (25, 18, 15, 10, 7)),
    "speckle_noise": Corruption("extra", _speckle_noise, (0.15, 0.2, 0.35, 0.45, 0.6)),
    "gaussian_blur": Corruption("extra", blurs.gaussian_blur, (1, 2, 3, 4, 6)),
    "spatter": Corruption("extra", weather.spatter, weather.SPATTER),
    "saturate": Corruption("extra", _saturate, ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))),
}
SEVERITIES = (1, 2, 3, 4, 5)
FAMILIES = ("noise", "blur", "weather", "digital")
NAMES = tuple(name for name, corruption in CORRUPTIONS.items() if corruption.family != "extra")
"""Those that a mean is taken over."""
EXTRA = tuple(name for name in CORRUPTIONS if name not in NAMES)
"""Those meant for choosing hyperparameters."""


@contextmanager
def _exact_products() -> Iterator[None]:
    """Products of float32 matrices in float32: TF32 keeps ten bits, and a picture has eight."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def corrupt(
    images: UInt8[Tensor, "b 3 s s"], index: Int[Tensor, " b"], name: str, severity: int, seed: int, frost: Frost = ()
) -> UInt8[Tensor, "b 3 s s"]:
    """The pictures corrupted: a function of (picture, its index in the set, name, severity 1 to 5, seed). Values are cut to whole levels.

    The index is best on the host. ValueError for a corruption or severity that there is not, pictures of less than SMALLEST_PX, and frost
    without photographs.
    """
    if name not in CORRUPTIONS or severity not in SEVERITIES:
        raise ValueError(f"{name} {severity}: expected one of {', '.join(CORRUPTIONS)}, at severity 1 to 5")
    if images.shape[-1] < SMALLEST_PX:
        raise ValueError(f"pictures of {images.shape[-1]} px: corruptions need {SMALLEST_PX} or more")
    if name == "frost" and not frost:
        raise ValueError("frost needs photographs of frost: give a folder of some, or leave frost out")
    _, render, parameters = CORRUPTIONS[name]
    number, extra = list(CORRUPTIONS).index(name), {"frost": frost} if name == "frost" else {}
    at_once = 1 if images.device.type == "cpu" else len(images)
    done = torch.empty_like(images)
    with _exact_products():
        for start in range(0, len(images), at_once):
            part = slice(start, start + at_once)
            draws = Draws(seed, number, severity, index[part], images.device)
            x = render(images[part].contiguous().float() / 255, parameters[severity - 1], draws, **extra)
            # As published, cut and not rounded; the thousandth is for levels that float32 has just missed.
            done[part] = (x.clamp(0, 1) * 255 + 1e-3).byte()
    return done
