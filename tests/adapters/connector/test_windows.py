"""Models whose layers have windows: which pages are stored and loaded, and who must not write into them meanwhile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dynamo_kvtc.adapters.connector.groups import Groups, groups_of
from dynamo_kvtc.adapters.connector.loads import LoadOrder
from dynamo_kvtc.adapters.connector.node import Node
from dynamo_kvtc.adapters.connector.options import parse_connector
from dynamo_kvtc.adapters.connector.scheduler import Match, Scheduler
from dynamo_kvtc.adapters.connector.worker import Worker
from dynamo_kvtc.adapters.engine_model import check_no_windows, check_one_group
from dynamo_kvtc.errors import ConfigError, UnsupportedModelError
from dynamo_kvtc.ops.pages.cache import NO_PAGE
from dynamo_kvtc.tier.transcode import Block
from tests.adapters.connector.test_orders import Stores, request

OPTIONS = parse_connector({"artifact": "x", "host_gib": 1})
# vLLM's first group is the one with windows.
TWO = Groups((1, 0), (("a.1", "a.3"), ("a.0", "a.2")), True)


def spec(kind: str, block_size: int = 16, heads: int = 2) -> Any:
    made = type(kind, (), {})()
    made.block_size, made.num_kv_heads, made.head_size, made.dtype = block_size, heads, 64, "bfloat16"
    made.page_size_bytes = block_size * heads * 256
    return made


def config(*specs: Any) -> Any:
    return SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(layer_names=[f"a.{i}"], kv_cache_spec=x) for i, x in enumerate(specs)]
    )


def test_groups_with_full_attention_come_first():
    window, full = spec("SlidingWindowSpec"), spec("FullAttentionSpec")
    assert groups_of(config(window, full, window), OPTIONS) == Groups((1, 0, 2), (("a.1",), ("a.0",), ("a.2",)), True)
    assert groups_of(config(full), OPTIONS) == Groups((0,), (("a.0",),), False)
    assert groups_of(config(window), OPTIONS) == Groups((0,), (("a.0",),), True)
    assert TWO.pages(([0, 0, 5], [1, 2, 3])) == [[1, 2, 3], [NO_PAGE, NO_PAGE, 5]]


def test_what_is_refused():
    window, full = spec("SlidingWindowSpec"), spec("FullAttentionSpec")
    with pytest.raises(UnsupportedModelError, match=r"2 groups \(FullAttentionSpec, MambaSpec\)"):
        groups_of(config(full, spec("MambaSpec")), OPTIONS)
    with pytest.raises(UnsupportedModelError, match=r"2 groups \(SlidingWindowSpec\)"):
        groups_of(config(window, window), OPTIONS)
    for other in (spec("SlidingWindowSpec", block_size=32), spec("SlidingWindowSpec", heads=1)):
        with pytest.raises(UnsupportedModelError, match="the cache groups differ"):
            groups_of(config(full, other), OPTIONS)
    layerwise = parse_connector({"artifact": "x", "host_gib": 1, "load": "layerwise"})
    assert not groups_of(config(full), layerwise).windows
    with pytest.raises(ConfigError, match="set load to 'async', or --disable-hybrid-kv-cache-manager"):
        groups_of(config(full, window), layerwise)


def test_adapters_that_know_one_page_of_a_block_refuse_what_has_more_or_loses_it():
    window, full = spec("SlidingWindowSpec"), spec("FullAttentionSpec")
    check_one_group(1)
    check_no_windows(config(full).kv_cache_groups)
    with pytest.raises(UnsupportedModelError, match=r"2 groups .* --disable-hybrid-kv-cache-manager"):
        check_one_group(2)
    with pytest.raises(UnsupportedModelError, match="all layers have sliding windows"):
        check_no_windows(config(window).kv_cache_groups)


@pytest.fixture
def parts():
    return made(TWO)


def made(groups: Groups) -> tuple[Stores, Scheduler, Worker]:
    node = Node(OPTIONS, False, groups)
    node.tier = Stores()  # type: ignore[assignment]
    return node.tier, Scheduler(node, 16, "e"), Worker(node)  # type: ignore[return-value]


def named(rid: str, blocks: int) -> Any:
    made = request(blocks)
    made.request_id = rid
    return made


def step(rows: dict[str, tuple[int, int, Any]], fresh: tuple[str, ...] = ()) -> Any:
    """rows: request -> (tokens computed, tokens of this step, its new pages by group)."""
    new = [SimpleNamespace(req_id=r, block_ids=rows[r][2], num_computed_tokens=rows[r][0]) for r in fresh]
    old = [r for r in rows if r not in fresh]
    cached = SimpleNamespace(
        req_ids=old, new_block_ids=[rows[r][2] for r in old], num_computed_tokens=[rows[r][0] for r in old],
        resumed_req_ids=set(),
    )  # fmt: skip
    tokens = {r: row[1] for r, row in rows.items()}
    return SimpleNamespace(
        scheduled_new_reqs=new, scheduled_cached_reqs=cached, num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()), preempted_req_ids=set(),
    )  # fmt: skip


def test_a_step_stores_what_it_computes_with_the_pages_of_all_groups(parts):
    _, scheduler, worker = parts
    scheduler.on_new_request(named("r", 5))
    orders = scheduler.build(step({"r": (0, 40, ([4, 5, 6], [1, 2, 3]))}, fresh=("r",)))[1]
    assert [(b.block_id, b.others, b.first_position) for b in orders[0].blocks] == [(1, (4,), 0), (2, (5,), 16)]
    worker.save(orders)
    # The third was begun in the step before; the window has left the first two behind.
    orders = scheduler.build(step({"r": (40, 40, ([8, 9], [10, 11]))}))[1]
    assert [(b.block_id, b.others) for b in orders[0].blocks] == [(3, (6,)), (10, (8,)), (11, (9,))]


def test_blocks_that_a_window_may_have_left_are_not_stored_late(parts):
    _, scheduler, worker = parts
    scheduler.on_new_request(named("r", 5))
    orders = scheduler.build(step({"r": (0, 32, ([4, 5], [1, 2]))}, fresh=("r",)))[1]
    worker.node.not_stored("r", 0)
    scheduler.reported()
    assert len(orders[0].blocks) == 2
    orders = scheduler.build(step({"r": (32, 16, ([6], [3]))}))[1]
    assert [b.block_id for b in orders[0].blocks] == [3]


def test_pages_that_a_store_reads_are_waited_for_before_another_has_them(parts):
    tier, scheduler, worker = parts
    for name in "rs":
        scheduler.on_new_request(named(name, 5))
    worker.save(scheduler.build(step({"r": (0, 32, ([4, 5], [1, 2]))}, fresh=("r",)))[1])
    # The same request or another: page 4 is written in this step.
    for rows, fresh in (({"r": (32, 8, ([4], [3]))}, ()), ({"s": (0, 8, ([4], [7]))}, ("s",))):
        assert scheduler.build(step(rows, fresh))[2] == {"r"}
    assert scheduler.build(step({"s": (8, 1, ([6], [8]))}))[2] == set()
    scheduler._orders["t"] = LoadOrder("t", [Block(b"k", 9, 0, others=(5,))], {})
    assert scheduler.build(step({}))[2] == {"r"}
    tier.frees.pop()()
    assert scheduler.build(step({"s": (9, 1, ([5], [9]))}))[2] == set()
    assert scheduler._read == {}


def test_a_load_leaves_out_what_no_layer_looks_at(parts):
    keys = [bytes([i]) * 32 for i in range(4)]

    def ordered(groups: Groups, pages: Any) -> list[Block]:
        tier, scheduler, _ = made(groups)
        tier.touch = lambda keys: None  # type: ignore[attr-defined]
        r = named("r", 6)
        scheduler.on_new_request(r)
        scheduler._states["r"].match = Match(1, keys, {})
        scheduler.update_state_after_alloc(r, pages, 64)
        assert scheduler._states["r"].next_store == 5
        return scheduler._orders["r"].blocks

    blocks = ordered(TWO, ([0, 0, 0, 7, 8, 9], [1, 2, 3, 4, 5, 6]))
    assert [(b.block_id, *b.others, b.first_position) for b in blocks] == [
        (2, NO_PAGE, 16), (3, NO_PAGE, 32), (4, 7, 48), (5, 8, 64)
    ]  # fmt: skip
    # One group, with a window: what lies before it is in no layer.
    blocks = ordered(Groups((0,), (("a.0",),), True), ([0, 0, 0, 7, 8, 9],))
    assert [(b.key, b.block_id, b.others, b.first_position) for b in blocks] == [
        (keys[2], 7, (), 48), (keys[3], 8, (), 64)
    ]  # fmt: skip


@pytest.mark.parametrize("windows", [True, False])
def test_a_load_that_failed_is_told_of_as_a_whole_where_there_are_windows(windows):
    _, _, worker = made(TWO if windows else Groups((0,), (("a.0",),), False))
    worker._running["r"] = SimpleNamespace(  # type: ignore[assignment]
        ended=True, failed=[Block(b"k", 9, 0)], order=SimpleNamespace(request="r"), look=lambda: None
    )
    assert worker.finished(()) == (set(), {"r"})
    assert worker.take_failed_requests() == ({"r"} if windows else set())
    assert worker.take_failed_blocks() == (set() if windows else {9})
    assert worker.take_failed_requests() == worker.take_failed_blocks() == set()
    assert worker.node.take_failed() == {"r"}
