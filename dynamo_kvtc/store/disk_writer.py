"""The disk tier's writer: one thread between the queue of puts and the disk.

A turn takes what waits (a few MiB at most), evicts if need be, writes and syncs the records, and only then commits
their rows: a row that can be found has its bytes behind it. Room is given back only after the rows that named it are
gone. Should an error break that order, the checksum over key and record still tells: what does not agree is not served.
"""

from __future__ import annotations

import binascii
import errno
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from dynamo_kvtc.store.disk_file import DataFile
from dynamo_kvtc.store.disk_index import Index, Row
from dynamo_kvtc.store.extents import NONE
from dynamo_kvtc.store.shelf import Shelf

BATCH_BYTES = 8 << 20
AHEAD_BYTES = 64 << 20
"""Evicted at once, at most (of a small store: 1/64): a commit of its own, so not for every turn."""
TOUCHES_KEPT = 1 << 16
FAILURES_TO_REFUSE = 3
MAX_REFUSE_SECONDS = 60.0

log = logging.getLogger(__name__)
Told = Callable[[bytes], None]


@dataclass
class Flush:
    """done is set once everything queued before it was tried; ok: nothing was lost since the last."""

    upto: int
    done: threading.Event = field(default_factory=threading.Event)
    ok: bool = True


class Queue:
    """What readers, callers and the writer share, under ``lock``: the shelf, and what waits to be written."""

    def __init__(self, shelf: Shelf, queue_bytes: int) -> None:
        self.lock = threading.Condition()
        self.shelf = shelf
        self.ids: dict[int, int] = {}
        self.crcs: dict[int, int] = {}
        self.pending: dict[bytes, tuple[int, bytes]] = {}
        self.pending_bytes = 0
        self.queue_bytes = queue_bytes
        self.gone: list[int] = []
        self.touched: dict[int, int] = {}
        self.flushes: list[Flush] = []
        self.clock = self.sequence = 0
        self.refuse_until = 0.0
        self.closing = False
        self.stop_at = 0.0
        self.index_bytes = 0
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    def mark_used(self, slot: int) -> None:
        self.clock += 1
        self.shelf.use(slot)
        if len(self.touched) < TOUCHES_KEPT or slot in self.touched:
            self.touched[slot] = self.clock

    def drop(self, slot: int) -> None:
        """It cannot be found; its room is the writer's to give back."""
        self.touched.pop(slot, None)
        self.shelf.drop(slot)
        self.gone.append(slot)

    def error(self, kind: str) -> None:
        self.errors[kind] += 1


class Writer:
    def __init__(self, queue: Queue, data: DataFile, index: Index, stored: Told, evicted: Told, lost: Told) -> None:
        """stored, evicted, lost: called with a key outside the lock; lost: accepted, but it could not be written."""
        self.queue, self.data, self.index = queue, data, index
        self._stored, self._evicted, self._lost = stored, evicted, lost
        self._failures = self._failed = 0
        self._intact = True
        self._batch_bytes = min(BATCH_BYTES, shelf_bytes(queue.shelf) // 8)
        self._rows = max(1, index.rows_per_commit // 3)
        self.thread = threading.Thread(target=self._run, daemon=True, name="kvtc-write")
        self.thread.start()

    def _run(self) -> None:
        q = self.queue
        while True:
            with q.lock:
                q.lock.wait_for(lambda: q.pending or q.gone or q.flushes or q.closing)
                if q.closing and (time.monotonic() > q.stop_at or not (q.pending or q.gone or q.flushes)):
                    break
                batch = self._next_batch()
                flushes, q.flushes = q.flushes, []
            lost: list[bytes] = []
            failed = self._failed
            self._turn(batch, lost, bool(flushes))
            self._intact &= not lost and failed == self._failed
            self._give_up(batch)
            for key in lost:
                self._lost(key)
            self._end_turn(flushes)

    def _next_batch(self) -> list[tuple[bytes, int, bytes]]:
        batch: list[tuple[bytes, int, bytes]] = []
        size = 0
        for key, (number, record) in self.queue.pending.items():
            size += len(record)
            if batch and (size > self._batch_bytes or len(batch) >= self._rows):
                break
            batch.append((key, number, record))
        return batch

    def _turn(self, batch: Sequence[tuple[bytes, int, bytes]], lost: list[bytes], all_touches: bool) -> None:
        q = self.queue
        with q.lock:
            gone, q.gone = q.gone, []
        self._delete(gone)
        slots: list[int] = []
        try:
            for nth in range(len(batch)):
                slots.append(self._room(batch, nth))
            rows = self._write(batch, slots)
            while True:
                with q.lock:
                    some = list(islice(q.touched, self._rows))
                    touches = [(q.touched.pop(s), q.ids[s]) for s in some]
                if rows or touches:
                    self.index.commit(rows, (), touches)
                if rows:
                    self._shelve(batch, slots, rows)
                    self._failures = 0
                rows = []
                if not all_touches or not touches:
                    break
        except Exception as exc:  # whatever it is: the engine must not stop over a disk
            self._fail(exc, [s for s in slots if s != NONE and s not in q.ids])
            lost.extend(key for key, _, _ in batch if not self._on_disk(key))
            return
        lost.extend(key for (key, _, _), slot in zip(batch, slots, strict=True) if slot == NONE)

    def _write(self, batch: Sequence[tuple[bytes, int, bytes]], slots: Sequence[int]) -> list[Row]:
        q, rows = self.queue, []
        for (key, _, record), slot in zip(batch, slots, strict=True):
            if slot == NONE:
                continue
            with q.lock:
                q.clock += 1
                places, units, now = q.shelf.places(slot), self._units(slot), q.clock
            view, at = memoryview(record), 0
            for offset, length in places:
                self.data.write(offset, view[at : at + length])
                at += length
            crc = binascii.crc32(record, binascii.crc32(key))
            rows.append(Row(now, key, len(record), crc, now, units))
        if rows:
            self.data.sync()
        return rows

    def _shelve(self, batch: Sequence[tuple[bytes, int, bytes]], slots: Sequence[int], rows: Sequence[Row]) -> None:
        """What is on the disk can be found, and is announced."""
        q, stored = self.queue, []
        written = {row.key: row for row in rows}
        with q.lock:
            for (key, number, _), slot in zip(batch, slots, strict=True):
                if slot == NONE:
                    continue
                row = written[key]
                q.ids[slot], q.crcs[slot] = row.id, row.crc
                q.shelf.name(slot, key)
                q.shelf.unpin(slot)
                if q.pending.get(key, (-1,))[0] != number:
                    q.drop(slot)  # removed while it was written
                else:
                    stored.append(key)
                    q.pending_bytes -= len(q.pending.pop(key)[1])
        for key in stored:
            self._stored(key)

    def _room(self, batch: Sequence[tuple[bytes, int, bytes]], nth: int) -> int:
        """A slot for the nth; evicts, somewhat ahead, so that not every turn does."""
        q, blocks = self.queue, self.queue.shelf.extents
        nbytes = len(batch[nth][2])
        goal = q.shelf.units(nbytes)
        crowded = nth == 0 and self._crowded()
        for _ in range(8):
            with q.lock:
                slot = NONE if crowded else q.shelf.take(nbytes)
                if slot != NONE:
                    return slot
                # The next try frees more: holes may be too small for a record in so many parts, or still read from.
                ahead = min(blocks.units // 64, AHEAD_BYTES // q.shelf.unit_bytes)
                goal = max(goal * 2, sum(q.shelf.units(len(r)) for _, _, r in batch), ahead)
                victims, room = [], 0
                while room < goal and (victim := q.shelf.oldest()) != NONE:
                    victims.append((victim, q.shelf.keys[victim]))
                    room += sum(n for _, n in q.shelf.places(victim)) // q.shelf.unit_bytes
                    q.touched.pop(victim, None)
                    q.shelf.drop(victim)
                q.counts["evictions"] += len(victims)
            if not victims:
                break
            self._delete([slot for slot, _ in victims])
            crowded = crowded and self._crowded()
            for _, key in victims:
                assert key is not None
                self._evicted(key)
        with q.lock:
            q.error("no_room")
        return NONE

    def _crowded(self) -> bool:
        try:
            return self.index.crowded()
        except OSError:
            return False  # the commit will say so

    def _delete(self, slots: Sequence[int]) -> None:
        """Rows first, then their room."""
        q = self.queue
        for i in range(0, len(slots), self._rows):
            some = slots[i : i + self._rows]
            try:
                self.index.commit((), [q.ids[slot] for slot in some], ())
            except OSError as exc:
                self._fail(exc, ())
            with q.lock:
                for slot in some:
                    del q.ids[slot], q.crcs[slot]
                    q.shelf.unpin(slot)

    def _fail(self, exc: Exception, slots: Sequence[int]) -> None:
        self._failures += 1
        self._failed += 1
        kind = f"write_{error_name(exc)}"
        with self.queue.lock:
            if not self.queue.errors[kind]:
                log.warning("the disk tier cannot write", exc_info=exc)
            self.queue.error(kind)
            for slot in slots:
                self.queue.shelf.unpin(slot)
            if self._failures >= FAILURES_TO_REFUSE:
                wait = min(MAX_REFUSE_SECONDS, 2.0 ** (self._failures - FAILURES_TO_REFUSE))
                self.queue.refuse_until = time.monotonic() + wait
        if getattr(exc, "damaged", False):
            self._renew_index()

    def _renew_index(self) -> None:
        """Everything it said is in memory, too."""
        q, rows = self.queue, []
        with q.lock:
            q.error("index_damaged")
            by_age = q.shelf.by_age()
            for slot in (*by_age, *(set(q.shelf.slots.values()) - set(by_age))):
                key = q.shelf.keys[slot]
                assert key is not None
                q.clock += 1
                rows.append(Row(q.ids[slot], key, q.shelf.nbytes[slot], q.crcs[slot], q.clock, self._units(slot)))
        try:
            self.index = self.index.begun_anew(rows)
        except OSError:
            log.exception("the disk tier's index cannot be begun anew")

    def _units(self, slot: int) -> list[tuple[int, int]]:
        unit = self.queue.shelf.unit_bytes
        return [(offset // unit, length // unit) for offset, length in self.queue.shelf.places(slot)]

    def _on_disk(self, key: bytes) -> bool:
        with self.queue.lock:
            return key in self.queue.shelf.slots

    def _give_up(self, batch: Sequence[tuple[bytes, int, bytes]]) -> None:
        """What was not written is not tried again."""
        q = self.queue
        with q.lock:
            for key, number, record in batch:
                if q.pending.get(key, (-1,))[0] == number:
                    del q.pending[key]
                    q.pending_bytes -= len(record)

    def _end_turn(self, flushes: Sequence[Flush]) -> None:
        q = self.queue
        with q.lock:
            first = next(iter(q.pending.values()), (q.sequence + 1,))[0]
            for flush in flushes:
                if flush.upto < first:
                    flush.ok, self._intact = self._intact, True
                    flush.done.set()
                else:
                    q.flushes.append(flush)
            try:
                q.index_bytes = self.index.used_bytes()
            except OSError as exc:
                q.error(f"index_{error_name(exc)}")


def shelf_bytes(shelf: Shelf) -> int:
    return shelf.extents.units * shelf.unit_bytes


def error_name(exc: BaseException) -> str:
    """ "ENOSPC", "SQLITE_FULL": a kind to count by."""
    number = getattr(exc, "errno", None)
    return getattr(exc, "kind", None) or errno.errorcode.get(number or 0, type(exc).__name__)
