"""What a prefill worker has of a request, asked directly: its records may not be coded yet when it is handed on.

One question and answer over NATS, at ``<pull subject>.sizes``: a version byte and keys of 32 bytes; a version byte and
for each key the record's size as 4 bytes (little-endian): 0 if it is not here, ``CODING`` while it is being coded.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence

from dynamo_kvtc.errors import NatsError, TransferProtocolError
from dynamo_kvtc.events.inbox import Message
from dynamo_kvtc.events.nats import Nats
from dynamo_kvtc.store import MAX_RECORD_BYTES

VERSION = 1
KEY_BYTES = 32
MAX_KEYS = 8192
CODING = 0xFFFFFFFF
_ASK_AGAIN_SECONDS = 0.01
_ANSWER_SECONDS = 0.5


def subject_of(pull_subject: str) -> str:
    return f"{pull_subject}.sizes"


def answer(question: bytes, size: Callable[[bytes], int | None]) -> bytes:
    """size: of a record: None if it is not here, 0 while it is coded. Raises TransferProtocolError."""
    count, rest = divmod(len(question) - 1, KEY_BYTES)
    if not question or question[0] != VERSION or rest or not 1 <= count <= MAX_KEYS:
        raise TransferProtocolError(f"a question of {len(question)} bytes that is none of this release")
    keys = (question[i : i + KEY_BYTES] for i in range(1, len(question), KEY_BYTES))
    told = [{None: 0, 0: CODING}.get(found, found) for found in map(size, keys)]
    return bytes([VERSION]) + struct.pack(f"<{count}I", *told)


def serve(size: Callable[[bytes], int | None]) -> Callable[[Message], bytes]:
    return lambda message: answer(message.data, size)


def read(told: bytes, count: int) -> list[int]:
    """Raises TransferProtocolError."""
    if len(told) != 1 + 4 * count or told[0] != VERSION:
        raise TransferProtocolError(f"an answer of {len(told)} bytes to a question about {count} records")
    sizes = list(struct.unpack_from(f"<{count}I", told, 1))
    bad = [size for size in sizes if size != CODING and size > MAX_RECORD_BYTES]
    if bad:
        raise TransferProtocolError(f"a record of {bad[0]} bytes; it has at most {MAX_RECORD_BYTES}")
    return sizes


def ask(nats: Nats, subject: str, keys: Sequence[bytes], deadline: float) -> list[int]:
    """Sizes of the longest prefix of keys that the worker has. Waits while it is coding them; then for what has been
    coded by the deadline (monotonic seconds)."""
    question = bytes([VERSION]) + b"".join(keys[:MAX_KEYS])
    count = min(len(keys), MAX_KEYS)
    sizes: list[int] = []
    while count and (left := deadline - time.monotonic()) > 0:
        try:
            sizes = read(nats.request(subject, question, min(left, _ANSWER_SECONDS)).data, count)
        except (NatsError, TransferProtocolError):
            time.sleep(min(0.05, max(0.0, deadline - time.monotonic())))
            continue
        if next((size for size in sizes if size in (0, CODING)), 0) != CODING:
            break
        time.sleep(min(_ASK_AGAIN_SECONDS, max(0.0, deadline - time.monotonic())))
    end = next((i for i, size in enumerate(sizes) if size in (0, CODING)), len(sizes))
    return sizes[:end]
