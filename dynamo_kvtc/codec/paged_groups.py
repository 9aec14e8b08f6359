"""Profile ``kvtc`` on a GPU: each layer group's operands there, built once per operating point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynamo_kvtc.codec.artifact import Artifact
from dynamo_kvtc.codec.kvtc_point import KvtcGroup, KvtcPoint
from dynamo_kvtc.ops import quantize, rans
from dynamo_kvtc.ops.pages import FixedInputs, PagedCache
from dynamo_kvtc.ops.project.device import Analysis, Pages, Synthesis, padded, synthesis_operands
from dynamo_kvtc.ops.quantize.device import Quantiser

_LEVEL_BITS = 16


@dataclass(frozen=True)
class PagedGroup:
    """One layer group on the device: P channels, Pw wide inputs, R components of which W are wide."""

    layers: tuple[int, int]
    channels: int
    wide_inputs: int
    rank: int
    wide: int
    leading: int
    inputs: FixedInputs
    analysis: Analysis
    quantiser: Quantiser
    classes: Tensor
    centroid: Tensor
    scale: Tensor
    level_bias: Tensor
    synthesis: Synthesis

    @property
    def narrow(self) -> int:
        return self.rank - self.wide

    @property
    def nbytes(self) -> int:
        """Bytes of the bases on the device; what else there is is small."""
        return self.analysis.nbytes + self.synthesis.nbytes


@dataclass(frozen=True)
class PagedPoint:
    """One operating point on the device. shrink: float32 [16], one over each fineness's gain."""

    groups: tuple[PagedGroup, ...]
    tables: rans.DeviceTables
    lanes: int
    shrink: Tensor

    @classmethod
    def load(cls, artifact: Artifact, index: int, device: torch.device) -> PagedPoint:
        """Raises ArtifactFormatError."""
        point = KvtcPoint.load(artifact, index)
        groups = tuple(
            _group(artifact, group, bounds, device)
            for group, bounds in zip(point.groups, artifact.manifest.groups, strict=True)
        )
        shrink = torch.zeros(16)
        levels = torch.arange(quantize.FINENESS_LEVELS)
        shrink[: len(levels)] = 1 / quantize.gains(levels, torch.float32)
        return cls(groups, rans.DeviceTables.build(point.tables, device), point.lanes, shrink.to(device))

    @property
    def nbytes(self) -> int:
        return sum(group.nbytes for group in self.groups)


def pages_of(cache: PagedCache) -> Pages:
    """The cache as the transform's kernel wants it."""
    block, head, token = cache.strides
    item = cache.dtype.itemsize
    alignment = cache.alignment // item
    for stride in (block, head, token):
        while alignment > 1 and stride % alignment:
            alignment //= 2
    table = cache.table
    return Pages(
        cache.addresses, cache.dtype, cache.heads, cache.head_dim, cache.tokens_per_block, block, head, token,
        max(alignment, 1), None if table is None else table.pages, None if table is None else table.group_of,
    )  # fmt: skip


def _group(artifact: Artifact, g: KvtcGroup, bounds: tuple[int, int], device: torch.device) -> PagedGroup:
    shape, rope = artifact.shape, artifact.manifest.rope
    rank, width = len(g.classes), g.wide.shape[1]
    wide_slot = torch.full((len(g.mean),), -1, dtype=torch.int32)
    wide_slot[g.wide_inputs] = torch.arange(len(g.wide_inputs), dtype=torch.int32)
    wide, narrow, wide_inputs = (x.to(device) for x in (g.wide, g.narrow, g.wide_inputs))
    mean, analysis_gain, synthesis_gain = (x.to(device) for x in (g.mean, g.analysis_gain, g.synthesis_gain))
    pad = torch.zeros(width, dtype=torch.int32)
    return PagedGroup(
        layers=bounds,
        channels=len(g.mean),
        wide_inputs=len(g.wide_inputs),
        rank=rank,
        wide=width,
        leading=g.leading,
        inputs=FixedInputs.of(mean, analysis_gain, wide_slot.to(device), shape.head_dim),
        analysis=Analysis.of(wide, narrow, wide_inputs),
        quantiser=Quantiser.of(
            g.units, g.rounding, g.limits, g.centroid, g.scale, g.level_bias, g.activity, g.importance, g.thresholds,
            g.mean_error, g.bias, device,
        ),
        classes=torch.from_numpy(g.classes).to(device),
        centroid=torch.cat([g.centroid, torch.zeros(rank - width)]).to(device),
        scale=(torch.cat([pad, g.scale]) << _LEVEL_BITS).to(device),
        level_bias=(torch.cat([pad, g.level_bias]) << _LEVEL_BITS).to(device),
        synthesis=synthesis_operands(
            wide, narrow, g.exponent, synthesis_gain, mean, bounds, shape.kv_heads, shape.head_dim,
            len(rope.inv_freq), rope.style == "interleaved", rope.attention_scaling,
        ),
    )  # fmt: skip


def operand(tokens: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros [T, max(columns, 1)], rows at multiples of 16 bytes: room for what matrix units read."""
    width = padded(columns, dtype.itemsize)
    return torch.zeros(tokens, width, dtype=dtype, device=device)[:, : max(columns, 1)]
