"""`kvtc bench events`, small."""

from __future__ import annotations

import pytest

from dynamo_kvtc.bench.events import measure_events, measure_index
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.events.server import LocalServer


def test_the_index_is_measured_against_a_dict():
    told = measure_index(5000)
    assert (told["entries"], told["lost"]) == (5000, 0)
    assert 50 < told["index_bytes"] < 60 < told["dict_bytes"]
    assert set(told["lookup_us_per_key"]) == {1, 16, 256, 1024}
    with pytest.raises(ConfigError, match="blocks is 5"):
        measure_index(5)


def test_events_are_measured_between_two_processes():
    pytest.importorskip("nats")
    with LocalServer() as server:
        told = measure_events(server.url, 3000, 5)
    assert told["events"] == 3000
    assert 0 < told["visible_ms_median"] <= told["visible_ms_p95"]
