"""Which tokens stay exact."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dynamo_kvtc.codec.policy import ExactCounts, ExactPolicy
from dynamo_kvtc.errors import ConfigError
from tests.builders import case_seed


@pytest.mark.parametrize(
    ("sinks", "window", "exact"),
    [(4, 0, [0, 1, 3]), (0, 0, []), (0, 2, [9]), (4, 128, [0, 1, 3, 5, 6, 9]), (1, 5, [0, 6, 9, 5])],
)
def test_mask_goes_by_position_not_by_index(sinks, window, exact):
    positions = torch.tensor([0, 1, 3, 5, 6, 9, 4])
    if window == 128:
        exact = positions.tolist()
    mask = ExactPolicy(sinks, window).mask(positions, sequence_tokens=10)
    assert sorted(positions[mask].tolist()) == sorted(exact)


def test_mask_of_any_numbers():
    generator = np.random.default_rng(case_seed())
    for _ in range(50):
        sinks, window, tokens = generator.integers(0, 20, 3)
        mask = ExactPolicy(int(sinks), int(window)).mask(torch.arange(int(tokens)), int(tokens))
        assert int(mask.sum()) == min(tokens, sinks + window)


def test_defaults_keep_four_sinks_and_no_window():
    assert ExactPolicy().mask(torch.arange(100), 100).nonzero()[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("field", "value"), [("sinks", -1), ("window", -3), ("max_error", 0), ("max_error", -1), ("max_error", math.nan)]
)
def test_refuses(field, value):
    with pytest.raises(ConfigError, match=f"{field} is {value}"):
        ExactPolicy(**{field: value})


def test_infinite_error_bound_is_allowed():
    assert ExactPolicy(max_error=math.inf).max_error == math.inf


def test_each_token_is_counted_once_under_its_first_reason():
    generator = np.random.default_rng(case_seed())
    policy, nonfinite, bound = (torch.from_numpy(generator.random(101) < 0.4) for _ in range(3))
    counts = ExactCounts.of(policy, nonfinite, bound)
    assert counts.policy == int(policy.sum())
    assert counts.total == int((policy | nonfinite | bound).sum())
    assert counts.error_bound == int((bound & ~policy & ~nonfinite).sum())
