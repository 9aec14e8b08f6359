"""The pages' kernels. A program takes a tile of tokens and some heads of one layer's K or V, all D dims of a head.

Where float32 must be the reference's bit for bit, no multiply-add is fused (``enable_fp_fusion=False``), and rounding
is done by hand: half to even by adding 1.5 * 2^23, whose sum has integer spacing; to bfloat16 on the bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynamo_kvtc.ops.pages.cache import PagedCache
from dynamo_kvtc.ops.pages.fixed import INPUT_MAX, NARROW_MAX, FixedInputs, FixedRows
from dynamo_kvtc.types import RopeSpec

_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_TILE = 1024
"""Elements of a head's tile of tokens: 8 a thread, 16 bytes of bfloat16."""
_MAX_HEADS = 2
"""Heads of a program, which share its cosines. 4 at most: so many squares of INPUT_MAX fit 32 bits."""
_EXACT_TILE = 1024
"""2-byte units of exact tokens that a program moves."""
_WARPS = 4

_LIMIT = tl.constexpr(INPUT_MAX)
_NARROW = tl.constexpr(NARROW_MAX)
_MAGIC = tl.constexpr(12582912.0)
_MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def _to_float(raw, KIND: tl.constexpr):
    """float32 of what was loaded: bfloat16 is read as int16, and is the upper half of a float32."""
    return (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True) if KIND == 2 else raw.to(tl.float32)


@triton.jit
def _from_float(x, KIND: tl.constexpr, TOP: tl.constexpr):
    """Clamped to the dtype's largest finite value, rounded half to even; NaN stays NaN."""
    x = tl.where(x != x, x, tl.minimum(tl.maximum(x, -TOP), TOP))
    if KIND == 0:
        out = x
    elif KIND == 1:
        out = x.to(tl.float16)
    else:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        out = tl.where(x != x, 0x7FC0, rounded).to(tl.int16)
    return out


@triton.jit
def _pages(address, KIND: tl.constexpr, ALIGN: tl.constexpr):
    if KIND == 0:
        pages = address.to(tl.pointer_type(tl.float32))
    elif KIND == 1:
        pages = address.to(tl.pointer_type(tl.float16))
    else:
        pages = address.to(tl.pointer_type(tl.int16))
    return tl.multiple_of(pages, ALIGN)


@triton.jit
def _token_offsets(slot, there, table, group_of, layer, room, stride_block, stride_token, N: tl.constexpr,
                   TABLED: tl.constexpr):  # fmt: skip
    """Where tokens lie in a layer's pages, and which of them do; a table says it where layers are of several groups."""
    slot = tl.where(there, slot, 0)
    page = slot // N
    if TABLED:
        row = tl.load(group_of + layer).to(tl.int64) * (room // N)
        page = tl.load(table + row + page, mask=there, other=-1)
        there = there & (page >= 0)
        page = tl.where(there, page, 0)
    return page * stride_block + (slot % N) * stride_token, there


@triton.jit
def _pairing(d, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Of each dim: the one it is rotated with, their angle's number, and whether it is the first of the two."""
    if INTERLEAVED:
        first = (d % 2) == 0
        partner = tl.where(first, d + 1, d - 1)
        pair = d // 2
    else:
        # Remainders, not cases: so neighbours are known to be neighbours, and come in one load. Wrong beyond 2 PAIRS.
        first = d < PAIRS
        partner = (d + PAIRS) % (2 * PAIRS)
        pair = d % PAIRS
    return partner, pair, first


@triton.jit
def _gather_part(
    pages, token_at, there, t, in_t, layer_channel, first_head, stride_head,
    cos, sin, scale, mean, gain, wide_slot, wide_heads, wide, low, ld_low, high, ld_high, energy, saturated,
    KEYS: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, SCALED: tl.constexpr,
    KIND: tl.constexpr, HEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    readable, writable = there[:, None], in_t[:, None]
    columns = tl.full((BLOCK_T, BLOCK_D), True, tl.int1)
    if D != BLOCK_D:
        in_d = (d < D)[None, :]
        readable, writable, columns = readable & in_d, writable & in_d, columns & in_d
    if KEYS:
        turned = (d < 2 * PAIRS)[None, :]
        partner, pair, first = _pairing(d, PAIRS, INTERLEAVED)
        angle = t[:, None] * PAIRS + pair[None, :]
        c = tl.load(cos + angle, mask=in_t[:, None] & turned, other=0.0)
        s = tl.load(sin + angle, mask=in_t[:, None] & turned, other=0.0)
        s = tl.where(first[None, :], s, -s)
    squares = tl.zeros((BLOCK_T, BLOCK_D), tl.uint32)
    worst = tl.zeros((BLOCK_T, BLOCK_D), tl.uint32)
    for i in tl.static_range(HEADS):
        head = first_head + i
        at = pages + (token_at + head.to(tl.int64) * stride_head)[:, None]
        if KIND == 2:
            raw = tl.load(at + d[None, :], mask=readable, other=0x7FC0)
        else:
            raw = tl.load(at + d[None, :], mask=readable, other=float("nan"))
        x = _to_float(raw, KIND)
        if KEYS:
            other = tl.load(at + partner[None, :], mask=readable & turned, other=0)
            rotated = x * c + _to_float(other, KIND) * s
            if SCALED:
                rotated = rotated * scale
            x = rotated if 2 * PAIRS == BLOCK_D else tl.where(turned, rotated, x)
        # Each thread looks up its own columns: sharing what one thread loaded would cost barriers.
        channel = tl.broadcast_to((layer_channel + head * D + d)[None, :], (BLOCK_T, BLOCK_D))
        g = (x - tl.load(mean + channel, mask=columns, other=0.0)) * tl.load(gain + channel, mask=columns, other=0.0)
        # What is not finite, or beyond 2^22, comes out beyond INPUT_MAX as well: its token is not to be coded.
        f = (g + _MAGIC).to(tl.int32, bitcast=True) - _MAGIC_BITS
        if D != BLOCK_D:
            f = tl.where(columns, f, 0)
        worst = tl.maximum(worst, (f + _LIMIT).to(tl.uint32, bitcast=True))
        squares += (f * f).to(tl.uint32, bitcast=True)
        narrow = tl.minimum(tl.maximum(f, -_NARROW), _NARROW)
        to_low = low + t[:, None] * ld_low + channel
        if tl.load(wide_heads + layer_channel // D + head) != 0:
            w = tl.load(wide_slot + channel, mask=columns, other=-1)
            is_wide = w.to(tl.uint32, bitcast=True) < wide
            # int8 keeps the lower byte.
            tl.store(to_low, tl.where(is_wide, f, narrow).to(tl.int8), mask=writable)
            to_high = high + t[:, None] * ld_high + w
            tl.store(to_high, ((f + 128) >> 8).to(tl.int8), mask=writable & is_wide)
        else:
            tl.store(to_low, narrow.to(tl.int8), mask=writable)
    tl.atomic_add(energy + t, tl.sum(squares.to(tl.int64), axis=1), mask=in_t, sem="relaxed")
    tl.store(saturated + t, 1, mask=in_t & (tl.max(worst, axis=1) > 2 * _LIMIT))


@triton.jit(do_not_specialize=["tokens", "room", "first_layer"])
def _gather_fixed(
    addresses, slots, cos, sin, mean, gain, wide_slot, wide_heads, low, high, energy, saturated,
    table, group_of,
    tokens, room, first_layer, layers, wide, ld_low, ld_high, stride_block, stride_head, stride_token, scale,
    N: tl.constexpr, TABLED: tl.constexpr, ALL_HEADS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, SCALED: tl.constexpr, KIND: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first_head = tl.program_id(1) % (ALL_HEADS // HEADS) * HEADS
    layer = tl.program_id(1) // (ALL_HEADS // HEADS)
    part = tl.program_id(2)
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    in_t = t < tokens
    slot = tl.load(slots + t, mask=in_t, other=-1)
    there = (slot >= 0) & (slot < room)
    token_at, there = _token_offsets(
        slot, there, table, group_of, first_layer + layer, room, stride_block, stride_token, N, TABLED
    )
    pages = _pages(tl.load(addresses + (first_layer + layer) * 2 + part), KIND, ALIGN)
    layer_channel = (part * layers + layer) * (ALL_HEADS * D)
    # One branch around all of it: the two programs differ in registers and loads, and neither waits for the other.
    if part == 0:
        _gather_part(
            pages, token_at, there, t, in_t, layer_channel, first_head, stride_head,
            cos, sin, scale, mean, gain, wide_slot, wide_heads, wide, low, ld_low, high, ld_high, energy, saturated,
            True, D, PAIRS, INTERLEAVED, SCALED, KIND, HEADS, BLOCK_T, BLOCK_D,
        )  # fmt: skip
    else:
        _gather_part(
            pages, token_at, there, t, in_t, layer_channel, first_head, stride_head,
            cos, sin, scale, mean, gain, wide_slot, wide_heads, wide, low, ld_low, high, ld_high, energy, saturated,
            False, D, PAIRS, INTERLEAVED, SCALED, KIND, HEADS, BLOCK_T, BLOCK_D,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "room", "first_layer"])
def _scatter_rows(
    addresses, slots, rows, cos, sin, keep, table, group_of,
    tokens, room, first_layer, layers, ld_rows, stride_block, stride_head, stride_token, scale,
    N: tl.constexpr, TABLED: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, KIND: tl.constexpr, TOP: tl.constexpr, ALIGN: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1) % HEADS
    layer = tl.program_id(1) // HEADS
    part = tl.program_id(2)
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    slot = tl.load(slots + t, mask=t < tokens, other=-1)
    written = (slot >= 0) & (slot < room) & (tl.load(keep + t, mask=t < tokens, other=0) != 0)
    token_at, written = _token_offsets(
        slot, written, table, group_of, first_layer + layer, room, stride_block, stride_token, N, TABLED
    )
    pages = _pages(tl.load(addresses + (first_layer + layer) * 2 + part), KIND, ALIGN)
    d = tl.arange(0, BLOCK_D)
    mask = written[:, None] & (d < D)[None, :]
    at = rows + t[:, None] * ld_rows + ((part * layers + layer) * HEADS + head) * D
    x = tl.load(at + d[None, :], mask=mask, other=0.0)
    if part == 0:
        turned = written[:, None] & (d < 2 * PAIRS)[None, :]
        partner, pair, first = _pairing(d, PAIRS, INTERLEAVED)
        angle = t[:, None] * PAIRS + pair[None, :]
        c = tl.load(cos + angle, mask=turned, other=0.0)
        s = tl.load(sin + angle, mask=turned, other=0.0)
        other = tl.load(at + partner[None, :], mask=turned, other=0.0)
        x = tl.where(turned, (x * c + other * tl.where(first[None, :], -s, s)) * scale, x)
    to = pages + (token_at + head.to(tl.int64) * stride_head)[:, None] + d[None, :]
    tl.store(to, _from_float(x, KIND, TOP), mask=mask)


@triton.jit(do_not_specialize=["tokens", "room", "size", "first_layer"], do_not_specialize_on_alignment=["base"])
def _move_exact(
    addresses, slots, base, index, count, buffer, groups, table, group_of,
    tokens, room, size, first_layer, stride_block, stride_head, stride_token,
    N: tl.constexpr, TABLED: tl.constexpr, HEADS: tl.constexpr, UNITS: tl.constexpr, UNITS_PER_VALUE: tl.constexpr,
    TO_PAGES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """One exact token of one layer: rows of D values, head by head K and V, in units of 2 bytes, as sections lie at
    any even byte. groups: of each layer its layer group, and its number among that one's layers."""
    x = tl.program_id(0)
    layer = tl.program_id(1)
    slot = tl.load(slots + x)
    there = (slot >= 0) & (slot < room)
    token_at, there = _token_offsets(
        slot, there, table, group_of, first_layer + layer, room, stride_block, stride_token, N, TABLED
    )
    row = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = row < 2 * HEADS
    starts = addresses + (first_layer + layer) * 2
    start = tl.where(row % 2 == 0, tl.load(starts), tl.load(starts + 1))
    offset = (token_at + (row // 2).to(tl.int64) * stride_head) * UNITS_PER_VALUE
    u = tl.arange(0, BLOCK_U)
    pages = start.to(tl.pointer_type(tl.int16))[:, None] + (offset[:, None] + u[None, :])
    # In bytes: [layer, head, K or V, exact token], each UNITS long.
    group, within = tl.load(groups + 2 * layer), tl.load(groups + 2 * layer + 1)
    place = (within * (2 * HEADS) + row).to(tl.int64) * tl.load(count + x) + tl.load(index + x)
    piece = tl.load(base + group.to(tl.int64) * tokens + x) + place * (2 * UNITS)
    # An odd piece would be a misaligned address, which ends the process's use of the GPU.
    fits = in_rows & (piece >= 0) & (piece + 2 * UNITS <= size) & (piece % 2 == 0)
    section = (buffer + piece).to(tl.pointer_type(tl.int16))[:, None] + u[None, :]
    mask = fits[:, None] & (u < UNITS)[None, :]
    if TO_PAGES:
        tl.store(pages, tl.load(section, mask=mask & there, other=0), mask=mask & there)
    else:
        tl.store(section, tl.load(pages, mask=mask & there, other=0), mask=mask)


def gather_fixed(
    cache: PagedCache, layers: tuple[int, int], slots: Tensor, cos: Tensor, sin: Tensor, rope: RopeSpec,
    inputs: FixedInputs, out: FixedRows,
) -> None:  # fmt: skip
    out.energy.zero_()
    out.saturated.zero_()
    tokens, count = slots.shape[0], layers[1] - layers[0]
    if not tokens:
        return
    heads, block_d = _heads_at_once(cache.heads), triton.next_power_of_2(cache.head_dim)
    block_t = max(1, _TILE // block_d)
    grid = (triton.cdiv(tokens, block_t), count * (cache.heads // heads), 2)
    with torch.cuda.device_of(cache.addresses):
        _gather_fixed[grid](
            cache.addresses, slots, cos, sin, inputs.mean, inputs.gain, inputs.wide_slot, inputs.wide_heads,
            out.low, out.high, out.energy, out.saturated, *_table_of(cache),
            tokens, cache.slots, layers[0], count, inputs.wide, out.low.stride(0), out.high.stride(0), *cache.strides,
            1.0 / rope.attention_scaling,
            N=cache.tokens_per_block, TABLED=cache.table is not None, ALL_HEADS=cache.heads, HEADS=heads,
            D=cache.head_dim, PAIRS=cos.shape[1], INTERLEAVED=rope.style == "interleaved",
            SCALED=rope.attention_scaling != 1.0, KIND=_KINDS[cache.dtype],
            ALIGN=cache.alignment, BLOCK_T=block_t, BLOCK_D=block_d, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def scatter_rows(
    cache: PagedCache, layers: tuple[int, int], slots: Tensor, rows: Tensor, cos: Tensor, sin: Tensor, rope: RopeSpec,
    keep: Tensor,
) -> None:  # fmt: skip
    tokens, count = slots.shape[0], layers[1] - layers[0]
    if not tokens:
        return
    block_d = triton.next_power_of_2(cache.head_dim)
    block_t = max(1, _TILE // block_d)
    with torch.cuda.device_of(cache.addresses):
        _scatter_rows[(triton.cdiv(tokens, block_t), count * cache.heads, 2)](
            cache.addresses, slots, rows, cos, sin, keep, *_table_of(cache),
            tokens, cache.slots, layers[0], count, rows.stride(0), *cache.strides, rope.attention_scaling,
            N=cache.tokens_per_block, TABLED=cache.table is not None, HEADS=cache.heads, D=cache.head_dim,
            PAIRS=cos.shape[1], INTERLEAVED=rope.style == "interleaved", KIND=_KINDS[cache.dtype],
            TOP=torch.finfo(cache.dtype).max,
            ALIGN=cache.alignment, BLOCK_T=block_t, BLOCK_D=block_d, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def move_exact(
    cache: PagedCache, groups: Sequence[tuple[int, int]], slots: Tensor, base: Tensor, index: Tensor, count: Tensor,
    buffer: Tensor, to_pages: bool,
) -> None:  # fmt: skip
    if not slots.shape[0]:
        return
    per_value = cache.dtype.itemsize // 2
    units = cache.head_dim * per_value
    block_u = triton.next_power_of_2(units)
    block_r = min(triton.next_power_of_2(2 * cache.heads), max(1, _EXACT_TILE // block_u))
    with torch.cuda.device_of(cache.addresses):
        first = groups[0][0]
        _move_exact[(slots.shape[0], groups[-1][1] - first, triton.cdiv(2 * cache.heads, block_r))](
            cache.addresses, slots, base, index, count, buffer, _groups_of(tuple(groups), cache.device),
            *_table_of(cache), slots.shape[0], cache.slots, buffer.numel(), first, *cache.strides,
            N=cache.tokens_per_block, TABLED=cache.table is not None, HEADS=cache.heads, UNITS=units,
            UNITS_PER_VALUE=per_value, TO_PAGES=to_pages, BLOCK_R=block_r, BLOCK_U=block_u, num_warps=_WARPS,
        )  # fmt: skip


def _table_of(cache: PagedCache) -> tuple[Tensor, Tensor]:
    """The table's pages and groups; without one, what is not looked at."""
    table = cache.table
    return (cache.addresses, cache.addresses) if table is None else (table.pages, table.group_of)


@lru_cache(maxsize=256)
def _groups_of(groups: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """int32 [layers, 2], from the first group's first layer on; on the device once and for all."""
    rows = [(g, i) for g, (start, end) in enumerate(groups) for i in range(end - start)]
    return torch.tensor(rows, dtype=torch.int32).to(device)


def _heads_at_once(heads: int) -> int:
    return next(n for n in range(_MAX_HEADS, 0, -1) if heads % n == 0)
