"""The engine's half of ``kvtc demo --engine vllm``: python -m dynamo_kvtc.adapters.vllm.serve_demo JOB.json

Runs in an interpreter that has vLLM, one engine a process. The job is a JSON object (``Job``); each line printed that
starts with "{" is one of

    {"started": seconds}
    {"session": i, "visit": 0 or 1, "ttft_seconds", "prompt_tokens", "cached_tokens", "host_blocks", "disk_blocks",
     "answer_ids"}
    {"held": {"host": bytes, "disk": bytes, "device": bytes}, "evicted": {"host", "disk"}, "ratio", "stored_blocks",
     "refused_blocks"}
    {"error": text}

READ FIRST: ``serve``. A session's second visit sends its whole conversation again, with another question, as any client
of a server does; what of it need not be computed is what the engine and its tier still have.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

SETTLE_SECONDS = 120.0
"""For what a visit stored to be coded before the next: visits are timed alone."""

Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """model: a folder; dtype: of arithmetic and cache, "auto" is the model's; tier: options of the spec, None for an
    engine without one; sessions: (tokens of the first visit, tokens that the second adds after the answer); order: of
    second visits; device_blocks: of block_tokens each, what the engine's own prefix cache has."""

    model: str
    dtype: str
    tier: dict[str, Any] | None
    sessions: list[tuple[list[int], list[int]]]
    order: list[int]
    answer_tokens: int
    device_blocks: int
    block_tokens: int
    max_tokens: int


def main() -> None:
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1",
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)

    def tell(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)

    try:
        told = json.loads(Path(sys.argv[1]).read_text())
        serve(Job(**{f.name: told[f.name] for f in fields(Job)}), tell)
    except Exception as exc:
        tell({"error": f"{type(exc).__name__}: {exc}"})
        raise


def serve(job: Job, tell: Tell) -> None:
    """All first visits in turn, then second ones in the order asked for."""
    began = time.monotonic()
    engine = _engine(job)
    _Visits(engine, None).make([5] * job.block_tokens, 1)  # What runs for the first time is not what is measured.
    tell({"started": time.monotonic() - began})
    visits = _Visits(engine, _tier() if job.tier is not None else None)
    history: list[list[int]] = []
    for i, (prompt, _) in enumerate(job.sessions):
        done = visits.make(prompt, job.answer_tokens)
        history.append(prompt + done["answer_ids"])
        tell({"session": i, "visit": 0, **done})
    for i in job.order:
        done = visits.make(history[i] + job.sessions[i][1], job.answer_tokens)
        tell({"session": i, "visit": 1, **done})
    tell(visits.held(engine))
    engine.engine_core.shutdown()


class _Visits:
    """One request at a time, timed, with what the tier brought for it."""

    def __init__(self, engine: Any, tier: Any) -> None:
        self._engine, self._tier, self._made = engine, tier, 0

    def make(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        from vllm import SamplingParams

        before = self._hits()
        self._made += 1
        began = time.perf_counter()
        self._engine.add_request(
            f"visit-{id(self)}-{self._made}", {"prompt_token_ids": prompt},
            SamplingParams(temperature=0, max_tokens=tokens),
        )  # fmt: skip
        first, last = None, None
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                last = output
                if first is None and output.outputs[0].token_ids:
                    first = time.perf_counter() - began
        assert last is not None
        assert first is not None
        self._settle()
        host, disk = (now - then for now, then in zip(self._hits(), before, strict=True))
        return {
            "ttft_seconds": first, "prompt_tokens": len(prompt), "cached_tokens": last.num_cached_tokens,
            "host_blocks": host, "disk_blocks": disk, "answer_ids": list(last.outputs[0].token_ids),
        }  # fmt: skip

    def held(self, engine: Any) -> dict[str, Any]:
        cache = engine.vllm_config.cache_config
        page = _page_bytes(engine) * (cache.num_gpu_blocks or 0)
        if self._tier is None:
            return {"held": {"device": page, "host": 0, "disk": 0}, "evicted": {"host": 0, "disk": 0}, "ratio": None,
                    "stored_blocks": 0, "refused_blocks": 0}  # fmt: skip
        self._tier.refresh()
        value = self._tier.metrics.value
        return {
            "held": {"device": page, **{t: int(value("kvtc_used_bytes", t)) for t in ("host", "disk")}},
            "evicted": {t: int(value("kvtc_evictions", t)) for t in ("host", "disk")},
            "ratio": value("kvtc_ratio"),
            "stored_blocks": int(value("kvtc_stored_blocks", "stored")),
            "refused_blocks": int(value("kvtc_stored_blocks", "queue_full")),
        }

    def _hits(self) -> tuple[int, int]:
        if self._tier is None:
            return 0, 0
        host, disk = (int(self._tier.metrics.value("kvtc_lookup_blocks", "hit", tier)) for tier in ("host", "disk"))
        return host, disk

    def _settle(self) -> None:
        """vLLM hands a finished request's last blocks over in its next step, which a server takes by itself."""
        if self._tier is not None:
            for _ in range(3):
                self._engine.step()
            self._tier.flush(SETTLE_SECONDS)


def _engine(job: Job) -> Any:
    from dynamo_kvtc.adapters.vllm._compat import require_vllm

    require_vllm()
    from vllm import LLM
    from vllm.config import KVTransferConfig

    transfer = None
    if job.tier is not None:
        transfer = KVTransferConfig(
            kv_connector="KvtcOffloadingConnector", kv_connector_module_path="dynamo_kvtc.adapters.vllm",
            kv_role="kv_both", kv_load_failure_policy="recompute",
            kv_connector_extra_config={
                "spec_name": "KvtcOffloadingSpec", "spec_module_path": "dynamo_kvtc.adapters.vllm", **job.tier,
            },
        )  # fmt: skip
    return LLM(
        model=job.model, dtype=job.dtype, enforce_eager=True, distributed_executor_backend="uni", seed=0,
        block_size=job.block_tokens, num_gpu_blocks_override=job.device_blocks, max_model_len=job.max_tokens,
        max_num_batched_tokens=job.max_tokens, max_num_seqs=2, enable_prefix_caching=True,
        disable_log_stats=True, kv_transfer_config=transfer,
    ).llm_engine  # fmt: skip


def _tier() -> Any:
    """Of the one engine in this process."""
    from dynamo_kvtc.adapters.vllm import shared

    return shared.engines.all()[0].tier


def _page_bytes(engine: Any) -> int:
    """Of one block in all layers."""
    config = engine.vllm_config
    model, parallel = config.model_config, config.parallel_config
    per_token = 2 * model.get_num_kv_heads(parallel) * model.get_head_size() * model.dtype.itemsize
    return int(per_token * model.get_num_layers(parallel) * config.cache_config.block_size)


if __name__ == "__main__":
    main()
