"""A store of every kind for the contract suite, and records that say whose they are."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from dynamo_kvtc.store import Store
from dynamo_kvtc.store.disk import DiskStore
from dynamo_kvtc.store.host import HostStore
from dynamo_kvtc.store.placed import PlacedStore
from dynamo_kvtc.store.tiered import TieredStore

MIB = 1 << 20
POISON = 0xA5


def host(nbytes: int = 2 * MIB) -> HostStore:
    return HostStore(bytearray([POISON]) * nbytes)


def disk(path: Path, budget: int = 8 * MIB, **options: object) -> DiskStore:
    return DiskStore(path, budget, **options)  # type: ignore[arg-type]


STORES: dict[str, Callable[[Path], Store]] = {
    "host": lambda path: host(),
    "disk": lambda path: disk(path),
    "tiered": lambda path: TieredStore(host(), disk(path)),
    "tiered-write-through": lambda path: TieredStore(host(), disk(path), write_through=True, promote_on=2),
    "tiered-host-only": lambda path: TieredStore(host(), None),
    "tiered-disk-only": lambda path: TieredStore(None, disk(path)),
    "placed-on-host": lambda path: PlacedStore(host(), disk(path), lambda key: "host"),
    "placed-on-disk": lambda path: PlacedStore(host(), disk(path), lambda key: "disk"),
}


def key_of(number: int, nbytes: int = 32) -> bytes:
    return number.to_bytes(nbytes, "big")


def record_of(number: int, nbytes: int) -> bytes:
    """Bytes that no other number has."""
    return random.Random(number).randbytes(nbytes)


def size_of(number: int) -> int:
    """5 to 60 KB, as records are."""
    return min(60_000, max(5_000, int(random.Random(number).lognormvariate(10.0, 0.6))))
