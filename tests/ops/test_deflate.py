"""Raw DEFLATE: round trips, other decoders, and every way a stream can lie."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_kvtc.errors import ConfigError, RecordCorruptError
from dynamo_kvtc.ops.deflate import deflate, inflate
from tests.builders import case_seed


def skewed_bytes(count: int) -> bytes:
    generator = np.random.default_rng(case_seed())
    return np.clip(generator.laplace(128, 10, count), 0, 255).astype(np.uint8).tobytes()


@given(st.binary(max_size=2000))
def test_round_trip(data: bytes) -> None:
    assert inflate(deflate(data), len(data)) == data


def test_large_skewed_data_shrinks() -> None:
    data = skewed_bytes(200_000)
    payload = deflate(data)
    assert len(payload) < 0.75 * len(data)
    assert inflate(memoryview(payload), len(data)) == data


def test_stream_is_raw_deflate_of_any_level() -> None:
    data = skewed_bytes(5000)
    assert zlib.decompress(deflate(data), -15) == data
    for level in (0, 1, 9):
        encoder = zlib.compressobj(level, zlib.DEFLATED, -15)
        assert inflate(encoder.compress(data) + encoder.flush(), len(data)) == data


def test_truncated_stream_is_refused_at_every_length() -> None:
    data = skewed_bytes(300)
    payload = deflate(data)
    for size in range(len(payload)):
        with pytest.raises(RecordCorruptError):
            inflate(payload[:size], len(data))


@pytest.mark.parametrize("size", [0, 1, 300])
def test_wrong_size_and_trailing_bytes_are_refused(size: int) -> None:
    data = skewed_bytes(size)
    payload = deflate(data)
    for expected in (size + 1, size + 1000, *([size - 1, 0] if size else [])):
        with pytest.raises(RecordCorruptError, match=str(expected)):
            inflate(payload, expected)
    with pytest.raises(RecordCorruptError, match="1 bytes follow"):
        inflate(payload + b"\0", size)


def test_wrapped_and_damaged_streams_are_refused() -> None:
    data = skewed_bytes(300)
    with pytest.raises(RecordCorruptError):
        inflate(zlib.compress(data), len(data))
    with pytest.raises(RecordCorruptError, match="damaged"):
        inflate(b"\xff" * 40, len(data))


def test_bomb_is_cut_off() -> None:
    payload = deflate(bytes(50_000_000))
    assert len(payload) < 60_000
    with pytest.raises(RecordCorruptError, match="more than the expected 100 bytes"):
        inflate(payload, 100)


def test_negative_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="-1"):
        inflate(b"", -1)
