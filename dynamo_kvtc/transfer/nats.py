"""The plane ``nats``: frames as messages through the NATS server. Nothing to configure, and every byte goes through the
server: for short records, and where workers cannot reach each other.

The holder listens at a subject, which is the address. An ask names the asker's inbox; frames go there, numbered, and
each names the subject ``<address>.credit.<ask>`` where the asker says up to which number it has taken them. No more
than WINDOW are under way: what is not credited in time ends the answer, and its leases. A frame that got lost holds up
nothing but itself.
"""

from __future__ import annotations

import itertools
import logging
import struct
import threading
import time
from collections.abc import Sequence

from dynamo_kvtc.errors import (
    ConfigError,
    NatsError,
    NatsTimeoutError,
    PeerGoneError,
    TransferError,
    TransferProtocolError,
    TransferTimeoutError,
)
from dynamo_kvtc.events.inbox import Message, Subscription
from dynamo_kvtc.events.nats import Nats
from dynamo_kvtc.transfer import plane
from dynamo_kvtc.transfer.plane import FRAME_BYTES, Answer, Buffer

WINDOW = 8
"""Frames sent and not credited, of one answer."""
_ANSWERS = 64
_NUMBER = struct.Struct("<I")
_LOOK_SECONDS = 0.1
"""How often a stream that waits looks whether the connection is still the one it asked on."""

log = logging.getLogger(__name__)


class NatsPlane(plane.Plane):
    name = "nats"

    def __init__(self, nats: Nats, subject: str, owned: bool = False) -> None:
        """subject: this worker's own, for asks: the namespace, the model key and the worker's id should be in it.
        owned: the connection is closed with the plane; otherwise it stays the caller's."""
        self._nats, self._subject, self._owned = nats, subject, owned
        self._subscriptions: list[Subscription] = []
        self._answers: dict[str, _Sender] = {}
        self._names = itertools.count()
        self._lock = threading.Lock()
        self._closed = False

    @property
    def frame_bytes(self) -> int:
        return min(FRAME_BYTES, self._nats.max_payload - 256)

    def serve(self, answer: Answer) -> str:
        if self._subscriptions:
            raise ConfigError("this plane serves already")

        def asked(message: Message) -> None:
            with self._lock:
                if self._closed or not message.reply or len(self._answers) >= _ANSWERS:
                    return
                name = f"{next(self._names)}"
                sender = _Sender(self._nats, message.reply, f"{self._subject}.credit.{name}", self.frame_bytes)
                self._answers[name] = sender
            threading.Thread(
                target=self._serve, args=(answer, message, sender, name), name="kvtc-nats-answer", daemon=True
            ).start()

        def credited(message: Message) -> None:
            with self._lock:
                sender = self._answers.get(message.subject.rpartition(".")[2])
            if sender is not None and len(message.data) == _NUMBER.size:
                sender.credited(_NUMBER.unpack(message.data)[0])

        try:
            self._subscriptions.append(self._nats.subscribe(f"{self._subject}.credit.*", credited))
            self._subscriptions.append(self._nats.subscribe(self._subject, asked))
        except NatsError as exc:
            raise PeerGoneError(f"serving at {self._subject}: {exc}") from exc
        return self._subject

    def connect(self, address: str, deadline: float) -> _Stream:
        inbox = self._nats.new_inbox()
        try:
            room = 2 * WINDOW * (self.frame_bytes + 1024)
            got = self._nats.subscribe(inbox, pending_bytes=room, timeout=max(0.0, deadline - time.monotonic()))
        except NatsError as exc:
            raise _told(exc, "subscribing to an inbox") from exc
        return _Stream(self._nats, address, inbox, got)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            answers = list(self._answers.values())
        for sender in answers:
            sender.end()
        for subscription in self._subscriptions:
            subscription.close(1.0)
        if self._owned:
            self._nats.close(1.0)

    def _serve(self, answer: Answer, message: Message, sender: _Sender, name: str) -> None:
        try:
            answer(memoryview(message.data), sender)
        except TransferError as exc:
            log.debug("transfer: an answer ended: %s", exc)
        except Exception:
            log.exception("transfer: answering failed")
        finally:
            with self._lock:
                self._answers.pop(name, None)


Plane = NatsPlane


class _Sender(plane.Sender):
    def __init__(self, nats: Nats, inbox: str, credit: str, frame_bytes: int) -> None:
        self.frame_bytes = frame_bytes
        self._nats, self._inbox, self._credit = nats, inbox, credit
        self._sent = self._taken = 0
        self._changed = threading.Condition()
        self._ended = False

    def send(self, frame: Sequence[Buffer], deadline: float) -> None:
        with self._changed:
            while self._sent - self._taken >= WINDOW:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TransferTimeoutError(f"the asker took nothing after frame {self._taken}")
                if self._ended:
                    break
                self._changed.wait(left)
            if self._ended:
                raise PeerGoneError("this plane was closed")
        told = b"".join([_NUMBER.pack(self._sent), *frame])
        self._sent += 1
        try:
            if self._nats.publish(self._inbox, told, self._credit, timeout=max(0.0, deadline - time.monotonic())):
                return
        except NatsError as exc:
            raise PeerGoneError(f"sending a frame of {len(told)} bytes: {exc}") from exc
        raise TransferTimeoutError("NATS took no frame in time")

    def credited(self, taken: int) -> None:
        with self._changed:
            if self._taken < taken <= self._sent:
                self._taken = taken
                self._changed.notify()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()


class _Stream(plane.Stream):
    def __init__(self, nats: Nats, address: str, inbox: str, got: Subscription) -> None:
        self._nats, self._address, self._inbox, self._got = nats, address, inbox, got
        self._connects = nats.connects
        self._closed = False

    def ask(self, frame: Buffer, deadline: float) -> None:
        self._connects = self._nats.connects
        try:
            left = max(0.0, deadline - time.monotonic())
            if self._nats.publish(self._address, bytes(frame), self._inbox, timeout=left):
                return
        except NatsError as exc:
            raise _told(exc, "asking") from exc
        raise TransferTimeoutError("NATS took no ask in time")

    def receive(self, deadline: float) -> memoryview:
        message = None
        while message is None:
            left = deadline - time.monotonic()
            if self._closed:
                raise PeerGoneError("the stream is closed")
            if left <= 0:
                raise TransferTimeoutError(f"nothing came from {self._address} in time")
            if self._nats.connects != self._connects:
                raise PeerGoneError("the connection to NATS was lost, and what was on its way with it")
            message = self._got.get(min(left, _LOOK_SECONDS))
        if message.headers.get("Status") == "503":
            raise PeerGoneError(f"nobody serves {self._address}")
        if len(message.data) < _NUMBER.size:
            raise TransferProtocolError(f"a frame of {len(message.data)} bytes on {self._address}")
        # Nobody but the holder is told, whatever the frame says.
        if message.reply.startswith(f"{self._address}.credit."):
            number = _NUMBER.unpack_from(message.data)[0]
            self._nats.publish(message.reply, _NUMBER.pack((number + 1) & 0xFFFFFFFF))
        return memoryview(message.data)[_NUMBER.size :]

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._got.close(0.5)


def _told(exc: NatsError, doing: str) -> TransferError:
    kind = TransferTimeoutError if isinstance(exc, NatsTimeoutError) else PeerGoneError
    return kind(f"{doing}: {exc}")


__all__ = ["NatsPlane", "Plane"]
