"""What calibration reads off the model: channel rows of its cache, and how much each channel matters.

A rank of a tensor-parallel engine sees only its own heads, so rows and weights are cut by rank and layer group here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dynamo_kvtc.codec.channels import join_rows
from dynamo_kvtc.errors import CalibrationError
from dynamo_kvtc.ops.rope import remove_rope
from dynamo_kvtc.types import KVShape, ModelIdentity, RopeSpec

SINKS = 4
"""Tokens at the start of a sequence that calibration leaves out: they are always stored exact, and their outliers
would claim the first components for themselves."""

GROUP_CHANNELS = 16_384
"""Restoring, encoding and calibrating cost by the channel of a group times the components kept. With a given arithmetic
more, smaller groups keep more of the components: better below about 30x, worse above (README, "Layer groups")."""

RECENT = 128
"""Tokens before a continuation whose importance is not learnt from."""

Progress = Callable[[str, float], None]
"""Called with the phase's name and the share of it that is done, 0 to 1."""


class CacheModel(Protocol):
    """The part of ``hf.model.Model`` that calibration needs; a synthetic one serves to size a run."""

    shape: KVShape
    rope: RopeSpec
    identity: ModelIdentity

    @property
    def device(self) -> torch.device: ...

    def prefill(self, ids: Tensor, chunk_tokens: int = 2048) -> tuple[Tensor, Tensor]: ...

    def fisher_gradients(
        self, ids_context: Tensor, ids_continuation: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Part:
    """One rank's share of one layer group: which layers and heads, and its channel count P (K and V)."""

    rank: int
    group: int
    layers: slice
    heads: slice
    channels: int


def parts_of(shape: KVShape, groups: tuple[tuple[int, int], ...], tp_size: int) -> list[Part]:
    """All parts, rank by rank and group by group."""
    heads = shape.kv_heads // tp_size
    return [
        Part(r, g, slice(*group), slice(r * heads, (r + 1) * heads),
             2 * (group[1] - group[0]) * heads * shape.head_dim)
        for r in range(tp_size)
        for g, group in enumerate(groups)
    ]  # fmt: skip


def split_layers(layers: int, groups: int) -> tuple[tuple[int, int], ...]:
    """(start, end) of each layer group, as equal as can be. Raises CalibrationError if there are too many groups."""
    if not 1 <= groups <= layers:
        raise CalibrationError(f"{groups} layer groups asked of a model with {layers} layers; use 1 to {layers}")
    edges = [round(i * layers / groups) for i in range(groups + 1)]
    return tuple(itertools.pairwise(edges))


def default_groups(shape: KVShape, tp_size: int) -> int:
    """Layer groups that keep a rank's group at GROUP_CHANNELS channels or fewer; 2 at least, for the stream's sake."""
    total = 2 * shape.layers * shape.kv_heads // tp_size * shape.head_dim
    return min(shape.layers, max(2, -(-total // GROUP_CHANNELS)))


@dataclass(frozen=True)
class CacheSample:
    """Tokens of caches: k, v [L, H, n, D] in engine form, positions int64 [n]."""

    k: Tensor
    v: Tensor
    positions: Tensor

    def rows(self, part: Part, rope: RopeSpec) -> Tensor:
        """float32 [n, P] channel rows of one part, RoPE removed."""
        k, v = (x[part.layers, part.heads].float() for x in (self.k, self.v))
        return join_rows(remove_rope(k, self.positions, rope), v)


def caches(
    model: CacheModel, sequences: Sequence[Tensor], phase: str, progress: Progress, tokens: int | None = None
) -> Iterator[CacheSample]:
    """The cache of each sequence without its sinks; ``tokens`` of it, evenly spread, if given.

    Raises CalibrationError if the model's cache holds NaN or Inf.
    """
    for i, ids in enumerate(sequences):
        k, v = model.prefill(ids)
        if not bool(k.isfinite().all() and v.isfinite().all()):
            raise CalibrationError(f"the model's cache holds NaN or Inf on calibration sequence {i}; check its weights")
        count = len(ids) - SINKS if tokens is None else min(tokens, len(ids) - SINKS)
        at = SINKS + torch.arange(count, device=k.device) * (len(ids) - SINKS) // count
        yield CacheSample(k[:, :, at], v[:, :, at], at)
        progress(phase, (i + 1) / len(sequences))


def sample_caches(
    model: CacheModel, sequences: Sequence[Tensor], tokens: int, phase: str, progress: Progress
) -> CacheSample:
    """About ``tokens`` tokens, the same number from every sequence: what tables are fitted on, bounded in memory."""
    each = max(1, -(-tokens // len(sequences)))
    drawn = list(caches(model, sequences, phase, progress, each))
    return CacheSample(
        torch.cat([c.k for c in drawn], dim=2), torch.cat([c.v for c in drawn], dim=2),
        torch.cat([c.positions for c in drawn]),
    )  # fmt: skip


@dataclass(frozen=True)
class TokenImportance:
    """How much the tokens of one sequence matter.

    context: int64 [Tc] ids; values: float32 [parts, n] at positions ``first`` to first + n - 1.
    """

    context: Tensor
    first: int
    values: Tensor


@dataclass(frozen=True)
class Fisher:
    """k, v: float64 [L, H, D], E[g**2] of each channel of K (before RoPE) and V; tokens: how much some matter."""

    k: Tensor
    v: Tensor
    tokens: list[TokenImportance]


def fisher_weights(
    model: CacheModel, sequences: Sequence[Tensor], parts: list[Part], seed: int, progress: Progress
) -> Fisher:
    """Fisher weights of the cache's channels, and the importance of tokens relative to them.

    g is the gradient of the model's log-likelihood of labels it sampled itself, over the last quarter of
    each sequence, with respect to the cache of the tokens before them (the diagonal of the Fisher information).
    A token's importance is the sum of g**2 / E[g**2] over a part's channels; the first quarter of the sequences gives
    the E[g**2] for that, the rest are judged by it.
    """
    total_k = total_v = torch.zeros((), dtype=torch.float64, device=model.device)
    count = 0
    generator = torch.Generator().manual_seed(seed)
    tokens: list[TokenImportance] = []
    norms: tuple[Tensor, Tensor] | None = None
    for i, ids in enumerate(sequences):
        context, continuation = ids[: -(len(ids) // 4)], ids[-(len(ids) // 4) :]
        gk, gv = (g[:, :, SINKS:].square() for g in model.fisher_gradients(context, continuation, generator))
        if norms is not None:
            # Recent tokens are read because they are recent; that says nothing of their worth later on.
            end = gk.shape[2] - min(RECENT, gk.shape[2] // 4)
            values = [
                (gk[p.layers, p.heads, :end] / norms[0][p.layers, p.heads, None]).sum(dim=(0, 1, 3))
                + (gv[p.layers, p.heads, :end] / norms[1][p.layers, p.heads, None]).sum(dim=(0, 1, 3))
                for p in parts
            ]
            tokens.append(TokenImportance(context, SINKS, torch.stack(values)))
        total_k = total_k + gk.sum(dim=2, dtype=torch.float64)
        total_v = total_v + gv.sum(dim=2, dtype=torch.float64)
        count += gk.shape[2]
        if norms is None and i + 1 >= len(sequences) / 4:
            floor = 0.05 * float(total_k.mean() + total_v.mean()) / 2 / count
            norms = ((total_k / count + floor).float(), (total_v / count + floor).float())
        progress("Fisher weights", (i + 1) / len(sequences))
    return Fisher(total_k / count, total_v / count, tokens)


def channel_scale(fisher: Fisher, part: Part, ridge: float) -> Tensor:
    """float32 [P]: square root of each channel's weight, with a ridge so that no channel is thrown away unseen.

    Weights are relative to the mean over the whole model, ranks and groups included, so one step serves them all.
    """
    mean = (fisher.k.mean() + fisher.v.mean()) / 2
    rows = join_rows(*(w[part.layers, part.heads].unsqueeze(2) for w in (fisher.k, fisher.v)))[0]
    return (rows / mean + ridge).sqrt().float()
