"""Host and disk side by side: the key says which, and nothing moves by itself."""

from __future__ import annotations

import pytest

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.store.disk import DiskStore
from dynamo_kvtc.store.placed import PlacedStore
from tests.store.stores import MIB, disk, host, key_of, record_of


def place(key: bytes) -> str:
    return "host" if key[-1] % 2 else "disk"


@pytest.fixture
def made(folder):
    events: list = []
    store = PlacedStore(
        host(MIB),
        disk(folder / "s"),
        place,
        on_moved=lambda key, tier: events.append((key, tier)),
        on_removed=lambda key: events.append((key, None)),
    )
    yield store, events
    store.close()


def test_a_record_lies_where_its_key_says_and_stays_there(made):
    store, events = made
    for i in range(8):
        assert store.put(key_of(i), record_of(i, 20_000))
    assert store.flush()
    for _ in range(3):
        leases = store.get_many([key_of(i) for i in range(8)])
        assert [lease.offset is not None for lease in leases] == [i % 2 == 1 for i in range(8)]
        for i, lease in enumerate(leases):
            assert lease.record == record_of(i, 20_000)
            lease.release()
    assert [store.tier_of(key_of(i)) for i in range(8)] == ["disk", "host"] * 4
    assert (store.host.stats().entries, store.disk.stats().entries) == (4, 4)
    assert sorted(events) == sorted((key_of(i), place(key_of(i))) for i in range(8))


def test_what_the_host_has_no_room_for_is_gone_and_told(made):
    store, events = made
    for i in range(1, 41, 2):
        assert store.put(key_of(i), record_of(i, 100_000))
    gone = [key for key, tier in events if tier is None]
    assert gone[:2] == [key_of(1), key_of(3)]
    assert store.host.stats().used_bytes <= MIB
    assert store.disk.stats().entries == 0
    assert [store.tier_of(key) for key in gone] == [None] * len(gone)


def test_a_tier_that_is_not_there_refuses():
    store = PlacedStore(host(MIB), None, place)
    assert store.put(key_of(1), b"x")
    assert not store.put(key_of(2), b"x")
    assert store.get(key_of(2)) is None
    assert store.tier_of(key_of(2)) is None
    store = PlacedStore(host(MIB), None, lambda key: "tape")
    with pytest.raises(ConfigError, match="'tape'"):
        store.put(key_of(1), b"x")


def test_a_fresh_disk_store_forgets_what_was_there(folder):
    for fresh, there in ((False, False), (False, True), (True, False)):
        store = DiskStore(folder / "s", 8 * MIB, fresh=fresh)
        assert store.contains(key_of(1)) is there
        store.put(key_of(1), record_of(1, 9000))
        assert store.close()
