"""Everybody else's events, made into the index of who holds what. READ after ``peers.py``.

    live       a subscription: each batch is applied when its turn comes
    stream     at the start, and after every reconnection: what was published before, or meanwhile
    snapshot   of one worker, when events of it are missing and the stream has them no more
    beats      who does not live is dropped; who lives further than we heard is asked

Nothing that arrives raises here: it is counted in ``counts``, and the first of a kind is logged. Lookups see a worker
from its first sign of life (a heartbeat, or events as they happen) until its time is over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict

from dynamo_kvtc.errors import EventError, KvtcError, NatsError, NatsUnavailableError
from dynamo_kvtc.events.holdings import read_snapshot
from dynamo_kvtc.events.inbox import Message
from dynamo_kvtc.events.index import Index
from dynamo_kvtc.events.jetstream import Bucket, Stream
from dynamo_kvtc.events.nats import Nats
from dynamo_kvtc.events.options import EventOptions
from dynamo_kvtc.events.peers import Peer, Peers, note_beat, note_events
from dynamo_kvtc.events.schema import Batch, Beat, Event, Subjects, WorkerUp, decode

GRACE_SECONDS = 0.05
"""What is only late comes by itself."""
TURN_SECONDS = 0.05
STREAM_SECONDS = 5.0
HEAL_SECONDS = 2.0
"""For the stream to go on, or all that it has of one worker; then a snapshot is asked for."""
REST = 4
"""Times as long as it took to heal a worker it is then left alone, so that the others have their turn."""

log = logging.getLogger(__name__)


class Follower:
    """me: this worker, whose own events are passed over; what it says of itself is what peers are compared with."""

    def __init__(
        self, nats: Nats, me: WorkerUp, index: Index | None = None, options: EventOptions | None = None
    ) -> None:
        self.options = options or EventOptions()
        self.nats, self.me = nats, me
        self.index = index or Index(self.options.index_mib << 20)
        self.subjects = Subjects(nats.options.namespace, me.model)
        self.counts: Counter[str] = Counter()
        self._peers = Peers()
        self._said: OrderedDict[tuple[str, ...], None] = OrderedDict()
        self._lock = threading.RLock()
        self._stream = Stream(nats, self.subjects.stream, self.subjects.stream_subjects, None)
        self._position = 0
        self._replay = threading.Event()
        self._replay.set()
        self._replayed = threading.Event()
        self._closed = threading.Event()
        self._ends = [nats.on_connected(self._replay.set)]
        self._live = nats.subscribe(self.subjects.events(), self._arrived)
        bucket = Bucket(nats, self.subjects.bucket, self.options.heartbeat_ttl_seconds, replicas=self.options.replicas)
        self._beats = bucket.watch(self._beat, failed=self._watch_failed)
        self._threads = [
            threading.Thread(target=target, name=f"kvtc-{name}", daemon=True)
            for target, name in ((self._keep, "follower"), (self._expire, "expire"))
        ]
        for thread in self._threads:
            thread.start()

    def wait_ready(self, timeout: float) -> bool:
        """Until what is in the stream was read once."""
        return self._replayed.wait(timeout)

    def workers(self) -> dict[str, WorkerUp]:
        """Who lives and can be pulled from, with its address facts."""
        with self._lock:
            return {w: p.up for w, p in self._peers.known.items() if p.up is not None and not p.refused and p.beat}

    def whole(self) -> bool:
        """Whether nothing is known to be missing."""
        with self._lock:
            return not any(p.behind or p.frozen for p in self._peers.known.values() if not p.refused)

    def close(self, timeout: float = 5.0) -> bool:
        self._closed.set()
        for end in self._ends:
            end()
        ended = self._live.close(timeout) and self._beats.close(timeout)
        for thread in self._threads:
            thread.join(timeout)
        return ended and not any(thread.is_alive() for thread in self._threads)

    def _watch_failed(self, exc: Exception) -> None:
        self._say("watch", "heartbeats cannot be read, it is tried again: %s", exc)

    def _arrived(self, message: Message) -> None:
        self._take(message.subject, message.data, live=True)

    def _take(self, subject: str, payload: bytes, live: bool) -> None:
        try:
            batch = decode(Batch, payload)
            if subject != self.subjects.events(batch.worker):
                raise EventError(f"worker {batch.worker} is told of on {subject}: a forgery")
            who = (batch.worker, batch.epoch, self.me.model)
            for sequence, event in enumerate(batch.events, batch.sequence):
                if not isinstance(event, WorkerUp):
                    continue
                if (event.worker, event.epoch, event.model) != who:
                    raise EventError(f"worker {batch.worker} says that it is another: a forgery")
                # It is the largest event by far, and begins an epoch: only there is it believed.
                if sequence:
                    raise EventError(f"worker {batch.worker} begins anew in the midst of its epoch: a forgery")
        except EventError as exc:
            self.counts[type(exc).__name__] += 1
            self._say(type(exc).__name__ + subject, "an event was passed over: %s (on %s)", exc, subject)
            return
        if batch.worker == self.me.worker:
            return
        with self._lock:
            self.counts["batches"] += 1
            peer, new = self._peers.of(batch.worker, batch.epoch)
            if peer is None:
                self.counts["stale"] += 1
                return
            if new:
                self.index.drop(batch.worker)
                peer.deadline = time.monotonic() + self.options.heartbeat_ttl_seconds
            before = peer.duplicates
            events = peer.offer(batch)
            self.counts["duplicates"] += peer.duplicates - before
            self._apply(peer, events)
            if live and peer.worker in self._peers.known and not peer.refused:
                self._show(peer)

    def _apply(self, peer: Peer, events: list[Event]) -> None:
        if not events:
            return
        down = note_events(peer, events)
        if peer.up is not None and not self._fits(peer):
            return
        try:
            self.index.apply(peer.worker, events)
            self.counts["events"] += len(events)
        except KvtcError as exc:
            self.counts["refused"] += 1
            self._say("refused", "a worker's events were passed over: %s", exc)
        if down:
            self._drop(peer, True)

    def _fits(self, peer: Peer) -> bool:
        """The model key covers model, artifact, point and policy; what is left is compared here."""
        assert peer.up is not None
        mine, its = _told(self.me), _told(peer.up)
        if mine != its and not peer.refused:
            peer.refused = True
            self.index.drop(peer.worker)
            self.counts["other_kind"] += 1
            self._say(
                f"kind{its}", "worker %s has %s, this one has %s: its records are not used", peer.worker, its, mine
            )
        return not peer.refused

    def _beat(self, key: str, value: bytes | None) -> None:
        if value is None:
            return
        try:
            beat = decode(Beat, value)
            if key != f"{beat.up.model}.{beat.up.worker}":
                raise EventError(f"the heartbeat of {beat.up.model}.{beat.up.worker} is at {key}: a forgery")
        except EventError as exc:
            self.counts[type(exc).__name__] += 1
            self._say(type(exc).__name__ + key, "a heartbeat was passed over: %s (of %s)", exc, key)
            return
        up = beat.up
        if up.worker == self.me.worker and up.model == self.me.model:
            return
        if up.model != self.me.model:
            if up.model_name == self.me.model_name:
                what = f"other{_told(up)}"
                self._say(what, "worker %s serves %s with %s, this one with %s: their records are not each other's",
                          up.worker, up.model_name, _told(up), _told(self.me))  # fmt: skip
            return
        with self._lock:
            peer, new = self._peers.of(up.worker, up.epoch)
            if peer is None:
                return
            if new:
                self.index.drop(up.worker)
            if note_beat(peer, beat, time.monotonic()) and self._fits(peer):
                self._show(peer)

    def _show(self, peer: Peer) -> None:
        if peer.beat == 0:
            peer.deadline = time.monotonic() + self.options.heartbeat_ttl_seconds
        try:
            self.index.show(peer.worker, True)
        except KvtcError as exc:
            self.counts["refused"] += 1
            self._say("refused", "a worker is passed over: %s", exc)

    def _drop(self, peer: Peer, for_good: bool) -> None:
        self._peers.remove(peer, for_good)
        self.index.drop(peer.worker)

    def _expire(self) -> None:
        """On a thread of its own, that waits for nobody: who does not live is dropped in time."""
        while not self._closed.wait(TURN_SECONDS):
            with self._lock:
                now = time.monotonic()
                for peer in [p for p in self._peers.known.values() if now > p.deadline > 0]:
                    self._drop(peer, False)
                    self.counts["dropped_workers"] += 1

    def _keep(self) -> None:
        """On a thread of its own: what takes time, one thing after another, each with its deadline."""
        while not self._closed.wait(TURN_SECONDS):
            try:
                if not self.nats.connected:
                    continue
                if self._replay.is_set():
                    self._replay.clear()
                    self._read_stream()
                self._heal(time.monotonic())
            except Exception as exc:
                self.counts["keeper"] += 1
                self._say("keeper", "following the events failed, it is tried again: %r", exc)

    def _read_stream(self) -> None:
        """What the stream has behind the place up to which it was read."""
        try:
            info = self._stream.info(STREAM_SECONDS)
            if info is not None:
                if info["last_seq"] < self._position:
                    self._position = 0  # it is another stream: the server lost the one before
                for kept in self._stream.read(self.subjects.events(), self._position + 1, timeout=STREAM_SECONDS):
                    self._take(kept.subject, kept.data, live=False)
                    self._position = kept.sequence
                self._position = max(self._position, info["last_seq"])
        except NatsError as exc:
            self._say("stream", "the stream of events cannot be read, snapshots are asked for: %s", exc)
        self._replayed.set()

    def _heal(self, now: float) -> None:
        with self._lock:
            behind = [p for p in self._peers.known.values() if p.behind and not p.refused and p.beat]
            for peer in self._peers.known.values():
                # While the next one comes, the rest is only late.
                if not peer.behind or peer.next != peer.seen_next:
                    peer.behind_since, peer.seen_next = None, peer.next
            for peer in behind:
                peer.behind_since = peer.behind_since or now
        # Who was quick comes first.
        for peer in sorted(behind, key=lambda peer: peer.took):
            if self._closed.is_set() or now < (peer.behind_since or now) + GRACE_SECONDS or now < peer.retry_at:
                continue
            began, pause = time.monotonic(), 0.0
            try:
                self.counts["gaps"] += 1
                if not peer.wants_snapshot and peer.next and self._heal_from_stream(peer):
                    self.counts["healed_from_stream"] += 1
                else:
                    self._heal_from_snapshot(peer)
                    self.counts["healed_from_snapshot"] += 1
                peer.failures = 0
            except KvtcError as exc:
                peer.failures += 1
                pause = min(30.0, 0.25 * 2 ** min(peer.failures, 7))
                self.counts["heal_failed"] += 1
                self._say(f"heal{peer.worker}", "what %s holds is not known in full: %s", peer.worker, exc)
            finally:
                ended = time.monotonic()
                peer.took = ended - began
                peer.retry_at = ended + pause + REST * peer.took
            if peer.took > HEAL_SECONDS:
                return  # who is behind by now, and was quick, comes before the rest

    def _heal_from_stream(self, peer: Peer) -> bool:
        """From the last place that its batches told of. False if something is still missing."""
        deadline = time.monotonic() + HEAL_SECONDS
        try:
            subject = self.subjects.events(peer.worker)
            for kept in self._stream.read(subject, peer.after + 1, timeout=HEAL_SECONDS):
                self._take(kept.subject, kept.data, live=False)
                if not peer.gap or time.monotonic() > deadline:
                    break
        except NatsError as exc:
            self._say("stream", "the stream of events cannot be read, snapshots are asked for: %s", exc)
        with self._lock:
            return not peer.gap

    def _heal_from_snapshot(self, peer: Peer) -> None:
        """Into a shadow in the index, which then takes the worker's name at once. Raises NatsError, EventError."""
        shadow = f"{peer.worker}~"

        def ask(question: bytes, seconds: float) -> bytes:
            if self._closed.is_set():
                raise NatsUnavailableError("closed")
            return self.nats.request(self.subjects.snapshot(peer.worker), question, seconds).data

        with self._lock:
            peer.freeze()
        sequence = None
        try:
            sequence = read_snapshot(ask, peer.worker, peer.epoch, self.index, shadow)
        finally:
            with self._lock:
                alive = self._peers.known.get(peer.worker) is peer
                if sequence is not None and alive:
                    self.index.rename(shadow, peer.worker)
                self.index.drop(shadow)
                events = peer.thaw(sequence)
                if alive:
                    self._apply(peer, events)

    def _say(self, kind: str, text: str, *told: object) -> None:
        """Once of each kind, as far as a bounded memory of kinds goes."""
        with self._lock:
            if (kind,) in self._said:
                return
            self._said[kind,] = None
            if len(self._said) > 1024:
                self._said.popitem(last=False)
        log.warning(text, *told)


def _told(up: WorkerUp) -> str:
    return f"artifact {up.artifact[:16]}, record version {up.record_version}, blocks of {up.block_tokens} tokens"
