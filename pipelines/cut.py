"""Cuts a box out of a decoded picture and resizes it: PIL's antialiased bilinear filter to one grey level, without the GIL.

The rule is Pillow's (ImagingResample with the triangle filter): output pixel x sees the source around (x + 0.5) * scale
within max(scale, 1) pixels, weights in 22-bit fixed point, rows first and rounded to bytes, then columns. Only source
rows that take part are filtered, and the flip is a matter of where a column is written. On boxes much taller than wide single
pixels were seen to differ by one level (it may take columns first there); a test holds them to that.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import UInt8
from numba import njit

_BITS = 22
_HALF = 1 << (_BITS - 1)


@njit(cache=True, nogil=True)
def _weights(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """First source pixel [size] and fixed-point weights [size, taps] of each output pixel along one axis."""
    scale = length / size
    support = max(scale, 1.0)
    taps = 2 * int(math.ceil(support)) + 1
    first, weights = np.zeros(size, np.int64), np.zeros((size, taps), np.int64)
    raw = np.empty(taps)
    for x in range(size):
        centre = (x + 0.5) * scale
        low, high = max(0, int(centre - support + 0.5)), min(length, int(centre + support + 0.5))
        total = 0.0
        for k in range(high - low):
            raw[k] = max(0.0, 1 - abs((low + k - centre + 0.5) * (1 / support)))
            total += raw[k]
        first[x] = min(low, max(0, length - taps))  # every tap stays inside, so that the inner loops need no bounds
        for k in range(high - low):
            weights[x, low - first[x] + k] = int(0.5 + raw[k] * (1 / total) * (1 << _BITS))
    return first, weights


@njit(cache=True, nogil=True)
def cut(
    image: UInt8[np.ndarray, "h w 3"], top: int, left: int, height: int, width: int, flip: bool, out: UInt8[np.ndarray, "s s 3"]
) -> None:
    """Fills `out` with the box of `image`, antialiased where it shrinks, mirrored where `flip`."""
    size = out.shape[0]
    first_x, weight_x = _weights(width, size)
    first_y, weight_y = _weights(height, size)
    taps_x, taps_y = min(weight_x.shape[1], width), min(weight_y.shape[1], height)
    rows = np.empty((height, size, 3), np.uint8)
    for y in range(height):
        line = image[top + y]
        for x in range(size):
            a = b = c = _HALF
            at = left + first_x[x]
            for k in range(taps_x):
                w = weight_x[x, k]
                a += w * line[at + k, 0]
                b += w * line[at + k, 1]
                c += w * line[at + k, 2]
            target = rows[y, size - 1 - x if flip else x]
            target[0], target[1], target[2] = a >> _BITS, b >> _BITS, c >> _BITS
    total = np.empty(size * 3, np.int64)
    flat = rows.reshape(height, size * 3)
    for y in range(size):
        total[:] = _HALF
        for k in range(taps_y):
            w = weight_y[y, k]
            if w != 0:
                source = flat[first_y[y] + k]
                for i in range(size * 3):
                    total[i] += w * source[i]
        target_row = out[y].reshape(size * 3)
        for i in range(size * 3):
            target_row[i] = total[i] >> _BITS
