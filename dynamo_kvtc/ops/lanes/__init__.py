"""Lane directories on the GPU: the payloads of profile ``kvtc`` (FORMAT.md) written and read block by block.

The CPU's side of the same bytes is ``codec.lanes``. All functions are asynchronous, on the current stream, and allocate
nothing. Tokens are in the order of their blocks; block b has ``counts[b]`` tokens from ``first[b]`` on.
"""

from __future__ import annotations

from torch import Tensor

SOUND, BAD_CHECKSUM, BAD_DIRECTORY, BAD_LANE = 0, 1, 2, 3
"""What a block's status says."""

_TOKENS = 256
_ROWS, _COLUMNS = 8, 128


def measure(lengths: Tensor, skip: Tensor, first: Tensor, counts: Tensor, out: Tensor, split: int, most: int) -> None:
    """out int32 [B, 4]: least and most words of a coded lane, words in all, coded tokens of each block.

    lengths: int32 [T * S]; skip: uint8 [T], 1 for exact tokens; first, counts: int32 [B]; split: lanes a token, S;
    most: largest count.
    """
    from dynamo_kvtc.ops.lanes import triton as kernels

    kernels.measure[(len(first),)](lengths, skip, first, counts, out, split, kernels.power(most * split))


def write(
    lengths: Tensor, skip: Tensor, first: Tensor, counts: Tensor, parameters: Tensor, base: Tensor, words: Tensor,
    target: Tensor, target_words: Tensor, word_at: Tensor, split: int, most: int,
) -> None:  # fmt: skip
    """Payloads into target, block b's from byte base[b] (even) on.

    parameters: uint8 [T]; base: int64 [B]; words: int16 [T * S, cap], a lane's words at the end of its row; target:
    uint8 [bytes], target_words: the same memory as int16; word_at: int64 [T * S], workspace. Others as in ``measure``.
    """
    from dynamo_kvtc.ops.lanes import triton as kernels

    lanes = len(lengths)
    tokens = kernels.power(most)
    kernels.write[(len(first),)](
        lengths, skip, first, counts, parameters, base, target, word_at, split, tokens * split, tokens
    )
    kernels.copy_words[(-(-lanes // _ROWS),)](
        words, words.stride(0), words.shape[1], lengths, word_at, target_words, lanes, _ROWS, _COLUMNS
    )


def read(
    data: Tensor, base: Tensor, size: Tensor, crc: Tensor, expected: Tensor, first: Tensor, counts: Tensor,
    status: Tensor, shrink: Tensor, starts: Tensor, lengths: Tensor, factors: Tensor, offsets: Tensor, split: int,
    most: int, neutral: int, classes: int, top: int,
) -> None:  # fmt: skip
    """Directories of payloads of G layer groups, checked as ``codec.lanes.unpack_lanes`` does.

    data: uint8 [bytes]; base, size: int64 [G, B], a payload's first byte and bytes; crc, expected: int32 [G, B], in one
    piece; first, counts: int32 [B], its coded tokens; status: int32 [B], a block that is not SOUND is left alone, one
    with a checksum that is not the expected one becomes BAD_CHECKSUM, with a directory that cannot be BAD_DIRECTORY.
    Out: starts int64, lengths int32 [G, T * S or more], in words of data, 0 words of a payload that is not sound;
    factors float32 [G, T or more], shrink (float32 [16]) of a token's fineness, which is at most ``top``; offsets int8
    [G, T or more], (table choice - neutral) * classes.
    """
    from dynamo_kvtc.ops.lanes import triton as kernels

    tokens = kernels.power(most)
    kernels.read[(len(first), len(base))](
        data, base, size, crc, expected, first, counts, status, shrink, starts, lengths, factors, offsets, top,
        starts.stride(0), lengths.stride(0), factors.stride(0), offsets.stride(0), neutral, classes, split,
        tokens * split, tokens,
    )  # fmt: skip


def verify(crc: Tensor, expected: Tensor, status: Tensor) -> None:
    """status int32 [B] becomes BAD_CHECKSUM for sound blocks whose crc int32 [B] is not the expected one."""
    from dynamo_kvtc.ops.lanes import triton as kernels

    kernels.verify[(-(-len(crc) // _TOKENS),)](crc, expected, status, len(crc), _TOKENS)


def judge(
    bad: Tensor, first: Tensor, counts: Tensor, status: Tensor, slots: Tensor, chosen: Tensor, split: int, most: int
) -> None:
    """status becomes BAD_LANE for sound blocks with a bad lane; then chosen int64 [T] is the slot for coded tokens of
    sound blocks, -1 for the others. bad: int32 [G, T * S], of G layer groups; slots: int64 [T]."""
    from dynamo_kvtc.ops.lanes import triton as kernels

    tokens = kernels.power(most)
    kernels.judge[(len(first),)](
        bad, bad.stride(0), len(bad), first, counts, status, slots, chosen, split, tokens * split, tokens
    )


def select(status: Tensor, block_of: Tensor, slots: Tensor, chosen: Tensor) -> None:
    """chosen int64 [T] is the slot for tokens of sound blocks, -1 for the others. block_of: int32 [T]."""
    from dynamo_kvtc.ops.lanes import triton as kernels

    tokens = len(block_of)
    if tokens:
        kernels.select[(-(-tokens // _TOKENS),)](status, block_of, slots, chosen, tokens, _TOKENS)
