"""What the scheduler orders and the worker does, in the order in which engines call them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dynamo_kvtc.adapters.connector.loads import Load, LoadOrder, Trace
from dynamo_kvtc.adapters.connector.node import Node
from dynamo_kvtc.adapters.connector.options import parse_connector
from dynamo_kvtc.adapters.connector.scheduler import Scheduler
from dynamo_kvtc.adapters.connector.worker import Worker
from dynamo_kvtc.events.index import Holder
from dynamo_kvtc.tier.estimate import PROBE_EVERY, Estimate
from dynamo_kvtc.tier.metrics import TierMetrics
from dynamo_kvtc.tier.tier import Tier
from dynamo_kvtc.tier.transcode import Block


class Stores:
    """As much of a tier as stores need: it keeps what it is given, and the callbacks."""

    by_group = None
    transcoder = SimpleNamespace(block_tokens=16)
    records = SimpleNamespace(host=None, put=lambda *_: True)

    def __init__(self) -> None:
        self.metrics = TierMetrics()
        self.stored: list[int] = []
        self.frees: list[Any] = []

    def key(self, name):
        return name

    def admit(self, keys, tokens, wanted=False):
        return [True] * len(keys)

    def fence(self):
        return None

    def store(self, blocks, free=None, fence=None):
        self.stored += [b.block_id for b in blocks]
        self.frees.append(free)
        return True

    def load(self, *what, **how):
        return False


@pytest.fixture
def parts():
    node = Node(parse_connector({"artifact": "x", "host_gib": 1}), False)
    node.tier = Stores()
    return node.tier, Scheduler(node, 16, "e"), Worker(node)


def request(blocks):
    return SimpleNamespace(
        request_id="r", kv_transfer_params=None, block_hashes=[bytes([i]) * 32 for i in range(blocks)],
        num_tokens=16 * blocks, num_prompt_tokens=16, status=SimpleNamespace(name="FINISHED_STOPPED"),
    )  # fmt: skip


def step(computed, tokens, new_blocks=None):
    new = [SimpleNamespace(req_id="r", block_ids=[new_blocks], num_computed_tokens=computed)] if new_blocks else []
    cached = SimpleNamespace(
        req_ids=[] if new else ["r"], new_block_ids=[None], num_computed_tokens=[computed], resumed_req_ids=set()
    )
    return SimpleNamespace(
        scheduled_new_reqs=new, scheduled_cached_reqs=cached, num_scheduled_tokens={"r": tokens},
        total_num_scheduled_tokens=tokens, preempted_req_ids=set(),
    )  # fmt: skip


def test_pages_are_kept_from_the_order_on(parts):
    """vLLM may end a request between the step's order and its forward: with asynchronous scheduling and structured
    output it samples, and has the worker save, after it has looked at the step before."""
    tier, scheduler, worker = parts
    r = request(1)
    scheduler.on_new_request(r)
    worker.save(scheduler.build(step(0, 31, [7, 8]))[1])
    tier.frees.pop()()
    r.block_hashes.append(b"1" * 32)
    orders = scheduler.build(step(31, 1))[1]
    assert [b.block_id for b in orders[0].blocks] == [8]
    assert scheduler.request_finished(r)[0], "its pages are about to be read"
    assert worker.finished({"r"})[0] == set()
    worker.save(orders)
    assert tier.stored == [7, 8]
    assert worker.finished(set())[0] == set()
    tier.frees.pop()()
    assert worker.finished(set())[0] == {"r"}


def test_what_a_failed_load_keeps_from_being_stored_is_offered_again(parts):
    """Another request's load fails in a layerwise step: nothing of that step is stored, and nothing is lost."""
    tier, scheduler, worker = parts
    r = request(2)
    scheduler.on_new_request(r)
    orders = scheduler.build(step(0, 32, [7, 8]))[1]
    failed = SimpleNamespace(
        order=SimpleNamespace(request="other"), failed=[SimpleNamespace(block_id=99)], deadline=0,
        wait_ended=lambda deadline: None,
    )  # fmt: skip
    worker._gates = [failed]
    worker.save(orders)
    scheduler.reported()
    assert tier.stored == []
    assert not worker.node.finish("r"), "no page is read"
    worker.save(scheduler.build(step(32, 1))[1])
    assert tier.stored == [7, 8]


@pytest.mark.parametrize("clustered", [False, True])
def test_one_in_some_declined_loads_is_let_through(clustered):
    class Slow:
        worth = Tier.worth

        def __init__(self) -> None:
            self._estimate, self.metrics = Estimate(1e9), TierMetrics()
            self._estimate.note_decode(1, 1.0)
            self.transcoder = SimpleNamespace(block_tokens=16)

        def lookup(self, keys):
            return ["host"] * len(keys)

    tier = Slow()
    cluster = SimpleNamespace(most_bytes=1 << 30, longest_prefix=lambda keys: []) if clustered else None
    options, router = SimpleNamespace(load="async"), SimpleNamespace(on=False)
    scheduler = Scheduler(SimpleNamespace(tier=tier, cluster=cluster, options=options, router=router), 16, "e")
    scheduler.on_new_request(request(10))
    state = scheduler._states["r"]
    state.keys = [bytes([i]) * 32 for i in range(10)]
    found = [len(scheduler._match(state, state.keys, 0).keys) for _ in range(10 * PROBE_EVERY)]
    assert found.count(10) == 10
    assert tier.metrics.value("kvtc_lookup_blocks", "declined", "host") == 10 * (PROBE_EVERY - 1) * 10


def test_blocks_that_are_never_handed_to_the_tier_are_counted():
    blocks = [Block(bytes([i]) * 32, i, 16 * i) for i in range(8)]
    tier = Stores()
    cluster = SimpleNamespace(groups=2, pull=lambda *what: None)
    remote = {b.key: SimpleNamespace(size=100, holders=(Holder("w", "host", 100),)) for b in blocks[3:]}
    load = Load(LoadOrder("r", blocks, remote), tier, cluster, (5, 30), Trace(None), None, lambda: None)
    load.start()
    assert load.ended
    # The five that nobody sends; the other three the tier counts, which refused them.
    assert tier.metrics.value("kvtc_loaded_blocks", "failed") == 5
