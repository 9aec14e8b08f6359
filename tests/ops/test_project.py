"""The transform: exact integers one way, the same bits for any batch both ways."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops import project
from dynamo_kvtc.ops.project import reference
from tests.builders import fresh_seed, same_bits


def case(generator: np.random.Generator, tokens: int, channels: int, rank: int, spread: float = 900.0):
    """x, mean, gain, basis: fixed-point inputs of about ``spread``."""
    x = torch.from_numpy(generator.standard_normal((tokens, channels))).float()
    mean = torch.from_numpy(generator.standard_normal(channels)).float()
    gain = torch.from_numpy(spread * np.exp(generator.normal(0, 0.5, channels))).float()
    basis = torch.from_numpy(generator.integers(-32767, 32768, (channels, rank))).to(torch.int16)
    return x, mean, gain, basis


@pytest.mark.parametrize(("tokens", "channels", "rank"), [(1, 1, 1), (3, 257, 19), (17, 96, 96), (2, 5, 0)])
def test_coefficients_are_exact_integer_sums(tokens, channels, rank):
    x, mean, gain, basis = case(np.random.default_rng(fresh_seed()), tokens, channels, rank)
    coefficients, energy, saturated = project.analyse(x, mean, gain, basis)
    fixed = [[int(value) for value in row] for row in ((x - mean) * gain).round().tolist()]
    columns = [[int(value) for value in column] for column in basis.T.tolist()]
    assert not saturated.any()
    assert coefficients.tolist() == [
        [sum(a * b for a, b in zip(row, column, strict=True)) for column in columns] for row in fixed
    ]
    assert energy.tolist() == [sum(a * a for a in row) for row in fixed]


def test_the_largest_sums_are_still_exact():
    channels = project.MAX_CHANNELS
    x = torch.full((1, channels), float(project.INPUT_MAX))
    ones = torch.ones(channels)
    basis = torch.full((channels, 2), 32767, dtype=torch.int16)
    basis[0, 1] = 32766
    coefficients, energy, saturated = project.analyse(x, torch.zeros(channels), ones, basis)
    assert not saturated.any()
    assert [int(c) for c in coefficients[0]] == [channels * 32767**2, channels * 32767**2 - 32767]
    assert int(energy) == channels * 32767**2


def test_more_components_than_one_column_chunk():
    generator = np.random.default_rng(fresh_seed())
    rank = reference.COLUMN_CHUNK + 5
    x, mean, gain, basis = case(generator, 3, 11, rank)
    coefficients, _, _ = project.analyse(x, mean, gain, basis)
    fixed = ((x - mean) * gain).round().to(torch.int64)
    assert torch.equal(coefficients.to(torch.int64), fixed @ basis.to(torch.int64))


@pytest.mark.parametrize(("channels", "rank"), [(61, 7), (1536, 130), (5, 0)])
def test_analysis_does_not_depend_on_the_batch(channels, rank):
    generator = np.random.default_rng(fresh_seed())
    x, mean, gain, basis = case(generator, 300, channels, rank)
    together = project.analyse(x, mean, gain, basis)
    for start, end in splits(generator):
        alone = project.analyse(x[start:end].clone(), mean, gain, basis)
        assert all(same_bits(a, b[start:end]) for a, b in zip(alone, together, strict=True)), (start, end)


@pytest.mark.parametrize(("channels", "rank"), [(61, 7), (1024, 515), (130, 1), (8, 0)])
def test_synthesis_does_not_depend_on_the_batch(channels, rank):
    generator = np.random.default_rng(fresh_seed())
    _, mean, gain, basis = case(generator, 1, channels, rank)
    # Not whole numbers: their float32 sums would be exact in any order and hide it.
    levels = torch.from_numpy(generator.laplace(0, 4, (600, rank))).float()
    decoder = project.decoder_basis(basis)
    together = project.synthesise(levels, decoder, gain, mean)
    for start, end in [*splits(generator), (255, 257), (511, 600)]:
        alone = project.synthesise(levels[start:end].clone(), decoder, gain, mean)
        assert same_bits(alone, together[start:end]), (start, end)


def splits(generator: np.random.Generator) -> list[tuple[int, int]]:
    cut = int(generator.integers(2, 299))
    return [(0, 1), (299, 300), (cut, cut + 1), (0, cut), (cut, 300), (cut - 1, cut + 1)]


def test_synthesis_agrees_with_float64():
    generator = np.random.default_rng(fresh_seed())
    _, mean, gain, basis = case(generator, 1, 77, 33, spread=1.0)
    levels = torch.from_numpy(generator.standard_normal((19, 33))).float()
    found = project.synthesise(levels, project.decoder_basis(basis), gain, mean)
    exact = levels.double() @ (basis.double().T / 2**15) * gain.double() + mean.double()
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 32768.0, -32768.0, 1e30])
def test_a_token_out_of_range_is_flagged_and_leaves_its_neighbours_alone(value):
    generator = np.random.default_rng(fresh_seed())
    x = torch.from_numpy(generator.integers(-1000, 1000, (5, 23))).float()
    mean, gain = torch.zeros(23), torch.ones(23)
    basis = case(generator, 1, 23, 4)[3]
    clean = project.analyse(x, mean, gain, basis)
    x[3, 22] = value
    coefficients, energy, saturated = project.analyse(x, mean, gain, basis)
    assert saturated.tolist() == [False, False, False, True, False]
    assert coefficients.isfinite().all()
    assert energy.isfinite().all()
    others = [0, 1, 2, 4]
    assert torch.equal(coefficients[others], clean[0][others])
    assert torch.equal(energy[others], clean[1][others])


def test_the_largest_input_is_not_flagged():
    x = torch.tensor([[32767.0, -32767.0], [32767.4, -32767.4]])
    _, _, saturated = project.analyse(x, torch.zeros(2), torch.ones(2), torch.ones(2, 1, dtype=torch.int16))
    assert not saturated.any()


def test_stored_basis_is_clamped_and_close():
    basis = torch.tensor([[1.0, -1.0], [0.5, 2.0**-16], [-(2.0**-15), 0.25]])
    assert project.quantise_basis(basis).tolist() == [[32767, -32767], [16384, 0], [-1, 8192]]
    generator = np.random.default_rng(fresh_seed())
    orthonormal = torch.from_numpy(np.linalg.qr(generator.standard_normal((64, 9)))[0])
    stored = project.decoder_basis(project.quantise_basis(orthonormal))
    assert stored.shape == (9, 64)
    torch.testing.assert_close(stored.T.double(), orthonormal, rtol=0, atol=2.0**-16 * 1.01)


def test_refuses_shapes_that_disagree():
    x, mean, gain, basis = case(np.random.default_rng(fresh_seed()), 2, 6, 3)
    for arguments, told in [
        ((x[:, :5], mean, gain, basis), r"float32 \[T, 6\]"),
        ((x.double(), mean, gain, basis), "float64"),
        ((x, mean[:5], gain, basis), "mean"),
        ((x, mean, gain.half(), basis), "gain"),
        ((x, mean, gain, basis.int()), "int16"),
    ]:
        with pytest.raises(ConfigError, match=told):
            project.analyse(*arguments)
    too_many = torch.zeros(project.MAX_CHANNELS + 1, 1, dtype=torch.int16)
    with pytest.raises(ConfigError, match="at most 131072"):
        project.analyse(x, mean, gain, too_many)
    with pytest.raises(ConfigError, match=r"float32 \[T, 3\]"):
        project.synthesise(torch.zeros(2, 4), project.decoder_basis(basis), gain, mean)
