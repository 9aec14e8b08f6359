"""Lane directories on the GPU: a program per block, a lane per element of its vectors."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _measure(lengths, skip, first, counts, out, S: tl.constexpr, LANES: tl.constexpr):
    """out[block] = least and most words of a coded lane, words of all, coded tokens."""
    block = tl.program_id(0)
    begin = tl.load(first + block)
    lane = tl.arange(0, LANES)
    token = lane // S
    here = token < tl.load(counts + block)
    coded = here & (tl.load(skip + begin + token, mask=here, other=1) == 0)
    length = tl.load(lengths + begin.to(tl.int64) * S + lane, mask=coded, other=0)
    tokens = tl.sum(coded.to(tl.int32)) // S
    tl.store(out + block * 4, tl.min(tl.where(coded, length, 1 << 30)))
    tl.store(out + block * 4 + 1, tl.max(length))
    tl.store(out + block * 4 + 2, tl.sum(length))
    tl.store(out + block * 4 + 3, tokens)


@triton.jit(do_not_specialize_on_alignment=["base"])
def _write(lengths, skip, first, counts, parameters, base, target, word_at, S: tl.constexpr, LANES: tl.constexpr,
           TOKENS: tl.constexpr):  # fmt: skip
    """Head, lengths and parameters of a block's payload at byte base[block] of target; where each lane's words go."""
    block = tl.program_id(0)
    begin = tl.load(first + block)
    count = tl.load(counts + block)
    lane = tl.arange(0, LANES)
    token = lane // S
    here = token < count
    coded = here & (tl.load(skip + begin + token, mask=here, other=1) == 0)
    length = tl.load(lengths + begin.to(tl.int64) * S + lane, mask=coded, other=0)
    rank = tl.cumsum(coded.to(tl.int32), 0) - 1
    tokens = tl.sum(coded.to(tl.int32)) // S
    least = tl.min(tl.where(coded, length, 1 << 30))
    most = tl.max(length) - least
    width = tl.where(most == 0, 0, tl.where(most < 256, 1, 2))
    start = target + tl.load(base + block)
    any_coded = tokens > 0
    tl.store(start, (least & 255).to(tl.uint8), mask=any_coded)
    tl.store(start + 1, (least >> 8).to(tl.uint8), mask=any_coded)
    tl.store(start + 2, width.to(tl.uint8), mask=any_coded)
    tl.store(start + 3, tl.zeros((), tl.uint8), mask=any_coded)
    excess = length - least
    tl.store(start + 4 + rank * width, (excess & 255).to(tl.uint8), mask=coded & (width > 0))
    tl.store(start + 5 + rank * width, (excess >> 8).to(tl.uint8), mask=coded & (width > 1))
    body = tokens * S * width
    t = tl.arange(0, TOKENS)
    of_token = t < count
    kept = of_token & (tl.load(skip + begin + t, mask=of_token, other=1) == 0)
    order = tl.cumsum(kept.to(tl.int32), 0) - 1
    value = tl.load(parameters + begin + t, mask=kept, other=0)
    tl.store(start + 4 + body + order, value, mask=kept)
    body += tokens
    tl.store(start + 4 + body, tl.zeros((), tl.uint8), mask=any_coded & (body % 2 == 1))
    body += body % 2
    word = tl.load(base + block) // 2 + (4 + body) // 2 + tl.cumsum(length, 0) - length
    tl.store(word_at + begin.to(tl.int64) * S + lane, word.to(tl.int64), mask=here)


@triton.jit(do_not_specialize=["lanes"])
def _copy_words(words, stride, cap, lengths, word_at, target, lanes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The last ``length`` words of each lane's row to its place in target (16-bit words)."""
    lane = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = lane < lanes
    length = tl.load(lengths + lane, mask=here, other=0)
    source = words + lane.to(tl.int64) * stride + (cap - length)
    place = target + tl.load(word_at + lane, mask=here, other=0)
    for i in range(0, tl.max(length), COLUMNS):
        k = i + tl.arange(0, COLUMNS)
        mask = k[None, :] < length[:, None]
        tl.store(place[:, None] + k[None, :], tl.load(source[:, None] + k[None, :], mask=mask, other=0), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["base", "size", "crc", "expected"])
def _read(data, base, size, crc, expected, first, counts, status, shrink, starts, lengths, factors, offsets, top,
          stride_starts, stride_lengths, stride_factors, stride_offsets,
          NEUTRAL: tl.constexpr, CLASSES: tl.constexpr, S: tl.constexpr, LANES: tl.constexpr,
          TOKENS: tl.constexpr):  # fmt: skip
    """Where each lane of each block's payload lies, in words of ``data``; length 0 where the payload is not sound."""
    block = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    own = group * tl.num_programs(0) + block
    begin = tl.load(first + block)
    count = tl.load(counts + block)
    at = tl.load(base + own)
    room = tl.load(size + own)
    start = data + at
    has_head = room >= 4
    least = tl.load(start, mask=has_head, other=0).to(tl.int32)
    least += tl.load(start + 1, mask=has_head, other=0).to(tl.int32) << 8
    width = tl.load(start + 2, mask=has_head, other=0).to(tl.int32)
    reserved = tl.load(start + 3, mask=has_head, other=1)
    sane = has_head & (width <= 2) & (reserved == 0)
    body = count * S * width + count
    head = 4 + body + body % 2
    sane = sane & (head <= room) & ((room - head) % 2 == 0) & (at % 2 == 0)
    sane = sane | ((count == 0) & (room == 0))
    before = tl.load(status + block)
    before = tl.where((before == 0) & (tl.load(crc + own) != tl.load(expected + own)), 1, before)
    sane = sane & (before == 0)

    lane = tl.arange(0, LANES)
    here = (lane < count * S) & sane
    length = tl.load(start + 4 + lane * width, mask=here & (width > 0), other=0).to(tl.int32)
    length += tl.load(start + 5 + lane * width, mask=here & (width > 1), other=0).to(tl.int32) << 8
    length = tl.where(here, length + least, 0)
    t = tl.arange(0, TOKENS)
    of_token = t < count
    value = tl.load(start + 4 + count * S * width + t, mask=of_token & sane, other=0)
    fine = tl.max(tl.where(of_token, value.to(tl.int32) % 16, 0)) <= top
    total = tl.sum(length.to(tl.int64))
    fits = (count == 0) | (2 * total == room - head)
    sound = sane & fine & fits & (tl.min(tl.where(here, length, 2)) >= 2)
    where = (at + head) // 2 + tl.cumsum(length.to(tl.int64), 0) - length
    to = begin.to(tl.int64) * S + lane
    inside = lane < count * S
    tl.store(starts + group * stride_starts + to, tl.where(sound, where, 0), mask=inside)
    tl.store(lengths + group * stride_lengths + to, tl.where(sound, length, 0), mask=inside)
    value = tl.where(sound, value, 4)
    tl.store(factors + group * stride_factors + begin + t, tl.load(shrink + value.to(tl.int32) % 16), mask=of_token)
    offset = ((value.to(tl.int32) // 16 - NEUTRAL) * CLASSES).to(tl.int8)
    tl.store(offsets + group * stride_offsets + begin + t, offset, mask=of_token)
    # The block's other layer groups are at it, too: the first to find something says so.
    if (sound == 0) & (tl.load(status + block) == 0):
        tl.atomic_cas(status + block, 0, tl.where(before == 0, 2, before))


@triton.jit(do_not_specialize=["groups"])
def _judge(bad, stride, groups, first, counts, status, slots, chosen, S: tl.constexpr, LANES: tl.constexpr,
           TOKENS: tl.constexpr):  # fmt: skip
    """status = 3 for a block with a bad lane; then chosen of its tokens."""
    block = tl.program_id(0)
    begin = tl.load(first + block)
    count = tl.load(counts + block)
    lane = tl.arange(0, LANES)
    at = bad + begin.to(tl.int64) * S + lane
    worst = tl.zeros((LANES,), tl.int32)
    for _ in range(groups):
        worst = tl.maximum(worst, tl.load(at, mask=lane < count * S, other=0))
        at += stride
    found = tl.max(worst)
    before = tl.load(status + block)
    after = tl.where((before == 0) & (found != 0), 3, before)
    tl.store(status + block, after)
    t = tl.arange(0, TOKENS)
    here = t < count
    slot = tl.load(slots + begin + t, mask=here, other=-1)
    tl.store(chosen + begin + t, tl.where(after == 0, slot, -1), mask=here)


@triton.jit(do_not_specialize=["tokens"])
def _select(status, block_of, slots, chosen, tokens, BLOCK: tl.constexpr):
    """chosen = slot for tokens of sound blocks, -1 for the others."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = t < tokens
    good = tl.load(status + tl.load(block_of + t, mask=here, other=0), mask=here, other=1) == 0
    tl.store(chosen + t, tl.where(good, tl.load(slots + t, mask=here, other=-1), -1), mask=here)


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["crc", "expected"])
def _verify(crc, expected, status, blocks, BLOCK: tl.constexpr):
    """status = 1 for a sound block whose checksum differs."""
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = b < blocks
    differs = tl.load(crc + b, mask=here, other=0) != tl.load(expected + b, mask=here, other=0)
    sound = tl.load(status + b, mask=here, other=1) == 0
    tl.store(status + b, tl.full((BLOCK,), 1, tl.int32), mask=here & differs & sound)


def power(n: int) -> int:
    return triton.next_power_of_2(max(n, 1))


measure, write, copy_words, read = _measure, _write, _copy_words, _read
verify, judge, select = _verify, _judge, _select
