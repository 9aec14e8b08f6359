"""Profile ``paper`` on the GPU path: exact int8 products of K and V, affine runs, DEFLATE; see ``codec.paged``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamo_kvtc.codec.paged_decode import Coded, Decoder, Sent
from dynamo_kvtc.codec.paged_encode import ALIGNMENT, EncodeChunk, Encoder
from dynamo_kvtc.codec.paged_groups import operand
from dynamo_kvtc.codec.paged_paper_point import PaperPart, PaperPoint
from dynamo_kvtc.codec.record import MAX_BLOCK_TOKENS
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops import affine, lanes
from dynamo_kvtc.ops.checksum import copy_ranges_device
from dynamo_kvtc.ops.deflate.host import HostDecoder, HostEncoder
from dynamo_kvtc.ops.deflate.nvcomp import MAX_CHUNK_BYTES, BatchDecoder, BatchEncoder, Codec
from dynamo_kvtc.ops.pages import FixedRows, gather_fixed
from dynamo_kvtc.ops.project.device import (
    analyse_wide_device,
    padded,
    square_sums_device,
    synthesise_into_pages,
)

if TYPE_CHECKING:
    from dynamo_kvtc.codec.paged import PagedCodec

_LEAST_BLOCK = 8
"""Tokens of a block below which a chunk is not filled: rooms for DEFLATE are per block, not per byte."""
_EMPTY_STREAM = (3, 0)
"""A DEFLATE stream of no bytes: what a block that must not be inflated is replaced by."""


class PaperEncoder(Encoder):
    def __init__(self, codec: PagedCodec, point: PaperPoint, deflate: str, effort: int) -> None:
        t = codec.limits.encode_tokens
        blocks = max(1, t // _LEAST_BLOCK)
        super().__init__(codec, blocks)
        self._point, self._nvcomp = point, deflate == "deflate"
        self._widest = max(g.width for g in point.groups)
        longest = self._widest * min(codec.limits.block_tokens, t, MAX_BLOCK_TOKENS)
        self._deflate: BatchEncoder | HostEncoder
        if self._nvcomp:
            longest = min(longest, MAX_CHUNK_BYTES[Codec.DEFLATE])
            self._deflate = BatchEncoder(Codec.DEFLATE, blocks, longest, self._device, effort)
        else:
            self._deflate = HostEncoder(blocks, longest)
        device, groups = self._device, point.groups
        parts = [part for g in groups for part in (g.k, g.v)]
        rank, width = max(part.rank for part in parts), self._widest
        self._stride = padded(max(g.channels for g in groups), 1)
        self._limbs = torch.zeros(2 * t * self._stride, dtype=torch.int8, device=device)
        self._products = torch.empty(4 * t * rank, dtype=torch.int32, device=device)
        self._coefficients = torch.empty(t * rank, dtype=torch.float64, device=device)
        self._levels = torch.empty(t * rank, dtype=torch.float32, device=device)
        self._fits = torch.empty(2 * t * max(part.plan.runs for part in parts), dtype=torch.float32, device=device)
        self._energy = torch.empty(2, t, dtype=torch.int64, device=device)
        self._sums = torch.empty(2, t, dtype=torch.float64, device=device)
        self._saturated = torch.empty(t, dtype=torch.uint8, device=device)
        self._overflow = torch.empty(t, dtype=torch.bool, device=device)
        self._data = [torch.empty(t, g.width, dtype=torch.uint8, device=device) for g in groups]
        # An empty block's chunk is one byte, which must be there.
        self._compact = torch.empty(t * width, dtype=torch.uint8, device=device)
        self._planes = torch.empty(t * width + ALIGNMENT, dtype=torch.uint8, device=device)
        self._order = torch.zeros(t + 1, dtype=torch.int64, device=device)
        self._numbers = torch.arange(t, dtype=torch.int64, device=device)
        self._starts = torch.zeros(blocks + 1, dtype=torch.int64, device=device)
        self._rooms = torch.arange(blocks, dtype=torch.int64, device=device) * self._deflate.room
        self._packed = [
            [torch.empty(blocks * self._deflate.room, dtype=torch.uint8, device=device) for _ in groups]
            for _ in range(2)
        ]
        self._packed_bytes = torch.empty(blocks, dtype=torch.int64, device=device)
        self._packed_status = torch.empty(blocks, dtype=torch.int32, device=device)

    def _check_blocks(self, counts: NDArray[np.int32]) -> None:
        super()._check_blocks(counts)
        most = int(counts.max())
        if most > self._codec.limits.block_tokens:
            raise ConfigError(
                f"a block has {most} tokens; PagedLimits.block_tokens is {self._codec.limits.block_tokens}"
            )
        if most * self._widest > self._deflate.max_chunk_bytes:
            raise ConfigError(
                f"a block of {most} tokens has {most * self._widest} bytes of codes in a layer group; nvCOMP's DEFLATE "
                f'takes {self._deflate.max_chunk_bytes}: use smaller blocks, more layer groups, or deflate="zlib"'
            )

    def _quantise(self, g: int, n: int, turn: int, sent: dict[str, Tensor], cos: Tensor, sin: Tensor) -> None:
        codec, group = self._codec, self._point.groups[g]
        # Low limbs of all tokens, then high limbs: one product with the basis's makes all four of a coefficient.
        limbs = self._limbs[: 2 * n * self._stride].view(2 * n, self._stride)
        energy, saturated = self._energy[:, :n], self._saturated[:n]
        rows = FixedRows(limbs[:n, : group.channels], limbs[n:, : group.channels], energy[1], saturated)
        gather_fixed(
            codec.cache, group.layers, sent["slots"], cos, sin, codec.artifact.manifest.rope, group.inputs, rows
        )
        square_sums_device(limbs[:, : group.channels // 2], energy[0])
        energy[1].sub_(energy[0])
        codec.mark("gather")
        error, unfit = self._error[g, :n], saturated != 0
        data, split = self._data[g][:n], group.k.width
        error.zero_()
        for part, own, squares in ((group.k, data[:, :split], energy[0]), (group.v, data[:, split:], energy[1])):
            error += self._quantise_part(part, limbs[:, part.column : part.end], own, squares)
            unfit |= self._overflow[:n]
        error.div_(group.mean_error).masked_fill_(unfit, float("inf"))

    def _quantise_part(self, part: PaperPart, inputs: Tensor, out: Tensor, energy: Tensor) -> Tensor:
        """Bytes of K or V into out uint8 [n, W]; squared error float64 [n], as ``codec.paper`` computes it."""
        n, rank = len(out), part.rank
        coefficients = self._coefficients[: n * rank].view(n, rank)
        analyse_wide_device(inputs, part.analysis, coefficients, self._products[: 4 * n * rank].view(2 * n, 2 * rank))
        self._codec.mark("project")
        fits = self._fits[: 2 * n * part.plan.runs].view(n, 2 * part.plan.runs)
        affine.encode_device(coefficients, part.plan, out, self._overflow[:n], fits)
        levels = affine.decode_device(out, part.plan, self._levels[: n * rank].view(n, rank))
        kept, lost = self._sums[:, :n]
        affine.squared_errors_device(coefficients, levels, part.plan, kept, lost)
        self._codec.mark("quantise")
        return (energy - kept).clamp_(min=0).add_(lost).mul_(part.unit**2)

    def _code(
        self, g: int, n: int, turn: int, sent: dict[str, Tensor], counts: NDArray[np.int32], measured: Tensor
    ) -> None:
        blocks, width, skip = len(counts), self._point.groups[g].width, self._skip[turn, :n]
        order, starts = self._order[: n + 1], self._starts[: blocks + 1]
        if g == 0:
            # Coded tokens to the front, in order; the last place takes the others.
            rank = (skip == 0).cumsum(0)
            order.zero_()
            order.scatter_(0, torch.where(skip == 0, rank - 1, n), self._numbers[:n])
            starts[1:] = rank[(sent["first"] + sent["counts"] - 1).long()]
        compact = self._compact[: n * width].view(n, width)
        torch.index_select(self._data[g][:n], 0, order[:n], out=compact)
        affine.to_planes(compact, starts, int(counts.max()), self._planes[: n * width])
        sizes = (starts[1:] - starts[:-1]) * width
        found, status = self._packed_bytes[:blocks], self._packed_status[:blocks]
        self._deflate.encode(
            self._planes, starts[:-1] * width, sizes.clamp(min=1), self._packed[turn][g], self._rooms[:blocks], found,
            status,
        )  # fmt: skip
        measured[:, 0] = torch.where(sizes > 0, found, 0)
        measured[:, 1] = torch.where(sizes > 0, status, 0)
        self._codec.mark("DEFLATE")

    def _payload_bytes(self, measured: NDArray[np.int64]) -> NDArray[np.int64]:
        if measured[:, 1].any():
            raise ConfigError(
                f"nvCOMP could not compress a block (status {int(measured[:, 1].max())}); it needs a driver and a GPU "
                'that this version knows: use deflate="zlib"'
            )
        return measured[:, 0]

    def _payloads(
        self, g: int, chunk: EncodeChunk, part: slice, tokens: slice, sent: dict[str, Tensor], most: int
    ) -> None:
        crc = self._crc[: part.stop - part.start]
        copy_ranges_device(
            self._packed[chunk.turn][g], self._rooms[part], sent["payload_sizes"][g], self._staging,
            sent["payload_base"][g], crc, most,
        )  # fmt: skip


class PaperDecoder(Decoder):
    def __init__(self, codec: PagedCodec, point: PaperPoint, deflate: str) -> None:
        super().__init__(codec)
        self._point = point
        t, device = codec.limits.decode_tokens, self._device
        width = max(g.width for g in point.groups)
        longest = width * min(t, MAX_BLOCK_TOKENS)
        self._inflate: BatchDecoder | HostDecoder
        self._inflate = (
            BatchDecoder(Codec.DEFLATE, t, longest, device) if deflate == "deflate" else HostDecoder(t, longest)
        )
        # The empty stream first, then each block's section so that its payload is aligned.
        room = codec.limits.record_bytes + ALIGNMENT * (2 * t + 1)
        self._aligned = torch.zeros(room, dtype=torch.uint8, device=device)
        self._aligned[: len(_EMPTY_STREAM)] = torch.tensor(_EMPTY_STREAM, dtype=torch.uint8)
        self._planes = torch.empty(t * width + ALIGNMENT, dtype=torch.uint8, device=device)
        self._sums = torch.empty(t, dtype=torch.int32, device=device)
        self._data = torch.empty(t * width, dtype=torch.uint8, device=device)
        self._found = torch.empty(t, dtype=torch.int64, device=device)
        self._status = torch.empty(t, dtype=torch.int32, device=device)
        self._good = torch.empty(2, t, dtype=torch.bool, device=device)
        rank = max(part.rank for g in point.groups for part in (g.k, g.v))
        self._levels = operand(t, rank, torch.float16, device)
        # Profile kvtc's narrow components and their factors: none, and ones.
        self._none = operand(t, 0, torch.int8, device)
        self._no_levels = operand(t, 0, torch.float16, device)
        self._ones = torch.ones(t, device=device)

    def _arrays(self, coded: Coded) -> tuple[dict[str, NDArray], NDArray[np.int64]]:
        # In a record a section may start at any byte; here, where its payload, behind the exact tokens, is aligned.
        lead = np.where(coded.sound, -coded.exact % ALIGNMENT, 0)
        span = -(-(lead + coded.section) // ALIGNMENT) * ALIGNMENT
        start = ALIGNMENT + np.cumsum(span, axis=1) - span + lead
        payload = coded.section - coded.exact
        wrong = coded.short | (coded.sound & ((payload > 0) != (coded.counts > 0)))
        starts = np.concatenate([[0], np.cumsum(coded.counts)]).astype(np.int64)
        tokens = np.tile(starts, (len(payload), 1))
        arrays = {
            "start": start, "payload": np.where(wrong, 0, start + coded.exact),
            "payload_bytes": np.where(wrong, len(_EMPTY_STREAM), payload),
            "wrong": np.where(wrong, lanes.BAD_DIRECTORY, lanes.SOUND).astype(np.int32), "tokens": tokens,
        }  # fmt: skip
        return arrays, start

    def _receive(self, own: slice, turn: int, sent: Sent) -> Tensor:
        g = own.start
        arrays, ring, status = sent.of(g), self._ring[turn], sent.status
        sums = self._sums[: len(status)]
        copy_ranges_device(
            ring, arrays["where"], arrays["section"], self._aligned, arrays["start"], sums, int(sent.most[g])
        )
        lanes.verify(sums, arrays["crc"], status)
        status.copy_(torch.where(status == 0, arrays["wrong"], status))
        self._codec.mark("checksum")
        return self._aligned

    def _coded(self, g: int, turn: int, sent: Sent) -> None:
        codec, group, n, most, arrays = self._codec, self._point.groups[g], sent.coded, sent.longest, sent.of(g)
        status = sent.status
        blocks, width, starts = len(status), group.width, arrays["tokens"]
        # What its checksum or its size gives away is never shown to nvCOMP, which promises nothing about such bytes.
        wanted = (arrays["counts"] > 0) & (status == 0)
        room = ((starts[1:] - starts[:-1]) * width).clamp(min=1)
        found, inflated = self._found[:blocks], self._status[:blocks]
        self._inflate.decode(
            self._aligned, torch.where(wanted, arrays["payload"], 0),
            torch.where(wanted, arrays["payload_bytes"], len(_EMPTY_STREAM)), self._planes, starts[:-1] * width, room,
            found, inflated,
        )  # fmt: skip
        damaged = wanted & ((inflated != 0) | (found != room))
        status.masked_fill_(damaged, lanes.BAD_LANE)
        codec.mark("DEFLATE")
        data, split = self._data[: n * width].view(n, width), group.k.width
        affine.from_planes(self._planes[: n * width], starts, most, data)
        parts = ((group.k, data[:, :split]), (group.v, data[:, split:]))
        good = self._good[:, :n]
        for i, (part, own) in enumerate(parts):
            affine.valid_device(own, part.plan, good[i])
        # Tokens of blocks that were found bad before are whatever was there, and their status stays.
        bad = (~good.all(dim=0)).to(torch.int32)[None]
        chosen = self._chosen[:n]
        lanes.judge(bad, arrays["first"], arrays["counts"], status, arrays["slots"], chosen, 1, most)
        codec.mark("dequantise")
        for part, own in parts:
            levels = self._levels[:n, : part.rank] if part.rank else self._no_levels[:n]
            if part.rank:
                affine.decode_device(own, part.plan, levels)
                codec.mark("dequantise")
            synthesise_into_pages(
                self._none[:n], levels, part.synthesis, self._ones[:n], *sent.angles, codec.pages, chosen
            )  # fmt: skip
            codec.mark("project")
