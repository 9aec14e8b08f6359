"""Drives the real compiled leader without an engine: plays vLLM's scheduler through kvbm's own Python, and the engine's
half of each worker. Runs as a program, in an environment that has kvbm; prints one JSON object.

    python -m tests.adapters.kvbm.leader_driver SCENARIO [--trace FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from typing import Any

import torch

from dynamo_kvtc.adapters.kvbm._compat import endpoints, require_kvbm
from dynamo_kvtc.adapters.kvbm.mover import MoverContext
from dynamo_kvtc.adapters.kvbm.options import Options
from dynamo_kvtc.adapters.kvbm.step import decode_step, encode_ours, kvbm_request_ids
from dynamo_kvtc.adapters.kvbm.worker import KvbmWorker
from tests.adapters.kvbm.parts import coding_rank
from tests.adapters.kvbm.raw_mover import RawMover

BLOCK = 16
DEVICE_BLOCKS = 512
HOST_BLOCKS, DISK_BLOCKS = 8, 64
WAIT_SECONDS = 20.0


class Rank:
    """One rank's pages, filled with what its rank, block and content say, and its worker. coding: through the codec."""

    def __init__(
        self, rank: int, world: int, mover_options: dict[str, Any], options: dict[str, Any], coding: bool = False
    ) -> None:
        self.rank = rank
        self.mover: Any
        if coding:
            self.pages, self.mover = coding_rank(rank, world, BLOCK, DEVICE_BLOCKS, mover_options)
        else:
            self.pages = torch.zeros(DEVICE_BLOCKS, 4, dtype=torch.int64)
            context = MoverContext({"layer.0": self.pages}, DEVICE_BLOCKS, BLOCK, rank, world, mover_options)
            self.mover = RawMover(context)
        self.worker = KvbmWorker(endpoints(), DEVICE_BLOCKS, self.mover, Options("tests", **options))
        self.worker.start()


class Engine:
    """A leader, its ranks, and the calls vLLM would make. ``log``: what happened, for the caller."""

    def __init__(
        self, ranks: int = 1, mover_options: dict[str, Any] | None = None, options: dict[str, Any] | None = None,
        coding: bool = False,
    ) -> None:  # fmt: skip
        from kvbm import KvbmLeader
        from kvbm._core import _vllm_integration as rust

        self.rust = rust
        self.ranks = [Rank(i, ranks, mover_options or {}, options or {}, coding) for i in range(ranks)]
        # Its handshake runs in the background; PyKvConnectorLeader holds the GIL while it waits for it.
        raw = KvbmLeader(ranks, None)
        for rank in self.ranks:
            rank.worker.wait_ready(WAIT_SECONDS)
        self.leader = rust.PyKvConnectorLeader("engine", None, BLOCK, raw)
        self.tables: dict[str, list[int]] = {}
        self.loading: dict[str, list[int]] = {}
        self.stored: list[list[str]] = []
        self.loaded: list[list[str]] = []
        self.errors: set[int] = set()

    def slot(self, request_id: str, tokens: list[int]) -> None:
        self.leader.create_slot(self.rust.KvbmRequest(request_id, None, None), tokens)

    def match(self, request_id: str, tokens: list[int], computed: int = 0) -> tuple[int, bool]:
        if not self.leader.has_slot(request_id):
            self.slot(request_id, tokens)
        return self.leader.get_num_new_matched_tokens(request_id, len(tokens), computed)

    def alloc(self, request_id: str, blocks: list[int], external: int) -> None:
        self.tables[request_id] = list(blocks)
        if external:
            self.loading[request_id] = blocks[len(blocks) - external // BLOCK :]
        self.leader.update_state_after_alloc(request_id, blocks, external)

    def step(
        self,
        new: list[tuple[str, list[int], int, int]] = (),
        cached: list[tuple[str, int, int]] = (),
        finished: list[str] = (),
        compute: dict[int, int] | None = None,
        preempted: list[str] = (),
    ) -> None:
        """new: (request, tokens, computed, scheduled); cached: (request, computed, scheduled); compute: what the
        forward pass writes, content by device block."""
        output = self.rust.SchedulerOutput()
        scheduled = {}
        for request_id, tokens, computed, count in new:
            output.add_new_request(request_id, tokens, self.tables[request_id], computed)
            scheduled[request_id] = count
        for request_id, computed, count in cached:
            output.add_cached_request(request_id, False, [], [], computed)
            scheduled[request_id] = count
        output.add_num_scheduled_tokens(scheduled)
        metadata = bytes(self.leader.build_connector_metadata(output))
        tables = {request_id: self.tables[request_id] for request_id in kvbm_request_ids(metadata)}
        loading = {request_id: self.loading[request_id] for request_id in tables if request_id in self.loading}
        ours = encode_ours(tables, BLOCK, finished, preempted, loading)
        for rank in self.ranks:
            if preempted:
                rank.worker.drop_stores(set(preempted))
            rank.worker.begin_step(decode_step(metadata, ours))
            for block, content in (compute or {}).items():
                rank.pages[block] = content * 10 + rank.rank
            rank.worker.release_loads()
            rank.worker.release_stores()
        self.poll()

    def poll(self) -> None:
        for i, rank in enumerate(self.ranks):
            stored, loaded = rank.worker.take_finished()
            while len(self.stored) <= i:
                self.stored.append([])
                self.loaded.append([])
            self.stored[i] += sorted(stored)
            self.loaded[i] += sorted(loaded)
            self.errors |= rank.worker.take_load_errors()

    def wait(self, what: Any, seconds: float = WAIT_SECONDS) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.poll()
            if what():
                return True
            time.sleep(0.01)
        return False

    def quiet(self, seconds: float = 0.4) -> None:
        """Until no rank has had anything open for a while."""
        last = time.monotonic()
        while time.monotonic() - last < seconds:
            self.poll()
            if any(rank.worker.open for rank in self.ranks):
                last = time.monotonic()
            time.sleep(0.02)

    def prefill(self, request_id: str, tokens: list[int], blocks: list[int], contents: list[int]) -> None:
        """A request without a match, whole in one step."""
        assert self.match(request_id, tokens) == (0, False)
        self.alloc(request_id, blocks, 0)
        self.step(new=[(request_id, tokens, 0, len(tokens))], compute=dict(zip(blocks, contents, strict=False)))

    def finish(self, request_id: str) -> bool:
        return bool(self.leader.request_finished(request_id, self.tables[request_id]))

    def close(self) -> dict[str, Any]:
        counts = [rank.worker.counts() for rank in self.ranks]
        for rank in self.ranks:
            rank.worker.shutdown()
        return {"counts": counts, "mover": [dict(getattr(rank.mover, "counts", ())) for rank in self.ranks]}


def main() -> None:
    from tests.adapters.kvbm import leader_scenarios

    parser = argparse.ArgumentParser()
    parser.add_argument("scenario")
    parser.add_argument("--trace")
    args = parser.parse_args()
    os.environ.setdefault("DYN_KVBM_CPU_CACHE_GB", "0.001")
    os.environ.setdefault("DYN_KVBM_DISK_CACHE_GB", "0.01")
    os.environ.setdefault("DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS", str(HOST_BLOCKS))
    os.environ.setdefault("DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS", str(DISK_BLOCKS))
    os.environ.setdefault("DYN_KVBM_DISK_CACHE_DIR", tempfile.mkdtemp(prefix="kvtc-test-"))
    os.environ.setdefault("DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER", "true")
    version = require_kvbm()
    if args.trace:
        from tests.adapters.kvbm.trace import record

        record(args.trace, version)
    result = getattr(leader_scenarios, args.scenario)()
    sys.stdout.write(json.dumps({"version": version, **result}) + "\n")
    sys.stdout.flush()
    # The leader's threads outlive Python's end and may crash in it; nothing is left to say.
    os._exit(0)


if __name__ == "__main__":
    main()
