"""Cuts boxes out of decoded pictures and resizes them: Pillow's antialiased bilinear filter bit for bit, without the GIL.

The rule is Pillow's (libImaging/Resample.c with the triangle filter): output pixel x sees the source around (x + 0.5) * scale within
max(scale, 1) pixels, weights in 22-bit fixed point, the width first and rounded to bytes, then the height. Where the box is not shrunk
that is plain bilinear interpolation with two taps.

Pictures come as planes, [x, 3, stride]: the rows of one colour of a column lie side by side. So the first pass runs along columns, a vector
of rows at a time; its result is transposed, and the second pass runs along rows, a vector of pixels at a time. The flip is a matter of
where the first pass writes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from cossl.pipelines.simd import address, compiled, kernel, read_8, read_word, write_8, write_word

LANES = 32  # bytes filtered at a time: the strides of planes and of the scratch memory are multiples of it
SMALLEST_PX = 16  # of a view: a row of pixels is at least LANES bytes
_BITS = 22
_MASK_4, _MASK_2, _MASK_1 = (np.uint64(n) for n in (0x00000000FFFFFFFF, 0x0000FFFF0000FFFF, 0x00FF00FF00FF00FF))
_N8, _N16, _N32 = np.uint64(8), np.uint64(16), np.uint64(32)


@compiled
def stride_of(height):  # type: ignore[no-untyped-def]
    """Bytes from one column of planes to the next."""
    return -(-height // LANES) * LANES


@compiled
def _weights(length, size, first, weights):  # type: ignore[no-untyped-def]
    """Fills each output pixel's first source pixel [size] and its fixed-point weights [size * taps]; returns taps, at most `length`."""
    scale = length / size
    support = max(scale, 1.0)
    taps = min(2 * int(math.ceil(support)) + 1, length)
    weights[: size * taps] = 0
    for x in range(size):
        centre = (x + 0.5) * scale
        low, high = max(0, int(centre - support + 0.5)), min(length, int(centre + support + 0.5))
        total = 0.0
        for k in range(low, high):
            total += max(0.0, 1 - abs((k - centre + 0.5) * (1 / support)))
        first[x] = min(low, length - taps)  # every tap stays inside, so that the inner loops need no bounds
        for k in range(low, high):
            weight = max(0.0, 1 - abs((k - centre + 0.5) * (1 / support))) / total
            weights[x * taps + k - first[x]] = int(0.5 + weight * (1 << _BITS))
    return taps


@kernel(LANES)
def _filter(v, source, step, weights, taps, target):  # type: ignore[no-untyped-def]
    """LANES bytes: the weighted sum of `taps` runs of bytes, `step` apart."""

    def term(tap):  # type: ignore[no-untyped-def]
        return v.load(v.offset(source, step, tap), 8) * v.splat(v.number(v.offset(weights, 4, tap), 32))

    v.store(v.accumulate(taps, v.constant(1 << (_BITS - 1)), term) >> _BITS, target, 8)


@njit(inline="always")
def _exchange(a, b, mask, shift):  # type: ignore[no-untyped-def]
    """Swaps the upper halves of a's fields with the lower halves of b's."""
    return (a & mask) | ((b & mask) << shift), ((a >> shift) & mask) | (b & ~mask)


@compiled
def transpose(source, source_step, target, target_step, rows, columns):  # type: ignore[no-untyped-def]
    """Bytes [rows, columns] at one address to [columns, rows] at another: 8 x 8 at a time in eight registers, the rest one by one."""
    whole_rows, whole_columns = rows & ~7, columns & ~7
    for y in range(0, whole_rows, 8):
        for x in range(0, whole_columns, 8):
            at = source + y * source_step + x
            a, b, c, d = read_word(at), read_word(at + source_step), read_word(at + 2 * source_step), read_word(at + 3 * source_step)
            at += 4 * source_step
            e, f, g, h = read_word(at), read_word(at + source_step), read_word(at + 2 * source_step), read_word(at + 3 * source_step)
            a, e = _exchange(a, e, _MASK_4, _N32)
            b, f = _exchange(b, f, _MASK_4, _N32)
            c, g = _exchange(c, g, _MASK_4, _N32)
            d, h = _exchange(d, h, _MASK_4, _N32)
            a, c = _exchange(a, c, _MASK_2, _N16)
            b, d = _exchange(b, d, _MASK_2, _N16)
            e, g = _exchange(e, g, _MASK_2, _N16)
            f, h = _exchange(f, h, _MASK_2, _N16)
            a, b = _exchange(a, b, _MASK_1, _N8)
            c, d = _exchange(c, d, _MASK_1, _N8)
            e, f = _exchange(e, f, _MASK_1, _N8)
            g, h = _exchange(g, h, _MASK_1, _N8)
            at = target + x * target_step + y
            for word in (a, b, c, d, e, f, g, h):
                write_word(at, word)
                at += target_step
    for y in range(rows):
        for x in range(whole_columns if y < whole_rows else 0, columns):
            write_8(target + x * target_step + y, read_8(source + y * source_step + x))


@compiled
def cut(planes, tall, top, left, height, width, flip, out, size, space):  # type: ignore[no-untyped-def]
    """Fills the size * size * 3 bytes at address `out` with a box of planes [x, 3, stride_of(tall)], mirrored where `flip`.

    The box must lie inside, LANES bytes follow the planes, and `size` is SMALLEST_PX at least; `space` comes from `workspace`.
    """
    columns, rows, first, weights = space
    stride, line, column = stride_of(tall), stride_of(3 * size), stride_of(height)
    taps = _weights(width, size, first, weights)
    for x in range(size):
        target = address(columns) + 3 * (size - 1 - x if flip else x) * column
        source, weight = address(planes) + 3 * (left + first[x]) * stride + top, address(weights) + 4 * x * taps
        for c in range(3):
            for y in range(0, height, LANES):
                _filter(source + c * stride + y, 3 * stride, weight, taps, target + c * column + y)
    transpose(address(columns), column, address(rows), line, 3 * size, height)
    taps = _weights(height, size, first, weights)
    last = 3 * size - LANES
    for y in range(size):
        source, weight = address(rows) + first[y] * line, address(weights) + 4 * y * taps
        for x in range(0, last, LANES):
            _filter(source + x, line, weight, taps, out + 3 * size * y + x)
        _filter(source + last, line, weight, taps, out + 3 * size * y + last)


@compiled
def planes_of(pixels, width, box, planes):  # type: ignore[no-untyped-def]
    """Fills planes with box = (left, top, right, bottom) of a picture `width` wide, given as flat bytes of RGB."""
    left, top, right, bottom = box
    transpose(
        address(pixels) + 3 * (top * width + left), 3 * width, address(planes), stride_of(bottom - top), bottom - top, 3 * (right - left)
    )


def workspace(longest_px: int, size: int) -> tuple[Any, ...]:
    """Memory for one thread's `cut` of boxes up to `longest_px` on a side to views of up to `size` pixels."""
    area = stride_of(3 * size) * stride_of(longest_px) + LANES
    weights = 2 * longest_px + 5 * size  # pixels times taps
    return np.empty(area, np.uint8), np.empty(area, np.uint8), np.empty(size, np.int64), np.empty(weights, np.int32)
