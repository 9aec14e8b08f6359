"""Rotary position embedding: put on keys, and taken off them."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops.rope import reference
from dynamo_kvtc.types import RopeSpec

MAX_POSITION = 2**31 - 1


def remove_rope(k: Tensor, positions: Tensor, rope: RopeSpec) -> Tensor:
    """Keys before RoPE from keys after it: the inverse of ``apply_rope``.

    k: float32 [..., H, T, D] as the engine caches them; positions: int64 [T], any order, gaps allowed.
    Returns float32 of k's shape. Elementwise only, so a token's result does not depend on its neighbours.
    Raises ConfigError for other dtypes, shapes or positions out of [0, 2**31).
    """
    _check(k, positions, rope)
    return reference.rotate(k, positions, rope, inverse=True)


def apply_rope(k: Tensor, positions: Tensor, rope: RopeSpec) -> Tensor:
    """Keys after RoPE from keys before it (Su et al., arXiv 2104.09864, eq. 34).

    Shapes, dtypes and errors as in ``remove_rope``.
    """
    _check(k, positions, rope)
    return reference.rotate(k, positions, rope, inverse=False)


def _check(k: Tensor, positions: Tensor, rope: RopeSpec) -> None:
    if k.dtype != torch.float32 or k.dim() < 2:
        raise ConfigError(f"RoPE works on float32 [..., T, D]; got {k.dtype} {tuple(k.shape)}")
    if positions.dtype != torch.int64 or positions.shape != (k.shape[-2],):
        raise ConfigError(
            f"positions must be int64 [{k.shape[-2]}], one per token; got {positions.dtype} {tuple(positions.shape)}"
        )
    if rope.rotary_dim > k.shape[-1]:
        raise ConfigError(f"RoPE rotates {rope.rotary_dim} dims but the head has {k.shape[-1]}")
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) <= MAX_POSITION:
        raise ConfigError(
            f"positions run from {int(positions.min())} to {int(positions.max())}; allowed is 0 to {MAX_POSITION}"
        )
