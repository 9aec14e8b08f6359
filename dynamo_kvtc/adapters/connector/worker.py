"""The worker's side: loads begun and waited for, blocks stored, and what went wrong."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence

from dynamo_kvtc.adapters.connector.loads import Load, LoadOrder, layers_of
from dynamo_kvtc.adapters.connector.node import Node
from dynamo_kvtc.adapters.connector.scheduler import StoreOrder
from dynamo_kvtc.errors import EngineTimeoutError

WAIT_SECONDS = 60.0
"""How long vLLM may be kept from reusing pages that a store is still reading."""

log = logging.getLogger(__name__)


class Worker:
    """On the engine's thread."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._running: dict[str, Load] = {}
        self._gates: list[Load] = []
        self._failed_blocks: set[int] = set()
        self._failed_requests: set[str] = set()
        groups = node.tier.by_group
        self._group_of = layers_of(groups.groups) if groups is not None else []

    def begin_loads(self, orders: Sequence[LoadOrder]) -> None:
        options, tier = self.node.options, self.node.tier
        for order in orders:
            load = Load(
                order, tier, self.node.cluster, (options.pull_seconds, options.load_seconds), self.node.trace,
                tier.fence(), self.node.change,
            )  # fmt: skip
            if order.layerwise:
                self._gates.append(load)
            else:
                self._running[order.request] = load
            load.start()
        self.node.loading = len(self._running)

    def wait_layer(self, layer: int) -> None:
        """Before a layer's attention: its group is in the pages, or the load is given up."""
        if not self._gates:
            return
        group = self._group_of[layer]
        began = time.monotonic()
        for load in self._gates:
            load.wait(group, load.deadline)
        self.node.trace.note("attention", layer=layer, group=group, waited=time.monotonic() - began)

    def save(self, orders: Sequence[StoreOrder]) -> None:
        """After the forward. What was computed on pages that failed is not stored."""
        sound = self._end_gates()
        tier = self.node.tier
        if not orders:
            return
        if not sound:
            for order in orders:
                self.node.not_stored(order.request, order.blocks[0].first_position)
                self.node.store_freed(order.number)
            return
        fence = tier.fence()
        for order in orders:

            def free(number: int = order.number) -> None:
                self.node.store_freed(number)
                self.node.change()

            if not tier.store(order.blocks, free=free, fence=fence):
                free()

    def finished(self, gone: Collection[str]) -> tuple[set[str], set[str]]:
        """(requests whose pages are not read any more, requests whose load has ended)."""
        for request in gone:
            if request in self._running:
                self._running[request].give_up()
        self.node.look()
        for load in self._running.values():
            load.look()
        ended = {request for request, load in self._running.items() if load.ended}
        for request in ended:
            self._note(self._running.pop(request))
        self.node.loading = len(self._running)
        return self.node.take_freed(), ended

    def take_failed_blocks(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_failed_requests(self) -> set[str]:
        """Where a model has windows: what lies before a block that failed is not all there, so all is computed."""
        failed, self._failed_requests = self._failed_requests, set()
        return failed

    def take_stats(self) -> list[tuple[str, str, float, tuple[str, ...]]]:
        return self.node.take_stats()

    def wait_stores(self, orders: Collection[int]) -> None:
        """Raises EngineTimeoutError: to go on would let others write into pages that are still read."""
        if not self.node.wait_freed(orders, WAIT_SECONDS):
            raise EngineTimeoutError(f"pages of stores {sorted(orders)} are still read after {WAIT_SECONDS:.0f} s")

    def close(self) -> bool:
        for load in [*self._running.values(), *self._gates]:
            load.give_up()
        return self.node.close()

    def _end_gates(self) -> bool:
        """Whether all that this step was computed on is what it should be."""
        gates, self._gates = self._gates, []
        for load in gates:
            load.wait_ended(load.deadline)
            self._note(load)
        return not any(load.failed for load in gates)

    def _note(self, load: Load) -> None:
        if load.failed:
            log.info("%s: %d blocks could not be loaded and are computed", load.order.request, len(load.failed))
            if self.node.groups.window:
                self._failed_requests.add(load.order.request)
            else:
                self._failed_blocks.update(b.block_id for b in load.failed)
            self.node.load_failed(load.order.request)
