"""Real vLLM on the CPU, the real leader, and the coding mover with the options an operator sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engines import VLLM_KVBM, _run, engines, require

pytestmark = [pytest.mark.engine, pytest.mark.model]


@pytest.fixture(scope="module")
def model(request) -> Path:
    # Before the model is unpacked for nothing.
    require("stub", f"kvbm-{VLLM_KVBM}", "vllm")
    return request.getfixturevalue("smollm2_dir")


@pytest.fixture(scope="module")
def any_artifact(model, tmp_path_factory) -> Path:
    from tests.adapters.vllm.artifacts import any_artifact

    return any_artifact(model, tmp_path_factory.mktemp("artifact") / "any.safetensors")


@pytest.fixture(scope="module")
def calibrated(model, tmp_path_factory) -> Path:
    """At about 18x and 34x; small: what is asked is whether engine and evaluation agree."""
    from dynamo_kvtc.calibrate.run import CalibrationConfig, calibrate
    from dynamo_kvtc.calibrate.texts import draw_texts
    from dynamo_kvtc.codec.artifact import save_artifact
    from dynamo_kvtc.hf.model import load_model

    loaded = load_model(str(model), dtype="float32")
    config = CalibrationConfig(groups=10, ratios=(18.0, 34.0), fisher_sequences=2)
    manifest, tensors = calibrate(loaded, draw_texts(loaded, ["python"], 6_000, 512, 4), config, lambda *_: None)
    path = tmp_path_factory.mktemp("artifact") / "calibrated.safetensors"
    save_artifact(path, manifest, tensors)
    return path


def run(scenario: str, *arguments: Any, timeout: float = 1800) -> dict[str, Any]:
    python = engines() / "vllm" / "bin" / "python"
    command = [str(python), "-m", "tests.adapters.kvbm.coding_driver", scenario, *map(str, arguments)]
    return _run(command, VLLM_KVBM, timeout)


def test_exact_blocks_are_those_of_a_local_hit_and_faults_cost_a_recompute(model, any_artifact, tmp_path):
    seen = run("exact", model, tmp_path, any_artifact)
    # The first prompt is exactly 4 blocks, and a token of it must be computed.
    assert seen["restored_cached"] == seen["local_cached"] == [96] + [128] * 23
    assert seen["same"] == [True] * 24
    counts = seen["counts"]
    assert counts["kvtc_lookup_blocks_total['hit', 'host']"] > 0
    assert counts["kvtc_lookup_blocks_total['hit', 'disk']"] > 0
    # 64 ids on the host, 96 blocks: the rest are evictions by overwrite, and the budgets were enough.
    assert counts["kvtc_records['host']"] == 64
    assert counts["kvtc_stored_blocks_total['stored']"] >= 96
    assert "kvtc_evictions_total['host']" not in counts
    assert seen["ledger"]["failed_stores"] == seen["ledger"]["failed_loads"] == seen["ledger"]["failed_demotions"] == 0

    phases = {name: phase for name, phase in seen.items() if isinstance(phase, dict) and "right" in phase}
    assert len(phases) == 6
    for name, phase in phases.items():
        prompts = 16 if name == "damaged_on_disk" else 6
        assert phase["right"] == [True] * prompts, name
        assert phase["ended"] == ["length"] * prompts, name
    assert phases["sound"]["cached"] == [128] * 6
    assert seen["flipped"] > 0
    assert phases["damaged"]["failed"] >= 6
    # Known by then: what lies before is loaded, and nothing fails.
    assert phases["known_to_be_damaged"]["failed"] == 0
    assert all(cached <= 64 for cached in phases["known_to_be_damaged"]["cached"]), phases
    assert phases["damaged_on_disk"]["failed"] > 0
    assert seen["reset"] is True
    assert phases["after_reset"]["cached"] == [0] * 6
    assert phases["stored_anew"]["cached"] == [128] * 6
    assert {"kvtc_errors_total['record_RecordCorruptError']", "kvtc_errors_total['disk_corrupt']"} <= set(
        seen["errors"]
    )
    assert seen["closed"] is True


@pytest.mark.parametrize("point", ["18", "34"])
def test_coded_records_cost_what_evaluation_says(model, calibrated, tmp_path, point):
    """KL within 15% of what the same texts cost without an engine; fewer bytes, so more blocks."""
    import pydoc_data.topics

    from transformers import AutoTokenizer

    from tests.adapters.kvbm.coding_driver import TOKENS
    from tests.adapters.vllm.predict import predicted_kl

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = [tokenizer(pydoc_data.topics.topics[name])["input_ids"] for name in ("debugger", "formatstrings")]
    texts = [(x[:384], x[384 : 384 + TOKENS]) for x in ids]
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(texts))
    seen = run("lossy", model, tmp_path, calibrated, path, point)
    assert seen["kl"] == pytest.approx(predicted_kl(model, calibrated, texts, 32, point), rel=0.15)
    assert seen["after"]["kvtc_loaded_blocks_total['loaded']"] >= 24
    assert "kvtc_loaded_blocks_total['failed']" not in seen["after"]
    assert seen["before"]["kvtc_ratio"] > 0.4 * float(point)
    # The leader counts on what the records take, not on raw blocks.
    raw = 32 * 46_080
    assert seen["capacity"][0] > 0.25e9 / raw * 0.4 * float(point)
    # All 47 blocks are held, and a token of the last one must be computed.
    assert seen["cached"] == 1472
    assert seen["metrics"]["vllm:kvtc_loaded_blocks"] >= 24
    assert seen["metrics"]["vllm:kvtc_used_bytes"] > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"host_gib": 4}, "host_gib is set by DYN_KVBM_CPU_CACHE_GB"),
        ({"point": "9"}, "operating point '9' is not in the artifact"),
    ],
)
def test_bad_configuration_is_refused_at_start(model, any_artifact, tmp_path, change, words):
    seen = run("refused", model, tmp_path, any_artifact, json.dumps(change))
    assert words in seen["error"]
