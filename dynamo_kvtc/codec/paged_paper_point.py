"""Profile ``paper`` on a GPU: each layer group's operands there, built once per operating point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynamo_kvtc.codec.artifact import Artifact
from dynamo_kvtc.codec.paper import PaperProfile, Part
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops import affine
from dynamo_kvtc.ops.pages import FixedInputs
from dynamo_kvtc.ops.project.device import ALIGNMENT, Synthesis, WideAnalysis, synthesis_operands

if TYPE_CHECKING:
    from dynamo_kvtc.ops.affine.triton import Plan

_LIMB_STEP = ALIGNMENT
"""Columns of int8 after which an operand may start."""


@dataclass(frozen=True)
class PaperPart:
    """K or V of one layer group on the device. column: where its operand starts among the layer group's inputs."""

    unit: float
    column: int
    plan: Plan
    analysis: WideAnalysis
    synthesis: Synthesis

    @property
    def width(self) -> int:
        """Bytes of a token."""
        return self.plan.width

    @property
    def rank(self) -> int:
        return self.plan.columns

    @property
    def end(self) -> int:
        return self.column + self.analysis.limbs.shape[1]


@dataclass(frozen=True)
class PaperGroup:
    """One layer group on the device: P channels in all, K's and V's."""

    layers: tuple[int, int]
    channels: int
    inputs: FixedInputs
    k: PaperPart
    v: PaperPart
    mean_error: float

    @property
    def width(self) -> int:
        """Bytes of a token."""
        return self.k.width + self.v.width


@dataclass(frozen=True)
class PaperPoint:
    """One operating point on the device."""

    groups: tuple[PaperGroup, ...]

    @classmethod
    def load(cls, artifact: Artifact, index: int, device: torch.device) -> PaperPoint:
        """Raises ArtifactFormatError, and ConfigError for an operating point that leaves a layer group nothing."""
        profile = PaperProfile(artifact, index)
        out = []
        for g, bounds in enumerate(artifact.manifest.groups):
            own = profile.groups[g]
            channels = len(own.k.mean)
            start = channels // _LIMB_STEP * _LIMB_STEP
            heads = (bounds[1] - bounds[0]) * artifact.shape.kv_heads
            everything = torch.arange(2 * channels, dtype=torch.int32, device=device)
            mean, gain = (torch.cat(x).to(device) for x in (
                (own.k.mean, own.v.mean), (own.k.analysis_gain, own.v.analysis_gain)
            ))  # fmt: skip
            group = PaperGroup(
                layers=bounds,
                channels=2 * channels,
                inputs=FixedInputs.of(mean, gain, everything, artifact.shape.head_dim),
                k=_part(artifact, own.k, bounds, 0, 0, 0, device),
                v=_part(artifact, own.v, bounds, start, channels - start, heads, device),
                mean_error=own.mean_error,
            )
            if not group.width:
                raise ConfigError(f"operating point {index} quantises nothing of layer group {g}; use BlockCodec")
            out.append(group)
        return cls(tuple(out))

    @property
    def nbytes(self) -> int:
        """Bytes of the bases on the device; what else there is is small."""
        return sum(part.analysis.nbytes + part.synthesis.nbytes for g in self.groups for part in (g.k, g.v))


def _part(
    artifact: Artifact, part: Part, bounds: tuple[int, int], column: int, offset: int, first_head: int,
    device: torch.device,
) -> PaperPart:  # fmt: skip
    rope, basis = artifact.manifest.rope, part.basis.to(device)
    none: Tensor = torch.zeros(len(basis), 0, dtype=torch.int8, device=device)
    return PaperPart(
        unit=part.unit,
        column=column,
        plan=affine.device_plan(part.runs, device),
        analysis=WideAnalysis.of(basis, offset),
        synthesis=synthesis_operands(
            basis, none, 0, part.synthesis_gain.to(device), part.mean.to(device), bounds, artifact.shape.kv_heads,
            artifact.shape.head_dim, len(rope.inv_freq), rope.style == "interleaved", rope.attention_scaling,
            first_head,
        ),
    )  # fmt: skip
