"""Cache shapes of models by name: what a bench needs of a model without its weights."""

from __future__ import annotations

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.types import KVShape

SHAPES = {
    "smollm2-135m": KVShape(30, 3, 64, "bfloat16"),
    "qwen2.5-1.5b": KVShape(28, 2, 128, "bfloat16"),
    "llama-3.1-8b": KVShape(32, 8, 128, "bfloat16"),
    "mistral-nemo-12b": KVShape(40, 8, 128, "bfloat16"),
    "llama-3.3-70b-tp4": KVShape(80, 2, 128, "bfloat16"),
}


def shape_of(name: str) -> KVShape:
    """Raises ConfigError naming the shapes there are."""
    if name not in SHAPES:
        raise ConfigError(f"shape {name!r} is unknown; known: {', '.join(SHAPES)}")
    return SHAPES[name]
