"""A coding mover over a small cache, and what tests ask of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from dynamo_kvtc.adapters.kvbm.budget import Budget
from dynamo_kvtc.adapters.kvbm.budget import Pool as BudgetPool
from dynamo_kvtc.adapters.kvbm.mover import BlockMove, MoveRequest
from dynamo_kvtc.adapters.kvbm.options import parse_coding
from dynamo_kvtc.adapters.kvbm.protocol import Pool
from dynamo_kvtc.adapters.kvbm.tier_mover import TierMover, code_blocks
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
