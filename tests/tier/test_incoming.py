"""Records that other workers send, into a host tier with room for them and into a full one."""

from __future__ import annotations

from dynamo_kvtc.store.host import HostStore
from dynamo_kvtc.store.tiered import TieredStore
from dynamo_kvtc.tier.incoming import Incoming
from tests.store.stores import MIB, key_of, record_of


def test_a_record_is_kept_in_place_and_a_full_tier_loses_nothing_for_one_that_does_not_come():
    store = TieredStore(HostStore(bytearray(MIB)), None)
    record = record_of(1, 60_000)
    for _ in range(2):
        incoming = Incoming(store, key_of(1), len(record))
        incoming.record[:] = record
        assert incoming.keep()
    with store.get(key_of(1)) as lease:
        assert lease.record == record
    i = 1
    while not store.host.stats().evictions:
        i += 1
        assert store.put(key_of(i), record_of(i, 60_000))
    held, evictions = store.held(), store.host.stats().evictions
    lost = [Incoming(store, key_of(100 + n), 60_000) for n in range(8)]
    come = Incoming(store, key_of(99), 60_000)
    come.record[:] = record_of(99, 60_000)
    for incoming in lost:
        incoming.drop()
    assert (store.held(), store.host.stats().evictions) == (held, evictions)
    assert come.keep()
    with store.get(key_of(99)) as lease:
        assert lease.record == record_of(99, 60_000)
    assert store.host.stats().evictions == evictions + 1
    assert store.close()
