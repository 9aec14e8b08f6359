"""Profile ``kvtc``: K and V jointly, Fisher-weighted PCA per layer group, one step size, static-class rANS.

Each token of a layer group is coded on its own. Its first components are quantised with the common step; their symbols
say how much the token matters (attention will look at it, or not), which makes the step of the rest finer or coarser;
and a weighted sum of its symbols says which scale of tables suits it. Both choices travel in one byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamo_kvtc.codec.artifact import Artifact
from dynamo_kvtc.codec.channels import join_rows, split_rows
from dynamo_kvtc.codec.kvtc_point import KvtcGroup, KvtcPoint
from dynamo_kvtc.codec.lanes import FINENESS_STRIDE, class_offsets, pack_lanes, unpack_lanes
from dynamo_kvtc.ops import project, quantize, rans


class KvtcProfile:
    """See ``codec.profile.Profile``. Symbols are int16 [T, 1 + r]: fineness + 16 * table choice, then components."""

    def __init__(self, artifact: Artifact, point: int, device: torch.device | str = "cpu") -> None:
        """Raises ArtifactFormatError."""
        self.shape = artifact.shape
        self.point = KvtcPoint.load(artifact, point)
        self.groups = [_on(group, device) for group in self.point.groups]
        self._decoders = [project.decoder_basis(group.wide) for group in self.groups]

    def quantise(self, group: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        g = self.groups[group]
        n, width = g.leading, g.wide.shape[1]
        fixed, energy, saturated = project.fixed_point(join_rows(k, v), g.mean, g.analysis_gain)
        fixed = project.clip_narrow(fixed, g.wide_inputs)
        coefficients = torch.cat(
            [
                project.analyse_wide(fixed, g.wide).long(),
                project.analyse_narrow(fixed, g.wide_inputs, g.narrow),
            ],
            dim=1,
        )
        first = quantize.quantise(coefficients[:, :n], g.units[:n], g.rounding[:n], g.limits[:n])
        fineness = quantize.fineness_of(first[0], g.importance, g.bias)
        rest = quantize.quantise(coefficients[:, n:], g.units[n:], g.rounding[n:], g.limits[n:], fineness)
        choice = quantize.class_offsets(rest[0], g.activity, g.thresholds)
        parameters = fineness.to(torch.int16) + FINENESS_STRIDE * choice.to(torch.int16)
        symbols = torch.cat([parameters[:, None], first[0], rest[0]], dim=1)

        q = symbols[:, 1:]
        narrow = quantize.narrow_levels(q[:, width:], g.scale, g.level_bias)
        levels = torch.cat(
            [
                quantize.wide_error_levels(q[:, :width], g.centroid),
                quantize.narrow_error_levels(narrow, g.scale),
            ],
            dim=1,
        )
        error = quantize.error_of(coefficients, g.units, levels, energy, fineness, n) / g.mean_error
        uncodable = saturated | (energy > quantize.ENERGY_MAX) | first[1] | rest[1]
        return symbols, error.masked_fill(uncodable, float("inf"))

    def dequantise(self, group: int, symbols: Tensor) -> tuple[Tensor, Tensor]:
        g = self.groups[group]
        symbols = symbols.to(g.mean.device)
        q, width = symbols[:, 1:], g.wide.shape[1]
        gain = quantize.gains(symbols[:, 0] % FINENESS_STRIDE, torch.float32)[:, None]
        wide = quantize.dequantise(q[:, :width], g.centroid)
        wide[:, g.leading :] /= gain
        narrow = quantize.narrow_levels(q[:, width:], g.scale, g.level_bias)
        rows = project.synthesise_wide(wide, self._decoders[group])
        rows += project.synthesise_narrow(narrow, g.narrow).float() * 2.0**-g.exponent / gain
        rows = rows * g.synthesis_gain + g.mean
        return split_rows(rows, g.layers, self.shape.kv_heads, self.shape.head_dim)

    def pack(self, group: int, symbols: Tensor, tokens_per_block: Sequence[int]) -> list[bytes]:
        g, lanes = self.groups[group], self.point.lanes
        rows = symbols.cpu().numpy()
        parameters = rows[:, 0].astype(np.uint8)
        words, lengths = rans.encode_lanes(
            np.ascontiguousarray(rows[:, 1:]), g.classes, self.point.tables, class_offsets(parameters), g.leading, lanes
        )
        payloads, token, word = [], 0, 0
        for tokens in tokens_per_block:
            own = lengths[token * lanes : (token + tokens) * lanes]
            count = int(own.sum())
            payloads.append(pack_lanes(own, parameters[token : token + tokens], words[word : word + count]))
            token, word = token + tokens, word + count
        return payloads

    def unpack(self, group: int, payloads: Sequence[bytes | memoryview], tokens_per_block: Sequence[int]) -> Tensor:
        g = self.groups[group]
        lengths, parameters, words = [np.empty(0, np.int64)], [np.empty(0, np.uint8)], [np.empty(0, np.uint16)]
        for payload, tokens in zip(payloads, tokens_per_block, strict=True):
            own = unpack_lanes(payload, tokens, self.point.lanes)
            lengths.append(own[0])
            parameters.append(own[1])
            words.append(own[2])
        first = np.concatenate(parameters)
        symbols = rans.decode_lanes(
            np.concatenate(words), np.concatenate(lengths), g.classes, self.point.tables, class_offsets(first),
            g.leading, self.point.lanes,
        )  # fmt: skip
        return torch.from_numpy(np.concatenate([first[:, None].astype(np.int16), symbols], axis=1))

    def cross_entropy_bits(self, group: int, symbols: Tensor) -> float:
        """What symbols [T, 1 + r] cost under the static tables, in bits; parameters are not counted."""
        g = self.groups[group]
        rows = symbols.cpu().numpy()
        offsets = class_offsets(rows[:, 0].astype(np.uint8))
        return rans.cross_entropy_bits(
            np.ascontiguousarray(rows[:, 1:]), g.classes, self.point.tables, offsets, g.leading
        )


def _on(group: KvtcGroup, device: torch.device | str) -> KvtcGroup:
    own = {f.name: getattr(group, f.name) for f in fields(group)}
    moved: dict[str, Any] = {name: x.to(device) for name, x in own.items() if isinstance(x, Tensor)}
    return replace(group, **moved)
