"""Record bytes: the offset table of FORMAT.md, every refusal forged once."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest

from dynamo_kvtc.codec.record import (
    MAX_BLOCK_TOKENS,
    MAX_GROUPS,
    RecordHeader,
    build_record,
    claimed_position,
    claimed_positions,
    parse_record,
)
from dynamo_kvtc.errors import (
    ConfigError,
    RecordCorruptError,
    RecordFormatError,
    RecordTruncatedError,
    RecordVersionError,
)
from tests.builders import case_seed

# FORMAT.md's table, written down a second time.
OFFSETS = {"magic": (0, "<4s"), "version": (4, "<B"), "profile": (5, "<B"), "point": (6, "<B"), "flags": (7, "<B"),
           "artifact": (8, "<Q"), "total": (16, "<I"), "first": (20, "<I"), "tokens": (24, "<H"),
           "exact_tokens": (26, "<H"), "rank": (28, "<B"), "groups": (29, "<B"), "header_bytes": (30, "<H"),
           "checksum": (32, "<I")}  # fmt: skip


def header(positions, exact=None, **fields) -> RecordHeader:
    positions = np.asarray(positions, dtype=np.int64)
    exact = np.zeros(len(positions), bool) if exact is None else np.asarray(exact, bool)
    values = {"profile": 2, "point": 3, "artifact": 0x1122334455667788, "rank": 1, **fields}
    return RecordHeader(positions=positions, exact=exact, **values)


def read(record: bytes, field: str) -> int:
    offset, layout = OFFSETS[field]
    return struct.unpack_from(layout, record, offset)[0]


def forge(record: bytes, field: str, value) -> bytes:
    """The record with one header field changed and the header's checksum made to fit again."""
    out = bytearray(record)
    offset, layout = OFFSETS[field]
    struct.pack_into(layout, out, offset, value)
    return sign(out, read(record, "header_bytes"))


def sign(record: bytearray, header_bytes: int) -> bytes:
    offset, layout = OFFSETS["checksum"]
    struct.pack_into(layout, record, offset, 0)
    struct.pack_into(layout, record, offset, zlib.crc32(record[:header_bytes]))
    return bytes(record)


CONTIGUOUS = build_record(header(range(7, 24)), [b"group-zero", b"group one, longer"])
GAPPED = build_record(header([1, 3, 9], [True, False, True]), [b"abcd"])


def test_bytes_are_where_the_format_says():
    record = build_record(header([5, 6, 9], [False, True, False], rank=2), [b"abc", b""])
    assert record[:4] == b"KVTC"
    fields = {field: read(record, field) for field in OFFSETS if field not in ("magic", "checksum")}
    assert fields == {
        "version": 2, "profile": 2, "point": 3, "flags": 1, "artifact": 0x1122334455667788, "total": len(record),
        "first": 5, "tokens": 3, "exact_tokens": 1, "rank": 2, "groups": 2, "header_bytes": 66,
    }  # fmt: skip
    # 36 bytes of fields, two table entries, the bitmap, three positions, one byte of padding, the sections.
    assert struct.unpack_from("<IIII", record, 36) == (3, zlib.crc32(b"abc"), 0, 0)
    assert record[52] == 0b010
    assert struct.unpack_from("<III", record, 53) == (5, 6, 9)
    assert record[65:] == b"\0abc"
    zeroed = record[:32] + b"\0\0\0\0" + record[36:66]
    assert read(record, "checksum") == zlib.crc32(zeroed)


def test_contiguous_positions_and_no_exact_tokens_cost_nothing():
    record = build_record(header(range(100, 116)), [b"xy"])
    assert len(record) == 36 + 8 + 2
    assert read(record, "flags") == 0


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 17, MAX_BLOCK_TOKENS])
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("sections", [1, 3, MAX_GROUPS])
def test_round_trip(tokens, gaps, sections):
    generator = np.random.default_rng(case_seed())
    positions = int(generator.integers(0, 2**30)) + np.arange(tokens)
    if gaps:
        positions = generator.integers(0, 2**31, tokens)
    exact = generator.random(tokens) < generator.choice([0.0, 0.3, 1.0])
    payloads = [generator.bytes(int(generator.integers(0, 40))) for _ in range(sections)]
    made = header(positions, exact, point=int(generator.integers(0, 256)), artifact=int(generator.integers(0, 2**63)))
    parsed = parse_record(build_record(made, payloads))
    np.testing.assert_array_equal(parsed.header.positions, positions)
    np.testing.assert_array_equal(parsed.header.exact, exact)
    assert (parsed.header.point, parsed.header.artifact, parsed.header.rank) == (made.point, made.artifact, made.rank)
    assert parsed.header.coded_tokens == tokens - exact.sum()
    assert [bytes(parsed.section(g)) for g in range(parsed.groups)] == payloads


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda b: memoryview(np.frombuffer(b, np.uint8))])
def test_any_buffer_is_read_without_a_copy(kind):
    parsed = parse_record(kind(CONTIGUOUS))
    assert bytes(parsed.section(1)) == b"group one, longer"


@pytest.mark.parametrize("record", [CONTIGUOUS, GAPPED])
def test_every_length_but_its_own_is_refused(record):
    for end in range(len(record)):
        with pytest.raises(RecordTruncatedError):
            parse_record(record[:end])
    with pytest.raises(RecordTruncatedError, match=f"{len(record)} bytes; got {len(record) + 1}"):
        parse_record(record + b"\0")


@pytest.mark.parametrize("record", [CONTIGUOUS, GAPPED])
def test_every_flipped_bit_is_refused(record):
    for bit in range(8 * len(record)):
        damaged = bytearray(record)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises((RecordTruncatedError, RecordVersionError, RecordCorruptError, RecordFormatError)):
            read_all(bytes(damaged))


def read_all(record: bytes) -> None:
    parsed = parse_record(record)
    for group in range(parsed.groups):
        parsed.section(group)


@pytest.mark.parametrize(
    ("field", "value", "error", "told"),
    [
        ("magic", b"KVTX", RecordFormatError, "KVTX"),
        ("version", 1, RecordVersionError, "version 1; this release reads 2"),
        ("version", 3, RecordVersionError, "version 3"),
        ("version", 0, RecordVersionError, "version 0"),
        ("profile", 0, RecordFormatError, "profile 0"),
        ("profile", 77, RecordFormatError, "profile 77"),
        ("flags", 2, RecordFormatError, "flags 0x2"),
        ("flags", 0x81, RecordFormatError, "flags 0x81"),
        ("flags", 1, RecordFormatError, "the header says"),
        ("total", 2**32 - 1, RecordTruncatedError, str(2**32 - 1)),
        ("total", 0, RecordTruncatedError, "0 bytes"),
        ("first", 2**31 - 3, RecordFormatError, "out of range"),
        ("first", 2**32 - 1, RecordFormatError, "out of range"),
        ("tokens", 0, RecordFormatError, "0 tokens"),
        ("tokens", MAX_BLOCK_TOKENS + 1, RecordFormatError, "1025 tokens"),
        ("tokens", 65535, RecordFormatError, "65535 tokens"),
        ("exact_tokens", 18, RecordFormatError, "18 of them"),
        ("exact_tokens", 1, RecordFormatError, "the header says"),
        ("groups", 0, RecordFormatError, "0 layer groups"),
        ("groups", 65, RecordFormatError, "65 layer groups"),
        ("groups", 1, RecordFormatError, "the header says"),
        ("header_bytes", 0, RecordFormatError, "0 bytes; its fields make 52"),
        ("header_bytes", 65535, RecordFormatError, "65535"),
        ("checksum", 12345, RecordCorruptError, "checksum"),
    ],
)
def test_forged_fields(field, value, error, told):
    record = bytearray(CONTIGUOUS)
    offset, layout = OFFSETS[field]
    struct.pack_into(layout, record, offset, value)
    forged = bytes(record) if field == "checksum" else sign(record, read(CONTIGUOUS, "header_bytes"))
    with pytest.raises(error, match=told):
        parse_record(forged)


def test_forged_fields_of_a_record_with_gaps():
    first = forge(GAPPED, "first", 2)
    with pytest.raises(RecordFormatError, match="inconsistent"):
        parse_record(first)
    count = forge(GAPPED, "exact_tokens", 1)
    with pytest.raises(RecordFormatError, match="marks 2 exact tokens; the header says 1"):
        parse_record(count)
    size = read(GAPPED, "header_bytes")
    for offset, value, told in [
        (44, 0b1101, "beyond the block's 3"),
        (45 + 7, 0x80, "out of range"),
        (size - 1, 1, "padding byte is 0x1"),
    ]:
        record = bytearray(GAPPED)
        record[offset] = value
        with pytest.raises(RecordFormatError, match=told):
            parse_record(sign(record, size))
    listed = bytearray(GAPPED)
    struct.pack_into("<III", listed, 45, 1, 2, 3)
    with pytest.raises(RecordFormatError, match="no gaps"):
        parse_record(sign(listed, size))


def test_forged_section_sizes_allocate_nothing():
    for sizes in ((2**32 - 1, 2**32 - 1), (0, 0), (10, 18), (11, 17)):
        record = bytearray(CONTIGUOUS)
        for i, size in enumerate(sizes):
            struct.pack_into("<I", record, 36 + 8 * i, size)
        forged = sign(record, read(CONTIGUOUS, "header_bytes"))
        if sum(sizes) == 27:
            with pytest.raises(RecordCorruptError, match="layer group 0"):
                read_all(forged)
        else:
            with pytest.raises(RecordFormatError, match="the record has"):
                parse_record(forged)


def test_header_that_needs_more_than_there_is():
    # 36 bytes that claim 64 groups: the table alone would need 512 more.
    record = bytearray(CONTIGUOUS[:36])
    for field, value in [("total", 36), ("groups", 64), ("header_bytes", 36 + 64 * 8)]:
        offset, layout = OFFSETS[field]
        struct.pack_into(layout, record, offset, value)
    with pytest.raises(RecordTruncatedError, match="needs 548 bytes"):
        parse_record(bytes(record))


def test_damaged_section_is_found_when_it_is_read_and_no_sooner():
    damaged = bytearray(CONTIGUOUS)
    damaged[-1] ^= 1
    parsed = parse_record(bytes(damaged))
    assert bytes(parsed.section(0)) == b"group-zero"
    with pytest.raises(RecordCorruptError, match="layer group 1"):
        parsed.section(1)
    for group in (2, -1):
        with pytest.raises(RecordFormatError, match=f"layer group {group} asked of a record that has 2"):
            parsed.section(group)


@pytest.mark.parametrize(
    ("positions", "sections", "told"),
    [
        ([], [b""], "0 tokens"),
        (range(MAX_BLOCK_TOKENS + 1), [b""], "1025 tokens"),
        ([0], [], "0 layer groups"),
        ([0], [b""] * (MAX_GROUPS + 1), "65 layer groups"),
        ([-1, 0], [b""], "-1..0"),
        ([2**31 - 1, 2**31], [b""], "2147483648"),
    ],
)
def test_refuses_to_build(positions, sections, told):
    with pytest.raises(ConfigError, match=told):
        build_record(header(positions), sections)


def test_claimed_positions_are_those_of_each_record():
    generator = np.random.default_rng(case_seed())
    arena = generator.integers(0, 256, 4096, dtype=np.uint8)
    sizes = generator.integers(1, 60, 40)
    offsets = generator.integers(0, len(arena) - 60, 40)
    one_by_one = [claimed_position(arena[a : a + n].tobytes()) for a, n in zip(offsets, sizes, strict=True)]
    assert claimed_positions(arena, offsets, sizes).tolist() == one_by_one
    assert -1 in one_by_one
    assert claimed_positions(arena[:5], np.zeros(1, np.int64), np.full(1, 5)).tolist() == [-1]
