"""The narrow basis: 8 bits an entry, rounded so that the largest components do not leak into the small ones.

Plain rounding would turn every column by an angle of about 1%. The first components are hundreds of steps long, so a
hundredth of them is not small. Rounding each entry up or down so that the column's rounding error stays orthogonal to
the first components (error feedback, weighted with their variance) costs nothing and takes that away.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GUARDED = 64
"""Leading components that rounding errors are kept orthogonal to."""

_LEVELS_PER_SIGMA = 59.5
"""Sets the exponent: an entry of standard deviation 1 / sqrt(P) is about 26 units at a scale of 2 or 3, levels a step,
and symbols up to 42 or 63 are narrow. Twice as many levels did SmolLM2 no good (KL .00073 for .00075 at 19x, .0064 for
.0059 at 58x) and made twice as many components wide; half as many had .00084 at 19x."""


def exponent_of(channels: int) -> int:
    """A narrow level times a narrow entry is in units of 2**-exponent steps."""
    return max(0, round(math.log2(_LEVELS_PER_SIGMA * math.sqrt(channels))))


def quantise_narrow(basis: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor, int]:
    """int8 entries [P, R], scales uint8 [R] and the exponent: basis is close to entries * scale * 2**-exponent.

    basis: float32 [P, R], orthonormal columns; deviation: float32 [P], the square root of every eigenvalue of the
    channels' covariance, the columns' first.
    """
    channels, rank = basis.shape
    exponent = exponent_of(channels)
    scale = (basis.abs().amax(dim=0) * (2**exponent / 127)).ceil().clamp(1, 255)
    guarded = deviation[:rank].topk(min(GUARDED, rank)).indices
    guard = basis[:, guarded] * deviation[guarded]
    # What is not guarded against is spread over all channels alike.
    rest = float(deviation.square().sum() - deviation[guarded].square().sum()) / channels + 1e-12
    leak = torch.zeros(rank, len(guarded), device=basis.device)
    entries = torch.empty(channels, rank, dtype=torch.int8, device=basis.device)
    power = guard.square().sum(dim=1) + rest
    for p in range(channels):
        wanted = basis[p] * 2.0**exponent / scale
        down = wanted.floor()
        below = down - wanted
        # Rounding up instead of down changes the cost |leak + guard * error|**2 + rest * error**2 by this:
        gain = 2 * (leak @ guard[p]) + power[p] * (2 * below + 1)
        error = torch.where(gain < 0, below + 1, below)
        leak += error[:, None] * guard[p]
        entries[p] = (wanted + error).round().clamp(-127, 127).to(torch.int8)
    return entries, scale.to(torch.uint8), exponent
