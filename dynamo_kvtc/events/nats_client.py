"""The library nats-py as ``nats.py`` needs it: what it takes, what it gives, and what it does that we would not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from dynamo_kvtc.errors import MissingDependencyError, NatsTimeoutError, NatsUnavailableError
from dynamo_kvtc.events.inbox import Message, Subscription
from dynamo_kvtc.events.options import NatsOptions

if TYPE_CHECKING:
    from nats.aio.client import Client

PING_SECONDS = 5
_FOR_EVER = 1e9
_flushing: WeakKeyDictionary[Client, set[asyncio.Task[None]]] = WeakKeyDictionary()


def client_options(options: NatsOptions, name: str) -> dict[str, Any]:
    """For ``connect``. Raises MissingDependencyError, ConfigError."""
    try:
        import nats.aio.client  # noqa: F401

        if options.credentials or options.nkey_seed:
            import nkeys  # noqa: F401
    except ImportError as exc:
        raise MissingDependencyError(
            f"{exc.name} is not installed; `pip install dynamo-kvtc[cluster]` brings the NATS client"
        ) from exc
    # The library's own reconnection is off: it gives up for good on a refused login, and keeps what it sent on a dead
    # connection. Ours makes a new client each time.
    made: dict[str, Any] = {
        "name": name, "allow_reconnect": False, "max_reconnect_attempts": 1, "reconnect_time_wait": 0.05,
        "ping_interval": PING_SECONDS, "max_outstanding_pings": 2, "connect_timeout": options.connect_seconds,
        "pending_size": min(options.pending_bytes, 4 << 20),
    }  # fmt: skip
    return made | options.for_client()


async def connect(
    options: dict[str, Any], tls: bool, closed: Callable[[], Awaitable[None]],
    erred: Callable[[Exception], Awaitable[None]], timeout: float,
) -> Client:  # fmt: skip
    """closed: awaited once when the connection is gone; erred: with what goes wrong meanwhile."""
    from nats.aio.client import Client
    from nats.errors import SecureConnWantedError

    class Checked(Client):
        """The library talks in the clear to a server that does not ask for TLS, even at an address that says tls."""

        def _connect_command(self) -> bytes:
            if tls and not self._server_info.get("tls_required"):
                raise SecureConnWantedError
            return super()._connect_command()

    client = Checked()
    try:
        await asyncio.wait_for(client.connect(closed_cb=closed, error_cb=erred, **options), timeout)
    except BaseException:
        await end(client)
        raise
    # A defect while it reads ends the library's reading, and nothing else: nobody would hear anything any more.
    reading = getattr(client, "_reading_task", None)
    if reading is not None:
        reading.add_done_callback(lambda _: asyncio.ensure_future(closed()))
    return client


async def end(client: Client) -> None:
    """A server that hangs would let the library wait for its socket for ever."""
    with contextlib.suppress(Exception):
        await asyncio.wait_for(client.close(), 1.0)
    # No answer comes any more, so these may be cancelled now.
    for flushing in _flushing.pop(client, ()):
        flushing.cancel()


async def subscribe(client: Client, subscription: Subscription) -> Any:
    async def arrived(got: Any) -> None:
        subscription.arrived(_message(got))

    return await client.subscribe(
        subscription.subject, subscription.queue, cb=arrived, pending_msgs_limit=0, pending_bytes_limit=0
    )


async def request(
    client: Client, subject: str, payload: bytes, timeout: float, headers: dict[str, str] | None
) -> Message:  # fmt: skip
    """Raises NatsUnavailableError if nobody serves there, NatsTimeoutError."""
    from nats.errors import NoRespondersError
    from nats.errors import TimeoutError as NatsPyTimeout

    try:
        return _message(await client.request(subject, payload, timeout, headers=headers))
    except NoRespondersError as exc:
        raise NatsUnavailableError(f"nobody serves {subject}") from exc
    except (NatsPyTimeout, asyncio.TimeoutError) as exc:
        raise NatsTimeoutError(f"{subject} did not answer within {timeout:g} s") from exc


async def flush(client: Client, timeout: float) -> None:
    """Until the server has read all before. Raises NatsTimeoutError, NatsUnavailableError if the connection ends."""
    # The library's own deadline leaves a cancelled future behind, on which an answer that is late breaks its reading:
    # so what is late here goes on waiting, until the answer or the end.
    flushing = asyncio.ensure_future(client.flush(_FOR_EVER))  # type: ignore[arg-type]
    waiting = _flushing.setdefault(client, set())
    waiting.add(flushing)
    flushing.add_done_callback(waiting.discard)
    flushing.add_done_callback(lambda done: done.cancelled() or done.exception())
    await asyncio.wait({flushing}, timeout=timeout)
    if not flushing.done():
        raise NatsTimeoutError(f"the server did not answer within {timeout:g} s")
    if flushing.cancelled():
        raise NatsUnavailableError("the NATS connection was lost meanwhile")
    flushing.result()


def _message(got: Any) -> Message:
    return Message(got.subject, got.data, got.reply or "", got.headers or {})
