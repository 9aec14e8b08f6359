"""Events that come twice, late or out of order, or not at all, and the state they leave: that of a plain dict."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_kvtc.events.index import MIN_BYTES, Index
from dynamo_kvtc.events.peers import WAITING_EVENTS, Peer, Peers, note_beat, note_events
from dynamo_kvtc.events.schema import Batch, Beat, BlocksCleared, BlockStored, WorkerDown, WorkerStats
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
    peer = Peer("w", 1)
    events = [BlockStored(KEYS[0], 1, 5)] * 1024
    for i in range(200):
        assert peer.offer(Batch("w", 1, 1 + 1024 * i, 0, events)) == []
        assert peer._waiting_events <= WAITING_EVENTS
    assert peer.wants_snapshot
    peer.freeze()
    peer.thaw(1 + 1024 * 200)
    assert not peer.behind


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
