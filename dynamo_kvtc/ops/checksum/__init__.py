"""CRC-32 as zlib's (reflected polynomial 0xEDB88320, all ones at the start, inverted at the end).

On a GPU the sum comes with a copy: every byte is read once, moved and summed. Both sides may lie in pinned host memory,
which the GPU reads and writes over its link.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError, MissingDependencyError
from dynamo_kvtc.ops.checksum import reference

MAX_BYTES = 2**32 - 1
"""Longest range, as long as the longest record."""

_MAX_PROGRAMS = 2**31 - 1

__all__ = ["MAX_BYTES", "copy_addresses_device", "copy_ranges", "copy_ranges_device", "crc32"]


crc32 = reference.crc32
"""The checksum of bytes, 0 to 2**32 - 1. zlib's own: a restore calls it once a record, where a layer shows."""


def copy_ranges(
    source: Tensor, source_start: Tensor, size: Tensor, target: Tensor | None, target_start: Tensor | None, crc: Tensor
) -> None:
    """What ``copy_ranges_device`` does, slowly and on any device."""
    _check(source_start, size, target, target_start, crc, 0)
    reference.copy_ranges(source, source_start, size, target, target_start, crc)


def copy_ranges_device(
    source: Tensor, source_start: Tensor, size: Tensor, target: Tensor | None, target_start: Tensor | None,
    crc: Tensor, max_size: int,
) -> None:  # fmt: skip
    """Copies N byte ranges and takes their checksums in one pass. Asynchronous, on the current stream.

    source, target: uint8 [bytes], contiguous, on the GPU or in pinned host memory; target None: only sums.
    source_start, size, target_start: int64 [N] on the GPU, in bytes, of any alignment; target_start as target is.
    crc: int32 [N] on the GPU, written (its bits are the unsigned checksum; what was there does not matter).
    max_size: at least every size, at most MAX_BYTES; time grows with N * max_size where sizes differ much. A size
        below 0 or above it is cut to 0 or to it.

    That ranges lie inside source and target, and that what is written does not overlap what is read or written
    elsewhere, is the caller's promise: they are on the GPU, where they cannot be checked without waiting. No byte
    outside is written; the aligned 16 bytes around a range's ends may be read. Allocates nothing after the first call
    on a device. Raises ConfigError for another dtype, shape or place, MissingDependencyError without triton.
    """
    _check(source_start, size, target, target_start, crc, max_size)
    host = _is_host("source", source, crc)
    _launch(source.data_ptr(), source_start, size, target, target_start, crc, max_size, host)


def copy_addresses_device(
    source_address: Tensor, size: Tensor, target: Tensor | None, target_start: Tensor | None, crc: Tensor,
    max_size: int, source_is_host: bool,
) -> None:  # fmt: skip
    """``copy_ranges_device`` for ranges that lie anywhere: source_address int64 [N] on the GPU, each an address that
    the GPU can read; source_is_host: they are in pinned host memory, to be read in whole lines.
    """
    _check(source_address, size, target, target_start, crc, max_size)
    _launch(0, source_address, size, target, target_start, crc, max_size, source_is_host)


def _launch(
    base: int, start: Tensor, size: Tensor, target: Tensor | None, target_start: Tensor | None, crc: Tensor,
    max_size: int, source_is_host: bool,
) -> None:  # fmt: skip
    if target is not None:
        _is_host("target", target, crc)
    kernels = _kernels(crc)
    if not len(crc):
        return
    programs = len(crc) * kernels.chunks_of(max_size)
    if programs > _MAX_PROGRAMS:
        raise ConfigError(f"{len(crc)} ranges of up to {max_size} bytes need {programs} programs; split the call")
    kernels.copy(
        base, start, size, 0 if target is None else target.data_ptr(), target_start, crc, max_size,
        by_target=target is not None and not source_is_host,
    )  # fmt: skip


def _check(
    start: Tensor, size: Tensor, target: Tensor | None, target_start: Tensor | None, crc: Tensor, max_size: int
) -> None:
    if (target is None) != (target_start is None):
        raise ConfigError("target and target_start go together; only one of them is None")
    if crc.dim() != 1 or crc.dtype != torch.int32 or not crc.is_contiguous():
        raise ConfigError(f"crc must be int32 [N], contiguous; got {crc.dtype} {tuple(crc.shape)}")
    for name, x in (("the ranges' starts", start), ("size", size), ("target_start", target_start)):
        if x is None:
            continue
        if x.dtype != torch.int64 or x.shape != crc.shape or x.device != crc.device or not x.is_contiguous():
            raise ConfigError(
                f"{name} must be int64 {tuple(crc.shape)} on {crc.device}, contiguous; "
                f"got {x.dtype} {tuple(x.shape)} on {x.device}"
            )
    if not 0 <= max_size <= MAX_BYTES:
        raise ConfigError(f"max_size is {max_size}; it must be 0 to {MAX_BYTES}")


def _is_host(name: str, x: Tensor, crc: Tensor) -> bool:
    """Whether x is host memory, which must be pinned for a GPU to see it."""
    if x.dtype != torch.uint8 or x.dim() != 1 or not x.is_contiguous():
        raise ConfigError(f"{name} must be uint8 [bytes], contiguous; got {x.dtype} {tuple(x.shape)}")
    if x.device == crc.device:
        return False
    if x.device.type != "cpu" or not x.is_pinned():
        raise ConfigError(
            f"{name} is on {x.device}; it must be on {crc.device} or in pinned host memory (pin_memory())"
        )
    return True


def _kernels(crc: Tensor) -> ModuleType:
    if not crc.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(f"crc is on {crc.device}; this needs an NVIDIA GPU (copy_ranges works anywhere)")
    try:
        from dynamo_kvtc.ops.checksum import triton
    except ImportError as exc:
        raise MissingDependencyError("checksums on a GPU need triton: pip install dynamo-kvtc[gpu]") from exc
    return triton
