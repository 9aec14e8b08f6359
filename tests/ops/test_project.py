"""The transform: exact integers one way, the same bits for any batch both ways."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops import project
from dynamo_kvtc.ops.project import reference
from tests.builders import case_seed, same_bits


def case(generator: np.random.Generator, tokens: int, channels: int, spread: float = 900.0):
    """x, mean, gain: fixed-point inputs of about ``spread``."""
    x = torch.from_numpy(generator.standard_normal((tokens, channels))).float()
    mean = torch.from_numpy(generator.standard_normal(channels)).float()
    gain = torch.from_numpy(spread * np.exp(generator.normal(0, 0.5, channels))).float()
    return x, mean, gain


def integers(generator: np.random.Generator, low: int, high: int, *shape: int) -> torch.Tensor:
    """float32 of whole numbers, low and high included."""
    return torch.from_numpy(generator.integers(low, high + 1, shape)).float()


def plain_product(rows: torch.Tensor, columns: torch.Tensor) -> list[list[int]]:
    """rows @ columns in Python's integers."""
    a = [[int(value) for value in row] for row in rows.tolist()]
    b = [[int(value) for value in column] for column in columns.T.tolist()]
    return [[sum(x * y for x, y in zip(row, column, strict=True)) for column in b] for row in a]


def splits(generator: np.random.Generator) -> list[tuple[int, int]]:
    cut = int(generator.integers(2, 299))
    return [(0, 1), (299, 300), (cut, cut + 1), (0, cut), (cut, 300), (cut - 1, cut + 1)]


@pytest.mark.parametrize(("tokens", "channels"), [(1, 1), (3, 257), (17, 96)])
def test_inputs_are_rounded_half_to_even_and_their_energy_is_exact(tokens, channels):
    generator = np.random.default_rng(case_seed())
    x, mean, gain = case(generator, tokens, channels)
    fixed, energy, saturated = project.fixed_point(x, mean, gain)
    assert (fixed.dtype, energy.dtype, saturated.dtype) == (torch.float32, torch.int64, torch.bool)
    # The difference and the product are rounded to float32 first; Python then rounds half to even.
    products = ((x - mean) * gain).tolist()
    wanted = [[round(Fraction(value)) for value in row] for row in products]
    assert fixed.tolist() == wanted
    assert energy.tolist() == [sum(f * f for f in row) for row in wanted]
    assert not saturated.any()


def test_ties_go_to_the_even_number():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    fixed, energy, _ = project.fixed_point(x, torch.zeros(6), torch.ones(6))
    assert fixed.tolist() == [[0, 2, 2, 0, -2, -2]]
    assert energy.tolist() == [16]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 32640.0, -32640.0, 1e30])
def test_a_token_out_of_range_is_flagged_clamped_and_leaves_its_neighbours_alone(value):
    generator = np.random.default_rng(case_seed())
    x = integers(generator, -1000, 1000, 5, 23)
    mean, gain = torch.zeros(23), torch.ones(23)
    clean = project.fixed_point(x, mean, gain)
    x[3, 22] = value
    fixed, energy, saturated = project.fixed_point(x, mean, gain)
    assert saturated.tolist() == [False, False, False, True, False]
    wanted = 0 if value != value else np.clip(value, -project.INPUT_MAX, project.INPUT_MAX)
    assert fixed[3, 22] == wanted
    assert int(energy[3]) == sum(int(f) ** 2 for f in fixed[3].tolist())
    others = [0, 1, 2, 4]
    assert torch.equal(fixed[others], clean[0][others])
    assert torch.equal(energy[others], clean[1][others])


def test_the_largest_input_is_not_flagged_and_its_energy_does_not_wrap():
    top = float(project.INPUT_MAX)
    x = torch.tensor([[top, -top], [top + 0.4, -top - 0.4], [top + 0.6, 0.0]])
    fixed, _, saturated = project.fixed_point(x, torch.zeros(2), torch.ones(2))
    assert saturated.tolist() == [False, False, True]
    assert fixed.tolist() == [[top, -top], [top, -top], [top, 0.0]]
    channels = project.MAX_CHANNELS
    _, energy, _ = project.fixed_point(torch.full((1, channels), top), torch.zeros(channels), torch.ones(channels))
    assert int(energy) == channels * project.INPUT_MAX**2


def test_all_but_wide_inputs_are_clipped():
    f = torch.tensor([[127.0, 128.0, -128.0, 32639.0, -32639.0, -127.0, 0.0]])
    assert project.clip_narrow(f, torch.tensor([3, 4])).tolist() == [[127, 127, -127, 32639, -32639, -127, 0]]
    assert project.clip_narrow(f, torch.arange(7)).tolist() == f.tolist()
    assert project.clip_narrow(f, torch.empty(0, dtype=torch.int64)).abs().max() == 127
    assert f[0, 1] == 128, "the argument itself must not change"


@pytest.mark.parametrize(("tokens", "channels", "rank"), [(1, 1, 1), (3, 257, 19), (17, 96, 96), (2, 5, 0)])
def test_wide_coefficients_are_exact_integer_sums(tokens, channels, rank):
    generator = np.random.default_rng(case_seed())
    fixed = integers(generator, -project.INPUT_MAX, project.INPUT_MAX, tokens, channels)
    basis = integers(generator, -32767, 32767, channels, rank).to(torch.int16)
    found = project.analyse_wide(fixed, basis)
    assert found.dtype == torch.float64
    assert found.tolist() == plain_product(fixed, basis)


@pytest.mark.parametrize(("tokens", "channels", "rank"), [(1, 1, 1), (3, 257, 19), (17, 96, 96), (2, 5, 0)])
@pytest.mark.parametrize("wide", [0.0, 0.2, 1.0])
def test_narrow_coefficients_are_exact_integer_sums(tokens, channels, rank, wide):
    generator = np.random.default_rng(case_seed())
    wide_inputs = torch.from_numpy(np.flatnonzero(generator.random(channels) < wide))
    fixed = integers(generator, -project.INPUT_MAX, project.INPUT_MAX, tokens, channels)
    fixed = project.clip_narrow(fixed, wide_inputs)
    basis = integers(generator, -128, 127, channels, rank).to(torch.int8)
    found = project.analyse_narrow(fixed, wide_inputs, basis)
    assert found.dtype == torch.int64
    assert found.tolist() == plain_product(fixed, basis)


def test_every_wide_input_splits_into_two_int8_limbs():
    """f = 256 * high + low for each f there can be: the limbs a kernel multiplies."""
    top = project.INPUT_MAX
    fixed = torch.arange(-top, top + 1).float()[:, None]
    high = torch.floor((fixed + 128) * 2.0**-8)
    low = fixed - 256 * high
    assert (high.min(), high.max(), low.min(), low.max()) == (-127, 127, -128, 127)
    found = project.analyse_narrow(fixed, torch.tensor([0]), torch.tensor([[-128, 127, 1]], dtype=torch.int8))
    assert torch.equal(found, fixed.long() * torch.tensor([-128, 127, 1]))


def test_the_largest_wide_sums_are_still_exact():
    channels = project.MAX_CHANNELS
    fixed = torch.full((1, channels), float(project.INPUT_MAX))
    basis = torch.full((channels, 2), 32767, dtype=torch.int16)
    basis[0, 1] = 32766
    full = channels * project.INPUT_MAX * 32767
    assert [int(c) for c in project.analyse_wide(fixed, basis)[0]] == [full, full - project.INPUT_MAX]


def test_the_largest_narrow_sums_are_still_exact():
    channels = project.MAX_CHANNELS
    fixed = torch.full((1, channels), float(project.INPUT_MAX))
    basis = torch.full((channels, 2), -128, dtype=torch.int8)
    basis[0, 1] = -127
    full = -128 * channels * project.INPUT_MAX
    assert project.analyse_narrow(fixed, torch.arange(channels), basis).tolist() == [[full, full + project.INPUT_MAX]]
    levels = torch.full((1, channels), 127, dtype=torch.int8)
    assert project.synthesise_narrow(levels, basis.T.contiguous()).tolist() == [
        [-128 * 127 * channels + d for d in (0, 127)]
    ]


def test_more_components_than_one_column_chunk():
    generator = np.random.default_rng(case_seed())
    rank = reference.COLUMN_CHUNK + 5
    fixed = integers(generator, -project.INPUT_MAX, project.INPUT_MAX, 3, 11)
    basis = integers(generator, -32767, 32767, 11, rank).to(torch.int16)
    assert torch.equal(project.analyse_wide(fixed, basis).long(), fixed.long() @ basis.long())


@pytest.mark.parametrize(("channels", "rank"), [(61, 7), (1536, 130), (5, 0)])
def test_analysis_does_not_depend_on_the_batch(channels, rank):
    generator = np.random.default_rng(case_seed())
    x, mean, gain = case(generator, 300, channels)
    wide_inputs = torch.arange(0, channels, 3)
    wide = integers(generator, -32767, 32767, channels, rank).to(torch.int16)
    narrow = integers(generator, -127, 127, channels, rank).to(torch.int8)

    def analyse(rows: torch.Tensor) -> list[torch.Tensor]:
        fixed, energy, saturated = project.fixed_point(rows, mean, gain)
        clipped = project.clip_narrow(fixed, wide_inputs)
        return [
            fixed, energy, saturated, clipped, project.analyse_wide(fixed, wide),
            project.analyse_narrow(clipped, wide_inputs, narrow),
        ]  # fmt: skip

    together = analyse(x)
    for start, end in splits(generator):
        alone = analyse(x[start:end].clone())
        assert all(same_bits(a, b[start:end]) for a, b in zip(alone, together, strict=True)), (start, end)


@pytest.mark.parametrize(("channels", "rank"), [(61, 7), (1024, 515), (130, 1), (8, 0)])
def test_wide_synthesis_does_not_depend_on_the_batch(channels, rank):
    generator = np.random.default_rng(case_seed())
    # Not whole numbers: their float32 sums would be exact in any order and hide it.
    levels = torch.from_numpy(generator.laplace(0, 4, (600, rank))).float()
    decoder = project.decoder_basis(integers(generator, -32767, 32767, channels, rank).to(torch.int16))
    together = project.synthesise_wide(levels, decoder)
    for start, end in [*splits(generator), (255, 257), (511, 600)]:
        alone = project.synthesise_wide(levels[start:end].clone(), decoder)
        assert same_bits(alone, together[start:end]), (start, end)


@pytest.mark.parametrize(("tokens", "channels", "rank"), [(1, 1, 1), (3, 19, 2100), (17, 96, 96), (2, 5, 0)])
def test_narrow_synthesis_is_an_exact_integer_sum(tokens, channels, rank):
    generator = np.random.default_rng(case_seed())
    levels = integers(generator, -127, 127, tokens, rank).to(torch.int8)
    basis = integers(generator, -128, 127, channels, rank).to(torch.int8)
    found = project.synthesise_narrow(levels, basis)
    assert found.dtype == torch.int64
    assert found.tolist() == plain_product(levels, basis.T)


def test_wide_synthesis_agrees_with_float64():
    generator = np.random.default_rng(case_seed())
    basis = integers(generator, -32767, 32767, 77, 33).to(torch.int16)
    levels = torch.from_numpy(generator.standard_normal((19, 33))).float()
    found = project.synthesise_wide(levels, project.decoder_basis(basis))
    torch.testing.assert_close(found.double(), levels.double() @ (basis.double().T / 2**14), rtol=1e-4, atol=1e-4)


def test_stored_basis_is_clamped_and_close():
    basis = torch.tensor([[1.0, -1.01], [0.5, 2.0**-15], [-(2.0**-14), 0.25]])
    assert project.quantise_basis(basis).tolist() == [[16384, -16384], [8192, 0], [-1, 4096]]
    generator = np.random.default_rng(case_seed())
    orthonormal = torch.from_numpy(np.linalg.qr(generator.standard_normal((64, 9)))[0])
    stored = project.decoder_basis(project.quantise_basis(orthonormal))
    assert stored.shape == (9, 64)
    torch.testing.assert_close(stored.T.double(), orthonormal, rtol=0, atol=2.0**-15 * 1.01)


def test_refuses_shapes_that_disagree():
    x, mean, gain = case(np.random.default_rng(case_seed()), 2, 6)
    for arguments, told in [
        ((x[:, :5], mean, gain), r"float32 \[T, 6\]"),
        ((x.double(), mean, gain), "float64"),
        ((x, mean[:5], gain), r"\[5\]"),
        ((x, mean, gain[:5]), "gain"),
        ((x, mean, gain.half()), "gain"),
    ]:
        with pytest.raises(ConfigError, match=told):
            project.fixed_point(*arguments)
    too_many = torch.zeros(project.MAX_CHANNELS + 1)
    with pytest.raises(ConfigError, match="at most 131072"):
        project.fixed_point(x, too_many, too_many)
    none = torch.empty(0, dtype=torch.int64)
    for dtype, other, analyse in (
        (torch.int16, torch.int8, project.analyse_wide),
        (torch.int8, torch.int16, lambda f, b: project.analyse_narrow(f, none, b)),
    ):
        for basis in (torch.zeros(6, 3, dtype=other), torch.zeros(5, 3, dtype=dtype), torch.zeros(6, dtype=dtype)):
            with pytest.raises(ConfigError, match=rf"the basis must be {dtype} \[6, R\]"):
                analyse(x, basis)
    with pytest.raises(ConfigError, match=r"float32 \[T, 3\]"):
        project.synthesise_wide(torch.zeros(2, 4), project.decoder_basis(torch.zeros(6, 3, dtype=torch.int16)))
    for levels, basis in (
        (torch.zeros(2, 4, dtype=torch.int8), torch.zeros(6, 3, dtype=torch.int8)),
        (torch.zeros(2, 3), torch.zeros(6, 3, dtype=torch.int8)),
        (torch.zeros(2, 3, dtype=torch.int8), torch.zeros(6, 3, dtype=torch.int16)),
    ):
        with pytest.raises(ConfigError, match=r"int8 \[T, 3\]"):
            project.synthesise_narrow(levels, basis)
