"""The transform in torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

TILE_TOKENS = 256
COLUMN_CHUNK = 1024
SUM_CHUNK = 1024
"""Products of two int8 that float32 adds up exactly, in any order: 128 * 127 * 1024 < 2**24."""


def fixed_point(x: Tensor, mean: Tensor, gain: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    fixed = ((x - mean) * gain).round()
    # NaN compares false, so "not inside" catches it together with overflow.
    saturated = ~((fixed.abs() <= limit).all(dim=1))
    return fixed.nan_to_num(0.0).clamp(-limit, limit), saturated


def analyse_wide(fixed: Tensor, basis: Tensor) -> Tensor:
    exact = fixed.double()
    # A float64 copy of the whole basis would be four times the artifact: convert it a few columns at a time.
    coefficients = torch.empty(fixed.shape[0], basis.shape[1], dtype=torch.float64, device=fixed.device)
    for start in range(0, basis.shape[1], COLUMN_CHUNK):
        columns = slice(start, start + COLUMN_CHUNK)
        torch.mm(exact, basis[:, columns].double(), out=coefficients[:, columns])
    return coefficients


def analyse_narrow(fixed: Tensor, wide_inputs: Tensor, basis: Tensor) -> Tensor:
    high = torch.floor((fixed[:, wide_inputs] + 128) * 2.0**-8)
    low = fixed.clone()
    low[:, wide_inputs] -= high * 256
    return _int8_sum(low, basis) + _int8_sum(high, basis[wide_inputs]) * 256


def synthesise_wide(levels: Tensor, decoder: Tensor) -> Tensor:
    out = torch.empty(levels.shape[0], decoder.shape[1], dtype=torch.float32, device=levels.device)
    for start in range(0, levels.shape[0], TILE_TOKENS):
        tile = levels[start : start + TILE_TOKENS]
        rows = tile.shape[0]
        if rows < TILE_TOKENS:
            # A short tile would take another kernel with another order of summation.
            tile = torch.cat([tile, tile.new_zeros(TILE_TOKENS - rows, tile.shape[1])])
        out[start : start + rows] = (tile @ decoder)[:rows]
    return out


def synthesise_narrow(levels: Tensor, basis: Tensor) -> Tensor:
    return _int8_sum(levels, basis.T)


def _int8_sum(a: Tensor, b: Tensor) -> Tensor:
    """Exact a @ b of values within int8, int64."""
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.int64, device=a.device)
    for start in range(0, b.shape[0], SUM_CHUNK):
        part = slice(start, start + SUM_CHUNK)
        total += (a[:, part].float() @ b[part].float()).long()
    return total
