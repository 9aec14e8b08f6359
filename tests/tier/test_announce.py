"""A tier's records are known to another worker: where they lie, when they go, and after a restart from disk."""

from __future__ import annotations

import pytest

from dynamo_kvtc.codec.record import VERSION
from dynamo_kvtc.events.follower import Follower
from dynamo_kvtc.events.index import Index
from dynamo_kvtc.events.nats import open_nats
from dynamo_kvtc.events.options import EventOptions, NatsOptions
from dynamo_kvtc.events.schema import WorkerUp, new_epoch
from dynamo_kvtc.events.server import LocalServer
from tests.builders import case_seed
from tests.tier.parts import BLOCK_TOKENS, MIB_OF_GIB, Engine, load, store
from tests.waiting import until

FAST = EventOptions(heartbeat_ttl_seconds=1.0, stream_mib=8)


@pytest.fixture
def nats():
    pytest.importorskip("nats")
    with LocalServer() as server:
        made = open_nats(NatsOptions(servers=(server.url,)))
        yield made
        made.close()


def announce(engine, tier, nats):
    return tier.announcer.start(nats, "holder", tier.keys, engine.artifact, BLOCK_TOKENS, options=FAST)


def follow(engine, tier, nats):
    m = engine.artifact.manifest.model.model_id
    me = WorkerUp("asker", new_epoch(), tier.keys.identity, m, engine.artifact.digest, VERSION, BLOCK_TOKENS)
    return Follower(nats, me, Index(1 << 20), FAST)


def seen(follower, tier, blocks):
    """What is known of these blocks, against what the store says."""
    held = {key: (tier_name, size) for key, tier_name, size in tier._store.held()}
    for block in blocks:
        found = follower.index.longest_prefix([block.key])
        if (held.get(block.key) is None) != (not found):
            return False
        if found and tuple(found[0][0][1:]) != held[block.key]:
            return False
    return follower.index.entries_of("holder") == len(held)


def test_what_a_tier_holds_is_known_to_others(tmp_path, nats):
    engine = Engine(case_seed())
    tier = engine.tier(tmp_path / "disk", window=0)
    blocks = engine.sequence(tier, 24)
    assert store(tier, blocks[:4]) == []
    publisher, follower = announce(engine, tier, nats), follow(engine, tier, nats)
    try:
        until(lambda: seen(follower, tier, blocks))  # from a snapshot: it was there before
        assert len(follower.index.longest_prefix([b.key for b in blocks])) == 4
        assert store(tier, blocks[4:]) == []
        until(lambda: seen(follower, tier, blocks))
        tier._store.host.remove(blocks[0].key)
        tier.forget([b.key for b in blocks[1:3]])
        until(lambda: not follower.index.longest_prefix([blocks[1].key]))
        assert load(tier, blocks[3:]) == []
        stats = tier.announcer.stats()
        assert stats.raw_bytes > stats.coded_bytes > 0
        assert sum(stats.entries.values()) >= 21
        tier.clear()
        until(lambda: follower.index.entries_of("holder") == 0)
    finally:
        assert publisher.close()
        assert follower.close()
        tier.close()


def test_evictions_and_a_restart_are_known(tmp_path, nats):
    """A host of 16 KiB over a disk: records move down, and are found on the disk by the next process."""
    engine = Engine(case_seed())
    options = {"host_gib": MIB_OF_GIB / 64, "window": 0}
    tier = engine.tier(tmp_path / "disk", **options)
    follower = follow(engine, tier, nats)
    publisher = announce(engine, tier, nats)
    blocks = engine.sequence(tier, 24)
    try:
        for i in range(4):
            assert store(tier, engine.sequence(tier, 24, i)) == []
        assert tier.flush()
        assert {t for _, t, _ in tier._store.held()} == {"host", "disk"}
        until(lambda: seen(follower, tier, blocks))
        assert publisher.close()
        until(lambda: not follower.index.workers)
        tier.close()
        tier = engine.tier(tmp_path / "disk", **options)
        assert tier._store.held()
        publisher = announce(engine, tier, nats)
        until(lambda: seen(follower, tier, blocks))
    finally:
        publisher.close()
        follower.close()
        tier.close()
