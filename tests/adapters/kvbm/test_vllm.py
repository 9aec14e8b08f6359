"""Real vLLM on the CPU with the real leader and our connector; exact copies through the raw mover."""

from __future__ import annotations

from typing import Any

import pytest

from tests.adapters.conftest import checked
from tests.engines import play

pytestmark = [pytest.mark.engine, pytest.mark.model, pytest.mark.long]


def run_vllm(scenario: str, *arguments: Any) -> dict[str, Any]:
    return checked(play("tests.adapters.kvbm.vllm_driver", [[scenario, *arguments]])[0])


def test_tokens_and_logprobs_are_those_of_a_local_hit(model, tmp_path):
    seen = run_vllm("exact", model, tmp_path, "")
    # The first prompt is exactly 4 blocks, and a token of it must be computed.
    assert seen["local_cached"] == [96] + [128] * 23
    assert seen["restored_cached"] == seen["local_cached"]
    assert seen["same"] == [True] * 24
    assert seen["singly_cached"] == seen["local_cached"][:4]
    assert seen["same_singly"] == [True] * 4
    mover = seen["mover"]
    assert mover["loaded_host"] > 0
    assert mover["loaded_disk"] > 0
    assert mover["overwritten"] > 0
    assert "misplaced" not in mover


def test_faults_cost_a_recompute(model, tmp_path):
    seen = run_vllm("faults", model, tmp_path, "")
    assert seen["failed"]["same"] == [True] * 6
    assert seen["failed"]["reasons"] == ["length"] * 6
    assert seen["after"] == {"cached": [0] * 6, "same": [True] * 6}
    assert seen["in_the_end"] == {"cached": [128] * 6, "same": [True] * 6}
    assert seen["opted_out"] == [0, 0]
    assert seen["opted_in"] == [128, 128]
    assert seen["reset"] is True
    assert seen["after_reset"] == [0] * 6
    assert "misplaced" not in seen["mover"]


def test_preempted_requests_come_back_right(model, tmp_path):
    seen = run_vllm("preempted", model, tmp_path, "")
    assert seen["grown"] == [110] * 4
    assert seen["cached"] == [128] * 4
    assert seen["same"] == [True] * 4
    assert "misplaced" not in seen["mover"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_load_failure_policy": "fail"}, "kv_load_failure_policy is 'fail'"),
        ({"kv_connector_extra_config": {"mover": "tests.adapters.kvbm.raw_mover:make", "host_gb": 4}}, "host_gb"),
    ],
)
def test_bad_configuration_is_refused_at_start(model, tmp_path, change, words):
    seen = run_vllm("refused", model, tmp_path, "", change)
    assert words in seen["error"]
