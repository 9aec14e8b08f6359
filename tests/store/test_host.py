"""The arena: written in place, never beyond its room, slid together under leases; a model dict beside it."""

from __future__ import annotations

import gc
import mmap
import random
import threading
from collections import OrderedDict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.store.host import COMPACT_FROM, UNIT_BYTES, HostStore, make_arena
from tests.store.stores import MIB, POISON, host, key_of, record_of, size_of


def test_a_lease_is_the_arenas_own_bytes():
    arena = make_arena(MIB)
    store = HostStore(arena)
    store.put(key_of(1), b"one")
    store.put(key_of(2), b"second")
    with store.get(key_of(2)) as lease:
        assert store.arena is arena
        assert lease.offset % UNIT_BYTES == 0
        assert arena[lease.offset : lease.offset + 6] == b"second"
        arena[lease.offset] = ord("S")
        assert lease.record == b"Second", "no copy"


def test_nothing_outside_the_record_is_written():
    store = host()
    before = bytes(store.arena)
    store.put(key_of(1), b"x" * 1000)
    with store.get(key_of(1)) as lease:
        assert store.arena[lease.offset + 1000 :] == before[lease.offset + 1000 :]
        assert set(store.arena[: lease.offset]) <= {POISON}


def test_written_in_place_and_shrunk():
    store = host()
    room = store.reserve(key_of(1), 100_000)
    assert room.record.nbytes == 100_000
    assert not store.contains(key_of(1))
    assert store.stats().used_bytes >= 100_000
    store.arena[room.offset : room.offset + 5] = b"hello"
    assert room.commit(5)
    assert store.stats().used_bytes == UNIT_BYTES
    with store.get(key_of(1)) as lease:
        assert lease.record == b"hello"
        assert lease.offset == room.offset
    assert store.reserve(key_of(1), 10) is None


def test_no_record_goes_for_one_that_may_never_come():
    store, i = host(), 0
    while not store.stats().evictions:
        i += 1
        assert store.put(key_of(i), record_of(i, 60_000))
    before, held = store.stats(), store.held()
    assert store.reserve(key_of(0), 60_000) is None
    assert (store.stats().evictions, store.stats().refused, store.held()) == (before.evictions, before.refused, held)
    # What is spare may go.
    store.remove(key_of(i))
    assert store.put(key_of(i), record_of(i, 60_000), spare=True)
    with store.reserve(key_of(0), 60_000) as room:
        assert room.record.nbytes == 60_000
    assert store.stats().evictions == before.evictions


def test_a_reservation_ends_once():
    store = host()
    with store.reserve(key_of(1), 1000) as room:
        room.record[:] = bytes(1000)
    assert not store.contains(key_of(1)), "no commit, no record"
    for nbytes in (0, 1001, -1):
        with store.reserve(key_of(1), 1000) as room, pytest.raises(ConfigError, match=str(nbytes)):
            room.commit(nbytes)
    room = store.reserve(key_of(1), 1000)
    room.commit()
    with pytest.raises(ConfigError, match="ended"):
        room.commit()
    room.abort()
    assert store.contains(key_of(1))
    store.remove(key_of(1))
    assert store.stats().used_bytes == 0


def test_the_first_of_two_writers_wins():
    store = host()
    first, second = store.reserve(key_of(1), 10), store.reserve(key_of(1), 10)
    second.record[:] = b"2" * 10
    assert second.commit()
    assert first.commit()
    with store.get(key_of(1)) as lease:
        assert lease.record == b"2" * 10
    assert store.stats().used_bytes == UNIT_BYTES


def test_what_is_forgotten_is_given_back():
    store = host()
    store.reserve(key_of(1), 1000)
    store.put(key_of(2), b"x")
    store.get(key_of(2))
    gc.collect()
    store.remove(key_of(2))
    assert store.stats().used_bytes == 0


def test_eviction_shows_the_record_and_spares_leases():
    store = host(MIB)
    seen = {}
    store.on_evicted = lambda key, lease: seen.__setitem__(key, bytes(lease.record))
    for i in range(10):
        assert store.put(key_of(i), record_of(i, 100_000))
        if i == 0:
            lease = store.get(key_of(0))
    for i in range(10, 40):
        assert store.put(key_of(i), record_of(i, 100_000))
    assert set(seen) == {key_of(i) for i in range(1, 40) if not store.contains(key_of(i))}
    assert all(record == record_of(int.from_bytes(key, "big"), 100_000) for key, record in seen.items())
    assert store.contains(key_of(0))
    assert lease.record == record_of(0, 100_000)


def test_all_on_lease_nothing_is_evicted():
    store = host(MIB)
    leases = []
    for i in range(10):
        store.put(key_of(i), record_of(i, 100_000))
        leases.append(store.get(key_of(i)))
    assert not store.put(key_of(50), bytes(100_000))
    assert store.stats().refused == 1
    assert store.stats().evictions == 0
    leases.pop(3).release()
    assert store.put(key_of(50), bytes(100_000))
    assert not store.contains(key_of(3))


def test_a_failing_callback_is_counted():
    store = host(MIB)
    store.on_evicted = lambda key, lease: 1 / 0
    for i in range(20):
        assert store.put(key_of(i), bytes(100_000))
    assert store.stats().errors == {"callback": 10}


@pytest.mark.parametrize("again", [0.0, 0.2, 0.7])
def test_fragmentation_is_bounded(again):
    """Sizes shift, recency is mixed up: at most 1/16 of a full arena and the record to come are lost."""
    store, rng = host(16 * MIB), random.Random(7)
    n, lowest = 0, 1.0
    pool = random.Random(1).randbytes(120_000)
    while n < 2500:
        size = size_of(n) * (1 + n // 800 % 2)
        before = store.stats().evictions
        assert store.put(key_of(n), memoryview(pool)[:size])
        if rng.random() < again:
            store.touch([key_of(rng.randrange(n + 1))])
        n += 1
        stats = store.stats()
        if stats.evictions > before:
            lowest = min(lowest, (stats.used_bytes + 2 * 120_000) / stats.budget_bytes)
    assert lowest > 1 - 1 / COMPACT_FROM
    assert stats.used_bytes - stats.record_bytes < stats.entries * UNIT_BYTES
    assert 0 <= stats.fragmentation <= 1


def test_leases_do_not_move():
    store, rng = host(4 * MIB), random.Random(3)
    held = {}
    for n in range(3000):
        assert store.put(key_of(n), record_of(n, size_of(n)))
        if len(held) < 20 and rng.random() < 0.1:
            held[n] = store.get(key_of(n))
        for i, lease in held.items():
            assert store.arena[lease.offset : lease.offset + 64] == record_of(i, 64)[:64]
        if held and rng.random() < 0.08:
            i = rng.choice(list(held))
            with held.pop(i) as lease:
                assert lease.record == record_of(i, size_of(i))
    for i in range(3000):
        lease = store.get(key_of(i))
        if lease is not None:
            with lease:
                assert lease.record == record_of(i, size_of(i))


def test_threads_evict_and_write_in_place():
    store, wrong = host(MIB), []
    records = [record_of(i, size_of(i)) for i in range(120)]
    store.on_evicted = lambda key, lease: wrong.extend(
        [key] if lease.record != records[int.from_bytes(key, "big")] else []
    )

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            i = rng.randrange(120)
            lease = store.get(key_of(i))
            if lease is not None:
                with lease:
                    if lease.record != records[i]:
                        wrong.append(i)
                continue
            room = store.reserve(key_of(i), 64_000)
            if room is None:
                store.put(key_of(i), records[i])
            else:
                with room:
                    room.record[: len(records[i])] = records[i]
                    if rng.random() < 0.9:
                        room.commit(len(records[i]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert store.stats().evictions > 0
    store.clear()
    assert store.stats().used_bytes == 0


def test_arenas_that_cannot_be():
    with pytest.raises(ConfigError, match="read-only"):
        HostStore(bytes(MIB))
    with pytest.raises(ConfigError, match="10 bytes"):
        HostStore(bytearray(10))
    with pytest.raises(ConfigError, match="no memory"):
        make_arena(1 << 60)
    with pytest.raises(ConfigError, match="at least"):
        make_arena(1)
    assert isinstance(make_arena(5000, prefault=False), mmap.mmap)


class HostModel(RuleBasedStateMachine):
    """Against a dict in order of use: the same records; whatever is missing was the least recently used. Spare records
    go silently, but before any other, and never for one of their own a lasting one."""

    def __init__(self) -> None:
        super().__init__()
        self.store = HostStore(bytearray([POISON]) * (256 << 10), self.evicted)
        self.model: OrderedDict[bytes, bytes] = OrderedDict()
        self.leases: list[tuple[bytes, bytes, object]] = []
        self.spare: dict[bytes, bytes] = {}

    def evicted(self, key: bytes, lease) -> None:
        assert self.store._shelf.oldest(spare_only=True) < 0, "a spare record could have gone"
        held = {k for k, _, _ in self.leases}
        oldest = next(k for k in self.model if k not in held)
        assert key == oldest
        assert lease.record == self.model.pop(key)

    keys = st.integers(0, 40).map(key_of)

    @rule(key=keys, size=st.integers(1, 60_000), seed=st.integers(0, 999))
    def put(self, key, size, seed):
        record = record_of(seed, size)
        if self.store.put(key, record) and key not in self.model:
            self.model[key] = record

    @rule(key=keys, size=st.integers(1, 60_000), share=st.floats(0.01, 1), commit=st.booleans())
    def reserve(self, key, size, share, commit):
        before = dict(self.model)
        room = self.store.reserve(key, size)
        assert self.model == before
        if room is not None:
            actual = max(1, int(size * share))
            room.record[:actual] = record_of(size, actual)
            if commit:
                assert room.commit(actual)
                self.model[key] = record_of(size, actual)
            else:
                room.abort()

    @rule(key=st.integers(100, 120).map(key_of), size=st.integers(1, 30_000))
    def put_spare(self, key, size):
        before = dict(self.model)
        known = self.store.contains(key)
        if self.store.put(key, record_of(size, size), spare=True) and not known:
            self.spare[key] = record_of(size, size)
        assert self.model == before

    @rule(key=keys)
    def get(self, key):
        lease = self.store.get(key)
        assert (lease is not None) == (key in self.model)
        if lease is not None:
            self.leases.append((key, self.model[key], lease))
            if len(self.leases) > 4:
                self.release(0)

    @rule(which=st.integers(0, 3))
    def release(self, which):
        if which < len(self.leases):
            key, record, lease = self.leases.pop(which)
            assert lease.record == record
            lease.release()
            # The end of the last lease is its last use.
            if key in self.model and self.model[key] is record and key not in {k for k, _, _ in self.leases}:
                self.model.move_to_end(key)

    @rule(key=keys)
    def touch(self, key):
        assert self.store.touch([key]) == (key in self.model)
        if key in self.model:
            self.model.move_to_end(key)

    @rule(key=keys)
    def remove(self, key):
        assert self.store.remove(key) == (self.model.pop(key, None) is not None)

    @rule()
    def clear(self):
        self.store.clear()
        self.model.clear()
        self.spare.clear()

    @invariant()
    def the_same(self):
        stats = self.store.stats()
        self.spare = {key: record for key, record in self.spare.items() if self.store.contains(key)}
        assert stats.entries == len(self.model) + len(self.spare)
        assert self.store.spare_bytes == sum(map(len, self.spare.values()))
        assert stats.record_bytes == sum(map(len, self.model.values())) + self.store.spare_bytes
        for key, record in self.spare.items():
            with self.store.peek(key) as lease:
                assert lease.record == record
        assert stats.record_bytes <= stats.used_bytes + 0
        assert stats.used_bytes <= stats.budget_bytes
        assert not stats.errors
        for _, record, lease in self.leases:
            assert lease.record == record

    def teardown(self):
        while self.leases:
            self.release(0)
        for key, record in self.model.items():
            with self.store.get(key) as lease:
                assert lease.record == record
        self.store.clear()
        assert self.store.stats().used_bytes == 0


HostModel.TestCase.settings = settings(max_examples=40, stateful_step_count=60, deadline=None)
TestHostModel = HostModel.TestCase
