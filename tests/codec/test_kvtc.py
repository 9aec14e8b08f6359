"""Profile kvtc: symbols, lane lengths, and an artifact whose numbers cannot be right."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from dynamo_kvtc.codec.artifact import Artifact
from dynamo_kvtc.codec.channels import from_rows, join_rows, split_rows, to_rows
from dynamo_kvtc.codec.kvtc import KvtcProfile
from dynamo_kvtc.errors import ArtifactFormatError, ConfigError, RecordCorruptError, RecordFormatError
from dynamo_kvtc.ops import rans
from dynamo_kvtc.types import KVShape
from tests.builders import fresh_seed, make_artifact, random_kv


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return make_artifact(KVShape(3, 2, 16, "float32"), groups=((0, 1), (1, 3)), components=24)[2]


@pytest.fixture(scope="module")
def profile(artifact) -> KvtcProfile:
    return KvtcProfile(artifact, 0)


def symbols_of(profile: KvtcProfile, artifact: Artifact, tokens: int, group: int = 1) -> torch.Tensor:
    k, v = random_kv(artifact, tokens, fresh_seed(), torch.zeros(tokens, dtype=torch.int64))
    start, end = artifact.manifest.groups[group]
    return profile.quantise(group, k[start:end], v[start:end])[0]


def test_channel_order_is_k_then_v_layer_head_dim():
    k = torch.arange(2 * 3 * 5 * 4).reshape(2, 3, 5, 4)
    rows = to_rows(k)
    assert rows[2].tolist() == k[:, :, 2, :].reshape(-1).tolist()
    assert torch.equal(from_rows(rows, 2, 3, 4), k)
    joined = join_rows(k, k + 1000)
    assert joined.shape == (5, 48)
    assert torch.equal(joined[:, 24:], rows + 1000)
    assert all(torch.equal(a, b) for a, b in zip(split_rows(joined, 2, 3, 4), (k, k + 1000), strict=True))


def test_symbols_are_whitened_coefficients(profile, artifact):
    """Against float64 linear algebra: no symbol is off by more than one, hardly any by one."""
    k, v = random_kv(artifact, 200, fresh_seed(), torch.zeros(200, dtype=torch.int64))
    symbols, error = profile.quantise(1, k[1:], v[1:])
    rows = join_rows(k[1:], v[1:]).double()
    mean, weight, basis = (
        artifact.tensor(f"group1.{name}", dtype, *[-1] * dims).double()
        for name, dtype, dims in (("mean", torch.float32, 1), ("weight", torch.float32, 1), ("basis", torch.int16, 2))
    )
    exact = ((rows - mean) * weight / 0.02) @ (basis[:, : symbols.shape[1]] / 2**15)
    plain = torch.sign(exact) * (exact.abs() + 0.4).floor()
    difference = (plain - symbols.double()).abs()
    assert difference.max() <= 1
    assert (difference > 0).double().mean() < 0.05
    assert error.isfinite().all()
    assert 0.3 < float(error.mean()) < 3


def test_error_is_the_squared_error_in_units_of_the_calibrated_mean(artifact):
    """At a coarse step: the 16-bit basis is orthonormal to about 1e-5, so of a token's energy that much is unsure."""
    profile = KvtcProfile(artifact, 1)
    k, v = random_kv(artifact, 40, fresh_seed(), torch.zeros(40, dtype=torch.int64))
    symbols, error = profile.quantise(0, k[:1], v[:1])
    k_back, v_back = profile.dequantise(0, symbols)
    weight = artifact.tensor("group0.weight", torch.float32, -1).double()
    lost = ((join_rows(k[:1], v[:1]) - join_rows(k_back, v_back)).double() * weight / 0.25).square().sum(dim=1)
    calibrated = float(artifact.tensor("group0.point1.error", torch.float32, 1))
    torch.testing.assert_close(error, lost / calibrated, rtol=0.2, atol=0.4)


@pytest.mark.parametrize("sizes", [[1], [16], [5, 0, 11], [0], [], [0, 0, 3], [1] * 9])
def test_pack_and_unpack(profile, artifact, sizes):
    symbols = symbols_of(profile, artifact, max(sum(sizes), 1))[: sum(sizes)]
    payloads = profile.pack(1, symbols, sizes)
    assert [len(p) == 0 for p in payloads] == [n == 0 for n in sizes]
    assert all(len(p) % 2 == 0 for p in payloads)
    assert torch.equal(profile.unpack(1, payloads, sizes), symbols)
    for i, n in enumerate(sizes):
        start = sum(sizes[:i])
        assert profile.pack(1, symbols[start : start + n], [n]) == [payloads[i]]


@pytest.mark.parametrize("width", [0, 1, 2])
def test_lane_lengths_of_every_width(width):
    """Lanes of equal length, of lengths within 255, and of lengths further apart."""
    shape = KVShape(1, 1, 256, "float32")
    artifact = make_artifact(shape, components=400 if width == 2 else 64, seed=3)[2]
    profile = KvtcProfile(artifact, 0)
    generator = np.random.default_rng(fresh_seed())
    rank = len(profile.groups[0].classes)
    symbols = np.zeros((5, rank), np.int16)
    if width:
        symbols[1] = generator.integers(-32768, 32768, rank)
        symbols[3] = generator.integers(-32768, 32768, rank)
    (payload,) = profile.pack(0, torch.from_numpy(symbols), [5])
    _, found, reserved = struct.unpack_from("<HBB", payload)
    assert (found, reserved) == (width, 0)
    assert torch.equal(profile.unpack(0, [payload], [5]), torch.from_numpy(symbols))


def test_payload_bytes_are_as_the_format_says(profile, artifact):
    symbols = symbols_of(profile, artifact, 3)
    (payload,) = profile.pack(1, symbols, [3])
    words, lengths = rans.encode_lanes(symbols.numpy(), profile.groups[1].classes, profile.tables)
    least, spread = int(lengths.min()), lengths - lengths.min()
    width = 1 if spread.max() else 0
    head = struct.pack("<HBB", least, width, 0) + (bytes(spread.astype(np.uint8)) + b"\0" if width else b"")
    assert payload == head + words.astype("<u2").tobytes()


def test_payloads_that_lie(profile, artifact):
    symbols = symbols_of(profile, artifact, 4)
    (payload,) = profile.pack(1, symbols, [4])
    least, width, _ = struct.unpack_from("<HBB", payload)
    body = payload[4:]
    for forged, told in [
        (b"", "0 bytes cannot hold"),
        (payload[:3], "3 bytes cannot hold"),
        (payload[:-1], "do not fit"),
        (payload[:-2], "words"),
        (payload + b"\0\0", "words"),
        (struct.pack("<HBB", least + 1, width, 0) + body, "words"),
        (struct.pack("<HBB", 0xFFFF, width, 0) + body, "words"),
        (struct.pack("<HBB", 1, width, 0) + body, "words"),
        (struct.pack("<HBB", least, 3, 0) + body, "width 3"),
        (struct.pack("<HBB", least, 255, 0) + body, "width 255"),
        (struct.pack("<HBB", least, width, 1) + body, "do not fit"),
        (struct.pack("<HBB", 2, 2, 0) + b"\0\0", "do not fit"),
    ]:
        with pytest.raises(RecordFormatError, match=told):
            profile.unpack(1, [forged], [4])
    with pytest.raises(RecordFormatError, match="without coded tokens"):
        profile.unpack(1, [payload], [0])
    with pytest.raises((RecordFormatError, RecordCorruptError)):
        profile.unpack(1, [payload], [3])
    with pytest.raises(RecordCorruptError):
        profile.unpack(0, [payload], [4])


def test_a_lane_too_long_for_a_record_is_refused():
    artifact = make_artifact(KVShape(1, 1, 8, "float32"), components=4)[2]
    profile = KvtcProfile(artifact, 0)
    classes = np.zeros(40_000, np.uint8)
    object.__setattr__(profile.groups[0], "classes", classes)
    generator = np.random.default_rng(fresh_seed())
    wild = torch.from_numpy(generator.integers(20_000, 32768, (1, len(classes))).astype(np.int16))
    with pytest.raises(ConfigError, match="use more layer groups"):
        profile.pack(0, wild, [1])


def test_no_live_components_decode_to_the_mean():
    artifact = make_artifact(KVShape(2, 1, 8, "float32"), points=(("all", 1e3),), components=6)[2]
    profile = KvtcProfile(artifact, 0)
    assert len(profile.groups[0].classes) == 0
    symbols = torch.empty(3, 0, dtype=torch.int16)
    (payload,) = profile.pack(0, symbols, [3])
    k, v = profile.dequantise(0, profile.unpack(0, [payload], [3]))
    mean = artifact.tensor("group0.mean", torch.float32, -1)
    assert torch.equal(join_rows(k, v), mean.expand(3, -1))


def test_tensors_of_an_unusable_kind_are_named(artifact):
    tensors = dict(artifact._tensors)
    for name, value, told in [
        ("rank0.group0.weight", torch.zeros(64), "layer group 0: weights must be positive"),
        ("rank0.group1.mean", torch.full((128,), float("nan")), "layer group 1"),
        ("rank0.group1.basis", torch.zeros(128, 3, dtype=torch.int16), "components over 3"),
        ("rank0.point0.shift", torch.full((8,), 13, dtype=torch.uint8), "operating point 0: shift"),
        ("rank0.point0.rounding", torch.full((8,), 2**20, dtype=torch.int32), "operating point 0: roundings"),
        ("rank0.point0.centroid", torch.full((8,), float("nan")), "operating point 0: roundings"),
        ("rank0.group1.mean", torch.zeros(127), r"\(127,\)"),
    ]:
        with pytest.raises(ArtifactFormatError, match=told):
            KvtcProfile(Artifact(artifact.manifest, {**tensors, name: value}), 0)
    del tensors["rank0.group1.basis"]
    with pytest.raises(ArtifactFormatError, match=r"has no tensor 'rank0\.group1\.basis'"):
        KvtcProfile(Artifact(artifact.manifest, tensors), 0)
