"""The PCA transform: analysis in exact integers, synthesis in float32.

Analysis must give the same symbols on every device and for every batch, so it is integer arithmetic from its input on.
Inputs are rounded to fixed point. A *wide* basis has 16 bits an entry; a *narrow* one 8, for components so small that
this is enough, which is nearly all of them: matrix units multiply int8 at twice the rate of bfloat16. Inputs that can
exceed int8 (*wide inputs*, few) are split into two int8 limbs, the others are clipped.

Every sum below is an integer that float64 or int64 holds exactly, in any order of summation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops.project import reference

BASIS_BITS = 14
"""Fraction bits of a wide basis: an entry b is kept as round(b * 2**14)."""

INPUT_MAX = 32639
"""Largest magnitude of a fixed-point input (two int8 limbs, 127 * 256 + 127); a token beyond it is saturated and must
be stored exact."""

NARROW_INPUT_MAX = 127
"""A narrow input is clipped here."""

MAX_CHANNELS = 2**17
"""Channels of a layer group for which 14 + 15 + 17 bits of a sum still fit float64's 53."""


def quantise_basis(basis: Tensor) -> Tensor:
    """Wide fixed point, int16 [P, R], of an orthonormal float basis [P, R]."""
    return (basis.double() * 2**BASIS_BITS).round().clamp(-(2**BASIS_BITS), 2**BASIS_BITS).to(torch.int16)


def fixed_point(x: Tensor, mean: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fixed-point inputs f = round_half_even((x - mean) * gain).

    x: float32 [T, P]; mean, gain: float32 [P].
    Returns f float32 [T, P] holding integers, clamped to INPUT_MAX, NaN as 0; energy int64 [T], the sum of f**2; and
    saturated bool [T], True where an input was not finite or beyond INPUT_MAX: that token is not to be coded.
    Raises ConfigError if the shapes disagree or P is over MAX_CHANNELS.
    """
    channels = len(mean)
    _check_vectors(channels, mean, gain)
    if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != channels:
        raise ConfigError(f"fixed_point needs float32 [T, {channels}]; got {x.dtype} {tuple(x.shape)}")
    fixed, saturated = reference.fixed_point(x, mean, gain, INPUT_MAX)
    return fixed, fixed.double().square().sum(dim=1).long(), saturated


def clip_narrow(fixed: Tensor, wide_inputs: Tensor) -> Tensor:
    """f float32 [T, P] with all but the wide inputs (int64 [Pw], their channels) clipped to NARROW_INPUT_MAX."""
    clipped = fixed.clamp(-NARROW_INPUT_MAX, NARROW_INPUT_MAX)
    clipped[:, wide_inputs] = fixed[:, wide_inputs]
    return clipped


def analyse_wide(fixed: Tensor, basis: Tensor) -> Tensor:
    """Exact coefficients under a wide basis: float64 [T, R], integers, the sums over P of f * basis.

    fixed: float32 [T, P] from ``fixed_point``; basis: int16 [P, R].
    """
    _check_basis(basis, torch.int16, fixed)
    return reference.analyse_wide(fixed, basis)


def analyse_narrow(fixed: Tensor, wide_inputs: Tensor, basis: Tensor) -> Tensor:
    """Exact coefficients under a narrow basis: int64 [T, R].

    fixed: float32 [T, P] from ``clip_narrow``; wide_inputs: int64 [Pw]; basis: int8 [P, R].
    """
    _check_basis(basis, torch.int8, fixed)
    return reference.analyse_narrow(fixed, wide_inputs, basis)


def decoder_basis(basis: Tensor) -> Tensor:
    """float32 [R, P] for ``synthesise_wide`` from a wide basis int16 [P, R]: kept by whoever decodes often."""
    return (basis.T.to(torch.float32) * 2.0**-BASIS_BITS).contiguous()


def synthesise_wide(levels: Tensor, decoder: Tensor) -> Tensor:
    """levels @ decoder. levels: float32 [T, R]; decoder: float32 [R, P] from ``decoder_basis``; returns float32 [T, P].

    The product runs in tiles of a fixed number of tokens, so a token's result does not depend on how many others are
    decoded with it.
    """
    if levels.dtype != torch.float32 or levels.dim() != 2 or levels.shape[1] != decoder.shape[0]:
        raise ConfigError(f"synthesise needs float32 [T, {decoder.shape[0]}]; got {levels.dtype} {tuple(levels.shape)}")
    return reference.synthesise_wide(levels, decoder)


def synthesise_narrow(levels: Tensor, basis: Tensor) -> Tensor:
    """Exact levels @ basis.T: int64 [T, P]. levels: int8 [T, R]; basis: int8 [P, R]."""
    if levels.dtype != torch.int8 or basis.dtype != torch.int8 or levels.shape[1] != basis.shape[1]:
        raise ConfigError(f"synthesise needs int8 [T, {basis.shape[1]}]; got {levels.dtype} {tuple(levels.shape)}")
    return reference.synthesise_narrow(levels, basis)


def _check_basis(basis: Tensor, dtype: torch.dtype, fixed: Tensor) -> None:
    if basis.dtype != dtype or basis.dim() != 2 or basis.shape[0] != fixed.shape[1]:
        raise ConfigError(f"the basis must be {dtype} [{fixed.shape[1]}, R]; got {basis.dtype} {tuple(basis.shape)}")


def _check_vectors(channels: int, mean: Tensor, gain: Tensor) -> None:
    if channels > MAX_CHANNELS:
        raise ConfigError(
            f"a layer group has {channels} channels; the exact transform takes at most {MAX_CHANNELS}: "
            "use more layer groups"
        )
    for name, vector in (("mean", mean), ("gain", gain)):
        if vector.dtype != torch.float32 or vector.shape != (channels,):
            raise ConfigError(f"{name} must be float32 [{channels}]; got {vector.dtype} {tuple(vector.shape)}")
