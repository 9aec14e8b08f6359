"""Exact coefficients from four products of limbs: the reference's, whatever the inputs and the basis."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops import project
from dynamo_kvtc.ops.project import device as op
from tests.builders import case_seed


def rows_of_limbs(fixed, device):
    """int8 [2T, P], rows aligned: low limbs, then high ones."""
    high, low = op.limbs(fixed.to(torch.int16))
    return op.aligned(torch.cat([low, high]).to(device))


@pytest.mark.parametrize(("tokens", "channels", "rank", "offset"), [(1, 64, 1, 0), (17, 130, 37, 5), (5, 33, 70, 15)])
def test_coefficients_are_the_references(kernel_device, tokens, channels, rank, offset):
    generator = np.random.default_rng(case_seed())
    fixed = torch.from_numpy(generator.integers(-32639, 32640, (tokens, channels)))
    basis = torch.from_numpy(generator.integers(-32639, 32640, (channels, rank))).to(torch.int16)
    # The ends of two limbs, of either sign.
    fixed[0, :2] = torch.tensor([32639, -32639])
    basis[0, 0] = 32639
    basis[channels - 1, rank - 1] = -32639
    before = torch.from_numpy(generator.integers(-9, 10, (tokens, offset)))
    inputs = rows_of_limbs(torch.cat([before, fixed], dim=1), kernel_device)
    out = torch.full((tokens, rank), float("nan"), dtype=torch.float64, device=kernel_device)
    products = torch.full((2 * tokens, 2 * rank), 77, dtype=torch.int32, device=kernel_device)
    op.analyse_wide_device(inputs, op.WideAnalysis.of(basis.to(kernel_device), offset), out, products)
    assert torch.equal(out.cpu(), project.analyse_wide(fixed.float(), basis))
    sums = torch.full((tokens,), -1, dtype=torch.int64, device=kernel_device)
    op.square_sums_device(rows_of_limbs(fixed, kernel_device), sums)
    assert torch.equal(sums.cpu(), fixed.square().sum(dim=1))


def test_what_does_not_fit_is_refused(kernel_device):
    basis = torch.zeros(64, 3, dtype=torch.int16)
    for entry in (32640, -32640, -32768):
        beyond = basis.clone()
        beyond[1, 2] = entry
        with pytest.raises(ConfigError, match="beyond 32639"):
            op.WideAnalysis.of(beyond)
    with pytest.raises(ConfigError, match="131072 channels"):
        op.WideAnalysis.of(torch.zeros(2**17, 1, dtype=torch.int16))
    operands = op.WideAnalysis.of(basis.to(kernel_device))
    inputs = torch.zeros(4, 64, dtype=torch.int8, device=kernel_device)
    out = torch.zeros(2, 3, dtype=torch.float64, device=kernel_device)
    products = torch.zeros(4, 6, dtype=torch.int32, device=kernel_device)
    for wrong, told in (
        ((inputs[:3], operands, out, products), "2T, 64"), ((inputs, operands, out[:1], products), "out must be"),
        ((inputs, operands, out, products[:3]), "products must be"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            op.analyse_wide_device(*wrong)
    with pytest.raises(ConfigError, match="int64"):
        op.square_sums_device(inputs, out[:, 0])
