"""From a prefill worker to a decode worker: what a request may say, and what is asked and answered."""

from __future__ import annotations

import random
import struct
import time
from types import SimpleNamespace

import pytest

from dynamo_kvtc.adapters.connector import handoff, plugin
from dynamo_kvtc.adapters.connector.params import Wish, params_of, wish_of
from dynamo_kvtc.errors import NatsTimeoutError, TransferProtocolError
from tests.builders import case_seed


def test_a_hand_off_is_understood_by_the_other_side():
    said = params_of("host-12ab", 7, "engine")
    assert said["do_remote_prefill"] is True
    assert said["do_remote_decode"] is False
    assert wish_of(said, "r") == Wish(worker="host-12ab", blocks=7)


@pytest.mark.parametrize(
    ("params", "wish"),
    [
        (None, Wish()),
        ({}, Wish()),
        ({"kvtc": "off"}, Wish(off=True)),
        ({"kvtc": "never"}, Wish(off=True)),
        ({"kvtc": 1, "do_remote_decode": True}, Wish(off=True)),
        ({"do_remote_decode": True}, Wish(handed_on=True)),
        ({"do_remote_decode": "yes"}, Wish()),
        ({"do_remote_prefill": True}, Wish()),
        ({"do_remote_prefill": True, "kvtc_worker": "a.>", "kvtc_blocks": 1}, Wish()),
        ({"do_remote_prefill": True, "kvtc_worker": "a" * 65, "kvtc_blocks": 1}, Wish()),
        ({"do_remote_prefill": True, "kvtc_worker": "a", "kvtc_blocks": True}, Wish()),
        ({"do_remote_prefill": True, "kvtc_worker": "a", "kvtc_blocks": 1 << 30}, Wish()),
        ({"do_remote_prefill": True, "kvtc_worker": ["a"], "kvtc_blocks": 1}, Wish()),
    ],
)
def test_what_a_request_may_say(params, wish):
    assert wish_of(params, "r") == wish


class Holder:
    """Answers as a worker whose records are coded one after another."""

    def __init__(self, sizes, failures=0):
        self.sizes, self.failures, self.asked = sizes, failures, 0

    def request(self, subject, question, timeout):
        assert subject == "kvtc.n.m.pull.w.sizes"
        self.asked += 1
        if self.failures:
            self.failures -= 1
            raise NatsTimeoutError("on purpose")
        coded = self.asked
        known = {key: (size if i < coded else 0 if size else None) for i, (key, size) in enumerate(self.sizes.items())}
        return SimpleNamespace(data=handoff.answer(question, known.get))


def test_a_prefix_is_waited_for_while_it_is_coded():
    rng = random.Random(case_seed())
    keys = [rng.randbytes(32) for _ in range(6)]
    sizes = {key: rng.randrange(100, 10_000) for key in keys[:4]} | {keys[4]: None}
    holder = Holder(sizes, failures=1)
    got = handoff.ask(holder, handoff.subject_of("kvtc.n.m.pull.w"), keys, time.monotonic() + 20)
    assert got == [sizes[key] for key in keys[:4]]
    assert holder.asked >= 4


def test_at_the_deadline_what_is_coded_is_taken():
    rng = random.Random(case_seed())
    keys = [rng.randbytes(32) for _ in range(3)]

    class Slow(Holder):
        def request(self, subject, question, timeout):
            return SimpleNamespace(data=b"\1" + struct.pack("<3I", 500, handoff.CODING, 600))

    began = time.monotonic()
    assert handoff.ask(Slow({}), "s", keys, began + 0.2) == [500]
    assert time.monotonic() - began < 10
    assert handoff.ask(Slow({}), "s", [], began + 0.2) == []


def test_what_comes_after_a_gap_is_not_waited_for():
    class Gap(Holder):
        def request(self, subject, question, timeout):
            self.asked += 1
            return SimpleNamespace(data=b"\1" + struct.pack("<3I", 500, 0, handoff.CODING))

    holder = Gap({})
    assert handoff.ask(holder, "s", [bytes(32)] * 3, time.monotonic() + 20) == [500]
    assert holder.asked == 1


@pytest.mark.parametrize("question", [b"", b"\1", b"\2" + bytes(32), b"\1" + bytes(31), b"\1" + bytes(32 * 8193)])
def test_a_question_that_is_none(question):
    with pytest.raises(TransferProtocolError):
        handoff.answer(question, lambda key: 1)


@pytest.mark.parametrize(
    "told", [b"", b"\1", b"\2" + bytes(8), b"\1" + bytes(12), b"\1" + struct.pack("<2I", 5, 1 << 30)]
)
def test_an_answer_that_is_none(told):
    with pytest.raises(TransferProtocolError):
        handoff.read(told, 2)


def test_dynamo_learns_the_protocol_and_its_absence_is_no_error(monkeypatch):
    plugin.register()

    class Nixl:
        pass

    known = {"NixlConnector": Nixl}
    module = SimpleNamespace(NixlConnectorProtocol=Nixl, KV_CONNECTOR_PROTOCOLS=known)
    monkeypatch.setattr(plugin.importlib, "import_module", lambda name: module)
    plugin.register()
    plugin.register()
    assert issubclass(known["KvtcConnector"], Nixl)
    monkeypatch.setattr(plugin.importlib, "import_module", lambda name: SimpleNamespace())
    plugin.register()
