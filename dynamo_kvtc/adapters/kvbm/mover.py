"""What moves a block's bytes: the seam between KVBM's protocol and the tier. The worker says what moves where and
when it may; a ``BlockMover`` moves it.

Ids are the leader's and are reused: a store or demotion to an id replaces what was there, and that is the only notice
of an eviction. ``present`` bookkeeping is the worker's: it never asks for an id whose last store failed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from dynamo_kvtc.adapters.kvbm.protocol import Pool
from dynamo_kvtc.errors import ConfigError

Done = Callable[[Collection[int]], None]
"""Called exactly once when a request has ended, from any thread, with the target ids that failed: empty when all is
well. Nothing of the request may be read from or written to the device's pages after the call."""


@dataclass(frozen=True)
class BlockMove:
    """One block. ``first_position``: the position of the block's first token in its sequence."""

    source: int
    target: int
    first_position: int


@dataclass(frozen=True)
class MoveRequest:
    """Blocks of one request between the device and a pool (``pool``: host or disk).

    fence: what ``BlockMover.fence`` returned on the engine's thread when the move was allowed; a move is ordered
        after what the engine had launched by then.
    deadline: ``time.monotonic()`` seconds by which ``done`` must have been called, with what is not there yet as
        failed. A load that may still write after that leaves the worker no way out but to stop the engine.
    """

    request_id: str
    pool: Pool
    moves: tuple[BlockMove, ...]
    fence: Any
    deadline: float


@dataclass(frozen=True)
class MoverContext:
    """What a factory gets. ``kv_caches``: the engine's tensors in layer order; ``engine_config``: vLLM's VllmConfig."""

    kv_caches: Mapping[str, Any]
    device_blocks: int
    block_tokens: int
    rank: int
    world_size: int
    options: Mapping[str, Any]
    engine_config: Any = None


class BlockMover(Protocol):
    """Moves blocks; every method but ``shutdown`` returns at once. Moves that name the same pool id are done in the
    order they were asked for, or fail. A load writes what was stored at the same first position, or it fails."""

    @property
    def bytes_per_block(self) -> int:
        """Mean bytes of a stored block of this rank: the leader divides its budgets by it. Asked once, at start."""

    def set_capacity(self, host_blocks: int, disk_blocks: int) -> None:
        """The leader's pools: ids are 0 .. blocks - 1. Called before any move; called again, all ids are void."""

    def fence(self) -> Any:
        """On the engine's thread: a point in what it has launched. An event on a GPU, None where nothing is async."""

    def store(self, request: MoveRequest, done: Done) -> None:
        """Device blocks (source) to the pool (target). A failed id holds nothing afterwards."""

    def load(self, request: MoveRequest, done: Done) -> None:
        """The pool's blocks (source) to the device (target). Wrong bytes are never written: such an id fails."""

    def demote(self, pairs: tuple[tuple[int, int], ...], done: Done) -> None:
        """Host ids (source) to disk ids (target). The host's copy stays."""

    def shutdown(self, timeout_seconds: float) -> None:
        """Ends what is moving, as failed where it must; afterwards nothing touches the device's pages."""


MoverFactory = Callable[[MoverContext], BlockMover]


def find_factory(path: str) -> MoverFactory:
    """The factory named by "package.module:function". Raises ConfigError."""
    module, colon, name = path.partition(":")
    if not (colon and module and name):
        raise ConfigError(f"mover is {path!r}; it must be 'package.module:function'")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as exc:
        raise ConfigError(f"mover {path!r} cannot be imported: {exc}") from exc
    if not callable(found):
        raise ConfigError(f"mover {path!r} is a {type(found).__name__}; it must be callable")
    return cast(MoverFactory, found)
