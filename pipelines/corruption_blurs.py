"""The corruptions of `cossl.pipelines.corruptions` that look at a pixel's surroundings: blurs, zooms, the elastic transform.

A filter that is separable and has a rule for the border is a matrix A, the blurred picture A x A': two products, with any border and any
width of the filter, fast on every device.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from cossl.pipelines.corruption_draws import Draws
from cossl.pipelines.geometry import uniform
from cossl.pipelines.simd import compiled

Pixels = Float[Tensor, "b c s s"]
Border = Literal["nearest", "reflect"]
"""Beyond a row a b c stands c c c, or c b a."""


def to_bytes(x: Pixels) -> Pixels:
    """Rounded to one of 256 levels: where the published script stores what it has so far as a PNG."""
    return torch.floor(x.clamp(0, 1) * 255 + 0.5) / 255


# -------------------------------------------------------------------------------------------------------- Gaussian blurs


@cache
def _gaussian_matrix(size: int, sigma: float, reach: float, border: Border, device: torch.device) -> Float[Tensor, "s s"]:
    """Row i holds the weights of pixel i's surroundings as far as `reach` deviations, those beyond the border added to where they fall."""
    radius = int(reach * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    source = np.arange(size)[:, None] + offsets
    if border == "nearest":
        source = source.clip(0, size - 1)
    else:
        source = source % (2 * size)
        source = np.minimum(source, 2 * size - 1 - source)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size)[:, None], source), weights / weights.sum())
    return torch.from_numpy(matrix).to(device, torch.float32)


def smooth(x: Pixels, sigma: float, reach: float = 4.0, border: Border = "nearest") -> Pixels:
    """Each channel under a Gaussian of deviation sigma pixels, cut off at `reach` deviations; in float32 products (no TF32)."""
    matrix = _gaussian_matrix(x.shape[-1], sigma, reach, border, x.device)
    return matrix @ x @ matrix.T


def gaussian_blur(x: Pixels, sigma: float, draws: Draws) -> Pixels:
    return smooth(x, sigma)


@compiled
def _shuffle(key, size, reach, times, source):  # type: ignore[no-untyped-def]
    slot = 0
    for _ in range(times):
        for h in range(size - reach, reach, -1):
            for w in range(size - reach, reach, -1):
                dx = int(uniform(key, slot, 0.0, 2.0 * reach)) - reach
                dy = int(uniform(key, slot + 1, 0.0, 2.0 * reach)) - reach
                slot += 2
                source[h * size + w] = source[(h + dy) * size + w + dx]


def shuffled(draws: Draws, size: int, reach: int, times: int) -> Int[np.ndarray, "b n"]:
    """Which pixel (row * size + column) stands where, after each in turn, from the last to the first, took over a near one.

    The published script means to exchange the two pixels, but its line `x[a], x[b] = x[b], x[a]` on views of an array copies one.
    """
    source = np.tile(np.arange(size * size), (len(draws.index), 1))
    for key, row in zip(draws.keys(0), source, strict=True):
        _shuffle(np.uint64(key), size, reach, times, row)
    return source


def glass_blur(x: Pixels, how: tuple[float, int, int], draws: Draws) -> Pixels:
    """Blurred, cut to whole levels, its pixels shuffled near by some times, and blurred again."""
    sigma, reach, times = how
    blurred = torch.floor(smooth(x, sigma) * 255 + 1e-3) / 255
    source = torch.from_numpy(shuffled(draws, x.shape[-1], reach, times)).to(x.device)
    moved = blurred.flatten(2).gather(2, source[:, None].expand(-1, x.shape[1], -1)).view_as(x)
    return smooth(moved, sigma)


# ----------------------------------------------------------------------------------------------------------- other blurs


@cache
def _disk(radius: int, sigma: float) -> Float[np.ndarray, "k k"]:
    """A disk of `radius` pixels whose edge is softened by a small Gaussian; the kernel's border mirrors its inside, edge not repeated."""
    half, taps = (8, 3) if radius <= 8 else (radius, 5)
    at = np.arange(-half, half + 1)
    sharp = (at[:, None] ** 2 + at**2 <= radius**2).astype(np.float64)
    soft = np.exp(-0.5 * ((np.arange(taps) - taps // 2) / sigma) ** 2)
    soft /= soft.sum()
    kernel = np.pad(sharp / sharp.sum(), taps // 2, mode="reflect")
    for axis in (0, 1):
        kernel = np.apply_along_axis(np.convolve, axis, kernel, soft, "valid")
    return kernel


def _fast(size: int) -> int:
    """The next size that is a product of 2, 3 and 5: what Fourier transforms are quick at."""
    while True:
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 1


def defocus_blur(x: Pixels, how: tuple[int, float], draws: Draws) -> Pixels:
    """Under a disk, by way of the Fourier transform; beyond the border the picture is mirrored, its edge not repeated."""
    kernel = torch.from_numpy(_disk(*how)).to(x)
    size, half = x.shape[-1], len(kernel) // 2
    whole = _fast(size + 2 * half)
    spectrum = torch.fft.rfft2(F.pad(x, (half,) * 4, mode="reflect"), (whole, whole)) * torch.fft.rfft2(kernel, (whole, whole))
    return torch.fft.irfft2(spectrum, (whole, whole))[..., 2 * half : 2 * half + size, 2 * half : 2 * half + size]


def motion(x: Pixels, radius: int, sigma: float, degrees: Float[np.ndarray, " b"]) -> Pixels:
    """Each picture smeared along its angle to one side, the weights half a Gaussian over 2 * radius + 1 pixels.

    ImageMagick's -motion-blur: whole steps, a half rounded down; beyond the border the edge is repeated.
    """
    size, taps = x.shape[-1], np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (taps / sigma) ** 2)
    weights /= weights.sum()
    pad = 2 * radius + 1
    wide, blurred = F.pad(x, (pad,) * 4, mode="replicate"), torch.zeros_like(x)
    for b, angle in enumerate(np.deg2rad(degrees)):
        for i, weight in zip(taps, weights, strict=True):
            down, right = (pad + math.ceil(i * part - 0.5) for part in (math.sin(angle), math.cos(angle)))
            blurred[b].add_(wide[b, :, down : down + size, right : right + size], alpha=float(weight))
    return blurred


def motion_blur(x: Pixels, how: tuple[int, float], draws: Draws) -> Pixels:
    """Along an angle within 45 degrees of the horizontal."""
    return to_bytes(motion(x, *how, draws.few(0, 1, -45, 45)[:, 0]))


def zoomed(x: Pixels, factor: float) -> Pixels:
    """The middle of the picture made larger by linear interpolation from corner to corner; of the same size."""
    size = x.shape[-1]
    cut = math.ceil(size / factor)
    start, large = (size - cut) // 2, round(cut * factor)
    middle = x[..., start : start + cut, start : start + cut]
    trim = (large - size) // 2
    zoom = F.interpolate(middle, (large, large), mode="bilinear", align_corners=True)
    return zoom[..., trim : trim + size, trim : trim + size]


def zoom_blur(x: Pixels, to: tuple[float, float], draws: Draws) -> Pixels:
    """The mean of the picture and of its zooms by factors from 1 on, to the first number, in steps of the second.

    As np.arange counts them, which by rounding keeps the end 1.11 of severity 1 and no other.
    """
    factors = np.arange(1, *to).tolist()
    total = x.clone()
    for factor in factors:
        total += zoomed(x, factor)
    return total / (len(factors) + 1)


# ----------------------------------------------------------------------------------------------------------- displacement


def _sampled(x: Pixels, right: Float[Tensor, "b s s"], down: Float[Tensor, "b s s"], edge_repeated: bool) -> Pixels:
    """The picture at other places, in pixels, by linear interpolation; mirrored beyond its border."""
    size = x.shape[-1]
    places = torch.stack([right, down], -1)
    grid = (2 * places + 1) / size - 1 if edge_repeated else 2 * places / (size - 1) - 1
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=not edge_repeated)


def affine_maps(size: int, moves: Float[np.ndarray, "b 6"]) -> Float[np.ndarray, "b 2 3"]:
    """From a pixel (column, row, 1) of the result to one of the source: three points of a square are moved by (x, y) each."""
    middle, side = float(size // 2), float(size // 3)
    points = np.array([[middle + side, middle + side], [middle + side, middle - side], [middle - side, middle - side]])
    moved = points + moves.reshape(-1, 3, 2)
    homogeneous = np.concatenate([moved, np.ones((len(moves), 3, 1))], 2)
    return np.linalg.solve(homogeneous, np.broadcast_to(points, moved.shape)).transpose(0, 2, 1)


def elastic_transform(x: Pixels, how: tuple[float, float, float], draws: Draws) -> Pixels:
    """A random affine map, then every pixel displaced by smoothed noise; `how`: strength and deviation of the noise, reach of the map."""
    strength, sigma, reach = how
    size = x.shape[-1]
    maps = torch.from_numpy(affine_maps(size, draws.few(0, 6, -reach, reach))).to(x)[..., None, None]
    at = torch.arange(size, device=x.device, dtype=x.dtype)
    row, column = at[:, None], at[None, :]
    right, down = (maps[:, i, 0] * column + maps[:, i, 1] * row + maps[:, i, 2] for i in (0, 1))
    turned = _sampled(x, right, down, edge_repeated=False)
    noise = draws.uniform(1, 2, size, size) * 2 - 1
    move = smooth(noise, sigma, 3.0, "reflect") * strength
    return _sampled(turned, column + move[:, 0], row + move[:, 1], edge_repeated=True)
