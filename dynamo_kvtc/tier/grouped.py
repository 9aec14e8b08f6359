"""Loads by layer group: records are opened once, then each group goes into the pages as soon as its bytes are here.

    open    keys -> records with a proven header, read off the engine's thread
    load    one group of records, from here or still arriving from another worker -> the pages of its layers

Groups may come in any order; a caller that computes meanwhile takes them from the first to the last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dynamo_kvtc.codec.record import Record
from dynamo_kvtc.errors import RecordError
from dynamo_kvtc.store import Lease
from dynamo_kvtc.tier.lane import Lane, safely
from dynamo_kvtc.tier.transcode import Block, GroupDecoder
from dynamo_kvtc.tier.work import Work


@dataclass
class Opened:
    """A record on lease, until ``release``. Its header is proven; its sections are when they are decoded."""

    record: Record
    tier: str
    lease: Lease | None

    def release(self) -> None:
        """Again is no error."""
        lease, self.lease = self.lease, None
        if lease is not None:
            lease.release()


class GroupLoads:
    """On the tier's own threads. Made by ``Tier``."""

    def __init__(self, decoder: GroupDecoder, work: Work, lane: Lane) -> None:
        self._decoder, self._work, self._lane = decoder, work, lane

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """Each group's layers: the first, and the one after the last."""
        return self._decoder.groups

    def open(self, keys: Sequence[bytes], done: Callable[[Mapping[bytes, Opened]], None]) -> bool:
        """done: called once with those that are here and whose header is sound. False if refused."""
        told = safely(done)

        def run(waited: float) -> None:
            self._work.waited(waited)
            out: dict[bytes, Opened] = {}
            for key, lease, tier in self._work.fetch(keys):
                try:
                    out[key] = Opened(self._decoder.parse(lease.record), tier, lease)
                except RecordError as exc:
                    lease.release()
                    self._work.bad(key, exc)
                self._work.metrics.count("kvtc_lookup_blocks", 1, "hit" if key in out else "miss", tier)
            told(out)

        def fail(why: BaseException) -> None:
            self._work.error(why, "open")
            told({})

        return self._lane.put(run, fail, 1)

    def load(
        self, blocks: Sequence[Block], records: Sequence[Record], group: int, done: Callable[[list[int]], None],
        deadline: float | None = None,
    ) -> bool:  # fmt: skip
        """done: called once with the indices of blocks that are not loaded. deadline: monotonic seconds after which it
        is not begun. False if refused: nothing is called."""
        told = safely(done)

        def run(waited: float) -> None:
            began = time.monotonic()
            errors = self._decoder.load(blocks, records, group)
            self._work.metrics.observe("kvtc_decode_seconds", time.monotonic() - began)
            for block, error in zip(blocks, errors, strict=True):
                if error is not None:
                    self._work.bad(block.key, error)
            told([i for i, error in enumerate(errors) if error is not None])

        def fail(why: BaseException) -> None:
            self._work.error(why, "load")
            told(list(range(len(blocks))))

        return self._lane.put(run, fail, 1, deadline)

    def ended(self, loaded: Sequence[Record], failed: int) -> None:
        """A load is over: for the counts."""
        m = self._work.metrics
        m.count("kvtc_raw_bytes", len(loaded) * self._decoder.block_bytes, "out")
        m.count("kvtc_coded_bytes", sum(len(record.data) for record in loaded), "out")
        m.count("kvtc_loaded_blocks", len(loaded), "loaded")
        m.count("kvtc_loaded_blocks", failed, "failed")
