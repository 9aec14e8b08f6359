"""What ``gather_fixed`` makes: a layer group's channels as integers, in bytes that matrix units multiply."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError

INPUT_MAX = 32639
"""Largest magnitude of an input: 256 * 127 + 127, so that both its bytes are at most 127."""
NARROW_MAX = 127
"""Largest magnitude of an input that has one byte."""


@dataclass(frozen=True)
class FixedInputs:
    """How a layer group's P channels become integers. Build it once, with ``FixedInputs.of``.

    mean, gain: float32 [P]; wide_slot: int32 [P], the channel's column in ``FixedRows.high``, or -1 if one byte holds
    it; wide_heads: int32 [P / D], whether a head has any such; wide: columns there are.
    """

    mean: Tensor
    gain: Tensor
    wide_slot: Tensor
    wide_heads: Tensor
    wide: int

    @classmethod
    def of(cls, mean: Tensor, gain: Tensor, wide_slot: Tensor, head_dim: int) -> FixedInputs:
        """Raises ConfigError for other dtypes or shapes, or wide_slot naming a column twice or leaving one out."""
        channels = mean.shape[0] if mean.dim() == 1 else -1
        if channels < 1 or head_dim < 1 or channels % (2 * head_dim):
            raise ConfigError(f"mean is {tuple(mean.shape)}; it must be [P], P a multiple of 2 heads of {head_dim}")
        for name, x, dtype in (
            ("mean", mean, torch.float32), ("gain", gain, torch.float32), ("wide_slot", wide_slot, torch.int32),
        ):  # fmt: skip
            if x.dtype != dtype or x.shape != (channels,) or x.device != mean.device or not x.is_contiguous():
                raise ConfigError(
                    f"{name} must be {dtype} [{channels}], contiguous, on {mean.device}; got {x.dtype} "
                    f"{tuple(x.shape)} on {x.device}"
                )
        columns = wide_slot[wide_slot >= 0].cpu().sort().values
        if not torch.equal(columns, torch.arange(len(columns), dtype=torch.int32)):
            raise ConfigError(
                f"wide_slot must number its {len(columns)} wide channels 0 to {len(columns) - 1}, each once"
            )
        heads = (wide_slot >= 0).unflatten(0, (-1, head_dim)).any(dim=1).to(torch.int32)
        return cls(mean, gain, wide_slot, heads, len(columns))


@dataclass(frozen=True)
class FixedRows:
    """Room for T tokens of P channels, of which Pw are wide; filled by ``gather_fixed``.

    low: int8 [T, P or more], the input of a narrow channel clamped to -127..127, the lower byte lo of a wide one;
    high: int8 [T, Pw or more], hi of the wide channels, the input being 256 * hi + lo with lo in -128..127;
    energy: int64 [T], the sum over all channels of the squared input; saturated: uint8 [T], 1 where an input was
    not finite or beyond INPUT_MAX, or there is no such slot: the token is not to be coded, and its bytes and energy
    mean nothing. Rows are contiguous; columns past P or Pw are left alone.
    """

    low: Tensor
    high: Tensor
    energy: Tensor
    saturated: Tensor

    @classmethod
    def empty(cls, tokens: int, channels: int, wide: int, device: torch.device | str) -> FixedRows:
        """Not initialised; rows padded to 16 bytes, as matrix units want them."""

        def rows(columns: int) -> Tensor:
            return torch.empty(tokens, -(-columns // 16) * 16, dtype=torch.int8, device=device)

        return cls(
            low=rows(channels),
            high=rows(wide),
            energy=torch.empty(tokens, dtype=torch.int64, device=device),
            saturated=torch.empty(tokens, dtype=torch.uint8, device=device),
        )
