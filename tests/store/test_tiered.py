"""Host over disk: what moves when, what is told about it, and a model of both."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.store.disk_file import DataFile
from dynamo_kvtc.store.host import HostStore
from dynamo_kvtc.store.placed import PlacedStore
from dynamo_kvtc.store.tiered import TieredStore
from tests.store.stores import MIB, disk, host, key_of, record_of
from tests.threads import hammer


@pytest.fixture
def tiers(folder):
    made = []

    def make(host_bytes: int = MIB, events: list | None = None, **options) -> TieredStore:
        told = events if events is not None else []
        made.append(
            TieredStore(
                host(host_bytes),
                disk(folder / "s"),
                on_moved=lambda key, tier: told.append((key, tier)),
                on_removed=lambda key: told.append((key, None)),
                **options,
            )
        )
        return made[-1]

    yield make
    for store in made:
        store.close()


def test_down_and_up_again(tiers):
    events: list = []
    store = tiers(events=events)
    for i in range(20):
        assert store.put(key_of(i), record_of(i, 100_000))
    assert store.flush()
    assert [store.tier_of(key_of(i)) for i in (0, 19, 20)] == ["disk", "host", None]
    assert [e for e in events if e[0] == key_of(0)] == [(key_of(0), "host"), (key_of(0), "disk")]
    with store.get(key_of(0)) as lease:
        assert lease.record == record_of(0, 100_000)
        assert lease.offset is not None, "the GPU may read it in place"
    assert store.tier_of(key_of(0)) == "host"
    assert store.disk.contains(key_of(0)), "so that going down again writes nothing"
    assert events[-1] == (key_of(0), "host")
    for i in range(100, 110):
        store.put(key_of(i), bytes(100_000))
    assert (key_of(0), "disk") in events[3:]


@pytest.mark.parametrize("placed", [False, True])
def test_a_batch_that_evicts_its_own_beginning_tells_what_is(folder, placed):
    events: list = []
    told = {
        "on_moved": lambda key, tier: events.append((key, tier)), "on_removed": lambda key: events.append((key, None)),
    }  # fmt: skip
    lower = disk(folder / "s")
    store = (
        PlacedStore(host(MIB), lower, lambda key: "host", **told) if placed else TieredStore(host(MIB), lower, **told)
    )
    keys = [key_of(i) for i in range(200)]
    assert store.put_many([(key, record_of(i, 100_000)) for i, key in enumerate(keys)]) == [True] * 200
    assert store.flush()
    last = dict(events)
    for key in keys:
        if placed:
            # What is not told of as removed was never told of as there.
            assert last.get(key) == store.tier_of(key)
        elif last.get(key, "disk") is not None:
            assert last[key] == store.tier_of(key)
    assert sum(tier == "host" for tier in last.values()) == sum(store.tier_of(key) == "host" for key in keys) > 0
    store.close()


def test_promoted_on_the_second_hit(tiers):
    store = tiers(promote_on=2)
    for i in range(20):
        store.put(key_of(i), record_of(i, 100_000))
    for want in (None, 0):
        with store.get(key_of(0)) as lease:
            assert lease.record == record_of(0, 100_000)
            assert (lease.offset is None) == (want is None)


def test_written_through_and_found_after_a_restart(tiers):
    events: list = []
    store = tiers(write_through=True, events=events)
    for i in range(5):
        store.put(key_of(i), record_of(i, 5000))
    with store.host.reserve(key_of(9), 5000) as room:
        room.record[:] = record_of(9, 5000)
        room.commit()
    store.stored(key_of(9))
    assert store.flush()
    assert events == [(key_of(i), "host") for i in (0, 1, 2, 3, 4, 9)]
    assert store.close()
    again = tiers()
    for i in (0, 4, 9):
        with again.get(key_of(i)) as lease:
            assert lease.record == record_of(i, 5000)


def test_what_disk_will_not_take_is_removed(tiers, monkeypatch):
    events: list = []
    store = tiers(events=events)
    store.disk._queue.queue_bytes = 1000
    for i in range(12):
        store.put(key_of(i), bytes(100_000))
    gone = [key for key, tier in events if tier is None]
    assert gone == [key_of(0), key_of(1)]
    assert store.tier_of(key_of(0)) is None

    store.disk._queue.queue_bytes = 1 << 20
    monkeypatch.setattr(DataFile, "sync", lambda self: 1 / 0)
    for i in range(12, 14):
        store.put(key_of(i), bytes(100_000))
    assert not store.flush()
    assert (key_of(2), None) in events
    assert (key_of(2), "disk") not in events


def test_evicted_from_disk_is_removed(tiers):
    events: list = []
    store = tiers(events=events)
    for i in range(120):
        store.put(key_of(i), bytes(100_000))
        store.flush()
    last = dict(events)
    assert all(last[key_of(i)] == store.tier_of(key_of(i)) for i in range(120))
    assert {None, "host", "disk"} == set(last.values())


def test_too_large_for_the_host_goes_to_disk(tiers):
    store = tiers(host_bytes=64 << 10)
    assert store.put(key_of(1), record_of(1, 100_000))
    with store.get(key_of(1)) as lease:
        assert lease.record == record_of(1, 100_000)


def test_callbacks_that_fail_are_counted():
    def fail(key, tier):
        raise RuntimeError

    store = TieredStore(host(), None, on_moved=fail)
    assert store.put(key_of(1), b"x")
    assert store.stats().errors == {"callback": 1}


def test_tiers_that_cannot_be():
    with pytest.raises(ConfigError, match="no tier"):
        TieredStore(None, None)
    with pytest.raises(ConfigError, match="promote_on is 3"):
        TieredStore(host(), None, promote_on=3)


@pytest.mark.parametrize("write_through", [False, True])
def test_threads_move_things_up_and_down(tiers, write_through):
    """Between tiers and threads a record may be missed; never mistaken. At rest, events and tiers agree."""
    events: list = []
    store = tiers(host_bytes=300_000, events=events, write_through=write_through)
    records = [record_of(i, 3000 + 211 * i) for i in range(100)]

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(200):
            i = rng.randrange(100)
            lease = store.get(key_of(i))
            if lease is None:
                store.put(key_of(i), records[i])
                continue
            with lease:
                assert lease.record == records[i]

    hammer(work, 5)
    assert store.flush()
    assert store.host.stats().evictions > 0
    assert not store.stats().errors
    assert all(store.tier_of(key_of(i)) is not None for i in range(100))


class TieredModel(RuleBasedStateMachine):
    """One thread: whatever was put is there (the disk is large enough), its bytes right, the last event true."""

    def __init__(self) -> None:
        super().__init__()
        shm = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(prefix="kvtc-test-", dir=shm if shm.is_dir() else None))
        self.model: dict[bytes, bytes] = {}
        self.open()

    def open(self) -> None:
        self.events: dict[bytes, str | None] = {}
        self.store = TieredStore(
            HostStore(bytearray(100_000)), disk(self.folder / "s"), promote_on=1,
            on_moved=self.events.__setitem__, on_removed=lambda key: self.events.__setitem__(key, None),
        )  # fmt: skip

    keys = st.integers(0, 30).map(key_of)

    @rule(key=keys, size=st.integers(1, 40_000), seed=st.integers(0, 99))
    def put(self, key, size, seed):
        assert self.store.put(key, record_of(seed, size))
        self.model.setdefault(key, record_of(seed, size))

    @rule(key=keys)
    def get(self, key):
        lease = self.store.get(key)
        assert (lease is not None) == (key in self.model)
        if lease is not None:
            with lease:
                assert lease.record == self.model[key]

    @rule(key=keys)
    def remove(self, key):
        assert self.store.remove(key) == (self.model.pop(key, None) is not None)
        self.events.pop(key, None)

    @rule(keys=st.lists(keys, max_size=4))
    def touch(self, keys):
        assert self.store.touch(keys) == sum(key in self.model for key in keys)

    @rule()
    def flush(self):
        assert self.store.flush()
        for key in self.model:
            if key in self.events:
                assert self.events[key] == self.store.tier_of(key)

    @rule()
    def restart(self):
        assert self.store.close()
        self.open()
        for key in list(self.model):
            if not self.store.contains(key):
                del self.model[key]

    @invariant()
    def sane(self):
        stats = self.store.stats()
        assert not stats.errors
        assert not stats.evictions
        assert stats.used_bytes <= stats.budget_bytes
        assert all(self.store.contains(key) for key in self.model)

    def teardown(self):
        self.store.close()
        shutil.rmtree(self.folder, ignore_errors=True)


TieredModel.TestCase.settings = settings(max_examples=20, stateful_step_count=40, deadline=None)
TestTieredModel = TieredModel.TestCase
