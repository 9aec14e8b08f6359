"""Integer frequencies of a class out of symbol counts: a parametric prior, then the cheapest rounding to 4096."""

from __future__ import annotations

import heapq
import math

import numpy as np
from numpy.typing import NDArray

from dynamo_kvtc.ops.rans import PROBABILITY_TOTAL

ALPHABET = 126
"""Largest table symbol; 2 * 126 + 2 columns fit a byte's index."""

_PRIOR_COUNT = 24.0
"""Weight of the Laplacian prior in a class's table, in symbols: it decides what small classes and rare symbols cost."""

_KEEP_FREQUENCY = 0.12
"""Expected count in 4096 below which coding a symbol through the escape is cheaper than a slot of its own."""


def frequencies(counts: NDArray[np.float64], shift: int, nominal: float) -> NDArray[np.uint16]:
    """uint16 [2 * ALPHABET + 2] for ``ops.rans.ClassTables``.

    counts: float64 [Q], how often each magnitude |q| was seen; both signs are taken as equally likely (a PCA axis has
    no sign). shift: raw low bits of the class. nominal: mean magnitude to assume where nothing was seen.
    """
    seen = float(counts.sum())
    mean = float((counts * np.arange(len(counts))).sum() / seen) if seen else nominal
    prior = _laplacian(mean, max(len(counts), (ALPHABET + 1) << shift))
    blended = np.pad(counts, (0, len(prior) - len(counts))) + _PRIOR_COUNT * prior
    signed = np.concatenate([blended[:0:-1] / 2, blended[:1], blended[1:] / 2])
    symbol = (np.arange(len(signed)) - (len(blended) - 1)) >> shift
    inside = np.abs(symbol) <= ALPHABET
    table = np.bincount(symbol[inside] + ALPHABET, signed[inside], 2 * ALPHABET + 1).astype(np.float64)
    return _normalise(table, float(signed[~inside].sum()), float(signed.sum()))


def _laplacian(mean: float, size: int) -> NDArray[np.float64]:
    """Probability of magnitudes 0..size-1 of a two-sided geometric law with this mean magnitude."""
    # mean = 2 t / (1 - t**2) for P(q) = (1 - t) / (1 + t) * t**|q|
    t = mean / (1 + math.sqrt(1 + mean * mean)) if mean > 0 else 1e-3
    p = 2 * np.power(t, np.arange(size, dtype=np.float64))
    p[0] = 1
    return p / p.sum()


def _normalise(counts: NDArray[np.float64], escaped: float, total: float) -> NDArray[np.uint16]:
    """Frequencies that sum to 4096 and cost least: rare symbols join the escape, the rest share greedily."""
    expected = counts * (PROBABILITY_TOTAL / total)
    rare = expected < _KEEP_FREQUENCY
    weights = np.append(np.where(rare, 0.0, counts), max(escaped + float(counts[rare].sum()), total * 1e-6))
    ideal = weights * (PROBABILITY_TOTAL / weights.sum())
    out = np.where(weights > 0, np.maximum(np.floor(ideal), 1), 0).astype(np.int64)
    missing = PROBABILITY_TOTAL - int(out.sum())
    sign = 1 if missing > 0 else -1

    def price(i: int) -> float:
        # Bits that one slot more saves (negative), or one less costs: the least is taken first.
        return float(weights[i]) * math.log2(out[i] / (out[i] + sign))

    heap = [(price(i), i) for i in range(len(weights)) if weights[i] > 0 and out[i] + sign >= 1]
    heapq.heapify(heap)
    for _ in range(abs(missing)):
        _, i = heapq.heappop(heap)
        out[i] += sign
        if out[i] + sign >= 1:
            heapq.heappush(heap, (price(i), i))
    # Where raising rare symbols to one slot took too many, a slot may still be worth more elsewhere. The cost is convex
    # in every frequency, so when no single move helps, nothing does.
    while True:
        saves = weights * np.log2((out + 1) / np.maximum(out, 1))
        costs = np.where(out > 1, weights * np.log2(np.maximum(out, 1) / np.maximum(out - 1, 1)), np.inf)
        to, source = int(saves.argmax()), int(costs.argmin())
        if saves[to] <= costs[source] + 1e-12:
            return out.astype(np.uint16)
        out[to] += 1
        out[source] -= 1
