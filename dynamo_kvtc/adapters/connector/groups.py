"""An engine's cache groups (hybrid attention): layers of one kind of attention, with pages of their own for blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dynamo_kvtc.adapters.connector.options import LAYERWISE, ConnectorOptions
from dynamo_kvtc.adapters.engine_model import WINDOW_SPEC
from dynamo_kvtc.errors import ConfigError, UnsupportedModelError
from dynamo_kvtc.ops.pages.cache import NO_PAGE

_FULL = "FullAttentionSpec"


@dataclass(frozen=True)
class Groups:
    """The engine's cache groups: those with full attention first, where all blocks keep their pages.

    order: their numbers with vLLM; names: each one's layers; window: tokens of the smallest window that layers attend
    in, 0 if they all attend to all: where there is one, vLLM takes pages away from a request that runs.
    """

    order: tuple[int, ...]
    names: tuple[tuple[str, ...], ...]
    window: int = 0

    def pages(self, block_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """Of vLLM's ids, group by group: page 0 is nobody's, and stands for one that was taken away."""
        return [[page or NO_PAGE for page in block_ids[g]] for g in self.order]


ONE_GROUP = Groups((0,), ((),))
"""Of a model with full attention in every layer."""


def groups_of(kv_cache_config: Any, options: ConnectorOptions) -> Groups:
    """Raises UnsupportedModelError for layers that are neither full nor sliding-window attention of one shape,
    ConfigError for options that do not go with windows."""
    groups = kv_cache_config.kv_cache_groups
    specs = [group.kv_cache_spec for group in groups]
    kinds = [type(spec).__name__ for spec in specs]
    names = tuple(tuple(group.layer_names) for group in groups)
    if not set(kinds) <= {_FULL, WINDOW_SPEC} or (len(kinds) > 1 and _FULL not in kinds):
        raise UnsupportedModelError(
            f"the engine's cache has {len(kinds)} groups ({', '.join(sorted(set(kinds)))}); supported are full "
            "attention, sliding windows beside it, and one group of sliding windows"
        )
    shapes = {(s.block_size, s.num_kv_heads, s.head_size, s.dtype, s.page_size_bytes) for s in specs}
    if len(shapes) > 1:
        raise UnsupportedModelError(
            "the cache groups differ in (block size, heads, head dim, dtype, page bytes): "
            f"{', '.join(sorted(map(str, shapes)))}"
        )
    windows = [spec.sliding_window for spec, kind in zip(specs, kinds, strict=True) if kind == WINDOW_SPEC]
    if windows and options.load == LAYERWISE:
        # vLLM takes word of a load that failed for a request as a whole, and only while that waits.
        also = ", or --disable-hybrid-kv-cache-manager" if _FULL in kinds else ""
        raise ConfigError(f"load is 'layerwise' and layers have sliding windows: set load to 'async'{also}")
    order = tuple(sorted(range(len(specs)), key=lambda g: kinds[g] != _FULL))
    return Groups(order, tuple(names[g] for g in order), min(windows, default=0))
