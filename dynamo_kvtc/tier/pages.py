"""How an engine's pages are read and written on a CPU: the door an adapter fits to its engine's layout.

A GPU's pages need no door: their K and V are views of any strides (``ops.pages.PagedCache``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dynamo_kvtc.ops.pages import PagedCache


class Pages(Protocol):
    """Whole blocks by id. K and V as the codec has them: [L, H, n * block_tokens, D], K after RoPE."""

    blocks: int
    block_tokens: int

    def read(self, block_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Copies, of n blocks in the order given."""
        ...

    def write(self, block_ids: Sequence[int], k: Tensor, v: Tensor, first_layer: int = 0) -> None:
        """No block comes twice. k, v: of the layers from first_layer on; the others' pages stay as they are."""
        ...


class StridedPages:
    """Pages that views of K and V describe."""

    def __init__(self, cache: PagedCache) -> None:
        self._cache = cache
        self.blocks, self.block_tokens = cache.blocks, cache.tokens_per_block

    def read(self, block_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(block_ids, dtype=torch.int64)
        k, v = (torch.stack([_rows(x[index]) for x in views]) for views in (self._cache.k, self._cache.v))
        return k, v

    def write(self, block_ids: Sequence[int], k: Tensor, v: Tensor, first_layer: int = 0) -> None:
        index = torch.tensor(block_ids, dtype=torch.int64)
        for views, x in ((self._cache.k, k), (self._cache.v, v)):
            for view, layer in zip(views[first_layer : first_layer + len(x)], x, strict=True):
                heads, _, dim = layer.shape
                view[index] = layer.reshape(heads, len(index), self.block_tokens, dim).transpose(0, 1)


def _rows(blocks: Tensor) -> Tensor:
    """[n, H, N, D] -> [H, n * N, D]."""
    count, heads, tokens, dim = blocks.shape
    return blocks.transpose(0, 1).reshape(heads, count * tokens, dim)
