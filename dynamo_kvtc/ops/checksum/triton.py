"""Byte ranges copied and summed in one pass.

CRC-32 is linear but for a constant that depends on the size alone, so a range's sum is the xor of its words' products
with powers of x. The words are those of one side's aligned 128-byte lines (the host's, if a side is host memory: PCIe
wants whole lines), with bytes outside the range taken as 0. Zeros in front change nothing. Zeros behind, ``pad`` bytes
up to the line's end, multiply the sum by x**(8 * pad), which a factor takes back.

A program takes ``ROWS * GROUPS`` rows of ``COLUMNS`` words, counted from the padded end. Each column is a polynomial in
x**(32 * COLUMNS) (Horner, one constant product a word); the columns, times their own powers of x, are xored together;
and the chunk's factor comes last. Chunks of a range meet in an atomic xor, whose order does not matter.
"""

# Triton's decorators hide the types of what they wrap.
# mypy: disable-error-code="misc,assignment"
from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from dynamo_kvtc.ops.checksum import reference

WARPS = 4
VECTOR = 4
COLUMNS = 32 * WARPS * VECTOR
ROWS, GROUPS = 4, 4
CHUNK_BYTES = 4 * COLUMNS * ROWS * GROUPS
LINE_BYTES = 128
_LOW_CHUNKS = 32
_START_RANGES = 32

# Where each table starts in ``_tables``, in int32: x**(8 i 256**d) for digits d of a size; the factor of the first
# chunks by their padding; a
# column's power; what 32 chunks more multiply by.
_DIGITS = 0
_FACTORS = _DIGITS + 4 * 256
_COLUMN_POWERS = _FACTORS + _LOW_CHUNKS * LINE_BYTES
_HIGH_CHUNKS = _COLUMN_POWERS + COLUMNS // VECTOR


def _signed(values: np.ndarray) -> tuple[int, ...]:
    return tuple(int(v) for v in np.asarray(values, np.uint32).view(np.int32).reshape(-1))


def _times_bits(bits: int) -> tuple[int, ...]:
    """What each bit of a word, from x**0 on, becomes when multiplied by x**bits."""
    return _signed(reference.power(np.arange(bits, bits + 32)))


_ROW = _times_bits(32 * COLUMNS)
_WORD = _times_bits(32)
_TWO_WORDS = _times_bits(64)


@lru_cache(maxsize=16)
def _tables(device: torch.device) -> Tensor:
    power, multiply = reference.power, reference.multiply
    digits = power(8 * np.arange(256)[None, :] * (256 ** np.arange(4))[:, None])
    # The register starts with all ones: with its product in one digit's table, it is in every size's.
    digits[0] = multiply(digits[0], np.uint32(0xFFFFFFFF))
    chunks, pad = np.arange(_LOW_CHUNKS)[:, None], np.arange(LINE_BYTES)[None, :]
    factors = power(8 * (chunks * CHUNK_BYTES - pad))
    threads = COLUMNS // VECTOR
    columns = power(32 * VECTOR * (threads - 1 - np.arange(threads)) + 32)
    high = power(8 * _LOW_CHUNKS * CHUNK_BYTES * np.arange(2**32 // CHUNK_BYTES // _LOW_CHUNKS + 2))
    flat = np.concatenate([t.reshape(-1) for t in (digits, factors, columns, high)])
    return torch.from_numpy(flat.view(np.int32)).to(device)


@triton.jit
def _times_constant(a, BITS: tl.constexpr):
    """a times the polynomial that made BITS (``_times_bits``)."""
    out = tl.where(a < 0, BITS[0], 0)
    for i in tl.static_range(1, 32):
        # In this form a bit is a test and a predicated xor: 40 to 68 instructions a word, where masks take 96.
        out = tl.where((a & (1 << (31 - i))) != 0, out ^ BITS[i], out)
    return out


@triton.jit
def _times(a, b):
    """a * b modulo the polynomial, whatever they are."""
    out = tl.where(a < 0, b, 0)
    for i in tl.static_range(1, 32):
        b = ((b >> 1) & 0x7FFFFFFF) ^ tl.where((b & 1) != 0, -306674912, 0)
        out = tl.where((a & (1 << (31 - i))) != 0, out ^ b, out)
    return out


@triton.jit(do_not_specialize=["n", "max_size"], do_not_specialize_on_alignment=["size"])
def _start_kernel(size, crc, tables, n, max_size: tl.int64, BLOCK: tl.constexpr):
    """crc = what a range of that many zeros has."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = tl.minimum(tl.maximum(tl.load(size + i, mask=i < n, other=0), 0), max_size)
    out = tl.load(tables + (s & 0xFF).to(tl.int32))
    for d in tl.static_range(1, 4):
        out = _times(tl.load(tables + d * 256 + ((s >> (8 * d)) & 0xFF).to(tl.int32)), out)
    tl.store(crc + i, out ^ -1, mask=i < n)


@triton.jit
def _load_row(address, shift, first, last, whole, COLUMNS: tl.constexpr):
    """A row of words at ``address + 4 * column``, bytes outside first .. last - 1 (relative to the address) zero.

    ``whole``: address is a multiple of 16, and shift (its bits beyond a multiple of 4) is 0. Reads no aligned 16 bytes
    (4, if not whole) without a byte of the range in them.
    """
    column = tl.arange(0, COLUMNS)
    at = column * 4
    if whole:
        # A mask that is the same for four words lets them be one load.
        block = (column // 4) * 16
        pointer = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)
        words = tl.load(pointer + column, mask=(block + 16 > first) & (block < last), other=0)
    else:
        skip = shift >> 3
        pointer = (address - skip).to(tl.pointer_type(tl.int32))
        words = tl.load(pointer + column, mask=(at - skip + 4 > first) & (at - skip < last), other=0)
        high = (at - skip + 8 > first) & (at - skip + 4 < last) & (shift > 0)
        above = tl.load(pointer + column + 1, mask=high, other=0)
        both = (above.to(tl.int64) << 32) | (words.to(tl.int64) & 0xFFFFFFFF)
        words = (both >> shift).to(tl.int32)
    if (first > 0) | (last < 4 * COLUMNS):
        low = tl.minimum(tl.maximum(first - at, 0), 4)
        high = tl.minimum(tl.maximum(at + 4 - last, 0), 4)
        # 64 bits: a shift by 32 must leave nothing.
        ones = tl.full((COLUMNS,), 0xFFFFFFFF, tl.int64)
        words &= ((ones << (8 * low)) & (ones >> (8 * high))).to(tl.int32)
    return words


@triton.jit
def _store_row(words, address, first, last, whole, COLUMNS: tl.constexpr):
    """The inverse: nothing outside first .. last - 1 is written."""
    column = tl.arange(0, COLUMNS)
    at = column * 4
    block = (column // 4) * 16
    inside = (block >= first) & (block + 16 <= last)
    if whole:
        pointer = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)
        tl.store(pointer + column, words, mask=inside)
    if (whole == 0) | (first > 0) | (last < 4 * COLUMNS):
        left = (inside == 0) | (whole == 0)
        pointer = address.to(tl.pointer_type(tl.int8))
        for b in tl.static_range(4):
            own = left & (at + b >= first) & (at + b < last)
            tl.store(pointer + at + b, (words >> (8 * b)).to(tl.int8), mask=own)


@triton.jit(
    do_not_specialize=["source_base", "target_base", "max_size", "chunks"],
    do_not_specialize_on_alignment=["source_start", "size", "target_start"],
)
def _copy_kernel(
    source_start, size, target_start, crc, tables,
    source_base: tl.int64, target_base: tl.int64, max_size: tl.int64, chunks,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, LINE: tl.constexpr, LOW_CHUNKS: tl.constexpr,
    FACTORS: tl.constexpr, COLUMN_POWERS: tl.constexpr, HIGH_CHUNKS: tl.constexpr,
    ROW_BITS: tl.constexpr, WORD_BITS: tl.constexpr, TWO_WORD_BITS: tl.constexpr,
    BY_TARGET: tl.constexpr, HAS_TARGET: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    bytes_here = tl.minimum(tl.maximum(tl.load(size + n), 0), max_size)
    from_address = source_base + tl.load(source_start + n)
    to_address = from_address
    if HAS_TARGET:
        to_address = target_base + tl.load(target_start + n)
    # Words are aligned on one side; ``other`` bytes lie between it and the other side.
    own = to_address if BY_TARGET else from_address
    other = (from_address - to_address) if BY_TARGET else (to_address - from_address)
    end = (own + bytes_here + LINE - 1) & -LINE
    pad = (end - own - bytes_here).to(tl.int32)
    ROW_BYTES: tl.constexpr = 4 * COLUMNS
    CHUNK: tl.constexpr = ROW_BYTES * ROWS * GROUPS
    base = end - (chunk + 1).to(tl.int64) * CHUNK
    if (bytes_here > 0) & (base + CHUNK > own):
        # Relative to the chunk, all fits 32 bits.
        first = tl.maximum(own - base, 0).to(tl.int32)
        last = tl.minimum(own + bytes_here - base, CHUNK).to(tl.int32)
        other_whole = ((other & 15) == 0).to(tl.int32)
        shift = ((other & 3) * 8).to(tl.int32) if BY_TARGET else 0
        load_whole = other_whole if BY_TARGET else 1
        store_whole = 1 if BY_TARGET else other_whole
        load_base = base + other if BY_TARGET else base
        store_base = base if BY_TARGET else base + other
        acc = tl.zeros((COLUMNS,), dtype=tl.int32)
        group = first // (ROW_BYTES * ROWS)
        while group < GROUPS:
            rows = ()
            for r in tl.static_range(ROWS):
                # Loads first: none can move before a store, which might change what it reads.
                at = (group * ROWS + r) * ROW_BYTES
                row = _load_row(load_base + at, shift, first - at, last - at, load_whole, COLUMNS)
                rows = rows + (row,)  # noqa: RUF005
            for r in tl.static_range(ROWS):
                at = (group * ROWS + r) * ROW_BYTES
                acc = _times_constant(acc, ROW_BITS) ^ rows[r]
                if HAS_TARGET:
                    _store_row(rows[r], store_base + at, first - at, last - at, store_whole, COLUMNS)
            group += 1
        # The four words of a thread, then the threads.
        even, odd = tl.split(tl.reshape(acc, (COLUMNS // 2, 2)))
        even, odd = tl.split(tl.reshape(_times_constant(even, WORD_BITS) ^ odd, (COLUMNS // 4, 2)))
        acc = _times_constant(even, TWO_WORD_BITS) ^ odd
        acc = _times(acc, tl.load(tables + COLUMN_POWERS + tl.arange(0, COLUMNS // 4)))
        total = tl.xor_sum(acc, axis=0)
        total = _times(total, tl.load(tables + FACTORS + (chunk % LOW_CHUNKS) * LINE + pad))
        if chunk >= LOW_CHUNKS:
            total = _times(total, tl.load(tables + HIGH_CHUNKS + chunk // LOW_CHUNKS))
        tl.atomic_xor(crc + n, total, sem="relaxed")


def chunks_of(max_size: int) -> int:
    """Programs of one range: it may begin and end inside a line."""
    return max(1, -(-(max_size + LINE_BYTES - 1) // CHUNK_BYTES))


def copy(
    source_base: int, source_start: Tensor, size: Tensor, target_base: int, target_start: Tensor | None, crc: Tensor,
    max_size: int, by_target: bool,
) -> None:  # fmt: skip
    """Ranges at source_base + source_start[n], to target_base + target_start[n] unless that is None.

    by_target: words are aligned as the target's, not as the source's.
    """
    n = len(size)
    tables = _tables(crc.device)
    chunks = chunks_of(max_size)
    with torch.cuda.device(crc.device) if crc.is_cuda else nullcontext():
        _start_kernel[(triton.cdiv(n, _START_RANGES),)](
            size, crc, tables, n, max_size, BLOCK=_START_RANGES, num_warps=1
        )  # fmt: skip
        _copy_kernel[(n * chunks,)](
            source_start, size, size if target_start is None else target_start, crc, tables, source_base,
            target_base, max_size, chunks,
            COLUMNS=COLUMNS, ROWS=ROWS, GROUPS=GROUPS, LINE=LINE_BYTES, LOW_CHUNKS=_LOW_CHUNKS,
            FACTORS=_FACTORS, COLUMN_POWERS=_COLUMN_POWERS, HIGH_CHUNKS=_HIGH_CHUNKS,
            ROW_BITS=_ROW, WORD_BITS=_WORD, TWO_WORD_BITS=_TWO_WORDS,
            BY_TARGET=by_target, HAS_TARGET=target_start is not None, num_warps=WARPS,
        )  # fmt: skip
