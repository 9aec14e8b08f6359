"""The quantiser's kernels give the reference's bytes, components and verdicts, and write nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops import affine
from tests.builders import case_seed


def random_layout(generator: np.random.Generator) -> affine.Layout:
    sizes = generator.choice([1, 1, 16, 64, 256], generator.integers(1, 14)).tolist()
    types = generator.integers(0, 4, len(sizes)).tolist()
    return affine.layout(torch.tensor(sizes), torch.tensor(types), sum(sizes))


def random_coefficients(generator: np.random.Generator, tokens: int, columns: int) -> Tensor:
    """Exact integers in float64, from a few units to near the largest."""
    scale = 2.0 ** generator.uniform(8, 40, columns)
    return torch.from_numpy(np.rint(np.clip(generator.laplace(0, 1, (tokens, columns)) * scale, -(2**45), 2**45)))


def encode_both(values: Tensor, runs: affine.Layout, device: str) -> Tensor:
    """The bytes, the same from both, written into the middle of a wider poisoned batch."""
    plain = affine.normalise(values) if values.dtype == torch.float64 else values
    wanted, wanted_overflow = affine.encode(plain, runs)
    plan = affine.device_plan(runs, device)
    wide = torch.full((len(values), runs.width + 7), 0xA5, dtype=torch.uint8, device=device)
    overflow = torch.ones(len(values), dtype=torch.bool, device=device)
    workspace = torch.full((len(values), 2 * runs.runs), float("nan"), device=device)
    out, _ = affine.encode_device(values.to(device), plan, wide[:, 3 : 3 + runs.width], overflow, workspace)
    assert torch.equal(out.cpu(), wanted)
    assert torch.equal(overflow.cpu(), wanted_overflow)
    assert (wide[:, :3] == 0xA5).all()
    assert (wide[:, 3 + runs.width :] == 0xA5).all()
    return out


def test_bytes_and_components_are_the_references(kernel_device: str) -> None:
    generator = np.random.default_rng(case_seed())
    for _ in range(6):
        runs = random_layout(generator)
        values = random_coefficients(generator, int(generator.integers(1, 8)), len(runs.live))
        for form in (values, affine.normalise(values)):
            out = encode_both(form, runs, kernel_device)
        plan = affine.device_plan(runs, kernel_device)
        poisoned = torch.full((len(values), len(runs.live)), float("nan"), device=kernel_device)
        affine.decode_device(out, plan, poisoned)
        assert torch.equal(poisoned.cpu().view(torch.int32), affine.decode(out.cpu(), runs).view(torch.int32))
        assert affine.valid_device(out, plan).all()


def test_errors_and_half_levels(kernel_device: str) -> None:
    generator = np.random.default_rng(case_seed())
    runs = affine.layout(torch.tensor([256, 64, 1, 16]), torch.tensor([1, 3, 2, 3]), 337)
    values = random_coefficients(generator, 5, 337)
    plan = affine.device_plan(runs, kernel_device)
    data, _ = affine.encode_device(values.to(kernel_device), plan)
    levels = affine.decode_device(data, plan)
    kept, lost = (torch.full((5,), -1.0, dtype=torch.float64, device=kernel_device) for _ in range(2))
    affine.squared_errors_device(values.to(kernel_device), levels, plan, kept, lost)
    exact = values * 2.0**-14
    torch.testing.assert_close(kept.cpu(), (exact.square() * 8).round().long().sum(dim=1).double() / 8, rtol=0, atol=0)
    rest = exact - affine.decode(data.cpu(), runs).double() * 256
    torch.testing.assert_close(lost.cpu(), (rest.square() * 8).round().long().sum(dim=1).double() / 8, rtol=0, atol=0)
    wide = torch.full((5, 344), 7.0, dtype=torch.float16, device=kernel_device)
    affine.decode_device(data, plan, wide[:, :337])
    assert torch.equal(wide[:, :337].cpu(), levels.cpu().clamp(-65504, 65504).half())
    assert bool((wide[:, 337:] == 7.0).all())


def test_ties_subnormals_and_ends_of_every_type(kernel_device: str) -> None:
    """Values placed on and next to the borders between codes: any other rounding shows."""
    generator = np.random.default_rng(case_seed())
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    levels = every[every.isfinite()].sort().values
    ties = (levels[1:] + levels[:-1]) / 2
    borders = torch.cat([ties, torch.nextafter(ties, levels[1:]), torch.nextafter(ties, levels[:-1]), levels])
    picked = borders[torch.from_numpy(generator.permutation(len(borders))[: 8 * 62])].reshape(8, 62)
    ends = torch.tensor([[-448.0, 448.0]]).expand(8, 2)
    steps = torch.from_numpy(generator.integers(0, 31, (8, 62))).float() / 2
    values = torch.cat([picked, ends, steps, torch.tensor([[0.0, 15.0]]).expand(8, 2)], dim=1)
    values = torch.cat([values, values[:, 64:] / 5], dim=1).contiguous()
    sizes, types = torch.tensor([64, 64, 64]), torch.tensor([affine.FP8, affine.INT4, affine.INT2])
    encode_both(values, affine.layout(sizes, types, 192), kernel_device)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -70000.0])
def test_overflow_is_the_references(kernel_device: str, bad: float) -> None:
    sizes, types = torch.tensor([16, 1] * 3), torch.tensor([1, 1, 2, 2, 3, 3])
    runs = affine.layout(sizes, types, 51)
    values = torch.randn(6, 51)
    for token, column in enumerate((0, 16, 20, 33, 40, 50)):
        values[token, column] = bad
    encode_both(values, runs, kernel_device)


def test_constant_and_tiny_runs(kernel_device: str) -> None:
    runs = affine.layout(torch.tensor([16, 16, 16]), torch.tensor([1, 2, 3]), 48)
    values = torch.stack([torch.full((48,), x) for x in (0.0, 1.0, -3.7, 60000.0, 1e-9, 2.0**-25)])
    values = torch.cat([values, torch.tensor([1e-12, 3e-12]).repeat(24)[None], 1e-40 * torch.randn(1, 48)])
    encode_both(values, runs, kernel_device)


def test_forged_bytes_are_found(kernel_device: str) -> None:
    generator = np.random.default_rng(case_seed())
    runs = affine.layout(torch.tensor([16, 1, 16]), torch.tensor([affine.FP8, affine.INT2, affine.INT4]), 33)
    data, _ = affine.encode(torch.randn(1, 33), runs)
    forged = data.repeat(300, 1)
    for row in range(1, 300):
        for at in generator.integers(0, runs.width, 2):
            forged[row, at] = int(generator.choice([0x7F, 0xFF, 0xFC, 0x7C, 0x80, 0x01]))
    found = affine.valid_device(forged.to(kernel_device)[:40], affine.device_plan(runs, kernel_device))
    assert torch.equal(found.cpu(), affine.valid(forged[:40], runs))
    assert found[0]


def test_forged_bytes_decode_as_the_references_do(kernel_device: str) -> None:
    runs = affine.layout(torch.tensor([16, 1, 16]), torch.tensor([affine.FP8, affine.INT2, affine.INT4]), 33)
    data = torch.randint(0, 256, (9, runs.width), dtype=torch.uint8)
    found = affine.decode_device(data.to(kernel_device), affine.device_plan(runs, kernel_device))
    torch.testing.assert_close(found.cpu(), affine.decode(data, runs), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("width", [1, 37, 130])
def test_planes(kernel_device: str, width: int) -> None:
    generator = np.random.default_rng(case_seed())
    tokens = [16, 1, 0, 16, 21]
    starts = torch.tensor([0, *np.cumsum(tokens)], device=kernel_device)
    wide = torch.from_numpy(generator.integers(0, 256, (54, width + 5), dtype=np.uint8)).to(kernel_device)
    data = wide[:, 2 : 2 + width]
    flat = torch.full((54 * width,), 0xA5, dtype=torch.uint8, device=kernel_device)
    affine.to_planes(data, starts, 21, flat)
    wanted = torch.cat([part.T.reshape(-1) for part in data.cpu().split(tokens)])
    assert torch.equal(flat.cpu(), wanted)
    back = torch.full_like(wide, 0xA5)
    affine.from_planes(flat, starts, 21, back[:, 2 : 2 + width])
    assert torch.equal(back[:, 2 : 2 + width], data)
    assert (back[:, :2] == 0xA5).all()
    assert (back[:, 2 + width :] == 0xA5).all()


def test_empty_batches_and_layouts(kernel_device: str) -> None:
    runs = affine.layout(torch.tensor([16]), torch.tensor([affine.NONE]), 16)
    plan = affine.device_plan(runs, kernel_device)
    out, overflow = affine.encode_device(torch.empty(3, 0, device=kernel_device), plan)
    assert out.shape == (3, 0)
    assert not overflow.any()
    assert affine.decode_device(out, plan).shape == (3, 0)
    assert affine.valid_device(out, plan).all()
    plan = affine.device_plan(affine.layout(torch.tensor([16]), torch.tensor([affine.FP8]), 16), kernel_device)
    assert affine.encode_device(torch.empty(0, 16, device=kernel_device), plan)[0].shape == (0, 20)


def test_refusals(kernel_device: str) -> None:
    runs = affine.layout(torch.tensor([16]), torch.tensor([affine.INT4]), 16)
    plan = affine.device_plan(runs, kernel_device)
    values = torch.zeros(2, 16, device=kernel_device)
    for wrong in (values[:, :15], values.int(), values[:, ::2], values[0], torch.zeros(16, 2, device=kernel_device).T):
        with pytest.raises(ConfigError):
            affine.encode_device(wrong, plan)
    with pytest.raises(ConfigError, match="out"):
        affine.encode_device(values, plan, torch.empty(2, 13, dtype=torch.uint8, device=kernel_device))
    with pytest.raises(ConfigError, match="data"):
        affine.decode_device(values, plan)
    with pytest.raises(ConfigError, match="planes"):
        affine.to_planes(values.byte(), torch.tensor([0, 2], device=kernel_device), 2, values.byte().flatten()[1:])
