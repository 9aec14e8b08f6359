"""DEFLATE by zlib, on the CPU."""

from __future__ import annotations

import zlib

from dynamo_kvtc.errors import RecordCorruptError

_RAW = -15
"""Window of 32 KiB; negative: no header, no checksum."""


def deflate(data: bytes, level: int) -> bytes:
    encoder = zlib.compressobj(level, zlib.DEFLATED, _RAW)
    return encoder.compress(data) + encoder.flush()


def inflate(payload: bytes | memoryview, expected_bytes: int) -> bytes:
    decoder = zlib.decompressobj(_RAW)
    try:
        # One byte more than expected tells a stream that is too long from one that fits.
        data = decoder.decompress(payload, expected_bytes + 1)
    except zlib.error as exc:
        raise RecordCorruptError(f"the DEFLATE stream of {len(payload)} bytes is damaged: {exc}") from exc
    if len(data) > expected_bytes:
        raise RecordCorruptError(f"the DEFLATE stream gives more than the expected {expected_bytes} bytes")
    if not decoder.eof:
        raise RecordCorruptError(f"the DEFLATE stream stops after {len(data)} bytes of {expected_bytes}, unfinished")
    if len(data) != expected_bytes:
        raise RecordCorruptError(f"the DEFLATE stream gives {len(data)} bytes; expected {expected_bytes}")
    if decoder.unused_data:
        raise RecordCorruptError(f"{len(decoder.unused_data)} bytes follow the DEFLATE stream")
    return data
