"""The plane ``nixl``: frames written into the asker's memory by NVIDIA's NIXL, over whatever UCX finds between the two
(InfiniBand, RoCE, shared memory, TCP).

Every worker has an agent; the address is the agent's metadata. An ask is a notification that names a landing block of
the asker, WINDOW slots of a frame each. The holder copies a frame into a block of its own, writes it into a slot, and
NIXL notifies the asker, who gives the slot back when it has taken the frame. Blocks are registered once and used again.

A frame is read out of its slot and proven in its record: a holder that writes into a slot late spoils a frame, no
more.
But UCX lets a peer that has the metadata write to whatever is registered with this agent, and over TCP trusts the
address it is given: use this plane among workers that trust each other.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import ctypes
import importlib
import logging
import secrets
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from dynamo_kvtc.errors import (
    ConfigError,
    MissingDependencyError,
    PeerGoneError,
    TransferError,
    TransferProtocolError,
    TransferTimeoutError,
)
from dynamo_kvtc.transfer import plane
from dynamo_kvtc.transfer.plane import FRAME_BYTES, Answer, Buffer

WINDOW = 8
_BLOCK_BYTES = WINDOW * FRAME_BYTES
_ANSWERS = 64
_REST_SECONDS = 60.0
"""How long a landing block is left alone after its stream broke: a holder may still write into it."""
_IDLE_SECONDS, _BUSY_SECONDS = 2e-3, 5e-5
"""Between two looks for notifications: NIXL has nothing to wait on."""
_ASK, _FRAME, _SLOT = b"A", b"F", b"S"
_STREAM_BYTES = 8
_NUMBERS = struct.Struct("<II")
_LANDING = struct.Struct("<QH")

log = logging.getLogger(__name__)


def _api() -> Any:
    """NIXL's Python. Package ``nixl`` picks the wheel that fits the machine's CUDA, and wants the wheels for all of
    them installed; where it is not, the wheel that is there."""
    for name in ("nixl", "nixl_cu12", "nixl_cu13"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(f"{name}._api")
    raise MissingDependencyError("plane nixl needs NIXL: pip install nixl-cu12 (or nixl-cu13, for CUDA 13)")


class _Block:
    """Registered memory: address of its first byte, and a view."""

    def __init__(self, agent: Any) -> None:
        self.view = memoryview(bytearray(_BLOCK_BYTES))
        self.address = ctypes.addressof((ctypes.c_char * _BLOCK_BYTES).from_buffer(self.view))
        agent.register_memory([(self.address, _BLOCK_BYTES, 0, "")], "DRAM")

    def slot(self, number: int) -> memoryview:
        at = number % WINDOW * FRAME_BYTES
        return self.view[at : at + FRAME_BYTES]


class NixlPlane(plane.Plane):
    name = "nixl"

    def __init__(self) -> None:
        """Raises MissingDependencyError, ConfigError."""
        api = _api()
        try:
            self._agent = api.nixl_agent(
                f"kvtc-{secrets.token_hex(8)}", api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
            )
        except Exception as exc:
            raise ConfigError(f"NIXL's agent cannot be made: {exc}; see UCX_TLS and UCX_NET_DEVICES") from exc
        self._agent_lock = threading.Lock()
        self._lock = threading.Lock()
        self._free: list[_Block] = []
        self._resting: deque[tuple[float, _Block, list[Any]]] = deque()
        self._streams: dict[bytes, _Stream] = {}
        self._senders: dict[bytes, _Sender] = {}
        self._answer: Answer | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="kvtc-nixl", daemon=True)
        self._thread.start()

    def serve(self, answer: Answer) -> str:
        if self._answer is not None:
            raise ConfigError("this plane serves already")
        self._answer = answer
        return base64.b64encode(self._told_metadata()).decode()

    def connect(self, address: str, deadline: float) -> _Stream:
        try:
            peer = self._meet(base64.b64decode(address, validate=True))
        except binascii.Error as exc:
            raise TransferProtocolError(f"address {address[:40]!r} is no metadata of NIXL") from exc
        stream = _Stream(self, peer, self._block())
        with self._lock:
            self._streams[stream.name] = stream
        return stream

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            told: list[_Waiting] = [*self._streams.values(), *self._senders.values()]
        for one in told:
            one.end()
        self._thread.join(2.0)

    # Below: for streams and senders.

    def call(self, what: Callable[[Any], Any], doing: str) -> Any:
        """One thread at a time, and its errors as this package's."""
        try:
            with self._agent_lock:
                return what(self._agent)
        except Exception as exc:
            raise PeerGoneError(f"NIXL: {doing}: {type(exc).__name__}: {exc}") from exc

    def notify(self, peer: str, told: bytes) -> None:
        self.call(lambda agent: agent.send_notif(peer, told), "notifying a peer")

    def look_at(self, handle: Any) -> str:
        """A write's state: "PROC" while it is under way, "DONE" or "ERR"."""
        return self.call(lambda agent: agent.check_xfer_state(handle), "looking at a write")

    def release(self, handle: Any) -> None:
        self.call(lambda agent: agent.release_xfer_handle(handle), "ending a write")

    def done(self, block: _Block, handles: Sequence[Any], broken: bool) -> None:
        """With this block; handles: writes out of it that have not ended."""
        with self._lock:
            if broken or handles:
                self._resting.append((time.monotonic(), block, list(handles)))
            else:
                self._free.append(block)

    def drop(self, name: bytes) -> None:
        with self._lock:
            self._streams.pop(name, None)
            self._senders.pop(name, None)

    def _told_metadata(self) -> bytes:
        """What a peer needs to write into this agent's blocks; grows with them."""
        return self.call(lambda agent: agent.get_agent_metadata(), "this agent's metadata")

    def _meet(self, metadata: bytes) -> str:
        name = self.call(lambda agent: agent.add_remote_agent(metadata), "a peer's metadata")
        return name.decode() if isinstance(name, bytes) else name

    def _block(self) -> _Block:
        with self._lock:
            if self._free:
                return self._free.pop()
            if self._resting and time.monotonic() - self._resting[0][0] > _REST_SECONDS:
                _, block, handles = self._resting.popleft()
                if not any(self._under_way(handle) for handle in handles):
                    return block
                self._resting.append((time.monotonic(), block, handles))
        return self.call(_Block, "registering memory")

    def _under_way(self, handle: Any) -> bool:
        try:
            return self.look_at(handle) == "PROC"
        except PeerGoneError:
            return False

    def _look(self) -> None:
        while not self._closed.is_set():
            try:
                found = self.call(lambda agent: agent.get_new_notifs(), "notifications")
            except PeerGoneError as exc:
                log.warning("transfer: %s", exc)
                found = {}
            for peer, messages in found.items():
                for message in messages:
                    try:
                        self._told(peer.decode() if isinstance(peer, bytes) else peer, message)
                    except (TransferError, struct.error) as exc:
                        log.debug("transfer: a notification of %s: %s", peer, exc)
            time.sleep(_BUSY_SECONDS if found or self._senders or self._streams else _IDLE_SECONDS)

    def _told(self, peer: str, message: bytes) -> None:
        kind, name, rest = message[:1], message[1 : 1 + _STREAM_BYTES], message[1 + _STREAM_BYTES :]
        if kind == _ASK:
            address, size = _LANDING.unpack_from(rest)
            head = _LANDING.size + size
            if self._answer is None or len(rest) < head:
                return
            self._meet(rest[_LANDING.size : head])
            with self._lock:
                if len(self._senders) >= _ANSWERS or self._closed.is_set() or name in self._senders:
                    return
            sender = _Sender(self, peer, name, address, self._block())
            with self._lock:
                self._senders[name] = sender
            threading.Thread(
                target=self._serve, args=(rest[head:], sender), name="kvtc-nixl-answer", daemon=True
            ).start()
            return
        with self._lock:
            one: _Waiting | None = (self._streams if kind == _FRAME else self._senders).get(name)
        if one is not None and one.peer == peer:
            one.told(*_NUMBERS.unpack(rest))

    def _serve(self, frame: bytes, sender: _Sender) -> None:
        assert self._answer is not None
        try:
            self._answer(memoryview(frame), sender)
        except TransferError as exc:
            log.debug("transfer: an answer ended: %s", exc)
        except Exception:
            log.exception("transfer: answering failed")
        finally:
            self.drop(sender.name)
            sender.finish()


Plane = NixlPlane


class _Waiting:
    """A stream or a sender: what the plane's thread tells it."""

    def __init__(self, owner: NixlPlane, peer: str, name: bytes, block: _Block) -> None:
        self.owner, self.peer, self.name, self.block = owner, peer, name, block
        self.changed = threading.Condition()
        self.ended = False

    def told(self, number: int, size: int) -> None:
        raise NotImplementedError

    def end(self) -> None:
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def wait(self, ready: Callable[[], bool], deadline: float, told: str) -> None:
        with self.changed:
            self.changed.wait_for(lambda: ready() or self.ended, max(0.0, deadline - time.monotonic()))
            if self.ended:
                raise PeerGoneError("the stream is closed")
            if not ready():
                raise TransferTimeoutError(told)


class _Sender(_Waiting, plane.Sender):
    frame_bytes = FRAME_BYTES

    def __init__(self, owner: NixlPlane, peer: str, name: bytes, landing: int, block: _Block) -> None:
        super().__init__(owner, peer, name, block)
        self._landing = landing
        self._sent = 0
        self._taken = [True] * WINDOW
        self._writes: list[Any] = [None] * WINDOW

    def told(self, number: int, size: int) -> None:
        with self.changed:
            if number < self._sent and number >= self._sent - WINDOW:
                self._taken[number % WINDOW] = True
                self.changed.notify()

    def send(self, frame: Sequence[Buffer], deadline: float) -> None:
        number, at = self._sent, self._sent % WINDOW
        while True:
            # NIXL notifies of a write when somebody looks whether it has ended.
            self._look_after(range(WINDOW))
            if self._taken[at] and self._writes[at] is None:
                break
            if self.ended:
                raise PeerGoneError("the stream is closed")
            if time.monotonic() > deadline:
                raise TransferTimeoutError(f"frame {number - WINDOW} was not taken in time")
            time.sleep(_BUSY_SECONDS)
        slot, size = self.block.slot(number), 0
        for part in frame:
            slot[size : size + len(part)] = part
            size += len(part)
        with self.changed:
            self._taken[at] = False
            self._sent += 1
        told = _FRAME + self.name + _NUMBERS.pack(number, size)

        def write(agent: Any) -> Any:
            here = agent.get_xfer_descs([(self.block.address + at * FRAME_BYTES, size, 0)], "DRAM")
            there = agent.get_xfer_descs([(self._landing + at * FRAME_BYTES, size, 0)], "DRAM")
            handle = agent.initialize_xfer("WRITE", here, there, self.peer, told)
            self._writes[at] = handle
            return agent.transfer(handle)

        if self.owner.call(write, "writing a frame") == "ERR":
            raise PeerGoneError("NIXL: a frame could not be written")

    def finish(self) -> None:
        """Waits a moment for the last writes; what is still under way keeps its block."""
        until, slots = time.monotonic() + 1.0, range(WINDOW)
        with contextlib.suppress(PeerGoneError):
            while self._look_after(slots) and time.monotonic() < until:
                time.sleep(_BUSY_SECONDS)
        self.owner.done(self.block, [handle for handle in self._writes if handle is not None], False)

    def _look_after(self, slots: Sequence[int]) -> bool:
        """Whether writes are under way."""
        under_way = False
        for at in slots:
            handle = self._writes[at]
            if handle is None:
                continue
            state = self.owner.look_at(handle)
            if state == "PROC":
                under_way = True
                continue
            self._writes[at] = None
            self.owner.release(handle)
            if state == "ERR":
                raise PeerGoneError("NIXL: a frame could not be written")
        return under_way


class _Stream(_Waiting, plane.Stream):
    def __init__(self, owner: NixlPlane, peer: str, block: _Block) -> None:
        super().__init__(owner, peer, secrets.token_bytes(_STREAM_BYTES), block)
        self._frames: deque[tuple[int, int]] = deque()
        self._reading: int | None = None
        self._closed = False

    def told(self, number: int, size: int) -> None:
        with self.changed:
            if size <= FRAME_BYTES and len(self._frames) < 2 * WINDOW:
                self._frames.append((number, size))
                self.changed.notify()

    def ask(self, frame: Buffer, deadline: float) -> None:
        self._give_back()
        # A name of its own for each ask: what is left of the one before finds nobody.
        self.owner.drop(self.name)
        self.name = secrets.token_bytes(_STREAM_BYTES)
        with self.owner._lock:
            self.owner._streams[self.name] = self
        self._frames.clear()
        metadata = self.owner._told_metadata()
        head = _LANDING.pack(self.block.address, len(metadata))
        self.owner.notify(self.peer, b"".join([_ASK, self.name, head, metadata, frame]))

    def receive(self, deadline: float) -> memoryview:
        self._give_back()
        self.wait(lambda: bool(self._frames), deadline, "nothing was written in time")
        number, size = self._frames.popleft()
        self._reading = number
        return self.block.slot(number)[:size]

    def close(self) -> None:
        with self.changed:
            if self._closed:
                return
            self._closed = True
        self.end()
        self.owner.drop(self.name)
        self.owner.done(self.block, [], True)

    def _give_back(self) -> None:
        number, self._reading = self._reading, None
        if number is not None:
            self.owner.notify(self.peer, _SLOT + self.name + _NUMBERS.pack(number, 0))


__all__ = ["NixlPlane", "Plane"]
