"""The worker's thread over real sockets, against a leader played by the test."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from dynamo_kvtc.adapters.kvbm import protocol
from dynamo_kvtc.adapters.kvbm._compat import Endpoints
from dynamo_kvtc.adapters.kvbm.mover import MoverContext
from dynamo_kvtc.adapters.kvbm.options import Options
from dynamo_kvtc.adapters.kvbm.protocol import Message, Pool, Transfer
from dynamo_kvtc.adapters.kvbm.step import Operation, Step
from dynamo_kvtc.adapters.kvbm.worker import KvbmWorker
from dynamo_kvtc.errors import ConfigError, EngineError, EngineProtocolError, EngineTimeoutError
from tests.adapters.kvbm.played import encode_message, encode_transfer
from tests.adapters.kvbm.raw_mover import RawMover
from tests.waiting import until

zmq = pytest.importorskip("zmq")

WAIT_SECONDS = 20


class PlayedLeader:
    """Binds where a leader binds; ``say`` and ``answers`` are frames."""

    def __init__(self) -> None:
        self.context = zmq.Context()
        self.publish = self.context.socket(zmq.PUB)
        self.pull = self.context.socket(zmq.PULL)
        self.pull.setsockopt(zmq.RCVTIMEO, WAIT_SECONDS * 1000)
        ports = [s.bind_to_random_port("tcp://127.0.0.1") for s in (self.publish, self.pull)]
        self.endpoints = Endpoints(*(f"tcp://127.0.0.1:{port}" for port in ports))
        self.next_id = 100

    def say(self, name: str, payload: bytes = b"") -> int:
        self.next_id += 1
        self.publish.send_multipart(encode_message(Message(self.next_id, name, payload)))
        return self.next_id

    def answer(self) -> int:
        return int.from_bytes(self.pull.recv_multipart()[0], "big")

    def handshake(self, host: int = 8, disk: int = 8) -> None:
        # Subscriptions take their time: the leader, too, repeats itself.
        end = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < end:
            self.say("worker_metadata")
            if self.pull.poll(100):
                break
        while self.pull.poll(100):
            self.pull.recv_multipart()
        self.say("leader_metadata", protocol.encode_numbers(host, disk))
        self.answer()
        self.say("ping")
        self.answer()

    def close(self) -> None:
        self.context.destroy(linger=0)


class Setting:
    def __init__(self, leader: PlayedLeader, mover_options=None, **options) -> None:
        self.leader = leader
        self.pages = torch.arange(64 * 3).reshape(64, 3)
        self.mover = RawMover(MoverContext({"l": self.pages}, 64, 16, 0, 1, mover_options or {}))
        self.worker = KvbmWorker(leader.endpoints, 64, self.mover, Options("tests", **options))
        self.worker.start()

    def step(self, uuid: str, blocks: list[int], load: bool = False) -> None:
        operation = Operation("r", uuid, load, {b: 16 * i for i, b in enumerate(blocks)})
        self.worker.begin_step(Step((operation,), loading={"r": tuple(blocks)} if load else {}))
        self.worker.release_loads()
        self.worker.release_stores()

    def store(self, uuid: str = "s") -> int:
        transfer = Transfer(Pool.DEVICE, Pool.HOST, ((3, 0), (4, 1)), "r", uuid, scheduled=True)
        message_id = self.leader.say("transfer_blocks", encode_transfer(transfer))
        self.step(uuid, [3, 4])
        return message_id

    def load(self, uuid: str = "l") -> int:
        transfer = Transfer(Pool.HOST, Pool.DEVICE, ((0, 13), (1, 14)), "r", uuid)
        message_id = self.leader.say("transfer_blocks", encode_transfer(transfer))
        self.step(uuid, [13, 14], load=True)
        return message_id


@pytest.fixture
def leader():
    played = PlayedLeader()
    yield played
    played.close()


@pytest.fixture
def setting(leader):
    made = []

    def make(mover_options=None, **options):
        made.append(Setting(leader, mover_options, **options))
        return made[-1]

    yield make
    for s in made:
        s.worker.shutdown()
    assert not [t for t in threading.enumerate() if t.name == "kvbm-worker"]


def test_out_and_back(leader, setting):
    s = setting()
    leader.handshake()
    s.worker.wait_ready(WAIT_SECONDS)
    assert s.mover.capacity == (8, 8)
    assert s.store() == leader.answer()
    before = s.pages[[3, 4]].clone()
    s.pages.fill_(-1)
    assert s.load() == leader.answer()
    until(lambda: s.worker.take_finished() == (set(), {"r"}))
    assert s.worker.take_load_errors() == set()
    assert torch.equal(s.pages[[13, 14]], before)
    assert int((s.pages == -1).sum()) == 62 * 3


def test_no_leader(leader, setting):
    s = setting()
    with pytest.raises(EngineTimeoutError, match="DYN_KVBM_LEADER_ZMQ_HOST"):
        s.worker.wait_ready(0.2)


def test_ready_is_who_has_answered(leader, setting, monkeypatch):
    """Who waited goes on to a call that holds the GIL until the leader has the last answer: a thread that still has to
    send it never would."""
    s, may_send = setting(), threading.Event()
    do = s.worker._do

    def held(action, answers):
        if getattr(action, "frames", [b""])[0] == leader.next_id.to_bytes(8, "big") and pinged.is_set():
            asked.set()
            assert may_send.wait(WAIT_SECONDS)
        do(action, answers)

    pinged, asked = threading.Event(), threading.Event()
    monkeypatch.setattr(s.worker, "_do", held)
    say = leader.say

    def mark(name, payload=b""):
        if name == "ping":
            pinged.set()
        return say(name, payload)

    monkeypatch.setattr(leader, "say", mark)
    shaking = threading.Thread(target=leader.handshake)
    shaking.start()
    assert asked.wait(WAIT_SECONDS)
    with pytest.raises(EngineTimeoutError):
        s.worker.wait_ready(0.3)
    may_send.set()
    s.worker.wait_ready(WAIT_SECONDS)
    shaking.join()


@pytest.mark.parametrize("payload", [b"{}", b"\x00" * 20])
def test_nonsense_stops_the_worker_and_the_engine_hears_of_it(leader, setting, payload):
    s = setting()
    leader.handshake()
    leader.say("transfer_blocks", payload)
    with pytest.raises(EngineProtocolError, match="transfer_blocks"):
        until(lambda: s.worker.take_finished() and False)
    with pytest.raises(EngineProtocolError):
        s.worker.begin_step(Step())


def test_a_mover_that_raises_fails_its_move_only(leader, setting, monkeypatch):
    s = setting()
    leader.handshake()
    assert s.store() == leader.answer()

    def refuse(request, done):
        raise RuntimeError("no")

    monkeypatch.setattr(s.mover, "load", refuse)
    assert s.load() == leader.answer()
    until(lambda: s.worker.take_finished() == (set(), {"r"}))
    assert s.worker.take_load_errors() == {13, 14}
    monkeypatch.undo()
    assert s.load("l2") == leader.answer()
    until(lambda: s.worker.take_finished() == (set(), {"r"}))
    assert s.worker.take_load_errors() == set()


def test_a_mover_whose_capacity_call_raises_stops_the_worker(leader, setting, monkeypatch):
    s = setting()

    def refuse(host, disk):
        raise RuntimeError("disk is gone")

    monkeypatch.setattr(s.mover, "set_capacity", refuse)
    leader.say("worker_metadata")
    until(lambda: leader.pull.poll(50) or leader.say("worker_metadata") < 0)
    leader.say("leader_metadata", protocol.encode_numbers(1, 1))
    with pytest.raises(EngineError, match="disk is gone"):
        s.worker.wait_ready(WAIT_SECONDS)


def test_shutdown_answers_what_is_open(leader, setting):
    s = setting({"never_end": True})
    leader.handshake()
    message_id = s.store()
    until(lambda: s.mover.counts["asked_stores"])
    s.worker.shutdown()
    assert leader.answer() == message_id
    s.worker.shutdown()


def test_preemption_waits_until_the_pages_are_read(leader, setting):
    s = setting({"delay_seconds": 0.3})
    leader.handshake()
    s.store()
    until(lambda: s.mover.counts["asked_stores"])
    begun = time.monotonic()
    s.worker.drop_stores({"r"})
    assert s.mover.counts["stored"] == 2
    assert time.monotonic() - begun < WAIT_SECONDS
    assert s.worker.open == 0


def test_preemption_does_not_wait_for_ever(leader, setting):
    s = setting({"never_end": True}, transfer_seconds=0.3)
    leader.handshake()
    message_id = s.store()
    until(lambda: s.mover.counts["asked_stores"])
    s.worker.drop_stores({"r"})
    assert leader.answer() == message_id
    assert s.load() == leader.answer()
    until(lambda: s.worker.take_finished() == (set(), {"r"}))
    assert s.worker.take_load_errors() == {13, 14}


@pytest.mark.parametrize("size", [0, -1, 1.5, True, 1 << 63])
def test_bytes_per_block_must_be_a_size(leader, size):
    class Mover:
        bytes_per_block = size

    with pytest.raises(ConfigError, match="bytes_per_block"):
        KvbmWorker(leader.endpoints, 4, Mover(), Options("tests"))
