"""Profile ``kvtc``: K and V jointly, Fisher-weighted PCA per layer group, one uniform step, static-class rANS."""

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
_GAIN_MAX = 1e24


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
    mean_error: float


class KvtcProfile:
    """See ``codec.profile.Profile``. Symbols are int16 [T, r]."""

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
        step = artifact.manifest.points[point].step
        if not 0 < step < float("inf"):
            raise ArtifactFormatError(f"operating point {point}: step {step} is not a positive number")
        self.groups = [
            self._load(artifact, g, end - start, prefix, step, rounding, centroid, device)
            for g, (start, end) in enumerate(artifact.manifest.groups)
        ]

    def _load(
        self, artifact: Artifact, g: int, layers: int, prefix: str, step: float, rounding: Tensor, centroid: Tensor,
        device: torch.device | str,
    ) -> _Group:  # fmt: skip
        channels = 2 * layers * self.shape.kv_heads * self.shape.head_dim
        mean = artifact.tensor(f"group{g}.mean", torch.float32, channels)
        weight = artifact.tensor(f"group{g}.weight", torch.float32, channels)
        basis = artifact.tensor(f"group{g}.basis", torch.int16, channels, -1)
        classes = artifact.tensor(f"group{g}.{prefix}.classes", torch.uint8, -1)
        error = artifact.tensor(f"group{g}.{prefix}.error", torch.float32, 1)
        rank = classes.shape[0]
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
            mean_error=max(float(error), 1e-12),
        )

    def quantise(self, group: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        g = self.groups[group]
        coefficients, energy, saturated = project.analyse(join_rows(k, v), g.mean, g.analysis_gain, g.basis)
        symbols, overflow = quantize.quantise(coefficients, g.rounding)
        exact = coefficients * 2.0**-quantize.FRACTION_BITS
        # Squared error in steps: what the dropped components held, plus what quantising the live ones lost.
        dropped = energy * 4.0**-quantize.INPUT_BITS - exact.square().sum(dim=1)
        lost = (exact - quantize.dequantise(symbols, g.centroid)).square().sum(dim=1)
        error = (dropped.clamp(min=0) + lost) / g.mean_error
        return symbols, error.masked_fill(saturated | overflow, float("inf"))

    def dequantise(self, group: int, symbols: Tensor) -> tuple[Tensor, Tensor]:
        g = self.groups[group]
        levels = quantize.dequantise(symbols.to(g.mean.device), g.centroid)
        rows = project.synthesise(levels, g.decoder, g.synthesis_gain, g.mean)
        return split_rows(rows, g.layers, self.shape.kv_heads, self.shape.head_dim)

    def pack(self, group: int, symbols: Tensor, tokens_per_block: Sequence[int]) -> list[bytes]:
        words, lengths = rans.encode_lanes(symbols.cpu().numpy(), self.groups[group].classes, self.tables)
        payloads, token, word = [], 0, 0
        for tokens in tokens_per_block:
            lanes = lengths[token : token + tokens]
            count = int(lanes.sum())
            payloads.append(_pack_lengths(lanes) + words[word : word + count].astype("<u2").tobytes())
            token, word = token + tokens, word + count
        return payloads

    def unpack(self, group: int, payloads: Sequence[bytes | memoryview], tokens_per_block: Sequence[int]) -> Tensor:
        lengths, words = [np.empty(0, np.int64)], [np.empty(0, np.uint16)]
        for payload, tokens in zip(payloads, tokens_per_block, strict=True):
            lanes, start = _unpack_lengths(payload, tokens)
            lengths.append(lanes)
            words.append(np.frombuffer(payload, "<u2", offset=start))
        all_words, all_lengths = np.concatenate(words), np.concatenate(lengths)
        return torch.from_numpy(rans.decode_lanes(all_words, all_lengths, self.groups[group].classes, self.tables))


def overhead_bits_per_token(groups: int, block_tokens: int) -> float:
    """What a record costs beside the symbols' cross-entropy, in bits per coded token.

    Per lane: its length (8) and a state that starts with 16 useless bits and ends 8 bits short of its word on average.
    """
    lane = 8 + 16 + 8
    return groups * lane + 8 * (header_bytes(groups) + groups * _LANES.size) / block_tokens


def _pack_lengths(lanes: np.ndarray) -> bytes:
    """The words of each lane as the least of them and the excess over it, in 0, 1 or 2 bytes a lane."""
    if not len(lanes):
        return b""
    least = int(lanes.min())
    excess = lanes - least
    most = int(excess.max())
    if least + most > 0xFFFF:
        raise ConfigError(f"a rANS lane of {least + most} words; a record holds at most 65535: use more layer groups")
    width = 0 if most == 0 else 1 if most < 256 else 2
    body = excess.astype(f"<u{width}").tobytes() if width else b""
    return _LANES.pack(least, width, 0) + body + b"\0" * (len(body) % 2)


def _unpack_lengths(payload: bytes | memoryview, tokens: int) -> tuple[np.ndarray, int]:
    """int64 [tokens] words per lane, and the offset at which the words start. Raises RecordFormatError."""
    if tokens == 0:
        if len(payload):
            raise RecordFormatError(f"{len(payload)} bytes of lanes in a block without coded tokens")
        return np.empty(0, np.int64), 0
    if len(payload) < _LANES.size:
        raise RecordFormatError(f"{len(payload)} bytes cannot hold the lane lengths of {tokens} tokens")
    least, width, reserved = _LANES.unpack_from(payload)
    body = tokens * width
    start = _LANES.size + body + body % 2
    if width > 2 or reserved or start > len(payload) or (len(payload) - start) % 2:
        raise RecordFormatError(f"lane lengths of width {width} for {tokens} tokens do not fit {len(payload)} bytes")
    excess = np.frombuffer(payload, f"<u{width}", tokens, _LANES.size) if width else np.zeros(tokens)
    lanes = excess.astype(np.int64) + least
    words = (len(payload) - start) // 2
    if int(lanes.min()) < rans.STATE_WORDS or int(lanes.sum()) != words:
        raise RecordFormatError(f"the lanes claim {int(lanes.sum())} words; {words} are there")
    return lanes, start
