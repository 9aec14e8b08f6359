"""Records that are whole and sound, of random bytes: what moves them does not look inside sections."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from dynamo_kvtc.codec.headers import Identity
from dynamo_kvtc.codec.record import RecordHeader, build_record
from dynamo_kvtc.store.host import HostStore, make_arena
from dynamo_kvtc.transfer.arriving import Expected
from dynamo_kvtc.transfer.options import Peers
from dynamo_kvtc.transfer.pull import Wanted

IDENTITY = Identity(profile=2, point=1, artifact=0x1234567890ABCDEF, rank=0, groups=3)
EXPECTED = Expected(IDENTITY)
PEERS = Peers("dynamo", "model-key")


def make_record(
    rng: random.Random, sizes: Sequence[int], first: int = 0, tokens: int = 16, exact: int = 0, identity=IDENTITY,
    gaps: bool = False,
) -> bytes:  # fmt: skip
    positions = np.arange(first, first + tokens, dtype=np.int64)
    if gaps:
        positions[1:] += 3
    marks = np.zeros(tokens, np.bool_)
    marks[:exact] = True
    header = RecordHeader(identity.profile, identity.point, identity.artifact, identity.rank, positions, marks)
    return build_record(header, [rng.randbytes(size) for size in sizes])


def make_records(rng: random.Random, count: int, least: int = 500, most: int = 9000) -> dict[bytes, bytes]:
    """One empty section, exact tokens and gaps among them."""
    out = {}
    for i in range(count):
        sizes = [rng.randrange(least, most) // 3 for _ in range(IDENTITY.groups)]
        if i % 7 == 3:
            sizes[rng.randrange(IDENTITY.groups)] = 0
        out[rng.randbytes(32)] = make_record(rng, sizes, 16 * i, exact=4 * (i == 0), gaps=i % 5 == 4)
    return out


def store_of(records: dict[bytes, bytes], spare_bytes: int = 1 << 20) -> HostStore:
    store = HostStore(make_arena(sum(len(r) + 512 for r in records.values()) + spare_bytes))
    assert all(store.put_many(records.items()))
    return store


def wanted_of(records: dict[bytes, bytes], *holders: str) -> list[Wanted]:
    return [Wanted(key, len(record), holders, 16, None) for key, record in records.items()]
