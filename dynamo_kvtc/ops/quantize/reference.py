"""The quantiser in torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def quantise(coefficients: Tensor, rounding: Tensor, fraction_bits: int, limit: int) -> tuple[Tensor, Tensor]:
    # |c| * gain < 2**52: the sum, the power-of-two scaling and the floor are exact in float64.
    magnitude = ((coefficients.abs() + rounding) * 2.0**-fraction_bits).floor()
    overflow = (magnitude > limit).any(dim=1)
    symbols = torch.sign(coefficients) * magnitude.clamp(max=limit)
    return symbols.to(torch.int16), overflow


def score(symbols: Tensor, weights: Tensor, clip: int) -> Tensor:
    """int64 [T]: sum over F of weights[0] * |q| + weights[1] * q."""
    q = symbols.to(torch.int64).clamp(-clip, clip)
    return (q.abs() * weights[0] + q * weights[1]).sum(dim=1)


def activity(symbols: Tensor, weights: Tensor, clip: int) -> Tensor:
    """int64 [T]: sum over R of weights * |q|."""
    return (symbols.to(torch.int64).abs().clamp(max=clip) * weights).sum(dim=1)
