"""Real vLLM on the CPU, its OffloadingConnector and our spec. Runs as a program in the engine's environment and prints
one JSON object: ``python -m tests.adapters.vllm.driver SCENARIO MODEL_DIR WORK_DIR ARTIFACT [MORE]``."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

BLOCK = 32
DTYPE = "float32"
"""Twice the bytes, but a CPU without bfloat16 arithmetic takes seven times as long with it."""


def prompt_of(i: int, tokens: int) -> list[int]:
    """Token ids as a text of this model might have, without a tokenizer's time: reproducible, all prompts differ."""
    return [1 + (i * 7919 + j * 104729 + j * j * 31) % 48000 for j in range(tokens)]


def engine(
    tier: dict[str, Any], device_blocks: int, transfer: dict[str, Any] | None = None, **extra: Any
) -> Any:  # fmt: skip
    from vllm import LLM
    from vllm.config import KVTransferConfig

    config: dict[str, Any] = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "KvtcOffloadingSpec", "spec_module_path": "dynamo_kvtc.adapters.vllm", **tier,
        },
        **(transfer or {}),
    }  # fmt: skip
    options = {
        "model": sys.argv[2],
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
        "kv_transfer_config": KVTransferConfig(**config),
        **extra,
    }
    return LLM(**options)


def shared() -> Any:
    """What both sides of the one engine of this process share."""
    from dynamo_kvtc.adapters.vllm import shared as module

    return next(iter(module._engines.values()))


def run(llm: Any, prompts: list[list[int]], tokens: int = 16, params: list[dict[str, Any] | None] | None = None) -> Any:
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


def same(a: Any, b: Any) -> list[bool]:
    return [x[:2] == y[:2] for x, y in zip(a, b, strict=True)]


def counted(names: dict[str, tuple[str, ...]]) -> dict[str, float]:
    tier = shared().tier
    tier.refresh()
    return {label: tier.metrics.value(*name) for label, name in names.items()}


COUNTS = {
    "stored": ("kvtc_stored_blocks", "stored"),
    "refused": ("kvtc_stored_blocks", "queue_full"),
    "loaded": ("kvtc_loaded_blocks", "loaded"),
    "failed": ("kvtc_loaded_blocks", "failed"),
    "hits_host": ("kvtc_lookup_blocks", "hit", "host"),
    "hits_disk": ("kvtc_lookup_blocks", "hit", "disk"),
    "evicted": ("kvtc_evictions", "host"),
    "ratio": ("kvtc_ratio",),
    "host_bytes": ("kvtc_used_bytes", "host"),
    "promise_errors": ("kvtc_errors", "record_RecordCorruptError"),
}


def settle() -> None:
    assert shared().tier.flush(120), "the tier did not come to rest"


def exact() -> dict[str, Any]:
    """24 prompts, chunked prefill, batches of 8; the device holds one batch, the host half of them, the disk all. What a
    local prefix hit gives, then the same from the tier, then one prompt at a time."""
    work = Path(sys.argv[3])
    tier = {
        "artifact": sys.argv[4], "point": "fine", "exact": "all", "host_gib": 0.07, "disk_gib": 0.5,
        "disk_path": str(work / "disk"),
    }  # fmt: skip
    llm = engine(tier, device_blocks=60)
    prompts = [prompt_of(i, 128 + i) for i in range(24)]
    batches = [prompts[i : i + 8] for i in range(0, 24, 8)]
    local, restored = [], []
    for batch in batches:
        run(llm, batch)
        local += run(llm, batch)
        settle()
    begun = time.monotonic()
    for batch in batches:
        restored += run(llm, batch)
    seconds = time.monotonic() - begun
    singly = [run(llm, [p])[0] for p in prompts[:4]]
    result = {
        "local_cached": [r[2] for r in local],
        "restored_cached": [r[2] for r in restored],
        "singly_cached": [r[2] for r in singly],
        "same": same(local, restored),
        "same_singly": same(local[:4], singly),
        "same_tokens_singly": [a[0] == b[0] for a, b in zip(local, singly, strict=False)],
        "seconds": seconds,
        "counts": counted(COUNTS),
    }
    llm.llm_engine.engine_core.shutdown()
    return result


def main() -> None:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    result = globals()[sys.argv[1]]()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
