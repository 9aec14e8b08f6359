"""The quantiser on the GPU: a program per token, all integer arithmetic, the same symbols as the reference."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dynamo_kvtc.ops.quantize.device import Quantiser

_COLUMNS = 512
_THRESHOLDS = 16


@triton.jit
def _symbols(c, j, mask, gain, units, rounding, limits, BITS: tl.constexpr, ROUND_SHIFT: tl.constexpr):
    """Magnitudes |c| in 2**-(BITS - 8) steps, and of the symbols before they are limited, int64."""
    y = tl.abs(c.to(tl.int64)) * tl.load(units + j, mask=mask, other=0).to(tl.int64)
    r = tl.load(rounding + j, mask=mask, other=0).to(tl.int64) << ROUND_SHIFT
    return y, (y * gain + r) >> BITS


@triton.jit
def _quantise(coefficients, stride_c, energies, saturated, units, rounding, limits, below, scale, level_bias,
              importance, bias, activity, thresholds, gains, mean_error, symbols, stride_s, parameters, errors, rank,
              width, leading, F: tl.constexpr, BC: tl.constexpr, BITS: tl.constexpr, ROUND_SHIFT: tl.constexpr,
              ERROR_SHIFT: tl.constexpr, ERROR_BITS: tl.constexpr, ENERGY_SHIFT: tl.constexpr, GAIN_BITS: tl.constexpr,
              SYMBOL_MAX: tl.constexpr, LEVEL_MAX: tl.constexpr, CLIP: tl.constexpr, SCORE_BITS: tl.constexpr,
              LEVELS: tl.constexpr, ENERGY_MAX: tl.constexpr, CHOICES: tl.constexpr):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    row = coefficients + t * stride_c
    neutral = tl.full((), 1 << GAIN_BITS, tl.int64)

    front = tl.arange(0, F)
    is_front = front < leading
    c_front = tl.load(row + front, mask=is_front, other=0)
    _, q_front = _symbols(c_front, front, is_front, neutral, units, rounding, limits, BITS, ROUND_SHIFT)
    q_front = tl.minimum(tl.minimum(q_front, tl.load(limits + front, mask=is_front, other=0)), CLIP)
    of_magnitude = tl.load(importance + front, mask=is_front, other=0).to(tl.int64)
    of_sign = tl.load(importance + leading + front, mask=is_front, other=0).to(tl.int64)
    score = tl.sum(q_front * of_magnitude + tl.where(c_front < 0, -q_front, q_front) * of_sign) + bias
    step = (score + (1 << (SCORE_BITS - 1))) >> SCORE_BITS
    fineness = tl.minimum(tl.maximum(step, 0), LEVELS - 1)
    gain = tl.load(gains + fineness).to(tl.int64)

    active = tl.zeros((BC,), tl.int64)
    held = tl.zeros((BC,), tl.int64)
    lost = tl.zeros((BC,), tl.int64)
    over = tl.zeros((BC,), tl.int32)
    half: tl.constexpr = 1 << (ERROR_SHIFT - 1)
    for start in range(0, width, BC):
        j = start + tl.arange(0, BC)
        mask = j < width
        c = tl.load(row + j, mask=mask, other=0)
        own = tl.where(j < leading, neutral, gain)
        y, q = _symbols(c, j, mask, own, units, rounding, limits, BITS, ROUND_SHIFT)
        over |= (mask & (q > SYMBOL_MAX)).to(tl.int32)
        q = tl.minimum(q, tl.load(limits + j, mask=mask, other=0))
        tl.store(symbols + t * stride_s + j, tl.where(c < 0, -q, q).to(tl.int16), mask=mask)
        active += tl.load(activity + j, mask=mask, other=0).to(tl.int64) * tl.minimum(q, CLIP)
        level = tl.where(q == 0, 0, (q << ERROR_BITS) - tl.load(below + j, mask=mask, other=0))
        common = ((level << GAIN_BITS) + own // 2) // own
        y = (y + half) >> ERROR_SHIFT
        held += y * y
        lost += tl.where(mask, (y - common) * (y - common), 0)
    small = gain.to(tl.int32)
    for begin in range(width, rank, BC):
        jn = begin + tl.arange(0, BC)
        mn = jn < rank
        cn = tl.load(row + jn, mask=mn, other=0)
        yn, qn = _symbols(cn, jn, mn, gain, units, rounding, limits, BITS, ROUND_SHIFT)
        qn = tl.minimum(qn, tl.load(limits + jn, mask=mn, other=0))
        tl.store(symbols + t * stride_s + jn, tl.where(cn < 0, -qn, qn).to(tl.int16), mask=mn)
        active += tl.load(activity + jn, mask=mn, other=0).to(tl.int64) * tl.minimum(qn, CLIP)
        # Limited symbols and level_ns of 7 bits: 32 bits are enough, and their division is cheaper.
        k = tl.load(scale + jn, mask=mn, other=1)
        level_n = tl.minimum(tl.maximum(qn.to(tl.int32) * k - tl.load(level_bias + jn, mask=mn, other=0), 0), LEVEL_MAX)
        level_n = tl.where(qn == 0, 0, ((level_n << ERROR_BITS) + k // 2) // k)
        common_n = (((level_n << GAIN_BITS) + small // 2) // small).to(tl.int64)
        yn = (yn + half) >> ERROR_SHIFT
        held += yn * yn
        lost += tl.where(mn, (yn - common_n) * (yn - common_n), 0)

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
    coefficients: Tensor, energy: Tensor, saturated: Tensor, q: Quantiser, symbols: Tensor, parameters: Tensor,
    error: Tensor,
) -> None:  # fmt: skip
    """See ``ops.quantize.device.quantise_device``."""
    from dynamo_kvtc.ops import quantize as op

    total = op.UNIT_BITS + op.INPUT_BITS
    gain_bits = 8
    _quantise[(len(coefficients),)](
        coefficients, coefficients.stride(0), energy, saturated, q.units, q.rounding, q.limits, q.below, q.scale,
        q.level_bias, q.importance, q.bias, q.activity, q.thresholds, q.gains, q.mean_error, symbols, symbols.stride(0),
        parameters, error, len(q.units), q.width, q.leading, max(16, triton.next_power_of_2(max(q.leading, 1))),
        _COLUMNS if coefficients.is_cuda else 64, total + gain_bits, total + gain_bits - op.FRACTION_BITS,
        total - op.ERROR_BITS, op.ERROR_BITS, 2 * (op.ERROR_BITS - op.INPUT_BITS), gain_bits, op.SYMBOL_MAX,
        op.LEVEL_MAX, op.CLIP, op.SCORE_BITS, op.FINENESS_LEVELS, op.ENERGY_MAX, _THRESHOLDS, num_warps=4,
    )  # fmt: skip
