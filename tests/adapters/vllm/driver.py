"""Real vLLM on the CPU, its OffloadingConnector and our spec. Runs as a program in the engine's environment and prints
one JSON object: ``python -m tests.adapters.vllm.driver SCENARIO MODEL_DIR WORK_DIR ARTIFACT [MORE]``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.adapters import engine_driver
from tests.adapters.engine_driver import BLOCK, local_and_restored, prompt_of, run, same


def engine(
    tier: dict[str, Any], device_blocks: int, transfer: dict[str, Any] | None = None, **extra: Any
) -> Any:  # fmt: skip
    config: dict[str, Any] = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "KvtcOffloadingSpec", "spec_module_path": "dynamo_kvtc.adapters.vllm", **tier,
        },
        **(transfer or {}),
    }  # fmt: skip
    return engine_driver.engine(sys.argv[2], config, device_blocks, **extra)


def shared() -> Any:
    """What both sides of the one engine of this process share."""
    from dynamo_kvtc.adapters.vllm import shared as module

    return next(iter(module._engines.values()))


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


def exact() -> dict[str, Any]:
    """24 prompts, chunked prefill, batches of 8; the device holds one batch, the host half of them, the disk all. What
    a local prefix hit gives, then the same from the tier, then one prompt at a time."""
    work = Path(sys.argv[3])
    tier = {
        "artifact": sys.argv[4], "point": "fine", "exact": "all", "host_gib": 0.07, "disk_gib": 0.5,
        "disk_path": str(work / "disk"),
    }  # fmt: skip
    llm = engine(tier, device_blocks=60)
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


def evict(llm: Any, fresh: Any, params: dict[str, Any] | None = None) -> None:
    """Fills the device with prompts of no interest."""
    run(llm, [prompt_of(next(fresh), 12 * BLOCK) for _ in range(4)], 1, [params or {"kvtc": "off"}] * 4)


def flip(key: bytes) -> bool:
    """A bit of a record in host memory."""
    host = shared().tier._store.host
    with host.get(key) as lease:
        host._view[lease.offset + len(lease) - 9] ^= 4
    return True


def close_to(a: Any, b: Any) -> list[bool]:
    """The same tokens, log-probabilities but for rounding: for prompts that were computed, not loaded."""
    return [
        x[0] == y[0] and max(abs(p - q) for p, q in zip(x[1], y[1], strict=True)) < 1e-3
        for x, y in zip(a, b, strict=True)
    ]


def faults() -> dict[str, Any]:
    """One engine through records damaged in memory and on disk, threads that raise, loads that fail after all, a
    request that opts out, and a reset; the answers after each."""
    work = Path(sys.argv[3])
    tier = {
        "artifact": sys.argv[4], "point": "fine", "exact": "all", "host_gib": 0.1, "disk_gib": 0.5,
        "disk_path": str(work / "disk"), "write_through": True,
    }  # fmt: skip
    transfer = {
        "kv_connector": "KvtcOffloadingConnector", "kv_connector_module_path": "dynamo_kvtc.adapters.vllm",
        "kv_load_failure_policy": "recompute",
    }  # fmt: skip
    llm = engine(tier, 48, transfer)
    fresh = iter(range(100, 1000))
    prompts = [prompt_of(i, 129 + i) for i in range(6)]
    result: dict[str, Any] = {}
    run(llm, prompts)
    local = run(llm, prompts)
    settle()
    t = shared().tier

    def after(name: str) -> None:
        evict(llm, fresh)
        got = run(llm, prompts)
        result[name] = {"cached": [r[2] for r in got], "right": close_to(local, got), "ended": [r[3] for r in got]}
        settle()

    after("restored")
    keys = list(t._store.host._shelf.slots)
    for key in keys[: len(keys) // 2]:
        flip(key)
        t._store.disk.remove(key)
    after("flipped_in_memory")
    after("stored_again")
    settle()
    # On disk alone, and damaged there.
    t._store.host.clear()
    records = work / "disk" / "rank0" / "records"
    with open(records, "r+b") as file:
        size = records.stat().st_size
        for at in range(0, size, 4096):
            file.seek(at + 100)
            byte = file.read(1)
            file.seek(at + 100)
            file.write(bytes([byte[0] ^ 1]))
    after("flipped_on_disk")
    after("stored_yet_again")

    load = t.transcoder.load
    broken = [1]

    def failing(blocks: Any, promises: Any, fence: Any) -> Any:
        if broken:
            broken.pop()
            raise RuntimeError("on purpose")
        out = load(blocks, promises, fence)
        out[len(out) // 2] = RuntimeError("on purpose")
        return out

    t.transcoder.load = failing
    after("failing_loads")
    t.transcoder.load = load

    # A thread that hangs: nobody waits for it for long, and its answer finds nobody.
    from dynamo_kvtc.adapters.vllm import manager

    promise, manager.ANSWER_SECONDS = t.transcoder.promise, 0.3
    t.transcoder.promise = lambda *what: (time.sleep(1.0), promise(*what))[1]
    after("hanging_promises")
    t.transcoder.promise, manager.ANSWER_SECONDS = promise, 10.0
    encode = t.transcoder.encode

    def raising(*what: Any) -> Any:
        raise RuntimeError("on purpose")

    t.clear()
    t.transcoder.encode = raising
    after("failing_stores")
    t.transcoder.encode = encode
    t.clear()
    after("stores_work_again")
    after("restored_at_last")
    evict(llm, fresh)
    result["opted_out"] = [r[2] for r in run(llm, prompts[:2], 4, [{"kvtc": "off"}] * 2)]
    evict(llm, fresh)
    result["opted_in"] = [r[2] for r in run(llm, prompts[:2], 4, [{"kvtc": "on"}] * 2)]
    result["reset"] = llm.reset_prefix_cache(reset_connector=True)
    result["after_reset"] = [r[2] for r in run(llm, prompts, 1)]
    result["counts"] = counted(COUNTS)
    result["errors"] = {
        s.labels["kind"]: s.value
        for family in t.metrics.registry.collect()
        if family.name == "kvtc_errors"
        for s in family.samples
        if s.name.endswith("_total")
    }
    llm.llm_engine.engine_core.shutdown()
    result["closed"] = t.closed
    return result


def distributions(llm: Any, texts: list[list[list[int]]], params: dict[str, Any] | None) -> Any:
    """Per text and continuation token the log-probabilities of all tokens before it, float64 [tokens, vocabulary]."""
    import numpy as np
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=1, logprobs=-1, detokenize=False,
        extra_args={"kv_transfer_params": params} if params else None,
    )  # fmt: skip
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


def lossy() -> dict[str, Any]:
    """Coded records: KL of continuations after a restored context against the same after a local one, the ratio, and,
    if asked for, the time to the first token. Argument 5: a file of [[context ids, continuation ids], ...]; 6: the
    operating point; 7: how many times 1,504 tokens are restored."""
    import numpy as np

    texts = json.loads(Path(sys.argv[5]).read_text())
    # What is predicted is the codec's cost: no exact tail.
    tier = {"artifact": sys.argv[4], "point": sys.argv[6], "host_gib": 0.25, "window": 0}
    llm = engine(tier, 96, max_model_len=2048, max_logprobs=-1, max_num_batched_tokens=2048)
    fresh = iter(range(100, 1000))
    off = {"kvtc": "off"}
    raw = distributions(llm, texts, off)
    evict(llm, fresh)
    for context, _ in texts:
        run(llm, [context], 1)
    settle()
    result: dict[str, Any] = {"before": counted(COUNTS)}
    for _ in range(2):
        evict(llm, fresh)
    coded = distributions(llm, texts, None)
    result["kl"] = [float((np.exp(p) * (p - q)).sum(axis=1).mean()) for p, q in zip(raw, coded, strict=True)]
    result["after"] = counted(COUNTS)
    result["cold_seconds"], result["restored_seconds"], result["cached"] = [], [], []
    for i in range(int(sys.argv[7])):
        prompt = prompt_of(50 + i, 1504)
        began = time.monotonic()
        run(llm, [prompt], 1)
        result["cold_seconds"].append(time.monotonic() - began)
        for _ in range(3):
            evict(llm, fresh)
        settle()
        began = time.monotonic()
        result["cached"].append(run(llm, [prompt], 1)[0][2])
        result["restored_seconds"].append(time.monotonic() - began)
    registry = shared().metrics.registry
    for name in ("encode", "decode"):
        told = [registry.get_sample_value(f"kvtc_{name}_seconds_{part}") for part in ("sum", "count")]
        result[f"{name}_seconds"] = told
    llm.llm_engine.engine_core.shutdown()
    return result


def capacity() -> dict[str, Any]:
    """How many sessions a host budget holds: stored in turn, each looked at again, until the tier has to let one go.
    Argument 5: a file of sessions' token ids, all of one length; 6: the operating point; 7: what is exact, "all" or
    "sinks"; 8: bytes."""
    sessions = json.loads(Path(sys.argv[5]).read_text())
    tier = {
        "artifact": sys.argv[4], "point": sys.argv[6], "exact": sys.argv[7], "host_gib": int(sys.argv[8]) / (1 << 30),
        "window": 0,
    }  # fmt: skip
    length = len(sessions[0])
    llm = engine(tier, length // BLOCK + 3, max_model_len=length + BLOCK)
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


def watched() -> dict[str, Any]:
    """Events and vLLM's own metrics."""
    from vllm.config import KVEventsConfig

    tier = {"artifact": sys.argv[4], "point": "fine", "exact": "all", "host_gib": 0.03, "disk_gib": 0.5,
            "disk_path": f"{sys.argv[3]}/disk"}  # fmt: skip
    events = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    llm = engine(tier, 48, kv_events_config=events, disable_log_stats=False)
    seen: list[Any] = []
    llm.llm_engine.engine_core.engine_core.scheduler.kv_event_publisher.publish = lambda batch: seen.extend(
        batch.events
    )
    fresh = iter(range(100, 1000))
    prompts = [prompt_of(i, 129 + i) for i in range(6)]
    run(llm, prompts)
    settle()
    evict(llm, fresh)
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


def tail() -> dict[str, Any]:
    """Prompts of 5 blocks, the last 2 of them within the window; then each again, longer by 3 blocks."""
    tier = {"artifact": sys.argv[4], "point": "fine", "host_gib": 0.25, "window": 2 * BLOCK}
    llm = engine(tier, 60)
    fresh = iter(range(100, 1000))
    prompts = [prompt_of(i, 5 * BLOCK + 2) for i in range(4)]
    names = {"coded": COUNTS["stored"], **{n: ("kvtc_overlay_blocks", n) for n in ("stored", "hit", "moved_on")},
             "bytes": ("kvtc_overlay_bytes",)}  # fmt: skip
    result: dict[str, Any] = {}
    for name, asked in (("first", prompts), ("again", prompts), ("longer", [p + p[: 3 * BLOCK] for p in prompts])):
        got = run(llm, asked, 1)
        # vLLM hands over the last blocks in a later step.
        for _ in range(2):
            evict(llm, fresh)
        settle()
        result[name] = {"cached": [r[2] for r in got], **counted(names)}
    llm.llm_engine.engine_core.shutdown()
    return result


def refused() -> dict[str, Any]:
    """What the engine says at start: argument 5 is what to change, as JSON."""
    change = json.loads(sys.argv[5])
    tier = {"artifact": sys.argv[4], "point": "fine", "exact": "all", "host_gib": 0.03, **change.pop("tier", {})}
    try:
        engine(tier, 48, change.pop("transfer", None), **change)
    except Exception as exc:
        return {"error": f"{type(exc).__name__}: {exc}"}
    return {"error": None}


def main() -> None:
    engine_driver.set_environment()
    result = globals()[sys.argv[1]]()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
