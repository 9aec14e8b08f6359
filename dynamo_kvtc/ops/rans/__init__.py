"""Static-model range asymmetric numeral system (rANS; Duda, arXiv 1311.2540), one lane per token.

State: 32 bits, at least 2**16 between symbols; renormalisation by 16-bit words; probabilities in 1/4096. A lane's words
are stored in the order the decoder reads them: the final encoder state (high word, low word), then the stream. The
encoder starts at state 2**16, so a decoder that does not end there has read damaged words.

A lane may shift its classes: every component from ``first`` on uses class c + offset[lane], kept within the tables, so
that a lane of large (or small) symbols is coded with the tables of a larger (or smaller) scale.

A symbol q of a component of class c is coded as: the table symbol a = q >> shift[c] (arithmetic) out of
frequencies[c], then the ``shift[c]`` low bits of q as they are; or, where a has no frequency, the class's escape and
16 raw bits of q.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dynamo_kvtc.errors import ConfigError, RecordCorruptError
from dynamo_kvtc.ops.rans import reference

PROBABILITY_BITS = 12
PROBABILITY_TOTAL = 1 << PROBABILITY_BITS
MAX_CLASSES = 64
MAX_SHIFT = 12
STATE_WORDS = 2
"""Words of a lane that hold its state: the least a lane can have."""


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


def encode_lanes(
    symbols: NDArray[np.int16],
    classes: NDArray[np.uint8],
    tables: ClassTables,
    offsets: NDArray[np.int8] | None = None,
    first: int = 0,
) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """One lane per row.

    symbols: int16 [T, R]; classes: uint8 [R], each below C; offsets: int8 [T], added to the class of components
    ``first`` on (default: none).
    Returns the lanes' words, one lane after another (uint16 [sum]), and the words per lane (int64 [T]).
    """
    _check(classes, tables)
    if symbols.dtype != np.int16 or symbols.ndim != 2 or symbols.shape[1] != len(classes):
        raise ConfigError(f"symbols must be int16 [T, {len(classes)}]; got {symbols.dtype} {symbols.shape}")
    shifted = _offsets(offsets, len(symbols))
    return reference.encode(
        np.ascontiguousarray(symbols), classes, shifted, first, tables.frequencies, tables.starts, tables.shift,
        tables.alphabet,
    )  # fmt: skip


def decode_lanes(
    words: NDArray[np.uint16],
    lane_words: Sequence[int] | NDArray[np.int64],
    classes: NDArray[np.uint8],
    tables: ClassTables,
    offsets: NDArray[np.int8] | None = None,
    first: int = 0,
) -> NDArray[np.int16]:
    """The inverse of ``encode_lanes``, given the same classes, tables, offsets and first: int16 [T, R].

    Raises RecordCorruptError if a lane runs out of words, leaves some, or does not end in the initial state.
    """
    _check(classes, tables)
    lengths = np.asarray(lane_words, dtype=np.int64)
    if int(lengths.sum()) != len(words) or (lengths < STATE_WORDS).any():
        raise RecordCorruptError(
            f"lanes of {int(lengths.sum())} words (each at least {STATE_WORDS}) do not fit {len(words)} words"
        )
    symbols, bad = reference.decode(
        words, lengths, classes, _offsets(offsets, len(lengths)), first, tables.frequencies, tables.starts,
        tables.slots, tables.shift, tables.alphabet,
    )  # fmt: skip
    if bad.any():
        raise RecordCorruptError(f"{int(bad.sum())} of {len(bad)} rANS lanes do not end in their initial state")
    return symbols


def cross_entropy_bits(
    symbols: NDArray[np.int16], classes: NDArray[np.uint8], tables: ClassTables,
    offsets: NDArray[np.int8] | None = None, first: int = 0,
) -> float:  # fmt: skip
    """Exact cost of the symbols under the tables, in bits: the floor that the coded lanes are compared with.

    Arguments as in ``encode_lanes``.
    """
    _check(classes, tables)
    return reference.cross_entropy(
        np.ascontiguousarray(symbols), classes, _offsets(offsets, len(symbols)), first, tables.frequencies,
        tables.shift, tables.alphabet,
    )  # fmt: skip


def _offsets(offsets: NDArray[np.int8] | None, lanes: int) -> NDArray[np.int8]:
    if offsets is None:
        return np.zeros(lanes, dtype=np.int8)
    if offsets.dtype != np.int8 or offsets.shape != (lanes,):
        raise ConfigError(f"offsets must be int8 [{lanes}], one per lane; got {offsets.dtype} {offsets.shape}")
    return offsets


def _check(classes: NDArray[np.uint8], tables: ClassTables) -> None:
    if classes.dtype != np.uint8 or classes.ndim != 1:
        raise ConfigError(f"classes must be uint8 [R]; got {classes.dtype} {classes.shape}")
    if len(classes) and int(classes.max()) >= len(tables.shift):
        raise ConfigError(f"class {int(classes.max())} is used but there are only {len(tables.shift)} tables")
