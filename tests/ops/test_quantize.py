"""The quantiser against fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from dynamo_kvtc.ops import quantize
from tests.builders import fresh_seed

ONE = 2**quantize.FRACTION_BITS
HALF = ONE // 2


def slow(coefficient: int, rounding: int) -> int:
    magnitude = math.floor(Fraction(abs(coefficient) + rounding, ONE))
    return magnitude if coefficient >= 0 else -magnitude


def run(coefficients: list[list[int]], rounding: list[int]) -> tuple[list[list[int]], list[bool]]:
    symbols, overflow = quantize.quantise(
        torch.tensor(coefficients, dtype=torch.float64), torch.tensor(rounding, dtype=torch.int32)
    )
    assert symbols.dtype == torch.int16
    return symbols.tolist(), overflow.tolist()


def test_agrees_with_fractions_on_random_numbers():
    generator = np.random.default_rng(fresh_seed())
    rounding = generator.integers(0, HALF + 1, 23).tolist()
    scale = 2.0 ** generator.uniform(0, 34, (41, 23))
    coefficients = np.round(generator.uniform(-1, 1, (41, 23)) * scale).astype(np.int64).tolist()
    symbols, overflow = run(coefficients, rounding)
    assert not any(overflow)
    assert symbols == [[slow(c, r) for c, r in zip(row, rounding, strict=True)] for row in coefficients]


@pytest.mark.parametrize("rounding", [0, 1, HALF - 1, HALF, HALF // 3])
def test_agrees_with_fractions_around_every_edge(rounding):
    edges = [k * ONE - rounding + d for k in (0, 1, 2, 3, 511, 32767) for d in (-1, 0, 1)]
    coefficients = [sign * edge for edge in edges for sign in (1, -1)]
    symbols, _ = run([coefficients], [rounding] * len(coefficients))
    assert symbols[0] == [slow(c, rounding) for c in coefficients]


def test_ties_of_plain_rounding_go_away_from_zero():
    symbols, _ = run([[HALF, -HALF, HALF - 1, 1 - HALF, 3 * HALF, -3 * HALF, 0]], [HALF] * 7)
    assert symbols == [[1, -1, 0, 0, 2, -2, 0]]


def test_beyond_the_largest_symbol_is_flagged_and_clamped():
    top = quantize.SYMBOL_MAX * ONE
    coefficients = [[top + HALF - 1, 0], [top + HALF, 0], [0, -top - HALF], [-(2**47), 2**47], [5, -top]]
    symbols, overflow = run(coefficients, [HALF, HALF])
    assert overflow == [False, True, True, True, False]
    assert symbols == [[32767, 0], [32767, 0], [0, -32767], [-32767, 32767], [0, -32767]]


def test_levels_lie_below_their_bin_by_the_centroid():
    symbols = torch.tensor([[0, 0], [1, -1], [-2, 2], [32767, -32767]], dtype=torch.int16)
    levels = quantize.dequantise(symbols, torch.tensor([0.25, 0.125]))
    assert levels.dtype == torch.float32
    assert levels.tolist() == [[0.0, 0.0], [0.75, -0.875], [-1.75, 1.875], [32766.75, -32766.875]]


def test_quantising_a_level_gives_its_symbol_back():
    generator = np.random.default_rng(fresh_seed())
    rounding, centroid = 0.4, generator.uniform(0.0, 0.35, 17)
    symbols = torch.from_numpy(generator.integers(-32767, 32768, (29, 17))).to(torch.int16)
    levels = quantize.dequantise(symbols, torch.from_numpy(centroid).float())
    again, overflow = quantize.quantise(
        (levels.double() * ONE).round(), torch.full((17,), int(rounding * ONE), dtype=torch.int32)
    )
    assert not overflow.any()
    assert torch.equal(again, symbols)


def test_no_tokens_and_no_components():
    for shape in ((0, 3), (4, 0)):
        symbols, overflow = quantize.quantise(
            torch.empty(shape, dtype=torch.float64), torch.zeros(shape[1], dtype=torch.int32)
        )
        assert symbols.shape == shape
        assert overflow.tolist() == [False] * shape[0]


def test_gains_are_quarter_octaves_in_8_fraction_bits():
    gains = quantize.gains(torch.arange(13, dtype=torch.uint8), torch.float64)
    assert gains.tolist() == [round(2 ** ((e - 4) / 4) * 256) / 256 for e in range(13)]
    assert (gains[0], gains[4], gains[8], gains[12]) == (0.5, 1.0, 2.0, 4.0)
    assert torch.equal(quantize.gains(torch.arange(13), torch.float32).double(), gains)


def test_a_token_of_any_fineness_agrees_with_fractions():
    generator = np.random.default_rng(fresh_seed())
    rounding = generator.integers(0, ONE, 19).tolist()
    fineness = generator.permutation(np.arange(52) % 13)
    gain = [Fraction(round(2 ** ((e - 4) / 4) * 256), 256) for e in fineness]
    scale = 2.0 ** generator.uniform(0, 32.9, (52, 19))
    coefficients = np.round(generator.uniform(-1, 1, (52, 19)) * scale).astype(np.int64)
    # Some of them right at an edge: the least coefficient of a symbol, and the one below it.
    for t, j in zip(range(52), generator.integers(0, 19, 52), strict=True):
        edge = math.ceil((int(generator.integers(1, 9)) * ONE - rounding[j]) / gain[t])
        coefficients[t, j] = (edge - t % 2) * (-1) ** (t // 2)
    symbols, overflow = quantize.quantise(
        torch.from_numpy(coefficients).double(), torch.tensor(rounding, dtype=torch.int32),
        torch.from_numpy(fineness.astype(np.uint8)),
    )  # fmt: skip
    assert not overflow.any()
    wanted = [
        [int(math.copysign(math.floor((abs(int(c)) * g + r) / ONE), c)) for c, r in zip(row, rounding, strict=True)]
        for row, g in zip(coefficients, gain, strict=True)
    ]
    assert symbols.tolist() == wanted


def test_neutral_fineness_is_none():
    generator = np.random.default_rng(fresh_seed())
    coefficients = torch.from_numpy(np.round(generator.normal(0, 2.0**22, (30, 11))))
    rounding = torch.full((11,), 400_000, dtype=torch.int32)
    plain, _ = quantize.quantise(coefficients, rounding)
    neutral, _ = quantize.quantise(coefficients, rounding, torch.full((30,), quantize.FINENESS_NEUTRAL).byte())
    assert torch.equal(plain, neutral)


def test_overflow_is_judged_in_the_tokens_own_steps():
    coefficients = torch.full((3, 1), 10_000.0 * ONE, dtype=torch.float64)
    _, overflow = quantize.quantise(coefficients, torch.tensor([0]).int(), torch.tensor([4, 10, 12]).byte())
    assert overflow.tolist() == [False, False, True]


def test_fineness_and_table_choice_agree_with_plain_integers():
    generator = np.random.default_rng(fresh_seed())
    symbols = generator.integers(-32768, 32768, (400, 7)) // 2 ** generator.integers(0, 16, (400, 7))
    weights = generator.integers(-600, 600, (2, 7))
    bias = int(generator.integers(2**16, 2**19))
    thresholds = np.sort(generator.integers(0, 2**20, 15))
    q = torch.from_numpy(symbols).to(torch.int16)
    fineness = quantize.fineness_of(q, torch.from_numpy(weights).int(), bias)
    choice = quantize.class_offsets(q, torch.from_numpy(abs(weights[0])).int(), torch.from_numpy(thresholds))
    assert fineness.dtype == choice.dtype == torch.uint8
    for row, found, chosen in zip(symbols.tolist(), fineness.tolist(), choice.tolist(), strict=True):
        row = [max(-1023, min(1023, x)) for x in row]
        score = bias + sum(int(a) * abs(x) + int(b) * x for a, b, x in zip(*weights, row, strict=True))
        assert found == max(0, min(12, math.floor(Fraction(score, 2**16) + Fraction(1, 2))))
        assert chosen == sum(sum(abs(int(w)) * abs(x) for w, x in zip(weights[0], row, strict=True)) >= thresholds)
    assert len(set(fineness.tolist())) > 5
    assert len(set(choice.tolist())) > 5


def test_extreme_weights_do_not_wrap():
    top = 2**31 - 1
    q = torch.tensor([[32767] * 64, [-32768] * 64], dtype=torch.int16)
    for weights, bias, wanted in [
        ([[top] * 64, [top] * 64], top, [12, 12]),
        ([[-top] * 64, [0] * 64], top, [0, 0]),
        ([[0] * 64, [top] * 64], 0, [12, 0]),
        ([[0] * 64, [0] * 64], -top - 1, [0, 0]),
    ]:
        assert quantize.fineness_of(q, torch.tensor(weights, dtype=torch.int32), bias).tolist() == wanted
    thresholds = torch.tensor([0, 64 * 1023 * top, 64 * 1023 * top + 1])
    assert quantize.class_offsets(q, torch.full((64,), top, dtype=torch.int32), thresholds).tolist() == [2, 2]
