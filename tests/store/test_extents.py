"""Blocks never overlap, holes are merged, and everything is accounted for."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.store.extents import NONE, Extents, _bin, _shortest


def check(extents: Extents, used: dict[int, int]) -> None:
    """used: block -> units asked for."""
    places = sorted((extents.start[b], extents.length[b], b) for b in used)
    holes = list(extents.holes())
    assert len(set(holes)) == len(holes)
    assert all(extents.length[b] == used[b] for b in used)
    everything = sorted([(s, n, 1) for s, n, _ in places] + [(extents.start[h], extents.length[h], 0) for h in holes])
    end, last = 0, 1
    for start, length, kind in everything:
        assert start == end, "gap or overlap"
        assert kind or last, "two holes side by side"
        end, last = start + length, kind
    assert end == extents.units
    assert extents.free == sum(extents.length[h] for h in holes)
    if holes:
        longest = max(extents.length[h] for h in holes)
        assert longest * 16 / 17 - 1 < extents.largest_bin() <= longest


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_use(data):
    extents = Extents(data.draw(st.integers(1, 3000)))
    rng = random.Random(data.draw(st.integers(0, 1 << 30)))
    used: dict[int, int] = {}
    for _ in range(120):
        what = rng.random()
        if what < 0.55:
            units = rng.choice((1, 2, rng.randint(1, 40), rng.randint(1, 600)))
            block = extents.take(units)
            if block == NONE:
                assert all(extents.length[h] < units for h in extents.holes()), "there was a hole long enough"
            else:
                assert block not in used
                used[block] = units
        elif used:
            block = rng.choice(list(used))
            if what < 0.85:
                del used[block]
                extents.give(block)
            elif what < 0.92:
                used[block] = rng.randint(1, used[block])
                extents.shrink(block, used[block])
            elif extents.left[block] != NONE and extents.is_hole(extents.left[block]):
                start = extents.start[extents.left[block]]
                hole = extents.slide(block)
                assert extents.start[block] == start
                assert extents.is_hole(hole)
                assert extents.left[hole] == block
        check(extents, used)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 120), st.integers(0, 20)), max_size=12))
def test_restored_places_are_those_that_can_be(places):
    extents = Extents(100)
    places.sort()
    used, end = {}, 0
    for (start, length), block in zip(places, extents.restore(places), strict=True):
        fits = start >= end and length > 0 and start + length <= 100
        assert (block != NONE) == fits
        if fits:
            used[block] = length
            end = start + length
            assert extents.start[block] == start
    check(extents, used)


def test_bins_are_in_order():
    for units in range(1, 20_000):
        assert _shortest(_bin(units)) <= units < _shortest(_bin(units) + 1)


def test_sizes_that_cannot_be():
    for units in (0, -1, 1 << 32):
        with pytest.raises(ConfigError, match=str(units)):
            Extents(units)
