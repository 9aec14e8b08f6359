"""Blocks that the leader says it has and that could not be loaded.

The leader takes every store for a success and matches such a block until it evicts it; stored anew, the copy gets
another id and is not what it matches (seen with 1.4.2 to 1.6.1, tests/adapters/kvbm/leader_scenarios.py). So the first
block of a load that failed is remembered by what it is chained over, and later matches end before it: what lies before
is loaded, the rest computed, and no request pays for a load that fails. Whether the leader has evicted it by now nobody
says: after 8 matches one is let through, then after 16, and so on; one that comes well lifts the mark.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

REMEMBERED = 1 << 16
FIRST_RETRY, LAST_RETRY = 8, 1024
"""Matches that are cut short before one is let through."""


@dataclass
class _Mark:
    wait: int = FIRST_RETRY
    left: int = FIRST_RETRY


class Damaged:
    """Not thread-safe: the scheduler's."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._marks: OrderedDict[bytes, _Mark] = OrderedDict()

    def __len__(self) -> int:
        return len(self._marks)

    def note(self, seed: str, tokens: Sequence[int], block: int) -> None:
        """Block number ``block`` of this sequence could not be loaded. seed: what else caches depend on."""
        key = next(key for i, key in self._chain(seed, tokens, block + 1) if i == block)
        mark = self._marks.setdefault(key, _Mark())
        self._marks.move_to_end(key)
        mark.left = mark.wait
        while len(self._marks) > REMEMBERED:
            self._marks.popitem(last=False)

    def cut(self, seed: str, tokens: Sequence[int], first: int, count: int) -> int:
        """How many of the matched blocks, count from the first on, to load."""
        if not self._marks:
            return count
        for i, key in self._chain(seed, tokens, first + count):
            mark = self._marks.get(key) if i >= first else None
            if mark is None:
                continue
            if mark.left > 0:
                mark.left -= 1
                return i - first
            # Let through; if it fails, ``note`` starts the longer wait.
            mark.wait = min(2 * mark.wait, LAST_RETRY)
            mark.left = mark.wait
        return count

    def lift(self, seed: str, tokens: Sequence[int], first: int, count: int) -> None:
        """These blocks were loaded well."""
        if self._marks:
            for i, key in self._chain(seed, tokens, first + count):
                if i >= first:
                    self._marks.pop(key, None)

    def clear(self) -> None:
        self._marks.clear()

    def _chain(self, seed: str, tokens: Sequence[int], blocks: int) -> Iterator[tuple[int, bytes]]:
        n, key = self._block_tokens, hashlib.blake2b(seed.encode(), digest_size=32).digest()
        for i in range(min(blocks, len(tokens) // n)):
            own = array("q", tokens[i * n : (i + 1) * n]).tobytes()
            key = hashlib.blake2b(own, key=key, digest_size=32).digest()
            yield i, key
