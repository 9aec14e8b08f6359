"""What lies where, how long unused, and who is looking at it: the bookkeeping that host and disk share.

An entry is a slot: the number of its (first) block in ``Extents``. Recency is a linked list through arrays, a key costs
one place in a dict: 190 bytes a record in all, its key of 32 bytes included (measured at a million). Pinned entries are
not in the list: the oldest entry is always free to go, in O(1). Entries may be *spare*: what can be missed best, with
a list of their own. Not thread-safe: its owner has the lock.
"""

from __future__ import annotations

from array import array

from dynamo_kvtc.store.extents import NONE, Extents


class Shelf:
    """Keys, blocks, pins and recency. ``units`` is a record's length in units of the extents, rounded up."""

    def __init__(self, units: int, unit_bytes: int, max_parts: int = 1) -> None:
        self.extents = Extents(units)
        self.unit_bytes = unit_bytes
        self._max_parts = max_parts
        self.reset()

    def reset(self) -> None:
        self.slots: dict[bytes, int] = {}
        self.record_bytes = self.spare_bytes = 0
        self.keys: list[bytes | None] = []
        self.nbytes = array("I")
        self.pins = array("I")
        self.spare = array("B")
        self._more: dict[int, list[int]] = {}
        self._older, self._newer = array("i"), array("i")
        # Of the lasting entries, of the spare ones.
        self._oldest, self._newest = [NONE, NONE], [NONE, NONE]

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def used_bytes(self) -> int:
        return (self.extents.units - self.extents.free) * self.unit_bytes

    @property
    def fragmentation(self) -> float:
        free = self.extents.free
        return max(0.0, 1 - self.extents.largest_bin() * 17 / 16 / free) if free else 0.0

    def units(self, nbytes: int) -> int:
        return -(-nbytes // self.unit_bytes)

    def take(self, nbytes: int, spare: bool = False) -> int:
        """Room for a record: a slot, pinned once, without a key; NONE if there is no such room."""
        units = self.units(nbytes)
        slot = self.extents.take(units)
        if slot == NONE:
            if self._max_parts == 1 or self.extents.free < units:
                return NONE
            slot = self._take_parts(units)
            if slot == NONE:
                return NONE
        self._grow()
        self.nbytes[slot], self.pins[slot], self.keys[slot], self.spare[slot] = nbytes, 1, None, spare
        return slot

    def places(self, slot: int) -> list[tuple[int, int]]:
        """(offset, length) in bytes of a slot's room, in the record's order."""
        e, unit = self.extents, self.unit_bytes
        return [(e.start[b] * unit, e.length[b] * unit) for b in (slot, *self._more.get(slot, ()))]

    def shrink(self, slot: int, nbytes: int) -> None:
        """The record became shorter than its room. For slots of one block."""
        self.nbytes[slot] = nbytes
        self.extents.shrink(slot, self.units(nbytes))

    def name(self, slot: int, key: bytes) -> None:
        """The slot's record is whole: it can be found. Its pin stays."""
        self.slots[key] = slot
        self.keys[slot] = key
        self.record_bytes += self.nbytes[slot]
        self.spare_bytes += self.nbytes[slot] * self.spare[slot]

    def adopt(self, entries: list[tuple[bytes, int, list[tuple[int, int]]]]) -> list[int]:
        """From scratch: (key, nbytes, [(start, length) in units]), oldest first; slots, NONE for one that cannot be."""
        self.reset()
        flat = sorted((place, i, j) for i, (_, _, places) in enumerate(entries) for j, place in enumerate(places))
        blocks: list[list[int]] = [[NONE] * len(places) for _, _, places in entries]
        for (_, i, j), block in zip(flat, self.extents.restore([place for place, _, _ in flat]), strict=True):
            blocks[i][j] = block
        self._grow()
        out = []
        for (key, nbytes, places), own in zip(entries, blocks, strict=True):
            fits = self.units(nbytes) == sum(length for _, length in places)
            if NONE in own or not own or key in self.slots or not fits:
                for block in own:
                    if block != NONE:
                        self.extents.give(block)
                out.append(NONE)
                continue
            slot = own[0]
            if len(own) > 1:
                self._more[slot] = own[1:]
            self.nbytes[slot], self.pins[slot], self.spare[slot] = nbytes, 1, False
            self.name(slot, key)
            self.unpin(slot)
            out.append(slot)
        return out

    def pin(self, slot: int) -> None:
        if not self.pins[slot]:
            self._unlink(slot)
        self.pins[slot] += 1

    def unpin(self, slot: int) -> bool:
        """One who looked is done: the entry is now the newest. True if its room was given back: it had been dropped."""
        self.pins[slot] -= 1
        if self.pins[slot]:
            return False
        if self.keys[slot] is None:
            self.give(slot)
            return True
        self._link(slot)
        return False

    def use(self, slot: int) -> None:
        if not self.pins[slot]:
            self._unlink(slot)
            self._link(slot)

    def drop(self, slot: int) -> None:
        """It cannot be found from now on. Its room stays taken: pinned, and to be unpinned by the caller."""
        self.pin(slot)
        key = self.keys[slot]
        assert key is not None
        del self.slots[key]
        self.keys[slot] = None
        self.record_bytes -= self.nbytes[slot]
        self.spare_bytes -= self.nbytes[slot] * self.spare[slot]

    def oldest(self, spare_only: bool = False) -> int:
        """The least recently used slot that nobody looks at, a spare one before all others, or NONE."""
        return self._oldest[1] if spare_only or self._oldest[1] != NONE else self._oldest[0]

    def by_age(self) -> list[int]:
        """Lasting slots in the list, the oldest first."""
        out, slot = [], self._oldest[0]
        while slot != NONE:
            out.append(slot)
            slot = self._newer[slot]
        return out

    def give(self, slot: int) -> None:
        """Its room is free: for a slot that has no key and no pin."""
        for block in (slot, *self._more.pop(slot, ())):
            self.extents.give(block)

    def _take_parts(self, units: int) -> int:
        parts: list[int] = []
        while units and len(parts) < self._max_parts:
            block = self.extents.take(units)
            if block == NONE:
                hole = next(self.extents.holes())
                block = self.extents.take(min(units, self.extents.length[hole]))
            parts.append(block)
            units -= self.extents.length[block]
        if units:
            for block in parts:
                self.extents.give(block)
            return NONE
        if len(parts) > 1:
            self._more[parts[0]] = parts[1:]
        return parts[0]

    def _grow(self) -> None:
        lacking = len(self.extents) - len(self.keys)
        if lacking > 0:
            self.keys.extend([None] * lacking)
            for table in (self.nbytes, self.pins):
                table.extend([0] * lacking)
            self.spare.extend([0] * lacking)
            for links in (self._older, self._newer):
                links.extend([NONE] * lacking)

    def _link(self, slot: int) -> None:
        which = self.spare[slot]
        newest = self._newest[which]
        self._older[slot], self._newer[slot] = newest, NONE
        if newest != NONE:
            self._newer[newest] = slot
        else:
            self._oldest[which] = slot
        self._newest[which] = slot

    def _unlink(self, slot: int) -> None:
        which, older, newer = self.spare[slot], self._older[slot], self._newer[slot]
        if older != NONE:
            self._newer[older] = newer
        else:
            self._oldest[which] = newer
        if newer != NONE:
            self._older[newer] = older
        else:
            self._newest[which] = older
