"""A mover for tests: exact copies of a block's pages in two dicts, host and disk, moved by a thread of its own."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
import time
from collections import Counter
from typing import Any

from dynamo_kvtc.adapters.kvbm.mover import Done, MoverContext, MoveRequest
from dynamo_kvtc.adapters.kvbm.protocol import Pool
from dynamo_kvtc.errors import ConfigError


class RawMover:
    """options: delay_seconds before each move; fail_loads, fail_stores: every n-th fails (0: never); fail_file: while
    that file exists every load fails; never_end: store and load never call back; report: a file that gets the counts
    as JSON at shutdown.
    """

    def __init__(self, context: MoverContext) -> None:
        known = {"delay_seconds", "fail_loads", "fail_stores", "fail_file", "never_end", "report"}
        if unknown := set(context.options) - known:
            raise ConfigError(f"unknown mover_options {sorted(unknown)}; known are {sorted(known)}")
        self.context = context
        self.options = context.options
        self.pages = list(context.kv_caches.values())
        self.capacity: tuple[int, int] | None = None
        self.held: dict[Pool, dict[int, tuple[int, list[Any]]]] = {Pool.HOST: {}, Pool.DISK: {}}
        self.counts: Counter[str] = Counter()
        self.misplaced: list[tuple[Any, ...]] = []
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="raw-mover", daemon=True)
        self._thread.start()

    @property
    def bytes_per_block(self) -> int:
        return sum(page[0].numel() * page[0].element_size() for page in self.pages)

    def set_capacity(self, host_blocks: int, disk_blocks: int) -> None:
        self.capacity = (host_blocks, disk_blocks)
        for held in self.held.values():
            held.clear()

    def fence(self) -> None:
        return None

    def store(self, request: MoveRequest, done: Done) -> None:
        self.counts["asked_stores"] += 1
        self._queue.put((self._store, request, done))

    def load(self, request: MoveRequest, done: Done) -> None:
        self._queue.put((self._load, request, done))

    def demote(self, pairs: tuple[tuple[int, int], ...], done: Done) -> None:
        self._queue.put((self._demote, pairs, done))

    def shutdown(self, timeout_seconds: float) -> None:
        self._queue.put(None)
        self._thread.join(timeout_seconds)
        if path := self.options.get("report"):
            counts = dict(
                self.counts,
                pid=os.getpid(),
                rank=self.context.rank,
                capacity=self.capacity,
                misplaced_at=self.misplaced,
            )
            with open(f"{path}.{self.context.rank}", "w") as file:
                json.dump(counts, file)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            move, what, done = work
            time.sleep(self.options.get("delay_seconds", 0))
            if self.options.get("never_end") and move != self._demote:
                continue
            with contextlib.suppress(RuntimeError):
                done(move(what))

    def _due(self, kind: str) -> bool:
        self.counts[f"{kind}_calls"] += 1
        every = self.options.get(f"fail_{kind}", 0)
        return bool(every) and self.counts[f"{kind}_calls"] % every == 0

    def _store(self, request: MoveRequest) -> list[int]:
        fail = self._due("stores")
        held = self.held[request.pool]
        for move in request.moves:
            # An overwrite is the eviction notice.
            self.counts["overwritten"] += held.pop(move.target, None) is not None
            if not fail:
                held[move.target] = (move.first_position, [page[move.source].clone() for page in self.pages])
                self.counts["stored"] += 1
        return [move.target for move in request.moves] if fail else []

    def _load(self, request: MoveRequest) -> list[int]:
        file = self.options.get("fail_file")
        if self._due("loads") or (file and os.path.exists(file)):
            self.counts["refused_loads"] += 1
            return [move.target for move in request.moves]
        failed = []
        for move in request.moves:
            position, payload = self.held[request.pool].get(move.source, (None, []))
            if position != move.first_position:
                self.counts["misplaced"] += 1
                self.misplaced.append(
                    (request.request_id, request.pool.value, move.source, move.first_position, position)
                )
                failed.append(move.target)
                continue
            for page, bytes_ in zip(self.pages, payload, strict=True):
                page[move.target] = bytes_
            self.counts[f"loaded_{request.pool.value.lower()}"] += 1
        return failed

    def _demote(self, pairs: tuple[tuple[int, int], ...]) -> list[int]:
        failed = []
        for host, disk in pairs:
            self.held[Pool.DISK].pop(disk, None)
            if host in self.held[Pool.HOST]:
                self.held[Pool.DISK][disk] = self.held[Pool.HOST][host]
                self.counts["demoted"] += 1
            else:
                failed.append(disk)
        return failed


def make(context: MoverContext) -> RawMover:
    return RawMover(context)
