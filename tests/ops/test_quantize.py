"""The quantiser against fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from dynamo_kvtc.ops import quantize
from tests.builders import case_seed

ONE = 2**quantize.FRACTION_BITS
HALF = ONE // 2
STEP = 2 ** (quantize.UNIT_BITS + quantize.INPUT_BITS)
"""A step, in coefficients times units."""
WIDE = quantize.WIDE_UNIT
TOP = quantize.SYMBOL_MAX
GAINS = [Fraction(round(2 ** ((e - 4) / 4) * 256), 256) for e in range(13)]


def slow(coefficient: int, unit: int, rounding: int, limit: int, gain: Fraction = Fraction(1)) -> int:
    steps = Fraction(abs(coefficient) * unit, STEP) * gain
    magnitude = min(math.floor(steps + Fraction(rounding, ONE)), limit)
    return magnitude if coefficient >= 0 else -magnitude


def ints(values: object) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.int32)


def run(
    coefficients: object, units: object, rounding: object, limits: object, fineness: object = None
) -> tuple[list[list[int]], list[bool]]:
    symbols, overflow = quantize.quantise(
        torch.as_tensor(np.asarray(coefficients), dtype=torch.int64), ints(units), ints(rounding), ints(limits),
        None if fineness is None else torch.as_tensor(np.asarray(fineness), dtype=torch.uint8),
    )  # fmt: skip
    assert symbols.dtype == torch.int16
    return symbols.tolist(), overflow.tolist()


def test_the_unit_of_a_wide_component_is_its_basis():
    """An input of one step under a basis entry of 1."""
    coefficient = 2**quantize.INPUT_BITS * 2**14
    assert coefficient * WIDE == STEP
    assert run([[coefficient, -3 * coefficient]], [WIDE] * 2, [HALF] * 2, [TOP] * 2) == ([[1, -3]], [False])


@pytest.mark.parametrize("fine", [False, True])
def test_agrees_with_fractions_on_random_numbers(fine):
    generator = np.random.default_rng(case_seed())
    rounding = generator.integers(0, ONE, 23).tolist()
    units = generator.integers(1, 2 ** generator.integers(1, 22, 23)).tolist()
    units[0] = 2**21
    limits = [TOP if j % 3 == 0 else int(generator.integers(0, 64)) for j in range(23)]
    fineness = generator.permutation(np.arange(52) % 13)
    gains = [GAINS[e] if fine else Fraction(1) for e in fineness]
    scale = 2.0 ** generator.uniform(0, 31, (52, 23))
    coefficients = np.round(generator.uniform(-1, 1, (52, 23)) * scale).astype(np.int64)
    # Whatever the units are, one token overflows and one does not.
    coefficients[0] = 0
    coefficients[1] >>= 21
    coefficients[0, 0] = 2**31
    # Some right at an edge: the least coefficient of a symbol, and the one below it.
    for t, j in zip(range(1, 52), generator.integers(0, 23, 51), strict=True):
        edge = math.ceil((int(generator.integers(1, 5)) - Fraction(rounding[j], ONE)) * STEP / units[j] / gains[t])
        coefficients[t, j] = min(edge - t % 2, 2**31) * (-1) ** (t // 2)
    symbols, overflow = run(coefficients, units, rounding, limits, fineness if fine else None)
    rows = [list(zip(map(int, row), units, rounding, limits, strict=True)) for row in coefficients]
    assert symbols == [[slow(*entry, gain) for entry in row] for row, gain in zip(rows, gains, strict=True)]
    over = [
        any(abs(slow(c, u, r, 2**60, g)) > TOP and n == TOP for c, u, r, n in row)
        for row, g in zip(rows, gains, strict=True)
    ]
    assert overflow == over
    assert any(over)
    assert not all(over)


@pytest.mark.parametrize("rounding", [0, 1, HALF - 1, HALF, HALF // 3])
@pytest.mark.parametrize("unit", [1, WIDE - 1, WIDE, 5 * 2**13, 2**21])
def test_agrees_with_fractions_around_every_edge(rounding, unit):
    edges = [
        math.ceil((k - Fraction(rounding, ONE)) * STEP / unit) + d for k in (0, 1, 2, 3, 511, TOP) for d in (-1, 0, 1)
    ]
    coefficients = [sign * edge for edge in edges for sign in (1, -1) if 0 <= edge < 2**31]
    n = len(coefficients)
    symbols, _ = run([coefficients], [unit] * n, [rounding] * n, [TOP] * n)
    assert symbols[0] == [slow(c, unit, rounding, TOP) for c in coefficients]


def test_ties_of_plain_rounding_go_away_from_zero():
    half = STEP // WIDE // 2
    symbols, _ = run([[half, -half, half - 1, 1 - half, 3 * half, -3 * half, 0]], [WIDE] * 7, [HALF] * 7, [TOP] * 7)
    assert symbols == [[1, -1, 0, 0, 2, -2, 0]]


def test_the_largest_products_do_not_wrap():
    """Coefficient, unit and gain at their limits: 2**62 and the rounding."""
    largest = 2**31
    symbols, overflow = run([[largest, -largest]] * 2, [2**21] * 2, [ONE - 1] * 2, [TOP, 25], [12, 0])
    assert symbols == [[TOP, -25]] * 2
    assert overflow == [True, True]
    assert slow(largest, 2**21, ONE - 1, 2**60, GAINS[12]) == 2 ** (62 - quantize.UNIT_BITS - quantize.INPUT_BITS - 8)


def test_beyond_the_largest_symbol_a_wide_component_is_flagged_and_clamped():
    step = STEP // WIDE
    top = TOP * step
    coefficients = [[top + step // 2 - 1, 0], [top + step // 2, 0], [0, -top - step // 2], [-(2**36), 2**36], [5, -top]]
    symbols, overflow = run(coefficients, [WIDE] * 2, [HALF] * 2, [TOP] * 2)
    assert overflow == [False, True, True, True, False]
    assert symbols == [[TOP, 0], [TOP, 0], [0, -TOP], [-TOP, TOP], [0, -TOP]]


def test_beyond_its_limit_a_narrow_component_is_clipped_and_not_flagged():
    step = STEP // WIDE
    symbols, overflow = run([[30 * step, -25 * step, 40_000 * step]], [WIDE] * 3, [HALF] * 3, [25, 25, 0])
    assert (symbols, overflow) == ([[25, -25, 0]], [False])


def test_overflow_is_judged_in_the_tokens_own_steps():
    coefficients = [[10_000 * STEP // WIDE]] * 3
    assert run(coefficients, [WIDE], [0], [TOP], [4, 10, 12])[1] == [False, False, True]


def test_no_tokens_and_no_components():
    for shape in ((0, 3), (4, 0)):
        none = torch.zeros(shape[1], dtype=torch.int32)
        symbols, overflow = quantize.quantise(torch.empty(shape, dtype=torch.int64), none, none, none)
        assert symbols.shape == shape
        assert overflow.tolist() == [False] * shape[0]
        levels = quantize.narrow_levels(symbols, none + 1, none)
        assert levels.shape == shape
        fineness = torch.full((shape[0],), 4, dtype=torch.uint8)
        energy = torch.zeros(shape[0], dtype=torch.int64)
        error = quantize.error_of(torch.empty(shape, dtype=torch.int64), none, levels.long(), energy, fineness, 0)
        assert error.tolist() == [0.0] * shape[0]


def test_neutral_fineness_is_none():
    generator = np.random.default_rng(case_seed())
    coefficients = torch.from_numpy(np.round(generator.normal(0, 2.0**22, (30, 11)))).long()
    parts = ints([WIDE] * 11), ints([400_000] * 11), ints([TOP] * 11)
    plain, _ = quantize.quantise(coefficients, *parts)
    neutral, _ = quantize.quantise(coefficients, *parts, torch.full((30,), quantize.FINENESS_NEUTRAL).byte())
    assert torch.equal(plain, neutral)


def test_wide_levels_lie_below_their_bin_by_the_centroid():
    symbols = torch.tensor([[0, 0], [1, -1], [-2, 2], [32767, -32767]], dtype=torch.int16)
    levels = quantize.dequantise(symbols, torch.tensor([0.25, 0.125]))
    assert levels.dtype == torch.float32
    assert levels.tolist() == [[0.0, 0.0], [0.75, -0.875], [-1.75, 1.875], [32766.75, -32766.875]]


def test_narrow_levels_are_small_integers():
    scale, bias = ints([5, 5, 1, 127, 128, 255]), ints([0, 2, 0, 126, 0, 128])
    q = torch.tensor([0, 1, -1, 2, 25, -26, 27, 127, 128, -32768, 32767], dtype=torch.int16)
    levels = quantize.narrow_levels(q[:, None].expand(-1, 6).contiguous(), scale, bias)
    assert levels.dtype == torch.int8
    for row, symbol in zip(levels.tolist(), q.tolist(), strict=True):
        for level, s, b in zip(row, scale.tolist(), bias.tolist(), strict=True):
            magnitude = min(max(abs(symbol) * s - b, 0), 127)
            assert level == (0 if symbol == 0 else magnitude if symbol > 0 else -magnitude)


def test_limits_are_the_largest_symbols_whose_levels_are_not_clipped():
    scale = torch.arange(1, 256, dtype=torch.int32).repeat_interleave(3)
    bias = (scale * torch.tensor([0, 1, 2]).repeat(255) // 3).int()
    for s, b, limit in zip(scale.tolist(), bias.tolist(), quantize.narrow_limits(scale, bias).tolist(), strict=True):
        assert limit * s - b <= quantize.LEVEL_MAX < (limit + 1) * s - b


@pytest.mark.parametrize("wide", [True, False])
def test_quantising_a_level_gives_its_symbol_back(wide):
    generator = np.random.default_rng(case_seed())
    rounding = ints([int(0.4 * ONE)] * 17)
    if wide:
        centroid = generator.uniform(0.0, 0.35, 17)
        symbols = torch.from_numpy(generator.integers(-TOP, TOP + 1, (29, 17))).to(torch.int16)
        levels = quantize.dequantise(symbols, torch.from_numpy(centroid).float()).double()
        limits = ints([TOP] * 17)
    else:
        scale = ints(generator.integers(1, 60, 17))
        bias = (scale * 0.2).int()
        limits = quantize.narrow_limits(scale, bias)
        symbols = torch.round(limits * torch.from_numpy(generator.uniform(-1, 1, (29, 17)))).to(torch.int16)
        levels = quantize.narrow_levels(symbols, scale, bias).double() / scale
    again, overflow = quantize.quantise((levels * STEP / WIDE).round().long(), ints([WIDE] * 17), rounding, limits)
    assert not overflow.any()
    assert torch.equal(again, symbols)


def test_the_error_agrees_with_fractions():
    """What was left out and what was lost, in the token's own steps, all but the roundings to 2**-12 steps."""
    generator = np.random.default_rng(case_seed())
    tokens, rank, leading = 26, 9, 4
    units = generator.integers(2**8, 2**14, rank)
    steps = generator.laplace(0, 20, (tokens, rank))
    coefficients = np.round(steps * STEP / units).astype(np.int64)
    fineness = np.arange(tokens) % 13
    levels = np.round(steps * 2**12).astype(np.int64) + generator.integers(-2000, 2001, (tokens, rank))
    outside = generator.integers(0, 10**6, tokens)
    held = [sum(Fraction(int(c) * int(u), STEP) ** 2 for c, u in zip(row, units, strict=True)) for row in coefficients]
    energy = [math.ceil(h * 4**quantize.INPUT_BITS) + int(x) for h, x in zip(held, outside, strict=True)]
    error = quantize.error_of(
        torch.from_numpy(coefficients), ints(units), torch.from_numpy(levels), torch.tensor(energy),
        torch.from_numpy(fineness.astype(np.uint8)), leading,
    )  # fmt: skip
    assert error.dtype == torch.float64
    for t in range(tokens):
        gain = GAINS[fineness[t]]
        lost = Fraction(0)
        for j in range(rank):
            level = Fraction(int(levels[t, j]), 2**12) / (1 if j < leading else gain)
            lost += (Fraction(int(coefficients[t, j]) * int(units[j]), STEP) - level) ** 2
        wanted = (Fraction(energy[t], 4**quantize.INPUT_BITS) - held[t] + lost) * gain**2
        # A coefficient of some hundred steps, off by 2**-13.
        assert float(error[t]) == pytest.approx(float(wanted), abs=float(gain**2) * rank * 400 * 2.0**-13)


def test_the_error_is_the_same_in_any_order_of_components():
    generator = np.random.default_rng(case_seed())
    coefficients = torch.from_numpy(generator.integers(-(2**26), 2**26, (7, 300)))
    units, levels = (
        ints(generator.integers(1, 2**14, 300)),
        torch.from_numpy(generator.integers(-(2**18), 2**18, (7, 300))),
    )
    energy, fineness = torch.full((7,), 2**31 - 1), torch.arange(7).byte()
    error = quantize.error_of(coefficients, units, levels, energy, fineness, 0)
    for _ in range(5):
        order = torch.from_numpy(generator.permutation(300))
        assert torch.equal(
            quantize.error_of(coefficients[:, order], units[order], levels[:, order], energy, fineness, 0), error
        )


def test_the_largest_error_does_not_wrap():
    """All of the largest energy in one wide component, and none of it coded; the same left out; and coded fully."""
    energy = quantize.ENERGY_MAX
    coefficient = math.isqrt(energy) * 2**14
    arguments = ints([WIDE]), torch.zeros(1, 1, dtype=torch.int64)
    neutral, finest = torch.tensor([4]).byte(), torch.tensor([12]).byte()
    steps = energy / 4**quantize.INPUT_BITS
    for held, factor in ((coefficient, 1), (0, 1)):
        for fineness, gain in ((neutral, 1), (finest, 16)):
            error = quantize.error_of(torch.tensor([[held]]), *arguments, torch.tensor([energy]), fineness, 1)
            assert float(error) == pytest.approx(factor * gain * steps, rel=1e-4)
    level = torch.tensor([[math.isqrt(energy) << 12 - quantize.INPUT_BITS]])
    full = quantize.error_of(torch.tensor([[coefficient]]), ints([WIDE]), level, torch.tensor([energy]), neutral, 1)
    assert float(full) == pytest.approx(0, abs=1e-4 * steps)


def test_a_clipped_component_counts_in_the_error():
    coefficient, scale, bias = 40 * STEP // WIDE, ints([5]), ints([1])
    limit = quantize.narrow_limits(scale, bias)
    symbols, _ = quantize.quantise(torch.tensor([[coefficient]]), ints([WIDE]), ints([HALF]), limit)
    assert symbols.tolist() == [[25]]
    levels = quantize.narrow_error_levels(quantize.narrow_levels(symbols, scale, bias), scale)
    energy = torch.tensor([(40 * 2**quantize.INPUT_BITS) ** 2])
    error = quantize.error_of(torch.tensor([[coefficient]]), ints([WIDE]), levels, energy, torch.tensor([4]).byte(), 0)
    assert float(error) == pytest.approx((40 - 24.8) ** 2, rel=1e-3)


def test_levels_for_the_error_are_those_of_the_decoder():
    generator = np.random.default_rng(case_seed())
    symbols = torch.from_numpy(generator.integers(-TOP, TOP + 1, (50, 12)) // 2 ** generator.integers(0, 15, (50, 12)))
    symbols = symbols.to(torch.int16)
    centroid = torch.from_numpy(generator.uniform(-0.9, 0.9, 12)).float()
    found = quantize.wide_error_levels(symbols, centroid)
    assert found.dtype == torch.int64
    exact = torch.sign(symbols).double() * (symbols.double().abs() - centroid.double())
    assert ((found.double() * 2.0**-12 - exact).abs() <= 2.0**-13).all()
    assert (found[symbols == 0] == 0).all()
    scale = ints(generator.integers(1, 256, 12))
    levels = torch.from_numpy(generator.integers(-127, 128, (50, 12))).to(torch.int8)
    found = quantize.narrow_error_levels(levels, scale)
    for row, wanted in zip(found.tolist(), levels.tolist(), strict=True):
        for value, level, s in zip(row, wanted, scale.tolist(), strict=True):
            magnitude = math.floor(Fraction(abs(level) * 2**12, s) + Fraction(s // 2, s))
            assert value == (magnitude if level > 0 else -magnitude)


def test_gains_are_quarter_octaves_in_8_fraction_bits():
    gains = quantize.gains(torch.arange(13, dtype=torch.uint8), torch.float64)
    assert gains.tolist() == [round(2 ** ((e - 4) / 4) * 256) / 256 for e in range(13)]
    assert (gains[0], gains[4], gains[8], gains[12]) == (0.5, 1.0, 2.0, 4.0)
    assert torch.equal(quantize.gains(torch.arange(13), torch.float32).double(), gains)


def test_fineness_and_table_choice_agree_with_plain_integers():
    generator = np.random.default_rng(case_seed())
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
