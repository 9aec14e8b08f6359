from __future__ import annotations

import random

import pytest

from tests.builders import case_seed
from tests.events.servers import Server
from tests.transfer.holders import EXPECTED, PEERS, Holder, Puller, plane_of
from tests.transfer.records import make_records


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory):
    """For tests that leave it as it is."""
    pytest.importorskip("nats")
    server = Server(tmp_path_factory.mktemp("nats")).start()
    yield server
    server.stop()


@pytest.fixture
def rng():
    return random.Random(case_seed())


@pytest.fixture(params=[False, True], ids=["groups", "records"])
def whole(request, monkeypatch):
    """How all pulls of a test are: layer group by layer group, or record by record."""
    pull = Puller.pull
    monkeypatch.setattr(Puller, "pull", lambda *what, **how: pull(*what, whole=request.param, **how))
    return request.param


class Field:
    """Holders in processes of their own, and askers in this one."""

    def __init__(self, kind, where):
        self.kind, self.where = kind, where
        self.seed, self.count = case_seed(), 0
        self.holders, self.planes, self.pullers = {}, [], []
        self.addresses = {}

    def records(self, count, least=500, most=9000):
        self.made = (self.seed, count, least, most)
        return make_records(random.Random(self.seed), count, least, most)

    def holder(self, name, **how):
        self.holders[name] = Holder(self.kind, self.where, f"{name}{self.seed}", self.made, **how)
        self.addresses[name] = self.holders[name].addresses
        return self.holders[name]

    def puller(self, options=None):
        self.planes.append(plane_of(self.kind, self.where, f"asker{self.seed}"))
        self.pullers.append(Puller(self.planes[-1:], lambda who: self.addresses.get(who, {}), PEERS, EXPECTED, options))
        return self.pullers[-1]

    def close(self):
        for puller in self.pullers:
            puller.close()
        for plane in self.planes:
            plane.close()
        for holder in self.holders.values():
            holder.end()


@pytest.fixture(params=["tcp", "nats", "nixl"])
def field(request):
    if request.param == "nixl":
        pytest.importorskip("nixl_cu12")
    made = Field(request.param, request.getfixturevalue("nats_server").url if request.param == "nats" else "")
    yield made
    made.close()
