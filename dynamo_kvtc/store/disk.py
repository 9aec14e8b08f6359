"""The disk tier: records in one preallocated file, their places in SQLite, a bounded queue in front.

Why so (figures in the README's section "Stores"; `kvtc bench store` measures them again): the budget must hold as the
operating system counts it, and a bad disk must not end the engine. LMDB is the quickest to read and holds a budget by
its map, but a map turns a truncated file or a read error into a SIGBUS in the engine (5 of 5 truncations). RocksDB has
1.8 to 2 times the live bytes between compactions, with no hard cap. Records inside SQLite write 2.6 to 3.3 bytes a byte
and are half as quick to write; diskcache has a file a record, which it never syncs. So SQLite does what it is best at,
a small crash-safe index, and the bytes lie in a flat file of fixed size that is full from the start: a disk that fills
up later takes nothing from it. What is paid: two syncs a batch, checksums, and the bookkeeping is Python's.

A put is a copy into the queue; it is refused when the queue is full, never waits. ``flush`` or ``on_stored`` say that
a record is on the disk: kill -9 loses at most what they had not said. A record's checksum covers its key; one that does
not agree is removed, counted ("corrupt") and missed. What is not in the system's cache is
read by a few threads and given up at a deadline.
Recency survives a restart but for the last commit's worth of uses.
"""

from __future__ import annotations

import binascii
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.store import Lease, OnEvicted, Record, Store, StoreStats, check_key, check_record_bytes
from dynamo_kvtc.store.disk_file import DATA, INDEX, UNIT_BYTES, DataFile, Folder
from dynamo_kvtc.store.disk_index import Index, forget
from dynamo_kvtc.store.disk_writer import Flush, Queue, Told, Writer, error_name, shelf_bytes
from dynamo_kvtc.store.extents import NONE
from dynamo_kvtc.store.readers import Readers
from dynamo_kvtc.store.shelf import Shelf

MAX_PARTS = 8
"""Holes a record may be spread over, so that the file needs no sliding together."""
INDEX_SHARE, LOG_SHARE = 32, 64
"""A budget over what its index and the index's log may take."""
_OTHER_BYTES = 64 << 10
"""Marker, lock and the folder itself."""

_Job = tuple[int, bytes, int, list[tuple[int, int]], int, int]
"""Place in the answer, key, slot, where, record's bytes, checksum."""

log = logging.getLogger(__name__)


class DiskStore(Store):
    """Besides the interface: ``flush``, ``durable``. on_stored(key): it is on the disk. on_lost(key): it was accepted
    and is not here, for an error. Callbacks come from the store's threads, outside its locks."""

    def __init__(
        self, path: str | os.PathLike[str], budget_bytes: int, queue_bytes: int = 256 << 20, readers: int = 4,
        read_seconds: float = 1.0, on_evicted: OnEvicted | None = None, on_stored: Told | None = None,
        on_lost: Told | None = None, fresh: bool = False,
    ) -> None:  # fmt: skip
        """path: a folder of its own, made if its parent exists; budget_bytes: of the disk, all files together;
        queue_bytes: of memory for records that wait to be written; read_seconds: when a read is given up; fresh: what
        an earlier process left there is forgotten.

        Raises ConfigError: the folder is not ours, of another version, locked, not writable or the disk too small.
        """
        if queue_bytes < 1 or readers < 1 or not read_seconds > 0:
            raise ConfigError(
                f"queue_bytes {queue_bytes}, readers {readers}, read_seconds {read_seconds}: all must be positive"
            )
        self.path, self.budget_bytes = Path(path), budget_bytes
        self.on_evicted, self.on_stored, self.on_lost = on_evicted, on_stored, on_lost
        index_bytes = max(1 << 20, budget_bytes // INDEX_SHARE)
        wal_bytes = max(1 << 20, min(8 << 20, budget_bytes // LOG_SHARE))
        units = (budget_bytes - index_bytes - wal_bytes - _OTHER_BYTES) // UNIT_BYTES
        self._folder = Folder(self.path, budget_bytes)
        try:
            shelf = Shelf(units, UNIT_BYTES, MAX_PARTS)
            if fresh:
                _forget(self.path / INDEX)
            self._data = DataFile(self.path / DATA, units * UNIT_BYTES)
            self._queue = Queue(shelf, queue_bytes)
            index = self._open_index(index_bytes, wal_bytes)
        except BaseException:
            if hasattr(self, "_data"):
                self._data.close()
            self._folder.unlock()
            raise
        self._read_seconds = read_seconds
        self._closed = False
        self._readers = Readers(readers)
        self._writer = Writer(
            self._queue, self._data, index, lambda key: self._tell(self.on_stored, key),
            lambda key: self._tell(None if self.on_evicted is None else partial(self._evicted_told, lease=None), key),
            lambda key: self._tell(self.on_lost, key),
        )  # fmt: skip

    def put(self, key: bytes, record: Record) -> bool:
        check_key(key)
        view = memoryview(record).cast("B")
        check_record_bytes(view.nbytes)
        q = self._queue
        with q.lock:
            if self._closed:
                return False
            if key in q.pending or key in q.shelf.slots:
                return True
            full = q.pending_bytes + view.nbytes > q.queue_bytes or view.nbytes > shelf_bytes(q.shelf) // 8
            if full or time.monotonic() < q.refuse_until:
                q.counts["refused"] += 1
                return False
            q.sequence += 1
            q.pending[key] = (q.sequence, bytes(view))
            q.pending_bytes += view.nbytes
            q.lock.notify()
            return True

    def get(self, key: bytes) -> Lease | None:
        return self.get_many([key])[0]

    def get_many(self, keys: Sequence[bytes]) -> list[Lease | None]:
        """One deadline for all of them."""
        deadline = time.monotonic() + self._read_seconds
        out: list[bytes | bytearray | None] = [None] * len(keys)
        jobs: list[_Job] = []
        q = self._queue
        with q.lock:
            for i, key in enumerate(keys):
                waiting = q.pending.get(key)
                slot = q.shelf.slots.get(key, NONE)
                if self._closed or (waiting is None and slot == NONE):
                    continue
                if waiting is not None:
                    out[i] = waiting[1]
                elif self._readers.stuck:
                    q.error("read_timeout")
                else:
                    q.mark_used(slot)
                    q.shelf.pin(slot)
                    jobs.append((i, key, slot, q.shelf.places(slot), q.shelf.nbytes[slot], q.crcs[slot]))
        # What the system has in memory is read here and now, the rest by threads that may be left behind.
        cold = [job for job in jobs if not self._fetch(job, out, self._data.read_cached)]
        shares = [cold[n :: len(self._readers)] for n in range(min(len(self._readers), len(cold)))]
        in_time = self._readers.run([partial(self._read_all, share, out) for share in shares], deadline)
        # Whatever comes later comes into a list that nobody has.
        leases = [None if record is None else Lease(record, len(record)) for record in list(out)]
        hits = sum(lease is not None for lease in leases)
        slow = {job[0] for job in cold}
        with q.lock:
            for job in jobs:
                if job[0] not in slow:
                    q.shelf.unpin(job[2])
            q.errors["read_timeout"] += not in_time
            q.counts["hits"] += hits
            q.counts["misses"] += len(keys) - hits
        return leases

    def contains(self, key: bytes) -> bool:
        q = self._queue
        with q.lock:
            return not self._closed and (key in q.pending or key in q.shelf.slots)

    def held(self) -> list[tuple[bytes, int]]:
        """(key, bytes) of all records that are on the disk."""
        with self._queue.lock:
            shelf = self._queue.shelf
            return [(key, shelf.nbytes[slot]) for key, slot in shelf.slots.items()]

    def size_of(self, key: bytes) -> int | None:
        """Bytes of a record that is on the disk; None if it is not."""
        with self._queue.lock:
            slot = self._queue.shelf.slots.get(key, NONE)
            return None if slot == NONE or self._closed else self._queue.shelf.nbytes[slot]

    def durable(self, key: bytes) -> bool:
        """Whether it is on the disk, not only in the queue."""
        with self._queue.lock:
            return not self._closed and key in self._queue.shelf.slots

    def touch(self, keys: Iterable[bytes]) -> int:
        q, found = self._queue, 0
        with q.lock:
            for key in keys:
                slot = q.shelf.slots.get(key, NONE)
                if slot != NONE:
                    q.mark_used(slot)
                found += slot != NONE or key in q.pending
        return found

    def remove(self, key: bytes) -> bool:
        """Killed before the next turn of the writer, it is found again at the next start."""
        q = self._queue
        with q.lock:
            waiting = q.pending.pop(key, None)
            if waiting is not None:
                q.pending_bytes -= len(waiting[1])
            slot = q.shelf.slots.get(key, NONE)
            if slot != NONE:
                q.drop(slot)
                q.lock.notify()
            return waiting is not None or slot != NONE

    def clear(self) -> None:
        q = self._queue
        with q.lock:
            q.pending.clear()
            q.pending_bytes = 0
            for slot in list(q.shelf.slots.values()):
                q.drop(slot)
            q.lock.notify()

    def flush(self, timeout: float = 10.0) -> bool:
        """True: all that was put or removed since the last flush is on the disk, uses too. False: not so."""
        q = self._queue
        with q.lock:
            if q.closing:
                return not q.pending
            flush = Flush(q.sequence)
            q.flushes.append(flush)
            q.lock.notify()
        return flush.done.wait(timeout) and flush.ok

    def stats(self) -> StoreStats:
        q = self._queue
        with q.lock:
            return StoreStats(
                len(q.shelf) + len(q.pending), q.shelf.record_bytes + q.pending_bytes,
                q.shelf.used_bytes + q.index_bytes, self.budget_bytes, q.counts["evictions"], q.counts["hits"],
                q.counts["misses"], q.counts["refused"], dict(+q.errors), q.shelf.fragmentation,
            )  # fmt: skip

    def close(self, timeout: float = 10.0) -> bool:
        """Writes what waits, until the timeout (seconds). A thread that hangs on the disk is left behind, and with it
        the folder's lock, until the process ends."""
        deadline = time.monotonic() + timeout
        q = self._queue
        with q.lock:
            if self._closed:
                return True
            self._closed = True
        flushed = self.flush(timeout)
        with q.lock:
            q.closing, q.stop_at = True, deadline
            q.lock.notify()
        self._writer.thread.join(max(0.0, deadline - time.monotonic()))
        ended = self._readers.close(max(deadline, time.monotonic() + 0.1))
        if self._writer.thread.is_alive() or not ended:
            return False
        try:
            self._writer.index.close()
        except OSError as exc:
            q.error(f"index_{error_name(exc)}")
            flushed = False
        self._data.close()
        self._folder.unlock()
        return flushed

    def _read_all(self, jobs: Sequence[_Job], out: list[bytes | bytearray | None]) -> None:
        """In a reader's thread."""
        for job in jobs:
            try:
                self._fetch(job, out, self._data.read)
            finally:
                with self._queue.lock:
                    self._queue.shelf.unpin(job[2])

    def _fetch(self, job: _Job, out: list[bytes | bytearray | None], read: Callable[[int, memoryview], bool]) -> bool:
        """False if ``read`` cannot without waiting. What cannot be read or is not what was written is dropped."""
        i, key, slot, places, nbytes, crc = job
        kind, record = "corrupt", bytearray(nbytes)
        try:
            view, at = memoryview(record), 0
            for offset, length in places:
                if not read(offset, view[at : at + length]):
                    return False
                at += length
            if binascii.crc32(record, binascii.crc32(key)) == crc:
                out[i] = record
                return True
        except OSError as exc:
            kind = f"read_{error_name(exc)}"
        self._drop_bad(key, slot, kind)
        return True

    def _drop_bad(self, key: bytes, slot: int, kind: str) -> None:
        """What cannot be read, or is not what was written, is not tried again."""
        q = self._queue
        with q.lock:
            q.error(kind)
            # The same slot may be another record's by now, of the same key even: then one miss too many.
            bad = q.shelf.slots.get(key, NONE) == slot
            if bad:
                q.drop(slot)
                q.lock.notify()
        if bad:
            self._tell(self.on_lost, key)

    def _open_index(self, index_bytes: int, wal_bytes: int) -> Index:
        """What it says is on the shelf; a damaged one is begun anew: the records are lost, the store goes on."""
        path, q = self.path / INDEX, self._queue
        try:
            index = Index(path, index_bytes, wal_bytes)
            try:
                rows = index.rows()
                slots = q.shelf.adopt([(r.key, r.nbytes, r.places) for r in rows])
                index.keep_only(r.id for r, slot in zip(rows, slots, strict=True) if slot != NONE)
                if index.crowded() and not rows:
                    raise OSError("the index is larger than its cap")
            except BaseException:
                index.close()
                raise
        except OSError as exc:
            log.warning("%s cannot be read (%s): the disk tier starts empty", path, exc)
            q.error("index_damaged")
            q.shelf.adopt([])
            try:
                forget(path)
                return Index(path, index_bytes, wal_bytes)
            except OSError as again:
                raise ConfigError(f"{path}: {again}; empty the folder or name another") from again
        for row, slot in zip(rows, slots, strict=True):
            if slot != NONE:
                q.ids[slot], q.crcs[slot] = row.id, row.crc
                q.clock = max(q.clock, row.used, row.id)
        q.index_bytes = index.used_bytes()
        return index

    def _evicted_told(self, key: bytes, lease: Lease | None) -> None:
        assert self.on_evicted is not None
        self.on_evicted(key, lease)

    def _tell(self, told: Callable[[bytes], None] | None, key: bytes) -> None:
        if told is None:
            return
        try:
            told(key)
        except Exception:
            log.exception("a callback failed")
            with self._queue.lock:
                self._queue.error("callback")


def _forget(index: Path) -> None:
    try:
        forget(index)
    except OSError as exc:
        raise ConfigError(f"{index}: {exc.strerror}; empty the folder or name another") from exc
