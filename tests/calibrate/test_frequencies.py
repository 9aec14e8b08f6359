"""Integer frequencies: they sum up, they are the cheapest there are, and nothing becomes impossible to code."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from dynamo_kvtc.calibrate import frequencies as module
from dynamo_kvtc.calibrate.frequencies import ALPHABET, frequencies
from dynamo_kvtc.ops import rans
from tests.builders import case_seed


def tables_of(row: np.ndarray, shift: int) -> rans.ClassTables:
    return rans.ClassTables(row[None], np.array([shift], np.uint8))


@pytest.mark.parametrize("shift", [0, 1, 5, 12])
def test_rows_are_valid_tables_for_any_counts(shift):
    generator = np.random.default_rng(case_seed())
    for _ in range(40):
        counts = generator.poisson(10.0 ** generator.uniform(-2, 5), int(generator.integers(1, 4000))).astype(float)
        counts *= generator.random(len(counts)) < generator.random()
        row = frequencies(counts, shift, float(10.0 ** generator.uniform(-2, 4)))
        assert row.shape == (2 * ALPHABET + 2,)
        assert int(row.astype(int).sum()) == 4096
        tables_of(row, shift)


def test_rows_are_symmetric_but_for_a_slot():
    """Both signs are as likely; rounding to whole slots may favour one by one. Shifted symbols round downwards."""
    counts = np.exp(-np.arange(300) / 9.0) * 1e5
    row = frequencies(counts, 0, 1.0).astype(int)
    assert (np.abs(row[:ALPHABET] - row[2 * ALPHABET : ALPHABET : -1]) <= 1).all()


@pytest.mark.parametrize("shift", [0, 2, 12])
def test_every_symbol_stays_codable_where_nothing_was_seen(shift):
    generator = np.random.default_rng(case_seed())
    for counts, nominal in ((np.zeros(5), 0.03), (np.zeros(1), 900.0), (np.array([1e9]), 1.0)):
        tables = tables_of(frequencies(counts, shift, nominal), shift)
        symbols = np.append(generator.integers(-32768, 32768, 200), [0, 1, -1, 32767, -32768]).astype(np.int16)[None]
        classes = np.zeros(symbols.shape[1], np.uint8)
        words, lengths = rans.encode_lanes(symbols, classes, tables)
        np.testing.assert_array_equal(rans.decode_lanes(words, lengths, classes, tables), symbols)


def test_the_prior_prices_the_unseen_by_distance():
    """A few small symbols were seen: a symbol next to them must cost less than one far away, and have its own slot."""
    row = frequencies(np.array([6.0, 4.0, 1.0]), 0, 5.0).astype(int)
    assert row[ALPHABET + 3] >= row[ALPHABET + 5] > 0
    assert row[ALPHABET + 100] == 0


def test_rounding_is_the_cheapest_there_is(monkeypatch):
    """Brute force over every way to share 24 slots among four symbols that must all have one."""
    monkeypatch.setattr(module, "PROBABILITY_TOTAL", 24)
    generator = np.random.default_rng(case_seed())
    for _ in range(30):
        counts = generator.uniform(0.15, 1.0, 4) ** generator.uniform(0.5, 4)
        escaped, total = float(generator.uniform(0.05, 0.5)), float(counts.sum())
        weights = np.append(counts, escaped)
        if (counts * 24 / total < 0.13).any():
            continue
        row = module._normalise(counts, escaped, total).astype(int)
        assert row.sum() == 24

        def cost(slots, weights=weights) -> float:
            return -sum(w * math.log2(n / 24) for w, n in zip(weights, slots, strict=True))

        best = min(
            cost((*slots, 24 - sum(slots))) for slots in itertools.product(range(1, 21), repeat=4) if sum(slots) < 24
        )
        assert cost(row) <= best + 1e-9


def test_cost_is_near_the_entropy_of_what_was_seen():
    generator = np.random.default_rng(case_seed())
    q = np.round(generator.laplace(0, 6.0, 200_000)).astype(np.int16)
    row = frequencies(np.bincount(np.abs(q).astype(int)).astype(float), 0, 1.0)
    bits = rans.cross_entropy_bits(q[None], np.zeros(len(q), np.uint8), tables_of(row, 0)) / len(q)
    p = np.unique(q, return_counts=True)[1] / len(q)
    entropy = -(p * np.log2(p)).sum()
    assert entropy - 1e-3 < bits < entropy * 1.003
