"""A record: one coded block's bytes (FORMAT.md). This module knows the layout, not what is in the payloads."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from dynamo_kvtc.codec.profile import PROFILE_NAMES
from dynamo_kvtc.errors import (
    ConfigError,
    RecordCorruptError,
    RecordFormatError,
    RecordTruncatedError,
    RecordVersionError,
)
from dynamo_kvtc.ops.checksum import crc32

MAGIC = b"KVTC"
VERSION = 2
MAX_BLOCK_TOKENS = 1024
MAX_GROUPS = 64
MAX_RANKS = 256
MAX_RECORD_BYTES = 2**32 - 1
FLAG_GAPS = 1

_FIXED = struct.Struct("<4sBBBBQIIHHBBHI")
_FIRST = struct.Struct("<20xI")
_SECTION = struct.Struct("<II")
FIXED_BYTES = _FIXED.size
SECTION_BYTES = _SECTION.size
CRC_OFFSET = FIXED_BYTES - 4


def header_bytes(groups: int) -> int:
    """Bytes before the sections of a record whose tokens are all coded and whose positions have no gaps."""
    return FIXED_BYTES + groups * SECTION_BYTES


@dataclass(frozen=True)
class RecordHeader:
    """What a record says of itself.

    artifact: first 8 bytes of the artifact's digest, as a little-endian integer; point: index of its operating point.
    positions: int64 [T]; exact: bool [T], True where the token is stored bit-exact.
    """

    profile: int
    point: int
    artifact: int
    rank: int
    positions: NDArray[np.int64]
    exact: NDArray[np.bool_]

    @property
    def tokens(self) -> int:
        return len(self.positions)

    @property
    def coded_tokens(self) -> int:
        return self.tokens - int(self.exact.sum())


@dataclass(frozen=True)
class Record:
    """A parsed record: its header and, per layer group, where its section lies and what its checksum must be."""

    header: RecordHeader
    data: memoryview
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    checksums: tuple[int, ...]

    @property
    def groups(self) -> int:
        return len(self.sizes)

    def section(self, group: int) -> memoryview:
        """The bytes of one layer group, checksum verified. Raises RecordCorruptError, RecordFormatError."""
        if not 0 <= group < self.groups:
            raise RecordFormatError(f"layer group {group} asked of a record that has {self.groups}")
        start = self.offsets[group]
        section = self.data[start : start + self.sizes[group]]
        found = crc32(section)
        if found != self.checksums[group]:
            raise RecordCorruptError(
                f"layer group {group}: checksum {found:#010x}, the record says {self.checksums[group]:#010x}"
            )
        return section


def build_record(header: RecordHeader, sections: list[bytes]) -> bytes:
    """The record's bytes: header, section table, exact bitmap, positions if they have gaps, sections.

    Raises ConfigError if a field is out of the format's range.
    """
    tokens, positions = header.tokens, header.positions
    if not 1 <= tokens <= MAX_BLOCK_TOKENS:
        raise ConfigError(f"a block has {tokens} tokens; a record holds 1 to {MAX_BLOCK_TOKENS}")
    if not 1 <= len(sections) <= MAX_GROUPS:
        raise ConfigError(f"{len(sections)} layer groups; a record holds 1 to {MAX_GROUPS}")
    if int(positions.min()) < 0 or int(positions.max()) >= 2**31:
        raise ConfigError(f"positions {int(positions.min())}..{int(positions.max())} are not in 0..2**31 - 1")
    gaps = bool((np.diff(positions) != 1).any())
    tail = np.packbits(header.exact, bitorder="little").tobytes() if header.exact.any() else b""
    if gaps:
        tail += positions.astype("<u4").tobytes()
    tail += b"\0" * (len(tail) % 2)
    table = b"".join(_SECTION.pack(len(s), crc32(s)) for s in sections)
    header_size = FIXED_BYTES + len(table) + len(tail)
    total = header_size + sum(map(len, sections))
    if total > MAX_RECORD_BYTES:
        raise ConfigError(f"the record would have {total} bytes; a record holds at most {MAX_RECORD_BYTES}")
    fields = (
        MAGIC, VERSION, header.profile, header.point, FLAG_GAPS if gaps else 0, header.artifact, total,
        int(positions[0]), tokens, int(header.exact.sum()), header.rank, len(sections), header_size,
    )  # fmt: skip
    unsigned = _FIXED.pack(*fields, 0) + table + tail
    return b"".join([_FIXED.pack(*fields, crc32(unsigned)), table, tail, *sections])


def claimed_position(data: bytes | memoryview) -> int:
    """The position of a record's first token as its header claims it, nothing checked; -1, where no block starts, for
    what is too short to say."""
    return int(_FIRST.unpack_from(data)[0]) if len(data) >= _FIRST.size else -1


def claimed_positions(
    arena: NDArray[np.uint8], offsets: NDArray[np.int64], sizes: NDArray[np.int64]
) -> NDArray[np.int64]:
    """``claimed_position`` of records in one piece of memory, [B]; offsets and sizes: int64 [B], bytes."""
    out = np.full(len(sizes), -1, dtype=np.int64)
    long = sizes >= _FIRST.size
    out[long] = arena[offsets[long, None] + np.arange(_FIRST.size - 4, _FIRST.size)].view("<u4")[:, 0]
    return out


def section_ends(data: bytes | memoryview) -> list[int]:
    """Where the header ends, then where each section does, as a record that was parsed before says it; nothing else is
    looked at. Raises RecordFormatError if that cannot be."""
    view = memoryview(data)
    groups, header_size = (view[29], int.from_bytes(view[30:32], "little")) if len(view) >= FIXED_BYTES else (0, 0)
    if not 1 <= groups <= MAX_GROUPS or not header_bytes(groups) <= header_size <= len(view):
        raise RecordFormatError(f"{groups} layer groups and a header of {header_size} of {len(view)} bytes")
    sizes = struct.unpack_from("<" + "I4x" * groups, view, FIXED_BYTES)
    ends = [header_size, *(header_size + end for end in accumulate(sizes))]
    if ends[-1] != len(view):
        raise RecordFormatError(f"header and sections make {ends[-1]} bytes; the record has {len(view)}")
    return ends


def parse_record(data: bytes | memoryview) -> Record:
    """Checks everything but the sections' own checksums (``Record.section`` does that) and allocates nothing large.

    Raises RecordTruncatedError, RecordVersionError, RecordCorruptError or RecordFormatError.
    """
    view = memoryview(data).cast("B") if not isinstance(data, bytes) else memoryview(data)
    if len(view) < FIXED_BYTES:
        raise RecordTruncatedError(f"a record has at least {FIXED_BYTES} bytes; got {len(view)}")
    (magic, version, profile, point, flags, artifact, total, first, tokens, exact_tokens, rank, groups, header_size,
     checksum) = _FIXED.unpack_from(view)  # fmt: skip
    if magic != MAGIC:
        raise RecordFormatError(f"a record starts with {MAGIC!r}; got {bytes(magic)!r}")
    if version != VERSION:
        raise RecordVersionError(f"record format version {version}; this release reads {VERSION}")
    if total != len(view):
        raise RecordTruncatedError(f"the record says it has {total} bytes; got {len(view)}")
    if not 1 <= tokens <= MAX_BLOCK_TOKENS or not 1 <= groups <= MAX_GROUPS or exact_tokens > tokens:
        raise RecordFormatError(f"{tokens} tokens, {exact_tokens} of them exact, {groups} layer groups: out of range")
    if profile not in PROFILE_NAMES or flags & ~FLAG_GAPS:
        raise RecordFormatError(f"profile {profile} or flags {flags:#x} unknown to this release")
    bitmap_bytes = (tokens + 7) // 8 if exact_tokens else 0
    position_bytes = 4 * tokens if flags & FLAG_GAPS else 0
    tail_bytes = bitmap_bytes + position_bytes
    expected = header_bytes(groups) + tail_bytes + tail_bytes % 2
    if header_size != expected:
        raise RecordFormatError(f"the header says it has {header_size} bytes; its fields make {expected}")
    if header_size > total:
        raise RecordTruncatedError(f"the header alone needs {header_size} bytes; the record has {total}")
    header = bytearray(view[:header_size])
    header[CRC_OFFSET:FIXED_BYTES] = b"\0\0\0\0"
    found = crc32(header)
    if found != checksum:
        raise RecordCorruptError(f"header checksum {found:#010x}, the record says {checksum:#010x}")

    table = [_SECTION.unpack_from(view, FIXED_BYTES + i * SECTION_BYTES) for i in range(groups)]
    sizes = tuple(size for size, _ in table)
    if header_size + sum(sizes) != total:
        raise RecordFormatError(f"header and sections make {header_size + sum(sizes)} bytes; the record has {total}")
    start = header_bytes(groups)
    exact = np.zeros(tokens, dtype=np.bool_)
    if bitmap_bytes:
        bits = np.frombuffer(view, np.uint8, bitmap_bytes, start)
        exact = np.unpackbits(bits, count=tokens, bitorder="little").astype(np.bool_)
        if tokens % 8 and bits[-1] >> (tokens % 8):
            raise RecordFormatError(f"the bitmap marks tokens beyond the block's {tokens}")
    if tail_bytes % 2 and view[header_size - 1]:
        raise RecordFormatError(f"the header's padding byte is {view[header_size - 1]:#x}; it must be 0")
    if int(exact.sum()) != exact_tokens:
        raise RecordFormatError(f"the bitmap marks {int(exact.sum())} exact tokens; the header says {exact_tokens}")
    if position_bytes:
        positions = np.frombuffer(view, "<u4", tokens, start + bitmap_bytes).astype(np.int64)
        if not (np.diff(positions) != 1).any():
            raise RecordFormatError("positions are listed though they have no gaps")
    else:
        positions = np.arange(first, first + tokens, dtype=np.int64)
    if int(positions.max()) >= 2**31 or int(positions[0]) != first:
        raise RecordFormatError(f"positions from {first} to {int(positions.max())} are out of range or inconsistent")
    offsets = tuple(header_size + sum(sizes[:i]) for i in range(groups))
    return Record(
        RecordHeader(profile, point, artifact, rank, positions, exact), view, offsets, sizes,
        tuple(crc for _, crc in table),
    )  # fmt: skip
