"""Static-model range asymmetric numeral system (rANS; Duda, arXiv 1311.2540), one or more lanes per token.

State: 32 bits, at least 2**16 between symbols; renormalisation by 16-bit words; probabilities in 1/4096. A lane's words
are stored in the order the decoder reads them: the final encoder state (high word, low word), then the stream. The
encoder starts at state 2**16, so a decoder that does not end there has read damaged words.

A token's components are dealt out to its S lanes (``lanes_per_token``): lane s has components s, s + S, s + 2 S, ...
Lanes are in token order, a token's S beside each other. One lane is the smallest; more of them keep a GPU busier.

A token may shift its classes: every component from ``first`` on uses class c + offset[token], kept within the tables,
so that a token of large (or small) symbols is coded with the tables of a larger (or smaller) scale.

A symbol q of a component of class c is coded as: the table symbol a = q >> shift[c] (arithmetic) out of
frequencies[c], then the ``shift[c]`` low bits of q as they are; or, where a has no frequency, the class's escape and
16 raw bits of q.

The functions on numpy arrays are the CPU's; those named ``_device`` run on the GPU and make the same words and symbols.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dynamo_kvtc.errors import ConfigError, RecordCorruptError
from dynamo_kvtc.ops.rans import reference
from dynamo_kvtc.ops.rans.device import (
    LevelGroup,
    LevelGroups,
    decode_levels_device,
    decode_symbols_device,
    encode_lanes_device,
)
from dynamo_kvtc.ops.rans.tables import (
    LANES_PER_TOKEN,
    MAX_CLASSES,
    MAX_SHIFT,
    PROBABILITY_BITS,
    PROBABILITY_TOTAL,
    ClassTables,
    DeviceTables,
)

__all__ = [
    "LANES_PER_TOKEN",
    "MAX_CLASSES",
    "MAX_SHIFT",
    "PROBABILITY_BITS",
    "PROBABILITY_TOTAL",
    "STATE_WORDS",
    "ClassTables",
    "DeviceTables",
    "LevelGroup",
    "LevelGroups",
    "cross_entropy_bits",
    "decode_lanes",
    "decode_levels_device",
    "decode_symbols_device",
    "encode_lanes",
    "encode_lanes_device",
]

STATE_WORDS = 2
"""Words of a lane that hold its state: the least a lane can have."""


def encode_lanes(
    symbols: NDArray[np.int16],
    classes: NDArray[np.uint8],
    tables: ClassTables,
    offsets: NDArray[np.int8] | None = None,
    first: int = 0,
    lanes_per_token: int = 1,
) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """``lanes_per_token`` (1, 2, 4 or 8) lanes per row.

    symbols: int16 [T, R]; classes: uint8 [R], each below C; offsets: int8 [T], added to the class of components
    ``first`` on (default: none).
    Returns the lanes' words, one lane after another (uint16 [sum]), and the words per lane (int64 [T * S]).
    """
    _check(classes, tables, lanes_per_token)
    if symbols.dtype != np.int16 or symbols.ndim != 2 or symbols.shape[1] != len(classes):
        raise ConfigError(f"symbols must be int16 [T, {len(classes)}]; got {symbols.dtype} {symbols.shape}")
    shifted = _offsets(offsets, len(symbols))
    return reference.encode(
        np.ascontiguousarray(symbols), classes, shifted, first, tables.frequencies, tables.starts, tables.shift,
        tables.alphabet, lanes_per_token,
    )  # fmt: skip


def decode_lanes(
    words: NDArray[np.uint16],
    lane_words: Sequence[int] | NDArray[np.int64],
    classes: NDArray[np.uint8],
    tables: ClassTables,
    offsets: NDArray[np.int8] | None = None,
    first: int = 0,
    lanes_per_token: int = 1,
) -> NDArray[np.int16]:
    """The inverse of ``encode_lanes``, given the same classes, tables and so on: int16 [T, R].

    Raises RecordCorruptError if a lane runs out of words, leaves some, or does not end in the initial state.
    """
    _check(classes, tables, lanes_per_token)
    lengths = np.asarray(lane_words, dtype=np.int64)
    if int(lengths.sum()) != len(words) or (lengths < STATE_WORDS).any():
        raise RecordCorruptError(
            f"lanes of {int(lengths.sum())} words (each at least {STATE_WORDS}) do not fit {len(words)} words"
        )
    if len(lengths) % lanes_per_token:
        raise RecordCorruptError(f"{len(lengths)} lanes are not {lanes_per_token} for each token")
    symbols, bad = reference.decode(
        words, lengths, classes, _offsets(offsets, len(lengths) // lanes_per_token), first, tables.frequencies,
        tables.starts, tables.slots, tables.shift, tables.alphabet, lanes_per_token,
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


def _offsets(offsets: NDArray[np.int8] | None, tokens: int) -> NDArray[np.int8]:
    if offsets is None:
        return np.zeros(tokens, dtype=np.int8)
    if offsets.dtype != np.int8 or offsets.shape != (tokens,):
        raise ConfigError(f"offsets must be int8 [{tokens}], one per token; got {offsets.dtype} {offsets.shape}")
    return offsets


def _check(classes: NDArray[np.uint8], tables: ClassTables, lanes_per_token: int = 1) -> None:
    if lanes_per_token not in LANES_PER_TOKEN:
        raise ConfigError(f"lanes_per_token is {lanes_per_token}; it must be one of {LANES_PER_TOKEN}")
    if classes.dtype != np.uint8 or classes.ndim != 1:
        raise ConfigError(f"classes must be uint8 [R]; got {classes.dtype} {classes.shape}")
    if len(classes) and int(classes.max()) >= len(tables.shift):
        raise ConfigError(f"class {int(classes.max())} is used but there are only {len(tables.shift)} tables")
