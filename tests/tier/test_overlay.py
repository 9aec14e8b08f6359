"""A conversation's tail, exact beside its coded records: preferred, first to go, never on disk, gone once outgrown."""

from __future__ import annotations

import pytest

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.tier.options import TierOptions
from tests.builders import case_seed, same_bits
from tests.store.stores import MIB, host, key_of, record_of
from tests.tier.parts import BLOCK_TOKENS, MIB_OF_GIB, SHAPE, Answer, Engine, load, promise, store

RAW = BLOCK_TOKENS * SHAPE.bytes_per_token


@pytest.fixture
def engine():
    return Engine(case_seed())


def store_with_tail(tier, blocks, tail):
    done = Answer()
    assert tier.store(blocks, done, tail={b.key for b in tail})
    assert done.get() == []


def exact_ones(tier, engine, blocks):
    """Which of the blocks come back bit for bit."""
    engine.wipe([b.block_id for b in blocks])
    assert load(tier, blocks) == []
    return [
        all(same_bits(a, b) for a, b in zip(engine.pages.read([x.block_id]), engine.original([x]), strict=True))
        for x in blocks
    ]


def test_the_tail_comes_back_exact(engine):
    tier = engine.tier()
    blocks = engine.sequence(tier, 8)
    assert tier.window == 128
    store_with_tail(tier, blocks, blocks[5:])
    tier.refresh()
    m = tier.metrics
    # What is counted as stored is the coded records, as if there were no others.
    assert m.value("kvtc_stored_blocks", "stored") == 8
    assert m.value("kvtc_raw_bytes", "in") == 8 * RAW
    assert m.value("kvtc_exact_tokens", "policy") == 4
    assert m.value("kvtc_ratio") > 1.2
    assert m.value("kvtc_overlay_blocks", "stored") == 3
    assert 3 * RAW < m.value("kvtc_overlay_bytes") < 3 * RAW + 3000
    assert exact_ones(tier, engine, blocks) == [False] * 5 + [True] * 3
    assert m.value("kvtc_overlay_blocks", "hit") == 3
    assert m.value("kvtc_lookup_blocks", "hit", "host") == 8
    # The sequence grows past it, is forgotten, is cleared.
    tier.moved_on([b.key for b in blocks[:6]])
    assert m.value("kvtc_overlay_blocks", "moved_on") == 1
    assert exact_ones(tier, engine, blocks) == [False] * 6 + [True] * 2
    tier.forget([blocks[7].key])
    assert load(tier, blocks[7:]) == [blocks[7].key]
    assert tier._store.host.spare_bytes < RAW + 1000
    tier.clear()
    assert tier._store.host.spare_bytes == 0
    assert tier.close()


def test_coded_records_come_first_and_exact_ones_never_reach_the_disk(engine, folder):
    raw_blocks = 6
    tier = engine.tier(folder / "tier", host_gib=raw_blocks * RAW / (1 << 30), write_through=True)
    blocks = engine.sequence(tier, 20)
    store_with_tail(tier, blocks[:4], blocks[2:4])
    assert tier._store.host.spare_bytes > 0
    for i in range(4, 20):
        store_with_tail(tier, blocks[i : i + 1], blocks[i : i + 1])
        kept = tier._store.host.stats()
        assert kept.used_bytes <= kept.budget_bytes
    assert tier.flush()
    disk = tier._store.disk
    assert disk.stats().entries == 20
    assert all(disk.durable(b.key) for b in blocks)
    assert not any(disk.contains(tier._overlay.key(b.key)) for b in blocks)
    # While a lasting record was evicted there was no spare one to take.
    assert tier.metrics.value("kvtc_overlay_blocks", "no_room") > 0
    exact_ones(tier, engine, blocks)
    assert tier.close()
    again = engine.tier(folder / "tier")
    assert not any(exact_ones(again, engine, blocks[4:]))
    again.close()


def test_a_damaged_exact_record_is_replaced_by_the_coded_one(engine):
    tier = engine.tier()
    blocks = engine.sequence(tier, 4)
    store_with_tail(tier, blocks, blocks)
    shelf = tier._store.host
    key = tier._overlay.key(blocks[2].key)
    with shelf.get(key) as lease:
        shelf._view[lease.offset + len(lease) - 7] ^= 4
    assert exact_ones(tier, engine, blocks) == [True, True, False, True]
    assert not shelf.contains(key)
    assert tier.metrics.value("kvtc_errors", "record_RecordCorruptError") == 1
    assert tier.metrics.value("kvtc_lookup_blocks", "miss", "host") == 0
    assert tier.metrics.value("kvtc_loaded_blocks", "loaded") == 4
    held = promise(tier, blocks)
    tier.moved_on([b.key for b in blocks])
    assert load(tier, blocks, promises=[held[b.key] for b in blocks]) == []
    tier.close()


def test_exact_copies_never_make_a_full_queue_refuse(engine):
    tier = engine.tier()
    tier._encode._limit = 5 * RAW
    blocks = engine.sequence(tier, 4)
    tier._encode.put(lambda waited: None, lambda why: None, 0)
    gate = Answer()
    tier._encode.put(lambda waited: gate.get(), lambda why: None, RAW)
    done = Answer()
    assert tier.store(blocks, done, tail={b.key for b in blocks})
    gate()
    assert done.get() == []
    assert tier._store.host.spare_bytes == 0
    tier.close()


def test_without_a_window_or_a_host_nothing_is_made(engine, folder):
    for options in ({"window": 0}, {"exact": "all"}, {"host_gib": 0.0}):
        tier = engine.tier(folder / "tier", **options)
        assert tier.window == 0
        blocks = engine.sequence(tier, 3)
        store_with_tail(tier, blocks, blocks)
        assert tier.metrics.value("kvtc_overlay_blocks", "stored") == 0
        tier.moved_on([blocks[0].key])
        tier.close()
    for options in ({"exact": "all"}, {"host_gib": 0, "disk_gib": 1, "disk_path": "/x"}):
        with pytest.raises(ConfigError, match=r"window is 64, host_gib .* or set window to 0"):
            TierOptions(**{"artifact": "a", "host_gib": 1.0, "window": 64, **options})
    assert engine.tier(window=16).window == 16


def test_spare_records_give_way():
    """The store's side: a spare record takes free room or another spare one's, a lasting one takes any."""
    told = []
    store = host(1 * MIB)
    store.on_evicted = lambda key, lease: told.append(int.from_bytes(key, "big"))
    size = 100_000
    for i in range(4):
        assert store.put(key_of(i), record_of(i, size))
    for i in range(100, 108):
        assert store.put(key_of(i), record_of(i, size), spare=True)
    spare = [i for i in range(100, 108) if store.contains(key_of(i))]
    assert spare == [102, 103, 104, 105, 106, 107]
    with store.get(key_of(102)) as lease:
        assert lease.record == record_of(102, size)  # now the newest of them
    with store.get(key_of(103)):  # on lease: it cannot go
        assert store.put(key_of(4), record_of(4, size))
        assert not store.contains(key_of(104))
    for i in range(5, 10):
        assert store.put(key_of(i), record_of(i, size))
    assert told == []
    assert store.spare_bytes == 0
    assert store.stats().evictions == 0
    assert store.put(key_of(10), record_of(10, size))
    assert told == [0]
    assert not store.put(key_of(200), record_of(200, size), spare=True)
    assert store.stats().refused == 0
    assert store.spare_room < size
    # A key that is there stays what it is.
    assert store.put(key_of(10), b"x", spare=True)
    assert store.spare_bytes == 0


def test_nothing_is_exact_unless_a_tail_is_told(engine):
    tier = engine.tier(host_gib=4 * MIB_OF_GIB, window=8)
    assert tier.window == 8
    store(tier, engine.sequence(tier, 2))
    assert tier.metrics.value("kvtc_overlay_blocks", "stored") == 0
    tier.close()
