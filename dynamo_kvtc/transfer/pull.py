"""The asker's side. ``Puller`` has what all pulls share: connections, the budget of bytes in flight, which holders have
failed of late. ``Pull`` (pending.py) knows what one of them still wants from whom.

A lane is a thread: it takes the next pieces that are wanted from its holder, in the order of layer groups or record by
record, waits for room in the budget, asks, and hands over what comes. When its holder fails, its pieces go elsewhere,
or are asked of it again a little later if there is nowhere else.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dynamo_kvtc.codec.record import FIXED_BYTES
from dynamo_kvtc.errors import (
    ConfigError,
    PeerGoneError,
    TransferError,
    TransferProtocolError,
    TransferRefusedError,
    TransferTimeoutError,
)
from dynamo_kvtc.store import check_key
from dynamo_kvtc.transfer import wire
from dynamo_kvtc.transfer.arriving import Expected
from dynamo_kvtc.transfer.budget import Budget
from dynamo_kvtc.transfer.idle import Idle
from dynamo_kvtc.transfer.options import Peers, PullOptions
from dynamo_kvtc.transfer.pending import Arrival, Pull, Work
from dynamo_kvtc.transfer.plane import Plane, Stream

_SLACK_BYTES = 1 << 20
_BACKOFF_SECONDS = (0.05, 1.0)
_STRAGGLE_SECONDS = 0.2

__all__ = ["Arrival", "Pull", "PullStats", "Puller", "Wanted"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """A record: its size as the holders tell it (those with another size are no holders of it), and who has it, by
    worker id. tokens, first_position: what the block must be, where the asker knows."""

    key: bytes
    size: int
    holders: tuple[str, ...]
    tokens: int | None = None
    first_position: int | None = None


@dataclass(frozen=True)
class PullStats:
    """pieces: arrived and proven; bytes: theirs; failed: pieces that nobody gave; retried: asked again;
    in_flight_bytes, in_flight_peak_bytes: asked for and not here, now and at most so far; errors: by kind."""

    pulls: int = 0
    pieces: int = 0
    bytes: int = 0
    failed: int = 0
    retried: int = 0
    in_flight_bytes: int = 0
    in_flight_peak_bytes: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)


class Puller:
    """Pulls records of one codec from other workers."""

    def __init__(
        self, planes: Sequence[Plane], addresses: Callable[[str], Mapping[str, str]], peers: Peers, expected: Expected,
        options: PullOptions | None = None,
    ) -> None:  # fmt: skip
        """planes: the one that is liked best first; they stay the caller's. addresses: of a holder, plane name ->
        address, as it advertises them; {} if it is unknown. Raises ConfigError."""
        if not planes:
            raise ConfigError("no plane to pull over; give at least one")
        self._planes, self._addresses, self._peers = list(planes), addresses, peers
        self._expected, self.options = expected, options or PullOptions()
        self.budget = Budget(self.options.in_flight_bytes)
        self.ask_bytes = min(self.options.ask_bytes, self.options.in_flight_bytes)
        room = min(plane.frame_bytes for plane in planes) - 1024
        self.max_items = min(wire.MAX_KEYS, max(1, room // wire.KEY_ROOM))
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._asked: Counter[str] = Counter()
        self._avoid: dict[str, float] = {}
        self._avoid_planes: dict[tuple[str, str], float] = {}
        self._told: set[str] = set()
        self._idle = Idle()
        self._numbers = itertools.count(1)
        self._pulls: set[Pull] = set()
        self._closed = False

    def pull(
        self, wanted: Sequence[Wanted], timeout: float, into: Sequence[memoryview] | None = None,
        on_arrival: Callable[[Arrival], None] | None = None, whole: bool = False,
    ) -> Pull:  # fmt: skip
        """Starts; does not wait. timeout: seconds until what is not here has failed. into: a writable slot of each
        record's size (a reservation's ``record`` is one); without it memory is taken, once all sizes were checked.
        on_arrival: called for each piece, from any thread; must be quick. whole: record by record, which costs both
        sides less, instead of the first layers of all records first.

        The slots are the pull's until it has ended (``result``, or ``cancel`` has returned). Raises ConfigError.
        """
        self._check(wanted, timeout, into)
        slots = [memoryview(bytearray(w.size)) for w in wanted] if into is None else [memoryview(s) for s in into]
        expected = [Expected(self._expected.identity, w.tokens, w.first_position) for w in wanted]
        pull = Pull(self, wanted, slots, expected, time.monotonic() + timeout, on_arrival, whole)
        with self._lock:
            if self._closed:
                raise ConfigError("the puller is closed; make another")
            self._counts["pulls"] += 1
            self._pulls.add(pull)
        self._idle.sweep()
        pull.start()
        return pull

    def stats(self) -> PullStats:
        with self._lock:
            return PullStats(
                **self._counts, in_flight_bytes=self.budget.taken_bytes, in_flight_peak_bytes=self.budget.peak_bytes,
                errors=dict(self._errors),
            )  # fmt: skip

    def close(self) -> None:
        """Pulls that run are cancelled. The planes stay open."""
        with self._lock:
            self._closed = True
            pulls = list(self._pulls)
        for pull in pulls:
            pull.cancel()
        self._idle.close()

    def _check(self, wanted: Sequence[Wanted], timeout: float, into: Sequence[memoryview] | None) -> None:
        options = self.options
        if not wanted:
            raise ConfigError("a pull of no record")
        if not 0 < timeout < float("inf"):
            raise ConfigError(f"timeout is {timeout!r}; it must be a number of seconds above 0")
        for w in wanted:
            check_key(w.key)
            if not FIXED_BYTES < w.size <= options.record_bytes:
                raise ConfigError(
                    f"a record of {w.size} bytes; a pull takes {FIXED_BYTES + 1} to {options.record_bytes}"
                )
        if len({w.key for w in wanted}) != len(wanted):
            raise ConfigError("a key is wanted twice in one pull; ask for it once")
        nbytes = sum(w.size for w in wanted)
        if nbytes > options.pull_bytes:
            raise ConfigError(f"a pull of {nbytes} bytes; pull_bytes is {options.pull_bytes}: pull in parts")
        if into is None:
            return
        if len(into) != len(wanted):
            raise ConfigError(f"{len(into)} slots for {len(wanted)} records")
        for w, slot in zip(wanted, into, strict=True):
            if slot.readonly or slot.format != "B" or slot.ndim != 1 or len(slot) != w.size:
                raise ConfigError(f"a slot of {slot.nbytes} bytes for a record of {w.size}; it must be a writable "
                                  "memoryview of so many bytes (format B)")  # fmt: skip

    # Below: for Pull and its lanes.

    def choose(self, holders: Sequence[str], rest: Mapping[str, int]) -> str:
        """Of these, one that has not failed of late, and has least to send: of other pulls, and ``rest`` of this."""
        now = time.monotonic()
        with self._lock:
            return min(holders, key=lambda h: (self._avoid.get(h, 0.0) > now, self._asked[h] + rest.get(h, 0)))

    def count(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)

    def wrong(self, kind: str, holder: str, told: str) -> None:
        """Counted each time, logged once for each holder and kind."""
        with self._lock:
            self._errors[kind] += 1
            new = f"{holder} {kind}" not in self._told and len(self._told) < 1024
            self._told.add(f"{holder} {kind}")
        if new:
            log.warning("transfer: holder %s: %s", holder, told)

    def ended(self, pull: Pull) -> None:
        with self._lock:
            self._pulls.discard(pull)
        self.budget.wake()

    def run_lane(self, pull: Pull, holder: str) -> None:
        """A thread's work: until nothing is wanted from this holder."""
        backoff = _BACKOFF_SECONDS[0]
        while True:
            work = pull.take(holder)
            if work is None:
                return
            took = self.budget.take(work.charge, pull.deadline, lambda: pull.over)
            if not took:
                pull.expire()
                continue
            with self._lock:
                self._asked[holder] += work.charge
            failed: TransferError | None = None
            try:
                self._ask(pull, holder, work)
                backoff = _BACKOFF_SECONDS[0]
            except TransferError as exc:
                failed = exc
            except Exception as exc:  # nothing a peer sends may leave a pull without an end
                log.exception("transfer: a lane failed")
                failed = TransferProtocolError(f"{type(exc).__name__}: {exc}")
            finally:
                self.budget.give(work.charge)
                with self._lock:
                    self._asked[holder] -= work.all_charge
                    if not self._asked[holder]:
                        del self._asked[holder]
            if failed is not None and not pull.over:
                self.wrong(type(failed).__name__, holder, str(failed))
                with self._lock:
                    now = time.monotonic()
                    self._avoid = {h: until for h, until in self._avoid.items() if until > now}
                    self._avoid[holder] = now + self.options.avoid_seconds
            pull.answered(holder, work, failed)
            if failed is not None:
                pull.pause(backoff)
                backoff = min(2 * backoff, _BACKOFF_SECONDS[1])

    def _ask(self, pull: Pull, holder: str, work: Work) -> None:
        number = next(self._numbers) & 0xFFFFFFFF
        ask = wire.Ask(wire.VERSION, number, self._peers.namespace, self._peers.model, work.items, pull.whole)
        give_up = min(pull.deadline, time.monotonic() + self.options.ask_seconds)
        plane, address, stream, used = self._stream(holder, give_up)
        try:
            pull.streams.add(stream)
            if pull.over:
                raise PeerGoneError("the pull is over")
            try:
                stream.ask(wire.pack(ask), self._silence(give_up))
                frame = stream.receive(self._silence(give_up))
            except PeerGoneError:
                if not used or pull.over:
                    raise
                # It was left from an earlier pull, and the other side may have closed it since.
                pull.streams.discard(stream)
                stream.close()
                plane, address, stream, _ = self._stream(holder, give_up, new=True)
                pull.streams.add(stream)
                stream.ask(wire.pack(ask), self._silence(give_up))
                frame = stream.receive(self._silence(give_up))
            while not self._hand_over(pull, holder, work, number, frame):
                frame = stream.receive(self._silence(give_up))
            if work.came < work.told:
                self._stragglers(pull, holder, work, number, stream)
        except BaseException:
            stream.close()
            raise
        finally:
            pull.streams.discard(stream)
        if not work.late:
            self._idle.keep((plane.name, address), stream)

    def _hand_over(self, pull: Pull, holder: str, work: Work, number: int, frame: memoryview) -> bool:
        """True at the end."""
        message, payload = wire.unpack(frame)
        if isinstance(message, wire.Ask):
            raise TransferProtocolError("a holder that asks")
        if message.ask != number:
            return False  # of an ask before, come late or twice
        if isinstance(message, wire.Refused):
            raise (TransferTimeoutError if message.busy else TransferRefusedError)(f"refused: {message.why}")
        if isinstance(message, wire.End):
            work.told = message.sent_bytes
            return True
        if isinstance(message, wire.Missing):
            pull.missing(holder, work, message.items)
            return False
        work.came += len(payload)
        if work.came > 2 * work.all_charge + _SLACK_BYTES:
            raise TransferProtocolError(f"{work.came} bytes came of an ask of at most {work.all_charge}")
        pull.arrived(holder, work, message.segments, payload)
        here = min(len(payload), work.charge)
        work.charge -= here
        self.budget.give(here)
        return False

    def _stragglers(self, pull: Pull, holder: str, work: Work, number: int, stream: Stream) -> None:
        """What the end has overtaken, if it comes soon. The stream is not used again."""
        until = min(pull.deadline, time.monotonic() + _STRAGGLE_SECONDS)
        with contextlib.suppress(TransferTimeoutError, PeerGoneError):
            while work.came < work.told:
                self._hand_over(pull, holder, work, number, stream.receive(until))
        stream.close()
        work.late = True

    def _silence(self, give_up: float) -> float:
        return min(give_up, time.monotonic() + self.options.silence_seconds)

    def _stream(self, holder: str, give_up: float, new: bool = False) -> tuple[Plane, str, Stream, bool]:
        """A connection that is free, unless it must be new, or a new one; used: it is not new. Of the planes that both
        have, the first that connects; one that did not of late comes last."""
        addresses = self._addresses(holder)
        planes = [plane for plane in self._planes if plane.name in addresses]
        if not planes:
            ours = ", ".join(plane.name for plane in self._planes)
            told = ", ".join(addresses) or "none"
            raise TransferRefusedError(f"it has no plane of this worker's ({ours}), but {told}")
        with self._lock:
            now = time.monotonic()
            planes.sort(key=lambda plane: self._avoid_planes.get((holder, plane.name), 0.0) > now)
        failed: list[TransferError] = []
        for plane in planes:
            address = addresses[plane.name]
            found = None if new else self._idle.take((plane.name, address))
            if found is not None:
                return plane, address, found, True
            try:
                deadline = min(give_up, time.monotonic() + self.options.connect_seconds)
                return plane, address, plane.connect(address, deadline), False
            except TransferError as exc:
                failed.append(exc)
                self._avoid_plane(holder, plane.name)
                if plane is not planes[-1]:
                    self.wrong(f"plane {plane.name}", holder, f"plane {plane.name} is left: {exc}")
        # A refusal is for good: not while another plane may come right.
        raise next((exc for exc in failed if not isinstance(exc, TransferRefusedError)), failed[0])

    def _avoid_plane(self, holder: str, name: str) -> None:
        with self._lock:
            now = time.monotonic()
            self._avoid_planes = {key: until for key, until in self._avoid_planes.items() if until > now}
            self._avoid_planes[holder, name] = now + self.options.avoid_seconds
