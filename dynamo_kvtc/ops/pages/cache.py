"""An engine's paged cache as it lies in memory: where each layer's K and V start, and the strides they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.types import DTYPES


@dataclass(frozen=True)
class PagedCache:
    """One rank's cache. Build it with ``PagedCache.of``.

    k, v: per layer a view [B blocks, H, N tokens of a block, D], of any strides but a contiguous last dim; they are
        kept alive as long as this is.
    addresses: int64 [L, 2], where each layer's K and V start, on the cache's device.
    alignment: bytes that divide every address, 16 at most.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    addresses: Tensor
    alignment: int

    @classmethod
    def of(cls, k_views: Sequence[Tensor], v_views: Sequence[Tensor]) -> PagedCache:
        """Views of the engine's own tensors; nothing is copied.

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
        bases = [[k.data_ptr(), v.data_ptr()] for k, v in zip(k_views, v_views, strict=True)]
        return cls(
            k=tuple(k_views),
            v=tuple(v_views),
            addresses=torch.tensor(bases, dtype=torch.int64, device=first.device),
            alignment=math.gcd(16, *(base for pair in bases for base in pair)),
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
