"""RoPE in torch. Products and sums are separate operations: no fused multiply-add, so every device rounds alike."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamo_kvtc.types import RopeSpec


def rotate(k: Tensor, positions: Tensor, rope: RopeSpec, inverse: bool) -> Tensor:
    cos, sin = _cos_sin(positions, rope)
    cos, sin = cos.to(k.device), sin.to(k.device)
    if inverse:
        sin = -sin
        gain = 1.0 / rope.attention_scaling
    else:
        gain = rope.attention_scaling
    n = len(rope.inv_freq)
    out = k.clone()
    if rope.style == "half":
        first, second = k[..., :n], k[..., n : 2 * n]
        slots = (slice(0, n), slice(n, 2 * n))
    else:
        first, second = k[..., 0 : 2 * n : 2], k[..., 1 : 2 * n : 2]
        slots = (slice(0, 2 * n, 2), slice(1, 2 * n, 2))
    out[..., slots[0]] = (first * cos - second * sin) * gain
    out[..., slots[1]] = (second * cos + first * sin) * gain
    return out


def _cos_sin(positions: Tensor, rope: RopeSpec) -> tuple[Tensor, Tensor]:
    """float32 [T, D_rot / 2], angles taken in float64 on the CPU: every device multiplies by the same numbers."""
    angles = positions.cpu().to(torch.float64)[:, None] * torch.tensor(rope.inv_freq, dtype=torch.float64)
    return angles.cos().to(torch.float32), angles.sin().to(torch.float32)
