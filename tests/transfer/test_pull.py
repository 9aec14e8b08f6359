"""Pulls between stores of one process: what arrives, in which order, within which bounds."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest

from dynamo_kvtc.codec.record import CRC_OFFSET, parse_record, section_ends
from dynamo_kvtc.errors import ConfigError, PeerGoneError
from dynamo_kvtc.store.host import HostStore, make_arena
from dynamo_kvtc.transfer import wire
from dynamo_kvtc.transfer.arriving import Arriving, Expected
from dynamo_kvtc.transfer.options import Peers, PullOptions, ServeOptions
from dynamo_kvtc.transfer.pending import Pull
from dynamo_kvtc.transfer.plane import Sender
from dynamo_kvtc.transfer.pull import Puller, Wanted
from dynamo_kvtc.transfer.serve import Server
from dynamo_kvtc.transfer.tcp import TcpPlane
from tests.transfer.holders import PATIENT
from tests.transfer.records import EXPECTED, IDENTITY, PEERS, make_record, make_records, store_of, wanted_of
from tests.waiting import until


@pytest.fixture
def world():
    made = World()
    yield made
    made.close()


class World:
    """Holders and askers over TCP in this process."""

    def __init__(self):
        self.addresses, self.planes, self.servers, self.pullers = {}, [], {}, []

    def plane(self):
        self.planes.append(TcpPlane())
        return self.planes[-1]

    def holder(self, name, records, peers=PEERS, options=None, store=None):
        store = store or store_of(records)
        self.servers[name] = Server(store, peers, [self.plane()], options)
        self.addresses[name] = self.servers[name].addresses
        return store

    def gated(self, name, records, nbytes, go):
        self.planes.append(GatedPlane(nbytes, go))
        self.servers[name] = Server(store_of(records), PEERS, self.planes[-1:])
        self.addresses[name] = self.servers[name].addresses

    def puller(self, options=PATIENT, peers=PEERS, expected=EXPECTED):
        self.pullers.append(Puller([self.plane()], lambda who: self.addresses.get(who, {}), peers, expected, options))
        return self.pullers[-1]

    def close(self):
        for puller in self.pullers:
            puller.close()
        for name, server in self.servers.items():
            assert server.close(), f"{name} has leases out: {server.stats()}"
        for plane in self.planes:
            plane.close()


def check(pull, records):
    assert pull.result(10) == [""] * len(records)
    for i, record in enumerate(records.values()):
        assert pull.record(i) == record


def test_the_records_that_arrive_are_the_holders(world, whole, rng):
    records = make_records(rng, 60)
    world.holder("a", records)
    puller = world.puller()
    check(puller.pull(wanted_of(records, "a"), 10), records)
    check(puller.pull(wanted_of(records, "a"), 10), records)
    nbytes = 2 * sum(map(len, records.values()))
    until(lambda: world.servers["a"].stats().sent_bytes == nbytes)
    stats, served = puller.stats(), world.servers["a"].stats()
    assert (stats.pulls, stats.pieces, stats.failed, stats.retried) == (2, 2 * 60 * IDENTITY.groups, 0, 0)
    assert stats.bytes == nbytes
    # A record is whole a little before its lane has heard the end of its ask.
    until(lambda: puller.stats().in_flight_bytes == 0)
    assert not stats.errors
    assert served.asks == 2


def test_layer_groups_arrive_in_order_and_each_is_told_once(world, rng):
    records = {rng.randbytes(32): make_record(rng, [rng.randrange(1, 3000) for _ in range(3)]) for _ in range(40)}
    world.holder("a", records)
    pull = world.puller().pull(wanted_of(records, "a"), 10)
    told = list(pull.arrivals())
    assert all(a.here for a in told)
    assert sorted((a.group, a.index) for a in told) == [(g, i) for g in range(IDENTITY.groups) for i in range(40)]
    assert [a.group for a in told] == sorted(a.group for a in told)
    assert all(pull.wait_group(g, 0) == [True] * 40 for g in range(IDENTITY.groups))


def test_whole_records_arrive_one_after_another_in_one_stretch_each(world, rng, monkeypatch):
    """But what is left of one that has come in part is asked for by layer group."""
    records = {rng.randbytes(32): make_record(rng, [rng.randrange(1, 3000) for _ in range(3)]) for _ in range(40)}
    world.holder("a", records)
    stretches: list[tuple[int, int]] = []
    arrived = Pull.arrived

    def seen(pull, holder, work, segments, payload):
        stretches.extend((offset, length) for _, offset, length in segments)
        arrived(pull, holder, work, segments, payload)

    monkeypatch.setattr(Pull, "arrived", seen)
    pull = world.puller().pull(wanted_of(records, "a"), 10, whole=True)
    told = list(pull.arrivals())
    check(pull, records)
    assert [(a.index, a.group) for a in told] == [(i, g) for i in range(40) for g in range(IDENTITY.groups)]
    assert stretches == [(0, len(record)) for record in records.values()]

    stretches.clear()
    key, record = next(iter(records.items()))
    header = int.from_bytes(record[CRC_OFFSET : CRC_OFFSET + 4], "little")
    frames: list[bytes] = []
    sender = SimpleNamespace(frame_bytes=1 << 20, send=lambda frame, deadline: frames.append(b"".join(frame)))
    ask = wire.Ask(wire.VERSION, 1, PEERS.namespace, PEERS.model, [wire.Item(key, len(record), header, 0b101)], True)
    world.servers["a"]._answer(memoryview(wire.pack(ask)), sender)
    ends = section_ends(record)
    told = [message for message, _ in map(wire.unpack, frames) if isinstance(message, wire.Pieces)]
    assert told[0].segments == [(0, 0, ends[1]), (0, ends[2], ends[3] - ends[2])]


def test_who_waits_is_woken_when_a_layer_group_ends_not_at_every_frame(world, rng):
    records = {rng.randbytes(32): make_record(rng, [3000] * 3) for _ in range(40)}
    go = threading.Event()
    world.gated("a", records, 0, go)
    pull = world.puller(replace(PATIENT, silence_seconds=9)).pull(wanted_of(records, "a"), 20)
    woken, told = [], pull._changed.notify_all
    pull._changed.notify_all = lambda: (woken.append(1), told())
    go.set()
    check(pull, records)
    assert 1 <= len(woken) <= IDENTITY.groups + 1


def test_a_whole_layer_group_next_to_what_is_here_is_ready_at_once(rng):
    record = make_record(rng, [900, 0, 700, 800], identity=replace(IDENTITY, groups=4))
    starts = [*parse_record(record).offsets, len(record)]
    pieces = [record[a:b] for a, b in pairwise(starts)]
    arriving = Arriving(memoryview(bytearray(len(record))), Expected(replace(IDENTITY, groups=4)))

    def settle(group):
        good = arriving.prove(group) is None
        arriving.proven(group, good)
        return good

    assert arriving.section(0, record[: starts[0]]) is None  # its header is not known
    arriving.write(0, record[: starts[0]])
    assert arriving.ready() == [1]  # it is empty
    assert settle(1)
    for group, data in ((2, pieces[2]), (0, pieces[0][:-1]), (0, pieces[0] + b"x")):
        assert arriving.section(starts[group], data) is None  # not next to the header; not a whole one
    assert arriving.section(starts[0], bytes(900)) == 0
    assert not settle(0)
    assert arriving.section(starts[0], pieces[0]) == 0
    assert arriving.section(starts[0], bytes(900)) is None  # while it is being proven
    assert settle(0)
    assert arriving.section(starts[2], pieces[2]) == 2
    for late in (bytes(900), bytes(900 + 700)):
        arriving.write(starts[0], late)
    assert not arriving.ready()
    assert settle(2)
    assert arriving.section(starts[3], pieces[3]) == 3
    assert settle(3)
    assert arriving.slot == record


def test_layer_groups_that_take_long_to_prove_arrive_in_order_too(world, rng):
    """One comes in many frames and is proven outside the lock, and the next, in its last frame, not before it."""
    record = make_record(rng, [100, (1 << 20) + 5000, 2000])
    world.holder("a", {(key := rng.randbytes(32)): record})
    pull = world.puller().pull([Wanted(key, len(record), ("a",))], 10)
    assert [a.group for a in pull.arrivals()] == [0, 1, 2]
    check(pull, {key: record})


class Gate(Sender):
    """Small frames; those after so many bytes wait for ``go``."""

    frame_bytes = 4096

    def __init__(self, inner, nbytes, go):
        self.inner, self.left, self.go = inner, nbytes, go

    def send(self, frame, deadline):
        if self.left < 0:
            assert self.go.wait(10)
        self.left -= sum(map(len, frame))
        self.inner.send(frame, deadline + 10)


class GatedPlane(TcpPlane):
    def __init__(self, nbytes, go):
        super().__init__()
        self.gate = nbytes, go

    def serve(self, answer):
        return super().serve(lambda frame, sender: answer(frame, Gate(sender, *self.gate)))


def test_a_group_can_be_decoded_while_later_ones_have_not_come(world, rng):
    records = {rng.randbytes(32): make_record(rng, [4000, 20_000, 20_000], 16 * i) for i in range(8)}
    go = threading.Event()
    world.gated("a", records, 8 * 5000, go)
    pull = world.puller(replace(PATIENT, silence_seconds=9)).pull(wanted_of(records, "a"), 20)
    assert pull.wait_group(0, 10) == [True] * 8
    assert pull.wait_group(2, 0.05) == [False] * 8
    assert "on its way" in pull.result(0.0)
    for i, record in enumerate(records.values()):
        assert pull.parsed(i).section(0) == parse_record(record).section(0)
        assert pull.parsed(i).header.positions[0] == 16 * i
        assert pull.record(i) is None
    go.set()
    check(pull, records)


def test_into_slots_of_a_store(world, whole, rng):
    records = make_records(rng, 30)
    world.holder("a", records)
    own = HostStore(make_arena(4 << 20))
    rooms = [own.reserve(key, len(record)) for key, record in records.items()]
    for room in rooms:
        room.record[:] = b"\xa5" * len(room.record)
    pull = world.puller().pull(wanted_of(records, "a"), 10, into=[room.record for room in rooms])
    assert pull.result() == [""] * 30
    assert all(room.commit() for room in rooms)
    for key, record in records.items():
        with own.get(key) as lease:
            assert lease.record == record


def test_slots_beside_each_other_stay_apart(world, whole, rng):
    records = make_records(rng, 20)
    world.holder("a", records)
    arena = bytearray(b"\xa5" * (sum(map(len, records.values())) + 16 * 21))
    at, slots, spans = 16, [], []
    for record in records.values():
        slots.append(memoryview(arena)[at : at + len(record)])
        spans.append((at, at + len(record)))
        at += len(record) + 16
    check(world.puller().pull(wanted_of(records, "a"), 10, into=slots), records)
    for (_, end), (start, _) in zip([(0, 0), *spans], [*spans, (len(arena), 0)], strict=True):
        assert bytes(arena[end:start]) == b"\xa5" * (start - end)


def test_work_is_shared_out_among_holders(world, whole, rng):
    records = make_records(rng, 90)
    for name in "abc":
        world.holder(name, records)
    check(world.puller().pull(wanted_of(records, "a", "b", "c"), 10), records)

    def sent():
        return [world.servers[name].stats().sent_bytes for name in "abc"]

    until(lambda: sum(sent()) == sum(map(len, records.values())))
    assert min(sent()) > 0.8 * sum(sent()) / 3


def test_what_one_holder_lacks_comes_from_another(world, whole, rng):
    records = make_records(rng, 50)
    keys = list(records)
    world.holder("a", {k: records[k] for k in keys[:30]})
    world.holder("b", {k: records[k] for k in keys[20:]})
    pull = world.puller().pull(wanted_of(records, "a", "b", "nobody"), 10)
    check(pull, records)


def test_what_nobody_has_is_said_at_once(world, whole, rng):
    records = make_records(rng, 10)
    gone = next(iter(records))
    world.holder("a", records).remove(gone)
    world.holder("b", {})
    start = time.monotonic()
    pull = world.puller().pull([*wanted_of(records, "a", "b"), Wanted(rng.randbytes(32), 900, ())], 30)
    told = pull.result()
    assert time.monotonic() - start < 10
    assert [bool(why) for why in told] == [True, *[False] * 9, True]
    assert "absent" in told[0]
    assert told[-1] == "nobody has it"
    assert pull.wait_group(1, 0) == [False, *[True] * 9, False]
    assert pull.record(0) is None


class OtherPlane(TcpPlane):
    name = "other"


class DeadPlane(TcpPlane):
    """What it connects to is not there: such as 127.0.0.1 of another machine."""

    def __init__(self):
        super().__init__()
        self.tried = 0

    def connect(self, address, deadline):
        self.tried += 1
        raise PeerGoneError(f"connecting to {address}: refused")


def test_a_plane_that_does_not_connect_is_left_for_the_next(world, rng):
    records = make_records(rng, 30)
    dead, far, near = DeadPlane(), OtherPlane(), OtherPlane()
    world.planes += [dead, far, near]
    world.servers["a"] = server = Server(store_of(records), PEERS, [far])
    where = {"tcp": "127.0.0.1:9", **server.addresses}
    options = replace(PATIENT, attempts=1, avoid_seconds=600)
    puller = Puller([dead, near], lambda _: where, PEERS, EXPECTED, options)
    world.pullers.append(puller)
    for _ in range(3):
        check(puller.pull(wanted_of(records, "a"), 10), records)
    # Once: then it comes last with this holder, and no piece was asked anew for it.
    assert dead.tried == 1
    assert puller.stats().errors == {"plane tcp": 1}
    assert puller.stats().retried == 0
    far.close()
    told = puller.pull(wanted_of(records, "a"), 10).result()
    assert all("refused" in why for why in told)
    assert dead.tried == 2


def test_another_size_is_another_record(world, rng):
    records = make_records(rng, 5)
    world.holder("a", records)
    wanted = [
        Wanted(w.key, w.size + d, w.holders) for w, d in zip(wanted_of(records, "a"), (0, 1, -1, 0, 0), strict=True)
    ]
    told = world.puller().pull(wanted, 10).result()
    assert [("other size" in why) for why in told] == [False, True, True, False, False]


@pytest.mark.parametrize("name", ["profile", "point", "artifact", "rank", "groups"])
def test_records_of_another_codec_are_never_used(world, whole, rng, caplog, name):
    other = IDENTITY.__class__(**{**IDENTITY.__dict__, name: 1 if name == "profile" else 2})
    key = rng.randbytes(32)
    record = make_record(rng, [300] * other.groups, identity=other)
    world.holder("a", {key: record})
    world.holder("b", {key: record})
    pull = world.puller().pull([Wanted(key, len(record), ("a", "b"))], 10)
    assert "this worker's codec" in pull.result()[0]
    assert pull.parsed(0) is None
    assert sum("holder a:" in r.message for r in caplog.records) == 1
    assert str(other) in caplog.text
    assert str(IDENTITY) in caplog.text


def test_a_record_of_another_place_is_not_used(world, rng):
    """A holder that mixes up its keys, where the asker knows the block's position."""
    key, record = rng.randbytes(32), make_record(rng, [300] * 3, first=32)
    world.holder("a", {key: record})
    puller = world.puller()
    assert "first position is 32" in puller.pull([Wanted(key, len(record), ("a",), 16, 48)], 10).result()[0]
    assert "tokens is 16" in puller.pull([Wanted(key, len(record), ("a",), 8, 32)], 10).result()[0]
    assert puller.pull([Wanted(key, len(record), ("a",), 16, 32)], 10).result() == [""]


def test_another_record_of_the_same_key_does_not_complete_the_first(world, whole, rng):
    """Group 2 of holder a is damaged; b has the key, but coded otherwise: only a whole record of one of them counts."""
    key, sizes = rng.randbytes(32), [900, 900, 900]
    first, second = make_record(rng, sizes), make_record(rng, sizes)
    damaged = bytearray(first)
    damaged[-5] ^= 1
    world.holder("a", {key: bytes(damaged)})
    puller = world.puller()
    world.addresses["b"] = {}
    pull = puller.pull([Wanted(key, len(first), ("a", "b"))], 10)
    assert "checksum" in pull.result()[0]
    assert [pull.wait_group(g, 0) for g in range(3)] == [[True], [True], [False]]
    world.holder("b", {key: second})
    told = world.puller().pull([Wanted(key, len(first), ("a", "b"))], 10).result()[0]
    assert not told or "other record" in told or "checksum" in told
    world.holder("c", {key: first})
    puller._avoid.clear()
    pull = world.puller().pull([Wanted(key, len(first), ("a", "c"))], 10)
    assert pull.result() == [""]
    assert pull.record(0) == first


@pytest.mark.parametrize("peers", [Peers("other", "model-key"), Peers("dynamo", "other")])
def test_a_holder_serves_its_own_namespace_and_model_only(world, rng, peers, caplog):
    records = make_records(rng, 3)
    world.holder("a", records)
    start = time.monotonic()
    told = world.puller(peers=peers).pull(wanted_of(records, "a"), 10).result()
    assert all("serves dynamo/model-key" in why for why in told)
    assert time.monotonic() - start < 5
    assert world.servers["a"].stats().sent_bytes == 0
    assert f"{peers.namespace}/{peers.model}" in caplog.text


def test_bytes_in_flight_and_on_lease_stay_within_their_limits(world, whole, rng):
    records = make_records(rng, 150, 20_000, 60_000)
    limit, leased = 256 << 10, 4 << 20
    world.holder("a", records, options=ServeOptions(leased_bytes=leased))
    world.holder("b", records, options=ServeOptions(leased_bytes=leased))
    puller = world.puller(replace(PATIENT, in_flight_bytes=limit, ask_bytes=100_000, record_bytes=limit))
    items = list(records.items())
    pulls = [(puller.pull(wanted_of(some, "a", "b"), 30), some) for some in (dict(items[i::5]) for i in range(5))]
    for pull, some in pulls:
        check(pull, some)
    assert 100_000 < puller.stats().in_flight_peak_bytes <= limit
    until(lambda: puller.stats().in_flight_bytes == 0)


def test_a_holder_with_little_room_for_leases_answers_all_the_same(world, whole, rng):
    """Asks that do not fit beside each other, and one that does not fit at all."""
    records = make_records(rng, 220, 20_000, 60_000)
    world.holder("a", records, options=ServeOptions(leased_bytes=4 << 20))
    puller = world.puller(replace(PATIENT, ask_bytes=8 << 20))
    assert sum(map(len, records.values())) > 6 << 20
    pulls = [puller.pull(wanted_of(records, "a"), 30) for _ in range(3)]
    for pull in pulls:
        check(pull, records)
    stats = world.servers["a"].stats()
    assert stats.leased_peak_bytes <= 4 << 20


def test_more_asks_than_a_holder_answers_wait(world, whole, rng):
    records = make_records(rng, 40)
    world.holder("a", records, options=ServeOptions(asks=1))
    puller = world.puller(replace(PATIENT, attempts=50))
    pulls = [puller.pull(wanted_of(records, "a"), 20) for _ in range(4)]
    for pull in pulls:
        check(pull, records)


def test_cancel_ends_it_and_leaves_the_slots_alone(world, whole, rng):
    records = make_records(rng, 60, 5000, 9000)
    go = threading.Event()
    world.gated("a", records, 100_000, go)
    slots = [memoryview(bytearray(len(r))) for r in records.values()]
    puller = world.puller(replace(PATIENT, silence_seconds=9))
    pull = puller.pull(wanted_of(records, "a"), 30, into=slots)
    assert next(pull.arrivals()).here
    pull.cancel()
    before = [bytes(slot) for slot in slots]
    told = pull.result()
    assert "cancelled" in told
    go.set()
    until(lambda: puller.stats().in_flight_bytes == 0)
    assert [bytes(slot) for slot in slots] == before
    check(puller.pull(wanted_of(records, "a"), 30), records)


def test_callbacks_may_fail(world, rng):
    records = make_records(rng, 10)
    world.holder("a", records)
    told = []

    def on_arrival(arrival):
        told.append(arrival)
        raise RuntimeError("a callback's own fault")

    check(world.puller().pull(wanted_of(records, "a"), 10, on_arrival=on_arrival), records)
    until(lambda: len(told) == 30)


def test_bad_input_is_refused_before_anything_is_taken(world, rng):
    records = make_records(rng, 2)
    puller = world.puller(replace(PATIENT, record_bytes=100_000, pull_bytes=150_000))
    key = rng.randbytes(32)
    for wanted, kwargs, told in [
        ([], {}, "no record"),
        ([Wanted(key, 100_001, ())], {}, "takes 37 to 100000"),
        ([Wanted(key, 36, ())], {}, "takes 37"),
        ([Wanted(b"short", 500, ())], {}, "5 bytes"),
        ([Wanted(key, 500, ()), Wanted(key, 500, ())], {}, "twice"),
        ([Wanted(rng.randbytes(32), 90_000, ()) for _ in range(2)], {}, "pull_bytes is 150000"),
        ([Wanted(key, 500, ())], {"timeout": 0}, "timeout is 0"),
        ([Wanted(key, 500, ())], {"timeout": float("nan")}, "timeout is nan"),
        ([Wanted(key, 500, ())], {"into": []}, "0 slots"),
        ([Wanted(key, 500, ())], {"into": [memoryview(bytes(500))]}, "writable"),
        ([Wanted(key, 500, ())], {"into": [memoryview(bytearray(499))]}, "499 bytes for a record of 500"),
    ]:
        with pytest.raises(ConfigError, match=told):
            puller.pull(wanted, **{"timeout": 5, **kwargs})
    assert records
    for made in (
        lambda: PullOptions(in_flight_bytes=10), lambda: PullOptions(record_bytes=1 << 30),
        lambda: PullOptions(lanes=0),
        lambda: ServeOptions(leased_bytes=1), lambda: ServeOptions(stall_seconds=0), lambda: Peers("", "x"),
        lambda: PullOptions(silence_seconds=float("inf")),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            made()
