"""zlib behind nvCOMP's interface: chunks anywhere, damage reported, nothing else written."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops import deflate
from dynamo_kvtc.ops.deflate.host import HostDecoder, HostEncoder
from tests.builders import case_seed


def test_round_trip_and_damage():
    generator = np.random.default_rng(case_seed())
    sizes = torch.tensor([1, 700, 40_000, 33])
    starts = torch.tensor([3, 5, 900, 41_000])
    source = torch.from_numpy(generator.integers(0, 256, 42_000, dtype=np.uint8))
    encoder = HostEncoder(4, 40_000)
    target = torch.full((4 * encoder.room,), 0xA5, dtype=torch.uint8)
    rooms = torch.arange(4) * encoder.room
    made, status = torch.zeros(4, dtype=torch.int64), torch.full((4,), -1, dtype=torch.int32)
    encoder.encode(source, starts, sizes, target, rooms, made, status)
    assert not status.any()
    assert int(made.max()) <= encoder.room
    for start, size, room, n in zip(starts, sizes, rooms, made, strict=True):
        payload = target[room : room + n].numpy().tobytes()
        assert deflate.inflate(payload, int(size)) == source[start : start + size].numpy().tobytes()
        assert bool((target[room + n : room + encoder.room] == 0xA5).all())

    back, found = torch.full((42_000,), 0xA5, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    room_for = sizes.clone()
    room_for[3] = 34
    HostDecoder(4, 40_000).decode(target, rooms, made, back, starts, room_for, found, status)
    assert status.tolist() == [0, 0, 0, 1]
    assert found.tolist() == [1, 700, 40_000, 0]
    for start, size in list(zip(starts, sizes, strict=True))[:3]:
        assert torch.equal(back[start : start + size], source[start : start + size])
    assert bool((back[:3] == 0xA5).all() & (back[40_900:] == 0xA5).all())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        HostEncoder(0, 5)
    x = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ConfigError, match="made for 1 of 5"):
        HostEncoder(1, 5).encode(torch.zeros(9, dtype=torch.uint8), x, x + 6, torch.zeros(99), x, x, x)
