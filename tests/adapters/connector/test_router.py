"""What the router is told, and whose pages are still read."""

from __future__ import annotations

import threading

from dynamo_kvtc.adapters.connector import router as router_module
from dynamo_kvtc.adapters.connector.router import Named, RouterEvents


def test_each_change_is_told_once():
    router = RouterEvents(True)
    named = Named(b"h", None, (1, 2))
    router.moved(b"unknown", "host")
    router.name(b"k", named)
    router.moved(b"k", "host")
    router.moved(b"k", "host")
    router.moved(b"k", "disk")
    router.removed(b"k")
    router.removed(b"k")
    assert router.take() == [
        (named, "host", False), (named, "disk", False), (named, "host", True), (named, "disk", True),
    ]  # fmt: skip
    assert router.take() == []
    router.name(b"k", named)
    router.moved(b"k", "host")
    router.forget()
    assert router.take() == [(named, "host", False), (named, "host", True)]


def test_what_is_forgotten_is_gone_for_the_router(monkeypatch):
    monkeypatch.setattr(router_module, "MAX_NAMES", 2)
    router = RouterEvents(True)
    names = [Named(bytes([i]), None, ()) for i in range(4)]
    for i, named in enumerate(names):
        router.name(bytes([i]) * 32, named)
        if i != 1:
            router.moved(bytes([i]) * 32, "host")
    told = router.take()
    assert [e for e in told if e[2]] == [(names[0], "host", True)]
    assert [e[0] for e in told if not e[2]] == [names[0], names[2], names[3]]


def test_nobody_asks_and_nothing_is_kept():
    router = RouterEvents(False)
    router.name(b"k", Named(b"h", None, ()))
    router.moved(b"k", "host")
    assert router.take() == []


def test_pages_are_not_given_back_while_a_store_reads_them():
    from dynamo_kvtc.adapters.connector.node import Node
    from dynamo_kvtc.adapters.connector.options import parse_connector

    node = Node(parse_connector({"artifact": "a", "host_gib": 1}), False)
    assert not node.finish("idle")
    first, second = node.store_ordered("r"), node.store_ordered("r")
    assert node.storing() == {first: "r", second: "r"}
    assert node.finish("r")
    assert node.take_freed() == set()
    node.store_freed(first)
    assert node.wait_freed([first], 0.01)
    assert not node.wait_freed([first, second], 0.01)
    assert node.take_freed() == set()
    threading.Timer(0.05, node.store_freed, [second]).start()
    assert node.wait_freed([second], 20)
    assert node.take_freed() == {"r"}
    assert node.take_freed() == set()
