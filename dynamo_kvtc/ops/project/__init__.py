"""The PCA transform: analysis in exact integers, synthesis in float32.

Analysis must give the same symbols on every device and for every batch, so it is integer arithmetic from its input on:
inputs are rounded to 16-bit fixed point, the basis is stored in 16-bit fixed point (``BASIS_BITS``), and their inner
products are integers below 2**53, exact in float64 in any order of summation (and in int32 limbs on matrix units).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops.project import reference

BASIS_BITS = 15
"""Fraction bits of the stored basis: an entry b is kept as round(b * 2**15), clamped to int16."""

INPUT_MAX = 32767
"""Largest magnitude of a fixed-point input; a token beyond it is saturated and must be stored exact."""

MAX_CHANNELS = 2**17
"""Channels of a layer group for which 15 + 15 + 17 bits of a sum still fit float64's 53."""


def quantise_basis(basis: Tensor) -> Tensor:
    """int16 fixed point [P, R] of an orthonormal float basis [P, R]."""
    return (basis.double() * 2**BASIS_BITS).round().clamp(-INPUT_MAX, INPUT_MAX).to(torch.int16)


def analyse(x: Tensor, mean: Tensor, gain: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exact coefficients of centred, scaled channels.

    x: float32 [T, P]; mean, gain: float32 [P]; basis: int16 [P, R].
    Returns coefficients float64 [T, R], holding integers: sum over P of round((x - mean) * gain) * basis; energy
    float64 [T]: the sum of squares of the rounded inputs; saturated: bool [T], True where an input was not finite or
    beyond INPUT_MAX (it was clamped, the token's coefficients are not to be used).
    Raises ConfigError if the shapes disagree or P is over MAX_CHANNELS.
    """
    _check(basis, mean, gain)
    if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != basis.shape[0]:
        raise ConfigError(f"analyse needs float32 [T, {basis.shape[0]}]; got {x.dtype} {tuple(x.shape)}")
    return reference.analyse(x, mean, gain, basis, INPUT_MAX)


def decoder_basis(basis: Tensor) -> Tensor:
    """float32 [R, P] for ``synthesise`` from the stored int16 [P, R]: kept by whoever decodes often."""
    return (basis.T.to(torch.float32) * 2.0**-BASIS_BITS).contiguous()


def synthesise(levels: Tensor, decoder: Tensor, gain: Tensor, mean: Tensor) -> Tensor:
    """Channels from reconstruction levels: (levels @ decoder) * gain + mean.

    levels: float32 [T, R]; decoder: float32 [R, P] from ``decoder_basis``; gain, mean: float32 [P].
    Returns float32 [T, P]. The product runs in tiles of a fixed number of tokens, so a token's result does not depend
    on how many others are decoded with it.
    """
    if levels.dtype != torch.float32 or levels.dim() != 2 or levels.shape[1] != decoder.shape[0]:
        raise ConfigError(f"synthesise needs float32 [T, {decoder.shape[0]}]; got {levels.dtype} {tuple(levels.shape)}")
    return reference.synthesise(levels, decoder, gain, mean)


def _check(basis: Tensor, mean: Tensor, gain: Tensor) -> None:
    if basis.dtype != torch.int16 or basis.dim() != 2:
        raise ConfigError(f"the basis must be int16 [P, R]; got {basis.dtype} {tuple(basis.shape)}")
    channels = basis.shape[0]
    if channels > MAX_CHANNELS:
        raise ConfigError(
            f"a layer group has {channels} channels; the exact transform takes at most {MAX_CHANNELS}: "
            "use more layer groups"
        )
    for name, vector in (("mean", mean), ("gain", gain)):
        if vector.dtype != torch.float32 or vector.shape != (channels,):
            raise ConfigError(f"{name} must be float32 [{channels}]; got {vector.dtype} {tuple(vector.shape)}")
