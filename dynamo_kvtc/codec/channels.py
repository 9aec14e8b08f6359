"""The order of a layer group's channels: how [Lg, H, T, D] becomes the rows the transforms work on."""

from __future__ import annotations

import torch
from torch import Tensor


def to_rows(x: Tensor) -> Tensor:
    """[Lg, H, T, D] -> [T, Lg * H * D], layer slowest, head dim fastest."""
    layers, heads, tokens, dim = x.shape
    return x.permute(2, 0, 1, 3).reshape(tokens, layers * heads * dim)


def from_rows(rows: Tensor, layers: int, heads: int, dim: int) -> Tensor:
    """[T, Lg * H * D] -> [Lg, H, T, D]; the inverse of ``to_rows``."""
    return rows.reshape(rows.shape[0], layers, heads, dim).permute(1, 2, 0, 3)


def join_rows(k: Tensor, v: Tensor) -> Tensor:
    """K and V [Lg, H, T, D] -> [T, 2 * Lg * H * D], all of K first."""
    return torch.cat([to_rows(k), to_rows(v)], dim=1)


def split_rows(rows: Tensor, layers: int, heads: int, dim: int) -> tuple[Tensor, Tensor]:
    """The inverse of ``join_rows``."""
    k, v = rows.chunk(2, dim=1)
    return from_rows(k, layers, heads, dim), from_rows(v, layers, heads, dim)
