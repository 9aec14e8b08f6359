"""Artifacts for the engine's model. Made outside the engine's process: vLLM 0.31 cannot start a CPU worker where numba
is imported already."""

from __future__ import annotations

from pathlib import Path

import msgspec

from dynamo_kvtc.codec.artifact import save_artifact
from dynamo_kvtc.hf.checkpoint import checkpoint_digest, read_config, rope_of, shape_of
from dynamo_kvtc.types import ModelIdentity
from tests.builders import make_artifact


def any_artifact(model: Path, path: Path, dtype: str = "float32") -> Path:
    """An artifact of random numbers that says it is this model's: enough where every token stays exact."""
    config = read_config(str(model))
    shape, rope = shape_of(config, dtype), rope_of(config, "half")
    manifest, tensors, _ = make_artifact(shape, rope, groups=((0, 10), (10, shape.layers)), components=20)
    identity = ModelIdentity("any", "", checkpoint_digest(model, dtype), config.architectures[0])
    save_artifact(path, msgspec.structs.replace(manifest, model=identity), tensors)
    return path
