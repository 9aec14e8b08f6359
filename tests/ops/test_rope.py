"""RoPE against complex numbers in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops.rope import MAX_POSITION, Rotations, apply_rope, remove_rope
from dynamo_kvtc.types import RopeSpec
from tests.builders import case_seed, gapped_positions, same_bits

CASES = [("half", 64, 32), ("half", 96, 48), ("half", 20, 3), ("interleaved", 128, 64), ("interleaved", 10, 5),
         ("interleaved", 17, 4), ("half", 7, 1)]  # fmt: skip


def spec(style: str, pairs: int, generator: np.random.Generator, scaling: float = 1.0) -> RopeSpec:
    return RopeSpec(tuple(generator.uniform(1e-5, 1.0, pairs).tolist()), scaling, style)


def keys(generator: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(generator.standard_normal(shape)).float()


def complex_rope(k: np.ndarray, positions: np.ndarray, rope: RopeSpec) -> np.ndarray:
    """float64: each pair of dims is a complex number, turned by position * frequency."""
    out = k.astype(np.float64).copy()
    for i, frequency in enumerate(rope.inv_freq):
        a, b = (i, i + len(rope.inv_freq)) if rope.style == "half" else (2 * i, 2 * i + 1)
        turned = (k[..., a] + 1j * k[..., b].astype(np.float64)) * np.exp(1j * positions * frequency)
        turned *= rope.attention_scaling
        out[..., a], out[..., b] = turned.real, turned.imag
    return out


@pytest.mark.parametrize(("style", "dim", "pairs"), CASES)
@pytest.mark.parametrize("scaling", [1.0, 1.2079])
def test_agrees_with_complex_numbers(style, dim, pairs, scaling):
    generator = np.random.default_rng(case_seed())
    rope = spec(style, pairs, generator, scaling)
    positions = torch.from_numpy(generator.integers(0, 131072, 13))
    k = keys(generator, 3, 2, 13, dim)
    found = apply_rope(k, positions, rope).double().numpy()
    np.testing.assert_allclose(found, complex_rope(k.numpy(), positions.numpy(), rope), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("style", "dim", "pairs"), CASES)
def test_inverse_of_each_other_at_any_positions(style, dim, pairs):
    seed = case_seed()
    generator = np.random.default_rng(seed)
    rope = spec(style, pairs, generator, 1.37)
    positions = gapped_positions(33, seed, first=int(generator.integers(0, 2**20)))
    k = keys(generator, 2, 33, dim)
    torch.testing.assert_close(remove_rope(apply_rope(k, positions, rope), positions, rope), k, rtol=0, atol=4e-6)
    torch.testing.assert_close(apply_rope(remove_rope(k, positions, rope), positions, rope), k, rtol=0, atol=4e-6)


@pytest.mark.parametrize("operation", [apply_rope, remove_rope])
def test_dims_beyond_the_rotated_pass_bit_for_bit(operation):
    generator = np.random.default_rng(case_seed())
    k = keys(generator, 2, 5, 11)
    k[0, 0, 8], k[1, 2, 9] = float("nan"), -0.0
    out = operation(k, torch.tensor([5, 0, 9, 9, 2]), spec("half", 4, generator))
    assert same_bits(out[..., 8:], k[..., 8:])
    assert not torch.equal(out[..., :8], k[..., :8])


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_position_zero_changes_nothing(style):
    generator = np.random.default_rng(case_seed())
    k = keys(generator, 1, 6, 16)
    out = apply_rope(k, torch.zeros(6, dtype=torch.int64), spec(style, 8, generator))
    assert torch.equal(out, k)


@pytest.mark.parametrize("operation", [apply_rope, remove_rope])
def test_a_token_does_not_depend_on_its_neighbours(operation):
    generator = np.random.default_rng(case_seed())
    rope = spec("half", 24, generator)
    positions = torch.from_numpy(generator.integers(0, MAX_POSITION, 301))
    k = keys(generator, 2, 301, 50)
    together = operation(k, positions, rope)
    for start, end in [(0, 1), (300, 301), (7, 24), (100, 299)]:
        alone = operation(k[:, start:end], positions[start:end], rope)
        assert same_bits(alone, together[:, start:end]), (start, end)


def test_scores_depend_on_the_distance_alone():
    generator = np.random.default_rng(case_seed())
    rope = spec("half", 8, generator)
    k, q = keys(generator, 1, 16), keys(generator, 1, 16)
    scores = [
        float((apply_rope(k, torch.tensor([at]), rope) * apply_rope(q, torch.tensor([at + 21]), rope)).sum())
        for at in (0, 5, 40_000)
    ]
    np.testing.assert_allclose(scores, scores[0], atol=1e-4)


def test_refuses_what_it_cannot_rotate():
    rope = RopeSpec((1.0, 0.5))
    k, positions = torch.zeros(3, 8), torch.arange(3)
    for bad_k, bad_positions, told in [
        (k.half(), positions, "float16"),
        (torch.zeros(8), positions, r"\(8,\)"),
        (k, positions.int(), "int32"),
        (k, torch.arange(4), r"\(4,\)"),
        (torch.zeros(3, 3), positions, "rotates 4 dims but the head has 3"),
        (k, torch.tensor([0, -1, 2]), "-1 to 2"),
        (k, torch.tensor([0, 1, 2**31]), str(2**31)),
    ]:
        for operation in (apply_rope, remove_rope):
            with pytest.raises(ConfigError, match=told):
                operation(bad_k, bad_positions, rope)


def test_last_position_is_allowed():
    out = apply_rope(torch.ones(1, 4), torch.tensor([MAX_POSITION]), RopeSpec((1.0, 1e-9)))
    assert out.isfinite().all()


def exact_cos_sin(positions: np.ndarray, frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """longdouble [T, n]. A product of 31 and 53 bits does not fit, so the frequency's low bits turn on their own."""
    if np.finfo(np.longdouble).nmant < 63:
        pytest.skip("long double is no wider than double on this machine")
    steps = positions.astype(np.longdouble)[:, None]
    high = frequencies.astype(np.float32).astype(np.longdouble)
    large, small = steps * high, steps * (frequencies.astype(np.longdouble) - high)
    cos = np.cos(large) * np.cos(small) - np.sin(large) * np.sin(small)
    return cos, np.sin(large) * np.cos(small) + np.cos(large) * np.sin(small)


def test_rotations_are_within_an_ulp_at_any_position():
    generator = np.random.default_rng(case_seed())
    frequencies = np.concatenate([generator.uniform(1e-5, 1.0, 5), 10.0 ** -generator.uniform(0, 8, 5), [1.0, 333.3]])
    positions = np.concatenate(
        [np.arange(40), generator.integers(0, 2**20, 200), generator.integers(0, 2**31, 200), [MAX_POSITION]]
    )
    found = Rotations(RopeSpec(tuple(frequencies.tolist()))).at(torch.from_numpy(positions))
    for mine, exact in zip(found, exact_cos_sin(positions, frequencies), strict=True):
        assert mine.dtype == torch.float32
        ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.longdouble)
        assert float((np.abs(mine.numpy().astype(np.longdouble) - exact) / ulp).max()) < 1.0


def test_rotations_do_not_depend_on_the_batch_and_start_at_one():
    generator = np.random.default_rng(case_seed())
    rotations = Rotations(spec("half", 9, generator))
    positions = torch.from_numpy(generator.integers(0, MAX_POSITION, 57))
    cos, sin = rotations.at(positions)
    for t in (0, 31, 56):
        assert all(
            same_bits(a, b[t : t + 1]) for a, b in zip(rotations.at(positions[t : t + 1]), (cos, sin), strict=True)
        )
    zero = rotations.at(torch.zeros(1, dtype=torch.int64))
    assert bool((zero[0] == 1).all())
    assert bool((zero[1] == 0).all())
    assert rotations.at(positions[:0])[0].shape == (0, 9)


def test_rotations_refuse_what_is_no_position():
    rotations = Rotations(RopeSpec((1.0, 0.5)))
    for bad, told in [
        (torch.zeros(3, dtype=torch.int32), "int32"),
        (torch.zeros(2, 2, dtype=torch.int64), r"\(2, 2\)"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), "meta"),
        (torch.tensor([3, -1]), "-1 to 3"),
    ]:
        with pytest.raises(ConfigError, match=told):
            rotations.at(bad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_rotates_bit_for_bit_as_the_cpu():
    generator = np.random.default_rng(case_seed())
    rope = spec("half", 48, generator, 1.2079)
    positions = torch.from_numpy(generator.integers(0, MAX_POSITION, 999))
    for mine, truth in zip(Rotations(rope, "cuda").at(positions.cuda()), Rotations(rope).at(positions), strict=True):
        assert same_bits(mine.cpu(), truth)
    k = keys(generator, 2, 3, 999, 100)
    for operation in (apply_rope, remove_rope):
        assert same_bits(operation(k.cuda(), positions.cuda(), rope).cpu(), operation(k, positions, rope))


def test_the_kernel_turns_by_the_same_bits(kernel_device):
    from dynamo_kvtc.ops.rope import tables
    from dynamo_kvtc.ops.rope import triton as kernels

    generator = np.random.default_rng(case_seed())
    own = tables.Tables(tuple(1e4 ** (-i / 7) for i in range(7)), torch.device("cpu"))
    positions = torch.from_numpy(generator.integers(0, 2**31, 301))
    parts = [(c.to(kernel_device), s.to(kernel_device)) for c, s in own._parts]
    found = kernels.rotations(positions.to(kernel_device), parts, tables.BITS)
    for mine, wanted in zip(found, own.at(positions), strict=True):
        assert torch.equal(mine.cpu(), wanted)
