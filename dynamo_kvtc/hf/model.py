"""A model of transformers, seen through its KV cache.

Everywhere here K and V are in *engine form*: as the engine caches them, K after RoPE, in the cache's dtype (which need
not be the dtype of the arithmetic: 16-bit arithmetic is slow on most CPUs), as two tensors [L, H, T, D] (layers, KV
heads, tokens, head dim) on the model's device. Token ids are int64 [T].
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dynamo_kvtc.errors import ConfigError, MissingDependencyError
from dynamo_kvtc.hf import smollm2
from dynamo_kvtc.hf.gradients import fisher_gradients
from dynamo_kvtc.hf.library import transformers
from dynamo_kvtc.hf.support import check_config, max_positions_of, read_and_prove, refuse, restore_float32_frequencies
from dynamo_kvtc.types import DTYPES, KVShape, ModelIdentity, RopeSpec

DEMO_MODEL = "smollm2"


@dataclass
class Model:
    """A causal language model in eval mode whose parameters take no gradient.

    module: the PreTrainedModel; tokenizer: its tokenizer (None if it was wrapped without one).
    rope: read from the model's rotary module and proven on its keys.
    max_positions: positions the model was made for; longer input is refused.
    """

    module: Any
    tokenizer: Any
    shape: KVShape
    rope: RopeSpec
    identity: ModelIdentity
    max_positions: int

    @property
    def device(self) -> torch.device:
        """Where ids go in and K, V come out."""
        return self.module.get_input_embeddings().weight.device

    def prefill(self, ids: Tensor, chunk_tokens: int = 2048) -> tuple[Tensor, Tensor]:
        """The cache of ``ids`` at positions 0 to T - 1, computed ``chunk_tokens`` tokens at a time, without gradients.

        ids: int64 [T]. Returns (k, v), each [L, H, T, D] in engine form. No logits are computed.
        Raises ConfigError if ids is empty, not int64 [T], or longer than the model's positions.
        """
        if chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")
        self.check_ids(ids, 0)
        cache = transformers().DynamicCache()
        with torch.no_grad():
            self._run_base(cache, ids, 0, chunk_tokens)
        return self._tensors_of(cache)

    def logits(self, k: Tensor, v: Tensor, ids: Tensor, position: int, last_only: bool = False) -> Tensor:
        """Teacher-forces ``ids`` after a cache, without gradients. k and v are not changed.

        k, v: [L, H, T1, D] in engine form (T1 may be 0); ids: int64 [T2]; position: the absolute position of ids[0],
        normally T1, more if tokens were evicted (not with sliding windows). ids attend to the cache and causally to
        themselves.
        Returns float32 [T2, vocab], or [1, vocab] for the last token alone if last_only.
        Raises ConfigError for wrong shapes, dtypes or positions.
        """
        self.check_ids(ids, position)
        self._check_place(k, position)
        with torch.no_grad():
            output = self.forward_after(self.cache_of(k, v), ids, position, last_only=last_only)
            return output.logits[0].float()

    def generate(
        self,
        k: Tensor,
        v: Tensor,
        ids: Tensor,
        position: int,
        max_new_tokens: int,
        stop_ids: Collection[int] | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> tuple[list[int], Tensor, Tensor, float]:
        """Greedy decoding after a cache and a prompt. k and v are not changed.

        k, v: [L, H, T1, D] in engine form (T1 may be 0, see ``empty_cache``); ids: int64 [T2], the prompt's tokens that
        are not in the cache, at least one; position: the absolute position of ids[0].
        stop_ids: tokens that end the text; default: the model's end tokens. on_token is called with each new token.

        Returns (new_ids, k, v, first_token_seconds):
        new_ids: the new tokens, at least one; a stop token is included as the last.
        k, v: the grown cache, T1 + T2 + len(new_ids) - 1 tokens. **The last new token is never in it**, since the model
        has not been run on it: a next turn starts its ids with new_ids[-1], at position + T2 + len(new_ids) - 1.
        first_token_seconds: from the call until the first token is known on the host, device work included.
        Raises ConfigError for wrong shapes, dtypes, or positions beyond the model's.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        self.check_ids(ids, position, extra=max_new_tokens - 1)
        self._check_place(k, position)
        stops = set(self.end_ids if stop_ids is None else stop_ids)
        self._synchronize()
        started = time.perf_counter()
        cache = self.cache_of(k, v)
        with torch.no_grad():
            self._run_base(cache, ids[:-1], position, 2048)
            position += len(ids) - 1
            token = self._next_token(cache, ids[-1:], position)
            first_token_seconds = time.perf_counter() - started
            new_ids = [token]
            if on_token:
                on_token(token)
            while len(new_ids) < max_new_tokens and token not in stops:
                position += 1
                token = self._next_token(cache, torch.tensor([token]), position)
                new_ids.append(token)
                if on_token:
                    on_token(token)
        return new_ids, *self._tensors_of(cache), first_token_seconds

    def fisher_gradients(
        self, ids_context: Tensor, ids_continuation: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """See ``dynamo_kvtc.hf.gradients.fisher_gradients``: (gk, gv), float32 [L, H, Tc, D], gk before RoPE."""
        return fisher_gradients(self, ids_context, ids_continuation, generator)

    def empty_cache(self) -> tuple[Tensor, Tensor]:
        """(k, v) of no tokens, [L, H, 0, D]: the start of a conversation."""
        shape = (self.shape.layers, self.shape.kv_heads, 0, self.shape.head_dim)
        k = torch.empty(shape, dtype=self.shape.torch_dtype, device=self.device)
        return k, k.clone()

    @property
    def end_ids(self) -> list[int]:
        """Token ids that end the model's text: those of its generation config, else of its tokenizer."""
        configured = getattr(getattr(self.module, "generation_config", None), "eos_token_id", None)
        if configured is None:
            configured = getattr(self.tokenizer, "eos_token_id", None)
        if configured is None:
            return []
        return list(configured) if isinstance(configured, (list, tuple)) else [int(configured)]

    def check_ids(self, ids: Tensor, position: int, extra: int = 0) -> None:
        """Raises ConfigError unless ids is int64 [T], T >= 1, and fits at ``position`` with ``extra`` tokens more."""
        if ids.dtype != torch.int64 or ids.dim() != 1 or ids.numel() == 0:
            raise ConfigError(f"token ids must be int64 [T] with T at least 1; got {ids.dtype} {tuple(ids.shape)}")
        end = position + len(ids) + extra
        if position < 0 or end > self.max_positions:
            raise ConfigError(
                f"{len(ids) + extra} tokens from position {position} end at {end}, but "
                f"{self.identity.model_id} has positions 0 to {self.max_positions}; give fewer tokens"
            )

    def _check_place(self, k: Tensor, position: int) -> None:
        """transformers counts a window in the tokens that the cache holds, not in positions."""
        window = getattr(self.module.config, "sliding_window", None)
        if window is not None and window < self.max_positions and k.shape[2] != position:
            raise ConfigError(
                f"{k.shape[2]} tokens are cached, and the next is at position {position}: a model with sliding windows "
                "must have all of them"
            )

    def cache_of(self, k: Tensor, v: Tensor) -> Any:
        """A cache object of transformers holding a copy of k and v; gradients flow back to them.

        k, v: [L, H, T, D] in engine form. Raises ConfigError for another shape or dtype.
        """
        wanted = (self.shape.layers, self.shape.kv_heads, self.shape.head_dim)
        for name, x in (("k", k), ("v", v)):
            if x.dim() != 4 or (x.shape[0], x.shape[1], x.shape[3]) != wanted or x.shape[2] != k.shape[2]:
                raise ConfigError(
                    f"{name} has shape {tuple(x.shape)}; {self.identity.model_id} needs [{wanted[0]}, {wanted[1]}, "
                    f"T, {wanted[2]}], T the same for k and v"
                )
            if x.dtype != self.shape.torch_dtype:
                raise ConfigError(f"{name} is {x.dtype}; the cache of {self.identity.model_id} is {self.shape.dtype}")
        cache = transformers().DynamicCache()
        k, v = (x.to(self.device, self.module.dtype) for x in (k, v))
        # unbind, not k[layer]: its gradient is one stack instead of a full-size tensor per layer.
        for layer, (keys, values) in enumerate(zip(k.unbind(0), v.unbind(0), strict=True)):
            cache.update(keys[None], values[None], layer)
        return cache

    def forward_after(self, cache: Any, ids: Tensor, position: int, last_only: bool = False) -> Any:
        """Runs the model with its head; ``cache`` grows by ids. Gradient mode is the caller's."""
        keep = {"logits_to_keep": 1} if last_only else {}
        return self.module(past_key_values=cache, use_cache=True, **self._inputs(ids, position), **keep)

    def _inputs(self, ids: Tensor, position: int) -> dict[str, Tensor]:
        ids = ids.to(self.device)
        positions = torch.arange(position, position + len(ids), device=self.device)
        return {"input_ids": ids[None], "position_ids": positions[None]}

    def _run_base(self, cache: Any, ids: Tensor, position: int, chunk_tokens: int) -> None:
        """Grows the cache by ids without the language-model head, so no [T, vocab] tensor is made."""
        for first in range(0, len(ids), chunk_tokens):
            inputs = self._inputs(ids[first : first + chunk_tokens], position + first)
            self.module.base_model(past_key_values=cache, use_cache=True, **inputs)

    def _next_token(self, cache: Any, ids: Tensor, position: int) -> int:
        return int(self.forward_after(cache, ids, position, last_only=True).logits[0, -1].argmax())

    def _tensors_of(self, cache: Any) -> tuple[Tensor, Tensor]:
        dtype = self.shape.torch_dtype
        k = torch.stack([layer.keys[0].to(dtype) for layer in cache.layers])
        v = torch.stack([layer.values[0].to(dtype) for layer in cache.layers])
        return k, v

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def load_model(
    name_or_path: str, device: str = "cpu", dtype: str | None = None, compute_dtype: str | None = None
) -> Model:
    """Loads a model and proves that its cache can be coded.

    name_or_path: "smollm2" (the demo model, fetched and unpacked on first use), a folder, or a name on the Hugging Face
    hub (HF_HUB_OFFLINE=1 keeps to what is cached). Only safetensors weights are read.
    device: "cpu", "cuda", "cuda:1" ...; dtype: the weights' and the cache's, "bfloat16", "float16", "float32", or None
    for the checkpoint's own; compute_dtype: the arithmetic's, by default float32 on a CPU and dtype elsewhere.

    Raises ConfigError for a name, folder, device or dtype that cannot be used, MissingDependencyError if transformers
    is absent, UnsupportedModelError with the reason if the codec cannot code this model's cache.
    """
    for name in (dtype, compute_dtype):
        if name is not None and name not in DTYPES:
            raise ConfigError(f"dtype {name!r} is unknown; use one of {', '.join(DTYPES)}, or leave it out")
    target = _checked_device(device)
    library = transformers()
    if name_or_path == DEMO_MODEL:
        source, model_id = str(smollm2.smollm2_dir()), smollm2.MODEL_ID
    else:
        source, model_id = _source(name_or_path)
    try:
        config = library.AutoConfig.from_pretrained(source)
        check_config(config)
        if type(config) not in library.AutoModelForCausalLM._model_mapping:
            raise refuse(f"model type {config.model_type!r} is not a causal language model")
        tokenizer = library.AutoTokenizer.from_pretrained(source)
        wanted = "auto" if dtype is None else DTYPES[dtype]
        module, report = library.AutoModelForCausalLM.from_pretrained(
            source, dtype=wanted, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, SafetensorError) as exc:
        if isinstance(exc, ConfigError):
            raise
        if "model type" in str(exc) or "Unrecognized" in str(exc):
            raise refuse(f"transformers cannot load {name_or_path!r}: {_first_line(exc)}") from exc
        raise ConfigError(
            f"model {name_or_path!r} could not be loaded: {_first_line(exc)}. Give {DEMO_MODEL!r}, a folder with "
            f"config.json, a tokenizer and safetensors weights, or a name on the Hugging Face hub"
        ) from exc
    # transformers fills what a checkpoint lacks with random numbers and only warns.
    for kind in ("missing_keys", "mismatched_keys"):
        if report.get(kind):
            names = ", ".join(sorted(map(str, report[kind]))[:3])
            raise ConfigError(f"model {name_or_path!r}: {len(report[kind])} {kind.replace('_', ' ')} ({names}, ...)")
    if compute_dtype is None and target.type == "cpu":
        compute_dtype = "float32"
    revision = getattr(config, "_commit_hash", None) or ""
    return wrap_model(module.to(target), tokenizer, model_id, revision, compute_dtype)


def wrap_model(
    module: Any, tokenizer: Any, model_id: str, revision: str = "", compute_dtype: str | None = None
) -> Model:
    """A Model of an already built PreTrainedModel, which is put into eval mode and stops taking gradients.

    tokenizer: may be None if only ids are used. compute_dtype: what the module is cast to in the end; its cache keeps
    the dtype that the module came in. Raises UnsupportedModelError with the reason if the codec cannot code
    this model's cache.
    """
    module.eval()
    module.requires_grad_(False)
    shape, rope = read_and_prove(module)
    architectures = getattr(module.config, "architectures", None)
    identity = ModelIdentity(
        model_id=model_id,
        revision=revision,
        weights_digest=weights_digest(module),
        architecture=architectures[0] if architectures else type(module).__name__,
    )
    if compute_dtype is not None and DTYPES[compute_dtype] != module.dtype:
        module.to(DTYPES[compute_dtype])
        restore_float32_frequencies(module)
    return Model(module, tokenizer, shape, rope, identity, max_positions_of(module.config))


def weights_digest(module: torch.nn.Module) -> str:
    """sha256 (hex) over the parameters in name order: name, dtype, shape and bytes. Tied parameters count once."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        # One tensor at a time on the host, hashed in place.
        data = parameter.detach().to("cpu").contiguous().reshape(-1)
        digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _checked_device(device: str) -> torch.device:
    try:
        target = torch.device(device)
    except RuntimeError as exc:
        raise ConfigError(f"device {device!r} is unknown; use 'cpu', 'cuda' or 'cuda:N'") from exc
    if target.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not supported; use 'cpu', 'cuda' or 'cuda:N'")
    if target.type == "cuda":
        if not torch.cuda.is_available():
            raise MissingDependencyError(f"device {device!r} was asked for, but torch sees no CUDA GPU; use 'cpu'")
        if target.index is not None and target.index >= torch.cuda.device_count():
            raise ConfigError(f"device {device!r} was asked for, but there are {torch.cuda.device_count()} GPUs")
    return target


def _source(name_or_path: str) -> tuple[str, str]:
    """(what transformers loads, the model's id): a folder's id is its base name."""
    path = Path(name_or_path).expanduser()
    if name_or_path and path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{name_or_path!r} has no config.json, so it is not a Hugging Face model folder")
        return str(path), path.resolve().name
    # A hub name has at most one slash; anything else that is not a folder is a mistyped path.
    if not name_or_path or path.exists() or name_or_path[0] in "./~" or name_or_path.count("/") > 1:
        raise ConfigError(f"{name_or_path!r} is not a model folder; give {DEMO_MODEL!r}, a folder or a hub name")
    return name_or_path, name_or_path


def _first_line(exc: Exception) -> str:
    text = str(exc).strip()
    return text.splitlines()[0] if text else type(exc).__name__
