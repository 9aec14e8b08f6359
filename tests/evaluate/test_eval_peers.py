"""Peers against slow references written from the formats' definitions, and their bit counts against arithmetic."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dynamo_kvtc.evaluate import peers
from dynamo_kvtc.evaluate.peers import PEERS
from tests.builders import case_seed

E4M3 = [
    (m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7))
    for e in range(16) for m in range(8) if (e, m) != (15, 7)
]  # fmt: skip
E2M1 = [(m / 2 if e == 0 else (1 + m / 2) * 2.0 ** (e - 1)) for e in range(4) for m in range(2)]
F32 = np.float32


def nearest(x: float, grid: list[float]) -> float:
    """The nearest value of a format, the even code on a tie, the largest beyond the end. The grid is in code order."""
    distances = [abs(abs(float(x)) - value) for value in grid]
    least = min(distances)
    tied = [code for code, distance in enumerate(distances) if distance == least]
    code = tied[0] if len(tied) == 1 else next(c for c in tied if c % 2 == 0)
    return float(np.copysign(grid[code], x))


def divided(x: np.ndarray, scale: np.float32) -> np.ndarray:
    return (x / scale).astype(F32) if scale > 0 else np.zeros_like(x)


def slow_fp8(x: np.ndarray) -> tuple[np.ndarray, int]:
    out, bits = np.empty_like(x), 0
    for layer, head in np.ndindex(*x.shape[:2]):
        scale = F32(np.abs(x[layer, head]).max() / F32(448))
        bits += 32
        for index in np.ndindex(*x.shape[2:]):
            out[layer, head][index] = F32(nearest(divided(x[layer, head][index], scale), E4M3)) * scale
            bits += 8
    return out, bits


def slow_nvfp4(x: np.ndarray) -> tuple[np.ndarray, int]:
    out, bits = np.empty_like(x), 0
    for layer in range(x.shape[0]):
        tensor_scale = F32(np.abs(x[layer]).max() / F32(6 * 448))
        bits += 32
        for head, token in np.ndindex(*x.shape[1:3]):
            for first in range(0, x.shape[3], 16):
                block = x[layer, head, token, first : first + 16]
                scale = F32(nearest(divided(F32(np.abs(block).max() / F32(6)), tensor_scale), E4M3))
                bits += 8 + 4 * len(block)
                values = [F32(nearest(q, E2M1)) for q in divided(block, F32(scale * tensor_scale))]
                out[layer, head, token, first : first + 16] = [F32(q * scale) * tensor_scale for q in values]
    return out, bits


def slow_kivi_line(line: np.ndarray) -> tuple[list[np.float32], int]:
    out, bits = [], 0
    for first in range(0, len(line), 32):
        group = line[first : first + 32]
        zero = F32(np.float16(group.min()))
        scale = F32(np.float16(F32(group.max() - group.min()) / F32(3)))
        bits += 32 + 2 * len(group)
        for value in group:
            level = np.clip(np.round(divided(F32(value - zero), scale)), 0, 3)
            out.append(F32(F32(level * scale) + zero))
    return out, bits


def slow_kivi(x: np.ndarray, keys: bool) -> tuple[np.ndarray, int]:
    out, bits = np.empty_like(x), 0
    for layer, head in np.ndindex(*x.shape[:2]):
        for i in range(x.shape[3] if keys else x.shape[2]):
            where = (layer, head, slice(None), i) if keys else (layer, head, i)
            out[where], spent = slow_kivi_line(x[where])
            bits += spent
    return out, bits


SLOW = {
    "fp8": (peers.fp8, slow_fp8),
    "nvfp4": (peers.nvfp4, slow_nvfp4),
    "kivi_keys": (peers.kivi_keys, lambda x: slow_kivi(x, keys=True)),
    "kivi_values": (peers.kivi_values, lambda x: slow_kivi(x, keys=False)),
}


@pytest.mark.parametrize("name", SLOW)
# Odd sizes: a short last block of dims and of tokens.
@pytest.mark.parametrize("shape", [(2, 2, 45, 20), (1, 3, 32, 32), (1, 1, 1, 8)])
def test_peer_is_its_slow_reference(name: str, shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(case_seed())
    x = (generator.standard_normal(shape) * np.exp(generator.normal(0, 2, shape[-1]))).astype(np.float32)
    x[0, 0, 0] = 0.0  # an all-zero block
    fast, slow = SLOW[name]
    values, bits = fast(torch.from_numpy(x))
    want, want_bits = slow(x)
    assert bits == want_bits
    # Equal but for the order of the scales' products: one last place of float32.
    torch.testing.assert_close(values, torch.from_numpy(want), rtol=3e-7, atol=0)


def test_rounding_goes_to_the_even_code_on_ties_and_saturates() -> None:
    limits = [(a + b) / 2 for a, b in itertools.pairwise(E2M1)]
    x = torch.tensor([*E2M1, *limits, 5.0001, 7.0, 1e9])
    assert peers.to_e2m1(x).tolist() == [nearest(v, E2M1) for v in x.tolist()]
    assert peers.to_e2m1(-x).tolist() == [-nearest(v, E2M1) for v in x.tolist()]
    y = torch.tensor([*E4M3, *[(a + b) / 2 for a, b in itertools.pairwise(E4M3)], 449.0, 1e9])
    assert peers.to_e4m3(y).tolist() == [nearest(v, E4M3) for v in y.tolist()]


@pytest.mark.parametrize(("name", "bits_per_value"), [("fp8", 8.0), ("nvfp4", 4.5), ("kivi2", 3.0)])
def test_ratio_is_sixteen_over_the_bits_of_a_value(name: str, bits_per_value: float) -> None:
    k = torch.randn(1, 1, 4096 + 6, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    mask = torch.zeros(k.shape[2], dtype=torch.bool)
    mask[:6] = True
    spent = PEERS[name].run(k, k, torch.arange(len(mask)), mask)[2]
    assert spent.ratio_coded == pytest.approx(16 / bits_per_value, rel=1e-4)
    assert (spent.coded_tokens, spent.exact_tokens, spent.exact_bytes) == (4096, 6, 6 * 2 * 64 * 2)


def test_all_zero_cache_comes_back_as_zeros() -> None:
    x = torch.zeros(1, 1, 40, 20)
    for quantise, _ in SLOW.values():
        assert torch.equal(quantise(x)[0], x)


def test_values_beyond_float16_stay_finite_in_kivi() -> None:
    x = torch.tensor([-3e5, 0.0, 3e5, 1.0]).reshape(1, 1, 1, 4)
    assert peers.kivi_values(x)[0].isfinite().all()
