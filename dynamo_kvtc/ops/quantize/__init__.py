"""The uniform dead-zone quantiser of profile ``kvtc``.

Coefficients come from the exact transform in units of 2**-FRACTION_BITS of a step, so quantising is integer arithmetic.
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


def quantise(coefficients: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor]:
    """Symbols of exact coefficients: sign(c) * floor((|c| + rounding) / 2**FRACTION_BITS).

    coefficients: float64 [T, R] holding integers; rounding: int32 [R] in units of 2**-FRACTION_BITS of a step:
    half a step (2**19) is plain rounding, less widens the zero bin.
    Returns symbols int16 [T, R] and overflow bool [T], True where a symbol was beyond SYMBOL_MAX (clamped).
    """
    return reference.quantise(coefficients, rounding, FRACTION_BITS, SYMBOL_MAX)


def dequantise(symbols: Tensor, centroid: Tensor) -> Tensor:
    """Reconstruction levels in steps: sign(q) * (|q| - centroid), 0 for q = 0.

    symbols: int16 [T, R]; centroid: float32 [R], how far the mass of a bin lies below its nominal level.
    Returns float32 [T, R].
    """
    magnitude = symbols.to(torch.float32)
    return magnitude - torch.sign(magnitude) * centroid
