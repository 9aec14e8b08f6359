"""The router's news as vLLM's KV events: what a tier holds has the medium "CPU" or "STORAGE"."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from dynamo_kvtc.adapters.connector.router import Named

_MEDIA = {"host": "CPU", "disk": "STORAGE"}


def events_of(news: Iterable[tuple[Named, str, bool]], block_tokens: int) -> Iterator[Any]:
    for named, tier, gone in news:
        block: Any = maybe_convert_block_hash(named.block_hash)
        if gone:
            yield BlockRemoved(block_hashes=[block], medium=_MEDIA[tier])
            continue
        parent: Any = None if named.parent is None else maybe_convert_block_hash(named.parent)
        yield BlockStored(
            block_hashes=[block], parent_block_hash=parent, token_ids=list(named.tokens), block_size=block_tokens,
            lora_id=None, medium=_MEDIA[tier], lora_name=None,
        )  # fmt: skip
