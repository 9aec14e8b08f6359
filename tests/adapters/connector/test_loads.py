"""Loads over real tiers and a real NATS server, without an engine: what is in the pages, and what is said of it."""

from __future__ import annotations

import random
import time

import pytest
import torch

from dynamo_kvtc.adapters.connector.cluster import Cluster, Remote
from dynamo_kvtc.adapters.connector.loads import Load, LoadOrder, Trace
from dynamo_kvtc.adapters.connector.options import parse_connector
from dynamo_kvtc.errors import NatsUnavailableError
from tests.adapters.connector.servers import server
from tests.builders import case_seed
from tests.tier.parts import POISON, Answer, Engine, store
from tests.tier.parts import load as load_whole
from tests.waiting import until

__all__ = ["server"]
SECONDS = (20.0, 20.0)


def cluster_of(engine: Engine, tier, url: str, **nats) -> Cluster:
    extra = {
        "artifact": "given", "point": "fine", "host_gib": 1, "nats": {"servers": url, "namespace": "t", **nats},
        "heartbeat_ttl_seconds": 1.0, "pull_seconds": SECONDS[0], "handoff_seconds": 5.0,
    }  # fmt: skip
    return Cluster(parse_connector(extra), tier, engine.artifact)


class Side:
    def __init__(self, seed: int, url: str, **nats) -> None:
        self.engine = Engine(seed)
        self.tier = self.engine.tier()
        self.cluster = cluster_of(self.engine, self.tier, url, **nats)

    def close(self) -> None:
        self.cluster.close()
        assert self.tier.close()


@pytest.fixture
def two(server):
    seed = case_seed()
    made = [Side(seed, server.url) for _ in range(2)]
    yield made
    for side in made:
        side.close()


def load(side: Side, blocks, remote=None, layerwise=False, seconds=SECONDS) -> tuple[Load, Answer]:
    told = Answer()
    made = Load(
        LoadOrder("r", blocks, remote or {}, layerwise), side.tier, side.cluster, seconds, Trace(None), None, told
    )  # fmt: skip
    made.start()
    return made, told


def right(side: Side, blocks) -> bool:
    """Bit for bit what a load of whole records, at once, puts there."""
    k, v = side.engine.pages.read([b.block_id for b in blocks])
    side.engine.wipe([b.block_id for b in blocks])
    assert load_whole(side.tier, blocks) == []
    wanted = side.engine.pages.read([b.block_id for b in blocks])
    return all(torch.equal(x.view(torch.int16), y.view(torch.int16)) for x, y in zip((k, v), wanted, strict=True))


def test_of_both_sides_each_block_comes_from_where_it_is(two):
    a, b = two
    blocks = a.engine.sequence(a.tier, 10)
    assert store(a.tier, blocks) == []
    mine = b.engine.sequence(b.tier, 12)
    assert [x.key for x in mine[:10]] == [x.key for x in blocks]
    assert store(b.tier, mine[3:5]) == []
    until(lambda: len(b.cluster.longest_prefix([x.key for x in mine])) == 10)
    found = b.cluster.longest_prefix([x.key for x in mine])
    assert {h for told in found for h in told.holders} == {a.cluster.worker}
    remote = {x.key: told for x, told in zip(mine, found, strict=False) if x not in mine[3:5]}
    b.engine.wipe([x.block_id for x in mine])
    made, told = load(b, mine[:10], remote)
    told.get()
    assert made.failed == []
    assert right(b, mine[:10])
    # They are the tier's now, and told to others.
    assert b.tier.lookup([x.key for x in mine]) == ["host"] * 10
    until(lambda: a.cluster.follower.index.entries_of(b.cluster.worker) == 10)
    assert b.tier.metrics.value("kvtc_pulled_blocks", "pulled") == 8
    assert sum(b.tier.records.host._shelf.pins) == 0


def test_the_first_that_is_missing_ends_what_is_loaded(two):
    a, b = two
    rng = random.Random(case_seed())
    blocks = a.engine.sequence(a.tier, 8)
    assert store(a.tier, blocks) == []
    mine = b.engine.sequence(b.tier, 8)
    until(lambda: len(b.cluster.longest_prefix([x.key for x in mine])) == 8)
    remote = {x.key: told for x, told in zip(mine, b.cluster.longest_prefix([x.key for x in mine]), strict=True)}
    gone = rng.randrange(1, 8)
    a.tier.forget([blocks[gone].key])
    b.engine.wipe([x.block_id for x in mine])
    made, told = load(b, mine, remote)
    told.get()
    assert [x.key for x in made.failed] == [x.key for x in mine[gone:]]
    assert right(b, mine[:gone])
    assert sum(b.tier.records.host._shelf.pins) == 0
    # The same of a record that the tier was said to have.
    made, told = load(a, blocks, {})
    told.get()
    assert [x.key for x in made.failed] == [x.key for x in blocks[gone:]]


def test_gates_open_group_by_group_and_a_damaged_record_is_found(two):
    a, _ = two
    blocks = a.engine.sequence(a.tier, 6)
    assert store(a.tier, blocks) == []
    host = a.tier.records.host
    with host.get(blocks[4].key) as lease:
        host._view[lease.offset + len(lease) - 3] ^= 8
    a.engine.wipe([x.block_id for x in blocks])
    made, told = load(a, blocks, layerwise=True)
    assert made.wait(0, time.monotonic() + 60)
    assert made.wait(1, time.monotonic() + 60)
    made.wait_ended(time.monotonic() + 60)
    told.get()
    assert [x.key for x in made.failed] == [x.key for x in blocks[4:]]
    assert right(a, blocks[:4])
    assert a.tier.lookup([blocks[4].key]) == []


def test_a_holder_that_nobody_knows_and_one_that_says_nothing(two):
    _, b = two
    mine = b.engine.sequence(b.tier, 3)
    made, told = load(b, mine, {x.key: Remote(5000, ("nobody",)) for x in mine}, seconds=(0.5, 20.0))
    told.get()
    assert made.failed == mine
    assert sum(b.tier.records.host._shelf.pins) == 0
    # What is more than a pull may be is refused, and computed.
    made, told = load(b, mine, {x.key: Remote(1 << 31, ("nobody",)) for x in mine[:1]}, seconds=(0.5, 20.0))
    told.get()
    assert made.failed == mine


def test_a_load_that_is_given_up_writes_nothing_afterwards(two):
    a, b = two
    blocks = a.engine.sequence(a.tier, 8)
    assert store(a.tier, blocks) == []
    mine = b.engine.sequence(b.tier, 8)
    until(lambda: len(b.cluster.longest_prefix([x.key for x in mine])) == 8)
    remote = {x.key: told for x, told in zip(mine, b.cluster.longest_prefix([x.key for x in mine]), strict=True)}
    made, told = load(b, mine, remote)
    made.give_up()
    told.get()
    assert made.failed == mine
    b.engine.wipe([x.block_id for x in mine])
    time.sleep(0.2)
    k, _ = b.engine.pages.read([x.block_id for x in mine])
    assert (k == POISON).all()
    assert sum(b.tier.records.host._shelf.pins) == 0


def test_a_prefill_worker_is_asked_what_it_has(two):
    a, b = two
    blocks = a.engine.sequence(a.tier, 6)
    keys = [x.key for x in blocks]
    told = Answer()
    # Asked while they are being coded.
    assert a.tier.store(blocks[:5])
    b.cluster.ask_holder(a.cluster.worker, keys, told)
    found = told.get()
    assert [r.size for r in found] == [a.tier.size(key) for key in keys[:5]]
    told = Answer()
    b.cluster.ask_holder("nobody", keys, told)
    assert told.get() == []


def test_without_a_server_it_fails_or_serves_alone(server):
    seed, url = case_seed(), server.url
    engine = Engine(seed)
    server.stop()
    tier = engine.tier()
    began = time.monotonic()
    with pytest.raises(NatsUnavailableError, match="NATS"):
        cluster_of(engine, tier, url, connect_seconds=0.3)
    assert time.monotonic() - began < 20
    side = Side(seed, url, connect_seconds=0.3, when_absent="degraded")
    assert side.cluster.longest_prefix([side.tier.key(b"x" * 32)]) == []
    blocks = side.engine.sequence(side.tier, 4)
    assert store(side.tier, blocks) == []
    server.start()
    other = Side(seed, url)
    # What it held before there was a server is found, too.
    until(lambda: len(other.cluster.longest_prefix([x.key for x in blocks])) == 4, 20)
    other.close()
    side.close()
    assert tier.close()
