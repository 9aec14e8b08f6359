"""Profile paper on the GPU path against the CPU's. Interpreted, with zlib for nvCOMP, where there is no GPU."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from dynamo_kvtc.codec.headers import BAD_HEADER, MISMATCH
from dynamo_kvtc.codec.paged import Blocks, PagedCodec, PagedLimits
from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.codec.policy import ExactPolicy
from dynamo_kvtc.codec.record import build_record, parse_record
from dynamo_kvtc.errors import ConfigError, MissingDependencyError
from dynamo_kvtc.ops import deflate
from dynamo_kvtc.ops.deflate import nvcomp
from dynamo_kvtc.ops.lanes import BAD_CHECKSUM, BAD_DIRECTORY, BAD_LANE
from dynamo_kvtc.ops.pages import PagedCache
from dynamo_kvtc.types import KVShape
from tests.builders import case_seed, gapped_positions, make_paper_artifact, random_kv, same_bits

LIMITS = PagedLimits(encode_tokens=16, decode_tokens=24, record_bytes=1 << 20)
POISON = 7.0
PAGE = 8


class Case:
    """Tokens in pages in random order, and the same as the CPU's codec takes them."""

    def __init__(self, device, shape, tokens, groups, gaps=False, block_tokens=4, point="coarse", policy=None,
                 limits=LIMITS):  # fmt: skip
        seed = case_seed()
        self.generator = np.random.default_rng(seed)
        self.artifact = make_paper_artifact(shape, groups, seed)[2]
        self.positions = gapped_positions(tokens, seed) if gaps else torch.arange(tokens)
        self.k, self.v = random_kv(self.artifact, tokens, seed, self.positions)
        self.device, self.point, self.limits, self.block_tokens = device, point, limits, block_tokens
        self.pages = -(-tokens // PAGE) + 2
        order = torch.from_numpy(self.generator.permutation(self.pages))
        self.slots = (order[:, None] * PAGE + torch.arange(PAGE)).flatten()[:tokens].clone()
        self.cache = self.empty()
        self.fill(self.k, self.v)
        self.codec = self.codec_for(self.cache, policy)
        self.reference = BlockCodec(self.artifact, point, policy)

    def codec_for(self, cache, policy=None):
        coder = "deflate" if self.device == "cuda" else "zlib"
        return PagedCodec(self.artifact, self.point, cache, policy, self.limits, deflate=coder)

    def empty(self):
        s = self.artifact.shape
        size = (self.pages, s.kv_heads, PAGE, 2 * s.head_dim)
        views = [torch.full(size, POISON, dtype=s.torch_dtype, device=self.device) for _ in range(s.layers)]
        return PagedCache.of([x[..., : s.head_dim] for x in views], [x[..., s.head_dim :] for x in views])

    def fill(self, k, v):
        at = (self.slots // PAGE, slice(None), self.slots % PAGE)
        for view, x in zip((*self.cache.k, *self.cache.v), (*k, *v), strict=True):
            view[at] = x.transpose(0, 1).to(self.device)

    def blocks(self, exact=None):
        return Blocks.uniform(self.slots, self.positions, self.block_tokens, exact)

    def arena(self, records=None):
        """Poisoned; with records in it 32 bytes apart, their offsets and sizes."""
        arena = torch.full((1 << 20,), 0xA5, dtype=torch.uint8, pin_memory=self.device == "cuda")
        if records is None:
            return arena
        offsets, at = [], 32
        for record in records:
            arena[at : at + len(record)] = torch.frombuffer(bytearray(record), dtype=torch.uint8)
            offsets.append(at)
            at += (len(record) + 33) // 2 * 2
        return arena, np.array(offsets, np.int64), np.array([len(r) for r in records], np.int64)

    def encode(self, exact=None):
        arena = self.arena()
        encoded = self.codec.encode(self.blocks(exact), arena, 32)
        encoded.finish()
        return arena, encoded

    def decode(self, arena, offsets, sizes, blocks=None):
        target = self.empty()
        restore = self.codec_for(target).decode(arena, offsets, sizes, blocks or self.blocks())
        status = restore.finish()
        assert len(restore.events) == len(self.artifact.manifest.groups)
        return target, status

    def contents(self, cache):
        at = (self.slots // PAGE, slice(None), self.slots % PAGE)
        return [torch.stack([x[at].transpose(0, 1).cpu() for x in views]) for views in (cache.k, cache.v)]

    def inflated(self, records):
        """What does not depend on the DEFLATE encoder: header fields, exact tokens and the codes of every section."""
        shape, out = self.artifact.shape, []
        for record in records:
            parsed = parse_record(record)
            header = parsed.header
            out.append((header.profile, header.point, header.positions.tolist(), header.exact.tolist()))
            exact = header.tokens - header.coded_tokens
            for g, (start, end) in enumerate(self.artifact.manifest.groups):
                section = parsed.section(g)
                size = exact * (end - start) * shape.bytes_per_layer_token
                own = self.reference.profile.groups[g]
                coded = header.coded_tokens * (own.k.runs.width + own.v.runs.width)
                payload = bytes(section[size:])
                out.append((bytes(section[:size]), deflate.inflate(payload, coded) if coded else payload))
        return out


def close(found, wanted):
    """Within float16's rounding of levels, and the cache dtype's of the result."""
    error = (found.double() - wanted.double()).square().mean().sqrt()
    rms = wanted.double().square().mean().sqrt()
    # Triton's interpreter truncates to bfloat16.
    rounding = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 0.0}[found.dtype]
    assert float(error / rms) < 1e-3 + rounding


SHAPES = [
    (KVShape(2, 1, 32, "bfloat16"), 6, ((0, 1), (1, 2)), False),
    (KVShape(2, 3, 20, "float16"), 9, ((0, 2),), True),
    (KVShape(1, 1, 128, "float32"), 7, ((0, 1),), False),
    (KVShape(3, 1, 20, "float32"), 10, ((0, 2), (2, 3)), True),
    (KVShape(1, 1, 64, "bfloat16"), 1, ((0, 1),), True),
]


@pytest.mark.parametrize(("shape", "tokens", "groups", "gaps"), SHAPES)
def test_records_hold_the_cpus_bytes_and_each_reads_the_others(kernel_device, shape, tokens, groups, gaps):
    point = "fine" if tokens % 2 else "coarse"
    case = Case(kernel_device, shape, tokens, groups, gaps, point=point, policy=ExactPolicy(sinks=0 if gaps else 4))
    arena, encoded = case.encode()
    theirs = [b.record for b in case.reference.encode_blocks(case.k, case.v, case.positions, block_tokens=4)]
    ours = encoded.records()
    assert case.inflated(ours) == case.inflated(theirs)
    last = int(encoded.offsets[-1] + encoded.sizes[-1])
    assert bool((arena[:32] == 0xA5).all() & (arena[last:] == 0xA5).all())

    wanted_k, wanted_v, positions = case.reference.decode_blocks(theirs)
    for mine, other in zip(case.reference.decode_blocks(ours), (wanted_k, wanted_v, positions), strict=True):
        assert same_bits(mine, other)
    exact = torch.from_numpy(encoded.exact)
    for records in ((arena, encoded.offsets, encoded.sizes), case.arena(theirs)):
        target, status = case.decode(*records)
        assert status.tolist() == [0] * len(theirs)
        for found, wanted in zip(case.contents(target), (wanted_k, wanted_v), strict=True):
            close(found, wanted)
            assert same_bits(found[:, :, exact], wanted[:, :, exact])
        untouched = torch.ones(case.pages * PAGE, dtype=torch.bool)
        untouched[case.slots] = False
        for view in (*target.k, *target.v):
            flat = view.transpose(1, 2).reshape(len(untouched), -1)
            assert bool((flat[untouched.to(flat.device)] == POISON).all())


def test_exact_tokens_of_every_reason_and_blocks_without_codes(kernel_device):
    case = Case(
        kernel_device, KVShape(2, 1, 20, "bfloat16"), 40, ((0, 2),), block_tokens=16, policy=ExactPolicy(0, 0, 40.0)
    )
    k, v = case.k.clone(), case.v.clone()
    k[1, 0, 21, 3], v[0, 0, 5, 19], v[1, 0, 30] = float("nan"), float("-inf"), 3e4
    case.fill(k, v)
    asked = torch.zeros(40, dtype=torch.bool)
    asked[[0, 15, 17]] = True
    asked[32:] = True
    arena, encoded = case.encode(asked)
    theirs = [b.record for b in case.reference.encode_blocks(k, v, case.positions, asked)]
    assert case.inflated(encoded.records()) == case.inflated(theirs)
    assert encoded.exact[[0, 5, 15, 17, 21, 30]].all()
    assert encoded.exact[32:].all()
    assert encoded.exact[:32].sum() < 32
    target, status = case.decode(arena, encoded.offsets, encoded.sizes)
    assert status.tolist() == [0, 0, 0]
    kept = torch.from_numpy(encoded.exact)
    for found, wanted in zip(case.contents(target), (k, v), strict=True):
        assert same_bits(found[:, :, kept], wanted[:, :, kept])


def test_blocks_of_any_size(kernel_device):
    case = Case(kernel_device, KVShape(1, 1, 32, "bfloat16"), 28, ((0, 1),))
    counts = np.array([1, 9, 3, 1, 1, 13], dtype=np.int32)
    arena = case.arena()
    encoded = case.codec.encode(Blocks(counts, case.slots, case.positions), arena)
    encoded.finish()
    theirs, start = [], 0
    for count in counts:
        own = slice(start, start + count)
        theirs.append(case.reference.encode_block(case.k[:, :, own], case.v[:, :, own], case.positions[own]).record)
        start += count
    assert case.inflated(encoded.records()) == case.inflated(theirs)
    target, status = case.decode(arena, encoded.offsets, encoded.sizes, Blocks(counts, case.slots))
    assert not status.any()
    for found, wanted in zip(case.contents(target), case.reference.decode_blocks(theirs)[:2], strict=True):
        close(found, wanted)


def test_a_damaged_record_is_reported_and_its_neighbours_come_back(kernel_device):
    case = Case(kernel_device, KVShape(1, 1, 20, "bfloat16"), 12, ((0, 1),))
    arena, encoded = case.encode()
    clean, _ = case.decode(arena, encoded.offsets, encoded.sizes)
    for block in range(3):
        bad = arena.clone()
        at = int(encoded.offsets[block] + case.generator.integers(0, encoded.sizes[block]))
        bad[at] ^= 1 << int(case.generator.integers(0, 8))
        bad = bad.pin_memory() if kernel_device == "cuda" else bad
        target, status = case.decode(bad, encoded.offsets, encoded.sizes)
        assert status[block] in (BAD_HEADER, MISMATCH, BAD_CHECKSUM)
        assert (np.delete(status, block) == 0).all()
        own = torch.arange(12) // 4 == block
        for found, wanted in zip(case.contents(target), case.contents(clean), strict=True):
            assert same_bits(found[:, :, ~own], wanted[:, :, ~own])
            assert bool((found[:, :, own] == POISON).all())


def test_payloads_that_lie_are_caught_behind_their_checksum(kernel_device):
    case = Case(kernel_device, KVShape(1, 1, 20, "bfloat16"), 8, ((0, 1),), policy=ExactPolicy(sinks=0))
    records = [b.record for b in case.reference.encode_blocks(case.k, case.v, case.positions, block_tokens=4)]
    parsed = parse_record(records[1])
    own = case.reference.profile.groups[0]
    size = 4 * (own.k.runs.width + own.v.runs.width)
    codes = bytearray(deflate.inflate(parsed.section(0), size))
    # The high byte of the first scale of every token: all ones is no finite number.
    codes[4:8] = b"\xff" * 4
    forgeries = {
        "nothing": (b"", BAD_DIRECTORY), "too few": (deflate.deflate(bytes(codes[:-1])), BAD_LANE),
        "not finite": (deflate.deflate(bytes(codes)), BAD_LANE),
    }  # fmt: skip
    if kernel_device == "cpu":
        forgeries["reserved type"] = (b"\x07" + bytes(parsed.section(0))[1:], BAD_LANE)
    for name, (payload, wanted) in forgeries.items():
        arena, offsets, sizes = case.arena([records[0], build_record(parsed.header, [payload])])
        target, status = case.decode(arena, offsets, sizes)
        assert status.tolist() == [0, wanted], name
        for x in case.contents(target):
            assert bool((x[:, :, 4:] == POISON).all())


def test_bad_calls_are_refused(kernel_device, monkeypatch):
    case = Case(kernel_device, KVShape(2, 1, 64, "bfloat16"), 32, ((0, 2),))
    for coder in ("gdeflate", "ans", ""):
        with pytest.raises(ConfigError, match="one of deflate, zlib"):
            PagedCodec(case.artifact, "coarse", case.cache, deflate=coder)
    limits = PagedLimits(encode_tokens=16, decode_tokens=16, record_bytes=1 << 20, block_tokens=3)
    codec = PagedCodec(case.artifact, "coarse", case.cache, limits=limits, deflate="zlib")
    with pytest.raises(ConfigError, match="block_tokens is 3"):
        codec.encode(case.blocks(), case.arena())
    monkeypatch.setitem(sys.modules, "nvidia.libnvcomp", None)
    nvcomp.library.cache_clear()
    with pytest.raises(MissingDependencyError, match="nvCOMP is not installed"):
        PagedCodec(case.artifact, "coarse", case.cache, limits=LIMITS)
    nvcomp.library.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_block_too_large_for_nvcomp_is_refused_and_zlib_takes_it():
    limits = PagedLimits(encode_tokens=1024, decode_tokens=1024, record_bytes=16 << 20, block_tokens=1024)
    case = Case("cuda", KVShape(2, 1, 128, "bfloat16"), 1024, ((0, 2),), block_tokens=1024, limits=limits, point="fine")
    with pytest.raises(ConfigError, match="zlib"):
        case.encode()
    codec = PagedCodec(case.artifact, "fine", case.cache, limits=limits, deflate="zlib")
    arena = case.arena()
    encoded = codec.encode(case.blocks(), arena)
    encoded.finish()
    assert not case.decode(arena, encoded.offsets, encoded.sizes)[1].any()
