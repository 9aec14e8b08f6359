"""The other workers, and their events put in order: no network here, and no clock but the one that is passed in.

Each event has a number in its worker's epoch. ``Peer.offer`` takes batches as they come, late, twice, out of order, and
gives back what is to be applied now, each event once. What cannot be applied yet waits, bounded; ``Peer.behind`` says
that something is missing. Then the caller reads the stream again, or takes a snapshot: from ``freeze`` on everything
waits, and ``thaw`` goes on behind the snapshot.
"""

from __future__ import annotations

from collections import OrderedDict

from dynamo_kvtc.events.index import MAX_WORKERS
from dynamo_kvtc.events.schema import Batch, Beat, Event, WorkerDown, WorkerStats, WorkerUp

WAITING_BYTES = 64 << 20
"""Of all workers together, out of order or during a snapshot."""
REMEMBERED = 4096
"""Workers that are gone whose last epoch is remembered, so that what arrives late does not raise them."""


class Room:
    """For what waits, of all peers. When it is full, whoever has most in it forgets that, and a snapshot heals it: so
    nobody's events are pushed out by one who sends what never comes to its turn."""

    def __init__(self, limit: int = WAITING_BYTES) -> None:
        self.limit, self.used = limit, 0
        self._taken: dict[Peer, int] = {}

    def add(self, peer: Peer, cost: int) -> None:
        """cost: negative when something leaves."""
        self.used += cost
        self._taken[peer] = self._taken.get(peer, 0) + cost
        if self._taken[peer] == 0:
            del self._taken[peer]
        while self.used > self.limit:
            max(self._taken, key=self._taken.__getitem__).forget()


class Peer:
    """One epoch of one worker. next: the sequence that comes next; known_end: how far it is said to be."""

    def __init__(self, worker: str, epoch: int, room: Room | None = None) -> None:
        self.worker, self.epoch = worker, epoch
        self.next = self.known_end = 0
        self.after = 0
        self.up: WorkerUp | None = None
        self.stats = WorkerStats()
        self.beat = 0
        self.wants_snapshot = self.frozen = self.refused = False
        self.behind_since: float | None = None
        self.seen_next = 0
        self.retry_at, self.failures = 0.0, 0
        self.took = 0.0
        self.deadline = 0.0
        self.duplicates = 0
        self._room = room or Room()
        self._waiting: dict[int, tuple[Batch, int]] = {}

    @property
    def gap(self) -> bool:
        """Whether events are missing."""
        return bool(self._waiting) or self.next < self.known_end

    @property
    def behind(self) -> bool:
        return self.wants_snapshot or self.gap

    def offer(self, batch: Batch) -> list[Event]:
        """What is to be applied now, in its order."""
        self.known_end = max(self.known_end, batch.end)
        if batch.end <= self.next:
            self.duplicates += 1
            return []
        if batch.sequence > self.next or self.frozen:
            self._wait(batch)
            return []
        return self._take(batch) + self._take_waiting()

    def freeze(self) -> None:
        """A snapshot begins: nothing is applied until it is there."""
        self.frozen = True

    def thaw(self, sequence: int | None) -> list[Event]:
        """The snapshot is there, with all events before sequence; None: it failed. What is to be applied now."""
        self.frozen = False
        if sequence is None:
            return self._take_waiting()
        # What is said to lie further ahead than the worker's own word now reaches may be a lie. If it is none, the next
        # heartbeat shows that something is missing.
        self.next = self.known_end = sequence
        self.wants_snapshot = False
        events = self._take_waiting()
        self._clear()
        self.known_end = self.next
        return events

    def forget(self) -> None:
        """What waits: only a snapshot brings that back."""
        self._clear()
        self.wants_snapshot = True

    def _wait(self, batch: Batch) -> None:
        known, known_cost = self._waiting.get(batch.sequence, (None, 0))
        if known is not None and known.end >= batch.end:
            self.duplicates += 1
            return
        cost = _cost(batch)
        self._waiting[batch.sequence] = batch, cost
        self._room.add(self, cost - known_cost)

    def _clear(self) -> None:
        cost = sum(cost for _, cost in self._waiting.values())
        self._waiting.clear()
        self._room.add(self, -cost)

    def _take(self, batch: Batch) -> list[Event]:
        events = batch.events[self.next - batch.sequence :]
        self.next, self.after = batch.end, batch.after
        return events

    def _take_waiting(self) -> list[Event]:
        out: list[Event] = []
        for sequence in sorted(self._waiting):
            if sequence > self.next:
                break
            batch, cost = self._waiting.pop(sequence)
            self._room.add(self, -cost)
            if batch.end > self.next:
                out += self._take(batch)
        return out


class Peers:
    """Workers by name. An epoch that is larger replaces, a smaller one is of the past."""

    def __init__(self) -> None:
        self.known: dict[str, Peer] = {}
        self.room = Room()
        self._floor: OrderedDict[str, int] = OrderedDict()

    def of(self, worker: str, epoch: int) -> tuple[Peer | None, bool]:
        """The peer, None if that epoch is over or there are too many; and whether it is new: then nothing that it held
        before counts."""
        peer = self.known.get(worker)
        if peer is not None and peer.epoch >= epoch:
            return (peer if peer.epoch == epoch else None), False
        if epoch < self._floor.get(worker, 0) or (peer is None and len(self.known) >= MAX_WORKERS):
            return None, False
        if peer is not None:
            peer.forget()
        peer = self.known[worker] = Peer(worker, epoch, self.room)
        return peer, True

    def remove(self, peer: Peer, for_good: bool) -> None:
        """for_good: it said so itself; otherwise the same epoch may be heard of again."""
        peer.forget()
        if self.known.get(peer.worker) is peer:
            del self.known[peer.worker]
        self._floor[peer.worker] = peer.epoch + for_good
        self._floor.move_to_end(peer.worker)
        if len(self._floor) > REMEMBERED:
            self._floor.popitem(last=False)


def note_beat(peer: Peer, beat: Beat, now: float) -> bool:
    """Whether it is new: a value that is read again does not prolong a life."""
    if beat.beat <= peer.beat:
        return False
    peer.beat, peer.up, peer.stats = beat.beat, beat.up, beat.stats
    peer.known_end = max(peer.known_end, beat.sequence)
    peer.deadline = now + beat.ttl_seconds
    return True


def note_events(peer: Peer, events: list[Event]) -> bool:
    """What the events say of the worker itself; True if it is going down."""
    for event in events:
        if isinstance(event, WorkerUp):
            peer.up = event
            # What it held at its start no event tells of.
            peer.wants_snapshot = peer.wants_snapshot or event.held > 0
    return any(isinstance(event, WorkerDown) for event in events)


def _cost(batch: Batch) -> int:
    """Bytes that it takes here, rather too many: an object of a few bytes on the wire has a hundred or more in memory,
    a character up to four."""
    cost = 512
    for event in batch.events:
        cost += 384
        if isinstance(event, WorkerDown):
            cost += 4 * len(event.reason)
        elif isinstance(event, WorkerUp):
            facts = [fact for plane in event.planes for pair in plane.facts.items() for fact in pair]
            texts = [event.model_name, event.artifact, *(plane.address for plane in event.planes), *facts]
            cost += 1024 * (1 + len(event.planes)) + sum(128 + 4 * len(text) for text in texts)
    return cost
