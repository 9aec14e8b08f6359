"""Which tokens stay exact: sinks, window, tokens named by the caller, tokens that code badly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError


@dataclass(frozen=True)
class ExactPolicy:
    """Tokens stored bit-exact.

    sinks: the sequence's first tokens. Coding them ruins the model's output; they cost next to nothing.
    window: the sequence's last tokens; 0 for prefixes that sequences share.
    max_error: a token whose squared error in the transform's domain would exceed this multiple of the calibrated
        mean is stored exact. A token with NaN or Inf always is.
    """

    sinks: int = 4
    window: int = 0
    max_error: float = 32.0

    def __post_init__(self) -> None:
        for name in ("sinks", "window"):
            if getattr(self, name) < 0:
                raise ConfigError(f"ExactPolicy.{name} is {getattr(self, name)}; it must be 0 or more")
        if not self.max_error > 0 or math.isnan(self.max_error):
            raise ConfigError(f"ExactPolicy.max_error is {self.max_error}; it must be positive (inf switches it off)")

    def mask(self, positions: Tensor, sequence_tokens: int) -> Tensor:
        """bool [T]: which of the tokens at ``positions`` (int64 [T]) of a sequence of this length stay exact."""
        return (positions < self.sinks) | (positions >= sequence_tokens - self.window)


@dataclass(frozen=True)
class ExactCounts:
    """Why tokens of a block were stored exact; each token is counted once, under the first reason that holds."""

    policy: int = 0
    nonfinite: int = 0
    error_bound: int = 0

    @property
    def total(self) -> int:
        return self.policy + self.nonfinite + self.error_bound

    @classmethod
    def of(cls, policy: Tensor, nonfinite: Tensor, error_bound: Tensor) -> ExactCounts:
        """Counts of three bool [T] masks."""
        nonfinite = nonfinite & ~policy
        error_bound = error_bound & ~policy & ~nonfinite
        return cls(*(int(torch.count_nonzero(mask)) for mask in (policy, nonfinite, error_bound)))
