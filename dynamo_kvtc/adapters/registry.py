"""How an engine's scheduler side and its worker's side, which share a process, find each other."""

from __future__ import annotations

import threading
from typing import Generic, Protocol, TypeVar

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.tier.tier import Tier


class HasTier(Protocol):
    @property
    def tier(self) -> Tier | None: ...


Sides = TypeVar("Sides", bound=HasTier)


class Registry(Generic[Sides]):
    """What the two sides of each engine share, by the engine's id. Thread-safe."""

    def __init__(self) -> None:
        self._by_engine: dict[str, Sides] = {}
        self._lock = threading.Lock()

    def publish(self, engine_id: str, shared: Sides) -> None:
        """Of the worker, once its tier is open. Raises ConfigError if that engine has one."""
        with self._lock:
            old = self._by_engine.get(engine_id)
            if old is not None and old.tier is not None and not old.tier.closed:
                raise ConfigError(f"engine {engine_id} has a tier already; one worker a process is supported")
            self._by_engine[engine_id] = shared

    def find(self, engine_id: str) -> Sides:
        """Of the scheduler. Raises ConfigError if the worker is in another process."""
        with self._lock:
            shared = self._by_engine.get(engine_id)
        if shared is None:
            raise ConfigError(
                "the scheduler finds no tier in its process: scheduler and worker must share one; set "
                "--distributed-executor-backend uni (one GPU)"
            )
        return shared

    def withdraw(self, engine_id: str, shared: Sides) -> None:
        with self._lock:
            if self._by_engine.get(engine_id) is shared:
                del self._by_engine[engine_id]

    def all(self) -> list[Sides]:
        with self._lock:
            return list(self._by_engine.values())
