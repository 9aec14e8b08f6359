"""Records into a CPU's pages, one layer group after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.codec.record import Record
from dynamo_kvtc.errors import ConfigError, RecordError, RecordMismatchError
from dynamo_kvtc.tier.pages import Pages
from dynamo_kvtc.tier.transcode import Block, place


class CpuGroups:
    """take_threads: called on the thread that decodes, before it does."""

    def __init__(self, codec: BlockCodec, pages: Pages, take_threads: Callable[[], None]) -> None:
        self._codec, self._pages, self._take_threads = codec, pages, take_threads
        self.groups = codec.artifact.manifest.groups
        self.block_bytes = pages.block_tokens * codec.shape.bytes_per_token

    def parse(self, record: memoryview) -> Record:
        parsed = self._codec.parse(record)
        if parsed.header.tokens != self._pages.block_tokens:
            raise RecordMismatchError(
                f"the record has {parsed.header.tokens} tokens, a block {self._pages.block_tokens}"
            )
        return parsed

    def load(self, blocks: Sequence[Block], records: Sequence[Record], group: int) -> list[Exception | None]:
        self._take_threads()
        out = [self._check(block, record) for block, record in zip(blocks, records, strict=True)]
        good = [i for i, wrong in enumerate(out) if wrong is None]
        if good:
            try:
                self._decode([blocks[i] for i in good], [records[i] for i in good], group)
            except RecordError:
                # At once if all are sound, which is the rule; else one by one.
                for i in good:
                    try:
                        self._decode([blocks[i]], [records[i]], group)
                    except RecordError as exc:
                        out[i] = exc
        return out

    def _decode(self, blocks: Sequence[Block], records: Sequence[Record], group: int) -> None:
        k, v = self._codec.decode_group(records, group)
        place(blocks, self._pages.table)
        self._pages.write([b.block_id for b in blocks], k, v, first_layer=self.groups[group][0])

    def _check(self, block: Block, record: Record) -> Exception | None:
        if not 0 <= block.block_id < self._pages.blocks:
            raise ConfigError(f"block {block.block_id} is asked for; the cache has {self._pages.blocks}")
        positions, n = record.header.positions, self._pages.block_tokens
        wanted = np.arange(block.first_position, block.first_position + n)
        if not np.array_equal(positions, wanted):
            return RecordMismatchError(f"the record starts at {int(positions[0])}, its block at {block.first_position}")
        return None
