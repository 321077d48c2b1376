"""A JPEG decoder in numba: the pixels that Pillow gives, bit for bit, of just the region that the views need.

Baseline and extended sequential Huffman JPEGs of 8 bits, grayscale or YCbCr at 4:4:4, 4:2:2, 4:4:0 or 4:2:0 (ITU-T T.81). Everything
else (progressive, CMYK, several scans, damage) is declined, and the caller asks Pillow. The arithmetic is libjpeg's: its accurate
integer inverse DCT (jidctint.c), its triangle-filter upsampling (jdsample.c), its fixed-point colour conversion (jdcolor.c).

Where the time goes decides the layout. Huffman decoding is 70 % of TurboJPEG's time: here one table look-up yields code, run and
value together (the idea of stb_image's fast AC table). Blocks outside of the region are decoded but not transformed, and nothing is read
below its last row. Blocks are transformed 32 at a time, one per vector lane. Pixels are given column by column, `[x, 3, y]`, so that colour
conversion and the filters of `cut` run along contiguous memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from numba import njit

from cossl.pipelines.cut import LANES as ROWS
from cossl.pipelines.cut import stride_of
from cossl.pipelines.simd import address, kernel, read_8, read_32, read_word_big_endian, write_16, write_word, write_word_big_endian

LANES = 32  # blocks transformed at a time
_LOOK = 10  # bits that one table look-up sees
# A table entry, 0 where there is no code: bits of code and value together (6), bits of the code (5), of the value (4), run before it (8).
_SIZE_AT, _RUN_AT, _LENGTH_AT = 11, 15, 6
_END_OF_BLOCK = 128  # a run that leaves the block
_U0, _U1, _U56, _U63, _U64 = (np.uint64(n) for n in (0, 1, 56, 63, 64))
_LOOK_SHIFT, _TWO, _THREE, _FIVE_BITS, _FOUR_BITS, _SIX_BITS = (np.uint64(n) for n in (64 - _LOOK, 2, 3, 31, 15, 63))
_ONES, _TOPS, _ALL = (np.uint64(n) for n in (0x0101010101010101, 0x8080808080808080, 0xFFFFFFFFFFFFFFFF))
_LARGEST = 8192  # eight times what a coefficient can be; libjpeg's shortcuts for empty rows differ from its formulas beyond that
MARGIN = 512  # zeros behind the unstuffed data: more than one damaged block can consume
OK, DECLINED = 0, 1

# info: what the header says, as one int64 row
_HEIGHT, _WIDTH, _COMPONENTS, _H, _V, _RESTART, _SCAN = range(7)
_QUANT_OF, _DC_OF, _AC_OF = 7, 10, 13  # three entries each: the tables of each component
_INFO = 16

# how many bytes from a lane its coefficient k lies: row by row (T.81, figure 5), LANES lanes of int16 each
_PLACE = 2 * LANES * np.array(
    [0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21, 28, 35, 42, 49, 56,
     57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63], np.int32,
)  # fmt: skip

# tables: per Huffman table the look-up, then for longer codes the largest code of each length, the offset of its first symbol, the symbols
_LOOKUP = 1 << _LOOK
_MAXCODE, _OFFSET, _SYMBOLS = _LOOKUP, _LOOKUP + 18, _LOOKUP + 36
_TABLE = _LOOKUP + 36 + 256


# ---- header -----------------------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _entry(length, symbol, is_ac):  # type: ignore[no-untyped-def]
    """The table entry of a code of `length` bits."""
    run, size = symbol >> 4, symbol & 15
    if is_ac and size == 0 and run != 15:
        run = _END_OF_BLOCK
    return (length + size) + (length << _LENGTH_AT) + (size << _SIZE_AT) + (run << _RUN_AT)


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
            if length <= _LOOK:
                spare = _LOOK - length
                table[code << spare : (code + 1) << spare] = _entry(length, symbol, is_ac)
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
        elif not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            return False  # neither an application's segment nor a comment: another kind of frame, arithmetic coding, damage
        if not fine:
            return False
        at = end
    return False


# ---- entropy decoding -------------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
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


@njit(cache=True, nogil=True)
def _long_code(table, bits):  # type: ignore[no-untyped-def]
    """The entry of a code of more than _LOOK bits in the table at that address; 0 where there is none."""
    for length in range(_LOOK + 1, 17):
        code = np.int64(bits >> np.uint64(64 - length))
        if code <= read_32(table + 4 * (_MAXCODE + length)):
            place = (code + read_32(table + 4 * (_OFFSET + length))) & 255
            return _entry(length, np.int64(read_32(table + 4 * (_SYMBOLS + place))), True)
    return 0


@njit(inline="always")
def _value(entry, bits):  # type: ignore[no-untyped-def]
    """The number behind a code: its bits, negative where they begin with 0 (T.81, F.2.2.1). Without a branch, as it cannot be foreseen."""
    size = (entry >> np.uint64(_SIZE_AT)) & _FOUR_BITS
    rest = bits << ((entry >> np.uint64(_LENGTH_AT)) & _FIVE_BITS)
    low = np.int64((_U1 << size) - _U1) & ~(np.int64(rest) >> 63)
    return np.int64((rest >> _U1) >> (_U63 - size)) - low


@njit(cache=True, nogil=True)
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
    k = 1
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
        k += np.int64(entry >> np.uint64(_RUN_AT))
        value = _value(entry, bits)
        bits <<= entry & _SIX_BITS
        count -= entry & _SIX_BITS
        if k > 63:
            fine &= k >= _END_OF_BLOCK
            break
        coefficient = value * read_32(quant + 4 * k)
        write_16(lane + read_32(places + 4 * k), coefficient)
        extreme |= coefficient + _LARGEST
        k += 1
    return at, bits, count, predicted, fine and 0 <= extreme < 2 * _LARGEST


@njit(cache=True, nogil=True)
def _decode_scan(data, info, quant, tables, places, region, origin, step, tile, clean):  # type: ignore[no-untyped-def]
    """The samples of MCUs region = (left, top, right, bottom), column by column.

    Component c starts at address origin[c], its columns are step[c] bytes apart. False where the data are damaged.
    """
    coefficients, words, targets, steps = tile
    left, top, right, bottom = region
    across, down = -(-info[_WIDTH] // (8 * info[_H])), -(-info[_HEIGHT] // (8 * info[_V]))
    restart, until_restart, lanes, components = info[_RESTART], info[_RESTART], 0, info[_COMPONENTS]
    marker, size = _unstuff(data, info[_SCAN], clean)
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
                h, v = (info[_H], info[_V]) if c == 0 else (1, 1)
                dc = address(tables) + 4 * _TABLE * info[_DC_OF + c]
                ac = address(tables) + 4 * _TABLE * (2 + info[_AC_OF + c])
                q = address(quant) + 4 * 64 * info[_QUANT_OF + c]
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


def _idct_8(a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, shift: int) -> list[Any]:
    """Eight samples from eight coefficients, scaled up by 2 to the power of (13 - shift): libjpeg's jidctint.c, constants in 13 bits.

    No undamaged picture has coefficients so large that it would matter, but the four plain sums wrap around at 16 bits here as they do
    in libjpeg-turbo's vector code (jidctint-avx2.asm): pixels stay equal to Pillow's for damaged ones as well.
    """
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
    columns = [[sample.clamp(-32768, 32767) for sample in _idct_8(*block, shift=11)] for block in blocks]
    rows = [_idct_8(*(columns[c][row] for c in range(8)), shift=18) for row in range(8)]
    for c in range(8):
        low, high = (
            [(rows[row][c] + 128).clamp(0, 255) << 8 * (row % 4) for row in part] for part in (range(4), range(4, 8))
        )  # fmt: skip
        low, high = low[0] | low[1] | low[2] | low[3], high[0] | high[1] | high[2] | high[3]
        v.store(low.widen(64) | (high.widen(64) << 32), v.offset(words, 8 * LANES * c), 64)


@njit(cache=True, nogil=True)
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


@njit(cache=True, nogil=True)
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


@njit(cache=True, nogil=True)
def _colour(planes, info, origin, step, corner, box, rgb, stride, blend, up):  # type: ignore[no-untyped-def]
    """rgb [x, 3, stride] of box = (left, top, right, bottom) from planes whose first sample is the picture's (x, y) = corner.

    Component c starts at address origin[c], its columns are step[c] bytes apart.
    """
    left, top, right, bottom = box
    h, v, height = info[_H], info[_V], bottom - top
    low, rows = top // v - corner[1] // v, (bottom - 1) // v - top // v + 1
    last, widest = (info[_HEIGHT] - 1) // v - corner[1] // v, (info[_WIDTH] - 1) // h
    cb, cr = address(up), address(up) + 2 * up.shape[1]
    if info[_COMPONENTS] == 1:
        up[:, : height + ROWS] = 128
    for x in range(left, right):
        if info[_COMPONENTS] == 3:
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


@njit(cache=True, nogil=True)
def decode_box(data, height, width, box, rgb, space):  # type: ignore[no-untyped-def]
    """Fills rgb [x, 3, stride] with the pixels of box = (left, top, right, bottom), Pillow's own, and returns OK; or returns DECLINED.

    data is the whole JPEG file, height and width what it has to be. rgb is flat memory of 3 * box width * `stride_of(box height)` bytes.
    `space` comes from `workspace`.
    """
    info, quant, tables, known, places, planes, tile, blend, up, clean = space
    if not _read_header(data, info, quant, tables, known) or info[_HEIGHT] != height or info[_WIDTH] != width:
        return DECLINED
    left, top, right, bottom = box
    wide, tall = 8 * info[_H], 8 * info[_V]
    across, down = -(-width // wide), -(-height // tall)
    region = (
        max(left - 1, 0) // wide, max(top - 1, 0) // tall, min(right // wide + 1, across), min(bottom // tall + 1, down)
    )  # fmt: skip
    origin, step = np.zeros(3, np.int64), np.zeros(3, np.int64)
    used = 0
    for c in range(info[_COMPONENTS]):
        h, v = (info[_H], info[_V]) if c == 0 else (1, 1)
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
    tables = np.zeros((4, 64), np.int32), np.zeros((4, _TABLE), np.int32), np.zeros((4, 280), np.int64), _PLACE
    line = longest_px + 4 * ROWS
    lines = np.empty(line, np.int16), np.empty((2, line), np.int16), np.empty(payload_bytes + MARGIN + 8, np.uint8)
    return (np.zeros(_INFO, np.int64), *tables, planes, tile, *lines)


def decode(payload: UInt8[np.ndarray, " n"], height: int, width: int, out: UInt8[np.ndarray, "h w 3"]) -> bool:
    """Decodes a whole JPEG into out, as Pillow would; False, and out undefined, for one that is damaged or of a kind left to Pillow."""
    stride = stride_of(height)
    rgb = np.empty(3 * width * stride, np.uint8)
    if decode_box(payload, height, width, (0, 0, width, height), rgb, workspace(height * width, max(height, width), payload.size)) != OK:
        return False
    out[:] = rgb.reshape(width, 3, stride)[:, :, :height].transpose(2, 0, 1)
    return True
