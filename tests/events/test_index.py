"""Who holds what: against a plain dict, and at its size."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.events.index import MAX_HOLDERS, MIN_BYTES, PLACE_BYTES, Holder, Index
from dynamo_kvtc.events.schema import TIERS, BlockMoved, BlockRemoved, BlocksCleared, BlockStored
from tests.builders import case_seed

MANY = 1_000_000 if os.environ.get("KVTC_TEST_SEED") == "fresh" else 100_000
KEYS = [bytes([i]) * 32 for i in range(12)]
KEY, TIER = st.sampled_from(KEYS), st.integers(0, len(TIERS) - 1)
EVENT = st.one_of(
    st.builds(BlockStored, KEY, TIER, st.integers(1, 2**32 - 1)),
    st.builds(BlockMoved, KEY, TIER),
    st.builds(BlockRemoved, KEY, TIER),
    st.just(BlocksCleared()),
)
WORKERS = ["a", "b", "c"]
STEP = st.one_of(
    st.tuples(st.just("apply"), st.sampled_from(WORKERS), st.lists(EVENT, max_size=12)),
    st.tuples(st.just("drop"), st.sampled_from(WORKERS), st.none()),
    st.tuples(st.just("rename"), st.sampled_from(WORKERS), st.lists(EVENT, max_size=12)),
)


class Model:
    """What the index is meant to be, in dicts."""

    def __init__(self) -> None:
        self.held: dict[str, dict[bytes, tuple[int, int]]] = {}

    def apply(self, worker, events):
        held = self.held.setdefault(worker, {})
        for event in events:
            if isinstance(event, BlockStored):
                held[event.key] = (event.tier, event.size)
            elif isinstance(event, BlockMoved) and event.key in held:
                held[event.key] = (event.tier, held[event.key][1])
            elif isinstance(event, BlockRemoved):
                held.pop(event.key, None)
            elif isinstance(event, BlocksCleared):
                held.clear()

    def holders(self, key):
        return {Holder(w, TIERS[held[key][0]], held[key][1]) for w, held in self.held.items() if key in held}


def test_nobody_can_choose_keys_for_the_same_places():
    """Each would push out the one before, one after the other, under the index's lock."""
    index, rng = Index(1 << 20), np.random.default_rng(case_seed())
    for same in ((1, 2), (0, 3), (0, 1, 2)):
        words = rng.integers(1 << 63, size=(4096, 4), dtype=np.uint64)
        words[:, same] = np.array(same, np.uint64)
        keys = [row.tobytes() for row in words]
        index.put("w", keys, [1] * len(keys), [1] * len(keys))
        assert index.entries_of("w") > 4000, "of keys that are all different, a table of 24,000 places keeps nearly all"
        index.drop("w")


@settings(max_examples=150, deadline=None)
@given(st.lists(STEP, max_size=20))
def test_it_is_what_dicts_would_be(steps):
    index, model = Index(MIN_BYTES), Model()
    for what, worker, events in steps:
        if what == "apply":
            index.apply(worker, events)
            model.apply(worker, events)
        elif what == "drop":
            assert index.drop(worker) == len(model.held.pop(worker, {}))
        else:
            index.show(worker, True)
            index.apply("shadow", events)
            index.rename("shadow", worker)
            model.held[worker] = {}
            model.apply(worker, events)
        for name in model.held:
            index.show(name, True)
    for key in KEYS:
        found = index.longest_prefix([key])
        assert set(found[0] if found else []) == model.holders(key)
    assert len(index) == sum(len(held) for held in model.held.values())


def test_a_prefix_ends_where_nobody_holds_it():
    rng = random.Random(case_seed())
    index = Index(1 << 20)
    keys = [rng.randbytes(32) for _ in range(700)]
    index.show("a", True)
    index.show("b", True)
    index.put("a", keys[:600], [2] * 600, range(1, 601))
    index.put("b", keys[590:], [1] * 110, [7] * 110)
    assert [h[0].size for h in index.longest_prefix(keys[:600])[:590]] == list(range(1, 591))
    assert index.longest_prefix(keys)[595] == [Holder("b", "host", 7), Holder("a", "disk", 596)]
    assert len(index.longest_prefix(keys)) == 700
    index.apply("b", [BlockRemoved(keys[650], 1)])
    assert len(index.longest_prefix(keys)) == 650
    assert index.longest_prefix([rng.randbytes(32), *keys]) == []
    assert index.longest_prefix([]) == []
    index.show("b", False)
    assert len(index.longest_prefix(keys)) == 600


def test_a_key_like_another_but_for_one_bit_is_another():
    rng = random.Random(case_seed())
    index, key = Index(MIN_BYTES), rng.randbytes(32)
    index.show("a", True)
    index.put("a", [key], [1], [5])
    for bit in range(256):
        other = bytearray(key)
        other[bit // 8] ^= 1 << bit % 8
        assert index.longest_prefix([bytes(other)]) == []


def test_many_are_held_in_few_bytes_and_none_is_lost():
    """To 3/4 full; then the least recently used go, and memory stays what it is."""
    rng = random.Random(case_seed())
    index = Index(MANY * 58)
    nbytes = index.nbytes
    assert nbytes <= MANY * 58
    index.show("a", True)
    keys = [rng.randbytes(32) for _ in range(MANY)]
    for i in range(0, MANY, 1000):
        index.put("a", keys[i : i + 1000], [1] * 1000, range(i + 1, i + 1001))
    assert len(index) == MANY
    assert index.evicted == 0
    for i in range(0, MANY, 1000):
        assert [h[0].size for h in index.longest_prefix(keys[i : i + 1000])] == list(range(i + 1, i + 1001))
    index.longest_prefix(keys[: MANY // 10])
    for i in range(0, MANY, 1000):
        index.put("a", [rng.randbytes(32) for _ in range(1000)], [1] * 1000, [9] * 1000)
        index.longest_prefix(keys[: MANY // 10]) if i % 20_000 == 0 else None
    assert index.nbytes == nbytes
    assert len(index) <= index.capacity
    assert index.evicted == 2 * MANY - len(index)
    kept = sum(bool(index.longest_prefix([key])) for key in keys[: MANY // 10 : 50])
    others = sum(bool(index.longest_prefix([key])) for key in keys[MANY // 10 :: 450])
    assert kept > 0.98 * (MANY // 500)
    assert others < 0.7 * kept
    assert index.drop("a") > 0
    assert len(index) == 0


def test_a_key_that_all_hold_pushes_out_nothing_beside_it():
    rng = random.Random(case_seed())
    index = Index(MIN_BYTES)
    keys = [rng.randbytes(32) for _ in range(300)]
    index.show("one", True)
    index.put("one", keys, [1] * 300, [5] * 300)
    for i in range(100):
        index.show(f"w{i}", True)
        index.put(f"w{i}", keys[:1], [2], [6])
    assert len(index.longest_prefix(keys)) == 300
    assert len(index.longest_prefix(keys[:1])[0]) == MAX_HOLDERS
    assert index.evicted == 0
    assert index.crowded == 101 - MAX_HOLDERS


def test_bad_budgets_and_too_many_workers_are_refused():
    with pytest.raises(ConfigError, match="budget is 1000 bytes"):
        Index(1000)
    assert PLACE_BYTES == 43
    index = Index(MIN_BYTES)
    with pytest.raises(ConfigError, match=r"keys of \[16\] bytes; .* 32"):
        index.longest_prefix([bytes(16)])
    for i in range(4095):
        index.show(f"w{i}", True)
    with pytest.raises(ConfigError, match="no place for 'more'"):
        index.show("more", True)
    index.drop("w7")
    index.show("more", True)
