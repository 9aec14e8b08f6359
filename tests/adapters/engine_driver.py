"""What programs that run a real vLLM on the CPU share: the engine's options, prompts, and what an answer is."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

BLOCK = 32
DTYPE = os.environ.get("KVTC_TEST_DTYPE", "float32")
"""Twice the bytes, but a CPU without bfloat16 arithmetic takes seven times as long with it."""


def set_environment() -> None:
    """Before vLLM is imported: one process, a small cache, nothing that leaves the machine."""
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)


def prompt_of(i: int, tokens: int) -> list[int]:
    """Token ids as a text of this model might have, without a tokenizer's time: reproducible, all prompts differ."""
    return [1 + (i * 7919 + j * 104729 + j * j * 31) % 48000 for j in range(tokens)]


def engine(model: str, transfer: dict[str, Any], device_blocks: int, **extra: Any) -> Any:
    """transfer: of KVTransferConfig; device_blocks: of BLOCK tokens; extra: more of LLM's, or instead."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    options = {
        "model": model,
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "block_size": BLOCK,
        "num_gpu_blocks_override": device_blocks,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "enable_prefix_caching": True,
        "seed": 0,
        "dtype": DTYPE,
        "disable_log_stats": True,
        "kv_transfer_config": KVTransferConfig(**transfer),
        **extra,
    }
    return LLM(**options)


def run(
    llm: Any, prompts: Sequence[list[int]], tokens: int = 16, params: Sequence[dict[str, Any] | None] | None = None
) -> list[Any]:  # fmt: skip
    """For each prompt its tokens and their log-probabilities, how many of its tokens were cached, and why it ended."""
    from vllm import SamplingParams

    sampling = [
        SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1,
            extra_args={"kv_transfer_params": p} if p else None,
        )
        for p in (params or [None] * len(prompts))
    ]  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    result = []
    for output in outputs:
        done = output.outputs[0]
        logprobs = [float(step[t].logprob) for t, step in zip(done.token_ids, done.logprobs, strict=True)]
        result.append([list(done.token_ids), logprobs, output.num_cached_tokens, done.finish_reason])
    return result


def local_and_restored(llm: Any, settle: Callable[[], None]) -> tuple[list[list[int]], list[Any], list[Any]]:
    """24 prompts, chunked prefill, batches of 8; the device is to hold one batch. The prompts, what a local prefix hit
    gives, and the same from below, the last first: they are still in the host's memory."""
    prompts = [prompt_of(i, 128 + i) for i in range(24)]
    batches = [prompts[i : i + 8] for i in range(0, 24, 8)]
    local, restored = [], []
    for batch in batches:
        run(llm, batch)
        local += run(llm, batch)
        settle()
    for batch in reversed(batches):
        restored = run(llm, batch) + restored
    return prompts, local, restored


def same(a: Any, b: Any) -> list[bool]:
    """Tokens and log-probabilities, bit for bit."""
    return [x[:2] == y[:2] for x, y in zip(a, b, strict=True)]
