"""The plane ``tcp``: a connection from asker to holder, frames with their length in front. Direct, and the fastest.

A connection begins with the holder's greeting, and if there is a shared token, with a proof from either side that it
has it: HMAC-SHA256 over both sides' random numbers, so the token itself never travels. That keeps strangers out, not
somebody who can change what is on the wire: for that there is TLS. The records' checksums find accidents on the way.

Addresses are numbers, never names: looking up a name has no deadline.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import logging
import secrets
import socket
import ssl
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamo_kvtc.errors import (
    ConfigError,
    PeerGoneError,
    TransferError,
    TransferProtocolError,
    TransferRefusedError,
    TransferTimeoutError,
)
from dynamo_kvtc.transfer import plane
from dynamo_kvtc.transfer.plane import FRAME_BYTES, MAX_FRAME_BYTES, Answer, Buffer

_GREETING = b"KVTC-TCP\x01"
_NONCE_BYTES = 32
_GREET_SECONDS = 2.0
_REST_SECONDS, _YIELD_SECONDS = 60.0, 1.0
"""How long a connection may rest between asks; and before it gives way to a new one where there are too many."""
_LENGTH = struct.Struct("<I")
_TIME = struct.Struct("@ll")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TcpOptions:
    """host: a number, of the interface to listen on; port: 0 for any that is free. advertise: the number that others
    reach this worker by, if it is another. token_file: what all workers share, at least 16 bytes. tls_cert, tls_key,
    tls_ca: files; all three, or none: every worker shows a certificate of that authority, and wants one."""

    host: str = "127.0.0.1"
    port: int = 0
    advertise: str | None = None
    token_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None
    connections: int = 256

    def __post_init__(self) -> None:
        for name in ("host", "advertise"):
            value = getattr(self, name)
            if value is not None:
                _number(value, name)
        if self.advertise is None and ipaddress.ip_address(self.host).is_unspecified:
            raise ConfigError(f"host is {self.host}, which nobody can be reached by: set advertise to its own")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port is {self.port}; it must be 0 to 65535")
        if self.connections < 1:
            raise ConfigError(f"connections is {self.connections}; it must be at least 1")
        if len({bool(f) for f in (self.tls_cert, self.tls_key, self.tls_ca)}) > 1:
            raise ConfigError("tls_cert, tls_key and tls_ca go together; set all or none")


class TcpPlane(plane.Plane):
    name = "tcp"

    def __init__(self, options: TcpOptions | None = None) -> None:
        """Raises ConfigError."""
        self._options = options or TcpOptions()
        self._token = _token(self._options.token_file)
        self._contexts = _contexts(self._options)
        self._listener: socket.socket | None = None
        self._lock = threading.Lock()
        self._inward: set[socket.socket] = set()
        self._resting: dict[socket.socket, float] = {}
        self._outward: set[socket.socket] = set()
        self._closed = False

    def serve(self, answer: Answer) -> str:
        if self._listener is not None:
            raise ConfigError("this plane serves already")
        o = self._options
        family = socket.AF_INET6 if ":" in o.host else socket.AF_INET
        try:
            self._listener = socket.create_server((o.host, o.port), family=family, backlog=128)
        except OSError as exc:
            raise ConfigError(f"host {o.host}, port {o.port} cannot be listened on: {exc}") from exc
        threading.Thread(target=self._accept, args=(answer,), name="kvtc-tcp-accept", daemon=True).start()
        port = self._listener.getsockname()[1]
        host = o.advertise or o.host
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def connect(self, address: str, deadline: float) -> _Stream:
        host, _, port = address.rpartition(":")
        try:
            where = (str(ipaddress.ip_address(host.strip("[]"))), int(port))
        except ValueError as exc:
            raise TransferProtocolError(f"address {address!r} is no number and port") from exc
        try:
            made = socket.create_connection(where, _left(deadline))
        except OSError as exc:
            raise _told(exc, f"connecting to {address}") from exc
        try:
            if self._contexts is not None:
                with _translated(f"TLS with {address}"):
                    made.settimeout(_left(deadline))
                    made = self._contexts[1].wrap_socket(made)
            _set_up(made)
            line = _Line(made)
            _greet(line, self._token, False, deadline)
        except BaseException:
            made.close()
            raise
        with self._lock:
            self._outward.add(made)
        return _Stream(line, self._forget)

    def close(self) -> None:
        self._closed = True
        if self._listener is not None:
            _shut(self._listener)
        with self._lock:
            sockets = [*self._inward, *self._outward]
        for one in sockets:
            _shut(one)

    def _accept(self, answer: Answer) -> None:
        assert self._listener is not None
        while True:
            try:
                made, _ = self._listener.accept()
            except OSError as exc:
                if self._closed:
                    self._listener.close()
                    return
                log.warning("transfer: accepting a connection: %s", exc)
                time.sleep(0.05)
                continue
            with self._lock:
                full = len(self._inward) >= self._options.connections and not self._yielded()
                if not full and not self._closed:
                    self._inward.add(made)
            if full or self._closed:
                made.close()
                continue
            threading.Thread(target=self._serve, args=(made, answer), name="kvtc-tcp", daemon=True).start()

    def _yielded(self) -> bool:
        """Under the lock: whether the connection that rests longest has been ended, for a new one; its asker connects
        again."""
        one, since = next(iter(self._resting.items()), (None, 0.0))
        if one is None or time.monotonic() - since < _YIELD_SECONDS:
            return False
        del self._resting[one]
        self._inward.discard(one)
        _shut(one)
        return True

    def _serve(self, raw: socket.socket, answer: Answer) -> None:
        made = raw
        try:
            _set_up(made)
            if self._contexts is not None:
                with _translated("TLS with an asker"):
                    made.settimeout(_GREET_SECONDS)
                    made = self._contexts[0].wrap_socket(made, server_side=True)
                with self._lock:
                    self._inward.discard(raw)  # its descriptor is the new one's now
                    self._inward.add(made)
            line = _Line(made)
            _greet(line, self._token, True, time.monotonic() + _GREET_SECONDS)
            while not self._closed:
                with self._lock:
                    self._resting[made] = time.monotonic()
                frame = line.receive(None)
                with self._lock:
                    self._resting.pop(made, None)
                answer(frame, line)
        except TransferError as exc:
            log.debug("transfer: a connection ended: %s", exc)
        except Exception:
            if not self._closed:
                log.exception("transfer: answering failed")
        finally:
            self._forget(raw)
            self._forget(made)

    def _forget(self, one: socket.socket) -> None:
        with self._lock:
            self._inward.discard(one)
            self._outward.discard(one)
            self._resting.pop(one, None)
        one.close()


Plane = TcpPlane


class _Line(plane.Sender):
    """A socket that carries frames. Its buffer grows to the largest frame that came, at most MAX_FRAME_BYTES.

    A plain socket blocks in the kernel, which minds the deadline: one call a frame. Python's own timeouts would take
    a call for each stretch that is there, and a thread waits up to 5 ms for the interpreter after every one.
    """

    frame_bytes = FRAME_BYTES

    def __init__(self, made: socket.socket) -> None:
        self.socket = made
        self._tls = isinstance(made, ssl.SSLSocket)
        if not self._tls:
            made.settimeout(None)
        self._buffer = bytearray(_LENGTH.size)

    def send(self, frame: Sequence[Buffer], deadline: float | None) -> None:
        parts = [memoryview(part) for part in frame if len(part)]
        parts.insert(0, memoryview(_LENGTH.pack(sum(map(len, parts)))))
        if self._tls:
            parts = [memoryview(b"".join(parts))]
        with _translated("sending"):
            while parts:
                self._mind(socket.SO_SNDTIMEO, deadline)
                sent = self.socket.send(parts[0]) if self._tls else self.socket.sendmsg(parts[:_PARTS])
                while parts and sent >= len(parts[0]):
                    sent -= len(parts.pop(0))
                if sent:
                    parts[0] = parts[0][sent:]

    def receive(self, deadline: float | None) -> memoryview:
        """deadline None: _REST_SECONDS until a frame begins, _GREET_SECONDS for the rest."""
        begin = deadline if deadline is not None else time.monotonic() + _REST_SECONDS
        self._fill(memoryview(self._buffer)[: _LENGTH.size], begin)
        size = _LENGTH.unpack_from(self._buffer)[0]
        if size > MAX_FRAME_BYTES:
            raise TransferProtocolError(f"a frame of {size} bytes; it has at most {MAX_FRAME_BYTES}")
        if size > len(self._buffer):
            self._buffer = bytearray(size)
        frame = memoryview(self._buffer)[:size]
        self._fill(frame, deadline if deadline is not None else time.monotonic() + _GREET_SECONDS)
        return frame

    def _mind(self, option: int, deadline: float | None) -> None:
        left = _left(deadline)
        if self._tls:
            self.socket.settimeout(left)
        else:
            microseconds = 0 if left is None else max(1, int(1e6 * left))
            self.socket.setsockopt(socket.SOL_SOCKET, option, _TIME.pack(*divmod(microseconds, 1_000_000)))

    def _fill(self, part: memoryview, deadline: float | None) -> None:
        with _translated("receiving"):
            while len(part):
                self._mind(socket.SO_RCVTIMEO, deadline)
                got = self.socket.recv_into(part, 0, 0 if self._tls else socket.MSG_WAITALL)
                if not got:
                    raise PeerGoneError("the other side closed the connection")
                part = part[got:]


_PARTS = 512
"""Buffers that one system call takes; Linux allows 1,024."""


class _Stream(plane.Stream):
    def __init__(self, line: _Line, forget) -> None:
        self._line, self._forget, self._waiting = line, forget, False

    def ask(self, frame: Buffer, deadline: float) -> None:
        self._waiting = True
        try:
            self._line.send([frame], deadline)
        finally:
            self._waiting = False

    def receive(self, deadline: float) -> memoryview:
        self._waiting = True
        try:
            return self._line.receive(deadline)
        finally:
            self._waiting = False

    def close(self) -> None:
        _shut(self._line.socket)
        if self._waiting:
            return  # in another thread, which is woken, and closes it
        self._forget(self._line.socket)


def _greet(line: _Line, token: bytes, holder: bool, deadline: float) -> None:
    """Both send a random number; then the asker proves first, so that a stranger learns nothing from a holder."""
    mine = secrets.token_bytes(_NONCE_BYTES)
    line.send([_GREETING, b"\1" if token else b"\0", mine], deadline)
    theirs = bytes(line.receive(deadline))
    head = len(_GREETING)
    if len(theirs) != head + 1 + _NONCE_BYTES or theirs[:head] != _GREETING:
        raise TransferProtocolError(f"the other side greets with {theirs[:16]!r}; this release with {_GREETING!r}")
    if bool(theirs[head]) != bool(token):
        raise TransferRefusedError(
            f"the other side has {'a' if theirs[head] else 'no'} token, this one {'a' if token else 'no'}: set "
            "token_file on all workers, or on none"
        )
    if not token:
        return
    both = (mine + theirs[head + 1 :]) if holder else (theirs[head + 1 :] + mine)

    def proof(side: bytes) -> bytes:
        return hmac.digest(token, _GREETING + side + both, "sha256")

    if not holder:
        line.send([proof(b"asker")], deadline)
    if not hmac.compare_digest(bytes(line.receive(deadline)), proof(b"asker" if holder else b"holder")):
        raise TransferRefusedError("the other side has another token; set the same token_file on all workers")
    if holder:
        line.send([proof(b"holder")], deadline)


def _token(path: str | None) -> bytes:
    if path is None:
        return b""
    try:
        token = Path(path).read_bytes().strip()
    except OSError as exc:
        raise ConfigError(f"token_file {path!r} cannot be read: {exc}") from exc
    if not 16 <= len(token) <= 4096:
        raise ConfigError(f"token_file {path!r} has {len(token)} bytes; it must have 16 to 4096: openssl rand -hex 32")
    return token


def _contexts(options: TcpOptions) -> tuple[ssl.SSLContext, ssl.SSLContext] | None:
    """The holder's and the asker's. Names are not compared: workers are known by their authority."""
    if options.tls_cert is None:
        return None
    out = []
    for protocol in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
        context = ssl.SSLContext(protocol)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            context.load_cert_chain(options.tls_cert, options.tls_key)
            context.load_verify_locations(options.tls_ca)
        except (OSError, ssl.SSLError) as exc:
            raise ConfigError(f"tls_cert, tls_key or tls_ca cannot be used: {exc}") from exc
        out.append(context)
    return out[0], out[1]


def _number(value: str, name: str) -> None:
    try:
        ipaddress.ip_address(value)
    except ValueError as exc:
        raise ConfigError(f"{name} is {value!r}; it must be an address in numbers, such as 10.0.0.7") from exc


def _left(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TransferTimeoutError("the time is over")
    return left


class _translated(contextlib.AbstractContextManager[None]):
    """Errors of sockets as this package's."""

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __exit__(self, kind, value, trace) -> None:
        if isinstance(value, OSError):
            raise _told(value, self._doing) from value
        if isinstance(value, ValueError) and not isinstance(value, TransferError):
            raise PeerGoneError(f"{self._doing}: {value}") from value


def _told(exc: OSError, doing: str) -> TransferError:
    if isinstance(exc, TimeoutError | BlockingIOError):
        return TransferTimeoutError(f"{doing}: not in time")
    return PeerGoneError(f"{doing}: {exc}")


def _set_up(made: socket.socket) -> None:
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _shut(one: socket.socket) -> None:
    """Whoever waits for it, in another thread, is woken, and closes it. (An SSLSocket's own shutdown would make it a
    plain one under that thread.)"""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(one, socket.SHUT_RDWR)


__all__ = ["Plane", "TcpOptions", "TcpPlane"]
