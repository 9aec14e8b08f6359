"""The scheduler's side: which blocks are offered for loading, and which are stored.

A block is a HIT once its record has been read and found sound, off the scheduler's thread, and is held for the request
that asked: so a load that vLLM has been promised can be kept. Until then it is RETRY, and the scheduler asks again in
its next step. What is missing, damaged, too slow to read, or slower to restore than to compute is a MISS.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    LoadStoreSpec,
    LookupResult,
    OffloadingEvent,
    OffloadingManager,
    PrepareStoreOutput,
    RequestOffloadingContext,
)

from dynamo_kvtc.adapters.engine_model import EMPTY_STEP_SECONDS, PREFIX, opted_out
from dynamo_kvtc.adapters.vllm._compat import end_position, end_positions, medium, sequence_tokens
from dynamo_kvtc.adapters.vllm.shared import Shared
from dynamo_kvtc.tier.transcode import Promise

REFRESH_SECONDS = 1.0
ANSWER_SECONDS = 10.0
"""How long a request may wait for its promises: a thread that hangs must not hang it."""
PROMISE_SECONDS = 0.01
"""How long an empty step waits for a promise."""
PROMISED_BYTES = 4 << 30
"""Of memory that promises take; requests beyond it wait for theirs."""

log = logging.getLogger(__name__)


@dataclass
class StoreKeys(LoadStoreSpec):
    """Records to make, and where each block starts in its sequence (None: the worker knows it from the job).
    tail: those within the tier's window at the end of their sequence so far."""

    keys: list[bytes]
    first_positions: list[int] | None
    tail: frozenset[bytes] = frozenset()

    @staticmethod
    def medium() -> str:
        return "KVTC"


@dataclass
class LoadPromises(LoadStoreSpec):
    """Records to load, one per block, already proven sound."""

    promises: list[Promise]

    @staticmethod
    def medium() -> str:
        return "KVTC"


@dataclass
class _Request:
    """names: our keys of vLLM's; wanted: those asked for, not yet submitted; asked: submitted in this turn, no answer
    yet, given up at ``until``; refused: answered no, for good; tail: our key and end of blocks stored as the sequence's
    tail (None: none yet)."""

    off: bool
    names: dict[bytes, bytes] = field(default_factory=dict)
    wanted: dict[bytes, bytes] = field(default_factory=dict)
    asked: dict[bytes, bytes] = field(default_factory=dict)
    promised: dict[bytes, Promise] = field(default_factory=dict)
    refused: set[bytes] = field(default_factory=set)
    tail: dict[bytes, int] | None = None
    missed: bool = False
    gone: bool = False
    turn: int = 0
    until: float = 0.0

    def release(self) -> None:
        for promise in self.promised.values():
            promise.release()
        self.promised.clear()


class Manager(OffloadingManager):
    def __init__(self, shared: Shared, block_tokens: int) -> None:
        assert shared.tier is not None
        self._shared, self._tier, self._block_tokens = shared, shared.tier, block_tokens
        self._lock = threading.Condition()
        # On a CPU the model runs on the scheduler's own thread: a busy machine would make empty steps long.
        self._clock = time.thread_time if self._tier.transcoder.staged_is_free else time.monotonic
        self._step_ended = 0.0
        self._first_asked = 0.0
        self._requests: dict[str, _Request] = {}
        self._waiting = 0
        self._promised_blocks = 0
        self._most_blocks = max(1, PROMISED_BYTES // self._tier.transcoder.held_block_bytes)
        self._refreshed = 0.0

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        with self._lock:
            self._requests.pop(req_context.req_id, None)
        self._request(req_context)
        return RequestOffloadingContext()

    def lookup(self, key: bytes, req_context: Any) -> LookupResult:
        if not self._first_asked:
            self._first_asked = self._clock()
        request = self._request(req_context)
        with self._lock:
            if request.off or key in request.refused:
                return LookupResult.MISS
            if key in request.promised:
                return LookupResult.HIT
            if request.asked and time.monotonic() > request.until:
                self._give_up(request)
                return LookupResult.MISS
            if key in request.wanted or key in request.asked:
                return LookupResult.RETRY
        own = self._own(request, key)
        if not self._tier.lookup([own]):
            if not request.missed:
                request.missed = True
                self._shared.metrics.count("kvtc_lookup_blocks", 1, "miss", "none")
            return LookupResult.MISS
        self._shared.name(own, key)
        with self._lock:
            request.wanted[key] = own
        return LookupResult.RETRY

    def on_schedule_end(self, context: Any) -> None:
        """Once a step, when every waiting request has said what it wants."""
        with self._lock:
            wanting = [r for r in self._requests.values() if r.wanted and not r.asked]
        for request in wanting:
            self._ask(request)
        # What vLLM's own questions take, of a long request many milliseconds, is no model's time.
        if (self._first_asked or self._clock()) - self._step_ended < EMPTY_STEP_SECONDS:
            self._wait_a_little()
        self._step_ended, self._first_asked = self._clock(), 0.0

    def _wait_a_little(self) -> None:
        with self._lock:
            waiting = self._waiting
            if waiting:
                # Longer: each time that vLLM asks again it asks for every block of the request.
                self._lock.wait_for(lambda: self._waiting < waiting, PROMISE_SECONDS)
                return
        with self._shared.loads_changed:
            loads = self._shared.loads
            if loads:
                self._shared.loads_changed.wait_for(lambda: self._shared.loads < loads, EMPTY_STEP_SECONDS)

    def has_pending_work(self) -> bool:
        with self._lock:
            return self._waiting > 0

    def prepare_load(self, keys: Collection[bytes], req_context: Any) -> LoadPromises:
        request = self._request(req_context)
        with self._lock:
            promises = [request.promised.pop(key) for key in keys]
            self._promised_blocks -= len(promises) + len(request.promised)
            # Those before and after the load are not needed.
            request.release()
            request.refused.clear()
        return LoadPromises(promises)

    def touch(self, keys: Collection[bytes], req_context: Any) -> None:
        request = self._request(req_context)
        self._tier.touch([self._own(request, key) for key in keys])

    def prepare_store(self, keys: Collection[bytes], req_context: Any) -> PrepareStoreOutput:
        """Blocks that the queue has no room for are skipped, and counted: a None would be asked for again in every
        step of the request."""
        listed = list(keys)
        request = self._request(req_context)
        if request.off:
            return PrepareStoreOutput([], StoreKeys([], None), [])
        own = [self._own(request, key) for key in listed]
        admitted = self._tier.admit(own, sequence_tokens(req_context))
        chosen = [(key, mine) for key, mine, yes in zip(listed, own, admitted, strict=True) if yes]
        ends = [end_position(req_context, key) for key, _ in chosen]
        firsts = [end - self._block_tokens for end in ends if end is not None]
        if len(firsts) != len(chosen):
            # The job will tell where its first block is, and no more: the blocks must follow each other.
            chosen = _first_run(chosen, admitted)
        if not chosen or not self._tier.has_room(len(chosen)):
            return PrepareStoreOutput([], StoreKeys([], None), [])
        for key, mine in chosen:
            self._shared.name(mine, key)
        positions = firsts if len(firsts) == len(chosen) else None
        tail = self._tail(request, req_context, {mine: end_position(req_context, key) or 0 for key, mine in chosen})
        spec = StoreKeys([mine for _, mine in chosen], positions, tail)
        return PrepareStoreOutput([key for key, _ in chosen], spec, [])

    def _tail(self, request: _Request, context: Any, ends: Mapping[bytes, int]) -> frozenset[bytes]:
        """Of blocks to be stored those within the window; tells the tier which blocks the sequence has grown past."""
        if not self._tier.window:
            return frozenset()
        edge = (sequence_tokens(context) or 0) - self._tier.window
        if request.tail is None:
            # The tail of an earlier turn may be anywhere before this one's.
            request.tail = {}
            self._tier.moved_on(self._tier.key(key) for key, end in end_positions(context).items() if end <= edge)
        passed = [key for key, end in request.tail.items() if end <= edge]
        for key in passed:
            del request.tail[key]
        self._tier.moved_on(passed)
        tail = {key: end for key, end in ends.items() if end > edge and end}
        request.tail |= tail
        return frozenset(tail)

    def on_request_finished(self, req_context: Any) -> None:
        with self._lock:
            request = self._requests.pop(req_context.req_id, None)
            if request is not None:
                if request.asked:
                    self._forget_asked(request)
                request.gone = True
                self._promised_blocks -= len(request.promised)
                request.release()

    def take_events(self) -> Iterable[OffloadingEvent]:
        for key, tier, removed in self._shared.take_events():
            yield OffloadingEvent(keys=[key], medium=medium(tier), removed=removed)

    def reset_cache(self) -> None:
        with self._lock:
            for request in self._requests.values():
                if request.asked:
                    self._forget_asked(request)
                self._promised_blocks -= len(request.promised)
                request.release()
                request.wanted.clear()
                request.refused.clear()
        self._tier.clear()
        self._shared.forget_all()

    def get_stats(self) -> OffloadingConnectorStats | None:
        now = time.monotonic()
        if now - self._refreshed > REFRESH_SECONDS:
            self._refreshed = now
            self._tier.refresh()
        noted = self._shared.take_stats()
        if not noted:
            return None
        stats = OffloadingConnectorStats()
        tell = {"counter": stats.increase_counter, "gauge": stats.set_gauge, "histogram": stats.observe_histogram}
        for kind, name, value, labels in noted:
            tell[kind](PREFIX + name, value, labels)
        return stats

    def shutdown(self) -> None:
        with self._lock:
            for request in self._requests.values():
                request.release()
            self._requests.clear()

    def _request(self, req_context: Any) -> _Request:
        with self._lock:
            found = self._requests.get(req_context.req_id)
            if found is None:
                found = self._requests[req_context.req_id] = _Request(
                    opted_out(req_context.kv_transfer_params, req_context.req_id)
                )
            return found

    def _own(self, request: _Request, key: bytes) -> bytes:
        """Our key of vLLM's, which names the same ones again and again."""
        found = request.names.get(key)
        if found is None:
            found = request.names[key] = self._tier.key(key)
        return found

    def _ask(self, request: _Request) -> None:
        with self._lock:
            if self._promised_blocks and self._promised_blocks + len(request.wanted) > self._most_blocks:
                return
            wanted, request.wanted = request.wanted, {}
        tiers = self._tier.lookup(list(wanted.values()))
        if not tiers or not self._tier.worth(tiers):
            with self._lock:
                request.refused.update(wanted)
            return
        with self._lock:
            request.asked, request.until = wanted, time.monotonic() + ANSWER_SECONDS
            turn = request.turn
            self._waiting += 1
            self._promised_blocks += len(wanted)

        def answered(promises: Mapping[bytes, Promise]) -> None:
            self._answered(request, turn, wanted, promises)

        if not self._tier.promise(list(wanted.values()), answered, prove=not self._shared.takes_failures):
            answered({})

    def _give_up(self, request: _Request) -> None:
        """Its answer, should it come after all, finds nobody. Under the lock."""
        log.warning("%d blocks were not read within %.0f s: they are computed", len(request.asked), ANSWER_SECONDS)
        self._shared.metrics.count("kvtc_errors", 1, "promise_timeout")
        request.refused.update(request.asked)
        self._forget_asked(request)

    def _forget_asked(self, request: _Request) -> None:
        self._promised_blocks -= len(request.asked)
        self._waiting -= 1
        request.asked = {}
        request.turn += 1

    def _answered(
        self, request: _Request, turn: int, wanted: Mapping[bytes, bytes], promises: Mapping[bytes, Promise]
    ) -> None:  # fmt: skip
        """From the tier's thread."""
        with self._lock:
            late = turn != request.turn
            if not late:
                self._waiting -= 1
                self._promised_blocks -= len(wanted)
                request.asked = {}
                self._lock.notify_all()
            if late or request.gone:
                for promise in promises.values():
                    promise.release()
                return
            for key, own in wanted.items():
                if own in promises:
                    request.promised[key] = promises[own]
                    self._promised_blocks += 1
                else:
                    request.refused.add(key)


def _first_run(
    chosen: Sequence[tuple[bytes, bytes]], admitted: Sequence[bool]
) -> list[tuple[bytes, bytes]]:  # fmt: skip
    """Of the chosen, those before the first gap."""
    start = next((i for i, yes in enumerate(admitted) if yes), len(admitted))
    length = next((i for i, yes in enumerate(admitted[start:]) if not yes), len(admitted) - start)
    return list(chosen[:length])
