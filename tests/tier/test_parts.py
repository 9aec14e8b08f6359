"""The tier's parts: keys, lanes, estimates, admission, metrics, pages."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_kvtc.codec.policy import ExactPolicy
from dynamo_kvtc.store import StoreStats
from dynamo_kvtc.tier.admission import Admission
from dynamo_kvtc.tier.estimate import PROBE_EVERY, Estimate
from dynamo_kvtc.tier.identity import KeySpace
from dynamo_kvtc.tier.lane import Closed, Lane
from dynamo_kvtc.tier.metrics import COUNTERS, GAUGES, HISTOGRAMS, TierMetrics, describe
from dynamo_kvtc.types import KVShape, ModelIdentity, RopeSpec
from tests.builders import case_seed, make_artifact, same_bits
from tests.tier.parts import BLOCK_TOKENS, POISON, SHAPE, Answer, Engine


def test_a_key_covers_all_that_makes_caches_differ():
    engine = Engine(3)
    base, artifact = engine.cache(), engine.artifact
    other = make_artifact(SHAPE, seed=77, components=20)[2]
    spaces = [
        KeySpace(base, artifact, "fine", ExactPolicy()),
        KeySpace(base, artifact, "coarse", ExactPolicy()),
        KeySpace(base, artifact, "fine", ExactPolicy(sinks=5)),
        KeySpace(base, artifact, "fine", ExactPolicy(max_error=1.0)),
        KeySpace(base, other, "fine", ExactPolicy()),
        KeySpace(replace(base, tp_rank=1), artifact, "fine", ExactPolicy()),
        KeySpace(replace(base, tp_size=2), artifact, "fine", ExactPolicy()),
        KeySpace(replace(base, block_tokens=16), artifact, "fine", ExactPolicy()),
        KeySpace(replace(base, shape=KVShape(3, 2, 16, "float16")), artifact, "fine", ExactPolicy()),
        KeySpace(replace(base, rope=RopeSpec((1.0, 0.5))), artifact, "fine", ExactPolicy()),
        *(
            KeySpace(replace(base, model=replace(base.model, **{name: "x"})), artifact, "fine", ExactPolicy())
            for name in ModelIdentity.__dataclass_fields__
        ),
    ]
    keys = {space.key(b"h" * 36) for space in spaces}
    assert len(keys) == len(spaces)
    assert all(len(key) == 32 for key in keys)
    assert KeySpace(base, artifact, "fine", ExactPolicy()).key(b"h" * 36) == spaces[0].key(b"h" * 36)
    assert spaces[0].key(b"h" * 35 + b"i") != spaces[0].key(b"h" * 36)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 6), max_size=12), st.integers(1, 12))
def test_a_lane_takes_what_fits_and_tells_of_each_once(costs, limit):
    lane, gate = Lane("test", limit), threading.Event()
    assert lane.put(lambda waited: gate.wait(10), lambda why: None, 1)
    held, taken, told = 1, [], []
    for i, cost in enumerate(costs):
        fits = held + cost <= limit
        assert lane.has_room(cost) == fits
        job = (lambda waited, i=i: 1 // 0) if i % 3 == 1 else (lambda waited, i=i: told.append(i))
        assert lane.put(job, lambda why, i=i: told.append(i), cost) == fits
        if fits:
            held += cost
            taken.append(i)
    assert lane.waiting_cost == held
    gate.set()
    assert lane.idle(10)
    assert told == taken
    assert lane.waiting_cost == 0
    assert lane.close(5)
    assert not lane.put(lambda waited: None, lambda why: None)


def test_a_lane_that_ends_fails_what_waits():
    lane, gate, failed = Lane("test", 10), threading.Event(), Answer()
    lane.put(lambda waited: gate.wait(30), lambda why: None, 1)
    lane.put(lambda waited: None, failed, 1)
    began = time.monotonic()
    assert not lane.close(0.2)
    assert time.monotonic() - began < 10
    assert isinstance(failed.get(), Closed)
    gate.set()


def test_an_estimate_adds_up_what_was_measured():
    e = Estimate(1000.0)
    assert e.restore_seconds({"host": 10}) is None
    assert e.worth({"host": 10})
    for _ in range(60):
        e.note_decode(100, 0.05)
        e.note_fetch("host", 100, 0.01)
        e.note_fetch("disk", 100, 0.1)
        e.note_wait(0.02)
    assert e.restore_seconds({"host": 100}) == pytest.approx(0.02 + 0.01 + 0.05)
    assert e.restore_seconds({"host": 100, "disk": 100}) == pytest.approx(0.02 + 0.11 + 0.1)
    assert e.recompute_seconds(100) == pytest.approx(0.1)
    assert e.worth({"host": 100})
    assert not e.worth({"disk": 100})
    assert [e.worth({"disk": 100}) for _ in range(PROBE_EVERY)].count(True) == 1
    for _ in range(60):
        e.note_fetch("disk", 100, 0.001)
    assert e.worth({"disk": 100})


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=60), st.integers(1, 4))
def test_admission_counts_uses(uses, nth):
    a, seen = Admission(store_on_use=nth), {}
    for use in uses:
        seen[use] = seen.get(use, 0) + 1
        assert a.admit([b"%d" % use]) == [seen[use] >= nth]


def test_admission_forgets_the_longest_unused():
    a = Admission(store_on_use=2, remembered=3)
    a.admit([b"a", b"b", b"c"])
    a.admit([b"d"])  # b"a" is forgotten
    assert a.admit([b"a", b"c"]) == [False, True]


def test_metrics_count_once_and_tell_the_sink():
    told = []
    m = TierMetrics(sink=lambda *what: told.append(what))
    m.count("kvtc_errors", 2, "x")
    m.count("kvtc_errors", 0, "x")
    m.observe("kvtc_encode_seconds", 0.5)
    for evictions in (3, 3, 5):
        m.refresh({"host": StoreStats(entries=1, used_bytes=7, budget_bytes=9, evictions=evictions)}, {"encode": 4})
    assert m.value("kvtc_errors", "x") == 2
    assert m.value("kvtc_evictions", "host") == 5
    assert m.value("kvtc_queue_bytes", "encode") == 4
    assert [t for t in told if t[1] == "kvtc_evictions"] == [
        ("counter", "kvtc_evictions", 3.0, ("host",)), ("counter", "kvtc_evictions", 2.0, ("host",)),
    ]  # fmt: skip
    assert all(describe(name) for name in COUNTERS | GAUGES | HISTOGRAMS)


def test_strided_pages_take_whole_blocks_only():
    engine = Engine(case_seed(), blocks=6)
    k, v = engine.pages.read(engine.order)
    assert same_bits(k, engine.k)
    assert same_bits(v, engine.v)
    some = engine.order[1:4]
    engine.wipe(some)
    left = [i for i in engine.order if i not in some]
    at = torch.cat([torch.arange(BLOCK_TOKENS) + engine.order.index(i) * BLOCK_TOKENS for i in left])
    assert same_bits(engine.pages.read(left)[0], engine.k[:, :, at])
    assert (engine.pages.read(some)[1] == POISON).all()
