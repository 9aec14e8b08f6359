"""Profile ``kvtc``: K and V jointly, Fisher-weighted PCA per layer group, one step size, static-class rANS.

Each token of a layer group is a lane of its own. Its first components are quantised with the common step; their
symbols say how much the token matters (attention will look at it, or not), which makes the step of the rest finer or
coarser; and a weighted sum of its symbols says which scale of tables suits it. Both choices travel in one byte.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dynamo_kvtc.codec.artifact import Artifact
from dynamo_kvtc.codec.channels import join_rows, split_rows
from dynamo_kvtc.codec.record import header_bytes
from dynamo_kvtc.errors import ArtifactFormatError, ConfigError, RecordFormatError
from dynamo_kvtc.ops import project, quantize, rans

_LANES = struct.Struct("<HBB")
OFFSET_NEUTRAL = 8
"""Table choice 0..15 means classes shifted by OFFSET_CLASSES * (choice - 8)."""
OFFSET_CHOICES = 16
FINENESS_STRIDE = 16
OFFSET_CLASSES = 2
_GAIN_MAX = 1e24
_ERROR_BITS = 12
"""Fraction bits of a squared error, in squared steps: a token's sum of them stays below 2**53."""


@dataclass(frozen=True)
class _Group:
    """What one layer group needs: P channels, r live components."""

    layers: int
    mean: Tensor
    analysis_gain: Tensor
    synthesis_gain: Tensor
    basis: Tensor
    decoder: Tensor
    rounding: Tensor
    centroid: Tensor
    classes: np.ndarray
    importance: Tensor
    bias: int
    activity: Tensor
    thresholds: Tensor
    mean_error: float

    @property
    def leading(self) -> int:
        """Components that are quantised with the common step and decide the rest's."""
        return self.importance.shape[1]


class KvtcProfile:
    """See ``codec.profile.Profile``. Symbols are int16 [T, 1 + r]: fineness + 16 * table choice, then components."""

    def __init__(self, artifact: Artifact, point: int, device: torch.device | str = "cpu") -> None:
        self.shape = artifact.shape
        prefix = f"point{point}"
        frequencies = artifact.tensor(f"{prefix}.frequencies", torch.uint16, -1, -1)
        count = frequencies.shape[0]
        shift = artifact.tensor(f"{prefix}.shift", torch.uint8, count)
        try:
            self.tables = rans.ClassTables(frequencies.numpy(), shift.numpy())
        except ConfigError as exc:
            raise ArtifactFormatError(f"operating point {point}: {exc}") from exc
        rounding = artifact.tensor(f"{prefix}.rounding", torch.int32, count)
        centroid = artifact.tensor(f"{prefix}.centroid", torch.float32, count)
        one = 2**quantize.FRACTION_BITS
        if not bool(((rounding >= 0) & (rounding < one)).all()) or not bool((centroid.abs() < 1).all()):
            raise ArtifactFormatError(
                f"operating point {point}: roundings must be in 0..{one - 1} and centroids between -1 and 1"
            )
        activity = artifact.tensor(f"{prefix}.activity", torch.int32, count)
        if not bool((activity >= 0).all()):
            raise ArtifactFormatError(f"operating point {point}: activity weights must not be negative")
        step = artifact.manifest.points[point].step
        if not 0 < step < float("inf"):
            raise ArtifactFormatError(f"operating point {point}: step {step} is not a positive number")
        self.groups = [
            self._load(artifact, g, end - start, prefix, step, rounding, centroid, activity, device)
            for g, (start, end) in enumerate(artifact.manifest.groups)
        ]

    def _load(
        self, artifact: Artifact, g: int, layers: int, prefix: str, step: float, rounding: Tensor, centroid: Tensor,
        activity: Tensor, device: torch.device | str,
    ) -> _Group:  # fmt: skip
        channels = 2 * layers * self.shape.kv_heads * self.shape.head_dim
        mean = artifact.tensor(f"group{g}.mean", torch.float32, channels)
        weight = artifact.tensor(f"group{g}.weight", torch.float32, channels)
        basis = artifact.tensor(f"group{g}.basis", torch.int16, channels, -1)
        classes = artifact.tensor(f"group{g}.{prefix}.classes", torch.uint8, -1)
        error = artifact.tensor(f"group{g}.{prefix}.error", torch.float32, 1)
        importance = artifact.tensor(f"group{g}.{prefix}.importance", torch.int32, 2, -1)
        bias = artifact.tensor(f"group{g}.{prefix}.bias", torch.int32, 1)
        thresholds = artifact.tensor(f"group{g}.{prefix}.thresholds", torch.int64, OFFSET_CHOICES - 1)
        rank = classes.shape[0]
        if importance.shape[1] > rank:
            raise ArtifactFormatError(f"layer group {g}: {importance.shape[1]} leading components of {rank}")
        if not bool((thresholds[1:] >= thresholds[:-1]).all()):
            raise ArtifactFormatError(f"layer group {g}: thresholds of the table choices must not fall")
        if rank > basis.shape[1] or int(classes.max() if rank else 0) >= len(self.tables.shift):
            raise ArtifactFormatError(f"layer group {g}: {rank} components over {basis.shape[1]}, or a class too many")
        if channels > project.MAX_CHANNELS:
            raise ArtifactFormatError(f"layer group {g}: {channels} channels; at most {project.MAX_CHANNELS}")
        analysis_gain = (weight.double() * (2**quantize.INPUT_BITS / step)).float()
        synthesis_gain = (step / weight.double()).float()
        # Within these bounds no sum over a token's levels leaves float32's range. NaN fails every comparison.
        fits = [(gain > 1 / _GAIN_MAX) & (gain < _GAIN_MAX) for gain in (analysis_gain, synthesis_gain)]
        if not all(bool(fit.all()) for fit in [*fits, mean.abs() < _GAIN_MAX, error >= 0, error < float("inf")]):
            raise ArtifactFormatError(
                f"layer group {g}: weights must be positive, means and error finite, weights over step {step} and its "
                f"inverse below {_GAIN_MAX:g}"
            )
        live = basis[:, :rank].contiguous()
        index = classes.long()
        return _Group(
            layers=layers,
            mean=mean.to(device),
            analysis_gain=analysis_gain.to(device),
            synthesis_gain=synthesis_gain.to(device),
            basis=live.to(device),
            decoder=project.decoder_basis(live).to(device),
            rounding=rounding[index].to(device),
            centroid=centroid[index].to(device),
            classes=classes.numpy(),
            importance=importance.to(device),
            bias=int(bias),
            activity=activity[index][importance.shape[1] :].to(device),
            thresholds=thresholds.to(device),
            mean_error=max(float(error), 1e-12),
        )

    def quantise(self, group: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        g = self.groups[group]
        n = g.leading
        coefficients, energy, saturated = project.analyse(join_rows(k, v), g.mean, g.analysis_gain, g.basis)
        leading, overflow = quantize.quantise(coefficients[:, :n], g.rounding[:n])
        fineness = quantize.fineness_of(leading, g.importance, g.bias)
        rest, too_large = quantize.quantise(coefficients[:, n:], g.rounding[n:], fineness)
        choice = quantize.class_offsets(rest, g.activity, g.thresholds)
        lane = fineness.to(torch.int16) + FINENESS_STRIDE * choice.to(torch.int16)
        symbols = torch.cat([lane[:, None], leading, rest], dim=1)

        # Squared error in common steps: what the dropped components held, plus what quantising the live ones lost;
        # then in the token's own steps, as the calibrated mean is.
        exact = coefficients * 2.0**-quantize.FRACTION_BITS
        dropped = energy * 4.0**-quantize.INPUT_BITS - _exact_sum(exact.square())
        lost = _exact_sum((exact - self._levels(g, symbols)).square())
        error = (dropped.clamp(min=0) + lost) * quantize.gains(fineness, torch.float64).square() / g.mean_error
        return symbols, error.masked_fill(saturated | overflow | too_large, float("inf"))

    def dequantise(self, group: int, symbols: Tensor) -> tuple[Tensor, Tensor]:
        g = self.groups[group]
        levels = self._levels(g, symbols.to(g.mean.device))
        rows = project.synthesise(levels, g.decoder, g.synthesis_gain, g.mean)
        return split_rows(rows, g.layers, self.shape.kv_heads, self.shape.head_dim)

    def pack(self, group: int, symbols: Tensor, tokens_per_block: Sequence[int]) -> list[bytes]:
        g = self.groups[group]
        rows = symbols.cpu().numpy()
        lane_bytes = rows[:, 0].astype(np.uint8)
        words, lengths = rans.encode_lanes(
            np.ascontiguousarray(rows[:, 1:]), g.classes, self.tables, class_offsets(lane_bytes), g.leading
        )
        payloads, token, word = [], 0, 0
        for tokens in tokens_per_block:
            lanes = slice(token, token + tokens)
            count = int(lengths[lanes].sum())
            payloads.append(
                _pack_lanes(lengths[lanes], lane_bytes[lanes]) + words[word : word + count].astype("<u2").tobytes()
            )
            token, word = token + tokens, word + count
        return payloads

    def unpack(self, group: int, payloads: Sequence[bytes | memoryview], tokens_per_block: Sequence[int]) -> Tensor:
        g = self.groups[group]
        lengths, lane_bytes, words = [np.empty(0, np.int64)], [np.empty(0, np.uint8)], [np.empty(0, np.uint16)]
        for payload, tokens in zip(payloads, tokens_per_block, strict=True):
            lanes, parameters, start = _unpack_lanes(payload, tokens)
            lengths.append(lanes)
            lane_bytes.append(parameters)
            words.append(np.frombuffer(payload, "<u2", offset=start))
        parameters = np.concatenate(lane_bytes)
        symbols = rans.decode_lanes(
            np.concatenate(words), np.concatenate(lengths), g.classes, self.tables, class_offsets(parameters), g.leading
        )
        return torch.from_numpy(np.concatenate([parameters[:, None].astype(np.int16), symbols], axis=1))

    def cross_entropy_bits(self, group: int, symbols: Tensor) -> float:
        """What symbols [T, 1 + r] cost under the static tables, in bits; lane parameters are not counted."""
        g = self.groups[group]
        rows = symbols.cpu().numpy()
        offsets = class_offsets(rows[:, 0].astype(np.uint8))
        return rans.cross_entropy_bits(np.ascontiguousarray(rows[:, 1:]), g.classes, self.tables, offsets, g.leading)

    def _levels(self, g: _Group, symbols: Tensor) -> Tensor:
        """float32 [T, r] in common steps."""
        levels = quantize.dequantise(symbols[:, 1:], g.centroid)
        gain = quantize.gains(symbols[:, 0] % FINENESS_STRIDE, torch.float32)
        levels[:, g.leading :] /= gain[:, None]
        return levels


def _exact_sum(terms: Tensor) -> Tensor:
    """float64 [T] of terms [T, R], each rounded to _ERROR_BITS: the same in any order of summation, so a token next to
    the error bound is exact on every device and in every batch, or on none."""
    return (terms * 2.0**_ERROR_BITS).round().sum(dim=1) * 2.0**-_ERROR_BITS


def class_offsets(lane_bytes: np.ndarray) -> np.ndarray:
    """int8 [T]: what each lane adds to the classes of its components after the leading ones; lane_bytes uint8 [T]."""
    return ((lane_bytes // FINENESS_STRIDE).astype(np.int8) - OFFSET_NEUTRAL) * np.int8(OFFSET_CLASSES)


def overhead_bits_per_token(groups: int, block_tokens: int) -> float:
    """What a record costs beside the symbols' cross-entropy, in bits per coded token.

    Per lane: its length (8), its parameters (8), and a state that starts with 16 useless bits and ends 8 bits short of
    its word on average.
    """
    lane = 8 + 8 + 16 + 8
    return groups * lane + 8 * (header_bytes(groups) + groups * _LANES.size) / block_tokens


def _pack_lanes(lanes: np.ndarray, parameters: np.ndarray) -> bytes:
    """Words per lane, as the least of them and the excess over it in 0, 1 or 2 bytes a lane; then a byte per lane."""
    if not len(lanes):
        return b""
    least = int(lanes.min())
    excess = lanes - least
    most = int(excess.max())
    if least + most > 0xFFFF:
        raise ConfigError(f"a rANS lane of {least + most} words; a record holds at most 65535: use more layer groups")
    width = 0 if most == 0 else 1 if most < 256 else 2
    body = (excess.astype(f"<u{width}").tobytes() if width else b"") + parameters.tobytes()
    return _LANES.pack(least, width, 0) + body + b"\0" * (len(body) % 2)


def _unpack_lanes(payload: bytes | memoryview, tokens: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Words per lane int64 [tokens], parameters uint8 [tokens], and where the words start. Raises RecordFormatError."""
    if tokens == 0:
        if len(payload):
            raise RecordFormatError(f"{len(payload)} bytes of lanes in a block without coded tokens")
        return np.empty(0, np.int64), np.empty(0, np.uint8), 0
    if len(payload) < _LANES.size:
        raise RecordFormatError(f"{len(payload)} bytes cannot hold the lane lengths of {tokens} tokens")
    least, width, reserved = _LANES.unpack_from(payload)
    body = tokens * (width + 1)
    start = _LANES.size + body + body % 2
    if width > 2 or reserved or start > len(payload) or (len(payload) - start) % 2:
        raise RecordFormatError(f"lane lengths of width {width} for {tokens} tokens do not fit {len(payload)} bytes")
    excess = np.frombuffer(payload, f"<u{width}", tokens, _LANES.size) if width else np.zeros(tokens)
    lanes = excess.astype(np.int64) + least
    parameters = np.frombuffer(payload, np.uint8, tokens, _LANES.size + tokens * width)
    words = (len(payload) - start) // 2
    if int(lanes.min()) < rans.STATE_WORDS or int(lanes.sum()) != words:
        raise RecordFormatError(f"the lanes claim {int(lanes.sum())} words; {words} are there")
    if int((parameters % FINENESS_STRIDE).max()) >= quantize.FINENESS_LEVELS:
        raise RecordFormatError(f"a lane's fineness is over {quantize.FINENESS_LEVELS - 1}")
    return lanes, parameters, start
