"""Encoding on the GPU path: see ``codec.paged``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamo_kvtc.codec.headers import gaps_of, header_bytes_of, write_headers
from dynamo_kvtc.codec.lanes import HEAD
from dynamo_kvtc.codec.mailbox import Mailbox
from dynamo_kvtc.codec.paged_groups import PagedGroup, operand
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops import lanes, rans
from dynamo_kvtc.ops.checksum import copy_ranges_device
from dynamo_kvtc.ops.pages import FixedRows, gather_exact, gather_fixed
from dynamo_kvtc.ops.project.device import analyse_device
from dynamo_kvtc.ops.quantize.device import quantise_device

if TYPE_CHECKING:
    from dynamo_kvtc.codec.paged import Blocks, PagedCodec

_ALIGNMENT = 16
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
    _pending: list[tuple[Any, ...]]
    _codec: PagedCodec
    _arena: Tensor
    _done: Any

    def finish(self) -> None:
        """Waits for the GPU and writes the headers: now the records are whole. Raises ConfigError from them."""
        if self._done is not None:
            self._done.synchronize()
        for blocks, positions, exact, offsets, sizes, crc in self._pending:
            checksums = crc.numpy().view(np.uint32).reshape(sizes.shape[::-1]).T
            write_headers(
                self._arena.numpy(), offsets, self._codec.identity, blocks, positions, exact, sizes, checksums
            )
        self._pending = []

    def records(self) -> list[bytes]:
        """Copies of the finished records."""
        data = self._arena.numpy()
        return [data[o : o + s].tobytes() for o, s in zip(self.offsets, self.sizes, strict=True)]


@dataclass
class _Chunk:
    """Whole blocks worked on at once, and what the first half leaves for the second."""

    tokens: slice
    counts: NDArray[np.int32]
    asked: NDArray[np.bool_]
    turn: int
    sent: dict[str, Tensor]
    done: Any


class Encoder:
    """Workspace and launches. Two chunks are in flight: while the host sizes one, the GPU works on the next."""

    def __init__(self, codec: PagedCodec) -> None:
        self._codec = codec
        self._device = device = codec.cache.device
        self._cuda = device.type == "cuda"
        groups, self._lanes = codec.point.groups, codec.point.lanes
        t = codec.limits.encode_tokens
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._low = operand(t, max(g.channels for g in groups), torch.int8, device)
        self._high = operand(t, max(g.wide_inputs for g in groups), torch.int8, device)
        self._no_high = operand(t, 0, torch.int8, device)
        self._energy = torch.empty(t, dtype=torch.int64, device=device)
        self._saturated = torch.empty(t, dtype=torch.uint8, device=device)
        rank = max(g.rank for g in groups)
        self._coefficients = torch.empty(t, max(rank, 1), dtype=torch.int32, device=device)
        self._symbols = [torch.empty(t, max(g.rank, 1), dtype=torch.int16, device=device) for g in groups]
        self._error = torch.empty(len(groups), t, dtype=torch.float64, device=device)
        self._parameters = torch.empty(2, len(groups), t, dtype=torch.uint8, device=device)
        self._words = [
            [
                torch.empty(t * self._lanes, 2 * -(-g.rank // self._lanes) + 2, dtype=torch.int16, device=device)
                for g in groups
            ]
            for _ in range(2)
        ]
        self._lengths = torch.empty(2, len(groups), t * self._lanes, dtype=torch.int32, device=device)
        self._word_at = torch.empty(t * self._lanes, dtype=torch.int64, device=device)
        self._skip = torch.empty(2, t, dtype=torch.uint8, device=device)
        self._measured = torch.empty(2, len(groups), t, 4, dtype=torch.int32, device=device)
        self._measured_host = torch.empty(2, len(groups), t, 4, dtype=torch.int32, pin_memory=self._cuda)
        self._skip_host = torch.empty(2, t, dtype=torch.uint8, pin_memory=self._cuda)
        self._staging = torch.empty(codec.limits.record_bytes + _ALIGNMENT, dtype=torch.uint8, device=device)
        self._crc = torch.empty(t * len(groups), dtype=torch.int32, device=device)
        self._mailbox = Mailbox(device, 256 + t * (96 + 40 * len(groups)))

    @property
    def nbytes(self) -> int:
        """Bytes of workspace on the device."""
        own = [x for x in vars(self).values() if isinstance(x, Tensor) and x.device == self._device]
        own += [*self._symbols, *(x for turn in self._words for x in turn)]
        return sum(x.untyped_storage().nbytes() for x in own) + self._mailbox.nbytes

    def encode(self, blocks: Blocks, arena: Tensor, at: int) -> Encoded:
        counts, positions = blocks.counts, blocks.positions
        assert positions is not None
        if counts.max() > self._codec.limits.encode_tokens:
            raise ConfigError(
                f"a block has {counts.max()} tokens; PagedLimits.encode_tokens is {self._codec.limits.encode_tokens}"
            )
        asked = (positions < self._codec.policy.sinks if blocks.exact is None else blocks.exact).numpy()
        out = Encoded(
            np.zeros(len(counts), np.int64), np.zeros(len(counts), np.int64), np.zeros(len(asked), np.bool_), asked, [],
            self._codec, arena, None,
        )  # fmt: skip
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            before: tuple[int, _Chunk] | None = None
            first = 0
            for turn, (tokens, own) in enumerate(_chunks(counts, self._codec.limits.encode_tokens)):
                chunk = self._front(blocks, tokens, own, asked[tokens], turn % 2)
                if before is not None:
                    at = self._back(out, before[0], before[1], blocks, at)
                before = (first, chunk)
                first += len(own)
            if before is not None:
                self._back(out, before[0], before[1], blocks, at)
            if self._stream is not None:
                out._done = torch.cuda.Event()
                out._done.record()
        return out

    def _front(
        self, blocks: Blocks, tokens: slice, counts: NDArray[np.int32], asked: NDArray[np.bool_], turn: int
    ) -> _Chunk:
        """From the pages to lanes of words and their lengths."""
        codec, n = self._codec, len(asked)
        assert blocks.positions is not None
        first = np.cumsum(counts) - counts
        sent = self._mailbox.send(
            {
                "slots": blocks.slots[tokens].numpy(), "positions": blocks.positions[tokens].numpy(),
                "asked": asked.astype(np.uint8), "first": first.astype(np.int32), "counts": counts,
            }
        )  # fmt: skip
        rope = codec.artifact.manifest.rope
        codec.mark("encode")
        cos, sin = codec.rotations.at(sent["positions"])
        codec.mark("rotations")
        for g, group in enumerate(codec.point.groups):
            rows = self._rows(group, n)
            gather_fixed(codec.cache, group.layers, sent["slots"], cos, sin, rope, group.inputs, rows)
            codec.mark("gather")
            coefficients = self._coefficients[:n, : group.rank]
            high = rows.high if group.wide_inputs else self._no_high[:n]
            analyse_device(rows.low, high, group.analysis, coefficients)
            codec.mark("project")
            quantise_device(
                coefficients, rows.energy, rows.saturated, group.quantiser, self._symbols[g][:n, : group.rank],
                self._parameters[turn, g, :n], self._error[g, :n],
            )  # fmt: skip
            codec.mark("quantise")
        # An infinite error cannot be coded at all, even where the bound is off.
        worst = self._error[:, :n].amax(dim=0)
        unfit = ~((worst <= codec.policy.max_error) & worst.isfinite())
        skip = self._skip[turn, :n]
        skip.copy_(unfit.logical_or(sent["asked"] != 0))
        most = int(counts.max())
        for g, group in enumerate(codec.point.groups):
            parameters = self._parameters[turn, g, :n]
            offsets = ((parameters // 16).to(torch.int8) - 8) * 2
            lengths = self._lengths[turn, g, : n * self._lanes]
            rans.encode_lanes_device(
                self._symbols[g][:n, : group.rank], group.classes, codec.point.tables,
                self._words[turn][g][: len(lengths)], lengths, offsets=offsets, skip=skip,
                first=group.leading, lanes_per_token=self._lanes,
            )  # fmt: skip
            lanes.measure(
                lengths, skip, sent["first"], sent["counts"], self._measured[turn, g, : len(counts)], self._lanes, most
            )
        codec.mark("rANS")
        self._measured_host[turn, :, : len(counts)].copy_(self._measured[turn, :, : len(counts)], non_blocking=True)
        self._skip_host[turn, :n].copy_(skip, non_blocking=True)
        done = None
        if self._cuda:
            done = torch.cuda.Event()
            done.record()
        return _Chunk(tokens, counts, asked, turn, sent, done)

    def _rows(self, group: PagedGroup, n: int) -> FixedRows:
        return FixedRows(
            self._low[:n, : group.channels], self._high[:n, : max(group.wide_inputs, 1)], self._energy[:n],
            self._saturated[:n],
        )  # fmt: skip

    def _back(self, out: Encoded, first_block: int, chunk: _Chunk, blocks: Blocks, at: int) -> int:
        """From lanes to records without headers, in the arena from ``at`` on; where the next may start."""
        if chunk.done is not None:
            chunk.done.synchronize()
        codec, counts = self._codec, chunk.counts
        tokens, groups = int(counts.sum()), len(codec.point.groups)
        exact = self._skip_host[chunk.turn, :tokens].numpy().astype(np.bool_)
        out.exact[chunk.tokens] = exact
        first = np.cumsum(counts).astype(np.int64) - counts
        exact_of = np.add.reduceat(exact.astype(np.int64), first)
        measured = self._measured_host[chunk.turn, :, : len(counts)].numpy().astype(np.int64)
        layer_bytes = codec.artifact.shape.bytes_per_layer_token
        exact_bytes = np.stack(
            [exact_of * (g.layers[1] - g.layers[0]) * layer_bytes for g in codec.point.groups], axis=1
        )
        sizes = exact_bytes + np.stack([self._payload_bytes(m) for m in measured], axis=1)
        assert blocks.positions is not None
        positions = blocks.positions[chunk.tokens].numpy()
        header = header_bytes_of(counts, exact_of, gaps_of(positions, counts), groups)
        total = header + sizes.sum(axis=1)
        padded = -(-total // _ALIGNMENT) * _ALIGNMENT
        offsets = at + np.cumsum(padded) - padded
        if offsets[-1] + total[-1] > len(out._arena):
            raise ConfigError(
                f"the arena has {len(out._arena)} bytes; the records so far need {offsets[-1] + total[-1]}"
            )
        own = slice(first_block, first_block + len(counts))
        out.offsets[own], out.sizes[own] = offsets, total
        targets = (offsets + header)[:, None] + np.cumsum(sizes, axis=1) - sizes
        staged = -(-sizes // _ALIGNMENT) * _ALIGNMENT
        for part in _runs(staged.sum(axis=1), self._codec.limits.record_bytes):
            crc = self._write(chunk, part, first, exact, exact_bytes, sizes, staged, targets, out._arena, blocks)
            here = slice(int(first[part.start]), int(first[part.start] + counts[part].sum()))
            out._pending.append((counts[part], positions[here], exact[here], offsets[part], sizes[part], crc))
        return int(offsets[-1] + padded[-1])

    def _payload_bytes(self, measured: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [B] of least, most, words, coded tokens [B, 4]. Raises ConfigError for a lane that is too long."""
        least, most, words, coded = measured.T
        if most.max() > 0xFFFF:
            raise ConfigError(f"a rANS lane of {most.max()} words; a record holds at most 65535: use more layer groups")
        spread = np.where(coded > 0, most - least, 0)
        width = np.where(spread == 0, 0, np.where(spread < 256, 1, 2))
        body = coded * self._lanes * width + coded
        return np.where(coded > 0, HEAD.size + body + body % 2 + 2 * words, 0)

    def _write(
        self, chunk: _Chunk, part: slice, first: NDArray[np.int64], exact: NDArray[np.bool_],
        exact_bytes: NDArray[np.int64], sizes: NDArray[np.int64], staged: NDArray[np.int64],
        targets: NDArray[np.int64], arena: Tensor, blocks: Blocks,
    ) -> Tensor:  # fmt: skip
        """Sections of some of the chunk's blocks into staging, then with their checksums into the arena."""
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
        sent = self._mailbox.send(
            {
                "first": (first[part] - begin).astype(np.int32), "counts": counts, "slots": slots,
                "index": index.astype(np.int32), "count": per_block[block_of].astype(np.int32),
                "exact_base": base[block_of].T.copy(), "payload_base": (base + exact_bytes[part]).T.copy(),
                "base": base.T.reshape(-1).copy(), "sizes": sizes[part].T.reshape(-1).copy(),
                "targets": targets[part].T.reshape(-1).copy(),
            }
        )  # fmt: skip
        lane = slice(tokens.start * self._lanes, tokens.stop * self._lanes)
        codec.mark("encode")
        words = self._staging[: len(self._staging) // 2 * 2].view(torch.int16)
        for g, group in enumerate(codec.point.groups):
            if len(kept):
                gather_exact(
                    codec.cache, group.layers, sent["slots"], sent["exact_base"][g], sent["index"], sent["count"],
                    self._staging,
                )  # fmt: skip
            lanes.write(
                self._lengths[chunk.turn, g, lane], self._skip[chunk.turn, tokens], sent["first"], sent["counts"],
                self._parameters[chunk.turn, g, tokens], sent["payload_base"][g], self._words[chunk.turn][g][lane],
                self._staging, words, self._word_at[: lane.stop - lane.start], self._lanes, int(counts.max()),
            )  # fmt: skip
        codec.mark("pack")
        crc = self._crc[: sizes[part].size]
        copy_ranges_device(
            self._staging, sent["base"], sent["sizes"], arena, sent["targets"], crc, int(sizes[part].max())
        )
        codec.mark("copy")
        found = torch.empty(len(crc), dtype=torch.int32, pin_memory=self._cuda)
        found.copy_(crc, non_blocking=True)
        return found


def _chunks(counts: NDArray[np.int32], most: int) -> Iterator[tuple[slice, NDArray[np.int32]]]:
    """Runs of whole blocks of at most ``most`` tokens: their tokens and their counts."""
    start = token = 0
    while start < len(counts):
        reach = np.cumsum(counts[start:])
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
