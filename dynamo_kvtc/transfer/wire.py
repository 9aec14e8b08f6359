"""The messages between asker and holder, in msgpack. Everything is bounded; what is not as written here is refused.

A frame is 4 bytes (little-endian) with the size of the message, the message, and the payload that it tells of. Only
``Pieces`` has one. Each answer names the ask it belongs to.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from dynamo_kvtc.codec.record import MAX_GROUPS
from dynamo_kvtc.errors import TransferProtocolError
from dynamo_kvtc.store import MAX_KEY_BYTES, MAX_RECORD_BYTES, MIN_KEY_BYTES
from dynamo_kvtc.transfer.plane import MAX_FRAME_BYTES

VERSION = 1
MAX_KEYS = 4096
"""Of an ask."""
KEY_ROOM = MAX_KEY_BYTES + 32
"""Bytes that a key and what is asked of it take at most."""
SEGMENT_ROOM = 16
ALL_GROUPS = (1 << MAX_GROUPS) - 1

ABSENT, OTHER_SIZE, OTHER_RECORD, DAMAGED = 1, 2, 3, 4
"""Why a holder sends nothing of a record: it has none, one of another size, one with another header, a damaged one."""
WHY = {ABSENT: "absent", OTHER_SIZE: "other size", OTHER_RECORD: "other record", DAMAGED: "damaged at the holder"}

_LENGTH = struct.Struct("<I")
_Number: TypeAlias = Annotated[int, Meta(ge=0, le=2**32 - 1)]
_Index: TypeAlias = Annotated[int, Meta(ge=0, lt=MAX_KEYS)]
_Offset: TypeAlias = Annotated[int, Meta(ge=0, lt=MAX_RECORD_BYTES)]
_Length: TypeAlias = Annotated[int, Meta(ge=1, le=MAX_RECORD_BYTES)]
_Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=256)]


class Item(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """size: what the record has; header: the checksum of the header that is here already, 0 if none is; groups: bit g
    is set if layer group g is wanted (bit 0: with the header)."""

    key: Annotated[bytes, Meta(min_length=MIN_KEY_BYTES, max_length=MAX_KEY_BYTES)]
    size: _Length
    header: _Number
    groups: int


class Ask(msgspec.Struct, tag="ask", array_like=True, frozen=True):
    """whole: record by record, those of which all is wanted in one stretch; else layer group by layer group."""

    version: int
    ask: _Number
    namespace: _Name
    model: _Name
    items: Annotated[list[Item], Meta(min_length=1, max_length=MAX_KEYS)]
    whole: bool = False


class Missing(msgspec.Struct, tag="missing", array_like=True, frozen=True):
    """Of these items, index and reason, nothing more will come."""

    ask: _Number
    items: Annotated[list[tuple[_Index, int]], Meta(max_length=MAX_KEYS)]


class Pieces(msgspec.Struct, tag="pieces", array_like=True, frozen=True):
    """The payload: one stretch after another, each (item, offset in its record, bytes)."""

    ask: _Number
    segments: list[tuple[_Index, _Offset, _Length]]


class End(msgspec.Struct, tag="end", array_like=True, frozen=True):
    """All that this holder has of the ask was sent: so many bytes of payload."""

    ask: _Number
    sent_bytes: Annotated[int, Meta(ge=0)]


class Refused(msgspec.Struct, tag="refused", array_like=True, frozen=True):
    """Nothing (more) will come. busy: it may later."""

    ask: _Number
    why: Annotated[str, Meta(max_length=1024)]
    busy: bool


Message: TypeAlias = Ask | Missing | Pieces | End | Refused

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def pack(message: Message) -> bytes:
    """A frame without its payload."""
    told = _encoder.encode(message)
    return _LENGTH.pack(len(told)) + told


def unpack(frame: bytes | bytearray | memoryview) -> tuple[Message, memoryview]:
    """Message and payload. Raises TransferProtocolError."""
    view = memoryview(frame)
    if not _LENGTH.size <= len(view) <= MAX_FRAME_BYTES:
        raise TransferProtocolError(f"a frame of {len(view)} bytes; it has {_LENGTH.size} to {MAX_FRAME_BYTES}")
    end = _LENGTH.size + _LENGTH.unpack_from(view)[0]
    if end > len(view):
        raise TransferProtocolError(f"a message that ends at {end} in a frame of {len(view)} bytes")
    try:
        message = _decoder.decode(view[_LENGTH.size : end])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise TransferProtocolError(f"not a message of this release: {exc}") from exc
    payload = view[end:]
    told = sum(length for _, _, length in message.segments) if isinstance(message, Pieces) else 0
    if told != len(payload):
        raise TransferProtocolError(f"a payload of {len(payload)} bytes; its message tells of {told}")
    return message, payload


def check_ask(message: Message) -> Ask:
    """Raises TransferProtocolError."""
    if not isinstance(message, Ask):
        raise TransferProtocolError(f"{type(message).__name__.lower()} instead of an ask")
    if message.version != VERSION:
        raise TransferProtocolError(f"transfer version {message.version}; this release speaks {VERSION}")
    for item in message.items:
        if not 0 < item.groups <= ALL_GROUPS:
            raise TransferProtocolError(f"layer groups {item.groups:#x} of a record that has at most {MAX_GROUPS}")
    return message


def groups_of(mask: int) -> list[int]:
    return [g for g in range(mask.bit_length()) if mask >> g & 1]


def mask_of(groups: Sequence[int]) -> int:
    return sum(1 << g for g in groups)
