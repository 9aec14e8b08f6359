"""This worker among the others of its namespace: what it holds is told and served, what they hold is known and pulled.

It can do without all of them: when NATS is away nothing new is learnt, and pulls that fail are computed.
"""

from __future__ import annotations

import importlib
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from typing import Any, NamedTuple

from dynamo_kvtc.adapters.connector import handoff
from dynamo_kvtc.adapters.connector.options import ConnectorOptions
from dynamo_kvtc.codec.artifact import Artifact
from dynamo_kvtc.codec.headers import Identity
from dynamo_kvtc.codec.profile import PROFILE_IDS
from dynamo_kvtc.errors import ConfigError, KvtcError
from dynamo_kvtc.events.follower import Follower
from dynamo_kvtc.events.nats import open_nats
from dynamo_kvtc.events.schema import Plane as PlaneAddress
from dynamo_kvtc.events.schema import new_worker
from dynamo_kvtc.store import MAX_RECORD_BYTES
from dynamo_kvtc.tier.identity import point_of
from dynamo_kvtc.tier.tier import Tier
from dynamo_kvtc.transfer.arriving import Expected
from dynamo_kvtc.transfer.nats import NatsPlane
from dynamo_kvtc.transfer.options import Peers
from dynamo_kvtc.transfer.pending import Arrival, Pull
from dynamo_kvtc.transfer.plane import PLANES, Plane
from dynamo_kvtc.transfer.pull import Puller, Wanted
from dynamo_kvtc.transfer.serve import Server
from dynamo_kvtc.transfer.tcp import TcpOptions, TcpPlane

_ASKERS = 4
_HEADER_BYTES = 4096
"""More than the header of any record."""

log = logging.getLogger(__name__)


class Remote(NamedTuple):
    """A record that others have: its size, and who."""

    size: int
    holders: tuple[str, ...]


class Cluster:
    """Thread-safe. Raises ConfigError, NatsError, MissingDependencyError, TransferError: all at start."""

    def __init__(self, options: ConnectorOptions, tier: Tier, artifact: Artifact) -> None:
        assert options.nats is not None
        self._options, self._tier = options, tier
        # What is said to be larger is no record of this cache: no room is made for it.
        self._most_record_bytes = min(MAX_RECORD_BYTES, tier.transcoder.raw_block_bytes + _HEADER_BYTES)
        self.worker = new_worker(socket.gethostname())
        self._ends: list[Callable[[], Any]] = []
        try:
            self._open(options, tier, artifact)
        except BaseException:
            self.close()
            raise

    def _open(self, options: ConnectorOptions, tier: Tier, artifact: Artifact) -> None:
        assert options.nats is not None
        model = tier.keys.identity
        peers = Peers(options.nats.namespace, model)
        self._pulls = f"kvtc.{options.nats.namespace}.{model}.pull"
        self.nats = open_nats(options.nats, f"kvtc {self.worker}")
        self._ends.append(self.nats.close)
        self.planes = [self._plane(name) for name in options.planes]
        self.server = Server(tier.records, peers, self.planes, options.serve)
        self._ends.append(lambda: self.server.close(1.0))
        sizes = self.nats.serve(handoff.subject_of(f"{self._pulls}.{self.worker}"), handoff.serve(tier.size))
        self._ends.append(lambda: sizes.close(1.0))
        addresses = [PlaneAddress(name, address) for name, address in self.server.addresses.items()]
        publisher = tier.announcer.start(
            self.nats, self.worker, tier.keys, artifact, tier.transcoder.block_tokens, addresses, options.events
        )
        self._ends.append(lambda: publisher.close(2.0))
        self.follower = Follower(self.nats, publisher.up, options=options.events)
        self._ends.append(lambda: self.follower.close(2.0))
        point = artifact.point_index(point_of(artifact, options.tier.point))
        identity = Identity(
            PROFILE_IDS[artifact.manifest.profile], point, artifact.fingerprint, artifact.rank,
            len(artifact.manifest.groups),
        )  # fmt: skip
        self.groups = identity.groups
        self.puller = Puller(
            self.planes, self._addresses, peers, Expected(identity, tier.transcoder.block_tokens), options.pull
        )
        self._ends.append(self.puller.close)
        self._askers = ThreadPoolExecutor(_ASKERS, "kvtc-handoff")
        self._ends.append(lambda: self._askers.shutdown(wait=False, cancel_futures=True))
        tier.announcer.pulled_bytes = lambda: self.puller.stats().bytes
        tier.announcer.served_bytes = lambda: self.server.stats().sent_bytes
        log.info("kvtc worker %s in namespace %s serves at %s", self.worker, peers.namespace, self.server.addresses)

    def _plane(self, name: str) -> Plane:
        if name == "tcp":
            made: Plane = TcpPlane(TcpOptions(**self._options.tcp))
        elif name == "nats":
            made = NatsPlane(self.nats, f"{self._pulls}.{self.worker}")
        else:
            made = importlib.import_module(PLANES[name]).Plane()
        self._ends.append(made.close)
        return made

    def _addresses(self, worker: str) -> Mapping[str, str]:
        up = self.follower.workers().get(worker)
        return {} if up is None else {plane.name: plane.address for plane in up.planes}

    def longest_prefix(self, keys: Sequence[bytes]) -> list[Remote]:
        """Of the longest prefix of keys that others hold. Of a record that is told of in two sizes, the one that more
        holders have."""
        out = []
        for holders in self.follower.index.longest_prefix(keys):
            by_size: dict[int, list[str]] = {}
            for holder in holders:
                if holder.size <= self._most_record_bytes:
                    by_size.setdefault(holder.size, []).append(holder.worker)
            if not by_size:
                break
            size = max(by_size, key=lambda s: len(by_size[s]))
            out.append(Remote(size, tuple(by_size[size])))
        return out

    def ask_holder(self, worker: str, keys: Sequence[bytes], told: Callable[[list[Remote]], None]) -> None:
        """What that worker has, or will have in a moment, of a prefix of keys; told once, within handoff_seconds."""
        deadline = time.monotonic() + self._options.handoff_seconds

        def run() -> None:
            found: list[Remote] = []
            try:
                while worker not in self.follower.workers() and time.monotonic() < deadline:
                    time.sleep(0.01)
                subject = handoff.subject_of(f"{self._pulls}.{worker}")
                sizes = handoff.ask(self.nats, subject, keys, deadline)
                found = [Remote(s, (worker,)) for s in takewhile(lambda s: s <= self._most_record_bytes, sizes)]
            except KvtcError as exc:
                log.warning("worker %s was not asked what it holds: %s", worker, exc)
            finally:
                told(found)

        try:
            self._askers.submit(run)
        except RuntimeError:  # closed
            told([])

    def pull(
        self, wanted: Sequence[Wanted], into: Sequence[memoryview], on_arrival: Callable[[Arrival], None]
    ) -> Pull | None:  # fmt: skip
        """None if it is refused."""
        # Without loads by layer group nothing begins before all is here.
        whole = self._tier.by_group is None
        try:
            return self.puller.pull(wanted, self._options.pull_seconds, into, on_arrival, whole)
        except ConfigError as exc:
            log.warning("a pull was refused: %s", exc)
            return None

    @property
    def most_bytes(self) -> int:
        """Of one pull."""
        return self._options.pull.pull_bytes

    def close(self) -> None:
        while self._ends:
            end = self._ends.pop()
            try:
                end()
            except Exception:
                log.exception("closing failed")


def open_cluster(options: ConnectorOptions, tier: Tier, artifact: Artifact) -> Cluster | None:
    """None where there is to be none."""
    return None if options.nats is None else Cluster(options, tier, artifact)
