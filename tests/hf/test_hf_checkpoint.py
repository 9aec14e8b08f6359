"""A checkpoint described without loading it says what the loaded model says."""

from __future__ import annotations

import pytest

from dynamo_kvtc.errors import ConfigError, UnsupportedModelError
from dynamo_kvtc.hf.checkpoint import checkpoint_digest, folder_of, read_config, rope_of, shape_of
from dynamo_kvtc.hf.model import load_model
from tests.conftest import build_tiny_module


@pytest.mark.parametrize("kind", ["llama", "llama3", "yarn", "llama-head-dim", "qwen3", "gemma2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_says_what_the_model_says(kind, dtype, tmp_path, byte_tokenizer):
    build_tiny_module(kind).save_pretrained(tmp_path / kind)
    byte_tokenizer.save_pretrained(tmp_path / kind)
    model = load_model(str(tmp_path / kind), dtype=dtype)
    config = read_config(str(tmp_path / kind))
    assert shape_of(config, dtype) == model.shape
    assert rope_of(config, model.rope.style) == model.rope
    assert checkpoint_digest(folder_of(str(tmp_path / kind)), dtype) == model.identity.weights_digest


def test_what_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no readable config"):
        read_config(str(tmp_path))
    with pytest.raises(ConfigError, match="no safetensors files: set weights"):
        checkpoint_digest(tmp_path, "bfloat16")
    module = build_tiny_module("mistral")
    module.config.layer_types = ["chunked_attention"] * module.config.num_hidden_layers
    module.config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="chunked attention in layer 0"):
        read_config(str(tmp_path))
    assert folder_of("nobody/nothing-at-all") is None
    with pytest.raises(ConfigError, match="fp8"):
        shape_of(build_tiny_module("llama").config, "fp8")
