"""The transform's products on Hopper: what ``triton.py`` does, with nothing to wait for between their parts.

One warp brings tiles of both products into a ring without a pause, over all of a program's tiles; eight warps multiply,
a product ahead of what they wait for, and write. Of the synthesis a thread's columns are eight neighbouring dims of a
head (``device.head_columns``), so pages are written straight from registers, 16 bytes at a time.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from dynamo_kvtc.ops.project.device import Pages, Synthesis

TOKENS, COLUMNS, DEPTH, STAGES = 256, 128, 128, 4
"""Of a tile, depth in bytes; 192 KiB of shared memory in all."""
_GROUP = 8
_WARPS = 8
_PRODUCER_REGISTERS = 24

PROVEN = {(head, dtype) for head in (64, 128) for dtype in (torch.bfloat16, torch.float16)}
"""Head dims and dtypes that the synthesis was compared with the reference for on a GPU."""

_BM, _BN, _BK, _STAGES = gl.constexpr(TOKENS), gl.constexpr(COLUMNS), gl.constexpr(DEPTH), gl.constexpr(STAGES)
_STAGE_BYTES = gl.constexpr((TOKENS + COLUMNS) * DEPTH)
_HALF = gl.constexpr(COLUMNS // 4)
"""Pairs of columns in half a tile, which is one head or half of one."""


@gluon.jit
def _place(tile, rows, columns, GROUP: gl.constexpr):
    """Row and column of a tile, in an order that keeps operands in the cache."""
    per = GROUP * columns
    first = tile // per * GROUP
    size = gl.minimum(rows - first, GROUP)
    return first + tile % per % size, tile % per // size


@gluon.jit
def _bring(a_desc, b_desc, pm, pn, columns, a, b, ready, free, n, STEP: gl.constexpr):
    """Tiles of one product's rows pm and pn, over all its columns, into the ring from stage n on."""
    for k in range(0, columns, STEP):
        stage = n % _STAGES
        mbarrier.wait(free.index(stage), ((n // _STAGES) & 1) ^ 1)
        mbarrier.expect(ready.index(stage), _STAGE_BYTES)
        tma.async_copy_global_to_shared(a_desc, [pm * _BM, k], ready.index(stage), a.index(stage))
        tma.async_copy_global_to_shared(b_desc, [pn * _BN, k], ready.index(stage), b.index(stage))
        n += 1
    return n


@gluon.jit
def _produce(a1, b1, a2, b2, ring_a1, ring_b1, ring_a2, ring_b2, ready, free, tokens, outputs, k1, k2, programs,
             GROUP: gl.constexpr, STEP1: gl.constexpr, STEP2: gl.constexpr):  # fmt: skip
    rows, columns = gl.cdiv(tokens, _BM), gl.cdiv(outputs, _BN)
    n = 0
    for tile in range(gl.program_id(0), rows * columns, programs):
        pm, pn = _place(tile, rows, columns, GROUP)
        n = _bring(a1, b1, pm, pn, k1, ring_a1, ring_b1, ready, free, n, STEP1)
        n = _bring(a2, b2, pm, pn, k2, ring_a2, ring_b2, ready, free, n, STEP2)


@gluon.jit
def _products(acc, a, b, ready, free, n, steps):
    """acc + a @ b.T over the next ``steps`` stages, one at least, each given back as soon as it has been read."""
    for k in range(steps):
        stage = n % _STAGES
        mbarrier.wait(ready.index(stage), (n // _STAGES) & 1)
        acc = warpgroup_mma(a.index(stage), b.index(stage).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        gl.thread_barrier()
        mbarrier.arrive(free.index((n + _STAGES - 1) % _STAGES), count=1, pred=k > 0)
        n += 1
    acc = warpgroup_mma_wait(0, deps=[acc])
    gl.thread_barrier()
    mbarrier.arrive(free.index((n + _STAGES - 1) % _STAGES), count=1)
    return acc, n


@gluon.jit
def _halves(x, layout: gl.constexpr):
    """[BM, BN / 2] of a tile's first or second halves to two [BM, BN / 4], their dims in order."""
    left, right = gl.split(x.reshape([_BM, 2, 8, 4]).permute([0, 3, 2, 1]))
    return (
        gl.convert_layout(left.reshape([_BM, _HALF]), layout), gl.convert_layout(right.reshape([_BM, _HALF]), layout)
    )  # fmt: skip


@gluon.jit
def _head(addresses, pn, half: gl.constexpr, first_layer, layers, heads, first_head, stride_head, D: gl.constexpr,
          ALIGN: gl.constexpr, DTYPE: gl.constexpr):  # fmt: skip
    """Of half a tile: its head among the operand's, whether that is one of K, and where its pages start."""
    own = (pn * _BN + half * (_BN // 2)) // D
    head = first_head + own
    is_k = head < layers * heads
    within = gl.where(is_k, head, head - layers * heads)
    # A tile of heads may be the last, and have one beyond: its address is not read from, only loaded.
    which = gl.minimum(first_layer + within // heads, first_layer + layers - 1) * 2 + gl.where(is_k, 0, 1)
    base = gl.load(addresses + which).to(gl.pointer_type(DTYPE), bitcast=True)
    base = gl.multiple_of(base, 16) + gl.multiple_of((within % heads).to(gl.int64) * stride_head, ALIGN)
    return own, is_k, base


@gluon.jit
def _write(x, y, rows, place, mask, gain, mean, cos, sin, base, first, is_k, scaling, top, D: gl.constexpr,
           DTYPE: gl.constexpr):  # fmt: skip
    """Dims first .. first + BN / 4 - 1 of a head, and those that RoPE turns with them, D / 2 further on.

    gain, mean: of the head's first dim on; place: of the token's row, elements from ``base`` on.
    """
    layout: gl.constexpr = x.type.layout
    i = first + gl.arange(0, _HALF, gl.SliceLayout(0, layout))
    x = x * gl.load(gain + i)[None, :] + gl.load(mean + i)[None, :]
    y = y * gl.load(gain + D // 2 + i)[None, :] + gl.load(mean + D // 2 + i)[None, :]
    if is_k:
        at = rows[:, None] * (D // 2) + i[None, :]
        c = gl.load(cos + at, mask=mask[:, None], other=1.0) * scaling
        s = gl.load(sin + at, mask=mask[:, None], other=0.0) * scaling
        turned = x * c - y * s
        y = y * c + x * s
        x = turned
    x = gl.minimum(gl.maximum(x, -top), top).to(DTYPE)
    y = gl.minimum(gl.maximum(y, -top), top).to(DTYPE)
    to = base + place[:, None] + i[None, :]
    gl.store(to, x, mask=mask[:, None])
    gl.store(to + D // 2, y, mask=mask[:, None])


@gluon.jit
def _consume(a, b, a_wide, b_wide, ready, free, tokens, channels, k_narrow, k_wide, narrow_unit, factors, gain, mean,
             cos, sin, addresses, slots, first_layer, layers, heads, first_head, block_tokens, stride_block,
             stride_head, stride_token, programs, scaling, top, D: gl.constexpr, GROUP: gl.constexpr,
             ALIGN: gl.constexpr, DTYPE: gl.constexpr):  # fmt: skip
    integers: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, _BN, 32])
    floats: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, _BN, 16])
    # Half a tile's columns in the threads that have them, but neighbours in neighbouring registers.
    written: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [128, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0], [64, 0]], [], [_BM, _HALF],
    )  # fmt: skip
    rows, columns = gl.cdiv(tokens, _BM), gl.cdiv(channels, _BN)
    n = 0
    for tile in range(gl.program_id(0), rows * columns, programs):
        pm, pn = _place(tile, rows, columns, GROUP)
        # Asked for before the products, to be there behind them.
        rm = pm * _BM + gl.arange(0, _BM, gl.SliceLayout(1, integers))
        factor = gl.load(factors + rm, mask=rm < tokens, other=0.0) * narrow_unit
        r = pm * _BM + gl.arange(0, _BM, gl.SliceLayout(1, written))
        slot = gl.load(slots + r, mask=r < tokens, other=-1).to(gl.int32)
        head0, is_k0, base0 = _head(addresses, pn, 0, first_layer, layers, heads, first_head, stride_head, D, ALIGN,
                                    DTYPE)  # fmt: skip
        head1, is_k1, base1 = _head(addresses, pn, 1, first_layer, layers, heads, first_head, stride_head, D, ALIGN,
                                    DTYPE)  # fmt: skip

        total = gl.zeros([_BM, _BN], gl.int32, integers)
        total, n = _products(total, a, b, ready, free, n, gl.cdiv(k_narrow, _BK))
        acc = gl.convert_layout(total.to(gl.float32) * factor[:, None], floats, assert_trivial=True)
        acc, n = _products(acc, a_wide, b_wide, ready, free, n, gl.cdiv(k_wide, _BK // 2))

        x, y = gl.split(acc.reshape([_BM, _BN // 2, 2]))
        x0, x1 = _halves(x, written)
        y0, y1 = _halves(y, written)
        mask = slot >= 0
        slot = gl.where(mask, slot, 0)
        place = (slot // block_tokens).to(gl.int64) * stride_block + (slot % block_tokens).to(gl.int64) * stride_token
        place = gl.multiple_of(place, [ALIGN])
        _write(x0, y0, r, place, mask, gain + head0 * D, mean + head0 * D, cos, sin, base0, 0, is_k0, scaling, top, D,
               DTYPE)  # fmt: skip
        # Of a tile of one head both halves are its own; of two heads each has one, and the second may not be there.
        if (head1 + 1) * D <= channels:
            _write(x1, y1, r, place, mask, gain + head1 * D, mean + head1 * D, cos, sin, base1,
                   _HALF if D == _BN else 0, is_k1, scaling, top, D, DTYPE)  # fmt: skip


@gluon.jit
def _ring():
    """Stages for tiles of bytes, and what says that they are there, and that they may be filled again."""
    a = gl.allocate_shared_memory(
        gl.int8, [_STAGES, _BM, _BK], gl.NVMMASharedLayout.get_default_for([_BM, _BK], gl.int8)
    )
    b = gl.allocate_shared_memory(
        gl.int8, [_STAGES, _BN, _BK], gl.NVMMASharedLayout.get_default_for([_BN, _BK], gl.int8)
    )
    ready = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(_STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    return a, b, ready, free


@gluon.jit(do_not_specialize=["tokens", "first_layer", "layers", "first_head", "programs"])
def _synthesise(narrow, wide, b_narrow, b_wide, tokens, channels, k_narrow, k_wide, stride_narrow, stride_wide,
                stride_bn, stride_bw, narrow_unit, factors, gain, mean, cos, sin, addresses, slots, first_layer,
                layers, heads, first_head, block_tokens, stride_block, stride_head, stride_token, programs, scaling,
                top, D: gl.constexpr, GROUP: gl.constexpr, ALIGN: gl.constexpr, DTYPE: gl.constexpr,
                PRODUCER: gl.constexpr):  # fmt: skip
    bytes_a: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_BM, _BK], gl.int8)
    bytes_b: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_BN, _BK], gl.int8)
    halves_a: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_BM, _BK // 2], gl.float16)
    halves_b: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_BN, _BK // 2], gl.float16)
    dn = tma.make_tensor_descriptor(narrow, [tokens, k_narrow], [stride_narrow, 1], [_BM, _BK], bytes_a)
    dw = tma.make_tensor_descriptor(wide, [tokens, k_wide], [stride_wide, 1], [_BM, _BK // 2], halves_a)
    en = tma.make_tensor_descriptor(b_narrow, [channels, k_narrow], [stride_bn, 1], [_BN, _BK], bytes_b)
    ew = tma.make_tensor_descriptor(b_wide, [channels, k_wide], [stride_bw, 1], [_BN, _BK // 2], halves_b)
    a, b, ready, free = _ring()
    a16 = a._reinterpret(gl.float16, [_STAGES, _BM, _BK // 2], halves_a)
    b16 = b._reinterpret(gl.float16, [_STAGES, _BN, _BK // 2], halves_b)
    gl.warp_specialize(
        [
            (_consume, (a, b, a16, b16, ready, free, tokens, channels, k_narrow, k_wide, narrow_unit, factors, gain,
                        mean, cos, sin, addresses, slots, first_layer, layers, heads, first_head, block_tokens,
                        stride_block, stride_head, stride_token, programs, scaling, top, D, GROUP, ALIGN, DTYPE)),
            (_produce, (dn, en, dw, ew, a, b, a16, b16, ready, free, tokens, channels, k_narrow, k_wide, programs,
                        GROUP, _BK, _BK // 2)),
        ],
        [1],
        [PRODUCER],
    )  # fmt: skip


@gluon.jit
def _limbs(a, b, ready, free, out, tokens, outputs, k_high, k_low, stride_out, programs, GROUP: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, _BN, 32])
    rows, columns = gl.cdiv(tokens, _BM), gl.cdiv(outputs, _BN)
    n = 0
    for tile in range(gl.program_id(0), rows * columns, programs):
        pm, pn = _place(tile, rows, columns, GROUP)
        total = gl.zeros([_BM, _BN], gl.int32, layout)
        total, n = _products(total, a, b, ready, free, n, gl.cdiv(k_high, _BK))
        total, n = _products(total << 8, a, b, ready, free, n, gl.cdiv(k_low, _BK))
        rm = pm * _BM + gl.arange(0, _BM, gl.SliceLayout(1, layout))
        rn = pn * _BN + gl.arange(0, _BN, gl.SliceLayout(0, layout))
        to = out + rm.to(gl.int64)[:, None] * stride_out + rn[None, :]
        # Whole tiles apart: what a mask may cut between neighbours is written one by one.
        if (pn + 1) * _BN <= outputs:
            gl.store(to, total, mask=(rm < tokens)[:, None])
        else:
            gl.store(to, total, mask=(rm < tokens)[:, None] & (rn < outputs)[None, :])


@gluon.jit(do_not_specialize=["tokens", "programs"])
def _analyse(high, low, b_high, b_low, out, tokens, outputs, k_high, k_low, stride_high, stride_low, stride_bh,
             stride_bl, stride_out, programs, GROUP: gl.constexpr, PRODUCER: gl.constexpr):  # fmt: skip
    bytes_a: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_BM, _BK], gl.int8)
    bytes_b: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_BN, _BK], gl.int8)
    ah = tma.make_tensor_descriptor(high, [tokens, k_high], [stride_high, 1], [_BM, _BK], bytes_a)
    al = tma.make_tensor_descriptor(low, [tokens, k_low], [stride_low, 1], [_BM, _BK], bytes_a)
    bh = tma.make_tensor_descriptor(b_high, [outputs, k_high], [stride_bh, 1], [_BN, _BK], bytes_b)
    bl = tma.make_tensor_descriptor(b_low, [outputs, k_low], [stride_bl, 1], [_BN, _BK], bytes_b)
    a, b, ready, free = _ring()
    gl.warp_specialize(
        [
            (_limbs, (a, b, ready, free, out, tokens, outputs, k_high, k_low, stride_out, programs, GROUP)),
            (_produce, (ah, bh, al, bl, a, b, a, b, ready, free, tokens, outputs, k_high, k_low, programs, GROUP, _BK,
                        _BK)),
        ],
        [1],
        [PRODUCER],
    )  # fmt: skip


def here(like: Tensor) -> bool:
    return like.is_cuda and torch.cuda.get_device_capability(like.device)[0] == 9


def fits(basis: Synthesis, pages: Pages, pairs: int) -> bool:
    """Whether ``synthesise`` can do it: RoPE on whole heads, halves apart, pages in 16-byte pieces, the same in every
    layer; and has done it."""
    plain = pages.table is None and pages.head_dim == basis.head == 2 * pairs and not basis.interleaved
    proven = (basis.head, pages.dtype) in PROVEN
    return here(basis.narrow) and plain and proven and pages.alignment * pages.dtype.itemsize >= 16


def synthesise(
    narrow: Tensor, wide: Tensor, basis: Synthesis, factors: Tensor, cos: Tensor, sin: Tensor, pages: Pages,
    slots: Tensor,
) -> None:  # fmt: skip
    """See ``ops.project.synthesise_into_pages``; only what ``fits``."""
    tokens, channels = len(slots), basis.narrow.shape[0]
    programs = _programs(slots, tokens, channels)
    _synthesise[(programs,)](
        narrow, wide, basis.narrow, basis.wide, tokens, channels, narrow.shape[1], wide.shape[1], narrow.stride(0),
        wide.stride(0), basis.narrow.stride(0), basis.wide.stride(0), basis.narrow_unit, factors, basis.gain,
        basis.mean, cos, sin, pages.addresses, slots, basis.first_layer, basis.layers, pages.heads, basis.first_head,
        pages.block_tokens, pages.stride_block, pages.stride_head, pages.stride_token, programs, basis.scaling,
        torch.finfo(pages.dtype).max, pages.head_dim, _GROUP, pages.alignment, _GL[pages.dtype], _PRODUCER_REGISTERS,
        num_warps=_WARPS,
    )  # fmt: skip


def analyse(low: Tensor, high: Tensor, b_low: Tensor, b_high: Tensor, out: Tensor) -> None:
    """See ``ops.project.triton.analyse``; only ``here``."""
    tokens, outputs = out.shape
    programs = _programs(out, tokens, outputs)
    _analyse[(programs,)](
        high, low, b_high, b_low, out, tokens, outputs, high.shape[1], low.shape[1], high.stride(0), low.stride(0),
        b_high.stride(0), b_low.stride(0), out.stride(0), programs, _GROUP, _PRODUCER_REGISTERS, num_warps=_WARPS,
    )  # fmt: skip


def _programs(like: Tensor, tokens: int, columns: int) -> int:
    units = torch.cuda.get_device_properties(like.device).multi_processor_count
    return min(units, triton.cdiv(tokens, TOKENS) * triton.cdiv(columns, COLUMNS))


_GL = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
