"""What the GPU path does on the host for every block of a call, compiled: in numpy it takes longer than the GPU does.

No more than loops over ``codec.headers``' arrays; what is said of a record is decided there.
"""

# numba's decorators hide the types of what they wrap.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
from __future__ import annotations

import numpy as np
from numba import njit

_FOREVER = 2**31


@njit(inline="always")
def _u32(data, at):
    return int(data[at]) | int(data[at + 1]) << 8 | int(data[at + 2]) << 16 | int(data[at + 3]) << 24


@njit(inline="always")
def _crc(data, at, size, skipped, table):
    """CRC-32 of ``size`` bytes, those of the checksum's own place taken as 0."""
    x = 0xFFFFFFFF
    for i in range(size):
        byte = 0 if skipped <= i < skipped + 4 else int(data[at + i])
        x = (x >> 8) ^ int(table[(x ^ byte) & 0xFF])
    return x ^ 0xFFFFFFFF


@njit(cache=True, nogil=True)
def prove(arena, sections, crc, tables, good, start, step):
    """good[b] becomes False, for b = start, start + step, ..., where a section is not what its checksum says.

    sections, crc: as ``scan`` leaves them; tables: uint32 [8, 256], of a byte with 0 to 7 bytes of zeros behind it.
    The interpreter is let go of: in pieces, others would be waited for at each.
    """
    t0, t1, t2, t3, t4, t5, t6, t7 = (
        tables[0], tables[1], tables[2], tables[3], tables[4], tables[5], tables[6], tables[7]
    )  # fmt: skip
    for b in range(start, len(good), step):
        for g in range(sections.shape[1]):
            if not good[b]:
                break
            at, size = sections[b, g, 0], sections[b, g, 1]
            x = np.uint32(0xFFFFFFFF)
            end = at + size
            while at + 8 <= end:
                low = x ^ (
                    np.uint32(arena[at]) | np.uint32(arena[at + 1]) << 8 | np.uint32(arena[at + 2]) << 16
                    | np.uint32(arena[at + 3]) << 24
                )  # fmt: skip
                x = np.uint32(
                    t7[low & 0xFF] ^ t6[(low >> 8) & 0xFF] ^ t5[(low >> 16) & 0xFF] ^ t4[(low >> 24) & 0xFF]
                    ^ t3[arena[at + 4]] ^ t2[arena[at + 5]] ^ t1[arena[at + 6]] ^ t0[arena[at + 7]]
                )  # fmt: skip
                at += 8
            while at < end:
                x = np.uint32((x >> 8) ^ t0[(x ^ arena[at]) & 0xFF])
                at += 1
            if x ^ np.uint32(0xFFFFFFFF) != crc[b, g]:
                good[b] = False


@njit(cache=True)
def seal(rows, crc_at, crc_table):
    """Writes the checksum of each header, uint8 [n, bytes], into its place."""
    for row in rows:
        x = _crc(row, 0, len(row), crc_at, crc_table)
        for i in range(4):
            row[crc_at + i] = (x >> (8 * i)) & 0xFF


@njit(cache=True)
def scan(arena, offsets, sizes, counts, least, table_at, total_at, first_at, tokens_at, crc_at, template, fixed,
         crc_table, status, positions, sections, crc):  # fmt: skip
    """Records whose header is ``template`` where ``fixed`` says so, with the rest as it must be, get status 0.

    template, fixed: uint8 and bool [bytes before the sections' table]; crc_table: uint32 [256]; the rest as in
    ``codec.headers.read_headers``. ``least`` bytes are a header without exact tokens and gaps.
    """
    token = 0
    groups = sections.shape[1]
    for b in range(len(counts)):
        count, at, size = int(counts[b]), int(offsets[b]), int(sizes[b])
        sound = at >= 0 and size >= least and at <= len(arena) - size
        if sound:
            for i in range(len(template)):
                if fixed[i] and arena[at + i] != template[i]:
                    sound = False
        if sound:
            body = 0
            for g in range(groups):
                body += _u32(arena, at + table_at + 8 * g)
            first = _u32(arena, at + first_at)
            tokens = int(arena[at + tokens_at]) | int(arena[at + tokens_at + 1]) << 8
            sound = (
                least + body == size and _u32(arena, at + total_at) == size and tokens == count
                and first + count <= _FOREVER
            )  # fmt: skip
        if sound:
            sound = _crc(arena, at, least, crc_at, crc_table) == _u32(arena, at + crc_at)
        if sound:
            status[b] = 0
            for i in range(count):
                positions[token + i] = first + i
            where = at + least
            for g in range(groups):
                section = _u32(arena, at + table_at + 8 * g)
                sections[b, g, 0], sections[b, g, 1] = where, section
                crc[b, g] = _u32(arena, at + table_at + 8 * g + 4)
                where += section
        token += count


@njit(cache=True)
def sort_tokens(counts, status, exact, positions, slots, first, coded_of, exact_of, coded_slots, coded_positions,
                exact_block, exact_slots, exact_index):  # fmt: skip
    """Tokens of sound blocks by kind, in order: coded ones, and exact ones with their block and number in it.

    Returns how many of each. first, coded_of, exact_of: [B] (out), where a block's coded tokens start, how many of each
    it has.
    """
    token = coded = kept = 0
    for b in range(len(counts)):
        first[b], begin, here = coded, coded, kept
        for _ in range(counts[b]):
            if exact[token]:
                exact_block[kept], exact_slots[kept], exact_index[kept] = b, slots[token], kept - here
                kept += 1
            elif status[b] == 0:
                coded_slots[coded], coded_positions[coded] = slots[token], positions[token]
                coded += 1
            token += 1
        coded_of[b], exact_of[b] = coded - begin, kept - here
    return coded, kept


def compile_all():
    """Seconds, the first time on a machine: not to be spent on a request."""
    byte, word, flag = (np.zeros(1, dtype) for dtype in (np.uint8, np.int64, np.bool_))
    crc, none, counts = np.zeros(256, np.uint32), np.zeros(0, np.int64), np.zeros(0, np.int32)
    scan(byte, none, none, counts, 0, 0, 0, 0, 0, 0, byte, flag, crc, counts, word, np.zeros((0, 1, 2), np.int64),
         np.zeros((0, 1), np.uint32))  # fmt: skip
    sort_tokens(counts, counts, flag, word, word, counts, counts, none, word, word, counts, word, counts)
    seal(np.zeros((1, 8), np.uint8), 0, crc)
    prove(
        byte, np.zeros((0, 1, 2), np.int64), np.zeros((0, 1), np.uint32), np.zeros((8, 256), np.uint32), flag[:0], 0, 1
    )
