"""The quantiser on the GPU: what a layer group needs there, and the checks before its kernel is launched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops import quantize


@dataclass(frozen=True)
class Quantiser:
    """One layer group's constants, on the device, all by component [R].

    units, rounding, limits: int32, as for ``quantise``; below: int32, a wide component's centroid in 2**-ERROR_BITS
    steps; scale, level_bias: int32, of narrow components (1 and 0 for wide ones); inverse: int32, ceil(2**32 / scale)
    as unsigned, 0 for a scale of 1; activity: int32, 0 for leading ones.
    importance: int32 [2, F]; thresholds: int64 [15]; gains: int32 [16]; mean_error: float64 [1].
    """

    units: Tensor
    rounding: Tensor
    limits: Tensor
    below: Tensor
    scale: Tensor
    inverse: Tensor
    level_bias: Tensor
    activity: Tensor
    importance: Tensor
    thresholds: Tensor
    gains: Tensor
    mean_error: Tensor
    bias: int
    width: int
    leading: int

    @classmethod
    def of(
        cls, units: Tensor, rounding: Tensor, limits: Tensor, centroid: Tensor, scale: Tensor, level_bias: Tensor,
        activity: Tensor, importance: Tensor, thresholds: Tensor, mean_error: float, bias: int, device: torch.device,
    ) -> Quantiser:  # fmt: skip
        """From the CPU's tensors: centroid float32 [W], scale, level_bias int32 [R - W], activity int32 [R - F]."""
        rank, width, leading = len(units), len(centroid), importance.shape[1]
        below = (centroid.double() * 2**quantize.ERROR_BITS).round().to(torch.int32)
        gains = torch.zeros(16, dtype=torch.int32)
        levels = torch.arange(quantize.FINENESS_LEVELS)
        gains[: len(levels)] = (quantize.gains(levels, torch.float64) * 2**8).to(torch.int32)
        pad = torch.zeros(rank, dtype=torch.int32)
        scales = torch.cat([pad[:width] + 1, scale.int()])
        on = (
            units.int(), rounding.int(), limits.int(), torch.cat([below, pad[width:]]), scales, _inverse(scales),
            torch.cat([pad[:width], level_bias.int()]),
            torch.cat([pad[:leading], activity.int()]), importance.int().contiguous(), thresholds.long(), gains,
            torch.tensor([mean_error], dtype=torch.float64),
        )  # fmt: skip
        names = (
            "units", "rounding", "limits", "below", "scale", "inverse", "level_bias", "activity", "importance",
            "thresholds", "gains", "mean_error",
        )  # fmt: skip
        tensors = {name: x.to(device) for name, x in zip(names, on, strict=True)}
        return cls(bias=bias, width=width, leading=leading, **tensors)


def _inverse(scale: Tensor) -> Tensor:
    """An n below 2**20 divided by a scale up to 255 is the upper half of n times this, exactly."""
    wanted = -(-(2**32) // scale.long()) % 2**32
    return torch.where(wanted >= 2**31, wanted - 2**32, wanted).to(torch.int32)


def quantise_device(
    products: Tensor, energy: Tensor, saturated: Tensor, quantiser: Quantiser, symbols: Tensor, parameters: Tensor,
    error: Tensor,
) -> None:  # fmt: skip
    """Symbols, parameters and errors of tokens, as the reference's functions make them one after another.

    products: int32 [T, W + R]: a wide component's coefficient is 256 * products[:, j] + products[:, W + j] modulo
    2**32, a narrow one's products[:, W + j]; energy: int64 [T]; saturated: uint8 or int32 [T], not 0 for a token that
    cannot be coded. Out: symbols int16 [T, R], any row stride; parameters uint8 [T], fineness + 16 * table choice;
    error float64 [T] as a multiple of the calibrated mean, infinite for a token that cannot be coded (saturated, an
    energy over ENERGY_MAX, a wide symbol over SYMBOL_MAX).
    """
    tokens, rank = len(products), len(quantiser.units)
    for name, x, dtypes, shape in (
        ("products", products, (torch.int32,), (tokens, quantiser.width + rank)),
        ("energy", energy, (torch.int64,), (tokens,)),
        ("saturated", saturated, (torch.uint8, torch.int32), (tokens,)),
        ("symbols", symbols, (torch.int16,), (tokens, rank)),
        ("parameters", parameters, (torch.uint8,), (tokens,)),
        ("error", error, (torch.float64,), (tokens,)),
    ):
        if x.dtype not in dtypes or tuple(x.shape) != shape or (x.numel() > 1 and x.stride(-1) != 1):
            raise ConfigError(f"{name} must be {dtypes[0]} {list(shape)}; got {x.dtype} {tuple(x.shape)}")
    if tokens:
        from dynamo_kvtc.ops.quantize import triton as kernels

        kernels.quantise(products, energy, saturated, quantiser, symbols, parameters, error)
