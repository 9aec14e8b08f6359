"""What engines say of their model, as the codec needs it: shared by the adapters, imports no engine."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dynamo_kvtc.errors import ConfigError, UnsupportedModelError
from dynamo_kvtc.tier.options import WEIGHTS
from dynamo_kvtc.types import KVShape, ModelIdentity, RopeSpec

if TYPE_CHECKING:
    from dynamo_kvtc.codec.artifact import Artifact

PREFIX = "vllm:"
"""Of metrics' names in vLLM's registry: what it looks for."""
SWITCH_SECONDS = 2e-4
"""See ``share_the_interpreter``."""
EMPTY_STEP_SECONDS = 0.002
"""A step that took less ran no model: the engine is only asking again. It then waits this long for an answer or a
load, so that it does not keep the interpreter from the threads that work on it."""
WINDOW_SPEC = "SlidingWindowSpec"
"""vLLM's class of a cache group with sliding windows, by name: it is looked at without vLLM, too."""
OPT_OUT = "kvtc"
"""``kv_transfer_params={"kvtc": "off"}`` of a request: neither stored nor loaded."""

log = logging.getLogger(__name__)


def model_of(model: str, dtype: str, weights: str, artifact: Artifact) -> tuple[ModelIdentity, KVShape, RopeSpec]:
    """The engine's model as its checkpoint says: identity, the whole model's cache, RoPE.

    model: a folder or a hub name; dtype: of the cache, by name; weights: "verify", or the digest if it is known.
    Raises ConfigError or UnsupportedModelError.
    """
    # Here, so that a connector can be made known to an engine without the libraries behind it.
    from dynamo_kvtc.hf.checkpoint import checkpoint_digest, folder_of, read_config, rope_of, shape_of

    config: Any = read_config(model)
    shape = shape_of(config, dtype)
    digest = weights
    if digest == WEIGHTS:
        folder = folder_of(model)
        if folder is None:
            raise ConfigError(
                f"the files of {model!r} are not on this machine, so weights cannot be verified: set weights to "
                "the digest that `kvtc inspect` shows, if you know that it is this model's"
            )
        digest = checkpoint_digest(folder, shape.dtype)
    architectures = getattr(config, "architectures", None)
    identity = ModelIdentity(
        model_id=model,
        revision=getattr(config, "_commit_hash", None) or "",
        weights_digest=digest,
        architecture=architectures[0] if architectures else artifact.manifest.model.architecture,
    )
    return identity, shape, rope_of(config, artifact.manifest.rope.style)


def share_the_interpreter() -> None:
    """The tier's threads run beside the engine's in one interpreter, and whoever has let go of it waits for up to the
    switch interval (5 ms) to have it back: an engine lets go many times a step, at each of PyTorch's calls."""
    sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))


def opted_out(params: Mapping[str, Any] | None, request: str) -> bool:
    """params: a request's ``kv_transfer_params``. An unknown value opts out, too: it must not crash a server."""
    wish = (params or {}).get(OPT_OUT, "on")
    if wish not in ("on", "off"):
        log.warning("request %s: kv_transfer_params.%s is %r; 'on' and 'off' are known", request, OPT_OUT, wish)
    return wish != "on"


def check_workers(workers: int) -> None:
    """For the adapters whose two sides share a process. Raises ConfigError."""
    if workers != 1:
        raise ConfigError(
            f"the engine has {workers} workers; scheduler and worker must share a process: 1 is supported (tensor and "
            "pipeline parallelism: use the KVBM adapter)"
        )


def check_one_group(cache_groups: int) -> None:
    """For the adapters that know one page of a block. Raises UnsupportedModelError."""
    if cache_groups != 1:
        raise UnsupportedModelError(
            f"the engine's cache has {cache_groups} groups (hybrid attention: their layers share pages under different "
            "block ids), and this adapter knows one: set --disable-hybrid-kv-cache-manager, or use the KvtcConnector"
        )


def check_no_windows(kv_cache_groups: Sequence[Any]) -> None:
    """For the adapters that take it that a request keeps its pages. kv_cache_groups: of vLLM's KVCacheConfig.
    Raises UnsupportedModelError."""
    if any(type(group.kv_cache_spec).__name__ == WINDOW_SPEC for group in kv_cache_groups):
        raise UnsupportedModelError(
            "all layers have sliding windows, whose pages the engine takes away from a request that runs: use the "
            "KvtcConnector with vLLM 0.31"
        )


def layer_index(name: str) -> int:
    """The first number between dots in a layer's name ("model.layers.7.self_attn.attn"): names sort badly."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    if found is None:
        raise UnsupportedModelError(f"layer {name!r} has no number in its name")
    return int(found.group(1))


def token_major_views(name: str, tensor: Tensor, shape: KVShape, block_tokens: int) -> tuple[Tensor, Tensor]:
    """K and V, [blocks, heads, tokens, dim] each, of a layer's cache on a GPU as vLLM has it before 0.31.

    Raises UnsupportedModelError for a layout that is not known.
    """
    n, h, d = block_tokens, shape.kv_heads, shape.head_dim
    if tensor.dim() == 5 and tuple(tensor.shape[1:]) == (2, n, h, d):
        k, v = tensor.unbind(1)
    elif tensor.dim() == 5 and tensor.shape[0] == 2 and tuple(tensor.shape[2:]) == (n, h, d):
        k, v = tensor.unbind(0)
    else:
        raise UnsupportedModelError(
            f"layer {name} caches {tuple(tensor.shape)}; vLLM is known to cache [blocks, 2, {n}, {h}, {d}]: use the "
            "FlashAttention or FlashInfer backend"
        )
    return k.transpose(1, 2), v.transpose(1, 2)
