"""A worker in a process of its own: ``python -m tests.events.worker URL NAMESPACE WORKER SEED TTL``.

Stores records at random, tells of them, and prints a line of JSON for each command it reads: "work N" does N more
things, "held" says what it holds, "close" ends it in order.
"""

from __future__ import annotations

import json
import random
import sys
import threading

from dynamo_kvtc.events.nats import open_nats
from dynamo_kvtc.events.options import EventOptions, NatsOptions
from dynamo_kvtc.events.publisher import Publisher
from dynamo_kvtc.events.schema import TIERS, Plane, WorkerStats, WorkerUp, new_epoch


def who(worker: str, model: str = "m1", held: int = 0, **more) -> WorkerUp:
    told = {
        "worker": worker, "epoch": new_epoch(), "model": model, "model_name": "tiny", "artifact": "ab" * 32,
        "record_version": 2, "block_tokens": 16, "planes": [Plane("nats", "pull")], "held": held,
    }  # fmt: skip
    return WorkerUp(**(told | more))


class Worker:
    """A publisher over a store that is a dict."""

    def __init__(self, nats, up: WorkerUp, seed: int, options: EventOptions, held=()) -> None:
        self.held: dict[bytes, tuple[str, int]] = dict(held)
        self.rng = random.Random(seed)
        self.lock = threading.Lock()
        self.publisher = Publisher(nats, up, self.holdings, self.stats, options)

    def holdings(self):
        with self.lock:
            return [(key, tier, size) for key, (tier, size) in self.held.items()]

    def stats(self) -> WorkerStats:
        with self.lock:
            return WorkerStats({"host": len(self.held)}, {"host": sum(size for _, size in self.held.values())})

    def work(self, steps: int) -> None:
        rng = self.rng
        for _ in range(steps):
            with self.lock:
                what = rng.random()
                if what < 0.6 or not self.held:
                    key, tier, size = rng.randbytes(32), rng.choice(TIERS), rng.randrange(1, 100_000)
                    self.held[key] = (tier, size)
                    self.publisher.stored(key, tier, size)
                    continue
                key = rng.choice(list(self.held)) if len(self.held) < 50 else next(iter(self.held))
                if what < 0.8:
                    tier = rng.choice(TIERS)
                    self.held[key] = (tier, self.held.pop(key)[1])
                    self.publisher.moved(key, tier)
                else:
                    self.publisher.removed(key, self.held.pop(key)[0])


def main() -> None:
    url, namespace, worker, seed, ttl = sys.argv[1:]
    nats = open_nats(NatsOptions(servers=(url,), namespace=namespace))
    it = Worker(nats, who(worker), int(seed), EventOptions(heartbeat_ttl_seconds=float(ttl)))
    print(json.dumps("up"), flush=True)
    for line in sys.stdin:
        command, *more = line.split()
        told: object = "done"
        if command == "work":
            it.work(int(more[0]))
        elif command == "held":
            told = {key.hex(): [tier, size] for key, tier, size in it.holdings()}
        elif command == "close":
            told = it.publisher.close() and nats.close()
        print(json.dumps(told), flush=True)
        if command == "close":
            return


if __name__ == "__main__":
    main()
