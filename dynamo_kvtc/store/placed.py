"""Host and disk side by side, for an engine that decides itself what lies where: a key says which of the two is its.

Nothing moves by itself. What the host or the disk has no room for is evicted, the least recently used first, and
``on_removed`` tells of it: the budgets are hard, whatever the engine believes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.store import Lease, Record, Store, StoreStats, check_key
from dynamo_kvtc.store.disk import DiskStore
from dynamo_kvtc.store.host import HostStore
from dynamo_kvtc.store.tiered import TieredStore

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
        for tier, own in self._by_tier([key for key, _ in listed]):
            for i, stored in zip(own, tier.put_many([listed[i] for i in own]), strict=True):
                out[i] = stored
                if stored and tier is self.host:
                    self._moved(listed[i][0], "host")  # the disk tells of itself, after the sync
        return out

    def stored(self, key: bytes) -> None:
        self._moved(key, "host")

    def get_many(self, keys: Sequence[bytes]) -> list[Lease | None]:
        leases: list[Lease | None] = [None] * len(keys)
        for tier, own in self._by_tier(keys):
            for i, lease in zip(own, tier.get_many([keys[i] for i in own]), strict=True):
                leases[i] = lease
        return self._counted(leases)

    def tier_of(self, key: bytes) -> str | None:
        tier = self._of(key)
        return self._place(key) if tier is not None and tier.contains(key) else None

    def tiers_of(self, keys: Sequence[bytes]) -> list[str | None]:
        out: list[str | None] = [None] * len(keys)
        for tier, own in self._by_tier(keys):
            name = "host" if tier is self.host else "disk"
            for i, here in zip(own, tier.contains_many([keys[i] for i in own]), strict=True):
                out[i] = name if here else None
        return out

    def stats(self) -> StoreStats:
        """As ``TieredStore``'s; evictions: from either."""
        return replace(super().stats(), evictions=sum(tier.stats().evictions for tier in self._tiers()))

    def _of(self, key: bytes) -> Store | None:
        name = self._place(key)
        if name not in ("host", "disk"):
            raise ConfigError(f"a key's place is {name!r}; it must be 'host' or 'disk'")
        return self.host if name == "host" else self.disk

    def _by_tier(self, keys: Sequence[bytes]) -> list[tuple[Store, list[int]]]:
        """Each tier that some of the keys belong to, and which."""
        found: dict[Store, list[int]] = {}
        for i, key in enumerate(keys):
            tier = self._of(key)
            if tier is not None:
                found.setdefault(tier, []).append(i)
        return list(found.items())

    def _host_evicted(self, key: bytes, lease: Lease | None) -> None:
        self._removed(key)
