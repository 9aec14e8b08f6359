"""Rotations on the GPU: the same float64 products and sums as ``tables``, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["total"])
def _rotations(positions, c0, s0, c1, s1, c2, s2, cos, sin, total, n, B0: tl.constexpr, B1: tl.constexpr,
               B2: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < total
    i = at % n
    p = tl.load(positions + at // n, mask=here, other=0)
    a = (p & ((1 << B0) - 1)) * n + i
    b = ((p >> B0) & ((1 << B1) - 1)) * n + i
    d = ((p >> (B0 + B1)) & ((1 << B2) - 1)) * n + i
    c, s = tl.load(c0 + a, mask=here, other=0.0), tl.load(s0 + a, mask=here, other=0.0)
    x, y = tl.load(c1 + b, mask=here, other=0.0), tl.load(s1 + b, mask=here, other=0.0)
    c, s = c * x - s * y, s * x + c * y
    x, y = tl.load(c2 + d, mask=here, other=0.0), tl.load(s2 + d, mask=here, other=0.0)
    c, s = c * x - s * y, s * x + c * y
    tl.store(cos + at, c.to(tl.float32), mask=here)
    tl.store(sin + at, s.to(tl.float32), mask=here)


def rotations(positions: Tensor, parts: list[tuple[Tensor, Tensor]], bits: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [T, n], of positions int64 [T]; parts: the three tables' cos and sin."""
    n = parts[0][0].shape[1]
    cos, sin = (torch.empty(len(positions), n, dtype=torch.float32, device=positions.device) for _ in range(2))
    total = cos.numel()
    if total:
        flat = [x for pair in parts for x in pair]
        _rotations[(triton.cdiv(total, 1024),)](
            positions, *flat, cos, sin, total, n, *bits, 1024, enable_fp_fusion=False
        )
    return cos, sin
