"""Many record headers at once, with numpy: what the GPU path needs on the host, where a record at a time is too slow.

Same bytes and same checks as ``codec.record``; a record that fails one gets a status instead of an error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
)
from dynamo_kvtc.errors import ConfigError
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
    raw[short, CRC_OFFSET:FIXED_BYTES] = _checksums(raw[short])
    arena[offsets[short, None] + np.arange(least)] = raw[short]
    for b in np.flatnonzero(~short):
        own = slice(first[b], first[b] + counts[b])
        tail = np.packbits(exact[own], bitorder="little").tobytes() if exact_counts[b] else b""
        if gaps[b]:
            tail += positions[own].astype("<u4").tobytes()
        whole = np.frombuffer(raw[b].tobytes() + tail + b"\0" * (len(tail) % 2), np.uint8).copy()
        whole[CRC_OFFSET:FIXED_BYTES] = _checksums(whole[None])[0]
        arena[offsets[b] : offsets[b] + len(whole)] = whole


def _checksums(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [n, 4] of rows uint8 [n, bytes], whose checksum's place holds zeros."""
    data, size = rows.tobytes(), rows.shape[1]
    found = [crc32(data[i : i + size]) for i in range(0, len(data), size)]
    return np.array(found, dtype="<u4").view(np.uint8).reshape(-1, 4)


def read_headers(
    arena: NDArray[np.uint8], offsets: NDArray[np.int64], sizes: NDArray[np.int64], counts: NDArray[np.int32],
    identity: Identity,
) -> HeaderBatch:  # fmt: skip
    """Headers of B records that are expected to have ``counts`` tokens each. Nothing outside a record is read."""
    groups, blocks = identity.groups, len(counts)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64) if blocks else np.zeros(0, np.int64)
    tokens = int(counts.sum())
    status = np.full(blocks, BAD_HEADER, dtype=np.int32)
    batch = HeaderBatch(
        status, np.zeros(tokens, np.bool_), np.zeros(tokens, np.int64), np.zeros((blocks, groups, 2), np.int64),
        np.zeros((blocks, groups), np.uint32),
    )  # fmt: skip
    least = FIXED_BYTES + groups * SECTION_BYTES
    there = (offsets >= 0) & (sizes >= least) & (offsets <= len(arena) - sizes)
    safe = np.where(there, offsets, 0)
    if not blocks or len(arena) < least:
        return batch
    raw = arena[safe[:, None] + np.arange(least)]
    h = np.ascontiguousarray(raw[:, :FIXED_BYTES]).view(_HEADER)[:, 0]
    table = np.ascontiguousarray(raw[:, FIXED_BYTES:]).view("<u4").reshape(blocks, groups, 2).astype(np.int64)
    plain = there & (h["magic"] == MAGIC) & (h["version"] == VERSION) & (h["flags"] & ~np.uint8(FLAG_GAPS) == 0)
    plain &= np.isin(h["profile"], list(PROFILE_NAMES))
    plain &= (h["total"] == sizes) & (h["tokens"] == counts) & (h["exact"] <= h["tokens"])
    gaps = (h["flags"] & FLAG_GAPS) != 0
    header = header_bytes_of(h["tokens"].astype(np.int32), h["exact"].astype(np.int64), gaps, groups)
    plain &= (h["groups"] == groups) & (h["header"] == header) & (header + table[:, :, 0].sum(axis=1) == sizes)
    ours = np.ones(blocks, dtype=np.bool_)
    for name in ("profile", "point", "artifact", "rank"):
        ours &= h[name] == getattr(identity, name)
    short = np.flatnonzero(plain & (header == least))
    rows = raw[short]
    rows[:, CRC_OFFSET:FIXED_BYTES] = 0
    good = short[(_checksums(rows) == raw[short, CRC_OFFSET:FIXED_BYTES]).all(axis=1)]
    last = h["first"][good].astype(np.int64) + counts[good] - 1
    status[good] = np.where(ours[good], np.where(last < 2**31, SOUND, BAD_HEADER), MISMATCH)
    token = np.arange(tokens) - np.repeat(first, counts)
    wanted = np.repeat((status == SOUND), counts)
    batch.positions[:] = np.where(wanted, np.repeat(h["first"].astype(np.int64), counts) + token, 0)
    for b in np.flatnonzero(plain & (header != least)):
        whole = arena[safe[b] : safe[b] + header[b]].copy()
        whole[CRC_OFFSET:FIXED_BYTES] = 0
        if int(_checksums(whole[None]).view("<u4")[0, 0]) != int(h["crc"][b]):
            continue
        if not ours[b]:
            status[b] = MISMATCH
            continue
        own = slice(first[b], first[b] + counts[b])
        if _read_tail(whole, least, h[b], bool(gaps[b]), batch.exact[own], batch.positions[own]):
            status[b] = SOUND
        else:
            batch.exact[own], batch.positions[own] = False, 0
    batch.sections[:, :, 1] = table[:, :, 0]
    batch.sections[:, :, 0] = (safe + header)[:, None] + np.cumsum(table[:, :, 0], axis=1) - table[:, :, 0]
    batch.crc[:] = table[:, :, 1]
    batch.sections[status != SOUND], batch.crc[status != SOUND] = 0, 0
    return batch


def _read_tail(
    header: NDArray[np.uint8], tail: int, fields: np.void, gaps: bool, exact: NDArray[np.bool_],
    positions: NDArray[np.int64],
) -> bool:  # fmt: skip
    """Bitmap and positions of one record into ``exact`` and ``positions``; False if they cannot be."""
    count, start = len(exact), int(fields["first"])
    if fields["exact"]:
        bits = header[tail : tail + (count + 7) // 8]
        tail += len(bits)
        mask = np.unpackbits(bits, bitorder="little").astype(np.bool_)
        if int(mask.sum()) != int(fields["exact"]) or mask[count:].any():
            return False
        exact[:] = mask[:count]
    positions[:] = np.arange(start, start + count)
    if gaps:
        positions[:] = np.frombuffer(header.tobytes(), "<u4", count, tail)
        tail += 4 * count
        if not (np.diff(positions) != 1).any() or int(positions[0]) != start:
            return False
    return int(positions.max()) < 2**31 and (tail == len(header) or header[-1] == 0)
