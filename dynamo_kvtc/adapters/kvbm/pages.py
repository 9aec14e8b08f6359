"""The engine's pages as KVBM's connector is given them: one tensor a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamo_kvtc.adapters.engine_model import token_major_views
from dynamo_kvtc.adapters.kvbm.mover import MoverContext
from dynamo_kvtc.errors import UnsupportedModelError
from dynamo_kvtc.ops.pages import PagedCache
from dynamo_kvtc.tier.pages import Pages
from dynamo_kvtc.types import KVShape


def engine_pages(context: MoverContext, shape: KVShape) -> Pages | PagedCache:
    """shape: this rank's. Raises UnsupportedModelError for a layout that is not known."""
    layers, n = context.kv_caches, context.block_tokens
    if len(layers) != shape.layers:
        raise UnsupportedModelError(
            f"the engine caches {len(layers)} layers, the artifact has {shape.layers}: speculative drafts and layers "
            "that share a cache are not supported"
        )
    wanted = (shape.kv_heads, n, 2 * shape.head_dim)
    if next(iter(layers.values())).device.type == "cuda":
        views = [
            (x[..., : shape.head_dim], x[..., shape.head_dim :])
            if x.dim() == 4 and tuple(x.shape[1:]) == wanted
            else token_major_views(name, x, shape, n)
            for name, x in layers.items()
        ]
        return PagedCache.of([k for k, _ in views], [v for _, v in views])
    # Only a CPU's layout needs vLLM itself: its kernel says where K lies.
    from dynamo_kvtc.adapters.vllm.layout import PermutedPages, probe_cpu

    rows = [_rows(name, x, wanted, shape) for name, x in layers.items()]
    return PermutedPages(rows, shape, n, *probe_cpu(shape, n))


def _rows(name: str, x: Tensor, wanted: tuple[int, ...], shape: KVShape) -> Tensor:
    """A layer's pages as bytes, int8 [blocks, page bytes]: a view."""
    if x.dim() != 4 or tuple(x.shape[1:]) != wanted or not x[0].is_contiguous() or x.dtype != shape.torch_dtype:
        raise UnsupportedModelError(
            f"layer {name} caches {x.dtype} {tuple(x.shape)} with strides {x.stride()}; on a CPU vLLM 0.31 is known to "
            f"cache {shape.torch_dtype} [blocks, {', '.join(map(str, wanted))}] with whole pages in one piece"
        )
    return x.as_strided((len(x), x[0].numel()), (x.stride(0), 1)).view(torch.int8)
