"""The quantiser in torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def quantise(
    coefficients: Tensor, units: Tensor, rounding: Tensor, limits: Tensor, gain: Tensor, bits: int, rounding_shift: int,
    symbol_max: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    # |c| < 2**31, units <= 2**21, gain <= 2**10: all of it fits 63 bits.
    magnitude = (coefficients.abs() * units * gain[:, None] + (rounding << rounding_shift)) >> bits
    overflow = (magnitude.clamp(max=symbol_max + 1) > symbol_max).logical_and(limits >= symbol_max).any(dim=1)
    symbols = torch.sign(coefficients) * torch.minimum(magnitude, limits)
    return symbols.to(torch.int16), overflow


def narrow_levels(symbols: Tensor, scale: Tensor, bias: Tensor, level_max: int) -> Tensor:
    q = symbols.to(torch.int32)
    magnitude = (q.abs() * scale - bias).clamp(0, level_max)
    return (torch.sign(q) * magnitude).to(torch.int8)


def squares(
    coefficients: Tensor, units: Tensor, levels: Tensor, gain: Tensor, leading: int, shift: int, gain_bits: int
) -> tuple[Tensor, Tensor]:
    """Sums over R of the coefficients' squares and of their squared distance to the levels, int64 [T]."""
    magnitude = (coefficients.abs() * units + (1 << (shift - 1))) >> shift
    y = torch.sign(coefficients) * magnitude
    common = levels.clone()
    rest = levels[:, leading:]
    common[:, leading:] = torch.sign(rest) * (((rest.abs() << gain_bits) + gain[:, None] // 2) // gain[:, None])
    return y.square().sum(dim=1), (y - common).square().sum(dim=1)


def score(symbols: Tensor, weights: Tensor, clip: int) -> Tensor:
    """int64 [T]: sum over F of weights[0] * |q| + weights[1] * q."""
    q = symbols.to(torch.int64).clamp(-clip, clip)
    return (q.abs() * weights[0] + q * weights[1]).sum(dim=1)


def activity(symbols: Tensor, weights: Tensor, clip: int) -> Tensor:
    """int64 [T]: sum over R of weights * |q|."""
    return (symbols.to(torch.int64).abs().clamp(max=clip) * weights).sum(dim=1)
