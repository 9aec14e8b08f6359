"""READ FIRST of this room: calibration from the model to the artifact's tensors, on one screen.

texts -> Fisher weights -> covariance per layer group -> PCA basis -> coefficients of unseen text -> per operating
point: step and tables (profile kvtc) or bit allocation (profile paper) -> expected KL -> artifact
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from dynamo_kvtc.calibrate.collect import (
    SINKS,
    CacheModel,
    CacheSample,
    Part,
    Progress,
    caches,
    channel_scale,
    fisher_weights,
    parts_of,
    sample_caches,
    split_layers,
)
from dynamo_kvtc.calibrate.covariance import StreamingCovariance
from dynamo_kvtc.calibrate.points import KvtcPoints, KvtcTransform, fit_paper, token_importance
from dynamo_kvtc.calibrate.solve import solve_kl
from dynamo_kvtc.codec.artifact import FORMAT_VERSION, Artifact, Manifest, Point, rank_shape, seal
from dynamo_kvtc.errors import ConfigError

MIN_SEQUENCE_TOKENS = 64

Measure = Callable[[Artifact, str], float]
"""Mean KL per token, in nats, of an operating point of an artifact on held-out text."""


@dataclass(frozen=True)
class CalibrationTexts:
    """Token sequences int64 [length] each: for the PCA, and held out from it for steps and tables."""

    fit: list[Tensor]
    held_out: list[Tensor]
    tokens_by_source: dict[str, int]


@dataclass(frozen=True)
class CalibrationConfig:
    """What to calibrate.

    profile: "kvtc" or "paper". groups: layer groups. ratios: targets on coded tokens (nominal for paper).
    kls: target mean KL per token, in nats (kvtc only). tp_size: ranks of the engine, a basis each.
    fisher_sequences: sequences the Fisher weights are averaged over. ridge: added to every channel's relative Fisher
    weight. max_rank: components kept per layer group at most. sample_tokens: unseen tokens on which steps and tables
    are fitted.
    """

    profile: str = "kvtc"
    groups: int = 2
    ratios: tuple[float, ...] = (16.0, 30.0, 60.0)
    kls: tuple[float, ...] = ()
    tp_size: int = 1
    block_tokens: int = 16
    fisher_sequences: int = 64
    ridge: float = 0.1
    max_rank: int = 6144
    sample_tokens: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        if self.profile not in ("kvtc", "paper"):
            raise ConfigError(f"profile {self.profile!r} is unknown; use 'kvtc' or 'paper'")
        if not self.ratios and not self.kls:
            raise ConfigError("no operating point: give at least one target ratio or KL")
        if self.profile == "paper" and self.kls:
            raise ConfigError("profile paper takes nominal ratios only; a target KL needs profile kvtc")
        for value in (*self.ratios, *self.kls):
            if not 0 < value < float("inf"):
                raise ConfigError(f"target {value} is not a positive number")


def calibrate(
    model: CacheModel, texts: CalibrationTexts, config: CalibrationConfig, progress: Progress,
    measure: Measure | None = None,
) -> tuple[Manifest, dict[str, Tensor]]:  # fmt: skip
    """The artifact's manifest, sealed with its digest, and its tensors.

    measure gives each point's expected KL and is needed for target KLs; without it expected_kl stays None.
    Raises CalibrationError (unreachable target, cache not finite) or ConfigError.
    """
    rank_shape(model.shape, config.tp_size)
    if config.kls and measure is None:
        raise ConfigError("a target KL needs held-out text to measure on")
    shortest = min(len(s) for s in (*texts.fit, *texts.held_out))
    if shortest < MIN_SEQUENCE_TOKENS:
        raise ConfigError(f"a calibration sequence has {shortest} tokens; use at least {MIN_SEQUENCE_TOKENS}")
    groups = split_layers(model.shape.layers, config.groups)
    parts = parts_of(model.shape, groups, config.tp_size)

    def sealed(points: list[Point], tensors: dict[str, Tensor]) -> tuple[Manifest, dict[str, Tensor]]:
        manifest = Manifest(
            FORMAT_VERSION, config.profile, model.identity, model.shape, model.rope, config.tp_size,
            config.block_tokens, groups, tuple(points), _provenance(texts, config),
        )  # fmt: skip
        return seal(manifest, tensors)

    if config.profile == "paper":
        points, tensors = _paper(model, texts, config, parts, progress)
        manifest, tensors = sealed(points, tensors)
    else:
        fitted = _kvtc(model, texts, config, parts, progress)
        for target in config.kls:
            assert measure is not None
            name = f"kl={target:g}"

            def kl_of(step: float, name: str = name) -> float:
                trial = fitted.trial(name, step)
                return measure(Artifact(*sealed(trial.points, trial.tensors())), name)

            fitted.add(name, solve_kl(kl_of, target, fitted.reachable(), fitted.start()))
        manifest, tensors = sealed(fitted.points, fitted.tensors())
    if measure is None:
        return manifest, tensors
    measured = []
    for i, point in enumerate(manifest.points):
        progress("expected KL", i / len(manifest.points))
        measured.append(msgspec.structs.replace(point, expected_kl=measure(Artifact(manifest, tensors), point.name)))
    progress("expected KL", 1.0)
    return sealed(measured, tensors)


def _kvtc(
    model: CacheModel, texts: CalibrationTexts, config: CalibrationConfig, parts: list[Part], progress: Progress
) -> KvtcPoints:
    sequences = texts.fit[: config.fisher_sequences]
    fisher = fisher_weights(model, sequences, parts, config.seed, progress)
    covariances = _covariances(model, texts, parts, progress)
    transforms = []
    for i, part in enumerate(parts):
        progress("PCA", i / len(parts))
        mean, covariance = covariances.pop(0).finish()
        scale = channel_scale(fisher, part, config.ridge)
        transforms.append(KvtcTransform.fit(part, mean, covariance, scale, config.max_rank))
    progress("PCA", 1.0)
    importance = token_importance(model, transforms, fisher, progress)
    sample = sample_caches(model, texts.held_out, config.sample_tokens, "coefficients", progress)
    fitted = KvtcPoints.sample(
        transforms, importance, sample, model.rope, model.shape.bytes_per_token, config.block_tokens
    )
    for i, ratio in enumerate(config.ratios):
        progress("step sizes and tables", i / len(config.ratios))
        fitted.add(f"{ratio:g}", fitted.solve(ratio))
    progress("step sizes and tables", 1.0)
    return fitted


def _paper(
    model: CacheModel, texts: CalibrationTexts, config: CalibrationConfig, parts: list[Part], progress: Progress
) -> tuple[list[Point], dict[str, Tensor]]:
    covariances = _covariances(model, texts, parts, progress)
    sample: CacheSample = sample_caches(model, texts.held_out, config.sample_tokens, "coefficients", progress)
    tensors: dict[str, Tensor] = {}
    bits = [0.0] * len(config.ratios)
    for part in parts:
        mean, covariance = covariances.pop(0).finish()
        fitted, spent = fit_paper(
            part, mean, covariance, lambda p: sample.rows(p, model.rope), config.ratios, config.max_rank, progress
        )
        tensors.update(fitted)
        bits = [a + b for a, b in zip(bits, spent, strict=True)]
    raw_bits = 8 * model.shape.bytes_per_token
    # Before DEFLATE, whose gain depends on the text; `kvtc eval` measures it on the records.
    return [Point(f"{r:g}", 0.0, raw_bits / b) for r, b in zip(config.ratios, bits, strict=True)], tensors


def _covariances(
    model: CacheModel, texts: CalibrationTexts, parts: list[Part], progress: Progress
) -> list[StreamingCovariance]:
    covariances = [StreamingCovariance(part.channels, model.device) for part in parts]
    for cache in caches(model, texts.fit, "covariance", progress):
        for part, covariance in zip(parts, covariances, strict=True):
            covariance.add(cache.rows(part, model.rope))
    return covariances


def _provenance(texts: CalibrationTexts, config: CalibrationConfig) -> dict[str, object]:
    return {
        "tokens": sum(len(s) - SINKS for s in texts.fit),
        "held_out_tokens": sum(len(s) - SINKS for s in texts.held_out),
        "sources": texts.tokens_by_source,
        "fisher_sequences": min(config.fisher_sequences, len(texts.fit)) if config.profile == "kvtc" else 0,
        "ridge": config.ridge,
        "seed": config.seed,
        "torch": str(torch.__version__),
    }
