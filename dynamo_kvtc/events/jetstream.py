"""What stays on the server: streams of messages, and buckets of last values. Over requests alone.

JetStream's interface is JSON on subjects, so it needs no more than the door's ``request`` and ``subscribe``, and a
server's permissions can be written down by subject. Whoever may not create a stream or bucket can use one that exists.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dynamo_kvtc.errors import ConfigError, NatsError, NatsRefusedError, NatsTimeoutError, NatsUnavailableError
from dynamo_kvtc.events.inbox import Message, Subscription
from dynamo_kvtc.events.nats import Nats

BATCH = 256
BATCH_BYTES = 16 << 20
IDLE_SECONDS = 5
"""How long the server keeps a reader's place after its last question."""
_NAME_TAKEN = 10058
_NO_STREAM = 10059
_NS = 1_000_000_000
_NAME = re.compile(r"[A-Za-z0-9_-]{1,200}")


@dataclass(frozen=True)
class Limits:
    """Of a stream: the oldest messages go. age_seconds: 0, no limit."""

    bytes: int = 256 << 20
    messages: int = 1_000_000
    age_seconds: float = 3600.0
    storage: str = "file"
    replicas: int = 1


@dataclass(frozen=True, slots=True)
class Kept:
    """A message in a stream. sequence: of the stream, from 1, without gaps but for what went."""

    sequence: int
    subject: str
    data: bytes
    removed: bool = False


class Stream:
    """limits: None, only to read one that exists."""

    def __init__(self, nats: Nats, name: str, subjects: list[str], limits: Limits | None) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"a stream's name is {name!r}; it must be 1 to 200 letters, digits, - or _")
        self.nats, self.name, self.subjects, self.limits = nats, name, subjects, limits
        self._more: dict[str, Any] = {}
        self._ensured = -1

    def ensure(self, timeout: float = 5.0) -> None:
        """Creates it if it is not there; one that is there stays as it is, for its operator may have chosen its limits.
        Raises NatsError."""
        limits, connection = self.limits, self.nats.connects
        if limits is None:
            return
        # The server remembers identities of messages, to drop repeats, no longer than the messages.
        window = min(120.0, limits.age_seconds or 120.0)
        config = {
            "name": self.name, "subjects": self.subjects, "retention": "limits", "discard": "old",
            "max_bytes": limits.bytes, "max_msgs": limits.messages, "max_age": int(limits.age_seconds * _NS),
            "storage": limits.storage, "num_replicas": limits.replicas, "duplicate_window": int(window * _NS),
            "allow_direct": True,
        }  # fmt: skip
        try:
            self._api(f"STREAM.CREATE.{self.name}", config | self._more, timeout)
        except NatsRefusedError as exc:
            # Who may not create one uses the one that its operator made.
            if f"({_NAME_TAKEN})" not in str(exc) and "permissions violation" not in str(exc).lower():
                raise
        self._ensured = connection

    def info(self, timeout: float = 5.0) -> dict[str, int] | None:
        """first_seq, last_seq, messages and bytes; None if it does not exist."""
        try:
            return dict(self._api(f"STREAM.INFO.{self.name}", None, timeout)["state"])
        except NatsRefusedError as exc:
            if f"({_NO_STREAM})" in str(exc):
                return None
            raise

    def publish(
        self, subject: str, payload: bytes, identity: str = "", timeout: float = 5.0,
        headers: dict[str, str] | None = None,
    ) -> int:  # fmt: skip
        """Its sequence, once the server has it. identity: repeats within two minutes are kept once. NatsError."""
        told = dict(headers or {})
        if identity:
            told["Nats-Msg-Id"] = identity
        deadline = time.monotonic() + timeout
        # A server that restarted may have lost the stream, and who else subscribes to the subject keeps that silent.
        if self._ensured != self.nats.connects:
            self.ensure(timeout)
        try:
            answer = self.nats.request(subject, payload, max(0.05, deadline - time.monotonic()), told or None)
        except (NatsTimeoutError, NatsUnavailableError):
            self._ensured = -1
            raise
        return int(_answer(answer, f"publishing to {subject}").get("seq", 0))

    def read(
        self, subject: str, start: int = 1, last_only: bool = False, timeout: float = 10.0
    ) -> Iterator[Kept]:  # fmt: skip
        """What the stream has of that subject (wildcards allowed) from sequence start on: as many messages as there are
        now, however many come meanwhile. last_only: of each subject the last; one that is replaced meanwhile comes
        anew. timeout: seconds between two messages. Raises NatsError."""
        reader = f"kvtc{secrets.token_hex(8)}"
        policy = {"deliver_policy": "last_per_subject"} if last_only else {
            "deliver_policy": "by_start_sequence", "opt_start_seq": max(1, start)}  # fmt: skip
        made = self._api(
            f"CONSUMER.CREATE.{self.name}.{reader}.{subject}",
            {"stream_name": self.name, "config": policy | {
                "name": reader, "ack_policy": "none", "filter_subject": subject, "mem_storage": True,
                "num_replicas": 1, "inactive_threshold": IDLE_SECONDS * _NS}},
            timeout,
        )  # fmt: skip
        left = int(made.get("num_pending", 0))
        most = 2 * left if last_only else left
        place, turn = self.nats.new_inbox(), 0
        inbox = self.nats.subscribe(f"{place}.*", timeout=timeout, pending_bytes=2 * BATCH_BYTES + (64 << 20))
        try:
            while left > 0:
                asked = min(BATCH, left)
                question = {"batch": asked, "no_wait": True, "max_bytes": BATCH_BYTES}
                turn, here = turn + 1, f"{place}.{turn}"
                asking = f"$JS.API.CONSUMER.MSG.NEXT.{self.name}.{reader}"
                if not self.nats.publish(asking, json.dumps(question).encode(), here, timeout=timeout):
                    raise NatsUnavailableError(f"the NATS connection was lost while {self.name} was read")
                got = 0
                while got < asked:
                    message = inbox.get(timeout)
                    if message is None:
                        raise NatsTimeoutError(f"stream {self.name} did not go on within {timeout:g} s")
                    status = message.headers.get("Status")
                    if status is not None and message.subject != here:
                        continue  # the end of a batch that was whole already
                    if status == "404":
                        return  # what was left went meanwhile: too old, or replaced
                    if status is not None:
                        if status == "409" and got:  # as many bytes as were asked for
                            break
                        why = message.headers.get("Description", "")
                        raise NatsRefusedError(f"stream {self.name} stopped with status {status} {why}")
                    kept, left = _kept(message)
                    got, most = got + 1, most - 1
                    left = min(left, most)
                    yield kept
                    if left == 0:
                        return
        finally:
            inbox.close()

    def _api(self, what: str, question: dict[str, Any] | None, timeout: float) -> dict[str, Any]:
        payload = b"" if question is None else json.dumps(question).encode()
        try:
            answer = self.nats.request(f"$JS.API.{what}", payload, timeout)
        except NatsUnavailableError as exc:
            if not self.nats.connected:
                raise
            raise NatsRefusedError("the NATS server has no JetStream: start it with -js, or enable it") from exc
        return _answer(answer, what)


class Bucket:
    """Last values by key, gone ttl_seconds after they were put. In the server's memory: a restart empties it.

    bytes: of all values together. create: False only to use one that exists.
    """

    def __init__(
        self, nats: Nats, name: str, ttl_seconds: float, bytes: int = 16 << 20, create: bool = True, replicas: int = 1
    ) -> None:
        limits = Limits(bytes, -1, ttl_seconds, "memory", replicas) if create else None
        self.nats, self.name, self.ttl_seconds = nats, name, ttl_seconds
        self._prefix = f"$KV.{name}."
        self._stream = Stream(nats, f"KV_{name}", [f"{self._prefix}>"], limits)
        self._stream._more = {
            "max_msgs_per_subject": 1, "discard": "new", "allow_rollup_hdrs": True, "deny_delete": True,
        }  # fmt: skip

    def ensure(self, timeout: float = 5.0) -> None:
        self._stream.ensure(timeout)

    def put(self, key: str, value: bytes, timeout: float = 5.0) -> int:
        """Once the server has it. Raises NatsError."""
        return self._stream.publish(self._prefix + key, value, timeout=timeout)

    def delete(self, key: str, timeout: float = 5.0) -> None:
        self._stream.publish(self._prefix + key, b"", timeout=timeout, headers={"KV-Operation": "DEL"})

    def get(self, key: str, timeout: float = 5.0) -> bytes | None:
        answer = self.nats.request(f"$JS.API.DIRECT.GET.KV_{self.name}.{self._prefix}{key}", b"", timeout)
        if answer.headers.get("Status") == "404" or _removed(answer):
            return None
        return answer.data

    def all(self, timeout: float = 10.0) -> dict[str, bytes]:
        read = self._stream.read(f"{self._prefix}>", last_only=True, timeout=timeout)
        return {kept.subject[len(self._prefix) :]: kept.data for kept in read if not kept.removed}

    def watch(
        self,
        told: Callable[[str, bytes | None], None],
        timeout: float = 5.0,
        failed: Callable[[Exception], None] | None = None,
    ) -> Watch:
        """Calls with every value there is, then with every change, after a reconnection with all again; None: deleted.
        A value may come twice, and an old one after a new one: number them. What grows older than its ttl just stays
        away: keep time."""
        return Watch(self, told, timeout, failed)


class Watch:
    """Ends with ``close``."""

    def __init__(
        self, bucket: Bucket, told: Callable[[str, bytes | None], None], timeout: float,
        failed: Callable[[Exception], None] | None,
    ) -> None:  # fmt: skip
        self._bucket, self._told, self._timeout, self._failed = bucket, told, timeout, failed
        self._again = threading.Event()
        self._closed = False
        prefix = bucket._prefix

        def live(message: Message) -> None:
            told(message.subject[len(prefix) :], None if _removed(message) else message.data)

        self._live: Subscription = bucket.nats.subscribe(f"{prefix}>", live, timeout=timeout)
        self._end = bucket.nats.on_connected(self._again.set)
        self._again.set()
        self._thread = threading.Thread(target=self._run, name=f"kvtc-watch-{bucket.name[-16:]}", daemon=True)
        self._thread.start()

    def close(self, timeout: float = 5.0) -> bool:
        self._closed = True
        self._again.set()
        self._end()
        ended = self._live.close(timeout)
        self._thread.join(timeout)
        return ended and not self._thread.is_alive()

    def _run(self) -> None:
        """All values, at the start and after every reconnection; again and again until it works once."""
        while not self._closed:
            self._again.wait()
            self._again.clear()
            while not self._closed and self._bucket.nats.connected:
                try:
                    self._bucket.ensure(self._timeout)
                    for key, value in self._bucket.all(self._timeout).items():
                        if not self._closed:
                            self._told(key, value)
                    break
                except Exception as exc:
                    if self._failed is not None:
                        self._failed(exc)
                    if self._again.wait(min(1.0, self._timeout)):
                        break


def _removed(message: Message) -> bool:
    return message.headers.get("KV-Operation") in ("DEL", "PURGE")


def _kept(message: Message) -> tuple[Kept, int]:
    """With how many are left. The server tells in the subject for acknowledgements: $JS.ACK.<stream>.<reader>.<times
    delivered>.<sequence>.<reader's sequence>.<time>.<left>, with two more tokens before the stream in a domain."""
    parts = message.reply.split(".")
    try:
        if len(parts) >= 11:
            parts = parts[:2] + parts[4:]
        return Kept(int(parts[5]), message.subject, message.data, _removed(message)), int(parts[8])
    except (IndexError, ValueError) as exc:
        raise NatsError(f"a stream's message came with {message.reply!r}, which is no place in a stream") from exc


def _answer(message: Message, what: str) -> dict[str, Any]:
    try:
        answer = json.loads(message.data)
        error = answer.get("error")
        refused = error and f"{error.get('description')} ({error.get('err_code', error.get('code'))})"
    except (ValueError, AttributeError) as exc:
        raise NatsError(f"{what}: the server's answer {message.data[:80]!r} is no JSON") from exc
    if refused:
        raise NatsRefusedError(f"{what}: {refused}")
    return answer
