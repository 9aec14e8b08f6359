"""A coding mover over a small cache, and what tests ask of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from dynamo_kvtc.adapters.kvbm._compat import endpoints
from dynamo_kvtc.adapters.kvbm.budget import Budget, read_budget
from dynamo_kvtc.adapters.kvbm.budget import Pool as BudgetPool
from dynamo_kvtc.adapters.kvbm.mover import BlockMove, MoveRequest
from dynamo_kvtc.adapters.kvbm.options import parse_coding
from dynamo_kvtc.adapters.kvbm.protocol import Pool
from dynamo_kvtc.adapters.kvbm.tier_mover import TierMover, code_blocks
from dynamo_kvtc.ops.pages import PagedCache
from dynamo_kvtc.tier.identity import EngineCache
from dynamo_kvtc.tier.pages import StridedPages
from dynamo_kvtc.types import KVShape
from tests.builders import make_artifact, random_kv
from tests.tier.parts import BLOCK_TOKENS, Answer, Engine

HOST, NONE = BudgetPool(0.01, 0), BudgetPool(0.0, 0)


def open_coding(engine: Engine, host: BudgetPool = HOST, disk: BudgetPool = NONE, **options: Any) -> TierMover:
    """The disk's folder: DYN_KVBM_DISK_CACHE_DIR."""
    given = {"artifact": "given", "point": "fine", "queue_mib": 16, **options}
    budget = Budget(host, disk, 1)
    mover = code_blocks(
        parse_coding(given), engine.cache(), engine.pages, engine.artifact, budget, "tcp://127.0.0.1:5"
    )  # fmt: skip
    mover.set_capacity(1000 if host else 0, 1000 if disk else 0)
    return mover


def request(mover: TierMover, pool: Pool, moves: Sequence[tuple[int, int, int]], seconds: float = 120) -> MoveRequest:
    made = tuple(BlockMove(*move) for move in moves)
    return MoveRequest("r", pool, made, mover.fence(), time.monotonic() + seconds)


def ask(start: Any, what: Any) -> list[int]:
    """Ids that failed."""
    done = Answer()
    start(what, done)
    return sorted(done.get())


def store(mover: TierMover, engine: Engine, blocks: Sequence[int], ids: Sequence[int], pool: Pool = Pool.HOST) -> Any:
    """Blocks of the engine's sequence, by number, to ids of the pool."""
    moves = [(engine.order[b], i, b * BLOCK_TOKENS) for b, i in zip(blocks, ids, strict=True)]
    return ask(mover.store, request(mover, pool, moves))


def load(
    mover: TierMover, engine: Engine, ids: Sequence[int], blocks: Sequence[int], pool: Pool = Pool.HOST,
    shift: int = 0,
) -> list[int]:  # fmt: skip
    """Ids of the pool to where those blocks of the sequence lie; numbers of blocks that failed."""
    moves = [(i, engine.order[b], b * BLOCK_TOKENS + shift) for b, i in zip(blocks, ids, strict=True)]
    failed = ask(mover.load, request(mover, pool, moves))
    return sorted(engine.order.index(b) for b in failed)


def coding_rank(rank: int, world: int, block_tokens: int, blocks: int, options: Any) -> tuple[Any, TierMover]:
    """A rank's pages full of its own content, and the coding mover over them, budgets from the environment."""
    shape = KVShape(3, 2 * world, 16, "bfloat16")
    artifact = make_artifact(shape, groups=((0, 1), (1, 3)), components=20, tp_size=world)[2].for_rank(rank)
    own, m = artifact.shape, artifact.manifest
    views = [torch.zeros(blocks, own.kv_heads, block_tokens, 2 * own.head_dim, dtype=own.torch_dtype) for _ in range(3)]
    pages = StridedPages(PagedCache.of([x[..., :16] for x in views], [x[..., 16:] for x in views]))
    # Four blocks each as at the begin of a sequence, from block 10 on: what scenarios store.
    parts = [random_kv(artifact, 4 * block_tokens, 1000 * rank + g) for g in range(blocks // 4)]
    k, v = (torch.cat([p[i] for p in parts], 2).roll(10 * block_tokens, 2) for i in (0, 1))
    pages.write(list(range(blocks)), k, v)
    pages.content = k if rank % 2 == 0 else v
    cache = EngineCache(m.model, m.shape, m.rope, rank, world, block_tokens)
    given = parse_coding({"artifact": "given", "point": "fine", "queue_mib": 16, **options})
    return pages, code_blocks(given, cache, pages, artifact, read_budget(world), endpoints().publish)
