"""Headers written and read many at once: the same bytes and verdicts as a record at a time."""

from __future__ import annotations

import numpy as np
import pytest

from dynamo_kvtc.codec.headers import (
    BAD_HEADER,
    MISMATCH,
    SOUND,
    Identity,
    header_bytes_of,
    read_headers,
    write_headers,
)
from dynamo_kvtc.codec.record import RecordHeader, build_record, parse_record
from dynamo_kvtc.errors import ConfigError, RecordError
from dynamo_kvtc.ops.checksum import crc32
from tests.builders import case_seed

OURS = Identity(2, 1, 0x1234567890ABCDEF, 3, 2)


def case(generator, blocks=23):
    """counts, positions, exact, sections of random blocks: some with exact tokens, some with gaps, some with both."""
    counts = generator.integers(1, 40, blocks).astype(np.int32)
    positions, exact, sections = [], [], []
    for b, count in enumerate(counts):
        own = np.arange(count) + int(generator.integers(0, 10**6))
        if b % 3 == 1 and count > 1:
            own = own + np.cumsum(generator.integers(0, 3, count))
            own[-1] += 2
        positions.append(own)
        exact.append(generator.random(count) < (0.3 if b % 2 else 0.0))
        sections.append([generator.bytes(2 * int(generator.integers(0, 30))) for _ in range(OURS.groups)])
    return counts, positions, exact, sections


def records_of(counts, positions, exact, sections):
    return [
        build_record(RecordHeader(OURS.profile, OURS.point, OURS.artifact, OURS.rank, p, e), s)
        for _, p, e, s in zip(counts, positions, exact, sections, strict=True)
    ]


def in_arena(records, generator):
    sizes = np.array([len(r) for r in records], dtype=np.int64)
    gaps = generator.integers(0, 9, len(records))
    offsets = np.cumsum(sizes + gaps) - sizes
    arena = generator.integers(0, 256, int(offsets[-1] + sizes[-1]) + 5).astype(np.uint8)
    for offset, record in zip(offsets, records, strict=True):
        arena[offset : offset + len(record)] = np.frombuffer(record, np.uint8)
    return arena, offsets, sizes


def test_written_headers_are_the_records_own():
    generator = np.random.default_rng(case_seed())
    counts, positions, exact, sections = case(generator)
    records = records_of(counts, positions, exact, sections)
    arena, offsets, _ = in_arena(records, generator)
    found = arena.copy()
    for offset, record in zip(offsets, records, strict=True):
        header = parse_record(record).offsets[0]
        found[offset : offset + header] = 0xA5
    sizes = np.array([[len(x) for x in s] for s in sections], dtype=np.int64)
    crc = np.array([[crc32(x) for x in s] for s in sections], dtype=np.uint32)
    write_headers(found, offsets, OURS, counts, np.concatenate(positions), np.concatenate(exact), sizes, crc)
    assert np.array_equal(found, arena)


def test_read_headers_say_what_the_records_say():
    generator = np.random.default_rng(case_seed())
    counts, positions, exact, sections = case(generator)
    arena, offsets, sizes = in_arena(records_of(counts, positions, exact, sections), generator)
    batch = read_headers(arena, offsets, sizes, counts, OURS)
    assert (batch.status == SOUND).all()
    assert np.array_equal(batch.positions, np.concatenate(positions))
    assert np.array_equal(batch.exact, np.concatenate(exact))
    for b, own in enumerate(sections):
        for g, section in enumerate(own):
            start, size = batch.sections[b, g]
            assert arena[start : start + size].tobytes() == section
            assert batch.crc[b, g] == crc32(section)


def test_any_changed_byte_of_a_header_is_noticed():
    generator = np.random.default_rng(case_seed())
    parts = case(generator, 9)
    records = records_of(*parts)
    arena, offsets, sizes = in_arena(records, generator)
    for b, record in enumerate(records):
        for at in range(parse_record(record).offsets[0]):
            bad = arena.copy()
            bad[offsets[b] + at] ^= 1 << int(generator.integers(0, 8))
            status = read_headers(bad, offsets, sizes, parts[0], OURS).status
            assert status[b] == BAD_HEADER
            assert (np.delete(status, b) == SOUND).all()


def test_resigned_forgeries_get_the_verdict_that_one_record_gets():
    """Every header byte changed and the checksum made right again: refused here exactly where parse_record refuses."""
    generator = np.random.default_rng(case_seed())
    parts = case(generator, 6)
    for b, record in enumerate(records_of(*parts)):
        size = parse_record(record).offsets[0]
        for at in range(size):
            forged = bytearray(record)
            forged[at] ^= 1 << int(generator.integers(0, 8))
            forged[32:36] = b"\0\0\0\0"
            forged[32:36] = crc32(bytes(forged[:size])).to_bytes(4, "little")
            data = np.frombuffer(bytes(forged), np.uint8)
            batch = read_headers(data, np.zeros(1, np.int64), np.array([len(data)]), parts[0][b : b + 1], OURS)
            try:
                header = parse_record(bytes(forged)).header
            except RecordError:
                assert batch.status[0] == BAD_HEADER, at
                continue
            same = (header.profile, header.point, header.artifact, header.rank, header.tokens) == (
                OURS.profile, OURS.point, OURS.artifact, OURS.rank, parts[0][b],
            )  # fmt: skip
            assert batch.status[0] == (SOUND if same else MISMATCH), at
            if same:
                assert np.array_equal(batch.positions, header.positions)
                assert np.array_equal(batch.exact, header.exact)


def test_records_that_are_not_in_the_arena_are_bad():
    generator = np.random.default_rng(case_seed())
    parts = case(generator, 4)
    arena, offsets, sizes = in_arena(records_of(*parts), generator)
    for b, (offset, size) in enumerate([(-1, sizes[0]), (len(arena), sizes[1]), (offsets[2], 10**12), (2**62, 2**62)]):
        moved, cut = offsets.copy(), sizes.copy()
        moved[b], cut[b] = offset, size
        status = read_headers(arena, moved, cut, parts[0], OURS).status
        assert status.tolist() == [BAD_HEADER if i == b else SOUND for i in range(4)]
    assert (read_headers(arena[:3], offsets, sizes, parts[0], OURS).status == BAD_HEADER).all()
    none = np.zeros(0, np.int64)
    assert len(read_headers(arena, none, none, np.zeros(0, np.int32), OURS).status) == 0


def test_a_sound_record_of_another_codec_is_a_mismatch():
    """With exact tokens and gaps and without; of fewer and more layer groups."""
    generator = np.random.default_rng(case_seed())
    parts = case(generator, 12)
    counts, positions, exact, sections = parts
    records = records_of(*parts)
    for b, (p, e, s) in enumerate(zip(positions, exact, sections, strict=True)):
        own = [OURS.profile, OURS.point, OURS.artifact, OURS.rank]
        if b % 6 < 4:
            own[b % 6] = 1 if b % 6 == 0 else int(generator.integers(10, 99))
        else:
            s = s[:1] if b % 6 == 4 else [*s, b"", b"more"]
        records[b] = build_record(RecordHeader(*own, p, e), s)
        parse_record(records[b])
    arena, offsets, sizes = in_arena(records, generator)
    batch = read_headers(arena, offsets, sizes, counts, OURS)
    assert (batch.status == MISMATCH).all()
    for found in (batch.exact, batch.positions, batch.sections, batch.crc):
        assert not found.any()


def test_another_number_of_tokens_than_expected_is_a_mismatch():
    generator = np.random.default_rng(case_seed())
    parts = case(generator, 3)
    arena, offsets, sizes = in_arena(records_of(*parts), generator)
    counts = parts[0].copy()
    counts[1] += 1
    assert read_headers(arena, offsets, sizes, counts, OURS).status.tolist() == [SOUND, MISMATCH, SOUND]


def test_what_a_record_cannot_hold_is_refused():
    sizes, crc = np.zeros((1, 2), np.int64), np.zeros((1, 2), np.uint32)
    arena, at = np.zeros(99, np.uint8), np.zeros(1, np.int64)
    for count, position, size in ((1, 2**31, 0), (1, -1, 0), (1, 0, 2**32)):
        with pytest.raises(ConfigError, match="record"):
            write_headers(
                arena, at, OURS, np.array([count], np.int32), np.array([position]), np.zeros(1, bool), sizes + size, crc
            )
    assert header_bytes_of(np.array([16], np.int32), np.array([0]), np.array([False]), 2)[0] == 52
