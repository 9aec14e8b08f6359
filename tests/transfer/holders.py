"""Holders and askers in processes of their own, some of them faulty."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time

from dynamo_kvtc.errors import PeerGoneError
from dynamo_kvtc.transfer.options import PullOptions, ServeOptions
from dynamo_kvtc.transfer.plane import Plane, Sender
from dynamo_kvtc.transfer.pull import Puller
from dynamo_kvtc.transfer.serve import Server
from dynamo_kvtc.transfer.tcp import TcpPlane
from tests.transfer.records import EXPECTED, PEERS, make_records, store_of, wanted_of


def _context(kind: str):
    """Importing all that a holder needs takes seconds, and what this process has running a child does not touch; but
    UCX does not outlive a fork, nor does an agent of NIXL that an earlier test has left to the collector."""
    return multiprocessing.get_context("spawn" if kind == "nixl" or "nixl_cu12" in sys.modules else "fork")


class Faulty(Sender):
    """Frames pass, but ... frame_bytes: small, so that there are many."""

    def __init__(self, inner: Sender, fault: str, rng: random.Random, seconds: float, frame_bytes: int) -> None:
        self.inner, self.fault, self.rng, self.seconds = inner, fault, rng, seconds
        self.frame_bytes, self.kept, self.count = frame_bytes, None, 0

    def send(self, frame, deadline):
        if self.seconds:
            time.sleep(self.seconds)
        told = bytearray(b"".join(frame))
        self.count += 1
        if self.fault == "corrupt" and self.rng.random() < 0.01:
            told[self.rng.randrange(len(told))] ^= 1 << self.rng.randrange(8)
        elif self.fault == "less" and self.rng.random() < 0.02:
            return
        elif self.fault == "truncated" and self.rng.random() < 0.02:
            del told[-1]
        elif self.fault == "closing" and self.count == 40:
            raise PeerGoneError("a holder that hangs up")
        elif self.fault in ("twice", "more"):
            for _ in range(1 if self.fault == "twice" else 40):
                self.inner.send([told], deadline)
        elif self.fault == "swapped":
            if self.kept is None:
                self.kept = told
                return
            self.inner.send([told], deadline)
            told, self.kept = self.kept, None
        self.inner.send([told], deadline)

    def end(self, deadline):
        if self.kept is not None:
            self.inner.send([self.kept], deadline)


def faulty(plane: Plane, fault: str, seconds: float, seed: int, frame_bytes: int) -> Plane:
    serve, rng = plane.serve, random.Random(seed)

    def served(answer):
        def answered(frame, sender):
            made = Faulty(sender, fault, rng, seconds, frame_bytes)
            answer(frame, made)
            made.end(time.monotonic() + 5)

        return serve(answered)

    plane.serve = served  # type: ignore[method-assign]
    return plane


def plane_of(kind: str, where: str, name: str) -> Plane:
    """where: the NATS server's address."""
    if kind == "tcp":
        return TcpPlane()
    if kind == "nixl":
        from dynamo_kvtc.transfer.nixl import NixlPlane

        return NixlPlane()
    from dynamo_kvtc.events.nats import open_nats
    from dynamo_kvtc.events.options import NatsOptions
    from dynamo_kvtc.transfer.nats import NatsPlane

    return NatsPlane(open_nats(NatsOptions(servers=(where,))), f"kvtc.test.pull.{name}", owned=True)


def _hold(pipe, kind, where, name, made, fault, seconds, frame_bytes, options):
    records = make_records(random.Random(made[0]), *made[1:])
    plane = faulty(plane_of(kind, where, name), fault, seconds, made[0], frame_bytes)
    server = Server(store_of(records), PEERS, [plane], options)
    pipe.send(server.addresses)
    while True:
        try:
            pipe.recv()
        except EOFError:
            os._exit(0)
        pipe.send(server.stats())


def _ask(pipe, kind, where, made, addresses):
    records = make_records(random.Random(made[0]), *made[1:])
    puller = Puller([plane_of(kind, where, "asker")], lambda _: addresses, PEERS, EXPECTED)
    pull = puller.pull(wanted_of(records, "a"), 60)
    next(pull.arrivals())
    pipe.send("begun")
    pull.result()
    pipe.send("ended")


class Process:
    def __init__(self, target, kind, *args):
        context = _context(kind)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, kind, *args), daemon=True)
        self.process.start()
        theirs.close()

    def hear(self, timeout: float = 30.0):
        assert self.pipe.poll(timeout), "the other process said nothing in time"
        return self.pipe.recv()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join(10)
        assert not self.process.is_alive()


class Holder(Process):
    """Of ``make_records(Random(seed), count, least, most)``."""

    def __init__(
        self, kind: str, where: str, name: str, made: tuple, fault: str = "", seconds: float = 0.0,
        frame_bytes: int = 4096, options: ServeOptions | None = None,
    ) -> None:  # fmt: skip
        super().__init__(_hold, kind, where, name, made, fault, seconds, frame_bytes, options)
        self.addresses = self.hear(120)

    def stats(self):
        self.pipe.send("stats")
        return self.hear(5)


class Asker(Process):
    def __init__(self, kind: str, where: str, made: tuple, addresses) -> None:
        super().__init__(_ask, kind, where, made, addresses)
        assert self.hear(120) == "begun"


STOP, KILL = signal.SIGSTOP, signal.SIGKILL
PATIENT = PullOptions(connect_seconds=5.0, silence_seconds=5.0)
"""For a machine that does other things, too."""
