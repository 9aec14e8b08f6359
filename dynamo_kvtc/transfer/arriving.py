"""One record on its way: which of its bytes are here, and which of its layer groups are proven.

Bytes land where nothing has landed yet, and nowhere else: what was proven, or is being proven, does not change again.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from dynamo_kvtc.codec.headers import Identity
from dynamo_kvtc.codec.record import CRC_OFFSET, FIXED_BYTES, Record, parse_record
from dynamo_kvtc.errors import RecordCorruptError, RecordError, RecordMismatchError, TransferProtocolError
from dynamo_kvtc.transfer.plane import Buffer

WAITING, PROVING, HERE, FAILED = "waiting", "proving", "here", "failed"


@dataclass(frozen=True)
class Expected:
    """What a record must say to be used. tokens, first_position: None if they are not known."""

    identity: Identity
    tokens: int | None = None
    first_position: int | None = None

    def check(self, record: Record) -> None:
        """Raises RecordMismatchError naming both sides."""
        h = record.header
        said = Identity(h.profile, h.point, h.artifact, h.rank, record.groups)
        if said != self.identity:
            raise RecordMismatchError(f"the record is of {said}, this worker's codec of {self.identity}")
        for name, found, wanted in (
            ("tokens", h.tokens, self.tokens), ("first position", int(h.positions[0]), self.first_position),
        ):  # fmt: skip
            if wanted is not None and found != wanted:
                raise RecordMismatchError(f"the record's {name} is {found}, the block's {wanted}")


class Arriving:
    """``status``: per layer group. ``record``: parsed and as expected, once its header is here. No lock of its own."""

    def __init__(self, slot: memoryview, expected: Expected) -> None:
        self.slot, self.expected = slot, expected
        self.status = [WAITING] * expected.identity.groups
        self.record: Record | None = None
        self._got: list[tuple[int, int]] = []

    @property
    def header_checksum(self) -> int:
        """As the record says it; 0 while it is not known."""
        return 0 if self.record is None else int.from_bytes(self.slot[CRC_OFFSET : CRC_OFFSET + 4], "little")

    def bytes_of(self, group: int) -> int:
        """Of this group's piece; while the header is not known all that the record has."""
        if self.record is None:
            return len(self.slot)
        return self.record.sizes[group] + (self.record.offsets[0] if group == 0 else 0)

    def write(self, offset: int, data: Buffer) -> None:
        """Raises a RecordError if the header is damaged or not as expected: then nothing is here any more;
        TransferProtocolError if there are more stretches than an honest holder makes."""
        end = offset + len(data)
        got = self._got
        if got and got[-1][1] == offset:
            # As holders send: what comes next.
            self.slot[offset:end] = data
            got[-1] = (got[-1][0], end)
            if self.record is None:
                self._parse()
            return
        at = offset
        for start, stop in got:
            if stop <= at:
                continue
            if start >= end:
                break
            if at < start:
                self.slot[at:start] = data[at - offset : start - offset]
            at = stop
        if at < end:
            self.slot[at:end] = data[at - offset :]
        self._add(offset, end)
        if self.record is None:
            self._parse()

    def section(self, offset: int, data: Buffer) -> int | None:
        """As holders send most of it: a whole layer group, next to what is here. It is written, and ready. None: it is
        no such, and nothing was done."""
        got = self._got
        if self.record is None or got[-1][1] != offset:
            return None
        group = bisect_right(self.record.offsets, offset) - 1
        begins = self.record.offsets[group] == offset and self.record.sizes[group] == len(data)
        if not begins or self.status[group] != WAITING:
            return None
        end = offset + len(data)
        self.slot[offset:end] = data
        got[-1] = (got[-1][0], end)
        self.status[group] = PROVING
        return group

    def ready(self) -> list[int]:
        """Layer groups that are here as a whole and wait to be proven; from now on they are not ready again."""
        if self.record is None:
            return []
        out = []
        offsets, sizes = self.record.offsets, self.record.sizes
        for group, status in enumerate(self.status):
            if status == WAITING and self._has(offsets[group], offsets[group] + sizes[group]):
                self.status[group] = PROVING
                out.append(group)
        return out

    def prove(self, group: int) -> RecordCorruptError | None:
        """Reads the bytes, changes nothing."""
        assert self.record is not None
        try:
            self.record.section(group)
        except RecordCorruptError as exc:
            return exc
        return None

    def proven(self, group: int, good: bool) -> None:
        """If not, it is as if it had never come."""
        assert self.record is not None
        self.status[group] = HERE if good else WAITING
        if not good:
            start = self.record.offsets[group]
            self._take_out(start, start + self.record.sizes[group])

    def _parse(self) -> None:
        if not self._got or self._got[0][0] != 0:
            return
        here = self._got[0][1]
        header_bytes = int.from_bytes(self.slot[30:32], "little") if here >= FIXED_BYTES else FIXED_BYTES
        if here < max(FIXED_BYTES, min(header_bytes, len(self.slot))):
            # Too short for the size it claims is refused below, too short so far is waited for.
            return
        try:
            record = parse_record(self.slot)
            self.expected.check(record)
        except RecordError:
            self._got.clear()
            raise
        self.record = record

    def _has(self, start: int, end: int) -> bool:
        if start == end:
            return True
        for a, b in self._got:
            if end <= b:
                return a <= start
        return False

    def _add(self, start: int, end: int) -> None:
        out = []
        for a, b in self._got:
            if b < start or a > end:
                out.append((a, b))
            else:
                start, end = min(start, a), max(end, b)
        out.append((start, end))
        if len(out) > 4 * len(self.status) + 64:
            # Each costs time at every write, under the pull's lock. The next holder begins where nothing is.
            self._got = self._kept()
            raise TransferProtocolError(f"a record that comes in more than {len(out) - 1} stretches")
        self._got = sorted(out)

    def _kept(self) -> list[tuple[int, int]]:
        """The header, and the layer groups that are proven or being proven."""
        if self.record is None:
            return []
        pieces = zip(self.status, self.record.offsets, self.record.sizes, strict=True)
        groups = [(start, start + size) for status, start, size in pieces if status in (PROVING, HERE) and size]
        return [(0, self.record.offsets[0]), *groups]

    def _take_out(self, start: int, end: int) -> None:
        out = []
        for a, b in self._got:
            out += [(x, y) for x, y in ((a, min(b, start)), (max(a, end), b)) if x < y]
        self._got = out
