"""READ FIRST: the facade that engines' adapters call. Nothing here waits for the disk, the codec or a queue.

    store    blocks of the engine's pages -> a bounded queue -> records -> host, and disk
    promise  keys -> records read and found sound, off the engine's thread: what is not, is a miss
    load     promised records (or keys) -> pages
    lookup   how long a prefix is held, and where

A failure is never an exception in the engine: what cannot be stored is not stored, what cannot be read, is damaged, or
comes too late is not loaded, and each is counted in ``metrics``. A block that a load reports as failed may have been
written in part: it must be computed again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from dynamo_kvtc.store.tiered import TieredStore
from dynamo_kvtc.tier.admission import Admission
from dynamo_kvtc.tier.announce import Announcer
from dynamo_kvtc.tier.estimate import Estimate
from dynamo_kvtc.tier.grouped import GroupLoads
from dynamo_kvtc.tier.identity import KeySpace
from dynamo_kvtc.tier.lane import Lane, safely
from dynamo_kvtc.tier.metrics import TierMetrics
from dynamo_kvtc.tier.overlay import Overlay
from dynamo_kvtc.tier.transcode import Block, Promise, Transcoder, release_promises
from dynamo_kvtc.tier.work import Work

_LOOKED_UP = 64
"""Keys that a lookup asks the store for at once."""
LOADS_WAITING = 4096
"""Loads and promises that wait at most; more are refused."""

log = logging.getLogger(__name__)

Failed = Callable[[Collection[bytes]], None]
"""Called once, from any thread, with the keys that failed: empty when all is well."""


class Tier:
    """One rank's. Its parts are built by ``build.open_tier``; ``close`` ends them all."""

    def __init__(
        self, keys: KeySpace, store: TieredStore, transcoder: Transcoder, metrics: TierMetrics,
        admission: Admission | None = None, estimate: Estimate | None = None, queue_bytes: int = 512 << 20,
        overlay: Overlay | None = None, announcer: Announcer | None = None,
    ) -> None:  # fmt: skip
        self.announcer = announcer or Announcer()
        self.announcer.watch(store, metrics)
        self.keys, self.transcoder, self.metrics = keys, transcoder, metrics
        self._store = store
        self._admission, self._estimate = admission or Admission(), estimate or Estimate(None)
        self._overlay = overlay or Overlay(None, keys, metrics, 0, transcoder.raw_block_bytes)
        self._work = Work(store, transcoder, metrics, self._estimate, self._overlay)
        self._encode, self._load = Lane("encode", queue_bytes), Lane("load", LOADS_WAITING)
        self.by_group = None if transcoder.by_group is None else GroupLoads(transcoder.by_group, self._work, self._load)
        self._lock = threading.Lock()
        self._coming: set[bytes] = set()
        self._clears = 0
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def records(self) -> TieredStore:
        """Where they are kept: for whoever serves them, and for what comes from others (``incoming.py``)."""
        return self._store

    @property
    def window(self) -> int:
        """Tokens at a sequence's end that ``store`` may be told of as its tail; 0: it makes nothing of them."""
        return self._overlay.tokens

    def key(self, block_hash: bytes) -> bytes:
        """Of the engine's block hash, which is chained over the tokens before it."""
        return self.keys.key(block_hash)

    def fence(self) -> Any:
        """On the engine's thread: ``store`` and ``load`` come after what it has launched by now."""
        return self.transcoder.fence()

    def lookup(self, keys: Sequence[bytes]) -> list[str]:
        """Of the longest prefix of keys that is held, each block's tier, "host" or "disk"."""
        out: list[str] = []
        # Not all at once: most that are asked for are not here, from the first one on.
        for start in range(0, len(keys), _LOOKED_UP):
            for tier in self._store.tiers_of(keys[start : start + _LOOKED_UP]):
                if tier is None:
                    return out
                out.append(tier)
        return out

    def worth(self, tiers: Sequence[str]) -> bool:
        """Whether restoring blocks that lie there beats computing them; a declined load is counted as such."""
        n = self.transcoder.block_tokens
        if not tiers or self._estimate.worth({t: n * tiers.count(t) for t in set(tiers)}):
            return True
        for tier in set(tiers):
            self.metrics.count("kvtc_lookup_blocks", tiers.count(tier), "declined", tier)
        return False

    def size(self, key: bytes) -> int | None:
        """A record's bytes; 0 while it is being coded, None if it is not here."""
        tier = self._store.tier_of(key)
        found = None if tier is None else self._store.size_of(key, tier)
        if found is None:
            with self._lock:
                return 0 if key in self._coming else None
        return found

    def admit(
        self, keys: Sequence[bytes], sequence_tokens: int | None = None, wanted: bool = False
    ) -> list[bool]:  # fmt: skip
        """Which blocks are to be stored: admitted by policy, not here and not on their way. Each call is a use.
        wanted: somebody is known to want them: policy has no say."""
        admitted = [True] * len(keys) if wanted else self._admission.admit(keys, sequence_tokens)
        known = self._known(keys)
        self.metrics.count("kvtc_stored_blocks", sum(known), "known")
        self.metrics.count(
            "kvtc_stored_blocks", sum(not k and not yes for k, yes in zip(known, admitted, strict=True)), "not_admitted"
        )
        self.touch([key for key, k in zip(keys, known, strict=True) if k])
        return [yes and not k for k, yes in zip(known, admitted, strict=True)]

    def has_room(self, blocks: int) -> bool:
        """Whether the queue takes so many blocks now; what it does not take is counted as refused."""
        if self._encode.has_room(blocks * self.transcoder.raw_block_bytes):
            return True
        self.metrics.count("kvtc_stored_blocks", blocks, "queue_full")
        return False

    def store(
        self, blocks: Sequence[Block], done: Failed | None = None, free: Callable[[], None] | None = None,
        fence: Any = None, tail: Collection[bytes] = (), deadline: float | None = None,
    ) -> bool:  # fmt: skip
        """On the engine's thread. False if refused: the queue is full, or it is closed; then nothing is called.

        free: called once, from any thread, when the pages are no longer read (where they are copied, before this
        returns); done: when the records are where they belong, with the keys of those that are not. tail: keys of the
        blocks within the last ``window`` tokens of their sequence: if there is room for it, a record with every token
        exact is kept beside the coded one, until ``moved_on``. deadline: monotonic seconds after which they are not
        coded any more.
        """
        free, done = safely(free), safely(done)
        if not self.has_room(len(blocks)):
            return False
        more = self._overlay.of(blocks, tail)
        cost = (len(blocks) + len(more)) * self.transcoder.raw_block_bytes
        if not self._encode.has_room(cost):
            cost, more = len(blocks) * self.transcoder.raw_block_bytes, []
        try:
            staged = self.transcoder.stage([*blocks, *more], fence)
        except Exception as exc:
            self._work.store_failed(blocks, exc)
            free()
            done([b.key for b in blocks])
            return True
        with self._lock:
            self._coming.update(b.key for b in blocks)
            clears = self._clears
        early = self.transcoder.staged_is_free

        def run(waited: float) -> None:
            self.metrics.observe("kvtc_queue_seconds", waited, "encode")
            failed = self._work.encode(blocks, staged, lambda: self._clears == clears)
            self._arrived(blocks)
            if not early:
                free()
            done(failed)

        def fail(why: BaseException) -> None:
            self._arrived(blocks)
            self._work.store_failed(blocks, why)
            if not early:
                free()
            done([b.key for b in blocks])

        if not self._encode.put(run, fail, cost, deadline):
            self._arrived(blocks)
            self.metrics.count("kvtc_stored_blocks", len(blocks), "queue_full")
            return False
        if early:
            free()
        return True

    def promise(
        self, keys: Sequence[bytes], done: Callable[[Mapping[bytes, Promise]], None], prove: bool = True
    ) -> bool:  # fmt: skip
        """Reads records and proves them sound; done: called once with those that are. False if refused.

        prove: False if the caller can bear that the load still finds a record bad; on a GPU that costs less."""

        told = safely(done)

        def run(waited: float) -> None:
            self._work.waited(waited)
            told(self._work.promise(keys, prove))

        def fail(why: BaseException) -> None:
            self._work.error(why, "promise")
            told({})

        return self._load.put(run, fail, 1)

    def load(
        self, blocks: Sequence[Block], done: Failed, promises: Sequence[Promise] | None = None, fence: Any = None,
        deadline: float | None = None,
    ) -> bool:  # fmt: skip
        """Into the pages. promises: one per block, released when done; without them the records are read first.
        deadline: monotonic seconds after which it is not begun. False if refused: nothing is called."""

        told = safely(done)

        def run(waited: float) -> None:
            self._work.waited(waited)
            told(self._work.load(blocks, promises, fence))

        def fail(why: BaseException) -> None:
            self._work.error(why, "load")
            self.metrics.count("kvtc_loaded_blocks", len(blocks), "failed")
            release_promises(promises or ())
            told([b.key for b in blocks])

        if self._load.put(run, fail, 1, deadline):
            return True
        self.metrics.count("kvtc_loaded_blocks", len(blocks), "failed")
        return False

    def touch(self, keys: Sequence[bytes]) -> None:
        self._store.touch(keys)

    def forget(self, keys: Sequence[bytes]) -> None:
        """They are not held any more; promises live on."""
        self._overlay.forget(keys)
        for key in keys:
            self._store.remove(key)
            self.announcer.removed(key)

    def moved_on(self, keys: Iterable[bytes]) -> None:
        """These blocks are no tail any more: their sequence was stored past the window. Coded records stay."""
        self._overlay.moved_on(keys)

    def demote(self, pairs: Sequence[tuple[bytes, bytes]], done: Failed) -> bool:
        """Copies host records (first keys) to disk under other keys (second). False if refused."""

        told = safely(done)

        def run(waited: float) -> None:
            told([target for source, target in pairs if not self._work.demote(source, target)])

        def fail(why: BaseException) -> None:
            self._work.error(why, "demote")
            told([target for _, target in pairs])

        return self._load.put(run, fail, 1)

    def clear(self) -> None:
        """Forgets all records, in memory and on disk, and those that are being coded now."""
        with self._lock:
            self._clears += 1
            self._coming.clear()
        self._store.clear()
        self.announcer.cleared()

    def budgets(self) -> dict[str, int]:
        """Bytes of the tiers that there are, "host" and "disk"."""
        tiers = (("host", self._store.host), ("disk", self._store.disk))
        return {name: tier.stats().budget_bytes for name, tier in tiers if tier is not None}

    def refresh(self) -> None:
        """Brings occupancy, evictions and stores' errors in ``metrics`` up to date."""
        tiers = {name: tier.stats() for name, tier in (("host", self._store.host), ("disk", self._store.disk)) if tier}
        self._overlay.refresh()
        self.metrics.refresh(tiers, {"encode": self._encode.waiting_cost, "load": self._load.waiting_cost})

    def flush(self, timeout: float = 10.0) -> bool:
        """Waits until what was stored is where it belongs. For tests and orderly ends, not for engines."""
        deadline = time.monotonic() + timeout
        return (
            self._encode.idle(timeout)
            and self._load.idle(max(0.0, deadline - time.monotonic()))
            and self._store.flush(max(0.0, deadline - time.monotonic()))
        )

    def close(self, timeout: float = 10.0) -> bool:
        """Loads that wait are run until a second or a quarter of the timeout (seconds) is over, stores until half of
        it; the others fail. True if all went where it belongs. Afterwards no thread touches the pages, unless one hangs
        (False)."""
        with self._lock:
            if self._closed:
                return True
            self._closed = True
        ends = [self._load.close(min(1.0, timeout / 4)), self._encode.close(timeout / 2)]
        if all(ends):
            self.transcoder.close()
        self.refresh()
        return self._store.close(timeout / 4) and all(ends)

    def _known(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether each is here, or on its way."""
        with self._lock:
            coming = [key in self._coming for key in keys]
        held = self._store.tiers_of(keys)
        return [soon or tier is not None for soon, tier in zip(coming, held, strict=True)]

    def _arrived(self, blocks: Sequence[Block]) -> None:
        with self._lock:
            self._coming.difference_update(b.key for b in blocks)
