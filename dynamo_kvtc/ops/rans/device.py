"""The coder on the GPU: what is checked before its kernels are launched.

Nothing here allocates or waits for the device. Tensors are checked by shape, dtype and stride; what they hold (lane
starts and lengths, classes) is checked by the kernels, which report a lane they cannot use instead of touching memory
outside it.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops.rans.tables import LANES_PER_TOKEN, DeviceTables

_WORDS = (torch.int16, torch.uint16)
_CLASSES = (torch.uint8, torch.int32)
_FLAGS = (torch.bool, torch.uint8)
_WIDE_STEP = 16
_INT32_MAX = 2**31 - 1
_MOST = 2**29

BLOCK_LANES = 32
"""Lanes of a program: one or more per thread of its warp."""
COARSE = True
"""Look a slot up among 256 cells first: a warp's reads then fall on few cache lines, and only a cell that is mixed
costs a second read."""


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
    if lanes:
        _encode(symbols, classes, tables, words, lengths, offsets, skip, first, lanes_per_token)


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
    if lanes:
        _decode(words, starts, lengths, classes, tables, bad, offsets, first, lanes_per_token, symbols=symbols)


def decode_levels_device(
    words: Tensor,
    starts: Tensor,
    lengths: Tensor,
    classes: Tensor,
    tables: DeviceTables,
    wide: Tensor,
    narrow: Tensor,
    bad: Tensor,
    *,
    centroid: Tensor,
    scale: Tensor,
    bias: Tensor,
    factor: Tensor,
    wide_components: int,
    offsets: Tensor | None = None,
    first: int = 0,
    lanes_per_token: int = 1,
) -> None:
    """Decode straight to the inverse transform's operands; ``reference.levels`` is the same on the CPU.

    The first W = wide_components (a multiple of 16, at least ``first``) components go to ``wide``, the others to
    ``narrow``; with q a component's symbol, and 0 wherever q is 0:

    wide (out): float16 [T, min(W, R) or more], sign(q) * (|q| - centroid[j]), from component ``first`` on times factor,
        computed in float32, its magnitude 65504 at most.
    narrow (out): int8 [T, max(R - W, 0) or more], column j - W:
        sign(q) * clamp((min(|q|, 2047) * scale[j] - bias[j] + 32768) >> 16, 0, 127) in int32.
    Any row stride; further columns are left alone. bad (out) and the other arguments as for ``decode_symbols_device``.
    centroid: float32 [R]; factor: float32 [T]; scale, bias: int32 [R], in 2**-16 levels; the int32 arithmetic must not
    overflow.
    """
    lanes = _streams(words, starts, lengths, classes, tables, bad, offsets, first, lanes_per_token)
    rank = classes.shape[0]
    if wide_components % _WIDE_STEP or not first <= wide_components <= _INT32_MAX:
        raise ConfigError(
            f"wide_components is {wide_components}; it must be a multiple of {_WIDE_STEP}, at least first = {first}"
        )
    _matrix("wide", wide, (torch.float16,), lanes // lanes_per_token, min(wide_components, rank))
    _matrix("narrow", narrow, (torch.int8,), lanes // lanes_per_token, max(rank - wide_components, 0))
    _vector("centroid", centroid, (torch.float32,), rank)
    _vector("factor", factor, (torch.float32,), lanes // lanes_per_token)
    _vector("scale", scale, (torch.int32,), rank)
    _vector("bias", bias, (torch.int32,), rank)
    _same_device(
        words, starts, lengths, classes, tables.decode, wide, narrow, bad, centroid, scale, bias, factor, offsets
    )
    if lanes:
        _decode(
            words, starts, lengths, classes, tables, bad, offsets, first, lanes_per_token,
            levels=(wide, narrow, centroid, scale, bias, factor), wide_components=wide_components,
        )  # fmt: skip


def _encode(
    symbols: Tensor, classes: Tensor, tables: DeviceTables, words: Tensor, lengths: Tensor, offsets: Tensor | None,
    skip: Tensor | None, first: int, split: int, block: int = BLOCK_LANES,
) -> None:  # fmt: skip
    from dynamo_kvtc.ops.rans import triton as kernels

    kernels.encode_kernel[(-(-len(lengths) // block),)](
        symbols, symbols.stride(0), classes, offsets if offsets is not None else classes,
        _raw(skip) if skip is not None else classes, tables.encode, tables.shift, _raw(words), words.stride(0), lengths,
        len(symbols), classes.shape[0], first, tables.classes - 1, tables.encode.shape[1], tables.alphabet,
        words.shape[1], BLOCK=block, S=split, OFFSETS=offsets is not None, SKIP=skip is not None, num_warps=1,
    )  # fmt: skip


def _decode(
    words: Tensor, starts: Tensor, lengths: Tensor, classes: Tensor, tables: DeviceTables, bad: Tensor,
    offsets: Tensor | None, first: int, split: int, symbols: Tensor | None = None,
    levels: tuple[Tensor, ...] | None = None, wide_components: int = 0, block: int = BLOCK_LANES, groups: int = 0,
    coarse: bool = COARSE,
) -> None:  # fmt: skip
    from dynamo_kvtc.ops.rans import triton as kernels

    # Chunks of at least 16 components: 16 bytes of a row at a time, and the wide ones are a multiple of that.
    least = max(1, _WIDE_STEP // (4 * split))
    # An output that is not asked for is never touched: any tensor stands in for it.
    out = symbols if symbols is not None else bad
    wide, narrow, centroid, scale, bias, factor = levels if levels is not None else (bad,) * 6
    kernels.decode_kernel[(-(-len(lengths) // block),)](
        _raw(words), words.shape[0], starts, lengths, offsets if offsets is not None else classes, classes,
        tables.decode, tables.coarse, tables.slots, tables.shift, out, out.stride(0), wide, wide.stride(0), narrow,
        narrow.stride(0), bad, centroid, scale, bias, factor, len(lengths) // split, classes.shape[0], wide_components,
        first, tables.classes - 1, tables.alphabet, BLOCK=block, S=split, GROUPS=groups or least, WIDE_GROUPS=least,
        LEVELS=levels is not None, OFFSETS=offsets is not None, COARSE=coarse, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


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
    if lanes_per_token not in LANES_PER_TOKEN:
        raise ConfigError(f"lanes_per_token is {lanes_per_token}; it must be one of {LANES_PER_TOKEN}")
    if not on.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(f"no kernels for tensors on {on.device}: use encode_lanes or decode_lanes on numpy arrays")
    _vector("classes", classes, _CLASSES, classes.shape[0])
    if offsets is not None:
        _vector("offsets", offsets, (torch.int8,), tokens)
    if not 0 <= first <= _INT32_MAX:
        raise ConfigError(f"first is {first}; it must be from 0 to {_INT32_MAX}")
    # The kernels count lanes and components, up to the end of their last chunk, in 32 bits.
    if tokens * lanes_per_token > _MOST or classes.shape[0] > _MOST:
        raise ConfigError(f"{tokens} tokens of {classes.shape[0]} components are too many for one call: use several")
    return tokens * lanes_per_token


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
