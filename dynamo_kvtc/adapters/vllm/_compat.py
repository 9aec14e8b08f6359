"""Which vLLM is installed, and what differs between the releases that are known."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynamo_kvtc.adapters.engine_model import check_no_windows
from dynamo_kvtc.errors import EngineVersionError, MissingDependencyError

SUPPORTED = ((0, 25), (0, 31))
"""0.31 is what the tests run for real, on a CPU; 0.25 is written from its sources."""


def require_vllm() -> tuple[int, int]:
    """(major, minor). Raises MissingDependencyError, or EngineVersionError for a release that is not known."""
    known = ", ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError as exc:
        raise MissingDependencyError(f"vllm is not installed; this adapter needs one of {known}") from exc
    found = re.match(r"(\d+)\.(\d+)", version)
    release = (int(found.group(1)), int(found.group(2))) if found else (0, 0)
    if release not in SUPPORTED:
        raise EngineVersionError(
            f"vllm {version} is installed; its offloading interface is experimental, and this release knows that of "
            f"{known}: install one of them, or turn this connector off"
        )
    return release


RELEASE = require_vllm()


@dataclass(frozen=True)
class EngineFacts:
    """What the spec was told. groups: layer names of each cache group; dtype: of the cache, by name.
    vllm_config: where the spec has it (0.25)."""

    model: str
    dtype: str
    groups: tuple[tuple[str, ...], ...]
    block_tokens: int
    blocks_per_chunk: int
    rank: int
    world_size: int
    tp_size: int
    engine_id: str
    kv_cache_layout: str | None
    vllm_config: Any = None


def facts(spec: Any) -> EngineFacts:
    """Of an OffloadingSpec whose own __init__ has run. Raises UnsupportedModelError."""
    if RELEASE >= (0, 31):
        c = spec.config
        return EngineFacts(
            model=c.model.name, dtype=c.model.dtype, groups=tuple(g.layer_names for g in c.groups),
            block_tokens=c.groups[0].tokens_per_block, blocks_per_chunk=c.cache.blocks_per_chunk,
            rank=c.parallel.rank, world_size=c.parallel.world_size, tp_size=c.parallel.tp_size, engine_id=c.engine_id,
            kv_cache_layout=c.kv_cache_layout,
        )  # fmt: skip
    config = spec.vllm_config
    check_no_windows(spec.kv_cache_config.kv_cache_groups)
    parallel, cache = config.parallel_config, config.cache_config
    dtype = config.model_config.dtype if cache.cache_dtype == "auto" else cache.cache_dtype
    return EngineFacts(
        model=config.model_config.model, dtype=str(dtype).removeprefix("torch."),
        groups=tuple(tuple(g.layer_names) for g in spec.kv_cache_config.kv_cache_groups),
        block_tokens=spec.gpu_block_size[0], blocks_per_chunk=spec.block_size_factor, rank=parallel.rank,
        world_size=parallel.world_size, tp_size=parallel.tensor_parallel_size,
        engine_id=config.kv_transfer_config.engine_id, kv_cache_layout=None, vllm_config=config,
    )  # fmt: skip


def medium(tier: str) -> Any:
    """The engine's name of a tier, for events."""
    name = {"host": "CPU", "disk": "STORAGE"}[tier]
    if RELEASE < (0, 31):
        return name
    from vllm.v1.kv_offload.base import Medium

    return Medium(name)


def end_position(context: Any, key: bytes) -> int | None:
    """The token a block ends at in the request's sequence; None where the release does not say."""
    ask = getattr(context, "get_offload_key_position", None)
    return None if ask is None else ask(key)


def sequence_tokens(context: Any) -> int | None:
    """Tokens of the request's whole blocks so far, its prompt's at least; None where the release does not say."""
    positions = getattr(context, "_offload_key_positions", None)
    return max(positions.values(), default=0) if positions is not None else None


def end_positions(context: Any) -> Mapping[bytes, int]:
    """Where the request's blocks end in its sequence; empty where the release does not say."""
    return getattr(context, "_offload_key_positions", {})


KNOWS_SEQUENCES = RELEASE >= (0, 31)


def cpu_isa(dtype: Any, block_tokens: int, head_dim: int) -> str:
    """The instruction set that the CPU's attention works with: it decides how K lies in a page."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return _get_attn_isa(dtype, block_tokens, head_dim, "auto")
