"""What profile ``kvtc`` reads of an artifact for one operating point: checked once, used by every device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamo_kvtc.codec.artifact import Artifact
from dynamo_kvtc.codec.lanes import OFFSET_CHOICES
from dynamo_kvtc.errors import ArtifactFormatError, ConfigError
from dynamo_kvtc.ops import project, quantize, rans

LANES = (1, 2, 4, 8)
WIDE_STEP = 16
"""Wide components come in multiples of this, or all components are wide."""
MAX_LEADING = 256
"""Components whose symbols decide a token's fineness."""
_GAIN_MAX = 1e24
_UNIT_MAX = 2**21
_LONGEST = 1.5
"""Of a component; rounding to 8 bits leaves its length within a percent of 1."""
_WIDE_INPUT = project.NARROW_INPUT_MAX
"""An input whose reach is over this many fixed-point units gets two limbs; the others are clipped there."""
_LEVEL_MARGIN = 0.2
"""Steps that a level stays inside its bin, so that coding a decoded block again gives the same symbols."""


@dataclass(frozen=True)
class KvtcGroup:
    """One layer group: P channels, R live components, the first W of them wide, the first F <= W leading. On the CPU.

    mean, analysis_gain, synthesis_gain: float32 [P]; wide_inputs: int64 [Pw] channels with two limbs;
    wide: int16 [P, W]; narrow: int8 [P, R - W]; exponent: a narrow level times a narrow entry is in 2**-exponent steps;
    classes: uint8 [R]; units, rounding, limits: int32 [R] (``ops.quantize``); centroid: float32 [W]; scale, level_bias:
    int32 [R - W]; importance: int32 [2, F]; activity: int32 [R - F]; thresholds: int64 [15].
    """

    layers: int
    mean: Tensor
    analysis_gain: Tensor
    synthesis_gain: Tensor
    wide_inputs: Tensor
    wide: Tensor
    narrow: Tensor
    exponent: int
    classes: NDArray[np.uint8]
    units: Tensor
    rounding: Tensor
    limits: Tensor
    centroid: Tensor
    scale: Tensor
    level_bias: Tensor
    importance: Tensor
    bias: int
    activity: Tensor
    thresholds: Tensor
    mean_error: float

    @property
    def leading(self) -> int:
        """Components that are quantised with the common step and decide the rest's."""
        return self.importance.shape[1]


@dataclass(frozen=True)
class KvtcPoint:
    """One operating point: its class tables, lanes per token, layer groups."""

    tables: rans.ClassTables
    lanes: int
    groups: tuple[KvtcGroup, ...]

    @classmethod
    def load(cls, artifact: Artifact, index: int) -> KvtcPoint:
        """Raises ArtifactFormatError if a tensor is missing or holds what no calibration writes."""
        prefix = f"point{index}"
        frequencies = artifact.tensor(f"{prefix}.frequencies", torch.uint16, -1, -1)
        count = frequencies.shape[0]
        shift = artifact.tensor(f"{prefix}.shift", torch.uint8, count)
        try:
            tables = rans.ClassTables(frequencies.numpy(), shift.numpy())
        except ConfigError as exc:
            raise ArtifactFormatError(f"operating point {index}: {exc}") from exc
        rounding = artifact.tensor(f"{prefix}.rounding", torch.int32, count)
        centroid = artifact.tensor(f"{prefix}.centroid", torch.float32, count)
        one = 2**quantize.FRACTION_BITS
        if not bool(((rounding >= 0) & (rounding < one)).all()) or not bool((centroid.abs() < 1).all()):
            raise ArtifactFormatError(
                f"operating point {index}: roundings must be in 0..{one - 1} and centroids between -1 and 1"
            )
        activity = artifact.tensor(f"{prefix}.activity", torch.int32, count)
        if not bool((activity >= 0).all()):
            raise ArtifactFormatError(f"operating point {index}: activity weights must not be negative")
        point = artifact.manifest.points[index]
        if not 0 < point.step < float("inf"):
            raise ArtifactFormatError(f"operating point {index}: step {point.step} is not a positive number")
        if point.lanes not in LANES:
            raise ArtifactFormatError(
                f"operating point {index}: {point.lanes} lanes a token; it must be one of {LANES}"
            )
        groups = tuple(
            _load_group(artifact, g, end - start, prefix, point.step, rounding, centroid, activity)
            for g, (start, end) in enumerate(artifact.manifest.groups)
        )
        return cls(tables, point.lanes, groups)


def _load_group(
    artifact: Artifact, g: int, layers: int, prefix: str, step: float, rounding: Tensor, centroid: Tensor,
    activity: Tensor,
) -> KvtcGroup:  # fmt: skip
    shape = artifact.shape
    channels = 2 * layers * shape.kv_heads * shape.head_dim
    mean = artifact.tensor(f"group{g}.mean", torch.float32, channels)
    weight = artifact.tensor(f"group{g}.weight", torch.float32, channels)
    reach = artifact.tensor(f"group{g}.reach", torch.float32, channels)
    wide = artifact.tensor(f"group{g}.wide", torch.int16, channels, -1)
    narrow = artifact.tensor(f"group{g}.narrow", torch.int8, channels, -1)
    scale = artifact.tensor(f"group{g}.scale", torch.uint8, narrow.shape[1]).to(torch.int32)
    exponent = int(artifact.tensor(f"group{g}.exponent", torch.int32, 1))
    classes = artifact.tensor(f"group{g}.{prefix}.classes", torch.uint8, -1)
    width = int(artifact.tensor(f"group{g}.{prefix}.wide", torch.int32, 1))
    error = artifact.tensor(f"group{g}.{prefix}.error", torch.float32, 1)
    importance = artifact.tensor(f"group{g}.{prefix}.importance", torch.int32, 2, -1)
    bias = artifact.tensor(f"group{g}.{prefix}.bias", torch.int32, 1)
    thresholds = artifact.tensor(f"group{g}.{prefix}.thresholds", torch.int64, OFFSET_CHOICES - 1)
    rank, where = classes.shape[0], f"layer group {g}"
    if not importance.shape[1] <= width <= min(rank, wide.shape[1]):
        raise ArtifactFormatError(
            f"{where}: {importance.shape[1]} leading and {width} wide components of {rank}, {wide.shape[1]} stored wide"
        )
    if importance.shape[1] > MAX_LEADING:
        raise ArtifactFormatError(f"{where}: {importance.shape[1]} leading components; at most {MAX_LEADING}")
    if width % WIDE_STEP and width != rank:
        raise ArtifactFormatError(f"{where}: {width} wide components of {rank}; allowed are multiples of {WIDE_STEP}")
    if not bool((thresholds[1:] >= thresholds[:-1]).all()):
        raise ArtifactFormatError(f"{where}: thresholds of the table choices must not fall")
    if rank > narrow.shape[1] or int(classes.max() if rank else 0) >= len(rounding):
        raise ArtifactFormatError(f"{where}: {rank} components over {narrow.shape[1]}, or a class too many")
    if channels > project.MAX_CHANNELS:
        raise ArtifactFormatError(f"{where}: {channels} channels; at most {project.MAX_CHANNELS}")
    if not 0 <= exponent <= quantize.UNIT_BITS or not bool((scale > 0).all()):
        raise ArtifactFormatError(f"{where}: exponent {exponent} or a narrow component's scale is out of range")
    largest = int(scale.max() if len(scale) else 1) << (quantize.UNIT_BITS - exponent)
    columns = (_squared_norms(wide), _squared_norms(narrow))
    norm = max(float(x.max()) if len(x) else 0.0 for x in columns)
    if largest > _UNIT_MAX or norm > quantize.NORM_MAX:
        raise ArtifactFormatError(f"{where}: a unit of {largest} or a squared norm of {norm:g}; the basis is too large")
    own = torch.cat([columns[0] * 4.0**-project.BASIS_BITS, columns[1] * scale.double().square() * 4.0**-exponent])
    if bool((own > _LONGEST**2).any()):
        raise ArtifactFormatError(f"{where}: a component of length {float(own.max()) ** 0.5:.3g}; it must be about 1")
    analysis_gain = (weight.double() * (2**quantize.INPUT_BITS / step)).float()
    synthesis_gain = (step / weight.double()).float()
    # Within these bounds no sum over a token's levels leaves float32's range. NaN fails every comparison.
    fits = [(gain > 1 / _GAIN_MAX) & (gain < _GAIN_MAX) for gain in (analysis_gain, synthesis_gain)]
    finite = [*fits, mean.abs() < _GAIN_MAX, reach >= 0, error >= 0, error < float("inf")]
    if not all(bool(fit.all()) for fit in finite):
        raise ArtifactFormatError(
            f"{where}: weights must be positive, means, reaches and error finite, weights over step {step} and its "
            f"inverse below {_GAIN_MAX:g}"
        )
    index = classes.long()
    own_scale, own_rounding, own_centroid = scale[width:rank], rounding[index], centroid[index]
    own_bias = level_bias(own_scale, own_rounding[width:], own_centroid[width:])
    limits = torch.full((rank,), quantize.SYMBOL_MAX, dtype=torch.int32)
    limits[width:] = quantize.narrow_limits(own_scale, own_bias)
    units = torch.full((rank,), quantize.WIDE_UNIT, dtype=torch.int32)
    units[width:] = own_scale << (quantize.UNIT_BITS - exponent)
    return KvtcGroup(
        layers=layers,
        mean=mean,
        analysis_gain=analysis_gain,
        synthesis_gain=synthesis_gain,
        wide_inputs=torch.nonzero(reach.double() * (2**quantize.INPUT_BITS / step) > _WIDE_INPUT)[:, 0],
        wide=wide[:, :width].contiguous(),
        narrow=narrow[:, width:rank].contiguous(),
        exponent=exponent,
        classes=classes.numpy(),
        units=units,
        rounding=own_rounding,
        limits=limits,
        centroid=own_centroid[:width],
        scale=own_scale,
        level_bias=own_bias,
        importance=importance,
        bias=int(bias),
        activity=activity[index][importance.shape[1] :],
        thresholds=thresholds,
        mean_error=max(float(error), 1e-12),
    )


def level_bias(scale: Tensor, rounding: Tensor, centroid: Tensor) -> Tensor:
    """int32 [N]: how many levels a narrow bin's level lies below its number; never so many that it leaves the bin.

    scale: int32 [N], levels per step; rounding: [N] in 2**-FRACTION_BITS steps; centroid: float32 [N], in steps.
    """
    wanted = (centroid.double() * scale).round()
    inside = ((rounding.double() * 2.0**-quantize.FRACTION_BITS - _LEVEL_MARGIN) * scale).floor()
    return torch.minimum(wanted, inside).clamp(min=0).to(torch.int32)


def _squared_norms(basis: Tensor) -> Tensor:
    """float64 [R], of the columns."""
    total = torch.zeros(basis.shape[1], dtype=torch.float64)
    for rows in basis.split(1024):
        total += rows.float().square().sum(dim=0)
    return total
