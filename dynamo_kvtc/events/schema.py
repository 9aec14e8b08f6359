"""What workers tell each other: a version byte, a CRC-32, msgpack; checked whole before anybody sees a field.

    batch      events of one worker, numbered: on ``kvtc.<namespace>.<model key>.events.<worker>``, and in a stream
    beat       that a worker lives, what it is and how it does: a value in a bucket, gone after its time
    ask, page  everything that a worker holds, in pages: on ``kvtc.<namespace>.<model key>.snapshot.<worker>``

The model key is KeySpace's identity, so peers whose records could not be used share no subject. Nothing here carries a
prompt: blocks are told by digest. A message of another version raises EventVersionError, every other defect
EventFormatError; no length is believed that the payload's own length does not bear.
"""

from __future__ import annotations

import binascii
import re
import secrets
import struct
import time
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from dynamo_kvtc.errors import ConfigError, EventFormatError, EventVersionError
from dynamo_kvtc.events.options import TOKEN

VERSION = 1
KEY_BYTES = 32
MAX_BYTES = 1 << 20
"""Of any of these messages: a NATS server's own limit, unless it is raised there."""
MAX_EVENTS = 4096
PAGE_ENTRIES = 8192
MAX_SIZE = (1 << 32) - 1
HOST, DISK = "host", "disk"
TIERS = ("device", HOST, DISK, "shared")

Key = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Parent = Annotated[bytes, Meta(max_length=KEY_BYTES)]
Text = Annotated[str, Meta(max_length=256)]
Address = Annotated[str, Meta(max_length=1 << 14)]
"""NIXL's metadata has a kilobyte for each of some network devices."""
Token = Annotated[str, Meta(pattern=f"^{TOKEN.pattern}$", max_length=64)]
Tier = Annotated[int, Meta(ge=0, lt=len(TIERS))]
Count = Annotated[int, Meta(ge=0, le=1 << 62)]
Size = Annotated[int, Meta(ge=1, le=MAX_SIZE)]


class _Told(msgspec.Struct, array_like=True, frozen=True):
    pass


class BlockStored(_Told, frozen=True, tag=1):
    """A record is whole in that tier. size: its bytes; parent: the key before it in its chain, b"" if that is not
    known; position: its first token's, -1 if not known; tokens: how many it holds, 0 if not known."""

    key: Key
    tier: Tier
    size: Size
    parent: Parent = b""
    position: Annotated[int, Meta(ge=-1, le=1 << 62)] = -1
    tokens: Count = 0


class BlockMoved(_Told, frozen=True, tag=2):
    """The best tier that has it is now this one."""

    key: Key
    tier: Tier


class BlockRemoved(_Told, frozen=True, tag=3):
    """No tier of the worker has it any more; tier: the last that had."""

    key: Key
    tier: Tier


class BlocksCleared(_Told, frozen=True, tag=4):
    """The worker holds nothing any more."""


class Plane(_Told, frozen=True):
    """One way to pull from a worker. facts: what that plane needs to know, by name."""

    name: Token
    address: Address
    facts: Annotated[dict[Text, Text], Meta(max_length=16)] = {}


class WorkerUp(_Told, frozen=True, tag=5):
    """The first event of an epoch. held: records it had at its start, which no event tells of."""

    worker: Token
    epoch: Count
    model: Token
    model_name: Text
    artifact: Text
    record_version: Count
    block_tokens: Count
    planes: Annotated[list[Plane], Meta(max_length=8)] = []
    held: Count = 0


class WorkerDown(_Told, frozen=True, tag=6):
    """The last event of an epoch."""

    reason: Text = ""


Event = BlockStored | BlockMoved | BlockRemoved | BlocksCleared | WorkerUp | WorkerDown


class Batch(_Told, frozen=True):
    """sequence: the first event's, counted from 0 in each epoch; the others follow without a gap. after: where in the
    stream the batch before this one is, 0 if that is not known: what was missed lies behind it."""

    worker: Token
    epoch: Count
    sequence: Count
    after: Count
    events: Annotated[list[Event], Meta(min_length=1, max_length=MAX_EVENTS)]

    @property
    def end(self) -> int:
        """The sequence of the event that comes next."""
        return self.sequence + len(self.events)


class WorkerStats(msgspec.Struct, frozen=True):
    """What `kvtc watch` shows; counts since the worker's start. entries, bytes: now, by tier."""

    entries: Annotated[dict[Text, Count], Meta(max_length=8)] = {}
    bytes: Annotated[dict[Text, Count], Meta(max_length=8)] = {}
    hits: Count = 0
    misses: Count = 0
    raw_bytes: Count = 0
    coded_bytes: Count = 0
    pulled_bytes: Count = 0
    served_bytes: Count = 0
    events: Count = 0
    events_dropped: Count = 0


class Beat(_Told, frozen=True):
    """beat: counted from 1; sequence: that of the next event to be published, so that a lost last batch shows."""

    up: WorkerUp
    beat: Count
    sequence: Count
    ttl_seconds: Annotated[float, Meta(gt=0, le=3600)]
    stats: WorkerStats


class SnapshotAsk(_Told, frozen=True):
    """A page of what the worker holds. asker: of this snapshot alone; page: from 0, the last one may be asked again."""

    asker: Token
    epoch: Count
    page: Count


class Held(_Told, frozen=True):
    key: Key
    tier: Tier
    size: Size


class SnapshotPage(_Told, frozen=True):
    """sequence: events before it are in the snapshot, the later ones must be applied over it; 0 is a refusal: another
    epoch, or a snapshot that is not known (any more). epoch: of the worker that answers. end: no page comes after."""

    worker: Token
    epoch: Count
    page: Count
    sequence: Count
    end: bool
    entries: Annotated[list[Held], Meta(max_length=PAGE_ENTRIES)]


_HEAD = struct.Struct("<BI")
T = TypeVar("T", Batch, Beat, SnapshotAsk, SnapshotPage)
_ENCODER = msgspec.msgpack.Encoder()
_DECODERS = {kind: msgspec.msgpack.Decoder(kind) for kind in (Batch, Beat, SnapshotAsk, SnapshotPage)}


def encode(message: Batch | Beat | SnapshotAsk | SnapshotPage) -> bytes:
    body = _ENCODER.encode(message)
    return _HEAD.pack(VERSION, binascii.crc32(body)) + body


def decode(kind: type[T], payload: bytes, max_bytes: int = MAX_BYTES) -> T:
    """Raises EventVersionError, EventFormatError."""
    if len(payload) > max_bytes:
        raise EventFormatError(f"a {kind.__name__} of {len(payload)} bytes; at most {max_bytes} are taken")
    if len(payload) <= _HEAD.size:
        raise EventFormatError(f"a {kind.__name__} of {len(payload)} bytes; its head alone has {_HEAD.size}")
    if payload[0] != VERSION:
        raise EventVersionError(
            f"a {kind.__name__} of version {payload[0]}; this release knows version {VERSION}: run the same release on "
            "all workers of the namespace"
        )
    body = memoryview(payload)[_HEAD.size :]
    if binascii.crc32(body) != _HEAD.unpack_from(payload)[1]:
        raise EventFormatError(f"a {kind.__name__} of {len(payload)} bytes was damaged: its checksum is another")
    try:
        return _DECODERS[kind].decode(body)  # type: ignore[return-value]
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as exc:
        raise EventFormatError(f"a {kind.__name__} of {len(payload)} bytes cannot be read: {exc}") from exc


def new_epoch() -> int:
    """Of one start of a worker: the milliseconds of the clock, so that a later start has the larger, and 20 bits that
    nobody foresees, so that two starts are never the same."""
    return (time.time_ns() // 1_000_000) << 20 | secrets.randbits(20)


def new_worker(name: str) -> str:
    """A worker's id from a host's or pod's name: what subjects cannot have is replaced."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)[:50] + "-" + secrets.token_hex(4)


def tier_number(tier: str) -> int:
    """Raises ConfigError."""
    if tier not in TIERS:
        raise ConfigError(f"tier {tier!r} is unknown; it must be one of {', '.join(TIERS)}")
    return TIERS.index(tier)


class Subjects:
    """Of one namespace and model key. model "*": of all."""

    def __init__(self, namespace: str, model: str) -> None:
        for name, value in (("namespace", namespace), ("model key", model)):
            if not TOKEN.fullmatch(value) and (value != "*" or name == "namespace"):
                raise ConfigError(f"{name} is {value!r}; it must be 1 to 64 letters, digits, - or _")
        self.namespace, self.model = namespace, model
        self.stream = f"KVTC_{namespace}_EVENTS"
        self.stream_subjects = [f"kvtc.{namespace}.*.events.*"]
        self.bucket = f"KVTC_{namespace}_WORKERS"

    def events(self, worker: str = "*") -> str:
        return f"kvtc.{self.namespace}.{self.model}.events.{worker}"

    def snapshot(self, worker: str) -> str:
        return f"kvtc.{self.namespace}.{self.model}.snapshot.{worker}"

    def beat(self, worker: str) -> str:
        """Its key in the bucket."""
        return f"{self.model}.{worker}"
