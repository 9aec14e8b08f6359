"""What a ledger decides, and what it remembers of an operation while it is open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dynamo_kvtc.adapters.kvbm.mover import MoveRequest
from dynamo_kvtc.adapters.kvbm.protocol import Pool, Transfer
from dynamo_kvtc.adapters.kvbm.step import Operation as EngineHalf


@dataclass(frozen=True)
class Answer:
    """Frames for the leader."""

    frames: list[bytes]


@dataclass(frozen=True)
class Capacity:
    host_blocks: int
    disk_blocks: int


@dataclass(frozen=True)
class Move:
    """A store or a load for the mover; ``done(token, failed target ids)`` when it has ended."""

    token: int
    load: bool
    request: MoveRequest


@dataclass(frozen=True)
class Demotion:
    token: int
    pairs: tuple[tuple[int, int], ...]


Action = Answer | Capacity | Move | Demotion


@dataclass
class OpenOperation:
    """Two halves and a life. ``token`` is set once the mover has it."""

    request_id: str
    uuid: str
    load: bool
    born: float
    message_id: int | None = None
    transfer: Transfer | None = None
    operation: EngineHalf | None = None
    released: bool = False
    fence: Any = None
    token: int | None = None

    @property
    def half_missing(self) -> bool:
        return self.transfer is None or self.operation is None


@dataclass
class Running:
    """What the mover is doing. ``pool``, ``targets``: of what is not present unless it succeeds."""

    message_id: int
    deadline: float
    pool: Pool
    targets: tuple[int, ...]
    already_failed: frozenset[int]
    operation: OpenOperation | None
