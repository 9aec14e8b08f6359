"""What arrives is whole, or a named error; nothing in between."""

from __future__ import annotations

import contextlib
import random
import struct
import tracemalloc
import zlib

import msgspec
import pytest

from dynamo_kvtc.errors import ConfigError, EventError, EventFormatError, EventVersionError
from dynamo_kvtc.events.publisher import Publisher
from dynamo_kvtc.events.schema import (
    MAX_EVENTS,
    Batch,
    Beat,
    BlockMoved,
    BlockRemoved,
    BlocksCleared,
    BlockStored,
    Held,
    Plane,
    SnapshotAsk,
    SnapshotPage,
    Subjects,
    WorkerDown,
    WorkerStats,
    WorkerUp,
    decode,
    encode,
    new_epoch,
    new_worker,
    tier_number,
)
from tests.builders import case_seed

KEY = bytes(range(32))


def sealed(body):
    return struct.pack("<BI", 1, zlib.crc32(body)) + body


def up(**more):
    told = {
        "worker": "w1", "epoch": 7, "model": "m1", "model_name": "SmolLM2", "artifact": "ab" * 32,
        "record_version": 2, "block_tokens": 16, "planes": [Plane("nats", "inbox", {"credit": "4"})], "held": 3,
    }  # fmt: skip
    return WorkerUp(**(told | more))


def test_an_address_as_long_as_nixls():
    """Its metadata names every network device of the machine."""
    told = up(planes=[Plane("nixl", "A" * (1 << 14))] * 8)
    batch = Batch("w1", 7, 0, 0, [told])
    assert decode(Batch, encode(batch)) == batch
    with pytest.raises(EventFormatError, match="16384"):
        decode(Batch, encode(Batch("w1", 7, 0, 0, [up(planes=[Plane("nixl", "A" * ((1 << 14) + 1))])])))


def test_who_cannot_be_read_by_others_is_told_so():
    with pytest.raises(ConfigError, match=r"cannot be read by others.*256"):
        Publisher(None, up(model_name="x" * 257))


def messages():
    events = [
        up(), BlockStored(KEY, 1, 4000, KEY, 160, 16), BlockStored(KEY, 2, 1), BlockMoved(KEY, 2),
        BlockRemoved(KEY, 2), BlocksCleared(), WorkerDown("asked"),
    ]  # fmt: skip
    return [
        Batch("w1", 7, 0, 12, events),
        Beat(up(), 1, 9, 6.0, WorkerStats({"host": 1}, {"host": 4000}, 1, 2, 3, 4, 5, 6, 7, 8)),
        SnapshotAsk("abc", 7, 0),
        SnapshotPage("w1", 7, 0, 9, True, [Held(KEY, 1, 4000)]),
    ]


@pytest.mark.parametrize("message", messages(), ids=lambda m: type(m).__name__)
def test_a_message_comes_back_as_it_was(message):
    assert decode(type(message), encode(message)) == message


@pytest.mark.parametrize("message", messages(), ids=lambda m: type(m).__name__)
def test_damage_is_an_error(message):
    rng = random.Random(case_seed())
    whole, kind = encode(message), type(message)
    for end in range(len(whole)):
        with pytest.raises(EventError):
            decode(kind, whole[:end])
    with pytest.raises(EventFormatError):
        decode(kind, whole + b"\0")
    for _ in range(2000):
        bad = bytearray(whole)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        with pytest.raises(EventError, match=kind.__name__):
            decode(kind, bytes(bad))
    # A liar, who counts his checksum right: still an error of ours, or another message that is whole.
    for _ in range(2000):
        body = bytearray(whole[5:])
        for _ in range(rng.randrange(1, 4)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        with contextlib.suppress(EventError):
            assert isinstance(decode(kind, sealed(bytes(body))), kind)


def test_another_version_is_told_from_damage():
    whole = bytearray(encode(messages()[0]))
    whole[0] = 9
    with pytest.raises(EventVersionError, match=r"version 9.*version 1"):
        decode(Batch, bytes(whole))
    with pytest.raises(EventFormatError, match="0 bytes"):
        decode(Batch, b"")


@pytest.mark.parametrize(
    "bad",
    [
        Batch("w1", 7, 0, 0, []),
        Batch("w1", 7, 0, 0, [BlocksCleared()] * (MAX_EVENTS + 1)),
        Batch("w.1", 7, 0, 0, [BlocksCleared()]),
        Batch("w1", -1, 0, 0, [BlocksCleared()]),
        Batch("w1", 7, 1 << 63, 0, [BlocksCleared()]),
        Batch("w1", 7, 0, 0, [BlockStored(KEY[:31], 1, 5)]),
        Batch("w1", 7, 0, 0, [BlockStored(KEY, 4, 5)]),
        Batch("w1", 7, 0, 0, [BlockStored(KEY, 1, 0)]),
        Batch("w1", 7, 0, 0, [BlockStored(KEY, 1, 1 << 32)]),
        Batch("w1", 7, 0, 0, [BlockStored(KEY, 1, 5, KEY + KEY)]),
        Batch("w1", 7, 0, 0, [up(model="a.b")]),
        Batch("w1", 7, 0, 0, [up(model_name="n" * 257)]),
        Batch("w1", 7, 0, 0, [up(planes=[Plane("a", "b")] * 9)]),
    ],
)
def test_values_out_of_bounds_are_refused(bad):
    with pytest.raises(EventFormatError, match="Batch of"):
        decode(Batch, encode(bad))


def test_an_oversized_message_is_refused_before_it_is_read():
    huge = b"\1" + bytes(3 << 20)
    tracemalloc.start()
    with pytest.raises(EventFormatError, match="3145729 bytes; at most 1048576"):
        decode(Batch, huge)
    forged = sealed(msgspec.msgpack.encode(["w", 1, 0, 0])[:-1] + b"\0\xdd\xff\xff\xff\xff")
    with pytest.raises(EventFormatError):
        decode(Batch, forged)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_later_epochs_are_larger_and_names_fit_subjects():
    epochs = [new_epoch() for _ in range(3)]
    assert len(set(epochs)) == 3
    assert epochs[0] >> 20 <= epochs[-1] >> 20
    assert epochs[0] < 1 << 62
    subjects = Subjects("prod", "ab" * 16)
    assert subjects.events(new_worker("pod.with dots/and more" + "x" * 90)).count(".") == 4
    with pytest.raises(ConfigError, match="namespace is '\\*'"):
        Subjects("*", "ab")
    with pytest.raises(ConfigError, match="tier 'tape'"):
        tier_number("tape")
