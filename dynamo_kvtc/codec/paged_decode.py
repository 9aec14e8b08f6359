"""Decoding on the GPU path: see ``codec.paged``."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamo_kvtc.codec.headers import HeaderBatch, read_headers
from dynamo_kvtc.codec.kvtc_point import WIDE_STEP
from dynamo_kvtc.codec.lanes import OFFSET_CLASSES, OFFSET_NEUTRAL
from dynamo_kvtc.codec.mailbox import Mailbox
from dynamo_kvtc.codec.paged_groups import PagedGroup, operand
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops import lanes, quantize, rans
from dynamo_kvtc.ops.checksum import copy_ranges_device
from dynamo_kvtc.ops.pages import scatter_exact
from dynamo_kvtc.ops.project.device import synthesise_into_pages

if TYPE_CHECKING:
    from dynamo_kvtc.codec.paged import Blocks, PagedCodec

_RING = 3
"""Chunks whose records may be on the GPU at once: one being decoded, the others on their way."""


@dataclass
class Restore:
    """Blocks on their way into the pages.

    events: one per layer group, recorded when its layers of all sound blocks are in the pages (None on a CPU).
    Attention on them may start then, if ``finish`` (which waits for all) finds no block it needs unsound; a block that
    is not sound has no page written by the layer group that found it so, or by later ones.
    """

    events: list[Any]
    _status: Tensor
    _done: Any

    def wait(self, group: int) -> None:
        """Makes the current stream wait for a layer group. The host does not wait."""
        if self.events[group] is not None:
            torch.cuda.current_stream().wait_event(self.events[group])

    def finish(self) -> NDArray[np.int32]:
        """Waits for the GPU; int32 [B]: 0 for each block that is restored, else why not (``ops.lanes``,
        ``codec.headers``): it must be recomputed."""
        if self._done is not None:
            self._done.synchronize()
        return self._status.numpy().copy()


@dataclass(frozen=True)
class _Chunk:
    """Blocks [first, last) of the call, tokens of them, and the bytes of the arena that hold their records."""

    blocks: slice
    tokens: slice
    start: int
    end: int


class Decoder:
    """Workspace and launches: a stream that copies, a stream that computes."""

    def __init__(self, codec: PagedCodec) -> None:
        self._codec = codec
        self._device = device = codec.cache.device
        self._cuda = device.type == "cuda"
        groups, self._lanes = codec.point.groups, codec.point.lanes
        t = codec.limits.decode_tokens
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._copies = torch.cuda.Stream(device) if self._cuda else None
        # Where a layer group has no component of a kind, its product reads columns of zeros that are never written.
        self._narrow = [operand(t, g.narrow, torch.int8, device) for g in groups]
        self._wide = [operand(t, g.wide, torch.float16, device) for g in groups]
        self._ring = [torch.empty(codec.limits.record_bytes, dtype=torch.uint8, device=device) for _ in range(_RING)]
        self._free = [torch.cuda.Event() for _ in range(_RING)] if self._cuda else []
        self._starts = torch.empty(t * self._lanes, dtype=torch.int64, device=device)
        self._lengths = torch.empty(t * self._lanes, dtype=torch.int32, device=device)
        self._bad = torch.empty(t * self._lanes, dtype=torch.int32, device=device)
        self._parameters = torch.empty(t, dtype=torch.uint8, device=device)
        self._offsets = torch.empty(t, dtype=torch.int8, device=device)
        self._keep = torch.empty(t, dtype=torch.uint8, device=device)
        self._chosen = torch.empty(t, dtype=torch.int64, device=device)
        self._exact_slots = torch.empty(t, dtype=torch.int64, device=device)
        self._crc = torch.empty(t, dtype=torch.int32, device=device)
        self._mailbox = Mailbox(device, 256 + t * 120)

    @property
    def nbytes(self) -> int:
        """Bytes of workspace on the device."""
        own = [x for x in vars(self).values() if isinstance(x, Tensor)]
        own += [*self._narrow, *self._wide, *self._ring]
        return sum(x.untyped_storage().nbytes() for x in own) + self._mailbox.nbytes

    def decode(
        self, arena: Tensor, offsets: NDArray[np.int64], sizes: NDArray[np.int64], blocks: Blocks
    ) -> Restore:  # fmt: skip
        batch = read_headers(arena.numpy(), offsets, sizes, blocks.counts, self._codec.identity)
        chunks = self._plan(offsets, sizes, blocks.counts, batch)
        status = torch.empty(len(blocks.counts), dtype=torch.int32, device=self._device)
        host = torch.empty(len(blocks.counts), dtype=torch.int32, pin_memory=self._cuda)
        host.copy_(torch.from_numpy(batch.status))
        events: list[Any] = []
        done = None
        if self._stream is not None and self._copies is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            status.copy_(host, non_blocking=True)
            turn = 0
            for g, group in enumerate(self._codec.point.groups):
                for chunk in chunks:
                    self._group(arena, g, group, chunk, blocks, batch, status, turn % _RING)
                    turn += 1
                events.append(self._event())
            host.copy_(status, non_blocking=True)
            done = self._event()
        return Restore(events, host, done)

    def _event(self) -> Any:
        if not self._cuda:
            return None
        event = torch.cuda.Event(enable_timing=self._codec.marks is not None)
        event.record()
        return event

    def _plan(
        self, offsets: NDArray[np.int64], sizes: NDArray[np.int64], counts: NDArray[np.int32], batch: HeaderBatch
    ) -> list[_Chunk]:
        """Chunks of whole blocks that fit the workspace. Records that follow each other are copied at once."""
        limits, out = self._codec.limits, []
        start = token = 0
        sound = batch.status == 0
        # A record that is not sound moves nothing.
        low, high = np.where(sound, offsets, -1), np.where(sound, offsets + sizes, -1)
        while start < len(counts):
            end, tokens, first, last, own = start, 0, -1, -1, 0
            while end < len(counts) and (tokens + counts[end] <= limits.decode_tokens or end == start):
                lo, hi = (first, last)
                if sound[end]:
                    lo = int(low[end]) if first < 0 else min(first, int(low[end]))
                    hi = max(last, int(high[end]))
                    own += int(sizes[end])
                # Far apart in the arena, or too many bytes: another chunk.
                if end > start and hi - lo > min(limits.record_bytes, 2 * own + 4096):
                    own -= int(sizes[end]) if sound[end] else 0
                    break
                first, last = lo, hi
                tokens += int(counts[end])
                end += 1
            if tokens > limits.decode_tokens or last - first > limits.record_bytes:
                raise ConfigError(
                    f"a block of {tokens} tokens and {last - first} bytes; PagedLimits allows {limits.decode_tokens} "
                    f"tokens and {limits.record_bytes} bytes"
                )
            out.append(_Chunk(slice(start, end), slice(token, token + tokens), first, last))
            start, token = end, token + tokens
        return out

    def _group(
        self, arena: Tensor, g: int, group: PagedGroup, chunk: _Chunk, blocks: Blocks, batch: HeaderBatch,
        status: Tensor, turn: int,
    ) -> None:  # fmt: skip
        """One layer group of one chunk."""
        codec, own = self._codec, chunk.blocks
        counts, exact = blocks.counts[own], batch.exact[chunk.tokens]
        sound = batch.status[own] == 0
        block_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        coded = ~exact & sound[block_of]
        per_block = np.bincount(block_of[coded], minlength=len(counts)).astype(np.int32)
        kept = np.flatnonzero(exact)
        exact_of = np.bincount(block_of[kept], minlength=len(counts))
        bytes_exact = exact_of * (group.layers[1] - group.layers[0]) * codec.artifact.shape.bytes_per_layer_token
        where = np.where(sound, batch.sections[own, g, 0] - chunk.start, 0)
        section = batch.sections[own, g, 1]
        short = sound & (section < bytes_exact)
        slots = blocks.slots[chunk.tokens].numpy()
        index = np.arange(len(kept)) - np.repeat(np.cumsum(exact_of) - exact_of, exact_of)
        arrays = {
            "where": where, "section": section, "payload": where + bytes_exact,
            "room": np.where(short, 1, section - bytes_exact), "crc": batch.crc[own, g].view(np.int32),
            "first": (np.cumsum(per_block) - per_block).astype(np.int32), "counts": per_block,
            "block_of": block_of[coded], "slots": slots[coded], "positions": batch.positions[chunk.tokens][coded],
            "exact_block": block_of[kept], "exact_slots": slots[kept], "exact_base": where[block_of[kept]],
            "index": index.astype(np.int32), "count": exact_of[block_of[kept]].astype(np.int32),
        }  # fmt: skip
        with torch.cuda.stream(self._copies) if self._copies is not None else nullcontext():
            if self._copies is not None:
                self._copies.wait_event(self._free[turn])
            ring = self._ring[turn]
            if chunk.end > chunk.start >= 0:
                ring[: chunk.end - chunk.start].copy_(arena[chunk.start : chunk.end], non_blocking=True)
            arrived = self._event()
        sent = self._mailbox.send(arrays)
        if arrived is not None and self._stream is not None:
            codec.mark("decode")
            self._stream.wait_event(arrived)
            codec.mark("copy")
        own_status = status[own]
        n, blocks_here = int(coded.sum()), len(counts)
        crc = self._crc[:blocks_here]
        copy_ranges_device(ring, sent["where"], sent["section"], None, None, crc, int(section.max(initial=0)))
        lanes.verify(crc, sent["crc"], own_status)
        codec.mark("checksum")
        self._coded(group, ring, sent, own_status, n, int(per_block.max(initial=0)))
        if len(kept):
            chosen = self._exact_slots[: len(kept)]
            lanes.select(own_status, sent["exact_block"], sent["exact_slots"], self._keep[: len(kept)], chosen)
            scatter_exact(
                codec.cache, group.layers, chosen, sent["exact_base"], sent["index"], sent["count"],
                ring,
            )  # fmt: skip
            codec.mark("exact")
        if self._cuda:
            self._free[turn].record()

    def _coded(
        self, group: PagedGroup, ring: Tensor, sent: dict[str, Tensor], status: Tensor, n: int, most: int
    ) -> None:
        """Coded tokens of a chunk: n of them, at most ``most`` of a block."""
        codec, split = self._codec, self._lanes
        starts, lengths, bad = (x[: n * split] for x in (self._starts, self._lengths, self._bad))
        parameters, offsets = self._parameters[:n], self._offsets[:n]
        lanes.read(
            ring, sent["payload"], sent["room"], sent["first"], sent["counts"], status, starts, lengths, parameters,
            offsets, split, max(most, 1), OFFSET_NEUTRAL, OFFSET_CLASSES, quantize.FINENESS_LEVELS - 1,
        )  # fmt: skip
        if not n:
            return
        g = codec.point.groups.index(group)
        narrow, wide = self._narrow[g][:n], self._wide[g][:n]
        words = ring[: len(ring) // 2 * 2].view(torch.int16)
        rans.decode_levels_device(
            words, starts, lengths, group.classes, codec.point.tables, wide, narrow, bad, centroid=group.centroid,
            scale=group.scale, bias=group.level_bias, wide_components=-(-group.wide // WIDE_STEP) * WIDE_STEP,
            offsets=offsets, first=group.leading, lanes_per_token=split,
        )  # fmt: skip
        codec.mark("rANS")
        lanes.blame(bad, sent["block_of"], status, split)
        keep, chosen = self._keep[:n], self._chosen[:n]
        lanes.select(status, sent["block_of"], sent["slots"], keep, chosen)
        cos, sin = codec.rotations.at(sent["positions"])
        codec.mark("rotations")
        synthesise_into_pages(
            narrow, wide, group.synthesis, parameters, codec.point.shrink, cos, sin, codec.pages, chosen, keep
        )
        codec.mark("project")
