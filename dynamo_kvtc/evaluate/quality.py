"""READ FIRST of this room: what coding a context's cache does to the tokens after it.

    context -> cache -> raw:           teacher-force the continuation -> reference distributions
                     -> coded, decoded: teacher-force the same tokens -> compared with the reference, token by token

The cache covers all of the context. The continuation's n tokens are fed after it, so the cache answers for the
predictions of its tokens 2 to n, and those n - 1 are scored: token 1 is predicted by the context's last position, whose
output was computed during prefill, before anything was coded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dynamo_kvtc.codec.policy import ExactPolicy
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.evaluate.codecs import CacheCodec, CodedBytes

_CHUNK_ROWS = 128
"""Predictions compared at once: bounds the float32 workspace at 128 vocabularies."""

OnStep = Callable[[str], None]
"""Called with a codec's name after each sequence or example coded with it."""


class CausalModel(Protocol):
    """What the measurements need of a model; ``dynamo_kvtc.hf.model.Model`` is one."""

    def prefill(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [T] -> k, v [L, H, T, D] in engine form."""
        ...

    def logits(self, k: Tensor, v: Tensor, ids: Tensor, position: int) -> Tensor:
        """float32 [T, vocab] of ids fed after the cache, the first of them at ``position``."""
        ...


@dataclass(frozen=True)
class Quality:
    """What one codec did to the continuations of one text.

    kl: mean over scored tokens of KL(p_raw || p_coded), in nats. kl_stderr: its standard error over sequences, None
        for one sequence (sequences of one text are not quite independent: it is a guide).
    ppl_ratio: exp(mean NLL after the coded cache - mean NLL after the raw one).
    top1: share of scored tokens where both caches make the same token the likeliest.
    scored_tokens: continuation tokens - 1, per sequence, summed.
    coded: bytes and exact tokens, summed.
    """

    codec: str
    kl: float
    kl_stderr: float | None
    ppl_ratio: float
    top1: float
    scored_tokens: int
    sequences: int
    coded: CodedBytes

    @property
    def ratio_coded(self) -> float:
        return self.coded.ratio_coded

    @property
    def ratio_total(self) -> float:
        return self.coded.ratio_total


@dataclass(frozen=True)
class Divergence:
    """Sums over T predictions: KL(p || q) in nats, NLL of the labels under q minus under p, equal first choices."""

    kl: float
    nll_gain: float
    same_top1: int
    tokens: int


@dataclass
class _Sums:
    kls: list[float] = field(default_factory=list)
    nll_gain: float = 0.0
    same_top1: int = 0
    tokens: int = 0
    coded: CodedBytes | None = None

    def add(self, d: Divergence, coded: CodedBytes) -> None:
        self.kls.append(d.kl / d.tokens)
        self.nll_gain += d.nll_gain
        self.same_top1 += d.same_top1
        self.tokens += d.tokens
        self.coded = coded if self.coded is None else self.coded + coded

    def quality(self, codec: str) -> Quality:
        assert self.coded is not None
        n = len(self.kls)
        # Every sequence scores the same number of tokens, so the mean of means is the mean over tokens.
        mean = math.fsum(self.kls) / n
        spread = math.fsum((kl - mean) ** 2 for kl in self.kls)
        return Quality(
            codec=codec,
            kl=mean,
            kl_stderr=math.sqrt(spread / (n - 1) / n) if n > 1 else None,
            ppl_ratio=_exp(self.nll_gain / self.tokens),
            top1=self.same_top1 / self.tokens,
            scored_tokens=self.tokens,
            sequences=n,
            coded=self.coded,
        )


def continuation_kl(
    model: CausalModel, sequences: Sequence[Tensor], context_tokens: int, codec: CacheCodec, policy: ExactPolicy
) -> Quality:
    """One codec on a few sequences: see ``measure``, which this is for one codec."""
    return measure(model, sequences, context_tokens, [codec], policy)[0]


def measure(
    model: CausalModel,
    sequences: Sequence[Tensor],
    context_tokens: int,
    codecs: Sequence[CacheCodec],
    policy: ExactPolicy,
    on_step: OnStep | None = None,
) -> list[Quality]:
    """Every codec on the same contexts and continuations, one sequence in memory at a time.

    sequences: int64 [context_tokens + n] each, n >= 2 and the same for all. policy: which of the context's tokens stay
    exact; its max_error is the codecs' own matter. on_step: see OnStep.
    Raises ConfigError for sequences that are too short or a policy that leaves nothing to code.
    """
    _check(sequences, context_tokens, codecs, policy)
    sums = [_Sums() for _ in codecs]
    positions = torch.arange(context_tokens)
    mask = policy.mask(positions, context_tokens)
    for ids in sequences:
        k, v = model.prefill(ids[:context_tokens])
        fed, labels = ids[context_tokens:-1], ids[context_tokens + 1 :]
        reference = log_probabilities(model.logits(k, v, fed, context_tokens))
        for codec, total in zip(codecs, sums, strict=True):
            coded_k, coded_v, spent = codec.run(k, v, positions, mask)
            logits = model.logits(coded_k, coded_v, fed, context_tokens)
            del coded_k, coded_v
            total.add(divergence(reference, logits, labels), spent)
            if on_step:
                on_step(codec.name)
    return [total.quality(codec.name) for codec, total in zip(codecs, sums, strict=True)]


def log_probabilities(logits: Tensor) -> Tensor:
    """float32 log-softmax of logits [T, vocab], overwriting them: two copies would not pay for a large vocabulary."""
    for rows in _chunks(len(logits)):
        logits[rows] = torch.log_softmax(logits[rows], dim=-1)
    return logits


def divergence(reference: Tensor, logits: Tensor, labels: Tensor) -> Divergence:
    """How far logits are from a reference.

    reference: float32 log-probabilities [T, vocab]; logits: float32 [T, vocab]; labels: int64 [T], the true tokens.
    KL(p || q) = sum over words of p (log p - log q), a word of p = 0 adding nothing.
    """
    kl = nll_gain = 0.0
    same = 0
    for rows in _chunks(len(labels)):
        p, q = reference[rows], torch.log_softmax(logits[rows], dim=-1)
        chosen = labels[rows].to(p.device)[:, None]
        weight = p.exp()
        terms = torch.where(weight > 0, weight * (p - q), torch.zeros_like(p))
        kl += float(terms.sum(dim=-1).double().sum())
        nll_gain += float((p.gather(1, chosen) - q.gather(1, chosen)).double().sum())
        same += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
    return Divergence(kl, nll_gain, same, len(labels))


def _chunks(rows: int) -> Iterator[slice]:
    return (slice(first, first + _CHUNK_ROWS) for first in range(0, rows, _CHUNK_ROWS))


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _check(sequences: Sequence[Tensor], context_tokens: int, codecs: Sequence[CacheCodec], policy: ExactPolicy) -> None:
    if not sequences or not codecs:
        raise ConfigError(f"nothing to measure: {len(sequences)} sequences, {len(codecs)} codecs")
    check_lengths(context_tokens, len(sequences[0]) - context_tokens, policy)
    lengths = sorted({len(ids) for ids in sequences})
    if len(lengths) > 1:
        raise ConfigError(f"sequences of {lengths[0]} to {lengths[-1]} tokens; all must have the same length")


def check_lengths(context_tokens: int, continuation_tokens: int, policy: ExactPolicy) -> None:
    """Raises ConfigError unless something of the context is coded and something of the continuation is scored."""
    if context_tokens <= policy.sinks + policy.window:
        raise ConfigError(
            f"a context of {context_tokens} tokens with {policy.sinks} sinks and a window of {policy.window} leaves "
            f"no token to code; give a longer context or a smaller window"
        )
    if continuation_tokens < 2:
        raise ConfigError(
            f"a continuation of {continuation_tokens} tokens leaves no prediction to score; give 2 or more"
        )
