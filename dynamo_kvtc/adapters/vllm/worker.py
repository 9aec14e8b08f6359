"""The worker's side: jobs of blocks to the tier, and their ends back to vLLM."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection

from vllm.v1.kv_offload.base import GPULoadStoreSpec, OffloadingWorker, TransferResult

from dynamo_kvtc.adapters.vllm.manager import LoadPromises, StoreKeys
from dynamo_kvtc.adapters.vllm.shared import Shared, engines
from dynamo_kvtc.errors import EngineProtocolError, EngineTimeoutError
from dynamo_kvtc.tier.transcode import Block

WAIT_SECONDS = 60.0
"""How long vLLM may be kept from reusing pages that a transfer is still working on."""

log = logging.getLogger(__name__)


class Worker(OffloadingWorker):
    def __init__(self, shared: Shared, engine_id: str) -> None:
        assert shared.tier is not None
        self._shared, self._tier, self._engine_id = shared, shared.tier, engine_id
        self._block_tokens = shared.tier.transcoder.block_tokens
        self._ended = threading.Condition()
        self._running: set[int] = set()
        self._results: list[TransferResult] = []
        self._failed_blocks: set[int] = set()

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: StoreKeys) -> bool:
        blocks = self._blocks(src_spec, dst_spec.keys, dst_spec.first_positions)
        began = self._begin(job_id)
        taken = self._tier.store(
            blocks, free=lambda: self._end(job_id, began, len(blocks)), fence=self._tier.fence(), tail=dst_spec.tail
        )
        if not taken:
            self._end(job_id, began, 0)
        return True

    def submit_load(self, job_id: int, src_spec: LoadPromises, dst_spec: GPULoadStoreSpec) -> bool:
        blocks = self._blocks(dst_spec, [p.key for p in src_spec.promises], None)
        began = self._begin(job_id)
        self._count_loads(1)

        def done(failed: Collection[bytes]) -> None:
            missing = set(failed)
            bad = [b.block_id for b in blocks if b.key in missing]
            self._end(job_id, began, len(blocks) - len(bad), bad)
            self._count_loads(-1)

        if not self._tier.load(blocks, done, src_spec.promises, self._tier.fence()):
            for promise in src_spec.promises:
                promise.release()
            done([b.key for b in blocks])
        return True

    def get_finished(self) -> list[TransferResult]:
        with self._ended:
            results, self._results = self._results, []
        return results

    def report_failures(self) -> None:
        """Someone will ask ``take_failed_blocks``."""
        self._shared.takes_failures = True

    def take_failed_blocks(self) -> set[int]:
        """Pages that were to be loaded and are not what they should be: to be computed."""
        with self._ended:
            failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def wait(self, job_ids: Collection[int]) -> None:
        """Raises EngineTimeoutError: to go on would let others write into pages that are still read or written."""
        deadline = time.monotonic() + WAIT_SECONDS
        with self._ended:
            if not self._ended.wait_for(lambda: not self._running & set(job_ids), deadline - time.monotonic()):
                raise EngineTimeoutError(
                    f"transfers {sorted(self._running & set(job_ids))} have not ended after {WAIT_SECONDS:.0f} s"
                )

    def shutdown(self) -> None:
        if not self._tier.close(self._shared.options.close_seconds):
            log.warning("the tier was closed before all that was stored was where it belongs")
        engines.withdraw(self._engine_id, self._shared)

    def _blocks(self, pages: GPULoadStoreSpec, keys: list[bytes], firsts: list[int] | None) -> list[Block]:
        ids = [int(i) for i in pages.block_ids]
        if list(pages.group_sizes) != [len(keys)] or len(ids) != len(keys):
            raise EngineProtocolError(
                f"a job names {len(ids)} pages in groups of {list(pages.group_sizes)} for {len(keys)} records"
            )
        if firsts is None:
            begin = int(pages.block_indices[0]) * self._block_tokens
            firsts = [begin + i * self._block_tokens for i in range(len(keys))]
        return [Block(key, i, first) for key, i, first in zip(keys, ids, firsts, strict=True)]

    def _count_loads(self, change: int) -> None:
        with self._shared.loads_changed:
            self._shared.loads += change
            self._shared.loads_changed.notify_all()

    def _begin(self, job_id: int) -> float:
        with self._ended:
            self._running.add(job_id)
        return time.monotonic()

    def _end(self, job_id: int, began: float, blocks: int, failed: Collection[int] = ()) -> None:
        nbytes = blocks * self._tier.transcoder.raw_block_bytes
        with self._ended:
            self._running.discard(job_id)
            self._failed_blocks.update(failed)
            sound = not failed or self._shared.takes_failures
            self._results.append(TransferResult(job_id, sound, nbytes, time.monotonic() - began))
            self._ended.notify_all()
        if not sound:
            log.error(
                "pages %s were promised and could not be loaded; vLLM's OffloadingConnector cannot take that: use "
                "KvtcOffloadingConnector with kv_load_failure_policy 'recompute'",
                sorted(failed),
            )
