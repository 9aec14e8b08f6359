"""The one door to NATS: a connection on a thread of its own, with a face that any other thread may use.

    publish      sent once and forgotten; bounded, refused or waited for when the server does not keep up
    request      an answer before a deadline, or an error
    subscribe    messages to a callback or a queue; found again after every reconnection
    serve        answers requests
    streams      jetstream.py: what stays on the server, over requests alone

When the connection is lost a new one is made, for ever, and every subscription is made anew on it: what was published
in between is lost to it. ``on_connected`` tells, so that whoever needs all of it can ask for what it missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Any, TypeVar

from dynamo_kvtc.errors import (
    KvtcError,
    NatsError,
    NatsRefusedError,
    NatsTimeoutError,
    NatsUnavailableError,
)
from dynamo_kvtc.events import nats_client
from dynamo_kvtc.events.inbox import MESSAGE_BYTES, Message, Subscription
from dynamo_kvtc.events.options import DEGRADED, NatsOptions

if TYPE_CHECKING:
    from dynamo_kvtc.events.nats_client import Client

PENDING_BYTES = 64 << 20
"""What a subscription holds at most, unless told otherwise."""
DEFAULT_PAYLOAD = 1 << 20
"""A server's limit unless it is configured; said until the first connection knows better."""
FAILED = "Kvtc-Failed"
"""Header of an answer that says only that the handler failed."""
BACKOFF_SECONDS = (0.05, 2.0)

log = logging.getLogger(__name__)
T = TypeVar("T")


def open_nats(options: NatsOptions, name: str = "kvtc") -> Nats:
    """Connects within ``options.connect_seconds``. Raises NatsUnavailableError, unless it may be degraded: then it goes
    on trying. Raises MissingDependencyError, ConfigError."""
    nats = Nats(options, name)
    if nats.wait_connected(options.connect_seconds):
        return nats
    told = (
        f"no NATS server at {options.told_servers} within {options.connect_seconds:g} s: "
        f"{nats.last_error or 'no answer'}"
    )
    if options.when_absent == DEGRADED:
        log.warning("%s; serving locally until there is one", told)
        return nats
    nats.close(1.0)
    raise NatsUnavailableError(f"{told}. Start it, set NATS_SERVER, or set when_absent to 'degraded'")


class Nats:
    """Made by ``open_nats``. Every method may be called from any thread but the connection's own, which only runs what
    is in this file."""

    def __init__(self, options: NatsOptions, name: str = "kvtc") -> None:
        self.options, self.name = options, name
        self.last_error: str | None = None
        self.connects = self.sent = self.refused = 0
        self._client_options = nats_client.client_options(options, name)
        self._client: Client | None = None
        self._lost: asyncio.Future[None] | None = None
        self._max_payload = DEFAULT_PAYLOAD
        self._changed = threading.Condition()
        self._out: deque[tuple[str, bytes, str, dict[str, str] | None]] = deque()
        self._out_bytes = 0
        self._pumping = False
        self._subscriptions: dict[Subscription, Any] = {}
        self._asked: dict[str, asyncio.Future[str]] = {}
        self._told_up: list[Callable[[], None]] = []
        self._told_down: list[Callable[[], None]] = []
        self._closed = False
        self._teller = ThreadPoolExecutor(1, "kvtc-nats-tell")
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._wake = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="kvtc-nats", daemon=True)
        self._thread.start()

    @property
    def connected(self) -> bool:
        return self._client is not None

    @property
    def max_payload(self) -> int:
        """Bytes of one message that the server takes, headers included."""
        return self._max_payload

    def wait_connected(self, timeout: float) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self.connected or self._closed, timeout)
        return self.connected

    def on_connected(self, told: Callable[[], None]) -> Callable[[], None]:
        """Called after every connection that is still to come, on a thread that may use this. The result ends it."""
        return _listed(self._told_up, told)

    def on_disconnected(self, told: Callable[[], None]) -> Callable[[], None]:
        return _listed(self._told_down, told)

    def new_inbox(self) -> str:
        """A subject that nobody else uses."""
        return f"{self.options.inbox_prefix}.{secrets.token_hex(11)}"

    def publish(
        self, subject: str, payload: bytes, reply: str = "", headers: Mapping[str, str] | None = None,
        timeout: float = 0.0,
    ) -> bool:  # fmt: skip
        """Hands it to the connection, in order. False if there is none, or too much waits to be sent, for timeout
        seconds. True says nothing about who got it. Raises NatsError if the server would not take so much."""
        cost = len(payload) + len(subject) + MESSAGE_BYTES
        self._check_size(subject, payload, headers)
        item = (subject, payload, reply, dict(headers) if headers else None)
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or self._has_room(cost), timeout) or self._closed:
                self.refused += 1
                return False
            self._out.append(item)
            self._out_bytes += cost
            if self._pumping:
                return True
            self._pumping = True
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._wake.set)
        return True

    def request(
        self, subject: str, payload: bytes, timeout: float, headers: Mapping[str, str] | None = None
    ) -> Message:  # fmt: skip
        """Raises NatsTimeoutError; NatsUnavailableError if not connected, or nobody serves there; NatsRefusedError if
        whoever serves failed, or this user may not ask there."""
        self._check_size(subject, payload, headers)
        asked = self._request(subject, payload, timeout, dict(headers) if headers else None)
        answer = self._on_thread(asked, timeout, f"{subject} did not answer within {timeout:g} s")
        if FAILED in answer.headers:
            raise NatsRefusedError(f"whoever serves {subject} failed on the request; its log says why")
        return answer

    def subscribe(
        self, subject: str, callback: Callable[[Message], None] | None = None, queue: str = "",
        pending_bytes: int = PENDING_BYTES, timeout: float = 5.0,
    ) -> Subscription:  # fmt: skip
        """To a callback on a thread of its own, or without one to ``Subscription.get``. queue: of all who subscribe
        with the same name one gets each message. If connected, the server knows of it when this returns."""
        made = Subscription(subject, queue, callback, pending_bytes, self._unsubscribe)
        try:
            self._on_thread(self._attach(made, timeout), timeout, f"subscribing to {subject} took over {timeout:g} s")
        except BaseException:
            made.close(1.0)
            raise
        return made

    def serve(
        self, subject: str, handler: Callable[[Message], bytes | None], queue: str = "",
        pending_bytes: int = PENDING_BYTES, reply_seconds: float = 5.0,
    ) -> Subscription:  # fmt: skip
        """Answers with what handler returns, one request at a time; None: no answer now (publish to ``reply`` later).
        If it raises, the asker is told that, and no more."""

        def answer(message: Message) -> None:
            try:
                made, headers = handler(message), None
            except Exception:
                made, headers = b"", {FAILED: "1"}
                if message.reply:
                    self.publish(message.reply, made, headers=headers, timeout=reply_seconds)
                raise
            if made is not None and message.reply:
                self.publish(message.reply, made, timeout=reply_seconds)

        return self.subscribe(subject, answer, queue, pending_bytes)

    def flush(self, timeout: float = 5.0) -> bool:
        """True when the server has all that was published before."""
        deadline = time.monotonic() + timeout
        with self._changed:
            if not self._changed.wait_for(lambda: not self._out or not self.connected, timeout):
                return False
        try:
            left = max(0.01, deadline - time.monotonic())
            return self._on_thread(self._ping(left), left, "the server did not answer")
        except NatsError:
            return False

    def close(self, timeout: float = 5.0) -> bool:
        """What waits to be sent is sent if it can be within timeout seconds. True if all went, and the thread ended."""
        if self._closed:
            return True
        flushed = self.flush(timeout / 2) if self.connected else not self._out
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        ends = [subscription.close(timeout / 4) for subscription in list(self._subscriptions)]
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout / 2 + 2)
        self._teller.shutdown(wait=False)
        return flushed and all(ends) and not self._thread.is_alive()

    # Below: on the connection's thread, but for the first three.

    def _has_room(self, cost: int) -> bool:
        return self.connected and (not self._out or self._out_bytes + cost <= self.options.pending_bytes)

    def _check_size(self, subject: str, payload: bytes, headers: Mapping[str, str] | None) -> None:
        size = len(payload) + (16 + sum(len(k) + len(v) + 4 for k, v in headers.items()) if headers else 0)
        if size > self._max_payload:
            raise NatsError(f"a message of {size} bytes to {subject}; the server takes {self._max_payload}: send less")

    def _on_thread(self, work: Coroutine[Any, Any, T], timeout: float, told: str) -> T:
        if self._closed or threading.current_thread() is self._thread:
            work.close()
            raise NatsUnavailableError("the NATS connection is closed")
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout + 1)
        except (FutureTimeoutError, asyncio.CancelledError) as exc:
            future.cancel()
            raise NatsTimeoutError(told) from exc
        except KvtcError:
            raise
        except Exception as exc:
            raise NatsError(f"{told}: {type(exc).__name__}: {exc}") from exc

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._stay_connected())
        finally:
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            if left:
                self._loop.run_until_complete(asyncio.wait(left, timeout=2.0))
            self._loop.close()

    async def _stay_connected(self) -> None:
        backoff = BACKOFF_SECONDS[0]
        stop = asyncio.ensure_future(self._stop.wait())
        while not self._stop.is_set():
            connecting = asyncio.ensure_future(self._connect())
            await asyncio.wait(_any(stop, connecting), return_when=asyncio.FIRST_COMPLETED)
            if not connecting.done():
                connecting.cancel()
                break
            client = connecting.result()
            if client is None:
                await asyncio.wait({stop}, timeout=backoff)
                backoff = min(2 * backoff, BACKOFF_SECONDS[1])
                continue
            backoff = BACKOFF_SECONDS[0]
            assert self._lost is not None
            pump = asyncio.ensure_future(self._pump(client))
            await asyncio.wait(_any(stop, self._lost, pump), return_when=asyncio.FIRST_COMPLETED)
            with self._changed:
                self._client = None
                self._changed.notify_all()
            if not self._lost.done():
                self._lost.set_result(None)
            pump.cancel()
            await nats_client.end(client)
            self._tell(self._told_down)

    async def _connect(self) -> Client | None:
        lost: asyncio.Future[None] = self._loop.create_future()

        async def closed() -> None:
            if not lost.done():
                lost.set_result(None)

        async def erred(exc: Exception) -> None:
            # A refusal by permission closes nothing: nobody but the log would hear of it.
            text = str(exc) or type(exc).__name__
            for subject, denied in list(self._asked.items()):
                if "permissions violation" in text.lower() and f'"{subject.lower()}"' in text.lower():
                    denied.set_result(text) if not denied.done() else None
            if text != self.last_error:
                log.log(logging.WARNING if self.connected else logging.DEBUG, "NATS: %s", text)
            self.last_error = text

        client = None
        try:
            seconds = self.options.connect_seconds
            client = await nats_client.connect(self._client_options, self.options.tls, closed, erred, seconds)
            # Those that are made meanwhile, too, before anybody hears that there is a connection.
            done: set[Subscription] = set()
            while missing := [s for s in self._subscriptions if s not in done]:
                for subscription in missing:
                    await self._subscribe_on(client, subscription)
                    done.add(subscription)
                await nats_client.flush(client, seconds)
        except Exception as exc:
            self.last_error = str(exc) or type(exc).__name__
            if client is not None:
                await nats_client.end(client)
            return None
        with self._changed:
            self._max_payload, self._lost, self._client = client.max_payload, lost, client
            self.connects += 1
            self._changed.notify_all()
        self._tell(self._told_up)
        return client

    async def _pump(self, client: Client) -> None:
        """Sends what waits. The library holds no more than its own buffer, then waits for the socket."""
        while True:
            with self._changed:
                if not self._out:
                    self._pumping = False
                # Taken before it is sent: a connection that breaks here loses it, and never sends it twice.
                item = self._out.popleft() if self._out else None
            if item is None:
                self._wake.clear()
                if not self._out:
                    await self._wake.wait()
                continue
            subject, payload, reply, headers = item
            try:
                await client.publish(subject, payload, reply, headers)
                self.sent += 1
            except Exception as exc:
                log.warning("NATS: not published to %s: %s", subject, exc)
            finally:
                with self._changed:
                    self._out_bytes -= len(payload) + len(subject) + MESSAGE_BYTES
                    self._changed.notify_all()

    async def _request(self, subject: str, payload: bytes, timeout: float, headers: dict[str, str] | None) -> Message:
        client, lost = self._client, self._lost
        if client is None or lost is None:
            raise NatsUnavailableError(f"not connected to NATS: {self.last_error or 'not yet'}")
        # The server drops what one may not publish, and says so beside it: without this the asker would wait.
        denied = self._asked.setdefault(subject, self._loop.create_future())
        asked = asyncio.ensure_future(nats_client.request(client, subject, payload, timeout, headers))
        await asyncio.wait(_any(asked, lost, denied), return_when=asyncio.FIRST_COMPLETED)
        if denied.done() or self._asked.get(subject) is denied:
            self._asked.pop(subject, None)
        if not asked.done():
            asked.cancel()
            if denied.done():
                raise NatsRefusedError(denied.result())
            raise NatsUnavailableError(f"the NATS connection was lost while {subject} was asked")
        return asked.result()

    async def _attach(self, subscription: Subscription, timeout: float) -> None:
        self._subscriptions[subscription] = None
        if self._client is not None:
            await self._subscribe_on(self._client, subscription)
            await nats_client.flush(self._client, timeout)

    async def _subscribe_on(self, client: Client, subscription: Subscription) -> None:
        made = await nats_client.subscribe(client, subscription)
        if subscription in self._subscriptions:
            self._subscriptions[subscription] = made
        else:  # it was closed meanwhile
            await made.unsubscribe()

    def _unsubscribe(self, subscription: Subscription) -> None:
        async def leave() -> None:
            made = self._subscriptions.pop(subscription, None)
            if made is not None and self._client is not None:
                with contextlib.suppress(Exception):
                    await made.unsubscribe()

        with contextlib.suppress(NatsError):
            self._on_thread(leave(), 1.0, "unsubscribing")

    async def _ping(self, timeout: float) -> bool:
        if self._client is None:
            return False
        await nats_client.flush(self._client, timeout)
        return True

    def _tell(self, told: list[Callable[[], None]]) -> None:
        for one in list(told):
            with contextlib.suppress(RuntimeError):
                self._teller.submit(_safely, one)


def _listed(told: list[Callable[[], None]], one: Callable[[], None]) -> Callable[[], None]:
    def end() -> None:
        with contextlib.suppress(ValueError):
            told.remove(one)

    told.append(one)
    return end


def _safely(told: Callable[[], None]) -> None:
    try:
        told()
    except Exception:
        log.exception("a callback failed")


def _any(*futures: asyncio.Future[Any]) -> set[asyncio.Future[Any]]:
    return set(futures)
