"""The dead-zone quantiser of profile ``kvtc``: one step for all components, finer for tokens that matter more.

Coefficients come from the exact transform in units of 2**-FRACTION_BITS of a step, so quantising is integer arithmetic.

A token's first components are quantised with the step itself; from their symbols follows how fine the rest of the token
is (``fineness``). They come back unchanged from a decoded token, so coding it again finds the same fineness.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynamo_kvtc.ops.quantize import reference

INPUT_BITS = 5
"""Fraction bits of the transform's fixed-point input, relative to the step: its rounding adds 0.1% to the noise."""

FRACTION_BITS = 20
"""INPUT_BITS + the basis's 15: a coefficient of one step is 2**20."""

SYMBOL_MAX = 32767
"""Largest magnitude of a symbol; a token beyond it must be stored exact."""

FINENESS_LEVELS = 13
"""Fineness e means a step of 2**((NEUTRAL - e) / 4) of the common one: twice as coarse at 0, a quarter at 12."""

FINENESS_NEUTRAL = 4

SCORE_BITS = 16
"""Fraction bits of the importance score; one unit is one level of fineness."""

CLIP = 1023
"""Symbols are clipped here before they are scored: an outlier must not decide alone, and sums stay small."""

_GAIN_BITS = 8
_GAINS = tuple(round(2 ** ((e - FINENESS_NEUTRAL) / 4) * 2**_GAIN_BITS) for e in range(FINENESS_LEVELS))


def quantise(coefficients: Tensor, rounding: Tensor, fineness: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Symbols of exact coefficients: sign(c) * floor((|c| * g + rounding) / 2**FRACTION_BITS), g the token's gain.

    coefficients: float64 [T, R] holding integers; rounding: int32 [R] in units of 2**-FRACTION_BITS of a step:
    half a step (2**19) is plain rounding, less widens the zero bin; fineness: uint8 [T] (default: neutral, g = 1).
    Returns symbols int16 [T, R] and overflow bool [T], True where a symbol was beyond SYMBOL_MAX (clamped).
    """
    scaled = coefficients if fineness is None else coefficients * gains(fineness, torch.float64)[:, None]
    return reference.quantise(scaled, rounding, FRACTION_BITS, SYMBOL_MAX)


def dequantise(symbols: Tensor, centroid: Tensor) -> Tensor:
    """Reconstruction levels in the token's own steps: sign(q) * (|q| - centroid), 0 for q = 0.

    symbols: int16 [T, R]; centroid: float32 [R], how far the mass of a bin lies below its nominal level.
    Returns float32 [T, R]; divide by ``gains`` for units of the common step.
    """
    magnitude = symbols.to(torch.float32)
    return magnitude - torch.sign(magnitude) * centroid


def gains(fineness: Tensor, dtype: torch.dtype) -> Tensor:
    """Common step over the token's own step, [T] in ``dtype``: 2**((e - NEUTRAL) / 4) rounded to 8 fraction bits."""
    table = torch.tensor(_GAINS, dtype=dtype, device=fineness.device) * 2.0**-_GAIN_BITS
    return table[fineness.long()]


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
