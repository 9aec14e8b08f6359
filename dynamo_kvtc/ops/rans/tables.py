"""The coder's static tables, as numpy holds them and as kernels read them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamo_kvtc.errors import ConfigError

PROBABILITY_BITS = 12
PROBABILITY_TOTAL = 1 << PROBABILITY_BITS
MAX_CLASSES = 64
MAX_SHIFT = 12
LANES_PER_TOKEN = (1, 2, 4, 8)
PLACES = 11
"""Numbers that say where a layer group's levels go (``device.LevelGroups``)."""
MAX_NARROW_SYMBOL = 2047
"""A symbol that becomes an 8-bit level is clipped to this first, so that its product with the scale fits 32 bits."""


@dataclass(frozen=True)
class ClassTables:
    """Frequency tables of up to 64 classes.

    frequencies: uint16 [C, S], S even and at most 256; column i is symbol i - (S - 2) / 2, the last column the escape
        (at least 1); a row sums to 4096; a symbol of frequency 0 is coded through the escape.
    shift: uint8 [C], raw low bits per symbol, at most 12.
    """

    frequencies: NDArray[np.uint16]
    shift: NDArray[np.uint8]

    def __post_init__(self) -> None:
        f, s = self.frequencies, self.shift
        if f.dtype != np.uint16 or f.ndim != 2 or f.shape[1] % 2 or not 4 <= f.shape[1] <= 256:
            raise ConfigError(f"frequencies must be uint16 [C, even S in 4..256]; got {f.dtype} {f.shape}")
        if not 1 <= f.shape[0] <= MAX_CLASSES:
            raise ConfigError(f"there are {f.shape[0]} classes; allowed is 1 to {MAX_CLASSES}")
        if s.dtype != np.uint8 or s.shape != (f.shape[0],) or int(s.max(initial=0)) > MAX_SHIFT:
            raise ConfigError(f"shift must be uint8 [{f.shape[0]}], each at most {MAX_SHIFT}")
        sums = f.astype(np.int64).sum(axis=1)
        if (sums != PROBABILITY_TOTAL).any() or (f[:, -1] == 0).any():
            raise ConfigError(f"every row of frequencies must sum to {PROBABILITY_TOTAL} with a non-zero escape")

    @property
    def alphabet(self) -> int:
        """Largest table symbol A; the table runs from -A to A."""
        return (self.frequencies.shape[1] - 2) // 2

    @cached_property
    def starts(self) -> NDArray[np.uint16]:
        """Cumulative frequency below each symbol, uint16 [C, S]."""
        total = np.cumsum(self.frequencies, axis=1, dtype=np.int64)
        return (total - self.frequencies).astype(np.uint16)

    @cached_property
    def slots(self) -> NDArray[np.uint8]:
        """Table symbol index of each of the 4096 slots, uint8 [C, 4096]."""
        index = np.arange(self.frequencies.shape[1], dtype=np.uint8)
        return np.stack([np.repeat(index, row) for row in self.frequencies])


RARE = -128
"""Table symbol of a decoder's entry that needs more than the entry: the escape, or a class with raw low bits."""
COARSE_BITS = 4
MIXED = -0x7F000001
"""A coarse entry whose slots do not all agree (RARE, f = 4096, start = 4095: no column has both)."""
LOOK_CLOSER = 1 << 31
"""Flag of an encoder's entry: the class has raw low bits, or the column is the escape or has no frequency."""


@dataclass(frozen=True)
class DeviceTables:
    """``ClassTables`` on a device, built once per operating point.

    decode: int32 [C, 4096], per slot: table symbol (or RARE) << 24 | (frequency - 1) << 12 | start.
    coarse: int32 [C, 256], the same per 16 slots, MIXED where they differ: it touches fewer cache lines.
    slots: uint8 [C, 4096], column of each slot.
    encode: int64 [C, S], per column: floor(2**32 / frequency) << 32 | LOOK_CLOSER | frequency << 12 | start.
    shift: int32 [C].
    """

    decode: Tensor
    coarse: Tensor
    slots: Tensor
    encode: Tensor
    shift: Tensor
    alphabet: int

    @classmethod
    def build(cls, tables: ClassTables, device: torch.device | str) -> DeviceTables:
        f, starts = tables.frequencies.astype(np.int64), tables.starts.astype(np.int64)
        escape = f.shape[1] - 1
        slots = tables.slots.astype(np.int64)
        symbol = np.where((slots == escape) | (tables.shift > 0)[:, None], RARE, slots - tables.alphabet)
        own_f, own_start = np.take_along_axis(f, slots, axis=1), np.take_along_axis(starts, slots, axis=1)
        decode = ((symbol << 24) | ((own_f - 1) << PROBABILITY_BITS) | own_start).astype(np.int32)
        cells = decode.reshape(len(f), -1, 1 << COARSE_BITS)
        coarse = np.where((cells == cells[:, :, :1]).all(axis=2), cells[:, :, 0], np.int32(MIXED))
        closer = (f == 0) | (tables.shift > 0)[:, None] | (np.arange(f.shape[1]) == escape)
        # Only f = 1 would need a 33rd bit; one less is as good (see the kernel).
        reciprocal = np.minimum((1 << 32) // np.maximum(f, 1), (1 << 32) - 1).astype(np.uint64)
        low = (closer * LOOK_CLOSER + (f << PROBABILITY_BITS) + np.where(f > 0, starts, 0)).astype(np.uint64)
        encode = ((reciprocal << np.uint64(32)) | low).view(np.int64)
        arrays = (decode, coarse, tables.slots, encode, tables.shift.astype(np.int32))
        on_device = [torch.from_numpy(a).to(device) for a in arrays]
        return cls(on_device[0], on_device[1], on_device[2], on_device[3], on_device[4], tables.alphabet)

    @property
    def classes(self) -> int:
        return self.shift.shape[0]
