"""The quantiser's kernel against the reference, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops import quantize
from dynamo_kvtc.ops.quantize.device import Quantiser, quantise_device
from tests.builders import case_seed


def reference(c, energy, saturated, parts, mean_error, bias):
    units, rounding, limits, centroid, scale, level_bias, activity, importance, thresholds = parts
    n, width = importance.shape[1], len(centroid)
    first = quantize.quantise(c[:, :n], units[:n], rounding[:n], limits[:n])
    fineness = quantize.fineness_of(first[0], importance, bias)
    rest = quantize.quantise(c[:, n:], units[n:], rounding[n:], limits[n:], fineness)
    choice = quantize.class_offsets(rest[0], activity, thresholds)
    q = torch.cat([first[0], rest[0]], dim=1)
    levels = torch.cat(
        [
            quantize.wide_error_levels(q[:, :width], centroid),
            quantize.narrow_error_levels(quantize.narrow_levels(q[:, width:], scale, level_bias), scale),
        ],
        dim=1,
    )
    error = quantize.error_of(c, units, levels, energy, fineness, n) / mean_error
    uncodable = saturated.bool() | (energy > quantize.ENERGY_MAX) | first[1] | rest[1]
    return q, fineness + 16 * choice, error.masked_fill(uncodable, float("inf"))


@pytest.mark.parametrize(
    ("tokens", "leading", "width", "rank"), [(1, 32, 48, 130), (17, 6, 16, 16), (15, 0, 0, 70), (16, 3, 16, 81)]
)
def test_same_bits_as_the_reference(kernel_device, tokens, leading, width, rank):
    generator = np.random.default_rng(case_seed())
    scale = torch.from_numpy(generator.integers(1, 14, rank - width)).int()
    level_bias = torch.from_numpy(generator.integers(0, 3, rank - width)).int().minimum(scale - 1)
    limits = torch.full((rank,), quantize.SYMBOL_MAX, dtype=torch.int32)
    limits[width:] = quantize.narrow_limits(scale, level_bias)
    units = torch.full((rank,), quantize.WIDE_UNIT, dtype=torch.int32)
    units[width:] = scale << 12
    rounding = torch.from_numpy(generator.integers(2**17, 2**19, rank)).int()
    centroid = torch.from_numpy(generator.uniform(0, 0.3, width)).float()
    activity = torch.from_numpy(generator.integers(0, 4000, rank - leading)).int()
    importance = torch.from_numpy(generator.integers(-9000, 9000, (2, leading))).int()
    thresholds = torch.from_numpy(np.sort(generator.integers(0, 4000 * rank, 15)))
    spread = 2.0 ** generator.uniform(16, 26, rank)
    spread[width:] = 2.0 ** generator.uniform(14, 19, rank - width)
    c = torch.from_numpy(np.round(generator.laplace(0, 1, (tokens, rank)) * spread)).long()
    c = c.clamp(-(2**31) + 1, 2**31 - 1)
    energy = torch.from_numpy(generator.integers(0, 2**22, tokens))
    saturated = torch.zeros(tokens, dtype=torch.uint8)
    if tokens > 3:
        energy[0] = quantize.ENERGY_MAX + 1
        energy[1] = quantize.ENERGY_MAX
        saturated[2] = 1
        if width:
            c[3, 0] = 2**31 - 1
    parts = (units, rounding, limits, centroid, scale, level_bias, activity, importance, thresholds)
    mean_error, bias = float(generator.uniform(1, 300)), int(generator.integers(0, 2**19))
    q, parameters, error = reference(c, energy, saturated, parts, mean_error, bias)
    quantiser = Quantiser.of(*parts, mean_error, bias, torch.device(kernel_device))
    found = torch.full((tokens, rank + 3), 77, dtype=torch.int16, device=kernel_device)
    found_parameters = torch.full((tokens,), 99, dtype=torch.uint8, device=kernel_device)
    found_error = torch.full((tokens,), float("nan"), dtype=torch.float64, device=kernel_device)
    # A wide coefficient comes as any two numbers whose sum, one of them times 256, it is.
    high = torch.from_numpy(generator.integers(-(2**31), 2**31, (tokens, width))).to(torch.int32)
    low = c[:, :width].to(torch.int32) - high * 256
    products = torch.cat([high, low, c[:, width:].to(torch.int32)], dim=1)
    on = [x.to(kernel_device) for x in (products, energy, saturated)]
    quantise_device(*on, quantiser, found[:, :rank], found_parameters, found_error)
    assert torch.equal(found_parameters.cpu(), parameters)
    usable = error.isfinite()
    assert torch.equal(found[:, :rank].cpu()[usable], q[usable])
    assert bool((found[:, rank:] == 77).all())
    assert torch.equal(found_error.cpu(), error)


def test_refuses_another_dtype(kernel_device):
    quantiser = Quantiser.of(
        *(torch.ones(4, dtype=torch.int32) for _ in range(3)), torch.zeros(4), torch.ones(0, dtype=torch.int32),
        torch.zeros(0, dtype=torch.int32), torch.ones(4, dtype=torch.int32), torch.zeros(2, 0, dtype=torch.int32),
        torch.zeros(15, dtype=torch.int64), 1.0, 0, torch.device(kernel_device),
    )  # fmt: skip
    c = torch.zeros(2, 4, dtype=torch.int64, device=kernel_device)
    ones = [torch.zeros(2, dtype=d, device=kernel_device) for d in (torch.int64, torch.uint8, torch.float64)]
    symbols = torch.zeros(2, 4, dtype=torch.int16, device=kernel_device)
    with pytest.raises(ConfigError, match=r"products must be torch\.int32"):
        quantise_device(c, ones[0], ones[1], quantiser, symbols, ones[1], ones[2])
