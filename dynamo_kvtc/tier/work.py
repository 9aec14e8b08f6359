"""What a tier's threads do: blocks to records, records to promises, promises to pages. Each ends in counts."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from dynamo_kvtc.errors import RecordError
from dynamo_kvtc.store import MAX_RECORD_BYTES, Lease, release_all
from dynamo_kvtc.store.tiered import TieredStore
from dynamo_kvtc.tier.estimate import Estimate
from dynamo_kvtc.tier.lane import Closed, TooLate
from dynamo_kvtc.tier.metrics import TierMetrics
from dynamo_kvtc.tier.overlay import Overlay
from dynamo_kvtc.tier.transcode import Block, Promise, Put, Transcoder, release_promises

log = logging.getLogger(__name__)


class Work:
    def __init__(
        self, store: TieredStore, transcoder: Transcoder, metrics: TierMetrics, estimate: Estimate, overlay: Overlay
    ) -> None:  # fmt: skip
        self._store, self.transcoder, self.metrics, self._estimate = store, transcoder, metrics, estimate
        self._overlay = overlay

    def encode(self, blocks: Sequence[Block], staged: Any, wanted: Callable[[], bool]) -> list[bytes]:
        """Keys that are not stored. staged: of the blocks, and after them of their exact copies; wanted: whether they
        still are to be stored."""
        began = time.monotonic()
        left, unfit = len(blocks), 0

        def put(items: Sequence[tuple[bytes, memoryview | bytes]]) -> list[bool]:
            nonlocal left, unfit
            ours, exact = items[:left], items[left:]
            left -= len(ours)
            if not wanted():
                return [False] * len(items)
            unfit += sum(not _fits(item) for item in ours)
            stored = _put_those_that_fit(ours, self._store.put_many)
            stored += _put_those_that_fit(exact, self._overlay.put_many)
            if wanted():
                return stored
            # Cleared in the middle of it.
            for key, _ in items:
                self._store.discard(key)
            return [False] * len(items)

        stored, sizes, exact = self.transcoder.encode(staged, put)
        stored, sizes = stored[: len(blocks)], sizes[: len(blocks)]
        m = self.metrics
        m.observe("kvtc_encode_seconds", time.monotonic() - began)
        m.count("kvtc_raw_bytes", len(blocks) * self.transcoder.raw_block_bytes, "in")
        m.count("kvtc_coded_bytes", sum(sizes), "in")
        m.count("kvtc_stored_blocks", sum(stored), "stored")
        if unfit:
            log.warning(
                "%d blocks cannot be stored: their records would have more than %d bytes", unfit, MAX_RECORD_BYTES
            )
            m.count("kvtc_errors", unfit, "encode_too_large")
            m.count("kvtc_stored_blocks", unfit, "failed")
        m.count("kvtc_stored_blocks", len(stored) - sum(stored) - unfit, "no_room" if wanted() else "failed")
        for reason in ("policy", "nonfinite", "error_bound"):
            m.count("kvtc_exact_tokens", getattr(exact, reason), reason)
        return [block.key for block, yes in zip(blocks, stored, strict=True) if not yes]

    def promise(self, keys: Sequence[bytes], prove: bool) -> dict[bytes, Promise]:
        """The sound ones."""
        out = self._proven([(key, lease, "host") for key, lease in self._overlay.get_many(keys)], prove, True)
        self.metrics.count("kvtc_overlay_blocks", len(out), "hit")
        try:
            return out | self._promise_coded([key for key in keys if key not in out], prove)
        except BaseException:
            release_promises(out.values())
            raise

    def _promise_coded(self, keys: Sequence[bytes], prove: bool) -> dict[bytes, Promise]:
        return self._proven(self.fetch(keys), prove, False)

    def fetch(self, keys: Sequence[bytes]) -> list[tuple[bytes, Lease, str]]:
        """Those that are there, with the tier they came from."""
        leases: list[tuple[bytes, Lease, str]] = []
        for tier, which, found, seconds in self._store.fetch(keys):
            if found:
                self.metrics.observe("kvtc_fetch_seconds", seconds, tier)
                self._estimate.note_fetch(tier, len(found) * self.transcoder.block_tokens, seconds)
            leases += [(keys[i], lease, tier) for i, lease in zip(which, found, strict=True)]
        self.metrics.count("kvtc_lookup_blocks", len(keys) - len(leases), "miss", "none")
        return leases

    def _proven(self, leases: Sequence[tuple[bytes, Lease, str]], prove: bool, exact: bool) -> dict[bytes, Promise]:
        """exact: whether they are the overlay's: then one that is bad is no miss, for there is the coded record."""
        if not leases:
            return {}
        began = time.monotonic()
        try:
            proven = self.transcoder.promise(
                [k for k, _, _ in leases], [x for _, x, _ in leases], [t for _, _, t in leases], prove
            )
        except BaseException:
            # Not left to the collector: whoever keeps the traceback would keep the records from being moved.
            release_all([lease for _, lease, _ in leases])
            raise
        seconds = time.monotonic() - began
        out: dict[bytes, Promise] = {}
        results: Counter[tuple[str, str]] = Counter()
        for (key, _, tier), promise in zip(leases, proven, strict=True):
            if isinstance(promise, Exception):
                self.bad(key, promise, exact)
                results["miss", tier] += not exact
            else:
                promise.exact = exact
                out[key] = promise
                results["hit", tier] += 1
        for (result, tier), number in results.items():
            self.metrics.count("kvtc_lookup_blocks", number, result, tier)
        if self.transcoder.staged_is_free:
            # Where a promise is decoded already.
            self.metrics.observe("kvtc_decode_seconds", seconds)
            self._estimate.note_decode(len(leases) * self.transcoder.block_tokens, seconds)
        return out

    def load(self, blocks: Sequence[Block], promises: Sequence[Promise] | None, fence: Any) -> list[bytes]:
        """Keys that are not loaded."""
        if promises is None:
            made = self.promise([b.key for b in blocks], prove=False)
            found = [(block, made[block.key]) for block in blocks if block.key in made]
        else:
            found = list(zip(blocks, promises, strict=True))
        errors: list[Exception | None] = []
        try:
            began = time.monotonic()
            if found:
                errors = self.transcoder.load([b for b, _ in found], [p for _, p in found], fence)
            seconds = time.monotonic() - began
            loaded = [(b, p) for (b, p), error in zip(found, errors, strict=True) if error is None]
            coded = sum(p.coded_bytes for _, p in loaded)
        finally:
            release_promises([promise for _, promise in found])
        for (block, promise), error in zip(found, errors, strict=True):
            if error is not None:
                self.bad(block.key, error, promise.exact)
        if not self.transcoder.staged_is_free and loaded:
            self.metrics.observe("kvtc_decode_seconds", seconds)
            self._estimate.note_decode(len(loaded) * self.transcoder.block_tokens, seconds)
        self.metrics.count("kvtc_raw_bytes", len(loaded) * self.transcoder.raw_block_bytes, "out")
        self.metrics.count("kvtc_coded_bytes", coded, "out")
        self.metrics.count("kvtc_loaded_blocks", len(loaded), "loaded")
        self.metrics.count("kvtc_loaded_blocks", len(blocks) - len(loaded), "failed")
        good = {block.key for block, _ in loaded}
        return [block.key for block in blocks if block.key not in good]

    def bad(self, key: bytes, why: Exception, exact: bool = False) -> None:
        """Damaged in memory: it would be found damaged for ever."""
        self.error(why, "record")
        if exact:
            self._overlay.forget([key])
        else:
            self._store.discard(key)

    def demote(self, source: bytes, target: bytes) -> bool:
        host, disk = self._store.host, self._store.disk
        lease = None if host is None or disk is None else host.get(source)
        if lease is None:
            return False
        with lease:
            assert disk is not None
            return disk.put(target, lease.record)

    def waited(self, seconds: float) -> None:
        self.metrics.observe("kvtc_queue_seconds", seconds, "load")
        self._estimate.note_wait(seconds)

    def store_failed(self, blocks: Sequence[Block], why: BaseException) -> None:
        self.error(why, "encode")
        self.metrics.count("kvtc_stored_blocks", len(blocks), "failed")

    def error(self, why: BaseException, where: str) -> None:
        """Known kinds by name; anything else is a defect of ours, told with its trace."""
        if isinstance(why, (Closed, TooLate, RecordError)):
            log.info("%s: %s: %s", where, type(why).__name__, why)
        else:
            log.error("%s failed", where, exc_info=why)
        self.metrics.count("kvtc_errors", 1, f"{where}_{type(why).__name__}")


def _fits(item: tuple[bytes, memoryview | bytes]) -> bool:
    """Whether there is a record, and stores take it."""
    return 0 < len(item[1]) <= MAX_RECORD_BYTES


def _put_those_that_fit(items: Sequence[tuple[bytes, memoryview | bytes]], put: Put) -> list[bool]:
    """Other blocks must not suffer from one whose record no store takes."""
    stored = iter(put([item for item in items if _fits(item)]))
    return [_fits(item) and next(stored) for item in items]
