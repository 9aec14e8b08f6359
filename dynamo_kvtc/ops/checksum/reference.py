"""CRC-32 by zlib, on the CPU; and the arithmetic behind it, from which kernels take their constants.

CRC-32 is a remainder of polynomials over GF(2) modulo ``POLYNOMIAL``. Bits are reflected: the highest bit of a 32-bit
number is the coefficient of x**0, so multiplying by x is a shift to the right.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

POLYNOMIAL = 0xEDB88320
"""Without its x**32."""

ORDER = 2**32 - 1
"""The polynomial is primitive: powers of x repeat after this many, and so do those of x**8."""

ONE = 0x80000000


crc32 = zlib.crc32
"""The checksum of bytes, 0 to 2**32 - 1."""


def copy_ranges(
    source: Tensor, source_start: Tensor, size: Tensor, target: Tensor | None, target_start: Tensor | None, crc: Tensor
) -> None:
    host = source.cpu()
    sums = []
    for i, (start, count) in enumerate(zip(source_start.tolist(), size.tolist(), strict=True)):
        part = host[start : start + count]
        sums.append(crc32(part.numpy().tobytes()))
        if target is not None and target_start is not None:
            to = int(target_start[i])
            target[to : to + count] = part
    crc.copy_(torch.from_numpy(np.array(sums, dtype=np.uint32).view(np.int32)))


def multiply(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Products of polynomials, modulo ``POLYNOMIAL``; shapes broadcast."""
    a, b = np.broadcast_arrays(np.asarray(a, np.uint32), np.asarray(b, np.uint32))
    b, out = b.copy(), np.zeros(a.shape, dtype=np.uint32)
    for i in range(32):
        out ^= np.where(a >> np.uint32(31 - i) & 1, b, np.uint32(0))
        b = (b >> np.uint32(1)) ^ np.where(b & 1, np.uint32(POLYNOMIAL), np.uint32(0))
    return out


def power(exponents: NDArray[np.int64]) -> NDArray[np.uint32]:
    """x to each exponent, which may be negative."""
    left = np.asarray(exponents, dtype=np.int64) % ORDER
    out = np.full(left.shape, ONE, dtype=np.uint32)
    square = np.full(left.shape, ONE >> 1, dtype=np.uint32)
    while left.any():
        out = np.where(left & 1, multiply(out, square), out)
        square = multiply(square, square)
        left = left >> 1
    return out
