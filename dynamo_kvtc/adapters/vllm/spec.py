"""What vLLM's OffloadingConnector makes: the two sides, and all that is refused at start."""

from __future__ import annotations

import logging
from typing import Any

from vllm.v1.kv_offload.base import (
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingHistogramMetadata,
    OffloadingManager,
    OffloadingSpec,
    OffloadingWorker,
)

from dynamo_kvtc.adapters.engine_model import (
    PREFIX,
    check_one_group,
    check_workers,
    model_of,
    share_the_interpreter,
)
from dynamo_kvtc.adapters.vllm._compat import KNOWS_SEQUENCES, RELEASE, EngineFacts, facts
from dynamo_kvtc.adapters.vllm.layout import pages_of
from dynamo_kvtc.adapters.vllm.manager import Manager
from dynamo_kvtc.adapters.vllm.options import parse_options
from dynamo_kvtc.adapters.vllm.shared import Shared, engines
from dynamo_kvtc.adapters.vllm.worker import Worker
from dynamo_kvtc.codec.artifact import load_artifact
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.tier.build import open_tier
from dynamo_kvtc.tier.identity import EngineCache
from dynamo_kvtc.tier.metrics import BUCKETS, COUNTERS, GAUGES, HISTOGRAMS, describe
from dynamo_kvtc.tier.options import TierOptions

log = logging.getLogger(__name__)


class KvtcOffloadingSpec(OffloadingSpec):
    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        """The names of ``tier.metrics`` behind vLLM's prefix, for vLLM's own /metrics."""
        return {
            **{PREFIX + n: OffloadingCounterMetadata(describe(n), labels) for n, labels in COUNTERS.items()},
            **{PREFIX + n: OffloadingGaugeMetadata(describe(n), labels) for n, labels in GAUGES.items()},
            **{
                PREFIX + n: OffloadingHistogramMetadata(describe(n), labels, BUCKETS)
                for n, labels in HISTOGRAMS.items()
            },
        }

    def __init__(self, *config: Any) -> None:
        super().__init__(*config)
        self._facts = facts(self)
        self._options = parse_options(self.extra_config)
        check_engine(self._facts, self._options)
        self._worker: Worker | None = None
        self._manager: Manager | None = None

    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        if self._worker is None:
            engine, options = self._facts, self._options
            artifact = load_artifact(options.artifact, engine.rank)
            cache = EngineCache(
                *model_of(engine.model, engine.dtype, options.weights, artifact), tp_rank=engine.rank,
                tp_size=engine.tp_size, block_tokens=engine.block_tokens,
            )  # fmt: skip
            cache.check(artifact)
            shared = Shared(options, self.kv_events_config.enable_kv_cache_events)
            pages = pages_of(kv_caches, engine, artifact.shape)
            shared.tier = open_tier(
                options, cache, pages, artifact, shared.metrics, shared.on_moved, shared.on_removed
            )  # fmt: skip
            share_the_interpreter()
            engines.publish(engine.engine_id, shared)
            self._worker = Worker(shared, engine.engine_id)
            log.info(
                "kvtc tier: %s, %d blocks of %d tokens on the engine's side", options, pages.blocks, cache.block_tokens
            )
        return self._worker

    def get_manager(self) -> OffloadingManager:
        if self._manager is None:
            self._manager = Manager(engines.find(self._facts.engine_id), self._facts.block_tokens)
        return self._manager


def check_engine(engine: EngineFacts, options: TierOptions) -> None:
    """Raises ConfigError or UnsupportedModelError for what the adapter cannot serve right."""
    check_workers(engine.world_size)
    check_one_group(len(engine.groups))
    if engine.blocks_per_chunk != 1:
        raise ConfigError(f"the engine offloads {engine.blocks_per_chunk} blocks at once; 1 is supported")
    if (options.min_tokens or options.window) and not KNOWS_SEQUENCES:
        raise ConfigError(
            f"min_tokens is {options.min_tokens}, window {options.window or 0}; vLLM {RELEASE[0]}.{RELEASE[1]} does "
            "not tell a sequence's length when blocks are stored: leave them out"
        )
