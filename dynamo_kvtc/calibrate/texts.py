"""What calibration needs around ``run.calibrate``: its texts, whether they suffice, and the measure of expected KL."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dynamo_kvtc.calibrate.collect import SINKS, parts_of, split_layers
from dynamo_kvtc.calibrate.run import CalibrationConfig, CalibrationTexts, Measure
from dynamo_kvtc.codec.artifact import Artifact
from dynamo_kvtc.codec.policy import ExactPolicy
from dynamo_kvtc.errors import ConfigError, TooFewTokensError
from dynamo_kvtc.evaluate.codecs import RecordCodec
from dynamo_kvtc.evaluate.quality import continuation_kl
from dynamo_kvtc.hf.model import Model
from dynamo_kvtc.hf.text import token_sequences
from dynamo_kvtc.types import KVShape

HOLD_OUT_EVERY = 8
"""Every eighth sequence of a source is kept out of the PCA: for steps, tables and the expected KL."""

LEAST_HELD_OUT = 4
MOST_HELD_OUT = 32
"""Sequences: tables fitted on less variety expect too little of other text; more than enough is only slower."""

LEAST_CONTEXT = 16
"""Tokens: sinks, and something to code and to predict."""

# (tokens per channel of a layer group at most, ratio lost at 60x and at 16x), against 10 tokens per channel: the rate
# of an ideal coder on unseen text at the same error, SmolLM2, layers 10 to 14 (1,920 channels).
_COST_OF_FEW = ((0.75, 0.19, 0.36), (1.5, 0.17, 0.23), (2.0, 0.07, 0.11))


def draw_texts(model: Model, sources: Sequence[str], tokens: int, length: int, held_out: int) -> CalibrationTexts:
    """Sequences of ``length`` tokens: enough for ``tokens`` without their sinks, and ``held_out`` others of the text.

    Fewer are drawn if the sources hold no more. Raises ConfigError for a length the model has no positions for or an
    unknown source, TooFewTokensError if a source gives no full sequence.
    """
    if not LEAST_CONTEXT <= length <= model.max_positions:
        raise ConfigError(
            f"a context of {length} tokens cannot be used; give {LEAST_CONTEXT} to {model.max_positions} "
            f"({model.identity.model_id}'s positions)"
        )
    if tokens < 1:
        raise ConfigError(f"{tokens} calibration tokens asked; give at least 1")
    wanted = max(-(-tokens // (length - SINKS)), len(sources))
    fit = token_sequences(sources, model.tokenizer, length, wanted, hold_out_every=HOLD_OUT_EVERY)
    unseen = token_sequences(
        sources, model.tokenizer, length, max(held_out, len(sources)), held_out=True, hold_out_every=HOLD_OUT_EVERY
    )
    return CalibrationTexts(fit.sequences, unseen.sequences, fit.tokens_by_source)


def held_out_sequences(tokens: int, length: int) -> int:
    """How many sequences to keep out of the PCA of ``tokens`` tokens."""
    return min(MOST_HELD_OUT, max(LEAST_HELD_OUT, tokens // length // HOLD_OUT_EVERY))


def fit_tokens(texts: CalibrationTexts) -> int:
    """Tokens that the covariance will see."""
    return sum(len(ids) - SINKS for ids in texts.fit)


def check_tokens(available: int, asked: int, shape: KVShape, config: CalibrationConfig) -> list[str]:
    """Warnings about the number of calibration tokens; none if all is well.

    Raises TooFewTokensError, saying how many are needed, if the asked rank is hopeless: a covariance of n tokens has
    at most n components, and half the rank is the least that leaves something to the codec.
    """
    channels = max(part.channels for part in parts_of(shape, split_layers(shape.layers, config.groups), config.tp_size))
    # Profile paper transforms K and V apart.
    channels = channels // 2 if config.profile == "paper" else channels
    rank = min(channels, config.max_rank)
    if available < rank / 2:
        raise TooFewTokensError(
            f"{available} calibration tokens cannot give a basis of rank {rank} ({channels} channels a layer group): "
            f"at least {-(-rank // 2)} are needed and {2 * channels} or more are advised; "
            f"give more text with --data, a larger --tokens, or more --groups"
        )
    warnings = []
    if available < asked:
        warnings.append(f"the text holds {available} tokens for calibration; {asked} were asked")
    if available < 2 * channels:
        low, high = next(cost for limit, *cost in _COST_OF_FEW if available <= limit * channels)
        warnings.append(
            f"{available} calibration tokens are few for {channels} channels a layer group: expect {low:.0%} "
            f"(at 60x) to {high:.0%} (at 16x) less ratio; {10 * channels} tokens, or more --groups, avoid it"
        )
    return warnings


def kl_measure(model: Model, sequences: Sequence[Tensor]) -> Measure:
    """Expected KL of an operating point: the first three quarters of each sequence are coded, the last continued.

    sequences: int64 [length] each, of one length. 4 sinks are exact, and a window of 128 tokens where the context has
    room for it. With tensor parallelism all ranks code their heads.
    """
    context = len(sequences[0]) * 3 // 4
    policy = ExactPolicy(sinks=SINKS, window=128 if context >= 4 * 128 else 0)

    def measure(artifact: Artifact, point: str) -> float:
        others = [artifact.for_rank(rank) for rank in range(1, artifact.manifest.tp_size)]
        codec = RecordCodec(point, artifact, point, policy, model.device, others)
        return continuation_kl(model, sequences, context, codec, policy).kl

    return measure
