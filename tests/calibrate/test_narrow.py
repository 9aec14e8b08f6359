"""The 8-bit basis: close to the basis, and deaf to the largest components."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dynamo_kvtc.calibrate.narrow import GUARDED, exponent_of, quantise_narrow
from dynamo_kvtc.ops.quantize import UNIT_BITS
from tests.builders import case_seed


def orthonormal(generator: np.random.Generator, channels: int, rank: int) -> Tensor:
    return torch.from_numpy(np.linalg.qr(generator.standard_normal((channels, rank)))[0]).float()


def deviations(channels: int, decay: float) -> Tensor:
    """Falling; the first are hundreds of steps, as in a key-value cache."""
    return 500.0 * torch.arange(1, channels + 1).float() ** -decay


def stored(entries: Tensor, scale: Tensor, exponent: int) -> Tensor:
    return entries.double() * scale.double() * 2.0**-exponent


def plain(basis: Tensor, scale: Tensor, exponent: int) -> Tensor:
    unit = scale.double() * 2.0**-exponent
    return (basis.double() / unit).round().clamp(-127, 127) * unit


@pytest.mark.parametrize(("channels", "rank"), [(1, 1), (16, 12), (64, 64), (384, 48), (1000, 130)])
def test_entries_are_close_to_the_basis(channels, rank):
    generator = np.random.default_rng(case_seed())
    basis = orthonormal(generator, channels, rank)
    entries, scale, exponent = quantise_narrow(basis, deviations(channels, 0.8))
    assert (entries.dtype, scale.dtype, type(exponent)) == (torch.int8, torch.uint8, int)
    assert entries.shape == (channels, rank)
    assert scale.shape == (rank,)
    unit = scale.double() * 2.0**-exponent
    # Rounded up or down; where the largest entry is next to 127 units, down only.
    assert ((stored(entries, scale, exponent) - basis.double()).abs() <= unit * 1.001).all()
    assert entries.abs().max() <= 127


@pytest.mark.parametrize("decay", [0.8, 1.5])
def test_rounding_errors_are_orthogonal_to_the_leading_components(decay):
    """The energy that leaks from all of them together into the others, against plain rounding."""
    generator = np.random.default_rng(case_seed())
    channels, rank = 1536, 200
    basis, deviation = orthonormal(generator, channels, rank), deviations(channels, decay)
    entries, scale, exponent = quantise_narrow(basis, deviation)
    leading = basis[:, :GUARDED].double() * deviation[:GUARDED].double()

    def leak(b: Tensor) -> float:
        return float((leading.T @ (b - basis.double())).square().sum())

    ours, others = leak(stored(entries, scale, exponent)), leak(plain(basis, scale, exponent))
    assert others >= 20 * ours, others / ours
    # And the error itself is not much larger than plain rounding's.
    noise = (stored(entries, scale, exponent) - basis).square().sum()
    assert noise < 4.5 * (plain(basis, scale, exponent) - basis).square().sum()


def test_leaks_stay_well_below_a_step():
    """Components of 500 steps and less leak less than a tenth of a step into any other; plain rounding, up to half."""
    generator = np.random.default_rng(case_seed())
    channels, rank = 1536, 100
    basis, deviation = orthonormal(generator, channels, rank), deviations(channels, 0.8)
    entries, scale, exponent = quantise_narrow(basis, deviation)
    leading = basis[:, :GUARDED].double() * deviation[:GUARDED].double()
    ours = (leading.T @ (stored(entries, scale, exponent) - basis)).norm(dim=0)
    others = (leading.T @ (plain(basis, scale, exponent) - basis)).norm(dim=0)
    assert ours.max() < 0.1
    assert others.max() > 0.2
    assert others.mean() > 3 * ours.mean()


def test_columns_stay_orthonormal_within_a_percent():
    generator = np.random.default_rng(case_seed())
    basis = orthonormal(generator, 1536, 100)
    b = stored(*quantise_narrow(basis, deviations(1536, 0.8)))
    assert (b.T @ b - torch.eye(100)).abs().max() < 0.01


@pytest.mark.parametrize("channels", [1, 7, 64, 768, 1536, 4096, 2**17])
def test_exponent_follows_the_channels(channels):
    exponent = exponent_of(channels)
    assert 0 <= exponent <= UNIT_BITS
    # An entry of the usual size takes 42 to 84 units of 2**-exponent.
    assert 42 <= 2**exponent / math.sqrt(channels) <= 85


def test_scales_are_the_least_that_hold_a_column():
    generator = np.random.default_rng(case_seed())
    basis = orthonormal(generator, 1536, 60)
    basis[:, 7] = 0.0
    basis[0, 7] = 1.0
    basis[:, 8] = 0.0
    _, scale, exponent = quantise_narrow(basis, deviations(1536, 0.8))
    for j in range(60):
        largest = float(basis[:, j].abs().max()) * 2**exponent
        assert int(scale[j]) == max(1, math.ceil(largest / 127 - 1e-4))
    # The largest column there can be, one entry of 1, and the smallest, nothing at all.
    assert int(scale[7]) == math.ceil(2**exponent / 127) <= 255
    assert int(scale[8]) == 1
    usual = scale[torch.tensor([j for j in range(60) if j not in (7, 8)])]
    assert 2 <= int(usual.min()) <= int(usual.max()) <= 4


@pytest.mark.parametrize("channels", [8, 64, 1536])
def test_columns_of_a_single_entry_are_kept(channels):
    """The largest entry there can be, as of channels that go with no other."""
    basis = torch.eye(channels)[:, :8]
    back = stored(*quantise_narrow(basis, deviations(channels, 0.8)))
    assert (back - basis).abs().max() < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_rounds_as_well():
    """Not to the same bits, since its sums differ in the last place, but leaking as little."""
    generator = np.random.default_rng(case_seed())
    basis, deviation = orthonormal(generator, 768, 100), deviations(768, 0.8)
    leading = basis[:, :GUARDED].double() * deviation[:GUARDED].double()

    def leak(device):
        entries, scale, exponent = quantise_narrow(basis.to(device), deviation.to(device))
        return (leading.T @ (stored(entries.cpu(), scale.cpu(), exponent) - basis)).square().sum()

    assert leak("cuda") < 1.5 * leak("cpu")
