"""Token importance: a planted dependence is found, noise is not, and coding again never changes its mind."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dynamo_kvtc.calibrate.importance import (
    LEADING,
    PROBES,
    STRENGTH,
    ImportanceModel,
    component_order,
    fit_importance,
)
from dynamo_kvtc.ops import quantize
from tests.builders import case_seed

LEVELS_PER_NAT = 2 / math.log(2)


def features(generator: np.random.Generator, tokens: int, components: int = 40) -> torch.Tensor:
    sigma = 6.0 * np.arange(1, components + 1) ** -0.7
    return torch.from_numpy((generator.laplace(0, 0.7, (tokens, components)) * sigma).astype(np.float32))


def sampled(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients, in steps, that leave nothing outside."""
    return y, torch.zeros(len(y), dtype=torch.float64)


def predicted(model: ImportanceModel, y: torch.Tensor) -> torch.Tensor:
    """Levels of fineness over neutral."""
    n = model.weights.shape[1]
    first = y[:, :n].double()
    return first.abs() @ model.weights[0] + first @ model.weights[1] + model.bias - quantize.FINENESS_NEUTRAL


def test_a_planted_dependence_is_found_and_recency_left_out():
    generator = np.random.default_rng(case_seed())
    y = features(generator, 30_000)
    age = torch.from_numpy(generator.integers(1, 2000, len(y))).float()
    signal = 0.5 * y[:, 0] / 6 - 0.7 * y[:, 2].abs() / 3 + 0.4 * y[:, 5] / 2
    noise = torch.from_numpy(generator.gamma(2.0, 0.5, len(y))).float()
    importance = (signal - 0.8 * age.log1p()).exp() * noise
    model = fit_importance(y, importance, age)
    assert model.weights.shape == (2, LEADING)
    found = predicted(model, y)
    wanted = STRENGTH * LEVELS_PER_NAT * (signal - signal.mean()).double()
    assert float(torch.corrcoef(torch.stack([found, wanted]))[0, 1]) > 0.97
    slope = float((found * wanted).sum() / wanted.square().sum())
    assert 0.85 < slope < 1.15
    assert abs(float(found.mean())) < 1e-3, "on average a token keeps the common step"


def test_importance_that_follows_nothing_moves_little():
    generator = np.random.default_rng(case_seed())
    y = features(generator, 20_000)
    importance = torch.from_numpy(generator.gamma(0.7, 1.0, len(y))).float()
    model = fit_importance(y, importance, torch.ones(len(y)))
    assert float(predicted(model, y).std()) < 0.5


def test_none_for_too_few_tokens():
    generator = np.random.default_rng(case_seed())
    enough = 20 * (2 * LEADING + 2)
    for tokens, leading in ((enough - 1, 0), (enough, LEADING), (0, 0)):
        y = features(generator, tokens)
        model = fit_importance(y, torch.ones(tokens), torch.ones(tokens))
        assert model.weights.shape == (2, leading)
    weights, bias = ImportanceModel.none().at_step(0.1, *sampled(torch.zeros(3, 4)))
    assert weights.shape == (2, 0)
    fineness = quantize.fineness_of(torch.zeros(3, 0, dtype=torch.int16), weights, bias)
    assert fineness.tolist() == [quantize.FINENESS_NEUTRAL] * 3


def test_fewer_components_than_predictors():
    generator = np.random.default_rng(case_seed())
    y = features(generator, 2000, 5)
    assert fit_importance(y, y[:, 0].exp(), torch.ones(2000)).weights.shape == (2, 5)


def test_tokens_without_any_gradient_do_not_break_the_fit():
    generator = np.random.default_rng(case_seed())
    y = features(generator, 3000)
    importance = torch.from_numpy(generator.gamma(1.0, 1.0, 3000) * (generator.random(3000) < 0.5)).float()
    importance[7] = 1e6
    model = fit_importance(y, importance, torch.ones(3000))
    assert model.weights.isfinite().all()
    assert math.isfinite(model.bias)


def test_weights_are_for_the_symbols_of_any_step():
    """The score of a token's symbols is what the model predicts for it, within what rounding to symbols takes."""
    generator = np.random.default_rng(case_seed())
    y = features(generator, 500)
    model = ImportanceModel(torch.from_numpy(generator.normal(0, 0.2, (2, LEADING))), 4.5)
    wanted = (predicted(model, y) + quantize.FINENESS_NEUTRAL).round().clamp(0, 12)
    weights, bias = model.at_step(0.01, *sampled(y / 0.01))
    assert weights.dtype == torch.int32
    symbols = (y[:, :LEADING] / 0.01).round().to(torch.int16)
    inside = (symbols.abs() < quantize.CLIP).all(dim=1)
    found = quantize.fineness_of(symbols, weights, bias)[inside]
    assert inside.sum() > 100
    assert ((found.double() - wanted[inside]).abs() <= 1).all()
    assert (found.double() == wanted[inside]).double().mean() > 0.9
    huge, limit = ImportanceModel(torch.full((2, 3), 1e30, dtype=torch.float64), -1e30).at_step(1.0, *sampled(y))
    assert huge.tolist() == [[2**31 - 1] * 3] * 2
    assert limit == -(2**31) + 1


@pytest.mark.parametrize("rank", [0, 1, 31, 32, 33, 40, 100, 500, 576, 3000, 6144])
def test_probes_follow_the_leading_components_and_lie_all_over_the_rest(rank):
    order, probes = component_order(rank)
    assert sorted(order.tolist()) == list(range(rank))
    leading = min(rank, LEADING)
    assert order[:leading].tolist() == list(range(leading))
    assert probes <= min(PROBES, (rank - leading) // 4)
    at, rest = order[leading : leading + probes], order[leading + probes :]
    assert bool((at[1:] > at[:-1]).all())
    assert bool((rest[1:] > rest[:-1]).all())
    if rank >= 500:
        assert probes >= 70
        assert int(at[0]) < 2.2 * LEADING
        assert int(at[-1]) > 0.8 * rank


@pytest.mark.parametrize("step", [0.3, 0.6])
def test_tokens_unlike_the_sample_are_coded_finer(step):
    """The same first components, the others twice as large: what is small enough to be lost is not, then."""
    generator = np.random.default_rng(case_seed())
    rank = 1500
    order, probes = component_order(rank)
    assert probes > 80
    sigma = torch.from_numpy(20.0 * np.arange(1, rank + 1) ** -0.8)[order]
    model = ImportanceModel(torch.zeros(2, LEADING, dtype=torch.float64), float(quantize.FINENESS_NEUTRAL), probes)

    def tokens(scale: float) -> torch.Tensor:
        y = torch.from_numpy(generator.laplace(0, 0.7, (600, rank))) * sigma
        activity = torch.from_numpy(np.exp(generator.normal(0, 0.15, (600, 1))))
        y[:, LEADING:] *= scale * activity
        return y.float()

    weights, bias = model.at_step(step, *sampled(tokens(1.0) / step))
    assert weights.shape == (2, LEADING + probes)
    assert bool((weights[0] >= 0).all())
    assert not weights[1].any()

    def fineness(y: torch.Tensor) -> torch.Tensor:
        q = torch.sign(y) * (y.abs() / step + 0.45).floor()
        return quantize.fineness_of(q[:, : LEADING + probes].to(torch.int16), weights, bias).double()

    assert abs(float(fineness(tokens(1.0)).mean()) - quantize.FINENESS_NEUTRAL) < 0.5
    assert float(fineness(tokens(2.0)).mean()) > quantize.FINENESS_NEUTRAL + 1


def test_probes_without_a_symbol_say_nothing():
    model = ImportanceModel(torch.zeros(2, LEADING, dtype=torch.float64), 4.0, 20)
    weights, bias = model.at_step(1.0, *sampled(torch.full((50, 100), 0.1)))
    assert not weights.any()
    assert bias == 4 << quantize.SCORE_BITS
