"""KVBM's blocks through the codec: the ``BlockMover`` behind which the tier keeps coded records.

The leader decides what lies where and when it goes; the tier's own demotion, promotion and admission are off. Ids are
the leader's and are reused, so a record's key is made of this session, the pool, the id and a generation that counts
every write: a write that comes late is another key's, and nobody asks for it. What was overwritten is forgotten, once
nobody reads it any more.

What the budgets have no room for after all is evicted, least recently used first, and its load fails. The disk is
scratch: the leader's index dies with its process, so the folder is emptied at start (it lies in
DYN_KVBM_DISK_CACHE_DIR, else /tmp, or in the option disk_path).
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence

from dynamo_kvtc.adapters.engine_model import model_of, share_the_interpreter
from dynamo_kvtc.adapters.kvbm._compat import endpoints
from dynamo_kvtc.adapters.kvbm.budget import Budget, block_bytes, disk_root, read_budget
from dynamo_kvtc.adapters.kvbm.mover import Done, MoverContext, MoveRequest
from dynamo_kvtc.adapters.kvbm.options import CodingOptions, parse_coding
from dynamo_kvtc.adapters.kvbm.pages import engine_pages
from dynamo_kvtc.adapters.kvbm.protocol import Pool
from dynamo_kvtc.codec.artifact import Artifact, load_artifact
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops.pages import PagedCache
from dynamo_kvtc.store.placed import Place
from dynamo_kvtc.tier.build import open_tier
from dynamo_kvtc.tier.identity import EngineCache, point_of
from dynamo_kvtc.tier.metrics import Sink, TierMetrics
from dynamo_kvtc.tier.pages import Pages
from dynamo_kvtc.tier.tier import Tier
from dynamo_kvtc.tier.transcode import Block

_NONCE_BYTES = 16
_KEY = struct.Struct("<16sBQQ")
"""Session, pool, id, generation."""
_POOLS = (Pool.HOST, Pool.DISK)
_HOST = _POOLS.index(Pool.HOST)
REFRESH_SECONDS = 1.0
_NOTED = 1 << 16
"""Numbers that wait for an engine which may not ask for them."""

log = logging.getLogger(__name__)

MakeTier = Callable[[Place, Callable[[bytes], None], Sink], Tier]
"""(the tier of a key, what to tell of a key that was evicted or lost, and of numbers) -> an open tier."""


class TierMover:
    def __init__(self, make_tier: MakeTier, bytes_per_block: int) -> None:
        self._bytes_per_block = bytes_per_block
        self._lock = threading.Lock()
        self._nonce = os.urandom(_NONCE_BYTES)
        self._generation = 0
        self._latest: dict[tuple[Pool, int], bytes] = {}
        """The key of an id's newest write, done or not."""
        self._whole: set[bytes] = set()
        """Keys whose write is done."""
        self._readers: Counter[bytes] = Counter()
        self.noted: deque[tuple[str, str, float, tuple[str, ...]]] = deque(maxlen=_NOTED)
        self._refreshed = 0.0
        self.tier = make_tier(_place, self._gone, lambda *what: self.noted.append(what))

    @property
    def bytes_per_block(self) -> int:
        return self._bytes_per_block

    def set_capacity(self, host_blocks: int, disk_blocks: int) -> None:
        """Raises ConfigError if the leader has a pool that this worker has no budget for."""
        held = self.tier.budgets()
        for pool, blocks, name in (("host", host_blocks, "CPU"), ("disk", disk_blocks, "DISK")):
            if blocks and not held.get(pool):
                raise ConfigError(
                    f"KVBM's leader has {blocks} {pool} blocks, this worker no {pool} budget: set DYN_KVBM_{name}_CACHE"
                    "_GB to the same in the environment of leader and workers"
                )
        with self._lock:
            self._nonce = os.urandom(_NONCE_BYTES)
            self._latest.clear()
            self._whole.clear()
        self.tier.clear()
        log.info("KVBM has %d host and %d disk blocks, in %s", host_blocks, disk_blocks, held)

    def fence(self) -> object:
        return self.tier.fence()

    def store(self, request: MoveRequest, done: Done) -> None:
        keys = self._begin(request.pool, [move.target for move in request.moves])
        blocks = [
            Block(key, move.source, move.first_position) for key, move in zip(keys, request.moves, strict=True)
        ]  # fmt: skip

        def ended(failed: Collection[bytes]) -> None:
            done(self._end(keys, failed))

        if not self.tier.store(blocks, ended, fence=request.fence, deadline=request.deadline):
            ended(keys)

    def load(self, request: MoveRequest, done: Done) -> None:
        """What is not there when it is asked for fails; a store of it that is still under way is not waited for."""
        keys = self._read(request.pool, [move.source for move in request.moves])
        found = [(key, move) for key, move in zip(keys, request.moves, strict=True) if key is not None]
        missing = [move.target for key, move in zip(keys, request.moves, strict=True) if key is None]
        blocks = [Block(key, move.target, move.first_position) for key, move in found]
        # The tier counts those that it is asked for.
        self.tier.metrics.count("kvtc_loaded_blocks", len(missing), "failed")

        def ended(failed: Collection[bytes]) -> None:
            bad = set(failed)
            try:
                done([*missing, *(move.target for key, move in found if key in bad)])
            finally:
                self._release([key for key, _ in found])

        if not blocks or not self.tier.load(blocks, ended, fence=request.fence, deadline=request.deadline):
            ended([key for key, _ in found])

    def demote(self, pairs: tuple[tuple[int, int], ...], done: Done) -> None:
        sources = self._read(Pool.HOST, [source for source, _ in pairs])
        targets = self._begin(Pool.DISK, [target for _, target in pairs])
        missing = [target for source, target in zip(sources, targets, strict=True) if source is None]
        found = [(source, target) for source, target in zip(sources, targets, strict=True) if source is not None]

        def ended(failed: Collection[bytes]) -> None:
            self._release([source for source, _ in found])
            done(self._end(targets, [*missing, *failed]))

        if not found or not self.tier.demote(found, ended):
            ended([target for _, target in found])

    def take_stats(self) -> list[tuple[str, str, float, tuple[str, ...]]]:
        """What the tier has counted since the last call, as ``tier.metrics.Sink`` is told it."""
        now = time.monotonic()
        if now - self._refreshed > REFRESH_SECONDS:
            self._refreshed = now
            self.tier.refresh()
        out = []
        while self.noted:
            out.append(self.noted.popleft())
        return out

    def shutdown(self, timeout_seconds: float) -> None:
        if self.tier.closed:
            return
        if not self.tier.close(timeout_seconds):
            log.warning("the tier was closed before all that was stored was where it belongs")
        told = {name: round(value, 3) for name, value in self.tier.metrics.totals().items() if value}
        log.info("kvtc tier, in all: %s", told)

    def _begin(self, pool: Pool, ids: Sequence[int]) -> list[bytes]:
        """Keys of new generations; the older ones are forgotten."""
        with self._lock:
            stale = [old for i in ids if (old := self._latest.get((pool, i))) is not None]
            keys = []
            for i in ids:
                self._generation += 1
                keys.append(_KEY.pack(self._nonce, _POOLS.index(pool), i, self._generation))
                self._latest[pool, i] = keys[-1]
            self._whole.difference_update(stale)
            unread = [key for key in stale if not self._readers[key]]
        self.tier.forget(unread)
        return keys

    def _end(self, keys: Sequence[bytes], failed: Collection[bytes]) -> list[int]:
        """The writes of these keys have ended: ids of those that hold nothing."""
        bad = set(failed)
        with self._lock:
            late = [key for key in keys if self._latest.get(_named(key)) != key]
            bad.update(late)
            for key in bad.difference(late):
                del self._latest[_named(key)]
            self._whole.update(key for key in keys if key not in bad)
        self.tier.forget([key for key in late if key not in failed])
        return [_named(key)[1] for key in keys if key in bad]

    def _read(self, pool: Pool, ids: Sequence[int]) -> list[bytes | None]:
        """Their keys, not to be forgotten before ``_release``; None for what is not there."""
        with self._lock:
            latest = [self._latest.get((pool, i)) for i in ids]
            keys = [key if key in self._whole else None for key in latest]
            self._readers.update(key for key in keys if key is not None)
        return keys

    def _release(self, keys: Sequence[bytes]) -> None:
        with self._lock:
            self._readers.subtract(keys)
            unread = [key for key in set(keys) if not self._readers[key]]
            for key in unread:
                del self._readers[key]
            stale = [key for key in unread if self._latest.get(_named(key)) != key]
        self.tier.forget(stale)

    def _gone(self, key: bytes) -> None:
        """Evicted by the budget or lost by the disk. From any thread."""
        with self._lock:
            self._whole.discard(key)
            if self._latest.get(_named(key)) == key:
                del self._latest[_named(key)]


def open_mover(context: MoverContext) -> TierMover:
    """What the connector uses unless it is told otherwise. Raises ConfigError, ArtifactError, UnsupportedModelError or
    MissingDependencyError: all that can be refused is refused here."""
    options = parse_coding(context.options)
    config = context.engine_config
    parallel, cache = config.parallel_config, config.cache_config
    if parallel.tensor_parallel_size != context.world_size:
        raise ConfigError(
            f"the engine has {context.world_size} workers, {parallel.tensor_parallel_size} of them tensor-parallel; an "
            "artifact knows tensor-parallel ranks alone: leave out pipeline and context parallelism"
        )
    artifact = load_artifact(options.given["artifact"], context.rank)
    dtype = config.model_config.dtype if cache.cache_dtype == "auto" else cache.cache_dtype
    weights = options.given.get("weights", "verify")
    model = config.model_config.model
    engine = EngineCache(
        *model_of(model, str(dtype).removeprefix("torch."), weights, artifact), tp_rank=context.rank,
        tp_size=context.world_size, block_tokens=context.block_tokens,
    )  # fmt: skip
    engine.check(artifact)
    pages = engine_pages(context, artifact.shape)
    share_the_interpreter()
    return code_blocks(options, engine, pages, artifact, read_budget(context.world_size), endpoints().publish)


def code_blocks(
    options: CodingOptions, engine: EngineCache, pages: Pages | PagedCache, artifact: Artifact, budget: Budget,
    publish: str,
) -> TierMover:  # fmt: skip
    """publish: the leader's endpoint, which names the scratch folder."""
    if "disk_path" in options.given and not budget.disk:
        raise ConfigError(
            f"disk_path is {options.given['disk_path']!r} and KVBM has no disk: set DYN_KVBM_DISK_CACHE_GB, or leave "
            "disk_path out"
        )
    probe = options.tier(1 << 30, 0, None)
    size = options.block_bytes or block_bytes(
        artifact, point_of(artifact, probe.point), probe.exact, probe.sinks, engine.block_tokens, bool(budget.disk)
    )
    root = disk_root(publish) if budget.disk else None
    tier = options.tier(budget.host_bytes(size), budget.disk_bytes(size), root)
    queue = tier.queue_bytes
    if isinstance(pages, PagedCache) and not options.queue_is_set:
        # What waits there is in the engine's pages, which are the engine's until it is done.
        queue = pages.blocks * engine.block_tokens * artifact.shape.bytes_per_token

    def make(place: Place, gone: Callable[[bytes], None], sink: Sink) -> Tier:
        metrics = TierMetrics(sink=sink)
        return open_tier(tier, engine, pages, artifact, metrics, on_removed=gone, place=place, queue_bytes=queue)

    mover = TierMover(make, size)
    log.info("kvtc behind KVBM: %s, %d bytes a block of %d tokens", tier, size, engine.block_tokens)
    return mover


def _place(key: bytes) -> str:
    return "host" if key[_NONCE_BYTES] == _HOST else "disk"


def _named(key: bytes) -> tuple[Pool, int]:
    _, pool, number, _ = _KEY.unpack(key)
    return _POOLS[pool], number
