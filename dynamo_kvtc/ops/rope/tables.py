"""Cosines and sines of position * frequency by angle addition, without a cosine function at run time.

Libraries' cosines differ in the last bit between a CPU and a GPU, and reduce large angles each in their own way. Here a
position is a + 2^10 b + 2^21 c, and the cosines and sines of the three parts come out of tables. What is left are
float64 products and sums, each an operation of its own, so every device gives the same float32.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

BITS = (10, 11, 10)
"""Bits of the three parts of a position, lowest first: 31 in all."""
_SHIFTS = (0, 10, 21)

_SPLIT = 2.0**27 + 1.0
"""Veltkamp's constant: splits a float64 into two of at most 26 bits."""


class Tables:
    """Cosines and sines of one set of frequencies, float64, on one device."""

    def __init__(self, inv_freq: tuple[float, ...], device: torch.device) -> None:
        self._parts = [(cos.to(device).contiguous(), sin.to(device).contiguous()) for cos, sin in _tables(inv_freq)]

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [T, n]; positions int64 [T] on the tables' device, of which the low 31 bits count."""
        if positions.is_cuda:
            try:
                from dynamo_kvtc.ops.rope import triton as kernels
            except ImportError:
                pass  # The same bits, in more launches.
            else:
                return kernels.rotations(positions, self._parts, BITS)
        (cos, sin), *others = [
            (c[index], s[index])
            for (c, s), shift, bits in zip(self._parts, _SHIFTS, BITS, strict=True)
            for index in [(positions >> shift) & (2**bits - 1)]
        ]
        for c, s in others:
            cos, sin = cos * c - sin * s, sin * c + cos * s
        return cos.to(torch.float32), sin.to(torch.float32)


@lru_cache(maxsize=16)
def _tables(inv_freq: tuple[float, ...]) -> list[tuple[Tensor, Tensor]]:
    frequency = np.array(inv_freq, dtype=np.float64)
    scaled = frequency * _SPLIT
    head = scaled - (scaled - frequency)
    tail = frequency - head
    out = []
    for bits, shift in zip(BITS, _SHIFTS, strict=True):
        steps = np.arange(2**bits, dtype=np.float64)[:, None] * 2.0**shift
        # Rounding steps * frequency itself would cost half a float32 ulp at 2^31 positions; these products are exact.
        large, small = steps * head, steps * tail
        cos = np.cos(large) * np.cos(small) - np.sin(large) * np.sin(small)
        sin = np.sin(large) * np.cos(small) + np.cos(large) * np.sin(small)
        out.append((torch.from_numpy(cos), torch.from_numpy(sin)))
    return out
