"""What goes wrong between workers, with holders and askers that are processes, over each plane. Whatever arrives is
right, and every wait ends."""

from __future__ import annotations

import time

import pytest

from dynamo_kvtc.transfer.options import PullOptions, ServeOptions
from tests.events.servers import Server
from tests.transfer.conftest import Field
from tests.transfer.holders import KILL, PATIENT, STOP, Asker
from tests.transfer.records import IDENTITY, wanted_of
from tests.waiting import until


def same(pull, records):
    """What is said to be here is; the number of those that are not."""
    told = pull.result()
    for i, (why, record) in enumerate(zip(told, records.values(), strict=True)):
        assert (pull.record(i) == record) if not why else (pull.record(i) is None)
    return sum(map(bool, told))


def test_pulls_from_two_processes(field, whole):
    records = field.records(60, 5000, 30_000)
    for name in "ab":
        field.holder(name, frame_bytes=256 << 10)
    puller = field.puller(PATIENT)
    for _ in range(2):
        assert same(puller.pull(wanted_of(records, "a", "b"), 20), records) == 0
    assert not puller.stats().errors
    until(lambda: all(holder.stats().leased_bytes == 0 for holder in field.holders.values()))


@pytest.mark.parametrize("how", [KILL, STOP])
def test_a_holder_that_dies_or_hangs_midway_is_replaced(field, how, whole):
    records = field.records(60)
    field.holder("a", seconds=0.01)
    field.holder("b")
    puller = field.puller(PullOptions(connect_seconds=1.0, silence_seconds=1.0))
    pull = puller.pull(wanted_of(records, "a", "b"), 20)
    until(lambda: puller.stats().pieces >= 40)
    field.holders["a"].signal(how)
    assert same(pull, records) == 0
    start = time.monotonic()
    assert same(puller.pull(wanted_of(records, "a", "b"), 20), records) == 0
    # It comes last for a while: nobody waits for it again.
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("how", [KILL, STOP])
def test_without_another_holder_what_is_missing_has_failed_by_the_deadline(field, how):
    records = field.records(60)
    field.holder("a", seconds=0.01)
    puller = field.puller(PullOptions(silence_seconds=0.5))
    start = time.monotonic()
    pull = puller.pull(wanted_of(records, "a"), 4)
    until(lambda: puller.stats().pieces >= 20)
    field.holders["a"].signal(how)
    failed = same(pull, records)
    assert 0 < failed <= 60
    assert time.monotonic() - start < 8
    # Groups that had come before are of use.
    here = [pull.wait_group(g, 0) for g in range(IDENTITY.groups)]
    assert sum(map(sum, here)) == puller.stats().pieces >= 20
    until(lambda: puller.stats().in_flight_bytes == 0)


@pytest.mark.parametrize("fault", ["corrupt", "less", "truncated", "twice", "swapped", "closing"])
def test_what_comes_wrong_is_asked_again(field, fault, whole):
    records = field.records(80)
    field.holder("a", fault=fault)
    field.holder("b", fault=fault)
    puller = field.puller(PullOptions(silence_seconds=1.0, attempts=8))
    for _ in range(2):
        assert same(puller.pull(wanted_of(records, "a", "b"), 20), records) == 0
    until(lambda: all(holder.stats().leased_bytes == 0 for holder in field.holders.values()))


def test_a_holder_that_sends_more_than_was_asked_is_left(field):
    """40 times as much: its stream ends long before."""
    records = field.records(40)
    field.holder("a", fault="more")
    field.holder("b")
    puller = field.puller(PATIENT)
    assert same(puller.pull(wanted_of(records, "a", "b"), 20), records) == 0


def test_an_asker_that_vanishes_holds_no_leases(field):
    """Killed: the connection tells. Stopped: only the deadline does."""
    field.records(110, 50_000, 90_000)
    holder = field.holder("a", seconds=0.02, frame_bytes=64 << 10, options=ServeOptions(stall_seconds=0.7))
    for how in (KILL, STOP):
        asker = Asker(field.kind, field.where, field.made, holder.addresses)
        asker.signal(how)
        try:
            until(lambda: holder.stats().leased_bytes > 0 or holder.stats().errors, 5)
            until(lambda: holder.stats().leased_bytes == 0, 8)
        finally:
            asker.end()
    assert sum(holder.stats().errors.values()) >= 1


def test_the_nats_server_may_restart_during_a_pull(tmp_path):
    pytest.importorskip("nats")
    server = Server(tmp_path).start()
    field = Field("nats", server.url)
    try:
        records = field.records(60)
        field.holder("a", seconds=0.01)
        puller = field.puller()
        pull = puller.pull(wanted_of(records, "a"), 30)
        until(lambda: puller.stats().pieces >= 20)
        server.kill()
        time.sleep(0.3)
        server.start()
        assert same(pull, records) == 0
        assert sum(puller.stats().errors.values()) >= 1
    finally:
        field.close()
        server.stop()
