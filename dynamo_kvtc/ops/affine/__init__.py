"""The quantiser of profile ``paper``: runs of consecutive components, each with a 16-bit scale and shift a token.

Types (Staniszewski and Lancucki, arXiv 2511.01815): int2 and int4 put their 4 or 16 levels evenly from the least
value of the run to the greatest (shift = least, scale = range / 3 or / 15); fp8 is E4M3 around the middle of the range
(shift = middle, scale = half the range / 448). A value is shift + scale * code. A run of equal values, and so every
run of one component, has scale 0 and codes 0: the shift alone holds it. Type none leaves its components out.

Scale and shift are float16: its 11 bits of precision keep the error of a rounded shift under that of an int4 code,
which bfloat16's 8 would not. What it lacks is range, so coefficients come in a unit that needs no more (``normalise``).
Both are rounded before a code is computed, so encoder and decoder use the same numbers.

A token's bytes, for q quantised runs with n8, n4 and n2 components of type fp8, int4 and int2, in component order:
    0                   scales, float16 little-endian, q
    2q                  shifts, float16 little-endian, q
    4q                  fp8 codes, n8 bytes
    4q + n8             a stream of 2-bit digits, four a byte, lowest bits first: the int4 codes (two digits each, low
                        digit first), then the int2 codes (one digit each), then zeros up to the byte
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops.affine import cpu, reference
from dynamo_kvtc.ops.affine.device import (
    decode_device,
    device_plan,
    encode_device,
    from_planes,
    squared_errors_device,
    to_planes,
    valid_device,
)
from dynamo_kvtc.ops.affine.reference import FP8, INT2, INT4, NONE, Layout

SIZES = (1, 16, 64, 256, 1024)
"""Components of a run: what the paper allows."""

TYPES = {"none": NONE, "int2": INT2, "int4": INT4, "fp8": FP8}
"""Numbers of the types, as artifacts store them."""

CODE_BITS = {NONE: 0, INT2: 2, INT4: 4, FP8: 8}
RUN_BITS = 32
"""Bits of a quantised run's scale and shift."""

FRACTION_BITS = 22
"""Fraction bits of an exact coefficient once normalised: the basis's 14, and 8 more of fixed-point input units."""

MAX_VALUE = 65504.0
"""Largest finite float16."""

__all__ = [
    "CODE_BITS", "FP8", "FRACTION_BITS", "INT2", "INT4", "MAX_VALUE", "NONE", "RUN_BITS", "SIZES", "TYPES", "Layout",
    "decode", "decode_device", "device_plan", "encode", "encode_device", "from_planes", "layout", "normalise",
    "run_errors", "squared_errors_device", "to_planes", "valid", "valid_device",
]  # fmt: skip


def normalise(coefficients: Tensor) -> Tensor:
    """float32 from exact coefficients (float64 integers of ``project.analyse``), in 2**8 units of its inputs.

    2**17 channels of 16-bit inputs give at most 2**23.5 input units, 2**15.5 here: within float16, whatever the data.
    Its least normal number, 2**-14, is 1/64 of an input unit, below what rounding the inputs has lost already.
    """
    # Adding zero turns -0 into 0: which of the two a minimum picks is the device's choice.
    return (coefficients * 2.0**-FRACTION_BITS).to(torch.float32) + 0.0


def layout(sizes: Tensor, types: Tensor, components: int, device: torch.device | str = "cpu") -> Layout:
    """Where everything lies in a token's bytes, for the runs of one allocation.

    sizes: int [m], components of each run, each in SIZES; types: uint8 [m], each in TYPES; components: how many the
    basis has. Raises ConfigError if a size or type is not allowed or the runs need more components.
    """
    if sizes.dim() != 1 or sizes.shape != types.shape:
        raise ConfigError(f"{tuple(sizes.shape)} run sizes and {tuple(types.shape)} types; each run needs both")
    size_list, type_list = [int(s) for s in sizes.tolist()], [int(t) for t in types.tolist()]
    wrong_sizes, wrong_types = set(size_list) - set(SIZES), set(type_list) - set(TYPES.values())
    if wrong_sizes or wrong_types:
        raise ConfigError(f"run sizes {sorted(wrong_sizes)} or types {sorted(wrong_types)} are not among {SIZES}, 0..3")
    if sum(size_list) > components:
        raise ConfigError(f"the runs hold {sum(size_list)} components; the basis has {components}")
    return Layout(size_list, type_list, device)


def encode(values: Tensor, runs: Layout) -> tuple[Tensor, Tensor]:
    """Tokens as bytes, each on its own.

    values: float32 [T, n], the components of ``runs.live`` in that order. Returns uint8 [T, runs.width] and overflow
    bool [T]: a value was not finite, or a scale or shift is beyond float16; such a token's bytes are not to be used.
    """
    if values.dtype != torch.float32 or values.dim() != 2 or values.shape[1] != len(runs.live):
        raise ConfigError(f"encode needs float32 [T, {len(runs.live)}]; got {values.dtype} {tuple(values.shape)}")
    return reference.encode(values, runs)


def decode(data: Tensor, runs: Layout) -> Tensor:
    """float32 [T, n] from ``encode``'s uint8 [T, runs.width], on the device of ``runs``."""
    if data.dtype != torch.uint8 or data.dim() != 2 or data.shape[1] != runs.width:
        raise ConfigError(f"decode needs uint8 [T, {runs.width}]; got {data.dtype} {tuple(data.shape)}")
    return reference.decode(data.to(runs.live.device), runs)


def valid(data: Tensor, runs: Layout) -> Tensor:
    """bool [T]: these bytes (on the CPU) are what an encoder writes: finite scales, shifts and codes, zero padding."""
    return reference.valid(data, runs)


def run_errors(rows: Tensor, low: Tensor, high: Tensor, size: int, kind: int) -> Tensor:
    """Squared error of a run of ``size`` components at each of many starts, summed over tokens: float64 [S].

    rows: float32 [R, n], a component each; low, high: float32 [S, n], least and greatest value of each token in the
    run that starts at row 0 to S - 1; kind: INT2, INT4 or FP8. The error of ``decode`` after ``encode``, without the
    bytes. Raises ConfigError if a run would end beyond R.
    """
    count = low.shape[0]
    if kind not in (INT2, INT4, FP8) or low.shape != high.shape or count + size - 1 > rows.shape[0]:
        raise ConfigError(f"{count} starts of runs of {size} (type {kind}) do not fit {tuple(rows.shape)} rows")
    if not count:
        return torch.empty(0, dtype=torch.float64)
    if rows.is_cuda:
        return reference.run_errors(rows, low, high, size, kind)
    scale, shift = reference.fit(low, high, kind)
    top = np.float32(0.0 if kind == FP8 else 2.0 ** CODE_BITS[kind] - 1)
    return torch.from_numpy(cpu.run_errors(rows.numpy(), scale.numpy(), shift.numpy(), size, top))
