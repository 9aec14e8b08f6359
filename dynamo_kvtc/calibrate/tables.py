"""Class tables of profile ``kvtc`` at one step size: which components live, their classes, frequencies and levels.

Everything is fitted on sampled coefficients of text that the PCA has not seen, so the tables expect what a user's text
brings. The quantiser is entropy-constrained: thresholds minimise squared error + LAMBDA * bits, with LAMBDA the slope of
the high-rate limit D = step**2 / 12, dD/dR = -2 ln 2 D (Sullivan, IEEE Trans. IT 42(5), 1996, for the Laplacian).
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamo_kvtc.ops.quantize import FRACTION_BITS, SYMBOL_MAX
from dynamo_kvtc.ops.rans import MAX_CLASSES, MAX_SHIFT, PROBABILITY_TOTAL, ClassTables

LAMBDA = 2 * math.log(2) / 12
"""Squared steps per bit."""

ALPHABET = 126
"""Largest table symbol; 2 * 126 + 2 columns fit a byte's index."""

_SCALE_PER_SHIFT = 12.0
"""A class whose symbols average above this gives its low bits to the raw stream."""

_PRIOR_COUNT = 24.0
"""Weight of the Laplacian prior in a class's table, in symbols: it decides what small classes and rare symbols cost."""

_ROUNDS = 3
_KEEP_FREQUENCY = 0.12
"""Expected count in 4096 below which coding a symbol through the escape is cheaper than a slot of its own."""


@dataclass(frozen=True)
class PointTables:
    """One operating point's tables, for all layer groups of a rank.

    classes: per layer group uint8 [r_g], its live components; rounding int32 [C], centroid float32 [C] as
    ops.quantize takes them; bits: per layer group, mean bits per token under the tables; error: per layer group, mean
    squared error per token in squared steps, dropped components included (not those beyond the sampled rank).
    """

    classes: tuple[NDArray[np.uint8], ...]
    tables: ClassTables
    rounding: NDArray[np.int32]
    centroid: NDArray[np.float32]
    bits: tuple[float, ...]
    error: tuple[float, ...]


def fit_tables(coefficients: list[Tensor], step: float, slope: float = LAMBDA) -> PointTables:
    """Tables for this step. coefficients: per layer group float32 [n, R_g], components by falling variance."""
    scaled = [y / step for y in coefficients]
    scale = torch.cat([y.abs().mean(dim=0) for y in scaled]).clamp(min=1e-6)
    index = _classes_by_scale(scale)
    members = [torch.nonzero(index == c)[:, 0] for c in range(int(index.max()) + 1)]
    columns = torch.cat(scaled, dim=1)
    fits = [_fit_class(columns[:, m], float(scale[m].mean()), slope) for m in members]

    keep_gain = torch.empty(len(index), dtype=torch.float64)
    bits, error = torch.empty_like(keep_gain), torch.empty_like(keep_gain)
    for m, fit in zip(members, fits, strict=True):
        b, e = fit.cost(columns[:, m])
        at = m.cpu()
        bits[at], error[at] = b.cpu(), e.cpu()
        keep_gain[at] = (columns[:, m].double().square().mean(dim=0) - e - slope * b).cpu()

    classes, group_bits, group_error, first = [], [], [], 0
    for y in scaled:
        part = slice(first, first + y.shape[1])
        total = torch.cumsum(keep_gain[part], dim=0)
        live = int(total.argmax()) + 1 if len(total) and float(total.max()) > 0 else 0
        classes.append(index[part][:live].to(torch.uint8).cpu().numpy())
        group_bits.append(float(bits[part][:live].sum()))
        dropped = float(y[:, live:].double().square().sum(dim=1).mean())
        group_error.append(float(error[part][:live].sum()) + dropped)
        first += y.shape[1]
    return PointTables(
        classes=tuple(classes),
        tables=ClassTables(np.stack([f.frequencies for f in fits]), np.array([f.shift for f in fits], np.uint8)),
        rounding=np.array([round(f.rounding * 2**FRACTION_BITS) for f in fits], np.int32),
        centroid=np.array([f.centroid for f in fits], np.float32),
        bits=tuple(group_bits),
        error=tuple(group_error),
    )


@dataclass(frozen=True)
class _Class:
    shift: int
    rounding: float
    centroid: float
    frequencies: NDArray[np.uint16]

    def cost(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean bits and mean squared error (squared steps) of each column of y, float64 [m]."""
        q = _symbols(y, self.rounding)
        f = torch.from_numpy(self.frequencies.astype(np.float64)).to(y.device)
        price = math.log2(PROBABILITY_TOTAL) - f.clamp(min=1e-9).log2() + self.shift
        escape = price[-1] - self.shift + 16
        price = torch.where(f > 0, price, escape)
        a = (q.int() >> self.shift) + ALPHABET
        inside = (a >= 0) & (a <= 2 * ALPHABET)
        bits = torch.where(inside, price[a.clamp(0, 2 * ALPHABET)], escape)
        level = q - torch.sign(q) * self.centroid
        return bits.mean(dim=0), (y - level).double().square().mean(dim=0)


def _classes_by_scale(scale: Tensor) -> Tensor:
    """Class of each component, int64 [sum R]: equal widths in the logarithm of the scale, empty classes left out."""
    log = scale.log()
    # Components far below a step are dropped anyway: one class holds them all.
    floor = max(float(log.min()), math.log(0.02))
    width = max((float(log.max()) - floor) / MAX_CLASSES, 1e-9)
    raw = ((log - floor) / width).floor().clamp(0, MAX_CLASSES - 1).long()
    return torch.unique(raw, return_inverse=True)[1]


def _symbols(y: Tensor, rounding: float) -> Tensor:
    return torch.sign(y) * (y.abs() + rounding).floor().clamp(max=SYMBOL_MAX)


def _fit_class(y: Tensor, scale: float, slope: float) -> _Class:
    """Alternates between the table of the symbols and the thresholds and levels that are best under that table."""
    shift = min(MAX_SHIFT, max(0, math.ceil(math.log2(scale / _SCALE_PER_SHIFT))))
    rounding, centroid = 0.45, 0.02
    magnitude = y.abs()
    frequencies = np.zeros(0, np.uint16)
    for _ in range(_ROUNDS):
        q = (magnitude + rounding).floor().clamp(max=SYMBOL_MAX)
        frequencies = _frequencies(q, shift)
        coded = q > 0
        if bool(coded.any()):
            centroid = float((q - magnitude)[coded].mean())
        if shift == 0:
            cost = -np.log2(np.maximum(frequencies[ALPHABET : ALPHABET + 2], 0.5) / PROBABILITY_TOTAL)
            level = 1.0 - centroid
            threshold = level / 2 + slope * float(cost[1] - cost[0]) / (2 * level)
            rounding = min(0.5, max(0.2, 1.0 - threshold))
        # Re-encoding a decoded block must give the same symbols: levels stay well inside their bins.
        centroid = min(max(centroid, rounding - 0.85), rounding - 0.1)
    q = (magnitude + rounding).floor().clamp(max=SYMBOL_MAX)
    return _Class(shift, rounding, centroid, _frequencies(q, shift))


def _frequencies(magnitude: Tensor, shift: int) -> NDArray[np.uint16]:
    """Frequencies uint16 [2 * ALPHABET + 2] out of symbol magnitudes, both signs alike (a PCA axis has no sign)."""
    counts = torch.bincount(magnitude.reshape(-1).long(), minlength=2).double().cpu().numpy()
    mean = float((counts * np.arange(len(counts))).sum() / counts.sum())
    prior = _laplacian(mean, len(counts) + (2 * ALPHABET << shift))
    counts = np.pad(counts, (0, len(prior) - len(counts))) + _PRIOR_COUNT * prior
    signed = np.concatenate([counts[:0:-1] / 2, counts[:1], counts[1:] / 2])
    symbol = (np.arange(len(signed)) - (len(counts) - 1)) >> shift
    inside = np.abs(symbol) <= ALPHABET
    table = np.bincount(symbol[inside] + ALPHABET, weights=signed[inside], minlength=2 * ALPHABET + 1)
    return _normalise(table, float(signed[~inside].sum()), float(signed.sum()))


def _laplacian(mean: float, size: int) -> NDArray[np.float64]:
    """Probability of magnitudes 0..size-1 of a two-sided geometric law with this mean magnitude."""
    # mean = 2 t / (1 - t**2) for P(q) = (1 - t) / (1 + t) * t**|q|
    t = mean / (1 + math.sqrt(1 + mean * mean)) if mean > 0 else 1e-3
    p = np.power(t, np.arange(size, dtype=np.float64)) * 2
    p[0] = 1
    return p / p.sum()


def _normalise(counts: NDArray[np.float64], escaped: float, total: float) -> NDArray[np.uint16]:
    """Integer frequencies that sum to 4096 and cost least: rare symbols join the escape, the rest share greedily."""
    expected = counts * (PROBABILITY_TOTAL / total)
    rare = expected < _KEEP_FREQUENCY
    weights = np.append(np.where(rare, 0.0, counts), max(escaped + float(counts[rare].sum()), total * 1e-6))
    ideal = weights * (PROBABILITY_TOTAL / weights.sum())
    frequencies = np.where(weights > 0, np.maximum(np.floor(ideal), 1), 0).astype(np.int64)
    missing = PROBABILITY_TOTAL - int(frequencies.sum())
    sign = 1 if missing > 0 else -1

    def gain(i: int) -> float:
        # Bits that one slot more saves (negative), or one less costs: the least is taken first.
        return weights[i] * math.log2(frequencies[i] / (frequencies[i] + sign))

    heap = [(gain(i), i) for i in range(len(weights)) if weights[i] > 0 and frequencies[i] + sign >= 1]
    heapq.heapify(heap)
    for _ in range(abs(missing)):
        _, i = heapq.heappop(heap)
        frequencies[i] += sign
        if frequencies[i] + sign >= 1:
            heapq.heappush(heap, (gain(i), i))
    return frequencies.astype(np.uint16)
