"""What the scheduler's side and the worker's share: they live in one process and find each other by the engine's id."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Collection
from typing import Any

from dynamo_kvtc.adapters.connector.cluster import Cluster
from dynamo_kvtc.adapters.connector.groups import ONE_GROUP, Groups
from dynamo_kvtc.adapters.connector.loads import Trace
from dynamo_kvtc.adapters.connector.options import ConnectorOptions
from dynamo_kvtc.adapters.connector.router import RouterEvents
from dynamo_kvtc.adapters.registry import Registry
from dynamo_kvtc.tier.metrics import TierMetrics
from dynamo_kvtc.tier.tier import Tier

_PENDING_STATS = 1 << 16
_REFRESH_SECONDS = 1.0


class Node:
    """One engine's tier and its place among the others. ``tier`` and ``cluster`` are set once, by the worker."""

    tier: Tier
    cluster: Cluster | None = None

    def __init__(self, options: ConnectorOptions, events: bool, groups: Groups = ONE_GROUP) -> None:
        self.options, self.groups = options, groups
        self._stats: deque[tuple[str, str, float, tuple[str, ...]]] = deque(maxlen=_PENDING_STATS)
        self.metrics = TierMetrics(sink=lambda *what: self._stats.append(what))
        self.router = RouterEvents(events)
        self.trace = Trace(options.trace)
        self._changed = threading.Condition()
        self._changes = self._looked = 0
        self.loading = 0
        """Requests whose load the worker has begun and not yet told of as ended."""
        self._failed: set[str] = set()
        self._storing: dict[int, str] = {}
        self._numbers = itertools.count()
        self._not_stored: list[tuple[str, int]] = []
        self._waited_for: set[str] = set()
        self._refreshed = 0.0

    def change(self) -> None:
        """Something that a scheduler may be waiting for."""
        with self._changed:
            self._changes += 1
            self._changed.notify_all()

    def wait_change(self, timeout: float) -> None:
        """Until something has changed that the worker has not looked at: what came in between is not waited for."""
        with self._changed:
            self._changed.wait_for(lambda: self._changes != self._looked, timeout)

    def look(self) -> None:
        """The worker is about to see what has changed."""
        with self._changed:
            self._looked = self._changes

    def load_failed(self, request: str) -> None:
        with self._changed:
            self._failed.add(request)

    def take_failed(self) -> set[str]:
        """Requests whose last load did not give all of its blocks."""
        with self._changed:
            failed, self._failed = self._failed, set()
        return failed

    def not_stored(self, request: str, position: int) -> None:
        """Its blocks from this position on were to be stored, and are not."""
        with self._changed:
            self._not_stored.append((request, position))

    def take_not_stored(self) -> list[tuple[str, int]]:
        with self._changed:
            told, self._not_stored = self._not_stored, []
        return told

    # Pages that a store reads must stay what they are: from its order on, for a step may end after the request has.

    def store_ordered(self, request: str) -> int:
        """The order's number."""
        with self._changed:
            number = next(self._numbers)
            self._storing[number] = request
            return number

    def storing(self) -> dict[int, str]:
        """Orders whose pages are read, or will be: number -> request."""
        with self._changed:
            return dict(self._storing)

    def store_freed(self, number: int) -> None:
        with self._changed:
            del self._storing[number]
            self._changed.notify_all()

    def finish(self, request: str) -> bool:
        """Whether its pages are still read: then ``take_freed`` names it when they are not."""
        with self._changed:
            if request not in self._storing.values():
                return False
            self._waited_for.add(request)
            return True

    def take_freed(self) -> set[str]:
        with self._changed:
            freed = self._waited_for.difference(self._storing.values())
            self._waited_for -= freed
        return freed

    def wait_freed(self, orders: Collection[int], timeout: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not any(number in self._storing for number in orders), timeout)

    def take_stats(self) -> list[tuple[str, str, float, tuple[str, ...]]]:
        now = time.monotonic()
        if now - self._refreshed > _REFRESH_SECONDS:
            self._refreshed = now
            self.tier.refresh()
        out: list[Any] = []
        while self._stats:
            out.append(self._stats.popleft())
        return out

    def close(self) -> bool:
        if self.cluster is not None:
            self.cluster.close()
        return self.tier.close(self.options.tier.close_seconds)


engines = Registry[Node]()
