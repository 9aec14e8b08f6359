"""The GPU path against the CPU's: the same records, and each reads the other's. Interpreted where there is no GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynamo_kvtc.codec.headers import BAD_HEADER, MISMATCH
from dynamo_kvtc.codec.paged import Blocks, PagedCodec, PagedLimits
from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.codec.policy import ExactPolicy
from dynamo_kvtc.errors import ConfigError, RecordCorruptError
from dynamo_kvtc.ops.lanes import BAD_CHECKSUM, BAD_DIRECTORY, BAD_LANE
from dynamo_kvtc.ops.pages import PagedCache
from dynamo_kvtc.types import KVShape
from tests.builders import case_seed, gapped_positions, make_artifact, random_kv, same_bits

# Small, like all that follows: the interpreter takes seconds for what a GPU does in microseconds.
LIMITS = PagedLimits(encode_tokens=18, decode_tokens=18, record_bytes=1 << 20)
POISON = 7.0


class Case:
    """Tokens in a paged cache of a random layout, and the same as the CPU's codec takes them."""

    def __init__(self, device, shape, tokens, seed, groups=None, lanes=1, gaps=False, block_tokens=16, point="coarse",
                 limits=LIMITS, policy=None, components=20, grouped=False):  # fmt: skip
        """grouped: every other layer is of a second group, with pages of its own in the memory of the layer before."""
        self.generator = np.random.default_rng(seed)
        self.artifact = make_artifact(shape, groups=groups, seed=seed, lanes=lanes, components=components)[2]
        self.positions = gapped_positions(tokens, seed) if gaps else torch.arange(tokens) + int(gaps is None) * 1000
        self.k, self.v = random_kv(self.artifact, tokens, seed, self.positions)
        self.device, self.point, self.policy, self.limits = device, point, policy, limits
        self.block_tokens = block_tokens
        self.page_tokens = 8
        self.pages = -(-tokens // self.page_tokens) + 2
        self.group_of = [layer % 2 if grouped else 0 for layer in range(shape.layers)]
        order = torch.from_numpy(self.generator.permutation(self.pages * (1 + grouped))).view(-1, self.pages)
        self.orders = order[[0, -1]]
        slots = self.orders[..., None] * self.page_tokens + torch.arange(self.page_tokens)
        # Of each group; a token goes by its slot in the first.
        self.group_slots = slots.flatten(1)[:, :tokens].clone()
        self.slots = self.group_slots[0]
        self.cache = self.empty()
        for layer, kv in enumerate(zip(self.k, self.v, strict=True)):
            for view, x in zip((self.cache.k[layer], self.cache.v[layer]), kv, strict=True):
                view[self.at(layer)] = x.transpose(0, 1).to(device)
        self.codec = PagedCodec(self.artifact, point, self.cache, policy, limits)
        self.reference = BlockCodec(self.artifact, point, policy)

    def empty(self):
        s = self.artifact.shape
        grouped = any(self.group_of)
        memory = [
            torch.full((self.pages * (1 + grouped), s.kv_heads, self.page_tokens, 2 * s.head_dim), POISON,
                       dtype=s.torch_dtype, device=self.device)
            for _ in range(s.layers)
        ]  # fmt: skip
        views = [memory[layer // (1 + grouped)] for layer in range(s.layers)]
        cache = PagedCache.of([x[..., : s.head_dim] for x in views], [x[..., s.head_dim :] for x in views],
                              self.group_of)  # fmt: skip
        if cache.table is not None:
            cache.table.put(self.orders[0].tolist(), [[page] for page in self.orders[1].tolist()])
        return cache

    def at(self, layer):
        """Of a layer's K or V, where the case's tokens are."""
        slots = self.group_slots[self.group_of[layer]]
        return slots // self.page_tokens, slice(None), slots % self.page_tokens

    def blocks(self, exact=None):
        return Blocks.uniform(self.slots, self.positions, self.block_tokens, exact)

    def arena(self, nbytes=1 << 20):
        return torch.full((nbytes,), 0xA5, dtype=torch.uint8, pin_memory=self.device == "cuda")

    def encode(self, exact=None):
        arena = self.arena()
        encoded = self.codec.encode(self.blocks(exact), arena, 32)
        encoded.finish()
        return arena, encoded

    def contents(self, cache):
        """K and V [L, H, T, D] of the case's tokens."""
        return [
            torch.stack([x[self.at(layer)].transpose(0, 1).cpu() for layer, x in enumerate(views)])
            for views in (cache.k, cache.v)
        ]


SHAPES = [
    (KVShape(2, 1, 64, "bfloat16"), 16, ((0, 1), (1, 2)), 1, False),
    (KVShape(2, 3, 96, "float16"), 17, None, 2, True),
    (KVShape(1, 1, 128, "float32"), 15, None, 4, None),
    (KVShape(3, 2, 64, "bfloat16"), 18, ((0, 2), (2, 3)), 1, True),
    (KVShape(2, 1, 64, "bfloat16"), 1, None, 8, False),
    (KVShape(1, 1, 256, "bfloat16"), 9, None, 1, None),
]


@pytest.mark.parametrize("point", ["fine", "coarse"])
@pytest.mark.parametrize(("shape", "tokens", "groups", "lanes", "gaps"), SHAPES)
def test_records_are_the_cpus_and_each_reads_the_others(kernel_device, shape, tokens, groups, lanes, gaps, point):
    components, block_tokens = 20 if tokens > 1 else 72, 8 if tokens > 17 else 16
    case = Case(kernel_device, shape, tokens, case_seed(), groups, lanes, gaps, point=point,
                block_tokens=block_tokens, components=components)  # fmt: skip
    for group in case.reference.profile.groups:
        assert 0 < group.wide.shape[1] < len(group.classes), "the case is meant to have both kinds of components"
    arena, encoded = case.encode()
    theirs = [b.record for b in case.reference.encode_blocks(case.k, case.v, case.positions, block_tokens=block_tokens)]
    assert encoded.records() == theirs
    last = int(encoded.offsets[-1] + encoded.sizes[-1])
    assert bool((arena[:32] == 0xA5).all())
    assert bool((arena[last:] == 0xA5).all())

    target = case.empty()
    codec = PagedCodec(case.artifact, point, target, limits=LIMITS)
    restore = codec.decode(arena, encoded.offsets, encoded.sizes, case.blocks())
    assert restore.finish().tolist() == [0] * len(theirs)
    assert len(restore.events) == len(case.artifact.manifest.groups)
    k, v, _ = case.reference.decode_blocks(theirs)
    exact = torch.from_numpy(encoded.exact)
    for found, wanted in zip(case.contents(target), (k, v), strict=True):
        scale = float(wanted.float().abs().max())
        tolerance = {"bfloat16": 2.0**-7, "float16": 2.0**-9, "float32": 2.0**-11}[shape.dtype]
        torch.testing.assert_close(found.float(), wanted.float(), rtol=tolerance, atol=1e-3 * scale)
        assert same_bits(found[:, :, exact], wanted[:, :, exact])
    untouched = torch.ones(case.pages * case.page_tokens, dtype=torch.bool)
    untouched[case.slots] = False
    for view in (*target.k, *target.v):
        flat = view.transpose(1, 2).reshape(len(untouched), -1)
        assert bool((flat[untouched.to(flat.device)] == POISON).all())


@pytest.mark.parametrize(
    ("shape", "groups"), [(KVShape(3, 2, 64, "bfloat16"), ((0, 2), (2, 3))), (KVShape(2, 3, 96, "float16"), None)]
)
def test_layers_of_two_groups_have_pages_of_their_own(kernel_device, shape, groups):
    """The second block has no page in the second group any more, as one that has left a window: its other layers come
    back, and nothing else is written."""
    case = Case(kernel_device, shape, 24, case_seed(), groups, block_tokens=8, grouped=True, gaps=None)
    exact = torch.arange(24) % 5 == 0
    arena, encoded = case.encode(exact)
    theirs = [b.record for b in case.reference.encode_blocks(case.k, case.v, case.positions, exact, block_tokens=8)]
    assert encoded.records() == theirs

    target = case.empty()
    lost = case.orders[1][1]
    target.table.put([int(case.orders[0][1])], [[-1]])
    codec = PagedCodec(case.artifact, case.point, target, limits=LIMITS)
    assert codec.decode(arena, encoded.offsets, encoded.sizes, case.blocks()).finish().tolist() == [0] * 3
    k, v, _ = case.reference.decode_blocks(theirs)
    second = torch.arange(24) // 8 == 1
    for found, wanted, views in zip(case.contents(target), (k, v), (target.k, target.v), strict=True):
        scale, tolerance = float(wanted.float().abs().max()), {"bfloat16": 2.0**-7, "float16": 2.0**-9}[shape.dtype]
        for layer in range(shape.layers):
            here = ~second if layer % 2 else torch.ones_like(second)
            torch.testing.assert_close(
                found[layer][:, here].float(), wanted[layer][:, here].float(), rtol=tolerance, atol=1e-3 * scale
            )
            assert same_bits(found[layer][:, here & exact], wanted[layer][:, here & exact])
            assert not layer % 2 or bool((views[layer][lost] == POISON).all())
    used = case.orders[:, :3].flatten().tolist()
    rest = [page for page in range(target.blocks) if page not in used]
    assert all(bool((view[rest] == POISON).all()) for view in (*target.k, *target.v))


@pytest.mark.parametrize("by_group", [True, False])
@pytest.mark.parametrize(
    ("decode_tokens", "chunks"), [(10, [4, 6]), (6, [2, 6, 2]), (2, [2] * 5)], ids=["together", "kept", "again"]
)
def test_chunks_that_stay_on_the_gpu_and_chunks_that_come_again(kernel_device, decode_tokens, chunks, by_group):
    """By layer group: all of all chunks at once; one by one; one by one, the records brought again for each. Or chunk
    by chunk."""
    limits = PagedLimits(encode_tokens=18, decode_tokens=decode_tokens, record_bytes=1 << 16)
    case = Case(kernel_device, KVShape(2, 1, 64, "bfloat16"), 10, case_seed(), ((0, 1), (1, 2)), 2, block_tokens=2,
                limits=limits)  # fmt: skip
    theirs = [b.record for b in case.reference.encode_blocks(case.k, case.v, case.positions, block_tokens=2)]
    arena, sizes = case.arena(), np.array([len(record) for record in theirs])
    offsets = np.cumsum(-(-sizes // 16) * 16) - sizes
    for at, record in zip(offsets, theirs, strict=True):
        arena[at : at + len(record)] = torch.frombuffer(bytearray(record), dtype=torch.uint8)
    found = case.codec._decoder._chunks(len(arena), offsets, sizes, case.blocks())
    assert [c.tokens.stop - c.tokens.start for c in found] == chunks
    damaged = 3
    arena[offsets[damaged] + sizes[damaged] - 1] ^= 1
    target = case.empty()
    status = PagedCodec(case.artifact, case.point, target, limits=limits).decode(
        arena, offsets, sizes, case.blocks(), by_group
    ).finish()  # fmt: skip
    assert [int(s) for s in status] == [BAD_CHECKSUM if b == damaged else 0 for b in range(5)]
    sound = torch.arange(10) // 2 != damaged
    k, v, _ = case.reference.decode_blocks(theirs)
    for ours, wanted in zip(case.contents(target), (k, v), strict=True):
        atol = 1e-3 * float(wanted.float().abs().max())
        torch.testing.assert_close(ours[:, :, sound].float(), wanted[:, :, sound].float(), rtol=2.0**-7, atol=atol)
    # The last layer group, found damaged, has written nothing of that block.
    assert all(bool((x[1][:, ~sound] == POISON).all()) for x in case.contents(target))


def test_exact_tokens_of_every_reason(kernel_device):
    seed = case_seed()
    case = Case(kernel_device, KVShape(2, 2, 64, "bfloat16"), 32, seed, ((0, 1), (1, 2)), gaps=None,
                policy=ExactPolicy(sinks=0, max_error=1.0))  # fmt: skip
    k, v = case.k.clone(), case.v.clone()
    k[1, 0, 21, 3], v[0, 1, 5, 60], v[1, 0, 30] = float("nan"), float("-inf"), 3e4
    for view, x in zip((*case.cache.k, *case.cache.v), (*k, *v), strict=True):
        at = (case.slots // case.page_tokens, slice(None), case.slots % case.page_tokens)
        view[at] = x.transpose(0, 1).to(kernel_device)
    asked = torch.zeros(32, dtype=torch.bool)
    asked[[0, 15, 16, 31]] = True
    _, encoded = case.encode(asked)
    theirs = case.reference.encode_blocks(k, v, case.positions, asked)
    assert encoded.records() == [b.record for b in theirs]
    assert encoded.exact[[0, 5, 15, 16, 21, 30, 31]].all()
    assert 7 < encoded.exact.sum() < 32
    assert np.array_equal(encoded.asked, asked.numpy())
    assert int(encoded.exact.sum()) == sum(b.exact.total for b in theirs)


def test_blocks_of_any_size_scattered_in_the_arena(kernel_device):
    case = Case(kernel_device, KVShape(2, 1, 64, "bfloat16"), 21, case_seed(), ((0, 1), (1, 2)))
    counts = np.array([1, 16, 3, 1], dtype=np.int32)
    records, start = [], 0
    for count in counts:
        own = slice(start, start + count)
        records.append(case.reference.encode_block(case.k[:, :, own], case.v[:, :, own], case.positions[own]).record)
        start += count
    arena = case.arena()
    order = case.generator.permutation(len(records))
    offsets, at = np.zeros(len(records), np.int64), 3
    for b in order:
        offsets[b] = at
        arena[at : at + len(records[b])] = torch.frombuffer(bytearray(records[b]), dtype=torch.uint8)
        at += len(records[b]) + 2 * int(case.generator.integers(0, 4000)) + len(records[b]) % 2
    sizes = np.array([len(r) for r in records], dtype=np.int64)
    target = case.empty()
    codec = PagedCodec(case.artifact, case.point, target, limits=LIMITS)
    offsets += 1
    arena = torch.roll(arena, 1).clone()
    if kernel_device == "cuda":
        arena = arena.pin_memory()
    status = codec.decode(arena, offsets, sizes, Blocks(counts, case.slots)).finish()
    assert status.tolist() == [0] * len(records)
    k, v, _ = case.reference.decode_blocks(records)
    for found, wanted in zip(case.contents(target), (k, v), strict=True):
        torch.testing.assert_close(
            found.float(), wanted.float(), rtol=2.0**-7, atol=1e-3 * float(wanted.float().abs().max())
        )


def test_a_damaged_record_is_reported_and_its_neighbours_come_back(kernel_device):
    case = Case(kernel_device, KVShape(2, 1, 64, "bfloat16"), 12, case_seed(), ((0, 1), (1, 2)), block_tokens=4)
    arena, encoded = case.encode()
    clean = case.empty()
    assert (
        not PagedCodec(case.artifact, case.point, clean, limits=LIMITS)
        .decode(arena, encoded.offsets, encoded.sizes, case.blocks())
        .finish()
        .any()
    )
    for block in range(3):
        bad = arena.clone()
        at = int(encoded.offsets[block] + case.generator.integers(0, encoded.sizes[block]))
        bad[at] ^= 1 << int(case.generator.integers(0, 8))
        if kernel_device == "cuda":
            bad = bad.pin_memory()
        target = case.empty()
        codec = PagedCodec(case.artifact, case.point, target, limits=LIMITS)
        status = codec.decode(bad, encoded.offsets, encoded.sizes, case.blocks()).finish()
        assert status[block] in (BAD_HEADER, MISMATCH, BAD_CHECKSUM)
        assert (np.delete(status, block) == 0).all()
        own = torch.arange(12) // 4 == block
        for found, wanted in zip(case.contents(target), case.contents(clean), strict=True):
            assert same_bits(found[:, :, ~own], wanted[:, :, ~own])


def test_a_record_whose_lanes_lie_is_caught_behind_its_checksum(kernel_device):
    """Damage that someone signed: a directory, or words, that no encoder writes."""
    from dynamo_kvtc.codec.record import build_record, parse_record

    case = Case(
        kernel_device, KVShape(1, 1, 64, "bfloat16"), 16, case_seed(), policy=ExactPolicy(sinks=0), block_tokens=8
    )
    records = [b.record for b in case.reference.encode_blocks(case.k, case.v, case.positions, block_tokens=8)]
    parsed = parse_record(records[1])
    section = bytearray(parsed.section(0))
    forgeries = {
        "reserved": (3, 9, BAD_DIRECTORY), "width": (2, 3, BAD_DIRECTORY), "least": (0, section[0] ^ 1, BAD_DIRECTORY),
        "parameters": (4 + 8 * section[2], 15, BAD_DIRECTORY), "words": (len(section) - 3, None, BAD_LANE),
        "first words": (4 + 8 * section[2] + 8, None, BAD_LANE),
    }  # fmt: skip
    for name, (at, value, wanted) in forgeries.items():
        forged = bytearray(section)
        forged[at] = section[at] ^ 0x40 if value is None else value
        changed = [records[0], build_record(parsed.header, [bytes(forged)])]
        if value is None:
            # Raw bits may be changed unseen: what matters is that both decoders see the same.
            try:
                case.reference.decode_block(changed[1])
                wanted = 0
            except RecordCorruptError:
                pass
        arena = case.arena()
        offsets = np.array([0, len(changed[0]) + 16], dtype=np.int64)
        for offset, record in zip(offsets, changed, strict=True):
            arena[offset : offset + len(record)] = torch.frombuffer(bytearray(record), dtype=torch.uint8)
        target = case.empty()
        codec = PagedCodec(case.artifact, case.point, target, limits=LIMITS)
        sizes = np.array([len(r) for r in changed], dtype=np.int64)
        status = codec.decode(arena, offsets, sizes, case.blocks()).finish()
        assert status.tolist() == [0, wanted], name
        k, v = case.contents(target)
        assert bool((k[:, :, 8:] == POISON).all()) == (wanted != 0)
        assert bool((v[:, :, 8:] == POISON).all()) == (wanted != 0)


def test_bad_calls_are_refused_before_any_launch(kernel_device):
    case = Case(kernel_device, KVShape(2, 1, 64, "bfloat16"), 16, case_seed(), block_tokens=8)
    arena, encoded = case.encode()
    full = int(encoded.offsets[-1] + encoded.sizes[-1])
    for told, call in [
        ("arena has", lambda: case.codec.encode(case.blocks(), case.arena(full // 2), 0)),
        ("slots run", lambda: case.codec.encode(Blocks.uniform(case.slots + 999, case.positions, 16), arena)),
        ("needs Blocks.positions", lambda: case.codec.encode(Blocks.uniform(case.slots, None, 16), arena)),
        ("positions run", lambda: case.codec.encode(Blocks.uniform(case.slots, case.positions - 1, 16), arena)),
        ("uint8", lambda: case.codec.encode(case.blocks(), arena.float())),
        ("one per block", lambda: case.codec.decode(arena, encoded.offsets[:1], encoded.sizes, case.blocks())),
        ("written twice", lambda: case.codec.decode(
            arena, encoded.offsets, encoded.sizes, Blocks.uniform(case.slots * 0, None, 8))),
        ("encode_tokens is 18", lambda: case.codec.encode(Blocks.uniform(
            case.slots.repeat(2), torch.arange(32), 32), arena)),
        ("a record holds at most 1024", lambda: Blocks.uniform(torch.zeros(2000, dtype=torch.int64), None, 2000)),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            call()
    other = make_artifact(KVShape(2, 2, 64, "bfloat16"))[2]
    with pytest.raises(ConfigError, match="KV heads"):
        PagedCodec(other, "coarse", case.cache)
    with pytest.raises(ConfigError, match="'ans'"):
        PagedCodec(case.artifact, "coarse", case.cache, deflate="ans")
    small = PagedLimits(encode_tokens=32, decode_tokens=32, record_bytes=64)
    tight = PagedCodec(case.artifact, case.point, case.cache, limits=small)
    with pytest.raises(ConfigError, match="record_bytes is 64"):
        tight.encode(case.blocks(), case.arena())
    with pytest.raises(ConfigError, match="record_bytes is 64"):
        tight.decode(arena, encoded.offsets, encoded.sizes, case.blocks())
