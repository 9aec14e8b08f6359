"""The holder's side: answers asks of its own namespace and model key from its store.

Records stay on lease from their first layer group to their last as long as the budget of leased bytes has room;
beyond, they are fetched again for each group, and one that is gone by then is said to be missing. Whoever waits for
room holds no lease meanwhile. Each frame has a deadline: an asker that takes nothing is given up.

The budget counts what an ask says that records have. One that has another size is found after it was fetched, and let
go at once: what is fetched together (``_FETCHED``) bounds how much that may be.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from dynamo_kvtc.codec.record import CRC_OFFSET, section_ends
from dynamo_kvtc.errors import ConfigError, RecordError, TransferError, TransferProtocolError, TransferTimeoutError
from dynamo_kvtc.store import Lease, Store
from dynamo_kvtc.transfer import wire
from dynamo_kvtc.transfer.budget import Budget
from dynamo_kvtc.transfer.options import Peers, ServeOptions
from dynamo_kvtc.transfer.plane import PLANES, Buffer, Plane, Sender

_FETCHED = 16

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeStats:
    """asks: answered or refused; missing: items that nothing was sent of; errors: asks that ended otherwise, by kind.
    leased_bytes: now; leased_peak_bytes: at most so far."""

    asks: int = 0
    refused: int = 0
    missing: int = 0
    sent_bytes: int = 0
    leased_bytes: int = 0
    leased_peak_bytes: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)


class Server:
    """Serves ``store`` on ``planes`` from now on. ``addresses``: plane name -> address, to be advertised."""

    def __init__(
        self, store: Store, peers: Peers, planes: Sequence[Plane], options: ServeOptions | None = None
    ) -> None:
        """planes: not served yet; they stay the caller's, and are closed before or after ``close``. Raises ConfigError,
        TransferError."""
        if not planes:
            raise ConfigError(f"no plane to serve on; give at least one of {', '.join(PLANES)}")
        self._store, self._peers, self._options = store, peers, options or ServeOptions()
        self._budget = Budget(self._options.leased_bytes)
        self._asks = threading.BoundedSemaphore(self._options.asks)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._told: set[tuple[str, str]] = set()
        self._closed = False
        self.addresses = {plane.name: plane.serve(self._answer) for plane in planes}

    def stats(self) -> ServeStats:
        with self._lock:
            counts, errors = dict(self._counts), dict(self._errors)
        return ServeStats(
            **counts, leased_bytes=self._budget.taken_bytes, leased_peak_bytes=self._budget.peak_bytes, errors=errors
        )

    def close(self, timeout: float = 5.0) -> bool:
        """Refuses from now on. True if no lease is out at the end of timeout seconds."""
        self._closed = True
        deadline = time.monotonic() + timeout
        while self._budget.taken_bytes and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self._budget.taken_bytes

    def _answer(self, frame: memoryview, sender: Sender) -> None:
        """One ask, from its first frame to the last. Raises what ends the connection."""
        try:
            ask = wire.check_ask(wire.unpack(frame)[0])
        except TransferProtocolError:
            self._count(errors="protocol")
            raise
        deadline = time.monotonic() + self._options.ask_seconds
        why, busy = self._refusal(ask)
        if not why and not self._asks.acquire(blocking=False):
            why, busy = f"{self._options.asks} asks are being answered", True
        self._count(asks=1, refused=bool(why))
        try:
            if why:
                self._send(sender, [wire.pack(wire.Refused(ask.ask, why, busy))], deadline)
                return
            try:
                _Answer(self, ask, sender, deadline).run()
            finally:
                self._asks.release()
        except TransferError as exc:
            self._count(errors=type(exc).__name__)
            raise

    def _refusal(self, ask: wire.Ask) -> tuple[str, bool]:
        if self._closed:
            return "this holder is closing", False
        theirs = (ask.namespace, ask.model)
        if theirs == (self._peers.namespace, self._peers.model):
            return "", False
        with self._lock:
            new = theirs not in self._told and len(self._told) < 64
            if new:
                self._told.add(theirs)
        told = f"serves {self._peers.namespace}/{self._peers.model}, asked for {ask.namespace}/{ask.model}"
        if new:
            log.warning("transfer: an ask was refused: this worker %s", told)
        return told[:1000], False

    def _send(self, sender: Sender, frame: Sequence[Buffer], deadline: float) -> None:
        sender.send(frame, min(deadline, time.monotonic() + self._options.stall_seconds))

    def _count(self, errors: str | None = None, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)
            if errors is not None:
                self._errors[errors] += 1


class _Answer:
    """The leases of one ask, and its frames. A frame's stretches stay on lease until it is sent; spent: records that
    nothing more is wanted of afterwards."""

    def __init__(self, server: Server, ask: wire.Ask, sender: Sender, deadline: float) -> None:
        self._server, self._ask, self._sender, self._deadline = server, ask, sender, deadline
        self._left = [item.groups for item in ask.items]
        self._ends: list[list[int] | None] = [None] * len(ask.items)
        self._held: dict[int, Lease] = {}
        self._spent: list[int] = []
        self._segments: list[tuple[int, int, int]] = []
        self._sent = 0
        self._parts: list[memoryview] = []
        self._room = self._full = sender.frame_bytes - 64

    def run(self) -> None:
        items = self._ask.items
        try:
            self._missing([(i, wire.ABSENT) for i, item in enumerate(items) if not self._store.contains(item.key)])
            if self._ask.whole:
                for some in self._batches([i for i, left in enumerate(self._left) if left]):
                    self._lease(some)
                    for i in some:
                        self._record(i)
                    self._spent += [i for i in some if i in self._held]
            for group in range(max(left.bit_length() for left in self._left)):
                wanted = [i for i, left in enumerate(self._left) if left >> group & 1]
                for some in self._batches(wanted):
                    self._lease(some)
                    for i in some:
                        if self._left[i]:
                            self._piece(i, group)
                            self._left[i] &= -1 << (group + 1)
                    self._spent += [i for i in some if not self._left[i] and i in self._held]
            self._flush()
            self._server._send(self._sender, [wire.pack(wire.End(self._ask.ask, self._sent))], self._deadline)
        finally:
            self._parts.clear()
            self._release(list(self._held))

    @property
    def _store(self) -> Store:
        return self._server._store

    def _batches(self, wanted: Sequence[int]) -> Iterator[list[int]]:
        """Few enough to be fetched at once: what is on lease already does not count."""
        some: list[int] = []
        fetched = nbytes = 0
        for i in wanted:
            size = 0 if i in self._held else self._ask.items[i].size
            if some and size and (fetched == _FETCHED or nbytes + size > self._server._budget.limit_bytes):
                yield some
                some, fetched, nbytes = [], 0, 0
            some.append(i)
            fetched, nbytes = fetched + bool(size), nbytes + size
        if some:
            yield some

    def _lease(self, some: Sequence[int]) -> None:
        """Items that are not here any more, or are not what was asked for, have nothing left to send afterwards."""
        budget, items = self._server._budget, self._ask.items
        fetch = [i for i in some if i not in self._held and self._left[i]]
        need = sum(items[i].size for i in fetch)
        if not fetch:
            return
        if not budget.try_take(need):
            # Two asks that each wait for what the other holds would wait for ever.
            self._flush()
            self._release(list(self._held))
            fetch = [i for i in some if self._left[i]]
            need = sum(items[i].size for i in fetch)
            if need > budget.limit_bytes or not budget.take(need, self._deadline):
                raise TransferTimeoutError(f"no room for {need} bytes on lease within the time of the ask")
        missing = []
        leases: Sequence[Lease | None] = [None] * len(fetch)
        try:
            leases = self._store.get_many([items[i].key for i in fetch])
        finally:
            for i, lease in zip(fetch, leases, strict=True):
                why = self._look(i, lease)
                if lease is not None and not why:
                    self._held[i] = lease
                    continue
                missing.append((i, why))
                if lease is not None:
                    lease.release()
                budget.give(items[i].size)
        self._missing(missing)

    def _look(self, i: int, lease: Lease | None) -> int:
        """0, or why this record is not sent."""
        item = self._ask.items[i]
        if lease is None:
            return wire.ABSENT
        if len(lease) != item.size:
            return wire.OTHER_SIZE
        if self._ends[i] is None:
            try:
                self._ends[i] = section_ends(lease.record)
            except RecordError as exc:
                log.warning("transfer: a stored record is damaged: %s", exc)
                return wire.DAMAGED
        header = int.from_bytes(lease.record[CRC_OFFSET : CRC_OFFSET + 4], "little")
        return wire.OTHER_RECORD if item.header not in (0, header) else 0

    def _record(self, i: int) -> None:
        """What is wanted of it, in one stretch where that is all."""
        ends, left, self._left[i] = self._ends[i], self._left[i], 0
        if not left:
            return
        assert ends is not None
        every = (1 << (len(ends) - 1)) - 1
        if left & every == every:
            self._stretch(i, 0, ends[-1])
            return
        for group in wire.groups_of(left):
            self._piece(i, group)

    def _piece(self, i: int, group: int) -> None:
        ends = self._ends[i]
        assert ends is not None
        if group >= len(ends) - 1:
            self._left[i] = 0
            return
        self._stretch(i, ends[group] if group else 0, ends[group + 1])

    def _stretch(self, i: int, start: int, end: int) -> None:
        record = self._held[i].record
        while start < end:
            cut = min(end, start + self._room - wire.SEGMENT_ROOM)
            self._segments.append((i, start, cut - start))
            self._parts.append(record[start:cut])
            self._room -= cut - start + wire.SEGMENT_ROOM
            if self._room < 2 * wire.SEGMENT_ROOM + 64:
                self._flush()
            start = cut

    def _flush(self) -> None:
        if self._segments:
            head = wire.pack(wire.Pieces(self._ask.ask, self._segments))
            self._server._send(self._sender, [head, *self._parts], self._deadline)
            nbytes = sum(length for _, _, length in self._segments)
            self._sent += nbytes
            self._server._count(sent_bytes=nbytes)
            for part in self._parts:
                part.release()
            self._segments, self._parts, self._room = [], [], self._full
        spent, self._spent = self._spent, []
        self._release(spent)

    def _missing(self, items: list[tuple[int, int]]) -> None:
        for i, _ in items:
            self._left[i] = 0
        step = max(1, self._full // wire.SEGMENT_ROOM)
        for at in range(0, len(items), step):
            self._server._send(
                self._sender, [wire.pack(wire.Missing(self._ask.ask, items[at : at + step]))], self._deadline
            )
        self._server._count(missing=len(items))

    def _release(self, some: Sequence[int]) -> None:
        for i in some:
            self._held.pop(i).release()
            self._server._budget.give(self._ask.items[i].size)
