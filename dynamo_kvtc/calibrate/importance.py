"""How much each token matters, predicted from its own coefficients.

Attention reads some tokens of a context far more than others, so an equal error in them costs more. A token's
importance is its squared Fisher gradient relative to the channels' mean. Its logarithm is regressed on the token's
first coefficients and their magnitudes; what recency explains is fitted beside and left out, because it passes. At
equal bits the loss is least when a token's squared step is inversely proportional to its importance (reverse
water-filling); STRENGTH tempers that, since the prediction is rough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamo_kvtc.ops.quantize import FINENESS_NEUTRAL, SCORE_BITS

LEADING = 32
"""Components that predict: all are worth little more, and these are coded with the common step."""

STRENGTH = 0.7
_LEVELS_PER_NAT = 0.5 * 4 / math.log(2)
"""Fineness levels (a quarter octave of step each) per nat of importance, of which the step takes the square root."""

_RIDGE = 100.0
_MIN_TOKENS = 20
_CLIP = 50.0
_REFINEMENTS = 15


@dataclass(frozen=True)
class ImportanceModel:
    """weights float64 [2, F]: fineness levels per unit of |y| and of y; bias: levels. F = 0: every token alike."""

    weights: Tensor
    bias: float

    @classmethod
    def none(cls) -> ImportanceModel:
        return cls(torch.zeros(2, 0, dtype=torch.float64), float(FINENESS_NEUTRAL))

    def at_step(self, step: float) -> tuple[Tensor, int]:
        """weights int32 [2, F] for symbols of this step and bias, in units of 2**-SCORE_BITS of a level."""
        limit = 2.0**31 - 1
        scaled = (self.weights * step * 2**SCORE_BITS).round().clamp(-limit, limit)
        return scaled.to(torch.int32), round(max(-limit, min(limit, self.bias * 2**SCORE_BITS)))


def fit_importance(coefficients: Tensor, importance: Tensor, age: Tensor) -> ImportanceModel:
    """The model of one layer group.

    coefficients: float32 [n, R]; importance: float32 [n], not negative; age: float32 [n], tokens to the context's end.
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
    return ImportanceModel(slope.reshape(2, count).cpu(), bias)
