"""Bytes that may be out at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Budget:
    """Whoever waits is served in turn, so that a large wish is not passed by small ones for ever."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.peak_bytes = 0
        self._taken = 0
        self._changed = threading.Condition()
        self._queue: list[object] = []

    @property
    def taken_bytes(self) -> int:
        return self._taken

    def try_take(self, nbytes: int) -> bool:
        with self._changed:
            if self._queue or self._taken + nbytes > self.limit_bytes:
                return False
            self._took(nbytes)
            return True

    def take(self, nbytes: int, deadline: float, over: Callable[[], bool] = lambda: False) -> bool:
        """False if there is no room before the deadline, or ``over()`` says that nobody wants it any more (looked at
        whenever something changes; ``wake``)."""
        if nbytes > self.limit_bytes:
            return False
        me = object()
        with self._changed:
            self._queue.append(me)
            try:
                while self._queue[0] is not me or self._taken + nbytes > self.limit_bytes:
                    left = deadline - time.monotonic()
                    if left <= 0 or over():
                        return False
                    self._changed.wait(left)
                self._took(nbytes)
                return True
            finally:
                self._queue.remove(me)
                self._changed.notify_all()

    def give(self, nbytes: int) -> None:
        if nbytes:
            with self._changed:
                self._taken -= nbytes
                self._changed.notify_all()

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _took(self, nbytes: int) -> None:
        self._taken += nbytes
        self.peak_bytes = max(self.peak_bytes, self._taken)
