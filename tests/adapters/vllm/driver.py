"""Real vLLM on the CPU, its OffloadingConnector and our spec: scenarios for engine_driver.play.
``echo '[["exact", MODEL_DIR, WORK_DIR, ARTIFACT], ...]' | python -m tests.adapters.vllm.driver``, in vLLM's
environment."""

from __future__ import annotations

import time
from typing import Any

from tests.adapters import engine_driver
from tests.adapters.engine_driver import (
    BLOCK,
    Case,
    cold_and_restored,
    distributions,
    forget,
    kl_of,
    local_and_restored,
    prompt_of,
    run,
    same,
)

FAILURES_ARE_TOLD = {
    "kv_connector": "KvtcOffloadingConnector", "kv_connector_module_path": "dynamo_kvtc.adapters.vllm",
    "kv_load_failure_policy": "recompute",
}  # fmt: skip


def engine(
    case: Case, tier: dict[str, Any], device_blocks: int, transfer: dict[str, Any] | None = None, **extra: Any
) -> Any:  # fmt: skip
    config: dict[str, Any] = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "KvtcOffloadingSpec", "spec_module_path": "dynamo_kvtc.adapters.vllm",
            "artifact": case.artifact, **tier,
        },
        **(transfer or {}),
    }  # fmt: skip
    return engine_driver.engine(case.model, config, device_blocks, **extra)


def shared() -> Any:
    """What both sides of this process's last engine share."""
    from dynamo_kvtc.adapters.vllm import shared as module

    return module.engines.all()[-1]


def counted(names: dict[str, tuple[str, ...]]) -> dict[str, float]:
    tier = shared().tier
    tier.refresh()
    return {label: tier.metrics.value(*name) for label, name in names.items()}


COUNTS = {
    "stored": ("kvtc_stored_blocks", "stored"),
    "refused": ("kvtc_stored_blocks", "queue_full"),
    "no_room": ("kvtc_stored_blocks", "no_room"),
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


def exact(case: Case) -> dict[str, Any]:
    """24 prompts, chunked prefill, batches of 8; the device holds one batch, the host half of them, the disk all. What
    a local prefix hit gives, then the same from the tier, then one prompt at a time."""
    tier = {
        "point": "fine", "exact": "all", "host_gib": 0.07, "disk_gib": 0.5,
        "disk_path": str(case.work / "disk"),
    }  # fmt: skip
    llm = engine(case, tier, device_blocks=60)
    prompts, local, restored = local_and_restored(llm, settle)
    singly = [run(llm, [p])[0] for p in prompts[:4]]
    result = {
        "local_cached": [r[2] for r in local],
        "restored_cached": [r[2] for r in restored],
        "singly_cached": [r[2] for r in singly],
        "same": same(local, restored),
        "same_singly": same(local[:4], singly),
        "same_tokens_singly": [a[0] == b[0] for a, b in zip(local, singly, strict=False)],
        "counts": counted(COUNTS),
    }
    llm.llm_engine.engine_core.shutdown()
    return result


def lossy(case: Case) -> dict[str, Any]:
    """Coded records: KL of continuations after a restored context against the same after a local one, the ratio, and,
    if asked for, the time to the first token. More: [[context ids, continuation ids], ...]; the operating point; how
    many times 1,504 tokens are restored."""
    texts, point, restores = case.more
    # What is predicted is the codec's cost: no exact tail.
    tier = {"point": point, "host_gib": 0.25, "window": 0}
    llm = engine(case, tier, 96, max_model_len=2048, max_logprobs=-1, max_num_batched_tokens=2048)
    raw = distributions(llm, texts)
    forget(llm, settle)
    result: dict[str, Any] = {"before": counted(COUNTS)}
    result["kl"] = kl_of(raw, distributions(llm, texts))
    result["after"] = counted(COUNTS)
    forget(llm, settle)
    result |= cold_and_restored(llm, settle, restores)
    registry = shared().metrics.registry
    for name in ("encode", "decode"):
        told = [registry.get_sample_value(f"kvtc_{name}_seconds_{part}") for part in ("sum", "count")]
        result[f"{name}_seconds"] = told
    llm.llm_engine.engine_core.shutdown()
    return result


def capacity(case: Case) -> dict[str, Any]:
    """How many sessions a host budget holds: stored in turn, each looked at again, until the tier has to let one go.
    More: sessions' token ids, all of one length; the operating point; what is exact, "all" or "sinks"; bytes."""
    sessions, point, exact, nbytes = case.more
    tier = {"point": point, "exact": exact, "host_gib": nbytes / (1 << 30), "window": 0}
    length = len(sessions[0])
    llm = engine(case, tier, length // BLOCK + 3, max_model_len=length + BLOCK)
    seen: list[dict[str, float]] = []
    for session in sessions:
        run(llm, [session], 1)
        # vLLM hands over the last blocks in the step after.
        for _ in range(3):
            llm.llm_engine.step()
        settle()
        seen.append(counted(COUNTS))
        if seen[-1]["evicted"] or seen[-1]["no_room"]:
            break
    whole = [s for s in seen if not s["evicted"] and not s["no_room"]]
    result: dict[str, Any] = {"stored": len(seen), "held": len(whole), "last": whole[-1] if whole else None}
    # The first was let go, in part at least; one that is held comes back whole, for all that the device forgot it.
    result["first_cached"] = run(llm, [sessions[0]], 1)[0][2]
    result["held_cached"] = run(llm, [sessions[len(seen) // 2]], 1)[0][2]
    result["counts"] = counted(COUNTS)
    llm.llm_engine.engine_core.shutdown()
    return result


def watched(case: Case) -> dict[str, Any]:
    """Events and vLLM's own metrics."""
    from vllm.config import KVEventsConfig

    tier = {"point": "fine", "exact": "all", "host_gib": 0.03, "disk_gib": 0.5,
            "disk_path": str(case.work / "disk")}  # fmt: skip
    events = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    llm = engine(case, tier, 48, kv_events_config=events, disable_log_stats=False)
    seen: list[Any] = []
    llm.llm_engine.engine_core.engine_core.scheduler.kv_event_publisher.publish = lambda batch: seen.extend(
        batch.events
    )
    prompts = [prompt_of(i, 129 + i) for i in range(6)]
    run(llm, prompts)
    forget(llm, settle)
    run(llm, prompts)
    settle()
    time.sleep(1.1)
    run(llm, prompts[:1])
    kinds: dict[str, int] = {}
    for event in seen:
        name = f"{type(event).__name__}:{getattr(event, 'medium', None)}"
        kinds[name] = kinds.get(name, 0) + 1
    known: dict[str, float] = {}
    for metric in llm.get_metrics():
        if "kvtc" in metric.name:
            told = metric.value if hasattr(metric, "value") else metric.count
            known[metric.name] = known.get(metric.name, 0) + told
    llm.llm_engine.engine_core.shutdown()
    return {"events": kinds, "metrics": known}


def tail(case: Case) -> dict[str, Any]:
    """Prompts of 5 blocks, the last 2 of them within the window; then each again, longer by 3 blocks."""
    tier = {"point": "fine", "host_gib": 0.25, "window": 2 * BLOCK}
    llm = engine(case, tier, 60)
    prompts = [prompt_of(i, 5 * BLOCK + 2) for i in range(4)]
    names = {"coded": COUNTS["stored"], **{n: ("kvtc_overlay_blocks", n) for n in ("stored", "hit", "moved_on")},
             "bytes": ("kvtc_overlay_bytes",)}  # fmt: skip
    result: dict[str, Any] = {}
    for name, asked in (("first", prompts), ("again", prompts), ("longer", [p + p[: 3 * BLOCK] for p in prompts])):
        got = run(llm, asked, 1)
        forget(llm, settle)
        result[name] = {"cached": [r[2] for r in got], **counted(names)}
    llm.llm_engine.engine_core.shutdown()
    return result


def windows(case: Case) -> dict[str, Any]:
    """More: what to change of the engine's options."""
    llm = engine(case, {"point": "fine", "exact": "all", "host_gib": 0.2}, 60, None, **case.more[0])
    out = engine_driver.windowed(llm, settle)
    llm.llm_engine.engine_core.shutdown()
    return out


def refused(case: Case) -> dict[str, Any]:
    """What the engine says at start. More: what to change."""
    change = dict(case.more[0])
    tier = {"point": "fine", "exact": "all", "host_gib": 0.03, **change.pop("tier", {})}
    try:
        engine(case, tier, 48, change.pop("transfer", None), **change)
    except Exception as exc:
        return {"error": f"{type(exc).__name__}: {exc}"}
    return {"error": None}


def main() -> None:
    from tests.adapters.vllm import faults

    scenarios = [exact, lossy, capacity, watched, tail, windows, refused, faults.faults, faults.full]
    engine_driver.play({scenario.__name__: scenario for scenario in scenarios})


if __name__ == "__main__":
    main()
