"""Everything that a worker holds, told in pages to whoever asks; and the asking."""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

from dynamo_kvtc.errors import EventError, NatsError
from dynamo_kvtc.events.inbox import Message
from dynamo_kvtc.events.index import Index
from dynamo_kvtc.events.schema import Held, SnapshotAsk, SnapshotPage, WorkerUp, decode, encode, tier_number

PAGE = 4096
ASKERS = 16
"""Snapshots that go on at once; the one that was asked least recently ends."""
IDLE_SECONDS = 60.0
PAGE_SECONDS = 2.0
PAGE_TRIES = 3
LEAST_ENTRIES = 64
"""Of a page that is not the last: nobody keeps us busy with crumbs."""
SNAPSHOT_SECONDS, MOST_SECONDS = 5.0, 60.0
PACE = 4096
"""Entries that make a snapshot's time longer by a second: others wait meanwhile, so it may be large, but not slow."""

Holdings = Callable[[], Iterable[tuple[bytes, str, int]]]
"""(key, tier, size in bytes) of all records. Called, and gone through, on another thread than the store's."""


class _Reading:
    def __init__(self, entries: Iterator[tuple[bytes, str, int]], sequence: int) -> None:
        self.entries, self.sequence = entries, sequence
        self.page, self.last = -1, b""
        self.used = time.monotonic()


class SnapshotServer:
    """``answer`` is a handler for ``Nats.serve``. sequence: the number of the next event; read before the holdings are,
    so that whatever changes later has an event that is applied over the snapshot."""

    def __init__(self, up: WorkerUp, holdings: Holdings, sequence: Callable[[], int], page: int = PAGE) -> None:
        self._up, self._holdings, self._sequence, self._page = up, holdings, sequence, page
        self._readings: OrderedDict[str, _Reading] = OrderedDict()
        self._lock = threading.Lock()
        self.pages = 0

    def answer(self, message: Message) -> bytes:
        """Raises EventError for what is no question; the asker is then told that it failed."""
        ask = decode(SnapshotAsk, message.data, 1024)
        with self._lock:
            return self._answer(ask)

    def _answer(self, ask: SnapshotAsk) -> bytes:
        up, now = self._up, time.monotonic()
        for asker in [a for a, r in self._readings.items() if now - r.used > IDLE_SECONDS]:
            del self._readings[asker]
        reading = self._readings.get(ask.asker)
        if ask.epoch != up.epoch or (reading is None and ask.page != 0):
            # Of another epoch, or of a snapshot that was given up here: begin anew.
            return encode(SnapshotPage(up.worker, up.epoch, ask.page, 0, True, []))
        if reading is None:
            sequence = self._sequence()
            reading = self._readings[ask.asker] = _Reading(iter(self._holdings()), sequence)
            if len(self._readings) > ASKERS:
                self._readings.popitem(last=False)
        self._readings.move_to_end(ask.asker)
        reading.used = now
        if ask.page == reading.page + 1:
            entries = [Held(k, tier_number(t), n) for k, t, n in itertools.islice(reading.entries, self._page)]
            end = len(entries) < self._page
            reading.last = encode(SnapshotPage(up.worker, up.epoch, ask.page, reading.sequence, end, entries))
            reading.page = ask.page
            self.pages += 1
        elif ask.page != reading.page:
            return encode(SnapshotPage(up.worker, up.epoch, ask.page, 0, True, []))
        return reading.last


def read_snapshot(
    ask: Callable[[bytes, float], bytes], worker: str, epoch: int, index: Index, name: str,
    clock: Callable[[], float] = time.monotonic,
) -> int:  # fmt: skip
    """What the worker holds, into the index under that name; how far its events are in it. ask: a question, and seconds
    for its answer. Raises NatsError, EventError."""
    asker, page, total, sequence, began = secrets.token_hex(8), 0, 0, 0, clock()
    index.show(name, False)
    while True:
        deadline = began + min(SNAPSHOT_SECONDS + total / PACE, MOST_SECONDS)
        got = _ask_page(ask, SnapshotAsk(asker, epoch, page), deadline, clock)
        if got.worker != worker or got.page != page or got.epoch != epoch or got.sequence == 0:
            raise EventError(f"worker {worker} has no such snapshot (any more)")
        if page and got.sequence != sequence:
            raise EventError(f"worker {worker} changed its snapshot from {sequence} to {got.sequence}")
        sequence = got.sequence
        held = {entry.key: entry for entry in got.entries}
        index.put(name, list(held), [e.tier for e in held.values()], [e.size for e in held.values()])
        total += len(held)
        if got.end:
            return sequence
        page += 1
        if total > index.capacity or len(held) < LEAST_ENTRIES:
            raise EventError(f"the snapshot of worker {worker} did not end at {total} entries")


def _ask_page(
    ask: Callable[[bytes, float], bytes], question: SnapshotAsk, deadline: float, clock: Callable[[], float]
) -> SnapshotPage:  # fmt: skip
    for tries in range(1, PAGE_TRIES + 1):
        seconds = min(PAGE_SECONDS, deadline - clock())
        if seconds <= 0:
            raise EventError(f"a snapshot comes too slowly, it was given up at page {question.page}")
        try:
            return decode(SnapshotPage, ask(encode(question), seconds))
        except (NatsError, EventError):
            if tries == PAGE_TRIES:
                raise
    raise AssertionError("not reached")
