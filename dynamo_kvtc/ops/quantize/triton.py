"""The quantiser on the GPU: a program per few tokens, all integer arithmetic, the same symbols as the reference."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dynamo_kvtc.ops.quantize.device import Quantiser

_TOKENS, _COLUMNS = 4, 128
"""Of a program's tile: tokens share what is looked up of a component."""
_THRESHOLDS = 16


@triton.jit
def _wide(row, j, width, mask):
    """Coefficients of wide components from their basis's limbs, modulo 2**32."""
    high = tl.load(row + j[None, :], mask=mask, other=0)
    return (high << 8) + tl.load(row + (width + j)[None, :], mask=mask, other=0)


@triton.jit
def _symbols(c, j, mask, gain, units, rounding, BITS: tl.constexpr, ROUND_SHIFT: tl.constexpr):
    """Magnitudes |c| in 2**-(BITS - 8) steps, and of the symbols before they are limited, int64."""
    y = tl.abs(c.to(tl.int64)) * tl.load(units + j, mask=mask, other=0).to(tl.int64)[None, :]
    r = tl.load(rounding + j, mask=mask, other=0).to(tl.int64) << ROUND_SHIFT
    return y, (y * gain + r[None, :]) >> BITS


@triton.jit
def _quantise(products, stride_c, energies, saturated, units, rounding, limits, below, scale, inverse, level_bias,
              importance, bias, activity, thresholds, gains, mean_error, symbols, stride_s, parameters, errors, tokens,
              rank, width, leading, F: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BITS: tl.constexpr,
              ROUND_SHIFT: tl.constexpr, ERROR_SHIFT: tl.constexpr, ERROR_BITS: tl.constexpr,
              ENERGY_SHIFT: tl.constexpr, GAIN_BITS: tl.constexpr, SYMBOL_MAX: tl.constexpr, LEVEL_MAX: tl.constexpr,
              CLIP: tl.constexpr, SCORE_BITS: tl.constexpr, LEVELS: tl.constexpr, ENERGY_MAX: tl.constexpr,
              CHOICES: tl.constexpr):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    here = t < tokens
    row = products + (t * stride_c)[:, None]
    to = symbols + (t * stride_s)[:, None]
    neutral = tl.full((BT, 1), 1 << GAIN_BITS, tl.int64)

    front = tl.arange(0, F)
    is_front = front < leading
    c_front = _wide(row, front, width, here[:, None] & is_front[None, :])
    _, q_front = _symbols(c_front, front, is_front, neutral, units, rounding, BITS, ROUND_SHIFT)
    limit_front = tl.minimum(tl.load(limits + front, mask=is_front, other=0), CLIP)
    q_front = tl.minimum(q_front, limit_front[None, :])
    of_magnitude = tl.load(importance + front, mask=is_front, other=0).to(tl.int64)
    of_sign = tl.load(importance + leading + front, mask=is_front, other=0).to(tl.int64)
    signed = tl.where(c_front < 0, -q_front, q_front)
    score = tl.sum(q_front * of_magnitude[None, :] + signed * of_sign[None, :], axis=1) + bias
    step = (score + (1 << (SCORE_BITS - 1))) >> SCORE_BITS
    fineness = tl.minimum(tl.maximum(step, 0), LEVELS - 1)
    gain = tl.load(gains + fineness).to(tl.int64)
    # With n below 2**28 and a gain below 2**12, n * inverse is the quotient, exactly.
    inverse_gain = ((1 << 40) // gain + 1)[:, None]

    active = tl.zeros((BT, BC), tl.int64)
    held = tl.zeros((BT, BC), tl.int64)
    lost = tl.zeros((BT, BC), tl.int64)
    over = tl.zeros((BT, BC), tl.int32)
    half: tl.constexpr = 1 << (ERROR_SHIFT - 1)
    for start in range(0, width, BC):
        j = start + tl.arange(0, BC)
        known = j < width
        mask = here[:, None] & known[None, :]
        c = _wide(row, j, width, mask)
        own = tl.where((j < leading)[None, :], neutral, gain[:, None])
        y, q = _symbols(c, j, known, own, units, rounding, BITS, ROUND_SHIFT)
        over |= (q > SYMBOL_MAX).to(tl.int32)
        q = tl.minimum(q, tl.load(limits + j, mask=known, other=0)[None, :])
        tl.store(to + j[None, :], tl.where(c < 0, -q, q).to(tl.int16), mask=mask)
        active += tl.load(activity + j, mask=known, other=0).to(tl.int64)[None, :] * tl.minimum(q, CLIP)
        level = tl.where(q == 0, 0, (q << ERROR_BITS) - tl.load(below + j, mask=known, other=0)[None, :])
        common = ((level << GAIN_BITS) + own // 2) // own
        y = (y + half) >> ERROR_SHIFT
        held += y * y
        lost += (y - common) * (y - common)
    half_gain = (gain.to(tl.int32) // 2)[:, None]
    for begin in range(width, rank, BC):
        jn = begin + tl.arange(0, BC)
        kn = jn < rank
        mn = here[:, None] & kn[None, :]
        cn = tl.load(row + (width + jn)[None, :], mask=mn, other=0)
        yn, qn = _symbols(cn, jn, kn, gain[:, None], units, rounding, BITS, ROUND_SHIFT)
        qn = tl.minimum(qn, tl.load(limits + jn, mask=kn, other=0)[None, :])
        tl.store(to + jn[None, :], tl.where(cn < 0, -qn, qn).to(tl.int16), mask=mn)
        active += tl.load(activity + jn, mask=kn, other=0).to(tl.int64)[None, :] * tl.minimum(qn, CLIP)
        # Limited symbols and levels of 7 bits: 32 bits are enough, and a quotient is a product.
        k = tl.load(scale + jn, mask=kn, other=1)
        reciprocal = tl.load(inverse + jn, mask=kn, other=0).to(tl.uint32, bitcast=True)[None, :]
        lower = tl.load(level_bias + jn, mask=kn, other=0)
        level_n = tl.minimum(tl.maximum(qn.to(tl.int32) * k[None, :] - lower[None, :], 0), LEVEL_MAX)
        level_n = tl.where(qn == 0, 0, (level_n << ERROR_BITS) + (k // 2)[None, :])
        divided = tl.umulhi(level_n.to(tl.uint32), reciprocal + tl.zeros_like(level_n).to(tl.uint32)).to(tl.int32)
        level_n = tl.where((k == 1)[None, :], level_n, divided)
        common_n = (((level_n << GAIN_BITS) + half_gain).to(tl.int64) * inverse_gain) >> 40
        yn = (yn + half) >> ERROR_SHIFT
        held += yn * yn
        lost += (yn - common_n) * (yn - common_n)

    energy = tl.load(energies + t, mask=here, other=0)
    left_out = tl.maximum((energy << ENERGY_SHIFT) - tl.sum(held, axis=1), 0)
    error = (left_out + tl.sum(lost, axis=1)).to(tl.float64) * (1.0 / (1 << (2 * ERROR_BITS)))
    ratio = gain.to(tl.float64) * (1.0 / (1 << GAIN_BITS))
    error = error * (ratio * ratio) / tl.load(mean_error)
    uncodable = (tl.load(saturated + t, mask=here, other=0) != 0) | (energy > ENERGY_MAX) | (tl.sum(over, axis=1) != 0)
    tl.store(errors + t, tl.where(uncodable, float("inf"), error), mask=here)
    i = tl.arange(0, CHOICES)
    threshold = tl.load(thresholds + i, mask=i < CHOICES - 1, other=0)
    reached = (tl.sum(active, axis=1)[:, None] >= threshold[None, :]) & (i < CHOICES - 1)[None, :]
    choice = tl.sum(reached.to(tl.int32), axis=1)
    tl.store(parameters + t, (fineness.to(tl.int32) + 16 * choice).to(tl.uint8), mask=here)


def quantise(
    products: Tensor, energy: Tensor, saturated: Tensor, q: Quantiser, symbols: Tensor, parameters: Tensor,
    error: Tensor,
) -> None:  # fmt: skip
    """See ``ops.quantize.device.quantise_device``."""
    from dynamo_kvtc.ops import quantize as op

    total = op.UNIT_BITS + op.INPUT_BITS
    gain_bits = 8
    tokens, columns = (_TOKENS, _COLUMNS) if products.is_cuda else (4, 64)
    _quantise[(triton.cdiv(len(products), tokens),)](
        products, products.stride(0), energy, saturated, q.units, q.rounding, q.limits, q.below, q.scale, q.inverse,
        q.level_bias, q.importance, q.bias, q.activity, q.thresholds, q.gains, q.mean_error, symbols, symbols.stride(0),
        parameters, error, len(products), len(q.units), q.width, q.leading,
        max(16, triton.next_power_of_2(max(q.leading, 1))), tokens, columns, total + gain_bits,
        total + gain_bits - op.FRACTION_BITS, total - op.ERROR_BITS, op.ERROR_BITS,
        2 * (op.ERROR_BITS - op.INPUT_BITS), gain_bits, op.SYMBOL_MAX, op.LEVEL_MAX, op.CLIP, op.SCORE_BITS,
        op.FINENESS_LEVELS, op.ENERGY_MAX, _THRESHOLDS, num_warps=4,
    )  # fmt: skip
