"""What the connector can be told, and what it refuses."""

from __future__ import annotations

import pytest

from dynamo_kvtc.adapters.connector.options import parse_connector
from dynamo_kvtc.errors import ConfigError

GIVEN = {"artifact": "a.safetensors", "host_gib": 1}


def test_without_nats_there_is_no_cluster():
    options = parse_connector(GIVEN)
    assert options.nats is None
    assert options.load == "async"
    assert options.tier.window == 0


def test_all_of_it():
    options = parse_connector(
        {
            **GIVEN, "load": "layerwise", "nats": {"servers": "nats://a:1,nats://b:2", "namespace": "n"},
            "planes": ["nats"], "pull_seconds": 2, "handoff_seconds": 0.5, "load_seconds": 3, "in_flight_mib": 4,
            "leased_mib": 8, "index_mib": 2, "heartbeat_ttl_seconds": 1, "trace": "t", "disk_gib": 1, "disk_path": "d",
        }
    )  # fmt: skip
    assert options.nats is not None
    assert options.nats.servers == ("nats://a:1", "nats://b:2")
    assert options.planes == ("nats",)
    assert options.pull.in_flight_bytes == 4 << 20
    assert options.pull.ask_bytes == 4 << 20
    assert options.serve.leased_bytes == 8 << 20
    assert options.events.index_mib == 2
    assert (options.pull_seconds, options.handoff_seconds, options.load_seconds) == (2, 0.5, 3)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"pull_second": 1}, "pull_second"),
        ({"window": 128}, "window"),
        ({"load": "eager"}, "'eager'"),
        ({"trace": 3}, "trace"),
        ({"host_gib": "1"}, "host_gib"),
        ({"planes": ["tcp"]}, "no nats"),
        ({"pull_seconds": 1}, "no nats"),
        ({"nats": "nats://a:1"}, "nats"),
        ({"nats": {"server": "a"}}, "server"),
        ({"nats": {}, "planes": ["udp"]}, "udp"),
        ({"nats": {}, "planes": []}, "planes"),
        ({"nats": {}, "planes": ["tcp", "tcp"]}, "planes"),
        ({"nats": {}, "tcp": {"hosts": "a"}}, "hosts"),
        ({"nats": {}, "planes": ["nats"], "tcp": {}}, "planes has no tcp"),
        ({"nats": {}, "pull_seconds": 0}, "pull_seconds"),
        ({"nats": {}, "pull_seconds": True}, "pull_seconds"),
        ({"nats": {}, "in_flight_mib": 1}, "in_flight_mib"),
        ({"nats": {}, "heartbeat_ttl_seconds": "6"}, "heartbeat_ttl_seconds"),
        ({"load_seconds": float("nan")}, "load_seconds"),
    ],
)
def test_what_cannot_be_is_named(more, told):
    with pytest.raises(ConfigError, match="kv_connector_extra_config") as caught:
        parse_connector({**GIVEN, **more})
    assert told in str(caught.value)
