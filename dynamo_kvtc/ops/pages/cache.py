"""An engine's paged cache as it lies in memory: where each layer's K and V start, and the strides they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.types import DTYPES

NO_PAGE = -1
"""Where a block lies in a group that has let go of it."""


class PageTable:
    """Where blocks lie in a cache whose layers are of several groups, each with pages of its own (hybrid attention).

    A block goes by its page in the first group. group_of: int32 [L], each layer's group; pages: int64 [G, B], a block's
    page in each group, or NO_PAGE: what a layer lacks reads as a saturated token and is never written. Both are on the
    cache's device.
    """

    def __init__(self, group_of: Sequence[int], blocks: int, device: torch.device) -> None:
        """Until ``put`` says otherwise a block has the same page in all groups."""
        self.groups = max(group_of) + 1
        self.group_of = torch.tensor(list(group_of), dtype=torch.int32, device=device)
        self.pages = torch.arange(blocks, device=device).repeat(self.groups, 1)

    def put(self, blocks: Sequence[int], others: Sequence[Sequence[int]]) -> None:
        """On the current stream. blocks: n; others: n times its pages in groups 1 and on, or NO_PAGE.

        Raises ConfigError for pages that the cache does not have.
        """
        count = self.pages.shape[1]
        told = torch.tensor([[block, *rest] for block, rest in zip(blocks, others, strict=True)], dtype=torch.int64)
        if told.shape != (len(blocks), self.groups) or not len(blocks):
            raise ConfigError(f"{len(blocks)} blocks with {len(told[0]) if len(told) else 0} pages each; the cache has "
                              f"{self.groups} groups")  # fmt: skip
        least = torch.tensor([0] + [NO_PAGE] * (self.groups - 1))
        if bool((told < least).any()) or bool((told >= count).any()):
            raise ConfigError(f"pages run from {int(told.min())} to {int(told.max())}; the cache has {count}")
        told = told.T.to(self.pages.device)
        self.pages[:, told[0]] = told

    def of(self, layer: int, blocks: Tensor) -> Tensor:
        """Their pages in that layer, int64 like blocks; NO_PAGE for none. On the cache's device."""
        return self.pages[self.group_of[layer], blocks]


@dataclass(frozen=True)
class PagedCache:
    """One rank's cache. Build it with ``PagedCache.of``.

    k, v: per layer a view [B blocks, H, N tokens of a block, D], of any strides but a contiguous last dim; they are
        kept alive as long as this is.
    addresses: int64 [L, 2], where each layer's K and V start, on the cache's device.
    alignment: bytes that divide every address, 16 at most.
    table: where blocks lie if layers are of several groups; None: a block has one page, in every layer.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    addresses: Tensor
    alignment: int
    table: PageTable | None = None

    @classmethod
    def of(cls, k_views: Sequence[Tensor], v_views: Sequence[Tensor], group_of: Sequence[int] = ()) -> PagedCache:
        """Views of the engine's own tensors; nothing is copied. group_of: each layer's group, if there are several.

        Raises ConfigError, naming the layer, unless all are bfloat16, float16 or float32 of one dtype, device, shape
        and strides, the last stride is 1 and no two elements of a view share memory.
        """
        if not k_views or len(k_views) != len(v_views):
            raise ConfigError(f"a cache has K and V of 1 layer or more; got {len(k_views)} of K, {len(v_views)} of V")
        first = k_views[0]
        if first.dim() != 4 or first.dtype not in DTYPES.values() or 0 in first.shape:
            raise ConfigError(
                f"layer 0: K must be bfloat16, float16 or float32 [blocks, heads, tokens per block, head dim]; got "
                f"{first.dtype} {tuple(first.shape)}"
            )
        for name, views in (("K", k_views), ("V", v_views)):
            for layer, view in enumerate(views):
                if _kind(view) != _kind(first):
                    raise ConfigError(f"layer {layer}: {name} is {_told(view)}; K of layer 0 is {_told(first)}")
        _check_strides(first)
        if group_of and len(group_of) != len(k_views):
            raise ConfigError(f"{len(group_of)} layers have a group; the cache has {len(k_views)} layers")
        bases = [[k.data_ptr(), v.data_ptr()] for k, v in zip(k_views, v_views, strict=True)]
        return cls(
            k=tuple(k_views),
            v=tuple(v_views),
            addresses=torch.tensor(bases, dtype=torch.int64, device=first.device),
            alignment=math.gcd(16, *(base for pair in bases for base in pair)),
            table=PageTable(group_of, first.shape[0], first.device) if any(group_of) else None,
        )

    @property
    def layers(self) -> int:
        return len(self.k)

    @property
    def blocks(self) -> int:
        return self.k[0].shape[0]

    @property
    def heads(self) -> int:
        return self.k[0].shape[1]

    @property
    def tokens_per_block(self) -> int:
        return self.k[0].shape[2]

    @property
    def head_dim(self) -> int:
        return self.k[0].shape[3]

    @property
    def slots(self) -> int:
        """Tokens the cache has room for."""
        return self.blocks * self.tokens_per_block

    @property
    def dtype(self) -> torch.dtype:
        return self.k[0].dtype

    @property
    def device(self) -> torch.device:
        return self.k[0].device

    @property
    def strides(self) -> tuple[int, int, int]:
        """Elements from a block, a head and a token of a block to the next."""
        block, head, token, _ = self.k[0].stride()
        return block, head, token

    def channels(self, layers: tuple[int, int]) -> int:
        """P of layers [start, end): all of K, then all of V; layer slowest, then head, then head dim."""
        return 2 * (layers[1] - layers[0]) * self.heads * self.head_dim


def _kind(view: Tensor) -> tuple[object, ...]:
    return view.dtype, view.device, tuple(view.shape), view.stride()


def _told(view: Tensor) -> str:
    return f"{view.dtype} {tuple(view.shape)} of strides {view.stride()} on {view.device}"


def _check_strides(view: Tensor) -> None:
    if view.stride(3) != 1:
        raise ConfigError(f"layer 0: K's strides are {view.stride()}; the last, the head dim's, must be 1")
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(view.stride(), view.shape, strict=True) if n > 1):
        if stride <= reach:
            raise ConfigError(f"layer 0: K is {_told(view)}: some of its elements share memory")
        reach += (size - 1) * stride
