"""Conversations over a tier as an engine holds them, from several threads; every block that comes back is looked at."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.codec.policy import ExactPolicy
from dynamo_kvtc.tier.tier import Tier
from dynamo_kvtc.tier.transcode import Block
from tests.builders import random_kv, same_bits
from tests.threads import hammer
from tests.tier.parts import BLOCK_TOKENS, POISON, Answer, Engine

ANSWER_SECONDS = 60.0
"""No wait may take longer, whatever is broken."""
SHARED_BLOCKS = 2
"""What all conversations of a variant begin with."""
TAIL_BLOCKS = 2


class World:
    """Content of some variants, and what each of its blocks may come back as: as it was, or as the codec has it."""

    def __init__(self, seed: int, pages: int = 48, variants: int = 3, blocks: int = 12) -> None:
        self.engine = Engine(seed, pages)
        self.variants, self.blocks = variants, blocks
        self._whole = [random_kv(self.engine.artifact, blocks * BLOCK_TOKENS, seed + 1 + n) for n in range(variants)]

    @cached_property
    def _coded(self) -> list[tuple[Tensor, Tensor]]:
        codec, out = BlockCodec(self.engine.artifact, "fine", ExactPolicy()), []
        for k, v in self._whole:
            records = codec.encode_blocks(k, v, torch.arange(k.shape[2]), block_tokens=BLOCK_TOKENS)
            out.append(codec.decode_blocks([r.record for r in records])[:2])
        return out

    def keys(self, tier: Tier, name: int, blocks: int) -> list[bytes]:
        shared = f"variant {name % self.variants}"
        return [
            tier.key(f"{shared if i < SHARED_BLOCKS else name}/{i}".encode().ljust(32)) for i in range(blocks)
        ]  # fmt: skip

    def compute(self, name: int, at: Sequence[tuple[int, int]]) -> None:
        """Writes blocks into pages: (block of the conversation, page)."""
        if at:
            rows = [_rows(self._whole[name % self.variants], i) for i, _ in at]
            self.engine.pages.write([page for _, page in at], *(torch.cat([r[x] for r in rows], 2) for x in (0, 1)))

    def right(self, name: int, block: int, page: int, exact: bool = False) -> bool:
        got = self.engine.pages.read([page])
        known = (self._whole,) if exact else (self._whole, self._coded)
        return any(_same(got, _rows(x[name % self.variants], block)) for x in known)

    def untouched(self, page: int) -> bool:
        k, v = self.engine.pages.read([page])
        return bool((k == POISON).all() and (v == POISON).all())


class Client:
    """One thread's conversations, in pages of its own. counts: what the tier's counters are to agree with."""

    def __init__(self, world: World, tier: Tier, pages: Sequence[int], seed: int, sessions: int, exact: bool) -> None:
        self._world, self._tier, self._pages, self._exact = world, tier, list(pages), exact
        self._rng, self._sessions = random.Random(seed), sessions
        self.counts: Counter[str] = Counter()
        self.slowest_call = 0.0

    def turn(self) -> None:
        rng, tier, world = self._rng, self._tier, self._world
        name, length = rng.randrange(self._sessions), rng.randint(1, world.blocks)
        pages = rng.sample(self._pages, length)
        keys = world.keys(tier, name, length)
        self.counts["turns"] += 1
        world.engine.wipe(pages)
        here = self._restore(name, keys[: len(self._timed(tier.lookup, keys))], pages)
        world.compute(name, [(i, page) for i, page in enumerate(pages) if i not in here])
        self.counts["offered"] += length
        chosen = [i for i, yes in enumerate(self._timed(tier.admit, keys, length * BLOCK_TOKENS)) if yes]
        # A decoded block coded again may differ in its record, and is not what is to be looked for later.
        world.compute(name, [(i, pages[i]) for i in chosen if i in here])
        self._timed(tier.moved_on, keys[: length - TAIL_BLOCKS])
        if chosen:
            done, free = Answer(), Answer()
            blocks = [Block(keys[i], pages[i], i * BLOCK_TOKENS) for i in chosen]
            if self._timed(tier.store, blocks, done, free, tier.fence(), keys[length - TAIL_BLOCKS :]):
                free.get(ANSWER_SECONDS)
                self.counts["taken"] += len(chosen)
                if rng.random() < 0.3:
                    self.counts["not_stored"] += len(done.get(ANSWER_SECONDS))
        self._now_and_then(keys)

    def _restore(self, name: int, keys: list[bytes], pages: Sequence[int]) -> set[int]:
        """Which blocks are in their pages now."""
        rng, tier = self._rng, self._tier
        if not keys:
            return set()
        blocks = [Block(key, page, i * BLOCK_TOKENS) for i, (key, page) in enumerate(zip(keys, pages, strict=False))]
        how, done = rng.random(), Answer()
        if how < 0.1:
            if tier.load(blocks, done, deadline=time.monotonic() - 1):
                assert set(done.get(ANSWER_SECONDS)) == set(keys)
                assert all(self._world.untouched(b.block_id) for b in blocks)
                self.counts["load"] += len(blocks)
            return set()
        promises = None
        if how < 0.7:
            answer = Answer()
            if not self._timed(tier.promise, keys, answer):
                return set()
            self.counts["asked"] += len(keys)
            found = answer.get(ANSWER_SECONDS)
            if how < 0.2:  # the request is aborted
                for promise in found.values():
                    promise.release()
                return set()
            blocks = [b for b in blocks if b.key in found]
            promises = [found[b.key] for b in blocks]
        else:
            self.counts["asked"] += len(keys)
        if not blocks:
            return set()
        if not self._timed(tier.load, blocks, done, promises, tier.fence()):
            for promise in promises or ():
                promise.release()
            if promises is None:
                self.counts["asked"] -= len(keys)
            return set()
        failed = set(done.get(ANSWER_SECONDS))
        self.counts["load"] += len(blocks)
        self.counts["load_failed"] += len(failed)
        good = [b for b in blocks if b.key not in failed]
        for b in good:
            block = b.first_position // BLOCK_TOKENS
            assert self._world.right(name, block, b.block_id, self._exact), f"{name}/{block} is wrong"
        return {b.first_position // BLOCK_TOKENS for b in good}

    def _now_and_then(self, keys: list[bytes]) -> None:
        what = self._rng.random()
        if what < 0.002:
            self._timed(self._tier.clear)
        elif what < 0.01:
            self._timed(self._tier.forget, keys[-1:])
        elif what < 0.02:
            self._timed(self._tier.touch, keys)

    def _timed(self, call, *what):
        """Of a call on the engine's thread: it must never wait for anything."""
        began = time.monotonic()
        try:
            return call(*what)
        finally:
            self.slowest_call = max(self.slowest_call, time.monotonic() - began)


class Traffic:
    """Two clients over a tier. exact: blocks must come back bit for bit."""

    def __init__(self, world: World, tier: Tier, seed: int, sessions: int = 30, exact: bool = False) -> None:
        self.tier, half = tier, world.engine.blocks // 2
        pages = range(world.engine.blocks)
        self.clients = [
            Client(world, tier, part, seed + i, sessions, exact) for i, part in enumerate((pages[:half], pages[half:]))
        ]

    def run(self, seconds: float, turns: int = 1 << 30) -> None:
        """Until the seconds are over or each client has had its turns. Raises what is wrong."""
        end = time.monotonic() + seconds

        def work(number: int) -> None:
            for _ in range(turns):
                if time.monotonic() > end:
                    return
                self.clients[number].turn()

        hammer(work, len(self.clients), seconds + 3 * ANSWER_SECONDS)

    def behind(self) -> threading.Thread:
        """Runs beside the test until the tier is closed; a failure ends up in ``failure``."""
        self.failure: BaseException | None = None

        def work() -> None:
            try:
                while not self.tier.closed:
                    self.run(0.2)
            except BaseException as exc:
                self.failure = exc

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    def counted(self) -> Counter[str]:
        return sum((client.counts for client in self.clients), Counter())

    def check_at_rest(self, faults: bool = False) -> None:
        """Counters balance and nobody holds anything. faults: threads raised, so lookups were not all counted."""
        assert self.tier.flush(ANSWER_SECONDS), "the tier does not come to rest"
        told, m = self.counted(), self.tier.metrics
        stored = {
            name: m.value("kvtc_stored_blocks", name)
            for name in ("stored", "known", "not_admitted", "queue_full", "no_room", "failed")
        }
        assert sum(stored.values()) == told["offered"], (stored, told)
        loaded = {name: m.value("kvtc_loaded_blocks", name) for name in ("loaded", "failed")}
        assert sum(loaded.values()) == told["load"], (loaded, told)
        if not faults:
            tiers = (("hit", "host"), ("hit", "disk"), ("miss", "host"), ("miss", "disk"), ("miss", "none"))
            asked = {labels: m.value("kvtc_lookup_blocks", *labels) for labels in tiers}
            assert sum(asked.values()) == told["asked"], (asked, told)
        check_nothing_is_held(self.tier)


def check_nothing_is_held(tier: Tier) -> None:
    """No lease, no reservation, no queued work; the stores' books agree with themselves."""
    assert not tier._coming
    assert tier._encode.waiting_cost == tier._load.waiting_cost == 0
    host, disk = tier._store.host, tier._store.disk
    shelves = [] if host is None else [host._shelf]
    if host is not None:
        host.stats()  # sweeps what was collected
    if disk is not None and not tier.closed:  # the writer of a closed one gives no more room back
        assert not disk._queue.pending
        assert disk._queue.pending_bytes == 0
        shelves.append(disk._queue.shelf)
    for shelf in shelves:
        assert not any(shelf.pins), "a lease is left"
        held = sum(shelf.units(shelf.nbytes[slot]) for slot in shelf.slots.values())
        assert held * shelf.unit_bytes == shelf.used_bytes, "room is lost"
        assert sum(shelf.nbytes[s] * shelf.spare[s] for s in shelf.slots.values()) == shelf.spare_bytes


def _rows(kv, block: int):
    at = slice(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)
    return [x[:, :, at] for x in kv]


def _same(a, b) -> bool:
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))
