"""Conversations, evictions, aborts and resets over one tier for as long as KVTC_SOAK_MINUTES says (30): run by
`make soak`; ``python -m tests.soak_tier``.

At intervals everything comes to rest, and must then balance; the process's memory must not grow: a line through it
after the warm-up (a third of the time) may rise by GROWTH_BYTES over what is measured, no more.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.tier.parts import MIB_OF_GIB
from tests.tier.traffic import Traffic, World

GROWTH_BYTES = 16 << 20


def soak(folder: Path, seconds: float, intervals: int, seed: int, growth_bytes: int = GROWTH_BYTES) -> dict[str, float]:
    """Raises AssertionError for what is wrong; figures."""
    world = World(seed)
    # The host holds a part of what is live, the disk not all of it either.
    tier = world.engine.tier(folder / "tier", host_gib=0.1 * MIB_OF_GIB, disk_gib=8 * MIB_OF_GIB, promote_on=2)
    traffic = Traffic(world, tier, seed, sessions=400)
    times, memory = [], []
    began = time.monotonic()
    for turn in range(intervals):
        traffic.run(max(0.0, began + seconds * (turn + 1) / intervals - time.monotonic()))
        traffic.check_at_rest()
        tier.refresh()
        gc.collect()
        times.append(time.monotonic() - began)
        memory.append(resident_bytes())
        print(_line(times[-1], memory[-1], traffic), flush=True)
    warm = len(times) // 3
    slope = float(np.polyfit(times[warm:], memory[warm:], 1)[0])
    grown = slope * (times[-1] - times[warm])
    told, m = traffic.counted(), tier.metrics
    out = {
        "seconds": times[-1], "turns": told["turns"], "blocks_offered": told["offered"],
        "blocks_loaded": m.value("kvtc_loaded_blocks", "loaded"), "overlay_hits": m.value("kvtc_overlay_blocks", "hit"),
        "host_evictions": m.value("kvtc_evictions", "host"), "disk_evictions": m.value("kvtc_evictions", "disk"),
        "disk_hits": m.value("kvtc_lookup_blocks", "hit", "disk"), "resident_mib": memory[-1] / (1 << 20),
        "grown_mib": grown / (1 << 20), "mib_per_hour": slope * 3600 / (1 << 20),
        "slowest_call_seconds": max(c.slowest_call for c in traffic.clients),
    }  # fmt: skip
    assert grown < growth_bytes, f"{grown / (1 << 20):.1f} MiB more after {times[-1]:.0f} s: {out}"
    assert tier.close()
    return out


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _line(seconds: float, memory: int, traffic: Traffic) -> str:
    told, m = traffic.counted(), traffic.tier.metrics
    return (
        f"{seconds:7.0f} s  {told['turns']:8,} turns  {memory / (1 << 20):7.1f} MiB  "
        f"loaded {m.value('kvtc_loaded_blocks', 'loaded'):9,.0f}  evicted "
        f"{m.value('kvtc_evictions', 'host'):9,.0f} host {m.value('kvtc_evictions', 'disk'):7,.0f} disk"
    )


def main() -> None:
    minutes = float(os.environ.get("KVTC_SOAK_MINUTES", "30"))
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"{minutes:g} minutes, seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="kvtc-soak-") as folder:
        for name, value in soak(Path(folder), minutes * 60, max(12, int(minutes * 4)), seed).items():
            print(f"{name}: {value:,.6g}")


if __name__ == "__main__":
    main()
