"""How long a model of some shape takes to compute a prompt's cache: its weights are random, its time is not."""

from __future__ import annotations

import time
from typing import Protocol

import torch

from dynamo_kvtc.hf.library import transformers
from dynamo_kvtc.types import KVShape

_RUNS = 3


class Dimensions(Protocol):
    """A decoder's dimensions."""

    @property
    def kv(self) -> KVShape: ...
    @property
    def hidden(self) -> int: ...
    @property
    def intermediate(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...


def prefill_seconds(model: Dimensions, tokens: int, device: str = "cuda") -> float:
    """Median seconds of a forward pass of ``tokens`` tokens that fills a cache and gives the last token's logits.

    A Llama with PyTorch's fused attention, in the cache's dtype. Raises MissingDependencyError without transformers.
    """
    library = transformers()
    config = library.LlamaConfig(
        vocab_size=model.vocabulary, hidden_size=model.hidden, intermediate_size=model.intermediate,
        num_hidden_layers=model.kv.layers, num_attention_heads=model.heads, num_key_value_heads=model.kv.kv_heads,
        head_dim=model.kv.head_dim, max_position_embeddings=max(tokens, 2048), attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        empty = library.LlamaForCausalLM(config).to(model.kv.torch_dtype)
    module = empty.to_empty(device=device).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02)
        # Not a parameter, so not restored from the empty model.
        rope = module.model.rotary_emb
        fresh = type(rope)(config).inv_freq
        rope.inv_freq = fresh.to(device)
        ids = torch.randint(0, model.vocabulary, (1, tokens), device=device)
        times = []
        for _ in range(1 + _RUNS):
            _wait(device)
            start = time.perf_counter()
            module(ids, use_cache=True, logits_to_keep=1)
            _wait(device)
            times.append(time.perf_counter() - start)
    del module
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    return sorted(times[1:])[_RUNS // 2]


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
