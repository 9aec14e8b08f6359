"""What the scheduler's side and the worker's share: they live in one process and find each other by the engine's id."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from dynamo_kvtc.adapters.registry import Registry
from dynamo_kvtc.tier.metrics import TierMetrics
from dynamo_kvtc.tier.options import TierOptions
from dynamo_kvtc.tier.tier import Tier

_PENDING_STATS = 1 << 16


class Shared:
    """One engine's tier, its events and its numbers on their way to the engine."""

    def __init__(self, options: TierOptions, events: bool) -> None:
        self.options = options
        self.tier: Tier | None = None
        self.metrics = TierMetrics(sink=self._note)
        self.events_on = events
        self.takes_failures = False
        """Whether vLLM hears of pages that a load could not fill; without that such a load ends the engine."""
        self.names: dict[bytes, bytes] = {}
        """The engine's key of a record's, for events alone."""
        self.loads = 0
        """Under way. Under ``loads_changed``."""
        self.loads_changed = threading.Condition()
        self._lock = threading.Lock()
        self._where: dict[bytes, str] = {}
        self._events: deque[tuple[bytes, str, bool]] = deque()
        self._stats: deque[tuple[str, str, float, tuple[str, ...]]] = deque(maxlen=_PENDING_STATS)

    def on_moved(self, key: bytes, tier: str) -> None:
        if not self.events_on:
            return
        with self._lock:
            name = self.names.get(key)
            before = self._where.get(key)
            if name is not None and before != tier:
                self._where[key] = tier
                self._events.append((name, tier, False))
                if before is not None:
                    self._events.append((name, before, True))

    def on_removed(self, key: bytes) -> None:
        if not self.events_on:
            return
        with self._lock:
            name, before = self.names.pop(key, None), self._where.pop(key, None)
            if name is not None and before is not None:
                self._events.append((name, before, True))

    def name(self, key: bytes, engine_key: bytes) -> None:
        if self.events_on:
            with self._lock:
                self.names[key] = engine_key

    def forget_all(self) -> None:
        with self._lock:
            self.names.clear()
            self._where.clear()
            self._events.clear()

    def take_events(self) -> list[tuple[bytes, str, bool]]:
        """(the engine's key, tier, whether removed)."""
        with self._lock:
            events, self._events = list(self._events), deque()
        return events

    def take_stats(self) -> list[tuple[str, str, float, tuple[str, ...]]]:
        out = []
        while self._stats:
            out.append(self._stats.popleft())
        return out

    def _note(self, *what: Any) -> None:
        self._stats.append(what)


engines = Registry[Shared]()
