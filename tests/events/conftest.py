from __future__ import annotations

import pytest

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
