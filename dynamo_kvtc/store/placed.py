"""Host and disk side by side, for an engine that decides itself what lies where: a key says which of the two is its.

Nothing moves by itself. What the host or the disk has no room for is evicted, the least recently used first, and
``on_removed`` tells of it: the budgets are hard, whatever the engine believes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import compress

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.store import Lease, Record, Store, StoreStats, check_key
from dynamo_kvtc.store.disk import DiskStore
from dynamo_kvtc.store.host import TOGETHER, HostStore
from dynamo_kvtc.store.tiered import Fetched, TieredStore, fetched

Place = Callable[[bytes], str]
"""The tier a key's record lies in: "host" or "disk"."""


class PlacedStore(TieredStore):
    def __init__(
        self, host: HostStore | None, disk: DiskStore | None, place: Place,
        on_moved: Callable[[bytes, str], None] | None = None, on_removed: Callable[[bytes], None] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(host, disk, on_moved=on_moved, on_removed=on_removed)
        self._place = place

    def put_many(self, items: Iterable[tuple[bytes, Record]]) -> list[bool]:
        """False, too, if the key's tier is not there."""
        listed = list(items)
        for key, _ in listed:
            check_key(key)
        out = [False] * len(listed)
        for _, tier, own in self._by_tier([key for key, _ in listed]):
            for start in range(0, len(own), TOGETHER):
                some = own[start : start + TOGETHER]
                for i, stored in zip(some, tier.put_many([listed[i] for i in some]), strict=True):
                    out[i] = stored
                # The disk tells of itself, after the sync; what another has evicted already was told of.
                if tier is self.host:
                    keys = [listed[i][0] for i in some]
                    for key in compress(keys, self.host.contains_many(keys)):
                        self._moved(key, "host")
        return out

    def stored(self, key: bytes) -> None:
        self._moved(key, "host")

    def fetch(self, keys: Sequence[bytes]) -> list[Fetched]:
        found = [fetched(name, tier, keys, own)[0] for name, tier, own in self._by_tier(keys)]
        return self._counted(found, len(keys))

    def tier_of(self, key: bytes) -> str | None:
        tier = self._of(key)
        return self._place(key) if tier is not None and tier.contains(key) else None

    def tiers_of(self, keys: Sequence[bytes]) -> list[str | None]:
        out: list[str | None] = [None] * len(keys)
        for name, tier, own in self._by_tier(keys):
            for i, here in zip(own, tier.contains_many([keys[i] for i in own]), strict=True):
                out[i] = name if here else None
        return out

    def stats(self) -> StoreStats:
        """As ``TieredStore``'s; evictions: from either."""
        return replace(super().stats(), evictions=sum(tier.stats().evictions for tier in self._tiers()))

    def _of(self, key: bytes) -> Store | None:
        return self._named(self._place(key))

    def _named(self, name: str) -> Store | None:
        if name not in ("host", "disk"):
            raise ConfigError(f"a key's place is {name!r}; it must be 'host' or 'disk'")
        return self.host if name == "host" else self.disk

    def _by_tier(self, keys: Sequence[bytes]) -> list[tuple[str, Store, list[int]]]:
        """Each tier that some of the keys belong to, and which."""
        places: dict[str, list[int]] = {}
        for i, place in enumerate(map(self._place, keys)):
            places.setdefault(place, []).append(i)
        tiers = [(name, self._named(name), own) for name, own in places.items()]
        return [(name, tier, own) for name, tier, own in tiers if tier is not None]

    def _host_evicted(self, key: bytes, lease: Lease | None) -> None:
        self._removed(key)
