"""Two real vLLM processes, and what may happen to the holder, its bytes and the server in the middle of a pull: every
request is answered, right, within its time."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from tests.adapters.connector.servers import server
from tests.adapters.connector.test_cluster import options
from tests.adapters.engine_driver import prompt_of

__all__ = ["server"]

pytestmark = [pytest.mark.engine, pytest.mark.model, pytest.mark.long]
PULL_SECONDS = 6.0
TOKENS = 513


def close_to(a: Any, b: Any) -> bool:
    """The same tokens, log-probabilities but for rounding: what is computed in another batch is rounded otherwise."""
    return a[0] == b[0] and max(abs(p - q) for p, q in zip(a[1], b[1], strict=True)) < 1e-3


@pytest.mark.parametrize("load", ["async", "layerwise"])
def test_faults_in_the_middle_of_a_pull_cost_a_recompute(start, any_artifact, server, load):
    a = start("holder", options(any_artifact, server), engine={"device_blocks": 40})
    extra = options(any_artifact, server, load=load, pull_seconds=PULL_SECONDS)
    b = start("asker", extra, engine={"device_blocks": 40})
    a.ready()
    b.ready()
    told: dict[str, Any] = {}
    threads = 0

    def phase(name: str, i: int, fault: Any) -> None:
        """A prompt that the holder has; the fault comes when its pull has begun."""
        nonlocal threads
        prompt = prompt_of(400 + i, TOKENS)
        a("run", [prompt], 1)
        local = a("run", [prompt])[0]
        assert a("settle")
        assert b("knows", a("worker"), a("held"))
        failed = b("counts")["failed"]
        began = time.monotonic()
        b.ask("run", [prompt])
        time.sleep(0.5)
        fault()
        got = b.answer(120)[0]
        seconds = time.monotonic() - began
        told[name] = (b("counts")["failed"] - failed, round(seconds, 1))
        assert close_to(local, got), name
        assert got[3] == "length", name
        assert b("pinned") == 0, name
        # What was computed instead is stored, and right: the next answer is the tier's.
        assert b("settle")
        assert b("reset")
        again = b("run", [prompt])[0]
        assert again[2] == TOKENS - 1, name
        assert close_to(local, again), name
        threads = threads or b("threads")

    phase("nothing", 0, lambda: None)
    a("damage", 10)
    phase("one frame in ten is damaged", 1, lambda: None)
    a("slow", 0.02)

    def restart() -> None:
        server.kill()
        time.sleep(0.3)
        server.start()

    phase("nats restarted", 2, restart)
    phase("stopped", 3, lambda: a.signal(signal.SIGSTOP))
    a.signal(signal.SIGCONT)
    phase("killed", 4, lambda: a.signal(signal.SIGKILL))
    # Nobody is left to be asked.
    fresh = prompt_of(500, TOKENS)
    assert b("run", [fresh])[0][2] == 0
    print(load, told, b("errors"), b("counts"))
    computed = {name: blocks > 0 for name, (blocks, _) in told.items()}
    # Damaged frames are asked for again, for as often as a pull does that.
    computed.pop("one frame in ten is damaged")
    assert computed == {"nothing": False, "nats restarted": False, "stopped": True, "killed": True}
    assert b("threads") <= threads + 8
    assert b("close")
