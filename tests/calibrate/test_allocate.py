"""The dynamic programme against brute force, its promises about bits and error, and its refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dynamo_kvtc.calibrate.allocate import Allocation, allocate, allocate_many, fit_paper_part, paper_unit
from dynamo_kvtc.errors import CalibrationError, ConfigError, TooFewTokensError, UnreachableTargetError
from dynamo_kvtc.ops import affine, project
from dynamo_kvtc.ops.affine.reference import Layout
from tests.builders import case_seed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


def decaying(generator: np.random.Generator, tokens: int, components: int, power: float = 1.0) -> Tensor:
    sigma = 30.0 * np.arange(1, components + 1) ** -power
    return torch.from_numpy((generator.laplace(0, 0.7, (tokens, components)) * sigma).astype(np.float32))


def squared_error(x: Tensor, sizes: list[int], types: list[int]) -> float:
    """Sum over tokens of ||y - y_q||^2, through the bytes."""
    runs = Layout(sizes, types, "cpu")
    y = torch.zeros_like(x)
    y[:, runs.live] = affine.decode(affine.encode(x[:, runs.live].contiguous(), runs)[0], runs)
    return float((x - y).double().square().sum())


def bits_of(sizes: list[int], types: list[int]) -> int:
    return sum(32 + s * affine.CODE_BITS[t] for s, t in zip(sizes, types, strict=True) if t)


def brute_force(x: Tensor, sizes: tuple[int, ...], budget_bits: int) -> float:
    """Least squared error over every way to cut the components into runs, any of them left out.

    Under the one rule ``allocate`` states: the budget bears a quantised run with all components before it at 2 bits.
    """
    components = x.shape[1]
    energy = x.double().square().sum(dim=0)
    memo: dict[tuple[int, int, int], float] = {}

    def run(start: int, size: int, kind: int) -> float:
        key = (start, size, kind)
        if key not in memo:
            memo[key] = squared_error(x[:, start : start + size].contiguous(), [size], [kind])
        return memo[key]

    def best(start: int, left: int) -> float:
        found = float(energy[start:].sum())
        for size in sizes:
            if start + size > components:
                continue
            for kind in (0, 1, 2, 3):
                cost = bits_of([size], [kind])
                if cost <= left and (not kind or 2 * start + cost <= budget_bits):
                    found = min(found, run(start, size, kind) + best(start + size, left - cost))
        return found

    return best(0, budget_bits)


@pytest.mark.parametrize("components", [1, 2, 5, 6])
def test_programme_is_brute_force_on_tiny_cases(components: int) -> None:
    generator = np.random.default_rng(case_seed())
    for _ in range(4):
        x = decaying(generator, 7, components, generator.uniform(0, 1.5))
        for budget_bytes in (5, 6, 9, 10, 12, 17, 21):
            # Twice 40 channels over the ratio are the bytes.
            (found,) = allocate_many(x, 40, [80 / budget_bytes], sizes=(1, 2, 4))
            wanted = brute_force(x, (1, 2, 4), 8 * budget_bytes) / len(x)
            assert found.mse == pytest.approx(wanted, rel=1e-5)
            assert found.bits <= 8 * budget_bytes


def test_programme_skips_components_that_hold_nothing() -> None:
    generator = np.random.default_rng(case_seed())
    x = torch.zeros(9, 100)
    x[:, :16] = decaying(generator, 9, 16, 0.2)
    x[:, 70:86] = decaying(generator, 9, 16, 0.2)
    found = allocate(x, 800, 20)
    types = torch.repeat_interleave(found.types, found.sizes.long())
    assert types[:16].all()
    assert types[70:86].all()
    assert set(found.sizes.tolist()) <= set(affine.SIZES)
    assert found.bits == bits_of(found.sizes.tolist(), found.types.tolist())


def test_error_and_bits_are_what_the_allocation_gives() -> None:
    generator = np.random.default_rng(case_seed())
    x = decaying(generator, 64, 400, 0.7)
    ratios = [3.0, 8.0, 16.0, 25.0]
    found = allocate_many(x, 400, ratios)
    for ratio, a in zip(ratios, found, strict=True):
        sizes, types = a.sizes.tolist(), a.types.tolist()
        assert (a.sizes.dtype, a.types.dtype) == (torch.int32, torch.uint8)
        assert a.mse == pytest.approx(squared_error(x, sizes, types) / 64, rel=1e-5)
        assert a.bits == bits_of(sizes, types)
        assert affine.layout(a.sizes, a.types, 400).width * ratio <= 2 * 400
        assert types[-1] != affine.NONE
    errors = [a.mse for a in found]
    assert errors == sorted(errors)
    assert errors[0] < 0.1 * errors[-1]


def test_one_table_serves_every_ratio() -> None:
    generator = np.random.default_rng(case_seed())
    x = decaying(generator, 32, 300, 0.8)
    together = allocate_many(x, 300, [16.0, 4.0, 8.0])
    for ratio, a in zip([16.0, 4.0, 8.0], together, strict=True):
        alone = allocate(x, 300, ratio)
        assert (a.sizes.tolist(), a.types.tolist(), a.bits) == (alone.sizes.tolist(), alone.types.tolist(), alone.bits)
        assert a.mse == pytest.approx(alone.mse, rel=1e-6)


def test_large_budget_uses_no_more_than_there_is() -> None:
    generator = np.random.default_rng(case_seed())
    x = decaying(generator, 16, 20)
    found = allocate(x, 5000, 2)
    assert found.mse < 1e-4 * float(x.square().sum(dim=1).mean())
    assert int(found.sizes.sum()) == 20


def test_progress_rises_to_one() -> None:
    seen: list[float] = []
    allocate(decaying(np.random.default_rng(0), 16, 100), 100, 4, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert len(seen) > 5


@pytest.mark.parametrize("ratio", [1.9, 0.0, -3.0, 81.0, float("nan"), float("inf")])
def test_ratio_out_of_reach_names_the_range(ratio: float) -> None:
    with pytest.raises(UnreachableTargetError, match=r"2 to 40\.0"):
        allocate(torch.randn(4, 20), 100, ratio)


def test_reachable_range_is_honest() -> None:
    x = decaying(np.random.default_rng(case_seed()), 64, 20, 2.0)
    found = allocate(x, 100, 40.0)
    assert found.sizes.tolist() == [1]
    assert found.bits <= 40
    assert allocate(x, 100, 2.0).mse < found.mse


def test_arguments_that_cannot_be_used() -> None:
    good = torch.randn(4, 20)
    for x in (good.double(), good[0], good[:, :0], good[:0], good * float("nan"), good * 1e9):
        with pytest.raises(ConfigError):
            allocate(x, 100, 8)
    for ratios, sizes in (([], (1,)), ([8.0], (2, 4)), ([8.0], (1, 1)), ([8.0], (1, 0))):
        with pytest.raises(ConfigError):
            allocate_many(good, 100, ratios, sizes=sizes)


def calibration(generator: np.random.Generator, tokens: int, channels: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    basis, _ = np.linalg.qr(generator.standard_normal((channels, rank)))
    z = decaying(generator, tokens, rank, 0.8).numpy()
    mean = generator.normal(0, 3, channels)
    rows = z @ basis.T + mean + generator.normal(0, 0.05, (tokens, channels))
    fixed = project.quantise_basis(torch.from_numpy(np.ascontiguousarray(basis)))
    return torch.from_numpy(rows).float(), torch.from_numpy(mean).float(), fixed


def test_part_error_is_in_channel_units_and_counts_what_the_basis_lacks() -> None:
    generator = np.random.default_rng(case_seed())
    rows, mean, basis = calibration(generator, 700, 128, 40)
    for factor in (1.0, 100.0):
        unit = paper_unit(rows.var(dim=0) * factor**2)
        fits = fit_paper_part(rows * factor, mean * factor, basis, unit, [4.0, 8.0])
        assert all(isinstance(fit, Allocation) for fit in fits)
        outside = 88 * 0.05**2 * factor**2
        y = (rows - mean) * factor @ (basis.float() * 2.0**-14)
        for fit in fits:
            # In channel units float16 has the range here too, so the allocation's error can be had without the unit.
            inside = squared_error(y, fit.sizes.tolist(), fit.types.tolist()) / 700
            assert fit.mse == pytest.approx(inside + outside, rel=0.05)
        assert fits[0].mse < fits[1].mse


def test_part_leaves_out_saturated_tokens() -> None:
    generator = np.random.default_rng(case_seed())
    rows, mean, basis = calibration(generator, 64, 64, 20)
    unit = paper_unit(rows.var(dim=0))
    clean = fit_paper_part(rows, mean, basis, unit, [4.0])[0]
    wild = torch.cat([rows, torch.full((1, 64), 1e6), torch.full((1, 64), float("nan"))])
    assert fit_paper_part(wild, mean, basis, unit, [4.0])[0].mse == pytest.approx(clean.mse, rel=1e-6)
    with pytest.raises(TooFewTokensError, match="none of 2"):
        fit_paper_part(wild[64:], mean, basis, unit, [4.0])


def test_unit_holds_sixteen_deviations_of_the_largest_channel() -> None:
    assert paper_unit(torch.tensor([0.01, 4.0, 1.0])) == pytest.approx(32 / project.INPUT_MAX)
    for variance in (torch.zeros(3), torch.tensor([1.0, float("nan")]), torch.empty(0), torch.tensor([float("inf")])):
        with pytest.raises(CalibrationError):
            paper_unit(variance)


@needs_gpu
@pytest.mark.gpu
def test_gpu_finds_the_same_allocation() -> None:
    x = decaying(np.random.default_rng(case_seed()), 200, 1500, 0.6)
    here, there = allocate_many(x, 1500, [8.0, 16.0]), allocate_many(x.cuda(), 1500, [8.0, 16.0])
    for a, b in zip(here, there, strict=True):
        assert a.mse == pytest.approx(b.mse, rel=1e-6)
        assert abs(a.bits - b.bits) <= 64
