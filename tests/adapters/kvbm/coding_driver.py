"""Real vLLM on the CPU, the real leader and the coding mover, configured as a user does. Runs as a program in the
engine's environment and prints one JSON object:
``python -m tests.adapters.kvbm.coding_driver SCENARIO MODEL_DIR WORK_DIR ARTIFACT [MORE]``."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.adapters.engine_driver import BLOCK, local_and_restored, prompt_of, run, same, set_environment
from tests.adapters.kvbm import vllm_driver
from tests.adapters.vllm.driver import close_to, distributions

TOKENS = 6
"""Of a continuation: each is a request of its own."""


def engine(device_blocks: int, coding: dict[str, Any], **extra: Any) -> Any:
    config = {"artifact": sys.argv[4], "handshake_seconds": 60, "transfer_seconds": 300, **coding}
    return vllm_driver.engine({}, device_blocks, {"kv_connector_extra_config": config}, **extra)


def worker() -> Any:
    from dynamo_kvtc.adapters.kvbm import connector

    return connector._local_workers[0]


def tier() -> Any:
    return worker().mover.tier


def settle() -> None:
    """Until nothing has moved for a while: the leader demotes at its leisure."""
    still = time.monotonic()
    while time.monotonic() - still < 0.5:
        if worker().open:
            still = time.monotonic()
        time.sleep(0.05)
    assert tier().flush(60)


def evict(llm: Any, fresh: Any) -> None:
    """Fills the device with prompts of no interest, which KVBM never sees."""
    run(llm, [prompt_of(next(fresh), 12 * BLOCK) for _ in range(4)], 1, [{"kvtc": "off"}] * 4)


def told() -> dict[str, float]:
    tier().refresh()
    return {name: value for name, value in tier().metrics.totals().items() if value}


def exact() -> dict[str, Any]:
    """24 prompts, chunked prefill, batches of 8; the device holds one batch, the host two, the disk all. What a local
    prefix hit gives, then the same from the tier. Then records are damaged in memory and on disk; then a reset."""
    from dynamo_kvtc.codec.record import claimed_position

    llm = engine(60, {"point": "fine", "exact": "all"})
    prompts, local, restored = local_and_restored(llm, settle)
    settle()
    result: dict[str, Any] = {
        "local_cached": [r[2] for r in local],
        "restored_cached": [r[2] for r in restored],
        "same": same(local, restored),
        "counts": told(),
        "budgets": tier().budgets(),
        "bytes_per_block": worker().mover.bytes_per_block,
        "ledger": worker().counts(),
    }
    fresh = iter(range(100, 1000))
    # The host holds sixteen prompts' blocks: of the sixteen others some are on disk alone.
    in_memory, others = slice(16, 22), slice(0, 16)

    def after(name: str, which: slice = in_memory) -> None:
        # Once leaves the device a few of the blocks it had computed anew.
        for _ in range(2):
            evict(llm, fresh)
        before = told().get("kvtc_loaded_blocks_total['failed']", 0)
        ledger = worker().counts().get("failed_loads", 0)
        got = run(llm, prompts[which])
        settle()
        result[name] = {
            "cached": [r[2] for r in got], "right": close_to(local[which], got), "ended": [r[3] for r in got],
            "failed": told().get("kvtc_loaded_blocks_total['failed']", 0) - before,
            "failed_in_ledger": worker().counts().get("failed_loads", 0) - ledger,
        }  # fmt: skip

    after("sound")
    # The third block of each prompt, wherever KVBM has it, in memory and on disk.
    store = tier()._store
    flipped = 0
    for key in list(store.host._shelf.slots):
        with store.host.get(key) as lease:
            if claimed_position(lease.record) == 2 * BLOCK:
                store.host._view[lease.offset + len(lease) - 9] ^= 4
                flipped += 1
    shelf = store.disk._queue.shelf
    with open(store.disk.path / "records", "r+b") as file:
        for key, slot in list(shelf.slots.items()):
            with store.disk.get(key) as lease:
                position = claimed_position(lease.record)
            if position == 2 * BLOCK:
                at = shelf.places(slot)[0][0] + 100
                file.seek(at)
                byte = file.read(1)
                file.seek(at)
                file.write(bytes([byte[0] ^ 1]))
    result["flipped"] = flipped
    after("damaged")
    after("known_to_be_damaged")
    after("damaged_on_disk", others)
    for _ in range(20):
        llm.llm_engine.step()
        time.sleep(0.05)
    result["reset"] = llm.reset_prefix_cache(reset_connector=True)
    after("after_reset")
    after("stored_anew")
    result["errors"] = {name: value for name, value in told().items() if name.startswith("kvtc_errors")}
    mover = worker().mover
    llm.llm_engine.engine_core.shutdown()
    result["closed"] = mover.tier.closed
    return result


def lossy() -> dict[str, Any]:
    """Coded records: KL of continuations after a restored context against the same after a local one. Argument 5: a
    file of [[context ids, continuation ids], ...]; 6: the point."""
    import numpy as np

    texts = [(context, continuation[:TOKENS]) for context, continuation in json.loads(Path(sys.argv[5]).read_text())]
    llm = engine(96, {"point": sys.argv[6]}, max_model_len=2048, max_logprobs=-1, max_num_batched_tokens=2048,
                 disable_log_stats=False)  # fmt: skip
    fresh = iter(range(100, 1000))
    raw = distributions(llm, texts, {"kvtc": "off"})
    # KVBM stores what was computed, not what the device had: nothing of the texts may be left there.
    for _ in range(3):
        evict(llm, fresh)
    for context, _ in texts:
        run(llm, [context], 1)
    settle()
    for _ in range(3):
        evict(llm, fresh)
    result: dict[str, Any] = {"before": told()}
    coded = distributions(llm, texts, None)
    settle()
    result["kl"] = [float((np.exp(p) * (p - q)).sum(axis=1).mean()) for p, q in zip(raw, coded, strict=True)]
    result["after"] = told()
    cold, warm = [], []
    for i in range(1):
        prompt = prompt_of(50 + i, 1504)
        began = time.monotonic()
        run(llm, [prompt], 1)
        cold.append(time.monotonic() - began)
        settle()
        for _ in range(3):
            evict(llm, fresh)
        began = time.monotonic()
        result["cached"] = run(llm, [prompt], 1)[0][2]
        warm.append(time.monotonic() - began)
    result["cold_seconds"], result["restored_seconds"] = cold, warm
    known: dict[str, float] = {}
    for metric in llm.get_metrics():
        if "kvtc" in metric.name:
            value = metric.value if hasattr(metric, "value") else metric.count
            known[metric.name] = known.get(metric.name, 0) + value
    result["metrics"] = known
    result["ledger"] = worker().counts()
    result["bytes_per_block"] = worker().mover.bytes_per_block
    result["capacity"] = [worker()._ledger.capacity.host_blocks, worker()._ledger.capacity.disk_blocks]
    llm.llm_engine.engine_core.shutdown()
    return result


def refused() -> dict[str, Any]:
    """What the engine says at start: argument 5 is what to change, as JSON."""
    try:
        engine(40, json.loads(sys.argv[5]))
    except Exception as exc:
        return {"error": f"{type(exc).__name__}: {exc}"}
    return {"error": "not refused"}


def main() -> None:
    set_environment()
    os.environ.update(
        DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER="true",
        DYN_KVBM_DISK_CACHE_DIR=sys.argv[3],
    )
    if sys.argv[1] == "exact":
        os.environ.update(DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS="64", DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS="256")
    else:
        os.environ.update(DYN_KVBM_CPU_CACHE_GB="0.25", DYN_KVBM_DISK_CACHE_GB="0.25")
    result = globals()[sys.argv[1]]()
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
