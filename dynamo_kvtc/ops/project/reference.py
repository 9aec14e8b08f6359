"""The transform in torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

TILE_TOKENS = 256
COLUMN_CHUNK = 1024


def analyse(x: Tensor, mean: Tensor, gain: Tensor, basis: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    fixed = ((x - mean) * gain).round()
    # NaN compares false, so "not inside" catches it together with overflow.
    saturated = ~((fixed.abs() <= limit).all(dim=1))
    exact = fixed.nan_to_num(0.0).clamp(-limit, limit).double()
    # A float64 copy of the whole basis would be four times the artifact: convert it a few columns at a time.
    coefficients = torch.empty(x.shape[0], basis.shape[1], dtype=torch.float64, device=x.device)
    for start in range(0, basis.shape[1], COLUMN_CHUNK):
        columns = slice(start, start + COLUMN_CHUNK)
        torch.mm(exact, basis[:, columns].double(), out=coefficients[:, columns])
    return coefficients, exact.square().sum(dim=1), saturated


def synthesise(levels: Tensor, decoder: Tensor, gain: Tensor, mean: Tensor) -> Tensor:
    out = torch.empty(levels.shape[0], decoder.shape[1], dtype=torch.float32, device=levels.device)
    for start in range(0, levels.shape[0], TILE_TOKENS):
        tile = levels[start : start + TILE_TOKENS]
        rows = tile.shape[0]
        if rows < TILE_TOKENS:
            # A short tile would take another kernel with another order of summation.
            tile = torch.cat([tile, tile.new_zeros(TILE_TOKENS - rows, tile.shape[1])])
        out[start : start + rows] = (tile @ decoder)[:rows] * gain + mean
    return out
