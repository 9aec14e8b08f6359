"""An engine's paged cache: tokens out of it, ready for the transform or bit-exact, and back into it.

Tokens are addressed by slot: block * tokens per block + place in the block, as engines' slot mappings are. Rows hold
the channels of layers [start, end): all of K, then all of V, layer slowest, then head, then head dim.

On a GPU nothing here waits for it: slots there cannot be looked at, so one that the cache does not have reads as a
saturated token and is never written. Where slots are on a CPU, use ``check_slots`` first.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops.pages import reference
from dynamo_kvtc.ops.pages.cache import PagedCache
from dynamo_kvtc.ops.pages.fixed import INPUT_MAX, NARROW_MAX, FixedInputs, FixedRows
from dynamo_kvtc.types import RopeSpec

__all__ = [
    "INPUT_MAX", "NARROW_MAX", "FixedInputs", "FixedRows", "PagedCache", "check_slots", "gather_exact", "gather_fixed",
    "scatter_exact", "scatter_rows", "slots_of",
]  # fmt: skip


def slots_of(block_table: Tensor, tokens_per_block: int) -> Tensor:
    """Slots of all tokens of a sequence's blocks, in order: int64 [n * tokens_per_block].

    block_table: int32 or int64 [n], on any device. Raises ConfigError for others.
    """
    if block_table.dtype not in (torch.int32, torch.int64) or block_table.dim() != 1 or tokens_per_block < 1:
        raise ConfigError(
            f"a block table is int32 or int64 [n] of blocks of 1 token or more; got {block_table.dtype} "
            f"{tuple(block_table.shape)}, {tokens_per_block} tokens a block"
        )
    places = torch.arange(tokens_per_block, device=block_table.device)
    return (block_table.long()[:, None] * tokens_per_block + places).flatten()


def check_slots(cache: PagedCache, slots: Tensor, written: bool = False) -> None:
    """Raises ConfigError unless slots, int64 [T] on a CPU, are all the cache's and, if written, none comes twice."""
    if slots.device.type != "cpu" or slots.dtype != torch.int64 or slots.dim() != 1:
        raise ConfigError(f"check_slots takes int64 [T] on a CPU; got {slots.dtype} {tuple(slots.shape)} there")
    if not slots.numel():
        return
    first, last = int(slots.min()), int(slots.max())
    if first < 0 or last >= cache.slots:
        raise ConfigError(f"slots run from {first} to {last}; the cache has {cache.slots}: was it resized?")
    if written and not _distinct(slots, cache.slots):
        raise ConfigError("a slot is written twice: give every token its own")


def _distinct(slots: Tensor, count: int) -> bool:
    """Whether no slot comes twice. Marking them in a cache's worth of bytes is faster than sorting them."""
    seen = np.zeros(count, dtype=np.bool_)
    seen[slots.numpy()] = True
    return int(np.count_nonzero(seen)) == len(slots)


def gather_fixed(
    cache: PagedCache, layers: tuple[int, int], slots: Tensor, cos: Tensor, sin: Tensor, rope: RopeSpec,
    inputs: FixedInputs, out: FixedRows,
) -> None:  # fmt: skip
    """Channels of tokens in the pages as integers: round_half_even((x - mean) * gain), K with RoPE removed.

    layers: [start, end) of the layer group; slots: int64 [T]; cos, sin: float32 [T, n], ``ops.rope.Rotations`` at the
    tokens' positions; rope: style and attention_scaling, n its frequencies; inputs, out: see there. All float32
    operations are rounded on their own, so ``out`` is the same bit for bit on every device.
    Raises ConfigError if shapes, dtypes or devices disagree. Allocates nothing.
    """
    channels = _check_group(cache, layers)
    tokens = _check_tokens(cache, slots, cos, sin, rope)
    if inputs.mean.shape != (channels,) or inputs.wide_heads.shape[0] * cache.head_dim != channels:
        raise ConfigError(
            f"inputs are for {inputs.mean.shape[0]} channels, {inputs.wide_heads.shape[0]} heads; layers {layers} of "
            f"the cache have {channels} in heads of {cache.head_dim}"
        )
    _check_tensor("inputs", inputs.mean, torch.float32, cache.device)
    for name, rows, columns in (("low", out.low, channels), ("high", out.high, inputs.wide)):
        _check_rows(name, rows, torch.int8, tokens, columns, cache.device)
    _check_tensor("energy", out.energy, torch.int64, cache.device, tokens)
    _check_tensor("saturated", out.saturated, torch.uint8, cache.device, tokens)
    _backend(cache).gather_fixed(cache, layers, slots, cos, sin, rope, inputs, out)


def scatter_rows(
    cache: PagedCache, layers: tuple[int, int], slots: Tensor, rows: Tensor, cos: Tensor, sin: Tensor, rope: RopeSpec,
    keep: Tensor,
) -> None:  # fmt: skip
    """Decoded channels into the pages: RoPE applied to K, clamped to the dtype's largest finite value, rounded to it.

    rows: float32 [T, P], rows contiguous; keep: uint8 [T], 0 for tokens that are not to be written, as those of a
    slot below 0 or beyond the cache are not. NaN stays NaN. No slot may come twice. The rest as in ``gather_fixed``.
    """
    channels = _check_group(cache, layers)
    tokens = _check_tokens(cache, slots, cos, sin, rope)
    _check_rows("rows", rows, torch.float32, tokens, channels, cache.device, wider=False)
    _check_tensor("keep", keep, torch.uint8, cache.device, tokens)
    _backend(cache).scatter_rows(cache, layers, slots, rows, cos, sin, rope, keep)


def gather_exact(
    cache: PagedCache, groups: Sequence[tuple[int, int]], slots: Tensor, base: Tensor, index: Tensor, count: Tensor,
    buffer: Tensor,
) -> None:  # fmt: skip
    """Bytes of exact tokens, out of the pages into records' sections: [Lg, H, 2, E, D] for each record and layer group.

    groups: G layer groups [start, end) that follow each other; slots: int64 [X]; base: int64 [G, X]; index, count:
    int32 [X]. For each token base is the byte in ``buffer`` where its record's exact part of a group starts, count that
    record's exact tokens E, index its number among them.
    buffer: uint8 [n], contiguous, on the cache's device or in pinned memory, at an even address. Values that
    would lie outside it or at an odd byte are left out; a slot that the cache does not have gives zeros.
    Raises ConfigError if shapes, dtypes or devices disagree.
    """
    _check_exact(cache, groups, slots, base, index, count, buffer)
    _backend(cache).move_exact(cache, groups, slots, base, index, count, buffer, False)


def scatter_exact(
    cache: PagedCache, groups: Sequence[tuple[int, int]], slots: Tensor, base: Tensor, index: Tensor, count: Tensor,
    buffer: Tensor,
) -> None:  # fmt: skip
    """The inverse of ``gather_exact``: from records' sections into the pages. No slot may come twice."""
    _check_exact(cache, groups, slots, base, index, count, buffer)
    _backend(cache).move_exact(cache, groups, slots, base, index, count, buffer, True)


def _backend(cache: PagedCache) -> ModuleType:
    """The module that works where the cache is."""
    if cache.device.type != "cuda":
        return reference
    from dynamo_kvtc.ops.pages import triton

    return triton


def _check_group(cache: PagedCache, layers: tuple[int, int]) -> int:
    start, end = layers
    if not 0 <= start < end <= cache.layers:
        raise ConfigError(f"layers [{start}, {end}) are asked for; the cache has {cache.layers}")
    return cache.channels(layers)


def _check_tokens(cache: PagedCache, slots: Tensor, cos: Tensor, sin: Tensor, rope: RopeSpec) -> int:
    tokens = slots.shape[0] if slots.dim() == 1 else -1
    _check_tensor("slots", slots, torch.int64, cache.device, tokens)
    if rope.rotary_dim > cache.head_dim:
        raise ConfigError(f"RoPE rotates {rope.rotary_dim} dims but the head has {cache.head_dim}")
    for name, x in (("cos", cos), ("sin", sin)):
        _check_tensor(name, x, torch.float32, cache.device, tokens, len(rope.inv_freq))
    return tokens


def _check_exact(
    cache: PagedCache, groups: Sequence[tuple[int, int]], slots: Tensor, base: Tensor, index: Tensor, count: Tensor,
    buffer: Tensor,
) -> None:  # fmt: skip
    for layers in groups:
        _check_group(cache, layers)
    if not groups or any(a[1] != b[0] for a, b in itertools.pairwise(groups)):
        raise ConfigError(f"layer groups {list(groups)} are asked for; they must follow each other, one at least")
    tokens = slots.shape[0] if slots.dim() == 1 else -1
    _check_tensor("base", base, torch.int64, cache.device, len(groups), tokens)
    for name, x, dtype in (
        ("slots", slots, torch.int64), ("index", index, torch.int32), ("count", count, torch.int32),
    ):  # fmt: skip
        _check_tensor(name, x, dtype, cache.device, tokens)
    here = buffer.device == cache.device or (buffer.device.type == "cpu" and buffer.is_pinned())
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous() or not here:
        raise ConfigError(
            f"buffer must be uint8 [n], contiguous, on {cache.device} or pinned; got {buffer.dtype} "
            f"{tuple(buffer.shape)} on {buffer.device}"
        )
    if buffer.data_ptr() % 2:
        raise ConfigError(f"buffer starts at the odd address {buffer.data_ptr():#x}; sections start at even ones")


def _check_tensor(name: str, x: Tensor, dtype: torch.dtype, device: torch.device, *shape: int) -> None:
    """Contiguous; no shape means any."""
    if x.dtype != dtype or x.device != device or not x.is_contiguous() or (shape and tuple(x.shape) != shape):
        raise ConfigError(
            f"{name} must be {dtype} {list(shape) or ''}, contiguous, on {device}; got {x.dtype} {tuple(x.shape)} of "
            f"strides {x.stride()} on {x.device}"
        )


def _check_rows(
    name: str, x: Tensor, dtype: torch.dtype, tokens: int, columns: int, device: torch.device, wider: bool = True
) -> None:
    fits = x.dim() == 2 and x.shape[0] == tokens and (x.shape[1] >= columns if wider else x.shape[1] == columns)
    if not fits or x.dtype != dtype or x.device != device or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ConfigError(
            f"{name} must be {dtype} [{tokens}, {columns}{' or more' if wider else ''}] of contiguous rows on {device};"
            f" got {x.dtype} {tuple(x.shape)} of strides {x.stride()} on {x.device}"
        )
