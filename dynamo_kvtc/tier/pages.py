"""How an engine's pages are read and written on a CPU: the door an adapter fits to its engine's layout.

A GPU's pages need no door: their K and V are views of any strides (``ops.pages.PagedCache``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dynamo_kvtc.ops.pages import PagedCache
from dynamo_kvtc.ops.pages.cache import PageTable


class Pages(Protocol):
    """Whole blocks by id. K and V as the codec has them: [L, H, n * block_tokens, D], K after RoPE."""

    blocks: int
    block_tokens: int
    table: PageTable | None
    """Where blocks lie if layers are of several cache groups: whoever reads or writes has told it."""

    def read(self, block_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Copies, of n blocks in the order given."""
        ...

    def write(self, block_ids: Sequence[int], k: Tensor, v: Tensor, first_layer: int = 0) -> None:
        """No block comes twice. k, v: of the layers from first_layer on; the others' pages stay as they are. Nothing is
        written where a layer has no page."""
        ...


class StridedPages:
    """Pages that views of K and V describe."""

    def __init__(self, cache: PagedCache) -> None:
        self._cache, self.table = cache, cache.table
        self.blocks, self.block_tokens = cache.blocks, cache.tokens_per_block

    def read(self, block_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(block_ids, dtype=torch.int64)
        k, v = (
            torch.stack([_rows(x[pages_in(self.table, layer, index)]) for layer, x in enumerate(views)])
            for views in (self._cache.k, self._cache.v)
        )
        return k, v

    def write(self, block_ids: Sequence[int], k: Tensor, v: Tensor, first_layer: int = 0) -> None:
        index = torch.tensor(block_ids, dtype=torch.int64)
        for views, x in ((self._cache.k, k), (self._cache.v, v)):
            for layer, own in enumerate(x, first_layer):
                heads, _, dim = own.shape
                pages = pages_in(self.table, layer, index)
                blocks = own.reshape(heads, len(index), self.block_tokens, dim).transpose(0, 1)
                views[layer][pages[pages >= 0]] = blocks[pages >= 0]


def pages_in(table: PageTable | None, layer: int, blocks: Tensor) -> Tensor:
    """Of blocks, int64 [n], in that layer: NO_PAGE for one that it lacks."""
    return blocks if table is None else table.of(layer, blocks)


def _rows(blocks: Tensor) -> Tensor:
    """[n, H, N, D] -> [H, n * N, D]."""
    count, heads, tokens, dim = blocks.shape
    return blocks.transpose(0, 1).reshape(heads, count * tokens, dim)
