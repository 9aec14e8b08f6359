"""Fixtures that more than one room's tests use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

# Read when a kernel is decorated, so before any module with kernels is imported: without a GPU they are interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# What the tiny models share; 512 positions, a vocabulary of 259 (bytes and three special tokens).
TINY = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
# name -> (prefix of the class in transformers, what its config adds to TINY)
TINY_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-head-dim": ("Llama", {"head_dim": 20}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-wide-window": ("Mistral", {"sliding_window": 4096}),
    "mistral-window": ("Mistral", {"sliding_window": 24}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 24}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "cohere": ("Cohere", {}),
    "glm": ("Glm", {"head_dim": 16}),
}


def build_tiny_module(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of transformers, always with the same weights."""
    library = pytest.importorskip("transformers")
    prefix, extra = TINY_KINDS[kind]
    config = getattr(library, f"{prefix}Config")(**{**TINY, **extra})
    torch.manual_seed(1234)
    module = getattr(library, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            # Fresh models have tiny weights and zero biases: make attention sharp enough to depend on positions.
            if "norm" in name:
                continue
            torch.nn.init.normal_(parameter, std=0.3 if name.endswith("bias") else 0.2)
    return module.to(dtype)


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")),
        pytest.param("cuda", marks=[
            pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
        ]),
    ]
)  # fmt: skip
def kernel_device(request, monkeypatch) -> str:
    """Where a kernel's test runs: in Triton's interpreter on "cpu", or for real on "cuda" (pytest -m gpu)."""
    pytest.importorskip("triton")
    if request.param == "cpu":
        from triton.runtime import interpreter

        # Its loops take their bounds as int(array of one element), which NumPy 2.4 refuses.
        patch = interpreter._patch_lang_tensor

        def patch_and_index(tensor: Any, scope: Any) -> None:
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_and_index)
    return request.param


@pytest.fixture(scope="session")
def tiny_module():
    """``tiny_module(kind, dtype)``: see build_tiny_module; kinds are in TINY_KINDS."""
    return build_tiny_module


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A tokenizer with a token per byte (its id is not the byte's value), bos 256, eos 257, no bos by default."""
    library = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    vocabulary |= {"<bos>": 256, "<eos>": 257, "<pad>": 258}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    return library.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def tiny_llama(byte_tokenizer):
    """A wrapped random float32 Llama: 3 layers, 2 KV heads, head dim 8, 512 positions, byte tokenizer."""
    from dynamo_kvtc.hf.model import wrap_model

    return wrap_model(build_tiny_module("llama"), byte_tokenizer, "tiny-llama", "r0")


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The real demo model's folder, unpacked on first use. For tests marked ``model``."""
    from dynamo_kvtc.hf.smollm2 import smollm2_dir as unpack

    return unpack()
