"""How much each token matters, predicted from its own coefficients.

Attention reads some tokens of a context far more than others, so an equal error in them costs more. A token's
importance is its squared Fisher gradient relative to the channels' mean. Its logarithm is regressed on the token's
first coefficients and their magnitudes; what recency explains is fitted beside and left out, because it passes. At
equal bits the loss is least when a token's squared step is inversely proportional to its importance (reverse
water-filling); STRENGTH tempers that, since the prediction is rough.

A token unlike the calibration's texts spreads over components that hardly any of those used, each below half a step and
lost. Probes, components from all over the spectrum, are coded with the common step, too: the busier they are, the finer
the token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamo_kvtc.ops.quantize import FINENESS_NEUTRAL, SCORE_BITS

LEADING = 32
"""Components that predict: all are worth little more, and these are coded with the common step."""

PROBES = 96
"""At most."""

PROBE_STRENGTH = 3.0
"""At 1, steps would halve for a token whose probes say that it loses twice as much squared error; but probes tell only
part of it. SmolLM2 calibrated on prose and maths, at 30x, on code: 1.49 times the KL of a calibration with code at 0,
1.37 at 1, 1.29 at 2 (8 sequences), 1.25 at 3 (16), while that calibration itself went from 26.0x to 25.6x, 25.2x and
25.3x."""

STRENGTH = 0.7
_LEVELS_PER_NAT = 0.5 * 4 / math.log(2)
"""Fineness levels (a quarter octave of step each) per nat of importance, of which the step takes the square root."""

_LEVELS_PER_OCTAVE_OF_LOSS = 2.0
"""A level is a quarter octave of step, half an octave of its square."""

_RIDGE = 100.0
_MIN_TOKENS = 20
_CLIP = 50.0
_REFINEMENTS = 15


@dataclass(frozen=True)
class ImportanceModel:
    """weights float64 [2, F]: fineness levels per unit of |y| and of y; bias: levels; probes: components that follow.

    F = 0 and no probes: every token alike."""

    weights: Tensor
    bias: float
    probes: int = 0

    @classmethod
    def none(cls) -> ImportanceModel:
        return cls(torch.zeros(2, 0, dtype=torch.float64), float(FINENESS_NEUTRAL))

    def at_step(self, step: float, y: Tensor, outside: Tensor) -> tuple[Tensor, int]:
        """weights int32 [2, F + probes] for symbols of this step and bias, in units of 2**-SCORE_BITS of a level.

        y: float32 [n, R], sampled tokens' coefficients in steps; outside: float64 [n], energy that no component holds,
        in squared steps.
        """
        weights, bias = self.weights * step, self.bias
        if self.probes:
            of_probes, at_rest = self._probe(y, outside)
            weights = torch.cat([weights, torch.stack([of_probes, torch.zeros_like(of_probes)])], dim=1)
            bias += at_rest
        limit = 2.0**31 - 1
        scaled = (weights * 2**SCORE_BITS).round().clamp(-limit, limit)
        return scaled.to(torch.int32), round(max(-limit, min(limit, bias * 2**SCORE_BITS)))

    def _probe(self, y: Tensor, outside: Tensor) -> tuple[Tensor, float]:
        """Levels per symbol of each probe, float64 [probes], and of none, by what tokens lose at the common step."""
        first = self.weights.shape[1]
        q = (y[:, first:].abs() + 0.45).floor()
        lost = (y[:, first:].abs() - q).square().sum(dim=1, dtype=torch.float64) + outside
        busy = q[:, : self.probes].double()
        # Each probe counts relative to what is usual in it, so that none outweighs the others.
        share = 1 / (1 + busy.mean(dim=0))
        signal = busy @ share
        usual = float(signal.mean())
        # Nothing to learn from probes that are silent, or equally busy, in every token.
        x = signal / usual - 1 if usual > 0 else torch.zeros_like(signal)
        variance = float(x.square().mean())
        if variance < 1e-6:
            return torch.zeros(self.probes, dtype=torch.float64), 0.0
        target = lost.clamp(min=1e-9).log2()
        slope = max(0.0, float((x * (target - target.mean())).mean()) / variance)
        levels = PROBE_STRENGTH * _LEVELS_PER_OCTAVE_OF_LOSS * slope
        return (share * (levels / usual)).cpu(), -levels


def component_order(rank: int) -> tuple[Tensor, int]:
    """int64 [rank]: components by falling variance, but for the probes behind the leading ones; and how many they are.

    Probes lie ever farther apart: whatever the step, some of them are about as large as it.
    """
    leading = min(LEADING, rank)
    count = min(PROBES, (rank - leading) // 4)
    at = torch.logspace(math.log10(2 * LEADING), math.log10(max(rank, 2 * LEADING + 1)), 2 * PROBES).long()
    probes = at[at < rank].unique()
    probes = probes[probes >= leading]
    if count < len(probes):
        probes = probes[torch.linspace(0, len(probes) - 1, count).long()]
    others = torch.ones(rank, dtype=torch.bool)
    others[:leading], others[probes] = False, False
    return torch.cat([torch.arange(leading), probes, others.nonzero()[:, 0]]), len(probes)


def fit_importance(coefficients: Tensor, importance: Tensor, age: Tensor, probes: int = 0) -> ImportanceModel:
    """The model of one layer group.

    coefficients: float32 [n, R]; importance: float32 [n], not negative; age: float32 [n], tokens to the context's end;
    probes: of the transform.
    """
    count = min(LEADING, coefficients.shape[1])
    if len(coefficients) < _MIN_TOKENS * (2 * count + 2):
        return ImportanceModel.none()
    y = coefficients[:, :count].double()
    raw = torch.cat([y.abs(), y, age.double().log1p()[:, None]], dim=1)
    mean, spread = raw.mean(dim=0), raw.std(dim=0).clamp(min=1e-9)
    x = torch.cat([(raw - mean) / spread, torch.ones_like(raw[:, :1])], dim=1)
    target = importance.double().clamp(min=float(importance.double().mean()) * 1e-6)

    gram = x.T @ x
    eye = torch.eye(len(gram), dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(gram + _RIDGE * eye, x.T @ target.log())
    # The mean of the logarithm is not the logarithm of the mean: a few damped steps of a Poisson regression.
    capped = target.clamp(max=float(target.mean()) * _CLIP)
    for _ in range(_REFINEMENTS):
        predicted = (x @ weights).clamp(-30, 30).exp()
        predicted *= capped.mean() / predicted.mean()
        residual = (capped / predicted - 1).clamp(-1, 6)
        weights = weights + 0.3 * torch.linalg.solve(gram + 3 * _RIDGE * eye, x.T @ residual)

    # Without recency and centred: on average a token keeps the common step.
    slope = STRENGTH * _LEVELS_PER_NAT * weights[: 2 * count] / spread[: 2 * count]
    bias = FINENESS_NEUTRAL - float((slope * mean[: 2 * count]).sum())
    return ImportanceModel(slope.reshape(2, count).cpu(), bias, probes)
