"""Compiles ahead what a codec may need on a GPU, so that no request waits for a compiler."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamo_kvtc.codec.paged import Blocks, PagedCodec
from dynamo_kvtc.ops.pages import scatter_rows
from dynamo_kvtc.ops.project.device import each_tile

_BLOCKS = 32


def compile_all(codec: PagedCodec, arena: Tensor) -> None:
    """Some pages are coded, decoded, and put back; nobody else may use them meanwhile. arena: as ``encode``'s.

    What a kernel is compiled for (``do_not_specialize``) must not depend on how many blocks there are: two numbers of
    them stand for all, with sinks and without, coded and exact.
    """
    cache = codec.cache
    raw = cache.tokens_per_block * codec.artifact.shape.bytes_per_token
    # Should all of them be exact for some reason, they fit twice.
    most = min(_BLOCKS, cache.slots // cache.tokens_per_block, len(arena) // (2 * raw))
    if not most:
        return
    pages = [view for views in (cache.k, cache.v) for view in views]
    kept = [view[:most].clone() for view in pages]
    for _ in each_tile(cache.device):
        for n, first, exact in ((1, 0, False), (1, 1, True), (most, 0, False), (most, 1, False)):
            blocks = _blocks(codec, n, first, exact)
            _fill(codec, blocks)
            _finish(codec)
            encoded = codec.encode(blocks, arena, 0)
            encoded.finish()
            codec.decode(arena, encoded.offsets, encoded.sizes, blocks).finish()
    for view, before in zip(pages, kept, strict=True):
        view[:most] = before
    _finish(codec)


def _blocks(codec: PagedCodec, count: int, first: int, exact: bool) -> Blocks:
    """The cache's first pages, as if they were a sequence's from block ``first`` on."""
    tokens = codec.cache.tokens_per_block
    slots = torch.arange(count * tokens)
    return Blocks.uniform(
        slots, slots + first * tokens, tokens, torch.ones(len(slots), dtype=torch.bool) if exact else None
    )


def _fill(codec: PagedCodec, blocks: Blocks) -> None:
    """Writes the calibrated mean: it can be coded whatever the model is."""
    cache, rope = codec.cache, codec.artifact.manifest.rope
    assert blocks.positions is not None
    slots = blocks.slots.to(cache.device)
    cos, sin = codec.rotations.at(blocks.positions.to(cache.device))
    keep = torch.ones(len(slots), dtype=torch.uint8, device=cache.device)
    groups: Sequence = codec.point.groups
    for group, layers in zip(groups, codec.artifact.manifest.groups, strict=True):
        rows = group.inputs.mean.expand(len(slots), -1).contiguous()
        scatter_rows(cache, layers, slots, rows, cos, sin, rope, keep)


def _finish(codec: PagedCodec) -> None:
    if codec.cache.device.type == "cuda":
        torch.cuda.current_stream(codec.cache.device).synchronize()
