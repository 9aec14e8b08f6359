"""What carries frames from a holder to an asker. To add one: the three classes below, and a line in ``PLANES``.

A worker advertises, for each plane it has, an address that only that plane reads. An asker takes the first of its own
planes that the holder has, too, and that connects: one that does not, such as ``tcp`` at an address of the holder's own
machine, comes last with that holder for a while. A plane knows nothing of records; everything it waits for has a
deadline, in seconds of ``time.monotonic``, and everything it raises is a TransferError.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

Buffer = bytes | bytearray | memoryview
FRAME_BYTES = 256 << 10
"""Of a frame, where the plane has no smaller limit."""
MAX_FRAME_BYTES = 1 << 20
"""Beyond it a frame is refused before there is memory for it."""

PLANES = {"tcp": "dynamo_kvtc.transfer.tcp", "nats": "dynamo_kvtc.transfer.nats", "nixl": "dynamo_kvtc.transfer.nixl"}
"""Name -> module; each has a ``Plane`` with the name in its ``name``."""


class Sender(ABC):
    """The holder's end of one ask. frame_bytes: what a frame may have at most."""

    frame_bytes: int

    @abstractmethod
    def send(self, frame: Sequence[Buffer], deadline: float) -> None:
        """The parts, one after another, are a frame; they may change once this returns.

        Waits while the asker takes nothing. Raises TransferTimeoutError at the deadline, PeerGoneError.
        """


Answer = Callable[[memoryview, Sender], None]
"""Called with an ask's frame, on a thread of its own; what it raises ends the connection."""


class Stream(ABC):
    """The asker's end: an ask, its frames up to the last, perhaps another ask. One thread at a time; ``close`` from
    any."""

    @abstractmethod
    def ask(self, frame: Buffer, deadline: float) -> None:
        """Raises TransferTimeoutError, PeerGoneError."""

    @abstractmethod
    def receive(self, deadline: float) -> memoryview:
        """The next frame; it is overwritten by the next call. Raises TransferTimeoutError, PeerGoneError,
        TransferProtocolError; after each of them the stream is to be closed."""

    @abstractmethod
    def close(self) -> None:
        """Again is no error. A ``receive`` that waits ends soon."""


class Plane(ABC):
    """One way between workers. Both sides in one object: a worker is usually holder and asker."""

    name: ClassVar[str]

    @property
    def frame_bytes(self) -> int:
        """What a frame may have at most."""
        return FRAME_BYTES

    @abstractmethod
    def serve(self, answer: Answer) -> str:
        """From now on asks are answered, until ``close``; the address for askers. Once."""

    @abstractmethod
    def connect(self, address: str, deadline: float) -> Stream:
        """Raises PeerGoneError, TransferTimeoutError, TransferRefusedError, TransferProtocolError."""

    @abstractmethod
    def close(self) -> None:
        """Ends all streams and answers, within a second or so. Again is no error."""
