"""Real vLLM on the CPU, the real leader, and the coding mover with the options an operator sets. What is not marked
``long`` runs in CI, all of it in one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.adapters.conftest import checked
from tests.engines import play

pytestmark = [pytest.mark.engine, pytest.mark.model]
DRIVER = "tests.adapters.kvbm.coding_driver"
TOKENS = 6
"""Of a continuation: each is a request of its own."""


@pytest.fixture(scope="module")
def short(model, any_artifact, quickly_calibrated, texts, hybrid, tmp_path_factory):
    """``short(scenario)``: its result."""
    work = tmp_path_factory.mktemp("short")
    cases = [
        ["exact", model, work / "exact", any_artifact],
        ["lossy", model, work / "lossy", quickly_calibrated, texts(TOKENS), "18", 0],
        ["windows", hybrid, work / "hybrid", any_artifact],
    ]
    results = dict(zip((case[0] for case in cases), play(DRIVER, cases), strict=True))
    print({name: (result["took_seconds"], result["processor_seconds"]) for name, result in results.items()})
    return lambda scenario: checked(results[scenario])


def run(scenario: str, *arguments: Any) -> dict[str, Any]:
    """One, in a process of its own. arguments: model, work, artifact, ..."""
    return checked(play(DRIVER, [[scenario, *arguments]])[0])


def test_exact_blocks_are_those_of_a_local_hit_and_faults_cost_a_recompute(short):
    seen = short("exact")
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
        assert phase["right"] == [True] * 6, name
        assert phase["ended"] == ["length"] * 6, name
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


def test_a_coded_record_costs_what_evaluation_says(short, model, quickly_calibrated, texts):
    """KL within 15% of what the same texts cost without an engine; fewer bytes, so more blocks."""
    check_coded(short("lossy"), model, quickly_calibrated, texts(TOKENS), "18")


def test_layers_with_windows_are_served(short):
    """Every other layer sees 256 tokens. For a connector of this kind vLLM makes one cache group, and keeps all."""
    seen = short("windows")
    assert seen["same"] == [True] * 3
    assert seen["restored"] == seen["local"] == [128, 480, 672]


@pytest.mark.long
@pytest.mark.parametrize("point", ["18", "34"])
def test_coded_records_cost_what_evaluation_says(model, calibrated, texts, tmp_path, point):
    seen = run("lossy", model, tmp_path, calibrated, texts(TOKENS), point, 1)
    check_coded(seen, model, calibrated, texts(TOKENS), point)
    # All 47 blocks are held, and a token of the last one must be computed.
    assert seen["cached"] == [1472]


def check_coded(seen, model, artifact, texts, point):
    from tests.adapters.vllm.predict import predicted_kl

    wanted = predicted_kl(model, artifact, texts, 32, point)
    print(seen["kl"], wanted, seen["before"]["kvtc_ratio"])
    assert seen["kl"] == pytest.approx(wanted, rel=0.15)
    assert seen["after"]["kvtc_loaded_blocks_total['loaded']"] >= 24
    assert "kvtc_loaded_blocks_total['failed']" not in seen["after"]
    assert seen["before"]["kvtc_ratio"] > 0.4 * float(point)
    # The leader counts on what the records take, not on raw blocks.
    raw = 32 * 46_080
    assert seen["capacity"][0] > 0.25e9 / raw * 0.4 * float(point)
    assert seen["metrics"]["vllm:kvtc_loaded_blocks"] >= 24
    assert seen["metrics"]["vllm:kvtc_used_bytes"] > 0


@pytest.mark.long
def test_two_ranks_of_tensor_parallelism(model, tmp_path):
    """Each in a process of its own. What one cannot load, both compute again."""
    from tests.adapters.vllm.artifacts import any_artifact, small_model

    small = small_model(tmp_path / "model")
    artifact = any_artifact(small, tmp_path / "two.safetensors", tp_size=2)
    seen = run("two_ranks", small, tmp_path / "work", artifact)
    assert seen["restored_cached"] == seen["local_cached"] == [96] + [128] * 23
    assert seen["same"] == [True] * 24
    assert len(seen["ranks"]) == 2
    for rank in seen["ranks"]:
        assert rank["counts"]["kvtc_lookup_blocks_total['hit', 'host']"] > 0
        assert rank["counts"]["kvtc_lookup_blocks_total['hit', 'disk']"] > 0
        assert rank["counts"]["kvtc_stored_blocks_total['stored']"] >= 96
        assert rank["ledger"]["failed_stores"] == rank["ledger"]["failed_loads"] == 0
    assert seen["flipped"] == [0, 64]
    damaged = seen["damaged"]
    assert damaged["right"] == [True] * 8
    assert damaged["ended"] == ["length"] * 8
    assert damaged["failed"][0] == 0
    assert damaged["failed"][1] > 0


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"host_gib": 4}, "host_gib is set by DYN_KVBM_CPU_CACHE_GB"),
        ({"point": "9"}, "operating point '9' is not in the artifact"),
    ],
)
def test_bad_configuration_is_refused_at_start(model, any_artifact, tmp_path, change, words):
    seen = run("refused", model, tmp_path, any_artifact, change, {})
    assert words in seen["error"]
