"""The other process of `kvtc bench pull`: holds records, and hands out the same bytes over a plain socket."""

from __future__ import annotations

import json
import random
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from dynamo_kvtc.codec.headers import Identity
from dynamo_kvtc.codec.record import RecordHeader, build_record
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.store.host import HostStore, make_arena
from dynamo_kvtc.transfer.options import Peers
from dynamo_kvtc.transfer.plane import PLANES, Plane
from dynamo_kvtc.transfer.serve import Server

TOKENS = 16
PEERS = Peers("bench", "bench")
SAYS = "kvtc-bench "
"""What the holder's line begins with: libraries write to standard output, too."""
_CHUNK = 1 << 20


def identity(groups: int) -> Identity:
    return Identity(profile=2, point=0, artifact=1, rank=0, groups=groups)


def records_of(seed: int, count: int, record_bytes: int, groups: int) -> dict[bytes, bytes]:
    """Sound records of random bytes; layer groups of the same size, near enough."""
    rng, who = random.Random(seed), identity(groups)
    out = {}
    for i in range(count):
        positions = np.arange(TOKENS * i, TOKENS * (i + 1), dtype=np.int64)
        header = RecordHeader(who.profile, who.point, who.artifact, who.rank, positions, np.zeros(TOKENS, np.bool_))
        size = max(1, (record_bytes - 36 - 8 * groups) // groups)
        out[rng.randbytes(32)] = build_record(header, [rng.randbytes(size) for _ in range(groups)])
    return out


def make_plane(name: str, host: str, nats_url: str | None, worker: str) -> Plane:
    """Raises ConfigError, MissingDependencyError."""
    if name not in PLANES:
        raise ConfigError(f"plane {name!r} is unknown; known: {', '.join(PLANES)}")
    module: Any = import_module(PLANES[name])
    if name == "tcp":
        return module.TcpPlane(module.TcpOptions(host=host))
    if name == "nats":
        from dynamo_kvtc.events.nats import open_nats
        from dynamo_kvtc.events.options import NatsOptions

        assert nats_url is not None
        return module.NatsPlane(open_nats(NatsOptions(servers=(nats_url,))), f"kvtc.bench.pull.{worker}", True)
    return module.Plane()


def serve_plain(host: str, payload: bytes) -> str:
    """A byte from the other side: all of it to the other side."""
    listener = socket.create_server((host, 0))

    def run() -> None:
        while True:
            made, _ = listener.accept()
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with made:
                while made.recv(1):
                    made.sendall(payload)

    threading.Thread(target=run, daemon=True).start()
    return f"{host}:{listener.getsockname()[1]}"


class Plain:
    """The same bytes in one go: what a plane is compared with."""

    def __init__(self, address: str, nbytes: int) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), 30)
        self.into = bytearray(nbytes)

    def copy(self) -> None:
        self._socket.sendall(b"\1")
        left = memoryview(self.into)
        while left:
            got = self._socket.recv_into(left, min(len(left), _CHUNK))
            if not got:
                raise ConfigError("the holder of the plain copy has gone")
            left = left[got:]


def hold(case: Mapping[str, Any], planes: Sequence[str]) -> None:
    """Until standard input ends."""
    records = records_of(case["seed"], case["count"], case["record_bytes"], case["groups"])
    store = HostStore(make_arena(sum(len(r) + 512 for r in records.values()) + (4 << 20)))
    if not all(store.put_many(records.items())):
        raise ConfigError("the records do not fit the store")
    made = [make_plane(name, case["host"], case["nats_url"], "holder") for name in planes]
    server = Server(store, PEERS, made)
    told = {"addresses": dict(server.addresses), "plain": serve_plain(case["host"], b"".join(records.values()))}
    print(SAYS + json.dumps(told), flush=True)
    sys.stdin.read()
    for plane in made:
        plane.close()


if __name__ == "__main__":
    _case = json.loads(sys.argv[1])
    hold(_case, _case["planes"])
