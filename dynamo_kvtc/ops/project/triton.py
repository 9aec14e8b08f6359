"""The transform's matrix products on the GPU: int8 where 8 bits are enough, float16 for the few wide components.

Tiles are read through tensor descriptors by persistent programs, one per multiprocessor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynamo_kvtc.ops.project import hopper
from dynamo_kvtc.ops.project.device import Pages, Synthesis, pairs_in_a_run

TILE = (256, 128, 128, 8, 3)
"""Tokens, columns and depth of a tile, warps, stages: the fastest of those measured on an H200 (int8, 8,192 x 8,192 x
32,768: 1,340 TOP/s; 128 x 256 within 3%)."""
SMALL_TILE = (128, 64, 128, 4, 4)
"""For few tokens, so that every multiprocessor has a tile."""
_BUSY = 0.75
"""Share of the multiprocessors' time in rounds of large tiles below which small ones are the better choice."""
INTERPRETED_TILE = (16, 128, 64, 4, 1)
_GROUP = 8
_ELEMENTS = 1024


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


@triton.jit
def _place(tile, rows, columns, GROUP: tl.constexpr):
    """Row and column of a tile, in an order that keeps operands in the cache."""
    per = GROUP * columns
    first = tile // per * GROUP
    size = tl.minimum(rows - first, GROUP)
    return first + tile % per % size, tile % per // size


@triton.jit(do_not_specialize=["tokens", "programs"])
def _analyse(a1, a2, b1, b2, c, tokens, components, k1, k2, stride_a1, stride_a2, stride_b1, stride_b2, stride_c,
             programs, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
             HIGH: tl.constexpr):  # fmt: skip
    """c = (a1 @ b1.T) * 256 + a2 @ b2.T, modulo 2**32; without HIGH a2 @ b2.T alone."""
    da2 = tl.make_tensor_descriptor(a2, shape=[tokens, k2], strides=[stride_a2, 1], block_shape=[BM, BK])
    db2 = tl.make_tensor_descriptor(b2, shape=[components, k2], strides=[stride_b2, 1], block_shape=[BN, BK])
    if HIGH:
        da1 = tl.make_tensor_descriptor(a1, shape=[tokens, k1], strides=[stride_a1, 1], block_shape=[BM, BK])
        db1 = tl.make_tensor_descriptor(b1, shape=[components, k1], strides=[stride_b1, 1], block_shape=[BN, BK])
    rows, columns = tl.cdiv(tokens, BM), tl.cdiv(components, BN)
    for tile in range(tl.program_id(0), rows * columns, programs):
        pm, pn = _place(tile, rows, columns, GROUP)
        rm, rn = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
        out = c + rm.to(tl.int64)[:, None] * stride_c + rn[None, :]
        inside = (rm < tokens)[:, None] & (rn < components)[None, :]
        acc = tl.zeros((BM, BN), dtype=tl.int32)
        if HIGH:
            for k in range(0, k1, BK):
                acc = tl.dot(da1.load([pm * BM, k]), db1.load([pn * BN, k]).T, acc, out_dtype=tl.int32)
            acc = acc << 8
        for k in range(0, k2, BK):
            acc = tl.dot(da2.load([pm * BM, k]), db2.load([pn * BN, k]).T, acc, out_dtype=tl.int32)
        tl.store(out, acc, mask=inside)


def analyse(low: Tensor, high: Tensor, b_low: Tensor, b_high: Tensor, out: Tensor) -> None:
    """out = high @ b_high.T * 256 + low @ b_low.T, exact modulo 2**32.

    low: int8 [T, P], high: int8 [T, Pw], b_low: int8 [C, P], b_high: int8 [C, Pw], out: int32 [T, C]; rows of the int8
    operands start at multiples of 16 bytes.
    """
    tokens, components = out.shape
    if not tokens or not components:
        return
    tile, programs = _tile(tokens, components, out)
    if tile is TILE and hopper.here(out):
        hopper.analyse(low, high, b_low, b_high, out)
        return
    _analyse[(programs,)](
        high, low, b_high, b_low, out, tokens, components, high.shape[1], low.shape[1], high.stride(0), low.stride(0),
        b_high.stride(0), b_low.stride(0), out.stride(0), programs, *tile[:3], _GROUP, True,
        num_warps=tile[3], num_stages=tile[4],
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _combine(products, out, tokens, rank, BLOCK: tl.constexpr):
    """Coefficients from products of limbs: rows of the inputs' low limbs, then high; columns of high ones, then low."""
    token = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = j < rank
    low = products + token * (2 * rank) + j
    high = products + (token + tokens) * (2 * rank) + j
    hh, hl = tl.load(high, mask=mask, other=0).to(tl.int64), tl.load(high + rank, mask=mask, other=0).to(tl.int64)
    lh, ll = tl.load(low, mask=mask, other=0).to(tl.int64), tl.load(low + rank, mask=mask, other=0).to(tl.int64)
    tl.store(out + token * rank + j, (hh * 65536 + (hl + lh) * 256 + ll).to(tl.float64), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _square_sums(inputs, out, tokens, columns, stride, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    low, high = inputs + token * stride, inputs + (token + tokens) * stride
    total = tl.zeros((BLOCK,), dtype=tl.int64)
    for k in range(0, columns, BLOCK):
        j = k + tl.arange(0, BLOCK)
        f = tl.load(high + j, mask=j < columns, other=0).to(tl.int32) * 256
        f += tl.load(low + j, mask=j < columns, other=0).to(tl.int32)
        total += (f * f).to(tl.int64)
    tl.store(out + token, tl.sum(total, axis=0))


def analyse_wide(inputs: Tensor, basis: Tensor, products: Tensor, out: Tensor) -> None:
    """See ``ops.project.device.analyse_wide_device``."""
    rows, columns = products.shape
    tile, programs = _tile(rows, columns, out)
    depth, stride_a, stride_b = inputs.shape[1], inputs.stride(0), basis.stride(0)
    _analyse[(programs,)](
        inputs, inputs, basis, basis, products, rows, columns, depth, depth, stride_a, stride_a, stride_b, stride_b,
        columns, programs, *tile[:3], _GROUP, False, num_warps=tile[3], num_stages=tile[4],
    )  # fmt: skip
    tokens, rank = out.shape
    _combine[(tokens, triton.cdiv(rank, _ELEMENTS))](products, out, tokens, rank, _ELEMENTS, num_warps=4)


def square_sums(inputs: Tensor, out: Tensor) -> None:
    """See ``ops.project.device.square_sums_device``."""
    _square_sums[(len(out),)](inputs, out, len(out), inputs.shape[1], inputs.stride(0), _ELEMENTS, num_warps=4)


@triton.jit
def _in_order(x, BM: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr):
    """From a matrix unit's order of pairs (``head_columns``) to that of a head's dims."""
    return tl.reshape(tl.permute(tl.reshape(x, [BM, COLUMNS // (4 * RUN), RUN, 4]), (0, 1, 3, 2)), [BM, COLUMNS])


@triton.jit(do_not_specialize=["tokens", "first_layer", "layers", "first_head", "programs"])
def _synthesise(narrow, wide, b_narrow, b_wide, tokens, channels, k_narrow, k_wide, stride_narrow, stride_wide,
                stride_bn, stride_bw, narrow_unit, factors, synthesis, mean, cos, sin, addresses, slots, first_layer,
                layers, heads, first_head, block_tokens, stride_block, stride_head, stride_token, programs,
                D: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, scaling, top,
                ROWS: tl.constexpr, RUN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                GROUP: tl.constexpr, ALIGN: tl.constexpr, ITEM: tl.constexpr, DTYPE: tl.constexpr, table, group_of,
                blocks, TABLED: tl.constexpr):  # fmt: skip
    """Channels of whole heads from levels, RoPE applied, into the pages. A tile is ROWS heads of BN / ROWS columns.

    Even columns of a head are dims of the first halves, odd ones of the second halves (``head_columns``): the two dims
    that RoPE rotates together are in one thread.
    """
    dn = tl.make_tensor_descriptor(narrow, shape=[tokens, k_narrow], strides=[stride_narrow, 1], block_shape=[BM, BK])
    dw = tl.make_tensor_descriptor(wide, shape=[tokens, k_wide], strides=[stride_wide, 1], block_shape=[BM, BK // 2])
    en = tl.make_tensor_descriptor(b_narrow, shape=[channels, k_narrow], strides=[stride_bn, 1], block_shape=[BN, BK])
    ew = tl.make_tensor_descriptor(b_wide, shape=[channels, k_wide], strides=[stride_bw, 1], block_shape=[BN, BK // 2])
    rows, columns = tl.cdiv(tokens, BM), tl.cdiv(channels, BN)
    HEAD: tl.constexpr = BN // ROWS
    for tile in range(tl.program_id(0), rows * columns, programs):
        pm, pn = _place(tile, rows, columns, GROUP)
        # Asked for before the products, to be there behind them.
        rm = pm * BM + tl.arange(0, BM)
        here = rm < tokens
        factor = tl.load(factors + rm, mask=here, other=0.0) * narrow_unit
        slot = tl.load(slots + rm, mask=here, other=-1)
        total = tl.zeros((BM, BN), dtype=tl.int32)
        for k in range(0, k_narrow, BK):
            total = tl.dot(dn.load([pm * BM, k]), en.load([pn * BN, k]).T, total, out_dtype=tl.int32)
        acc = total.to(tl.float32) * factor[:, None]
        for k in range(0, k_wide, BK // 2):
            acc = tl.dot(dw.load([pm * BM, k]), ew.load([pn * BN, k]).T, acc)

        first, second = tl.split(tl.reshape(acc, [BM, BN // 2, 2]))
        if RUN:
            first = _in_order(first, BM, BN // 2, RUN)
            second = _in_order(second, BM, BN // 2, RUN)
        written = here & (slot >= 0)
        block = tl.where(written, slot // block_tokens, 0)
        within_block = tl.where(written, slot % block_tokens * stride_token, 0)
        # A tile of one head has one base address, so its stores are plainly contiguous.
        if ROWS == 1:
            i = tl.arange(0, BN // 2)
            own = pn
        else:
            i = tl.arange(0, BN // 2) % (HEAD // 2)
            own = (pn * (BN // 2) + tl.arange(0, BN // 2)) // (HEAD // 2)
        head = first_head + own
        is_k = head < layers * heads
        within = tl.where(is_k, head, head - layers * heads)
        turned = (i < PAIRS) & is_k
        if INTERLEAVED:
            d_first = tl.where(i < PAIRS, 2 * i, 2 * PAIRS + (i - PAIRS) * 2)
            d_second = d_first + 1
        elif PAIRS == HALF:
            d_first = i
            d_second = i + PAIRS
        else:
            d_first = tl.where(i < PAIRS, i, 2 * PAIRS + (i - PAIRS) * 2)
            d_second = tl.where(i < PAIRS, i + PAIRS, d_first + 1)
        real = (own < channels // HEAD) & (i < HALF)
        both = real & (d_second < D)
        channel = own * D
        first = first * tl.load(synthesis + channel + d_first, mask=real, other=0.0)[None, :]
        first += tl.load(mean + channel + d_first, mask=real, other=0.0)[None, :]
        second = second * tl.load(synthesis + channel + d_second, mask=both, other=0.0)[None, :]
        second += tl.load(mean + channel + d_second, mask=both, other=0.0)[None, :]
        at = rm[:, None] * PAIRS + i[None, :]
        c = tl.load(cos + at, mask=written[:, None] & turned[None, :], other=1.0)
        s = tl.load(sin + at, mask=written[:, None] & turned[None, :], other=0.0)
        scale = tl.where(turned, scaling, 1.0)[None, :]
        x = (first * c - second * s) * scale
        y = (second * c + first * s) * scale
        x = tl.minimum(tl.maximum(x, -top), top).to(DTYPE)
        y = tl.minimum(tl.maximum(y, -top), top).to(DTYPE)
        # Base addresses are bytes, strides elements.
        layer = first_layer + within // heads
        which = layer * 2 + tl.where(is_k, 0, 1)
        stored = written[:, None] & real[None, :]
        if ROWS == 1:
            if TABLED:
                block = tl.load(table + tl.load(group_of + layer).to(tl.int64) * blocks + block, mask=written, other=-1)
                stored = stored & (block >= 0)[:, None]
            place = block * stride_block + within_block
            base = tl.multiple_of(tl.load(addresses + which).to(tl.pointer_type(DTYPE)), ALIGN * ITEM)
            base += tl.multiple_of(within % heads * stride_head, ALIGN)
            pointers = base + tl.multiple_of(place, [ALIGN])[:, None]
        else:
            base = tl.load(addresses + which, mask=real, other=0).to(tl.pointer_type(DTYPE))
            if TABLED:
                row = tl.load(group_of + layer, mask=real, other=0).to(tl.int64) * blocks
                own_block = tl.load(table + row[None, :] + block[:, None], mask=stored, other=-1)
                stored = stored & (own_block >= 0)
                place = own_block * stride_block + within_block[:, None]
            else:
                place = (block * stride_block + within_block)[:, None]
            pointers = (base + within % heads * stride_head)[None, :] + place
        tl.store(pointers + d_first[None, :], x, mask=stored)
        tl.store(pointers + d_second[None, :], y, mask=stored & both[None, :])


def synthesise(
    narrow: Tensor, wide: Tensor, basis: Synthesis, factors: Tensor, cos: Tensor, sin: Tensor, pages: Pages,
    slots: Tensor,
) -> None:  # fmt: skip
    """See ``ops.project.synthesise_into_pages``."""
    tokens, channels = len(slots), basis.narrow.shape[0]
    if not tokens:
        return
    tile, programs = _tile(tokens, channels, slots)
    if tile is TILE and hopper.fits(basis, pages, cos.shape[1]):
        hopper.synthesise(narrow, wide, basis, factors, cos, sin, pages, slots)
        return
    bm, bn, bk, warps, stages = tile
    if basis.head > bn:
        bm, bn = bm * bn // basis.head, basis.head
    _synthesise[(programs,)](
        narrow, wide, basis.narrow, basis.wide, tokens, channels, narrow.shape[1], wide.shape[1],
        narrow.stride(0), wide.stride(0), basis.narrow.stride(0), basis.wide.stride(0), basis.narrow_unit, factors,
        basis.gain, basis.mean, cos, sin, pages.addresses, slots, basis.first_layer, basis.layers, pages.heads,
        basis.first_head, pages.block_tokens, pages.stride_block, pages.stride_head, pages.stride_token, programs,
        pages.head_dim, (pages.head_dim + 1) // 2, cos.shape[1], basis.interleaved, basis.scaling,
        torch.finfo(pages.dtype).max, bn // basis.head, pairs_in_a_run(basis.head), bm, bn, bk, _GROUP, pages.alignment,
        pages.dtype.itemsize, _TL[pages.dtype], *_table_of(pages), num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _table_of(pages: Pages) -> tuple[Tensor, Tensor, int, bool]:
    """The table, groups, blocks, and whether there is one: else its place is taken by what is not looked at."""
    if pages.table is None or pages.group_of is None:
        return pages.addresses, pages.addresses, 0, False
    return pages.table, pages.group_of, pages.table.shape[1], True


_TL = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


_only: tuple[int, int, int, int, int] | None = None


def each_tile() -> Iterator[None]:
    """See ``ops.project.device.each_tile``."""
    global _only
    try:
        for _only in (TILE, SMALL_TILE):
            yield
    finally:
        _only = None


def _tile(tokens: int, columns: int, like: Tensor) -> tuple[tuple[int, int, int, int, int], int]:
    """The tile and how many programs share the work."""
    if not like.is_cuda:
        tile = INTERPRETED_TILE
        return tile, 2
    triton.set_allocator(_workspace)
    units = torch.cuda.get_device_properties(like.device).multi_processor_count
    tiles = triton.cdiv(tokens, TILE[0]) * triton.cdiv(columns, TILE[1])
    busy = tiles / (triton.cdiv(tiles, units) * units)
    tile = _only or (TILE if busy > _BUSY else SMALL_TILE)
    return tile, min(units, triton.cdiv(tokens, tile[0]) * triton.cdiv(columns, tile[1]))
