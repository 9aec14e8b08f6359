"""A thread with a bounded queue: work beside the engine, never in front of it. Nothing waits to be let in."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)


@dataclass
class _Job:
    run: Callable[[float], None]
    fail: Callable[[BaseException], None]
    cost: int
    born: float
    deadline: float | None


class Closed(Exception):
    """The lane ended before the job's turn came."""


class TooLate(Exception):
    """The job's deadline passed before its turn came."""


class Lane:
    """Jobs in order, one at a time. A job that raises fails, and the next one runs."""

    def __init__(self, name: str, limit: int) -> None:
        """limit: of the costs that wait and run together; a single job above it is let in when nothing else is."""
        self._limit = limit
        self._lock = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._cost = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"kvtc-{name}")
        self._thread.start()

    @property
    def waiting_cost(self) -> int:
        with self._lock:
            return self._cost

    def has_room(self, cost: int) -> bool:
        with self._lock:
            return not self._closing and (not self._cost or self._cost + cost <= self._limit)

    def put(
        self, run: Callable[[float], None], fail: Callable[[BaseException], None], cost: int = 0,
        deadline: float | None = None,
    ) -> bool:  # fmt: skip
        """False if refused: full or closed; then neither is called. run(seconds it waited); fail(why) if run raises,
        the deadline (monotonic seconds) has passed, or the lane ends first."""
        with self._lock:
            if self._closing or (self._cost and self._cost + cost > self._limit):
                return False
            self._cost += cost
            self._jobs.append(_Job(run, fail, cost, time.monotonic(), deadline))
            self._lock.notify_all()
            return True

    def idle(self, timeout: float) -> bool:
        """Waits until nothing waits or runs."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._jobs and not self._running, timeout)

    def close(self, timeout: float) -> bool:
        """Runs what waits until the timeout (seconds), fails the rest. False if a job hangs: its thread is left
        behind, and whoever waits for it must not."""
        deadline = time.monotonic() + timeout
        with self._lock:
            self._closing = True
            self._lock.notify_all()
            self._lock.wait_for(lambda: not self._jobs and not self._running, timeout)
            dropped, self._jobs = list(self._jobs), deque()
            self._cost -= sum(job.cost for job in dropped)
        for job in dropped:
            self._failed(job, Closed())
        self._thread.join(max(0.0, deadline - time.monotonic()) + 0.05)
        return not self._thread.is_alive() and not dropped

    _running = False

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._jobs or self._closing)
                if not self._jobs:
                    return
                job = self._jobs.popleft()
                self._running = True
            try:
                now = time.monotonic()
                if job.deadline is not None and now > job.deadline:
                    raise TooLate(f"waited {now - job.born:.3f} s")
                job.run(now - job.born)
            except BaseException as exc:
                self._failed(job, exc)
            finally:
                with self._lock:
                    self._running = False
                    self._cost -= job.cost
                    self._lock.notify_all()

    def _failed(self, job: _Job, why: BaseException) -> None:
        try:
            job.fail(why)
        except Exception:
            log.exception("a job's failure could not be told")


def safely(told: Callable[..., None] | None) -> Callable[..., None]:
    """A callback whose own failure is not taken for that of the work it is told of."""

    def call(*what: Any) -> None:
        if told is not None:
            try:
                told(*what)
            except Exception:
                log.exception("a callback failed")

    return call
