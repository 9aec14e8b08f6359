"""What profile ``kvtc`` needs at one step size: live components, their classes, tables, levels and lane parameters.

Everything is fitted on sampled coefficients of text that the PCA has not seen, so the tables expect what a user's text
brings. The quantiser is entropy-constrained: thresholds minimise squared error + LAMBDA * bits, with LAMBDA the slope
of the high-rate limit D = step**2 / 12, dD/dR = -2 ln 2 D (Sullivan, IEEE Trans. IT 42(5), 1996, for the Laplacian).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamo_kvtc.calibrate.frequencies import ALPHABET, frequencies
from dynamo_kvtc.calibrate.importance import ImportanceModel
from dynamo_kvtc.codec.kvtc_point import WIDE_STEP, level_bias
from dynamo_kvtc.codec.lanes import OFFSET_CHOICES, OFFSET_CLASSES, OFFSET_NEUTRAL
from dynamo_kvtc.ops import quantize
from dynamo_kvtc.ops.quantize import FRACTION_BITS, SYMBOL_MAX
from dynamo_kvtc.ops.rans import MAX_CLASSES, MAX_SHIFT, PROBABILITY_TOTAL, ClassTables

LAMBDA = 2 * math.log(2) / 12
"""Squared steps per bit."""

_SMALLEST_SCALE = 0.02
"""Mean magnitude, in steps, below which a component never leaves zero."""

_SCALE_PER_SHIFT = 12.0
"""A class whose symbols average above this gives its low bits to the raw stream."""

_CLIPPED = 0.004
"""Squared steps that a component may lose on average by clipping; beyond it, it is wide. A step's noise is 1/12."""

_ACTIVITY_ONE = 4096
_ROUNDS = 3
_OFFSET_TOKENS = 128


@dataclass(frozen=True)
class GroupFit:
    """One layer group's part of a point: classes uint8 [r] of its live components, how many of them are wide, the
    leading components' importance weights int32 [2, F] and bias, the table choices' thresholds int64 [15]; bits: mean
    per token under the tables; error: mean of what ``quantize.error_of`` says of a token, the squared error of all its
    components in its own steps, dropped ones included."""

    classes: NDArray[np.uint8]
    wide: int
    importance: Tensor
    bias: int
    thresholds: Tensor
    bits: float
    error: float


@dataclass(frozen=True)
class PointTables:
    """One operating point of a rank: rounding int32 [C], centroid float32 [C], activity int32 [C] are per class."""

    groups: tuple[GroupFit, ...]
    tables: ClassTables
    rounding: NDArray[np.int32]
    centroid: NDArray[np.float32]
    activity: NDArray[np.int32]

    @property
    def bits(self) -> float:
        return sum(group.bits for group in self.groups)


def fit_tables(
    coefficients: list[Tensor], step: float, importance: list[ImportanceModel], scales: list[Tensor],
    outside: list[Tensor], slope: float = LAMBDA,
) -> PointTables:  # fmt: skip
    """The point at this step.

    Per layer group: coefficients float32 [n, R_g], components by falling variance; scales uint8 [R_g], levels per step
    of the narrow basis; outside: float32 [n], energy of each token that no component holds.
    """
    lanes = [_Lanes.of(*group, step) for group in zip(coefficients, importance, outside, strict=True)]
    classes = _Classes.over(torch.cat([lane.scale for lane in lanes]))
    for lane in lanes:
        lane.classes = classes.of_scale(lane.scale)
    for round_ in range(_ROUNDS):
        last = round_ == _ROUNDS - 1
        classes.refit(lanes, None if last else slope)
        for lane in lanes:
            if not last:
                lane.choose_fineness(classes)
            if round_ == 0:
                lane.choose_tables(classes)
    groups = tuple(lane.finish(classes, slope, scale) for lane, scale in zip(lanes, scales, strict=True))
    return PointTables(
        groups,
        ClassTables(np.stack(classes.rows), classes.shift.astype(np.uint8)),
        np.round(classes.rounding * 2**FRACTION_BITS).astype(np.int32),
        classes.centroid.astype(np.float32),
        classes.activity.astype(np.int32),
    )


class _Classes:
    """Classes of equal width in the logarithm of the scale; one that no component falls into lives from its prior."""

    def __init__(self, floor: float, width: float) -> None:
        self.floor, self.width = floor, width
        self.nominal = np.exp(floor + width * (np.arange(MAX_CLASSES) + 0.5))
        self.shift = np.clip(np.ceil(np.log2(self.nominal / _SCALE_PER_SHIFT)), 0, MAX_SHIFT).astype(np.int64)
        self.activity = np.round(_ACTIVITY_ONE / (1 + self.nominal)).astype(np.int64)
        self.rounding = np.full(MAX_CLASSES, 0.45)
        self.centroid = np.full(MAX_CLASSES, 0.02)
        self.rows: list[NDArray[np.uint16]] = []

    @classmethod
    def over(cls, scale: Tensor) -> _Classes:
        floor = math.log(_SMALLEST_SCALE)
        largest = max(float(scale.max()) if len(scale) else 0.0, 1.0)
        return cls(floor, (math.log(largest) - floor) / MAX_CLASSES)

    def of_scale(self, scale: Tensor) -> Tensor:
        """int64 [R]."""
        return ((scale.log() - self.floor) / self.width).floor().clamp(0, MAX_CLASSES - 1).long()

    def refit(self, lanes: list[_Lanes], slope: float | None) -> None:
        """Tables of the symbols as they are now; then, given a slope, the thresholds that suit those tables best."""
        width = ((ALPHABET + 1) << int(self.shift.max())) + 1
        counts = np.zeros((MAX_CLASSES, width))
        below, coded = np.zeros(MAX_CLASSES), np.zeros(MAX_CLASSES)
        for lane in lanes:
            q = lane.magnitudes(self)
            flat = (lane.shifted_classes() * width + q.clamp(max=width - 1)).reshape(-1)
            counts += torch.bincount(flat, minlength=counts.size).reshape(counts.shape).cpu().numpy()
            mask = q > 0
            per_column = torch.where(mask, q - lane.magnitude, 0.0).sum(dim=0, dtype=torch.float64)
            below += _by_class(lane.classes, per_column)
            coded += _by_class(lane.classes, mask.sum(dim=0).double())
        self.rows = [frequencies(counts[c], int(self.shift[c]), self.nominal[c]) for c in range(MAX_CLASSES)]
        if slope is None:
            return
        self.centroid = np.where(coded > 0, below / np.maximum(coded, 1), self.centroid)
        for c in np.flatnonzero(self.shift == 0):
            cost = -np.log2(np.maximum(self.rows[c][ALPHABET : ALPHABET + 2], 0.5) / PROBABILITY_TOTAL)
            level = 1.0 - self.centroid[c]
            threshold = level / 2 + slope * float(cost[1] - cost[0]) / (2 * level)
            self.rounding[c] = min(0.5, max(0.2, 1.0 - threshold))
        # Coding a decoded block again must give the same symbols: levels stay well inside their bins.
        self.centroid = np.clip(self.centroid, self.rounding - 0.8, self.rounding - 0.2)

    def prices(self, device: torch.device) -> Tensor:
        """float32 [C, 2 * ALPHABET + 2]: bits of each table symbol, an uncoded one at the price of its escape."""
        f = np.stack(self.rows).astype(np.float64)
        escape = 16 - np.log2(f[:, -1:] / PROBABILITY_TOTAL)
        price = np.where(f > 0, -np.log2(np.maximum(f, 1) / PROBABILITY_TOTAL) + self.shift[:, None], escape)
        price[:, -1:] = escape
        return torch.from_numpy(price).float().to(device)


@dataclass
class _Lanes:
    """A layer group's sampled tokens: magnitudes in the token's own steps (the common one for leading components),
    float32 [n, R]; gain: float32 [n], common step over the token's own; dropped: float64 [n], what the components
    beyond R hold, in squared own steps."""

    dropped: Tensor
    magnitude: Tensor
    sign: Tensor
    scale: Tensor
    importance: Tensor
    bias: int
    classes: Tensor
    offsets: Tensor
    thresholds: Tensor
    gain: Tensor

    @property
    def leading(self) -> int:
        return self.importance.shape[1]

    @classmethod
    def of(cls, coefficients: Tensor, model: ImportanceModel, outside: Tensor, step: float) -> _Lanes:
        y = coefficients / step
        outside = outside.double() / step**2
        weights, bias = model.at_step(step, y, outside)
        weights = weights.to(y.device)
        n = weights.shape[1]
        leading = torch.sign(y[:, :n]) * (y[:, :n].abs() + 0.45).floor().clamp(max=SYMBOL_MAX)
        gain = quantize.gains(quantize.fineness_of(leading.to(torch.int16), weights, bias), torch.float32)
        y[:, n:] *= gain[:, None]
        magnitude = y.abs()
        scale = magnitude.mean(dim=0)
        live = torch.nonzero(scale > _SMALLEST_SCALE)[:, 0]
        rank = max(int(live[-1]) + 1 if len(live) else 0, n)
        dropped = magnitude[:, rank:].double().square().sum(dim=1) + outside * gain.double().square()
        return cls(
            dropped, magnitude[:, :rank], torch.sign(y[:, :rank]).to(torch.int8),
            scale[:rank].clamp(min=1e-6), weights, bias, torch.zeros(rank, dtype=torch.int64, device=y.device),
            torch.zeros(len(y), dtype=torch.int64, device=y.device), torch.zeros(0), gain,
        )  # fmt: skip

    def choose_fineness(self, classes: _Classes) -> None:
        """Each token's fineness by its leading symbols as they are now."""
        n = self.leading
        rounding = torch.from_numpy(classes.rounding).to(self.magnitude)[self.classes[:n]]
        q = (self.magnitude[:, :n] + rounding).floor().clamp(max=SYMBOL_MAX) * self.sign[:, :n]
        gain = quantize.gains(quantize.fineness_of(q.to(torch.int16), self.importance, self.bias), torch.float32)
        change = gain / self.gain
        self.magnitude[:, n:] *= change[:, None]
        self.dropped *= change.double().square()
        self.gain = gain

    def magnitudes(self, classes: _Classes) -> Tensor:
        """int64 [n, R] of the quantised symbols."""
        rounding = torch.from_numpy(classes.rounding).to(self.magnitude)[self.classes]
        return (self.magnitude + rounding).floor().clamp(max=SYMBOL_MAX).long()

    def shifted_classes(self, offsets: Tensor | None = None) -> Tensor:
        """int64 [n, R]: the class each symbol is coded with."""
        n = self.leading
        shifted = self.classes[None, n:] + (self.offsets if offsets is None else offsets)[:, None]
        leading = self.classes[None, :n].expand(len(self.magnitude), n)
        return torch.cat([leading, shifted.clamp(0, MAX_CLASSES - 1)], dim=1)

    def bits(self, classes: _Classes, q: Tensor, shifted: Tensor) -> Tensor:
        """float32 [n, R]: price of each symbol."""
        price = classes.prices(q.device)
        signed = torch.where(self.sign[: len(q)] < 0, -q, q)
        a = signed >> torch.from_numpy(classes.shift).to(q.device)[shifted]
        column = torch.where(a.abs() <= ALPHABET, a + ALPHABET, 2 * ALPHABET + 1)
        return price.reshape(-1)[shifted * price.shape[1] + column]

    def choose_tables(self, classes: _Classes) -> None:
        """Thresholds on a token's activity that pick the cheapest tables on average, and each token's choice by them.

        The cheapest choice is found by trying all on some tokens; it grows with the logarithm of the activity.
        """
        q = self.magnitudes(classes)
        some = slice(None, None, max(1, len(q) // _OFFSET_TOKENS))
        part = _Lanes(
            self.dropped[some], self.magnitude[some], self.sign[some], self.scale, self.importance, self.bias,
            self.classes, self.offsets[some], self.thresholds, self.gain[some],
        )  # fmt: skip
        costs = []
        for choice in range(OFFSET_CHOICES):
            offsets = torch.full_like(part.offsets, OFFSET_CLASSES * (choice - OFFSET_NEUTRAL))
            costs.append(part.bits(classes, q[some], part.shifted_classes(offsets)).sum(dim=1))
        best = torch.stack(costs).argmin(dim=0).double()
        activity = self._activity(classes, q)
        # A token of zeros alone is no measure of scale: it falls below every threshold, where zeros are cheapest.
        active = activity[some] > 0
        x, best = activity[some][active].double().log(), best[active]
        variance = float(x.var(unbiased=False)) if len(x) > 1 else 0.0
        slope = float(((x - x.mean()) * (best - best.mean())).mean()) / variance if variance > 1e-9 else 0.0
        choices = torch.arange(1, OFFSET_CHOICES, dtype=torch.float64)
        if slope > 1e-3:
            at = (choices - 0.5 - float(best.mean())) / slope + float(x.mean())
            thresholds = at.clamp(-1, 40).exp().round().long()
        else:
            # Activity says nothing here: every token takes the neutral tables.
            thresholds = torch.where(choices <= OFFSET_NEUTRAL, 0, 2**62).long()
        self.thresholds = thresholds
        chosen = (activity[:, None] >= thresholds.to(q.device)).sum(dim=1)
        self.offsets = OFFSET_CLASSES * (chosen - OFFSET_NEUTRAL)

    def _activity(self, classes: _Classes, q: Tensor) -> Tensor:
        n = self.leading
        weights = torch.from_numpy(classes.activity).to(q.device)[self.classes[n:]]
        return (q[:, n:].clamp(max=quantize.CLIP) * weights).sum(dim=1)

    def finish(self, classes: _Classes, slope: float, scale: Tensor) -> GroupFit:
        """Drops the trailing components that cost more than they mend."""
        q = self.magnitudes(classes)
        bits = self.bits(classes, q, self.shifted_classes()).mean(dim=0, dtype=torch.float64)
        centroid = torch.from_numpy(classes.centroid).to(self.magnitude)[self.classes]
        level = torch.where(q > 0, q - centroid, 0.0)
        error = (self.magnitude - level).square().mean(dim=0, dtype=torch.float64)
        energy = self.magnitude.square().mean(dim=0, dtype=torch.float64)
        dropped = float(self.dropped.mean())
        # Cost with the first r components live, r = 0..R. Components that earn almost nothing here are kept: text off
        # the calibration's domain lives in them, and without them it would lose quality instead of costing bits.
        cost = torch.cumsum(torch.cat([energy.sum().reshape(1), error + slope * bits - energy]), dim=0) + dropped
        # A multiple of 16, if there are so many: a GPU then moves 16 bytes at a time.
        live = min(len(energy), -(-max(int(cost.argmin()), self.leading) // WIDE_STEP) * WIDE_STEP)
        limit = torch.div(quantize.LEVEL_MAX, scale[:live].to(self.magnitude), rounding_mode="floor")
        clipped = (self.magnitude[:, :live] - (limit + 0.5)).clamp(min=0).square().mean(dim=0)
        too_large = torch.nonzero(clipped > _CLIPPED)[:, 0]
        wide = max(self.leading, int(too_large[-1]) + 1 if len(too_large) else 0)
        return GroupFit(
            classes=self.classes[:live].to(torch.uint8).cpu().numpy(),
            wide=min(live, -(-wide // WIDE_STEP) * WIDE_STEP),
            importance=self.importance.cpu(),
            bias=self.bias,
            thresholds=self.thresholds.cpu(),
            bits=float(bits[:live].sum()),
            error=self._error(classes, q, wide, live, scale) + float(energy[live:].sum()) + dropped,
        )

    def _error(self, classes: _Classes, q: Tensor, wide: int, live: int, scale: Tensor) -> float:
        """Mean squared error of the live components, in the token's own steps for the leading ones too."""
        centroid = torch.from_numpy(classes.centroid).to(self.magnitude)[self.classes]
        level = torch.where(q > 0, q - centroid, 0.0)[:, :live]
        own = scale[wide:live].to(q.device, torch.int32)
        rounding = torch.from_numpy(classes.rounding).to(q.device)[self.classes[wide:live]]
        bias = level_bias(own, (rounding * 2**FRACTION_BITS).round(), centroid[wide:live])
        level[:, wide:] = quantize.narrow_levels(q[:, wide:live].to(torch.int16), own, bias) / own
        lost = (self.magnitude[:, :live] - level).square()
        lost[:, : self.leading] *= self.gain[:, None].square()
        return float(lost.sum(dim=1, dtype=torch.float64).mean())


def _by_class(classes: Tensor, per_column: Tensor) -> NDArray[np.float64]:
    total = torch.zeros(MAX_CLASSES, dtype=torch.float64, device=per_column.device)
    return total.index_add_(0, classes, per_column.double()).cpu().numpy()
