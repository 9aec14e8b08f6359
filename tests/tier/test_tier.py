"""The facade: blocks out to records and back, in host memory and on disk, and what counts as what."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.codec.policy import ExactPolicy
from tests.builders import case_seed, same_bits
from tests.tier.parts import BLOCK_TOKENS, MIB_OF_GIB, Answer, Engine, load, promise, store


@pytest.fixture
def engine():
    return Engine(case_seed())


def test_blocks_come_back_as_the_codec_has_them(engine):
    tier = engine.tier()
    blocks = engine.sequence(tier, 7)
    assert store(tier, blocks) == []
    engine.wipe([b.block_id for b in blocks])
    assert load(tier, blocks) == []
    k, v = engine.original(blocks)
    codec = BlockCodec(engine.artifact, "fine", ExactPolicy())
    records = codec.encode_blocks(k, v, torch.arange(7 * BLOCK_TOKENS), block_tokens=BLOCK_TOKENS)
    wanted = codec.decode_blocks([r.record for r in records])
    got = engine.pages.read([b.block_id for b in blocks])
    assert same_bits(got[0], wanted[0])
    assert same_bits(got[1], wanted[1])
    m = tier.metrics
    assert m.value("kvtc_stored_blocks", "stored") == m.value("kvtc_loaded_blocks", "loaded") == 7
    assert (
        m.value("kvtc_coded_bytes", "in") == m.value("kvtc_coded_bytes", "out") == sum(len(r.record) for r in records)
    )
    assert m.value("kvtc_raw_bytes", "in") == 7 * BLOCK_TOKENS * engine.shape.bytes_per_token
    assert m.value("kvtc_exact_tokens", "policy") == 4
    assert tier.close()


def test_exact_blocks_come_back_bit_for_bit_from_host_and_disk(engine, folder):
    tier = engine.tier(folder / "tier", exact="all", host_gib=0.05 * MIB_OF_GIB)
    blocks = engine.sequence(tier, 24)
    assert store(tier, blocks) == []
    assert tier.flush()
    tiers = tier.lookup([b.key for b in blocks])
    assert len(tiers) == 24
    assert set(tiers) == {"host", "disk"}
    # A different place for every block: pages are what the engine says, not where they were.
    moved = [b.__class__(b.key, (b.block_id + 1) % engine.blocks, b.first_position) for b in blocks]
    engine.wipe(range(engine.blocks))
    assert load(tier, moved) == []
    k, v = engine.original(blocks)
    got = engine.pages.read([b.block_id for b in moved])
    assert same_bits(got[0], k)
    assert same_bits(got[1], v)
    assert tier.metrics.value("kvtc_lookup_blocks", "hit", "disk") == tiers.count("disk")
    assert tier.close()


def test_a_restart_finds_what_was_written_through(engine, folder):
    tier = engine.tier(folder / "tier", exact="all", write_through=True)
    blocks = engine.sequence(tier, 5)
    assert store(tier, blocks) == []
    assert tier.close()
    again = engine.tier(folder / "tier", exact="all", write_through=True)
    assert again.lookup([b.key for b in blocks]) == ["disk"] * 5
    engine.wipe([b.block_id for b in blocks])
    assert load(again, blocks) == []
    assert same_bits(engine.pages.read([b.block_id for b in blocks])[0], engine.original(blocks)[0])
    again.close()
    # Another policy, point or artifact: other records.
    for options in ({"exact": "sinks"}, {"exact": "all", "point": "coarse"}):
        other = engine.tier(folder / "tier", **options)
        assert other.lookup([other.key(b"x" * 32)]) == []
        assert other.key(b"x" * 32) != again.key(b"x" * 32)
        other.close()


def test_lookup_is_the_longest_prefix(engine):
    tier = engine.tier()
    blocks = engine.sequence(tier, 6)
    store(tier, [b for i, b in enumerate(blocks) if i != 4])
    assert tier.lookup([b.key for b in blocks]) == ["host"] * 4
    assert tier.admit([b.key for b in blocks]) == [False] * 4 + [True, False]
    assert tier.metrics.value("kvtc_stored_blocks", "known") == 5
    tier.close()


def test_a_promise_outlives_the_record(engine):
    tier = engine.tier()
    blocks = engine.sequence(tier, 4)
    store(tier, blocks)
    wanted = engine.pages.read([b.block_id for b in blocks])
    assert load(tier, blocks) == []
    coded = engine.pages.read([b.block_id for b in blocks])
    assert not same_bits(coded[0], wanted[0])
    promises = promise(tier, blocks)
    tier.clear()
    assert tier.lookup([b.key for b in blocks]) == []
    engine.wipe([b.block_id for b in blocks])
    assert load(tier, blocks, promises=[promises[b.key] for b in blocks]) == []
    assert same_bits(engine.pages.read([b.block_id for b in blocks])[0], coded[0])
    tier.close()


def test_a_full_queue_refuses_and_says_so(engine):
    tier = engine.tier(queue_mib=1)
    gate, inside = threading.Event(), threading.Event()
    encode = tier.transcoder.encode

    def slow(staged, put):
        inside.set()
        assert gate.wait(20)
        return encode(staged, put)

    tier.transcoder.encode = slow
    tier._encode._limit = 10 * tier.transcoder.raw_block_bytes
    blocks = engine.sequence(tier, 24)
    first, second = Answer(), Answer()
    assert tier.store(blocks[:8], first)
    assert inside.wait(20)
    assert not tier.has_room(3)
    assert not tier.store(blocks[8:16])
    assert tier.store(blocks[16:18], second)
    assert tier.metrics.value("kvtc_stored_blocks", "queue_full") == 3 + 8
    # What is on its way is not asked for again.
    assert tier.admit([b.key for b in blocks[:9]]) == [False] * 8 + [True]
    gate.set()
    assert first.get() == second.get() == []
    assert tier.lookup([b.key for b in blocks[16:18]]) == ["host"] * 2
    assert tier.flush()
    assert tier.has_room(3)
    tier.close()


def test_blocks_are_staged_before_store_returns(engine):
    """The engine may write into its pages as soon as ``free`` is called."""
    tier = engine.tier(exact="all")
    blocks, free, done = engine.sequence(tier, 4), Answer(), Answer()
    assert tier.store(blocks, done, free)
    free.get(0.1)
    engine.wipe([b.block_id for b in blocks])
    assert done.get() == []
    assert load(tier, blocks) == []
    assert same_bits(engine.pages.read([b.block_id for b in blocks])[0], engine.original(blocks)[0])
    tier.close()


def test_a_load_that_would_be_slower_is_declined(engine):
    tier = engine.tier(prefill_tokens_per_second=1e9)
    blocks = engine.sequence(tier, 4)
    store(tier, blocks)
    assert tier.worth(["host"] * 4)  # nothing measured yet
    load(tier, blocks)
    answers = [tier.worth(["host"] * 4) for _ in range(64)]
    assert answers.count(True) == 2  # now and then one, to measure again
    assert tier.metrics.value("kvtc_lookup_blocks", "declined", "host") == 4 * 62
    tier.close()
    patient = engine.tier(prefill_tokens_per_second=1.0)
    store(patient, blocks := engine.sequence(patient, 4))
    load(patient, blocks)
    assert patient.worth(["host"] * 4)
    patient.close()


def test_demote_copies_under_another_key(engine, folder):
    tier = engine.tier(folder / "tier", exact="all")
    blocks = engine.sequence(tier, 2)
    store(tier, blocks)
    below = [tier.key(b"below%d" % i * 5) for i in range(3)]
    done = Answer()
    assert tier.demote([(blocks[0].key, below[0]), (blocks[1].key, below[1]), (tier.key(b"nothing"), below[2])], done)
    assert done.get() == [below[2]]
    assert tier.lookup(below) == ["disk", "disk"]
    tier.forget([b.key for b in blocks])
    assert tier.lookup([blocks[0].key]) == []
    engine.wipe([b.block_id for b in blocks])
    assert (
        load(tier, [b.__class__(key, b.block_id, b.first_position) for b, key in zip(blocks, below, strict=False)])
        == []
    )
    assert same_bits(engine.pages.read([b.block_id for b in blocks])[0], engine.original(blocks)[0])
    tier.close()


def test_admission(engine):
    tier = engine.tier(min_tokens=64, store_on_use=2)
    keys = [tier.key(b"%d" % i) for i in range(3)]
    assert tier.admit(keys, 63) == [False] * 3
    assert tier.admit(keys, 64) == [False] * 3  # the first use
    assert tier.admit(keys[1:], 64) == [True] * 2
    assert tier.admit(keys, None) == [True] * 3
    assert tier.metrics.value("kvtc_stored_blocks", "not_admitted") == 6
    tier.close()


def test_occupancy_is_told(engine):
    tier = engine.tier(exact="all", host_gib=0.05 * MIB_OF_GIB)
    store(tier, engine.sequence(tier, 24))
    tier.refresh()
    m = tier.metrics
    assert m.value("kvtc_records", "host") < 24
    assert (
        0 < m.value("kvtc_used_bytes", "host") <= m.value("kvtc_budget_bytes", "host") == 0.05 * (1 << 20) // 256 * 256
    )
    evicted = m.value("kvtc_evictions", "host")
    assert evicted == 24 - m.value("kvtc_records", "host")
    tier.refresh()
    assert m.value("kvtc_evictions", "host") == evicted
    assert m.value("kvtc_ratio") == pytest.approx(1, rel=0.2)
    tier.close()


@pytest.mark.parametrize("at", ["queue", "put"])
def test_what_is_coded_while_all_is_forgotten_is_forgotten_too(engine, at):
    """A cache is reset when its contents have become wrong."""
    tier = engine.tier()
    blocks = engine.sequence(tier, 4)
    coded, go = threading.Event(), threading.Event()
    owner, name = (tier.transcoder, "encode") if at == "queue" else (tier._store, "put_many")
    real = getattr(owner, name)

    def late(*what):
        out = real(*what) if at == "put" else None
        coded.set()
        assert go.wait(20)
        return real(*what) if out is None else out

    setattr(owner, name, late)
    done = Answer()
    assert tier.store(blocks, done)
    assert coded.wait(20)
    tier.clear()
    assert tier.lookup([b.key for b in blocks]) == []
    assert tier.admit([b.key for b in blocks]) == [True] * 4
    go.set()
    assert sorted(done.get()) == sorted(b.key for b in blocks)
    assert tier.lookup([b.key for b in blocks]) == []
    assert tier.records.held() == []
    setattr(owner, name, real)
    assert store(tier, blocks) == []
    assert load(tier, blocks) == []
    tier.close()


def test_closing_with_transfers_in_flight(engine, folder):
    """Every callback comes, what was taken is stored or failed, and it is over in time."""
    tier = engine.tier(folder / "tier", write_through=True, close_seconds=5)
    encode = tier.transcoder.encode
    tier.transcoder.encode = lambda staged, put: (time.sleep(0.05), encode(staged, put))[1]
    blocks = engine.sequence(tier, 24)
    answers = [Answer() for _ in range(8)]
    for i, done in enumerate(answers):
        assert tier.store(blocks[3 * i : 3 * i + 3], done)
    loads = [Answer() for _ in range(5)]
    for done in loads:
        tier.load(blocks[:2], done)
    began = time.monotonic()
    assert tier.close(8.0)
    assert time.monotonic() - began < 8
    failed = [key for done in answers for key in done.get(1)]
    assert failed == []
    for done in loads:
        done.get(1)
    assert not tier.store(blocks[:1], Answer())
    assert not tier.load(blocks[:1], Answer())
    assert tier.lookup([blocks[0].key]) == []
    assert tier.close()


def test_a_record_that_no_store_takes_costs_no_other(monkeypatch):
    engine = Engine(case_seed())
    tier = engine.tier()
    blocks = engine.sequence(tier, 5)
    bad = engine.k[:, :, 2 * BLOCK_TOKENS : 3 * BLOCK_TOKENS].clone()
    engine.pages.write([blocks[2].block_id], bad * float("nan"), bad)
    monkeypatch.setattr("dynamo_kvtc.tier.work.MAX_RECORD_BYTES", tier.transcoder.raw_block_bytes)
    assert store(tier, blocks) == [blocks[2].key]
    assert tier.lookup([b.key for b in blocks]) == ["host"] * 2
    assert tier.lookup([b.key for b in blocks[3:]]) == ["host"] * 2
    assert tier.metrics.value("kvtc_stored_blocks", "stored") == 4
    assert tier.metrics.value("kvtc_stored_blocks", "failed") == 1
    assert tier.metrics.value("kvtc_errors", "encode_too_large") == 1
    tier.close()
