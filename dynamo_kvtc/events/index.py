"""Who holds which record: key -> holders with tier and size, in memory that never grows.

A table of fixed size, laid out like a processor's cache: a key has two buckets of 16 places, an entry is one holder of
one key in any of these 32, and a new entry goes where there is more room. When both are full the least recently used of
the 32 goes (a full table of a million loses none before it is 3/4 full). Nothing is ever moved and nothing marks what
was removed, so every step is a few array operations over a whole batch of keys, and dropping a worker is one pass over
two bytes a place. At most ``MAX_HOLDERS`` holders of one key are remembered: nobody pulls from more.

It says who was told to hold a record: whoever pulls must bear that it is gone.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.events.schema import KEY_BYTES, TIERS, BlockMoved, BlockRemoved, BlocksCleared, BlockStored, Event

WAYS = 16
MAX_HOLDERS = 8
MAX_WORKERS = 4095
PLACE_BYTES = KEY_BYTES + 4 + 4 + 2 + 1
MIN_BYTES = 1 << 16
LOOK = 256
"""Keys that are looked up at once: a prefix usually ends before it has more."""
_NOBODY = 0

U64 = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]


class Holder(NamedTuple):
    worker: str
    tier: str
    size: int


class Index:
    """Thread-safe. Workers are known by name; whoever applies their events in order is ``follower.py``."""

    def __init__(self, budget_bytes: int = 64 << 20) -> None:
        """Raises ConfigError if that holds nothing worth having."""
        if budget_bytes < MIN_BYTES:
            raise ConfigError(f"the index's budget is {budget_bytes} bytes; it must be at least {MIN_BYTES}")
        self._buckets = budget_bytes // (WAYS * PLACE_BYTES)
        self._secret = np.frombuffer(secrets.token_bytes(64), dtype=np.uint64).reshape(4, 2)
        self.capacity = self._buckets * WAYS
        # calloc: pages that were never written take no memory.
        self._first = np.zeros((self._buckets, WAYS), np.uint64)
        self._rest = np.zeros((self._buckets, WAYS, 3), np.uint64)
        self._size = np.zeros((self._buckets, WAYS), np.uint32)
        self._used = np.zeros((self._buckets, WAYS), np.uint32)
        self._owner = np.zeros((self._buckets, WAYS), np.uint16)
        self._tier = np.zeros((self._buckets, WAYS), np.uint8)
        self._ids: dict[str, int] = {}
        self._names: list[str | None] = [None] * (MAX_WORKERS + 1)
        self._visible = np.zeros(MAX_WORKERS + 1, bool)
        self._lock = threading.Lock()
        self._now = 1
        self.evicted = self.crowded = 0

    def __len__(self) -> int:
        """Entries: one for every holder of every key."""
        with self._lock:
            return int(np.count_nonzero(self._owner))

    @property
    def nbytes(self) -> int:
        arrays = (self._first, self._rest, self._size, self._used, self._owner, self._tier)
        return sum(a.nbytes for a in arrays)

    @property
    def workers(self) -> list[str]:
        with self._lock:
            return list(self._ids)

    def entries_of(self, worker: str) -> int:
        with self._lock:
            return int(np.count_nonzero(self._owner == self._ids[worker])) if worker in self._ids else 0

    def show(self, worker: str, visible: bool) -> None:
        """Whether lookups see what it holds; not, until this is said."""
        with self._lock:
            self._visible[self._id(worker)] = visible

    def drop(self, worker: str) -> int:
        """Forgets it and all it held; how many entries that was."""
        with self._lock:
            number = self._ids.pop(worker, _NOBODY)
            if number == _NOBODY:
                return 0
            self._visible[number] = False
            self._names[number] = None
            return self._clear(number)

    def rename(self, shadow: str, worker: str) -> None:
        """What shadow holds is now what worker holds, at once; what that held before is gone."""
        with self._lock:
            old, new = self._id(worker), self._id(shadow)
            self._visible[new] = self._visible[old]
            self._visible[old] = False
            self._names[new], self._names[old] = worker, None
            self._ids[worker] = new
            del self._ids[shadow]
            self._clear(old)

    def apply(self, worker: str, events: Sequence[Event]) -> None:
        """In their order; what is no block event is passed over. Raises ConfigError beyond MAX_WORKERS workers."""
        last: dict[bytes, tuple[int, int]] = {}
        cleared = False
        for event in events:
            if isinstance(event, BlockStored):
                last[event.key] = (event.tier + 1, event.size)
            elif isinstance(event, BlockMoved):
                before = last.get(event.key)
                if before is None:
                    last[event.key] = (event.tier + 1, 0 if not cleared else -1)
                elif before[1] >= 0:
                    last[event.key] = (event.tier + 1, before[1])
            elif isinstance(event, BlockRemoved):
                last[event.key] = (0, -1)
            elif isinstance(event, BlocksCleared):
                last.clear()
                cleared = True
        self._set(worker, list(last), [t for t, _ in last.values()], [s for _, s in last.values()], cleared)

    def put(self, worker: str, keys: Sequence[bytes], tiers: Sequence[int], sizes: Sequence[int]) -> None:
        """As many BlockStored, of keys that differ."""
        self._set(worker, keys, [t + 1 for t in tiers], sizes, False)

    def longest_prefix(self, keys: Sequence[bytes]) -> list[list[Holder]]:
        """For each key in order its holders, the best tier first; ends before the first key that nobody holds."""
        out: list[list[Holder]] = []
        for begin in range(0, len(keys), LOOK):
            some = keys[begin : begin + LOOK]
            found = self._look(some)
            out += found
            if len(found) < len(some):
                break
        return out

    def _look(self, keys: Sequence[bytes]) -> list[list[Holder]]:
        words = _words(keys)
        out: list[list[Holder]] = [[] for _ in keys]
        with self._lock:
            row, bucket, way = self._find(words, None)
            owner = self._owner[bucket, way]
            seen = self._visible[owner]
            row, bucket, way, owner = row[seen], bucket[seen], way[seen], owner[seen]
            self._used[bucket, way] = self._tick()
            tiers, sizes = self._tier[bucket, way].tolist(), self._size[bucket, way].tolist()
            for i, number, tier, size in zip(row.tolist(), owner.tolist(), tiers, sizes, strict=True):
                out[i].append(Holder(self._names[number] or "", TIERS[tier - 1], size))
        for i, holders in enumerate(out):
            if not holders:
                return out[:i]
            if len(holders) > 1:
                holders.sort(key=lambda h: TIERS.index(h.tier))
        return out

    def _set(
        self, worker: str, keys: Sequence[bytes], tiers: Sequence[int], sizes: Sequence[int], cleared: bool
    ) -> None:  # fmt: skip
        """tier 0: gone; size 0: only if it is there, and of the size it had; size -1 with a tier: nothing."""
        with self._lock:
            number = self._id(worker)
            if cleared:
                self._clear(number)
            if not keys:
                return
            words, tier = _words(keys), np.array(tiers, np.uint8)
            size = np.array(sizes, np.int64)
            row, bucket, way = self._find(words, number)
            # Gone, or there and changed.
            gone = tier[row] == 0
            self._owner[bucket[gone], way[gone]] = _NOBODY
            stay = ~gone & (size[row] >= 0)
            row, bucket, way = row[stay], bucket[stay], way[stay]
            self._tier[bucket, way] = tier[row]
            sized = size[row] > 0
            self._size[bucket[sized], way[sized]] = size[row[sized]]
            self._used[bucket, way] = now = self._tick()
            new = (tier > 0) & (size > 0)
            new[row] = False
            self._insert(words[new], number, tier[new], size[new], now)

    def _insert(self, words: U64, number: int, tier: npt.NDArray[np.uint8], size: Ints, now: int) -> None:
        while len(words):
            both = self._homes(words)
            free = self._owner.take(both, 0) == _NOBODY  # rows, 2, WAYS
            room = free.sum(2)
            # Where there is more room; if none in either, the least recently used of both goes.
            choice = (room[:, 1] > room[:, 0]).astype(np.int64)
            rows = np.arange(len(words))
            way = free[rows, choice].argmax(1)
            full = np.flatnonzero(~free.any((1, 2)))
            if len(full):
                oldest = self._used[both[full]].reshape(len(full), -1).argmin(1)
                choice[full], way[full] = oldest // WAYS, oldest % WAYS
            # A key with very many holders would push out everything beside it: its least recently used goes instead.
            same = (self._first.take(both, 0) == words[:, :1, None]) & ~free
            many = np.flatnonzero(same.sum((1, 2)) >= MAX_HOLDERS)
            if len(many):
                used = np.where(same[many], self._used[both[many]], np.uint32(0xFFFFFFFF)).reshape(len(many), -1)
                choice[many], way[many] = used.argmin(1) // WAYS, used.argmin(1) % WAYS
            bucket = both[rows, choice]
            _, win = np.unique(bucket * WAYS + way, return_index=True)
            bucket, way = bucket[win], way[win]
            displaced = np.isin(win, many)
            self.crowded += int(displaced.sum())
            self.evicted += int((self._owner[bucket, way] != _NOBODY).sum() - displaced.sum())
            self._first[bucket, way] = words[win, 0]
            self._rest[bucket, way] = words[win, 1:]
            self._size[bucket, way], self._tier[bucket, way] = size[win], tier[win]
            self._used[bucket, way], self._owner[bucket, way] = now, number
            left = np.ones(len(words), bool)
            left[win] = False
            words, tier, size = words[left], tier[left], size[left]

    def _find(self, words: U64, number: int | None) -> tuple[Ints, Ints, Ints]:
        """(row, bucket, way) of every entry of these keys, of one worker or of all."""
        both = self._homes(words)
        hit = self._first.take(both, 0) == words[:, :1, None]
        hit[:, 1] &= (both[:, 0] != both[:, 1])[:, None]
        row, place = np.divmod(np.flatnonzero(hit), 2 * WAYS)
        side, way = np.divmod(place, WAYS)
        bucket = both[row, side]
        owner = self._owner[bucket, way]
        right = owner != _NOBODY if number is None else owner == number
        right &= (self._rest[bucket, way] == words[row, 1:]).all(1)
        return row[right], bucket[right], way[right]

    def _homes(self, words: U64) -> Ints:
        """Two buckets a row. Keys are digests, any of their bits as good as a hash; but others choose them: with a
        secret in it nobody can choose many for the same two buckets, whose insertion takes quadratic time."""
        return ((words @ self._secret >> np.uint64(32)) % np.uint64(self._buckets)).astype(np.int64)

    def _id(self, worker: str) -> int:
        number = self._ids.get(worker)
        if number is None:
            if len(self._ids) >= MAX_WORKERS:
                raise ConfigError(f"the index knows {MAX_WORKERS} workers, and has no place for {worker!r}")
            number = self._names.index(None, 1)
            self._ids[worker], self._names[number] = number, worker
        return number

    def _clear(self, number: int) -> int:
        held = self._owner == number
        self._owner[held] = _NOBODY
        return int(held.sum())

    def _tick(self) -> int:
        self._now += 1
        if self._now == 0xFFFFFFFF:  # after four thousand million calls all are equally old
            self._used[:] = 0
            self._now = 1
        return self._now


def _words(keys: Sequence[bytes]) -> U64:
    joined = b"".join(keys)
    if len(joined) != KEY_BYTES * len(keys):
        raise ConfigError(f"keys of {sorted({len(key) for key in keys})} bytes; the index takes {KEY_BYTES} bytes each")
    return np.frombuffer(joined, "<u8").reshape(len(keys), KEY_BYTES // 8)
