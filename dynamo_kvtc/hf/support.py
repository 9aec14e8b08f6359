"""Which models can be coded, and how their rotary embedding is read and proven.

A model is judged in two steps: its config is read before any weight is loaded (cheap refusals with a clear reason),
then a short run of the model itself is the judge: the classes and shapes in its real cache, and its keys at two
positions, from which RoPE is removed and which must then agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynamo_kvtc.errors import UnsupportedModelError
from dynamo_kvtc.hf.library import transformers
from dynamo_kvtc.ops.rope import remove_rope
from dynamo_kvtc.types import KVShape, RopeSpec

SUPPORTED = (
    "supported are decoder-only models with RoPE, one for all layers, and multi-head or grouped-query attention, full "
    "or in sliding windows: Llama, Mistral, Qwen2, Qwen2.5, Qwen3, Gemma 2 and alike"
)
# RoPE whose angles depend on the length of the sequence: a cached key has no single inverse.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
# A layer that attends within a window has the same K and V of every token; the engine only forgets them sooner.
CODED_LAYERS = ("full_attention", "sliding_attention")
LAYER_KINDS = {
    "chunked_attention": "chunked attention",
    "linear_attention": "linear attention",
    "indexed_attention": "sparse attention with an indexer",
}
PROBE_TOKENS = 12
# The first shift turns the fast pairs well round, the second the slow ones, as far as the model's positions go.
PROBE_SHIFTS = (37, 4099)
# Layer 0's keys depend on the tokens alone, so they may differ by rounding only: of the cached keys and, in a model of
# 16 bits, of cos and sin. Relative error per pair of dims.
FIRST_LAYER_TOLERANCE = {torch.float32: 4e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
# Deeper layers add up the rounding of all layers before them, so this is the error over a whole layer. A layer without
# RoPE or with another one is off by at least CLEARLY_TURNED in the pairs that are looked at.
DEEP_LAYER_TOLERANCE = {torch.float32: 0.05, torch.float16: 0.1, torch.bfloat16: 0.25}
# Deeper layers are judged by the pairs that the shift moves by at least this share of their length.
CLEARLY_TURNED = 0.8


def refuse(reason: str) -> UnsupportedModelError:
    """The error to raise for a model that cannot be coded, with the reason and what can be."""
    return UnsupportedModelError(f"{reason}; {SUPPORTED}")


def check_config(config: Any) -> None:
    """Refuses what a model's config already rules out, before its weights are loaded.

    Raises UnsupportedModelError with the reason.
    """
    name = f"model type {getattr(config, 'model_type', type(config).__name__)!r}"
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise refuse(f"{name} is an encoder-decoder model or has cross-attention")
    for part in ("vision_config", "audio_config"):
        if getattr(config, part, None) is not None:
            raise refuse(f"{name} is multimodal (its config has a {part})")
    if getattr(config, "cross_attention_layers", None):
        raise refuse(f"{name} has cross-attention layers")
    if getattr(config, "kv_lora_rank", None):
        raise refuse(f"{name} uses multi-head latent attention (kv_lora_rank is {config.kv_lora_rank})")
    if getattr(config, "alibi", False):
        raise refuse(f"{name} uses ALiBi instead of RoPE")
    _check_layers(config, name)
    _check_rope_type(config, name)


def max_positions_of(config: Any) -> int:
    """How many positions a model was made for. Raises UnsupportedModelError if its config does not say."""
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        raise refuse(f"its config names no number of positions (max_position_embeddings is {most!r})")
    return most


def _check_layers(config: Any, name: str) -> None:
    for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind not in CODED_LAYERS:
            raise refuse(f"{name} has {LAYER_KINDS.get(kind, f'a layer of type {kind!r}')} in layer {layer}")


def _check_rope_type(config: Any, name: str) -> None:
    # "rope_parameters" since transformers 5, "rope_scaling" in older configs.
    for field in ("rope_parameters", "rope_scaling"):
        parameters = getattr(config, field, None)
        if not isinstance(parameters, dict):
            continue
        nested = [value for value in parameters.values() if isinstance(value, dict)]
        if len({str(value) for value in nested}) > 1:
            raise refuse(f"{name} has more than one kind of RoPE")
        for entry in [parameters, *nested]:
            kind = entry.get("rope_type", entry.get("type"))
            if kind in LENGTH_DEPENDENT_ROPE:
                raise refuse(f"{name} has {kind!r} RoPE, whose angles depend on the sequence length")


def read_and_prove(module: Any) -> tuple[KVShape, RopeSpec]:
    """The cache's shape and the rotary embedding of a loaded model, both checked on short runs of the model.

    module: a causal language model of transformers in eval mode. Runs 12 tokens at three offsets.
    Raises UnsupportedModelError if the cache is not plain K and V of one shape in every layer, if no rotary embedding
    is found, or if removing it does not make the keys independent of their position.
    """
    check_config(module.config)
    restore_float32_frequencies(module)
    inv_freq, scaling = read_rotary(module)
    device = module.get_input_embeddings().weight.device
    vocabulary = int(module.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (PROBE_TOKENS,), generator=generator).to(device)
    start = torch.arange(PROBE_TOKENS, device=device)
    with _OutputsAtZero(module) as outputs:
        keys, shape = _probe(module, ids, start)
    for value in outputs.values:
        # cos(0) times the scaling: the shifted runs below cannot see a wrong factor, since both would have it.
        if abs(value - scaling) > 0.01 * scaling:
            raise refuse(f"its rotary embedding scales keys by {value:.4g}, its attention_scaling says {scaling:.4g}")
    if 2 * len(inv_freq) > shape.head_dim:
        raise refuse(f"the rotary embedding turns {2 * len(inv_freq)} dims but a cached key has {shape.head_dim}")
    most = max_positions_of(module.config)
    if most <= 2 * PROBE_TOKENS:
        raise refuse(f"it has only {most} positions")
    shifts = sorted({min(shift, most - PROBE_TOKENS) for shift in PROBE_SHIFTS})
    shifted = [(shift, _probe(module, ids, start + shift)[0]) for shift in shifts]
    after, _ = read_rotary(module)
    if after != inv_freq:
        raise refuse("the model changed its RoPE frequencies while it ran: they depend on the sequence length")
    reasons = []
    for style in ("half", "interleaved"):
        rope = RopeSpec(inv_freq, scaling, style)
        reason = next(filter(None, (_disagreement(keys, start, moved, shift, rope) for shift, moved in shifted)), None)
        if reason is None:
            return shape, rope
        reasons.append(f"{style}: {reason}")
    raise refuse(f"its rotary embedding could not be removed from its keys ({'; '.join(reasons)})")


class _OutputsAtZero:
    """While entered, notes what each rotary module returns as the cosines of the first position, as ``values``."""

    def __init__(self, module: Any) -> None:
        self.values: list[float] = []
        self._handles = [part.register_forward_hook(self._note) for _, part in _rotary_modules(module)]

    def _note(self, part: Any, inputs: Any, output: Any) -> None:
        cos = output[0] if isinstance(output, tuple) else output
        if isinstance(cos, Tensor) and not cos.is_complex() and cos.dim() >= 2:
            at_zero = cos[..., 0, :].float()
            self.values += [float(at_zero.min()), float(at_zero.max())]

    def __enter__(self) -> _OutputsAtZero:
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()


def restore_float32_frequencies(module: Any) -> None:
    """Puts float32 frequencies back where ``module.to(bfloat16)`` rounded them along with the weights.

    Rounded frequencies turn a key at position 1,000 by a wrong angle of radians; engines keep them in float32.
    Raises UnsupportedModelError if the rotary module cannot be made anew from the config.
    """
    for _, rotary in _rotary_modules(module):
        if rotary.inv_freq.dtype == torch.float32:
            continue
        try:
            fresh = type(rotary)(config=module.config)
        except Exception as exc:
            raise refuse(f"its RoPE frequencies are {rotary.inv_freq.dtype} and cannot be made anew: {exc}") from exc
        for name in ("inv_freq", "original_inv_freq"):
            if isinstance(getattr(rotary, name, None), Tensor):
                setattr(rotary, name, getattr(fresh, name).to(rotary.inv_freq.device, torch.float32))


def _rotary_modules(module: Any) -> list[tuple[str, Any]]:
    return [
        (name, part) for name, part in module.named_modules() if isinstance(getattr(part, "inv_freq", None), Tensor)
    ]


def read_rotary(module: Any) -> tuple[tuple[float, ...], float]:
    """(frequencies in radians per position, attention scaling) of the model's rotary modules, which must agree."""
    found = {
        (tuple(part.inv_freq.detach().float().flatten().tolist()), float(getattr(part, "attention_scaling", 1.0)))
        for _, part in _rotary_modules(module)
    }
    if not found:
        raise refuse(f"{type(module).__name__} has no rotary position embedding (RoPE) module")
    if len(found) > 1:
        raise refuse(f"{type(module).__name__} has {len(found)} different rotary embeddings")
    for part in _rotary_modules(module):
        kind = getattr(part[1], "rope_type", None)
        if kind in LENGTH_DEPENDENT_ROPE:
            raise refuse(f"{type(module).__name__} has {kind!r} RoPE, whose angles depend on the sequence length")
    return found.pop()


def _probe(module: Any, ids: Tensor, positions: Tensor) -> tuple[list[Tensor], KVShape]:
    """Runs the model with the cache it makes itself. Returns each layer's keys [H, T, D] and the cache's shape."""
    try:
        with torch.no_grad():
            output = module(input_ids=ids[None], position_ids=positions[None], use_cache=True)
    except (TypeError, ValueError, AttributeError, KeyError) as exc:
        raise refuse(f"{type(module).__name__} could not run a plain forward pass: {exc}") from exc
    cache = getattr(output, "past_key_values", None)
    layers = getattr(cache, "layers", None)
    if not layers:
        raise refuse(f"{type(module).__name__} keeps no key-value cache (it is a state-space or recurrent model)")
    cache_utils = transformers().cache_utils
    allowed = (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer)
    for index, layer in enumerate(layers):
        if type(layer) not in allowed or not isinstance(layer.keys, Tensor) or not isinstance(layer.values, Tensor):
            raise refuse(f"layer {index} caches with {type(layer).__name__}, not plain keys and values")
    return _shape_of(module, [layer.keys for layer in layers], [layer.values for layer in layers], len(ids))


def _shape_of(
    module: Any, keys: Sequence[Tensor], values: Sequence[Tensor], tokens: int
) -> tuple[list[Tensor], KVShape]:
    expected = getattr(module.config, "num_hidden_layers", len(keys))
    if len(keys) != expected:
        raise refuse(f"only {len(keys)} of {expected} layers have a cache of their own")
    first = keys[0]
    if first.dim() != 4 or first.shape[0] != 1 or first.shape[2] != tokens:
        raise refuse(f"cached keys have shape {tuple(first.shape)}, expected [1, kv heads, {tokens} tokens, head dim]")
    for index, (k, v) in enumerate(zip(keys, values, strict=True)):
        if k.shape != first.shape or v.shape != first.shape or k.dtype != first.dtype or v.dtype != first.dtype:
            raise refuse(
                f"layer {index} caches K {tuple(k.shape)} {k.dtype} and V {tuple(v.shape)} {v.dtype}, "
                f"layer 0 K {tuple(first.shape)} {first.dtype}; all must be alike"
            )
    shape = KVShape(len(keys), int(first.shape[1]), int(first.shape[3]), str(first.dtype).removeprefix("torch."))
    return [k[0] for k in keys], shape


def _disagreement(keys: list[Tensor], start: Tensor, moved: list[Tensor], shift: int, rope: RopeSpec) -> str | None:
    """None if keys and moved are equal once RoPE is removed, else what is not. keys, moved: a [H, T, D] per layer."""
    n = len(rope.inv_freq)
    angles = torch.tensor(rope.inv_freq, dtype=torch.float64, device=keys[0].device) * shift
    turned = 2 * (angles / 2).sin().abs() >= CLEARLY_TURNED  # |exp(i angle) - 1|
    for layer, (here, there) in enumerate(zip(keys, moved, strict=True)):
        a = remove_rope(here.float(), start, rope)
        b = remove_rope(there.float(), start + shift, rope)
        error, size = ((x.double().square().sum(dim=-2)) for x in (a - b, a))  # [H, D], summed over tokens
        # A pair carries the rounding of both its dims, and a tiny one that of the head's sum: hence the floor.
        floor = 1e-6 * size.mean(dim=-1, keepdim=True)
        if layer == 0:
            relative = _pairs(error, n, rope.style) / (_pairs(size, n, rope.style) + floor)
            worst = float(relative.max().sqrt())
            limit = FIRST_LAYER_TOLERANCE[here.dtype]
        elif bool(turned.any()):
            ratio = _pairs(error, n, rope.style)[:, turned].sum() / _pairs(size, n, rope.style)[:, turned].sum()
            worst, limit = float(ratio.sqrt()), DEEP_LAYER_TOLERANCE[here.dtype]
        else:
            continue
        if not worst <= limit:
            return f"layer {layer} differs by {worst:.2g} of its size after a shift of {shift}, allowed is {limit:.2g}"
    return None


def _pairs(per_dim: Tensor, n: int, style: str) -> Tensor:
    """Sums over the two dims of each rotated pair: [H, D] -> [H, n]."""
    if style == "half":
        return per_dim[:, :n] + per_dim[:, n : 2 * n]
    return per_dim[:, 0 : 2 * n : 2] + per_dim[:, 1 : 2 * n : 2]
