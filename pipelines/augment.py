"""Photometric augmentation of a whole batch: uint8 views and their parameters in, normalised float views out.

Order and formulas are torchvision's (ColorJitter in the sample's own order, grayscale, Gaussian blur, solarize, normalise),
on values in [0, 1], clamped after each jitter operation. `augment` is one function with two renderings of the same
arithmetic: tensor operations that torch.compile fuses on a GPU, and a numba kernel that takes one picture at a time on a
CPU (0.45 against 1.54 ms a picture at 96 px with blur, one thread: each picture stays in the cache). A test holds them equal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from cossl.pipelines.simd import compiled

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_ORDERS = np.array(list(itertools.permutations(range(4))), np.int64)  # brightness 0, contrast 1, saturation 2, hue 3
_LUMA = (0.2989, 0.587, 0.114)
_MEAN, _STD = np.array(IMAGENET_MEAN, np.float32), np.array(IMAGENET_STD, np.float32)


def blur_radius(size_px: int) -> int:
    """The blur kernel reaches this far: a tenth of the view in all, odd (23 taps at 224 px), as BYOL's."""
    return max(1, round(size_px / 20))


def augment(images: UInt8[Tensor, "b 3 s s"], photometry: Float[Tensor, "b 8"]) -> Float[Tensor, "b 3 s s"]:
    """Views as the network sees them: float32, channels-last, normalised by ImageNet's mean and deviation."""
    if images.device.type == "cpu":
        return _augment_cpu(images, photometry)
    return _compiled()(images, photometry, _orders(images.device))


@cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`_render` by torch.compile: on a GPU each of its passes over the pixels becomes one kernel."""
    compiled: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.compile(_render, fullgraph=True, dynamic=False)
    return compiled


@cache
def _orders(device: torch.device) -> Int[Tensor, "24 4"]:
    return torch.as_tensor(_ORDERS, device=device)


def normalize(images: UInt8[Tensor, "b 3 s s"]) -> Float[Tensor, "b 3 s s"]:
    """The same without any augmentation."""
    return _normalized(images.float() / 255)


# ---------------------------------------------------------------------------------------------- as tensor operations

# Constants are plain numbers: a tensor made of them on a GPU would be copied there, and waited for, in every call.


def _normalized(x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    channels = [(channel - mean) / std for channel, mean, std in zip(x.unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)]
    return torch.stack(channels, 1)


def _luma(x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
    r, g, b = x.unbind(1)
    return (_LUMA[0] * r + _LUMA[1] * g + _LUMA[2] * b)[:, None]


def _shift_hue(x: Float[Tensor, "b 3 h w"], shift: Float[Tensor, "b 1 1"]) -> Float[Tensor, "b 3 h w"]:
    r, g, b = x.unbind(1)
    high, low = x.amax(1), x.amin(1)
    spread = high - low
    safe = torch.where(spread == 0, 1, spread)
    rc, gc, bc = (high - r) / safe, (high - g) / safe, (high - b) / safe
    hue = torch.where(high == r, bc - gc, torch.where(high == g, 2 + rc - bc, 4 + gc - rc)) / 6
    hue = torch.where(spread == 0, 0, hue) + shift
    hue = hue - hue.floor()
    # channel(k) = high - spread * clip(min(t, 4 - t), 0, 1) with t = (k + 6 hue) mod 6: HSV to RGB without cases
    channels = []
    for k in (5, 3, 1):
        t = (k + 6 * hue) % 6
        channels.append(high - spread * torch.minimum(t, 4 - t).clamp(0, 1))
    return torch.stack(channels, 1)


def _blur_rows(x: Float[Tensor, "b 3 h w"], kernel: Float[Tensor, "b taps"]) -> Float[Tensor, "b 3 h w"]:
    """Blurred along the last axis, reflected at its ends. A sum of shifted copies: one kernel when compiled, as no convolution is."""
    taps, width = kernel.shape[1], x.shape[3]
    x = F.pad(x, [taps // 2, taps // 2, 0, 0], mode="reflect")
    return sum((kernel[:, k, None, None, None] * x[..., k : k + width] for k in range(1, taps)), kernel[:, :1, None, None] * x[..., :width])


def _blur(x: Float[Tensor, "b 3 h w"], sigma: Float[Tensor, " b"]) -> Float[Tensor, "b 3 h w"]:
    radius = blur_radius(x.shape[2])
    taps = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (taps / sigma.clamp(min=1e-3)[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    return _blur_rows(_blur_rows(x, kernel).transpose(2, 3), kernel).transpose(2, 3)


def augment_tensors(images: UInt8[Tensor, "b 3 s s"], photometry: Float[Tensor, "b 8"]) -> Float[Tensor, "b 3 s s"]:
    """`augment` by tensor operations, not compiled."""
    return _render(images, photometry, _orders(images.device))


def _render(images: UInt8[Tensor, "b 3 s s"], photometry: Float[Tensor, "b 8"], orders: Int[Tensor, "24 4"]) -> Float[Tensor, "b 3 s s"]:
    """The arithmetic, without a data-dependent branch and without waiting for the device."""
    x = images.float() / 255
    factor = photometry[:, :4, None, None, None]
    order = orders[photometry[:, 4].long()]
    for slot in range(4):
        turn = order[:, slot, None, None, None]
        luma = _luma(x)
        other = torch.where(turn == 0, 0, torch.where(turn == 1, luma.mean((1, 2, 3), keepdim=True), luma))
        amount = torch.where(turn == 0, factor[:, 0], torch.where(turn == 1, factor[:, 1], factor[:, 2]))
        blended = (amount * x + (1 - amount) * other).clamp(0, 1)
        x = torch.where(turn == 3, _shift_hue(x, factor[:, 3, 0]), blended)
    gray, sigma, solarize = (photometry[:, i, None, None, None] for i in (5, 6, 7))
    x = torch.where(gray > 0, _luma(x), x)
    x = torch.where(sigma > 0, _blur(x, photometry[:, 6]), x)
    x = torch.where((solarize > 0) & (x >= 0.5), 1 - x, x)
    return _normalized(x).contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------- one picture at a time


@compiled
def _blend(x: np.ndarray, operation: int, amount: float) -> None:
    one, a = np.float32(1), np.float32(amount)
    mean = np.float32(0)
    if operation == 1:
        total = 0.0
        for p in range(x.shape[0]):
            total += x[p, 0] * _LUMA[0] + x[p, 1] * _LUMA[1] + x[p, 2] * _LUMA[2]
        mean = np.float32(total / x.shape[0])
    for p in range(x.shape[0]):
        if operation == 2:
            mean = np.float32(x[p, 0] * _LUMA[0] + x[p, 1] * _LUMA[1] + x[p, 2] * _LUMA[2])
        for c in range(3):
            x[p, c] = min(max(a * x[p, c] + (one - a) * mean, np.float32(0)), one)


@compiled
def _turn_hue(x: np.ndarray, shift: float) -> None:
    for p in range(x.shape[0]):
        r, g, b = x[p, 0], x[p, 1], x[p, 2]
        high, low = max(r, g, b), min(r, g, b)
        spread = high - low
        if spread == 0:
            continue
        if high == r:
            hue = (g - b) / spread
        elif high == g:
            hue = 2 + (b - r) / spread
        else:
            hue = 4 + (r - g) / spread
        hue = hue / 6 + shift
        hue -= math.floor(hue)
        for c in range(3):
            t = 5 - 2 * c + 6 * hue
            t -= 6 * math.floor(t / 6)
            x[p, c] = high - spread * min(max(min(t, 4 - t), 0.0), 1.0)


@compiled
def _blur_lines(source: np.ndarray, target: np.ndarray, kernel: np.ndarray, size: int) -> None:
    """Blurs along the rows and writes the transpose, so that twice is a blur in both directions."""
    radius = len(kernel) // 2
    for row in range(size):
        for column in range(size):
            a = b = c = np.float32(0)
            for k in range(len(kernel)):
                at = abs(column + k - radius)
                at = size - 1 - abs(size - 1 - at)  # reflect, as F.pad
                pixel = source[row * size + at]
                a += kernel[k] * pixel[0]
                b += kernel[k] * pixel[1]
                c += kernel[k] * pixel[2]
            out = target[column * size + row]
            out[0], out[1], out[2] = a, b, c


@compiled
def _augment_pictures(images, photometry, out, radius):  # type: ignore[no-untyped-def]
    size = images.shape[1]
    scratch = np.empty((size * size, 3), np.float32)
    kernel = np.empty(2 * radius + 1, np.float32)
    for b in range(images.shape[0]):
        row, x, source = photometry[b], out[b].reshape(size * size, 3), images[b].reshape(size * size, 3)
        for p in range(size * size):
            for c in range(3):
                x[p, c] = np.float32(source[p, c]) / np.float32(255)
        for slot in range(4):
            operation = _ORDERS[int(row[4]), slot]
            if operation == 3 and row[3] != 0:
                _turn_hue(x, row[3])
            elif operation != 3 and row[operation] != 1:
                _blend(x, operation, row[operation])
        if row[5] > 0:
            for p in range(size * size):
                x[p, :] = np.float32(x[p, 0] * _LUMA[0] + x[p, 1] * _LUMA[1] + x[p, 2] * _LUMA[2])
        if row[6] > 0:
            for k in range(len(kernel)):
                kernel[k] = math.exp(-0.5 * ((k - radius) / row[6]) ** 2)
            kernel /= kernel.sum()
            _blur_lines(x, scratch, kernel, size)
            _blur_lines(scratch, x, kernel, size)
        for p in range(size * size):
            for c in range(3):
                if row[7] > 0 and x[p, c] >= 0.5:
                    x[p, c] = np.float32(1) - x[p, c]
                x[p, c] = (x[p, c] - _MEAN[c]) / _STD[c]


def _augment_cpu(images: UInt8[Tensor, "b 3 s s"], photometry: Float[Tensor, "b 8"]) -> Float[Tensor, "b 3 s s"]:
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    rows, out = photometry.numpy(), np.empty(pixels.shape, np.float32)
    radius, threads = blur_radius(pixels.shape[1]), torch.get_num_threads()
    cuts = [slice(i * len(rows) // threads, (i + 1) * len(rows) // threads) for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda cut: _augment_pictures(pixels[cut], rows[cut], out[cut], radius), cuts))
    return torch.from_numpy(out).permute(0, 3, 1, 2)
