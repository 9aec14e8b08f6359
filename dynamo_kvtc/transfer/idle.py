"""Connections that an asker keeps from one ask to the next: a few for each address, and not for long."""

from __future__ import annotations

import threading
import time

from dynamo_kvtc.transfer.plane import Stream

_IDLE_SECONDS, _IDLE_STREAMS = 20.0, 4


class Idle:
    """By plane name and address. Whoever comes here closes what others have left too long: workers come and go, and
    nobody asks again at the address of one that has gone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: dict[tuple[str, str], list[tuple[float, Stream]]] = {}
        self._closed = False

    def take(self, where: tuple[str, str]) -> Stream | None:
        self.sweep()
        with self._lock:
            some = self._streams.get(where)
            if not some:
                return None
            stream = some.pop()[1]
            if not some:
                del self._streams[where]
            return stream

    def keep(self, where: tuple[str, str], stream: Stream) -> None:
        self.sweep()
        with self._lock:
            some = self._streams.get(where, [])
            keep = not self._closed and len(some) < _IDLE_STREAMS
            if keep:
                self._streams[where] = [*some, (time.monotonic(), stream)]
        if not keep:
            stream.close()

    def sweep(self) -> None:
        since = time.monotonic() - _IDLE_SECONDS
        with self._lock:
            old = [stream for some in self._streams.values() for at, stream in some if at <= since]
            if old:
                young = {where: [pair for pair in some if pair[0] > since] for where, some in self._streams.items()}
                self._streams = {where: some for where, some in young.items() if some}
        for stream in old:
            stream.close()

    def close(self) -> None:
        """What is kept from now on is closed at once."""
        with self._lock:
            self._closed = True
            streams = [stream for some in self._streams.values() for _, stream in some]
            self._streams.clear()
        for stream in streams:
            stream.close()
