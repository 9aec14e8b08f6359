"""Decoding on the GPU path, whatever the profile: see ``codec.paged``."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamo_kvtc.codec import header_scan
from dynamo_kvtc.codec.headers import HeaderBatch, read_headers
from dynamo_kvtc.codec.paged_encode import workspace_bytes
from dynamo_kvtc.codec.upload import Uploads
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops import lanes
from dynamo_kvtc.ops.pages import scatter_exact

if TYPE_CHECKING:
    from dynamo_kvtc.codec.paged import Blocks, PagedCodec

_NEAR = 4096
"""Bytes: gaps between records up to this are copied along."""

RING = 3
"""Chunks whose records may be on the GPU at once: one being decoded, the others on their way. A call of so many chunks
or fewer brings them there once; a longer one, for every layer group again."""

_FIRST = 2
"""The first chunk is half the largest: the GPU starts on it while the rest of records and headers is on the way."""


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


@dataclass(frozen=True)
class Sent:
    """What the GPU has of a chunk, but for its records.

    arrays: those of all layer groups; by_group: [G, ...], a row each; most: int64 [G], bytes of the largest section;
    coded, exact: tokens; longest: most coded tokens of a block, at least 1; row: where in the workspace its tokens have
    their rows; seen: layer groups whose sections are seen to at once, when it is the first one's turn; angles: cos and
    sin of coded tokens; status: int32 [B], not 0 for a block found bad.
    """

    arrays: dict[str, Tensor]
    by_group: dict[str, Tensor]
    most: NDArray[np.int64]
    coded: int
    exact: int
    longest: int
    row: int
    seen: tuple[slice, ...]
    angles: tuple[Tensor, Tensor]
    status: Tensor

    def of(self, g: int) -> dict[str, Tensor]:
        return self.arrays | {name: x[g] for name, x in self.by_group.items()}


@dataclass(frozen=True)
class Coded:
    """A chunk's sections, as the host sees them: G layer groups of B blocks, of which some are not sound.

    sound: bool [B]; where, section: int64 [G, B], first byte in the ring and bytes; exact: int64 [G, B], bytes of exact
    tokens, which come first; counts: int32 [B], coded tokens; short: bool [G, B], too few bytes for the exact tokens.
    """

    sound: NDArray[np.bool_]
    where: NDArray[np.int64]
    section: NDArray[np.int64]
    exact: NDArray[np.int64]
    counts: NDArray[np.int32]
    short: NDArray[np.bool_]


class Decoder(ABC):
    """Launches and what they work in: a stream that copies, a stream that computes.

    A profile adds the abstract methods: what lies between a section on the GPU and the pages.
    """

    def __init__(self, codec: PagedCodec) -> None:
        self._codec = codec
        self._device = device = codec.cache.device
        self._cuda = device.type == "cuda"
        t = codec.limits.decode_tokens
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._copies = torch.cuda.Stream(device) if self._cuda else None
        self._ring = [torch.empty(codec.limits.record_bytes, dtype=torch.uint8, device=device) for _ in range(RING)]
        self._free = [torch.cuda.Event() for _ in range(RING)] if self._cuda else []
        self._uploads = Uploads(device)
        self._chosen = torch.empty(t, dtype=torch.int64, device=device)
        self._exact_slots = torch.empty(t, dtype=torch.int64, device=device)
        header_scan.compile_all()

    @property
    def nbytes(self) -> int:
        """Bytes of workspace on the device."""
        return workspace_bytes(self, self._device)

    @abstractmethod
    def _arrays(self, coded: Coded) -> tuple[dict[str, NDArray], NDArray[np.int64]]:
        """What the methods below need of each block, [G, ...], to be sent to the device; and int64 [G, B], where each
        section starts in what ``_receive`` returns, even numbers."""

    def _seen(self, coded: int, together: bool, apart: bool) -> tuple[slice, ...]:
        """``Sent.seen`` of a chunk with so many coded tokens.

        together: its records stay in the ring, and its rows are its own, until all layer groups are done.
        apart: the first layer group is not to be kept waiting for the others.
        """
        return tuple(slice(g, g + 1) for g in range(len(self._codec.artifact.manifest.groups)))

    @abstractmethod
    def _receive(self, own: slice, turn: int, sent: Sent) -> Tensor:
        """Blocks whose section, in these layer groups, is not what its checksum says get a status; returns the memory
        to read sections from. turn: where in the ring the records are."""

    @abstractmethod
    def _coded(self, g: int, turn: int, sent: Sent) -> None:
        """Coded tokens of a chunk into the pages. Blocks found bad get a status, and those that have one write
        nothing."""

    def decode(
        self, arena: Tensor, offsets: NDArray[np.int64], sizes: NDArray[np.int64], blocks: Blocks, by_group: bool
    ) -> Restore:  # fmt: skip
        self._check_sizes(arena, offsets, sizes, blocks)
        groups = range(len(self._codec.artifact.manifest.groups))
        chunks = self._chunks(len(arena), offsets, sizes, blocks)
        # Whether a chunk's records are brought once, and whether what is decoded of it stays until its last group.
        once = len(chunks) <= RING or not by_group
        together = not by_group or (once and chunks[-1].tokens.stop <= self._codec.limits.decode_tokens)
        if by_group:
            items = [(g, i, i if once else (g * len(chunks) + i) % RING) for g in groups for i in range(len(chunks))]
        else:
            items = [(g, i, i % RING) for i in range(len(chunks)) for g in groups]
        loads = (self._load(arena, chunks[i], turn) for g, i, turn in items if g == 0 or not once)
        arrived = deque(itertools.islice(loads, RING))
        host = torch.empty(len(blocks.counts), dtype=torch.int32, pin_memory=self._cuda)
        events: list[Any] = []
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            sent: dict[int, Sent] = {}
            for g, i, turn in items:
                own = chunks[i].blocks
                if i not in sent:
                    batch = read_headers(
                        arena.numpy(), offsets[own], sizes[own], blocks.counts[own], self._codec.identity
                    )
                    row = chunks[i].tokens.start if together and by_group else 0
                    sent[i] = self._send(chunks[i], blocks, batch, row, together, by_group)
                if g == 0 or not once:
                    self._wait(arrived.popleft())
                self._group(g, sent[i], turn)
                if by_group or g == groups[-1]:
                    arrived.extend(itertools.islice(loads, 1))
                if i == len(chunks) - 1:
                    events.append(self._event())
            for chunk, of in zip(chunks, sent.values(), strict=True):
                host[chunk.blocks].copy_(of.status, non_blocking=True)
            done = self._event()
        return Restore(events, host, done)

    def _event(self) -> Any:
        if not self._cuda:
            return None
        event = torch.cuda.Event(enable_timing=self._codec.marks is not None)
        event.record()
        return event

    def _chunks(
        self, room: int, offsets: NDArray[np.int64], sizes: NDArray[np.int64], blocks: Blocks
    ) -> list[_Chunk]:  # fmt: skip
        """Chunks of whole blocks that fit the workspace. Records that follow each other are copied at once."""
        limits, counts = self._codec.limits, blocks.counts
        total, most = len(counts), limits.decode_tokens
        there = (offsets >= 0) & (sizes >= 0) & (offsets <= room - sizes) & (sizes <= limits.record_bytes)
        reach = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        # A record that is not there moves nothing: it counts as lying where the last one that is ends.
        last = np.maximum.accumulate(np.where(there, np.arange(total), -1))
        ends = np.where(last >= 0, (offsets + sizes)[last], 0)
        starts = np.where(there, offsets, ends)
        # Copied at once: records that follow each other without a gap as large as a record.
        follows = np.zeros(total, dtype=np.bool_)
        follows[1:] = (starts[1:] >= ends[:-1]) & (starts[1:] - ends[:-1] <= np.maximum(sizes[1:], _NEAR))
        breaks = np.append(np.flatnonzero(~follows), total)
        out, start = [], 0
        while start < total:
            end = int(breaks[np.searchsorted(breaks, start, side="right")])
            room_tokens = most if start else max(most // _FIRST, int(counts[0]))
            end = min(end, int(np.searchsorted(reach, reach[start] + min(most, room_tokens), side="right")) - 1)
            end = min(end, start + int(np.searchsorted(ends[start:end], starts[start] + limits.record_bytes, "right")))
            if end <= start:
                raise ConfigError(
                    f"a block of {counts[start]} tokens; PagedLimits.decode_tokens is {limits.decode_tokens}"
                )
            first = int(starts[start])
            tokens = slice(int(reach[start]), int(reach[end]))
            out.append(_Chunk(slice(start, end), tokens, first, max(int(ends[end - 1]), first)))
            start = end
        return out

    def _check_sizes(
        self, arena: Tensor, offsets: NDArray[np.int64], sizes: NDArray[np.int64], blocks: Blocks
    ) -> None:  # fmt: skip
        """Raises ConfigError, before anything is launched, for a sound record that is too large to be moved."""
        limit = self._codec.limits.record_bytes
        large = np.flatnonzero(sizes > limit)
        if len(large):
            batch = read_headers(
                arena.numpy(), offsets[large], sizes[large], blocks.counts[large], self._codec.identity
            )
            for size in sizes[large][batch.status == 0]:
                raise ConfigError(f"a record of {size} bytes; PagedLimits.record_bytes is {limit}")

    def _load(self, arena: Tensor, chunk: _Chunk, turn: int) -> Any:
        """A chunk's records on their way to the GPU; the event of their arrival."""
        with torch.cuda.stream(self._copies) if self._copies is not None else nullcontext():
            if self._copies is not None:
                self._copies.wait_event(self._free[turn])
            if chunk.end > chunk.start:
                self._ring[turn][: chunk.end - chunk.start].copy_(arena[chunk.start : chunk.end], non_blocking=True)
            return self._event()

    def _wait(self, arrived: Any) -> None:
        if arrived is not None and self._stream is not None:
            self._codec.mark("decode")
            self._stream.wait_event(arrived)
            self._codec.mark("wait for copy")

    def _send(
        self, chunk: _Chunk, blocks: Blocks, batch: HeaderBatch, row: int, together: bool, apart: bool
    ) -> Sent:  # fmt: skip
        """What the kernels need to know of a chunk, for all layer groups at once; row: see ``Sent``; the rest:
        ``_seen``."""
        codec, artifact = self._codec, self._codec.artifact
        counts, tokens = blocks.counts[chunk.blocks], chunk.tokens.stop - chunk.tokens.start
        first, coded_of = (np.empty(len(counts), dtype=np.int32) for _ in range(2))
        exact_of = np.empty(len(counts), dtype=np.int64)
        slots, positions, exact_slots = (np.empty(tokens, dtype=np.int64) for _ in range(3))
        exact_block, index = (np.empty(tokens, dtype=np.int32) for _ in range(2))
        coded, kept = header_scan.sort_tokens(
            counts, batch.status, batch.exact, batch.positions, blocks.slots.numpy()[chunk.tokens], first, coded_of,
            exact_of, slots, positions, exact_block, exact_slots, index,
        )  # fmt: skip
        sound = batch.status == 0
        per_token = np.array([end - start for start, end in artifact.manifest.groups], dtype=np.int64)
        exact = exact_of * (per_token * artifact.shape.bytes_per_layer_token)[:, None]
        where = np.where(sound, batch.sections[:, :, 0].T - chunk.start, 0)
        section = np.ascontiguousarray(batch.sections[:, :, 1].T)
        more, base = self._arrays(Coded(sound, where, section, exact, coded_of, sound & (section < exact)))
        by_group = more | {
            "where": where, "section": section, "crc": batch.crc.T.view(np.int32),
            "exact_base": base[:, exact_block[:kept]],
        }  # fmt: skip
        shared = {
            "first": first, "counts": coded_of, "slots": slots[:coded], "positions": positions[:coded],
            "exact_block": exact_block[:kept], "exact_slots": exact_slots[:kept], "index": index[:kept],
            "count": exact_of[exact_block[:kept]].astype(np.int32), "status": batch.status,
        }  # fmt: skip
        arrays = self._uploads.send(shared | by_group)
        angles = codec.rotations.at(arrays["positions"])
        codec.mark("rotations")
        return Sent(
            arrays, {name: arrays.pop(name) for name in by_group}, section.max(axis=1, initial=0), coded, kept,
            max(1, int(coded_of.max())), row, self._seen(coded, together, apart), angles, arrays.pop("status"),
        )  # fmt: skip

    def _group(self, g: int, sent: Sent, turn: int) -> None:
        """One layer group of one chunk, whose records are in the ring."""
        codec = self._codec
        seen = next((own for own in sent.seen if own.start == g), None)
        source = None if seen is None else self._receive(seen, turn, sent)
        if sent.coded:
            self._coded(g, turn, sent)
        if sent.exact and source is not None and seen is not None:
            arrays, chosen = sent.arrays, self._exact_slots[: sent.exact]
            lanes.select(sent.status, arrays["exact_block"], arrays["exact_slots"], chosen)
            scatter_exact(
                codec.cache, codec.artifact.manifest.groups[seen], chosen, sent.by_group["exact_base"][seen],
                arrays["index"], arrays["count"], source,
            )  # fmt: skip
            codec.mark("exact")
        if self._cuda:
            self._free[turn].record()
