"""vLLM's OffloadingConnector that also says which pages a load could not fill."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector

from dynamo_kvtc.adapters.vllm.worker import Worker
from dynamo_kvtc.errors import ConfigError


class KvtcOffloadingConnector(OffloadingConnector):
    """Refuses a failure policy that would end requests."""

    def __init__(self, vllm_config: Any, *others: Any, **named: Any) -> None:
        policy = vllm_config.kv_transfer_config.kv_load_failure_policy
        if policy != "recompute":
            raise ConfigError(
                f"kv_load_failure_policy is {policy!r}: a block that cannot be loaded would end its request with an "
                "error; set it to 'recompute' in --kv-transfer-config"
            )
        super().__init__(vllm_config, *others, **named)

    def register_kv_caches(self, kv_caches: Any) -> None:
        super().register_kv_caches(kv_caches)
        worker = self._kvtc_worker
        if worker is not None:
            worker.report_failures()

    def get_block_ids_with_load_errors(self) -> set[int]:
        worker = self._kvtc_worker
        return set() if worker is None else worker.take_failed_blocks()

    @property
    def _kvtc_worker(self) -> Worker | None:
        side = self.connector_worker
        return side.worker if side is not None and isinstance(side.worker, Worker) else None
