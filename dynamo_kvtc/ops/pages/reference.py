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
    for index, layer in enumerate(range(*layers)):
        there, block, offset = _place(cache, slots, layer)
        kept = (keep != 0) & there
        for part, views in enumerate((cache.k, cache.v)):
            views[layer][block[kept], :, offset[kept]] = parts[kept, part, index]


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
    for number, layer in enumerate(range(*layers)):
        places = (x.tolist() for x in _place(cache, slots, layer))
        rows = zip(*places, base.tolist(), index.tolist(), count.tolist(), strict=True)
        for there, block, offset, start, place, of in rows:
            piece = start + (number * 2 * cache.heads * of + place) * size
            for head in range(cache.heads):
                for view in (cache.k[layer], cache.v[layer]):
                    values = view[block, head, offset].view(torch.uint8)
                    if 0 <= piece <= buffer.numel() - size and piece % 2 == 0:
                        if not to_pages:
                            buffer[piece : piece + size] = values if there else 0
                        elif there:
                            values.copy_(buffer[piece : piece + size])
                    piece += of * size


def _read_rows(cache: PagedCache, layers: tuple[int, int], slots: Tensor) -> Tensor:
    """float32 [T, P]; NaN where there is no such slot."""
    places = {layer: _place(cache, slots, layer) for layer in range(*layers)}
    parts = []
    for views in (cache.k, cache.v):
        for layer, (there, block, offset) in places.items():
            part = views[layer][block, :, offset].float()
            part[~there] = float("nan")
            parts.append(part)
    return torch.stack(parts, dim=1).flatten(1)


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


def _place(cache: PagedCache, slots: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whether each slot is there in that layer, its page (0 if it is not) and its place within."""
    there = (slots >= 0) & (slots < cache.slots)
    slots = torch.where(there, slots, 0)
    page = slots // cache.tokens_per_block
    if cache.table is not None:
        page = cache.table.of(layer, page)
        there &= page >= 0
    return there, torch.where(there, page, 0), slots % cache.tokens_per_block
