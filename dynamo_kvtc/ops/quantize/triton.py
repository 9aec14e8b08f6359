"""The quantiser on the GPU: a program per token, all integer arithmetic, the same symbols as the reference.

A coefficient that can be coded is below 2**13 steps (``codec.kvtc_point`` checks the basis, the kernel the token's
energy), so in 2**-ERROR_BITS steps it fits 32 bits, and most products are of two 32-bit numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dynamo_kvtc.ops.quantize.device import Quantiser

_COLUMNS = 512
_THRESHOLDS = 16


@triton.jit
def _wide(row, j, width, mask):
    """Coefficients of wide components from their basis's limbs, modulo 2**32."""
    return (tl.load(row + j, mask=mask, other=0) << 8) + tl.load(row + width + j, mask=mask, other=0)


@triton.jit
def _unsigned(x):
    """A number that is not negative, for products of 32 by 32 bits."""
    return x.to(tl.uint32).to(tl.int64)


@triton.jit
def _magnitude(c, j, mask, gain, units, rounding, BITS: tl.constexpr, ROUND_SHIFT: tl.constexpr,
               ERROR_SHIFT: tl.constexpr):  # fmt: skip
    """Magnitudes |c| in 2**-ERROR_BITS steps, and of the symbols before they are limited, int32."""
    size = _unsigned(tl.abs(c))
    unit = tl.load(units + j, mask=mask, other=0)
    r = tl.load(rounding + j, mask=mask, other=0).to(tl.int64) << ROUND_SHIFT
    q = (size * _unsigned(unit * gain) + r) >> BITS
    y = (size * _unsigned(unit) + (1 << (ERROR_SHIFT - 1))) >> ERROR_SHIFT
    return y.to(tl.int32), q.to(tl.int32)


@triton.jit
def _square(x):
    wide = x.to(tl.int64)
    return wide * wide


@triton.jit
def _quantise(products, stride_c, energies, saturated, units, rounding, limits, below, scale, inverse, level_bias,
              importance, bias, activity, thresholds, gains, mean_error, symbols, stride_s, parameters, errors, rank,
              width, leading, F: tl.constexpr, BC: tl.constexpr, BITS: tl.constexpr, ROUND_SHIFT: tl.constexpr,
              ERROR_SHIFT: tl.constexpr, ERROR_BITS: tl.constexpr, ENERGY_SHIFT: tl.constexpr, GAIN_BITS: tl.constexpr,
              SYMBOL_MAX: tl.constexpr, LEVEL_MAX: tl.constexpr, CLIP: tl.constexpr, SCORE_BITS: tl.constexpr,
              LEVELS: tl.constexpr, ENERGY_MAX: tl.constexpr, CHOICES: tl.constexpr):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    row = products + t * stride_c
    to = symbols + t * stride_s
    neutral = tl.full((), 1 << GAIN_BITS, tl.int32)

    front = tl.arange(0, F)
    is_front = front < leading
    c_front = _wide(row, front, width, is_front)
    _, q_front = _magnitude(c_front, front, is_front, neutral, units, rounding, BITS, ROUND_SHIFT, ERROR_SHIFT)
    q_front = tl.minimum(tl.minimum(q_front, tl.load(limits + front, mask=is_front, other=0)), CLIP)
    of_magnitude = tl.load(importance + front, mask=is_front, other=0).to(tl.int64)
    of_sign = tl.load(importance + leading + front, mask=is_front, other=0).to(tl.int64)
    score = tl.sum(q_front * of_magnitude + tl.where(c_front < 0, -q_front, q_front) * of_sign) + bias
    step = (score + (1 << (SCORE_BITS - 1))) >> SCORE_BITS
    fineness = tl.minimum(tl.maximum(step, 0), LEVELS - 1)
    gain = tl.load(gains + fineness)
    # With n below 2**28 and a gain below 2**11, n * inverse_gain >> 40 is the quotient, exactly.
    inverse_gain = (1 << 40) // gain.to(tl.int64) + 1

    active = tl.zeros((BC,), tl.int64)
    held = tl.zeros((BC,), tl.int64)
    lost = tl.zeros((BC,), tl.int64)
    over = tl.zeros((BC,), tl.int32)
    for start in range(0, width, BC):
        j = start + tl.arange(0, BC)
        mask = j < width
        c = _wide(row, j, width, mask)
        own = tl.where(j < leading, neutral, gain)
        y, q = _magnitude(c, j, mask, own, units, rounding, BITS, ROUND_SHIFT, ERROR_SHIFT)
        over |= (q > SYMBOL_MAX).to(tl.int32)
        q = tl.minimum(q, tl.load(limits + j, mask=mask, other=0))
        tl.store(to + j, tl.where(c < 0, -q, q).to(tl.int16), mask=mask)
        active += _unsigned(tl.load(activity + j, mask=mask, other=0)) * _unsigned(tl.minimum(q, CLIP))
        level = tl.where(q == 0, 0, (q << ERROR_BITS) - tl.load(below + j, mask=mask, other=0))
        common = ((level.to(tl.int64) << GAIN_BITS) + own // 2) // own
        held += _square(y)
        lost += _square(y - common.to(tl.int32))
    for begin in range(width, rank, BC):
        jn = begin + tl.arange(0, BC)
        mn = jn < rank
        cn = tl.load(row + width + jn, mask=mn, other=0)
        yn, qn = _magnitude(cn, jn, mn, gain, units, rounding, BITS, ROUND_SHIFT, ERROR_SHIFT)
        qn = tl.minimum(qn, tl.load(limits + jn, mask=mn, other=0))
        tl.store(to + jn, tl.where(cn < 0, -qn, qn).to(tl.int16), mask=mn)
        active += _unsigned(tl.load(activity + jn, mask=mn, other=0)) * _unsigned(tl.minimum(qn, CLIP))
        # Limited symbols and levels of 7 bits: a quotient is a product.
        k = tl.load(scale + jn, mask=mn, other=1)
        reciprocal = tl.load(inverse + jn, mask=mn, other=0).to(tl.uint32, bitcast=True)
        level_n = tl.minimum(tl.maximum(qn * k - tl.load(level_bias + jn, mask=mn, other=0), 0), LEVEL_MAX)
        level_n = tl.where(qn == 0, 0, (level_n << ERROR_BITS) + k // 2)
        level_n = tl.where(k == 1, level_n, tl.umulhi(level_n.to(tl.uint32), reciprocal).to(tl.int32))
        common_n = (_unsigned((level_n << GAIN_BITS) + gain // 2) * inverse_gain) >> 40
        held += _square(yn)
        lost += _square(yn - common_n.to(tl.int32))

    energy = tl.load(energies + t)
    left_out = tl.maximum((energy << ENERGY_SHIFT) - tl.sum(held), 0)
    error = (left_out + tl.sum(lost)).to(tl.float64) * (1.0 / (1 << (2 * ERROR_BITS)))
    ratio = gain.to(tl.float64) * (1.0 / (1 << GAIN_BITS))
    error = error * (ratio * ratio) / tl.load(mean_error)
    uncodable = (tl.load(saturated + t) != 0) | (energy > ENERGY_MAX) | (tl.sum(over) != 0)
    tl.store(errors + t, tl.where(uncodable, float("inf"), error))
    i = tl.arange(0, CHOICES)
    reached = (tl.sum(active) >= tl.load(thresholds + i, mask=i < CHOICES - 1, other=0)) & (i < CHOICES - 1)
    choice = tl.sum(reached.to(tl.int32))
    tl.store(parameters + t, (fineness.to(tl.int32) + 16 * choice).to(tl.uint8))


def quantise(
    products: Tensor, energy: Tensor, saturated: Tensor, q: Quantiser, symbols: Tensor, parameters: Tensor,
    error: Tensor,
) -> None:  # fmt: skip
    """See ``ops.quantize.device.quantise_device``."""
    from dynamo_kvtc.ops import quantize as op

    total = op.UNIT_BITS + op.INPUT_BITS
    gain_bits = 8
    _quantise[(len(products),)](
        products, products.stride(0), energy, saturated, q.units, q.rounding, q.limits, q.below, q.scale, q.inverse,
        q.level_bias, q.importance, q.bias, q.activity, q.thresholds, q.gains, q.mean_error, symbols, symbols.stride(0),
        parameters, error, len(q.units), q.width, q.leading, max(16, triton.next_power_of_2(max(q.leading, 1))),
        _COLUMNS if products.is_cuda else 64, total + gain_bits, total + gain_bits - op.FRACTION_BITS,
        total - op.ERROR_BITS, op.ERROR_BITS, 2 * (op.ERROR_BITS - op.INPUT_BITS), gain_bits, op.SYMBOL_MAX,
        op.LEVEL_MAX, op.CLIP, op.SCORE_BITS, op.FINENESS_LEVELS, op.ENERGY_MAX, _THRESHOLDS, num_warps=4,
    )  # fmt: skip
