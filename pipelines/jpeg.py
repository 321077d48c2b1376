"""A JPEG decoder in numba: the pixels that Pillow gives, bit for bit, of just the region that the views need.

Baseline and extended sequential Huffman JPEGs of 8 bits, grayscale or YCbCr at 4:4:4, 4:2:2, 4:4:0 or 4:2:0 (ITU-T T.81). Everything
else (progressive, CMYK, several scans, damage) is declined, and the caller asks Pillow. The arithmetic is libjpeg's: its accurate
integer inverse DCT (jidctint.c), its triangle-filter upsampling (jdsample.c), its fixed-point colour conversion (jdcolor.c).

Where the time goes decides the layout. Huffman decoding is 70 % of TurboJPEG's time: here one table look-up yields code, run and
value together (the idea of stb_image's fast AC table). Blocks outside of the region are decoded but not transformed, and nothing is read
below its last row. Blocks are transformed 32 at a time, one per vector lane. Planes are stored column by column, `[3, x, y]`, so that the
filters of `cut` and the colour conversion run along contiguous memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 32  # blocks transformed at a time
_LOOK = 10  # bits that one table look-up sees
# A table entry: length (6 bits), run (4), size (4), end of block, value still to be read, and the value (signed) from bit 16 on; 0: no code.
_END_OF_BLOCK, _PARTIAL = 1 << 14, 1 << 15
_ZERO, _FF, _LOOK_SHIFT = np.uint64(0), np.uint64(0xFFFFFFFF), np.uint64(64 - _LOOK)
_ONES, _TOPS = np.uint64(0x01010101), np.uint64(0x80808080)
OK, DECLINED = 0, 1

# info: what the header says, as one int64 row
_HEIGHT, _WIDTH, _COMPONENTS, _H, _V, _RESTART, _SCAN = range(7)
_QUANT_OF, _DC_OF, _AC_OF = 7, 10, 13  # three entries each: the tables of each component
_INFO = 16

_ZIGZAG = np.array(
    [0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21, 28,
     35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
     *[63] * 16], np.int64,
)  # fmt: skip

# tables: per Huffman table the look-up, then for longer codes the largest code of each length, the offset of its first symbol, the symbols
_LOOKUP = 1 << _LOOK
_MAXCODE, _OFFSET, _SYMBOLS = _LOOKUP, _LOOKUP + 18, _LOOKUP + 36
_TABLE = _LOOKUP + 36 + 256


@intrinsic
def _load_big_endian_32(typing_context, array, at):  # type: ignore[no-untyped-def]
    """The four bytes from array[at] on as one number; the caller has made sure that they exist."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(32).as_pointer())
        word = builder.load(place)
        word.align = 1
        return builder.bswap(word)

    return types.uint32(array, types.int64), build


# ---- header -----------------------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _entry(length, symbol, is_ac):  # type: ignore[no-untyped-def]
    """The table entry of a code whose value, if any, is still to be read."""
    run, size = symbol >> 4, symbol & 15
    return length + (run << 6) + (size << 10) + (_PARTIAL if size else _END_OF_BLOCK if is_ac and run != 15 else 0)


@njit(cache=True, nogil=True)
def _build_table(data, at, symbols_at, is_ac, table):  # type: ignore[no-untyped-def]
    """One Huffman table from its 16 counts at data[at:] and its symbols; False where the counts describe no code."""
    table[:_LOOKUP] = 0
    code, taken = 0, 0
    for length in range(1, 17):
        count = data[at + length - 1]
        table[_OFFSET + length] = taken - code
        for _ in range(count):
            symbol = np.int64(data[symbols_at + taken])
            table[_SYMBOLS + taken] = symbol
            if code >> length or not (is_ac or symbol < 16):
                return False
            spare, size = _LOOK - length, symbol & 15
            for rest in range(1 << spare if spare >= 0 else 0):
                entry = _entry(length, symbol, is_ac)
                if 0 < size <= spare:
                    value = rest >> (spare - size)
                    value -= ((1 << size) - 1) * (value < 1 << (size - 1))
                    entry = (length + size) + (symbol >> 4 << 6) + (value << 16)
                table[(code << spare) + rest] = entry
            code, taken = code + 1, taken + 1
        table[_MAXCODE + length] = code - 1 if count else -1
        code <<= 1
    return True


@njit(cache=True, nogil=True)
def _read_tables(data, at, end, tables, known, defined):  # type: ignore[no-untyped-def]
    """The Huffman tables of one DHT segment; `known` remembers each table's bytes, so that equal tables are built once."""
    while at < end:
        kind, number = data[at] >> 4, data[at] & 15
        if kind > 1 or number > 1 or at + 17 > end:
            return False
        total = 0
        for i in range(16):
            total += data[at + 1 + i]
        size, row = 16 + total, 2 * kind + number
        if total > 256 or at + 1 + size > end:
            return False
        same = known[row, 0] == size
        for i in range(size):
            if not same:
                break
            same = known[row, 1 + i] == data[at + 1 + i]
        if not same:
            known[row, 0] = 0
            if not _build_table(data, at + 1, at + 17, kind == 1, tables[row]):
                return False
            known[row, 0] = size
            for i in range(size):
                known[row, 1 + i] = data[at + 1 + i]
        defined[4 + row] = 1
        at += 1 + size
    return True


@njit(cache=True, nogil=True)
def _read_frame(data, at, end, info):  # type: ignore[no-untyped-def]
    """SOF0 or SOF1: size, components, subsampling. False for what is declined."""
    if end - at < 6 or data[at] != 8:
        return False
    info[_HEIGHT], info[_WIDTH] = (data[at + 1] << 8) + data[at + 2], (data[at + 3] << 8) + data[at + 4]
    components = info[_COMPONENTS] = data[at + 5]
    if components not in (1, 3) or end - at != 6 + 3 * components:
        return False
    info[_H], info[_V] = data[at + 7] >> 4, data[at + 7] & 15
    for c in range(components):
        info[_QUANT_OF + c] = data[at + 8 + 3 * c]
        if info[_QUANT_OF + c] > 3 or (c and data[at + 7 + 3 * c] != 0x11):
            return False
    if components == 1:
        info[_H] = info[_V] = 1  # a single component is not interleaved, whatever its factors say
    elif data[at + 6] == 82 and data[at + 9] == 71 and data[at + 12] == 66:
        return False  # "RGB"
    if not (1 <= info[_H] <= 2 and 1 <= info[_V] <= 2):
        return False
    return info[_H] == 1 or info[_WIDTH] > 4  # libjpeg has no triangle filter for chroma of one or two columns


@njit(cache=True, nogil=True)
def _read_scan(data, at, end, order, info, defined):  # type: ignore[no-untyped-def]
    """SOS: one scan with every component, no progression, all of its tables defined."""
    components = info[_COMPONENTS]
    if end - at != 4 + 2 * components or data[at] != components:
        return False
    for c in range(components):
        if data[at + 1 + 2 * c] != data[order + 3 * c]:
            return False
        info[_DC_OF + c], info[_AC_OF + c] = data[at + 2 + 2 * c] >> 4, data[at + 2 + 2 * c] & 15
        if info[_DC_OF + c] > 1 or info[_AC_OF + c] > 1:
            return False
        if not (defined[info[_QUANT_OF + c]] and defined[4 + info[_DC_OF + c]] and defined[6 + info[_AC_OF + c]]):
            return False
    last = at + 1 + 2 * components
    return data[last] == 0 and data[last + 1] == 63 and data[last + 2] == 0


@njit(cache=True, nogil=True)
def _read_quantizers(data, at, end, quant, defined):  # type: ignore[no-untyped-def]
    while at < end:
        if data[at] > 3 or at + 65 > end:  # the upper four bits tell of 16-bit tables
            return False
        defined[data[at]] = 1
        for k in range(64):
            quant[data[at], k] = data[at + 1 + k]
        at += 65
    return True


@njit(cache=True, nogil=True)
def _read_header(data, info, quant, tables, known):  # type: ignore[no-untyped-def]
    """Fills info, quant and tables from the segments up to the scan. False for what is damaged or declined."""
    at, size, order = 2, len(data), 0
    defined = np.zeros(8, np.int64)  # four quantizers, then the Huffman tables: DC 0, DC 1, AC 0, AC 1
    info[:] = 0
    if size < 4 or data[0] != 0xFF or data[1] != 0xD8:
        return False
    while at + 4 <= size:
        marker, length = data[at + 1], (data[at + 2] << 8) + data[at + 3]
        start, end = at + 4, at + 2 + length
        if data[at] != 0xFF or length < 2 or end > size:
            return False
        fine = True
        if marker == 0xDB:
            fine = _read_quantizers(data, start, end, quant, defined)
        elif marker == 0xC4:
            fine = _read_tables(data, start, end, tables, known, defined)
        elif marker in (0xC0, 0xC1):
            fine, order = order == 0 and _read_frame(data, start, end, info), start + 6
        elif marker == 0xDD:
            fine = length == 4
            info[_RESTART] = (data[start] << 8) + data[start + 1] if fine else 0
        elif marker == 0xEE and length >= 14 and data[start] == 65 and data[start + 1] == 100:
            fine = data[start + 11] == 1  # Adobe's marker: 1 is YCbCr
        elif marker == 0xDA:
            info[_SCAN] = end
            return order > 0 and _read_scan(data, start, end, order, info, defined)
        elif marker < 0xC0 or 0xC1 < marker < 0xDD:
            return False  # another kind of frame, arithmetic coding, or no segment at all
        if not fine:
            return False
        at = end
    return False


# ---- entropy decoding -------------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _refill(data, at, bits, count, missing):  # type: ignore[no-untyped-def]
    """At least 32 valid bits, left-aligned. At a marker or the end zeros follow, and `missing` counts them."""
    if at + 4 <= len(data):
        word = np.uint64(_load_big_endian_32(data, at))
        if ((word ^ _FF) - _ONES) & ~(word ^ _FF) & _TOPS == _ZERO:  # no byte is 0xFF
            return at + 4, bits | (word << np.uint64(32 - count)), count + 32, missing
    while count <= 48:
        byte = _ZERO
        if at + 1 < len(data) and (data[at] != 0xFF or data[at + 1] == 0):
            byte = np.uint64(data[at])
            at += 2 if data[at] == 0xFF else 1
        else:
            missing += 8
        bits |= byte << np.uint64(56 - count)
        count += 8
    return at, bits, count, missing


@njit(cache=True, nogil=True)
def _long_code(table, bits):  # type: ignore[no-untyped-def]
    """The entry of a code of more than _LOOK bits; 0 where there is none."""
    for length in range(_LOOK + 1, 17):
        code = np.int64(bits >> np.uint64(64 - length))
        if code <= table[_MAXCODE + length]:
            return _entry(length, np.int64(table[_SYMBOLS + ((code + table[_OFFSET + length]) & 255)]), True)
    return np.int64(0)


@njit(cache=True, nogil=True)
def _take(entry, bits, count):  # type: ignore[no-untyped-def]
    """The value of a table entry, and the bits after it."""
    length, size, value = entry & 63, (entry >> 10) & 15, entry >> 16
    bits, count = bits << np.uint64(length), count - length
    if entry & _PARTIAL:
        raw = np.int64(bits >> np.uint64(64 - size))
        value = raw - ((1 << size) - 1) * (raw < 1 << (size - 1))
        bits, count = bits << np.uint64(size), count - size
    return value, bits, count


@njit(cache=True, nogil=True)
def _decode_block(data, at, bits, count, missing, dc, ac, quant, predicted, coefficients, lane):  # type: ignore[no-untyped-def]
    """One block, dequantized, into coefficients[lane::LANES]. The last number returned is over 64 where a code is broken."""
    if count < 32:
        at, bits, count, missing = _refill(data, at, bits, count, missing)
    entry = np.int64(dc[bits >> _LOOK_SHIFT])
    if entry == 0:
        entry = _long_code(dc, bits)
    value, bits, count = _take(entry, bits, count)
    predicted += value
    coefficients[lane] = predicted * quant[0]
    k = 1 if entry else 99
    while k < 64:
        if count < 32:
            at, bits, count, missing = _refill(data, at, bits, count, missing)
        entry = np.int64(ac[bits >> _LOOK_SHIFT])
        if entry == 0:
            entry = _long_code(ac, bits)
            if entry == 0:
                k = 99
                break
        value, bits, count = _take(entry, bits, count)
        if entry & _END_OF_BLOCK:
            break
        k += (entry >> 6) & 15
        coefficients[_ZIGZAG[k] * LANES + lane] = value * quant[k & 63]
        k += 1
    return at, bits, count, missing, predicted, k


@njit(cache=True, nogil=True)
def _decode_scan(data, info, quant, tables, region, origin, stride, planes, tile):  # type: ignore[no-untyped-def]
    """The samples of MCUs region = (left, top, right, bottom) into `planes`, words of eight samples of a column.

    Component c starts at word origin[c], its columns are stride[c] words apart. False where the data are damaged.
    """
    coefficients, work, samples, words, targets, strides, trash = tile
    left, top, right, bottom = region
    components, across = info[_COMPONENTS], -(-info[_WIDTH] // (8 * info[_H]))
    down = -(-info[_HEIGHT] // (8 * info[_V]))
    at, bits, count, missing, lanes, until_restart = info[_SCAN], _ZERO, 0, 0, 0, info[_RESTART]
    predicted = np.zeros(3, np.int64)
    coefficients[:] = 0
    for row in range(bottom):
        for column in range(right if row == bottom - 1 and bottom < down else across):
            if info[_RESTART] and until_restart == 0:
                if not missing <= count < missing + 8 or at + 2 > len(data) or data[at] != 0xFF or data[at + 1] >> 3 != 0xD0 >> 3:
                    return False
                at, bits, count, missing, until_restart = at + 2, _ZERO, 0, 0, info[_RESTART]
                predicted[:] = 0
            until_restart -= 1
            wanted = row >= top and left <= column < right
            for c in range(components):
                h, v = (info[_H], info[_V]) if c == 0 else (1, 1)
                dc, ac = tables[info[_DC_OF + c]], tables[2 + info[_AC_OF + c]]
                for block in range(h * v):
                    into, lane = (coefficients, lanes) if wanted else (trash, 0)
                    at, bits, count, missing, predicted[c], k = _decode_block(
                        data, at, bits, count, missing, dc, ac, quant[info[_QUANT_OF + c]], predicted[c], into, lane
                    )
                    if k > 64:
                        return False
                    if wanted:
                        x, y = (column - left) * h + block % h, (row - top) * v + block // h
                        targets[lanes], strides[lanes] = origin[c] + 8 * x * stride[c] + y, stride[c]
                        lanes += 1
                        if lanes == LANES:
                            _transform(coefficients, work, samples, words)
                            _scatter(words, targets, strides, planes, lanes)
                            coefficients[:] = 0
                            lanes = 0
    _transform(coefficients, work, samples, words)
    _scatter(words, targets, strides, planes, lanes)
    if missing > count:
        return False
    return bottom < down or (count < missing + 8 and at + 2 <= len(data) and data[at] == 0xFF and data[at + 1] == 0xD9)


# ---- inverse DCT ------------------------------------------------------------------------------------------------------------------


@njit(inline="always")
def _idct_8(a, b, c, d, e, f, g, h, shift):  # type: ignore[no-untyped-def]
    """Eight samples from eight coefficients, scaled up by 2 to the power of (13 - shift): libjpeg's jidctint.c, constants in 13 bits."""
    i = np.int32  # numba's integers grow to 64 bits at every step; vectors of 32 bits hold twice as many
    half = i(1 << (shift - 1))
    z = i(i(c + g) * i(4433))
    even_2, even_3 = i(z - i(g * i(15137))), i(z + i(c * i(6270)))
    even_0, even_1 = i(i(i(a + e) << 13) + half), i(i(i(a - e) << 13) + half)
    s_0, s_3, s_1, s_2 = i(even_0 + even_3), i(even_0 - even_3), i(even_1 + even_2), i(even_1 - even_2)
    z_1, z_2, z_3, z_4 = i(i(h + b) * i(-7373)), i(i(f + d) * i(-20995)), i(h + d), i(f + b)
    z_5 = i(i(z_3 + z_4) * i(9633))
    z_3, z_4 = i(i(z_3 * i(-16069)) + z_5), i(i(z_4 * i(-3196)) + z_5)
    t_0, t_1 = i(i(i(h * i(2446)) + z_1) + z_3), i(i(i(f * i(16819)) + z_2) + z_4)
    t_2, t_3 = i(i(i(d * i(25172)) + z_2) + z_3), i(i(i(b * i(12299)) + z_1) + z_4)
    return (
        i(s_0 + t_3) >> shift, i(s_1 + t_2) >> shift, i(s_2 + t_1) >> shift, i(s_3 + t_0) >> shift,
        i(s_3 - t_0) >> shift, i(s_2 - t_1) >> shift, i(s_1 - t_2) >> shift, i(s_0 - t_3) >> shift,
    )  # fmt: skip


@njit(inline="always")
def _clamped(x):  # type: ignore[no-untyped-def]
    return np.uint8(min(max(np.int32(np.int32(x) + np.int32(128)), np.int32(0)), np.int32(255)))


@njit(cache=True, nogil=True)
def _transform(coefficients, work, samples, words):  # type: ignore[no-untyped-def]
    """LANES blocks of coefficients [row, column, lane] to columns of eight samples: words [column, lane]."""
    x, w = coefficients.reshape(8, 8, LANES), work.reshape(8, 8, LANES)
    for c in range(8):
        for n in range(LANES):
            w[0, c, n], w[1, c, n], w[2, c, n], w[3, c, n], w[4, c, n], w[5, c, n], w[6, c, n], w[7, c, n] = _idct_8(
                np.int32(x[0, c, n]), np.int32(x[1, c, n]), np.int32(x[2, c, n]), np.int32(x[3, c, n]),
                np.int32(x[4, c, n]), np.int32(x[5, c, n]), np.int32(x[6, c, n]), np.int32(x[7, c, n]), 11,
            )  # fmt: skip
    s = samples.reshape(8, 8, LANES)
    for r in range(8):
        for n in range(LANES):
            a, b, c, d, e, f, g, h = _idct_8(
                w[r, 0, n], w[r, 1, n], w[r, 2, n], w[r, 3, n], w[r, 4, n], w[r, 5, n], w[r, 6, n], w[r, 7, n], 18
            )
            s[0, r, n], s[1, r, n], s[2, r, n], s[3, r, n] = _clamped(a), _clamped(b), _clamped(c), _clamped(d)
            s[4, r, n], s[5, r, n], s[6, r, n], s[7, r, n] = _clamped(e), _clamped(f), _clamped(g), _clamped(h)
    for c in range(8):
        for n in range(LANES):
            word = np.uint64(s[c, 0, n])
            for i in range(1, 8):
                word |= np.uint64(s[c, i, n]) << np.uint64(8 * i)
            words[c, n] = word


@njit(cache=True, nogil=True)
def _scatter(words, targets, strides, planes, lanes):  # type: ignore[no-untyped-def]
    for n in range(lanes):
        for c in range(8):
            planes[targets[n] + c * strides[n]] = words[c, n]


# ---- chroma and colour ------------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _upsample(near, far, h, v, odd, low, last, rows, blend, out):  # type: ignore[no-untyped-def]
    """One column of chroma at full resolution: v rows of out for each of the chroma rows low .. low + rows - 1.

    libjpeg's triangle filter, 3/4 of the near sample and 1/4 of the far one; at the picture's edge the near one stands for both.
    `far` is the neighbouring column, `last` the picture's last chroma row. libjpeg rounds the two halves of a pair differently
    (`odd` columns, lower rows), so that no drift adds up.
    """
    a, b = np.int16(3 if h == 2 else 1), np.int16(1 if h == 2 else 0)
    for y in range(rows):
        blend[1 + y] = a * np.int16(near[low + y]) + b * np.int16(far[low + y])
    first, after = max(low - 1, 0), min(low + rows, last)
    blend[0], blend[rows + 1] = a * near[first] + b * far[first], a * near[after] + b * far[after]
    if v == 1:
        shift, bias = (2, np.int32(2 if odd else 1)) if h == 2 else (0, np.int32(0))
        for y in range(rows):
            out[y] = np.int32(np.int32(blend[1 + y]) + bias) >> shift
        return
    shift, above, below = 2, np.int32(1), np.int32(2)
    if h == 2:
        shift, above = 4, np.int32(7 if odd else 8)
        below = above
    for y in range(rows):
        c = np.int32(np.int32(3) * np.int32(blend[1 + y]))
        out[2 * y] = np.int32(np.int32(c + np.int32(blend[y])) + above) >> shift
        out[2 * y + 1] = np.int32(np.int32(c + np.int32(blend[2 + y])) + below) >> shift


@njit(inline="always")
def _byte(x):  # type: ignore[no-untyped-def]
    return np.uint8(min(max(x, np.int32(0)), np.int32(255)))


@njit(cache=True, nogil=True)
def _to_rgb(luma, cb, cr, red, green, blue):  # type: ignore[no-untyped-def]
    """One column from YCbCr to RGB, JFIF's coefficients in 16 bits."""
    i = np.int32
    for y in range(len(red)):
        base, u, w = i(luma[y]), i(i(cb[y]) - i(128)), i(i(cr[y]) - i(128))
        red[y] = _byte(i(base + (i(i(w * i(91881)) + i(32768)) >> 16)))
        green[y] = _byte(i(base + (i(i(i(u * i(-22554)) + i(w * i(-46802))) + i(32768)) >> 16)))
        blue[y] = _byte(i(base + (i(i(u * i(116130)) + i(32768)) >> 16)))


@njit(cache=True, nogil=True)
def _colour(planes, info, origin, stride, corner, box, rgb, blend, up):  # type: ignore[no-untyped-def]
    """rgb [3, x, y] of box = (left, top, right, bottom) from decoded planes whose first sample is the picture's (x, y) = corner."""
    left, top, right, bottom = box
    h, v, height = info[_H], info[_V], bottom - top
    start, step = 8 * origin, 8 * stride  # in bytes
    low = top // v - corner[1] // v
    rows = (bottom - 1) // v - top // v + 1
    last, widest = (info[_HEIGHT] - 1) // v - corner[1] // v, (info[_WIDTH] - 1) // h
    skip = top % v
    for x in range(left, right):
        begin = start[0] + (x - corner[0]) * step[0] + top - corner[1]
        luma = planes[begin : begin + height]
        red, green, blue = rgb[0, x - left, :height], rgb[1, x - left, :height], rgb[2, x - left, :height]
        if info[_COMPONENTS] == 1:
            red[:], green[:], blue[:] = luma, luma, luma
            continue
        for c in range(1, 3):
            near = x // h
            far = min(max(near + 2 * (x % h) - 1, 0), widest) if h == 2 else near
            near, far = start[c] + (near - corner[0] // h) * step[c], start[c] + (far - corner[0] // h) * step[c]
            _upsample(planes[near : near + step[c]], planes[far : far + step[c]], h, v, x % h == 1, low, last, rows, blend, up[c - 1])
        _to_rgb(luma, up[0, skip : skip + height], up[1, skip : skip + height], red, green, blue)


@njit(cache=True, nogil=True)
def decode_box(data, height, width, box, rgb, space):  # type: ignore[no-untyped-def]
    """Fills rgb [3, x, y] with the pixels of box = (left, top, right, bottom), Pillow's own, and returns OK; or returns DECLINED.

    data is the whole JPEG file, height and width what it has to be. `space` comes from `workspace`.
    """
    info, quant, tables, known, planes, tile, blend, up = space
    if not _read_header(data, info, quant, tables, known) or info[_HEIGHT] != height or info[_WIDTH] != width:
        return DECLINED
    left, top, right, bottom = box
    wide, tall = 8 * info[_H], 8 * info[_V]
    across, down = -(-width // wide), -(-height // tall)
    region = (
        max(left - 1, 0) // wide, max(top - 1, 0) // tall, min(right // wide + 1, across), min(bottom // tall + 1, down)
    )  # fmt: skip
    origin, stride = np.zeros(3, np.int64), np.zeros(3, np.int64)
    used = 0
    for c in range(info[_COMPONENTS]):
        h, v = (info[_H], info[_V]) if c == 0 else (1, 1)
        origin[c], stride[c] = used, (region[3] - region[1]) * v
        used += (region[2] - region[0]) * 8 * h * stride[c]
    if used > len(planes) or not _decode_scan(data, info, quant, tables, region, origin, stride, planes, tile):
        return DECLINED
    _colour(planes.view(np.uint8), info, origin, stride, (region[0] * wide, region[1] * tall), box, rgb, blend, up)
    return OK


def workspace(pixels: int, longest_px: int) -> tuple[Any, ...]:
    """Memory for one thread's `decode_box` of boxes of up to `pixels` pixels and `longest_px` on a side."""
    tile = (
        np.empty(64 * LANES, np.int16), np.empty(64 * LANES, np.int32), np.empty(64 * LANES, np.uint8), np.empty((8, LANES), np.uint64),
        np.empty(LANES, np.int64), np.empty(LANES, np.int64), np.empty(64 * LANES, np.int16),
    )  # fmt: skip
    words = 3 * (pixels + 34 * 2 * longest_px + 34 * 34) // 8  # boxes grow by a margin and to whole MCUs
    return (
        np.zeros(_INFO, np.int64), np.zeros((4, 64), np.int64), np.zeros((4, _TABLE), np.int32), np.zeros((4, 280), np.int64),
        np.empty(words, np.uint64), tile, np.empty(longest_px + 64, np.int16), np.empty((2, longest_px + 64), np.int16),
    )  # fmt: skip


def decode(payload: UInt8[np.ndarray, " n"], height: int, width: int, out: UInt8[np.ndarray, "h w 3"]) -> bool:
    """Decodes a whole JPEG into out, as Pillow would; False, and out undefined, for one that is damaged or of a kind left to Pillow."""
    rgb = np.empty((3, width, height), np.uint8)
    if decode_box(payload, height, width, (0, 0, width, height), rgb, workspace(height * width, max(height, width))) != OK:
        return False
    out[:] = rgb.transpose(2, 1, 0)
    return True
