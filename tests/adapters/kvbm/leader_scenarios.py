"""What the real leader is put through. Each scenario asserts what it saw and returns what the test asks about."""

from __future__ import annotations

import time
from typing import Any

from dynamo_kvtc.adapters.kvbm.protocol import Pool
from tests.adapters.kvbm.leader_driver import BLOCK, DISK_BLOCKS, HOST_BLOCKS, WAIT_SECONDS, Engine


def tokens_of(seed: int, count: int) -> list[int]:
    return [seed * 1000 + i for i in range(count)]


def pages(engine: Engine, blocks: list[int]) -> list[list[int]]:
    return [[int(rank.pages[b][0]) for b in blocks] for rank in engine.ranks]


def load(engine: Engine, request_id: str, tokens: list[int], blocks: list[int]) -> None:
    """A request whose full blocks are all matched: waits until every rank has loaded it."""
    full = len(tokens) // BLOCK * BLOCK
    end = time.monotonic() + WAIT_SECONDS
    # On a busy machine the leader may not have got round to what was acknowledged.
    while (matched := engine.match(request_id, tokens)) != (full, True) and time.monotonic() < end:
        engine.leader.request_finished(request_id, [])
        time.sleep(0.1)
    assert matched == (full, True)
    engine.alloc(request_id, blocks[: full // BLOCK], full)
    engine.step()
    assert engine.wait(lambda: all(request_id in loaded for loaded in engine.loaded)), "not loaded"


def round_trip(ranks: int = 1, **kwargs: Any) -> dict[str, Any]:
    """device -> host -> disk -> device and host -> device, eviction from host by overwrite, reset."""
    engine = Engine(ranks, **kwargs)
    first = tokens_of(1, 70)
    engine.prefill("r0", first, [10, 11, 12, 13, 14], [100, 101, 102, 103, 104])
    engine.quiet()
    host = [len(rank.mover.held[Pool.HOST]) for rank in engine.ranks]
    finished = engine.finish("r0")
    engine.step(finished=["r0"] if finished else [])
    assert not finished or engine.wait(lambda: all("r0" in stored for stored in engine.stored))

    load(engine, "r1", [*first[:64], 7, 7, 7], [20, 21, 22, 23])
    from_host = pages(engine, [20, 21, 22, 23])
    engine.alloc("r1", [20, 21, 22, 23, 24], 0)
    engine.step(new=[("r1", [*first[:64], 7, 7, 7], 64, 3)], compute={24: 1})

    for k in range(3):
        blocks = [30 + 4 * k + i for i in range(4)]
        engine.prefill(f"f{k}", tokens_of(10 + k, 64), blocks, [200 + b for b in blocks])
        engine.quiet()
    load(engine, "r2", first, [50, 51, 52, 53])
    from_disk = pages(engine, [50, 51, 52, 53])
    engine.quiet()
    reset = engine.leader.reset_cache()
    again = engine.match("r3", first)
    return {
        "held_on_host": host,
        "finished": finished,
        "from_host": from_host,
        "from_disk": from_disk,
        "errors": sorted(engine.errors),
        "reset": reset,
        "after_reset": list(again),
        "capacity": [rank.mover.capacity for rank in engine.ranks],
        "expected_capacity": [HOST_BLOCKS, DISK_BLOCKS],
        **engine.close(),
    }


def coded(ranks: int = 1, **options: Any) -> dict[str, Any]:
    """As ``round_trip``, through the codec: what comes back, against what was in the pages; ids that get reused."""
    engine = Engine(ranks, options or {"exact": "all"}, coding=True)

    def differ(blocks: list[int], of: list[int]) -> list[list[float]]:
        """Of what is in these blocks from what was in those: root mean square over that of the original."""
        out = []
        for rank in engine.ranks:
            k, v = rank.pages.read(blocks)
            wanted = [rank.pages.content[:, :, b * BLOCK : (b + 1) * BLOCK].float() for b in of]
            rows = [(k if rank.rank % 2 == 0 else v)[:, :, i * BLOCK : (i + 1) * BLOCK].float() for i in range(len(of))]
            out.append(
                [float(((a - b).square().mean() / b.square().mean()).sqrt()) for a, b in zip(rows, wanted, strict=True)]
            )
        return out

    first = tokens_of(1, 70)
    engine.prefill("r0", first, [10, 11, 12, 13, 14], [])
    engine.quiet()
    load(engine, "r1", [*first[:64], 7, 7, 7], [20, 21, 22, 23])
    from_host = differ([20, 21, 22, 23], [10, 11, 12, 13])
    engine.finish("r1")
    for k in range(3):
        engine.prefill(f"f{k}", tokens_of(10 + k, 64), [30 + 4 * k + i for i in range(4)], [])
        engine.quiet()
    tiers = [rank.mover.tier for rank in engine.ranks]
    assert all(tier.flush() for tier in tiers)
    load(engine, "r2", first, [50, 51, 52, 53])
    from_disk = differ([50, 51, 52, 53], [10, 11, 12, 13])
    counts = [
        {
            "stored": tier.metrics.value("kvtc_stored_blocks", "stored"),
            "host": tier.metrics.value("kvtc_lookup_blocks", "hit", "host"),
            "disk": tier.metrics.value("kvtc_lookup_blocks", "hit", "disk"),
            "records": [tier._store.host.stats().entries, tier._store.disk.stats().entries],
        }
        for tier in tiers
    ]
    engine.finish("r2")
    engine.quiet()
    reset = engine.leader.reset_cache()
    again = engine.match("r3", first)
    return {
        "from_host": from_host, "from_disk": from_disk, "errors": sorted(engine.errors), "seen": counts,
        "reset": reset, "after_reset": list(again), **engine.close(),
    }  # fmt: skip


def coded_two_ranks() -> dict[str, Any]:
    return coded(2)


def coded_lossy() -> dict[str, Any]:
    """Random numbers code worse than any artifact expects: the size of a block is set."""
    return coded(1, exact="sinks", block_bytes=20_000)


def fewer_than_matched() -> dict[str, Any]:
    """Told that fewer blocks than matched are wanted, the leader loads those, from host and disk; and a prefix that is
    computed again is stored again."""
    engine = Engine()
    first = tokens_of(1, 96)
    engine.prefill("r0", first, [10, 11, 12, 13, 14, 15], [100, 101, 102, 103, 104, 105])
    engine.quiet()
    engine.finish("r0")
    # Four of the six are evicted from the host, the others remain.
    engine.prefill("f", tokens_of(5, 96), [30, 31, 32, 33, 34, 35], [1, 2, 3, 4, 5, 6])
    engine.quiet()
    engine.finish("f")
    seen = []
    for n in range(1, 6):
        name = f"r{n}"
        blocks = [100 + 10 * n + i for i in range(7)]
        matched = engine.match(name, [*first, 7])
        engine.alloc(name, blocks[:n], 16 * n)
        engine.step()
        assert engine.wait(lambda name=name: name in engine.loaded[0]), f"{n} were not loaded"
        engine.leader.update_state_after_alloc(name, blocks[n:], 0)
        engine.tables[name] = blocks
        engine.step(new=[(name, [*first, 7], 16 * n, 97 - 16 * n)], compute=dict.fromkeys(blocks[n:], 9))
        engine.quiet(0.2)
        engine.finish(name)
        seen.append([list(matched), pages(engine, blocks)[0]])
    mover = engine.ranks[0].mover
    stored = mover.counts["stored"]
    assert engine.match("again", [*first, 8])[0] == 96
    engine.alloc("again", [300, 301, 302, 303, 304, 305, 306], 0)
    engine.step(new=[("again", [*first, 8], 0, 97)], compute={300 + i: 900 + i for i in range(7)})
    engine.quiet()
    engine.finish("again")
    stored = mover.counts["stored"] - stored
    load(engine, "last", [*first, 9], [310, 311, 312, 313, 314, 315])
    return {"seen": seen, "stored_again": stored, "last": pages(engine, [310, 311, 312, 313, 314, 315])[0],
            "errors": sorted(engine.errors), **engine.close()}  # fmt: skip


def stored_again() -> dict[str, Any]:
    """What is computed although the leader has it is stored again under other ids, and the leader goes on matching the
    older ones: so a block that was not stored, or is damaged, is not healed by storing it (damaged.py)."""
    engine = Engine()
    first = tokens_of(1, 48)
    engine.prefill("r0", first, [10, 11, 12], [100, 101, 102])
    engine.quiet()
    engine.finish("r0")
    assert engine.match("r1", [*first, 8])[0] == 48
    engine.alloc("r1", [20, 21, 22, 23], 0)
    engine.step(new=[("r1", [*first, 8], 0, 49)], compute={20: 900, 21: 901, 22: 902})
    engine.quiet()
    engine.finish("r1")
    load(engine, "r2", [*first, 9], [30, 31, 32])
    return {"stored": engine.ranks[0].mover.counts["stored"], "pages": pages(engine, [30, 31, 32])[0],
            "errors": sorted(engine.errors), **engine.close()}  # fmt: skip


def two_ranks() -> dict[str, Any]:
    return round_trip(2)


def failing_stores() -> dict[str, Any]:
    """What was not stored is acknowledged, matched by the leader, and its load fails by its device blocks."""
    engine = Engine(mover_options={"fail_stores": 1})
    first = tokens_of(1, 64)
    engine.prefill("r0", first, [10, 11, 12, 13], [100, 101, 102, 103])
    engine.quiet()
    load(engine, "r1", [*first, 7, 7], [20, 21, 22, 23])
    return {"errors": sorted(engine.errors), "pages": pages(engine, [20, 21, 22, 23]), **engine.close()}


def failing_loads() -> dict[str, Any]:
    """A failed load is reported with its request; the leader's slot is dropped and the request goes on without it."""
    engine = Engine(mover_options={"fail_loads": 1})
    first = tokens_of(1, 64)
    engine.prefill("r0", first, [10, 11, 12, 13], [100, 101, 102, 103])
    engine.quiet()
    load(engine, "r1", [*first, 7, 7], [20, 21, 22, 23])
    held = engine.finish("r1")
    has_slot = engine.leader.has_slot("r1")
    # The same id again, as after a preemption.
    matched = engine.match("r1", [*first, 7, 7])
    return {
        "errors": sorted(engine.errors),
        "pages": pages(engine, [20, 21, 22, 23]),
        "held": held,
        "has_slot": has_slot,
        "matched_again": list(matched),
        **engine.close(),
    }


def restarted_slots() -> dict[str, Any]:
    """A slot may be dropped in any state and its request asked for anew: staged, onboarding, prefilling, decoding."""
    engine = Engine()
    first = tokens_of(1, 64)
    engine.prefill("r0", first, [10, 11, 12, 13], [100, 101, 102, 103])
    engine.quiet()
    seen = []
    longer = [*first, *tokens_of(2, 40)]
    engine.tables["s"] = [20, 21, 22, 23]
    for state in ("staged", "onboarding", "prefilling", "decoding"):
        seen.append([state, list(engine.match("s", longer))])
        if state != "staged":
            engine.alloc("s", [20, 21, 22, 23], 64)
            engine.step()
            if state != "onboarding":
                assert engine.wait(lambda: "s" in engine.loaded[0])
                engine.loaded[0].clear()
                engine.alloc("s", [20, 21, 22, 23, 24, 25, 26], 0)
                scheduled = 20 if state == "prefilling" else 40
                engine.step(new=[("s", longer, 64, scheduled)], compute={24: 300, 25: 301})
            if state == "decoding":
                engine.step(cached=[("s", 104, 1)])
        seen[-1].append(engine.finish("s"))
        engine.quiet(0.2)
    seen.append(["declined", list(engine.match("d", [*first, 9]))])
    # Declined although matched: vLLM allocates without external tokens and computes everything.
    engine.alloc("d", [30, 31, 32, 33, 34], 0)
    engine.step(new=[("d", [*first, 9], 0, 65)], compute={30: 1})
    seen[-1].append(engine.finish("d"))
    engine.quiet()
    return {"seen": seen, "errors": sorted(engine.errors), **engine.close()}


def preemption() -> dict[str, Any]:
    """A store that has not been read when its request is preempted is waited for; one that cannot start is dropped."""
    engine = Engine(mover_options={"delay_seconds": 0.3})
    first = tokens_of(1, 64)
    engine.prefill("r0", first, [10, 11, 12, 13], [100, 101, 102, 103])
    begun = time.monotonic()
    assert engine.wait(lambda: engine.ranks[0].mover.counts["asked_stores"])
    engine.step(preempted=["r0"], compute={10: 999, 11: 999, 12: 999, 13: 999})
    waited = time.monotonic() - begun
    engine.quiet()
    engine.finish("r0")
    matched = engine.match("r1", [*first, 5])
    engine.alloc("r1", [20, 21, 22, 23], matched[0])
    engine.step()
    assert engine.wait(lambda: "r1" in engine.loaded[0])
    return {
        "waited": waited,
        "errors": sorted(engine.errors),
        "pages": pages(engine, [20, 21, 22, 23])[0],
        **engine.close(),
    }


def shutdown_mid_transfer() -> dict[str, Any]:
    """A worker that is shut down with moves open answers them all; the leader's own end does not hang."""
    engine = Engine(mover_options={"never_end": True})
    first = tokens_of(1, 64)
    engine.prefill("r0", first, [10, 11, 12, 13], [100, 101, 102, 103])
    assert engine.wait(lambda: engine.ranks[0].mover.counts["asked_stores"])
    open_before = engine.ranks[0].worker.open
    begun = time.monotonic()
    closed = engine.close()
    return {"open_before": open_before, "open_after": engine.ranks[0].worker.open, "seconds": time.monotonic() - begun,
            **closed}  # fmt: skip


def stuck_mover() -> dict[str, Any]:
    """A store that never ends is given up at its deadline; a load that never ends stops the engine."""
    engine = Engine(mover_options={"never_end": True}, options={"transfer_seconds": 0.5})
    first = tokens_of(1, 64)
    engine.prefill("r0", first, [10, 11, 12, 13], [100, 101, 102, 103])
    # On a busy machine nothing may have come yet: no store open is not yet a store given up.
    assert engine.wait(lambda: engine.ranks[0].mover.counts["asked_stores"] > 0, 30), "no store has come"
    engine.quiet(1.0)
    engine.finish("r0")
    load(engine, "r1", [*first, 7, 7], [20, 21, 22, 23])
    return {"errors": sorted(engine.errors), **engine.close()}


def aborted() -> dict[str, Any]:
    """Requests that finish while their store or their load is on its way: nothing is held longer than it moves."""
    engine = Engine(mover_options={"delay_seconds": 0.3})
    first = tokens_of(1, 64)
    engine.prefill("r0", first, [10, 11, 12, 13], [100, 101, 102, 103])
    finished = engine.finish("r0")
    begun = time.monotonic()
    engine.step(finished=["r0"])
    assert engine.wait(lambda: "r0" in engine.stored[0]), "the blocks are held for ever"
    held_seconds = time.monotonic() - begun
    engine.quiet()
    matched = engine.match("r1", [*first, 7])
    engine.alloc("r1", [20, 21, 22, 23], matched[0])
    engine.step()
    engine.finish("r1")
    engine.step()
    assert engine.wait(lambda: "r1" in engine.loaded[0]), "the load is held for ever"
    return {"finished": finished, "held_seconds": held_seconds, "matched": list(matched),
            "errors": sorted(engine.errors), "pages": pages(engine, [20, 21, 22, 23])[0],
            **engine.close()}  # fmt: skip


def second_alloc(second: tuple[int, ...] = (24, 25, 26)) -> dict[str, Any]:
    """vLLM allocates twice for a request that is loaded, and names all its blocks each time. The leader appends what it
    is told. Told the new blocks only, it stores the fifth and sixth block of the request."""
    engine = Engine()
    first = tokens_of(1, 64)
    engine.prefill("r0", first, [10, 11, 12, 13], [100, 101, 102, 103])
    engine.quiet()
    longer = [*first, *tokens_of(2, 40)]
    assert engine.match("s", longer) == (64, True)
    engine.alloc("s", [20, 21, 22, 23], 64)
    engine.step()
    assert engine.wait(lambda: "s" in engine.loaded[0])
    engine.leader.update_state_after_alloc("s", list(second), 0)
    engine.tables["s"] = [20, 21, 22, 23, 24, 25, 26]
    engine.step(new=[("s", longer, 64, 40)], compute={24: 300, 25: 301})
    engine.quiet()
    held = engine.ranks[0].mover.held[Pool.HOST]
    return {"stored_positions": sorted(position for position, _ in held.values()), **engine.close()}


def second_alloc_as_vllm_does() -> dict[str, Any]:
    """Told all blocks again, it stores the first and second in their place: why leader.py filters."""
    return second_alloc((20, 21, 22, 23, 24, 25, 26))


def full_host() -> dict[str, Any]:
    """More blocks in one prompt than the host pool has, and slow stores: what the leader skips holds nothing."""
    engine = Engine(mover_options={"delay_seconds": 0.2}, options={"half_seconds": 3.0})
    for k in range(3):
        engine.prefill(f"r{k}", tokens_of(k + 1, 16 * 16), list(range(100 * k, 100 * k + 16)), list(range(16)))
        engine.finish(f"r{k}")
    begun = time.monotonic()
    engine.step(finished=["r0", "r1", "r2"])
    gone = engine.wait(lambda: len(engine.stored[0]) == 3)
    seconds = time.monotonic() - begun
    engine.quiet()
    # The leader still works.
    engine.prefill("z", tokens_of(9, 64), [400, 401, 402, 403], [1, 2, 3, 4])
    engine.quiet()
    return {"gone": gone, "seconds": seconds, "matched": list(engine.match("y", [*tokens_of(9, 64), 1])),
            **engine.close()}  # fmt: skip
