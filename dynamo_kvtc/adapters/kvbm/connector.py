"""vLLM's connector: KVBM's Rust leader on the scheduler's side, our worker on the other.

    --kv-transfer-config '{"kv_connector": "DynamoConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "dynamo_kvtc.adapters.kvbm", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"artifact": "model.safetensors", "point": "16"}}'

Budgets are KVBM's own: DYN_KVBM_CPU_CACHE_GB, DYN_KVBM_DISK_CACHE_GB, DYN_KVBM_DISK_CACHE_DIR (budget.py). The other
options are in options.py. A GB holds as many more blocks as the records are smaller.

It is a subclass of KVBM's connector and has its name, because Dynamo and PdConnector ask for both.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

from dynamo_kvtc.adapters.engine_model import check_no_windows, check_one_group, layer_index
from dynamo_kvtc.adapters.kvbm._compat import endpoints, require_kvbm
from dynamo_kvtc.adapters.kvbm.mover import MoverContext, find_factory
from dynamo_kvtc.adapters.kvbm.options import parse_options
from dynamo_kvtc.adapters.kvbm.step import decode_step, preempted_of
from dynamo_kvtc.adapters.kvbm.worker import KvbmWorker
from dynamo_kvtc.errors import ConfigError

VERSION = require_kvbm()

# kvbm comes after the question whether it is the right one.
from kvbm.vllm_integration.connector.dynamo_connector import (  # noqa: E402
    DynamoConnector as KvbmDynamoConnector,
)
from kvbm.vllm_integration.connector.dynamo_connector import (  # noqa: E402
    DynamoConnectorMetadata as KvbmMetadata,
)

from dynamo_kvtc.adapters.kvbm.leader import Leader  # noqa: E402
from dynamo_kvtc.adapters.kvbm.stats import TierPromMetrics, TierStats  # noqa: E402

log = logging.getLogger(__name__)

_local_workers: list[KvbmWorker] = []
"""Workers of this process: the leader's Python must not hold the GIL before they have answered."""
_local_lock = threading.Lock()


class DynamoConnectorMetadata(KvbmMetadata):
    """KVBM's metadata as it is, and ours beside it."""

    def __init__(self, metadata: bytes, ours: bytes) -> None:
        super().__init__(metadata)
        self.ours = ours


class DynamoConnector(KvbmDynamoConnector):
    """Refuses, at start: unknown options, a failure policy that ends requests, models with several cache groups."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        # Not KVBM's own __init__: it would build KVBM's Rust worker.
        KVConnectorBase_V1.__init__(self, vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        config = vllm_config.kv_transfer_config
        self.engine_id = config.engine_id
        self._options = parse_options(config.kv_connector_extra_config)
        if config.kv_load_failure_policy != "recompute":
            raise ConfigError(
                f"kv_load_failure_policy is {config.kv_load_failure_policy!r}: a block that cannot be loaded would end "
                f"its request with an error; set it to 'recompute' in --kv-transfer-config"
            )
        groups = getattr(kv_cache_config, "kv_cache_groups", None)
        if groups is not None:
            check_one_group(len(groups))
            check_no_windows(groups)
        self._scheduler: Leader | None = None
        self._worker: KvbmWorker | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = Leader(vllm_config, self.engine_id, self._wait_for_local_workers)

    def _wait_for_local_workers(self) -> None:
        with _local_lock:
            workers = list(_local_workers)
        for worker in workers:
            worker.wait_ready(self._options.handshake_seconds)

    # Scheduler

    @property
    def _leader(self) -> Leader:
        assert self._scheduler is not None, "a scheduler's method was called on a worker's connector"
        return self._scheduler

    def build_connector_meta(self, scheduler_output: Any) -> DynamoConnectorMetadata:
        return DynamoConnectorMetadata(*self._leader.build_metadata(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        self._leader.workers_reported(
            set(connector_output.finished_recving or ()), set(connector_output.invalid_block_ids or ())
        )

    # Worker

    @property
    def _moving(self) -> KvbmWorker:
        assert self._worker is not None, "register_kv_caches has not been called"
        return self._worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._worker is not None:
            raise ConfigError("register_kv_caches was called twice; this connector keeps one set of pages")
        config = self._vllm_config
        parallel = config.parallel_config
        context = MoverContext(
            kv_caches=dict(sorted(kv_caches.items(), key=lambda item: layer_index(item[0]))),
            device_blocks=int(self._kv_cache_config.num_blocks),
            block_tokens=int(config.cache_config.block_size),
            rank=int(parallel.rank),
            world_size=int(parallel.world_size),
            options=self._options.mover_options,
            engine_config=config,
        )
        # Not before: vLLM's CPU worker cannot start in a process that has imported numba.
        factory = find_factory(self._options.mover)
        worker = KvbmWorker(endpoints(), context.device_blocks, factory(context), self._options)
        with _local_lock:
            _local_workers.append(worker)
        worker.start()
        self._worker = worker
        log.info("worker %d of KVBM %s's leader, %d device blocks", context.rank, VERSION, context.device_blocks)

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        # Before this step writes into their blocks; the step itself is bound after.
        if preempted := preempted_of(kv_connector_metadata.ours):
            self._moving.drop_stores(preempted)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        KVConnectorBase_V1.bind_connector_metadata(self, connector_metadata)
        if self._worker is not None:
            self._worker.begin_step(decode_step(connector_metadata.metadata, connector_metadata.ours))

    def clear_connector_metadata(self) -> None:
        KVConnectorBase_V1.clear_connector_metadata(self)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.release_loads()

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: under full CUDA graphs it is not called, so stores wait for wait_for_save."""

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.release_stores()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._worker is None:
            return None, None
        stored, loaded = self._worker.take_finished()
        return stored or None, loaded or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_load_errors() if self._worker is not None else set()

    def get_kv_connector_stats(self) -> TierStats | None:
        take = None if self._worker is None else getattr(self._worker.mover, "take_stats", None)
        return None if take is None else TierStats.of(take())

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> TierStats:
        return TierStats(data)

    @classmethod
    def build_prom_metrics(cls, *what: Any, **named: Any) -> TierPromMetrics:
        return TierPromMetrics(*what, **named)

    def shutdown(self) -> None:
        if self._worker is not None:
            with _local_lock:
                if self._worker in _local_workers:
                    _local_workers.remove(self._worker)
            self._worker.shutdown()
