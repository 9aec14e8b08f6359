"""A tier's records, told to other workers: from the store's callbacks to a publisher of events.

An ``Announcer`` is given to ``open_tier``, and does nothing until ``start``: then what the tier holds is known to every
follower of the namespace, and what comes and goes is told when it is whole where it is said to be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dynamo_kvtc.codec.artifact import Artifact
from dynamo_kvtc.codec.record import VERSION
from dynamo_kvtc.events.nats import Nats
from dynamo_kvtc.events.options import EventOptions
from dynamo_kvtc.events.publisher import Publisher
from dynamo_kvtc.events.schema import BlocksCleared, Plane, WorkerStats, WorkerUp, new_epoch
from dynamo_kvtc.store.tiered import TieredStore
from dynamo_kvtc.tier.identity import KeySpace
from dynamo_kvtc.tier.metrics import TierMetrics

Moved = Callable[[bytes, str], None]
Removed = Callable[[bytes], None]
_TIERS = ("host", "disk")


class Announcer:
    """Thread-safe; a store's thread never waits in it. pulled_bytes, served_bytes: from and to other workers, for
    heartbeats; whoever moves them sets these."""

    def __init__(self) -> None:
        self.publisher: Publisher | None = None
        self.pulled_bytes: Callable[[], int] = int
        self.served_bytes: Callable[[], int] = int
        self._store: TieredStore | None = None
        self._metrics: TierMetrics | None = None

    def watch(self, store: TieredStore, metrics: TierMetrics) -> None:
        """The tier's own parts, told by ``Tier``."""
        self._store, self._metrics = store, metrics

    def also_moved(self, told: Moved | None) -> Moved:
        """For the store's ``on_moved``: told hears of it, too."""

        def both(key: bytes, tier: str) -> None:
            self.moved(key, tier)
            if told is not None:
                told(key, tier)

        return both

    def also_removed(self, told: Removed | None) -> Removed:
        def both(key: bytes) -> None:
            self.removed(key)
            if told is not None:
                told(key)

        return both

    def start(
        self, nats: Nats, worker: str, keys: KeySpace, artifact: Artifact, block_tokens: int,
        planes: Sequence[Plane] = (), options: EventOptions | None = None,
    ) -> Publisher:  # fmt: skip
        """worker: an id of its own (``new_worker``); planes: how its records can be pulled. Close what it returns
        before the tier."""
        assert self._store is not None, "the tier is not open yet"
        held = len(self._store.held())
        up = WorkerUp(
            worker, new_epoch(), keys.identity, artifact.manifest.model.model_id[:256], artifact.digest, VERSION,
            block_tokens, list(planes), held,
        )  # fmt: skip
        self.publisher = Publisher(nats, up, self._store.held, self.stats, options)
        if not held:
            # What came between the two lines above: followers were told that there is nothing.
            for key, tier, size in self._store.held():
                self.publisher.stored(key, tier, size)
        return self.publisher

    def moved(self, key: bytes, tier: str) -> None:
        """The whole event, though it may only have moved: who has forgotten it since knows it again."""
        if self.publisher is not None and self._store is not None:
            size = self._store.size_of(key, tier)
            if size is not None:
                self.publisher.stored(key, tier, size)

    def removed(self, key: bytes) -> None:
        # Callbacks of one key may come in either order: what is here again is not gone.
        if self.publisher is not None and self._store is not None and not self._store.contains(key):
            self.publisher.removed(key, "disk")

    def cleared(self) -> None:
        if self.publisher is not None:
            self.publisher.publish(BlocksCleared())

    def stats(self) -> WorkerStats:
        """For heartbeats."""
        store, metrics = self._store, self._metrics
        assert store is not None
        assert metrics is not None
        tiers = {name: t.stats() for name, t in zip(_TIERS, (store.host, store.disk), strict=True) if t is not None}
        return WorkerStats(
            {name: s.entries for name, s in tiers.items()}, {name: s.record_bytes for name, s in tiers.items()},
            int(sum(metrics.value("kvtc_lookup_blocks", "hit", tier) for tier in _TIERS)),
            int(metrics.value("kvtc_lookup_blocks", "miss", "none")),
            int(metrics.value("kvtc_raw_bytes", "in")), int(metrics.value("kvtc_coded_bytes", "in")),
            self.pulled_bytes(), self.served_bytes(),
        )  # fmt: skip
