"""The stores' bench proves before it times, and skips nothing in silence."""

from __future__ import annotations

import pytest

from dynamo_kvtc.bench.store import CANDIDATES, measure, measure_host
from dynamo_kvtc.bench.store_report import markdown, table
from dynamo_kvtc.errors import ConfigError, MissingDependencyError


@pytest.mark.parametrize("name", CANDIDATES)
def test_every_engine_gives_its_records_back(name, tmp_path):
    try:
        row = measure(name, 8_000_000, tmp_path)
    except MissingDependencyError as exc:
        pytest.skip(str(exc))
    assert min(row.fill, row.churn, row.get, row.get_cold, row.space) > 0
    assert row.engine in markdown([row])
    assert table([row]).row_count == 1
    assert not list(tmp_path.iterdir())


def test_an_engine_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="'mongo'"):
        measure("mongo", 1000, tmp_path)


def test_the_host():
    told = measure_host(4 << 20, records=300)
    assert told["put_microseconds"] > 0
    assert 0.9 < told["record_bytes_over_budget"] <= 1
