from __future__ import annotations

import pytest

from dynamo_kvtc.events.nats import open_nats
from dynamo_kvtc.events.options import NatsOptions
from tests.events.servers import Server


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory):
    """For tests that leave it as it is: each has a namespace of its own."""
    pytest.importorskip("nats")
    server = Server(tmp_path_factory.mktemp("nats")).start()
    yield server
    server.stop()


@pytest.fixture
def own_server(tmp_path):
    """For tests that kill it."""
    pytest.importorskip("nats")
    server = Server(tmp_path).start()
    yield server
    server.stop()


@pytest.fixture
def connect():
    made = []

    def one(server, **more):
        made.append(open_nats(NatsOptions(servers=(server.url,), **{"connect_seconds": 5.0} | more)))
        return made[-1]

    yield one
    for nats in made:
        nats.close()
