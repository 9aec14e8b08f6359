"""Many record headers at once, with numpy: what the GPU path needs on the host, where a record at a time is too slow.

Same bytes and same checks as ``codec.record``; a record that fails one gets a status instead of an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from dynamo_kvtc.codec import header_scan
from dynamo_kvtc.codec.profile import PROFILE_NAMES
from dynamo_kvtc.codec.record import (
    CRC_OFFSET,
    FIXED_BYTES,
    FLAG_GAPS,
    MAGIC,
    MAX_BLOCK_TOKENS,
    MAX_RECORD_BYTES,
    SECTION_BYTES,
    VERSION,
    header_bytes,
    parse_record,
)
from dynamo_kvtc.errors import ConfigError, RecordError
from dynamo_kvtc.ops.checksum import crc32

SOUND, BAD_HEADER, MISMATCH = 0, 4, 5
"""Statuses of a record; those between are ``ops.lanes``'."""

_HEADER = np.dtype(
    [
        ("magic", "S4"), ("version", "u1"), ("profile", "u1"), ("point", "u1"), ("flags", "u1"), ("artifact", "<u8"),
        ("total", "<u4"), ("first", "<u4"), ("tokens", "<u2"), ("exact", "<u2"), ("rank", "u1"), ("groups", "u1"),
        ("header", "<u2"), ("crc", "<u4"),
    ]
)  # fmt: skip
assert _HEADER.itemsize == FIXED_BYTES
_VARYING = ("total", "first", "tokens", "crc")
_VARYING_AT = tuple(_HEADER.fields[name][1] for name in _VARYING)  # type: ignore[index]


@dataclass(frozen=True)
class Identity:
    """What a record must say to belong to a codec: see ``RecordHeader``."""

    profile: int
    point: int
    artifact: int
    rank: int
    groups: int


@dataclass(frozen=True)
class HeaderBatch:
    """B records' headers, T tokens in all.

    status: int32 [B]; exact: bool [T], positions: int64 [T], those of a record with a status are False and 0;
    sections: int64 [B, G, 2], first byte in the arena and bytes; crc: uint32 [B, G].
    """

    status: NDArray[np.int32]
    exact: NDArray[np.bool_]
    positions: NDArray[np.int64]
    sections: NDArray[np.int64]
    crc: NDArray[np.uint32]


def header_bytes_of(
    counts: NDArray[np.int32], exact: NDArray[np.int64], gaps: NDArray[np.bool_], groups: int
) -> NDArray[np.int64]:
    """Bytes before the sections of records of these many tokens, exact ones among them, with and without gaps."""
    tail = np.where(exact > 0, (counts + 7) // 8, 0) + np.where(gaps, 4 * counts.astype(np.int64), 0)
    return FIXED_BYTES + groups * SECTION_BYTES + tail + tail % 2


def gaps_of(positions: NDArray[np.int64], counts: NDArray[np.int32]) -> NDArray[np.bool_]:
    """bool [B]: whether a block's positions are not consecutive."""
    jump = np.ones(len(positions), dtype=np.int64)
    jump[1:] = (np.diff(positions) != 1).astype(np.int64)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    jump[first] = 0
    return np.add.reduceat(jump, first) > 0


def write_headers(
    arena: NDArray[np.uint8], offsets: NDArray[np.int64], identity: Identity, counts: NDArray[np.int32],
    positions: NDArray[np.int64], exact: NDArray[np.bool_], sizes: NDArray[np.int64], crc: NDArray[np.uint32],
) -> None:  # fmt: skip
    """Headers of B records into the arena at ``offsets``. sizes: int64, crc: uint32 [B, G], of the sections.

    Raises ConfigError if a field is out of the format's range.
    """
    groups, blocks = identity.groups, len(counts)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    if counts.min() < 1 or counts.max() > MAX_BLOCK_TOKENS or positions.min() < 0 or positions.max() >= 2**31:
        raise ConfigError(
            f"blocks of {counts.min()} to {counts.max()} tokens at positions {positions.min()} to {positions.max()}; a "
            f"record holds 1 to {MAX_BLOCK_TOKENS} tokens at 0 to 2**31 - 1"
        )
    exact_counts = np.add.reduceat(exact.astype(np.int64), first)
    gaps = gaps_of(positions, counts)
    header = header_bytes_of(counts, exact_counts, gaps, groups)
    total = header + sizes.sum(axis=1)
    if total.max() > MAX_RECORD_BYTES:
        raise ConfigError(f"a record would have {total.max()} bytes; it holds at most {MAX_RECORD_BYTES}")
    rows = np.zeros(blocks, dtype=_HEADER)
    rows["magic"], rows["version"] = MAGIC, VERSION
    for name in ("profile", "point", "artifact", "rank", "groups"):
        rows[name] = getattr(identity, name)
    rows["flags"] = np.where(gaps, FLAG_GAPS, 0)
    rows["total"], rows["first"], rows["tokens"] = total, positions[first], counts
    rows["exact"], rows["header"] = exact_counts, header
    table = np.zeros((blocks, groups, 2), dtype="<u4")
    table[:, :, 0], table[:, :, 1] = sizes, crc
    raw = np.concatenate([rows.view(np.uint8).reshape(blocks, -1), table.reshape(blocks, -1).view(np.uint8)], axis=1)
    least = raw.shape[1]
    short = header == least
    # Nearly all records: no exact tokens, no gaps.
    usual = raw[short]
    header_scan.seal(usual, CRC_OFFSET, _crc_table())
    _windows(arena, least)[offsets[short]] = usual
    for b in np.flatnonzero(~short):
        own = slice(first[b], first[b] + counts[b])
        tail = np.packbits(exact[own], bitorder="little").tobytes() if exact_counts[b] else b""
        if gaps[b]:
            tail += positions[own].astype("<u4").tobytes()
        whole = np.frombuffer(raw[b].tobytes() + tail + b"\0" * (len(tail) % 2), np.uint8).copy()
        header_scan.seal(whole[None], CRC_OFFSET, _crc_table())
        arena[offsets[b] : offsets[b] + len(whole)] = whole


def _windows(arena: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """View [n, size] of the ``size`` bytes from each byte of the arena on."""
    return as_strided(arena, (max(len(arena) - size + 1, 0), size), (1, 1))


def read_headers(
    arena: NDArray[np.uint8], offsets: NDArray[np.int64], sizes: NDArray[np.int64], counts: NDArray[np.int32],
    identity: Identity,
) -> HeaderBatch:  # fmt: skip
    """Headers of B records that are expected to have ``counts`` tokens each. Nothing outside a record is read.

    BAD_HEADER where ``parse_record`` refuses the record or it is not in the arena; MISMATCH where it is sound but
    another codec's, or has other tokens or layer groups than expected.
    """
    groups, blocks = identity.groups, len(counts)
    first = np.cumsum(counts, dtype=np.int64) - counts
    tokens = int(counts.sum())
    batch = HeaderBatch(
        np.full(blocks, BAD_HEADER, np.int32), np.zeros(tokens, np.bool_), np.zeros(tokens, np.int64),
        np.zeros((blocks, groups, 2), np.int64), np.zeros((blocks, groups), np.uint32),
    )  # fmt: skip
    if blocks and identity.profile in PROFILE_NAMES and counts.min() >= 1 and counts.max() <= MAX_BLOCK_TOKENS:
        # Nearly all records: sound, as expected, no exact tokens, no gaps.
        template, fixed = _template(identity)
        header_scan.scan(
            arena, offsets, sizes, counts, header_bytes(groups), FIXED_BYTES, *_VARYING_AT, template, fixed,
            _crc_table(), batch.status, batch.positions, batch.sections, batch.crc,
        )  # fmt: skip
    there = (offsets >= 0) & (sizes >= 0) & (offsets <= len(arena) - sizes)
    for b in np.flatnonzero(there & (batch.status != SOUND)):
        try:
            record = parse_record(arena.data[offsets[b] : offsets[b] + sizes[b]])
        except RecordError:
            continue
        h = record.header
        if Identity(h.profile, h.point, h.artifact, h.rank, record.groups) != identity or h.tokens != counts[b]:
            batch.status[b] = MISMATCH
            continue
        own = slice(first[b], first[b] + counts[b])
        batch.status[b], batch.exact[own], batch.positions[own] = SOUND, h.exact, h.positions
        batch.sections[b, :, 0], batch.sections[b, :, 1] = record.offsets, record.sizes
        batch.sections[b, :, 0] += offsets[b]
        batch.crc[b] = record.checksums
    return batch


def prove_sections(
    arena: NDArray[np.uint8], batch: HeaderBatch, good: NDArray[np.bool_], start: int, step: int
) -> None:
    """Of records start, start + step, ... those that are good stay so only if their sections' checksums are right.

    Lets go of the interpreter, so several threads may have a share each; one does 1 to 3 GB/s.
    """
    header_scan.prove(arena, batch.sections, batch.crc, _crc_tables(), good, start, step)


@lru_cache(maxsize=64)
def _template(identity: Identity) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A header's first bytes, and which of them are the same in all usual records."""
    row, fixed = np.zeros(1, dtype=_HEADER), np.zeros(1, dtype=_HEADER)
    row["magic"], row["version"], row["header"] = MAGIC, VERSION, header_bytes(identity.groups)
    for name in ("profile", "point", "artifact", "rank", "groups"):
        row[name] = getattr(identity, name)
    mask = fixed.view(np.uint8)
    mask[:] = 1
    for name in _VARYING:
        fixed[name] = 0
    return row.view(np.uint8), mask.astype(np.bool_)


@lru_cache(maxsize=1)
def _crc_table() -> NDArray[np.uint32]:
    """CRC-32's table: what a byte makes of a register of zeros."""
    return np.array([crc32(bytes([0xFF ^ value])) ^ 0xFF000000 for value in range(256)], dtype=np.uint32)


@lru_cache(maxsize=1)
def _crc_tables() -> NDArray[np.uint32]:
    """``_crc_table`` with 0 to 7 bytes of zeros behind the byte, uint32 [8, 256]."""
    tables = [_crc_table()]
    for _ in range(7):
        tables.append((tables[-1] >> 8) ^ tables[0][tables[-1] & 0xFF])
    return np.stack(tables)
