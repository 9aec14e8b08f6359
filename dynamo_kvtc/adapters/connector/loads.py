"""Blocks on their way into the pages: from the tier, from other workers, part by part.

A *part* is a layer group where the tier decodes by layer group (CPU), else all of the layers (GPU). A part is decoded
when all of its bytes are here and proven, of the blocks that can still be used: the first block that fails, and all
after it, are computed again. What is here goes into the tier, too, so that a later request finds it.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynamo_kvtc.adapters.connector.cluster import Cluster, Remote
from dynamo_kvtc.codec.record import Record
from dynamo_kvtc.errors import EngineTimeoutError, KvtcError
from dynamo_kvtc.tier.grouped import Opened
from dynamo_kvtc.tier.incoming import Incoming
from dynamo_kvtc.tier.tier import Tier
from dynamo_kvtc.tier.transcode import Block
from dynamo_kvtc.transfer.pending import Arrival, Pull
from dynamo_kvtc.transfer.pull import Wanted

_LOOK_SECONDS = 0.25
_HANG_SECONDS = 60.0
"""How long past its deadline a load may still be in the middle of decoding a part."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadOrder:
    """remote: by key, those that others have; the rest is the tier's. layerwise: gates wait for it, layer by layer."""

    request: str
    blocks: list[Block]
    remote: dict[bytes, Remote]
    layerwise: bool = False


class Trace:
    """Lines of JSON: when what came, and when what was computed."""

    def __init__(self, path: str | None) -> None:
        self._file = None if path is None else open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._lock = threading.Lock()

    def note(self, what: str, **told: Any) -> None:
        if self._file is not None:
            with self._lock:
                self._file.write(json.dumps({"at": time.monotonic(), "what": what, **told}) + "\n")
                self._file.flush()


class Load:
    """One request's. ``failed`` are its blocks that must be computed, once it has ``ended``."""

    def __init__(
        self, order: LoadOrder, tier: Tier, cluster: Cluster | None, seconds: tuple[float, float], trace: Trace,
        fence: Any, changed: Callable[[], None],
    ) -> None:  # fmt: skip
        """seconds: of pulling, and of loading after that; changed: told when it has ended."""
        self.order, self.ended = order, False
        self._tier, self._cluster, self._trace, self._fence, self._told = tier, cluster, trace, fence, changed
        self.began = time.monotonic()
        self.deadline = self.began + seconds[1] + (seconds[0] if order.remote else 0.0)
        groups = tier.by_group
        self._parts = 1 if groups is None else len(groups.groups)
        self._changed = threading.Condition()
        self._cut = len(order.blocks)
        self._part, self._busy, self._opened = 0, False, groups is None
        self._handed = 0
        self._local: dict[int, Opened] = {}
        self._records: dict[int, Record] = {}
        self._slots: list[Incoming] = []
        self._pulled: list[int] = []
        self._left: list[int] = []
        self._pull: Pull | None = None
        self._awaited: list[set[tuple[int, int]]] = [set() for _ in range(self._parts)]

    @property
    def failed(self) -> list[Block]:
        return self.order.blocks[self._cut :]

    def start(self) -> None:
        blocks, remote = self.order.blocks, self.order.remote
        self._pulled = [i for i, b in enumerate(blocks) if b.key in remote]
        local = [b.key for b in blocks if b.key not in remote]
        if self._pulled:
            try:
                self._start_pull()
            except KvtcError as exc:
                log.warning("a pull was not begun: %s", exc)
            if self._pull is None:
                with self._changed:
                    self._cut_at(self._pulled[0])
        groups = self._tier.by_group
        if groups is not None and (not local or not groups.open(local, self._here)):
            self._here({})
        self._advance()

    def wait(self, part: int, deadline: float) -> bool:
        """Whether that part is in the pages of all blocks that did not fail. At the deadline the load is given up."""
        if not self._wait_for(lambda: self.ended or self._part > part, deadline):
            log.warning("a load of %d blocks was not here in time", len(self.order.blocks))
        if not self.ended and self._part <= part:
            self.give_up()
        return self._part > part

    def wait_ended(self, deadline: float) -> None:
        if not self._wait_for(lambda: self.ended, deadline):
            self.give_up()

    def _wait_for(self, ready: Callable[[], bool], deadline: float) -> bool:
        while True:
            left = deadline - time.monotonic()
            with self._changed:
                if self._changed.wait_for(ready, min(_LOOK_SECONDS, left)):
                    return True
            if left <= 0:
                return False
            if self._pull is not None:
                self._pull.expire()

    def look(self) -> None:
        """From time to time: what is late has failed. Raises EngineTimeoutError if a thread hangs in its pages."""
        now = time.monotonic()
        if self._pull is not None and not self._pull.over:
            self._pull.expire()
        if now > self.deadline and not self.ended:
            with self._changed:
                busy = self._busy
                self._cut_at(0)
            if not busy:
                self._end()
            elif now > self.deadline + _HANG_SECONDS:
                raise EngineTimeoutError(
                    f"a load of {len(self.order.blocks)} blocks has not ended {_HANG_SECONDS:.0f} s after its deadline"
                )

    def give_up(self) -> None:
        """When this returns no page is written any more. Raises EngineTimeoutError if a thread hangs in them."""
        with self._changed:
            self._cut_at(0)
            ended = self._changed.wait_for(lambda: not self._busy, _HANG_SECONDS)
        if not ended:
            raise EngineTimeoutError(f"pages were still written {_HANG_SECONDS:.0f} s after their load was given up")
        self._end()

    def _start_pull(self) -> None:
        blocks, remote = self.order.blocks, self.order.remote
        wanted, parts = [], range(self._parts)
        for k, i in enumerate(self._pulled):
            key = blocks[i].key
            wanted.append(Wanted(
                key, remote[key].size, remote[key].holders, self._tier.transcoder.block_tokens,
                blocks[i].first_position,
            ))  # fmt: skip
            self._slots.append(Incoming(self._tier.records, key, remote[key].size))
            for part in parts:
                self._awaited[part].add((i, k))
        assert self._cluster is not None
        self._left = [self._cluster.groups] * len(self._pulled)
        self._pull = self._cluster.pull(wanted, [slot.record for slot in self._slots], self._arrived)

    def _arrived(self, arrival: Arrival) -> None:
        """From a thread of the pull's."""
        i = self._pulled[arrival.index]
        with self._changed:
            if not arrival.here:
                self._cut_at(i)
            elif self._tier.by_group is not None:
                self._awaited[arrival.group].discard((i, arrival.index))
                if not self._awaited[arrival.group]:
                    self._trace.note("arrived", request=self.order.request, group=arrival.group)
            else:
                self._left[arrival.index] -= 1
                if not self._left[arrival.index]:
                    self._awaited[0].discard((i, arrival.index))
        self._advance()

    def _here(self, opened: Mapping[bytes, Opened]) -> None:
        """From the tier's thread: what it has."""
        with self._changed:
            self._opened = True
            for i, block in enumerate(self.order.blocks):
                if block.key in opened:
                    self._local[i] = opened[block.key]
                    self._records[i] = opened[block.key].record
                elif block.key not in self.order.remote:
                    self._cut_at(i)
                    break
            if self.ended:
                self._let_go()
        self._advance()

    def _cut_at(self, i: int) -> None:
        """Under the lock: this block and those after it are of no use."""
        if i < self._cut:
            self._cut = i
            self._awaited = [{(j, k) for j, k in some if j < i} for some in self._awaited]

    def _advance(self) -> None:
        """Begins the next part if all of it is here."""
        with self._changed:
            if self.ended or self._busy or not self._opened:
                return
            if self._pulled and self._pull is None and self._cut > self._pulled[0]:
                return  # not begun yet
            over = not self._cut or self._part == self._parts
            if not over and self._awaited[self._part]:
                return
            self._busy = not over
            part, blocks = self._part, self.order.blocks[: self._cut]
        if over:
            self._end()
        elif not self._begin(part, blocks):
            self._loaded(range(len(blocks)))

    def _begin(self, part: int, blocks: list[Block]) -> bool:
        groups = self._tier.by_group
        if groups is None:
            self._keep()

            def done(failed: Collection[bytes]) -> None:
                missing = set(failed)
                self._loaded([i for i, b in enumerate(blocks) if b.key in missing])

            self._handed = len(blocks)
            return self._tier.load(blocks, done, fence=self._fence, deadline=self.deadline)
        for k, i in enumerate(self._pulled):
            if i < len(blocks) and i not in self._records:
                assert self._pull is not None
                parsed = self._pull.parsed(k)
                assert parsed is not None
                self._records[i] = parsed
        return groups.load(blocks, [self._records[i] for i in range(len(blocks))], part, self._loaded, self.deadline)

    def _loaded(self, failed: Collection[int]) -> None:
        """From the tier's thread: the part is in the pages."""
        with self._changed:
            self._busy = False
            if failed:
                self._cut_at(min(failed))
            self._trace.note("loaded", request=self.order.request, group=self._part, blocks=self._cut)
            self._part += 1
            self._changed.notify_all()
        self._advance()

    def _end(self) -> None:
        with self._changed:
            if self.ended:
                return
            self.ended = True
            loaded = [self._records[i] for i in range(self._cut) if i in self._records]
            if self._tier.by_group is not None:
                self._tier.by_group.ended(loaded, len(self.order.blocks) - self._cut)
            else:
                # The others are counted where they are loaded.
                self._tier.metrics.count("kvtc_loaded_blocks", len(self.order.blocks) - self._handed, "failed")
            self._changed.notify_all()
        self._records.clear()
        del loaded
        self._let_go()
        self._keep()
        self._told()

    def _let_go(self) -> None:
        for opened in self._local.values():
            opened.release()
        self._local.clear()

    def _keep(self) -> None:
        """What has come as a whole goes into the tier; nothing else will."""
        with self._changed:
            pull, slots, self._slots = self._pull, self._slots, []
        if not slots:
            return
        if pull is not None:
            pull.cancel()
        kept = nbytes = 0
        for k, slot in enumerate(slots):
            if pull is not None and pull.record(k) is not None:
                nbytes += slot.record.nbytes
                kept += 1
                slot.keep()
            else:
                slot.drop()
        metrics = self._tier.metrics
        metrics.count("kvtc_pulled_blocks", kept, "pulled")
        metrics.count("kvtc_pulled_blocks", len(slots) - kept, "failed")
        metrics.count("kvtc_pulled_bytes", nbytes)
        metrics.observe("kvtc_pull_seconds", time.monotonic() - self.began)


def layers_of(groups: Sequence[tuple[int, int]]) -> list[int]:
    """Of each layer its group."""
    return [g for g, (start, end) in enumerate(groups) for _ in range(start, end)]
