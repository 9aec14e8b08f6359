"""Host over disk: what the host has no room for moves down, what is asked for moves up. Either may be absent.

    put     -> host; also -> disk with write_through
    host evicts -> disk, if it is not there already (otherwise nothing is written)
    get     -> host, else disk; from disk it is put into the host on its promote_on-th hit, and stays on disk, too

``on_moved(key, tier)``: the best tier that holds it is now "host" or "disk", where it is whole (disk: after the sync).
``on_removed(key)``: no tier holds it any more. Both come outside every lock, from any thread; events of one key that
happen at once in two threads may come in either order, so a listener that must be sure asks ``tier_of``. Between a
host's eviction and the disk's queue a record is for some microseconds in neither: a get just then misses.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, cast

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.store import Lease, Record, Store, StoreStats, check_key
from dynamo_kvtc.store.disk import DiskStore
from dynamo_kvtc.store.host import TOGETHER, HostStore

_SEEN = 1 << 16
"""Keys whose hits on disk are remembered, to promote on the second."""

log = logging.getLogger(__name__)


class Fetched(NamedTuple):
    """Records of one tier. which: of the keys asked for; seconds: to look for them."""

    tier: str
    which: list[int]
    leases: list[Lease]
    seconds: float


class TieredStore(Store):
    """Owns its tiers: it sets their callbacks, and closes them. ``host.reserve`` may be used beside it: tell
    ``stored`` after the commit."""

    def __init__(
        self, host: HostStore | None, disk: DiskStore | None, write_through: bool = False, promote_on: int = 1,
        on_moved: Callable[[bytes, str], None] | None = None, on_removed: Callable[[bytes], None] | None = None,
    ) -> None:  # fmt: skip
        """promote_on: 1 or 2, the hit on disk that brings a record to the host. Raises ConfigError."""
        if host is None and disk is None:
            raise ConfigError("a tiered store of no tier; give it a host store, a disk store or both")
        if promote_on not in (1, 2):
            raise ConfigError(f"promote_on is {promote_on}; it must be 1 or 2")
        self.host, self.disk = host, disk
        self._write_through, self._promote_on = write_through, promote_on
        self._on_moved, self._on_removed = on_moved, on_removed
        self._lock = threading.Lock()
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._counts: Counter[str] = Counter()
        if host is not None:
            host.on_evicted = self._host_evicted
        if disk is not None:
            disk.on_stored = self._disk_stored
            disk.on_evicted = lambda key, _: self._disk_lost(key)
            disk.on_lost = self._disk_lost

    def put(self, key: bytes, record: Record) -> bool:
        return self.put_many([(key, record)])[0]

    def put_many(self, items: Iterable[tuple[bytes, Record]]) -> list[bool]:
        listed = list(items)
        for key, _ in listed:
            check_key(key)
        if self.host is None:
            assert self.disk is not None
            return self.disk.put_many(listed)
        out: list[bool] = []
        for start in range(0, len(listed), TOGETHER):
            some = listed[start : start + TOGETHER]
            keys = [key for key, _ in some]
            known = self.host.contains_many(keys)
            stored = self.host.put_many(some)
            # The last of them may have evicted the first, which was told of by then.
            here = self.host.contains_many(keys)
            for i, (key, record) in enumerate(some):
                if not stored[i]:
                    stored[i] = self.disk is not None and self.disk.put(key, record)
                elif here[i] and not known[i]:
                    self.stored(key)
            out += stored
        return out

    def stored(self, key: bytes) -> None:
        """A record was committed to the host: writes it through if asked to, and tells ``on_moved``."""
        assert self.host is not None
        self._moved(key, "host")
        if self._write_through and self.disk is not None and not self.disk.contains(key):
            lease = self.host.get(key)
            if lease is not None:
                with lease:
                    self.disk.put(key, lease.record)

    def get(self, key: bytes) -> Lease | None:
        return self.get_many([key])[0]

    def get_many(self, keys: Sequence[bytes]) -> list[Lease | None]:
        leases: list[Lease | None] = [None] * len(keys)
        for found in self.fetch(keys):
            for i, lease in zip(found.which, found.leases, strict=True):
                leases[i] = lease
        return leases

    def fetch(self, keys: Sequence[bytes]) -> list[Fetched]:
        """What ``get_many`` finds, by the tier it was in."""
        out, left = [], list(range(len(keys)))
        if self.host is not None:
            found, left = fetched("host", self.host, keys, left)
            out.append(found)
        if self.disk is not None and left:
            began = time.monotonic()
            found, left = fetched("disk", self.disk, keys, left)
            leases = [self._promoted(keys[i], lease) for i, lease in zip(found.which, found.leases, strict=True)]
            out.append(found._replace(leases=leases, seconds=time.monotonic() - began))
        return self._counted(out, len(keys))

    def _counted(self, found: list[Fetched], of: int) -> list[Fetched]:
        hits = sum(len(f.leases) for f in found)
        with self._lock:
            self._counts["hits"] += hits
            self._counts["misses"] += of - hits
        return found

    def tier_of(self, key: bytes) -> str | None:
        """ "host", "disk" (queued or on it) or None."""
        if self.host is not None and self.host.contains(key):
            return "host"
        return "disk" if self.disk is not None and self.disk.contains(key) else None

    def tiers_of(self, keys: Sequence[bytes]) -> list[str | None]:
        """``tier_of`` each."""
        above = [False] * len(keys) if self.host is None else self.host.contains_many(keys)
        return [
            "host" if here else "disk" if self.disk is not None and self.disk.contains(key) else None
            for key, here in zip(keys, above, strict=True)
        ]

    def held(self) -> list[tuple[bytes, str, int]]:
        """(key, best tier, bytes) of all records that are whole in a tier."""
        out = [] if self.disk is None else [(key, "disk", size) for key, size in self.disk.held()]
        if self.host is not None:
            above = self.host.held()
            names = {key for key, _ in above}
            out = [entry for entry in out if entry[0] not in names] + [(key, "host", size) for key, size in above]
        return out

    def size_of(self, key: bytes, tier: str) -> int | None:
        """Bytes of a record that is whole in that tier; None if it is not."""
        where = self.host if tier == "host" else self.disk
        return None if where is None else where.size_of(key)

    def contains(self, key: bytes) -> bool:
        return self.tier_of(key) is not None

    def touch(self, keys: Iterable[bytes]) -> int:
        listed = list(keys)
        found = len(listed) - self.tiers_of(listed).count(None)
        for tier in self._tiers():
            tier.touch(listed)
        return found

    def remove(self, key: bytes) -> bool:
        return sum(tier.remove(key) for tier in self._tiers()) > 0

    def discard(self, key: bytes) -> None:
        """``remove`` that ``on_removed`` is told of."""
        if self.remove(key):
            self._removed(key)

    def clear(self) -> None:
        for tier in self._tiers():
            tier.clear()
        with self._lock:
            self._seen.clear()

    def flush(self, timeout: float = 10.0) -> bool:
        """The disk's: True if all that went down is on it."""
        return self.disk is None or self.disk.flush(timeout)

    def stats(self) -> StoreStats:
        """Both tiers together: a record in both is two entries; evictions: from the lowest tier. Ask ``host`` and
        ``disk`` for theirs."""
        parts = [tier.stats() for tier in self._tiers()]
        errors: Counter[str] = Counter()
        for part in parts:
            errors.update(part.errors)
        with self._lock:
            errors["callback"] += self._counts["callback"]
            return StoreStats(
                sum(p.entries for p in parts), sum(p.record_bytes for p in parts), sum(p.used_bytes for p in parts),
                sum(p.budget_bytes for p in parts), parts[-1].evictions, self._counts["hits"], self._counts["misses"],
                sum(p.refused for p in parts), dict(+errors), parts[0].fragmentation,
            )  # fmt: skip

    def close(self, timeout: float = 10.0) -> bool:
        """What is in the host alone is lost; with write_through it is on disk. timeout: the disk's, in seconds."""
        ends = [True if self.host is None else self.host.close()]
        ends.append(True if self.disk is None else self.disk.close(timeout))
        return all(ends)

    def _tiers(self) -> list[Store]:
        return [tier for tier in (self.host, self.disk) if tier is not None]

    def _promoted(self, key: bytes, lease: Lease) -> Lease:
        """In the host if it is its turn and there is room, else as it came."""
        if self.host is None or not self._turn_to_promote(key) or not self.host.put(key, lease.record):
            return lease
        above = self.host.get(key)
        if above is None:
            return lease
        lease.release()
        self._moved(key, "host")
        return above

    def _turn_to_promote(self, key: bytes) -> bool:
        if self._promote_on == 1:
            return True
        with self._lock:
            if key in self._seen:
                del self._seen[key]
                return True
            self._seen[key] = None
            if len(self._seen) > _SEEN:
                self._seen.popitem(last=False)
            return False

    def _host_evicted(self, key: bytes, lease: Lease | None) -> None:
        assert lease is not None
        there = self.disk is not None and self.disk.durable(key)
        if self.disk is None or not self.disk.put(key, lease.record):
            self._removed(key)
        elif there:
            self._moved(key, "disk")  # otherwise _disk_stored tells, after the sync

    def _disk_stored(self, key: bytes) -> None:
        if self.host is None or not self.host.contains(key):
            self._moved(key, "disk")

    def _disk_lost(self, key: bytes) -> None:
        if not self.contains(key):
            self._removed(key)

    def _moved(self, key: bytes, tier: str) -> None:
        if self._on_moved is not None:
            self._tell(lambda told=self._on_moved: told(key, tier))  # type: ignore[misc]

    def _removed(self, key: bytes) -> None:
        if self._on_removed is not None and not self.contains(key):
            self._tell(lambda told=self._on_removed: told(key))  # type: ignore[misc]

    def _tell(self, told: Callable[[], None]) -> None:
        try:
            told()
        except Exception:
            log.exception("a callback failed")
            with self._lock:
                self._counts["callback"] += 1


def fetched(name: str, tier: Store, keys: Sequence[bytes], which: list[int]) -> tuple[Fetched, list[int]]:
    """Those of the keys that the tier has, and which it has not."""
    began = time.monotonic()
    leases = tier.get_many(keys if len(which) == len(keys) else [keys[i] for i in which])
    seconds = time.monotonic() - began
    if None not in leases:
        return Fetched(name, which, cast("list[Lease]", leases), seconds), []
    there = [(i, lease) for i, lease in zip(which, leases, strict=True) if lease is not None]
    missing = [i for i, lease in zip(which, leases, strict=True) if lease is None]
    return Fetched(name, [i for i, _ in there], [lease for _, lease in there], seconds), missing
