"""A small cache, a tier over it, and what tests need to know of both."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamo_kvtc.codec.artifact import Artifact
from dynamo_kvtc.ops.pages import PagedCache
from dynamo_kvtc.tier.build import open_tier
from dynamo_kvtc.tier.identity import EngineCache
from dynamo_kvtc.tier.options import TierOptions
from dynamo_kvtc.tier.pages import StridedPages
from dynamo_kvtc.tier.tier import Tier
from dynamo_kvtc.tier.transcode import Block
from dynamo_kvtc.types import KVShape
from tests.builders import make_artifact, random_kv

SHAPE = KVShape(3, 2, 16, "bfloat16")
BLOCK_TOKENS = 8
MIB_OF_GIB = 1 / 1024
POISON = 7.0


class Engine:
    """Pages of a random layout with a sequence in them, and a copy of what was there."""

    def __init__(self, seed: int, blocks: int = 24, shape: KVShape = SHAPE, artifact: Artifact | None = None) -> None:
        self.artifact = artifact or make_artifact(shape, groups=((0, 1), (1, 3)), seed=seed, components=20)[2]
        self.shape, self.blocks = shape, blocks
        self.pages = StridedPages(self.empty())
        self.k, self.v = random_kv(self.artifact, blocks * BLOCK_TOKENS, seed)
        self.order = np.random.default_rng(seed).permutation(blocks).tolist()
        self.pages.write(self.order, self.k, self.v)

    def empty(self) -> PagedCache:
        s = self.shape
        views = [
            torch.full((self.blocks, s.kv_heads, BLOCK_TOKENS, 2 * s.head_dim), POISON, dtype=s.torch_dtype)
            for _ in range(s.layers)
        ]
        return PagedCache.of([x[..., : s.head_dim] for x in views], [x[..., s.head_dim :] for x in views])

    def cache(self, **changes: Any) -> EngineCache:
        m = self.artifact.manifest
        known: dict[str, Any] = {
            "model": m.model, "shape": m.shape, "rope": m.rope, "tp_rank": self.artifact.rank, "tp_size": m.tp_size,
            "block_tokens": BLOCK_TOKENS,
        }  # fmt: skip
        return EngineCache(**{**known, **changes})

    def tier(self, path: Any = None, engine: dict[str, Any] | None = None, **options: Any) -> Tier:
        known: dict[str, Any] = {"artifact": "given", "point": "fine", "host_gib": 2 * MIB_OF_GIB}
        if path is not None:
            known |= {"disk_path": str(path), "disk_gib": 16 * MIB_OF_GIB}
        return open_tier(TierOptions(**{**known, **options}), self.cache(**(engine or {})), self.pages, self.artifact)

    def sequence(self, tier: Tier, blocks: int, name: int = 0) -> list[Block]:
        """The first blocks of the sequence, as the engine would name them."""
        return [
            Block(tier.key(f"{name}/{i}".encode() * 4), self.order[i], i * BLOCK_TOKENS) for i in range(blocks)
        ]  # fmt: skip

    def wipe(self, block_ids: Sequence[int]) -> None:
        shape = (self.shape.layers, self.shape.kv_heads, len(block_ids) * BLOCK_TOKENS, self.shape.head_dim)
        poison = torch.full(shape, POISON, dtype=self.shape.torch_dtype)
        self.pages.write(block_ids, poison, poison)

    def original(self, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
        at = torch.cat([torch.arange(b.first_position, b.first_position + BLOCK_TOKENS) for b in blocks])
        return self.k[:, :, at], self.v[:, :, at]


class Answer:
    """A callback to wait for: what it was called with, and how often."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._called = threading.Event()

    def __call__(self, *what: Any) -> None:
        self.calls.append(what)
        self._called.set()

    def get(self, timeout: float = 180.0) -> Any:
        assert self._called.wait(timeout), "no answer in time"
        assert len(self.calls) == 1
        return self.calls[0][0] if self.calls[0] else None


def store(tier: Tier, blocks: Sequence[Block]) -> list[bytes]:
    done = Answer()
    assert tier.store(blocks, done)
    return list(done.get())


def load(tier: Tier, blocks: Sequence[Block], **how: Any) -> list[bytes]:
    done = Answer()
    assert tier.load(blocks, done, **how)
    return list(done.get())


def promise(tier: Tier, blocks: Sequence[Block]) -> Any:
    done = Answer()
    assert tier.promise([b.key for b in blocks], done)
    return done.get()
