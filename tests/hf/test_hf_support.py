"""The rotary embedding read off a model is right, and models that cannot be coded are refused with the reason."""

from __future__ import annotations

import math

import pytest
import torch

from dynamo_kvtc.errors import ConfigError, MissingDependencyError, UnsupportedModelError
from dynamo_kvtc.hf.model import load_model, wrap_model
from dynamo_kvtc.hf.support import check_config, read_and_prove
from dynamo_kvtc.ops.rope import remove_rope

transformers = pytest.importorskip("transformers")

BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
PLAIN = tuple(10000.0 ** (-2 * i / 8) for i in range(4))


@pytest.mark.parametrize(
    ("kind", "style", "rotary_dim"),
    [
        ("llama", "half", 8),
        ("llama-mha", "half", 8),
        ("llama-head-dim", "half", 20),
        ("llama3", "half", 8),
        ("yarn", "half", 8),
        ("mistral", "half", 8),
        ("mistral-wide-window", "half", 8),
        ("qwen2", "half", 8),
        ("qwen3", "half", 16),
        ("cohere", "interleaved", 8),
        ("glm", "interleaved", 8),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_is_read_and_proven(tiny_module, kind, style, rotary_dim, dtype):
    module = tiny_module(kind, dtype)
    shape, rope = read_and_prove(module)
    assert (rope.style, rope.rotary_dim) == (style, rotary_dim)
    assert shape.layers == 3
    assert shape.kv_heads == (4 if kind == "llama-mha" else 2)
    assert shape.head_dim == {"llama-head-dim": 20, "qwen3": 16, "glm": 16}.get(kind, 8)
    assert shape.dtype == str(dtype).removeprefix("torch.")
    # Casting a model to bf16 rounds its frequencies; they are put back, for engines keep them in float32.
    assert rope.inv_freq == read_and_prove(tiny_module(kind))[1].inv_freq
    assert {part.inv_freq.dtype for part in module.modules() if hasattr(part, "inv_freq")} == {torch.float32}


def test_frequencies_are_the_formulas(tiny_module):
    _, plain = read_and_prove(tiny_module("llama"))
    assert plain.inv_freq == pytest.approx(PLAIN, rel=1e-6)
    assert plain.attention_scaling == 1.0
    _, llama3 = read_and_prove(tiny_module("llama3"))
    # Wavelengths under 64 / 4 positions stay, those over 64 are stretched by 8.
    assert llama3.inv_freq[0] == pytest.approx(1.0)
    assert llama3.inv_freq[2:] == pytest.approx([f / 8 for f in PLAIN[2:]], rel=1e-6)
    _, yarn = read_and_prove(tiny_module("yarn"))
    assert yarn.attention_scaling == pytest.approx(0.1 * math.log(4) + 1)


def test_removed_rope_gives_the_key_projection(tiny_module):
    """With YaRN's scaling: what is left after removal is k_proj's output, so the factor is right too."""
    model = wrap_model(tiny_module("yarn"), None, "yarn")
    seen = []
    handle = model.module.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *a: seen.append(a[2]))
    k, _ = model.prefill(torch.arange(60))
    handle.remove()
    expected = seen[0][0].reshape(60, 2, 8).transpose(0, 1)
    torch.testing.assert_close(remove_rope(k[0], torch.arange(60), model.rope), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["frequency", "scaling"])
def test_a_rotary_module_that_does_otherwise_than_it_says_is_refused(tiny_module, change):
    module = tiny_module("llama")
    rotary = module.model.rotary_emb
    plain = rotary.forward

    def lying(x, position_ids):
        if change == "frequency":
            return plain(x, position_ids * 1.01)
        cos, sin = plain(x, position_ids)
        return cos * 1.2, sin * 1.2

    rotary.forward = lying
    with pytest.raises(UnsupportedModelError, match="could not be removed" if change == "frequency" else "scales keys"):
        read_and_prove(module)


def rope(kind: str, **more) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, **more}}


DEEPSEEK = {
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "moe_intermediate_size": 8,
    "num_experts_per_tok": 1,
}
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 128}
REFUSED = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {}, "no rotary"),
    "opt": ("OPTForCausalLM", "OPTConfig", {"word_embed_proj_dim": 32, "ffn_dim": 32}, "no rotary"),
    "bloom": ("BloomForCausalLM", "BloomConfig", {}, "no rotary"),
    "mpt": ("MptForCausalLM", "MptConfig", {}, "no rotary"),
    "falcon-alibi": ("FalconForCausalLM", "FalconConfig", {"alibi": True}, "ALiBi"),
    "deepseek-v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", DEEPSEEK, "latent attention"),
    "deepseek-v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK, "latent attention"),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {"head_dim": 16, "sliding_window": 64}, "kind of RoPE"),
    "dynamic": ("LlamaForCausalLM", "LlamaConfig", rope("dynamic"), "'dynamic' RoPE"),
    "longrope": ("LlamaForCausalLM", "LlamaConfig", rope("longrope", **LONG), "'longrope' RoPE"),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"state_size": 4}, "linear attention|no rotary"),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {"num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
        "in layer 0|no rotary",
    ),
    # RoPE in layer 0, none in layer 1: only the run of the model shows it.
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {"no_rope_layers": [1, 0]}, "layer 1 differs"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_unsupported_models_are_refused_with_the_reason(kind):
    module_name, config_name, extra, reason = REFUSED[kind]
    torch.manual_seed(0)
    module = getattr(transformers, module_name)(getattr(transformers, config_name)(**{**BASE, **extra}))
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        wrap_model(module, None, kind)
    assert "supported are decoder-only models with RoPE" in str(caught.value)


@pytest.mark.parametrize("config_name", ["T5Config", "BartConfig"])
def test_encoder_decoders_are_refused_by_their_config(config_name):
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        check_config(getattr(transformers, config_name)())


def test_latent_attention_in_disguise_is_refused_by_its_cache(monkeypatch):
    """Even if the config did not say so: its cache does not hold K and V of one shape with RoPE on all dims."""
    monkeypatch.setattr("dynamo_kvtc.hf.support.check_config", lambda config: None)
    torch.manual_seed(0)
    module = transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(**{**BASE, **DEEPSEEK, "num_key_value_heads": 4})
    )
    with pytest.raises(UnsupportedModelError, match=r"all must be alike|could not be removed"):
        wrap_model(module, None, "disguised")


def test_load_model_from_a_folder(tmp_path, tiny_module, byte_tokenizer):
    folder = tmp_path / "my-model"
    module = tiny_module("llama")
    module.save_pretrained(folder)
    with pytest.raises(ConfigError, match="could not be loaded"):
        load_model(str(folder))  # no tokenizer
    byte_tokenizer.save_pretrained(folder)
    model = load_model(str(folder))
    assert model.identity.model_id == "my-model"
    assert model.identity.weights_digest == wrap_model(module, None, "x").identity.weights_digest
    assert (model.shape.dtype, model.max_positions, model.device.type) == ("float32", 512, "cpu")
    assert load_model(str(folder), dtype="bfloat16").shape.dtype == "bfloat16"
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ConfigError, match="could not be loaded"):
        load_model(str(folder))
    # A sound file without the weights: transformers would fill them with random numbers.
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(ConfigError, match=r"missing keys \(lm_head\.weight"):
        load_model(str(folder))


def test_pickled_weights_are_not_read(tmp_path, tiny_module, byte_tokenizer):
    module = tiny_module("llama")
    module.config.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        load_model(str(tmp_path))


def test_refusal_comes_before_the_weights_are_loaded(tmp_path):
    transformers.FalconConfig(**{**BASE, "alibi": True}).save_pretrained(tmp_path / "alibi")
    with pytest.raises(UnsupportedModelError, match="ALiBi"):
        load_model(str(tmp_path / "alibi"))
    transformers.T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        load_model(str(tmp_path / "t5"))
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(UnsupportedModelError, match="no-such-type"):
        load_model(str(tmp_path / "unknown"))


def test_bad_names_and_devices_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="not a model folder"):
        load_model(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_model(str(tmp_path))
    with pytest.raises(ConfigError, match="not a model folder"):
        load_model("")
    with pytest.raises(ConfigError, match="device 'quantum' is unknown"):
        load_model("smollm2", device="quantum")
    with pytest.raises(ConfigError, match="dtype 'int4' is unknown"):
        load_model("smollm2", dtype="int4")
    if not torch.cuda.is_available():
        with pytest.raises(MissingDependencyError, match="sees no CUDA GPU"):
            load_model("smollm2", device="cuda")


def test_missing_transformers_names_the_remedy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install dynamo-kvtc\[model\]"):
        load_model("smollm2")
