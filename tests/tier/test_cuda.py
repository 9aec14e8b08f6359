"""The GPU's side of the tier: what it writes and reads is what the CPU's does. Interpreted where there is no GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynamo_kvtc.codec.paged import PagedLimits
from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.codec.policy import ExactPolicy
from dynamo_kvtc.errors import RecordCorruptError
from dynamo_kvtc.ops.pages import PagedCache
from dynamo_kvtc.tier.build import open_tier
from dynamo_kvtc.tier.cuda import Fence
from dynamo_kvtc.tier.options import TierOptions
from dynamo_kvtc.tier.pages import StridedPages
from dynamo_kvtc.tier.transcode import Block
from dynamo_kvtc.types import KVShape
from tests.builders import case_seed, make_artifact, random_kv, same_bits
from tests.tier.parts import BLOCK_TOKENS, MIB_OF_GIB, POISON, Answer, Engine, load, promise, store

SHAPE = KVShape(2, 1, 64, "bfloat16")
LIMITS = PagedLimits(encode_tokens=16, decode_tokens=16, record_bytes=1 << 20)


class GpuEngine(Engine):
    """Pages where the kernels run; ``StridedPages`` over the same memory looks at them from outside."""

    def __init__(self, device, seed, blocks=4):
        self.artifact = make_artifact(SHAPE, groups=((0, 1), (1, 2)), seed=seed, components=20)[2]
        self.shape, self.blocks, self.device = SHAPE, blocks, device
        views = [
            torch.full((blocks, 1, BLOCK_TOKENS, 128), POISON, dtype=torch.bfloat16, device=device)
            for _ in range(SHAPE.layers)
        ]
        self.paged = PagedCache.of([x[..., :64] for x in views], [x[..., 64:] for x in views])
        self.pages = _Moved(self.paged, device)
        self.k, self.v = random_kv(self.artifact, blocks * BLOCK_TOKENS, seed)
        self.order = np.random.default_rng(seed).permutation(blocks).tolist()
        self.pages.write(self.order, self.k, self.v)

    def tier(self, path=None, **options):
        known = {"artifact": "given", "point": "fine", "host_gib": 2 * MIB_OF_GIB}
        if path is not None:
            known |= {"disk_path": str(path), "disk_gib": 16 * MIB_OF_GIB}
        return open_tier(TierOptions(**{**known, **options}), self.cache(), self.paged, self.artifact, limits=LIMITS)


class _Moved(StridedPages):
    def __init__(self, cache, device):
        super().__init__(cache)
        self._device = device

    def read(self, block_ids):
        k, v = super().read(block_ids)
        return k.cpu(), v.cpu()

    def write(self, block_ids, k, v):
        super().write(block_ids, k.to(self._device), v.to(self._device))


@pytest.fixture
def engine(kernel_device):
    return GpuEngine(kernel_device, case_seed())


def test_records_are_the_cpus_and_come_back_from_host_and_disk(engine, folder):
    tier = engine.tier(folder / "tier", write_through=True)
    blocks = engine.sequence(tier, 4)
    assert store(tier, blocks) == []
    k, v = engine.original(blocks)
    codec = BlockCodec(engine.artifact, "fine", ExactPolicy())
    wanted = [r.record for r in codec.encode_blocks(k, v, torch.arange(4 * BLOCK_TOKENS), block_tokens=BLOCK_TOKENS)]
    for block, record in zip(blocks, wanted, strict=True):
        with tier._store.get(block.key) as lease:
            assert bytes(lease.record) == record
    assert tier.flush()
    # Two of them from disk, and not promoted: through the scratch memory.
    for block in blocks[:2]:
        tier._store.host.remove(block.key)
    tier._store._promote_on = 2
    engine.wipe(range(engine.blocks))
    assert load(tier, blocks) == []
    decoded = codec.decode_blocks(wanted)
    for got, want in zip(engine.pages.read([b.block_id for b in blocks]), decoded, strict=False):
        most = float(want.float().abs().max())
        torch.testing.assert_close(got.float(), want.float(), rtol=2.0**-7, atol=1e-3 * most)
    m = tier.metrics
    assert m.value("kvtc_exact_tokens", "policy") == 4
    assert m.value("kvtc_lookup_blocks", "hit", "disk") == m.value("kvtc_lookup_blocks", "hit", "host") == 2
    assert tier.close()


def test_exact_records_bit_for_bit_and_more_than_fits_the_scratch(engine):
    tier = engine.tier(exact="all")
    tier.transcoder._out = tier.transcoder._out[: 3 * tier.transcoder.raw_block_bytes]
    blocks = engine.sequence(tier, 4)
    assert store(tier, blocks) == []
    engine.wipe(range(engine.blocks))
    assert load(tier, blocks) == []
    for got, want in zip(engine.pages.read([b.block_id for b in blocks]), engine.original(blocks), strict=True):
        assert same_bits(got, want)
    tier.close()


def test_a_block_that_does_not_fit_costs_no_other(engine):
    tier = engine.tier()
    blocks = engine.sequence(tier, 4)
    engine.paged.k[0][blocks[2].block_id] = float("nan")
    # Room for a coded record, not for one with every token exact.
    tier.transcoder._out = tier.transcoder._out[: tier.transcoder.raw_block_bytes * 3 // 4]
    assert store(tier, blocks) == [blocks[2].key]
    assert tier.lookup([b.key for b in blocks]) == ["host"] * 2
    assert tier.lookup([blocks[3].key]) == ["host"]
    assert tier.metrics.value("kvtc_stored_blocks", "failed") == 1
    assert tier.metrics.value("kvtc_errors", "encode_too_large") == 1
    tier.close()


def test_the_tail_is_exact_beside_the_same_coded_records(engine):
    tier = engine.tier()
    blocks = engine.sequence(tier, 4)
    done = Answer()
    assert tier.store(blocks, done, tail={b.key for b in blocks[2:]})
    assert done.get() == []
    k, v = engine.original(blocks)
    codec = BlockCodec(engine.artifact, "fine", ExactPolicy())
    wanted = codec.encode_blocks(k, v, torch.arange(4 * BLOCK_TOKENS), block_tokens=BLOCK_TOKENS)
    for block, record in zip(blocks, wanted, strict=True):
        with tier._store.get(block.key) as lease:
            assert bytes(lease.record) == record.record
    m = tier.metrics
    assert m.value("kvtc_exact_tokens", "policy") == 4
    assert m.value("kvtc_coded_bytes", "in") == sum(len(r.record) for r in wanted)
    engine.wipe(range(engine.blocks))
    assert load(tier, blocks) == []
    assert m.value("kvtc_overlay_blocks", "stored") == m.value("kvtc_overlay_blocks", "hit") == 2
    got, want = engine.pages.read([b.block_id for b in blocks[2:]]), engine.original(blocks[2:])
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
    coded = engine.pages.read([b.block_id for b in blocks[:2]])
    assert not same_bits(coded[0], engine.original(blocks[:2])[0])
    # An exact record found bad by the GPU: the load fails, the coded record is taken the next time.
    host = tier._store.host
    with host.get(tier._overlay.key(blocks[3].key)) as lease:
        host._view[lease.offset + len(lease) - 3] ^= 1
    assert load(tier, blocks) == [blocks[3].key]
    assert load(tier, blocks) == []
    assert m.value("kvtc_overlay_blocks", "hit") == 2 + 2 + 1
    tier.close()


def test_damage_is_found_at_the_promise_or_by_the_gpu(engine):
    tier = engine.tier()
    blocks = engine.sequence(tier, 3)
    store(tier, blocks)
    host = tier._store.host

    def flip(lease):
        host._view[lease.offset + len(lease) - 3] ^= 1

    with host.get(blocks[1].key) as lease:
        flip(lease)
    assert set(promise(tier, blocks)) == {blocks[0].key, blocks[2].key}
    assert tier.metrics.value("kvtc_errors", "record_RecordCorruptError") == 1
    # Damaged after the promise.
    promises = promise(tier, [blocks[0], blocks[2]])
    flip(promises[blocks[2].key].lease)
    engine.wipe(range(engine.blocks))
    both = [blocks[0], blocks[2]]
    assert load(tier, both, promises=[promises[b.key] for b in both]) == [blocks[2].key]
    assert (engine.pages.read([blocks[2].block_id])[0][1] == POISON).all()
    assert tier.metrics.value("kvtc_errors", "record_RecordCorruptError") == 2
    assert isinstance(
        tier.transcoder.load([blocks[0]], list(promise(tier, [blocks[0]]).values()), tier.fence())[0],
        (type(None), RecordCorruptError),
    )
    # Not proven before: the GPU finds it.
    with host.get(blocks[0].key) as lease:
        flip(lease)
    engine.wipe(range(engine.blocks))
    assert load(tier, [blocks[0]]) == [blocks[0].key]
    assert store(tier, [blocks[1]]) == []
    wrong = Block(blocks[1].key, blocks[1].block_id, 16)
    assert load(tier, [wrong]) == [wrong.key]
    tier.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_store_lets_the_next_step_pass():
    x, stream = torch.randn(8192, 8192, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()

    def step():
        with torch.cuda.stream(stream):
            for _ in range(10):
                torch.mm(x, x)
            event = torch.cuda.Event(blocking=True)
            event.record(stream)
            return event

    step().synchronize()
    fence = Fence(step(), stream)
    following = step()
    after = fence.and_the_next_step()
    assert fence.event.query()
    assert after is not fence.event
    assert not following.query()
    after.synchronize()
    assert following.query()
    # One that has passed long ago is not waited behind.
    step()
    assert fence.and_the_next_step() is fence.event
