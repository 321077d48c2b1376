"""Crop boxes, flips and photometric parameters as pure functions of (seed, epoch, sample index, view).

Randomness is counter-based: a hash of the key and a slot number gives each draw, so there is no state to carry, and any
backend, worker count, world size or restart meets the same numbers. A loader renders what stands here and draws nothing.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float, Int

from cossl.pipelines.simd import compiled

PHOTOMETRY = ("brightness", "contrast", "saturation", "hue", "order", "grayscale", "blur_sigma", "solarize")

# The finalizer of splitmix64 (Steele, Lea and Flood 2014): every output bit depends on every input bit.
_GOLDEN, _MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)
_UNIT = 2.0**-53


@compiled
def _mix(z: np.uint64) -> np.uint64:
    z = (z ^ (z >> _S30)) * _MIX_1
    z = (z ^ (z >> _S27)) * _MIX_2
    return z ^ (z >> _S31)


@compiled
def stream(seed: int, epoch: int, index: int, view: int, purpose: int) -> np.uint64:
    """The key of one independent stream of draws."""
    key = _mix(np.uint64(seed) + _GOLDEN)
    for word in (epoch, index, view, purpose):
        key = _mix((key ^ np.uint64(word)) + _GOLDEN)
    return key


@compiled
def uniform(key: np.uint64, slot: int, low: float, high: float) -> float:
    """Draw number `slot` of the stream, uniform in [low, high)."""
    bits = _mix(key + np.uint64(slot + 1) * _GOLDEN)
    return low + (high - low) * (float(bits >> _S11) * _UNIT)


GEOMETRY, COLOUR, POSITIONS = 0, 1, 2  # purposes: one stream each


@compiled
def _random_resized_crop(key: np.uint64, height: int, width: int, spec: np.ndarray, box: np.ndarray) -> None:
    low, high = spec[0], spec[1]
    log_low, log_high = math.log(spec[2]), math.log(spec[3])
    for attempt in range(10):
        area = height * width * uniform(key, 4 * attempt, low, high)
        aspect = math.exp(uniform(key, 4 * attempt + 1, log_low, log_high))
        w, h = int(round(math.sqrt(area * aspect))), int(round(math.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            box[0] = int(uniform(key, 4 * attempt + 2, 0, height - h + 1))
            box[1] = int(uniform(key, 4 * attempt + 3, 0, width - w + 1))
            box[2], box[3] = h, w
            return
    ratio = width / height
    h = max(1, int(round(width / spec[2]))) if ratio < spec[2] else height
    w = max(1, int(round(height * spec[3]))) if ratio > spec[3] else width
    box[0], box[1], box[2], box[3] = (height - h) // 2, (width - w) // 2, h, w


@compiled
def _photometry(key: np.uint64, spec: np.ndarray, row: np.ndarray) -> None:
    row[:] = (1, 1, 1, 0, 0, 0, 0, 0)
    if uniform(key, 0, 0, 1) < spec[5]:
        for i in range(3):
            row[i] = uniform(key, 1 + i, max(0.0, 1 - spec[6 + i]), 1 + spec[6 + i])
        row[3] = uniform(key, 4, -spec[9], spec[9])
        row[4] = int(uniform(key, 5, 0, 24))
    if uniform(key, 6, 0, 1) < spec[10]:
        row[5] = 1
    if uniform(key, 7, 0, 1) < spec[11]:
        row[6] = uniform(key, 8, spec[12], spec[13])
    if uniform(key, 9, 0, 1) < spec[14]:
        row[7] = 1


@compiled
def _sample_views(seed, epoch, index, heights, widths, specs, boxes, flips, photometry):  # type: ignore[no-untyped-def]
    for b in range(len(index)):
        for v in range(len(specs)):
            key = stream(seed, epoch, index[b], v, GEOMETRY)
            if specs[v, 15] > 0:
                side = max(1, int(round(specs[v, 15] * min(heights[b], widths[b]))))
                boxes[b, v] = ((heights[b] - side) // 2, (widths[b] - side) // 2, side, side)
            else:
                _random_resized_crop(key, heights[b], widths[b], specs[v], boxes[b, v])
            flips[b, v] = uniform(key, 40, 0, 1) < specs[v, 4]
            _photometry(stream(seed, epoch, index[b], v, COLOUR), specs[v], photometry[b, v])


def sample_views(
    seed: int,
    epoch: int,
    index: Int[np.ndarray, " b"],
    heights: Int[np.ndarray, " b"],
    widths: Int[np.ndarray, " b"],
    specs: Float[np.ndarray, "v 16"],
) -> tuple[Int[np.ndarray, "b v 4"], Bool[np.ndarray, "b v"], Float[np.ndarray, "b v 8"]]:
    """Boxes (top, left, height, width) in pixels of the source, flips, and photometric parameters of each view.

    The crop is torchvision's RandomResizedCrop.get_params: ten tries at an area and a log-uniform aspect ratio, then
    the largest central box within the ratio bounds. The colour ranges are those of torchvision's ColorJitter. `order`
    numbers the 24 orders of the four jitter operations lexicographically. The box depends on the picture's size: a
    picture that was shrunk at conversion gets another one, at the same place up to rounding.
    """
    count, views = len(index), len(specs)
    boxes = np.empty((count, views, 4), np.int32)
    flips = np.empty((count, views), np.bool_)
    photometry = np.empty((count, views, len(PHOTOMETRY)), np.float32)
    _sample_views(seed, epoch, index.astype(np.int64), heights.astype(np.int64), widths.astype(np.int64), specs, boxes, flips, photometry)
    return boxes, flips, photometry


def box_fractions(
    boxes: Int[np.ndarray, "b v 4"], heights: Int[np.ndarray, " b"], widths: Int[np.ndarray, " b"]
) -> Float[np.ndarray, "b v 4"]:
    """The boxes as (left, top, right, bottom), fractions of the source picture, float32."""
    top, left, h, w = (boxes[..., i].astype(np.float64) for i in range(4))
    tall, wide = heights[:, None], widths[:, None]
    return np.stack([left / wide, top / tall, (left + w) / wide, (top + h) / tall], axis=-1).astype(np.float32)
