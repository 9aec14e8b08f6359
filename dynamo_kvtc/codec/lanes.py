"""The payload of profile ``kvtc``: how many words each rANS lane has, one parameter byte per token, then the words."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from dynamo_kvtc.codec.record import header_bytes
from dynamo_kvtc.errors import ConfigError, RecordFormatError
from dynamo_kvtc.ops import quantize, rans

HEAD = struct.Struct("<HBB")
"""Least words of a lane, bytes per lane of the excess over it, reserved."""

OFFSET_NEUTRAL = 8
"""Table choice 0..15 means classes shifted by OFFSET_CLASSES * (choice - 8)."""
OFFSET_CHOICES = 16
OFFSET_CLASSES = 2
FINENESS_STRIDE = 16
"""A parameter byte is fineness + 16 * table choice."""


def class_offsets(parameters: NDArray[np.uint8]) -> NDArray[np.int8]:
    """int8 [T]: what each token adds to the classes of its components after the leading ones."""
    return ((parameters // FINENESS_STRIDE).astype(np.int8) - OFFSET_NEUTRAL) * np.int8(OFFSET_CLASSES)


LANE_BITS = 8 + 16 + 8
"""What a lane costs: its length, and a state that starts with 16 useless bits and ends 8 bits short of its word on
average."""


def overhead_bits_per_token(groups: int, block_tokens: int, lanes: int) -> float:
    """What a record costs beside the symbols' cross-entropy, in bits per coded token.

    Per lane LANE_BITS; per token and layer group: its parameters (8).
    """
    return groups * (lanes * LANE_BITS + 8) + 8 * (header_bytes(groups) + groups * HEAD.size) / block_tokens


def pack_lanes(lengths: NDArray[np.int64], parameters: NDArray[np.uint8], words: NDArray[np.uint16]) -> bytes:
    """One block's payload. lengths: int64 [N S] words per lane; parameters: uint8 [N]; words: uint16 [sum of lengths].

    Lengths are the least of them and the excess over it in 0, 1 or 2 bytes a lane. Raises ConfigError.
    """
    if not len(lengths):
        return b""
    least = int(lengths.min())
    excess = lengths - least
    most = int(excess.max())
    if least + most > 0xFFFF:
        raise ConfigError(f"a rANS lane of {least + most} words; a record holds at most 65535: use more layer groups")
    width = 0 if most == 0 else 1 if most < 256 else 2
    body = (excess.astype(f"<u{width}").tobytes() if width else b"") + parameters.tobytes()
    return HEAD.pack(least, width, 0) + body + b"\0" * (len(body) % 2) + words.astype("<u2").tobytes()


def unpack_lanes(
    payload: bytes | memoryview, tokens: int, lanes: int
) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.uint16]]:
    """Words per lane int64 [N S], parameters uint8 [N] and the words of a payload of N tokens, S lanes each.

    Raises RecordFormatError.
    """
    if tokens == 0:
        if len(payload):
            raise RecordFormatError(f"{len(payload)} bytes of lanes in a block without coded tokens")
        return np.empty(0, np.int64), np.empty(0, np.uint8), np.empty(0, np.uint16)
    if len(payload) < HEAD.size:
        raise RecordFormatError(f"{len(payload)} bytes cannot hold the lane lengths of {tokens} tokens")
    least, width, reserved = HEAD.unpack_from(payload)
    count = tokens * lanes
    body = count * width + tokens
    start = HEAD.size + body + body % 2
    if width > 2 or reserved or start > len(payload) or (len(payload) - start) % 2:
        raise RecordFormatError(f"lane lengths of width {width} for {tokens} tokens do not fit {len(payload)} bytes")
    excess = np.frombuffer(payload, f"<u{width}", count, HEAD.size) if width else np.zeros(count)
    lengths = excess.astype(np.int64) + least
    parameters = np.frombuffer(payload, np.uint8, tokens, HEAD.size + count * width)
    words = np.frombuffer(payload, "<u2", offset=start)
    if int(lengths.min()) < rans.STATE_WORDS or int(lengths.sum()) != len(words):
        raise RecordFormatError(f"the lanes claim {int(lengths.sum())} words; {len(words)} are there")
    if int((parameters % FINENESS_STRIDE).max()) >= quantize.FINENESS_LEVELS:
        raise RecordFormatError(f"a token's fineness is over {quantize.FINENESS_LEVELS - 1}")
    return lengths, parameters, words
