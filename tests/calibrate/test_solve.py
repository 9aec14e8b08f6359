"""Steps for a target: reached, or the range that is."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dynamo_kvtc.calibrate.solve import TOLERANCE, solve_kl, solve_step
from dynamo_kvtc.errors import UnreachableTargetError
from tests.builders import case_seed


def ratio_curve(generator: np.random.Generator):
    """Bits of a Laplacian-like spectrum at a step: a line in the logarithm that bends and levels off."""
    scale = np.exp(generator.normal(0, 2, 200))
    overhead = float(generator.uniform(1, 40))

    def ratio(step: float) -> float:
        return 6400 / (overhead + float(np.log2(1 + scale / step).sum()))

    return ratio


def test_solve_step_reaches_the_target_in_few_evaluations():
    generator = np.random.default_rng(case_seed())
    for _ in range(30):
        curve = ratio_curve(generator)
        low, high = 1e-4, 1e2
        target = curve(math.exp(generator.uniform(math.log(low), math.log(high))))
        asked: list[float] = []

        def ratio_of(step: float, curve=curve, asked=asked) -> float:
            asked.append(step)
            return curve(step)

        guess = None if generator.random() < 0.5 else float(10 ** generator.uniform(-5, 3))
        step = solve_step(ratio_of, target, low, high, guess)
        assert abs(math.log(curve(step) / target)) < TOLERANCE
        assert low <= step <= high
        assert len(asked) <= 25


def test_a_curve_with_a_jump_still_ends():
    step = solve_step(lambda s: 5.0 if s < 0.3 else 50.0, 10.0, 1e-3, 1e3)
    assert step == pytest.approx(0.3, rel=1e-3)


@pytest.mark.parametrize("target", [1.0, 90.0])
def test_an_unreachable_ratio_names_the_range(target):
    with pytest.raises(UnreachableTargetError, match=rf"ratio {target:g} .* about 2\.1 to 80"):
        solve_step(lambda s: min(max(s, 2.01), 80.9), target, 0.1, 1000.0)


def test_solve_kl_on_a_curve_like_a_models():
    """About the square of the step, with a floor and a bend."""
    generator = np.random.default_rng(case_seed())
    for _ in range(30):
        power, bend = generator.uniform(1.4, 2.6), float(generator.uniform(0, 0.2))
        scale = float(10 ** generator.uniform(-3, 0))
        asked: list[float] = []

        def kl_of(step: float, power=power, bend=bend, scale=scale, asked=asked) -> float:
            asked.append(step)
            return scale * step**power / (1 + bend * step)

        target = kl_of(float(10 ** generator.uniform(-1, 1)))
        asked.clear()
        step = solve_kl(kl_of, target, (1e-3, 1e3), float(10 ** generator.uniform(-1, 1)))
        assert kl_of(step) == pytest.approx(target, rel=0.031)
        assert len(asked) <= 8


def test_solve_kl_out_of_reach_says_where_it_got():
    with pytest.raises(UnreachableTargetError, match=r"KL 5 cannot be reached: at step .* within 0\.1 to 2"):
        solve_kl(lambda step: 0.01 * step**2, 5.0, (0.1, 2.0), 1.0)


def test_solve_kl_of_a_lossless_start_moves_up():
    assert solve_kl(lambda step: 0.0 if step < 0.5 else step**2, 1.0, (1e-3, 1e3), 0.1) == pytest.approx(1, rel=0.02)
