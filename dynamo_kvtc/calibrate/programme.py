"""The dynamic programme of ``allocate`` in numba."""

# numba's decorators hide the types of what they wrap.
# mypy: disable-error-code="misc"
from __future__ import annotations

import numpy as np
from numba import njit


def solve(energy, errors, sizes, costs, units):
    """Least error of the first P components for every budget.

    energy: float64 [P], lost where a component is left out; errors: float64 [K, P] of a run of kind k at a start,
    infinite where it may not be; sizes, costs: int64 [K], components and budget units of a kind. Returns choice int8
    [P + 1, units + 1], the kind of the run that ends there (-1: one component left out), and best float64 [units + 1].
    """
    count = len(energy)
    choice = np.full((count + 1, units + 1), -1, dtype=np.int8)
    # Rows further back than the longest run are never read again: a ring bounds the memory.
    ring = np.zeros((min(int(sizes.max()), count) + 1, units + 1))
    _solve(energy, errors, sizes.astype(np.int64), costs.astype(np.int64), ring, choice)
    return choice, ring[count % len(ring)]


def trace(choice, budget, kinds, costs):
    """Kinds of the runs of the best allocation within a budget, first to last; -1: one component left out."""
    out = []
    p = choice.shape[0] - 1
    while p > 0:
        k = int(choice[p, budget])
        out.append(k)
        if k < 0:
            p -= 1
        else:
            p, budget = p - kinds[k][0], budget - costs[k]
    return out[::-1]


@njit(cache=True)
def _solve(energy, errors, sizes, costs, ring, choice):
    rows, width = ring.shape
    for p in range(1, len(energy) + 1):
        row, before, chosen = ring[p % rows], ring[(p - 1) % rows], choice[p]
        for b in range(width):
            row[b] = before[b] + energy[p - 1]
        for k in range(len(sizes)):
            start = p - sizes[k]
            if start < 0 or errors[k, start] == np.inf:
                continue
            cost = costs[k]
            error = errors[k, start]
            source = ring[start % rows]
            for b in range(cost, width):
                value = source[b - cost] + error
                if value < row[b]:
                    row[b] = value
                    chosen[b] = np.int8(k)
