"""Rotary position embedding: put on keys, and taken off them."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops.rope import reference
from dynamo_kvtc.ops.rope.tables import BITS, Tables
from dynamo_kvtc.types import RopeSpec

MAX_POSITION = 2 ** sum(BITS) - 1


class Rotations:
    """What RoPE multiplies by, for one model on one device: bit for bit the same on every device."""

    def __init__(self, rope: RopeSpec, device: torch.device | str = "cpu") -> None:
        """Tables of 64 KB a frequency; those of the last few models stay on the CPU."""
        self.device = torch.device(device)
        self._tables = Tables(rope.inv_freq, self.device)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of position * inv_freq, float32 [T, n], within one ulp; without attention_scaling.

        positions: int64 [T] in [0, 2**31) on this device. On a GPU they are not checked, which would wait for it: bits
        from 31 on are ignored. Raises ConfigError for other dtypes, shapes and devices, and on a CPU for positions out
        of range.
        """
        if positions.dtype != torch.int64 or positions.dim() != 1 or positions.device.type != self.device.type:
            raise ConfigError(
                f"positions must be int64 [T] on {self.device}; got {positions.dtype} {tuple(positions.shape)} on "
                f"{positions.device}"
            )
        _check_positions(positions)
        return self._tables.at(positions)


@lru_cache(maxsize=8)
def rotations_of(rope: RopeSpec, device: torch.device) -> Rotations:
    """``Rotations``, kept for the next call."""
    return Rotations(rope, device)


def remove_rope(k: Tensor, positions: Tensor, rope: RopeSpec) -> Tensor:
    """Keys before RoPE from keys after it: the inverse of ``apply_rope``.

    k: float32 [..., H, T, D] as the engine caches them; positions: int64 [T], any order, gaps allowed.
    Returns float32 of k's shape. Elementwise only, so a token's result does not depend on its neighbours.
    Raises ConfigError for other dtypes, shapes or positions out of [0, 2**31), which are checked if on a CPU.
    """
    return _rotate(k, positions, rope, inverse=True)


def apply_rope(k: Tensor, positions: Tensor, rope: RopeSpec) -> Tensor:
    """Keys after RoPE from keys before it (Su et al., arXiv 2104.09864, eq. 34).

    Shapes, dtypes and errors as in ``remove_rope``.
    """
    return _rotate(k, positions, rope, inverse=False)


def _rotate(k: Tensor, positions: Tensor, rope: RopeSpec, inverse: bool) -> Tensor:
    _check(k, positions, rope)
    cos, sin = rotations_of(rope, k.device).at(positions.to(k.device))
    return reference.rotate(k, cos, sin, rope, inverse)


def _check(k: Tensor, positions: Tensor, rope: RopeSpec) -> None:
    if k.dtype != torch.float32 or k.dim() < 2:
        raise ConfigError(f"RoPE works on float32 [..., T, D]; got {k.dtype} {tuple(k.shape)}")
    if positions.dtype != torch.int64 or positions.shape != (k.shape[-2],):
        raise ConfigError(
            f"positions must be int64 [{k.shape[-2]}], one per token; got {positions.dtype} {tuple(positions.shape)}"
        )
    if rope.rotary_dim > k.shape[-1]:
        raise ConfigError(f"RoPE rotates {rope.rotary_dim} dims but the head has {k.shape[-1]}")
    _check_positions(positions)


def _check_positions(positions: Tensor) -> None:
    if positions.device.type != "cpu" or not positions.numel():
        return
    first, last = int(positions.min()), int(positions.max())
    if not 0 <= first <= last <= MAX_POSITION:
        raise ConfigError(f"positions run from {first} to {last}; allowed is 0 to {MAX_POSITION}")
