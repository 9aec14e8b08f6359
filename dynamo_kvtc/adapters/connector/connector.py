"""vLLM's hooks, and nothing else: each is a call of the scheduler's or the worker's side."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from dynamo_kvtc.adapters.connector.options import LAYERWISE, ConnectorOptions, parse_connector
from dynamo_kvtc.adapters.engine_model import layer_index, model_of, share_the_interpreter
from dynamo_kvtc.adapters.vllm._compat import RELEASE
from dynamo_kvtc.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from dynamo_kvtc.adapters.connector.loads import LoadOrder
    from dynamo_kvtc.adapters.connector.scheduler import Scheduler, StoreOrder
    from dynamo_kvtc.adapters.connector.worker import Worker

# What decodes is imported with the worker's pages: vLLM's CPU worker cannot start in a process that has numba.

log = logging.getLogger(__name__)

_HYBRID = (SupportsHMA,) if RELEASE >= (0, 31) else ()
"""Before that, a load that failed cannot be told of where layers have windows: vLLM makes them full attention, unless
all layers have windows."""


@dataclass
class Step(KVConnectorMetadata):
    """Of one step; both sides are in one process."""

    loads: list[LoadOrder] = field(default_factory=list)
    stores: list[StoreOrder] = field(default_factory=list)
    awaited: set[int] = field(default_factory=set)
    """Numbers of earlier stores that must have read their pages before this step writes."""


class KvtcConnector(KVConnectorBase_V1, *_HYBRID):  # type: ignore[misc]
    """Refuses, at start: unknown options, a failure policy that ends requests, layers that are neither full nor
    sliding-window attention, several workers."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        config = vllm_config.kv_transfer_config
        if config.kv_load_failure_policy != "recompute":
            raise ConfigError(
                f"kv_load_failure_policy is {config.kv_load_failure_policy!r}: a block that cannot be loaded would end "
                "its request with an error; set it to 'recompute' in --kv-transfer-config"
            )
        self._options: ConnectorOptions = parse_connector(config.kv_connector_extra_config)
        self._engine_id: str = config.engine_id
        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._open_scheduler()

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return extra_config.get("load") == LAYERWISE

    @property
    def requires_kv_delivery(self) -> bool:
        """A block that is not handed on is computed again."""
        return False

    def _open_scheduler(self) -> None:
        from dynamo_kvtc.adapters.connector.node import engines
        from dynamo_kvtc.adapters.connector.scheduler import Scheduler

        node = engines.find(self._engine_id)
        self._scheduler = Scheduler(node, node.tier.transcoder.block_tokens, self._engine_id)

    # Worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from dynamo_kvtc.adapters.connector.cluster import open_cluster
        from dynamo_kvtc.adapters.connector.groups import groups_of
        from dynamo_kvtc.adapters.connector.node import Node, engines
        from dynamo_kvtc.adapters.connector.pages import caches_of, facts_of
        from dynamo_kvtc.adapters.connector.worker import Worker
        from dynamo_kvtc.adapters.vllm.layout import pages_of
        from dynamo_kvtc.codec.artifact import load_artifact
        from dynamo_kvtc.tier.build import open_tier
        from dynamo_kvtc.tier.identity import EngineCache

        if self._worker is not None:
            raise ConfigError("register_kv_caches was called twice; this connector keeps one set of pages")
        options, config = self._options, self._vllm_config
        groups = groups_of(self._kv_cache_config, options)
        if groups.window and not _HYBRID:
            raise UnsupportedModelError("all layers have sliding windows: this needs vLLM 0.31")
        engine = facts_of(config, self._kv_cache_config, groups)
        artifact = load_artifact(options.tier.artifact, engine.rank)
        cache = EngineCache(
            *model_of(engine.model, engine.dtype, options.tier.weights, artifact), tp_rank=engine.rank,
            tp_size=engine.tp_size, block_tokens=engine.block_tokens,
        )  # fmt: skip
        cache.check(artifact)
        events = config.kv_events_config
        node = Node(options, bool(events is not None and events.enable_kv_cache_events), groups)
        caches = caches_of(kv_caches, engine, int(self._kv_cache_config.num_blocks), options)
        pages = pages_of(caches, engine, artifact.shape)
        node.tier = open_tier(
            options.tier, cache, pages, artifact, node.metrics, node.router.moved, node.router.removed,
            # Pages that a window leaves behind are soon another request's: stores are to be over by then.
            engine_first=options.nats is None and not groups.window,
        )  # fmt: skip
        try:
            node.cluster = open_cluster(options, node.tier, artifact)
        except BaseException:
            node.tier.close(1.0)
            raise
        share_the_interpreter()
        engines.publish(self._engine_id, node)
        self._worker = Worker(node)
        log.info("kvtc connector: %s, %d blocks of %d tokens", options, pages.blocks, cache.block_tokens)

    @property
    def _moving(self) -> Worker:
        assert self._worker is not None, "register_kv_caches has not been called"
        return self._worker

    @property
    def _step(self) -> Step:
        step = self._get_connector_metadata()
        assert isinstance(step, Step)
        return step

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        if kv_connector_metadata.awaited:
            self._moving.wait_stores(kv_connector_metadata.awaited)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._moving.begin_loads(self._step.loads)

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._options.load == LAYERWISE:
            self._moving.wait_layer(layer_index(layer_name))

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: blocks are stored whole, after the forward."""

    def wait_for_save(self) -> None:
        self._moving.save(self._step.stores)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        freed, loaded = self._moving.finished(finished_req_ids)
        return freed or None, loaded or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """From 0.31 on, instead of ``get_finished``."""
        results = super().get_transfer_results(finished_req_ids)
        results.failed_recving = self._moving.take_failed_requests()
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._moving.take_failed_blocks()

    def get_kv_connector_stats(self) -> Any:
        if self._worker is None:
            return None
        from dynamo_kvtc.adapters.kvbm.stats import TierStats

        return TierStats.of(self._moving.take_stats())

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        from dynamo_kvtc.adapters.kvbm.stats import TierStats

        return TierStats(data)

    @classmethod
    def build_prom_metrics(cls, *what: Any, **named: Any) -> Any:
        from dynamo_kvtc.adapters.kvbm.stats import TierPromMetrics

        return TierPromMetrics(*what, **named)

    def shutdown(self) -> None:
        if self._worker is not None:
            from dynamo_kvtc.adapters.connector.node import engines

            worker, self._worker = self._worker, None
            if not worker.close():
                log.warning("the tier was closed before all that was stored was where it belongs")
            engines.withdraw(self._engine_id, worker.node)

    # Scheduler

    @property
    def _planning(self) -> Scheduler:
        assert self._scheduler is not None, "a scheduler's method was called on a worker's connector"
        return self._scheduler

    def on_new_request(self, request: Any) -> None:
        self._planning.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._planning.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._planning.update_state_after_alloc(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        return Step(*self._planning.build(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        self._planning.reported()

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._planning.request_finished(request)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._planning.request_finished(request)

    def take_events(self) -> Iterable[Any]:
        from dynamo_kvtc.adapters.connector.vllm_events import events_of

        return events_of(self._planning.take_events(), self._planning.block_tokens)

    def reset_cache(self) -> bool:
        self._planning.reset()
        return True
