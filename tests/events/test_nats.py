"""The door to NATS, with a real server."""

from __future__ import annotations

import random
import signal
import threading
import time

import pytest

from dynamo_kvtc.errors import (
    ConfigError,
    NatsError,
    NatsRefusedError,
    NatsTimeoutError,
    NatsUnavailableError,
)
from dynamo_kvtc.events.nats import open_nats
from dynamo_kvtc.events.options import DEGRADED, NatsOptions, parse_nats
from tests.builders import case_seed
from tests.events.servers import Server, free_port
from tests.waiting import until


def test_messages_arrive_whole_and_in_order(shared_server, connect):
    a, b = connect(shared_server), connect(shared_server)
    rng = random.Random(case_seed())
    sent = [rng.randbytes(rng.choice([0, 1, 100, 5000, 200_000])) for _ in range(200)]
    subscription = a.subscribe("order.x")
    for payload in sent:
        assert b.publish("order.x", payload, timeout=5)
    got = [subscription.get(5) for _ in sent]
    assert [m.data for m in got] == sent
    assert subscription.get(0) is None
    assert subscription.dropped == 0


def test_requests_are_answered_refused_or_late(shared_server, connect):
    a, b = connect(shared_server), connect(shared_server)

    def handler(message):
        if message.data == b"fail":
            raise ValueError("as asked")
        return None if message.data == b"late" else message.data[::-1]

    a.serve("ask.me", handler)
    assert b.request("ask.me", b"abc", 5).data == b"cba"
    with pytest.raises(NatsTimeoutError, match=r"ask\.me"):
        b.request("ask.me", b"late", 0.1)
    with pytest.raises(NatsRefusedError, match="its log"):
        b.request("ask.me", b"fail", 5)
    with pytest.raises(NatsUnavailableError, match="nobody serves"):
        b.request("nobody.here", b"", 5)
    assert b.request("ask.me", b"still", 5).data == b"llits"


def test_a_callback_may_use_the_connection(shared_server, connect):
    a = connect(shared_server)
    a.serve("deep", lambda m: b"deep")
    a.serve("shallow", lambda m: a.request("deep", b"", 5).data + b"er")
    assert a.request("shallow", b"", 5).data == b"deeper"


def test_what_the_server_would_not_take_is_not_sent(shared_server, connect):
    a = connect(shared_server)
    assert a.max_payload == 1 << 20
    with pytest.raises(NatsError, match=r"1048577 bytes.*1048576"):
        a.publish("x", bytes(a.max_payload + 1))
    with pytest.raises(NatsError, match="1048577 bytes"):
        a.request("x", bytes(a.max_payload + 1), 1)
    assert a.connected


def test_a_full_subscription_drops_and_says_so(shared_server, connect):
    a, b = connect(shared_server), connect(shared_server)
    subscription, last = a.subscribe("flood", pending_bytes=100_000), a.subscribe("last")
    for _ in range(100):
        b.publish("flood", bytes(10_000), timeout=5)
    b.publish("last", b"")
    assert last.get(5) is not None
    assert subscription.dropped == 100 - 9
    assert subscription.get(1).data == bytes(10_000)


def test_an_absent_server_is_told_within_the_time():
    began = time.monotonic()
    with pytest.raises(NatsUnavailableError, match=r"127\.0\.0\.1.*degraded"):
        open_nats(NatsOptions(servers=(f"nats://me:secret@127.0.0.1:{free_port()}",), connect_seconds=0.5))
    assert time.monotonic() - began < 5


def test_a_degraded_service_finds_the_server_later(tmp_path):
    server = Server(tmp_path)
    nats = open_nats(NatsOptions(servers=(server.url,), connect_seconds=0.3, when_absent=DEGRADED))
    try:
        assert not nats.connected
        assert not nats.publish("x", b"")
        with pytest.raises(NatsUnavailableError, match="not connected"):
            nats.request("x", b"", 1)
        subscription = nats.subscribe("x")
        came = threading.Event()
        nats.on_connected(came.set)
        server.start()
        assert came.wait(10)
        assert nats.publish("x", b"now", timeout=5)
        assert subscription.get(5).data == b"now"
    finally:
        nats.close()
        server.stop()


def test_a_killed_server_is_found_again_with_every_subscription(own_server, connect):
    a, b = connect(own_server), connect(own_server)
    subscription = a.subscribe("back")
    a.serve("ask", lambda m: m.data)
    down, up = threading.Event(), threading.Event()
    a.on_disconnected(down.set)
    a.on_connected(up.set)
    for _ in range(2):
        down.clear()
        up.clear()
        own_server.kill()
        assert down.wait(5)
        assert not a.connected
        with pytest.raises(NatsUnavailableError):
            a.request("ask", b"", 5)
        own_server.start()
        assert up.wait(10)
        assert b.wait_connected(10)
        assert b.request("ask", b"again", 5).data == b"again"
        assert b.publish("back", b"again", timeout=5)
        assert subscription.get(5).data == b"again"


def test_a_request_ends_when_the_connection_does(own_server, connect):
    a, b = connect(own_server), connect(own_server)
    a.serve("ask", lambda m: None)
    threading.Timer(0.3, own_server.kill).start()
    began = time.monotonic()
    with pytest.raises(NatsUnavailableError, match="lost"):
        b.request("ask", b"", 60)
    assert time.monotonic() - began < 30


def test_an_answer_that_comes_too_late_leaves_the_connection_whole(own_server, connect, caplog):
    a, b = connect(own_server), connect(own_server)
    a.serve("ask", lambda m: m.data)
    own_server.kill(signal.SIGSTOP)
    try:
        assert not a.flush(0.2)
        with pytest.raises(NatsTimeoutError):
            a.subscribe("late", timeout=0.2)
    finally:
        own_server.kill(signal.SIGCONT)
    assert a.flush(4)
    assert b.request("ask", b"still", 4).data == b"still"
    assert a.connects == 1
    assert not [r for r in caplog.records if r.levelname == "ERROR"]


def test_a_subscription_that_failed_leaves_nothing(own_server, connect):
    a = connect(own_server)
    own_server.kill(signal.SIGSTOP)
    try:
        with pytest.raises(NatsTimeoutError):
            a.subscribe("failed.1", lambda m: None, timeout=0.2)
    finally:
        own_server.kill(signal.SIGCONT)
    assert not a._subscriptions
    assert a.close()
    with pytest.raises(NatsUnavailableError):
        a.subscribe("failed.2", lambda m: None)
    assert not [t.name for t in threading.enumerate() if "failed." in t.name]


def test_a_connection_that_reads_no_more_is_made_anew(own_server, connect):
    a, b = connect(own_server), connect(own_server)
    a.serve("ask", lambda m: m.data)
    a._loop.call_soon_threadsafe(a._client._reading_task.cancel)
    until(lambda: a.connects == 2, 4)
    assert b.request("ask", b"again", 4).data == b"again"


def test_pending_bytes_are_bounded_while_the_server_hangs(own_server, connect):
    a = connect(own_server, pending_mib=2)
    own_server.kill(signal.SIGSTOP)
    try:
        sent = 0
        while a.publish("x", bytes(100_000), timeout=0.2):
            sent += 100_000
            assert sent < 64 << 20
        assert a._out_bytes <= 2 << 20
    finally:
        own_server.kill(signal.SIGCONT)
        until(lambda: a.publish("x", b"", timeout=0.1))


def test_close_sends_what_waits(shared_server, connect):
    a, b = connect(shared_server), connect(shared_server)
    subscription = b.subscribe("bye")
    for i in range(100):
        assert a.publish("bye", bytes([i]), timeout=1)
    assert a.close()
    assert [subscription.get(5).data for _ in range(100)] == [bytes([i]) for i in range(100)]
    assert not a.publish("bye", b"")
    with pytest.raises(NatsUnavailableError):
        a.request("bye", b"", 1)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"servers": "http://a"}, "no NATS address"),
        ({"servers": []}, "servers is empty"),
        ({"servers": 3}, "servers is 3"),
        ({"namespace": "a.b"}, "namespace is 'a.b'"),
        ({"namespace": ">"}, "namespace is '>'"),
        ({"server": "x"}, "unknown options server"),
        ({"nkey_seed": "/nowhere"}, "no file"),
        ({"tls_cert": __file__}, "go together"),
        ({"credentials": __file__, "nkey_seed": __file__}, "one identity"),
        ({"when_absent": "maybe"}, "when_absent is 'maybe'"),
        ({"connect_seconds": 0}, "connect_seconds is 0"),
        ({"connect_seconds": True}, "connect_seconds is True"),
        ({"pending_mib": 0}, "pending_mib is 0"),
        ({"inbox_prefix": "a.>"}, "inbox_prefix"),
    ],
)
def test_options_that_cannot_work_are_refused(given, told):
    with pytest.raises(ConfigError, match=f"here: .*{told}|here has {told}"):
        parse_nats(given, "here", {})


def test_the_environment_fills_what_is_not_configured():
    environment = {"NATS_SERVER": "nats://one:1,two:2", "DYN_NAMESPACE": "prod"}
    options = parse_nats({}, "here", environment)
    assert options.servers == ("nats://one:1", "nats://two:2")
    assert options.namespace == "prod"
    assert parse_nats({"namespace": "mine"}, "here", environment).namespace == "mine"
    assert parse_nats({}, "here", {}).servers == ("nats://127.0.0.1:4222",)
