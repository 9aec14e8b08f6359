"""The real compiled leaders against our worker: no mock of the protocol. Skipped where the engines are not made."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from dynamo_kvtc.adapters.kvbm._compat import SUPPORTED
from tests.engines import require, run_leader

pytestmark = [pytest.mark.engine, pytest.mark.parametrize("version", SUPPORTED)]


@functools.cache
def scenario(version: str, name: str) -> dict[str, Any]:
    require("stub", f"kvbm-{version}")
    result = run_leader(version, name)
    assert result["version"] == version
    return result


@pytest.mark.parametrize("name", ["round_trip", "two_ranks"])
def test_blocks_go_to_host_and_disk_and_come_back_exact(version, name):
    seen = scenario(version, name)
    ranks = 2 if name == "two_ranks" else 1
    exact = [[1000 + 10 * i + rank for i in range(4)] for rank in range(ranks)]
    assert seen["from_host"] == exact
    assert seen["from_disk"] == exact
    assert seen["errors"] == []
    assert seen["capacity"] == [seen["expected_capacity"]] * ranks
    for counts, mover in zip(seen["counts"], seen["mover"], strict=True):
        assert mover["loaded_host"] == 4
        assert mover["loaded_disk"] == 4
        # 16 blocks went through 8 host ids: the rest are evictions by overwrite.
        assert (mover["stored"], mover["overwritten"]) == (16, 8)
        assert (counts["stores"], counts["failed_stores"], counts["failed_loads"]) == (16, 0, 0)
    assert seen["reset"] is True
    assert seen["after_reset"] == [0, False]


@pytest.mark.parametrize("name", ["failing_stores", "failing_loads", "stuck_mover"])
def test_what_is_not_there_is_reported_by_its_device_blocks(version, name):
    seen = scenario(version, name)
    assert seen["errors"] == [20, 21, 22, 23]
    assert seen["counts"][0]["loads"] == 0
    if name != "stuck_mover":
        assert seen["pages"] == [[0, 0, 0, 0]]


def test_after_a_failed_load_the_slot_can_be_dropped(version):
    seen = scenario(version, "failing_loads")
    assert seen["has_slot"] is False
    # The leader would match the same blocks again: leader.py does not ask it.
    assert seen["matched_again"] == [64, True]


def test_a_slot_can_be_asked_for_anew_in_any_state(version):
    seen = scenario(version, "restarted_slots")
    assert [row[0] for row in seen["seen"]] == ["staged", "onboarding", "prefilling", "decoding", "declined"]
    assert all(row[1][0] >= 64 for row in seen["seen"])
    assert seen["errors"] == []


def test_the_leader_appends_blocks_it_is_told_twice(version):
    assert scenario(version, "second_alloc")["stored_positions"] == [0, 16, 32, 48, 64, 80]
    assert scenario(version, "second_alloc_as_vllm_does")["stored_positions"] == [0, 0, 16, 16, 32, 48]


def test_preemption_waits_for_what_is_being_read(version):
    seen = scenario(version, "preemption")
    assert seen["errors"] == []
    assert seen["pages"] == [1000, 1010, 1020, 1030]


def test_requests_that_end_early_hold_nothing_longer_than_it_moves(version):
    seen = scenario(version, "aborted")
    assert seen["held_seconds"] < 5
    assert seen["errors"] == []


def test_a_prompt_larger_than_the_host_pool_is_skipped_by_the_leader(version):
    seen = scenario(version, "full_host")
    assert seen["gone"] is True
    assert seen["seconds"] < 2.5
    assert seen["matched"] == [64, True]


def test_shutdown_with_transfers_in_flight(version):
    seen = scenario(version, "shutdown_mid_transfer")
    assert (seen["open_before"], seen["open_after"]) == (1, 0)
    assert seen["seconds"] < 10


@pytest.mark.parametrize("name", ["coded", "coded_two_ranks", "coded_lossy"])
def test_blocks_go_through_the_codec_to_host_and_disk_and_back(version, name):
    seen = scenario(version, name)
    ranks = 2 if name == "coded_two_ranks" else 1
    if name == "coded_lossy":
        # Not what it was, but the same from either place.
        assert all(x > 0 for x in seen["from_host"][0])
        assert seen["from_disk"] == seen["from_host"]
    else:
        assert seen["from_disk"] == seen["from_host"] == [[0.0] * 4] * ranks, "bit for bit"
    assert seen["errors"] == []
    # 16 blocks went through 8 host ids; all of them to disk.
    assert seen["seen"] == [{"stored": 16, "host": 4, "disk": 4, "records": [8, 16]}] * ranks
    assert [c["failed_stores"] + c["failed_loads"] + c["failed_demotions"] for c in seen["counts"]] == [0] * ranks
    assert (seen["reset"], seen["after_reset"]) == (True, [0, False])


def test_a_match_can_be_cut_short(version):
    seen = scenario(version, "fewer_than_matched")
    for n, (matched, there) in enumerate(seen["seen"], 1):
        assert matched == [96, True]
        assert there == [1000 + 10 * i for i in range(n)] + [90] * (7 - n)
    assert seen["stored_again"] == 6
    assert seen["errors"] == []


def test_what_is_stored_again_is_not_what_is_matched(version):
    seen = scenario(version, "stored_again")
    assert seen["stored"] == 6
    assert seen["pages"] == [1000, 1010, 1020]
    assert seen["errors"] == []
