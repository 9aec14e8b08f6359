"""The scheduler's side: which blocks of a request are loaded, from whom, and which are stored.

A block's key is of its hash, which is chained over the tokens before it, so a prefix is held where its keys are. What
is matched here is a hope: a record may be gone or damaged when its turn comes, then its block is computed after all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dynamo_kvtc.adapters.connector.cluster import Remote
from dynamo_kvtc.adapters.connector.loads import LoadOrder
from dynamo_kvtc.adapters.connector.node import Node
from dynamo_kvtc.adapters.connector.options import LAYERWISE
from dynamo_kvtc.adapters.connector.params import Wish, params_of, wish_of
from dynamo_kvtc.adapters.connector.router import Named
from dynamo_kvtc.adapters.engine_model import EMPTY_STEP_SECONDS
from dynamo_kvtc.ops.pages.cache import NO_PAGE
from dynamo_kvtc.tier.transcode import Block

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreOrder:
    """Blocks of one request that this step completes. number: of the order, with the node."""

    request: str
    blocks: list[Block]
    number: int


@dataclass
class Match:
    """Blocks from ``first`` on: remote's are pulled, the others are in the tier."""

    first: int
    keys: list[bytes]
    remote: dict[bytes, Remote]


@dataclass
class _State:
    """keys: of its blocks, as far as they were asked for; pages: of its blocks, in each cache group; next_store: the
    first block that was not offered yet; handed: what its prefill worker has (None: it has not answered)."""

    request: Any
    wish: Wish
    keys: list[bytes] = field(default_factory=list)
    pages: list[list[int]] = field(default_factory=list)
    match: Match | None = None
    next_store: int = 0
    refused: bool = False
    asked: bool = False
    handed: list[Remote] | None = None
    give_up: float = 0.0


class Scheduler:
    """Its methods are vLLM's hooks of the same names. Never waits, but for EMPTY_STEP_SECONDS."""

    def __init__(self, node: Node, block_tokens: int, engine_id: str) -> None:
        self._node, self._n, self._engine_id = node, block_tokens, engine_id
        self._layerwise = node.options.load == LAYERWISE
        self._states: dict[str, _State] = {}
        self._orders: dict[str, LoadOrder] = {}
        self._read: dict[int, int] = {}
        """Where a model has windows: pages that stores read, and the store's number."""

    def on_new_request(self, request: Any) -> None:
        wish = wish_of(request.kv_transfer_params, request.request_id)
        self._states[request.request_id] = _State(request, wish)

    def matched_tokens(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """Beyond the computed ones; None: not known yet."""
        state = self._state(request)
        if state.wish.off or state.refused:
            return 0, False
        # One token at least is computed, for it gives the next one. Of a whole load vLLM sees to that itself, but takes
        # the window's pages to be those of the token after.
        less = self._layerwise or bool(self._node.groups.window)
        end = min((request.num_tokens - less) // self._n, len(request.block_hashes))
        keys = self._keys(state, end)[computed // self._n :]
        if not keys:
            return 0, False
        if state.wish.worker is not None and not self._asked(state):
            return None, False
        match = self._match(state, keys, computed)
        state.match = match
        found = len(match.keys) * self._n
        return found, bool(found) and not self._layerwise

    def update_state_after_alloc(self, request: Any, block_ids: Sequence[Sequence[int]], external: int) -> None:
        state = self._state(request)
        match, state.match = state.match, None
        if not external or match is None:
            return
        count = external // self._n
        pages = self._node.groups.pages(block_ids)
        blocks = [self._block(key, pages, i) for i, key in enumerate(match.keys[:count], match.first)]
        self._node.tier.touch([b.key for b in blocks if b.key not in match.remote])
        # What no layer looks at any more need not come.
        blocks = [b for b in blocks if b.block_id != NO_PAGE]
        remote = {b.key: match.remote[b.key] for b in blocks if b.key in match.remote}
        self._orders[request.request_id] = LoadOrder(request.request_id, blocks, remote, self._layerwise)
        # They are in the tier, or on their way into it.
        state.next_store = match.first + count
        if self._node.router.on:
            for i in range(match.first, match.first + count):
                self._name(state, i)

    def build(self, output: Any) -> tuple[list[LoadOrder], list[StoreOrder], set[int]]:
        """Of this step: loads to begin, blocks to store when it is computed, and stores before it that must have read
        their pages, because others have these now."""
        loads, self._orders = list(self._orders.values()), {}
        stores = []
        before, gone = self._node.storing(), set(output.preempted_req_ids or ())
        awaited = {number for number, rid in before.items() if rid in gone}
        windows = bool(self._node.groups.window)
        # What a window has left behind is another's when the engine says so, and only then.
        self._read = {page: number for page, number in self._read.items() if number in before}
        awaited |= self._readers(page for load in loads for b in load.blocks for page in (b.block_id, *b.others))
        for rid, block_ids, computed, fresh in _rows(output):
            state = self._states.get(rid)
            new = self._node.groups.pages(block_ids) if block_ids else []
            # Of all of a request's pages the first are found, or were looked at when their load was ordered.
            written = computed // self._n if fresh else 0
            awaited |= self._readers(page for pages in new for page in pages[written:])
            if state is None:
                continue
            if fresh:
                state.pages = []
                if rid not in {order.request for order in loads} and computed == 0:
                    state.next_store = 0
            if new:
                have = state.pages or [[] for _ in new]
                state.pages = [old + more for old, more in zip(have, new, strict=True)]
            blocks = self._stores(state, computed, output.num_scheduled_tokens[rid])
            if blocks:
                stores.append(StoreOrder(rid, blocks, self._node.store_ordered(rid)))
        if windows:
            self._read |= {page: x.number for x in stores for b in x.blocks for page in (b.block_id, *b.others)}
        if not output.total_num_scheduled_tokens and not loads:
            self._wait_a_little()
        return loads, stores, awaited

    def reported(self) -> None:
        """The worker has told what became of a step's loads, and what of its stores it left out."""
        for rid in self._node.take_failed():
            state = self._states.get(rid)
            if state is not None:
                # Once is enough: it is computed, and what was computed is offered to be stored.
                state.refused = True
                state.next_store = 0
        for rid, position in self._node.take_not_stored():
            state = self._states.get(rid)
            if state is not None:
                state.next_store = min(state.next_store, position // self._n)

    def request_finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:
        """Whether its pages are still read, and what the worker that decodes it is told."""
        state = self._states.pop(request.request_id, None)
        self._orders.pop(request.request_id, None)
        busy = self._node.finish(request.request_id)
        if state is None or not state.wish.handed_on or self._node.cluster is None:
            return busy, None
        if request.status.name in ("FINISHED_ABORTED", "FINISHED_ERROR"):
            return busy, None
        blocks = min(request.num_prompt_tokens // self._n, len(request.block_hashes))
        return busy, params_of(self._node.cluster.worker, blocks, self._engine_id)

    @property
    def block_tokens(self) -> int:
        return self._n

    def take_events(self) -> list[tuple[Named, str, bool]]:
        return self._node.router.take()

    def reset(self) -> None:
        self._node.tier.clear()
        self._node.router.forget()

    def _state(self, request: Any) -> _State:
        if request.request_id not in self._states:
            self.on_new_request(request)
        return self._states[request.request_id]

    def _keys(self, state: _State, end: int) -> list[bytes]:
        hashes = state.request.block_hashes
        for i in range(len(state.keys), min(end, len(hashes))):
            state.keys.append(self._node.tier.key(bytes(hashes[i])))
        return state.keys[:end]

    def _asked(self, state: _State) -> bool:
        """Whether the prefill worker's answer is here, or is not waited for any longer."""
        cluster = self._node.cluster
        if cluster is None or state.wish.worker == cluster.worker:
            state.handed = []
            return True
        if not state.asked:
            state.asked = True
            state.give_up = time.monotonic() + self._node.options.handoff_seconds + 1.0
            keys = state.keys[: state.wish.blocks]

            def told(found: list[Remote]) -> None:
                state.handed = found
                self._node.change()

            assert state.wish.worker is not None
            cluster.ask_holder(state.wish.worker, keys, told)
        if state.handed is None and time.monotonic() > state.give_up:
            state.handed = []
        return state.handed is not None

    def _match(self, state: _State, keys: Sequence[bytes], computed: int) -> Match:
        """The longest prefix of keys that is here or elsewhere."""
        tier, cluster = self._node.tier, self._node.cluster
        handed = dict(zip(state.keys, state.handed or (), strict=False))
        remote: dict[bytes, Remote] = {}
        at = nbytes = 0
        most = 0 if cluster is None else cluster.most_bytes
        while at < len(keys):
            here = tier.lookup(keys[at:])
            # Asked once: an answer is counted, and one in some is another.
            worth = tier.worth(here)
            at += len(here) if worth else 0
            if at == len(keys) or cluster is None or (here and not worth):
                break
            found = self._elsewhere(keys[at:], handed)
            before = at
            for key, told in zip(keys[at:], found, strict=False):
                if nbytes + told.size > most or tier.lookup([key]):
                    break
                remote[key] = told
                nbytes += told.size
                at += 1
            if at == before:
                break
        return Match(computed // self._n, list(keys[:at]), remote)

    def _elsewhere(self, keys: Sequence[bytes], handed: Mapping[bytes, Remote]) -> list[Remote]:
        """What the prefill worker said, and who else has the same; without it the index alone."""
        assert self._node.cluster is not None
        index = self._node.cluster.longest_prefix(keys)
        out = []
        for i, key in enumerate(keys):
            told = handed.get(key)
            if told is None:
                if i >= len(index):
                    break
                out.append(index[i])
                continue
            others = index[i].holders if i < len(index) and index[i].size == told.size else ()
            out.append(Remote(told.size, (*told.holders, *(h for h in others if h not in told.holders))))
        return out

    def _readers(self, pages: Iterable[int]) -> set[int]:
        """Stores that may still read pages that are given to others now."""
        return {self._read[page] for page in pages if page in self._read} if self._read else set()

    def _block(self, key: bytes, pages: Sequence[Sequence[int]], i: int) -> Block:
        return Block(key, pages[0][i], i * self._n, others=tuple(group[i] for group in pages[1:]))

    def _stores(self, state: _State, computed: int, scheduled: int) -> list[Block]:
        """The blocks that are whole once what is scheduled is computed, and are to be stored."""
        request, tier, window = state.request, self._node.tier, self._node.groups.window
        have = min(map(len, state.pages), default=0)
        end = min((computed + scheduled) // self._n, len(request.block_hashes), have)
        first, state.next_store = state.next_store, max(state.next_store, end)
        if state.wish.off or first >= end:
            return []
        # Of blocks before this a window may have taken pages; they are used all the same.
        held = max(0, computed - window + 1) // self._n if window else 0
        keys = self._keys(state, end)[first:]
        admitted = tier.admit(keys, request.num_tokens, wanted=state.wish.handed_on)
        blocks = []
        for i, (key, yes) in enumerate(zip(keys, admitted, strict=True), first):
            if self._node.router.on:
                self._name(state, i)
            block = self._block(key, state.pages, i)
            if yes and i >= held and NO_PAGE not in (block.block_id, *block.others):
                blocks.append(block)
        return blocks

    def _name(self, state: _State, i: int) -> None:
        hashes, tokens = state.request.block_hashes, state.request.all_token_ids
        parent = bytes(hashes[i - 1]) if i else None
        named = Named(bytes(hashes[i]), parent, tuple(tokens[i * self._n : (i + 1) * self._n]))
        self._node.router.name(state.keys[i], named)

    def _wait_a_little(self) -> None:
        asking = any(s.asked and s.handed is None for s in self._states.values())
        if asking or self._node.loading:
            self._node.wait_change(EMPTY_STEP_SECONDS)


def _rows(output: Any) -> list[tuple[str, Sequence[Sequence[int]], int, bool]]:
    """(request, its new pages in each cache group, tokens computed before this step, whether its pages are all new)."""
    rows = [(r.req_id, r.block_ids, r.num_computed_tokens, True) for r in output.scheduled_new_reqs]
    cached = output.scheduled_cached_reqs
    for i, rid in enumerate(cached.req_ids):
        new = cached.new_block_ids[i] or ()
        rows.append((rid, new, cached.num_computed_tokens[i], rid in cached.resumed_req_ids))
    return rows
