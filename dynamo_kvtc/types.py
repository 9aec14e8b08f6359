"""The nouns every room shares. Frozen; the unit is in the name; shape letters are fixed once:

L layers, H KV heads, T tokens, D head dim, G layer groups, P channels of a layer group, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynamo_kvtc.errors import ConfigError

DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class KVShape:
    """The KV cache of one rank: what a token holds in it.

    ``dtype`` is the engine's cache dtype by name ("bfloat16", "float16" or "float32").
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"KVShape.{name} is {value}; it must be at least 1")
        if self.dtype not in DTYPES:
            raise ConfigError(f"KV dtype {self.dtype!r} is not supported; use one of {', '.join(DTYPES)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def bytes_per_layer_token(self) -> int:
        """K and V of one token in one layer, in bytes."""
        return 2 * self.kv_heads * self.head_dim * self.torch_dtype.itemsize

    @property
    def bytes_per_token(self) -> int:
        """K and V of one token in all layers, in bytes."""
        return self.layers * self.bytes_per_layer_token


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding, as the model applies it to keys.

    inv_freq: one angular frequency per rotated pair, radians per position; 2 * len(inv_freq) of the
        head's dims are rotated, the rest pass through.
    attention_scaling: factor the model multiplies into cos and sin (YaRN; 1.0 elsewhere).
    style: "half" pairs dim i with i + len(inv_freq) (Llama, Mistral, Qwen); "interleaved" pairs 2i with 2i + 1.
    """

    inv_freq: tuple[float, ...]
    attention_scaling: float = 1.0
    style: str = "half"

    def __post_init__(self) -> None:
        if self.style not in ("half", "interleaved"):
            raise ConfigError(f"RoPE style {self.style!r} is unknown; use 'half' or 'interleaved'")
        if not self.inv_freq:
            raise ConfigError("RopeSpec.inv_freq is empty; a model without RoPE is not supported")
        if not self.attention_scaling > 0:
            raise ConfigError(f"RopeSpec.attention_scaling is {self.attention_scaling}; it must be positive")

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.inv_freq)


@dataclass(frozen=True)
class ModelIdentity:
    """What makes two models' caches differ, as far as the weights go.

    weights_digest: sha256 (hex) over the model's parameters.
    """

    model_id: str
    revision: str
    weights_digest: str
    architecture: str
