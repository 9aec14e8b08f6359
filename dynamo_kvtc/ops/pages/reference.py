"""The pages in torch: what the kernels are compared with, and what a CPU engine's cache is read and written by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamo_kvtc.ops.pages.cache import PagedCache
from dynamo_kvtc.ops.pages.fixed import INPUT_MAX, NARROW_MAX, FixedInputs, FixedRows
from dynamo_kvtc.types import RopeSpec


def gather_fixed(
    cache: PagedCache, layers: tuple[int, int], slots: Tensor, cos: Tensor, sin: Tensor, rope: RopeSpec,
    inputs: FixedInputs, out: FixedRows,
) -> None:  # fmt: skip
    rows = _read_rows(cache, layers, slots)
    _turn_keys(rows, cache.head_dim, cos, -sin, rope, 1.0 / rope.attention_scaling)
    fixed = ((rows - inputs.mean) * inputs.gain).round()
    # NaN compares false, so "not inside" catches it together with overflow.
    out.saturated.copy_((~(fixed.abs() <= INPUT_MAX)).any(dim=1))
    exact = fixed.nan_to_num(0.0).clamp(-INPUT_MAX, INPUT_MAX).to(torch.int32)
    out.energy.copy_(exact.to(torch.int64).square().sum(dim=1))
    # The lower byte of a wide input is what int8 keeps of it: -128 to 127, and a multiple of 256 below the input.
    wide = inputs.wide_slot >= 0
    out.low[:, : rows.shape[1]] = torch.where(wide, exact, exact.clamp(-NARROW_MAX, NARROW_MAX)).to(torch.int8)
    out.high[:, inputs.wide_slot[wide].long()] = ((exact[:, wide] + 128) >> 8).to(torch.int8)


def scatter_rows(
    cache: PagedCache, layers: tuple[int, int], slots: Tensor, rows: Tensor, cos: Tensor, sin: Tensor, rope: RopeSpec,
    keep: Tensor,
) -> None:  # fmt: skip
    rows = rows.clone()
    _turn_keys(rows, cache.head_dim, cos, sin, rope, rope.attention_scaling)
    # A value next to the dtype's largest must not come back as infinity.
    top = torch.finfo(cache.dtype).max
    parts = rows.clamp(-top, top).to(cache.dtype).unflatten(1, (2, layers[1] - layers[0], cache.heads, cache.head_dim))
    kept = (keep != 0) & _there(cache, slots)
    block, offset = _place(cache, slots[kept])
    for part, views in enumerate((cache.k, cache.v)):
        for index, view in enumerate(views[slice(*layers)]):
            view[block, :, offset] = parts[kept, part, index]


def move_exact(
    cache: PagedCache, groups: Sequence[tuple[int, int]], slots: Tensor, base: Tensor, index: Tensor, count: Tensor,
    buffer: Tensor, to_pages: bool,
) -> None:  # fmt: skip
    """``gather_exact``, or ``scatter_exact`` with to_pages, a token at a time and a head's D values at a time."""
    for layers, own in zip(groups, base, strict=True):
        _move_exact(cache, layers, slots, own, index, count, buffer, to_pages)


def _move_exact(
    cache: PagedCache, layers: tuple[int, int], slots: Tensor, base: Tensor, index: Tensor, count: Tensor,
    buffer: Tensor, to_pages: bool,
) -> None:  # fmt: skip
    size = cache.head_dim * cache.dtype.itemsize
    rows = zip(slots.tolist(), base.tolist(), index.tolist(), count.tolist(), strict=True)
    for slot, start, place, of in rows:
        there = 0 <= slot < cache.slots
        if to_pages and not there:
            continue
        block, offset = divmod(slot if there else 0, cache.tokens_per_block)
        piece = start + place * size
        for k, v in zip(cache.k[slice(*layers)], cache.v[slice(*layers)], strict=True):
            for head in range(cache.heads):
                for view in (k, v):
                    values = view[block, head, offset].view(torch.uint8)
                    if 0 <= piece <= buffer.numel() - size and piece % 2 == 0:
                        if to_pages:
                            values.copy_(buffer[piece : piece + size])
                        else:
                            buffer[piece : piece + size] = values if there else 0
                    piece += of * size


def _read_rows(cache: PagedCache, layers: tuple[int, int], slots: Tensor) -> Tensor:
    """float32 [T, P]; NaN where there is no such slot."""
    there = _there(cache, slots)
    block, offset = _place(cache, torch.where(there, slots, 0))
    parts = [view[block, :, offset].float() for views in (cache.k, cache.v) for view in views[slice(*layers)]]
    rows = torch.stack(parts, dim=1).flatten(1)
    rows[~there] = float("nan")
    return rows


def _turn_keys(rows: Tensor, dim: int, cos: Tensor, sin: Tensor, rope: RopeSpec, gain: float) -> None:
    """Rotates the first half of the channels in place. Every product and sum is an operation of its own, as in
    ``ops/rope``: nothing is fused, so every device rounds alike."""
    keys = rows[:, : rows.shape[1] // 2].unflatten(1, (-1, dim))
    n = cos.shape[1]
    first, second = slice(0, n), slice(n, 2 * n)
    if rope.style == "interleaved":
        first, second = slice(0, 2 * n, 2), slice(1, 2 * n, 2)
    a, b = keys[..., first].clone(), keys[..., second].clone()
    cos, sin = cos[:, None], sin[:, None]
    keys[..., first] = (a * cos - b * sin) * gain
    keys[..., second] = (b * cos + a * sin) * gain


def _there(cache: PagedCache, slots: Tensor) -> Tensor:
    return (slots >= 0) & (slots < cache.slots)


def _place(cache: PagedCache, slots: Tensor) -> tuple[Tensor, Tensor]:
    return slots // cache.tokens_per_block, slots % cache.tokens_per_block
