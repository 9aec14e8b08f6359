"""Whole blocks: out of the cache and back, in every dtype and odd size."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from dynamo_kvtc.codec.artifact import Artifact
from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.codec.policy import ExactPolicy
from dynamo_kvtc.codec.record import MAX_BLOCK_TOKENS, RecordHeader, build_record
from dynamo_kvtc.errors import ConfigError, RecordFormatError, RecordMismatchError
from dynamo_kvtc.types import KVShape, RopeSpec
from tests.builders import case_seed, default_rope, gapped_positions, make_artifact, random_kv, same_bits

GROUPS = {1: ((0, 3),), 2: ((0, 1), (1, 3)), 3: ((0, 1), (1, 2), (2, 3))}
NONE = ExactPolicy(sinks=0)


def small(dtype: str = "bfloat16", seed: int = 0, **more) -> Artifact:
    more.setdefault("groups", GROUPS[2])
    return make_artifact(KVShape(3, 2, 16, dtype), seed=seed, components=24, **more)[2]


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


SIZES = list(itertools.product(["bfloat16", "float16", "float32"], [1, 3], [64, 96, 128]))
LANES = [1, 2, 4, 8]


@pytest.mark.parametrize(("dtype", "heads", "dim"), SIZES)
def test_round_trip(dtype, heads, dim):
    seed = case_seed()
    groups = GROUPS[1 + SIZES.index((dtype, heads, dim)) % 3]
    shape = KVShape(3, heads, dim, dtype)
    rope = default_rope(shape) if dim != 96 else RopeSpec((0.9, 0.11, 0.03), 1.1, "interleaved")
    artifact = make_artifact(shape, rope, groups, seed=seed, lanes=LANES[SIZES.index((dtype, heads, dim)) % 4])[2]
    for tokens in (1, 15, 16, 17, 33):
        positions = gapped_positions(tokens, seed + tokens, first=tokens * 1001)
        k, v = random_kv(artifact, tokens, seed + tokens, positions)
        errors = []
        for point in ("fine", "coarse"):
            codec = BlockCodec(artifact, point)
            records = [block.record for block in codec.encode_blocks(k, v, positions)]
            assert len(records) == math.ceil(tokens / 16)
            k_back, v_back, positions_back = codec.decode_blocks(records)
            assert k_back.shape == k.shape
            assert k_back.dtype == v_back.dtype == k.dtype
            assert torch.equal(positions_back, positions)
            errors.append(relative_error(k_back, k) + relative_error(v_back, v))
        assert errors[0] < 0.12, (tokens, errors)
        assert errors[1] < 0.3, (tokens, errors)


def awkward(tokens: int, artifact: Artifact, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of random bits: NaN with payloads, infinities, -0.0, subnormals."""
    shape = artifact.shape
    size = (shape.layers, shape.kv_heads, tokens, shape.head_dim * shape.torch_dtype.itemsize)
    generator = np.random.default_rng(seed)
    k, v = (torch.from_numpy(generator.integers(0, 256, size).astype(np.uint8)).view(shape.torch_dtype) for _ in "kv")
    k[0, 0, 0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, float("-inf")], dtype=k.dtype)
    v[-1, -1, -1, :2] = torch.finfo(v.dtype).smallest_normal / 4
    return k, v


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_exact_tokens_keep_every_bit(dtype):
    seed = case_seed()
    artifact = small(dtype, seed)
    codec = BlockCodec(artifact, "coarse")
    tokens = 37
    k, v = random_kv(artifact, tokens, seed)
    odd_k, odd_v = awkward(tokens, artifact, seed)
    exact = torch.from_numpy(np.random.default_rng(seed).random(tokens) < 0.4)
    exact[5], exact[6] = True, False
    k[:, :, exact], v[:, :, exact] = odd_k[:, :, exact], odd_v[:, :, exact]
    blocks = codec.encode_blocks(k, v, torch.arange(tokens), exact)
    assert sum(block.exact.policy for block in blocks) == int(exact.sum())
    assert sum(block.exact.total for block in blocks) == int(exact.sum())
    k_back, v_back, _ = codec.decode_blocks([block.record for block in blocks])
    assert same_bits(k_back[:, :, exact], k[:, :, exact])
    assert same_bits(v_back[:, :, exact], v[:, :, exact])
    assert k_back[:, :, ~exact].isfinite().all()
    assert not torch.equal(k_back[:, :, ~exact], k[:, :, ~exact])


def test_all_tokens_exact_and_none():
    seed = case_seed()
    artifact = small("bfloat16", seed)
    codec = BlockCodec(artifact, "coarse")
    k, v = awkward(19, artifact, seed)
    all_exact = torch.ones(19, dtype=torch.bool)
    blocks = codec.encode_blocks(k, v, torch.arange(19), all_exact)
    k_back, v_back, _ = codec.decode_blocks([block.record for block in blocks])
    assert same_bits(k_back, k)
    assert same_bits(v_back, v)
    k, v = random_kv(artifact, 19, seed)
    blocks = codec.encode_blocks(k, v, torch.arange(19), ~all_exact)
    assert sum(block.exact.total for block in blocks) == 0
    assert codec.decode_blocks([block.record for block in blocks])[0].isfinite().all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_not_finite_is_stored_exact_and_counted(dtype, value):
    seed = case_seed()
    artifact = small(dtype, seed)
    codec = BlockCodec(artifact, "coarse", NONE)
    k, v = random_kv(artifact, 33, seed)
    k[2, 1, 3, 15] = value
    v[0, 0, 20, 0] = value
    blocks = codec.encode_blocks(k, v, torch.arange(33))
    assert [block.exact.nonfinite for block in blocks] == [1, 1, 0]
    assert [block.exact.total for block in blocks] == [1, 1, 0]
    k_back, v_back, _ = codec.decode_blocks([block.record for block in blocks])
    for token in (3, 20):
        assert same_bits(k_back[:, :, token], k[:, :, token])
        assert same_bits(v_back[:, :, token], v[:, :, token])
    others = [t for t in range(33) if t not in (3, 20)]
    assert k_back[:, :, others].isfinite().all()
    assert v_back[:, :, others].isfinite().all()


@pytest.mark.parametrize("factor", [30.0, 3000.0])
def test_an_outlier_is_stored_exact_and_counted(factor):
    """30 times the usual: energy that no component holds. 3,000 times: beyond the fixed-point range as well."""
    seed = case_seed()
    artifact = small("float32", seed)
    codec = BlockCodec(artifact, "fine", NONE)
    k, v = random_kv(artifact, 17, seed)
    v[:, :, 9] *= factor
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal(tuple(v[:, :, 9].shape))).float()
    v[:, :, 9] += factor * noise
    blocks = codec.encode_blocks(k, v, torch.arange(17))
    assert [block.exact.error_bound for block in blocks] == [1, 0]
    _, v_back, _ = codec.decode_blocks([block.record for block in blocks])
    assert same_bits(v_back[:, :, 9], v[:, :, 9])


def test_error_bound_can_be_switched_off_but_not_for_what_cannot_be_coded():
    seed = case_seed()
    artifact = small("float32", seed)
    codec = BlockCodec(artifact, "coarse", ExactPolicy(sinks=0, max_error=math.inf))
    k, v = random_kv(artifact, 3, seed)
    v[:, :, 1] += 4 * torch.from_numpy(np.random.default_rng(seed).standard_normal(tuple(v[:, :, 1].shape))).float()
    k[0, 0, 2, 0] = 1e30
    block = codec.encode_block(k, v, torch.arange(3))
    assert block.exact.error_bound == 1
    k_back, _, _ = codec.decode_block(block.record)
    assert same_bits(k_back[:, :, 2], k[:, :, 2])


def test_largest_float16_does_not_come_back_as_infinity():
    seed = case_seed()
    artifact = small("float16", seed)
    tensors = {name: t.clone() for name, t in artifact._tensors.items()}
    for g in (0, 1):
        tensors[f"rank0.group{g}.mean"] = torch.full_like(tensors[f"rank0.group{g}.mean"], 65504.0)
        tensors[f"rank0.group{g}.weight"].fill_(0.002)
    codec = BlockCodec(Artifact(artifact.manifest, tensors), "coarse", ExactPolicy(sinks=0, max_error=math.inf))
    generator = np.random.default_rng(seed)
    v = torch.from_numpy(65504.0 - generator.uniform(0, 4000, (3, 2, 21, 16))).half()
    k = torch.zeros_like(v)
    k[..., :] = v
    block = codec.encode_block(k, v, torch.zeros(21, dtype=torch.int64))
    assert block.exact.total < 21, "the case is meant to code tokens"
    k_back, v_back, _ = codec.decode_block(block.record)
    assert k_back.isfinite().all()
    assert v_back.isfinite().all()


@pytest.mark.parametrize(("dtype", "lanes"), [("bfloat16", 1), ("float16", 2), ("float32", 8)])
def test_coding_what_was_decoded_changes_no_symbol(dtype, lanes):
    seed = case_seed()
    artifact = make_artifact(KVShape(3, 3, 64, dtype), groups=GROUPS[2], seed=seed, lanes=lanes)[2]
    codec = BlockCodec(artifact, "coarse")
    positions = gapped_positions(50, seed, first=3)
    k, v = random_kv(artifact, 50, seed, positions)
    first = [block.record for block in codec.encode_blocks(k, v, positions)]
    k_back, v_back, _ = codec.decode_blocks(first)
    exact = torch.from_numpy(np.concatenate([codec.parse(record).header.exact for record in first]))
    assert not exact.all()
    assert [block.record for block in codec.encode_blocks(k_back, v_back, positions, exact)] == first


@pytest.mark.parametrize(("block_tokens", "lanes"), [(1, 1), (7, 2), (16, 4), (64, 8)])
def test_record_bytes_do_not_depend_on_what_is_encoded_with_them(block_tokens, lanes):
    seed = case_seed()
    artifact = small("bfloat16", seed, groups=GROUPS[3], lanes=lanes)
    codec = BlockCodec(artifact, "fine")
    positions = gapped_positions(41, seed)
    k, v = random_kv(artifact, 41, seed, positions)
    k[1, 0, 30, 2] = float("nan")
    together = codec.encode_blocks(k, v, positions, block_tokens=block_tokens)
    assert len(together) == math.ceil(41 / block_tokens)
    for i, block in enumerate(together):
        part = slice(i * block_tokens, (i + 1) * block_tokens)
        assert codec.encode_block(k[:, :, part], v[:, :, part], positions[part]) == block, i


def test_lanes_change_the_records_and_no_value():
    seed = case_seed()
    k, v = random_kv(small("bfloat16", seed), 20, seed)
    decoded, sizes = [], []
    for lanes in LANES:
        codec = BlockCodec(small("bfloat16", seed, lanes=lanes), "coarse")
        records = [block.record for block in codec.encode_blocks(k, v, torch.arange(20))]
        sizes.append(sum(map(len, records)))
        decoded.append(codec.decode_blocks(records))
    assert all(same_bits(a, b) for other in decoded[1:] for a, b in zip(other, decoded[0], strict=True))
    assert sizes == sorted(sizes)


def test_chunks_of_a_long_sequence_change_no_byte(monkeypatch):
    seed = case_seed()
    artifact = small("bfloat16", seed)
    codec = BlockCodec(artifact, "coarse")
    k, v = random_kv(artifact, 100, seed)
    whole = codec.encode_blocks(k, v, torch.arange(100))
    monkeypatch.setattr("dynamo_kvtc.codec.pipeline._CHUNK_TOKENS", 7)
    assert codec.encode_blocks(k, v, torch.arange(100)) == whole


def test_tensors_of_any_memory_layout_encode_alike():
    seed = case_seed()
    artifact = small("bfloat16", seed)
    codec = BlockCodec(artifact, "coarse")
    k, v = random_kv(artifact, 18, seed)
    layer_last = k.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not layer_last.is_contiguous()
    assert codec.encode_blocks(layer_last, v, torch.arange(18)) == codec.encode_blocks(k, v, torch.arange(18))


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("lanes", [1, 4])
def test_groups_and_blocks_decode_alone_to_the_same_bits(groups, lanes):
    seed = case_seed()
    artifact = small("bfloat16", seed, groups=GROUPS[groups], lanes=lanes)
    codec = BlockCodec(artifact, "fine")
    k, v = random_kv(artifact, 50, seed)
    records = [block.record for block in codec.encode_blocks(k, v, torch.arange(50))]
    k_all, v_all, positions = codec.decode_blocks(records)
    parsed = [codec.parse(record) for record in records]
    for g in reversed(range(groups)):
        start, end = GROUPS[groups][g]
        k_group, v_group = codec.decode_group(parsed, g)
        assert same_bits(k_group, k_all[start:end])
        assert same_bits(v_group, v_all[start:end])
    for i, record in enumerate(records):
        k_one, v_one, positions_one = codec.decode_block(record)
        part = slice(16 * i, 16 * i + 16)
        assert same_bits(k_one, k_all[:, :, part])
        assert same_bits(v_one, v_all[:, :, part])
        assert torch.equal(positions_one, positions[part])


def test_records_of_different_sizes_decode_in_one_call():
    seed = case_seed()
    artifact = small("float16", seed)
    codec = BlockCodec(artifact, "coarse")
    k, v = random_kv(artifact, 23, seed)
    cuts = [0, 1, 2, 18, 23]
    records = [
        codec.encode_block(k[:, :, a:b], v[:, :, a:b], torch.arange(a, b)).record for a, b in itertools.pairwise(cuts)
    ]
    k_all, _, positions = codec.decode_blocks(records)
    assert torch.equal(positions, torch.arange(23))
    whole = codec.decode_block(codec.encode_block(k, v, torch.arange(23)).record)[0]
    assert same_bits(k_all, whole)


def test_tensor_parallel_ranks_have_their_own_coding():
    seed = case_seed()
    manifest, tensors, artifact = make_artifact(KVShape(2, 4, 16, "bfloat16"), tp_size=2, seed=seed, components=16)
    other = Artifact(manifest, tensors, rank=1)
    k, v = random_kv(artifact, 8, seed)
    assert k.shape == (2, 2, 8, 16)
    record = BlockCodec(artifact, "coarse").encode_block(k, v, torch.arange(8)).record
    with pytest.raises(RecordMismatchError, match=r"rank is 0x0; this codec's is 0x1"):
        BlockCodec(other, "coarse").decode_block(record)


def test_a_record_of_another_making_is_refused_naming_both_sides():
    seed = case_seed()
    artifact, other = small(seed=1), small(seed=2)
    k, v = random_kv(artifact, 8, seed)
    codec = BlockCodec(artifact, "coarse")
    record = codec.encode_block(k, v, torch.arange(8)).record
    with pytest.raises(RecordMismatchError, match=f"{artifact.fingerprint:#x}.*{other.fingerprint:#x}"):
        BlockCodec(other, "coarse").decode_block(record)
    with pytest.raises(RecordMismatchError, match=r"point is 0x1; this codec's is 0x0"):
        BlockCodec(artifact, "fine").decode_block(record)
    ours = {"profile": 2, "point": 1, "artifact": artifact.fingerprint, "rank": 0}
    empty = np.arange(4), np.ones(4, bool)
    for change, sections, told in [
        ({"profile": 1}, 2, "profile is 0x1; this codec's is 0x2"),
        ({"rank": 9}, 2, "rank is 0x9"),
        ({}, 3, "layer groups is 0x3; this codec's is 0x2"),
    ]:
        forged = build_record(RecordHeader(**{**ours, **change}, positions=empty[0], exact=empty[1]), [b""] * sections)
        with pytest.raises(RecordMismatchError, match=told):
            codec.decode_block(forged)


def test_exact_tokens_that_are_not_all_there():
    artifact = small()
    codec = BlockCodec(artifact, "coarse")
    header = RecordHeader(2, 1, artifact.fingerprint, 0, np.arange(4), np.ones(4, bool))
    sizes = [4 * (end - start) * artifact.shape.bytes_per_layer_token for start, end in artifact.manifest.groups]
    fits = build_record(header, [bytes(size) for size in sizes])
    assert float(codec.decode_block(fits)[0].abs().max()) == 0
    with pytest.raises(RecordFormatError, match="4 exact tokens need 512 bytes of 511"):
        codec.decode_block(build_record(header, [bytes(sizes[0] - 1), bytes(sizes[1])]))
    with pytest.raises(RecordFormatError, match="2 bytes of lanes in a block without coded tokens"):
        codec.decode_block(build_record(header, [bytes(sizes[0]), bytes(sizes[1] + 2)]))


def test_sinks_are_exact_unless_the_caller_says_otherwise():
    seed = case_seed()
    artifact = small("bfloat16", seed)
    codec = BlockCodec(artifact, "coarse", ExactPolicy(sinks=3))
    k, v = random_kv(artifact, 20, seed)
    by_policy = codec.encode_blocks(k, v, torch.arange(20))
    assert [block.exact.policy for block in by_policy] == [3, 0]
    later = codec.encode_blocks(k, v, torch.arange(1, 21))
    assert [block.exact.policy for block in later] == [2, 0]
    window = ExactPolicy(sinks=3, window=2).mask(torch.arange(20), 20)
    assert [block.exact.policy for block in codec.encode_blocks(k, v, torch.arange(20), window)] == [3, 2]


def test_refuses_input_that_is_not_the_artifacts():
    artifact = small()
    codec = BlockCodec(artifact, "coarse")
    k, v = random_kv(artifact, 5, case_seed())
    positions = torch.arange(5)
    for bad_k, bad_v, bad_positions, exact, told in [
        (k.float(), v, positions, None, "k is torch.float32"),
        (k, v[:2], positions, None, "v is"),
        (k[:, :1], v, positions, None, "k is"),
        (k[..., :8], v[..., :8], positions, None, "T >= 1, 16"),
        (k[:, :, :0], v[:, :, :0], positions[:0], None, "k is"),
        (k[0], v[0], positions, None, "k is"),
        (k[0, 0], v[0, 0], positions, None, "k is"),
        (k, v[:, :, :4], positions, None, "v is"),
        (k, v, positions[:4], None, "int64"),
        (k, v, positions.int(), None, "int32"),
        (k, v, positions - 1, None, "-1 to 3"),
        (k, v, positions + 2**31, None, "2147483652"),
        (k, v, positions, torch.zeros(4, dtype=torch.bool), "exact must be bool"),
        (k, v, positions, torch.zeros(5), "exact must be bool"),
    ]:
        for encode in (codec.encode_block, codec.encode_blocks):
            with pytest.raises(ConfigError, match=told):
                encode(bad_k, bad_v, bad_positions, exact)
    for size in (0, -1, MAX_BLOCK_TOKENS + 1):
        with pytest.raises(ConfigError, match=f"block_tokens is {size}"):
            codec.encode_blocks(k, v, positions, block_tokens=size)
    with pytest.raises(ConfigError, match="at least one record"):
        codec.decode_blocks([])
    with pytest.raises(ConfigError, match="'nope' is not in the artifact; it has fine, coarse"):
        BlockCodec(artifact, "nope")


def test_decoding_does_not_read_what_is_not_written(monkeypatch):
    """New tensors come poisoned, so an element that decoding forgot would show."""
    seed = case_seed()
    artifact = small("float32", seed)
    codec = BlockCodec(artifact, "coarse")
    k, v = random_kv(artifact, 20, seed)
    records = [block.record for block in codec.encode_blocks(k, v, torch.arange(20))]
    clean = codec.decode_blocks(records)
    real, real_numpy = torch.empty, np.empty

    def poisoned(*args, **kwargs):
        out = real(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(0x25)

    def poisoned_numpy(*args, **kwargs):
        out = real_numpy(*args, **kwargs)
        out.reshape(-1).view(np.uint8)[:] = 0xA5
        return out

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(np, "empty", poisoned_numpy)
    again = codec.decode_blocks(records)
    assert same_bits(again[0], clean[0])
    assert same_bits(again[1], clean[1])
    assert [block.record for block in codec.encode_blocks(k, v, torch.arange(20))] == records
