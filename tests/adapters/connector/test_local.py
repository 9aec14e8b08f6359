"""One real vLLM on the CPU: what leaves the device comes back from the tier, bit for bit."""

from __future__ import annotations

import pytest

from tests.adapters.engine_driver import prompt_of, same
from tests.adapters.vllm.artifacts import hybrid_model

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


@pytest.mark.parametrize("windows", ["some", pytest.param("all", marks=pytest.mark.long)])
def test_layers_with_windows_have_pages_of_their_own(start, any_artifact, model, hybrid, tmp_path, windows):
    """Every other layer sees 256 tokens: two cache groups. What comes back has all of its pages in one, and those of
    its last window in the other; a record that is damaged costs a recompute. Or all layers do: nothing but the last
    window comes back."""
    of = hybrid if windows == "some" else hybrid_model(model, tmp_path / "all", every=1)
    extra = {
        "artifact": str(any_artifact), "point": "fine", "exact": "all", "host_gib": 0.3, "disk_gib": 0.5,
        "disk_path": str(tmp_path / "disk"),
    }  # fmt: skip
    engine = start("one", extra, of=of, engine={"device_blocks": 120}).ready()
    assert engine("groups") == [[15, 15] if windows == "some" else [30], 256]
    # Chunks of 256 tokens in batches: a window leaves pages behind while a prompt is computed.
    prompts = [prompt_of(i, n) for i, n in enumerate((129, 481, 700))]
    whole = [128, 480, 672]
    engine("run", prompts)
    local = [engine("run", [p])[0] for p in prompts]
    assert [r[2] for r in local] == whole
    assert engine("settle")
    # Of the 16 tokens that are generated the last is never computed.
    assert engine("held") == sum((len(p) + 15) // 32 for p in prompts)
    engine("forget")
    restored = [engine("run", [p])[0] for p in prompts]
    assert [r[2] for r in restored] == whole
    assert same(local, restored) == [True] * len(prompts)
    counts = engine("counts")
    assert counts["loaded"] == (sum(whole) // 32 if windows == "some" else 4 + 8 + 8)
    assert counts["failed"] == 0

    # An answer that goes on past a block's end: that is stored, too, and found.
    longer = prompts[1] + engine("run", [prompts[1]], 40)[0][0][:-1]
    here = engine("run", [longer], 4)[0]
    engine("forget")
    back = engine("run", [longer], 4)[0]
    assert back[2] == here[2] == 512
    assert same([here], [back]) == [True]

    # Two new prompts that begin alike, in one step: the second has the first one's pages, which are about to be stored.
    alike = [prompt_of(7, 96) + prompt_of(8 + i, 64) for i in range(2)]
    fresh = engine("run", alike)
    engine("forget")
    assert [r[0] for r in engine("run", alike)] == [r[0] for r in fresh]

    engine("forget")
    assert engine("spoil", 3) > 0
    again = engine("run", prompts)
    assert [r[3] for r in again] == ["length"] * len(prompts)
    assert [r[0] for r in again] == [r[0] for r in local]
    assert engine("counts")["failed"] > 0
    # What was computed after all is stored again.
    engine("forget")
    together = engine("run", prompts)
    assert [r[2] for r in together] == whole
    assert [r[0] for r in together] == [r[0] for r in local]
    assert engine("close")
