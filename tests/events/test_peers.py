"""Events that come twice, late or out of order, or not at all, and the state they leave: that of a plain dict."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_kvtc.events.index import MIN_BYTES, Index
from dynamo_kvtc.events.peers import WAITING_BYTES, Peer, Peers, Room, note_beat, note_events
from dynamo_kvtc.events.schema import Batch, Beat, BlocksCleared, BlockStored, Plane, WorkerDown, WorkerStats
from tests.events.test_index import EVENT, KEYS, Model
from tests.events.test_schema import up


@settings(max_examples=150, deadline=None)
@given(st.lists(EVENT, min_size=1, max_size=60), st.integers(0, 2**32))
def test_any_order_and_any_repeats_leave_the_same_state(events, seed):
    """Every event comes at least once, in batches cut anew each time."""
    rng = random.Random(seed)
    batches = []
    for _ in range(rng.randrange(1, 4)):
        at = 0
        while at < len(events):
            n = rng.randrange(1, 9)
            batches.append(Batch("w", 1, at, 0, events[at : at + n]))
            at += n
    rng.shuffle(batches)
    peer, index, model = Peer("w", 1), Index(MIN_BYTES), Model()
    index.show("w", True)
    for batch in batches:
        index.apply("w", peer.offer(batch))
    model.apply("w", events)
    assert not peer.behind
    assert peer.next == len(events)
    for key in KEYS:
        found = index.longest_prefix([key])
        assert set(found[0] if found else []) == model.holders(key)


@settings(max_examples=150, deadline=None)
@given(st.lists(EVENT, min_size=2, max_size=60), st.data())
def test_a_snapshot_and_what_comes_meanwhile_leave_the_same_state(events, data):
    """Some events are lost; the snapshot shows each record some time after it was begun."""
    lost = set(data.draw(st.lists(st.integers(0, len(events) - 1))))
    begun = data.draw(st.integers(0, len(events)))
    peer, index = Peer("w", 1), Index(MIN_BYTES)
    for i in range(begun):
        if i not in lost:
            index.apply("w", peer.offer(Batch("w", 1, i, 0, [events[i]])))
    peer.freeze()
    snapshot = {}
    for key in KEYS:
        seen, so_far = data.draw(st.integers(begun, len(events))), Model()
        so_far.apply("w", events[:seen])
        if key in so_far.held["w"]:
            snapshot[key] = so_far.held["w"][key]
    for i in range(begun, len(events)):
        assert peer.offer(Batch("w", 1, i, 0, [events[i]])) == []
    index.put("w~", list(snapshot), [t for t, _ in snapshot.values()], [s for _, s in snapshot.values()])
    index.rename("w~", "w")
    index.apply("w", peer.thaw(begun))
    model = Model()
    model.apply("w", events)
    index.show("w", True)
    assert not peer.behind
    for key in KEYS:
        found = index.longest_prefix([key])
        assert set(found[0] if found else []) == model.holders(key)


def test_what_waits_is_bounded_and_then_a_snapshot_is_wanted():
    room = Room()
    peer = Peer("w", 1, room)
    events = [BlockStored(KEYS[0], 1, 5)] * 1024
    for i in range(400):
        assert peer.offer(Batch("w", 1, 1 + 1024 * i, 0, events)) == []
        assert room.used <= WAITING_BYTES
    assert peer.wants_snapshot
    peer.freeze()
    peer.thaw(1 + 1024 * 400)
    assert not peer.behind
    assert room.used == 0


def test_what_waits_of_all_together_is_bounded_in_bytes_and_the_greediest_pays():
    peers = Peers()
    honest, _ = peers.of("honest", 1)
    honest.offer(Batch("honest", 1, 3, 0, [BlockStored(KEYS[0], 1, 5)]))
    large = up(planes=[Plane(f"p{i}", "a" * (1 << 14), {str(j): "v" * 256 for j in range(16)}) for i in range(8)])
    greedy = [peers.of(f"g{i}", 1)[0] for i in range(50)]
    for i in range(20):
        for peer in greedy:
            peer.offer(Batch(peer.worker, 1, 1 + 4 * i, 0, [large] * 4))
            assert 0 < peers.room.used <= WAITING_BYTES
    assert sum(peer.wants_snapshot for peer in greedy) >= 40
    assert not honest.wants_snapshot
    for peer in greedy:
        peers.remove(peer, for_good=False)
    assert honest.offer(Batch("honest", 1, 0, 0, [BlocksCleared()] * 3))
    assert not honest.behind
    assert peers.room.used == 0


def test_a_new_epoch_takes_no_room_for_the_one_before():
    peers = Peers()
    peers.of("w", 1)[0].offer(Batch("w", 1, 3, 0, [BlocksCleared()]))
    assert peers.room.used > 0
    peers.of("w", 2)
    assert peers.room.used == 0


def test_a_lost_last_batch_shows_in_the_beat():
    peer = Peer("w", 1)
    assert peer.offer(Batch("w", 1, 0, 0, [BlocksCleared()]))
    beat = Beat(up(), 1, 1, 6.0, WorkerStats())
    assert note_beat(peer, beat, 10.0)
    assert not peer.behind
    assert not note_beat(peer, beat, 12.0)
    assert peer.deadline == 16.0
    assert note_beat(peer, Beat(up(), 2, 5, 6.0, WorkerStats()), 12.0)
    assert peer.behind


def test_an_old_epoch_replaces_nothing_and_the_dead_stay_dead():
    peers = Peers()
    first, new = peers.of("w", 5)
    assert new
    assert peers.of("w", 5) == (first, False)
    assert peers.of("w", 4) == (None, False)
    second, new = peers.of("w", 6)
    assert new
    assert second is not first
    peers.remove(second, for_good=False)
    assert peers.of("w", 5) == (None, False)
    third, new = peers.of("w", 6)
    assert new
    peers.remove(third, for_good=True)
    assert peers.of("w", 6) == (None, False)
    assert peers.of("w", 7)[1]


def test_events_tell_of_the_worker_itself():
    peer = Peer("w1", 7)
    assert not note_events(peer, [up()])
    assert peer.wants_snapshot
    assert peer.up == up()
    assert note_events(peer, [WorkerDown()])
