"""What arrives on a subject, between the connection's thread and whoever takes it: bounded, and never waited for."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

MESSAGE_BYTES = 512
"""What a message costs beside its payload, roughly: so that many small ones are bounded, too."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Message:
    """reply: the subject an answer goes to, "" if none is wanted."""

    subject: str
    data: bytes
    reply: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


class Subscription:
    """Holds what arrived until it is taken, by ``get`` or by a thread of its own that calls back.

    When it is full, what arrives is dropped and counted in ``dropped``: waiting would stop every other subscription of
    the connection. So whoever sends bulk asks for credit first, and whoever sends events numbers them.
    A callback may block, and may use the connection; its failure is logged, counted in ``failed``, and ends nothing.
    """

    def __init__(
        self, subject: str, queue: str, callback: Callable[[Message], None] | None, pending_bytes: int,
        closing: Callable[[Subscription], None],
    ) -> None:  # fmt: skip
        self.subject, self.queue = subject, queue
        self.dropped = self.failed = self.taken = 0
        self._callback, self._pending_bytes, self._closing = callback, pending_bytes, closing
        self._waiting: deque[Message] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        if callback is not None:
            self._thread = threading.Thread(target=self._run, name=f"kvtc-{subject[-24:]}", daemon=True)
            self._thread.start()

    def arrived(self, message: Message) -> None:
        """On the connection's thread; never waits."""
        cost = len(message.data) + MESSAGE_BYTES
        with self._changed:
            if self._closed:
                return
            if self._bytes + cost > self._pending_bytes:
                self.dropped += 1
                return
            self._waiting.append(message)
            self._bytes += cost
            self._changed.notify()

    def get(self, timeout: float) -> Message | None:
        """The next message; None if none comes within timeout seconds, or it was closed."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not self._waiting:
                left = deadline - time.monotonic()
                if self._closed or left <= 0:
                    return None
                self._changed.wait(left)
            message = self._waiting.popleft()
            self._bytes -= len(message.data) + MESSAGE_BYTES
            self.taken += 1
            return message

    def close(self, timeout: float = 5.0) -> bool:
        """Nothing is called back afterwards, unless a callback hangs (False). What waits is forgotten."""
        with self._changed:
            already, self._closed = self._closed, True
            self._waiting.clear()
            self._bytes = 0
            self._changed.notify_all()
        if not already:
            self._closing(self)
        if self._thread is None or self._thread is threading.current_thread():
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        assert self._callback is not None
        while not self._closed:
            message = self.get(3600)
            if message is None:
                continue
            try:
                self._callback(message)
            except Exception:
                self.failed += 1
                log.exception("what arrived on %s was not dealt with", self.subject)
