"""rANS lanes in numba, threaded over lanes."""

# numba's decorators hide the types of what they wrap.
# mypy: disable-error-code="misc"
from __future__ import annotations

from contextlib import contextmanager

import numba
import numpy as np
import torch
from numba import njit, prange

from dynamo_kvtc.ops.rans.tables import MAX_NARROW_SYMBOL

_BITS = 12
_MASK = np.uint32((1 << _BITS) - 1)
_LOW = np.uint32(1 << 16)
_WORD = np.uint32(0xFFFF)
_CHUNK_LANES = 4096


@contextmanager
def _torchs_threads():
    """As many as torch takes in this thread, and torch as many as before: numba takes one per core, whatever
    OMP_NUM_THREADS says, and where both use OpenMP its start raises torch's number to that. Threads that wait for each
    other beside a busy process, such as an engine, cost several times what they bring."""
    threads = torch.get_num_threads()
    try:
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        yield
    finally:
        if torch.get_num_threads() != threads:
            # Not torch's public name: an engine may have put a function there that does nothing.
            torch._C.set_num_threads(threads)


def encode(symbols, classes, offsets, first, frequencies, starts, shift, alphabet, split):
    tokens, rank = symbols.shape
    # Worst case per symbol: one word for its table part and one for its raw bits.
    width = 2 * -(-rank // split) + 2
    lengths = np.zeros(tokens * split, dtype=np.int64)
    parts: list[np.ndarray] = []
    step = max(1, _CHUNK_LANES // split)
    for start in range(0, tokens, step):
        part, lanes = slice(start, start + step), slice(start * split, (start + step) * split)
        buffer = np.empty((len(lengths[lanes]), width), dtype=np.uint16)
        with _torchs_threads():
            _encode(
                symbols[part], classes, offsets[part], first, frequencies, starts, shift, alphabet, split, buffer,
                lengths[lanes],
            )  # fmt: skip
        parts.extend(row[width - n :] for row, n in zip(buffer, lengths[lanes], strict=True))
    words = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint16)
    return words, lengths


def decode(words, lengths, classes, offsets, first, frequencies, starts, slots, shift, alphabet, split):
    starts_at = np.cumsum(lengths) - lengths
    symbols = np.empty((len(lengths) // split, len(classes)), dtype=np.int16)
    bad = np.zeros(len(lengths), dtype=np.bool_)
    with _torchs_threads():
        _decode(
            words, starts_at, lengths, classes, offsets, first, frequencies, starts, slots, shift, alphabet, split,
            symbols, bad,
        )  # fmt: skip
    return symbols, bad


def levels(symbols, centroid, scale, bias, wide, factor, first):
    """What ``decode_levels_device`` makes of symbols int16 [T, R]: float16 [T, min(W, R)], int8 [T, max(R - W, 0)]."""
    q = symbols.astype(np.int32)
    magnitude = np.abs(q).astype(np.float32) - centroid.astype(np.float32)
    magnitude[:, first:] *= factor[:, None]
    magnitude = np.minimum(magnitude, np.float32(np.finfo(np.float16).max))
    high = np.where(q == 0, np.float32(0), np.where(q < 0, -magnitude, magnitude))[:, :wide].astype(np.float16)
    scaled = (np.minimum(np.abs(q), MAX_NARROW_SYMBOL) * scale - bias + np.int32(1 << 15)) >> np.int32(16)
    scaled = np.where(q == 0, 0, np.clip(scaled, 0, 127))
    return high, np.where(q < 0, -scaled, scaled)[:, wide:].astype(np.int8)


def cross_entropy(symbols, classes, offsets, first, frequencies, shift, alphabet):
    with np.errstate(divide="ignore"):
        cost = np.where(frequencies > 0, _BITS - np.log2(np.maximum(frequencies, 1)), np.inf) + shift[:, None]
    # The escape carries 16 raw bits of its own in place of the class's low bits.
    cost[:, -1] += 16.0 - shift
    return _cross_entropy(symbols, classes, offsets, first, cost, shift, alphabet)


@njit(inline="always")
def _shifted(base, offset, applies, top):
    """The class a lane codes a component with."""
    if not applies:
        return np.int64(base)
    return min(max(np.int64(base) + np.int64(offset), np.int64(0)), np.int64(top))


@njit(parallel=True, cache=True)
def _encode(symbols, classes, offsets, first, frequencies, starts, shift, alphabet, split, buffer, lengths):
    tokens, rank = symbols.shape
    width = buffer.shape[1]
    escape = frequencies.shape[1] - 1
    top = frequencies.shape[0] - 1
    for lane in prange(tokens * split):
        token = lane // split
        own = lane % split
        x = _LOW
        p = width
        for i in range((rank - own + split - 1) // split - 1, -1, -1):
            j = own + i * split
            c = _shifted(classes[j], offsets[token], j >= first, top)
            s = np.uint32(shift[c])
            q = np.int32(symbols[token, j])
            a = (q >> np.int32(s)) + alphabet
            if a < 0 or a >= escape or frequencies[c, a] == 0:
                a = escape
                p -= 1
                buffer[lane, p] = np.uint16(x & _WORD)
                x = np.uint32((x & ~_WORD) | (np.uint32(q) & _WORD))
            elif s > 0:
                if (x >> np.uint32(32 - s)) > 0:
                    p -= 1
                    buffer[lane, p] = np.uint16(x & _WORD)
                    x = np.uint32(x >> np.uint32(16))
                x = np.uint32((x << s) | (np.uint32(q) & np.uint32((np.uint32(1) << s) - 1)))
            f = np.uint32(frequencies[c, a])
            # Renormalise if x >= f * 2**20, the largest state that coding a would keep below 2**32.
            if (x >> np.uint32(20)) >= f:
                p -= 1
                buffer[lane, p] = np.uint16(x & _WORD)
                x = np.uint32(x >> np.uint32(16))
            quotient = np.uint32(x // f)
            x = np.uint32((quotient << np.uint32(_BITS)) + (x - quotient * f) + np.uint32(starts[c, a]))
        p -= 1
        buffer[lane, p] = np.uint16(x & _WORD)
        p -= 1
        buffer[lane, p] = np.uint16(x >> np.uint32(16))
        lengths[lane] = width - p


@njit(parallel=True, cache=True)
def _decode(
    words, starts_at, lengths, classes, offsets, first, frequencies, starts, slots, shift, alphabet, split, symbols, bad
):
    tokens, rank = symbols.shape
    escape = frequencies.shape[1] - 1
    top = frequencies.shape[0] - 1
    for lane in prange(tokens * split):
        token = lane // split
        p = starts_at[lane]
        end = p + lengths[lane]
        x = np.uint32((np.uint32(words[p]) << np.uint32(16)) | np.uint32(words[p + 1]))
        p += 2
        ok = x >= _LOW
        for j in range(lane % split, rank, split):
            c = _shifted(classes[j], offsets[token], j >= first, top)
            slot = np.uint32(x & _MASK)
            a = np.int32(slots[c, slot])
            x = np.uint32(np.uint32(frequencies[c, a]) * (x >> np.uint32(_BITS)) + slot - np.uint32(starts[c, a]))
            if x < _LOW:
                if p >= end:
                    ok = False
                    break
                x = np.uint32((x << np.uint32(16)) | np.uint32(words[p]))
                p += 1
            s = np.uint32(shift[c])
            if a == escape:
                if p >= end:
                    ok = False
                    break
                symbols[token, j] = np.int16(np.uint16(x & _WORD))
                x = np.uint32((x & ~_WORD) | np.uint32(words[p]))
                p += 1
            elif s > 0:
                low = np.int32(x & np.uint32((np.uint32(1) << s) - 1))
                x = np.uint32(x >> s)
                if x < _LOW:
                    if p >= end:
                        ok = False
                        break
                    x = np.uint32((x << np.uint32(16)) | np.uint32(words[p]))
                    p += 1
                symbols[token, j] = np.int16(((a - alphabet) << np.int32(s)) + low)
            else:
                symbols[token, j] = np.int16(a - alphabet)
        bad[lane] = (not ok) or x != _LOW or p != end


@njit(cache=True)
def _cross_entropy(symbols, classes, offsets, first, cost, shift, alphabet):
    escape = cost.shape[1] - 1
    top = cost.shape[0] - 1
    total = 0.0
    for lane in range(symbols.shape[0]):
        for j in range(symbols.shape[1]):
            c = _shifted(classes[j], offsets[lane], j >= first, top)
            a = (np.int32(symbols[lane, j]) >> np.int32(shift[c])) + alphabet
            if a < 0 or a >= escape or cost[c, a] == np.inf:
                a = escape
            total += cost[c, a]
    return total
