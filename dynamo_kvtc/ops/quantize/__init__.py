"""The dead-zone quantiser of profile ``kvtc``: one step for all components, finer for tokens that matter more.

Coefficients are exact integers in units of their component, so quantising is integer arithmetic.

A token's first components are quantised with the step itself; from their symbols follows how fine the rest of the token
is (``fineness``). They come back unchanged from a decoded token, so coding it again finds the same fineness.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynamo_kvtc.ops.quantize import reference

INPUT_BITS = 5
"""Fraction bits of the transform's fixed-point input, relative to the step: its rounding adds 0.1% to the noise."""

UNIT_BITS = 25
"""A basis entry times its component's unit is the entry's value times 2**UNIT_BITS."""

WIDE_UNIT = 2 ** (UNIT_BITS - 14)
"""The unit of a wide component, whose basis has 14 fraction bits."""

FRACTION_BITS = 20
"""Fraction bits of roundings, relative to the step."""

ERROR_BITS = 12
"""Fraction bits of a coefficient's error, relative to the step."""

SYMBOL_MAX = 32767
"""Largest magnitude of a symbol; a token with a wide component beyond it must be stored exact."""

LEVEL_MAX = 127
"""Largest magnitude of a narrow component's level; its symbols are clipped to what that allows."""

ENERGY_MAX = 2**33 - 1
"""Largest energy of a token: with columns of a squared norm up to NORM_MAX, coefficients fit 32 bits."""

NORM_MAX = 2**29

FINENESS_LEVELS = 13
"""Fineness e means a step of 2**((NEUTRAL - e) / 4) of the common one: twice as coarse at 0, a quarter at 12."""

FINENESS_NEUTRAL = 4

SCORE_BITS = 16
"""Fraction bits of the importance score; one unit is one level of fineness."""

CLIP = 1023
"""Symbols are clipped here before they are scored: an outlier must not decide alone, and sums stay small."""

_GAIN_BITS = 8
_GAINS = tuple(round(2 ** ((e - FINENESS_NEUTRAL) / 4) * 2**_GAIN_BITS) for e in range(FINENESS_LEVELS))


def quantise(
    coefficients: Tensor, units: Tensor, rounding: Tensor, limits: Tensor, fineness: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Symbols of exact coefficients: sign(c) * floor(y * g + rounding), y the magnitude in steps, g the token's gain.

    coefficients: int64 [T, R], below 2**31; units: int32 [R]: coefficient times unit is in 2**-(UNIT_BITS + INPUT_BITS)
    steps; rounding: int32 [R] in units of 2**-FRACTION_BITS of a step: half a step (2**19) is plain rounding, less
    widens the zero bin; limits: int32 [R], largest magnitudes (clipped beyond); fineness: uint8 [T] (default: neutral).
    Returns symbols int16 [T, R] and overflow bool [T], True where a symbol was beyond SYMBOL_MAX.
    """
    gain = _integer_gains(fineness, coefficients)
    return reference.quantise(
        coefficients, units.long(), rounding.long(), limits.long(), gain, UNIT_BITS + INPUT_BITS + _GAIN_BITS,
        UNIT_BITS + INPUT_BITS + _GAIN_BITS - FRACTION_BITS, SYMBOL_MAX,
    )  # fmt: skip


def dequantise(symbols: Tensor, centroid: Tensor) -> Tensor:
    """Reconstruction levels of wide components in the token's own steps: sign(q) * (|q| - centroid), 0 for q = 0.

    symbols: int16 [T, R]; centroid: float32 [R], how far the mass of a bin lies below its nominal level.
    Returns float32 [T, R]; divide by ``gains`` for units of the common step.
    """
    magnitude = symbols.to(torch.float32)
    return magnitude - torch.sign(magnitude) * centroid


def narrow_levels(symbols: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Reconstruction levels of narrow components, int8 [T, R]: sign(q) * (|q| * scale - bias), 0 for q = 0.

    symbols: int16 [T, R]; scale: int32 [R], levels per step; bias: int32 [R], less than scale. Clipped to LEVEL_MAX.
    """
    return reference.narrow_levels(symbols, scale, bias, LEVEL_MAX)


def narrow_limits(scale: Tensor, bias: Tensor) -> Tensor:
    """int32 [R]: the largest symbol whose level is not clipped."""
    return ((LEVEL_MAX + bias) // scale).to(torch.int32)


def error_of(
    coefficients: Tensor, units: Tensor, levels: Tensor, energy: Tensor, fineness: Tensor, leading: int
) -> Tensor:
    """Squared error of each token in its own squared steps, float64 [T]; the same in any order of summation.

    coefficients: int64 [T, R]; units: int32 [R]; levels: int64 [T, R] in 2**-ERROR_BITS own steps (common ones for the
    first ``leading`` components); energy: int64 [T] of the inputs, before any was clipped; fineness: uint8 [T].
    It is what the components left out held, plus what quantising the others lost. A clipped input counts with all its
    energy, as if nothing of what was cut off came back: the error of such a token is overstated.
    """
    gain = _integer_gains(fineness, coefficients)
    held, lost = reference.squares(
        coefficients, units.long(), levels, gain, leading, UNIT_BITS + INPUT_BITS - ERROR_BITS, _GAIN_BITS
    )
    left_out = (energy << 2 * (ERROR_BITS - INPUT_BITS)) - held
    error = (left_out.clamp(min=0) + lost).double() * 4.0**-ERROR_BITS
    return error * gains(fineness, torch.float64).square()


def wide_error_levels(symbols: Tensor, centroid: Tensor) -> Tensor:
    """``dequantise``'s levels for ``error_of``: int64 [T, R]. centroid: float32 [R]."""
    below = (centroid.double() * 2**ERROR_BITS).round().long()
    q = symbols.long()
    return torch.sign(q) * ((q.abs() << ERROR_BITS) - below)


def narrow_error_levels(levels: Tensor, scale: Tensor) -> Tensor:
    """``narrow_levels``' levels for ``error_of``: int64 [T, R]. levels: int8 [T, R]; scale: int32 [R]."""
    a = levels.long()
    return torch.sign(a) * (((a.abs() << ERROR_BITS) + scale // 2) // scale)


def gains(fineness: Tensor, dtype: torch.dtype) -> Tensor:
    """Common step over the token's own step, [T] in ``dtype``: 2**((e - NEUTRAL) / 4) rounded to 8 fraction bits."""
    table = torch.tensor(_GAINS, dtype=dtype, device=fineness.device) * 2.0**-_GAIN_BITS
    return table[fineness.long()]


def _integer_gains(fineness: Tensor | None, like: Tensor) -> Tensor:
    """int64 [T]: ``gains`` times 2**_GAIN_BITS."""
    if fineness is None:
        return torch.full((like.shape[0],), 1 << _GAIN_BITS, dtype=torch.int64, device=like.device)
    return torch.tensor(_GAINS, dtype=torch.int64, device=like.device)[fineness.long()]


def fineness_of(symbols: Tensor, weights: Tensor, bias: int) -> Tensor:
    """How finely a token is quantised, from the symbols of its first F components: uint8 [T].

    symbols: int16 [T, F]; weights: int32 [2, F] for |q| and q, bias: in units of 2**-SCORE_BITS of a level.
    """
    score = reference.score(symbols, weights, CLIP) + bias
    return ((score + 2 ** (SCORE_BITS - 1)) >> SCORE_BITS).clamp(0, FINENESS_LEVELS - 1).to(torch.uint8)


def class_offsets(symbols: Tensor, weights: Tensor, thresholds: Tensor) -> Tensor:
    """Which tables suit a token's symbols: the number of thresholds its weighted magnitude reaches, uint8 [T].

    symbols: int16 [T, R]; weights: int32 [R], not negative; thresholds: int64 [N], rising.
    """
    activity = reference.activity(symbols, weights, CLIP)
    return (activity[:, None] >= thresholds).sum(dim=1).to(torch.uint8)
