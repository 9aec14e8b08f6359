"""deploy/nats is accepted by a real server, lets workers work, and keeps a watcher from more than watching."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynamo_kvtc.adapters.connector import handoff
from dynamo_kvtc.errors import ConfigError, NatsRefusedError, NatsUnavailableError
from dynamo_kvtc.events.follower import Follower
from dynamo_kvtc.events.index import Index
from dynamo_kvtc.events.jetstream import Bucket, Limits, Stream
from dynamo_kvtc.events.nats import open_nats
from dynamo_kvtc.events.options import EventOptions, NatsOptions
from dynamo_kvtc.events.schema import Batch, Beat, BlocksCleared, Subjects, decode, encode
from dynamo_kvtc.transfer.nats import NatsPlane
from dynamo_kvtc.transfer.pull import Puller
from dynamo_kvtc.transfer.serve import Server
from tests.builders import case_seed
from tests.events.servers import Server as NatsServer
from tests.events.test_cluster import knows
from tests.events.worker import Worker, who
from tests.transfer.records import EXPECTED, PEERS, make_records, store_of, wanted_of
from tests.waiting import until

DEPLOY = Path(__file__).parents[2] / "deploy" / "nats"


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    pytest.importorskip("nkeys")
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    folder = tmp_path_factory.mktemp("deploy")
    shutil.copy(DEPLOY / "nats-server.conf", folder)
    command = [sys.executable, str(DEPLOY / "make_keys.py"), "--folder", str(folder), "--host", "127.0.0.1"]
    subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)
    server = NatsServer(folder, file=folder / "nats-server.conf").start()
    yield server
    server.stop()


@pytest.fixture
def enter(deployed):
    made = []

    def one(user, **more):
        options = {"nkey_seed": str(deployed.folder / f"{user}.nk"), "inbox_prefix": f"_INBOX_{user}",
                   "tls_ca": str(deployed.folder / "tls/ca.pem"), "connect_seconds": 5.0}  # fmt: skip
        made.append(open_nats(NatsOptions(servers=(deployed.url,), **(options | more))))
        return made[-1]

    yield one
    for nats in reversed(made):
        nats.close()


def test_keys_are_their_owners_alone(deployed):
    for path in [*deployed.folder.glob("*.nk"), *deployed.folder.glob("tls/*.key")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_workers_work(deployed, enter):
    fast = EventOptions(heartbeat_ttl_seconds=1.0, stream_mib=8, stream_messages=3, batch_events=16)
    a = Worker(enter("worker"), who("a"), case_seed(), fast)
    follower = Follower(enter("worker"), who("b"), Index(1 << 20), fast)
    a.work(300)
    until(lambda: knows(follower, a), told=str(follower.counts))
    assert a.publisher.flush()
    late = Follower(enter("worker"), who("c"), Index(1 << 20), fast)
    until(lambda: knows(late, a) and late.counts["healed_from_snapshot"] == 1, told=str(late.counts))
    seen = {}
    watch = Bucket(enter("watcher"), a.publisher.subjects.bucket, 1.0, create=False).watch(seen.__setitem__)
    until(lambda: "m1.a" in seen)
    assert decode(Beat, seen["m1.a"]).up.worker == "a"
    for end in (watch, late, follower, a.publisher):
        assert end.close()


def test_workers_transfer(enter):
    """More frames than may be under way, so that credits have to get through, too."""
    rng, base = random.Random(case_seed()), "kvtc.dynamo.model-key.pull.a"
    records = make_records(rng, 100, 50_000, 60_000)
    holder, asker = enter("worker"), enter("worker")
    planes = [NatsPlane(holder, base), NatsPlane(asker, "kvtc.dynamo.model-key.pull.b")]
    server = Server(store_of(records), PEERS, planes[:1])
    sizes = holder.serve(handoff.subject_of(base), handoff.serve(lambda key: len(records[key])))
    assert handoff.ask(asker, handoff.subject_of(base), list(records), time.monotonic() + 5) == [
        len(record) for record in records.values()
    ]
    puller = Puller(planes[1:], {"a": server.addresses}.__getitem__, PEERS, EXPECTED)
    slots = [memoryview(bytearray(len(record))) for record in records.values()]
    assert puller.pull(wanted_of(records, "a"), 30, slots).result() == [""] * len(records)
    assert [bytes(slot) for slot in slots] == list(records.values())
    puller.close()
    assert server.close(5)
    assert sizes.close(1)
    for plane in planes:
        plane.close()


def test_a_watcher_can_only_watch(deployed, enter):
    watcher, operator, worker = enter("watcher"), enter("operator"), enter("worker")
    subjects = Subjects("dynamo", "m1")
    Stream(operator, subjects.stream, subjects.stream_subjects, Limits(bytes=8 << 20)).ensure()
    events, beats = operator.subscribe("kvtc.>"), operator.subscribe("$KV.>")
    forged = encode(Batch("a", 1, 0, 0, [BlocksCleared()]))
    for subject in (subjects.events("a"), subjects.snapshot("a"), f"$KV.{subjects.bucket}.m1.a"):
        assert watcher.publish(subject, forged, timeout=1)
        with pytest.raises(NatsRefusedError, match="ermissions"):
            watcher.request(subject, forged, 5)
    for what in ("STREAM.DELETE", "STREAM.PURGE", "STREAM.INFO"):
        with pytest.raises(NatsRefusedError, match="ermissions"):
            watcher.request(f"$JS.API.{what}.{subjects.stream}", b"", 5)
    assert watcher.flush()
    blocks = watcher.subscribe("kvtc.>")
    assert worker.publish(subjects.events("a"), forged)
    assert worker.flush()
    got = events.get(5)
    assert (got.subject, got.data) == (subjects.events("a"), forged)  # the worker's, and nothing of the watcher's
    assert events.get(0.1) is None
    assert beats.get(0.1) is None
    assert blocks.get(0.1) is None


def test_a_worker_stays_in_its_namespace_and_out_of_inboxes(enter):
    worker, operator = enter("worker"), enter("operator")
    seen = operator.subscribe(">")
    for subject in (
        "kvtc.other.m1.events.a",
        "_INBOX_watcher.x",
        "_INBOX_worker.x",
        "$JS.API.STREAM.DELETE.KVTC_dynamo_EVENTS",
    ):
        began = time.monotonic()
        with pytest.raises(NatsRefusedError, match="ermissions"):
            worker.request(subject, b"", 5)
        assert time.monotonic() - began < 4
    assert worker.connected
    assert seen.get(0.1) is None


def test_who_has_no_key_or_no_tls_does_not_get_in(deployed, enter):
    files = {"connect_seconds": 0.5}
    for more in (
        {"nkey_seed": None},
        {"tls_ca": None},
        {"tls_ca": str(_other_ca(deployed.folder))},
    ):
        with pytest.raises(NatsUnavailableError):
            enter("worker", **(files | more))


def test_a_worker_with_tls_never_speaks_in_the_clear(shared_server, deployed):
    files = {"servers": (shared_server.url,), "connect_seconds": 0.5}
    with pytest.raises(NatsUnavailableError, match="secure connection"):
        open_nats(NatsOptions(tls_ca=str(deployed.folder / "tls/ca.pem"), **files))
    with pytest.raises(ConfigError, match="TLS files"):
        open_nats(NatsOptions(tls_ca=__file__, **files))


def _other_ca(folder):
    path = folder / "other.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout",
               str(folder / "other.key"), "-out", str(path), "-subj", "/CN=kvtc"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return path
