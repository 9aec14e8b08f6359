"""What stays on the server, on a real one."""

from __future__ import annotations

import random
import time

import pytest

from dynamo_kvtc.errors import NatsRefusedError, NatsUnavailableError
from dynamo_kvtc.events.jetstream import Bucket, Limits, Stream
from tests.builders import case_seed
from tests.events.servers import Server
from tests.waiting import until


def test_a_stream_is_read_from_any_place_by_subject(shared_server, connect):
    nats = connect(shared_server)
    stream = Stream(nats, "read", ["read.>"], Limits(storage="memory"))
    assert stream.info() is None
    stream.ensure()
    stream.ensure()
    rng = random.Random(case_seed())
    sent = [(f"read.{rng.choice('abc')}", rng.randbytes(rng.randrange(2000))) for _ in range(700)]
    for i, (subject, payload) in enumerate(sent):
        assert stream.publish(subject, payload) == i + 1
    assert [(k.subject, k.data) for k in stream.read("read.>")] == sent
    assert [k.sequence for k in stream.read("read.>", 600)] == list(range(600, 701))
    assert [k.data for k in stream.read("read.a", 300)] == [p for s, p in sent[299:] if s == "read.a"]
    assert list(stream.read("read.>", 701)) == []
    assert list(stream.read("read.none")) == []
    assert {k.subject: k.data for k in stream.read("read.>", last_only=True)} == dict(sent)


def test_repeats_are_kept_once_and_the_oldest_go(shared_server, connect):
    nats = connect(shared_server)
    stream = Stream(nats, "few", ["few.>"], Limits(messages=10, storage="memory"))
    stream.ensure()
    for i in range(25):
        stream.publish("few.x", b"%d" % i, f"id{i}")
        stream.publish("few.x", b"%d" % i, f"id{i}")
    assert [k.data for k in stream.read("few.>")] == [b"%d" % i for i in range(15, 25)]
    assert stream.info()["first_seq"] == 16


def test_more_bytes_than_one_batch_takes(shared_server, connect, monkeypatch):
    monkeypatch.setattr("dynamo_kvtc.events.jetstream.BATCH_BYTES", 200_000)
    nats = connect(shared_server)
    stream = Stream(nats, "big", ["big.>"], Limits(storage="memory"))
    stream.ensure()
    for i in range(20):
        stream.publish("big.x", bytes([i]) * 60_000)
    assert [k.data[0] for k in stream.read("big.>")] == list(range(20))


def test_reading_ends_though_more_comes_all_the_time(shared_server, connect):
    nats = connect(shared_server)
    stream = Stream(nats, "flood", ["flood.>"], Limits(storage="memory"))
    stream.ensure()
    for i in range(300):
        stream.publish(f"flood.{i}", b"")
    for last_only, there, most in ((False, 300, 300), (True, 600, 1200)):
        read = []
        for kept in stream.read("flood.>", last_only=last_only):
            read.append(kept.sequence)
            stream.publish(f"flood.{kept.sequence}.{last_only}", b"")
            assert len(read) <= most
        assert read[:there] == list(range(1, there + 1))


def test_a_bucket_keeps_last_values_for_a_while(shared_server, connect):
    a, b = connect(shared_server), connect(shared_server)
    bucket, other = Bucket(a, "beats", 1.0), Bucket(b, "beats", 1.0, create=False)
    bucket.ensure()
    bucket.put("one", b"1")
    seen = []
    watch = other.watch(lambda key, value: seen.append((key, value)))
    until(lambda: ("one", b"1") in seen)
    bucket.put("two", b"2")
    bucket.put("one", b"3")
    until(lambda: ("one", b"3") in seen and ("two", b"2") in seen)
    assert other.get("one") == b"3"
    assert other.get("three") is None
    bucket.delete("one")
    until(lambda: ("one", None) in seen)
    assert other.get("one") is None
    assert other.all() == {"two": b"2"}
    until(lambda: other.all() == {}, 5, "the value outlived its time")
    assert watch.close()


def test_a_restarted_server_gets_its_bucket_and_watchers_back(own_server, connect):
    a, b = connect(own_server), connect(own_server)
    bucket, seen = Bucket(a, "beats", 30.0), []
    bucket.ensure()
    watch = Bucket(b, "beats", 30.0, create=False).watch(lambda key, value: seen.append((key, value)))
    bucket.put("one", b"1")
    until(lambda: ("one", b"1") in seen)
    own_server.kill()
    until(lambda: not a.connected and not b.connected)
    with pytest.raises(NatsUnavailableError):
        bucket.put("one", b"2")
    own_server.start()
    assert a.wait_connected(10)
    assert b.wait_connected(10)
    bucket.put("one", b"3")
    until(lambda: ("one", b"3") in seen)
    assert watch.close()


def test_a_stream_in_files_survives_the_server(own_server, connect):
    nats = connect(own_server)
    stream = Stream(nats, "kept", ["kept.>"], Limits())
    stream.ensure()
    for i in range(10):
        stream.publish("kept.x", b"%d" % i)
    own_server.kill()
    own_server.start()
    assert nats.wait_connected(10)
    assert [k.data for k in stream.read("kept.>")] == [b"%d" % i for i in range(10)]


def test_a_server_without_jetstream_says_so(tmp_path, connect):
    server = Server(tmp_path)
    del server.config["jetstream"]
    server.start()
    try:
        began = time.monotonic()
        with pytest.raises(NatsRefusedError, match="no JetStream"):
            Stream(connect(server), "x", ["x.>"], Limits()).ensure()
        assert time.monotonic() - began < 5
    finally:
        server.stop()
