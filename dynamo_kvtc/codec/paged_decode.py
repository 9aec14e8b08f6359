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

_NEAR = 4096
"""Bytes: gaps between records up to this are copied along."""

_KEPT_ANGLES = 4
"""Chunks whose rotations are kept from one layer group to the next; with more, they are computed again."""

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
class _Plan:
    """What all layer groups of a chunk share: sound: bool [B]; exact_of: int64 [B], exact tokens; arrays for the GPU."""

    sound: NDArray[np.bool_]
    exact_of: NDArray[np.int64]
    arrays: dict[str, NDArray]

    @classmethod
    def of(cls, counts: NDArray[np.int32], slots: NDArray[np.int64], batch: HeaderBatch, own: slice, tokens: slice) -> _Plan:
        exact, sound = batch.exact[tokens], batch.status[own] == 0
        block_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        coded = ~exact & sound[block_of]
        per_block = np.bincount(block_of[coded], minlength=len(counts)).astype(np.int32)
        kept = np.flatnonzero(exact)
        exact_of = np.bincount(block_of[kept], minlength=len(counts))
        index = np.arange(len(kept)) - np.repeat(np.cumsum(exact_of) - exact_of, exact_of)
        arrays = {
            "first": (np.cumsum(per_block) - per_block).astype(np.int32), "counts": per_block,
            "slots": slots[coded], "positions": batch.positions[tokens][coded],
            "exact_block": block_of[kept], "exact_slots": slots[kept], "index": index.astype(np.int32),
            "count": exact_of[block_of[kept]].astype(np.int32),
        }  # fmt: skip
        return cls(sound, exact_of, arrays)


@dataclass(frozen=True)
class _Chunk:
    """Blocks [first, last) of the call, tokens of them, and the bytes of the arena that hold their records."""

    blocks: slice
    tokens: slice
    start: int
    end: int
    plan: _Plan


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
        chunks = self._chunks(offsets, sizes, blocks, batch)
        status = torch.empty(len(blocks.counts), dtype=torch.int32, device=self._device)
        host = torch.empty(len(blocks.counts), dtype=torch.int32, pin_memory=self._cuda)
        host.copy_(torch.from_numpy(batch.status))
        events: list[Any] = []
        done = None
        if self._stream is not None and self._copies is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            status.copy_(host, non_blocking=True)
            turn, angles = 0, {}
            keep_angles = len(chunks) <= _KEPT_ANGLES
            for g, group in enumerate(self._codec.point.groups):
                for chunk in chunks:
                    self._group(arena, g, group, chunk, blocks, batch, status, turn % _RING, angles)
                    if not keep_angles:
                        angles.clear()
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

    def _chunks(
        self, offsets: NDArray[np.int64], sizes: NDArray[np.int64], blocks: Blocks, batch: HeaderBatch
    ) -> list[_Chunk]:
        """Chunks of whole blocks that fit the workspace. Records that follow each other are copied at once."""
        limits, counts, slots = self._codec.limits, blocks.counts, blocks.slots.numpy()
        total, sound = len(counts), batch.status == 0
        reach = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        # A record that is not sound moves nothing: it counts as lying where the last sound one ends.
        last = np.maximum.accumulate(np.where(sound, np.arange(total), -1))
        ends = np.where(last >= 0, (offsets + sizes)[last], 0)
        starts = np.where(sound, offsets, ends)
        # Copied at once: records that follow each other without a gap as large as a record.
        follows = np.zeros(total, dtype=np.bool_)
        follows[1:] = (starts[1:] >= ends[:-1]) & (starts[1:] - ends[:-1] <= np.maximum(sizes[1:], _NEAR))
        breaks = np.append(np.flatnonzero(~follows), total)
        out, start = [], 0
        while start < total:
            end = int(breaks[np.searchsorted(breaks, start, side="right")])
            end = min(end, int(np.searchsorted(reach, reach[start] + limits.decode_tokens, side="right")) - 1)
            room = starts[start] + limits.record_bytes
            end = min(end, start + int(np.searchsorted(ends[start:end], room, side="right")))
            if end <= start:
                raise ConfigError(
                    f"a block of {counts[start]} tokens and {sizes[start]} bytes; PagedLimits allows "
                    f"{limits.decode_tokens} tokens and {limits.record_bytes} bytes"
                )
            first = int(starts[start])
            tokens = slice(int(reach[start]), int(reach[end]))
            own = slice(start, end)
            plan = _Plan.of(counts[own], slots[tokens], batch, own, tokens)
            out.append(_Chunk(own, tokens, first, max(int(ends[end - 1]), first), plan))
            start = end
        return out

    def _group(
        self, arena: Tensor, g: int, group: PagedGroup, chunk: _Chunk, blocks: Blocks, batch: HeaderBatch,
        status: Tensor, turn: int, angles: dict[int, tuple[Tensor, Tensor]],
    ) -> None:  # fmt: skip
        """One layer group of one chunk. angles: rotations of chunks by their first block, kept for the next group."""
        codec, own, plan = self._codec, chunk.blocks, chunk.plan
        counts = blocks.counts[own]
        bytes_exact = plan.exact_of * (group.layers[1] - group.layers[0]) * codec.artifact.shape.bytes_per_layer_token
        where = np.where(plan.sound, batch.sections[own, g, 0] - chunk.start, 0)
        section = batch.sections[own, g, 1]
        short = plan.sound & (section < bytes_exact)
        arrays = plan.arrays | {
            "where": where, "section": section, "payload": where + bytes_exact,
            "room": np.where(short, 1, section - bytes_exact), "crc": batch.crc[own, g].view(np.int32),
            "exact_base": where[plan.arrays["exact_block"]],
        }  # fmt: skip
        with torch.cuda.stream(self._copies) if self._copies is not None else nullcontext():
            if self._copies is not None:
                self._copies.wait_event(self._free[turn])
            ring = self._ring[turn]
            if chunk.end > chunk.start:
                ring[: chunk.end - chunk.start].copy_(arena[chunk.start : chunk.end], non_blocking=True)
            arrived = self._event()
        sent = self._mailbox.send(arrays)
        if arrived is not None and self._stream is not None:
            codec.mark("decode")
            self._stream.wait_event(arrived)
            codec.mark("wait for copy")
        own_status = status[own]
        n, blocks_here = len(plan.arrays["slots"]), len(counts)
        crc = self._crc[:blocks_here]
        copy_ranges_device(ring, sent["where"], sent["section"], None, None, crc, int(section.max(initial=0)))
        codec.mark("checksum")
        if chunk.blocks.start not in angles:
            angles[chunk.blocks.start] = codec.rotations.at(sent["positions"])
            codec.mark("rotations")
        self._coded(group, ring, sent, own_status, n, int(plan.arrays["counts"].max(initial=0)),
                    angles[chunk.blocks.start])  # fmt: skip
        kept = len(plan.arrays["exact_slots"])
        if kept:
            chosen = self._exact_slots[:kept]
            lanes.select(own_status, sent["exact_block"], sent["exact_slots"], chosen)
            scatter_exact(
                codec.cache, group.layers, chosen, sent["exact_base"], sent["index"], sent["count"],
                ring,
            )  # fmt: skip
            codec.mark("exact")
        if self._cuda:
            self._free[turn].record()

    def _coded(
        self, group: PagedGroup, ring: Tensor, sent: dict[str, Tensor], status: Tensor, n: int, most: int,
        angles: tuple[Tensor, Tensor],
    ) -> None:  # fmt: skip
        """Coded tokens of a chunk: n of them, at most ``most`` of a block."""
        codec, split = self._codec, self._lanes
        starts, lengths, bad = (x[: n * split] for x in (self._starts, self._lengths, self._bad))
        parameters, offsets = self._parameters[:n], self._offsets[:n]
        lanes.read(
            ring, sent["payload"], sent["room"], self._crc, sent["crc"], sent["first"], sent["counts"], status, starts, lengths, parameters,
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
        keep, chosen = self._keep[:n], self._chosen[:n]
        lanes.judge(bad, sent["first"], sent["counts"], status, sent["slots"], keep, chosen, split, max(most, 1))
        synthesise_into_pages(
            narrow, wide, group.synthesis, parameters, codec.point.shrink, *angles, codec.pages, chosen, keep
        )
        codec.mark("project")
