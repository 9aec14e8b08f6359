"""Events between two processes, and the index against a plain dict of sets in the same run.

Each case proves its result first: the follower's index holds exactly what the worker stored, the index answers what the
dict answers.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

from dynamo_kvtc.errors import ConfigError, NatsTimeoutError
from dynamo_kvtc.events.follower import Follower
from dynamo_kvtc.events.index import Holder, Index
from dynamo_kvtc.events.nats import open_nats
from dynamo_kvtc.events.options import EventOptions, NatsOptions
from dynamo_kvtc.events.publisher import Publisher
from dynamo_kvtc.events.schema import WorkerUp, new_epoch

NAMESPACE = "kvtc-bench"
WAIT_SECONDS = 120.0
PREFIXES = (1, 16, 256, 1024)
BATCH = 1024
SINGLE_SECONDS = 0.02
"""Between two single events."""


def measure_index(blocks: int, seed: int = 0) -> dict[str, Any]:
    """One worker's blocks, in an index of 58 bytes each. Microseconds are medians."""
    if not 1024 <= blocks <= 1 << 24:
        raise ConfigError(f"blocks is {blocks}; it must be 1024 to {1 << 24}")
    rng = random.Random(seed)
    keys = [rng.randbytes(32) for _ in range(blocks)]
    sizes = [rng.randrange(5_000, 60_000) for _ in keys]
    index = Index(58 * blocks)
    plain: dict[bytes, set[Holder]] = {}
    index.show("w", True)
    put: dict[str, list[float]] = {"index": [], "dict": []}
    for at in range(0, blocks, BATCH):
        some = range(at, min(at + BATCH, blocks))

        def into_index(some: range = some) -> None:
            index.put("w", keys[some.start : some.stop], [1] * len(some), sizes[some.start : some.stop])

        def into_dict(some: range = some) -> None:
            for i in some:
                plain.setdefault(keys[i], set()).add(Holder("w", "host", sizes[i]))

        put["index"].append(_microseconds(into_index) / len(some))
        put["dict"].append(_microseconds(into_dict) / len(some))
    for at in range(0, blocks, 4096):
        found = index.longest_prefix(keys[at : at + 4096])
        if found != [list(plain[key]) for key in keys[at : at + 4096]]:
            raise ConfigError("the index does not answer what the dict does: it is not measured")
    lookups = {}
    for length in (n for n in PREFIXES if n <= blocks):
        took: dict[str, list[float]] = {"index": [], "dict": []}
        for _ in range(200):
            at = rng.randrange(blocks - length + 1)
            asked = keys[at : at + length]
            took["index"].append(_microseconds(partial(index.longest_prefix, asked)) / length)
            took["dict"].append(_microseconds(partial(_prefix, plain, asked)) / length)
        lookups[length] = {name: statistics.median(times) for name, times in took.items()}
    entries, nbytes = len(index), index.nbytes
    drop = _microseconds(lambda: index.drop("w"))
    return {
        "blocks": blocks, "entries": entries, "lost": blocks - entries, "index_bytes": nbytes / entries,
        "dict_bytes": _dict_bytes(min(blocks, 200_000), rng),
        "put_us": {name: statistics.median(times) for name, times in put.items()},
        "lookup_us_per_key": lookups, "drop_ms": drop / 1000,
    }  # fmt: skip


def measure_events(url: str, events: int, singles: int = 100, seed: int = 0) -> dict[str, Any]:
    """A worker in another process stores; here is the follower. Raises NatsError, ConfigError."""
    nats = open_nats(NatsOptions(servers=(url,), namespace=NAMESPACE))
    follower = Follower(nats, _who("bench-here"), Index(max(1 << 20, 64 * (events + singles))), _options(events))
    command = [sys.executable, "-m", "dynamo_kvtc.bench.events_worker", url, str(events), str(singles), str(seed)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        keys = stored_keys(events + singles, seed)
        if child.stdout.readline() != "ready\n":
            raise ConfigError("the worker's process did not start; its error is above")
        child.stdin.write("all\n")
        child.stdin.flush()
        began = int(child.stdout.readline())
        _until(lambda: follower.index.entries_of("bench-there") >= events, "all events")
        took = (time.monotonic_ns() - began) / 1e9
        sent = int(child.stdout.readline()) / 1e9
        if len(follower.index.longest_prefix(keys[:events])) != events:
            raise ConfigError("the index does not hold what the worker stored: it is not measured")
        visible = []
        for key in keys[events:]:
            time.sleep(SINGLE_SECONDS)
            child.stdin.write("one\n")
            child.stdin.flush()
            stored = int(child.stdout.readline())
            _until(partial(_seen, follower, key), "a single event", 0.0001)
            visible.append((time.monotonic_ns() - stored) / 1e6)
        visible.sort()
        return {
            "events": events, "seconds": took, "events_per_second": events / took, "publishing_seconds": sent,
            "visible_ms_median": statistics.median(visible), "visible_ms_p95": visible[int(0.95 * len(visible))],
            "linger_ms": 1000 * _options(events).linger_seconds, "healed": follower.counts["gaps"],
        }  # fmt: skip
    finally:
        child.kill()
        child.wait(10)
        child.stdin.close()
        child.stdout.close()
        follower.close()
        nats.close()


def worker(url: str, events: int, singles: int, seed: int) -> None:
    """The other process: "all" stores and tells when it began and how long it took to hand over, "one" one more."""
    nats = open_nats(NatsOptions(servers=(url,), namespace=NAMESPACE))
    publisher = Publisher(nats, _who("bench-there"), options=_options(events))
    keys = iter(stored_keys(events + singles, seed))
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.monotonic_ns()
        for _ in range(events if line == "all\n" else 1):
            publisher.stored(next(keys), "host", 30_000, tokens=16)
        print(began, flush=True)
        if line == "all\n":
            publisher.flush(WAIT_SECONDS)
            print(time.monotonic_ns() - began, flush=True)
    publisher.close()
    nats.close()


def stored_keys(n: int, seed: int) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(32) for _ in range(n)]


def _who(name: str) -> WorkerUp:
    return WorkerUp(name, new_epoch(), "bench", "bench", "none", 0, 16)


def _options(events: int) -> EventOptions:
    return EventOptions(queue_events=max(1024, events + 1024), stream_mib=64)


def _seen(follower: Follower, key: bytes) -> bool:
    return bool(follower.index.longest_prefix([key]))


def _prefix(plain: dict[bytes, set[Holder]], keys: list[bytes]) -> list[list[Holder]]:
    out = []
    for key in keys:
        holders = plain.get(key)
        if not holders:
            break
        out.append(list(holders))
    return out


def _dict_bytes(blocks: int, rng: random.Random) -> float:
    """A block, with its key, in a dict of sets."""
    tracemalloc.start()
    plain = {rng.randbytes(32): {Holder("w", "host", rng.randrange(5_000, 60_000))} for _ in range(blocks)}
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return used / len(plain)


def _microseconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return 1e6 * (time.perf_counter() - began)


def _until(true: Callable[[], bool], what: str, pause: float = 0.001) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not true():
        if time.monotonic() > deadline:
            raise NatsTimeoutError(f"{what} did not arrive within {WAIT_SECONDS:g} s")
        time.sleep(pause)
