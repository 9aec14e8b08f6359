"""The disk tier and what else could be it, against a plain file in the same run, step by step in turn.

Every engine holds the same live records: it is filled, then records come and the least recently used go, a step of 64
at a time, each on the disk when the step ends; then all that it should have is read back and compared, and timed. The
plain file is written and read beside it, because a disk's speed changes from minute to minute: only ratios mean much.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dynamo_kvtc.bench.store_engines import ENGINES, Item, PlainFile
from dynamo_kvtc.errors import ConfigError, KvtcError
from dynamo_kvtc.store.disk import DiskStore
from dynamo_kvtc.store.host import HostStore, make_arena

STEP = 64
READS = 8000
_OVERHEAD = 1.2
"""Budget of the disk tier over its live bytes: pages, index, log and what is evicted ahead."""


class Tier:
    """``store/disk.py`` as an engine: put, remove, flush; it never needs to evict."""

    def __init__(self, path: Path, capacity_bytes: int) -> None:
        self._store = DiskStore(path / "tier", int(_OVERHEAD * capacity_bytes) + (32 << 20), read_seconds=60)

    def write(self, puts: Sequence[Item], deletes: Sequence[bytes]) -> None:
        for key in deletes:
            self._store.remove(key)
        if not all(self._store.put_many(puts)) or not self._store.flush(120):
            raise ConfigError(f"the disk tier refused records: {self._store.stats()}")

    def read(self, key: bytes) -> bytes | None:
        lease = self._store.get(key)
        return None if lease is None else bytes(lease.record)

    def read_many(self, keys: Sequence[bytes]) -> list[Any]:
        return [None if lease is None else lease.record for lease in self._store.get_many(keys)]

    def close(self) -> None:
        self._store.close()


CANDIDATES: dict[str, Callable[[Path, int], Any]] = {"kvtc": Tier, **{k: v for k, v in ENGINES.items() if k != "plain"}}


@dataclass(frozen=True)
class StoreRow:
    """Rates over the plain file's in the same run; space: peak bytes of the disk over live bytes while records come and
    go; reopen in seconds; plain_*: the plain file's own rates, MB/s."""

    engine: str
    fill: float
    churn: float
    get: float
    get_cold: float
    get_many: float | None
    space: float
    reopen_seconds: float
    plain_write_mb_s: float
    plain_read_mb_s: float
    plain_cold_mb_s: float


def measure(name: str, live_bytes: int, folder: Path, seed: int = 0) -> StoreRow:
    """Raises ConfigError for an unknown engine or if records do not come back, MissingDependencyError."""
    if name not in CANDIDATES:
        raise ConfigError(f"engine {name!r} is unknown; use one of {', '.join(CANDIDATES)}")
    rng, pool = random.Random(seed), os.urandom(8 << 20)
    where = Path(tempfile.mkdtemp(prefix="kvtc-bench-", dir=folder))
    try:
        (where / "engine").mkdir()
        plain, engine = PlainFile(where, live_bytes), CANDIDATES[name](where / "engine", live_bytes)
        live: dict[bytes, tuple[int, int]] = {}
        order: deque[bytes] = deque()
        held = 0

        def step() -> tuple[float, float, int]:
            nonlocal held
            puts = []
            for _ in range(STEP):
                size = min(60_000, max(5_000, int(rng.lognormvariate(10.2, 0.5))))
                at = rng.randrange(len(pool) - size)
                key = rng.randbytes(32)
                live[key] = (at, size)
                order.append(key)
                held += size
                puts.append((key, pool[at : at + size]))
            deletes = []
            while held > live_bytes:
                if rng.random() < 0.2:
                    order.rotate(-1)  # the oldest was used again
                    continue
                deletes.append(order.popleft())
                held -= live.pop(deletes[-1])[1]
            new = {key for key, _ in puts}
            deletes = [key for key in deletes if key not in new]
            seconds = [_timed(partial(store.write, puts, deletes)) for store in (plain, engine)]
            return seconds[0], seconds[1], sum(len(record) for _, record in puts)

        fill = _sums(step, lambda: held < 0.97 * live_bytes)
        turned, peak = 0, 0.0

        def more() -> bool:
            nonlocal turned, peak
            turned += 1
            if turned % 8 == 1:
                peak = max(peak, _disk_bytes(where / "engine") / held)
            return turned * STEP * 30_000 < live_bytes

        churn = _sums(step, more)
        keys = rng.sample(sorted(live), min(READS, len(live)))
        size = sum(live[key][1] for key in keys)
        warm = [_timed(partial(_check, store, keys, live, pool)) for store in (plain, engine)]
        many = None
        if hasattr(engine, "read_many"):
            many = _timed(lambda: [engine.read_many(keys[i : i + STEP]) for i in range(0, len(keys), STEP)])
        engine.close()
        _drop_cache(where)
        start = time.perf_counter()
        engine = CANDIDATES[name](where / "engine", live_bytes)
        _check(engine, keys[:1], live, pool)
        reopen = time.perf_counter() - start
        some = keys[1 : 1 + READS // 4]
        cold_size = sum(live[key][1] for key in some)
        cold = [_timed(partial(_check, store, some, live, pool)) for store in (plain, engine)]
        engine.close()
        plain.close()
        return StoreRow(
            name, fill[0] / fill[1], churn[0] / churn[1], warm[0] / warm[1], cold[0] / cold[1],
            None if many is None else warm[0] / many, peak, reopen, churn[2] / churn[0] / 1e6, size / warm[0] / 1e6,
            cold_size / cold[0] / 1e6,
        )  # fmt: skip
    except KvtcError:
        raise
    except Exception as exc:  # each library has errors of its own
        raise ConfigError(f"{name}: {type(exc).__name__}: {exc}") from exc
    finally:
        shutil.rmtree(where, ignore_errors=True)


def measure_host(arena_bytes: int, record_bytes: int = 30_000, records: int = 20_000) -> dict[str, float]:
    """Putting into and leasing from the host tier; ``copy``: putting over copying the same bytes alone."""
    arena, pool = make_arena(arena_bytes), memoryview(os.urandom(8 << 20))
    store, rng = HostStore(arena), random.Random(0)
    keys = [rng.randbytes(32) for _ in range(records)]
    cuts = [pool[at : at + record_bytes] for at in (rng.randrange(len(pool) - record_bytes) for _ in keys)]
    target, slots = memoryview(make_arena(arena_bytes)), arena_bytes // record_bytes

    def copy() -> None:
        for i, cut in enumerate(cuts):
            at = i % slots * record_bytes
            target[at : at + record_bytes] = cut

    copied = _timed(copy)
    put = _timed(lambda: [store.put(key, cut) for key, cut in zip(keys, cuts, strict=True)])
    here = [i for i in range(records) if store.contains(keys[i])]
    for i in here:
        with store.get(keys[i]) as lease:  # type: ignore[union-attr]
            if lease.record != cuts[i]:
                raise ConfigError(f"record {i} did not come back")
    got = _timed(lambda: [store.get(keys[i]).release() for i in here])  # type: ignore[union-attr]
    return {
        "put_microseconds": 1e6 * put / records, "lease_microseconds": 1e6 * got / len(here), "copy": copied / put,
        "record_bytes_over_budget": store.stats().record_bytes / arena_bytes,
    }  # fmt: skip


def _sums(step: Callable[[], tuple[float, float, int]], more: Callable[[], bool]) -> tuple[float, float, int]:
    total = (0.0, 0.0, 0)
    while more():
        plain, engine, size = step()
        total = (total[0] + plain, total[1] + engine, total[2] + size)
    return total


def _check(store: Any, keys: Sequence[bytes], live: dict[bytes, tuple[int, int]], pool: bytes) -> None:
    """Comparing costs both sides the same."""
    for key in keys:
        at, size = live[key]
        if store.read(key) != pool[at : at + size]:
            raise ConfigError(f"{type(store).__name__} does not give a record of {size} bytes back")


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _disk_bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_blocks * 512
            except FileNotFoundError:  # it was compacted away
                continue
    return total


def _drop_cache(folder: Path) -> None:
    os.sync()
    for root, _, names in os.walk(folder):
        for name in names:
            fd = os.open(os.path.join(root, name), os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
