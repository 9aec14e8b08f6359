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
TWO = Groups((1, 0), (("a.1", "a.3"), ("a.0", "a.2")), 24)
ALL = Groups((0,), (("a.0",),), 24)


def spec(kind: str, block_size: int = 16, heads: int = 2) -> Any:
    made = type(kind, (), {})()
    made.block_size, made.num_kv_heads, made.head_size, made.dtype = block_size, heads, 64, "bfloat16"
    made.page_size_bytes = block_size * heads * 256
    made.sliding_window = 24
    return made


def config(*specs: Any) -> Any:
    return SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(layer_names=[f"a.{i}"], kv_cache_spec=x) for i, x in enumerate(specs)]
    )


def test_groups_with_full_attention_come_first():
    window, full = spec("SlidingWindowSpec"), spec("FullAttentionSpec")
    wider = spec("SlidingWindowSpec")
    wider.sliding_window = 100
    assert groups_of(config(wider, full, window), OPTIONS) == Groups((1, 0, 2), (("a.1",), ("a.0",), ("a.2",)), 24)
    assert groups_of(config(full), OPTIONS) == Groups((0,), (("a.0",),), 0)
    assert groups_of(config(window), OPTIONS) == ALL
    assert TWO.pages(([0, 0, 5], [1, 2, 3])) == [[1, 2, 3], [NO_PAGE, NO_PAGE, 5]]


def test_what_is_refused():
    window, full = spec("SlidingWindowSpec"), spec("FullAttentionSpec")
    for specs, told in (
        ((full, spec("MambaSpec")), r"2 groups \(FullAttentionSpec, MambaSpec\)"),
        ((window, window), r"2 groups \(SlidingWindowSpec\)"),
        ((spec("ChunkedLocalAttentionSpec"),), r"1 groups \(ChunkedLocalAttentionSpec\)"),
    ):
        with pytest.raises(UnsupportedModelError, match=told):
            groups_of(config(*specs), OPTIONS)
    for other in (spec("SlidingWindowSpec", block_size=32), spec("SlidingWindowSpec", heads=1)):
        with pytest.raises(UnsupportedModelError, match="the cache groups differ"):
            groups_of(config(full, other), OPTIONS)
    layerwise = parse_connector({"artifact": "x", "host_gib": 1, "load": "layerwise"})
    assert not groups_of(config(full), layerwise).window
    with pytest.raises(ConfigError, match=r"set load to 'async', or --disable-hybrid-kv-cache-manager$"):
        groups_of(config(full, window), layerwise)
    with pytest.raises(ConfigError, match=r"set load to 'async'$"):
        groups_of(config(window), layerwise)


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


def test_blocks_that_a_window_has_left_are_not_stored_late(parts):
    """They count as used, though: what is in the tier stays warm."""
    tier, scheduler, worker = parts
    offered: list[Any] = []
    tier.admit = lambda keys, *_, **__: offered.append(list(keys)) or [True] * len(keys)
    r = named("r", 6)
    scheduler.on_new_request(r)
    scheduler.build(step({"r": (0, 64, ([4, 5, 6, 7], [1, 2, 3, 4]))}, fresh=("r",)))
    worker.node.not_stored("r", 0)
    scheduler.reported()
    # 64 computed, and a window of 24: tokens from 41 on are held, and so the blocks from 32 on.
    orders = scheduler.build(step({"r": (64, 16, ([8], [5]))}))[1]
    assert [b.first_position for b in orders[0].blocks] == [32, 48, 64]
    assert offered[-1] == r.block_hashes[:5]


def test_a_prompt_found_in_the_engines_own_cache_is_used_in_the_tier_too(parts):
    tier, scheduler, _ = parts
    offered: list[Any] = []
    tier.admit = lambda keys, *_, **__: offered.append(list(keys)) or [True] * len(keys)
    r = named("r", 5)
    scheduler.on_new_request(r)
    orders = scheduler.build(step({"r": (64, 16, ([0, 0, 5, 6, 7], [1, 2, 3, 4, 8]))}, fresh=("r",)))[1]
    assert offered == [r.block_hashes]
    assert [(b.first_position, b.others) for b in orders[0].blocks] == [(32, (5,)), (48, (6,)), (64, (7,))]


def test_a_block_whose_hash_comes_a_step_late_is_stored(parts):
    """With asynchronous scheduling its last token is not known when its step is ordered; with drafts of speculative
    decoding a step may pass its end."""
    _, scheduler, _ = parts
    r = named("r", 1)
    scheduler.on_new_request(r)
    scheduler.build(step({"r": (0, 31, ([4, 5], [1, 2]))}, fresh=("r",)))
    assert scheduler.build(step({"r": (31, 1, None)}))[1] == []
    r.block_hashes.append(b"1" * 32)
    orders = scheduler.build(step({"r": (32, 1, ([6], [3]))}))[1]
    assert [(b.block_id, b.others, b.first_position) for b in orders[0].blocks] == [(2, (5,), 16)]


def test_pages_that_a_store_reads_are_waited_for_before_another_has_them(parts):
    tier, scheduler, worker = parts
    for name in "rs":
        scheduler.on_new_request(named(name, 9))

    def saved(orders: Any) -> list[int]:
        worker.save(orders)
        return [order.number for order in orders]

    first = saved(scheduler.build(step({"r": (0, 32, ([4, 5], [1, 2]))}, fresh=("r",)))[1])
    # The same request or another: page 4 is written in this step.
    _, orders, awaited = scheduler.build(step({"r": (32, 16, ([4], [3]))}))
    assert awaited == set(first)
    # This step's own store comes after what it waits for.
    second = saved(orders)
    assert len(second) == 1
    assert scheduler.build(step({"s": (0, 8, ([5], [7]))}, fresh=("s",)))[2] == set(first)
    assert scheduler.build(step({"s": (8, 1, ([6], [8]))}))[2] == set()
    scheduler._orders["t"] = LoadOrder("t", [Block(b"k", 9, 0, others=(5,))], {})
    assert scheduler.build(step({}))[2] == set(first)
    tier.frees.pop(0)()
    assert scheduler.build(step({"s": (9, 1, ([5], [9]))}))[2] == set()
    # Page 4 is the second one's now.
    assert scheduler.build(step({"s": (10, 1, ([4], [10]))}))[2] == set(second)
    tier.frees.pop(0)()
    scheduler.build(step({"s": (11, 1, None)}))
    assert scheduler._read == {}


def test_pages_that_are_shared_are_not_waited_for(parts):
    """Two new prompts that begin alike, in one step: the second has the first one's pages, whose store comes after this
    step. And one that comes while they are stored."""
    _, scheduler, worker = parts
    for name in "rst":
        scheduler.on_new_request(named(name, 4))
    rows = {"r": (0, 48, ([4, 5, 6], [1, 2, 3])), "s": (32, 16, ([4, 5, 7], [1, 2, 8]))}
    _, orders, awaited = scheduler.build(step(rows, fresh=("r", "s")))
    assert awaited == set()
    worker.wait_stores(awaited)
    worker.save(orders)
    assert scheduler.build(step({"t": (32, 16, ([4, 5, 9], [1, 2, 10]))}, fresh=("t",)))[2] == set()


def test_a_request_preempted_and_resumed_in_one_step_waits_for_earlier_stores_only(parts):
    _, scheduler, worker = parts
    scheduler.on_new_request(named("r", 4))
    orders = scheduler.build(step({"r": (0, 32, ([4, 5], [1, 2]))}, fresh=("r",)))[1]
    worker.save(orders)
    output = step({"r": (0, 32, ([6, 7], [8, 9]))})
    output.preempted_req_ids, output.scheduled_cached_reqs.resumed_req_ids = {"r"}, {"r"}
    _, again, awaited = scheduler.build(output)
    assert awaited == {orders[0].number}
    assert [b.block_id for b in again[0].blocks] == [8, 9]


def test_a_load_leaves_out_what_no_layer_looks_at():
    keys = [bytes([i]) * 32 for i in range(4)]

    def ordered(groups: Groups, pages: Any) -> list[Block]:
        tier, scheduler, _ = made(groups)
        touched: list[bytes] = []
        tier.touch = touched.extend  # type: ignore[attr-defined]
        r = named("r", 6)
        scheduler.on_new_request(r)
        scheduler._states["r"].match = Match(1, keys, {})
        scheduler.update_state_after_alloc(r, pages, 64)
        assert scheduler._states["r"].next_store == 5
        # The head of the chain, too: without it the rest is not found.
        assert touched == keys
        return scheduler._orders["r"].blocks

    blocks = ordered(TWO, ([0, 0, 0, 7, 8, 9], [1, 2, 3, 4, 5, 6]))
    assert [(b.block_id, *b.others, b.first_position) for b in blocks] == [
        (2, NO_PAGE, 16), (3, NO_PAGE, 32), (4, 7, 48), (5, 8, 64)
    ]  # fmt: skip
    # One group, with a window: what lies before it is in no layer.
    blocks = ordered(ALL, ([0, 0, 0, 7, 8, 9],))
    assert [(b.key, b.block_id, b.others, b.first_position) for b in blocks] == [
        (keys[2], 7, (), 48), (keys[3], 8, (), 64)
    ]  # fmt: skip


def test_the_token_that_is_computed_sees_its_own_window():
    """Of a prompt that is found as a whole vLLM computes the last token, with the pages of the window after it."""
    for groups, most in ((TWO, 3), (Groups((0,), (("a.0",),)), 4)):
        tier, scheduler, _ = made(groups)
        tier.lookup = lambda keys: ["host"] * len(keys)  # type: ignore[attr-defined]
        tier.worth = lambda tiers: True  # type: ignore[attr-defined]
        assert scheduler.matched_tokens(named("r", 4), 0) == (16 * most, True)


@pytest.mark.parametrize("windows", [True, False])
def test_a_load_that_failed_is_told_of_as_a_whole_where_there_are_windows(windows):
    _, _, worker = made(TWO if windows else Groups((0,), (("a.0",),)))
    worker._running["r"] = SimpleNamespace(  # type: ignore[assignment]
        ended=True, failed=[Block(b"k", 9, 0)], order=SimpleNamespace(request="r"), look=lambda: None
    )
    assert worker.finished(()) == (set(), {"r"})
    assert worker.take_failed_requests() == ({"r"} if windows else set())
    assert worker.take_failed_blocks() == (set() if windows else {9})
    assert worker.take_failed_requests() == worker.take_failed_blocks() == set()
    assert worker.node.take_failed() == {"r"}
