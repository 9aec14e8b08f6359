"""Real vLLM on the CPU, the real leader, our connector and the raw mover: scenarios for engine_driver.play, which need
no artifact. ``echo '[["exact", MODEL_DIR, WORK_DIR, ""], ...]' | python -m tests.adapters.kvbm.vllm_driver``, in
vLLM's environment."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from dynamo_kvtc.adapters.kvbm.damaged import FIRST_RETRY
from tests.adapters import engine_driver
from tests.adapters.engine_driver import BLOCK, Case, local_and_restored, prompt_of, run, same


def budget(case: Case, **settings: float) -> None:
    """KVBM's, DYN_KVBM_ left out, and no other."""
    for name in [name for name in os.environ if name.startswith("DYN_KVBM_") and "_CACHE_" in name]:
        del os.environ[name]
    os.environ.update({f"DYN_KVBM_{name}": str(value) for name, value in settings.items()})
    os.environ.update(DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER="true", DYN_KVBM_DISK_CACHE_DIR=str(case.work))


def engine(
    case: Case, mover_options: dict[str, Any], device_blocks: int, transfer: dict[str, Any] | None = None, **extra: Any
) -> Any:
    config = {
        "kv_connector": "DynamoConnector",
        "kv_connector_module_path": "dynamo_kvtc.adapters.kvbm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "mover": "tests.adapters.kvbm.raw_mover:make",
            "mover_options": mover_options,
            "handshake_seconds": 60,
        },
        **(transfer or {}),
    }
    return engine_driver.engine(case.model, config, device_blocks, **extra)


def report(llm: Any, path: str) -> dict[str, Any]:
    """Ends the engine; what the mover counted."""
    llm.llm_engine.engine_core.shutdown()
    with open(f"{path}.0") as file:
        return json.load(file)


def exact(case: Case) -> dict[str, Any]:
    """24 prompts, chunked prefill, batches of 8; the device holds one batch, the host two, the disk all. What a local
    prefix hit gives, then the same from the tier, then one prompt at a time."""
    path = f"{case.work}/exact"
    raw_budget(case)
    llm = engine(case, {"report": path}, device_blocks=60)
    prompts, local, restored = local_and_restored(llm, lambda: None)
    singly = [run(llm, [p])[0] for p in prompts[:4]]
    return {
        "local_cached": [r[2] for r in local],
        "restored_cached": [r[2] for r in restored],
        "singly_cached": [r[2] for r in singly],
        "same": same(local, restored),
        "same_singly": [a[0] == b[0] for a, b in zip(local, singly, strict=False)],
        "mover": report(llm, path),
    }


def faults(case: Case) -> dict[str, Any]:
    """One engine through: failing loads, an opted-out request, preemptions, a reset; the answers after each."""
    path, switch = f"{case.work}/faults", f"{case.work}/fail"
    raw_budget(case)
    llm = engine(case, {"report": path, "fail_file": switch}, device_blocks=40)
    prompts = [prompt_of(i, 129 + i) for i in range(6)]
    fresh = iter(range(100, 1000))
    result: dict[str, Any] = {}

    def evict(params: dict[str, Any] | None = None) -> None:
        run(llm, [prompt_of(next(fresh), 10 * BLOCK) for _ in range(4)], 1, [params] * 4)

    run(llm, prompts)
    local = run(llm, prompts)
    evict()
    open(switch, "w").close()
    failed = run(llm, prompts)
    result["failed"] = {
        "cached": [r[2] for r in failed],
        "same": [a[0] == b[0] for a, b in zip(local, failed, strict=True)],
        "reasons": [r[3] for r in failed],
    }
    os.unlink(switch)
    evict()
    wary = run(llm, prompts)
    result["after"] = {
        "cached": [r[2] for r in wary], "same": [a[0] == b[0] for a, b in zip(local, wary, strict=True)]
    }  # fmt: skip
    # What failed is not matched for a while; then once, and it comes well.
    for _ in range(FIRST_RETRY + 1):
        evict()
        good = run(llm, prompts)
        if any(r[2] for r in good):
            break
    result["in_the_end"] = {"cached": [r[2] for r in good], "same": same(local, good)}

    private = [prompt_of(50 + i, 140) for i in range(2)]
    run(llm, private, 16, [{"kvtc": "off"}] * 2)
    evict()
    result["opted_out"] = [r[2] for r in run(llm, private)]
    evict()
    result["opted_in"] = [r[2] for r in run(llm, private)]

    # A finished request's blocks are freed in the step after, which only a server takes by itself. Blocks that leaked
    # make the reset fail.
    for _ in range(20):
        llm.llm_engine.step()
        time.sleep(0.05)
    result["reset"] = llm.reset_prefix_cache(reset_connector=True)
    result["after_reset"] = [r[2] for r in run(llm, prompts)]
    result["mover"] = report(llm, path)
    return result


def preempted(case: Case) -> dict[str, Any]:
    """4 requests that grow to 8 blocks each on 24: some are preempted and resumed. Their text comes back as it was."""
    path = f"{case.work}/preempted"
    raw_budget(case)
    llm = engine(case, {"report": path}, device_blocks=24, max_model_len=384)
    long = [prompt_of(70 + i, 135) for i in range(4)]
    grown = run(llm, long, 110)
    run(llm, [prompt_of(100 + i, 10 * BLOCK) for i in range(3)], 1)
    again = run(llm, long, 110)
    return {
        "grown": [len(r[0]) for r in grown],
        "cached": [r[2] for r in again],
        "same": [a[0][:8] == b[0][:8] for a, b in zip(grown, again, strict=True)],
        "mover": report(llm, path),
    }


def refused(case: Case) -> dict[str, Any]:
    """More: what to change of the transfer's configuration."""
    raw_budget(case)
    try:
        engine(case, {}, 40, case.more[0])
    except Exception as exc:
        return {"error": f"{type(exc).__name__}: {exc}"}
    return {"error": "not refused"}


def raw_budget(case: Case) -> None:
    budget(case, CPU_CACHE_GB=1, DISK_CACHE_GB=4, CPU_CACHE_OVERRIDE_NUM_BLOCKS=64,
           DISK_CACHE_OVERRIDE_NUM_BLOCKS=2048)  # fmt: skip


def main() -> None:
    engine_driver.play({scenario.__name__: scenario for scenario in (exact, faults, preempted, refused)})


if __name__ == "__main__":
    main()
