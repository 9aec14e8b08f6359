"""Faults under a running vLLM with our spec: scenarios of driver.py."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.adapters.engine_driver import Case, close_to, forget, prompt_of, run
from tests.adapters.vllm.driver import COUNTS, FAILURES_ARE_TOLD, counted, engine, settle, shared

TOKENS = 8
"""Of an answer."""


def flip(key: bytes) -> bool:
    """A bit of a record in host memory."""
    host = shared().tier._store.host
    with host.get(key) as lease:
        host._view[lease.offset + len(lease) - 9] ^= 4
    return True


def faults(case: Case) -> dict[str, Any]:
    """One engine through records damaged in memory and on disk, threads that raise, loads that fail after all, a
    request that opts out, and a reset; the answers after each."""
    tier = {
        "point": "fine", "exact": "all", "host_gib": 0.1, "disk_gib": 0.5, "disk_path": str(case.work / "disk"),
        "write_through": True,
    }  # fmt: skip
    llm = engine(case, tier, 48, FAILURES_ARE_TOLD)
    prompts = [prompt_of(i, 129 + i) for i in range(6)]
    result: dict[str, Any] = {}
    run(llm, prompts, TOKENS)
    local = run(llm, prompts, TOKENS)
    settle()
    t = shared().tier

    def after(name: str) -> None:
        forget(llm, settle)
        got = run(llm, prompts, TOKENS)
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
    records = case.work / "disk" / "rank0" / "records"
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
    forget(llm, settle)
    result["opted_out"] = [r[2] for r in run(llm, prompts[:2], 4, [{"kvtc": "off"}] * 2)]
    forget(llm, settle)
    result["opted_in"] = [r[2] for r in run(llm, prompts[:2], 4, [{"kvtc": "on"}] * 2)]
    result["reset"] = llm.reset_prefix_cache(reset_connector=True)
    result["after_reset"] = [r[2] for r in run(llm, prompts, 1)]
    result["counts"] = counted(COUNTS)
    result["errors"] = list(errors())
    llm.llm_engine.engine_core.shutdown()
    result["closed"] = t.closed
    return result


def errors() -> dict[str, float]:
    """By kind."""
    return {
        sample.labels["kind"]: sample.value
        for family in shared().metrics.registry.collect()
        if family.name == "kvtc_errors"
        for sample in family.samples
        if sample.name.endswith("_total")
    }


def full(case: Case) -> dict[str, Any]:
    """A disk that fills up under the engine, and has room again. More: a folder on a small file system."""
    place = Path(case.more[0])
    # Host memory for 16 blocks of 1.4 MiB: most must come from the disk, and the disk holds all.
    tier = {
        "point": "fine", "exact": "all", "host_gib": 16.5 * 1.41 / 1024, "disk_gib": 0.09,
        "disk_path": str(place / "disk"), "write_through": True,
    }  # fmt: skip
    llm = engine(case, tier, 48, FAILURES_ARE_TOLD)
    result: dict[str, Any] = {}
    local: dict[int, list[Any]] = {}

    def rest() -> None:
        shared().tier.flush(60)  # says once that something was lost

    def phase(name: str, first: int) -> None:
        """4 prompts, numbered from ``first``: computed the first time, and then from below."""
        prompts = [prompt_of(first + i, 129 + i) for i in range(4)]
        if first not in local:
            run(llm, prompts, TOKENS)
            local[first] = run(llm, prompts, TOKENS)
        forget(llm, rest)
        got = run(llm, prompts, TOKENS)
        result[name] = {
            "cached": [r[2] for r in got], "right": close_to(local[first], got), "ended": [r[3] for r in got],
            "on_disk": shared().tier._store.disk.stats().entries, "errors": errors(),
        }  # fmt: skip

    phase("before", 0)
    with open(place / "ballast", "wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(4096))
        except OSError as exc:
            result["filled"] = exc.errno
        phase("during", 10)
        phase("before_again", 0)
        ballast.truncate(0)
    shared().tier._store.disk._queue.refuse_until = 0.0
    phase("after", 20)
    phase("before_at_last", 0)
    # Those that were lost meanwhile: computed, and there from now on.
    phase("during_again", 10)
    phase("during_at_last", 10)
    llm.llm_engine.engine_core.shutdown()
    return result
