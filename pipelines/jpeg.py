"""A JPEG decoder in numba: the pixels that Pillow gives, bit for bit, of just the region that the views need.

Baseline and extended sequential Huffman JPEGs of 8 bits, grayscale or YCbCr at 4:4:4, 4:2:2, 4:4:0 or 4:2:0 (ITU-T T.81). Everything
else (progressive, CMYK, several scans, damage) is declined, and the caller asks Pillow. The arithmetic is libjpeg's: its accurate
integer inverse DCT (jidctint.c), its triangle-filter upsampling (jdsample.c), its fixed-point colour conversion (jdcolor.c).

Where the time goes decides the layout. Huffman decoding is 70 % of TurboJPEG's time: here the stuffed zeros are taken out beforehand, so
that bits are refilled without a branch; one look-up yields code length, run and size, and the value follows without a branch either.
Blocks outside of the region are decoded but not transformed, and nothing is read below its last row. Blocks are transformed 16 at a time,
one per vector lane. Pixels are given column by column, `[x, 3, y]`, so that colour conversion and the filters of `cut` run along
contiguous memory. On a Zen 5 core a whole 500-px picture of quality 90 takes 0.40 ms (TurboJPEG with its inexact fast DCT 0.50, Pillow
0.57), the union of two random crops 0.34 ms, 0.29 ms of the 0.40 for the Huffman codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import UInt8
from numba import njit

from cossl.pipelines import jpeg_header as header
from cossl.pipelines.cut import LANES as ROWS
from cossl.pipelines.cut import stride_of
from cossl.pipelines.simd import (
    address,
    compiled,
    kernel,
    read_8,
    read_32,
    read_word_big_endian,
    write_16,
    write_word,
    write_word_big_endian,
)

LANES = 32  # blocks gathered before they are transformed
_U0, _U1, _U56, _U63, _U64 = (np.uint64(n) for n in (0, 1, 56, 63, 64))
_LOOK_SHIFT, _TWO, _THREE, _FIVE_BITS, _FOUR_BITS, _SIX_BITS = (np.uint64(n) for n in (64 - header.LOOK, 2, 3, 31, 15, 63))
_ONES, _TOPS, _ALL = (np.uint64(n) for n in (0x0101010101010101, 0x8080808080808080, 0xFFFFFFFFFFFFFFFF))
_LARGEST = 8192  # eight times what a coefficient can be; libjpeg's shortcuts for empty rows differ from its formulas beyond that
MARGIN = 512  # zeros behind the unstuffed data: more than one damaged block can consume
OK, DECLINED = 0, 1

# how many bytes from a lane its coefficient k lies: row by row (T.81, figure 5), LANES lanes of int16 each
_PLACE = 2 * LANES * np.array(
    [0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21, 28, 35, 42, 49, 56,
     57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63], np.int32,
)  # fmt: skip


# ---- entropy decoding -------------------------------------------------------------------------------------------------------------


@compiled
def _unstuff(data, at, clean):  # type: ignore[no-untyped-def]
    """Copies data[at:] up to the next marker, without the zeros stuffed behind each 0xFF; (where the marker is, bytes copied)."""
    size, into, source, target = len(data), 0, address(data), address(clean)
    while at + 1 < size:
        if at + 8 <= size:
            word = read_word_big_endian(source + at)
            if ((word ^ _ALL) - _ONES) & word & _TOPS == _U0:  # no byte is 0xFF
                write_word_big_endian(target + into, word)
                at, into = at + 8, into + 8
                continue
        for _ in range(8):
            if at + 1 >= size:
                break
            byte = data[at]
            if byte == 0xFF:
                if data[at + 1] != 0:
                    clean[into : into + MARGIN] = 0
                    return at, into
                at += 1
            clean[into] = byte
            at, into = at + 1, into + 1
    clean[into : into + MARGIN] = 0
    return at, into


@compiled
def _long_code(table, bits):  # type: ignore[no-untyped-def]
    """The entry of a code of more than LOOK bits in the table at that address; 0 where there is none."""
    for length in range(header.LOOK + 1, 17):
        code = np.int64(bits >> np.uint64(64 - length))
        if code <= read_32(table + 4 * (header.MAXCODE + length)):
            place = (code + read_32(table + 4 * (header.OFFSET + length))) & 255
            return header.entry_of(length, np.int64(read_32(table + 4 * (header.SYMBOLS + place))), True)
    return 0


@njit(inline="always")
def _value(entry, bits):  # type: ignore[no-untyped-def]
    """The number behind a code: its bits, negative where they begin with 0 (T.81, F.2.2.1). Without a branch, as it cannot be foreseen."""
    size = (entry >> np.uint64(header.SIZE_AT)) & _FOUR_BITS
    rest = bits << ((entry >> np.uint64(header.LENGTH_AT)) & _FIVE_BITS)
    low = np.int64((_U1 << size) - _U1) & ~(np.int64(rest) >> 63)
    return np.int64((rest >> _U1) >> (_U63 - size)) - low


@compiled
def _decode_block(at, bits, count, dc, ac, quant, predicted, places, lane):  # type: ignore[no-untyped-def]
    """One block, dequantized; (at, bits, count, its DC, whether every code was one and no coefficient beyond reason).

    at, dc, ac and quant are addresses: of the data, the two tables and the quantizers. places is that of _PLACE, which says how far from
    `lane` each coefficient goes. `bits` holds what follows, uppermost bit first; at least `count` of them are valid, and after a refill
    56: a code and its value have 31 at most.
    """
    fine = True
    bits |= read_word_big_endian(at) >> count
    at += np.int64((_U63 - count) >> _THREE)
    count |= _U56
    entry = np.uint64(read_32(dc + np.int64((bits >> _LOOK_SHIFT) << _TWO)))
    if entry == _U0:
        entry = np.uint64(_long_code(dc, bits))
        fine = entry != _U0
    predicted += _value(entry, bits)
    bits <<= entry & _SIX_BITS
    count -= entry & _SIX_BITS
    coefficient = predicted * read_32(quant)
    write_16(lane, coefficient)
    extreme = coefficient + _LARGEST
    k = np.int64(1)
    while k < 64:
        bits |= read_word_big_endian(at) >> count
        at += np.int64((_U63 - count) >> _THREE)
        count |= _U56
        entry = np.uint64(read_32(ac + np.int64((bits >> _LOOK_SHIFT) << _TWO)))
        if entry == _U0:
            entry = np.uint64(_long_code(ac, bits))
            if entry == _U0:
                fine = False
                break
        k += np.int64(entry >> np.uint64(header.RUN_AT))
        value = _value(entry, bits)
        bits <<= entry & _SIX_BITS
        count -= entry & _SIX_BITS
        if k > 63:
            fine = fine and bool(k >= header.END_OF_BLOCK)
            break
        coefficient = value * read_32(quant + 4 * k)
        write_16(lane + read_32(places + 4 * k), coefficient)
        extreme |= coefficient + _LARGEST
        k += 1
    return at, bits, count, predicted, fine and 0 <= extreme < 2 * _LARGEST


@compiled
def _decode_scan(data, info, quant, tables, places, region, origin, step, tile, clean):  # type: ignore[no-untyped-def]
    """The samples of MCUs region = (left, top, right, bottom), column by column.

    Component c starts at address origin[c], its columns are step[c] bytes apart. False where the data are damaged.
    """
    coefficients, words, targets, steps = tile
    left, top, right, bottom = region
    across, down = -(-info[header.WIDTH] // (8 * info[header.H])), -(-info[header.HEIGHT] // (8 * info[header.V]))
    restart, until_restart, lanes, components = info[header.RESTART], info[header.RESTART], 0, info[header.COMPONENTS]
    marker, size = _unstuff(data, info[header.SCAN], clean)
    start, first_lane, natural = address(clean), address(coefficients), address(places)
    at, bits, count, trash = start, _U0, _U0, first_lane + 2 * 64 * LANES
    predicted, expected = np.zeros(3, np.int64), 0xD0
    coefficients[:] = 0
    for row in range(bottom):
        for column in range(right if row == bottom - 1 and bottom < down else across):
            if restart:
                if until_restart == 0:
                    used = 8 * (at - start) - np.int64(count)
                    if not 8 * (size - 1) < used <= 8 * size or marker + 2 > len(data) or data[marker + 1] != expected:
                        return False
                    expected = 0xD0 + ((expected + 1) & 7)
                    marker, size = _unstuff(data, marker + 2, clean)
                    at, bits, count, until_restart = start, _U0, _U0, restart
                    predicted[:] = 0
                until_restart -= 1
            wanted = row >= top and left <= column < right
            for c in range(components):
                h, v = (info[header.H], info[header.V]) if c == 0 else (1, 1)
                dc = address(tables) + 4 * header.TABLE * info[header.DC_OF + c]
                ac = address(tables) + 4 * header.TABLE * (2 + info[header.AC_OF + c])
                q = address(quant) + 4 * 64 * info[header.QUANT_OF + c]
                for block in range(h * v):
                    lane = first_lane + 2 * lanes if wanted else trash
                    at, bits, count, predicted[c], fine = _decode_block(at, bits, count, dc, ac, q, predicted[c], natural, lane)
                    if not fine or at > start + size + 8:
                        return False
                    if wanted:
                        x, y = (column - left) * h + block % h, (row - top) * v + block // h
                        targets[lanes], steps[lanes] = origin[c] + 8 * (x * step[c] + y), step[c]
                        lanes += 1
                        if lanes == LANES:
                            _flush(coefficients, words, targets, steps, lanes)
                            lanes = 0
    _flush(coefficients, words, targets, steps, lanes)
    used = 8 * (at - start) - np.int64(count)
    if used > 8 * size:
        return False
    return bottom < down or (used > 8 * (size - 1) and marker + 2 <= len(data) and data[marker + 1] == 0xD9)


# ---- inverse DCT ------------------------------------------------------------------------------------------------------------------


def _idct_8(coefficients: list[Any], shift: int) -> list[Any]:
    """Eight samples from eight coefficients, scaled up by 2 to the power of (13 - shift): libjpeg's jidctint.c, constants in 13 bits.

    No undamaged picture has coefficients so large that it would matter, but the four plain sums wrap around at 16 bits here as they do
    in libjpeg-turbo's vector code (jidctint-avx2.asm): pixels stay equal to Pillow's for damaged ones as well.
    """
    a, b, c, d, e, f, g, h = coefficients
    z = (c + g) * 4433
    even_2, even_3 = z - g * 15137, z + c * 6270
    even_0, even_1 = ((a + e) << 16 >> 3) + (1 << (shift - 1)), ((a - e) << 16 >> 3) + (1 << (shift - 1))
    s_0, s_3, s_1, s_2 = even_0 + even_3, even_0 - even_3, even_1 + even_2, even_1 - even_2
    z_1, z_2, z_3, z_4 = (h + b) * -7373, (f + d) * -20995, (h + d) << 16 >> 16, (f + b) << 16 >> 16
    z_5 = (z_3 + z_4) * 9633
    z_3, z_4 = z_3 * -16069 + z_5, z_4 * -3196 + z_5
    t_0, t_1 = h * 2446 + z_1 + z_3, f * 16819 + z_2 + z_4
    t_2, t_3 = d * 25172 + z_2 + z_3, b * 12299 + z_1 + z_4
    upper, lower = (s_0 + t_3, s_1 + t_2, s_2 + t_1, s_3 + t_0), (s_3 - t_0, s_2 - t_1, s_1 - t_2, s_0 - t_3)
    return [sample >> shift for sample in (*upper, *lower)]


@kernel(16)
def _transform_16(v, coefficients, words):  # type: ignore[no-untyped-def]
    """16 blocks from coefficients [row, column, lane] to words [column, lane], each the eight samples of a column, top one lowest."""
    blocks = [[v.load(v.offset(coefficients, 2 * LANES * (8 * row + column)), 16, signed=True) for row in range(8)] for column in range(8)]
    columns = [[sample.clamp(-32768, 32767) for sample in _idct_8(block, shift=11)] for block in blocks]
    rows = [_idct_8([column[row] for column in columns], shift=18) for row in range(8)]
    for c in range(8):
        low, high = (
            [(rows[row][c] + 128).clamp(0, 255) << 8 * (row % 4) for row in part] for part in (range(4), range(4, 8))
        )  # fmt: skip
        low, high = low[0] | low[1] | low[2] | low[3], high[0] | high[1] | high[2] | high[3]
        v.store(low.widen(64) | (high.widen(64) << 32), v.offset(words, 8 * LANES * c), 64)


@compiled
def _flush(coefficients, words, targets, steps, lanes):  # type: ignore[no-untyped-def]
    """Transforms the blocks gathered in `coefficients`, puts them into the planes, and clears their place."""
    for lane in range(0, lanes, 16):
        _transform_16(address(coefficients) + 2 * lane, address(words) + 8 * lane)
    for lane in range(lanes):
        target, step = targets[lane], steps[lane]
        for c in range(8):
            write_word(target + c * step, words[c * LANES + lane])
    coefficients[: 64 * LANES] = 0


# ---- chroma and colour ------------------------------------------------------------------------------------------------------------

# libjpeg's triangle filter gives the near sample 3/4 and the far one 1/4 in each direction; a direction without subsampling has both the
# same, so that one formula in sixteenths serves all. The roundings are libjpeg's, unequal for the two halves of a pair.


@kernel(ROWS)
def _across(v, near, far, blend):  # type: ignore[no-untyped-def]
    v.store(v.load(near, 8, 16) * 3 + v.load(far, 8, 16), blend, 16)


@kernel(ROWS)
def _level(v, blend, out, rounding):  # type: ignore[no-untyped-def]
    v.store((v.load(blend, 16, 16) + v.splat(rounding, 16)) >> 2, out, 16)


@kernel(ROWS)
def _down(v, blend, out, upper, lower):  # type: ignore[no-untyped-def]
    near = v.load(blend, 16, 16) * 3
    above, below = v.load(v.offset(blend, -2), 16, 16), v.load(v.offset(blend, 2), 16, 16)
    v.store(v.interleave((near + above + v.splat(upper, 16)) >> 4, (near + below + v.splat(lower, 16)) >> 4), out, 16)


@kernel(ROWS)
def _to_rgb(v, luma, cb, cr, red, green, blue):  # type: ignore[no-untyped-def]
    """JFIF's coefficients in 16 bits."""
    y, u, w = v.load(luma, 8), v.load(cb, 16) - 128, v.load(cr, 16) - 128
    v.store((y + ((w * 91881 + 32768) >> 16)).clamp(0, 255), red, 8)
    v.store((y + ((u * -22554 + w * -46802 + 32768) >> 16)).clamp(0, 255), green, 8)
    v.store((y + ((u * 116130 + 32768) >> 16)).clamp(0, 255), blue, 8)


@compiled
def _upsample(near, far, h, v, odd, low, last, rows, blend, out):  # type: ignore[no-untyped-def]
    """One column of chroma at full resolution at `out`: v rows for each of the chroma rows low .. low + rows - 1.

    near and far are the addresses of the column and its neighbour, `last` is the picture's last chroma row, from which on all are equal.
    """
    start = address(blend)
    for y in range(0, rows, ROWS):
        _across(near + low + y, far + low + y, start + 2 * (1 + y))
    first, after = max(low - 1, 0), min(low + rows, last)
    blend[0] = 3 * read_8(near + first) + read_8(far + first)
    blend[rows + 1] = 3 * read_8(near + after) + read_8(far + after)
    if v == 1:
        for y in range(0, rows, ROWS):
            _level(start + 2 * (1 + y), out + 2 * y, 0 if h == 1 else 2 if odd else 1)
        return
    upper, lower = (4, 8) if h == 1 else (7, 7) if odd else (8, 8)
    for y in range(0, rows, ROWS):
        _down(start + 2 * (1 + y), out + 4 * y, upper, lower)


@compiled
def _colour(planes, info, origin, step, corner, box, rgb, stride, blend, up):  # type: ignore[no-untyped-def]
    """rgb [x, 3, stride] of box = (left, top, right, bottom) from planes whose first sample is the picture's (x, y) = corner.

    Component c starts at address origin[c], its columns are step[c] bytes apart.
    """
    left, top, right, bottom = box
    h, v, height = info[header.H], info[header.V], bottom - top
    low, rows = top // v - corner[1] // v, (bottom - 1) // v - top // v + 1
    last, widest = (info[header.HEIGHT] - 1) // v - corner[1] // v, (info[header.WIDTH] - 1) // h
    cb, cr = address(up), address(up) + 2 * up.shape[1]
    if info[header.COMPONENTS] == 1:
        up[:, : height + ROWS] = 128
    for x in range(left, right):
        if info[header.COMPONENTS] == 3:
            near = x // h
            far = min(max(near + 2 * (x % h) - 1, 0), widest) if h == 2 else near
            near, far = near - corner[0] // h, far - corner[0] // h
            _upsample(origin[1] + near * step[1], origin[1] + far * step[1], h, v, x % h == 1, low, last, rows, blend, cb)
            _upsample(origin[2] + near * step[2], origin[2] + far * step[2], h, v, x % h == 1, low, last, rows, blend, cr)
        luma, skip = origin[0] + (x - corner[0]) * step[0] + top - corner[1], 2 * (top % v)
        red = address(rgb) + 3 * (x - left) * stride
        green, blue = red + stride, red + 2 * stride
        for y in range(0, height, ROWS):
            _to_rgb(luma + y, cb + skip + 2 * y, cr + skip + 2 * y, red + y, green + y, blue + y)


@compiled
def decode_box(data, height, width, box, rgb, space):  # type: ignore[no-untyped-def]
    """Fills rgb [x, 3, stride] with the pixels of box = (left, top, right, bottom), Pillow's own, and returns OK; or returns DECLINED.

    data is the whole JPEG file, height and width what it has to be. rgb is flat memory of 3 * box width * `stride_of(box height)` bytes.
    `space` comes from `workspace`.
    """
    info, quant, tables, known, places, planes, tile, blend, up, clean = space
    if not header.read_header(data, info, quant, tables, known) or info[header.HEIGHT] != height or info[header.WIDTH] != width:
        return DECLINED
    left, top, right, bottom = box
    wide, tall = 8 * info[header.H], 8 * info[header.V]
    across, down = -(-width // wide), -(-height // tall)
    region = (
        max(left - 1, 0) // wide, max(top - 1, 0) // tall, min(right // wide + 1, across), min(bottom // tall + 1, down)
    )  # fmt: skip
    origin, step = np.zeros(3, np.int64), np.zeros(3, np.int64)
    used = 0
    for c in range(info[header.COMPONENTS]):
        h, v = (info[header.H], info[header.V]) if c == 0 else (1, 1)
        origin[c], step[c] = address(planes) + used, 8 * (region[3] - region[1]) * v
        used += (region[2] - region[0]) * 8 * h * step[c]
    stride = stride_of(bottom - top)
    if used + 2 * ROWS > len(planes) or len(data) + MARGIN > len(clean) or 3 * (right - left) * stride > len(rgb):
        return DECLINED
    if not _decode_scan(data, info, quant, tables, places, region, origin, step, tile, clean):
        return DECLINED
    _colour(planes, info, origin, step, (region[0] * wide, region[1] * tall), box, rgb, stride, blend, up)
    return OK


def workspace(pixels: int, longest_px: int, payload_bytes: int) -> tuple[Any, ...]:
    """Memory for one thread's `decode_box`, of pictures of so many pixels, so long a side and files of so many bytes at the most."""
    tile = np.zeros(2 * 64 * LANES, np.int16), np.empty(8 * LANES, np.uint64), np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    planes = np.empty(3 * (pixels + 2 * 16 * longest_px + 16 * 16) + 2 * ROWS, np.uint8)  # up to whole MCUs
    tables = np.zeros((4, 64), np.int32), np.zeros((4, header.TABLE), np.int32), np.zeros((4, 280), np.int64), _PLACE
    line = longest_px + 4 * ROWS
    lines = np.empty(line, np.int16), np.empty((2, line), np.int16), np.empty(payload_bytes + MARGIN + 8, np.uint8)
    return (np.zeros(header.INFO, np.int64), *tables, planes, tile, *lines)


def decode(payload: UInt8[np.ndarray, " n"], height: int, width: int, out: UInt8[np.ndarray, "h w 3"]) -> bool:
    """Decodes a whole JPEG into out, as Pillow would; False, and out undefined, for one that is damaged or of a kind left to Pillow."""
    stride = stride_of(height)
    rgb = np.empty(3 * width * stride, np.uint8)
    if decode_box(payload, height, width, (0, 0, width, height), rgb, workspace(height * width, max(height, width), payload.size)) != OK:
        return False
    out[:] = rgb.reshape(width, 3, stride)[:, :, :height].transpose(2, 0, 1)
    return True
