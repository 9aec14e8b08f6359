"""What a profile is: one way to turn a layer group's channels into symbols and symbols into bytes.

To add one: implement ``Profile`` in a file of its own, give it the next id here (an id is a promise: it decodes for
ever what it wrote), add its constructor to ``pipeline.PROFILES`` and its bytes to FORMAT.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

PROFILE_IDS = {"paper": 1, "kvtc": 2}
PROFILE_NAMES = {number: name for name, number in PROFILE_IDS.items()}


class Profile(Protocol):
    """The transform, quantiser and entropy coder of one operating point of one rank."""

    def quantise(self, group: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Symbols of a layer group's tokens, each token on its own.

        k, v: float32 [Lg, H, T, D], K before RoPE. Returns symbols [T, W] (dtype and W are the profile's) and error
        float64 [T]: the squared coding error of each token as a multiple of the calibrated mean; infinite where the
        token cannot be coded (not finite, out of range).
        """
        ...

    def dequantise(self, group: int, symbols: Tensor) -> tuple[Tensor, Tensor]:
        """k, v float32 [Lg, H, T, D], K before RoPE, from symbols [T, W]."""
        ...

    def pack(self, group: int, symbols: Tensor, tokens_per_block: Sequence[int]) -> list[bytes]:
        """Payloads of consecutive blocks; tokens_per_block sums to T. A block of 0 tokens gives b""."""
        ...

    def unpack(self, group: int, payloads: Sequence[bytes | memoryview], tokens_per_block: Sequence[int]) -> Tensor:
        """Symbols [T, W] on the CPU of consecutive blocks' payloads.

        Raises RecordFormatError or RecordCorruptError; what it allocates is bounded by tokens_per_block.
        """
        ...
