"""What programs that run a real vLLM on the CPU share: the engine's options, prompts, what an answer is, and how one
process plays several scenarios, an engine each: half a minute of imports is paid once."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK = 32
DTYPE = os.environ.get("KVTC_TEST_DTYPE", "float32")
"""Twice the bytes, but a CPU without bfloat16 arithmetic takes seven times as long with it."""


@dataclass(frozen=True)
class Case:
    """What a scenario is given: the model's folder, a folder of its own, an artifact, and what only it knows."""

    model: str
    work: Path
    artifact: str
    more: tuple[Any, ...]


def play(scenarios: dict[str, Any]) -> None:
    """The program. It reads a JSON list of [scenario, model, work, artifact, ...] and prints one of their results: if a
    scenario raised, {"raised": why}."""
    set_environment()
    results = []
    for name, model, work, artifact, *more in json.load(sys.stdin):
        began, busy = time.monotonic(), time.process_time()
        take_ports()
        Path(work).mkdir(exist_ok=True)
        try:
            result = scenarios[name](Case(model, Path(work), artifact, tuple(more)))
        except Exception:
            result = {"raised": traceback.format_exc()}
        took = {"took_seconds": time.monotonic() - began, "processor_seconds": time.process_time() - busy}
        results.append({**result, **took})
        allow_another_engine()
    sys.stdout.write("\n" + json.dumps(results) + "\n")
    sys.stdout.flush()
    # KVBM's leader has threads that nothing ends.
    os._exit(0)


def set_environment() -> None:
    """Before vLLM is imported: one process, a small cache, nothing that leaves the machine."""
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)


def take_ports() -> None:
    """For a leader of KVBM: the one before keeps its own until the process ends."""
    names = ("DYN_KVBM_LEADER_ZMQ_PUB_PORT", "DYN_KVBM_LEADER_ZMQ_ACK_PORT", "DYN_KVBM_METRICS_PORT")
    free = os.environ.get("KVTC_TEST_PORTS", "").split()
    os.environ.update(zip(names, free, strict=False))
    os.environ["KVTC_TEST_PORTS"] = " ".join(free[len(names) :])


def allow_another_engine() -> None:
    """vLLM replaces its kernels by looking through all modules, and stumbles over numba's, which the tier has imported
    by now. They are replaced already."""
    from vllm.platforms import current_platform

    type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)


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
            temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1, detokenize=False,
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


def forget(llm: Any, settle: Callable[[], None]) -> None:
    """The device has nothing any more, and wrong numbers where its cache was. settle: until nothing is read there."""
    deadline = time.monotonic() + 60
    while True:
        # A finished request's blocks are handed over and freed in steps after, which only a server takes by itself.
        for _ in range(3):
            llm.llm_engine.step()
        settle()
        if llm.reset_prefix_cache():
            break
        assert time.monotonic() < deadline, "blocks are still in use"
        time.sleep(0.05)
    for cache in llm.llm_engine.model_executor.driver_worker.worker.model_runner.kv_caches:
        cache.fill_(7.0)


def windowed(llm: Any, settle: Callable[[], None]) -> dict[str, Any]:
    """Prompts that a window of 256 tokens cuts: what a local prefix hit gives, and the same from below."""
    prompts = [prompt_of(i, n) for i, n in enumerate((129, 481, 700))]
    run(llm, prompts)
    local = [run(llm, [prompt])[0] for prompt in prompts]
    forget(llm, settle)
    restored = [run(llm, [prompt])[0] for prompt in prompts]
    return {"same": same(local, restored), "local": [r[2] for r in local], "restored": [r[2] for r in restored]}


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


def close_to(a: Any, b: Any) -> list[bool]:
    """The same tokens, log-probabilities but for rounding: for prompts that were computed, not loaded."""
    return [
        x[0] == y[0] and max(abs(p - q) for p, q in zip(x[1], y[1], strict=True)) < 1e-3
        for x, y in zip(a, b, strict=True)
    ]


def distributions(llm: Any, texts: Sequence[Sequence[list[int]]]) -> Any:
    """Per text and continuation token the log-probabilities of all tokens before it, float64 [tokens, vocabulary]."""
    import numpy as np
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, detokenize=False)
    out = []
    for context, continuation in texts:
        rows = []
        for j in range(len(continuation)):
            prompt = {"prompt_token_ids": context + continuation[: j + 1]}
            found = llm.generate([prompt], sampling, use_tqdm=False)[0].outputs[0].logprobs[0]
            row = np.empty(len(found))
            for token, told in found.items():
                row[token] = told.logprob
            rows.append(row)
        out.append(np.stack(rows))
    return out


def kl_of(raw: Any, coded: Any) -> list[float]:
    """Mean KL per continuation token of each text, in nats."""
    import numpy as np

    return [float((np.exp(p) * (p - q)).sum(axis=1).mean()) for p, q in zip(raw, coded, strict=True)]


def cold_and_restored(llm: Any, settle: Callable[[], None], times: int) -> dict[str, Any]:
    """Seconds to the first token of 1,504 tokens, computed and then restored, and how many of them were cached."""
    out: dict[str, Any] = {"cold_seconds": [], "restored_seconds": [], "cached": []}
    for i in range(times):
        prompt = prompt_of(50 + i, 1504)
        began = time.monotonic()
        run(llm, [prompt], 1)
        out["cold_seconds"].append(time.monotonic() - began)
        forget(llm, settle)
        began = time.monotonic()
        out["cached"].append(run(llm, [prompt], 1)[0][2])
        out["restored_seconds"].append(time.monotonic() - began)
    return out
