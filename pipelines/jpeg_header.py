"""What a JPEG file says before its scan: sizes, quantizers, and Huffman tables made ready for `jpeg`'s look-ups (ITU-T T.81, annex B)."""

from __future__ import annotations

import numpy as np

from cossl.pipelines.simd import compiled

# info: what the header says, as one int64 row
HEIGHT, WIDTH, COMPONENTS, H, V, RESTART, SCAN = range(7)
QUANT_OF, DC_OF, AC_OF = 7, 10, 13  # three entries each: the tables of each component
INFO = 16

# A table entry, 0 where there is no code: bits of code and value together (6), bits of the code (5), of the value (4), run before it (8).
LENGTH_AT, SIZE_AT, RUN_AT = 6, 11, 15
END_OF_BLOCK = 128  # a run that leaves the block

# tables: per Huffman table the look-up, then for longer codes the largest code of each length, the offset of its first symbol, the symbols
LOOK = 10  # bits that one look-up sees
LOOKUP = 1 << LOOK
MAXCODE, OFFSET, SYMBOLS = LOOKUP, LOOKUP + 18, LOOKUP + 36
TABLE = LOOKUP + 36 + 256


@compiled
def entry_of(length, symbol, is_ac):  # type: ignore[no-untyped-def]
    """The table entry of a code of `length` bits."""
    run, size = symbol >> 4, symbol & 15
    if is_ac and size == 0 and run != 15:
        run = END_OF_BLOCK
    return (length + size) + (length << LENGTH_AT) + (size << SIZE_AT) + (run << RUN_AT)


@compiled
def _build_table(data, at, symbols_at, is_ac, table):  # type: ignore[no-untyped-def]
    """One Huffman table from its 16 counts at data[at:] and its symbols; False where the counts describe no code."""
    table[:LOOKUP] = 0
    code, taken = 0, 0
    for length in range(1, 17):
        count = data[at + length - 1]
        table[OFFSET + length] = taken - code
        for _ in range(count):
            symbol = np.int64(data[symbols_at + taken])
            table[SYMBOLS + taken] = symbol
            if code >> length or not (is_ac or symbol < 16):
                return False
            if length <= LOOK:
                spare = LOOK - length
                table[code << spare : (code + 1) << spare] = entry_of(length, symbol, is_ac)
            code, taken = code + 1, taken + 1
        table[MAXCODE + length] = code - 1 if count else -1
        code <<= 1
    return True


@compiled
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


@compiled
def _read_frame(data, at, end, info):  # type: ignore[no-untyped-def]
    """SOF0 or SOF1: size, components, subsampling. False for what is declined."""
    if end - at < 6 or data[at] != 8:
        return False
    info[HEIGHT], info[WIDTH] = (data[at + 1] << 8) + data[at + 2], (data[at + 3] << 8) + data[at + 4]
    components = info[COMPONENTS] = data[at + 5]
    if components not in (1, 3) or end - at != 6 + 3 * components:
        return False
    info[H], info[V] = data[at + 7] >> 4, data[at + 7] & 15
    if not (1 <= info[H] <= 4 and 1 <= info[V] <= 4):
        return False
    for c in range(components):
        info[QUANT_OF + c] = data[at + 8 + 3 * c]
        if info[QUANT_OF + c] > 3 or (c and data[at + 7 + 3 * c] != 0x11):
            return False
    if components == 1:
        info[H] = info[V] = 1  # a single component is not interleaved, whatever its factors say
    elif data[at + 6] == 82 and data[at + 9] == 71 and data[at + 12] == 66:
        return False  # "RGB"
    if info[H] > 2 or info[V] > 2:
        return False
    return info[H] == 1 or info[WIDTH] > 4  # libjpeg has no triangle filter for chroma of one or two columns


@compiled
def _read_scan(data, at, end, order, info, defined):  # type: ignore[no-untyped-def]
    """SOS: one scan with every component, no progression, all of its tables defined."""
    components = info[COMPONENTS]
    if end - at != 4 + 2 * components or data[at] != components:
        return False
    for c in range(components):
        if data[at + 1 + 2 * c] != data[order + 3 * c]:
            return False
        info[DC_OF + c], info[AC_OF + c] = data[at + 2 + 2 * c] >> 4, data[at + 2 + 2 * c] & 15
        if info[DC_OF + c] > 1 or info[AC_OF + c] > 1:
            return False
        if not (defined[info[QUANT_OF + c]] and defined[4 + info[DC_OF + c]] and defined[6 + info[AC_OF + c]]):
            return False
    last = at + 1 + 2 * components
    return data[last] == 0 and data[last + 1] == 63 and data[last + 2] == 0


@compiled
def _read_quantizers(data, at, end, quant, defined):  # type: ignore[no-untyped-def]
    while at < end:
        if data[at] > 3 or at + 65 > end:  # the upper four bits tell of 16-bit tables
            return False
        defined[data[at]] = 1
        for k in range(64):
            quant[data[at], k] = data[at + 1 + k]
        at += 65
    return True


@compiled
def read_header(data, info, quant, tables, known):  # type: ignore[no-untyped-def]
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
            info[RESTART] = (data[start] << 8) + data[start + 1] if fine else 0
        elif marker == 0xEE and length >= 14 and data[start] == 65 and data[start + 1] == 100:
            fine = data[start + 11] == 1  # Adobe's marker: 1 is YCbCr
        elif marker == 0xDA:
            info[SCAN] = end
            return order > 0 and _read_scan(data, start, end, order, info, defined)
        elif not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            return False  # neither an application's segment nor a comment: another kind of frame, arithmetic coding, damage
        if not fine:
            return False
        at = end
    return False
