"""Who lives in a namespace, and how they do: what `kvtc watch` shows. Reads heartbeats alone, of all models."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import msgspec

from dynamo_kvtc.errors import EventError, NatsRefusedError
from dynamo_kvtc.events.jetstream import Bucket
from dynamo_kvtc.events.nats import Nats
from dynamo_kvtc.events.schema import Beat, Subjects, decode

RATES = ("pulled_bytes", "served_bytes", "events")
MAX_LINES = 4096


@dataclass(frozen=True)
class Line:
    """One worker. rates: a second, between its last two heartbeats; empty until there were two."""

    beat: Beat
    heard: float
    rates: dict[str, float]

    @property
    def hit_rate(self) -> float | None:
        """Of the blocks that were asked for."""
        s = self.beat.stats
        return s.hits / (s.hits + s.misses) if s.hits + s.misses else None

    @property
    def ratio(self) -> float | None:
        """Raw bytes over coded bytes of what was stored."""
        s = self.beat.stats
        return s.raw_bytes / s.coded_bytes if s.coded_bytes else None

    def told(self) -> dict[str, Any]:
        """For JSON."""
        up = self.beat.up
        return {
            "worker": up.worker, "epoch": up.epoch, "model": up.model, "model_name": up.model_name,
            "artifact": up.artifact, "record_version": up.record_version, "block_tokens": up.block_tokens,
            "planes": [msgspec.to_builtins({"name": p.name, "address": p.address}) for p in up.planes],
            "stats": msgspec.structs.asdict(self.beat.stats), "hit_rate": self.hit_rate, "ratio": self.ratio,
            "rates": self.rates, "age_seconds": round(time.monotonic() - self.heard, 2),
        }  # fmt: skip


class Board:
    """``lines`` is what was heard and is not over. Nothing that arrives raises: ``bad`` counts what is no heartbeat."""

    def __init__(self, nats: Nats, ttl_seconds: float = 6.0) -> None:
        """ttl_seconds: of the bucket, for who may have to create it; heartbeats carry their own."""
        self._bucket = Bucket(nats, Subjects(nats.options.namespace, "*").bucket, ttl_seconds, create=False)
        self._lines: dict[str, Line] = {}
        self._lock = threading.Lock()
        self._watch: Any = None
        self.bad: Counter[str] = Counter()

    def read(self, timeout: float = 10.0) -> None:
        """What there is now, once. A namespace where nobody ever was is empty. Raises NatsError."""
        try:
            beats = self._bucket.all(timeout)
        except NatsRefusedError as exc:
            if "(10059)" not in str(exc):
                raise
            return
        for key, value in beats.items():
            self.take(key, value)

    def follow(self) -> None:
        """From now on, until ``close``."""
        self._watch = self._bucket.watch(self.take)

    def take(self, key: str, value: bytes | None) -> None:
        with self._lock:
            if value is None:
                self._lines.pop(key, None)
                return
            try:
                beat = decode(Beat, value)
                if key != f"{beat.up.model}.{beat.up.worker}":
                    raise EventError("a heartbeat in another's name")
            except EventError as exc:
                self.bad[type(exc).__name__] += 1
                return
            before, now = self._lines.get(key), time.monotonic()
            if before is not None and before.beat.up.epoch == beat.up.epoch and before.beat.beat >= beat.beat:
                return
            if len(self._lines) < MAX_LINES or before is not None:
                self._lines[key] = Line(beat, now, _rates(before, beat, now))

    def lines(self) -> list[Line]:
        """By model and worker."""
        now = time.monotonic()
        with self._lock:
            for key in [k for k, line in self._lines.items() if now > line.heard + line.beat.ttl_seconds]:
                del self._lines[key]
            return [line for _, line in sorted(self._lines.items())]

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()


def _rates(before: Line | None, beat: Beat, now: float) -> dict[str, float]:
    if before is None or before.beat.up.epoch != beat.up.epoch or now <= before.heard:
        return {}
    seconds = now - before.heard
    return {n: max(0, getattr(beat.stats, n) - getattr(before.beat.stats, n)) / seconds for n in RATES}
