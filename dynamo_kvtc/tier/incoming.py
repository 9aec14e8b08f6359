"""Room for a record that another worker sends: in the host's arena where there is some, so that it is kept in place.

Where the host is full its records stay until the one that is to come is here and proven: until then it has memory of
its own."""

from __future__ import annotations

from dynamo_kvtc.store.host import Reservation
from dynamo_kvtc.store.tiered import TieredStore


class Incoming:
    """``record``: where its bytes go. End it with ``keep``, once all of them are here and proven, or ``drop``."""

    def __init__(self, store: TieredStore, key: bytes, nbytes: int) -> None:
        self._store, self._key = store, key
        self._room: Reservation | None = None if store.host is None else store.host.reserve(key, nbytes)
        self.record = memoryview(bytearray(nbytes)) if self._room is None else self._room.record

    def keep(self) -> bool:
        """Whether a tier has it now."""
        if self._room is None:
            return self._store.put(self._key, self.record)
        kept = self._room.commit()
        if kept:
            self._store.stored(self._key)
        return kept

    def drop(self) -> None:
        if self._room is not None:
            self._room.abort()
