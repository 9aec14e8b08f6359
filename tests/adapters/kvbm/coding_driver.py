"""Real vLLM on the CPU, the real leader and the coding mover, configured as a user does: scenarios for
engine_driver.play. ``echo '[["exact", MODEL_DIR, WORK_DIR, ARTIFACT], ...]' | python -m
tests.adapters.kvbm.coding_driver``, in vLLM's environment."""

from __future__ import annotations

import os
import time
from typing import Any

from tests.adapters import engine_driver
from tests.adapters.engine_driver import (
    BLOCK,
    Case,
    close_to,
    cold_and_restored,
    distributions,
    forget,
    kl_of,
    local_and_restored,
    run,
    same,
)
from tests.adapters.kvbm import vllm_driver
from tests.adapters.kvbm.vllm_driver import budget


def engine(case: Case, device_blocks: int, coding: dict[str, Any], **extra: Any) -> Any:
    config = {"artifact": case.artifact, "handshake_seconds": 60, "transfer_seconds": 300, **coding}
    return vllm_driver.engine(case, {}, device_blocks, {"kv_connector_extra_config": config}, **extra)


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


def told() -> dict[str, float]:
    tier().refresh()
    return {name: value for name, value in tier().metrics.totals().items() if value}


def exact(case: Case) -> dict[str, Any]:
    """24 prompts, chunked prefill, batches of 8; the device holds one batch, the host two, the disk all. What a local
    prefix hit gives, then the same from the tier. Then records are damaged in memory and on disk; then a reset."""
    from dynamo_kvtc.codec.record import claimed_position

    budget(case, CPU_CACHE_OVERRIDE_NUM_BLOCKS=64, DISK_CACHE_OVERRIDE_NUM_BLOCKS=256)
    llm = engine(case, 60, {"point": "fine", "exact": "all"})
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
    # The host has 64 blocks, of the last 16 prompts that were computed.
    in_memory, on_disk = slice(16, 22), slice(1, 7)

    def after(name: str, which: slice = in_memory) -> None:
        forget(llm, settle)
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
    after("damaged_on_disk", on_disk)
    result["reset"] = llm.reset_prefix_cache(reset_connector=True)
    after("after_reset")
    after("stored_anew")
    result["errors"] = {name: value for name, value in told().items() if name.startswith("kvtc_errors")}
    mover = worker().mover
    llm.llm_engine.engine_core.shutdown()
    result["closed"] = mover.tier.closed
    return result


def lossy(case: Case) -> dict[str, Any]:
    """Coded records: KL of continuations after a restored context against the same after a local one. More: [[context
    ids, continuation ids], ...]; the point; how many times 1,504 tokens are restored."""
    texts, point, restores = case.more
    budget(case, CPU_CACHE_GB=0.25, DISK_CACHE_GB=0.25)
    llm = engine(case, 96, {"point": point}, max_model_len=2048, max_logprobs=-1, max_num_batched_tokens=2048,
                 disable_log_stats=False)  # fmt: skip
    raw = distributions(llm, texts)
    forget(llm, settle)
    result: dict[str, Any] = {"before": told()}
    result["kl"] = kl_of(raw, distributions(llm, texts))
    settle()
    result["after"] = told()
    forget(llm, settle)
    result |= cold_and_restored(llm, settle, restores)
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


def two_ranks(case: Case) -> dict[str, Any]:
    """Tensor parallelism in processes of vLLM's own: as in ``exact``. Then what one rank holds in memory is damaged."""
    cores = sorted(os.sched_getaffinity(0))
    # Functions go to the workers; a CPU's workers are told their cores where there is one NUMA node.
    os.environ.update(VLLM_ALLOW_INSECURE_SERIALIZATION="1", VLLM_CPU_OMP_THREADS_BIND=f"{cores[0]}|{cores[-1]}")
    budget(case, CPU_CACHE_OVERRIDE_NUM_BLOCKS=64, DISK_CACHE_OVERRIDE_NUM_BLOCKS=256)
    llm = engine(case, 60, {"point": "fine", "exact": "all"}, distributed_executor_backend="mp",
                 tensor_parallel_size=2, skip_tokenizer_init=True)  # fmt: skip

    def settle_all() -> None:
        llm.collective_rpc(settle_rank)

    prompts, local, restored = local_and_restored(llm, settle_all)
    settle_all()
    result: dict[str, Any] = {
        "local_cached": [r[2] for r in local], "restored_cached": [r[2] for r in restored],
        "same": same(local, restored), "ranks": llm.collective_rpc(rank_told),
    }  # fmt: skip
    # Out of the device's cache, by prompts that only KVBM's host and disk have now.
    evicting = slice(0, 8)
    run(llm, prompts[evicting])
    result["flipped"] = llm.collective_rpc(flip_on_rank_1)
    last = slice(16, 24)
    got = run(llm, prompts[last])
    settle_all()
    result["damaged"] = {
        "cached": [r[2] for r in got], "right": close_to(local[last], got), "ended": [r[3] for r in got],
        "failed": [rank["ledger"].get("failed_loads", 0) for rank in llm.collective_rpc(rank_told)],
    }  # fmt: skip
    llm.llm_engine.engine_core.shutdown()
    return result


def settle_rank(_: Any) -> None:
    settle()


def rank_told(_: Any) -> dict[str, Any]:
    return {"counts": told(), "ledger": dict(worker().counts())}


def flip_on_rank_1(engine_worker: Any) -> int:
    """A bit of every record in its host memory."""
    host, keys = tier()._store.host, []
    if engine_worker.rank == 1:
        keys = list(host._shelf.slots)
        for key in keys:
            with host.get(key) as lease:
                host._view[lease.offset + len(lease) - 9] ^= 4
    return len(keys)


def windows(case: Case) -> dict[str, Any]:
    budget(case, CPU_CACHE_GB=0.25, DISK_CACHE_GB=0.25)
    llm = engine(case, 60, {"point": "fine", "exact": "all"})
    out = engine_driver.windowed(llm, settle)
    llm.llm_engine.engine_core.shutdown()
    return out


def refused(case: Case) -> dict[str, Any]:
    """What the engine says at start. More: what to change of the mover's options and of the engine's."""
    coding, extra = case.more
    budget(case, CPU_CACHE_GB=0.25, DISK_CACHE_GB=0.25)
    try:
        engine(case, 40, coding, **extra)
    except Exception as exc:
        return {"error": f"{type(exc).__name__}: {exc}"}
    return {"error": "not refused"}


def main() -> None:
    engine_driver.play({scenario.__name__: scenario for scenario in (exact, lossy, windows, refused, two_ranks)})


if __name__ == "__main__":
    main()
