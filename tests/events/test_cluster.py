"""Publishers and followers on a real server: everybody knows what everybody holds, whatever is lost on the way."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dynamo_kvtc.errors import NatsUnavailableError
from dynamo_kvtc.events.follower import Follower
from dynamo_kvtc.events.index import Index
from dynamo_kvtc.events.nats import open_nats
from dynamo_kvtc.events.options import EventOptions, NatsOptions
from dynamo_kvtc.events.schema import Batch, Beat, BlocksCleared, BlockStored, WorkerStats, decode, encode
from tests.builders import case_seed
from tests.events.worker import Worker, who
from tests.waiting import until

FAST = EventOptions(heartbeat_ttl_seconds=1.0, linger_seconds=0.002, stream_mib=8)


@pytest.fixture
def cluster(request, shared_server):
    """Makes workers and followers on the shared server, in a namespace of the test's own, and ends them."""
    made = Cluster(shared_server, f"t{abs(hash(request.node.nodeid)) % 10**12}")
    yield made
    made.close()


@pytest.fixture
def own_cluster(own_server):
    made = Cluster(own_server, "own")
    yield made
    made.close()


class Cluster:
    def __init__(self, server, namespace) -> None:
        self.server, self.namespace = server, namespace
        self.ends, self.processes = [], []
        self.seed = case_seed()

    def nats(self, **more):
        options = NatsOptions(servers=(self.server.url,), namespace=self.namespace, **({"connect_seconds": 5.0} | more))
        nats = open_nats(options)
        self.ends.append(nats.close)
        return nats

    def worker(self, name="w1", held=(), options=FAST, nats=None, **more) -> Worker:
        worker = Worker(nats or self.nats(), who(name, held=len(held), **more), self.seed, options, held)
        self.ends.append(lambda: worker.publisher.close(1.0))
        return worker

    def follower(self, name="me", options=FAST, nats=None, index=None, **more) -> Follower:
        follower = Follower(nats or self.nats(), who(name, **more), index or Index(4 << 20), options)
        self.ends.append(follower.close)
        return follower

    def process(self, name, ttl=1.0):
        command = [sys.executable, "-m", "tests.events.worker", self.server.url, self.namespace, name]
        process = subprocess.Popen(
            [*command, str(self.seed % 2**32), str(ttl)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        self.processes.append(process)
        assert json.loads(process.stdout.readline()) == "up"

        def ask(command):
            process.stdin.write(command + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        return process, ask

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait(10)
            process.stdin.close()
            process.stdout.close()
        for end in reversed(self.ends):
            end()


def knows(follower, *workers, gone=()) -> bool:
    """Whether it knows exactly what they hold."""
    if any(follower.index.entries_of(w.publisher.up.worker) != len(w.held) for w in workers):
        return False
    for worker in workers:
        name, held = worker.publisher.up.worker, dict(worker.held)
        found = follower.index.longest_prefix(list(held))
        if len(found) < len(held):
            return False
        for holders, (tier, size) in zip(found, held.values(), strict=True):
            if (name, tier, size) not in holders:
                return False
    return not any(follower.index.longest_prefix([key]) for key in gone)


def test_what_one_stores_all_others_see(cluster):
    a, b = cluster.worker("a"), cluster.worker("b")
    one, two = cluster.follower("a"), cluster.follower("c")
    a.work(300)
    b.work(300)
    until(lambda: knows(one, b) and knows(two, a, b), told="not seen")
    assert one.index.entries_of("a") == 0
    until(lambda: set(two.workers()) == {"a", "b"})
    assert two.workers()["a"].planes[0].name == "nats"
    a.held.clear()
    a.publisher.publish(BlocksCleared())
    until(lambda: knows(two, a, b))
    until(lambda: two.whole())
    assert two.counts["healed_from_snapshot"] == 0
    a.publisher.close()
    until(lambda: two.index.workers == ["b"])


def test_a_late_joiner_reads_the_stream(cluster):
    a = cluster.worker()
    a.work(2000)
    assert a.publisher.flush()
    late = cluster.follower()
    assert late.wait_ready(10)
    until(lambda: knows(late, a))
    assert late.counts["healed_from_snapshot"] == 0


def test_a_late_joiner_beyond_the_streams_reach_asks_the_holder(cluster):
    few = EventOptions(heartbeat_ttl_seconds=1.0, stream_messages=3, batch_events=16)
    a = cluster.worker(options=few)
    for _ in range(20):
        a.work(100)
        assert a.publisher.flush()
    late = cluster.follower()
    until(lambda: knows(late, a))
    assert late.counts["healed_from_snapshot"] == 1
    a.work(100)
    until(lambda: knows(late, a))


def test_what_a_restarted_worker_found_on_its_disk_is_known(cluster):
    follower = cluster.follower()
    a = cluster.worker()
    a.work(300)
    until(lambda: knows(follower, a))
    disk = {key: ("disk", size) for key, (_, size) in list(a.held.items())[:50]}
    gone = [key for key in a.held if key not in disk]
    again = cluster.worker(held=disk)
    until(lambda: knows(follower, again, gone=gone))
    a.work(20)  # the one before is still talking: its epoch is over
    again.work(20)
    until(lambda: knows(follower, again, gone=gone))


class Hostile:
    """A stream that loses, repeats, holds back and damages what is published to it."""

    def __init__(self, stream, seed, rate) -> None:
        self.stream, self.rng, self.rate = stream, random.Random(seed), rate
        self.held = []
        self.done = dict.fromkeys(("lost", "again", "late", "damaged"), 0)

    def publish(self, subject, payload, identity="", timeout=5.0):
        what = self.rng.choice(list(self.done)) if self.rng.random() < self.rate else "whole"
        if what in self.done:
            self.done[what] += 1
        if what == "lost":
            return 0
        if what == "late":
            self.held.append(payload)
            return 0
        if what == "damaged":
            bad = bytearray(payload)
            for _ in range(self.rng.randrange(1, 4)):
                bad[self.rng.randrange(len(bad))] ^= 1 << self.rng.randrange(8)
            return self.stream.publish(subject, bytes(bad))
        place = self.stream.publish(subject, payload)
        if what == "again":
            self.stream.publish(subject, payload)
        if self.held and self.rng.random() < 0.3:
            self.stream.publish(subject, self.held.pop(self.rng.randrange(len(self.held))))
        return place


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_lost_repeated_late_and_damaged_messages_leave_the_truth(cluster, rate):
    follower = cluster.follower()
    a = cluster.worker(options=EventOptions(heartbeat_ttl_seconds=1.0, batch_events=4, linger_seconds=0))
    hostile = a.publisher._stream = Hostile(a.publisher._stream, cluster.seed, rate)
    for _ in range(20):
        a.work(40)
        time.sleep(0.01)
    assert a.publisher.flush()
    until(lambda: knows(follower, a), 20, f"{hostile.done} {follower.counts}")
    assert all(hostile.done.values()), hostile.done
    assert follower.counts["EventFormatError"] + follower.counts["EventVersionError"] >= 1
    assert follower.counts["gaps"] >= 1
    assert follower.counts["keeper"] == 0


def test_a_gap_that_the_stream_can_fill_needs_no_snapshot(cluster):
    follower = cluster.follower()
    a = cluster.worker()
    a.work(50)
    until(lambda: knows(follower, a))
    assert follower.wait_ready(10)
    follower._live.close()  # from now on nothing comes as it happens; the heartbeat says that there is more
    a.work(50)
    until(lambda: knows(follower, a))
    until(lambda: follower.counts["healed_from_stream"] >= 1)
    assert follower.counts["healed_from_snapshot"] == 0


def test_a_full_queue_drops_events_and_the_gap_is_healed(cluster):
    follower = cluster.follower()
    a = cluster.worker(options=EventOptions(heartbeat_ttl_seconds=1.0, queue_events=16))
    began = time.monotonic()
    a.work(5000)
    assert time.monotonic() - began < 5
    assert a.publisher.dropped > 0
    until(lambda: knows(follower, a), 20, str(follower.counts))
    assert follower.counts["healed_from_snapshot"] >= 1


def test_a_snapshot_of_many_pages_under_traffic(cluster):
    rng = random.Random(cluster.seed)
    held = {rng.randbytes(32): ("disk", rng.randrange(1, 99999)) for _ in range(10_000)}
    a = cluster.worker(held=held)
    a.publisher._snapshots._page = 100
    follower = cluster.follower()
    end = time.monotonic() + 1
    while time.monotonic() < end:
        a.work(20)
        time.sleep(0.005)
    until(lambda: knows(follower, a), 20)
    assert a.publisher._snapshots.pages >= 100


@pytest.mark.parametrize("forgets", [False, True])
def test_a_server_killed_during_traffic_is_found_again(own_cluster, forgets):
    server = own_cluster.server
    a, b = own_cluster.worker("a"), own_cluster.worker("b")
    follower = own_cluster.follower()
    stop = threading.Event()

    def traffic():
        while not stop.is_set():
            a.work(5)
            b.work(5)
            time.sleep(0.002)

    thread = threading.Thread(target=traffic, daemon=True)
    thread.start()
    try:
        until(lambda: follower.counts["events"] > 200)
        server.kill()
        time.sleep(0.2)
        if forgets:
            shutil.rmtree(server.folder / "js")
        server.start()
        time.sleep(0.5)
    finally:
        stop.set()
        thread.join(10)
    until(lambda: knows(follower, a, b), 20, str(follower.counts))
    late = own_cluster.follower("late")
    until(lambda: knows(late, a, b), 20, str(late.counts))


def test_a_killed_worker_drops_out_and_a_stopped_one_comes_back(cluster):
    follower = cluster.follower()
    killed, ask_killed = cluster.process("killed")
    stopped, ask_stopped = cluster.process("stopped")
    ask_killed("work 300")
    ask_stopped("work 300")
    held = {name: len(ask("held")) for name, ask in (("killed", ask_killed), ("stopped", ask_stopped))}
    until(lambda: all(follower.index.entries_of(name) == n for name, n in held.items()))
    until(lambda: set(follower.workers()) == set(held))
    os.kill(killed.pid, signal.SIGKILL)
    os.kill(stopped.pid, signal.SIGSTOP)
    # The time to live is a second; the rest is for a busy machine.
    until(lambda: not follower.index.workers, 5)
    late = cluster.follower("late")
    assert late.wait_ready(10)
    until(lambda: not late.index.workers, 5)
    os.kill(stopped.pid, signal.SIGCONT)
    until(lambda: follower.index.entries_of("stopped") == held["stopped"] == late.index.entries_of("stopped"), 10)
    assert ask_stopped("close") is True
    until(lambda: not follower.index.workers)


def test_garbage_and_forgeries_are_counted_and_logged_once(cluster, caplog):
    caplog.set_level(logging.WARNING)
    follower = cluster.follower()
    a, liar = cluster.worker("a"), cluster.nats()
    a.work(20)
    until(lambda: knows(follower, a))
    epoch, subjects = a.publisher.up.epoch, a.publisher.subjects
    good = encode(Batch("a", epoch, 9, 0, [BlocksCleared()]))
    garbage = [b"", b"x", bytes([99]) + good[1:], good[:-1], good[:9] + b"\xff" + good[10:], b"\1" + bytes(900_000)]
    for payload in garbage * 3:
        assert liar.publish(subjects.events("a"), payload, timeout=5)
    # In another's name, on a subject of its own; saying that it is another; beginning in its midst; at the end of all
    # numbers.
    assert liar.publish(subjects.events("b"), good, timeout=5)
    assert liar.publish(subjects.events("b"), encode(Batch("b", 1, 0, 0, [who("c")])), timeout=5)
    midst = Batch("d", 1, 4, 0, [BlocksCleared(), who("d", epoch=1)])
    assert liar.publish(subjects.events("d"), encode(midst), timeout=5)
    assert liar.publish(subjects.events("a"), encode(Batch("a", epoch, 1 << 60, 0, [BlocksCleared()])), timeout=5)
    forged = encode(Beat(who("zz"), 1, 0, 6.0, WorkerStats()))
    assert liar.publish(f"$KV.{subjects.bucket}.{subjects.beat('a')}", forged, timeout=5)
    a.work(20)
    until(lambda: knows(follower, a), 10, str(follower.counts))
    # More, if they were met again in the stream.
    until(lambda: follower.counts["EventFormatError"] >= 15 and follower.counts["EventVersionError"] >= 3)
    until(lambda: follower.counts["EventError"] >= 4)
    told = [r.getMessage() for r in caplog.records if "passed over" in r.getMessage()]
    assert len(told) == len(set(told)) == 5
    assert follower._live.failed == 0


def test_a_peer_with_other_records_is_never_used_and_logged_once(cluster, caplog):
    caplog.set_level(logging.WARNING)
    follower = cluster.follower()
    newer, other = cluster.worker("newer", record_version=3), cluster.worker("other", model="m2", artifact="cd" * 32)
    third, fits = cluster.worker("third", model="m3", model_name="big"), cluster.worker("fits")
    for worker in (newer, other, third, fits):
        worker.work(50)
    until(lambda: knows(follower, fits) and follower.counts["other_kind"] == 1)
    time.sleep(0.5)
    assert follower.index.workers == ["fits"]
    assert set(follower.workers()) == {"fits"}
    told = [r.getMessage() for r in caplog.records if "records are" in r.getMessage()]
    assert len(told) == 2
    assert any("newer has" in t and "version 3" in t and "version 2" in t for t in told)
    assert any("other serves tiny" in t and "cdcdcdcd" in t and "abababab" in t for t in told)


def test_a_holder_that_lies_in_its_snapshot_ends_it(cluster):
    """Pages without an end, of another worker, or nothing: what others hold is known all the same."""
    follower = cluster.follower(index=Index(1 << 16))
    a, fits = cluster.worker("a", held={bytes(32): ("disk", 5)}), cluster.worker("fits")
    a.publisher._snapshots.answer = None
    a.publisher._served.close()
    turns = iter(range(1_000_000))

    def lie(message):
        from dynamo_kvtc.events.schema import Held, SnapshotAsk, SnapshotPage, decode

        ask = decode(SnapshotAsk, message.data)
        key = next(turns).to_bytes(32, "little")
        return encode(SnapshotPage("a", ask.epoch, ask.page, 5, False, [Held(key, 1, 5)] * 3))

    liar = cluster.nats()
    liar.serve(a.publisher.subjects.snapshot("a"), lie)
    a.publisher._sequence += 5  # if its first snapshot was quicker than this test: another is needed
    a.work(1)
    fits.work(50)
    until(lambda: follower.counts["heal_failed"] >= 1 and knows(follower, fits), 20, str(follower.counts))
    assert follower.index.entries_of("a~") == 0


def test_who_does_not_live_drops_out_while_another_is_slow(cluster):
    follower, a = cluster.follower(), cluster.worker("a")
    a.work(20)
    until(lambda: knows(follower, a))
    began, end = threading.Event(), threading.Event()

    def slow(now):
        began.set()
        end.wait(60)

    follower._heal = slow
    try:
        assert began.wait(10)
        a.publisher._ended.set()  # it says nothing any more
        until(lambda: not follower.index.workers, 10)
    finally:
        end.set()


def test_a_slow_worker_is_left_alone_and_the_quick_come_first(cluster):
    follower = cluster.follower()
    follower._closed.set()
    for thread in follower._threads:
        thread.join(10)
    follower._closed.clear()
    peers = {name: follower._peers.of(name, 1)[0] for name in ("slow", "lost", "quick")}
    healed = []

    def heal(peer):
        healed.append(peer.worker)
        if peer.worker != "quick":
            time.sleep(0.1)
        if peer.worker == "lost":
            raise NatsUnavailableError("as asked")

    follower._heal_from_snapshot = heal
    for failures in (1, 2):
        for peer in peers.values():
            peer.beat, peer.wants_snapshot, peer.behind_since, peer.retry_at = 1, True, 1.0, 0.0
        began = time.monotonic()
        follower._heal(began)
        assert peers["slow"].retry_at >= began + 0.5
        assert peers["lost"].retry_at >= began + 0.5 + 0.25 * 2**failures
    assert healed[:3] == ["slow", "lost", "quick"]
    assert healed[3] == "quick"


def test_without_a_server_everything_waits_for_it(tmp_path):
    from tests.events.servers import Server

    server = Server(tmp_path)
    cluster = Cluster(server, "later")
    try:
        with pytest.raises(NatsUnavailableError):
            cluster.nats(connect_seconds=0.2)
        absent = {"connect_seconds": 0.2, "when_absent": "degraded"}
        a, follower = cluster.worker(nats=cluster.nats(**absent)), cluster.follower(nats=cluster.nats(**absent))
        a.work(100)
        assert follower.index.longest_prefix(list(a.held)) == []
        server.start()
        until(lambda: knows(follower, a), 10)
    finally:
        cluster.close()
        server.stop()


def test_a_publisher_never_waits_and_its_memory_is_bounded(tmp_path):
    from tests.events.servers import Server

    cluster = Cluster(Server(tmp_path), "alone")
    try:
        nats = cluster.nats(connect_seconds=0.2, when_absent="degraded")
        a = cluster.worker(nats=nats, options=EventOptions(queue_events=1000))
        began = time.monotonic()
        for i in range(20_000):
            a.publisher.publish(BlockStored(i.to_bytes(32, "little"), 1, 5))
        assert time.monotonic() - began < 5
        assert len(a.publisher._queue) <= 1000
        assert a.publisher.dropped >= 18_000
        began = time.monotonic()
        assert not a.publisher.close(0.5)
        assert time.monotonic() - began < 5
    finally:
        cluster.close()


@pytest.mark.parametrize("few", [{"batch_events": 7}, {"batch_bytes": 1024}])
def test_batches_are_cut_by_count_and_by_bytes(cluster, few):
    spy = cluster.nats().subscribe(f"kvtc.{cluster.namespace}.m1.events.*")
    a = cluster.worker(options=EventOptions(linger_seconds=10.0, **few))
    for i in range(100):
        a.publisher.stored(i.to_bytes(32, "little"), "disk", (1 << 32) - 1, bytes(32), 1 << 40, 16)
    sizes, got = [], 0
    while got < 7 * (101 // 7) - 7:  # the last ones wait for their time
        message = spy.get(5)
        batch = decode(Batch, message.data)
        assert batch.sequence == got
        got = batch.end
        assert len(message.data) <= 1024 + 128
        sizes.append(len(batch.events))
    assert max(sizes) <= 9
    assert a.publisher.close()
