"""One real vLLM on the CPU: what leaves the device comes back from the tier, bit for bit."""

from __future__ import annotations

import pytest

from tests.adapters.engine_driver import prompt_of, same

pytestmark = [pytest.mark.engine, pytest.mark.model]


@pytest.mark.parametrize("load", ["async", "layerwise"])
def test_evicted_blocks_come_back_as_they_were(start, any_artifact, tmp_path, load):
    extra = {
        "artifact": str(any_artifact), "point": "fine", "exact": "all", "host_gib": 0.07, "disk_gib": 0.5,
        "disk_path": str(tmp_path / "disk"), "load": load,
    }  # fmt: skip
    engine = start("one", extra, engine={"device_blocks": 60}).ready()
    prompts = [prompt_of(i, 129 + i) for i in range(16)]
    batches = [prompts[:8], prompts[8:]]
    local, restored = [], []
    for batch in batches:
        engine("run", batch)
        local += engine("run", batch)
        assert engine("settle")
    assert [r[2] for r in local] == [128] * 16
    for batch in reversed(batches):
        engine("fill", 900)
        restored = engine("run", batch) + restored
    assert [r[2] for r in restored] == [128] * 16
    assert same(local, restored) == [True] * 16
    counts = engine("counts")
    assert counts["loaded"] >= 64
    assert counts["failed"] == 0
    assert counts["evicted"] > 0
    assert counts["hits_disk"] > 0
    assert counts["stored"] >= 64
    # Of what is generated, too, whole blocks: 129 tokens and 40 make a fifth.
    more = engine("run", [prompts[0]], 40)
    assert more[0][2] == 128
    assert engine("settle")
    assert engine("counts")["stored"] == counts["stored"] + 1
    # What a router hears of a prompt that is new.
    engine("listen")
    engine("run", [prompt_of(99, 100)])
    assert engine("settle")
    engine("run", [prompt_of(99, 100)], 1)
    stored = [told for told in engine("heard") if told[0] == "BlockStored" and told[1] == "CPU"]
    assert stored[:3] == [["BlockStored", "CPU", i == 0, 32] for i in range(3)]
    assert engine("reset")
    engine("clear")
    assert [r[2] for r in engine("run", prompts[:2])] == [0, 0]
    assert engine("close")
