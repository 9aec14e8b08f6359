"""Which blocks the tier holds, by the engine's own names: for vLLM's KV events, and so for Dynamo's router."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from dataclasses import dataclass

MAX_NAMES = 1 << 18
"""Blocks whose tokens are remembered; of the oldest beyond that no event tells."""


@dataclass(frozen=True)
class Named:
    """The engine's hash of a block and of the one before it (None: it is the first), and its tokens."""

    block_hash: bytes
    parent: bytes | None
    tokens: tuple[int, ...]


class RouterEvents:
    """Thread-safe. ``on`` is whether anybody asks: otherwise nothing is remembered."""

    def __init__(self, on: bool) -> None:
        self.on = on
        self._lock = threading.Lock()
        self._names: OrderedDict[bytes, Named] = OrderedDict()
        self._where: dict[bytes, str] = {}
        self._events: deque[tuple[Named, str, bool]] = deque()

    def name(self, key: bytes, named: Named) -> None:
        with self._lock:
            self._names[key] = named
            self._names.move_to_end(key)
            if len(self._names) > MAX_NAMES:
                # What the router would not be told of any more must be gone for it now.
                old, forgotten = self._names.popitem(last=False)
                before = self._where.pop(old, None)
                if before is not None:
                    self._events.append((forgotten, before, True))

    def moved(self, key: bytes, tier: str) -> None:
        """As ``TieredStore`` tells it."""
        with self._lock:
            named = self._names.get(key) if self.on else None
            before = self._where.get(key)
            if named is not None and before != tier:
                self._where[key] = tier
                self._events.append((named, tier, False))
                if before is not None:
                    self._events.append((named, before, True))

    def removed(self, key: bytes) -> None:
        with self._lock:
            named, before = self._names.pop(key, None), self._where.pop(key, None)
            if named is not None and before is not None:
                self._events.append((named, before, True))

    def forget(self) -> None:
        with self._lock:
            self._events.extend((self._names[key], tier, True) for key, tier in self._where.items())
            self._names.clear()
            self._where.clear()

    def take(self) -> list[tuple[Named, str, bool]]:
        """(block, tier, whether it is gone from there)."""
        with self._lock:
            events, self._events = list(self._events), deque()
        return events
