"""The messages between KVBM's Rust leader and its workers, as bytes. The protocol is private to KVBM; this is what
its releases in ``_compat.SUPPORTED`` send, and anything else is refused.

    leader -> workers   PUB    [id, name] or [id, name, payload]
    worker -> leader    PUSH   [id] (acknowledged), or [id, name, payload] (answered)

id: u64, big-endian. A leader waits for one answer per rank to every message. Names and payloads:

    worker_metadata   no payload; answered with varint(device blocks) varint(bytes per block)
    leader_metadata   varint(host blocks) varint(disk blocks); acknowledged
    ping              no payload; acknowledged
    transfer_blocks   JSON, see ``Transfer``; acknowledged once the bytes have moved. There is no way to refuse: what
                      is acknowledged, the leader takes for moved.

varint (bincode's): below 251 one byte; else 251, 252 or 253 and a u16, u32 or u64, little-endian.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from dynamo_kvtc.errors import EngineProtocolError

MAX_NAME_BYTES = 64
MAX_PAYLOAD_BYTES = 16 << 20
MAX_PAIRS = 1 << 19
MAX_REQUEST_ID_CHARS = 4096
MAX_UUID_CHARS = 64
MAX_BLOCK_ID = (1 << 48) - 1

_WIDE = {251: ("<H", 251), 252: ("<I", 1 << 16), 253: ("<Q", 1 << 32)}
"""First byte -> format, and the least number that needs it."""


class Pool(Enum):
    DEVICE = "Device"
    HOST = "Host"
    DISK = "Disk"


ROUTES = frozenset(
    {
        (Pool.DEVICE, Pool.HOST),
        # Where there is no host cache, the leader offloads to disk at once.
        (Pool.DEVICE, Pool.DISK),
        (Pool.HOST, Pool.DISK),
        (Pool.HOST, Pool.DEVICE),
        (Pool.DISK, Pool.DEVICE),
    }
)


@dataclass(frozen=True)
class Transfer:
    """One ``transfer_blocks``: pairs of block ids (source, target), and the operation of a request it is half of.

    request_id, uuid: None where no request waits for it (host to disk). The other half of the operation comes through
    the engine. scheduled: the source is being computed; the transfer must wait for the engine's half.
    """

    source: Pool
    target: Pool
    pairs: tuple[tuple[int, int], ...]
    request_id: str | None = None
    uuid: str | None = None
    scheduled: bool = False


@dataclass(frozen=True)
class Message:
    """A message of the leader. ``payload`` is empty where there was none."""

    id: int
    name: str
    payload: bytes = b""


def encode_varint(value: int) -> bytes:
    """Raises EngineProtocolError outside of 0 .. 2**64 - 1."""
    if not 0 <= value < 1 << 64:
        raise EngineProtocolError(f"{value} does not fit a varint; it must be 0 to 2**64 - 1")
    if value < 251:
        return bytes([value])
    mark = 251 if value < 1 << 16 else 252 if value < 1 << 32 else 253
    return bytes([mark]) + struct.pack(_WIDE[mark][0], value)


def decode_varint(data: bytes, offset: int = 0) -> tuple[int, int]:
    """The number at ``offset`` and the offset after it. Raises EngineProtocolError."""
    if offset >= len(data):
        raise EngineProtocolError(f"a varint is missing at byte {offset} of {len(data)}")
    mark = data[offset]
    if mark < 251:
        return mark, offset + 1
    if mark not in _WIDE:
        raise EngineProtocolError(f"varint mark {mark} at byte {offset} is unknown; 251, 252 and 253 are known")
    form, least = _WIDE[mark]
    end = offset + 1 + struct.calcsize(form)
    if end > len(data):
        raise EngineProtocolError(f"the varint at byte {offset} needs {end - offset} bytes of {len(data) - offset}")
    value = struct.unpack_from(form, data, offset + 1)[0]
    if value < least:
        raise EngineProtocolError(f"the varint at byte {offset} spends {end - offset} bytes on {value}")
    return value, end


def encode_numbers(*values: int) -> bytes:
    return b"".join(encode_varint(value) for value in values)


def decode_numbers(data: bytes, count: int, what: str) -> tuple[int, ...]:
    """Exactly ``count`` varints and nothing after them."""
    values, offset = [], 0
    for _ in range(count):
        value, offset = decode_varint(data, offset)
        values.append(value)
    if offset != len(data):
        raise EngineProtocolError(f"{what} has {len(data)} bytes; its {count} numbers end at byte {offset}")
    return tuple(values)


def decode_message(frames: Sequence[bytes]) -> Message:
    """The leader's message. Raises EngineProtocolError, naming what is wrong with the frames."""
    if not 2 <= len(frames) <= 3:
        raise EngineProtocolError(f"a leader's message has 2 or 3 frames; got {len(frames)}")
    if len(frames[0]) != 8:
        raise EngineProtocolError(f"a message id has 8 bytes; got {len(frames[0])}")
    if not 1 <= len(frames[1]) <= MAX_NAME_BYTES or not frames[1].isascii():
        raise EngineProtocolError(f"a message name is 1 to {MAX_NAME_BYTES} ASCII bytes; got {frames[1][:80]!r}")
    payload = frames[2] if len(frames) == 3 else b""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise EngineProtocolError(f"a payload of {len(payload)} bytes; at most {MAX_PAYLOAD_BYTES} are read")
    return Message(int.from_bytes(frames[0], "big"), frames[1].decode("ascii"), bytes(payload))


def encode_ack(message_id: int) -> list[bytes]:
    return [_id(message_id)]


def encode_worker_metadata(message_id: int, device_blocks: int, bytes_per_block: int) -> list[bytes]:
    return [_id(message_id), b"worker_metadata", encode_numbers(device_blocks, bytes_per_block)]


def decode_leader_metadata(payload: bytes) -> tuple[int, int]:
    """Host blocks and disk blocks of the leader's pools."""
    host, disk = decode_numbers(payload, 2, "leader_metadata")
    return host, disk


def decode_transfer(payload: bytes) -> Transfer:
    """Raises EngineProtocolError for anything but what a known leader writes."""
    fields = load_json_object(payload, "transfer_blocks")
    _keys(fields, {"from_pool", "to_pool", "blocks"}, {"connector_req"}, "transfer_blocks")
    try:
        source, target = Pool(fields["from_pool"]), Pool(fields["to_pool"])
    except (ValueError, TypeError) as exc:
        raise EngineProtocolError(
            f"transfer_blocks from {fields['from_pool']!r} to {fields['to_pool']!r}; the pools are "
            f"{', '.join(pool.value for pool in Pool)}"
        ) from exc
    if (source, target) not in ROUTES:
        raise EngineProtocolError(f"transfer_blocks from {source.value} to {target.value}: no known leader asks this")
    pairs = _pairs(fields["blocks"])
    if (fields.get("connector_req") is None) == (Pool.DEVICE in (source, target)):
        raise EngineProtocolError(
            f"{source.value} to {target.value} with connector_req {fields.get('connector_req')!r:.200}: it is there "
            f"where the device is, and nowhere else"
        )
    if fields.get("connector_req") is None:
        return Transfer(source, target, pairs)
    asked = fields["connector_req"]
    if not isinstance(asked, dict):
        raise EngineProtocolError(f"connector_req is a {type(asked).__name__}; it must be an object")
    _keys(asked, {"request_id", "uuid", "request_type"}, {"requirement"}, "connector_req")
    if asked.get("requirement") is not None:
        raise EngineProtocolError(f"connector_req has the requirement {asked['requirement']!r}; only null is known")
    if asked["request_type"] not in ("Immediate", "Scheduled"):
        raise EngineProtocolError(f"request_type {asked['request_type']!r}; 'Immediate' and 'Scheduled' are known")
    return Transfer(
        source,
        target,
        pairs,
        request_id=text(asked["request_id"], MAX_REQUEST_ID_CHARS, "request_id"),
        uuid=text(asked["uuid"], MAX_UUID_CHARS, "uuid"),
        scheduled=asked["request_type"] == "Scheduled",
    )


def load_json_object(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object of bounded size; not NaN, not a key twice. Raises EngineProtocolError."""
    if len(data) > MAX_PAYLOAD_BYTES:
        raise EngineProtocolError(f"{what} has {len(data)} bytes; at most {MAX_PAYLOAD_BYTES} are read")

    def once(items: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(items)
        if len(fields) != len(items):
            raise ValueError("a key is there twice")
        return fields

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a number of JSON")

    try:
        fields = json.loads(data, object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as exc:
        raise EngineProtocolError(f"{what} is not JSON ({exc}): {data[:80]!r}") from exc
    if not isinstance(fields, dict):
        raise EngineProtocolError(f"{what} is a JSON {type(fields).__name__}; it must be an object")
    return fields


def text(value: Any, longest: int, what: str) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= longest:
        raise EngineProtocolError(f"{what} must be a string of 1 to {longest} characters; got {value!r:.80}")
    return value


def block_id(value: Any, what: str) -> int:
    # bool is an int in Python, and no leader writes one.
    if type(value) is not int or not 0 <= value <= MAX_BLOCK_ID:
        raise EngineProtocolError(f"{what} must be an integer of 0 to {MAX_BLOCK_ID}; got {value!r:.80}")
    return value


def _pairs(blocks: Any) -> tuple[tuple[int, int], ...]:
    if not isinstance(blocks, list) or len(blocks) > MAX_PAIRS:
        raise EngineProtocolError(f"blocks must be a list of at most {MAX_PAIRS} pairs; got {blocks!r:.80}")
    pairs = []
    for pair in blocks:
        if not isinstance(pair, list) or len(pair) != 2:
            raise EngineProtocolError(f"a pair of blocks must be [source, target]; got {pair!r:.80}")
        pairs.append((block_id(pair[0], "a source block"), block_id(pair[1], "a target block")))
    if len({target for _, target in pairs}) != len(pairs):
        raise EngineProtocolError("a target block is there twice in one transfer")
    return tuple(pairs)


def _keys(fields: dict[str, Any], needed: set[str], optional: set[str], what: str) -> None:
    missing, unknown = needed - fields.keys(), fields.keys() - needed - optional
    if missing or unknown:
        raise EngineProtocolError(f"{what}: missing {sorted(missing)}, unknown {sorted(unknown)}")


def _id(message_id: int) -> bytes:
    if not 0 <= message_id < 1 << 64:
        raise EngineProtocolError(f"message id {message_id} does not fit 8 bytes")
    return message_id.to_bytes(8, "big")
