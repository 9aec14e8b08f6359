"""Where K and V lie in vLLM's pages.

On a CPU a head's page is 2 N rows of D, K before V, and K is transposed or tiled as the attention kernel likes it: the
kernel that writes the cache is run on numbered tokens, and the permutation read off. On a GPU the strides of the
layers' own tensors say it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynamo_kvtc.adapters.engine_model import layer_index, token_major_views
from dynamo_kvtc.adapters.vllm._compat import EngineFacts, cpu_isa
from dynamo_kvtc.errors import UnsupportedModelError
from dynamo_kvtc.ops.pages import PagedCache
from dynamo_kvtc.ops.pages.cache import PageTable
from dynamo_kvtc.tier.pages import Pages, pages_in
from dynamo_kvtc.types import KVShape

_DIGIT = 128
"""Numbers are told to the kernel in digits to this base: every dtype holds them exactly."""


class PermutedPages:
    """One tensor a layer, int8 [blocks, page bytes], each head's part of a page a permutation of its K and V."""

    def __init__(
        self, layers: Sequence[Tensor], shape: KVShape, block_tokens: int, k_at: Tensor, v_at: Tensor,
        group_of: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """k_at, v_at: int64 [N * D], where element (token, dim) of K and V lies in a head's part of a page; group_of:
        each layer's cache group, if there are several."""
        self._shape, self._k_at, self._v_at = shape, k_at, v_at
        n = 2 * block_tokens * shape.head_dim
        nbytes = shape.kv_heads * n * shape.torch_dtype.itemsize
        self._layers = [x[:, :nbytes].view(shape.torch_dtype).view(len(x), shape.kv_heads, n) for x in layers]
        self.blocks, self.block_tokens = len(layers[0]), block_tokens
        self.table = PageTable(group_of, self.blocks, layers[0].device) if any(group_of) else None

    def read(self, block_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(block_ids, dtype=torch.int64)
        s, n = self._shape, len(block_ids)
        k = torch.empty(s.layers, s.kv_heads, n, self.block_tokens, s.head_dim, dtype=s.torch_dtype)
        v = torch.empty_like(k)
        for layer, pages in enumerate(self._layers):
            page = pages[pages_in(self.table, layer, index)].transpose(0, 1)  # [H, n, 2 N D]
            for out, at in ((k, self._k_at), (v, self._v_at)):
                out[layer] = page[..., at].view(s.kv_heads, n, self.block_tokens, s.head_dim)
        whole = (s.layers, s.kv_heads, n * self.block_tokens, s.head_dim)
        return k.view(whole), v.view(whole)

    def write(self, block_ids: Sequence[int], k: Tensor, v: Tensor, first_layer: int = 0) -> None:
        index = torch.tensor(block_ids, dtype=torch.int64)
        s, n = self._shape, len(block_ids)
        for i, pages in enumerate(self._layers[first_layer : first_layer + len(k)]):
            page = torch.empty(s.kv_heads, n, pages.shape[2], dtype=s.torch_dtype)
            for x, at in ((k, self._k_at), (v, self._v_at)):
                page[..., at] = x[i].reshape(s.kv_heads, n, len(at))
            own = pages_in(self.table, first_layer + i, index)
            pages[own[own >= 0]] = page.transpose(0, 1)[own >= 0]


def pages_of(caches: Any, engine: EngineFacts, shape: KVShape) -> Pages | PagedCache:
    """The engine's pages, layer by layer. caches: vLLM's CanonicalKVCaches; shape: this rank's.

    Raises UnsupportedModelError for a layout that is not known.
    """
    names = [name for group in engine.groups for name in group]
    order = sorted(range(len(names)), key=lambda i: layer_index(names[i]))
    if len(names) != shape.layers:
        raise UnsupportedModelError(
            f"the engine caches {len(names)} layers, the artifact has {shape.layers}: speculative drafts and layers "
            "that share a cache are not supported"
        )
    groups = [g for g, group in enumerate(engine.groups) for _ in group]
    group_of = [groups[i] for i in order]
    device = caches.tensors[0].tensor.device
    if device.type == "cuda":
        return _gpu_pages(caches, engine, shape, [names[i] for i in order], group_of)
    refs = [ref for group in caches.group_data_refs for ref in group]
    wanted = engine.block_tokens * shape.bytes_per_layer_token
    if len(refs) != len(names) or any(ref.page_size_bytes != wanted for ref in refs):
        found = sorted({ref.page_size_bytes for ref in refs})
        raise UnsupportedModelError(
            f"the engine has {len(refs)} pages a block of {found} bytes; {len(names)} layers of K and V ({shape}) in "
            f"blocks of {engine.block_tokens} tokens have {wanted} bytes each: latent attention and scales are not "
            "supported"
        )
    layers = [caches.tensors[refs[i].tensor_idx].tensor for i in order]
    return PermutedPages(layers, shape, engine.block_tokens, *probe_cpu(shape, engine.block_tokens), group_of)


def probe_cpu(shape: KVShape, block_tokens: int) -> tuple[Tensor, Tensor]:
    """(k_at, v_at) of ``PermutedPages``, by running vLLM's own kernel. Raises UnsupportedModelError."""
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    n, d, heads = block_tokens, shape.head_dim, 2
    isa = cpu_isa(shape.torch_dtype, n, d)

    def page_of(k: Tensor, v: Tensor) -> Tensor:
        page = torch.full((1, heads, 2 * n, d), -1, dtype=shape.torch_dtype)
        k_part, v_part = page.chunk(2, dim=2)
        slots = torch.arange(n, dtype=torch.int64)
        ops.cpu_attn_reshape_and_cache(
            k, v, k_part, v_part, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
        )
        return page[0].reshape(heads, -1).to(torch.int64)

    number = torch.arange(n * d).view(n, 1, d).expand(n, heads, d)
    at = []
    for which in (0, 1):
        found = torch.zeros(heads, 2 * n * d, dtype=torch.int64)
        written = torch.ones_like(found, dtype=torch.bool)
        for digit in range(4):
            told = (number // _DIGIT**digit % _DIGIT).to(shape.torch_dtype).contiguous()
            other = torch.full_like(told, -2)
            page = page_of(told, other) if which == 0 else page_of(other, told)
            written &= page >= 0
            found += page.clamp(min=0) * _DIGIT**digit
        place = torch.nonzero(written[0])[:, 0]
        order = torch.argsort(found[0, place])
        alike = torch.equal(found[0], found[1]) and torch.equal(written[0], written[1])
        if not alike or not torch.equal(found[0, place][order], torch.arange(n * d)):
            raise UnsupportedModelError(
                f"vLLM's CPU attention ({isa}) keeps {'KV'[which]} of blocks of {n} tokens and head dim {d} in a way "
                "that is no permutation of it"
            )
        at.append(place[order])
    return at[0], at[1]


def _gpu_pages(
    caches: Any, engine: EngineFacts, shape: KVShape, names: Sequence[str], group_of: Sequence[int]
) -> PagedCache:
    """Views of K and V, [blocks, heads, tokens, dim] each."""
    n, h, d = engine.block_tokens, shape.kv_heads, shape.head_dim
    ks, vs = [], []
    if engine.vllm_config is None:
        refs = [ref for group in caches.group_data_refs for ref in group]
        by_name = dict(zip((name for group in engine.groups for name in group), refs, strict=True))
        for name in names:
            if engine.kv_cache_layout != "LBHNC":
                raise UnsupportedModelError(
                    f"the engine's pages have the layout {engine.kv_cache_layout!r}; 'LBHNC' is known on a GPU"
                )
            raw = caches.tensors[by_name[name].tensor_idx].tensor
            rows = raw[:, : n * shape.bytes_per_layer_token].view(shape.torch_dtype).view(len(raw), h, n, 2 * d)
            ks.append(rows[..., :d])
            vs.append(rows[..., d:])
        return PagedCache.of(ks, vs, group_of)
    for name in names:
        layer = engine.vllm_config.compilation_config.static_forward_context[name]
        tensor = layer.kv_cache[0] if isinstance(layer.kv_cache, (list, tuple)) else layer.kv_cache
        k, v = token_major_views(name, tensor, shape, n)
        ks.append(k)
        vs.append(v)
    return PagedCache.of(ks, vs, group_of)
