"""Profile ``kvtc`` on the GPU path: int8 product, quantiser and rANS; see ``codec.paged``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamo_kvtc.codec.kvtc_point import WIDE_STEP
from dynamo_kvtc.codec.lanes import FINENESS_STRIDE, HEAD, OFFSET_CLASSES, OFFSET_NEUTRAL
from dynamo_kvtc.codec.paged_decode import Coded, Decoder, Sent
from dynamo_kvtc.codec.paged_encode import EncodeChunk, Encoder
from dynamo_kvtc.codec.paged_groups import PagedPoint, operand
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops import lanes, quantize, rans
from dynamo_kvtc.ops.checksum import copy_ranges_device
from dynamo_kvtc.ops.pages import FixedRows, gather_fixed
from dynamo_kvtc.ops.project.device import analyse_device, padded, synthesise_into_pages
from dynamo_kvtc.ops.quantize.device import quantise_device

if TYPE_CHECKING:
    from dynamo_kvtc.codec.paged import PagedCodec


class KvtcEncoder(Encoder):
    def __init__(self, codec: PagedCodec, point: PagedPoint) -> None:
        t = codec.limits.encode_tokens
        super().__init__(codec, t)
        device, groups, self._lanes = self._device, point.groups, point.lanes
        self._point = point
        self._low = operand(t, max(g.channels for g in groups), torch.int8, device)
        self._high = operand(t, max(g.wide_inputs for g in groups), torch.int8, device)
        self._no_high = operand(t, 0, torch.int8, device)
        self._energy = torch.empty(t, dtype=torch.int64, device=device)
        self._saturated = torch.empty(t, dtype=torch.uint8, device=device)
        products = max(g.analysis.products for g in groups)
        self._products = torch.empty(t, padded(products, 4), dtype=torch.int32, device=device)
        self._symbols = [torch.empty(t, max(g.rank, 1), dtype=torch.int16, device=device) for g in groups]
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

    def _quantise(self, g: int, n: int, turn: int, sent: dict[str, Tensor], cos: Tensor, sin: Tensor) -> None:
        codec, group = self._codec, self._point.groups[g]
        rows = FixedRows(
            self._low[:n, : group.channels], self._high[:n, : max(group.wide_inputs, 1)], self._energy[:n],
            self._saturated[:n],
        )  # fmt: skip
        rope = codec.artifact.manifest.rope
        gather_fixed(codec.cache, group.layers, sent["slots"], cos, sin, rope, group.inputs, rows)
        codec.mark("gather")
        products = self._products[:n, : group.analysis.products]
        high = rows.high if group.wide_inputs else self._no_high[:n]
        analyse_device(rows.low, high, group.analysis, products)
        codec.mark("project")
        quantise_device(
            products, rows.energy, rows.saturated, group.quantiser, self._symbols[g][:n, : group.rank],
            self._parameters[turn, g, :n], self._error[g, :n],
        )  # fmt: skip
        codec.mark("quantise")

    def _code(
        self, g: int, n: int, turn: int, sent: dict[str, Tensor], counts: NDArray[np.int32], measured: Tensor
    ) -> None:
        group, skip = self._point.groups[g], self._skip[turn, :n]
        parameters = self._parameters[turn, g, :n]
        offsets = ((parameters // FINENESS_STRIDE).to(torch.int8) - OFFSET_NEUTRAL) * OFFSET_CLASSES
        lengths = self._lengths[turn, g, : n * self._lanes]
        rans.encode_lanes_device(
            self._symbols[g][:n, : group.rank], group.classes, self._point.tables, self._words[turn][g][: len(lengths)],
            lengths, offsets=offsets, skip=skip, first=group.leading, lanes_per_token=self._lanes,
        )  # fmt: skip
        lanes.measure(lengths, skip, sent["first"], sent["counts"], measured, self._lanes, int(counts.max()))
        self._codec.mark("rANS")

    def _payload_bytes(self, measured: NDArray[np.int64]) -> NDArray[np.int64]:
        """From least, most, words and coded tokens of each block. Raises ConfigError for a lane that is too long."""
        least, most, words, coded = measured.T
        if most.max() > 0xFFFF:
            raise ConfigError(f"a rANS lane of {most.max()} words; a record holds at most 65535: use more layer groups")
        spread = np.where(coded > 0, most - least, 0)
        width = np.where(spread == 0, 0, np.where(spread < 256, 1, 2))
        body = coded * self._lanes * width + coded
        return np.where(coded > 0, HEAD.size + body + body % 2 + 2 * words, 0)

    def _payloads(
        self, g: int, chunk: EncodeChunk, part: slice, tokens: slice, sent: dict[str, Tensor], most: int
    ) -> None:
        lane = slice(tokens.start * self._lanes, tokens.stop * self._lanes)
        words = self._staging[: len(self._staging) // 2 * 2].view(torch.int16)
        lanes.write(
            self._lengths[chunk.turn, g, lane], self._skip[chunk.turn, tokens], sent["first"], sent["counts"],
            self._parameters[chunk.turn, g, tokens], sent["payload_base"][g], self._words[chunk.turn][g][lane],
            self._staging, words, self._word_at[: lane.stop - lane.start], self._lanes, int(chunk.counts[part].max()),
        )  # fmt: skip


MANY_LANES = 1 << 15
"""rANS lanes that keep a GPU busy."""


class KvtcDecoder(Decoder):
    def __init__(self, codec: PagedCodec, point: PagedPoint) -> None:
        super().__init__(codec)
        self._point, self._lanes = point, point.lanes
        t, device = codec.limits.decode_tokens, self._device
        # Where a layer group has no component of a kind, its product reads columns of zeros that are never written.
        self._narrow = [operand(t, g.narrow, torch.int8, device) for g in point.groups]
        self._wide = [operand(t, g.wide, torch.float16, device) for g in point.groups]
        self._levels = rans.LevelGroups.of(
            [
                rans.LevelGroup(
                    g.classes, g.centroid, g.scale, g.level_bias, wide, narrow, -(-g.wide // WIDE_STEP) * WIDE_STEP,
                    g.leading,
                )
                for g, wide, narrow in zip(point.groups, self._wide, self._narrow, strict=True)
            ]
        )  # fmt: skip
        groups = len(point.groups)
        self._sums = torch.empty(groups * t, dtype=torch.int32, device=device)
        self._starts = torch.empty(groups, t * self._lanes, dtype=torch.int64, device=device)
        self._lengths = torch.empty(groups, t * self._lanes, dtype=torch.int32, device=device)
        self._bad = torch.empty(groups, t * self._lanes, dtype=torch.int32, device=device)
        self._factors = torch.empty(groups, t, dtype=torch.float32, device=device)
        self._offsets = torch.empty(groups, t, dtype=torch.int8, device=device)

    def _arrays(self, coded: Coded) -> tuple[dict[str, NDArray], NDArray[np.int64]]:
        room = np.where(coded.short, 1, coded.section - coded.exact)
        return {"payload": coded.where + coded.exact, "room": room}, coded.where

    def _seen(self, coded: int, together: bool, apart: bool) -> tuple[slice, ...]:
        """More layer groups at once: more lanes side by side, and fewer launches. Where one group's lanes are many, the
        first group need not wait for the others."""
        every = len(self._point.groups)
        if not together:
            return super()._seen(coded, together, apart)
        if apart and coded * self._lanes >= MANY_LANES and every > 1:
            return slice(0, 1), slice(1, every)
        return (slice(0, every),)

    def _receive(self, own: slice, turn: int, sent: Sent) -> Tensor:
        """Levels, and which tokens may be written."""
        codec, ring, split, n, status = self._codec, self._ring[turn], self._lanes, sent.coded, sent.status
        rows, lane = slice(sent.row, sent.row + n), slice(sent.row * split, (sent.row + n) * split)
        starts, lengths, bad = (x[own, lane] for x in (self._starts, self._lengths, self._bad))
        factors, offsets = self._factors[own, rows], self._offsets[own, rows]
        blocks, sections = sent.arrays, {name: x[own] for name, x in sent.by_group.items()}
        sums = self._sums[: sections["section"].numel()]
        copy_ranges_device(
            ring, sections["where"].view(-1), sections["section"].view(-1), None, None, sums, int(sent.most[own].max())
        )
        lanes.read(
            ring, sections["payload"], sections["room"], sums, sections["crc"], blocks["first"], blocks["counts"],
            status, self._point.shrink, starts, lengths, factors, offsets, split, sent.longest, OFFSET_NEUTRAL,
            OFFSET_CLASSES, quantize.FINENESS_LEVELS - 1,
        )  # fmt: skip
        codec.mark("checksum")
        if n:
            words = ring[: len(ring) // 2 * 2].view(torch.int16)
            rans.decode_levels_device(
                words, starts, lengths, self._point.tables, self._levels, bad, factors=factors, offsets=offsets,
                lanes_per_token=split, group=own.start, row=sent.row,
            )  # fmt: skip
            chosen = self._chosen[rows]
            lanes.judge(bad, blocks["first"], blocks["counts"], status, blocks["slots"], chosen, split, sent.longest)
        codec.mark("rANS")
        return ring

    def _coded(self, g: int, turn: int, sent: Sent) -> None:
        group, rows = self._point.groups[g], slice(sent.row, sent.row + sent.coded)
        synthesise_into_pages(
            self._narrow[g][rows], self._wide[g][rows], group.synthesis, self._factors[g, rows], *sent.angles,
            self._codec.pages, self._chosen[rows],
        )  # fmt: skip
        self._codec.mark("project")
