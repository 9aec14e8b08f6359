"""The payload of profile kvtc: lane lengths, lane bytes, words; one lane a token or several."""

from __future__ import annotations

import struct

import msgspec
import numpy as np
import pytest
import torch

from dynamo_kvtc.codec.artifact import Artifact
from dynamo_kvtc.codec.kvtc import KvtcProfile
from dynamo_kvtc.codec.kvtc_point import LANES
from dynamo_kvtc.codec.lanes import class_offsets, overhead_bits_per_token, pack_lanes, unpack_lanes
from dynamo_kvtc.errors import ConfigError, RecordCorruptError, RecordFormatError
from dynamo_kvtc.ops import rans
from dynamo_kvtc.types import KVShape
from tests.builders import LEADING, case_seed, make_artifact, random_kv


def made(lanes: int) -> tuple[KvtcProfile, Artifact]:
    shape = KVShape(3, 2, 16, "float32")
    artifact = make_artifact(shape, groups=((0, 1), (1, 3)), components=24, lanes=lanes, seed=case_seed())[2]
    return KvtcProfile(artifact, 0), artifact


@pytest.fixture(scope="module", params=LANES)
def coded(request) -> tuple[KvtcProfile, Artifact]:
    return made(request.param)


def symbols_of(coded: tuple[KvtcProfile, Artifact], tokens: int, group: int = 1) -> torch.Tensor:
    profile, artifact = coded
    k, v = random_kv(artifact, tokens, case_seed(), torch.zeros(tokens, dtype=torch.int64))
    start, end = artifact.manifest.groups[group]
    return profile.quantise(group, k[start:end], v[start:end])[0]


@pytest.mark.parametrize("sizes", [[1], [16], [5, 0, 11], [0], [], [0, 0, 3], [1] * 9])
def test_pack_and_unpack(coded, sizes):
    profile = coded[0]
    symbols = symbols_of(coded, max(sum(sizes), 1))[: sum(sizes)]
    payloads = profile.pack(1, symbols, sizes)
    assert [len(p) == 0 for p in payloads] == [n == 0 for n in sizes]
    assert all(len(p) % 2 == 0 for p in payloads)
    assert torch.equal(profile.unpack(1, payloads, sizes), symbols)
    for i, n in enumerate(sizes):
        start = sum(sizes[:i])
        assert profile.pack(1, symbols[start : start + n], [n]) == [payloads[i]]


@pytest.mark.parametrize("tokens", [1, 2, 3, 17])
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("excess", [0, 1, 255, 256, 60_000])
def test_lengths_come_back_in_the_fewest_bytes(tokens, lanes, excess):
    generator = np.random.default_rng(case_seed())
    count = tokens * lanes
    lengths = generator.integers(2, 3 + excess, count)
    lengths[0], lengths[-1] = 2, 2 + (excess if count > 1 else 0)
    parameters = (generator.integers(0, 13, tokens) + 16 * generator.integers(0, 16, tokens)).astype(np.uint8)
    words = generator.integers(0, 2**16, int(lengths.sum())).astype(np.uint16)
    payload = pack_lanes(lengths, parameters, words)
    spread = int(lengths.max() - lengths.min())
    width = 0 if spread == 0 else 1 if spread < 256 else 2
    assert payload[2:4] == bytes([width, 0])
    assert len(payload) == 4 + (width * count + tokens + 1) // 2 * 2 + 2 * len(words)
    for found, wanted in zip(unpack_lanes(payload, tokens, lanes), (lengths, parameters, words), strict=True):
        assert found.dtype == wanted.dtype
        assert np.array_equal(found, wanted)


def test_payload_bytes_are_as_the_format_says(coded):
    profile = coded[0]
    lanes = profile.point.lanes
    symbols = symbols_of(coded, 3)
    (payload,) = profile.pack(1, symbols, [3])
    parameters = symbols[:, 0].tolist()
    offsets = np.array([2 * (byte // 16 - 8) for byte in parameters], np.int8)
    words, lengths = rans.encode_lanes(
        np.ascontiguousarray(symbols[:, 1:].numpy()), profile.groups[1].classes, profile.point.tables, offsets, LEADING,
        lanes,
    )  # fmt: skip
    assert len(lengths) == 3 * lanes
    least, spread = int(lengths.min()), lengths - lengths.min()
    width = 1 if spread.max() else 0
    body = (bytes(spread.astype(np.uint8)) if width else b"") + bytes(parameters)
    head = struct.pack("<HBB", least, width, 0)
    assert payload == head + body + b"\0" * (len(body) % 2) + words.astype("<u2").tobytes()


@pytest.mark.parametrize("width", [0, 1, 2])
def test_lane_lengths_of_every_width(width):
    """Lanes of equal length, of lengths within 255, and of lengths further apart."""
    shape = KVShape(1, 1, 256, "float32")
    artifact = make_artifact(shape, components=400 if width == 2 else 64, seed=3)[2]
    profile = KvtcProfile(artifact, 0)
    generator = np.random.default_rng(case_seed())
    rank = len(profile.groups[0].classes)
    symbols = np.zeros((5, 1 + rank), np.int16)
    symbols[:, 0] = 4 + 16 * 8
    if width:
        symbols[1, 1:] = generator.integers(-32768, 32768, rank)
        symbols[3, 1:] = generator.integers(-32768, 32768, rank)
    (payload,) = profile.pack(0, torch.from_numpy(symbols), [5])
    _, found, reserved = struct.unpack_from("<HBB", payload)
    assert (found, reserved) == (width, 0)
    assert torch.equal(profile.unpack(0, [payload], [5]), torch.from_numpy(symbols))


def test_a_lane_holds_every_lanes_th_component():
    """Its words are those of a token that has these components alone, so lanes can be decoded side by side."""
    profile, artifact = made(4)
    symbols = symbols_of((profile, artifact), 5)
    classes, tables = profile.groups[1].classes, profile.point.tables
    rows, offsets = symbols[:, 1:].numpy(), class_offsets(symbols[:, 0].numpy().astype(np.uint8))
    words, lengths = rans.encode_lanes(np.ascontiguousarray(rows), classes, tables, offsets, LEADING, 4)
    ends = np.cumsum(lengths)
    for own in range(4):
        first = len(range(own, LEADING, 4))
        alone, sizes = rans.encode_lanes(np.ascontiguousarray(rows[:, own::4]), classes[own::4], tables, offsets, first)
        assert sizes.tolist() == lengths[own::4].tolist()
        parts = [words[end - size : end] for end, size in zip(ends[own::4], lengths[own::4], strict=True)]
        assert np.array_equal(np.concatenate(parts), alone)


@pytest.mark.parametrize("lane", [13, 14, 15, 16 * 15 + 13, 255])
def test_a_fineness_that_is_not_there_is_refused(coded, lane):
    profile = coded[0]
    symbols = symbols_of(coded, 4)
    (payload,) = profile.pack(1, symbols, [4])
    at = 4 + 4 * profile.point.lanes * payload[2]
    for token in range(4):
        forged = bytearray(payload)
        forged[at + token] = lane
        with pytest.raises(RecordFormatError, match="fineness is over 12"):
            profile.unpack(1, [bytes(forged)], [4])
    forged[at + 3] = 12 + 16 * (payload[at + 3] // 16)
    assert int(profile.unpack(1, [bytes(forged)], [4])[3, 0]) == forged[at + 3]


def test_payloads_that_lie(coded):
    profile = coded[0]
    symbols = symbols_of(coded, 4)
    (payload,) = profile.pack(1, symbols, [4])
    least, width, _ = struct.unpack_from("<HBB", payload)
    body = payload[4:]
    for forged, told in [
        (b"", "0 bytes cannot hold"),
        (payload[:3], "3 bytes cannot hold"),
        (payload[:-1], "do not fit"),
        (payload[:-2], "words"),
        (payload + b"\0\0", "words"),
        (struct.pack("<HBB", least + 1, width, 0) + body, "words"),
        (struct.pack("<HBB", 0xFFFF, width, 0) + body, "words"),
        (struct.pack("<HBB", 1, width, 0) + body, "words"),
        (struct.pack("<HBB", least, 3, 0) + body, "width 3"),
        (struct.pack("<HBB", least, 255, 0) + body, "width 255"),
        (struct.pack("<HBB", least, width, 1) + body, "do not fit"),
        (struct.pack("<HBB", 2, 2, 0) + b"\0\0", "do not fit"),
    ]:
        with pytest.raises(RecordFormatError, match=told):
            profile.unpack(1, [forged], [4])
    with pytest.raises(RecordFormatError, match="without coded tokens"):
        profile.unpack(1, [payload], [0])
    with pytest.raises((RecordFormatError, RecordCorruptError)):
        profile.unpack(1, [payload], [3])
    with pytest.raises(RecordCorruptError):
        profile.unpack(0, [payload], [4])


def test_a_lane_shorter_than_its_state_is_refused_whatever_the_others_have():
    """The total fits; one lane of a single word borrows from its neighbour."""
    lengths, parameters = np.array([1, 3, 2, 2]), np.full(2, 4, np.uint8)
    payload = pack_lanes(lengths, parameters, np.ones(8, np.uint16))
    with pytest.raises(RecordFormatError, match="words"):
        unpack_lanes(payload, 2, 2)


@pytest.mark.parametrize("other", LANES)
def test_another_number_of_lanes_reads_no_token_wrongly(coded, other):
    """A record names its artifact, which says how many there are; but a damaged one must not pass for sound either."""
    profile, artifact = coded
    if other == profile.point.lanes:
        return
    symbols = symbols_of(coded, 8)
    payloads = profile.pack(1, symbols, [8])
    points = tuple(msgspec.structs.replace(point, lanes=other) for point in artifact.manifest.points)
    stranger = KvtcProfile(Artifact(msgspec.structs.replace(artifact.manifest, points=points), artifact._tensors), 0)
    with pytest.raises((RecordFormatError, RecordCorruptError)):
        stranger.unpack(1, payloads, [8])


def test_random_damage_is_refused_or_reads_as_symbols(coded):
    profile = coded[0]
    generator = np.random.default_rng(case_seed())
    (payload,) = profile.pack(1, symbols_of(coded, 6), [6])
    refused = 0
    for _ in range(200):
        forged = bytearray(payload)
        for _ in range(int(generator.integers(1, 4))):
            forged[int(generator.integers(len(forged)))] ^= 1 << int(generator.integers(8))
        try:
            symbols = profile.unpack(1, [bytes(forged)], [6])
        except (RecordFormatError, RecordCorruptError):
            refused += 1
        else:
            assert symbols.shape == (6, 1 + len(profile.groups[1].classes))
            assert (symbols[:, 0] % 16 <= 12).all()
    assert refused > 50


def test_a_lane_too_long_for_a_record_is_refused():
    profile = KvtcProfile(make_artifact(KVShape(1, 1, 8, "float32"), components=4)[2], 0)
    classes = np.zeros(40_000, np.uint8)
    object.__setattr__(profile.groups[0], "classes", classes)
    generator = np.random.default_rng(case_seed())
    wild = torch.from_numpy(generator.integers(20_000, 32768, (1, 1 + len(classes))).astype(np.int16))
    wild[0, 0] = 4 + 16 * 8
    with pytest.raises(ConfigError, match="use more layer groups"):
        profile.pack(0, wild, [1])
    # Dealt out to two lanes, each has half of them.
    object.__setattr__(profile.point, "lanes", 2)
    payloads = profile.pack(0, wild, [1])
    assert torch.equal(profile.unpack(0, payloads, [1]), wild)


@pytest.mark.parametrize("lanes", LANES)
def test_overhead_is_what_records_spend_beside_the_entropy(lanes):
    profile, artifact = made(lanes)
    k, v = random_kv(artifact, 512, case_seed(), torch.zeros(512, dtype=torch.int64))
    spent = floor = 0.0
    for g, (start, end) in enumerate(artifact.manifest.groups):
        symbols, _ = profile.quantise(g, k[start:end], v[start:end])
        spent += 8 * sum(map(len, profile.pack(g, symbols, [16] * 32)))
        floor += profile.cross_entropy_bits(g, symbols)
    # The header of a record is in the estimate and not in the payloads.
    header = 8 * (36 + 2 * 8) / 16
    wanted = overhead_bits_per_token(2, 16, lanes) - header
    assert (spent - floor) / 512 == pytest.approx(wanted, rel=0.1)
