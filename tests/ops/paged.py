"""Paged caches of every layout that an engine has, on the CPU and copied to where a kernel runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dynamo_kvtc.ops.pages import FixedInputs, FixedRows, PagedCache
from dynamo_kvtc.types import RopeSpec


@dataclass
class Paged:
    """A cache and all the memory it is cut out of, the gaps between its views included."""

    memory: Tensor
    cache: PagedCache

    @classmethod
    def of(cls, memory: Tensor, layout: str) -> Paged:
        """Shapes of memory are in ``random``."""
        if layout == "heads-first":
            dim = memory.shape[4] // 2
            k, v = ([x[..., s] for x in memory] for s in (slice(dim), slice(dim, 2 * dim)))
        elif layout == "tokens-first":
            k, v = ([x[:, part].transpose(1, 2) for x in memory] for part in (0, 1))
        else:
            k, v = ([memory[:, layer, part] for layer in range(memory.shape[1])] for part in (0, 1))
        return cls(memory, PagedCache.of(k, v))

    @classmethod
    def random(
        cls, layout: str, dtype: torch.dtype, layers: int, blocks: int, heads: int, tokens: int, dim: int,
        generator: np.random.Generator,
    ) -> Paged:  # fmt: skip
        shape = {
            "heads-first": (layers, blocks, heads, tokens, 2 * dim),
            "tokens-first": (layers, blocks, 2, tokens, heads, dim),
            "cross-layer": (blocks, layers, 2, heads, tokens, dim),
        }[layout]
        return cls.of(torch.from_numpy(generator.standard_normal(shape)).to(dtype), layout)

    def on(self, device: str, layout: str) -> Paged:
        return Paged.of(self.memory.to(device, copy=True), layout)


def random_slots(cache: PagedCache, tokens: int, generator: np.random.Generator) -> Tensor:
    """int64 [tokens], each once, blocks in any order."""
    return torch.from_numpy(generator.permutation(cache.slots)[:tokens].astype(np.int64))


def random_rope(style: str, pairs: int, generator: np.random.Generator, scaling: float = 1.2079) -> RopeSpec:
    return RopeSpec(tuple(generator.uniform(1e-5, 1.0, pairs).tolist()), scaling, style)


def random_inputs(channels: int, head_dim: int, generator: np.random.Generator, wide: float = 0.1) -> FixedInputs:
    """Inputs of up to some hundreds, narrow ones clamped at times; wide ones of thousands, in a random order."""
    is_wide = generator.random(channels) < wide
    slot = np.full(channels, -1, np.int32)
    slot[is_wide] = generator.permutation(int(is_wide.sum()))
    gain = np.where(is_wide, 2000.0, 45.0) * np.exp(generator.normal(0, 0.3, channels))
    mean = generator.normal(0, 0.5, channels)
    return FixedInputs.of(
        torch.from_numpy(mean).float(), torch.from_numpy(gain).float(), torch.from_numpy(slot), head_dim
    )


def moved(inputs: FixedInputs, device: str) -> FixedInputs:
    return FixedInputs(
        inputs.mean.to(device), inputs.gain.to(device), inputs.wide_slot.to(device), inputs.wide_heads.to(device),
        inputs.wide,
    )  # fmt: skip


def poisoned_rows(tokens: int, channels: int, wide: int, device: str) -> FixedRows:
    """Columns of padding, so that writes past a row's end show."""
    return FixedRows(
        low=torch.full((tokens, channels + 7), 0x55, dtype=torch.int8, device=device),
        high=torch.full((tokens, wide + 3), 0x55, dtype=torch.int8, device=device),
        energy=torch.full((tokens,), -(2**40) - 1, dtype=torch.int64, device=device),
        saturated=torch.full((tokens,), 0xA5, dtype=torch.uint8, device=device),
    )
