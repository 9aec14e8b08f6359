"""The scheduler's side: KVBM's Rust leader, unchanged, behind KVBM's own Python, with what vLLM does and that Python
does not expect put right before it gets there:

- a request that must not be cached (opt-out, multi-modal, prompt embeddings, a failed load) is not shown to the leader;
- a request that vLLM asks about again in another state (preempted, or its allocation failed and its local hit has
  changed) gets a fresh slot: the leader refuses the first and would answer the second with stale matches;
- a resumed request is shown as a new one, which is what a fresh slot expects;
- blocks that a request already has are not told to the leader twice;
- what the leader matches and could not be loaded before is not loaded again (damaged.py).

Beside KVBM's metadata it keeps each request's device blocks in order, for ``step.encode_ours``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from kvbm import KvbmLeader
from kvbm.vllm_integration.connector_leader import KvConnectorLeader
from kvbm.vllm_integration.consolidator_config import get_consolidator_mode
from kvbm.vllm_integration.rust import KvbmRequest
from kvbm.vllm_integration.rust import KvConnectorLeader as RustLeader

from dynamo_kvtc.adapters.engine_model import opted_out
from dynamo_kvtc.adapters.kvbm.damaged import Damaged
from dynamo_kvtc.adapters.kvbm.step import encode_ours, kvbm_request_ids
from dynamo_kvtc.errors import EngineProtocolError

log = logging.getLogger(__name__)


def _is_hidden(request: Any) -> bool:
    """Whether the leader must not see the request."""
    unhashable = getattr(request, "mm_features", None) or getattr(request, "prompt_embeds", None) is not None
    return bool(unhashable) or opted_out(request.kv_transfer_params, request.request_id)


@dataclasses.dataclass(frozen=True)
class _Loading:
    """A request's blocks that are to be loaded: device ids, in order, and the number of the first in its sequence."""

    request: Any
    first: int
    blocks: list[int]


def _seed(request: Any) -> str:
    """What a request's cache depends on beside its tokens."""
    lora = getattr(request, "lora_request", None)
    return repr((lora.lora_name if lora else None, request.cache_salt))


class Leader(KvConnectorLeader):
    def __init__(self, vllm_config: Any, engine_id: str, wait_for_local_workers: Callable[[], None]) -> None:
        # KVBM's own __init__ builds both Rust objects at once, and the second waits for the workers with the GIL held:
        # a worker in this process could never answer.
        self.drt = None
        self.vllm_config = vllm_config
        self._block_tokens = int(vllm_config.cache_config.block_size)
        leader = KvbmLeader(vllm_config.parallel_config.world_size, drt=None)
        wait_for_local_workers()
        bind, publish, mode = None, None, None
        self._consolidator_output_port = None
        if points := (vllm_config.additional_config or {}).get("consolidator_endpoints"):
            bind, publish, _ = points
            mode = get_consolidator_mode()
            self._consolidator_output_port = int(publish.split(":")[-1])
        self._connector = RustLeader(
            engine_id,
            None,
            self._block_tokens,
            leader,
            consolidator_vllm_endpoint=bind,
            consolidator_output_endpoint=publish,
            consolidator_mode=mode,
        )
        self._tables: dict[str, list[int]] = {}
        """Device blocks of each request the leader knows, from position 0 on."""
        self._asked: dict[str, int] = {}
        """Requests with a slot, and the local hit that their slot was asked with; -1 once they have blocks."""
        self._unseen: set[str] = set()
        """Requests that the leader must not see."""
        self._loading: dict[str, _Loading] = {}
        """What a request waits for; until the engine's workers have reported it."""
        self._damaged = Damaged(self._block_tokens)
        self._new_loads: set[str] = set()
        self._failed: set[str] = set()
        self._cut: set[str] = set()
        """Requests that load fewer blocks than the leader matched."""
        self._finished: set[str] = set()

    # What vLLM's scheduler calls, in the order of a request's life

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        request_id = request.request_id
        if request_id in self._unseen or _is_hidden(request):
            self._unseen.add(request_id)
            return 0, False
        asked = self._asked.get(request_id)
        if asked is not None and asked != num_computed_tokens:
            self._drop(request_id)
        self._asked[request_id] = num_computed_tokens
        self._cut.discard(request_id)
        self._create_slot(request)
        matched, later = self._connector.get_num_new_matched_tokens(
            request_id, request.num_tokens, num_computed_tokens
        )  # fmt: skip
        if not matched or not len(self._damaged):
            return matched, later
        n = self._block_tokens
        first, count = num_computed_tokens // n, matched // n
        kept = self._damaged.cut(_seed(request), request.all_token_ids, first, count)
        if kept == count:
            return matched, later
        # The leader ends the process at a step that computes less than it has matched ("device block overflow"): it may
        # see the load of such a request, and nothing after.
        if not kept:
            self._hide(request_id)
            return 0, False
        self._cut.add(request_id)
        return kept * n, later

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        request_id = request.request_id
        if request_id in self._unseen:
            return
        ids = [int(i) for i in blocks.get_block_ids()[0]]
        if num_external_tokens:
            # The leader takes the last blocks for those to load, but vLLM may have allocated some to look ahead.
            first = self._asked[request_id] // self._block_tokens
            ids = ids[: first + num_external_tokens // self._block_tokens]
            self._loading[request_id] = _Loading(request, first, ids[first:])
            self._new_loads.add(request_id)
        # vLLM names all blocks each time; the leader appends what it is told, and would take the second round's first
        # blocks for those behind the first round's: it then stores other blocks than it says.
        told = self._tables.get(request_id, []) if self._asked[request_id] == -1 else []
        new = ids[len(told) :] if ids[: len(told)] == told else ids
        self._tables[request_id] = told + new
        self._asked[request_id] = -1
        self._connector.update_state_after_alloc(request_id, new, num_external_tokens)

    def build_metadata(self, scheduler_output: Any) -> tuple[bytes, bytes]:
        """KVBM's metadata and ours for this step."""
        shown = self._shown(scheduler_output)
        kvbm = bytes(super().build_connector_meta(shown))
        active = kvbm_request_ids(kvbm)
        if missing := active - self._tables.keys():
            raise EngineProtocolError(f"the leader has operations for requests without blocks: {sorted(missing)}")
        ours = encode_ours(
            {request_id: self._tables[request_id] for request_id in sorted(active)},
            self._block_tokens,
            finished=self._finished,
            preempted=scheduler_output.preempted_req_ids or (),
            loading={request_id: self._loading[request_id].blocks for request_id in sorted(self._new_loads)},
        )
        self._finished = set()
        self._new_loads.clear()
        return kvbm, ours

    def workers_reported(self, loaded: set[str], invalid_blocks: set[int]) -> None:
        """What the workers said of this step. A request whose load failed is recomputed, and forgotten by the leader:
        it would match the same blocks again."""
        if invalid_blocks:
            for request_id, loading in self._loading.items():
                bad = [i for i, block in enumerate(loading.blocks) if block in invalid_blocks]
                if bad:
                    self._failed.add(request_id)
                    request = loading.request
                    self._damaged.note(_seed(request), request.all_token_ids, loading.first + bad[0])
        for request_id in loaded:
            ended = self._loading.pop(request_id, None)
            if ended is not None and request_id not in self._failed:
                request = ended.request
                self._damaged.lift(_seed(request), request.all_token_ids, ended.first, len(ended.blocks))
            if request_id in self._failed or request_id in self._cut:
                self._hide(request_id)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        request_id = request.request_id
        # A request that ends while it waits for its load: vLLM keeps its blocks until the load is reported, and would
        # free them twice if they were kept for the stores as well.
        loading = self._loading.pop(request_id, None) is not None
        has_blocks = self._asked.get(request_id) == -1
        held = self._drop(request_id)
        self._unseen.discard(request_id)
        self._failed.discard(request_id)
        self._cut.discard(request_id)
        if not has_blocks or loading or not held:
            return False, None
        self._finished.add(request_id)
        return True, None

    def reset_cache(self) -> bool:
        self._damaged.clear()
        return bool(super().reset_cache())

    # Inside

    def _hide(self, request_id: str) -> None:
        """The leader forgets the request and hears no more of it."""
        self._failed.discard(request_id)
        self._cut.discard(request_id)
        self._drop(request_id)
        self._unseen.add(request_id)

    def _drop(self, request_id: str) -> bool:
        """Whether the leader says that the request's device blocks are still in use."""
        blocks = self._tables.pop(request_id, [])
        self._asked.pop(request_id, None)
        if not self._connector.has_slot(request_id):
            return False
        return bool(self._connector.request_finished(request_id, blocks))

    def _create_slot(self, request: Any) -> None:
        if self._connector.has_slot(request.request_id):
            return
        lora = getattr(request, "lora_request", None)
        # KVBM calls lora_name, which is a string.
        slot = KvbmRequest(
            request_id=request.request_id, lora_name=lora.lora_name if lora else None, salt_hash=request.cache_salt
        )
        self._connector.create_slot(slot, request.all_token_ids)

    def _shown(self, output: Any) -> Any:
        """The step without unseen requests, resumed requests as new ones; and the block tables brought up to date."""
        cached = output.scheduled_cached_reqs
        new = [r for r in output.scheduled_new_reqs if r.req_id in self._asked]
        for request in new:
            self._tables[request.req_id] = [int(i) for i in request.block_ids[0]]
        kept = []
        for i, request_id in enumerate(cached.req_ids):
            if request_id not in self._asked:
                continue
            added = cached.new_block_ids[i]
            if request_id in cached.resumed_req_ids:
                self._tables[request_id] = [int(b) for b in added[0]]
                new.append(self._as_new(request_id, added, cached.num_computed_tokens[i]))
                continue
            if added is not None:
                self._tables[request_id].extend(int(b) for b in added[0])
            kept.append(i)
        if len(kept) == len(cached.req_ids) and len(new) == len(output.scheduled_new_reqs):
            return output
        ids = {r.req_id for r in new} | {cached.req_ids[i] for i in kept}
        scheduled = {r: n for r, n in output.num_scheduled_tokens.items() if r in ids}
        some = SimpleNamespace(
            req_ids=[cached.req_ids[i] for i in kept],
            resumed_req_ids=set(),
            new_token_ids=[cached.new_token_ids[i] for i in kept] if cached.new_token_ids else [],
            new_block_ids=[cached.new_block_ids[i] for i in kept],
            num_computed_tokens=[cached.num_computed_tokens[i] for i in kept],
        )
        return dataclasses.replace(
            output,
            scheduled_new_reqs=new,
            scheduled_cached_reqs=some,
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=sum(scheduled.values()),
        )

    def _as_new(self, request_id: str, blocks: Any, computed: int) -> Any:
        # The slot has its tokens since it was created; the leader does not read these.
        return SimpleNamespace(req_id=request_id, prompt_token_ids=[], block_ids=blocks, num_computed_tokens=computed)
