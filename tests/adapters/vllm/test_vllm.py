"""Real vLLM 0.31 on the CPU, its OffloadingConnector and our spec over the tier."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.engines import VLLM_KVBM, _run, engines, require

pytestmark = [pytest.mark.engine, pytest.mark.model]


@pytest.fixture(scope="module")
def model(request) -> Path:
    # Before the model is unpacked for nothing.
    require("vllm")
    return request.getfixturevalue("smollm2_dir")


@pytest.fixture(scope="module")
def any_artifact(model, tmp_path_factory) -> Path:
    from tests.adapters.vllm.artifacts import any_artifact

    return any_artifact(model, tmp_path_factory.mktemp("artifact") / "any.safetensors")


@pytest.fixture(scope="module")
def calibrated(model, tmp_path_factory) -> Path:
    """At about 18x; small: what is asked is whether engine and evaluation agree."""
    from dynamo_kvtc.calibrate.run import CalibrationConfig, calibrate
    from dynamo_kvtc.calibrate.texts import draw_texts
    from dynamo_kvtc.codec.artifact import save_artifact
    from dynamo_kvtc.hf.model import load_model

    loaded = load_model(str(model), dtype="float32")
    config = CalibrationConfig(groups=10, ratios=(18.0,), fisher_sequences=2)
    manifest, tensors = calibrate(loaded, draw_texts(loaded, ["python"], 6_000, 512, 4), config, lambda *_: None)
    path = tmp_path_factory.mktemp("artifact") / "calibrated.safetensors"
    save_artifact(path, manifest, tensors)
    return path


def run(scenario: str, *arguments: Any, timeout: float = 900) -> dict[str, Any]:
    python = engines() / "vllm" / "bin" / "python"
    command = [str(python), "-m", "tests.adapters.vllm.driver", scenario, *map(str, arguments)]
    return _run(command, VLLM_KVBM, timeout)


def test_tokens_and_logprobs_are_those_of_a_local_hit(model, any_artifact, tmp_path):
    seen = run("exact", model, tmp_path, any_artifact)
    assert seen["restored_cached"] == seen["local_cached"] == [128] * 24
    assert seen["same"] == [True] * 24
    assert seen["same_singly"] == [True] * 4
    counts = seen["counts"]
    assert counts["stored"] == 96
    assert counts["hits_host"] > 0
    assert counts["hits_disk"] > 0
    assert counts["evicted"] > 0
    assert counts["failed"] == counts["refused"] == 0


def test_faults_cost_a_recompute(model, any_artifact, tmp_path):
    seen = run("faults", model, tmp_path, any_artifact)
    phases = {name: phase for name, phase in seen.items() if isinstance(phase, dict) and "right" in phase}
    assert len(phases) == 10
    for name, phase in phases.items():
        assert phase["right"] == [True] * 6, name
        assert phase["ended"] == ["length"] * 6, name
    for name in ("restored", "stored_again", "stored_yet_again", "restored_at_last"):
        assert phases[name]["cached"] == [128] * 6, name
    assert 0 < phases["flipped_in_memory"]["cached"].count(0) < 6
    for name in ("flipped_on_disk", "hanging_promises", "failing_stores", "stores_work_again"):
        assert phases[name]["cached"] == [0] * 6, name
    assert seen["counts"]["failed"] > 0
    assert {"record_RecordCorruptError", "disk_corrupt", "load_RuntimeError", "encode_RuntimeError"} <= set(
        seen["errors"]
    )
    assert seen["opted_out"] == [0, 0]
    assert seen["opted_in"] == [128, 128]
    assert seen["reset"] is True
    assert seen["after_reset"] == [0] * 6
    assert seen["closed"] is True


def test_coded_records_cost_what_evaluation_says(model, calibrated, tmp_path):
    """KL within 15% of what the same texts cost without an engine; fewer bytes; a faster first token."""
    import pydoc_data.topics

    from transformers import AutoTokenizer

    from tests.adapters.vllm.predict import predicted_kl

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = [tokenizer(pydoc_data.topics.topics[name])["input_ids"] for name in ("debugger", "formatstrings")]
    texts = [(x[:384], x[384:400]) for x in ids]
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(texts))
    seen = run("lossy", model, tmp_path, calibrated, path)
    wanted = predicted_kl(model, calibrated, texts, 32)
    assert seen["kl"] == pytest.approx(wanted, rel=0.15)
    assert seen["before"]["ratio"] > 8
    assert seen["after"]["loaded"] == 24
    assert seen["cached"] == 1504
    assert statistics.median(seen["restored_seconds"]) < statistics.median(seen["cold_seconds"]) / 2


def test_a_conversations_tail_is_exact_until_it_has_moved_on(model, any_artifact, tmp_path):
    seen = run("tail", model, tmp_path, any_artifact)
    first, again, longer = (seen[name] for name in ("first", "again", "longer"))
    assert again["cached"] == longer["cached"] == [160] * 4
    assert first["coded"] == again["coded"] == 4 * 5
    assert first["stored"] == again["stored"] == again["hit"] == 4 * 2
    assert first["hit"] == first["moved_on"] == again["moved_on"] == 0
    # Loaded once more, then outgrown.
    assert (longer["coded"], longer["stored"]) == (4 * 8, 4 * 4)
    assert (longer["hit"], longer["moved_on"]) == (4 * 4, 4 * 2)
    assert longer["bytes"] == first["bytes"] > 0


def test_events_and_metrics_reach_the_engine(model, any_artifact, tmp_path):
    seen = run("watched", model, tmp_path, any_artifact)
    assert seen["events"]["BlockStored:CPU"] >= 24
    assert seen["events"]["BlockStored:STORAGE"] > 0
    assert seen["events"]["BlockRemoved:CPU"] > 0
    metrics = seen["metrics"]
    assert metrics["vllm:kvtc_loaded_blocks"] > 0
    assert metrics["vllm:kvtc_used_bytes"] > 0
    assert metrics["vllm:kvtc_decode_seconds"] > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tier": {"host_gb": 4}}, "unknown options host_gb"),
        ({"tier": {"host_gib": 1 << 19}}, "MiB available: lower them"),
        ({"tier": {"weights": "0" * 64}}, "weights_digest"),
        ({"block_size": 128}, "set the engine's block size"),
        ({"transfer": {"kv_connector": "KvtcOffloadingConnector", "kv_load_failure_policy": "fail",
                       "kv_connector_module_path": "dynamo_kvtc.adapters.vllm"}}, "kv_load_failure_policy is 'fail'"),
    ],
)  # fmt: skip
def test_bad_configuration_is_refused_at_start(model, any_artifact, tmp_path, change, words):
    seen = run("refused", model, tmp_path, any_artifact, json.dumps(change))
    assert words in seen["error"]


def test_a_hybrid_model_is_refused(model, any_artifact, tmp_path):
    """Sliding windows in every other layer: two cache groups."""
    hybrid = tmp_path / "hybrid"
    hybrid.mkdir()
    for file in model.iterdir():
        (hybrid / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    kinds = [("full", "sliding")[i % 2] + "_attention" for i in range(config["num_hidden_layers"])]
    (hybrid / "config.json").unlink()
    (hybrid / "config.json").write_text(json.dumps({**config, "layer_types": kinds, "sliding_window": 256}))
    seen = run("refused", hybrid, tmp_path, any_artifact, '{"num_gpu_blocks_override": 128}')
    assert "UnsupportedModelError" in seen["error"]
    assert "2 groups" in seen["error"]
