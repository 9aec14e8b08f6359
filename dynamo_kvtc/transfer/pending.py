"""One pull: what it still wants from whom, what has arrived, what failed for good."""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import TYPE_CHECKING

from dynamo_kvtc.codec.record import Record
from dynamo_kvtc.errors import (
    RecordError,
    RecordMismatchError,
    RecordVersionError,
    TransferError,
    TransferProtocolError,
    TransferRefusedError,
)
from dynamo_kvtc.transfer import wire
from dynamo_kvtc.transfer.arriving import FAILED, HERE, PROVING, WAITING, Arriving, Expected
from dynamo_kvtc.transfer.plane import MAX_FRAME_BYTES, Stream

if TYPE_CHECKING:
    from dynamo_kvtc.transfer.pull import Puller, Wanted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arrival:
    """Layer group ``group`` of record ``index`` of the pull: ``why`` is "" if it is here, else why it never will be."""

    group: int
    index: int
    why: str = ""

    @property
    def here(self) -> bool:
        return not self.why


class Work:
    """An ask to be: pieces (layer group, index), the same as items, and what may come of them in bytes. charge: of it
    what is not here yet; came: bytes that did, told: that were sent, as the end says; late: the end came before them;
    placed: pieces that are asked for anew already."""

    def __init__(self, pieces: list[tuple[int, int]], charge: int) -> None:
        self.pieces, self.charge, self.all_charge = pieces, charge, charge
        self.came = self.told = 0
        self.late = False
        self.placed: set[tuple[int, int]] = set()
        self.indices: list[int] = []
        self.items: list[wire.Item] = []


class _Item:
    __slots__ = ("arriving", "attempts", "banned", "wanted", "why")

    def __init__(self, wanted: Wanted, arriving: Arriving) -> None:
        self.wanted, self.arriving = wanted, arriving
        self.attempts: Counter[str] = Counter()
        self.banned: set[str] = set()
        self.why = "nobody has it"


class Pull:
    """Made by ``Puller.pull``. Every method may be called from any thread; every wait ends by the pull's deadline."""

    def __init__(
        self, puller: Puller, wanted: Sequence[Wanted], slots: Sequence[memoryview], expected: Sequence[Expected],
        deadline: float, on_arrival: Callable[[Arrival], None] | None, whole: bool,
    ) -> None:  # fmt: skip
        self.deadline, self.whole = deadline, whole
        self.streams: set[Stream] = set()
        self._puller, self._on_arrival = puller, on_arrival
        self._items = [_Item(w, Arriving(s, e)) for w, s, e in zip(wanted, slots, expected, strict=True)]
        self._groups = expected[0].identity.groups
        self._open = len(self._items) * self._groups
        self._open_of = [len(self._items)] * self._groups
        self._changed = threading.Condition()
        self._told: deque[Arrival] = deque()
        self._read = False
        # A holder's pieces: (layer group, index), or where records are whole (index, layer group).
        self._queues: dict[str, list[tuple[int, int]]] = {}
        self._queued_bytes: Counter[str] = Counter()
        self._lanes: Counter[str] = Counter()

    @property
    def over(self) -> bool:
        return self._open == 0

    def wait_group(self, group: int, timeout: float) -> list[bool]:
        """Waits until this layer group of every record has arrived or failed; which are here and proven."""
        self._wait(lambda: self._open_of[group] == 0, timeout)
        return [item.arriving.status[group] == HERE for item in self._items]

    def arrivals(self) -> Iterator[Arrival]:
        """What arrives or fails, from the first on, until all has. For one reader."""
        self._read = True
        while True:
            self._wait(lambda: bool(self._told), float("inf"))
            try:
                yield self._told.popleft()
            except IndexError:
                return

    def result(self, timeout: float = float("inf")) -> list[str]:
        """Waits for all; "" for each record that is whole and proven, else why it is not."""
        self._wait(lambda: self.over, timeout)
        return [
            "" if all(s == HERE for s in item.arriving.status) else item.why if self.over else "on its way"
            for item in self._items
        ]

    def record(self, index: int) -> memoryview | None:
        """All bytes, read-only, if they are here and proven: the holder's."""
        arriving = self._items[index].arriving
        return arriving.slot.toreadonly() if all(s == HERE for s in arriving.status) else None

    def parsed(self, index: int) -> Record | None:
        """The record with its proven header, for decoding; ``section`` of those layer groups that have arrived."""
        return self._items[index].arriving.record

    def cancel(self) -> None:
        """What is not here has failed. When this returns the slots are not written any more."""
        self._fail_all("cancelled")

    # Below: for the puller and its lanes.

    def start(self) -> None:
        todo: list[Arrival] = []
        with self._changed:
            for index in range(len(self._items)):
                self._place(index, range(self._groups), todo)
        self._tell(todo)
        self._hire()

    def take(self, holder: str) -> Work | None:
        """The next pieces to be asked of this holder; None: this lane has ended."""
        with self._changed:
            queue = self._queues.get(holder, [])
            masks: dict[int, int] = {}
            pieces: list[tuple[int, int]] = []
            charge = 0
            while queue and not self.over:
                group, index = self._turned(*queue[0])
                arriving = self._items[index].arriving
                known = arriving.record is not None
                cost = 0 if index in masks and not known else arriving.bytes_of(group)
                full = charge + cost > self._puller.ask_bytes or (
                    index not in masks and len(masks) == self._puller.max_items
                )
                if pieces and full:
                    break
                heapq.heappop(queue)
                if arriving.status[group] != WAITING:
                    continue
                charge += cost
                pieces.append((group, index))
                masks[index] = masks.get(index, 0) | 1 << group
            if not pieces:
                self._lanes[holder] -= 1
                self._queued_bytes[holder] = 0
                return None
            self._queued_bytes[holder] = max(0, self._queued_bytes[holder] - charge)
            work = Work(pieces, charge)
            for index, mask in masks.items():
                item = self._items[index]
                work.indices.append(index)
                work.items.append(wire.Item(item.wanted.key, item.wanted.size, item.arriving.header_checksum, mask))
            return work

    def arrived(
        self, holder: str, work: Work, segments: Sequence[tuple[int, int, int]], payload: memoryview
    ) -> None:  # fmt: skip
        """Raises TransferProtocolError; what came before it counts."""
        todo: list[Arrival] = []
        prove: list[tuple[int, int]] = []
        failed: TransferProtocolError | None = None
        at = 0
        # An honest frame has a segment a piece, and one that was cut at either end.
        if len(segments) > 2 * len(work.pieces) + 64:
            raise TransferProtocolError(f"a frame of {len(segments)} segments for {len(work.pieces)} pieces")
        with self._changed:
            for i, offset, length in segments:
                if i >= len(work.indices) or offset + length > work.items[i].size:
                    told = f"bytes {offset} to {offset + length} of item {i} were not asked for"
                    failed = TransferProtocolError(told)
                    break
                item = self._items[index := work.indices[i]]
                data, at = payload[at : at + length], at + length
                if self.over or WAITING not in item.arriving.status or holder in item.banned:
                    continue
                # What is soon proven is proven at once; after what is not, nothing is: groups arrive in their order.
                group = None if prove else item.arriving.section(offset, data)
                if group is not None:
                    self._judged(index, group, item.arriving.prove(group), holder, todo, work)
                    continue
                try:
                    item.arriving.write(offset, data)
                except TransferProtocolError as exc:
                    failed = exc
                    break
                except RecordError as exc:
                    # A header of another version or codec stays what it is; a damaged one may come right next time.
                    if isinstance(exc, RecordMismatchError | RecordVersionError):
                        item.banned.add(holder)
                    self._puller.wrong(type(exc).__name__, holder, str(exc))
                    self._again(index, wire.groups_of(work.items[i].groups), holder, str(exc), todo, work)
                    continue
                ready = item.arriving.ready()
                if prove or sum(map(item.arriving.bytes_of, ready)) > MAX_FRAME_BYTES:
                    prove += [(index, group) for group in ready]
                    continue
                for group in ready:
                    self._judged(index, group, item.arriving.prove(group), holder, todo, work)
        if prove:
            bad = [(index, group, self._items[index].arriving.prove(group)) for index, group in prove]
            with self._changed:
                for index, group, wrong in bad:
                    self._judged(index, group, wrong, holder, todo, work)
        here = [self._items[a.index].arriving.bytes_of(a.group) for a in todo if a.here]
        self._puller.count(pieces=len(here), bytes=sum(here))
        self._tell(todo)
        self._hire()
        if failed is not None:
            raise failed

    def _judged(
        self, index: int, group: int, wrong: RecordError | None, holder: str, todo: list[Arrival], work: Work
    ) -> None:  # fmt: skip
        arriving = self._items[index].arriving
        if arriving.status[group] != PROVING:
            return
        arriving.proven(group, wrong is None)
        if wrong is None:
            self._settled(index, group, "", todo)
            return
        self._puller.wrong(type(wrong).__name__, holder, str(wrong))
        self._again(index, [group], holder, str(wrong), todo, work)

    def missing(self, holder: str, work: Work, items: Sequence[tuple[int, int]]) -> None:
        todo: list[Arrival] = []
        with self._changed:
            for i, why in items:
                if i >= len(work.indices):
                    raise TransferProtocolError(f"item {i} of an ask of {len(work.indices)} is missing")
                index = work.indices[i]
                self._items[index].banned.add(holder)
                told = f"{holder}: {wire.WHY.get(why, 'not sent')}"
                self._again(index, wire.groups_of(work.items[i].groups), holder, told, todo, work)
        self._tell(todo)
        self._hire()

    def answered(self, holder: str, work: Work, failed: TransferError | None) -> None:
        """An ask has ended: what did not come is asked elsewhere; after an error all that waits for its holder."""
        why = f"{holder}: not all of it was sent" if failed is None else f"{holder}: {failed}"
        todo: list[Arrival] = []
        with self._changed:
            asked: dict[int, list[int]] = {}
            waiting: dict[int, list[int]] = {}
            for group, index in work.pieces:
                asked.setdefault(index, []).append(group)
            if failed is not None:
                for group, index in starmap(self._turned, self._queues.pop(holder, [])):
                    waiting.setdefault(index, []).append(group)
                self._queued_bytes[holder] = 0
            if isinstance(failed, TransferRefusedError):
                for index in (*asked, *waiting):
                    self._items[index].banned.add(holder)
            for index, groups in asked.items():
                self._again(index, groups, holder, why, todo, work)
            for index, groups in waiting.items():
                self._again(index, groups, holder, why, todo)
        self._tell(todo)
        self._hire()

    def pause(self, seconds: float) -> None:
        until = min(self.deadline, time.monotonic() + seconds)
        with self._changed:
            self._changed.wait_for(lambda: self.over, max(0.0, until - time.monotonic()))

    def expire(self) -> None:
        """If the deadline has passed."""
        if time.monotonic() >= self.deadline:
            self._fail_all("not here in time")

    def _wait(self, ready: Callable[[], bool], timeout: float) -> None:
        until = min(self.deadline, time.monotonic() + timeout)
        with self._changed:
            self._changed.wait_for(lambda: ready() or self.over, max(0.0, until - time.monotonic()))
        self.expire()

    def _again(
        self, index: int, groups: Sequence[int], holder: str, why: str, todo: list[Arrival], work: Work | None = None
    ) -> None:  # fmt: skip
        """work: the ask that they did not come of, unless they were only to be asked."""
        item, placed = self._items[index], work.placed if work else set()
        groups = [g for g in groups if item.arriving.status[g] == WAITING and (g, index) not in placed]
        if not groups or self.over:
            return
        item.why = why
        if work is not None:
            placed.update((g, index) for g in groups)
            item.attempts[holder] += 1
            self._puller.count(retried=len(groups))
        self._place(index, groups, todo)

    def _place(self, index: int, groups: Sequence[int], todo: list[Arrival]) -> None:
        """Queues them with the best holder that is left; if none is, they have failed."""
        item, options = self._items[index], self._puller.options
        left = [h for h in item.wanted.holders if h not in item.banned and item.attempts[h] < options.attempts]
        if not left:
            for group in groups:
                item.arriving.status[group] = FAILED
                self._settled(index, group, item.why, todo)
            return
        fewest = min(item.attempts[h] for h in left)
        holder = self._puller.choose([h for h in left if item.attempts[h] == fewest], self._queued_bytes)
        queue = self._queues.setdefault(holder, [])
        for group in groups:
            heapq.heappush(queue, self._turned(group, index))
        arriving = item.arriving
        self._queued_bytes[holder] += sum(map(arriving.bytes_of, groups)) if arriving.record else len(arriving.slot)

    def _turned(self, a: int, b: int) -> tuple[int, int]:
        """A piece as it is queued, and back."""
        return (b, a) if self.whole else (a, b)

    def _settled(self, index: int, group: int, why: str, todo: list[Arrival]) -> None:
        self._open -= 1
        self._open_of[group] -= 1
        todo.append(Arrival(group, index, why))
        self._told.append(todo[-1])

    def _fail_all(self, why: str) -> None:
        todo: list[Arrival] = []
        with self._changed:
            for index, item in enumerate(self._items):
                for group, status in enumerate(item.arriving.status):
                    if status in (WAITING, PROVING):
                        item.why = why
                        item.arriving.status[group] = FAILED
                        self._settled(index, group, why, todo)
            streams = list(self.streams)
        self._tell(todo)
        for stream in streams:
            stream.close()

    def _tell(self, todo: Sequence[Arrival]) -> None:
        if not todo:
            return
        failed = sum(not a.here for a in todo)
        if failed:
            self._puller.count(failed=failed)
        if self._read or self.over or not all(self._open_of[a.group] for a in todo):
            # Whoever waits for a layer group, or for all, is not woken at every frame to find that it is not the last.
            with self._changed:
                self._changed.notify_all()
        if self.over:
            self._puller.ended(self)
        if self._on_arrival is not None:
            for arrival in todo:
                try:
                    self._on_arrival(arrival)
                except Exception:
                    log.exception("on_arrival failed")

    def _hire(self) -> None:
        """A lane for each holder that pieces wait for; more if they fill more than an ask."""
        options, hired = self._puller.options, []
        with self._changed:
            for holder, queue in self._queues.items():
                full = self._queued_bytes[holder] // self._puller.ask_bytes
                while queue and self._lanes[holder] < min(options.lanes, 1 + full) and not self.over:
                    self._lanes[holder] += 1
                    hired.append(holder)
        for holder in hired:
            threading.Thread(target=self._puller.run_lane, args=(self, holder), name="kvtc-pull", daemon=True).start()
