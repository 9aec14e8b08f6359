"""`kvtc watch` against a real server."""

from __future__ import annotations

import json
import time

import pytest
from click.testing import CliRunner

from dynamo_kvtc.cli.main import main
from dynamo_kvtc.cli.watch import table
from dynamo_kvtc.events.board import Board
from dynamo_kvtc.events.jetstream import Bucket
from dynamo_kvtc.events.nats import open_nats
from dynamo_kvtc.events.options import EventOptions, NatsOptions
from dynamo_kvtc.events.publisher import Publisher
from dynamo_kvtc.events.schema import Beat, Subjects, WorkerStats, encode
from tests.events.conftest import shared_server  # noqa: F401
from tests.events.servers import free_port
from tests.events.worker import who
from tests.waiting import until


@pytest.fixture
def nats(shared_server):  # noqa: F811
    made = open_nats(NatsOptions(servers=(shared_server.url,), namespace="watched"))
    yield made
    made.close()


def watch(nats, *more):
    command = ["watch", "--server", nats.options.servers[0], "--namespace", nats.options.namespace, *more]
    return CliRunner().invoke(main, command)


def test_it_shows_who_is_there_once(nats):
    told = watch(nats, "--once", "--json")
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout) == {"workers": [], "bad": {}}
    stats = WorkerStats({"host": 12, "disk": 3456}, {"host": 480_000, "disk": 99_000_000}, 75, 25, 2000, 100, 5000, 7)
    publisher = Publisher(nats, who("w1"), stats=lambda: stats, options=EventOptions(heartbeat_ttl_seconds=2.0))
    try:
        until(lambda: json.loads(watch(nats, "--once", "--json").stdout)["workers"])
        (line,) = json.loads(watch(nats, "--once", "--json").stdout)["workers"]
        assert (line["worker"], line["model"], line["hit_rate"], line["ratio"]) == ("w1", "m1", 0.75, 20.0)
        assert line["stats"]["entries"] == {"host": 12, "disk": 3456}
        shown = watch(nats, "--once").stdout
        for part in ("1 workers", "w1", "tiny", "abababab", "12 (480 kB)", "3,456 (99.0 MB)", "75%", "20.0x"):
            assert part in shown, shown
    finally:
        publisher.close()
    until(lambda: not json.loads(watch(nats, "--once", "--json").stdout)["workers"])


def test_an_absent_server_is_one_line(monkeypatch):
    monkeypatch.setattr("dynamo_kvtc.events.options.NatsOptions.connect_seconds", 0.3)
    done = CliRunner().invoke(main, ["watch", "--once", "--server", f"127.0.0.1:{free_port()}"])
    assert done.exit_code == 2
    assert "error: no NATS server at nats://127.0.0.1" in done.output
    assert CliRunner().invoke(main, ["watch", "--server", "http://x"]).exit_code == 2


def test_a_board_follows_forgets_and_bears_garbage(nats):
    bucket = Bucket(nats, Subjects("watched", "*").bucket, 2.0)
    bucket.ensure()
    board = Board(nats)
    board.follow()
    up = who("w2")
    try:
        bucket.put("m1.w2", encode(Beat(up, 1, 0, 1.0, WorkerStats(pulled_bytes=1000))))
        until(board.lines)
        time.sleep(0.1)
        bucket.put("m1.w2", encode(Beat(up, 2, 0, 1.0, WorkerStats(pulled_bytes=3000))))
        bucket.put("m1.w3", encode(Beat(up, 2, 0, 1.0, WorkerStats())))
        bucket.put("m1.w4", b"garbage")
        until(lambda: board.lines()[0].rates and sum(board.bad.values()) >= 2)
        assert 0 < board.lines()[0].rates["pulled_bytes"] < 2000 / 0.1
        assert table(board.lines()).row_count == 1
        until(lambda: not board.lines(), 3, "a worker that is silent stays")
    finally:
        board.close()
