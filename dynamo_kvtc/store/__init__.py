"""Bytes in, bytes out: where coded records are kept. READ FIRST: the interface that every store keeps.

    host.py    records in one arena of (pinned) memory, variable length, evicted least recently used first
    disk.py    records in one file of fixed size with an index in SQLite, behind a queue; found again after a restart
    tiered.py  host over disk: what leaves the host goes to disk, what is asked for comes back
    placed.py  host and disk side by side: the key says which, nothing moves by itself

Keys are 16 to 64 bytes, opaque, usually a digest over everything that makes two caches differ. Records are immutable:
a key's bytes never change, so putting a key again does nothing. Everything is thread-safe. Nothing here raises for what
goes wrong while it runs (a full disk, a damaged record): it is counted in ``stats().errors`` and looks like a miss or a
refused put, so that the engine computes again. Bad arguments raise ConfigError.

To add a store: a subclass of ``Store``, and a line in ``tests/store/stores.py``; the contract suite does the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType

from dynamo_kvtc.errors import ConfigError

MIN_KEY_BYTES, MAX_KEY_BYTES = 16, 64
MAX_RECORD_BYTES = 4 << 20

Record = bytes | bytearray | memoryview


class Lease:
    """A record on loan: its bytes stay where and what they are until ``release`` (or the end of ``with``).

    record: read-only memoryview, made when it is asked for; releasing ends it. A tensor or array made over it ends with
        the lease, too, without being told: its bytes are another record's soon.
    offset: where the record starts in the store's ``arena``; None if it is not in one.
    Forgotten leases are released when they are collected, but not before the store is used again.
    """

    __slots__ = ("_done", "_nbytes", "_read", "_slot", "_source", "_waste", "offset")

    def __init__(
        self, source: Record, nbytes: int, offset: int | None = None, slot: int = -1,
        done: Callable[[Sequence[int]], None] | None = None, waste: deque[int] | None = None,
    ) -> None:  # fmt: skip
        """source: the record, or with an offset what it lies in; done: told the slot when the lease ends."""
        self._source: Record | None = source
        self._nbytes, self.offset = nbytes, offset
        self._read: memoryview | None = None
        self._slot, self._done, self._waste = slot, done, waste

    @property
    def record(self) -> memoryview:
        """Raises ValueError once the lease has ended."""
        if self._read is None:
            if self._source is None:
                raise ValueError("the lease on this record has ended")
            start = self.offset or 0
            with memoryview(self._source) as view, view[start : start + self._nbytes] as own:
                self._read = own.toreadonly()
        return self._read

    def release(self) -> None:
        """Again is no error."""
        done = self._end()
        if done is not None:
            done((self._slot,))

    def _end(self) -> Callable[[Sequence[int]], None] | None:
        done, self._done, self._waste, self._source = self._done, None, None, None
        if self._read is not None:
            with suppress(BufferError):  # a view over it is alive: see above
                self._read.release()
        return done

    def __len__(self) -> int:
        return self._nbytes

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        # The collector may run inside a store's lock: the slot is only noted, and dealt with at the next call.
        waste = getattr(self, "_waste", None)
        if waste is not None:
            waste.append(self._slot)


def release_all(leases: Iterable[Lease]) -> None:
    """``release`` of each, for less than one by one."""
    slots: dict[Callable[[Sequence[int]], None], list[int]] = {}
    for lease in leases:
        done = lease._end()
        if done is not None:
            slots.setdefault(done, []).append(lease._slot)
    for done, own in slots.items():
        done(own)


@dataclass(frozen=True)
class StoreStats:
    """entries: records; record_bytes: theirs; used_bytes: what they take, padding and index included;
    budget_bytes: what used_bytes never exceeds; evictions, hits, misses, refused (puts): counts since it was opened;
    errors: counts by kind; fragmentation: 0 if all free space is in one piece (to 1/16), towards 1 if it is in crumbs.
    """

    entries: int = 0
    record_bytes: int = 0
    used_bytes: int = 0
    budget_bytes: int = 0
    evictions: int = 0
    hits: int = 0
    misses: int = 0
    refused: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)
    fragmentation: float = 0.0


OnEvicted = Callable[[bytes, Lease | None], None]
"""Called with a key that was evicted to make room, and its record where it is at hand (host: yes, disk: no). Outside
every lock; the lease ends with the call. An exception is counted, no more."""


class Store(ABC):
    """What every store does. Keys: bytes, 16 to 64 of them; records: bytes-like, 1 byte to 4 MiB."""

    @abstractmethod
    def put(self, key: bytes, record: Record) -> bool:
        """Stores a copy. True if it is there (a key that was there already: nothing happens), False if refused.

        Raises ConfigError for a key or record of a length no store takes.
        """

    def put_many(self, items: Iterable[tuple[bytes, Record]]) -> list[bool]:
        """What ``put`` says to each."""
        return [self.put(key, record) for key, record in items]

    @abstractmethod
    def get(self, key: bytes) -> Lease | None:
        """The record, marked as just used; None if it is not here (or cannot be read in time, or is damaged)."""

    def get_many(self, keys: Sequence[bytes]) -> list[Lease | None]:
        """``get`` of each; a store that reads slowly reads them side by side."""
        return [self.get(key) for key in keys]

    @abstractmethod
    def contains(self, key: bytes) -> bool:
        """Whether it is here; neither a hit nor a use."""

    def contains_many(self, keys: Sequence[bytes]) -> list[bool]:
        """``contains`` of each."""
        return [self.contains(key) for key in keys]

    @abstractmethod
    def touch(self, keys: Iterable[bytes]) -> int:
        """Marks them as just used, the last one last; how many of them are here."""

    @abstractmethod
    def remove(self, key: bytes) -> bool:
        """Forgets it: False if it was not here. A lease on it lives on. No callback."""

    @abstractmethod
    def clear(self) -> None:
        """Forgets all. Leases live on. No callback."""

    @abstractmethod
    def stats(self) -> StoreStats: ...

    @abstractmethod
    def close(self) -> bool:
        """From now on it refuses and misses. True if all that was put is where it belongs. Leases live on."""


def check_key(key: bytes) -> None:
    """Raises ConfigError."""
    if not isinstance(key, bytes) or not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
        told = f"{len(key)} bytes" if isinstance(key, bytes) else type(key).__name__
        raise ConfigError(f"a key is {told}; it must be bytes, {MIN_KEY_BYTES} to {MAX_KEY_BYTES} of them")


def check_record_bytes(nbytes: int) -> None:
    """Raises ConfigError."""
    if not 1 <= nbytes <= MAX_RECORD_BYTES:
        raise ConfigError(f"a record of {nbytes} bytes; it must have 1 to {MAX_RECORD_BYTES}: store it in parts")
