"""Between pages and records: a seam with a side for engines on a CPU (cpu.py) and one for those on a GPU (cuda.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from dynamo_kvtc.codec.policy import ExactCounts
from dynamo_kvtc.codec.record import Record
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops.pages.cache import NO_PAGE, PageTable
from dynamo_kvtc.store import Lease, release_all


class Block(NamedTuple):
    """A whole block of the engine's pages. key: of its record; first_position: of its first token in the sequence;
    exact: whether every token is to be stored bit-exact (the tier's own wish: an overlay); others: its pages in the
    cache groups after the first, where the engine's layers are of several; NO_PAGE for one it lacks."""

    key: bytes
    block_id: int
    first_position: int
    exact: bool = False
    others: tuple[int, ...] = ()


def place(blocks: Sequence[Block], table: PageTable | None) -> None:
    """Tells the table, if layers are of several cache groups, where blocks lie. Raises ConfigError."""
    if table is not None:
        table.put([b.block_id for b in blocks], [b.others for b in blocks])


def check_whole(blocks: Sequence[Block]) -> None:
    """Raises ConfigError if one lacks pages: it cannot be read."""
    lacking = [b.block_id for b in blocks if NO_PAGE in b.others]
    if lacking:
        raise ConfigError(
            f"block {lacking[0]} is to be stored, and lacks pages of some layers: it has left their window"
        )


@dataclass(slots=True)
class Promise:
    """A record that has been read and found sound, kept until it is in pages: ``release`` lets it go.

    tier: where it was; coded_bytes: its length; held: what was decoded of it; lease: what is let go of; exact: whether
    it is the overlay's record.
    """

    key: bytes
    tier: str
    coded_bytes: int
    held: Any = None
    lease: Lease | None = None
    exact: bool = False

    def release(self) -> None:
        """Again is no error."""
        release_promises([self])


def release_promises(promises: Iterable[Promise]) -> None:
    """``release`` of each, for less than one by one."""
    leases = []
    for promise in promises:
        if promise.lease is not None:
            leases.append(promise.lease)
        promise.held = promise.lease = None
    release_all(leases)


Put = Callable[[Sequence[tuple[bytes, memoryview | bytes]]], list[bool]]
"""Stores records under keys: whether each is stored."""


class GroupDecoder(Protocol):
    """Loads layer group by layer group, for an engine that computes the first layers while the others come."""

    groups: tuple[tuple[int, int], ...]
    """Each group's layers: the first, and the one after the last."""
    block_bytes: int
    """Of a block, raw."""

    def parse(self, record: memoryview) -> Record:
        """Its header proven, and this codec's; its sections are when they are decoded. Raises RecordError."""
        ...

    def load(self, blocks: Sequence[Block], records: Sequence[Record], group: int) -> list[Exception | None]:
        """This group's sections into the pages of its layers. An error: that block's may have been written in part."""
        ...


class Transcoder(Protocol):
    """Moves blocks between pages and records. ``encode`` and ``promise``/``load`` come from two threads, one each."""

    block_tokens: int
    raw_block_bytes: int
    held_block_bytes: int
    """Of memory that a promise takes."""
    staged_is_free: bool
    """Whether pages may be written again as soon as ``stage`` returns: their bytes were copied."""

    by_group: GroupDecoder | None
    """For loads by layer group; None: there are only whole ones."""

    def fence(self) -> Any:
        """On the engine's thread: a point in what it has launched. None where nothing is asynchronous."""
        ...

    def stage(self, blocks: Sequence[Block], fence: Any) -> Any:
        """On the engine's thread, quickly: what ``encode`` needs. The fence: blocks are whole after it."""
        ...

    def encode(self, staged: Any, put: Put) -> tuple[list[bool], list[int], ExactCounts]:
        """Records of the blocks handed to ``put``, some at a time, in order, an empty one for a block that is too large
        to be coded: what it said, their lengths, exact tokens by reason (those of exact blocks are not counted)."""
        ...

    def promise(
        self, keys: Sequence[bytes], leases: Sequence[Lease], tiers: Sequence[str], prove: bool
    ) -> list[Promise | Exception]:
        """Takes the leases over; what is not sound is an error, and its lease ends. prove: not False unless the caller
        can bear that ``load`` finds a record bad, which may be much cheaper."""
        ...

    def load(self, blocks: Sequence[Block], promises: Sequence[Promise], fence: Any) -> list[Exception | None]:
        """Into the pages, after the fence; done when it returns. An error: the block must count as not loaded."""
        ...

    def close(self) -> None: ...
