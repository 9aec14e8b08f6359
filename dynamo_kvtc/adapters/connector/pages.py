"""What vLLM hands a connector, as ``adapters.vllm.layout`` and the codec want it; what cannot be served is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dynamo_kvtc.adapters.connector.groups import Groups
from dynamo_kvtc.adapters.connector.options import LAYERWISE, ConnectorOptions
from dynamo_kvtc.adapters.engine_model import check_workers
from dynamo_kvtc.adapters.vllm._compat import RELEASE, EngineFacts
from dynamo_kvtc.errors import ConfigError, UnsupportedModelError


@dataclass(frozen=True)
class _Tensor:
    tensor: torch.Tensor


@dataclass(frozen=True)
class _Ref:
    tensor_idx: int
    page_size_bytes: int


@dataclass(frozen=True)
class Caches:
    """As vLLM's CanonicalKVCaches, all layers in one group: int8 [blocks, page bytes] a layer."""

    tensors: list[_Tensor]
    group_data_refs: list[list[_Ref]]


def facts_of(vllm_config: Any, kv_cache_config: Any, groups: Groups) -> EngineFacts:
    """Raises UnsupportedModelError, ConfigError."""
    parallel, cache, model = vllm_config.parallel_config, vllm_config.cache_config, vllm_config.model_config
    check_workers(parallel.world_size)
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    dtype = model.dtype if cache.cache_dtype == "auto" else cache.cache_dtype
    return EngineFacts(
        model=model.model, dtype=str(dtype).removeprefix("torch."), groups=groups.names,
        block_tokens=spec.block_size,
        blocks_per_chunk=1, rank=parallel.rank, world_size=parallel.world_size, tp_size=parallel.tensor_parallel_size,
        engine_id=vllm_config.kv_transfer_config.engine_id, kv_cache_layout=getattr(cache, "kv_cache_layout", None),
        vllm_config=None if RELEASE >= (0, 31) else vllm_config,
    )  # fmt: skip


def caches_of(
    kv_caches: dict[str, torch.Tensor], engine: EngineFacts, blocks: int, options: ConnectorOptions
) -> Caches:
    """Raises UnsupportedModelError, ConfigError."""
    names = [name for group in engine.groups for name in group]
    missing = [name for name in names if name not in kv_caches]
    if missing:
        raise UnsupportedModelError(
            f"the engine has no pages of {missing[0]}: layers that share a cache are not served"
        )
    device = kv_caches[names[0]].device
    if device.type == "cuda" and options.load == LAYERWISE:
        raise ConfigError("load is 'layerwise', which a CPU's tier can do; on a GPU set it to 'async'")
    tensors: list[_Tensor] = []
    refs: list[_Ref] = []
    for name in names:
        layer = kv_caches[name]
        if engine.vllm_config is None:
            if layer.shape[0] != blocks:
                raise UnsupportedModelError(f"layer {name} has {layer.shape[0]} pages, the engine {blocks}")
            size = layer.element_size()
            nbytes = layer[0].numel() * size
            raw = torch.tensor([], dtype=torch.int8, device=device).set_(
                layer.untyped_storage(), layer.storage_offset() * size, (blocks, nbytes), (layer.stride(0) * size, 1)
            )
            tensors.append(_Tensor(raw))
            refs.append(_Ref(len(refs), nbytes))
        else:
            tensors.append(_Tensor(layer))
            refs.append(_Ref(len(refs), 0))
    return Caches(tensors, [refs])
