"""Two real vLLM processes and a NATS server: what one has prefilled the other pulls."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.connector.servers import server
from tests.adapters.engine_driver import prompt_of, same
from tests.events.servers import Server

__all__ = ["server"]

pytestmark = [pytest.mark.engine, pytest.mark.model, pytest.mark.long]


def options(artifact: Path, server: Server, **more: Any) -> dict[str, Any]:
    return {
        "artifact": str(artifact), "point": "fine", "exact": "all", "host_gib": 0.25,
        "nats": {"servers": server.url, "namespace": "test"}, "heartbeat_ttl_seconds": 2.0, **more,
    }  # fmt: skip


def notes(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_what_one_has_prefilled_the_other_pulls(start, any_artifact, server, tmp_path):
    """Two that serve alike: a prompt of one is restored on the other, bit for bit, and computed there is the tail. Then
    a request that is prefilled here and decoded there."""
    trace = tmp_path / "trace"
    a = start("a", options(any_artifact, server), engine={"device_blocks": 96, "max_model_len": 2048})
    b = start(
        "b", options(any_artifact, server, load="layerwise", trace=str(trace)),
        engine={"device_blocks": 96, "max_model_len": 2048},
    )  # fmt: skip
    a.ready()
    b.ready()
    prompts = [prompt_of(i, 129 + i) for i in range(4)]
    a("run", prompts)
    local = a("run", prompts)
    assert a("settle")
    held = a("held")
    assert b("knows", a("worker"), held)
    pulled = b("run", prompts)
    assert [r[2] for r in pulled] == [r[2] for r in local] == [128] * 4
    assert same(local, pulled) == [True] * 4
    counts = b("counts")
    assert counts["pulled"] == 16
    assert counts["not_pulled"] == counts["failed"] == 0
    # A later hit is local.
    served = a("served")
    assert b("settle")
    assert b("reset")
    again = b("run", prompts)
    assert same(local, again) == [True] * 4
    assert a("served") == served
    # And what came is told to others.
    assert a("knows", b("worker"), 16)

    # The first token of what nobody has, and of what the other has.
    cold, warm = [], []
    for i in range(2):
        cold.append(b("first_token", prompt_of(50 + i, 1504)))
        prompt = prompt_of(60 + i, 1504)
        a("run", [prompt], 1)
        assert a("settle")
        assert b("knows", a("worker"), a("held"))
        warm.append(b("first_token", prompt))
    assert [tokens for _, tokens in cold] == [0, 0]
    assert [tokens for _, tokens in warm] == [1472, 1472]
    cold_seconds, warm_seconds = (statistics.median(s for s, _ in some) for some in (cold, warm))
    print(f"first token of 1,504: cold {cold_seconds:.2f} s, pulled {warm_seconds:.2f} s, exact records", cold, warm)

    # Of a holder that is slow: the first layers are computed while the last group's bytes are on their way.
    prompt = prompt_of(70, 513)
    a("run", [prompt])
    local = a("run", [prompt])
    assert a("settle")
    assert b("knows", a("worker"), a("held"))
    before = len(notes(trace))
    a("slow", 0.01)
    pulled = b("run", [prompt])
    assert pulled[0][2] == 512
    assert same(local, pulled) == [True]
    seen = [(n["what"], n.get("group")) for n in notes(trace)[before:]]
    first, last = seen.index(("attention", 0)), seen.index(("arrived", 1))
    print(f"{seen[:last].count(('attention', 0))} of 10 layers were computed before the last group had come")
    assert seen.index(("loaded", 0)) < first < last < seen.index(("loaded", 1))
    assert b("close")
    assert a("close")


@pytest.mark.parametrize("plane", ["tcp", "nixl"])
def test_prefilled_here_and_decoded_there(start, any_artifact, server, plane):
    if plane == "nixl":
        pytest.importorskip("nixl_cu12")
    a = start("prefill", options(any_artifact, server, planes=[plane]))
    b = start("decode", options(any_artifact, server, planes=[plane]))
    a.ready()
    b.ready()
    prompts = [prompt_of(200 + i, 161 + 40 * i) for i in range(4)]
    if plane == "tcp":
        a("count_wire")
    params = []
    for prompt in prompts:
        params.append(a("prefill", prompt))
        wanted = {
            "do_remote_prefill": True, "do_remote_decode": False, "kvtc_worker": a("worker"),
            "kvtc_blocks": len(prompt) // 32,
        }  # fmt: skip
        assert wanted.items() <= params[-1].items()
        # At once: its records may not be coded, and no event has told of them.
        decoded = b("run", [prompt], 16, [params[-1]])[0]
        # vLLM reports as cached what was cached where it was prefilled.
        assert decoded[2] == params[-1]["remote_prefill_cached_tokens"] == 0
        assert b("counts")["loaded"] == sum(len(p) // 32 for p in prompts[: len(params)])
        # What a hit on the prefill worker's own device gives.
        assert decoded[:2] == a("run", [prompt])[0][:2]
    counts = b("counts")
    assert counts["pulled"] == sum(len(p) // 32 for p in prompts)
    raw = counts["pulled"] * 32 * 30 * 2 * 3 * 64 * 4
    if plane == "tcp":
        print(f"{a('wire')} bytes sent for {raw} raw, every token exact")
        assert raw < a("wire") < 1.01 * raw
    # A worker that is not there, and params that are none: it is prefilled where it is decoded, after its time.
    bad = [
        *({**params[0], "kvtc_worker": worker} for worker in ("nobody-1234", "a.b")),
        *({**params[0], "kvtc_blocks": blocks} for blocks in (-1, "7")), {"do_remote_prefill": True},
    ]  # fmt: skip
    fresh = [prompt_of(300 + i, 100) for i in range(len(bad))]
    got = [b("run", [p], 4, [w])[0] for p, w in zip(fresh, bad, strict=True)]
    assert b("counts")["loaded"] == counts["loaded"]
    assert [r[3] for r in got] == ["length"] * len(bad)
    assert b("close")
    assert a("close")
