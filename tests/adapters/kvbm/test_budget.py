"""Budgets as the leader reads them, and what a block is reckoned to take."""

from __future__ import annotations

import pytest

from dynamo_kvtc.adapters.kvbm.budget import Budget, Pool, block_bytes, disk_root, read_budget
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.store.disk import DiskStore
from dynamo_kvtc.store.host import HostStore
from tests.adapters.kvbm.parts import open_coding, store
from tests.builders import case_seed, make_artifact
from tests.store.stores import key_of
from tests.tier.parts import Engine

NAMES = [f"DYN_KVBM_{pool}_CACHE_{what}" for pool in ("CPU", "DISK") for what in ("GB", "OVERRIDE_NUM_BLOCKS")]


@pytest.fixture
def environment(monkeypatch):
    for name in [*NAMES, "DYN_KVBM_DISK_CACHE_DIR"]:
        monkeypatch.delenv(name, raising=False)

    def make(*values: str) -> None:
        for name, value in zip(NAMES, values, strict=False):
            monkeypatch.setenv(name, value)

    return make


def test_gb_are_decimal_and_shared_by_the_ranks(environment):
    environment("0.5", "", "3")
    budget = read_budget(2)
    assert budget == Budget(Pool(0.5, 0), Pool(3.0, 0), 2)
    assert budget.host_bytes(1000) == 250_000_000
    assert budget.disk_bytes(1000) == 1_500_000_000


def test_numbers_of_blocks_come_before_gb(environment):
    environment("4", " 100 ", "4", "0")
    budget = read_budget(1)
    assert budget.host.blocks == 100
    assert budget.disk_bytes(1) == 4_000_000_000
    assert 100 * 1024 <= budget.host_bytes(1000) <= 101 * 1024


@pytest.mark.parametrize(("size", "blocks"), [(1000, 3), (4096, 3000), (50_000, 1000)])
def test_so_many_blocks_fit_and_stay(size, blocks, tmp_path):
    budget = Budget(Pool(0, blocks), Pool(0, blocks), 1)
    stores = [HostStore(bytearray(budget.host_bytes(size)))]
    stores.append(DiskStore(tmp_path / "s", budget.disk_bytes(size), queue_bytes=1 << 30))
    for s in stores:
        assert all(s.put(key_of(i), bytes(size)) for i in range(blocks))
    assert stores[1].flush(60)
    assert [s.stats().entries for s in stores] == [blocks] * 2
    assert stores[1].close()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "are both 0 or not set"),
        (["0", "", "0.0"], "are both 0 or not set"),
        (["4GB"], "DYN_KVBM_CPU_CACHE_GB is '4GB'"),
        (["nan"], "is 'nan'"),
        (["-1"], "is '-1'"),
        (["1", "many"], "OVERRIDE_NUM_BLOCKS is 'many'"),
        (["1", "", "1,5"], "DYN_KVBM_DISK_CACHE_GB is '1,5'"),
    ],
)
def test_what_the_leader_would_take_for_nothing_is_refused(environment, values, words):
    environment(*values)
    with pytest.raises(ConfigError, match=words):
        read_budget(1)


def test_a_scratch_folder_of_ones_own(environment, monkeypatch):
    assert disk_root("tcp://127.0.0.1:56001") == "/tmp/kvtc-kvbm-56001"
    monkeypatch.setenv("DYN_KVBM_DISK_CACHE_DIR", "/nvme")
    assert disk_root("tcp://127.0.0.1:7") == "/nvme/kvtc-kvbm-7"


def test_the_reckoned_size_is_near_what_records_take():
    """All tokens exact: to the byte; coded: the artifact's word, and margins."""
    engine = Engine(case_seed())
    mover = open_coding(engine, exact="all")
    assert store(mover, engine, list(range(24)), list(range(24))) == []
    stats = mover.tier._store.host.stats()
    assert stats.used_bytes == 24 * mover.bytes_per_block
    mover.shutdown(5)
    artifact = make_artifact(engine.shape, groups=((0, 1), (1, 3)), seed=1)[2]
    token = engine.shape.bytes_per_token
    ratio = artifact.manifest.points[artifact.point_index("fine")].expected_ratio
    for tokens in (16, 512):
        mean = block_bytes(artifact, "fine", "sinks", 0, tokens, False)
        assert 1.1 < mean / (tokens * token / ratio) < 1.5 + 400 / tokens
        assert block_bytes(artifact, "fine", "sinks", 4, tokens, False) >= mean
        assert block_bytes(artifact, "fine", "sinks", 4, tokens, True) > mean
