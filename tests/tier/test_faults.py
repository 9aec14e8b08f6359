"""What goes wrong: it costs a recompute, is counted, and never raises, hangs or leaves a page that counts as good."""

from __future__ import annotations

import threading
import time

import pytest

from tests.builders import case_seed, make_artifact, same_bits
from tests.threads import hammer
from tests.tier.parts import BLOCK_TOKENS, MIB_OF_GIB, POISON, SHAPE, Answer, Engine, load, promise, store


@pytest.fixture
def engine():
    return Engine(case_seed())


def flip(tier, key, at):
    host = tier._store.host
    with host.get(key) as lease:
        host._view[lease.offset + at % len(lease)] ^= 0x10


@pytest.mark.parametrize("at", [0, 5, 30, 50, 80, -1])
def test_a_record_flipped_in_memory_is_a_miss(engine, at):
    tier = engine.tier()
    blocks = engine.sequence(tier, 5)
    store(tier, blocks)
    flip(tier, blocks[2].key, at)
    engine.wipe([b.block_id for b in blocks])
    gone = []
    tier._store._on_removed = gone.append
    assert load(tier, blocks) == [blocks[2].key]
    assert gone == [blocks[2].key], "others who look for it here are told"
    page = engine.pages.read([blocks[2].block_id])
    assert (page[0] == POISON).all()
    assert (page[1] == POISON).all()
    assert tier.lookup([b.key for b in blocks]) == ["host"] * 2  # it is forgotten
    assert tier.metrics.value("kvtc_lookup_blocks", "miss", "host") == 1
    assert tier.metrics.value("kvtc_loaded_blocks", "failed") == 1
    assert store(tier, [blocks[2]]) == []
    assert tier.lookup([b.key for b in blocks]) == ["host"] * 5
    tier.close()


def test_a_record_flipped_on_disk_is_a_miss(engine, folder):
    tier = engine.tier(folder / "tier", exact="all", write_through=True)
    blocks = engine.sequence(tier, 6)
    store(tier, blocks)
    tier.flush()
    tier._store.host.clear()
    data = folder / "tier" / "rank0" / "records"
    raw = bytearray(data.read_bytes())
    for at in range(60, len(raw), 4096):
        raw[at] ^= 1
    data.write_bytes(raw)
    assert sorted(load(tier, blocks)) == sorted(b.key for b in blocks)
    tier.refresh()
    assert tier.metrics.value("kvtc_errors", "disk_corrupt") == 6
    assert tier.lookup([blocks[0].key]) == []
    tier.close()


def test_a_record_of_another_block_is_never_loaded(engine):
    """Should a key ever name the wrong record: the position in it must be the block's."""
    tier = engine.tier()
    blocks = engine.sequence(tier, 4)
    store(tier, blocks)
    wrong = blocks[1].__class__(blocks[1].key, blocks[1].block_id, blocks[3].first_position)
    engine.wipe([b.block_id for b in blocks])
    assert load(tier, [blocks[0], wrong]) == [wrong.key]
    assert (engine.pages.read([wrong.block_id])[0] == POISON).all()
    tier.close()


def test_a_replaced_artifact_finds_nothing(engine, folder):
    tier = engine.tier(folder / "tier", write_through=True)
    blocks = engine.sequence(tier, 3)
    store(tier, blocks)
    tier.close()
    other = Engine(1, artifact=make_artifact(SHAPE, groups=((0, 1), (1, 3)), seed=99, components=20)[2])
    again = other.tier(folder / "tier")
    assert again.lookup([b.key for b in other.sequence(again, 3)]) == []
    # Under the old keys, too, it takes nothing that it did not write.
    engine.wipe([b.block_id for b in blocks])
    assert sorted(load(again, blocks)) == sorted(b.key for b in blocks)
    assert again.metrics.value("kvtc_errors", "record_RecordMismatchError") == 3
    again.close()


@pytest.mark.parametrize("what", ["stage", "encode", "put_many"])
def test_a_store_that_raises(engine, what):
    tier = engine.tier()
    blocks = engine.sequence(tier, 3)
    owner = tier._store if what == "put_many" else tier.transcoder
    good = getattr(owner, what)

    def bad(*args):
        raise RuntimeError("on purpose")

    setattr(owner, what, bad)
    done, free = Answer(), Answer()
    assert tier.store(blocks, done, free)
    assert sorted(done.get()) == sorted(b.key for b in blocks)
    free.get()
    setattr(owner, what, good)
    assert tier.metrics.value("kvtc_errors", "encode_RuntimeError") == 1
    assert tier.admit([b.key for b in blocks]) == [True] * 3
    assert store(tier, blocks) == []
    assert load(tier, blocks) == []
    tier.close()


@pytest.mark.parametrize("what", ["promise", "load"])
def test_a_load_that_raises(engine, what):
    tier = engine.tier()
    blocks = engine.sequence(tier, 3)
    store(tier, blocks)
    good = getattr(tier.transcoder, what)

    def bad(*args):
        raise RuntimeError("on purpose")

    setattr(tier.transcoder, what, bad)
    assert sorted(load(tier, blocks)) == sorted(b.key for b in blocks)
    if what == "promise":
        assert promise(tier, blocks) == {}
    setattr(tier.transcoder, what, good)
    assert load(tier, blocks) == []
    tier.close()


def test_callbacks_that_raise_end_nothing(engine):
    tier = engine.tier()
    blocks = engine.sequence(tier, 2)
    called = []

    def bad(*what):
        called.append(what)
        raise RuntimeError("on purpose")

    assert tier.store(blocks, bad, bad)
    assert tier.flush()
    assert tier.promise([blocks[0].key], bad)
    assert tier.load(blocks, bad)
    assert tier.flush()
    assert len(called) == 4
    assert load(tier, blocks) == []
    tier.close()


def test_a_load_past_its_deadline_is_not_begun(engine):
    tier = engine.tier()
    blocks = engine.sequence(tier, 2)
    store(tier, blocks)
    gate = threading.Event()
    good = tier.transcoder.promise
    tier.transcoder.promise = lambda *what: (gate.wait(60), good(*what))[1]
    first, late = Answer(), Answer()
    tier.load(blocks[:1], first)
    tier.load(blocks, late, deadline=time.monotonic() + 0.05)
    time.sleep(0.1)
    engine.wipe([b.block_id for b in blocks])
    gate.set()
    assert first.get() == []
    assert sorted(late.get()) == sorted(b.key for b in blocks)
    assert (engine.pages.read([blocks[1].block_id])[0] == POISON).all()
    assert tier.metrics.value("kvtc_errors", "load_TooLate") == 1
    tier.close()


def test_closing_a_tier_that_hangs_is_over_in_time(engine):
    tier = engine.tier()
    gate = threading.Event()
    good = tier.transcoder.encode
    tier.transcoder.encode = lambda *what: (gate.wait(20), good(*what))[1]
    blocks = engine.sequence(tier, 6)
    stuck, waiting = Answer(), Answer()
    assert tier.store(blocks[:2], stuck)
    assert tier.store(blocks[2:], waiting)
    began = time.monotonic()
    assert not tier.close(1.0)
    assert time.monotonic() - began < 15
    assert sorted(waiting.get(1)) == sorted(b.key for b in blocks[2:])
    gate.set()
    # It ends with its blocks refused: the store is closed.
    assert sorted(stuck.get()) == sorted(b.key for b in blocks[:2])


def test_a_slow_disk_is_given_up(engine, folder):
    tier = engine.tier(folder / "tier", exact="all", write_through=True, read_seconds=0.2)
    blocks = engine.sequence(tier, 4)
    store(tier, blocks)
    tier.flush()
    tier._store.host.clear()
    data = tier._store.disk._data
    gate = threading.Event()
    data.read_cached = lambda *what: False
    data.read = lambda *what: gate.wait(30) and False
    began = time.monotonic()
    assert sorted(load(tier, blocks)) == sorted(b.key for b in blocks)
    assert time.monotonic() - began < 10
    # Stores and the host's records go on meanwhile.
    other = engine.sequence(tier, 4, name=1)
    assert store(tier, other) == []
    assert load(tier, other) == []
    gate.set()
    tier.refresh()
    assert tier.metrics.value("kvtc_errors", "disk_read_timeout") > 0
    tier.close()


def test_a_tier_too_small_for_a_block_refuses_it(engine):
    raw = BLOCK_TOKENS * SHAPE.bytes_per_token
    tier = engine.tier(exact="all", host_gib=raw * 0.9 / (1 << 30))
    blocks = engine.sequence(tier, 2)
    assert sorted(store(tier, blocks)) == sorted(b.key for b in blocks)
    assert tier.metrics.value("kvtc_stored_blocks", "no_room") == 2
    tier.close()


def test_many_threads_at_once(engine, folder):
    """Stores, loads, promises and removals from several threads: whatever is reported as loaded is what was stored."""
    tier = engine.tier(folder / "tier", exact="all", host_gib=0.03 * MIB_OF_GIB)
    blocks = engine.sequence(tier, 24)

    def work(part):
        mine = blocks[part::3]
        for turn in range(4):
            if tier.store(mine, done := Answer()):
                done.get()
            engine.wipe([b.block_id for b in mine])
            failed = set(load(tier, mine))
            good = [b for b in mine if b.key not in failed]
            if good:
                got = engine.pages.read([b.block_id for b in good])
                assert all(same_bits(a, b) for a, b in zip(got, engine.original(good), strict=True)), (part, turn)
            for b in mine:
                engine.pages.write([b.block_id], *engine.original([b]))
            tier.forget([mine[turn].key])

    hammer(work, 3)
    assert tier.close()
