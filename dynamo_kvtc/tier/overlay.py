"""The exact tail of a conversation: what a sequence ends with matters most, and is asked for next.

Beside the coded record of such a block lies, while the host has memory that no other record wants, one with every token
exact. A load takes it where it is; both are right, it is the better one. It is the first to be evicted, never goes to
disk, and is forgotten once its sequence has grown past it. A prefix that others share may be loaded either way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from dynamo_kvtc.store import Lease
from dynamo_kvtc.store.host import HostStore
from dynamo_kvtc.tier.identity import KeySpace
from dynamo_kvtc.tier.metrics import TierMetrics
from dynamo_kvtc.tier.transcode import Block

WINDOW_TOKENS = 128
"""The default: the window that quality is measured with."""


class Overlay:
    """keys: a space of exact records; block_bytes: of a block without any coding. Off without a host, or tokens 0."""

    def __init__(
        self, host: HostStore | None, keys: KeySpace, metrics: TierMetrics, tokens: int, block_bytes: int
    ) -> None:  # fmt: skip
        self._host, self._keys, self._metrics, self._block_bytes = host, keys, metrics, block_bytes
        self.tokens = 0 if host is None else tokens

    def key(self, key: bytes) -> bytes:
        """Of the exact record beside a coded one."""
        return self._keys.key(key)

    def of(self, blocks: Sequence[Block], tail: Collection[bytes]) -> list[Block]:
        """Blocks of the tail once more, to be coded exact: none where there is no room, so that nothing is coded for
        nothing."""
        if not self.tokens or self._host is None or not tail:
            return []
        found = [b._replace(key=self.key(b.key), exact=True) for b in blocks if b.key in tail]
        room = self._host.spare_room // self._block_bytes
        self._metrics.count("kvtc_overlay_blocks", max(0, len(found) - room), "no_room")
        # The last ones matter most.
        return found[max(0, len(found) - room) :]

    def put_many(self, items: Sequence[tuple[bytes, memoryview | bytes]]) -> list[bool]:
        if not items:
            return []
        assert self._host is not None
        stored = self._host.put_many(items, spare=True)
        self._metrics.count("kvtc_overlay_blocks", sum(stored), "stored")
        self._metrics.count("kvtc_overlay_blocks", len(stored) - sum(stored), "no_room")
        return stored

    def get_many(self, keys: Sequence[bytes]) -> list[tuple[bytes, Lease]]:
        """Those of the keys that have an exact record, and it."""
        if self._host is None or not self._host.spare_bytes:
            return []
        found = [(key, self._host.peek(self.key(key))) for key in keys]
        return [(key, lease) for key, lease in found if lease is not None]

    def forget(self, keys: Iterable[bytes]) -> None:
        if self._host is not None and self._host.spare_bytes:
            for key in keys:
                self._host.remove(self.key(key))

    def moved_on(self, keys: Iterable[bytes]) -> None:
        """Blocks that are no sequence's tail any more."""
        if self._host is not None and self._host.spare_bytes:
            gone = sum(self._host.remove(self.key(key)) for key in keys)
            self._metrics.count("kvtc_overlay_blocks", gone, "moved_on")

    def refresh(self) -> None:
        self._metrics.set("kvtc_overlay_bytes", 0 if self._host is None else self._host.spare_bytes)
