"""The coder on the GPU: what is checked before its kernels are launched.

Nothing here allocates or waits for the device. Tensors are checked by shape, dtype and stride; what they hold (lane
starts and lengths, classes) is checked by the kernels, which report a lane they cannot use instead of touching memory
outside it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops.rans.tables import LANES_PER_TOKEN, PLACES, DeviceTables

_WORDS = (torch.int16, torch.uint16)
_CLASSES = (torch.uint8, torch.int32)
_FLAGS = (torch.bool, torch.uint8)
_WIDE_STEP = 16
_INT32_MAX = 2**31 - 1
_MOST = 2**29

BLOCK_LANES = 32
"""Lanes of a program: one or more per thread of its warp."""


def encode_lanes_device(
    symbols: Tensor,
    classes: Tensor,
    tables: DeviceTables,
    words: Tensor,
    lengths: Tensor,
    *,
    offsets: Tensor | None = None,
    skip: Tensor | None = None,
    first: int = 0,
    lanes_per_token: int = 1,
) -> None:
    """``encode_lanes`` on the GPU, into scratch rows.

    symbols: int16 [T, R], any row stride; classes: uint8 or int32 [R]; offsets: int8 [T]; skip: bool or uint8 [T], a
    token set there is not coded.
    words (out): int16 or uint16 [T * S, cap], any row stride. Each lane's words are the last ``length`` of its row, in
        reading order; the row before them is scratch. 2 * ceil(R / S) + 2 words always suffice.
    lengths (out): int32 [T * S], words per lane; 0 for a skipped token, -1 for a lane that needs more than cap.
    """
    lanes = _common(symbols, classes, tables, offsets, first, lanes_per_token, len(symbols))
    rank = classes.shape[0]
    _matrix("symbols", symbols, (torch.int16,), len(symbols), rank)
    _matrix("words", words, _WORDS, lanes, 0)
    _vector("lengths", lengths, (torch.int32,), lanes)
    if symbols.shape[1] != rank:
        raise ConfigError(f"symbols have {symbols.shape[1]} components and classes {rank}; they must agree")
    if skip is not None:
        _vector("skip", skip, _FLAGS, len(symbols))
    _same_device(symbols, classes, tables.encode, words, lengths, offsets, skip)
    if not lanes:
        return
    from dynamo_kvtc.ops.rans import triton as kernels

    kernels.encode_kernel[(-(-lanes // BLOCK_LANES),)](
        symbols, symbols.stride(0), classes, offsets if offsets is not None else classes,
        _raw(skip) if skip is not None else classes, tables.encode, tables.shift, _raw(words), words.stride(0), lengths,
        len(symbols), rank, first, tables.classes - 1, tables.encode.shape[1], tables.alphabet, words.shape[1],
        BLOCK=BLOCK_LANES, S=lanes_per_token, OFFSETS=offsets is not None, SKIP=skip is not None, num_warps=1,
    )  # fmt: skip


def decode_symbols_device(
    words: Tensor,
    starts: Tensor,
    lengths: Tensor,
    classes: Tensor,
    tables: DeviceTables,
    symbols: Tensor,
    bad: Tensor,
    *,
    offsets: Tensor | None = None,
    first: int = 0,
    lanes_per_token: int = 1,
) -> None:
    """``decode_lanes`` on the GPU.

    words: int16 or uint16 [n], whatever holds the lanes; starts: int64 [T * S], where each lane begins in it; lengths:
    int32 [T * S], its words, 0 for a lane that is not there (its symbols are 0); classes, offsets: as for encoding.
    symbols (out): int16 [T, R], any row stride.
    bad (out): int32 [T * S], 1 for a lane that did not consume exactly its words, did not end in the initial state or
        does not lie within ``words``, else 0. The symbols of a token with a bad lane mean nothing.
    """
    lanes = _streams(words, starts, lengths, classes, tables, bad, offsets, first, lanes_per_token)
    _matrix("symbols", symbols, (torch.int16,), lanes // lanes_per_token, classes.shape[0])
    _same_device(words, starts, lengths, classes, tables.decode, symbols, bad, offsets)
    if not lanes:
        return
    from dynamo_kvtc.ops.rans import triton as kernels

    kernels.decode_symbols_kernel[(-(-lanes // BLOCK_LANES),)](
        _raw(words), words.shape[0], starts, lengths, offsets if offsets is not None else classes, classes,
        tables.decode, tables.coarse, tables.slots, tables.shift, symbols, symbols.stride(0), bad,
        lanes // lanes_per_token, classes.shape[0], first, tables.classes - 1, tables.alphabet, BLOCK=BLOCK_LANES,
        S=lanes_per_token, GROUPS=_least_groups(lanes_per_token), OFFSETS=offsets is not None, num_warps=1,
        enable_fp_fusion=False,
    )  # fmt: skip


@dataclass(frozen=True)
class LevelGroup:
    """One layer group of R components for ``decode_levels_device``: classes uint8, centroid float32, scale and bias
    int32 [R], in 2**-16 levels; wide float16 [T, min(W, R) or more], narrow int8 [T, max(R - W, 0) or more], outputs,
    rows at multiples of 16 bytes; wide_components: W, a multiple of 16, at least ``first``."""

    classes: Tensor
    centroid: Tensor
    scale: Tensor
    bias: Tensor
    wide: Tensor
    narrow: Tensor
    wide_components: int
    first: int


@dataclass(frozen=True)
class LevelGroups:
    """Where the levels of G layer groups go, and what becomes of a symbol: built once, checked once.

    places: int64 [G, PLACES] on the device; tokens: rows that the outputs have.
    """

    places: Tensor
    tokens: int
    _kept: tuple[Tensor, ...]

    @classmethod
    def of(cls, groups: Sequence[LevelGroup]) -> LevelGroups:
        """Raises ConfigError for other dtypes or shapes, or outputs with rows not at multiples of 16 bytes."""
        rows, tokens = [], len(groups[0].wide)
        for g in groups:
            rank, width = len(g.classes), g.wide_components
            if width % _WIDE_STEP or not g.first <= width <= _INT32_MAX:
                raise ConfigError(
                    f"wide_components is {width}; it must be a multiple of {_WIDE_STEP}, at least first = {g.first}"
                )
            _vector("classes", g.classes, (torch.uint8,), rank)
            _vector("centroid", g.centroid, (torch.float32,), rank)
            _vector("scale", g.scale, (torch.int32,), rank)
            _vector("bias", g.bias, (torch.int32,), rank)
            _matrix("wide", g.wide, (torch.float16,), tokens, min(width, rank))
            _matrix("narrow", g.narrow, (torch.int8,), tokens, max(rank - width, 0))
            for name, x in (("wide", g.wide), ("narrow", g.narrow)):
                if x.data_ptr() % 16 or x.stride(0) * x.itemsize % 16:
                    raise ConfigError(f"{name}'s rows must start at multiples of 16 bytes; strides {x.stride()}")
            _same_device(g.classes, g.centroid, g.scale, g.bias, g.wide, g.narrow)
            rows.append(
                [g.classes.data_ptr(), g.centroid.data_ptr(), g.scale.data_ptr(), g.bias.data_ptr(), g.wide.data_ptr(),
                 g.wide.stride(0), g.narrow.data_ptr(), g.narrow.stride(0), rank, width, g.first]
            )  # fmt: skip
            assert len(rows[-1]) == PLACES
        kept = tuple(x for g in groups for x in (g.classes, g.centroid, g.scale, g.bias, g.wide, g.narrow))
        return cls(torch.tensor(rows, dtype=torch.int64).to(groups[0].wide.device), tokens, kept)


def decode_levels_device(
    words: Tensor,
    starts: Tensor,
    lengths: Tensor,
    tables: DeviceTables,
    groups: LevelGroups,
    bad: Tensor,
    *,
    factors: Tensor,
    offsets: Tensor | None = None,
    lanes_per_token: int = 1,
    group: int = 0,
    row: int = 0,
) -> None:
    """Decode straight to the inverse transform's operands, layer groups from ``group`` on side by side;
    ``reference.levels`` is the same on the CPU.

    starts: int64, lengths: int32, bad (out): int32 [G, T * S]; factors: float32, offsets: int8 [G, T]: as for
    ``decode_symbols_device``, any row stride. Token i's levels go to row ``row`` + i. With q a component's symbol, and
    0 wherever q is 0:

    wide (out): sign(q) * (|q| - centroid[j]), from component ``first`` on times the token's factor, computed in
        float32, its magnitude 65504 at most.
    narrow (out): column j - W: sign(q) * clamp((min(|q|, 2047) * scale[j] - bias[j] + 32768) >> 16, 0, 127) in int32,
        which must not overflow.
    Further columns are left alone.
    """
    count, lanes = starts.shape if starts.dim() == 2 else (0, -1)
    tokens = lanes // lanes_per_token if lanes_per_token > 0 else 0
    _check_lanes(words, lanes_per_token)
    _vector("words", words, _WORDS, words.shape[0])
    for name, x, dtype, columns in (
        ("starts", starts, torch.int64, tokens * lanes_per_token),
        ("lengths", lengths, torch.int32, tokens * lanes_per_token),
        ("bad", bad, torch.int32, tokens * lanes_per_token), ("factors", factors, torch.float32, tokens),
        *([] if offsets is None else [("offsets", offsets, torch.int8, tokens)]),
    ):  # fmt: skip
        if x.dtype != dtype or x.shape != (count, columns) or (x.shape[1] > 1 and x.stride(1) != 1):
            raise ConfigError(f"{name} must be {dtype} [{count}, {columns}]; got {x.dtype} {tuple(x.shape)}")
    if not 0 <= row <= groups.tokens - tokens or not 0 <= group <= len(groups.places) - count:
        raise ConfigError(
            f"rows {row} to {row + tokens} of layer groups {group} to {group + count} are asked for; there are "
            f"{groups.tokens} and {len(groups.places)}"
        )
    if tokens * lanes_per_token > _MOST:
        raise ConfigError(f"{tokens} tokens are too many for one call: use several")
    _same_device(words, starts, lengths, tables.decode, groups.places, bad, factors, offsets)
    if not count or not tokens:
        return
    from dynamo_kvtc.ops.rans import triton as kernels

    shifts = factors if offsets is None else offsets
    kernels.decode_levels_kernel[(-(-lanes // BLOCK_LANES), count)](
        _raw(words), words.shape[0], starts, lengths, shifts, factors, bad, starts.stride(0), lengths.stride(0),
        shifts.stride(0), factors.stride(0), bad.stride(0), groups.places[group:], row, tables.decode, tables.coarse,
        tables.slots, tables.shift, tokens, tables.classes - 1, tables.alphabet, BLOCK=BLOCK_LANES, S=lanes_per_token,
        GROUPS=_least_groups(lanes_per_token), OFFSETS=offsets is not None, num_warps=1,
        enable_fp_fusion=False,
    )  # fmt: skip


def _least_groups(split: int) -> int:
    """Chunks of at least 16 components: 16 bytes of a row at a time, and the wide ones are a multiple of that."""
    return max(1, _WIDE_STEP // (4 * split))


def _raw(x: Tensor) -> Tensor:
    """The same bytes under a dtype that every version of Triton takes."""
    return x.view(torch.int16 if x.element_size() == 2 else torch.uint8)


def _streams(
    words: Tensor, starts: Tensor, lengths: Tensor, classes: Tensor, tables: DeviceTables, bad: Tensor,
    offsets: Tensor | None, first: int, lanes_per_token: int,
) -> int:  # fmt: skip
    """Number of lanes, once what both decoders take is checked."""
    tokens = lengths.shape[0] // lanes_per_token if lanes_per_token > 0 else 0
    lanes = _common(words, classes, tables, offsets, first, lanes_per_token, tokens)
    _vector("words", words, _WORDS, words.shape[0])
    _vector("starts", starts, (torch.int64,), lanes)
    _vector("lengths", lengths, (torch.int32,), lanes)
    _vector("bad", bad, (torch.int32,), lanes)
    return lanes


def _common(
    on: Tensor, classes: Tensor, tables: DeviceTables, offsets: Tensor | None, first: int, lanes_per_token: int,
    tokens: int,
) -> int:  # fmt: skip
    """Number of lanes, once what all three functions take is checked."""
    _check_lanes(on, lanes_per_token)
    _vector("classes", classes, _CLASSES, classes.shape[0])
    if offsets is not None:
        _vector("offsets", offsets, (torch.int8,), tokens)
    if not 0 <= first <= _INT32_MAX:
        raise ConfigError(f"first is {first}; it must be from 0 to {_INT32_MAX}")
    # The kernels count lanes and components, up to the end of their last chunk, in 32 bits.
    if tokens * lanes_per_token > _MOST or classes.shape[0] > _MOST:
        raise ConfigError(f"{tokens} tokens of {classes.shape[0]} components are too many for one call: use several")
    return tokens * lanes_per_token


def _check_lanes(on: Tensor, lanes_per_token: int) -> None:
    if lanes_per_token not in LANES_PER_TOKEN:
        raise ConfigError(f"lanes_per_token is {lanes_per_token}; it must be one of {LANES_PER_TOKEN}")
    if not on.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(f"no kernels for tensors on {on.device}: use encode_lanes or decode_lanes on numpy arrays")


def _vector(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], size: int) -> None:
    if x.dtype not in dtypes or x.shape != (size,) or (size > 1 and x.stride(0) != 1):
        raise ConfigError(f"{name} must be {_names(dtypes)} [{size}], contiguous; got {x.dtype} {tuple(x.shape)}")


def _matrix(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], rows: int, columns: int) -> None:
    """A matrix of at least that many columns, beside each other in memory, whose rows do not overlap."""
    fits = x.dtype in dtypes and x.dim() == 2 and x.shape[0] == rows and columns <= x.shape[1] <= _INT32_MAX
    if not fits or (x.shape[1] > 1 and x.stride(1) != 1) or (rows > 1 and x.stride(0) < x.shape[1]):
        raise ConfigError(
            f"{name} must be {_names(dtypes)} [{rows}, {columns} or more] with its columns beside each other; got "
            f"{x.dtype} {tuple(x.shape)} of strides {x.stride()}"
        )


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _same_device(*tensors: Tensor | None) -> None:
    devices = {str(x.device) for x in tensors if x is not None}
    if len(devices) > 1:
        raise ConfigError(f"the tensors are on {', '.join(sorted(devices))}; they must be on one device")
