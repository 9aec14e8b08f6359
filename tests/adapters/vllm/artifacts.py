"""Artifacts for the engine's model. Made outside the engine's process: vLLM 0.31 cannot start a CPU worker where numba
is imported already."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec

from dynamo_kvtc.codec.artifact import save_artifact
from dynamo_kvtc.hf.checkpoint import checkpoint_digest, read_config, rope_of, shape_of
from dynamo_kvtc.types import ModelIdentity
from tests.builders import case_seed, make_artifact


def any_artifact(model: Path, path: Path, dtype: str = "float32", tp_size: int = 1) -> Path:
    """An artifact of random numbers that says it is this model's: enough where every token stays exact."""
    config = read_config(str(model))
    shape, rope = shape_of(config, dtype), rope_of(config, "half")
    groups = ((0, shape.layers // 3), (shape.layers // 3, shape.layers))
    manifest, tensors, _ = make_artifact(shape, rope, groups=groups, components=20, tp_size=tp_size)
    identity = ModelIdentity("any", "", checkpoint_digest(model, dtype), config.architectures[0])
    save_artifact(path, msgspec.structs.replace(manifest, model=identity), tensors)
    return path


def calibrated(
    model: Path, path: Path, groups: int, ratios: Sequence[float], tokens: int = 8_000, length: int = 512,
    fisher: int = 2,
) -> None:  # fmt: skip
    from dynamo_kvtc.calibrate.run import CalibrationConfig, calibrate
    from dynamo_kvtc.calibrate.texts import draw_texts
    from dynamo_kvtc.hf.model import load_model

    loaded = load_model(str(model), dtype="float32")
    config = CalibrationConfig(groups=groups, ratios=tuple(ratios), fisher_sequences=fisher)
    manifest, tensors = calibrate(loaded, draw_texts(loaded, ["python"], tokens, length, 4), config, lambda *_: None)
    save_artifact(path, manifest, tensors)


def small_model(folder: Path) -> Path:
    """Random weights, no tokenizer; 2 KV heads, for two ranks (SmolLM2 has 3), and a vocabulary for prompt_of."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(case_seed())
    module = LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
    ))  # fmt: skip
    for name, parameter in module.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    module.save_pretrained(folder)
    return folder


def hybrid_model(model: Path, folder: Path, every: int = 2) -> Path:
    """The model with windows of 256 tokens, in one layer of so many."""
    folder.mkdir(exist_ok=True)
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    kinds = [("full", "sliding")[i % every == every - 1] + "_attention" for i in range(config["num_hidden_layers"])]
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "layer_types": kinds, "sliding_window": 256}))
    return folder
