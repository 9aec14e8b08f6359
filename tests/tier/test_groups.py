"""Layers of two cache groups, each with pages of its own in the same memory: on a CPU, and with a GPU's kernels."""

from __future__ import annotations

import pytest
import torch

from dynamo_kvtc.ops.pages import PagedCache
from dynamo_kvtc.ops.pages.cache import NO_PAGE
from dynamo_kvtc.tier.build import open_tier
from dynamo_kvtc.tier.options import TierOptions
from dynamo_kvtc.tier.pages import StridedPages
from dynamo_kvtc.tier.transcode import Block
from dynamo_kvtc.types import KVShape
from tests.builders import case_seed, make_artifact, random_kv, same_bits
from tests.tier.parts import BLOCK_TOKENS, MIB_OF_GIB, POISON, load, store
from tests.tier.parts import Engine as Plain
from tests.tier.test_cuda import LIMITS

SHAPE = KVShape(3, 1, 64, "bfloat16")
GROUP_OF = (0, 1, 0)
BLOCKS, PAGES = 4, 10


class Engine(Plain):
    """Block b's pages are first[b] and second[b]; layers 0 and 1 share memory."""

    def __init__(self, device: str, seed: int, gpu: bool) -> None:
        self.artifact = make_artifact(SHAPE, groups=((0, 2), (2, 3)), seed=seed, components=20)[2]
        self.shape, self.gpu = SHAPE, gpu
        order = torch.randperm(PAGES, generator=torch.Generator().manual_seed(seed)).tolist()
        self.first, self.second = order[:BLOCKS], order[BLOCKS : 2 * BLOCKS]
        self.memory = torch.full((2, PAGES, 1, BLOCK_TOKENS, 128), POISON, dtype=torch.bfloat16, device=device)
        views = [self.memory[layer // 2] for layer in range(SHAPE.layers)]
        self.paged = PagedCache.of([x[..., :64] for x in views], [x[..., 64:] for x in views], GROUP_OF)
        self.k, self.v = random_kv(self.artifact, BLOCKS * BLOCK_TOKENS, seed)
        for views, x in ((self.paged.k, self.k), (self.paged.v, self.v)):
            for layer, view in enumerate(views):
                view[self.pages_in(layer)] = x[layer].view(1, BLOCKS, BLOCK_TOKENS, 64).transpose(0, 1).to(device)

    def pages_in(self, layer: int) -> list[int]:
        return self.second if GROUP_OF[layer] else self.first

    def tier(self, **options):
        known = {"artifact": "given", "point": "fine", "host_gib": 2 * MIB_OF_GIB, "exact": "all"}
        pages = self.paged if self.gpu else StridedPages(self.paged)
        return open_tier(TierOptions(**{**known, **options}), self.cache(), pages, self.artifact, limits=LIMITS)

    def sequence(self, tier, blocks=BLOCKS, lacking=()):
        return [
            Block(tier.key(bytes([i]) * 32), self.first[i], i * BLOCK_TOKENS,
                  others=(NO_PAGE if i in lacking else self.second[i],))
            for i in range(blocks)
        ]  # fmt: skip

    def here(self, layer: int) -> list[torch.Tensor]:
        """K and V of all blocks, [BLOCKS, 1, N, D]."""
        return [views[layer][self.pages_in(layer)].cpu() for views in (self.paged.k, self.paged.v)]


@pytest.fixture(params=["cpu", "kernels"])
def engine(request, kernel_device):
    gpu = request.param == "kernels"
    return Engine(kernel_device if gpu else "cpu", case_seed(), gpu)


def test_blocks_go_and_come_back_into_the_pages_that_layers_have(engine):
    tier = engine.tier()
    assert store(tier, engine.sequence(tier)) == []
    truth = [engine.here(layer) for layer in range(SHAPE.layers)]
    engine.memory.fill_(POISON)
    # They come back elsewhere, and the first two have left the window.
    engine.first, engine.second = engine.second[::-1], engine.first
    assert load(tier, engine.sequence(tier, lacking=(0, 1))) == []
    for layer, wanted in enumerate(truth):
        for found, want in zip(engine.here(layer), wanted, strict=True):
            if GROUP_OF[layer]:
                assert same_bits(found[2:], want[2:])
                # Neither what it had before, nor anything else.
                assert bool((found[:2] == POISON).all())
            else:
                assert same_bits(found, want)
    used = {0: set(engine.first) | set(engine.second[2:]), 1: set(engine.first)}
    for half in (0, 1):
        rest = [page for page in range(PAGES) if page not in used[half]]
        assert bool((engine.memory[half, rest] == POISON).all())
    tier.close()


def test_layer_group_by_layer_group(engine):
    tier = engine.tier()
    if tier.by_group is None:
        pytest.skip("a GPU's tier loads whole blocks")
    blocks = engine.sequence(tier)
    assert store(tier, blocks) == []
    truth = [engine.here(layer) for layer in range(SHAPE.layers)]
    engine.memory.fill_(POISON)
    decoder = tier.transcoder.by_group
    with_leases = [tier._store.get(b.key) for b in blocks]
    records = [decoder.parse(lease.record) for lease in with_leases]
    some = engine.sequence(tier, lacking=(0,))
    assert decoder.load(some, records, 0) == [None] * BLOCKS
    assert all(bool((found == POISON).all()) for found in engine.here(2))
    assert decoder.load(some, records, 1) == [None] * BLOCKS
    for layer in (0, 1, 2):
        for found, want in zip(engine.here(layer), truth[layer], strict=True):
            assert same_bits(found[1:], want[1:])
            assert same_bits(found[0], torch.full_like(want[0], POISON) if GROUP_OF[layer] else want[0])
    del records
    for lease in with_leases:
        lease.release()
    tier.close()


def test_a_block_that_lacks_pages_is_not_stored(engine):
    tier = engine.tier()
    blocks = engine.sequence(tier, lacking=(1,))
    assert sorted(store(tier, blocks[:2])) == sorted(b.key for b in blocks[:2])
    assert store(tier, blocks[2:]) == []
    assert tier.lookup([blocks[0].key]) == tier.lookup([blocks[1].key]) == []
    assert tier.metrics.value("kvtc_stored_blocks", "failed") == 2
    tier.close()
