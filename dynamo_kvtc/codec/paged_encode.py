"""Encoding on the GPU path, whatever the profile: see ``codec.paged``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamo_kvtc.codec.headers import gaps_of, header_bytes_of, write_headers
from dynamo_kvtc.codec.upload import Uploads
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops.checksum import copy_ranges_device
from dynamo_kvtc.ops.pages import gather_exact

if TYPE_CHECKING:
    from dynamo_kvtc.codec.paged import Blocks, PagedCodec

ALIGNMENT = 16
"""Records and staged sections start at multiples of this many bytes."""


@dataclass
class Encoded:
    """Records on their way into the arena.

    offsets, sizes: int64 [B], in the arena; exact: bool [T], tokens stored bit-exact; asked: bool [T], those the caller
    or the policy asked for (the others could not be coded, or not well enough). Call ``finish`` before using a record.
    """

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    exact: NDArray[np.bool_]
    asked: NDArray[np.bool_]
    _pending: list[_Headless]
    _codec: PagedCodec
    _arena: Tensor

    def finish(self) -> None:
        """Waits for the GPU and writes the headers: now the records are whole. Raises ConfigError from them."""
        for records in self._pending:
            self._complete(records)
        self._pending = []

    def _complete(self, records: _Headless) -> None:
        if records.done is not None:
            records.done.synchronize()
        checksums = records.crc.numpy().view(np.uint32).reshape(records.sizes.shape[::-1]).T
        write_headers(
            self._arena.numpy(), records.offsets, self._codec.identity, records.counts, records.positions,
            records.exact, records.sizes, checksums,
        )  # fmt: skip

    def records(self) -> list[bytes]:
        """Copies of the finished records."""
        data = self._arena.numpy()
        return [data[o : o + s].tobytes() for o, s in zip(self.offsets, self.sizes, strict=True)]


@dataclass(frozen=True)
class _Headless:
    """Records without headers. crc: int32, of their sections, layer group by layer group; done: when they are there."""

    counts: NDArray[np.int32]
    positions: NDArray[np.int64]
    exact: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    crc: Tensor
    done: Any


@dataclass
class EncodeChunk:
    """Whole blocks worked on at once, and what the first half leaves for the second."""

    tokens: slice
    counts: NDArray[np.int32]
    turn: int
    done: Any


class Encoder(ABC):
    """Launches and what they work in. Two chunks are in flight: while the host sizes one, the GPU works on the next.

    A profile adds the abstract methods: what lies between the pages and a payload.
    """

    def __init__(self, codec: PagedCodec, max_blocks: int) -> None:
        """max_blocks: most blocks of a chunk."""
        self._codec = codec
        self._device = device = codec.cache.device
        self._cuda = device.type == "cuda"
        self._groups = groups = codec.artifact.manifest.groups
        self._max_blocks = max_blocks
        t = codec.limits.encode_tokens
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._error = torch.empty(len(groups), t, dtype=torch.float64, device=device)
        self._skip = torch.empty(2, t, dtype=torch.uint8, device=device)
        self._measured = torch.empty(2, len(groups) * t * 4, dtype=torch.int32, device=device)
        self._measured_host = torch.empty(2, len(groups) * t * 4, dtype=torch.int32, pin_memory=self._cuda)
        self._skip_host = torch.empty(2, t, dtype=torch.uint8, pin_memory=self._cuda)
        self._copies = torch.cuda.Stream(device) if self._cuda else None
        self._uploads = Uploads(device)
        self._staging = torch.empty(codec.limits.record_bytes + ALIGNMENT, dtype=torch.uint8, device=device)
        # Records as they will lie in the arena, and when the last ones have left.
        self._records = torch.empty(codec.limits.record_bytes, dtype=torch.uint8, device=device)
        self._left = torch.cuda.Event() if self._cuda else None
        self._crc = torch.empty(t * len(groups), dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of workspace on the device."""
        return workspace_bytes(self, self._device)

    def _sizes(self, of: Tensor, turn: int, blocks: int) -> Tensor:
        """int32 [G, B, 4] in one piece, so that a copy of it does not wait: ``self._measured`` or the host's."""
        return of[turn, : len(self._groups) * blocks * 4].view(len(self._groups), blocks, 4)

    @abstractmethod
    def _quantise(self, g: int, n: int, turn: int, sent: dict[str, Tensor], cos: Tensor, sin: Tensor) -> None:
        """Layer group g of a chunk of n tokens, quantised; self._error[g, :n] is each token's error as a multiple of
        the calibrated mean, infinite if it cannot be coded."""

    @abstractmethod
    def _code(
        self, g: int, n: int, turn: int, sent: dict[str, Tensor], counts: NDArray[np.int32], measured: Tensor
    ) -> None:
        """Entropy codes tokens that self._skip[turn] does not name; measured: int32 [B, 4] (out), what
        ``_payload_bytes`` needs of each block."""

    @abstractmethod
    def _payload_bytes(self, measured: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [B] from what ``_code`` measured, int64 [B, 4]. Raises ConfigError if a block cannot be coded."""

    @abstractmethod
    def _payloads(
        self, g: int, chunk: EncodeChunk, part: slice, tokens: slice, sent: dict[str, Tensor], most: int
    ) -> None:
        """Payloads of blocks ``part``, which have ``tokens`` of the chunk, into staging at sent["payload_base"][g].

        most: largest payload, in bytes.
        """

    def _check_blocks(self, counts: NDArray[np.int32]) -> None:
        """Raises ConfigError for blocks too large for the workspace."""
        if counts.max() > self._codec.limits.encode_tokens:
            raise ConfigError(
                f"a block has {counts.max()} tokens; PagedLimits.encode_tokens is {self._codec.limits.encode_tokens}"
            )

    def encode(self, blocks: Blocks, arena: Tensor, at: int) -> Encoded:
        counts, positions = blocks.counts, blocks.positions
        assert positions is not None
        self._check_blocks(counts)
        asked = (positions < self._codec.policy.sinks if blocks.exact is None else blocks.exact).numpy()
        out = Encoded(
            np.zeros(len(counts), np.int64), np.zeros(len(counts), np.int64), np.zeros(len(asked), np.bool_), asked, [],
            self._codec, arena,
        )  # fmt: skip
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            before: tuple[int, EncodeChunk] | None = None
            first = 0
            for turn, (tokens, own) in enumerate(_chunks(counts, self._codec.limits.encode_tokens, self._max_blocks)):
                chunk = self._front(blocks, tokens, own, asked[tokens], turn % 2)
                if before is not None:
                    at = self._back(out, before[0], before[1], blocks, at)
                before = (first, chunk)
                first += len(own)
            if before is not None:
                self._back(out, before[0], before[1], blocks, at)
        return out

    def _front(
        self, blocks: Blocks, tokens: slice, counts: NDArray[np.int32], asked: NDArray[np.bool_], turn: int
    ) -> EncodeChunk:
        """From the pages to payloads and their sizes."""
        codec, n = self._codec, len(asked)
        assert blocks.positions is not None
        first = np.cumsum(counts) - counts
        sent = self._uploads.send(
            {
                "slots": blocks.slots[tokens].numpy(), "positions": blocks.positions[tokens].numpy(),
                "asked": asked.astype(np.uint8), "first": first.astype(np.int32), "counts": counts,
            }
        )  # fmt: skip
        codec.mark("encode")
        cos, sin = codec.rotations.at(sent["positions"])
        codec.mark("rotations")
        for g in range(len(self._groups)):
            self._quantise(g, n, turn, sent, cos, sin)
        # An infinite error cannot be coded at all, even where the bound is off.
        worst = self._error[:, :n].amax(dim=0)
        unfit = ~((worst <= codec.policy.max_error) & worst.isfinite())
        skip = self._skip[turn, :n]
        skip.copy_(unfit.logical_or(sent["asked"] != 0))
        measured = self._sizes(self._measured, turn, len(counts))
        for g in range(len(self._groups)):
            self._code(g, n, turn, sent, counts, measured[g])
        self._sizes(self._measured_host, turn, len(counts)).copy_(measured, non_blocking=True)
        self._skip_host[turn, :n].copy_(skip, non_blocking=True)
        done = None
        if self._cuda:
            done = torch.cuda.Event(blocking=True)
            done.record()
        return EncodeChunk(tokens, counts, turn, done)

    def _back(self, out: Encoded, first_block: int, chunk: EncodeChunk, blocks: Blocks, at: int) -> int:
        """From payloads to records without headers, in the arena from ``at`` on; where the next may start."""
        if chunk.done is not None:
            chunk.done.synchronize()
        codec, counts = self._codec, chunk.counts
        tokens, groups = int(counts.sum()), len(self._groups)
        exact = self._skip_host[chunk.turn, :tokens].numpy().astype(np.bool_)
        out.exact[chunk.tokens] = exact
        first = np.cumsum(counts).astype(np.int64) - counts
        exact_of = np.add.reduceat(exact.astype(np.int64), first)
        measured = self._sizes(self._measured_host, chunk.turn, len(counts)).numpy().astype(np.int64)
        layer_bytes = codec.artifact.shape.bytes_per_layer_token
        exact_bytes = np.stack([exact_of * (end - start) * layer_bytes for start, end in self._groups], axis=1)
        sizes = exact_bytes + np.stack([self._payload_bytes(m) for m in measured], axis=1)
        assert blocks.positions is not None
        positions = blocks.positions[chunk.tokens].numpy()
        header = header_bytes_of(counts, exact_of, gaps_of(positions, counts), groups)
        total = header + sizes.sum(axis=1)
        padded = -(-total // ALIGNMENT) * ALIGNMENT
        offsets = at + np.cumsum(padded) - padded
        if offsets[-1] + total[-1] > len(out._arena):
            raise ConfigError(
                f"the arena has {len(out._arena)} bytes; the records so far need {offsets[-1] + total[-1]}"
            )
        own = slice(first_block, first_block + len(counts))
        out.offsets[own], out.sizes[own] = offsets, total
        targets = (offsets + header)[:, None] + np.cumsum(sizes, axis=1) - sizes
        staged = -(-sizes // ALIGNMENT) * ALIGNMENT
        before, out._pending = out._pending, []
        for part in _runs(np.maximum(staged.sum(axis=1), padded), self._codec.limits.record_bytes):
            begin, end = int(offsets[part.start]), int(offsets[part.stop - 1] + total[part.stop - 1])
            crc = self._write(chunk, part, first, exact, exact_bytes, sizes, staged, targets - begin, blocks)
            done = self._leave(out._arena[begin:end])
            here = slice(int(first[part.start]), int(first[part.start] + counts[part].sum()))
            out._pending.append(
                _Headless(counts[part], positions[here], exact[here], offsets[part], sizes[part], crc, done)
            )
        # Headers of the chunk before, while the GPU has this one to do.
        for records in before:
            out._complete(records)
        return int(offsets[-1] + padded[-1])

    def _write(
        self, chunk: EncodeChunk, part: slice, first: NDArray[np.int64], exact: NDArray[np.bool_],
        exact_bytes: NDArray[np.int64], sizes: NDArray[np.int64], staged: NDArray[np.int64],
        targets: NDArray[np.int64], blocks: Blocks,
    ) -> Tensor:  # fmt: skip
        """Sections of some of the chunk's blocks into staging, then to where ``targets`` says in ``self._records``.
        Returns their checksums, on the host once the GPU is done."""
        codec, counts = self._codec, chunk.counts[part]
        begin = int(first[part.start])
        tokens = slice(begin, begin + int(counts.sum()))
        # One layer group after another, as they are written.
        flat = staged[part].T.reshape(-1)
        base = (np.cumsum(flat) - flat).reshape(-1, len(counts)).T
        kept = np.flatnonzero(exact[tokens])
        block_of = np.repeat(np.arange(len(counts)), counts)[kept]
        per_block = np.bincount(block_of, minlength=len(counts))
        index = np.arange(len(kept)) - np.repeat(np.cumsum(per_block) - per_block, per_block)
        slots = blocks.slots[chunk.tokens].numpy()[tokens][kept]
        payloads = sizes[part] - exact_bytes[part]
        sent = self._uploads.send(
            {
                "first": (first[part] - begin).astype(np.int32), "counts": counts, "slots": slots,
                "index": index.astype(np.int32), "count": per_block[block_of].astype(np.int32),
                "exact_base": base[block_of].T.copy(), "payload_base": (base + exact_bytes[part]).T.copy(),
                "base": base.T.reshape(-1).copy(), "sizes": sizes[part].T.reshape(-1).copy(),
                "targets": targets[part].T.reshape(-1).copy(),
                "payload_sizes": payloads.T.copy(),
            }
        )  # fmt: skip
        codec.mark("encode")
        if len(kept):
            gather_exact(
                codec.cache, self._groups, sent["slots"], sent["exact_base"], sent["index"], sent["count"],
                self._staging,
            )  # fmt: skip
        for g in range(len(self._groups)):
            self._payloads(g, chunk, part, tokens, sent, int(payloads[:, g].max()))
        codec.mark("pack")
        if self._left is not None:
            torch.cuda.current_stream().wait_event(self._left)
        crc = self._crc[: sizes[part].size]
        copy_ranges_device(
            self._staging, sent["base"], sent["sizes"], self._records, sent["targets"], crc, int(sizes[part].max())
        )
        codec.mark("checksum")
        found = torch.empty(len(crc), dtype=torch.int32, pin_memory=self._cuda)
        found.copy_(crc, non_blocking=True)
        return found

    def _leave(self, target: Tensor) -> Any:
        """``self._records`` into the arena, beside whatever the GPU does next; the event of their arrival."""
        if self._copies is None or self._left is None:
            target.copy_(self._records[: len(target)])
            return None
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            target.copy_(self._records[: len(target)], non_blocking=True)
            self._left.record()
            done = torch.cuda.Event(blocking=True)
            done.record()
        return done


def workspace_bytes(owner: object, device: torch.device) -> int:
    """Bytes of the tensors on ``device`` that are attributes of ``owner``, or in lists there."""

    def tensors(x: object) -> list[Tensor]:
        if isinstance(x, (list, tuple)):
            return [t for y in x for t in tensors(y)]
        return [x] if isinstance(x, Tensor) and x.device == device else []

    return sum(x.untyped_storage().nbytes() for x in tensors(list(vars(owner).values())))


def _chunks(counts: NDArray[np.int32], most: int, blocks: int) -> Iterator[tuple[slice, NDArray[np.int32]]]:
    """Runs of at most ``blocks`` whole blocks of at most ``most`` tokens: their tokens and their counts."""
    start = token = 0
    while start < len(counts):
        reach = np.cumsum(counts[start : start + blocks])
        n = max(1, int(np.searchsorted(reach, most, side="right")))
        yield slice(token, token + int(reach[n - 1])), counts[start : start + n]
        token += int(reach[n - 1])
        start += n


def _runs(bytes_of: NDArray[np.int64], most: int) -> Iterator[slice]:
    """Runs of blocks whose sections fit into ``most`` bytes. Raises ConfigError for one that alone does not."""
    if len(bytes_of) and int(bytes_of.max()) > most:
        raise ConfigError(f"a block's sections have {int(bytes_of.max())} bytes; PagedLimits.record_bytes is {most}")
    start = 0
    while start < len(bytes_of):
        n = max(1, int(np.searchsorted(np.cumsum(bytes_of[start:]), most, side="right")))
        yield slice(start, start + n)
        start += n
