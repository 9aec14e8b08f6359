"""Where in one stretch of bytes each record lies: a two-level segregated fit over units of a fixed size.

Free stretches ("holes") are kept in bins by length, 16 bins to a power of two, with a bit for each bin that holds any:
taking and giving back are O(1), and a hole given back is merged with its neighbours at once. Everything is in arrays of
machine integers, 26 bytes a block: a million records are not a million objects for the garbage collector to walk.

Fragmentation: a hole that is found by bin is at most 1/16 longer than it need be, and what is left of it is a hole
again. What is lost to rounding is half a unit a record on average, less than one unit at worst. What is lost because
holes are too small for the next record is won back by the user: ``slide`` moves a used block over the hole before it
(the host arena, which moves bytes), or a record is put into several holes (the disk file).

Not thread-safe: its owner has the lock.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from dynamo_kvtc.errors import ConfigError

NONE = -1
_TRIES = 8
"""Holes of the record's own bin that are looked at before one of a larger bin is cut."""


class Extents:
    """Blocks of units, numbered; a block is used or a hole, and knows its neighbours. Lengths and starts in units."""

    def __init__(self, units: int) -> None:
        """Raises ConfigError for no unit or for more than 2**32 - 1."""
        if not 1 <= units < 1 << 32:
            raise ConfigError(f"{units} units of space; there must be 1 to {2**32 - 1}: change the budget or the unit")
        self.units = units
        self.clear()

    def clear(self) -> None:
        self.start, self.length = array("I"), array("I")
        self.left, self.right = array("i"), array("i")
        self._up, self._down = array("i"), array("i")
        self._used = bytearray()
        self._spare: list[int] = []
        self._heads: dict[int, int] = {}
        self._bitmap = 0
        self.free = 0
        self._put_hole(self._block(0, self.units, NONE, NONE))

    def __len__(self) -> int:
        """Blocks and holes there have been at once: what a table beside this one must have room for."""
        return len(self.start)

    def take(self, units: int) -> int:
        """A used block of exactly so many units, or NONE if no hole is long enough."""
        hole = self._find(units)
        if hole == NONE:
            return NONE
        self._take_hole(hole)
        self._used[hole] = 1
        self.shrink(hole, units)
        return hole

    def shrink(self, block: int, units: int) -> None:
        """Gives the end of a used block back."""
        rest = self.length[block] - units
        if rest:
            self.length[block] = units
            after = self.right[block]
            hole = self._block(self.start[block] + units, rest, block, after)
            self.right[block] = hole
            if after != NONE:
                self.left[after] = hole
            self._put_hole(self._merge_right(hole))

    def give(self, block: int) -> None:
        self._used[block] = 0
        before = self.left[block]
        if before != NONE and not self._used[before]:
            self._take_hole(before)
            block = self._swallow(before, block)
        self._put_hole(self._merge_right(block))

    def is_hole(self, block: int) -> bool:
        return not self._used[block]

    def slide(self, block: int) -> int:
        """Moves a used block to the start of the hole before it; the hole, now behind it and maybe longer."""
        hole, after = self.left[block], self.right[block]
        before = self.left[hole]
        self._take_hole(hole)
        self.start[block] = self.start[hole]
        self.start[hole] = self.start[block] + self.length[block]
        self.left[block], self.right[block] = before, hole
        self.left[hole], self.right[hole] = block, after
        if before != NONE:
            self.right[before] = block
        if after != NONE:
            self.left[after] = hole
        hole = self._merge_right(hole)
        self._put_hole(hole)
        return hole

    def largest_bin(self) -> int:
        """Units of the shortest hole that the fullest-length bin may hold: at most 1/16 under the longest hole's."""
        return _shortest(self._bitmap.bit_length() - 1) if self._bitmap else 0

    def holes(self) -> Iterator[int]:
        """From the longest bin down. The blocks must not change while it runs."""
        bins = self._bitmap
        while bins:
            top = bins.bit_length() - 1
            hole = self._heads[top]
            while hole != NONE:
                yield hole
                hole = self._down[hole]
            bins ^= 1 << top

    def restore(self, places: Sequence[tuple[int, int]]) -> list[int]:
        """From scratch, used blocks at these (start, length), ascending; NONE for one that overlaps or sticks out."""
        self.clear()
        self._take_hole(0)
        self._spare.append(0)
        last, end, out = NONE, 0, []
        for start, length in places:
            if start < end or not length or start + length > self.units:
                out.append(NONE)
                continue
            if start > end:
                last = self._append(end, start - end, last, used=False)
            last = self._append(start, length, last, used=True)
            out.append(last)
            end = start + length
        if end < self.units:
            self._append(end, self.units - end, last, used=False)
        return out

    def _append(self, start: int, length: int, last: int, used: bool) -> int:
        block = self._block(start, length, last, NONE)
        if last != NONE:
            self.right[last] = block
        if used:
            self._used[block] = 1
        else:
            self._put_hole(block)
        return block

    def _find(self, units: int) -> int:
        own = _bin(units)
        hole = self._heads.get(own, NONE)
        for _ in range(_TRIES):
            if hole == NONE:
                break
            if self.length[hole] >= units:
                return hole
            hole = self._down[hole]
        above = self._bitmap >> (own + 1)
        if above:
            return self._heads[own + (above & -above).bit_length()]
        while hole != NONE and self.length[hole] < units:
            hole = self._down[hole]
        return hole

    def _block(self, start: int, length: int, left: int, right: int) -> int:
        if self._spare:
            block = self._spare.pop()
            self.start[block], self.length[block] = start, length
            self.left[block], self.right[block] = left, right
            self._used[block] = 0
            return block
        self.start.append(start)
        self.length.append(length)
        self.left.append(left)
        self.right.append(right)
        self._up.append(NONE)
        self._down.append(NONE)
        self._used.append(0)
        return len(self.start) - 1

    def _merge_right(self, hole: int) -> int:
        after = self.right[hole]
        if after != NONE and not self._used[after]:
            self._take_hole(after)
            hole = self._swallow(hole, after)
        return hole

    def _swallow(self, block: int, after: int) -> int:
        """One block of two neighbours, neither of them in a bin."""
        self.length[block] += self.length[after]
        beyond = self.right[after]
        self.right[block] = beyond
        if beyond != NONE:
            self.left[beyond] = block
        self._spare.append(after)
        return block

    def _put_hole(self, hole: int) -> None:
        which = _bin(self.length[hole])
        head = self._heads.get(which, NONE)
        self._up[hole], self._down[hole] = NONE, head
        if head != NONE:
            self._up[head] = hole
        self._heads[which] = hole
        self._bitmap |= 1 << which
        self.free += self.length[hole]

    def _take_hole(self, hole: int) -> None:
        up, down = self._up[hole], self._down[hole]
        if down != NONE:
            self._up[down] = up
        if up != NONE:
            self._down[up] = down
        else:
            which = _bin(self.length[hole])
            self._heads[which] = down
            if down == NONE:
                self._bitmap ^= 1 << which
        self.free -= self.length[hole]


def _bin(units: int) -> int:
    """Below 32 units a bin a length; above, 16 bins to a power of two."""
    shift = max(units.bit_length() - 5, 0)
    return 16 * shift + (units >> shift)


def _shortest(which: int) -> int:
    shift = max(which // 16 - 1, 0)
    return (which - 16 * shift) << shift
