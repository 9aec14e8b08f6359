"""rANS kernels: a thread per lane, a warp per program.

A warp alone can branch as one without a barrier, and the work of a lane is a chain in which each step waits for the
last: what counts is how short a step is, and how many lanes are at it.

Components are handled in chunks of 4 or more steps of every lane. A chunk's common case has no escape and no raw bits;
a chunk in which any lane of the program has one is done (by the decoder: done again) symbol by symbol.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dynamo_kvtc.ops.rans import tables as t

_RARE = tl.constexpr(t.RARE)
_MIXED = tl.constexpr(t.MIXED)
_PLACES = tl.constexpr(t.PLACES)
_COARSE_BITS = tl.constexpr(t.COARSE_BITS)
_NARROW_TOP = tl.constexpr(t.MAX_NARROW_SYMBOL)
_SYMBOLS, _WIDE, _NARROW = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _shifted(base, j, offset, first, top):
    c = base.to(tl.int32) + tl.where(j >= first, offset, 0)
    return tl.minimum(tl.maximum(c, 0), top)


@triton.jit
def _class(classes, j, offset, first, top):
    """Of components j, all of them there."""
    return _shifted(tl.load(classes + j), j, offset, first, top)


@triton.jit
def _four_classes(classes, j, offset, first, top, S: tl.constexpr):
    """Of four steps. Loads stay in the order they are written in: these before any that waits for a state."""
    b0 = tl.load(classes + j)
    b1 = tl.load(classes + (j + S))
    b2 = tl.load(classes + (j + 2 * S))
    b3 = tl.load(classes + (j + 3 * S))
    return (
        _shifted(b0, j, offset, first, top), _shifted(b1, j + S, offset, first, top),
        _shifted(b2, j + 2 * S, offset, first, top), _shifted(b3, j + 3 * S, offset, first, top),
    )  # fmt: skip


@triton.jit
def _unsigned(word):
    return word.to(tl.uint16, bitcast=True).to(tl.uint32)


# --- decoding ---------------------------------------------------------------------------------------------------------


@triton.jit
def _step(x, p, ahead, rare, packed, base, end, active, c, lut, coarse):
    slot = x & 4095
    at = lut + ((c << 12) + slot.to(tl.int32))
    # Among 256 cells first: a warp's reads then fall on few cache lines, and only a mixed cell costs a second read.
    cell = coarse + ((c << (12 - _COARSE_BITS)) + (slot >> _COARSE_BITS).to(tl.int32))
    entry = tl.load(cell, mask=active, other=0)
    entry = tl.load(at, mask=entry == _MIXED, other=entry)
    bits = entry.to(tl.uint32, bitcast=True)
    x = (((bits >> 12) & 4095) + 1) * (x >> 12) + slot - (bits & 4095)
    need = x < 65536
    x = tl.where(need, (x << 16) | _unsigned(ahead), x)
    p += need.to(tl.int32)
    # The next word is fetched a step or more before it is needed.
    ahead = tl.load(base + p, mask=need & (p < end), other=ahead)
    packed = (packed >> 8) | (bits & 0xFF000000)
    rare |= ((entry >> 24) == _RARE).to(tl.int32)
    return x, p, ahead, rare, packed


@triton.jit
def _four(x, p, ahead, rare, base, end, active, j, offset, first, top, classes, lut, coarse,
          S: tl.constexpr):  # fmt: skip
    """Four steps of every lane; their table symbols as the bytes of a uint32, the first lowest."""
    c0, c1, c2, c3 = _four_classes(classes, j, offset, first, top, S)
    packed = tl.zeros_like(x)
    x, p, ahead, rare, packed = _step(x, p, ahead, rare, packed, base, end, active, c0, lut, coarse)
    x, p, ahead, rare, packed = _step(x, p, ahead, rare, packed, base, end, active, c1, lut, coarse)
    x, p, ahead, rare, packed = _step(x, p, ahead, rare, packed, base, end, active, c2, lut, coarse)
    x, p, ahead, rare, packed = _step(x, p, ahead, rare, packed, base, end, active, c3, lut, coarse)
    return x, p, ahead, rare, packed


@triton.jit
def _tile(packed, TOKENS: tl.constexpr, S: tl.constexpr, STEPS: tl.constexpr):
    """[TOKENS * S, STEPS / 4] of four symbols each, as int8 [TOKENS, STEPS * S] in component order."""
    bytes4 = (packed[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :].to(tl.uint32)).to(tl.int8)
    return tl.reshape(tl.permute(tl.reshape(bytes4, [TOKENS, S, STEPS]), (0, 2, 1)), [TOKENS, STEPS * S])


@triton.jit
def _level(q, j, mask, centroid, scale, bias, factor, first, KIND: tl.constexpr):
    """What is stored for symbols q (int32) of components j. factor: of the token, from component ``first`` on."""
    if KIND == _SYMBOLS:
        return q.to(tl.int16)
    elif KIND == _WIDE:
        magnitude = tl.abs(q).to(tl.float32) - tl.load(centroid + j, mask=mask)
        magnitude = tl.minimum(magnitude * tl.where(j >= first, factor, 1.0), 65504.0)
        return tl.where(q == 0, 0.0, tl.where(q < 0, -magnitude, magnitude)).to(tl.float16)
    else:
        scaled = tl.minimum(tl.abs(q), _NARROW_TOP) * tl.load(scale + j, mask=mask)
        scaled = (scaled - tl.load(bias + j, mask=mask) + 32768) >> 16
        scaled = tl.minimum(tl.maximum(scaled, 0), 127)
        return tl.where(q == 0, 0, tl.where(q < 0, -scaled, scaled)).to(tl.int8)


@triton.jit
def _one_by_one(x, p, base, end, active, exists, row, own, j0, column, count, offset, first, top, classes, lut, slots,
                shift, alphabet, out, centroid, scale, bias, factor, S: tl.constexpr,
                KIND: tl.constexpr):  # fmt: skip
    """Up to ``count`` components from j0 on, with escapes and raw bits, exactly as the reference does it."""
    for i in range(0, count, S):
        here = i + own < count
        j = j0 + i + own
        m = active & here
        c = _class(classes, tl.where(here, j, 0), offset, first, top)
        slot = x & 4095
        at = (c << 12) + slot.to(tl.int32)
        bits = tl.load(lut + at, mask=m, other=0).to(tl.uint32, bitcast=True)
        a = tl.load(slots + at, mask=m, other=0).to(tl.int32)
        s = tl.load(shift + c, mask=m, other=0)
        x = tl.where(m, (((bits >> 12) & 4095) + 1) * (x >> 12) + slot - (bits & 4095), x)
        need = m & (x < 65536)
        word = _unsigned(tl.load(base + p, mask=need & (p < end), other=0))
        x = tl.where(need, (x << 16) | word, x)
        p += need.to(tl.int32)

        escaped = m & (a == 2 * alphabet + 1)
        raw = m & (s > 0) & (a != 2 * alphabet + 1)
        low = x & ((1 << s) - 1).to(tl.uint32)
        q = tl.where(escaped, (x & 0xFFFF).to(tl.int32), ((a - alphabet) << s) + tl.where(raw, low.to(tl.int32), 0))
        q = tl.where(m, q.to(tl.int16).to(tl.int32), 0)
        x = tl.where(raw, x >> s.to(tl.uint32), x)
        more = escaped | (raw & (x < 65536))
        word = _unsigned(tl.load(base + p, mask=more & (p < end), other=0))
        x = tl.where(escaped, (x & 0xFFFF0000) | word, tl.where(more, (x << 16) | word, x))
        p += more.to(tl.int32)
        stored = exists & here
        tl.store(out + row + (column + i + own), _level(q, j, stored, centroid, scale, bias, factor, first, KIND),
                 mask=stored)  # fmt: skip
    return x, p


@triton.jit
def _components(x, p, ahead, base, end, active, exists, token, own, lane0, tokens, j_from, count, offset, first, top,
                classes, lut, coarse, slots, shift, alphabet, out, stride, centroid, scale, bias, factors,
                BLOCK: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr,
                KIND: tl.constexpr):  # fmt: skip
    """Components j_from .. j_from + count - 1 into columns 0 .. count - 1 of ``out``."""
    CHUNK: tl.constexpr = 4 * GROUPS * S
    TOKENS: tl.constexpr = BLOCK // S
    tile_token = lane0 // S + tl.arange(0, TOKENS)
    tile_row = out + tile_token.to(tl.int64)[:, None] * stride
    tile_exists = (tile_token < tokens)[:, None]
    lane_factor = tl.full([BLOCK], 1.0, tl.float32)
    tile_factor = tl.full([TOKENS, 1], 1.0, tl.float32)
    if KIND == _WIDE:
        lane_factor = tl.load(factors + token, mask=exists, other=0.0)
        tile_factor = tl.load(factors + tile_token, mask=tile_token < tokens, other=0.0)[:, None]
    for i0 in range(0, count, CHUNK):
        x0, p0 = x, p
        any_rare = 1
        j0 = j_from + i0
        if i0 + CHUNK <= count:
            rare = tl.zeros_like(p)
            x, p, ahead, rare, packed = _four(x, p, ahead, rare, base, end, active, j0 + own, offset, first, top,
                                              classes, lut, coarse, S)  # fmt: skip
            if GROUPS == 1:
                packed = packed[:, None]
            else:
                x, p, ahead, rare, second = _four(x, p, ahead, rare, base, end, active, j0 + own + 4 * S, offset, first,
                                                  top, classes, lut, coarse, S)  # fmt: skip
                if GROUPS == 2:
                    packed = tl.join(packed, second)
                else:
                    x, p, ahead, rare, third = _four(x, p, ahead, rare, base, end, active, j0 + own + 8 * S, offset,
                                                     first, top, classes, lut, coarse, S)  # fmt: skip
                    x, p, ahead, rare, fourth = _four(x, p, ahead, rare, base, end, active, j0 + own + 12 * S, offset,
                                                      first, top, classes, lut, coarse, S)  # fmt: skip
                    packed = tl.reshape(tl.join(tl.join(packed, third), tl.join(second, fourth)), [BLOCK, 4])
            any_rare = tl.max(rare, axis=0)
            if any_rare == 0:
                q = _tile(packed, TOKENS, S, 4 * GROUPS).to(tl.int32)
                column = (i0 + tl.arange(0, CHUNK))[None, :]
                value = _level(q, j_from + column, None, centroid, scale, bias, tile_factor, first, KIND)
                tl.store(tile_row + column, value, mask=tile_exists)
        if any_rare != 0:
            x, p = _one_by_one(x0, p0, base, end, active, exists, token.to(tl.int64) * stride, own, j0, i0,
                               tl.minimum(count - i0, CHUNK), offset, first, top, classes, lut, slots, shift, alphabet,
                               out, centroid, scale, bias, lane_factor, S, KIND)  # fmt: skip
            ahead = tl.load(base + p, mask=p < end, other=0)
    return x, p, ahead


@triton.jit
def _open(words, total, starts, lengths, lane, exists):
    """Each lane's words and its state: base, end, which are active, which are broken, x, p, the word ahead."""
    start = tl.load(starts + lane, mask=exists, other=0)
    length = tl.load(lengths + lane, mask=exists, other=0)
    inside = (start >= 0) & (length >= 0) & (start <= total - length)
    active = exists & inside & (length > 0)
    base = words + tl.where(active, start, 0)
    end = tl.where(active, length, 0)
    high = _unsigned(tl.load(base, mask=active, other=1))
    x = (high << 16) | _unsigned(tl.load(base + 1, mask=end > 1, other=0))
    broken = (active & (x < 65536)) | (exists & (inside == 0))
    ahead = tl.load(base + 2, mask=end > 2, other=0)
    return base, end, active, broken, x, tl.full(lane.shape, 2, tl.int32), ahead


@triton.jit
def _close(bad, lane, exists, active, broken, x, p, end):
    # A lane that asked for a word it does not have has counted it: p is then beyond its end.
    tl.store(bad + lane, (broken | (active & ((p != end) | (x != 65536)))).to(tl.int32), mask=exists)


@triton.jit(do_not_specialize=["total", "rank", "tokens", "first", "top", "alphabet"])
def decode_symbols_kernel(
    words, total, starts, lengths, offsets, classes, lut, coarse, slots, shift, symbols, stride, bad, tokens, rank,
    first, top, alphabet, BLOCK: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    lane0 = tl.program_id(0) * BLOCK
    lane = lane0 + tl.arange(0, BLOCK)
    token, own = lane // S, lane % S
    exists = token < tokens
    base, end, active, broken, x, p, ahead = _open(words, total, starts, lengths, lane, exists)
    offset = tl.zeros_like(token)
    if OFFSETS:
        offset = tl.load(offsets + token, mask=exists, other=0).to(tl.int32)
    x, p, ahead = _components(x, p, ahead, base, end, active, exists, token, own, lane0, tokens, 0, rank, offset, first,
                              top, classes, lut, coarse, slots, shift, alphabet, symbols, stride, bad, bad, bad, bad,
                              BLOCK, S, GROUPS, _SYMBOLS)  # fmt: skip
    _close(bad, lane, exists, active, broken, x, p, end)


@triton.jit(do_not_specialize=["total", "row", "tokens", "top", "alphabet"], do_not_specialize_on_alignment=["places"])
def decode_levels_kernel(
    words, total, starts, lengths, offsets, factors, bad, stride_starts, stride_lengths, stride_offsets, stride_factors,
    stride_bad, places, row, lut, coarse, slots, shift, tokens, top, alphabet, BLOCK: tl.constexpr, S: tl.constexpr,
    GROUPS: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """Program (i, g): lanes of layer group g, whose operands ``places`` names (``LevelGroups``)."""
    group = tl.program_id(1).to(tl.int64)
    place = places + group * _PLACES
    classes = tl.load(place).to(tl.pointer_type(tl.uint8))
    centroid = tl.load(place + 1).to(tl.pointer_type(tl.float32))
    scale = tl.load(place + 2).to(tl.pointer_type(tl.int32))
    bias = tl.load(place + 3).to(tl.pointer_type(tl.int32))
    # Rows start at multiples of 16 bytes.
    wide_stride, narrow_stride = tl.multiple_of(tl.load(place + 5), 8), tl.multiple_of(tl.load(place + 7), 16)
    wide = tl.multiple_of(tl.load(place + 4).to(tl.pointer_type(tl.float16)), 8) + row * wide_stride
    narrow = tl.multiple_of(tl.load(place + 6).to(tl.pointer_type(tl.int8)), 16) + row * narrow_stride
    rank, width = tl.load(place + 8).to(tl.int32), tl.load(place + 9).to(tl.int32)
    first = tl.load(place + 10).to(tl.int32)

    lane0 = tl.program_id(0) * BLOCK
    lane = lane0 + tl.arange(0, BLOCK)
    token, own = lane // S, lane % S
    exists = token < tokens
    base, end, active, broken, x, p, ahead = _open(
        words, total, starts + group * stride_starts, lengths + group * stride_lengths, lane, exists
    )
    offset = tl.zeros_like(token)
    if OFFSETS:
        offset = tl.load(offsets + group * stride_offsets + token, mask=exists, other=0).to(tl.int32)
    factor = factors + group * stride_factors
    x, p, ahead = _components(x, p, ahead, base, end, active, exists, token, own, lane0, tokens, 0,
                              tl.minimum(width, rank), offset, first, top, classes, lut, coarse, slots, shift, alphabet,
                              wide, wide_stride, centroid, scale, bias, factor, BLOCK, S, GROUPS,
                              _WIDE)  # fmt: skip
    x, p, ahead = _components(x, p, ahead, base, end, active, exists, token, own, lane0, tokens, width, rank - width,
                              offset, first, top, classes, lut, coarse, slots, shift, alphabet, narrow, narrow_stride,
                              centroid, scale, bias, factor, BLOCK, S, GROUPS, _NARROW)  # fmt: skip
    _close(bad + group * stride_bad, lane, exists, active, broken, x, p, end)


# --- encoding ---------------------------------------------------------------------------------------------------------


@triton.jit
def _emit(row, p, x, wanted):
    """A lane's row is filled from its end; what does not fit is counted and not written."""
    p -= wanted.to(tl.int32)
    tl.store(row + p, (x & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True), mask=wanted & (p >= 0))
    return p


@triton.jit
def _put(x, p, row, entry, m):
    """One table symbol. ``entry``: see DeviceTables.encode."""
    low = entry.to(tl.uint32)
    f = (low >> 12) & 8191
    out = m & ((x >> 20) >= f)
    p = _emit(row, p, x, out)
    x = tl.where(out, x >> 16, x)
    # With m = floor(2**32 / f), x / f - x * m / 2**32 is below 1 for every 32-bit x: the quotient is right or one less.
    quotient = tl.umulhi(x, (entry >> 32).to(tl.uint32))
    quotient += (x - quotient * f >= f).to(tl.uint32)
    return tl.where(m, x + quotient * (4096 - f) + (low & 4095), x), p


@triton.jit
def _entry(table, q, c, active, columns, alphabet):
    """Without regard to shift: its flag says whether that was enough."""
    a = tl.minimum((q + alphabet).to(tl.uint32), (columns - 1).to(tl.uint32)).to(tl.int32)
    return tl.load(table + (c * columns + a), mask=active, other=0)


@triton.jit
def _put_one_by_one(x, p, row, active, symbols_row, own, j0, count, offset, first, top, classes, table, shift, columns,
                    alphabet, S: tl.constexpr):  # fmt: skip
    """Up to ``count`` components from j0 on, last first, with escapes and raw bits."""
    steps = tl.cdiv(count, S)
    for k in range(0, steps):
        i = (steps - 1 - k) * S + own
        here = i < count
        m = active & here
        j = j0 + i
        c = _class(classes, tl.where(here, j, 0), offset, first, top)
        q = tl.load(symbols_row + j, mask=m, other=0).to(tl.int32)
        s = tl.load(shift + c, mask=m, other=0)
        a = (q >> s) + alphabet
        known = (a >= 0) & (a < columns - 1)
        entry = tl.load(table + (c * columns + tl.where(known, a, columns - 1)), mask=m, other=0)
        escaped = m & ((((entry >> 12) & 8191) == 0) | ~known)
        entry = tl.load(table + (c * columns + (columns - 1)), mask=escaped, other=entry)

        raw = m & (s > 0) & ~escaped
        over = (x >> ((32 - s) & 31).to(tl.uint32)) > 0
        p = _emit(row, p, x, escaped | (raw & over))
        low = (q & ((1 << s) - 1)).to(tl.uint32)
        shifted = (tl.where(over, x >> 16, x) << s.to(tl.uint32)) | low
        x = tl.where(escaped, (x & 0xFFFF0000) | (q & 0xFFFF).to(tl.uint32), tl.where(raw, shifted, x))
        x, p = _put(x, p, row, entry, m)
    return x, p


@triton.jit(do_not_specialize=["tokens", "rank", "first", "top", "columns", "alphabet", "cap"])
def encode_kernel(
    symbols, symbols_stride, classes, offsets, skip, table, shift, words, words_stride, lengths, tokens, rank, first,
    top, columns, alphabet, cap, BLOCK: tl.constexpr, S: tl.constexpr, OFFSETS: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    CHUNK: tl.constexpr = 4 * S
    TOKENS: tl.constexpr = BLOCK // S
    lane0 = tl.program_id(0) * BLOCK
    lane = lane0 + tl.arange(0, BLOCK)
    token = lane // S
    own = lane % S
    exists = token < tokens
    active = exists
    if SKIP:
        active = exists & (tl.load(skip + token, mask=exists, other=1) == 0)
    offset = tl.zeros_like(token)
    if OFFSETS:
        offset = tl.load(offsets + token, mask=exists, other=0).to(tl.int32)
    row = words + lane.to(tl.int64) * words_stride
    symbols_row = symbols + token.to(tl.int64) * symbols_stride
    tile_token = lane0 // S + tl.arange(0, TOKENS)
    tile_row = symbols + tile_token.to(tl.int64)[:, None] * symbols_stride
    tile_exists = (tile_token < tokens)[:, None]
    tile_column = tl.arange(0, CHUNK)[None, :]

    x = tl.full([BLOCK], 65536, tl.uint32)
    p = tl.zeros([BLOCK], tl.int32) + cap
    chunks = rank // CHUNK
    x, p = _put_one_by_one(x, p, row, active, symbols_row, own, chunks * CHUNK, rank - chunks * CHUNK, offset, first,
                           top, classes, table, shift, columns, alphabet, S)  # fmt: skip
    following = tl.load(tile_row + ((chunks - 1) * CHUNK + tile_column), mask=tile_exists & (chunks > 0), other=0)
    for k in range(0, chunks):
        j0 = (chunks - 1 - k) * CHUNK
        tile = following
        # Asked for a chunk ahead.
        following = tl.load(tile_row + (j0 - CHUNK + tile_column), mask=tile_exists & (j0 > 0), other=0)
        by_lane = tl.permute(tl.reshape(tile, [TOKENS, 4, S]), (0, 2, 1))
        even, odd = tl.split(tl.reshape(by_lane, [BLOCK, 2, 2]))
        q0, q2 = tl.split(even)
        q1, q3 = tl.split(odd)
        c0, c1, c2, c3 = _four_classes(classes, j0 + own, offset, first, top, S)
        e0 = _entry(table, q0.to(tl.int32), c0, active, columns, alphabet)
        e1 = _entry(table, q1.to(tl.int32), c1, active, columns, alphabet)
        e2 = _entry(table, q2.to(tl.int32), c2, active, columns, alphabet)
        e3 = _entry(table, q3.to(tl.int32), c3, active, columns, alphabet)
        closer = tl.max(((e0 | e1 | e2 | e3).to(tl.uint32) >> 31).to(tl.int32), axis=0)
        if closer == 0:
            x, p = _put(x, p, row, e3, active)
            x, p = _put(x, p, row, e2, active)
            x, p = _put(x, p, row, e1, active)
            x, p = _put(x, p, row, e0, active)
        else:
            x, p = _put_one_by_one(x, p, row, active, symbols_row, own, j0, CHUNK, offset, first, top, classes, table,
                                   shift, columns, alphabet, S)  # fmt: skip
    p = _emit(row, p, x, active)
    p = _emit(row, p, x >> 16, active)
    tl.store(lengths + lane, tl.where(active, tl.where(p < 0, -1, cap - p), 0), mask=exists)
