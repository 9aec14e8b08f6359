"""A worker's side: it numbers its events, publishes them in batches, says that it lives, and answers for what it holds.

``publish`` only puts an event into a bounded queue: the tier's thread never waits for the network. **Call it after the
bytes are durable in the tier that the event names** (TieredStore's ``on_moved`` comes then), and after the store shows
the change: a snapshot that was begun later must contain it.

What does not fit into the queue is dropped, but its number is used: followers see the gap and ask for a snapshot. A
batch is sent until the stream has it, through reconnections; repeats are dropped by the stream, and by followers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

import msgspec

from dynamo_kvtc.errors import (
    ConfigError,
    EventFormatError,
    KvtcError,
    NatsError,
    NatsRefusedError,
    NatsTimeoutError,
    NatsUnavailableError,
)
from dynamo_kvtc.events.holdings import Holdings, SnapshotServer
from dynamo_kvtc.events.jetstream import Bucket, Limits, Stream
from dynamo_kvtc.events.nats import Nats
from dynamo_kvtc.events.options import EventOptions
from dynamo_kvtc.events.schema import (
    MAX_BYTES,
    Batch,
    Beat,
    BlockMoved,
    BlockRemoved,
    BlockStored,
    Event,
    Subjects,
    WorkerDown,
    WorkerStats,
    WorkerUp,
    decode,
    encode,
    tier_number,
)

ACK_SECONDS = 5.0

log = logging.getLogger(__name__)


class Publisher:
    """up: who this is; its epoch is of this start alone. holdings: (key, tier, size) of all it holds, asked anew for
    each snapshot. stats: asked at every heartbeat. Works without a server, too: then it waits for one."""

    def __init__(
        self, nats: Nats, up: WorkerUp, holdings: Holdings = tuple, stats: Callable[[], WorkerStats] = WorkerStats,
        options: EventOptions | None = None,
    ) -> None:  # fmt: skip
        """Raises ConfigError for an ``up`` that others would refuse."""
        try:
            decode(Batch, encode(Batch(up.worker, up.epoch, 0, 0, [up])))
        except EventFormatError as exc:
            raise ConfigError(f"what this worker tells of itself, {up}, cannot be read by others: {exc}") from exc
        self.options = options or EventOptions()
        self.nats, self.up = nats, up
        self.subjects = Subjects(nats.options.namespace, up.model)
        self.published = self.dropped = 0
        self._stats = stats
        self._queue: deque[tuple[int, Event]] = deque()
        self._changed = threading.Condition()
        self._sequence = self._queued_bytes = 0
        self._sending: int | None = None
        self._first_queued = 0.0
        self._closing = False
        self._give_up_at = float("inf")
        self._beats = 0
        self._after = 0
        self._refused = ""
        o = self.options
        self._stream = Stream(
            nats, self.subjects.stream, self.subjects.stream_subjects,
            Limits(o.stream_mib << 20, o.stream_messages, o.stream_seconds, "file", o.replicas),
        )  # fmt: skip
        self._bucket = Bucket(nats, self.subjects.bucket, o.heartbeat_ttl_seconds, replicas=o.replicas)
        self._snapshots = SnapshotServer(up, holdings, lambda: self.sequence)
        self._served = nats.serve(self.subjects.snapshot(up.worker), self._snapshots.answer)
        self.publish(up)
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=f"kvtc-{name}", daemon=True)
            for target, name in ((self._send_all, "events"), (self._live, "beat"))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def sequence(self) -> int:
        """The number of the next event."""
        with self._changed:
            return self._sequence

    def publish(self, event: Event) -> bool:
        """Never waits. False if it was dropped: followers will see that something is missing."""
        with self._changed:
            sequence = self._sequence
            self._sequence += 1
            if self._closing or len(self._queue) >= self.options.queue_events:
                self.dropped += 1
                return False
            if not self._queue:
                self._first_queued = time.monotonic()
            full = self._full()
            self._queue.append((sequence, event))
            self._queued_bytes += _cost(event)
            if len(self._queue) == 1 or self._full() != full:
                self._changed.notify_all()
            return True

    def stored(
        self, key: bytes, tier: str, size: int, parent: bytes = b"", position: int = -1, tokens: int = 0
    ) -> bool:  # fmt: skip
        return self.publish(BlockStored(key, tier_number(tier), size, parent, position, tokens))

    def moved(self, key: bytes, tier: str) -> bool:
        return self.publish(BlockMoved(key, tier_number(tier)))

    def removed(self, key: bytes, tier: str) -> bool:
        return self.publish(BlockRemoved(key, tier_number(tier)))

    def flush(self, timeout: float = 5.0) -> bool:
        """True when all that was published before is on the server."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and self._sending is None, timeout)

    def close(self, timeout: float = 5.0) -> bool:
        """Says that the worker goes. True if the server has all of it."""
        with self._changed:
            if self._closing:
                return True
        self.publish(WorkerDown("closed"))
        with self._changed:
            self._closing = True
            self._give_up_at = time.monotonic() + timeout
            self._changed.notify_all()
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout)
        self._served.close(1.0)
        with self._changed:
            sent = not self._queue and self._sending is None
        try:
            self._bucket.delete(self.subjects.beat(self.up.worker), min(1.0, timeout))
        except NatsError:
            sent = False
        return sent

    def _send_all(self) -> None:
        o = self.options
        while True:
            with self._changed:
                while not self._queue and not self._closing:
                    self._changed.wait(1.0)
                if not self._queue:
                    return
                wait = self._first_queued + o.linger_seconds - time.monotonic()
                if wait > 0 and not self._closing and not self._full():
                    self._changed.wait(wait)
                    continue
                events = [self._queue.popleft()]
                self._sending, cost = events[0][0], _cost(events[0][1])
                # A batch has no gap in it: where events were dropped another one begins.
                while self._queue and len(events) < o.batch_events and self._queue[0][0] == events[-1][0] + 1:
                    cost += _cost(self._queue[0][1])
                    if cost > o.batch_bytes:
                        break
                    events.append(self._queue.popleft())
                self._queued_bytes -= sum(_cost(event) for _, event in events)
            sent = self._send(self._sending, [event for _, event in events])
            with self._changed:
                self._sending = None
                if not sent:
                    self.dropped += len(events) + len(self._queue)
                    self._queue.clear()
                    self._queued_bytes = 0
                self._changed.notify_all()
                if not sent:
                    return

    def _full(self) -> bool:
        """Whether a batch is together."""
        return len(self._queue) >= self.options.batch_events or self._queued_bytes >= self.options.batch_bytes

    def _send(self, sequence: int, events: list[Event]) -> bool:
        """Until the server has it; False if it was closed before."""
        payload = encode(Batch(self.up.worker, self.up.epoch, sequence, self._after, events))
        if len(payload) > min(MAX_BYTES, self.nats.max_payload - 1024) and len(events) > 1:
            half = len(events) // 2
            return self._send(sequence, events[:half]) and self._send(sequence + half, events[half:])
        subject, identity = self.subjects.events(self.up.worker), f"{self.up.worker}.{self.up.epoch}.{sequence}"
        while time.monotonic() < self._give_up_at:
            if not self.nats.wait_connected(0.5):
                continue
            try:
                self._after = self._stream.publish(subject, payload, identity, ACK_SECONDS)
                self.published += len(events)
                return True
            except (NatsTimeoutError, NatsUnavailableError, NatsRefusedError) as exc:
                refused = isinstance(exc, NatsRefusedError)
                if refused and str(exc) != self._refused:
                    log.warning("a batch of events was refused, it is sent again: %s", exc)
                    self._refused = str(exc)
                self._ended.wait(1.0 if refused else 0.05)
            except KvtcError as exc:
                log.warning("a batch of %d events cannot be sent: %s", len(events), exc)
                self.dropped += len(events)
                return True
        return False

    def _live(self) -> None:
        """Heartbeats, three within a time to live, and at once after every connection."""
        again = threading.Event()
        end = self.nats.on_connected(again.set)
        ttl = self.options.heartbeat_ttl_seconds
        failed: str | None = None
        while not self._ended.is_set():
            again.clear()
            if self.nats.connected:
                try:
                    self._bucket.put(self.subjects.beat(self.up.worker), self._beat(), ttl / 3)
                    failed = None
                except KvtcError as exc:
                    if failed is None:
                        log.warning("a heartbeat was not taken: %s", exc)
                    failed = str(exc)
            deadline = time.monotonic() + (ttl / 3 if failed is None else min(0.2, ttl / 3))
            while not self._ended.wait(0.05) and time.monotonic() < deadline and not again.is_set():
                pass
        end()

    def _beat(self) -> bytes:
        try:
            stats = self._stats()
        except Exception:
            log.exception("statistics for the heartbeat failed")
            stats = WorkerStats()
        with self._changed:
            waiting = self._queue[0][0] if self._queue else self._sequence
            sequence = waiting if self._sending is None else self._sending
            self._beats += 1
            stats = msgspec.structs.replace(stats, events=self.published, events_dropped=self.dropped)
            return encode(Beat(self.up, self._beats, sequence, self.options.heartbeat_ttl_seconds, stats))


def _cost(event: Event) -> int:
    """Bytes that it takes in a batch, at most; who is told of as a worker takes some more, but rarely."""
    if isinstance(event, WorkerUp):
        return 1024 + sum(len(plane.address) for plane in event.planes)
    return 80 + len(event.parent) if isinstance(event, BlockStored) else 48
