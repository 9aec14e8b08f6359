"""Layers of two groups, each with pages of its own in the same memory: the same as a cache whose blocks have one page
in every layer. What a layer has no page for reads as a token that cannot be coded, and is not written."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops.pages import PagedCache, reference
from dynamo_kvtc.ops.pages.cache import PageTable
from dynamo_kvtc.ops.rope import Rotations
from tests.builders import case_seed, same_bits
from tests.ops.paged import Paged, moved, poisoned_rows, random_inputs, random_rope, random_slots

LAYERS, BLOCKS, PAGES, N = 4, 5, 11, 16
GROUP_OF = (0, 1, 0, 1)
SHAPES = [
    (torch.bfloat16, 3, 64, 32, "half"),
    (torch.float16, 1, 96, 20, "half"),
    (torch.float32, 2, 20, 10, "interleaved"),
]


class Pair:
    """plain: blocks of one page; grouped: layers 0 and 1, 2 and 3 in the same memory, block b at pages first[b] and
    second[b]; device: where grouped is."""

    def __init__(self, dtype: torch.dtype, heads: int, dim: int, device: str, generator: np.random.Generator) -> None:
        self.plain = Paged.random("heads-first", dtype, LAYERS, BLOCKS, heads, N, dim, generator).cache
        order = generator.permutation(PAGES)
        self.first, self.second = torch.from_numpy(order[:BLOCKS]), torch.from_numpy(order[BLOCKS : 2 * BLOCKS])
        self.dim, self.heads, self.device = dim, heads, device
        self.memory = torch.full((LAYERS // 2, PAGES, heads, N, 2 * dim), 7.0, dtype=dtype, device=device)
        self.cache = self.over(self.memory)
        for layer, (k, v) in enumerate(zip(self.cache.k, self.cache.v, strict=True)):
            at = (self.second if GROUP_OF[layer] else self.first).to(device)
            k[at], v[at] = self.plain.k[layer].to(device), self.plain.v[layer].to(device)

    def over(self, memory: torch.Tensor) -> PagedCache:
        views = [memory[layer // 2] for layer in range(LAYERS)]
        cache = PagedCache.of([x[..., : self.dim] for x in views], [x[..., self.dim :] for x in views], GROUP_OF)
        assert cache.table is not None
        cache.table.put(self.first.tolist(), [[page] for page in self.second.tolist()])
        return cache

    def lacking(self, block: int) -> None:
        """It has no page in the second group any more."""
        assert self.cache.table is not None
        self.cache.table.put([int(self.first[block])], [[-1]])

    def slots(self, slots: torch.Tensor) -> torch.Tensor:
        """Of the plain cache's, the grouped one's."""
        return self.first[slots // N] * N + slots % N

    def contents(self, memory: torch.Tensor | None = None) -> list[torch.Tensor]:
        """K and V of each layer as the plain cache has them."""
        cache = self.cache if memory is None else self.over(memory)
        at = [(self.second if group else self.first).to(self.device) for group in GROUP_OF]
        return [x[at[layer]].cpu() for views in (cache.k, cache.v) for layer, x in enumerate(views)]


def backend(device: str) -> ModuleType:
    """The kernels; the reference itself is tried beside them, on the CPU."""
    return pytest.importorskip("dynamo_kvtc.ops.pages.triton")


@pytest.fixture(params=["reference", "kernel"])
def where(request, kernel_device):
    if request.param == "reference":
        return reference, "cpu"
    return backend(kernel_device), kernel_device


@pytest.mark.parametrize(("dtype", "heads", "dim", "pairs", "style"), SHAPES)
def test_gathered_alike(where, dtype, heads, dim, pairs, style):
    module, device = where
    generator = np.random.default_rng(case_seed())
    pair = Pair(dtype, heads, dim, device, generator)
    slots, rope = random_slots(pair.plain, 30, generator), random_rope(style, pairs, generator)
    layers = (1, 4)
    channels = pair.plain.channels(layers)
    inputs = random_inputs(channels, dim, generator)
    cos, sin = Rotations(rope).at(torch.from_numpy(generator.integers(0, 2**31, len(slots))))
    truth, out = (poisoned_rows(len(slots), channels, inputs.wide, d) for d in ("cpu", device))
    reference.gather_fixed(pair.plain, layers, slots, cos, sin, rope, inputs, truth)
    lacking = int(slots[0]) // N
    for lacks in (False, True):
        if lacks:
            pair.lacking(lacking)
            truth.saturated[slots // N == lacking] = 1
        on = [x.to(device) for x in (pair.slots(slots), cos, sin)]
        module.gather_fixed(pair.cache, layers, *on, rope, moved(inputs, device), out)
        assert torch.equal(out.saturated.cpu(), truth.saturated)
        coded = truth.saturated == 0
        for name in ("low", "high", "energy"):
            assert torch.equal(getattr(out, name).cpu()[coded], getattr(truth, name)[coded]), name


@pytest.mark.parametrize(("dtype", "heads", "dim", "pairs", "style"), SHAPES)
def test_scattered_alike(where, dtype, heads, dim, pairs, style):
    module, device = where
    generator = np.random.default_rng(case_seed())
    pair = Pair(dtype, heads, dim, device, generator)
    slots, rope = random_slots(pair.plain, 30, generator), random_rope(style, pairs, generator)
    layers, lacking = (0, 3), int(slots[0]) // N
    rows = torch.from_numpy(generator.standard_normal((len(slots), pair.plain.channels(layers)))).float()
    cos, sin = Rotations(rope).at(torch.from_numpy(generator.integers(0, 2**31, len(slots))))
    keep = torch.from_numpy(generator.integers(0, 2, len(slots)).astype(np.uint8))
    pair.lacking(lacking)
    before = pair.memory.clone()
    on = [x.to(device) for x in (pair.slots(slots), rows, cos, sin)]
    module.scatter_rows(pair.cache, layers, *on, rope, keep.to(device))
    kept = [x[lacking].clone() for x in (pair.plain.k[1], pair.plain.v[1])]
    reference.scatter_rows(pair.plain, layers, slots, rows, cos, sin, rope, keep)
    pair.plain.k[1][lacking], pair.plain.v[1][lacking] = kept
    for mine, truth in zip(pair.contents(), [*pair.plain.k, *pair.plain.v], strict=True):
        assert same_bits(mine, truth)
    used = torch.cat([pair.first, pair.second])
    others = torch.tensor([page for page in range(PAGES) if page not in used.tolist()], device=device)
    assert torch.equal(pair.memory[:, others], before[:, others])


@pytest.mark.parametrize(("dtype", "heads", "dim", "pairs", "style"), SHAPES)
def test_exact_tokens_alike(where, dtype, heads, dim, pairs, style):
    module, device = where
    generator = np.random.default_rng(case_seed())
    pair = Pair(dtype, heads, dim, device, generator)
    slots = random_slots(pair.plain, 7, generator)
    groups = [(0, 1), (1, 4)]
    sizes = [pair.plain.channels(layers) * dtype.itemsize * len(slots) for layers in groups]
    base = torch.tensor([[0] * len(slots), [sizes[0]] * len(slots)])
    index, count = torch.arange(len(slots), dtype=torch.int32), torch.full((len(slots),), len(slots), dtype=torch.int32)
    truth = torch.zeros(sum(sizes), dtype=torch.uint8)
    reference.move_exact(pair.plain, groups, slots, base, index, count, truth, False)
    mine = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
    on = [x.to(device) for x in (pair.slots(slots), base, index, count)]
    module.move_exact(pair.cache, groups, *on, mine, False)
    assert torch.equal(mine.cpu(), truth)

    noise = torch.from_numpy(generator.integers(0, 256, len(truth), dtype=np.uint8))
    lacking = int(slots[0]) // N
    pair.lacking(lacking)
    module.move_exact(pair.cache, groups, *on, noise.to(device), True)
    kept = {(part, layer): getattr(pair.plain, part)[layer][lacking].clone() for part in "kv" for layer in (1, 3)}
    reference.move_exact(pair.plain, groups, slots, base, index, count, noise, True)
    for (part, layer), x in kept.items():
        getattr(pair.plain, part)[layer][lacking] = x
    for found, wanted in zip(pair.contents(), [*pair.plain.k, *pair.plain.v], strict=True):
        # NaNs of any payload among them: compared as bytes.
        assert torch.equal(found.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))


def test_what_a_table_refuses():
    table = PageTable(GROUP_OF, PAGES, torch.device("cpu"))
    with pytest.raises(ConfigError, match="2 groups"):
        table.put([1], [[2, 3]])
    with pytest.raises(ConfigError, match="2 groups"):
        table.put([], [])
    for block, other in ((-1, 2), (PAGES, 2), (1, PAGES), (1, -2)):
        with pytest.raises(ConfigError, match="the cache has 11"):
            table.put([block], [[other]])
    views = [torch.zeros(PAGES, 1, N, 8)] * 2
    with pytest.raises(ConfigError, match="3 layers have a group; the cache has 2"):
        PagedCache.of(views, views, (0, 1, 0))
    assert PagedCache.of(views, views, (0, 0)).table is None
