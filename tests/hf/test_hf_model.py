"""A Model against the library's own full forward pass and greedy generation."""

from __future__ import annotations

import pytest
import torch

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.hf.model import weights_digest, wrap_model

KINDS = ["llama", "llama-mha", "llama-head-dim", "llama3", "yarn", "mistral", "mistral-wide-window", "qwen2", "qwen3"]
WINDOWS = ["mistral-window", "gemma2"]  # of 24 tokens, in all layers and in every other one
OTHER_ROPE = ["cohere", "glm"]  # interleaved pairs; glm turns half of the head's dims


def random_ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=KINDS + WINDOWS + OTHER_ROPE)
def model(request, tiny_module):
    return wrap_model(tiny_module(request.param), None, request.param)


def test_prefill_and_logits_equal_a_full_forward_pass(model):
    ids = random_ids(50)
    with torch.no_grad():
        expected = model.module(input_ids=ids[None], use_cache=True)
    k, v = model.prefill(ids[:31], chunk_tokens=7)
    assert k.shape == v.shape == (3, model.shape.kv_heads, 31, model.shape.head_dim)
    for layer, entry in enumerate(expected.past_key_values.layers):
        # Its own cache forgets what has left a window.
        first = 50 - entry.keys.shape[2]
        torch.testing.assert_close(k[layer][:, first:], entry.keys[0, :, : 31 - first], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(v[layer][:, first:], entry.values[0, :, : 31 - first], rtol=1e-4, atol=1e-5)
    before = k.clone(), v.clone()
    logits = model.logits(k, v, ids[31:], 31)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected.logits[0, 31:].float(), rtol=1e-4, atol=1e-4)
    last = model.logits(k, v, ids[31:], 31, last_only=True)
    torch.testing.assert_close(last, logits[-1:], rtol=1e-4, atol=1e-4)
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])


def test_no_cache_is_an_empty_cache(tiny_llama):
    ids = random_ids(9)
    with torch.no_grad():
        expected = tiny_llama.module(input_ids=ids[None]).logits[0]
    torch.testing.assert_close(tiny_llama.logits(*tiny_llama.empty_cache(), ids, 0), expected, rtol=1e-4, atol=1e-4)


def test_logits_after_evicted_tokens_equal_a_masked_forward_pass(tiny_llama):
    """The cache has lost tokens 4 to 19: the same as the library's pass with those columns masked for later tokens."""
    ids = random_ids(40)
    k, v = tiny_llama.prefill(ids[:30])
    kept = torch.cat([torch.arange(4), torch.arange(20, 30)])
    logits = tiny_llama.logits(k[:, :, kept], v[:, :, kept], ids[30:], position=30)
    allowed = torch.ones(40, 40, dtype=torch.bool).tril()
    allowed[30:, 4:20] = False
    with torch.no_grad():
        masked = tiny_llama.module(input_ids=ids[None], attention_mask=allowed[None, None]).logits[0, 30:]
    torch.testing.assert_close(logits, masked, rtol=1e-4, atol=1e-4)
    shifted = tiny_llama.logits(k[:, :, kept], v[:, :, kept], ids[30:], position=14)
    assert not torch.allclose(logits, shifted, atol=1e-2)


@pytest.mark.parametrize("kind", WINDOWS)
def test_a_window_is_counted_in_what_the_cache_holds_so_nothing_may_be_missing(kind, tiny_module):
    model = wrap_model(tiny_module(kind), None, kind)
    k, v = model.prefill(random_ids(30))
    for call in (model.logits, lambda *what: model.generate(*what, 1)):
        with pytest.raises(ConfigError, match="30 tokens are cached, and the next is at position 31"):
            call(k, v, random_ids(2), 31)


def test_generate_equals_the_librarys_greedy_decoding(model):
    ids = random_ids(20, seed=3)
    expected = model.module.generate(ids[None], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=258)
    k, v = model.prefill(ids[:13])
    seen: list[int] = []
    new_ids, grown_k, grown_v, seconds = model.generate(k, v, ids[13:], 13, 12, stop_ids=[], on_token=seen.append)
    assert new_ids == expected[0, 20:].tolist() == seen
    assert seconds > 0
    assert grown_k.shape[2] == grown_v.shape[2] == 20 + 12 - 1
    whole_k, whole_v = model.prefill(expected[0, :-1])
    torch.testing.assert_close(grown_k, whole_k, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(grown_v, whole_v, rtol=1e-3, atol=1e-4)
    # A second turn starts with the token that the cache lacks.
    again, *_ = model.generate(grown_k, grown_v, torch.tensor(new_ids[-1:]), 31, 3, stop_ids=[])
    longer = model.module.generate(ids[None], max_new_tokens=15, do_sample=False, eos_token_id=None, pad_token_id=258)
    assert new_ids + again == longer[0, 20:].tolist()


def test_generate_ends_with_the_stop_token(tiny_llama):
    ids = random_ids(20)
    empty = tiny_llama.empty_cache()
    free, *_ = tiny_llama.generate(*empty, ids, 0, 8, stop_ids=[])
    stop = free[3]
    stopped, k, _, _ = tiny_llama.generate(*empty, ids, 0, 8, stop_ids=[stop])
    assert stopped == free[: free.index(stop) + 1]
    assert k.shape[2] == 20 + len(stopped) - 1
    assert tiny_llama.end_ids == [257]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_cache_keeps_its_dtype(tiny_module, dtype):
    model = wrap_model(tiny_module("qwen2", dtype), None, "half")
    ids = random_ids(40)
    k, v = model.prefill(ids[:30])
    assert k.dtype == v.dtype == dtype
    assert model.shape.dtype == str(dtype).removeprefix("torch.")
    with torch.no_grad():
        expected = model.module(input_ids=ids[None]).logits[0, 30:].float()
    error = model.logits(k, v, ids[30:], 30) - expected
    assert error.abs().max() < 0.1 * expected.std()


def test_identity_covers_name_dtype_and_bytes(tiny_module):
    module = tiny_module("llama")
    first = wrap_model(module, None, "tiny", "r1").identity
    assert (first.model_id, first.revision, first.architecture) == ("tiny", "r1", "LlamaForCausalLM")
    assert len(first.weights_digest) == 64
    assert weights_digest(tiny_module("llama")) == first.weights_digest
    assert weights_digest(tiny_module("llama", torch.bfloat16)) != first.weights_digest
    with torch.no_grad():
        module.model.layers[2].mlp.down_proj.weight[0, 0] += 1e-3
    assert weights_digest(module) != first.weights_digest


def test_wrapping_freezes_the_model(tiny_module):
    module = tiny_module("llama").train()
    wrap_model(module, None, "tiny")
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_wrong_arguments_are_named(tiny_llama):
    ids = random_ids(5)
    k, v = tiny_llama.prefill(ids)
    with pytest.raises(ConfigError, match="int64"):
        tiny_llama.prefill(ids.int())
    with pytest.raises(ConfigError, match="T at least 1"):
        tiny_llama.prefill(ids[:0])
    with pytest.raises(ConfigError, match="positions 0 to 512"):
        tiny_llama.prefill(random_ids(513))
    with pytest.raises(ConfigError, match="positions 0 to 512"):
        tiny_llama.logits(k, v, ids, 508)
    with pytest.raises(ConfigError, match="positions 0 to 512"):
        tiny_llama.generate(k, v, ids, 500, 9)
    with pytest.raises(ConfigError, match="at least 1"):
        tiny_llama.generate(k, v, ids, 5, 0)
    with pytest.raises(ConfigError, match="chunk_tokens is 0"):
        tiny_llama.prefill(ids, chunk_tokens=0)
    with pytest.raises(ConfigError, match=r"k has shape \(2, 2, 5, 8\)"):
        tiny_llama.logits(k[:2], v, ids, 5)
    with pytest.raises(ConfigError, match="v has shape"):
        tiny_llama.logits(k, v[:, :, :4], ids, 5)
    with pytest.raises(ConfigError, match=r"v is torch\.bfloat16"):
        tiny_llama.logits(k, v.bfloat16(), ids, 5)
