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
