"""Reads that have a deadline: a few threads that may hang on a bad disk in the caller's place.

The threads are daemons and not concurrent.futures' pool, which waits for its threads when the interpreter ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

log = logging.getLogger(__name__)


class _Job:
    """``ended`` is a lock that is held until the call has ended: cheaper to wait for than an event."""

    __slots__ = ("abandoned", "call", "ended", "over")

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call
        self.ended = threading.Lock()
        self.ended.acquire()
        self.over = self.abandoned = False


class Readers:
    def __init__(self, threads: int) -> None:
        self._work: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._run, daemon=True, name="kvtc-read") for _ in range(threads)]
        self._lock = threading.Lock()
        self._late = 0
        for thread in self._threads:
            thread.start()

    def __len__(self) -> int:
        return len(self._threads)

    @property
    def stuck(self) -> bool:
        """As many calls as there are threads have not ended in time, nor since: another would only wait."""
        return self._late >= len(self._threads)

    def run(self, calls: Sequence[Callable[[], None]], deadline: float) -> bool:
        """Side by side; True once all have ended. Past the deadline (monotonic seconds) False: they still may run."""
        jobs = [_Job(call) for call in calls]
        for job in jobs:
            self._work.put(job)
        in_time = True
        for job in jobs:
            if not job.ended.acquire(timeout=max(0.0, deadline - time.monotonic())):
                with self._lock:
                    if not job.over:
                        job.abandoned, in_time = True, False
                        self._late += 1
        return in_time

    def close(self, deadline: float) -> bool:
        """Whether all threads ended in time."""
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while (job := self._work.get()) is not None:
            try:
                job.call()
            except Exception:
                log.exception("a read failed")
            with self._lock:
                job.over = True
                self._late -= job.abandoned
            job.ended.release()
