"""Profile ``paper``: K and V apart, PCA, allocated runs of int2, int4 and fp8 codes, DEFLATE (arXiv 2511.01815)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dynamo_kvtc.codec.artifact import Artifact
from dynamo_kvtc.codec.channels import from_rows, to_rows
from dynamo_kvtc.errors import ArtifactFormatError, ConfigError, RecordFormatError
from dynamo_kvtc.ops import affine, deflate, project

_LEVEL_UNITS = 2.0 ** (affine.FRACTION_BITS - project.BASIS_BITS)
"""Fixed-point units in a normalised 1."""

_ERROR_BITS = 3
"""Fraction bits of a squared error's terms, in squared fixed-point units (a channel's deviation is some 2**11 units).

An input is below 2**15 and K or V of a layer group has at most 2**17 channels, so a token's energy is below 2**47, and
orthonormal columns hold no more. A code stands for a number within its run's range, so each of a run's components, at
most 2**10, loses less than four times the run's energy. Terms add up to less than 2**59; int64 holds 3 bits more.
"""


@dataclass(frozen=True)
class Part:
    """K or V of one layer group: P2 channels, of R components the n that are quantised."""

    mean: Tensor
    unit: float
    analysis_gain: Tensor
    synthesis_gain: Tensor
    basis: Tensor
    decoder: Tensor
    runs: affine.Layout
    host_runs: affine.Layout

    def quantise(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes uint8 [T, W] of rows float32 [T, P2], and squared error float64 [T] in channel units, or infinite."""
        fixed, energy, saturated = project.fixed_point(rows, self.mean, self.analysis_gain)
        coefficients = project.analyse_wide(fixed, self.basis)
        values = affine.normalise(coefficients)
        data, overflow = affine.encode(values, self.runs)
        exact = coefficients * 2.0**-project.BASIS_BITS
        # In input units: what the components left out held, plus what quantising the others lost.
        dropped = energy.double() - _exact_sum(exact.square())
        lost = _exact_sum((exact - affine.decode(data, self.runs).double() * _LEVEL_UNITS).square())
        error = (dropped.clamp(min=0) + lost) * self.unit**2
        return data, error.masked_fill(saturated | overflow, float("inf"))

    def dequantise(self, data: Tensor) -> Tensor:
        """float32 [T, P2] from ``quantise``'s bytes."""
        levels = affine.decode(data, self.runs)
        return project.synthesise_wide(levels, self.decoder) * self.synthesis_gain + self.mean


@dataclass(frozen=True)
class Group:
    layers: int
    k: Part
    v: Part
    mean_error: float


class PaperProfile:
    """See ``codec.profile.Profile``. Symbols are uint8 [T, W]: a token's bytes of K, then of V, each laid out as in
    ``ops.affine``. A payload is the block's bytes, one byte position after another ([W, T]), as one DEFLATE stream.
    """

    def __init__(self, artifact: Artifact, point: int, device: torch.device | str = "cpu") -> None:
        """Raises ArtifactFormatError if a tensor is missing or holds what no calibration writes."""
        self.shape = artifact.shape
        self.groups = [
            self._load(artifact, g, end - start, point, device)
            for g, (start, end) in enumerate(artifact.manifest.groups)
        ]

    def _load(self, artifact: Artifact, g: int, layers: int, point: int, device: torch.device | str) -> Group:
        channels = layers * self.shape.kv_heads * self.shape.head_dim
        error = float(artifact.tensor(f"group{g}.point{point}.error", torch.float32, 1))
        if not 0 <= error < float("inf"):
            raise ArtifactFormatError(f"layer group {g}, point {point}: a mean error of {error}; it must be finite")
        k, v = (_load_part(artifact, f"group{g}", point, name, channels, device) for name in ("k", "v"))
        return Group(layers, k, v, max(error, 1e-12))

    def quantise(self, group: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        g = self.groups[group]
        k_data, k_error = g.k.quantise(to_rows(k))
        v_data, v_error = g.v.quantise(to_rows(v))
        return torch.cat([k_data, v_data], dim=1), (k_error + v_error) / g.mean_error

    def dequantise(self, group: int, symbols: Tensor) -> tuple[Tensor, Tensor]:
        g = self.groups[group]
        data = symbols.to(g.k.mean.device)
        k, v = (
            from_rows(part.dequantise(own), g.layers, self.shape.kv_heads, self.shape.head_dim)
            for part, own in ((g.k, data[:, : g.k.runs.width]), (g.v, data[:, g.k.runs.width :]))
        )
        return k, v

    def pack(self, group: int, symbols: Tensor, tokens_per_block: Sequence[int]) -> list[bytes]:
        data = symbols.cpu().numpy()
        payloads, token = [], 0
        for tokens in tokens_per_block:
            # By byte position, not by token: neighbours share a distribution, and DEFLATE's code tables follow it. On
            # 16-token blocks of Laplace or Gaussian coefficients it gains 2 to 14%, token by token up to 2 points less.
            block = data[token : token + tokens].T
            payloads.append(deflate.deflate(block.tobytes()) if tokens else b"")
            token += tokens
        return payloads

    def unpack(self, group: int, payloads: Sequence[bytes | memoryview], tokens_per_block: Sequence[int]) -> Tensor:
        g = self.groups[group]
        split = g.k.runs.width
        width = split + g.v.runs.width
        data = np.empty((sum(tokens_per_block), width), dtype=np.uint8)
        token = 0
        for payload, tokens in zip(payloads, tokens_per_block, strict=True):
            if tokens:
                flat = deflate.inflate(payload, tokens * width)
                data[token : token + tokens] = np.frombuffer(flat, np.uint8).reshape(width, tokens).T
            elif len(payload):
                raise RecordFormatError(f"{len(payload)} bytes of codes in a block without coded tokens")
            token += tokens
        symbols = torch.from_numpy(data)
        good = affine.valid(symbols[:, :split], g.k.host_runs) & affine.valid(symbols[:, split:], g.v.host_runs)
        if not bool(good.all()):
            raise RecordFormatError(f"{int((~good).sum())} of {len(good)} tokens hold numbers that no encoder writes")
        return symbols


def _exact_sum(terms: Tensor) -> Tensor:
    """float64 [T] of terms [T, R], each rounded to _ERROR_BITS: the same in any order of summation, so a token next to
    the error bound is exact on every device and in every batch, or on none."""
    return (terms * 2.0**_ERROR_BITS).round().long().sum(dim=1).double() * 2.0**-_ERROR_BITS


def _load_part(
    artifact: Artifact, group: str, point: int, name: str, channels: int, device: torch.device | str
) -> Part:
    mean = artifact.tensor(f"{group}.{name}.mean", torch.float32, channels)
    unit = float(artifact.tensor(f"{group}.{name}.unit", torch.float32, 1))
    basis = artifact.tensor(f"{group}.{name}.basis", torch.int16, channels, -1)
    sizes = artifact.tensor(f"{group}.point{point}.{name}.sizes", torch.int32, -1)
    types = artifact.tensor(f"{group}.point{point}.{name}.types", torch.uint8, -1)
    where = f"{group}, {name.upper()}, point {point}"
    # A unit under float32's least normal number has no finite reciprocal.
    if not torch.finfo(torch.float32).tiny <= unit < 1e30 or not bool(mean.isfinite().all()):
        raise ArtifactFormatError(f"{where}: unit {unit} is not a positive number, or a mean is not finite")
    if basis.numel() and int(basis.to(torch.int32).abs().max()) > 2**project.BASIS_BITS:
        raise ArtifactFormatError(f"{where}: a basis entry is beyond 2**{project.BASIS_BITS}, which stands for 1")
    try:
        runs = affine.layout(sizes, types, basis.shape[1], device)
        host_runs = affine.layout(sizes, types, basis.shape[1])
    except ConfigError as exc:
        raise ArtifactFormatError(f"{where}: {exc}") from exc
    live = basis[:, host_runs.live].contiguous()
    return Part(
        mean=mean.to(device),
        unit=unit,
        analysis_gain=torch.full((channels,), 1.0 / unit, dtype=torch.float32, device=device),
        synthesis_gain=torch.full((channels,), unit * _LEVEL_UNITS, dtype=torch.float32, device=device),
        basis=live.to(device),
        decoder=project.decoder_basis(live).to(device),
        runs=runs,
        host_runs=host_runs,
    )
