"""A worker's snapshot, read from one that is honest, large, slow or endless; on a clock of the test's own."""

from __future__ import annotations

import random

import pytest

from dynamo_kvtc.errors import EventError, NatsTimeoutError
from dynamo_kvtc.events.holdings import SnapshotServer, read_snapshot
from dynamo_kvtc.events.inbox import Message
from dynamo_kvtc.events.index import Index
from tests.builders import case_seed
from tests.events.test_schema import up


class Holder:
    """Answers each question after that many seconds, or not at all."""

    def __init__(self, entries: int, page: int, seconds: float) -> None:
        rng = random.Random(case_seed())
        held = [(rng.randbytes(32), "disk", 5) for _ in range(entries)]
        self.server = SnapshotServer(up(), lambda: held, lambda: 7, page)
        self.seconds, self.now, self.asked = seconds, 0.0, 0

    def ask(self, question: bytes, seconds: float) -> bytes:
        assert seconds > 0
        self.asked += 1
        self.now += min(self.seconds, seconds)
        if self.seconds > seconds:
            raise NatsTimeoutError("late")
        return self.server.answer(Message("", question))

    def read(self, index: Index) -> int:
        return read_snapshot(self.ask, up().worker, up().epoch, index, "w~", lambda: self.now)


@pytest.mark.parametrize(("entries", "page", "seconds"), [(100, 4096, 1.9), (1000, 64, 0.01), (60_000, 4096, 0.9)])
def test_a_snapshot_that_comes_at_a_sane_pace_is_read_whole(entries, page, seconds):
    index, holder = Index(16 << 20), Holder(entries, page, seconds)
    assert holder.read(index) == 7
    assert index.entries_of("w~") > 0.99 * entries  # of one bucket the oldest may have gone


@pytest.mark.parametrize(("page", "seconds"), [(64, 1.5), (4096, 1.9), (4096, 1000.0), (64, 0.1)])
def test_a_slow_holder_is_given_up_soon(page, seconds):
    holder = Holder(150_000, page, seconds)
    with pytest.raises((EventError, NatsTimeoutError)):
        holder.read(Index(16 << 20))
    assert holder.now <= 15


def test_no_pace_makes_it_last_for_minutes():
    holder = Holder(400_000, 4096, 0.99)
    with pytest.raises(EventError, match="too slowly"):
        holder.read(Index(64 << 20))
    assert 55 < holder.now <= 62
