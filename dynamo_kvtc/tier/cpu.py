"""Pages of an engine on a CPU: copied on the engine's thread, coded by the reference codec; decoded before a promise,
so that keeping it is a copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.codec.policy import ExactCounts
from dynamo_kvtc.errors import ConfigError, RecordError, RecordMismatchError
from dynamo_kvtc.store import Lease
from dynamo_kvtc.tier.cpu_groups import CpuGroups
from dynamo_kvtc.tier.pages import Pages
from dynamo_kvtc.tier.transcode import Block, GroupDecoder, Promise, Put, check_whole, place

Staged = tuple[Sequence[Block], Tensor, Tensor]


class CpuTranscoder:
    """A promise holds the decoded block: raw_block_bytes of memory until it is released."""

    staged_is_free = True

    def __init__(self, codec: BlockCodec, pages: Pages) -> None:
        self._codec, self._pages = codec, pages
        self._threads = torch.get_num_threads()
        self.block_tokens = pages.block_tokens
        self.raw_block_bytes = self.held_block_bytes = pages.block_tokens * codec.shape.bytes_per_token
        self.by_group: GroupDecoder | None = CpuGroups(codec, pages, self._take_threads)
        self._warm_up()

    def fence(self) -> None:
        return None

    def stage(self, blocks: Sequence[Block], fence: None) -> Staged:
        self._check(blocks)
        check_whole(blocks)
        place(blocks, self._pages.table)
        return (blocks, *self._pages.read([b.block_id for b in blocks]))

    def encode(self, staged: Staged, put: Put) -> tuple[list[bool], list[int], ExactCounts]:
        self._take_threads()
        blocks, k, v = staged
        positions = torch.cat([torch.arange(b.first_position, b.first_position + self.block_tokens) for b in blocks])
        whole = torch.tensor([b.exact for b in blocks]).repeat_interleave(self.block_tokens)
        exact = whole | (positions < self._codec.policy.sinks)
        encoded = self._codec.encode_blocks(k, v, positions, exact, self.block_tokens)
        stored = put([(block.key, e.record) for block, e in zip(blocks, encoded, strict=True)])
        counts = [e.exact for block, e in zip(blocks, encoded, strict=True) if not block.exact]
        total = ExactCounts(*(sum(getattr(c, name) for c in counts) for name in ("policy", "nonfinite", "error_bound")))
        return stored, [len(e.record) for e in encoded], total

    def promise(
        self, keys: Sequence[bytes], leases: Sequence[Lease], tiers: Sequence[str], prove: bool
    ) -> list[Promise | Exception]:
        self._take_threads()
        decoded = self._decode(leases)
        out: list[Promise | Exception] = []
        for key, lease, tier, found in zip(keys, leases, tiers, decoded, strict=True):
            out.append(found if isinstance(found, Exception) else Promise(key, tier, len(lease), found))
            lease.release()
        return out

    def load(self, blocks: Sequence[Block], promises: Sequence[Promise], fence: None) -> list[Exception | None]:
        self._check(blocks)
        out: list[Exception | None] = []
        good: list[tuple[Block, Tensor, Tensor]] = []
        for block, promise in zip(blocks, promises, strict=True):
            k, v, first = promise.held
            if first != block.first_position:
                out.append(RecordMismatchError(f"the record starts at {first}, its block at {block.first_position}"))
                continue
            good.append((block, k, v))
            out.append(None)
        if good:
            place([block for block, _, _ in good], self._pages.table)
            ids = [block.block_id for block, _, _ in good]
            self._pages.write(ids, torch.cat([k for _, k, _ in good], 2), torch.cat([v for _, _, v in good], 2))
        return out

    def close(self) -> None:
        """Nothing is held."""

    def _warm_up(self) -> None:
        """Loads compiled code now: else the first request to come back waits a second or two for it."""
        s = self._codec.shape
        zeros = torch.zeros(s.layers, s.kv_heads, self.block_tokens, s.head_dim, dtype=s.torch_dtype)
        block = self._codec.encode_block(zeros, zeros, torch.arange(self.block_tokens))
        self._codec.decode_block(block.record)

    def _take_threads(self) -> None:
        """As many as torch has on the engine's thread: a new thread may come with one per core, and those wait for each
        other in vain where the engine keeps the cores busy."""
        if torch.get_num_threads() != self._threads:
            # Not torch's public name: vLLM puts a function there that does nothing, for the sake of its own threads.
            torch._C.set_num_threads(self._threads)

    def _decode(self, leases: Sequence[Lease]) -> list[tuple[Tensor, Tensor, int] | Exception]:
        """At once if all are sound, which is the rule; else one by one."""
        try:
            k, v, positions = self._codec.decode_blocks([lease.record for lease in leases])
            n = self.block_tokens
            if len(positions) == n * len(leases):
                firsts = positions.view(-1, n)
                return [
                    (k[:, :, i * n : (i + 1) * n], v[:, :, i * n : (i + 1) * n], _first(firsts[i]))
                    for i in range(len(leases))
                ]
        except RecordError:
            pass
        return [self._decode_one(lease) for lease in leases]

    def _decode_one(self, lease: Lease) -> tuple[Tensor, Tensor, int] | Exception:
        try:
            k, v, positions = self._codec.decode_block(lease.record)
            if len(positions) != self.block_tokens:
                raise RecordMismatchError(f"the record has {len(positions)} tokens, a block {self.block_tokens}")
            return k, v, _first(positions)
        except RecordError as exc:
            return exc

    def _check(self, blocks: Sequence[Block]) -> None:
        bad = [b.block_id for b in blocks if not 0 <= b.block_id < self._pages.blocks]
        if bad:
            raise ConfigError(f"block {bad[0]} is asked for; the cache has {self._pages.blocks}")


def _first(positions: Tensor) -> int:
    """The first of consecutive positions, or -1: what no block starts at."""
    first = int(positions[0])
    return first if torch.equal(positions, torch.arange(first, first + len(positions))) else -1
