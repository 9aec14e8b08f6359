"""Models' shapes by name: what a bench needs of a model without its weights."""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.types import KVShape


@dataclass(frozen=True)
class ModelShape:
    """A decoder's dimensions, of one tensor-parallel rank for a name that says so (its kv is that rank's cache)."""

    kv: KVShape
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int


MODELS = {
    "smollm2-135m": ModelShape(KVShape(30, 3, 64, "bfloat16"), 576, 1536, 9, 49152),
    "qwen2.5-1.5b": ModelShape(KVShape(28, 2, 128, "bfloat16"), 1536, 8960, 12, 151936),
    "llama-3.1-8b": ModelShape(KVShape(32, 8, 128, "bfloat16"), 4096, 14336, 32, 128256),
    "mistral-nemo-12b": ModelShape(KVShape(40, 8, 128, "bfloat16"), 5120, 14336, 32, 131072),
    "llama-3.3-70b-tp4": ModelShape(KVShape(80, 2, 128, "bfloat16"), 8192, 7168, 16, 128256),
}
SHAPES = {name: model.kv for name, model in MODELS.items()}


def shape_of(name: str) -> KVShape:
    """Raises ConfigError naming the shapes there are."""
    return model_of(name).kv


def model_of(name: str) -> ModelShape:
    """Raises ConfigError naming the shapes there are."""
    if name not in MODELS:
        raise ConfigError(f"shape {name!r} is unknown; known: {', '.join(MODELS)}")
    return MODELS[name]
