"""Decoding on the GPU path, whatever the profile: see ``codec.paged``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamo_kvtc.codec.headers import HeaderBatch, read_headers
from dynamo_kvtc.codec.mailbox import Mailbox
from dynamo_kvtc.codec.paged_encode import workspace_bytes
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops import lanes
from dynamo_kvtc.ops.pages import scatter_exact

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


@dataclass(frozen=True)
class Coded:
    """A chunk's sections of one layer group, as the host sees them. B blocks, of which some are not sound.

    sound: bool [B]; where, section: int64 [B], first byte in the ring and bytes; exact: int64 [B], bytes of exact
    tokens, which come first; counts: int32 [B], coded tokens; short: bool [B], too few bytes for the exact tokens.
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
        self._ring = [torch.empty(codec.limits.record_bytes, dtype=torch.uint8, device=device) for _ in range(_RING)]
        self._free = [torch.cuda.Event() for _ in range(_RING)] if self._cuda else []
        self._keep = torch.empty(t, dtype=torch.uint8, device=device)
        self._chosen = torch.empty(t, dtype=torch.int64, device=device)
        self._exact_slots = torch.empty(t, dtype=torch.int64, device=device)
        self._crc = torch.empty(t, dtype=torch.int32, device=device)
        self._mailbox = Mailbox(device, 512 + t * 160)

    @property
    def nbytes(self) -> int:
        """Bytes of workspace on the device."""
        return workspace_bytes(self, self._device) + self._mailbox.nbytes

    @abstractmethod
    def _arrays(self, g: int, coded: Coded) -> tuple[dict[str, NDArray], NDArray[np.int64]]:
        """What the methods below need of each block, to be sent to the device; and int64 [B], where each section starts
        in what ``_receive`` returns, even numbers."""

    @abstractmethod
    def _receive(self, ring: Tensor, sent: dict[str, Tensor], crc: Tensor, most: int) -> Tensor:
        """Checksums of sections, of up to ``most`` bytes, into crc int32 [B]; returns the memory to read them from."""

    @abstractmethod
    def _coded(self, g: int, ring: Tensor, sent: dict[str, Tensor], status: Tensor, n: int, most: int) -> None:
        """Coded tokens of a chunk into the pages: n of them, at most ``most`` of a block. Blocks found bad get a
        status, and those that have one write nothing."""

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
            for g in range(len(self._codec.artifact.manifest.groups)):
                for chunk in chunks:
                    self._group(arena, g, chunk, blocks, batch, status, turn % _RING)
                    turn += 1
                events.append(self._event())
            host.copy_(status, non_blocking=True)
            done = self._event()
        return Restore(events, host, done)

    def _event(self) -> Any:
        if not self._cuda:
            return None
        event = torch.cuda.Event()
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
                # Far apart in the arena, or too many bytes (a record may be asked for twice): another chunk.
                if end > start and (hi - lo > min(limits.record_bytes, 2 * own + 4096) or own > limits.record_bytes):
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
        self, arena: Tensor, g: int, chunk: _Chunk, blocks: Blocks, batch: HeaderBatch, status: Tensor, turn: int
    ) -> None:  # fmt: skip
        """One layer group of one chunk."""
        codec, own = self._codec, chunk.blocks
        layers = codec.artifact.manifest.groups[g]
        counts, exact = blocks.counts[own], batch.exact[chunk.tokens]
        sound = batch.status[own] == 0
        block_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        coded = ~exact & sound[block_of]
        per_block = np.bincount(block_of[coded], minlength=len(counts)).astype(np.int32)
        kept = np.flatnonzero(exact)
        exact_of = np.bincount(block_of[kept], minlength=len(counts))
        bytes_exact = exact_of * (layers[1] - layers[0]) * codec.artifact.shape.bytes_per_layer_token
        where = np.where(sound, batch.sections[own, g, 0] - chunk.start, 0)
        section = batch.sections[own, g, 1]
        short = sound & (section < bytes_exact)
        slots = blocks.slots[chunk.tokens].numpy()
        index = np.arange(len(kept)) - np.repeat(np.cumsum(exact_of) - exact_of, exact_of)
        more, base = self._arrays(g, Coded(sound, where, section, bytes_exact, per_block, short))
        arrays = {
            "where": where, "section": section, "crc": batch.crc[own, g].view(np.int32),
            "first": (np.cumsum(per_block) - per_block).astype(np.int32), "counts": per_block,
            "block_of": block_of[coded], "slots": slots[coded], "positions": batch.positions[chunk.tokens][coded],
            "exact_block": block_of[kept], "exact_slots": slots[kept], "exact_base": base[block_of[kept]],
            "index": index.astype(np.int32), "count": exact_of[block_of[kept]].astype(np.int32),
            **more,
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
            self._stream.wait_event(arrived)
        own_status = status[own]
        n, blocks_here = int(coded.sum()), len(counts)
        crc = self._crc[:blocks_here]
        source = self._receive(ring, sent, crc, int(section.max(initial=0)))
        lanes.verify(crc, sent["crc"], own_status)
        self._coded(g, ring, sent, own_status, n, int(per_block.max(initial=0)))
        if len(kept):
            chosen = self._exact_slots[: len(kept)]
            lanes.select(own_status, sent["exact_block"], sent["exact_slots"], self._keep[: len(kept)], chosen)
            scatter_exact(codec.cache, layers, chosen, sent["exact_base"], sent["index"], sent["count"], source)
        if self._cuda:
            self._free[turn].record()
