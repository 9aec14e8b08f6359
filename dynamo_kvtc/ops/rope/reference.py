"""RoPE in torch. Products and sums are separate operations: no fused multiply-add, so every device rounds alike."""

from __future__ import annotations

from torch import Tensor

from dynamo_kvtc.types import RopeSpec


def rotate(k: Tensor, cos: Tensor, sin: Tensor, rope: RopeSpec, inverse: bool) -> Tensor:
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
