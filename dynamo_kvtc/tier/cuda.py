"""Pages of an engine on a GPU: records are coded straight from the pages, and decoded straight out of the host arena
into them.

A promise that is proven checks a record's checksums on the host and keeps its lease; the GPU checks them, again, while
it decodes. What the engine had launched by a fence is waited for on a stream of this side's own, so no thread of the
engine waits. Stores whose step is not over when their turn comes also let the next step go first, if the engine has
launched it by the time their own is done: in it the last tokens of a long prompt are computed, for which somebody
waits.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamo_kvtc.codec.headers import SOUND, prove_sections, read_headers
from dynamo_kvtc.codec.paged import Blocks, PagedCodec
from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.codec.policy import ExactCounts
from dynamo_kvtc.codec.record import Record, claimed_position, claimed_positions
from dynamo_kvtc.codec.warm import compile_all
from dynamo_kvtc.errors import ConfigError, RecordCorruptError, RecordError, RecordMismatchError
from dynamo_kvtc.store import Lease
from dynamo_kvtc.tier.transcode import Block, GroupDecoder, Promise, Put, check_whole, place

log = logging.getLogger(__name__)

_ALIGNMENT = 16
_PROVERS = max(1, min(8, (os.cpu_count() or 1) // 2))
"""Threads that check records' checksums on the host."""
SCRATCH_BYTES = 96 << 20
"""Pinned memory that records pass through, each way: more than the codec's largest chunk of them."""


class Fence(NamedTuple):
    """A point in what an engine has launched on a stream."""

    event: torch.cuda.Event
    stream: torch.cuda.Stream

    def and_the_next_step(self) -> torch.cuda.Event:
        """Waits for it, if it has not passed; what the engine has launched by then."""
        if self.event.query():
            return self.event
        self.event.synchronize()
        later = torch.cuda.Event()
        later.record(self.stream)
        return later


class CudaTranscoder:
    """arena: uint8 [bytes] over the host store's memory, pinned (``close`` unpins it), or None if there is none."""

    staged_is_free = False
    by_group: GroupDecoder | None = None

    def __init__(
        self, codec: PagedCodec, checker: BlockCodec, arena: Tensor | None, scratch_bytes: int = SCRATCH_BYTES,
        engine_first: bool = True,
    ) -> None:  # fmt: skip
        """checker: the same artifact and point, for headers; engine_first: stores let the engine's next step pass."""
        self._engine_first = engine_first
        self._codec, self._checker, self._arena = codec, checker, arena
        self.block_tokens = codec.cache.tokens_per_block
        self.raw_block_bytes = self.block_tokens * codec.artifact.shape.bytes_per_token
        self.held_block_bytes = self.raw_block_bytes // 8
        device = codec.cache.device
        self._device, self._cuda = device, device.type == "cuda"
        self._out = torch.empty(scratch_bytes, dtype=torch.uint8, pin_memory=self._cuda)
        self._in = torch.empty(scratch_bytes, dtype=torch.uint8, pin_memory=self._cuda)
        self._provers = ThreadPoolExecutor(_PROVERS, thread_name_prefix="kvtc-prove")
        # One each way: what the codec's two halves share, they only read.
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if self._cuda else [None, None]

    def fence(self) -> Fence | None:
        if not self._cuda:
            return None
        stream = torch.cuda.current_stream(self._device)
        event = torch.cuda.Event(blocking=True)
        event.record(stream)
        return Fence(event, stream)

    def stage(self, blocks: Sequence[Block], fence: Fence | None) -> tuple[Sequence[Block], Fence | None]:
        check_whole(blocks)
        return blocks, fence

    def encode(
        self, staged: tuple[Sequence[Block], Fence | None], put: Put
    ) -> tuple[list[bool], list[int], ExactCounts]:
        blocks, fence = staged
        after = None if fence is None else fence.and_the_next_step() if self._engine_first else fence.event
        stored: list[bool] = []
        sizes: list[int] = []
        policy = unfit = 0
        waiting = [blocks]
        while waiting:
            part = waiting.pop(0)
            try:
                with self._on(self._streams[0], after):
                    place(part, self._codec.cache.table)
                    encoded = self._codec.encode(self._blocks(part, encoding=True), self._out, 0)
                    encoded.finish()
            except ConfigError as exc:
                # Records that code badly, or are exact by policy, may need more room than all of them have.
                if len(part) == 1:
                    log.warning("a block is not coded: %s", exc)
                    stored += put([(part[0].key, b"")])
                    sizes.append(0)
                    continue
                middle = len(part) // 2
                waiting[:0] = [part[:middle], part[middle:]]
                continue
            data = self._out.numpy().data
            places = list(zip(encoded.offsets.tolist(), encoded.sizes.tolist(), strict=True))
            stored += put([(block.key, data[at : at + size]) for block, (at, size) in zip(part, places, strict=True)])
            sizes += [size for _, size in places]
            coded = ~np.repeat([block.exact for block in part], self.block_tokens)
            policy += int((encoded.exact & encoded.asked & coded).sum())
            unfit += int((encoded.exact & ~encoded.asked & coded).sum())
        return stored, sizes, ExactCounts(policy, 0, unfit)

    def promise(
        self, keys: Sequence[bytes], leases: Sequence[Lease], tiers: Sequence[str], prove: bool
    ) -> list[Promise | Exception]:
        # Not proven here, the GPU checks all but where a block starts (``load`` does), and that again with the header's
        # checksum.
        sound = self._proven(leases) if prove else np.ones(len(leases), dtype=np.bool_)
        return [
            Promise(key, tier, len(lease), lease=lease) if good else self._promise(key, lease, tier)
            for key, lease, tier, good in zip(keys, leases, tiers, sound.tolist(), strict=True)
        ]

    def _proven(self, leases: Sequence[Lease]) -> NDArray[np.bool_]:
        """bool [B]: records in the arena that are sound; the others must be looked at one by one."""
        out = np.zeros(len(leases), dtype=np.bool_)
        here = [i for i, lease in enumerate(leases) if lease.offset is not None and self._arena is not None]
        if not here:
            return out
        assert self._arena is not None
        arena, n = self._arena.numpy(), self.block_tokens
        offsets = np.array([leases[i].offset for i in here], dtype=np.int64)
        sizes = np.array([len(leases[i]) for i in here], dtype=np.int64)
        batch = read_headers(arena, offsets, sizes, np.full(len(here), n, dtype=np.int32), self._codec.identity)
        good = batch.status == SOUND

        prove = partial(prove_sections, arena, batch, good, step=_PROVERS)
        list(self._provers.map(prove, range(min(_PROVERS, len(here)))))
        positions = batch.positions.reshape(-1, n)
        out[here] = good & (positions[:, -1] - positions[:, 0] == n - 1)
        return out

    def _promise(self, key: bytes, lease: Lease, tier: str) -> Promise | Exception:
        try:
            record: Record = self._checker.parse(lease.record)
            if record.header.tokens != self.block_tokens:
                raise RecordMismatchError(f"the record has {record.header.tokens} tokens, a block {self.block_tokens}")
            for group in range(record.groups):
                record.section(group)
            first, last = int(record.header.positions[0]), int(record.header.positions[-1])
            if last - first != self.block_tokens - 1:
                raise RecordMismatchError(f"the record's positions, {first} to {last}, are not a block's")
        except RecordError as exc:
            lease.release()
            return exc
        del record
        return Promise(key, tier, len(lease), lease=lease)

    def load(self, blocks: Sequence[Block], promises: Sequence[Promise], fence: Fence | None) -> list[Exception | None]:
        out: list[Exception | None] = [None] * len(blocks)
        leases = [cast(Lease, promise.lease) for promise in promises]
        offsets = np.array([-1 if x.offset is None or self._arena is None else x.offset for x in leases], np.int64)
        wanted = np.array([block.first_position for block in blocks], np.int64)
        first = self._claimed(leases, offsets)
        for i in np.flatnonzero(first != wanted):
            out[i] = RecordMismatchError(f"the record starts at {first[i]}, its block at {wanted[i]}")
        in_place = np.flatnonzero((first == wanted) & (offsets >= 0))
        if len(in_place):
            # In the arena's order records that were stored together are copied together.
            in_place = in_place[np.argsort(offsets[in_place])]
            assert self._arena is not None
            self._decode(self._arena, offsets[in_place], in_place.tolist(), blocks, promises, fence, out)
        copied = np.flatnonzero((first == wanted) & (offsets < 0)).tolist()
        while copied:
            part, places, at = [], [], 0
            while copied and at + promises[copied[0]].coded_bytes <= len(self._in):
                i = copied.pop(0)
                size = promises[i].coded_bytes
                self._in.numpy()[at : at + size] = np.frombuffer(leases[i].record, np.uint8)
                part.append(i)
                places.append(at)
                at += -(-size // _ALIGNMENT) * _ALIGNMENT
            if not part:
                raise ConfigError(
                    f"a record of {promises[copied[0]].coded_bytes} bytes does not fit the scratch memory"
                )
            self._decode(self._in, np.array(places, np.int64), part, blocks, promises, fence, out)
        return out

    def _claimed(self, leases: Sequence[Lease], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [B]: where records start, as their headers say; offsets: in the arena, -1 for one that is not there."""
        out = np.empty(len(leases), dtype=np.int64)
        here = offsets >= 0
        if self._arena is not None and here.any():
            sizes = np.array([len(lease) for lease in leases], dtype=np.int64)
            out[here] = claimed_positions(self._arena.numpy(), offsets[here], sizes[here])
        for i in np.flatnonzero(~here).tolist():
            out[i] = claimed_position(leases[i].record)
        return out

    def warm(self) -> None:
        """Before anything uses the pages: compiles what loads and stores will need."""
        compile_all(self._codec, self._out)

    def close(self) -> None:
        self._provers.shutdown()
        if self._cuda:
            for stream in self._streams:
                assert stream is not None
                stream.synchronize()
            if self._arena is not None:
                torch.cuda.cudart().cudaHostUnregister(self._arena.data_ptr())

    def _decode(
        self, arena: Tensor, offsets: NDArray[np.int64], which: Sequence[int], blocks: Sequence[Block],
        promises: Sequence[Promise], fence: Fence | None, out: list[Exception | None],
    ) -> None:  # fmt: skip
        sizes = np.array([promises[i].coded_bytes for i in which], dtype=np.int64)
        part = [blocks[i] for i in which]
        with self._on(self._streams[1], None if fence is None else fence.event):
            place(part, self._codec.cache.table)
            restore = self._codec.decode(arena, offsets, sizes, self._blocks(part), by_group=False)
        for i, status in zip(which, restore.finish(), strict=True):
            if status:
                out[i] = RecordCorruptError(f"the GPU found the record bad (status {status})")

    def _blocks(self, blocks: Sequence[Block], encoding: bool = False) -> Blocks:
        n = self.block_tokens
        ids = torch.tensor([b.block_id for b in blocks], dtype=torch.int64)
        first = torch.tensor([b.first_position for b in blocks], dtype=torch.int64)
        step = torch.arange(n)
        positions, exact = (first[:, None] + step).reshape(-1), None
        if encoding and any(b.exact for b in blocks):
            whole = torch.tensor([b.exact for b in blocks]).repeat_interleave(n)
            exact = whole | (positions < self._codec.policy.sinks)
        return Blocks.uniform((ids[:, None] * n + step).reshape(-1), positions, n, exact)

    @contextmanager
    def _on(self, stream: Any, after: torch.cuda.Event | None) -> Iterator[None]:
        """Launches on a stream after an event."""
        if stream is None:
            yield
            return
        with torch.cuda.stream(stream):
            if after is not None:
                stream.wait_event(after)
            yield
