"""The streamed covariance and its eigenbasis against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynamo_kvtc.calibrate.covariance import StreamingCovariance, eigenbasis
from dynamo_kvtc.errors import TooFewTokensError
from tests.builders import case_seed


def rows_of(generator: np.random.Generator, tokens: int, channels: int, offset: float = 0.0) -> np.ndarray:
    mixing = generator.standard_normal((channels, channels)) * np.geomspace(3.0, 0.05, channels)
    return (generator.standard_normal((tokens, channels)) @ mixing.T + offset).astype(np.float32)


def streamed(rows: np.ndarray, cuts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    covariance = StreamingCovariance(rows.shape[1], "cpu")
    for part in np.split(rows, cuts):
        covariance.add(torch.from_numpy(part))
    assert covariance.tokens == len(rows)
    return covariance.finish()


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("cuts", [[], [1], [7, 8, 200], list(range(2, 400, 3))])
def test_streaming_equals_numpy_whatever_the_batches(offset, cuts):
    """A large mean must not eat the variances: in plain float32 sums, 300**2 would leave two digits of them."""
    rows = rows_of(np.random.default_rng(case_seed()), 400, 23, offset)
    mean, covariance = streamed(rows, cuts)
    exact = rows.astype(np.float64)
    np.testing.assert_allclose(mean.numpy(), exact.mean(axis=0), rtol=1e-6, atol=1e-5)
    wanted = np.cov(exact.T, bias=True)
    np.testing.assert_allclose(covariance.numpy(), wanted, atol=2e-4 * np.abs(wanted).max())


def test_fewer_than_two_tokens_are_refused():
    covariance = StreamingCovariance(5, "cpu")
    with pytest.raises(TooFewTokensError, match="0 tokens"):
        covariance.finish()
    covariance.add(torch.zeros(1, 5))
    with pytest.raises(TooFewTokensError, match="1 tokens"):
        covariance.finish()


@pytest.mark.parametrize("rank", [1, 7, 30])
def test_eigenbasis_against_numpy(rank):
    generator = np.random.default_rng(case_seed())
    wanted = np.cov(rows_of(generator, 500, 30).astype(np.float64).T)
    basis, values = eigenbasis(torch.from_numpy(wanted).float(), rank)
    assert basis.shape == (30, rank)
    truth = np.linalg.eigvalsh(wanted)[::-1]
    np.testing.assert_allclose(values.numpy(), truth, atol=1e-5 * truth[0])
    b = basis.double().numpy()
    np.testing.assert_allclose(b.T @ b, np.eye(rank), atol=1e-5)
    captured = np.diag(b.T @ wanted @ b)
    np.testing.assert_allclose(captured, truth[:rank], atol=1e-5 * truth[0])
    assert (b[np.abs(b).argmax(axis=0), np.arange(rank)] > 0).all()


def test_a_singular_covariance_has_no_negative_eigenvalue():
    rows = rows_of(np.random.default_rng(case_seed()), 6, 20)
    basis, values = eigenbasis(streamed(rows, [])[1], 20)
    assert (values >= 0).all()
    assert (values[6:] < 1e-4 * values[0]).all()
    torch.testing.assert_close(basis.T @ basis, torch.eye(20), atol=1e-5, rtol=0)
