"""What every store promises, tested once for all of them."""

from __future__ import annotations

import random

import pytest

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.store import MAX_RECORD_BYTES, Store, StoreStats
from tests.store.stores import STORES, key_of, record_of, size_of
from tests.threads import hammer


@pytest.fixture(params=list(STORES))
def store(request, folder):
    made = STORES[request.param](folder / "store")
    yield made
    made.close()


def taken(store: Store, key: bytes) -> bytes | None:
    lease = store.get(key)
    if lease is None:
        return None
    with lease:
        return bytes(lease.record)


def test_what_is_put_comes_back(store):
    for i, size in enumerate((1, 255, 256, 257, 4095, 4096, 4097, 30_000, 200_000)):
        for nbytes in (16, 32, 64):
            assert store.put(key_of(i, nbytes), record_of(i, size))
    for i, size in enumerate((1, 255, 256, 257, 4095, 4096, 4097, 30_000, 200_000)):
        for nbytes in (16, 32, 64):
            assert taken(store, key_of(i, nbytes)) == record_of(i, size)
    assert taken(store, key_of(99)) is None
    assert store.contains(key_of(0))
    assert not store.contains(key_of(99))


def test_a_record_never_changes(store):
    assert store.put(key_of(1), b"first")
    assert store.put(key_of(1), b"second, refused in silence")
    assert taken(store, key_of(1)) == b"first"


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_bytes_are_copied(store, kind):
    source = bytearray(record_of(3, 7000))
    given = source if kind is bytearray else kind(source)
    assert store.put(key_of(3), given)
    source[:] = bytes(7000)
    assert taken(store, key_of(3)) == record_of(3, 7000)


def test_a_lease_is_read_only_and_ends(store):
    store.put(key_of(1), b"abc")
    lease = store.get(key_of(1))
    assert lease is not None
    assert len(lease) == 3
    with pytest.raises(TypeError):
        lease.record[0] = 0
    lease.release()
    lease.release()
    with pytest.raises(ValueError, match="released"):
        lease.record[0]


def test_leases_outlive_removal_eviction_and_close(store):
    size = 20_000
    leases = []
    for i in range(8):
        assert store.put(key_of(i), record_of(i, size))
        leases.append(store.get(key_of(i)))
    store.remove(key_of(0))
    for i in range(100, 500):
        store.put(key_of(i), record_of(i, size))
    store.clear()
    store.put(key_of(0), b"new")
    assert taken(store, key_of(0)) == b"new"
    store.close()
    for i, lease in enumerate(leases):
        assert lease is not None
        assert lease.record == record_of(i, size)
        lease.release()


def test_many_leases_on_one_record(store):
    store.put(key_of(1), b"abc")
    leases = [store.get(key_of(1)) for _ in range(5)]
    store.remove(key_of(1))
    for lease in leases:
        assert lease is not None
        assert lease.record == b"abc"
        lease.release()


def test_many_at_once(store):
    items = [(key_of(i), record_of(i, size_of(i))) for i in range(20)]
    assert store.put_many(items) == [True] * 20
    got = store.get_many([key for key, _ in items] + [key_of(99)])
    assert got.pop() is None
    for lease, (_, record) in zip(got, items, strict=True):
        assert lease is not None
        assert lease.record == record
        lease.release()


def test_many_at_once_of_which_the_last_push_out_the_first(store):
    """And one that is named twice is one record."""
    items = [(key_of(i), record_of(i, 15_000)) for i in range(600)]
    items.insert(599, items[598])
    stored = []
    for some in range(0, 601, 100):
        stored += store.put_many(items[some : some + 100])
        if hasattr(store, "flush"):
            store.flush()
    stats = store.stats()
    assert len(stored) == 601
    assert stats.used_bytes <= stats.budget_bytes
    assert stats.entries < 600
    assert stored[-3:] == [True] * 3
    for i in (597, 598, 599):
        assert taken(store, key_of(i)) == record_of(i, 15_000)
    assert taken(store, key_of(0)) is None


def test_the_budget_holds_and_the_least_recently_used_go(store):
    for i in range(600):
        store.put(key_of(i), record_of(i, 15_000))
        store.touch([key_of(0)])
        if i % 20 == 0 and hasattr(store, "flush"):
            store.flush()
        stats = store.stats()
        assert stats.used_bytes <= stats.budget_bytes
    if hasattr(store, "flush"):
        store.flush()  # nothing may go while we look
    here = [i for i in range(600) if store.contains(key_of(i))]
    assert here[0] == 0, "touched all the time"
    assert here[1:] == list(range(here[1], 600)), "the older went first"
    assert store.stats().evictions > 0


def test_remove_and_clear(store):
    for i in range(5):
        store.put(key_of(i), b"x")
    assert store.remove(key_of(2))
    assert not store.remove(key_of(2))
    assert taken(store, key_of(2)) is None
    store.clear()
    assert not any(store.contains(key_of(i)) for i in range(5))
    assert store.put(key_of(2), b"y")
    assert taken(store, key_of(2)) == b"y"


def test_touch_counts_what_is_here(store):
    store.put(key_of(1), b"x")
    assert store.touch([key_of(1), key_of(2)]) == 1


def test_bad_arguments_are_refused(store):
    for key in (b"short", bytes(65), bytearray(32), "x" * 32):
        with pytest.raises(ConfigError, match="key"):
            store.put(key, b"x")
    for record in (b"", bytes(MAX_RECORD_BYTES + 1)):
        with pytest.raises(ConfigError, match=f"{len(record)} bytes"):
            store.put(key_of(1), record)
    assert store.get(b"short") is None


def test_what_can_never_fit_is_refused_and_evicts_nothing(store):
    store.put(key_of(1), b"x")
    assert not store.put(key_of(2), bytes(MAX_RECORD_BYTES))
    assert taken(store, key_of(2)) is None
    assert store.contains(key_of(1))
    assert store.stats().refused >= 1


def test_figures(store):
    assert store.stats().entries == 0
    store.put(key_of(1), bytes(1000))
    taken(store, key_of(1))
    taken(store, key_of(2))
    stats = store.stats()
    assert isinstance(stats, StoreStats)
    assert stats.entries >= 1
    assert stats.record_bytes >= 1000
    assert (stats.hits, stats.misses, stats.evictions, dict(stats.errors)) == (1, 1, 0, {})


def test_after_close_it_refuses_quietly(store):
    store.put(key_of(1), b"x")
    assert store.close()
    assert store.close()
    assert not store.put(key_of(2), b"x")
    assert store.get(key_of(1)) is None
    assert not store.contains(key_of(1))
    store.stats()


def test_threads_at_once(store):
    """Every record read is the one its key means, whatever else happens; nothing raises."""
    records = [record_of(i, 500 + 97 * i) for i in range(150)]

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(250):
            i = rng.randrange(150)
            what = rng.random()
            if what < 0.4:
                store.put(key_of(i), records[i])
            elif what < 0.9:
                found = taken(store, key_of(i))
                assert found is None or found == records[i]
            elif what < 0.95:
                store.remove(key_of(i))
            else:
                store.touch([key_of(i)])

    hammer(work, 6)
    assert not store.stats().errors
