"""The quantiser in torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def quantise(coefficients: Tensor, rounding: Tensor, fraction_bits: int, limit: int) -> tuple[Tensor, Tensor]:
    # |c| < 2**52: the sum, the power-of-two scaling and the floor are exact in float64.
    magnitude = ((coefficients.abs() + rounding) * 2.0**-fraction_bits).floor()
    overflow = (magnitude > limit).any(dim=1)
    symbols = torch.sign(coefficients) * magnitude.clamp(max=limit)
    return symbols.to(torch.int16), overflow
