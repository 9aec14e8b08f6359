"""The host tier: records in one arena of memory that is handed in, read and written in place by the GPU.

The arena is the budget: nothing but records (rounded up to 256 bytes) and holes is in it. Holes are kept in bins by
length (``extents.py``). When no hole is long enough, the least recently used record goes; as soon as a sixteenth of the
arena is free in crumbs, unpinned records are slid together instead, a few at a time. So at most 1/16 of a full arena,
and the record that did not fit, is lost to fragmentation as long as leases do not wall holes in; the README has what
was measured. Records on lease or being written never move.

*Spare* records are those that can be missed best: they take what room there is, are the first to go, never push out a
lasting record, and nobody is told when they go.

One lock, held for bookkeeping and for sliding at most 4 MiB; records are copied outside it. A reader of a lease needs
no lock.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from itertools import islice
from types import TracebackType
from typing import Any

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.store import Lease, OnEvicted, Record, Store, StoreStats, check_key, check_record_bytes
from dynamo_kvtc.store.extents import NONE
from dynamo_kvtc.store.shelf import Shelf

UNIT_BYTES = 256
"""What a record starts at a multiple of: coalesced reads on a GPU, and few enough units to number with 32 bits."""
COMPACT_FROM = 16
"""Records are slid together from one part in so many free."""
_SLIDE_BYTES = 4 << 20
TOGETHER = 32
"""Records of ``put_many`` that the lock is held for at once."""
_POPULATE_WRITE = 23
"""Linux 5.14's MADV_POPULATE_WRITE."""

log = logging.getLogger(__name__)


def make_arena(nbytes: int, prefault: bool = True) -> mmap.mmap:
    """Private memory, in huge pages where the kernel gives them, not copied into children; prefault: taken now.

    Raises ConfigError if there is not so much. It can be pinned: ``torch.frombuffer(arena, dtype=torch.uint8)`` and
    cudaHostRegister over it.
    """
    if nbytes < UNIT_BYTES:
        raise ConfigError(f"an arena of {nbytes} bytes; it must have at least {UNIT_BYTES}")
    try:
        arena = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as exc:
        raise ConfigError(f"no memory for an arena of {nbytes} bytes: {exc}; give the host tier less") from exc
    # A pinned page must not be copied on write after a fork: the child has no arena.
    for advice in (getattr(mmap, "MADV_HUGEPAGE", None), getattr(mmap, "MADV_DONTFORK", None)):
        if advice is not None:
            try:
                arena.madvise(advice)
            except OSError:
                log.debug("madvise(%d) refused", advice)
    if prefault:
        try:
            arena.madvise(_POPULATE_WRITE)
        except MemoryError as exc:
            raise ConfigError(f"no memory for an arena of {nbytes} bytes: {exc}; give the host tier less") from exc
        except (OSError, ValueError):
            for start in range(0, nbytes, mmap.PAGESIZE):
                arena[start] = 0
    return arena


class Reservation:
    """Room for one record, to be written in place at ``offset`` of the arena through ``record``, then committed.

    Left uncommitted it is aborted: at the end of ``with``, or when it is collected.
    """

    __slots__ = ("_done", "_key", "_slot", "_store", "offset", "record")

    def __init__(self, store: HostStore, key: bytes, slot: int, offset: int, record: memoryview) -> None:
        self.offset = offset
        self.record = record
        self._store, self._key, self._slot, self._done = store, key, slot, False

    def commit(self, nbytes: int | None = None) -> bool:
        """The first nbytes (default: all) are the record. True if the key is there now.

        Raises ConfigError for more bytes than reserved or none, and if it was committed or aborted before.
        """
        size = self.record.nbytes if nbytes is None else nbytes
        if self._done or not 1 <= size <= self.record.nbytes:
            told = "it has ended" if self._done else f"of {self.record.nbytes} bytes"
            raise ConfigError(f"commit of {size} bytes to a reservation: {told}")
        self._done = True
        return self._store._commit(self._key, self._slot, size)

    def abort(self) -> None:
        """Again, or after a commit, is no error."""
        if not self._done:
            self._done = True
            self._store._unpin((self._slot,))

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def __del__(self) -> None:
        if not getattr(self, "_done", True):
            self._store._waste.append(self._slot)


class HostStore(Store):
    """Records in ``arena``. Besides the interface: ``reserve``, for a writer that produces in place."""

    def __init__(self, arena: Any, on_evicted: OnEvicted | None = None) -> None:
        """arena: a writable, contiguous buffer that outlives the store and its leases. Raises ConfigError."""
        view = memoryview(arena)
        if view.readonly or not view.c_contiguous or view.nbytes < UNIT_BYTES:
            raise ConfigError(
                f"the arena has {view.nbytes} bytes, {'read-only' if view.readonly else 'writable'}; it must be "
                f"writable, contiguous and of at least {UNIT_BYTES} bytes"
            )
        self.arena = arena
        self.on_evicted = on_evicted
        self._view = view.cast("B")
        self._shelf = Shelf(view.nbytes // UNIT_BYTES, UNIT_BYTES)
        self._lock = threading.Lock()
        self._waste: deque[int] = deque()
        self._counts: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._closed = False

    def put(self, key: bytes, record: Record, spare: bool = False) -> bool:
        return self.put_many([(key, record)], spare)[0]

    def put_many(self, items: Iterable[tuple[bytes, Record]], spare: bool = False) -> list[bool]:
        """As every store's; spare: see above."""
        sources: list[tuple[bytes, memoryview]] = []
        for key, record in items:
            check_key(key)
            source = memoryview(record).cast("B")
            check_record_bytes(source.nbytes)
            sources.append((key, source))
        out: list[bool] = []
        while len(out) < len(sources):
            out += self._put_some(sources[len(out) : len(out) + TOGETHER], spare)
        return out

    def _put_some(self, sources: Sequence[tuple[bytes, memoryview]], spare: bool) -> list[bool]:
        """The first ones: those that there is room for, or if there is none for the first, that one alone."""
        shelf = self._shelf
        slots: list[int] = []
        with self._lock:
            self._sweep()
            for key, source in sources:
                here = self._closed or key in shelf.slots
                slot = NONE if here else shelf.take(source.nbytes, spare)
                if slot == NONE and not here:
                    break
                slots.append(slot)
        if not slots:
            slots.append(self._make_room(sources[0][1].nbytes, spare))
        for (_, source), slot in zip(sources, slots, strict=False):
            if slot != NONE:
                offset = self._offset(slot)
                self._view[offset : offset + source.nbytes] = source
        with self._lock:
            for (key, source), slot in zip(sources, slots, strict=False):
                if slot != NONE:
                    self._name(key, slot, source.nbytes)
            return [not self._closed and key in shelf.slots for key, _ in sources[: len(slots)]]

    def reserve(self, key: bytes, nbytes: int) -> Reservation | None:
        """Room for a record of at most nbytes, where spare records are at most; None if there is none, or if the key
        is there already. No other record goes for what may never come: ``put`` it once it is here.

        Several may write the same key: the first to commit wins, the others' commits are True and change nothing.
        """
        check_key(key)
        check_record_bytes(nbytes)
        with self._lock:
            if self._closed or key in self._shelf.slots:
                return None
        slot = self._make_room(nbytes, spare=False, evict=False)
        if slot == NONE:
            return None
        offset = self._offset(slot)
        return Reservation(self, key, slot, offset, self._view[offset : offset + nbytes])

    def get(self, key: bytes) -> Lease | None:
        return self._look([key], 1)[0]

    def peek(self, key: bytes) -> Lease | None:
        """As ``get``, but a miss is not counted: for what need not be here."""
        return self._look([key], 0)[0]

    def get_many(self, keys: Sequence[bytes]) -> list[Lease | None]:
        return self._look(keys, 1)

    def _look(self, keys: Sequence[bytes], miss: int) -> list[Lease | None]:
        found: list[tuple[int, int, int] | None] = []
        with self._lock:
            self._sweep()
            shelf, closed = self._shelf, self._closed
            for key in keys:
                slot = NONE if closed else shelf.slots.get(key, NONE)
                if slot == NONE:
                    found.append(None)
                    continue
                shelf.pin(slot)
                found.append((slot, self._offset(slot), shelf.nbytes[slot]))
            misses = found.count(None)
            self._counts["misses"] += miss * misses
            self._counts["hits"] += len(keys) - misses
        view, unpin, waste = self._view, self._unpin, self._waste
        return [None if place is None else Lease(view, place[2], place[1], place[0], unpin, waste) for place in found]

    def held(self) -> list[tuple[bytes, int]]:
        """(key, bytes) of all records but the spare ones."""
        with self._lock:
            shelf = self._shelf
            return [(key, shelf.nbytes[slot]) for key, slot in shelf.slots.items() if not shelf.spare[slot]]

    def size_of(self, key: bytes) -> int | None:
        """A record's bytes; None if it is not here."""
        with self._lock:
            slot = self._shelf.slots.get(key, NONE)
            return None if slot == NONE or self._closed else self._shelf.nbytes[slot]

    def contains(self, key: bytes) -> bool:
        with self._lock:
            return not self._closed and key in self._shelf.slots

    def contains_many(self, keys: Sequence[bytes]) -> list[bool]:
        with self._lock:
            return [not self._closed and key in self._shelf.slots for key in keys]

    def touch(self, keys: Iterable[bytes]) -> int:
        with self._lock:
            found = [self._shelf.slots[key] for key in keys if key in self._shelf.slots]
            for slot in found:
                self._shelf.use(slot)
            return len(found)

    def remove(self, key: bytes) -> bool:
        with self._lock:
            self._sweep()
            slot = self._shelf.slots.get(key, NONE)
            if slot == NONE:
                return False
            self._shelf.drop(slot)
            self._shelf.unpin(slot)
            return True

    def clear(self) -> None:
        with self._lock:
            self._sweep()
            for slot in list(self._shelf.slots.values()):
                self._shelf.drop(slot)
                self._shelf.unpin(slot)

    @property
    def spare_bytes(self) -> int:
        """What spare records have."""
        with self._lock:
            return self._shelf.spare_bytes

    @property
    def spare_room(self) -> int:
        """Bytes that spare records have or could have, if they left no crumbs."""
        with self._lock:
            return self._shelf.extents.free * UNIT_BYTES + self._shelf.spare_bytes

    def stats(self) -> StoreStats:
        with self._lock:
            self._sweep()
            shelf = self._shelf
            return StoreStats(
                len(shelf), shelf.record_bytes, shelf.used_bytes, shelf.extents.units * UNIT_BYTES,
                self._counts["evictions"], self._counts["hits"], self._counts["misses"], self._counts["refused"],
                dict(self._errors), shelf.fragmentation,
            )  # fmt: skip

    def close(self) -> bool:
        with self._lock:
            self._closed = True
        return True

    def _make_room(self, nbytes: int, spare: bool, evict: bool = True) -> int:
        """A pinned slot, or NONE. evict: whether a lasting record may go for another. Where leases leave no stretch of
        that length, no more than an eighth is evicted."""
        shelf = self._shelf
        units = shelf.units(nbytes)
        patience = shelf.extents.units // 8 + 4 * units
        while True:
            with self._lock:
                self._sweep()
                slot = shelf.take(nbytes, spare)
                if slot == NONE and shelf.extents.free >= max(units, shelf.extents.units // COMPACT_FROM):
                    self._slide_together(units)
                    slot = shelf.take(nbytes, spare)
                if slot != NONE:
                    return slot
                victim = shelf.oldest(spare_only=spare or not evict)
                if victim == NONE or patience <= 0 or units > shelf.extents.units:
                    self._counts["refused"] += evict and not spare
                    return NONE
                key, lasting = shelf.keys[victim], not shelf.spare[victim]
                shelf.drop(victim)
                self._counts["evictions"] += lasting
                patience -= shelf.extents.length[victim] * lasting
                if self.on_evicted is None or not lasting:
                    shelf.unpin(victim)
                    continue
                offset, size = self._offset(victim), shelf.nbytes[victim]
            assert key is not None
            # Nobody finds it any more, and its bytes stay until the callback has seen them.
            self._tell(key, Lease(self._view, size, offset))
            self._unpin((victim,))

    def _tell(self, key: bytes, lease: Lease) -> None:
        try:
            with lease:
                assert self.on_evicted is not None
                self.on_evicted(key, lease)
        except Exception:
            log.exception("on_evicted failed")
            with self._lock:
                self._errors["callback"] += 1

    def _slide_together(self, units: int) -> None:
        """Makes a hole of so many units out of the longest one and those behind it, if no lease is in the way."""
        shelf, blocks = self._shelf, self._shelf.extents
        left = _SLIDE_BYTES // UNIT_BYTES
        for attempt in range(4):
            hole = next(islice(blocks.holes(), attempt, None), NONE)
            while hole != NONE and blocks.length[hole] < units:
                block = blocks.right[hole]
                if block == NONE or shelf.pins[block] or left < blocks.length[block]:
                    break
                left -= blocks.length[block]
                old, size = self._offset(block), shelf.nbytes[block]
                hole = blocks.slide(block)
                new = self._offset(block)
                self._view[new : new + size] = self._view[old : old + size]
            if hole == NONE or blocks.length[hole] >= units:
                return

    def _commit(self, key: bytes, slot: int, nbytes: int) -> bool:
        with self._lock:
            return self._name(key, slot, nbytes)

    def _name(self, key: bytes, slot: int, nbytes: int) -> bool:
        """Whether the key is here now, be it with another's record."""
        shelf = self._shelf
        stored = key in shelf.slots
        if not stored and not self._closed:
            shelf.shrink(slot, nbytes)
            shelf.name(slot, key)
            stored = True
        shelf.unpin(slot)
        return stored

    def _unpin(self, slots: Sequence[int]) -> None:
        with self._lock:
            for slot in slots:
                self._shelf.unpin(slot)

    def _sweep(self) -> None:
        """Leases and reservations that were collected without an end."""
        while self._waste:
            self._shelf.unpin(self._waste.popleft())

    def _offset(self, slot: int) -> int:
        return self._shelf.extents.start[slot] * UNIT_BYTES
