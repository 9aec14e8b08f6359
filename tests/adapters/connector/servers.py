from __future__ import annotations

import pytest

from tests.events.servers import Server


@pytest.fixture
def server(tmp_path):
    """A nats-server of the test's own."""
    pytest.importorskip("nats")
    server = Server(tmp_path).start()
    yield server
    server.stop()
