"""Profile kvtc: symbols, lane lengths, and an artifact whose numbers cannot be right."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

from dynamo_kvtc.codec.artifact import Artifact
from dynamo_kvtc.codec.channels import from_rows, join_rows, split_rows, to_rows
from dynamo_kvtc.codec.kvtc import KvtcProfile, _exact_sum
from dynamo_kvtc.errors import ArtifactFormatError, ConfigError, RecordCorruptError, RecordFormatError
from dynamo_kvtc.ops import rans
from dynamo_kvtc.types import KVShape
from tests.builders import CLASSES, LEADING, ROUNDING, fresh_seed, make_artifact, random_kv


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


def test_symbols_are_whitened_coefficients_in_the_tokens_own_steps(profile, artifact):
    """Against float64 linear algebra: no symbol is off by more than one, hardly any by one."""
    k, v = random_kv(artifact, 200, fresh_seed(), torch.zeros(200, dtype=torch.int64))
    symbols, error = profile.quantise(1, k[1:], v[1:])
    rows = join_rows(k[1:], v[1:]).double()
    mean, weight, basis = (
        artifact.tensor(f"group1.{name}", dtype, *[-1] * dims).double()
        for name, dtype, dims in (("mean", torch.float32, 1), ("weight", torch.float32, 1), ("basis", torch.int16, 2))
    )
    exact = ((rows - mean) * weight / 0.02) @ (basis[:, : symbols.shape[1] - 1] / 2**15)
    fineness = symbols[:, 0] % 16
    assert len(fineness.unique()) > 5, "the case is meant to have many"
    exact[:, LEADING:] *= 2 ** ((fineness.double() - 4) / 4)[:, None]
    plain = torch.sign(exact) * (exact.abs() + ROUNDING).floor()
    difference = (plain - symbols[:, 1:].double()).abs()
    # A gain is rounded to 8 bits and an input to 1/32 of a common step, an eighth of the finest.
    assert (difference <= 1 + 0.003 * exact.abs()).all()
    assert (difference[fineness <= 4] > 0).double().mean() < 0.08
    assert error.isfinite().all()
    assert 0.3 < float(error.mean()) < 3


@pytest.mark.parametrize("point", [0, 1])
def test_lane_bytes_follow_from_the_symbols_as_the_format_says(artifact, point):
    """Fineness and table choice in plain integers."""
    profile = KvtcProfile(artifact, point)
    k, v = random_kv(artifact, 300, fresh_seed(), torch.zeros(300, dtype=torch.int64))
    lanes = []
    for g, (start, end) in enumerate(artifact.manifest.groups):
        tensor = {name.removeprefix(f"rank0.group{g}.point{point}."): t for name, t in artifact._tensors.items()}
        (plain, signed), bias = tensor["importance"].tolist(), int(tensor["bias"])
        activity = artifact._tensors[f"rank0.point{point}.activity"].tolist()
        weights = [activity[c] for c in tensor["classes"].tolist()]
        leading = len(plain)
        assert leading == LEADING
        for lane, *q in profile.quantise(g, k[start:end], v[start:end])[0].tolist():
            clipped = [max(-1023, min(1023, x)) for x in q]
            score = bias + sum(a * abs(x) + b * x for a, b, x in zip(plain, signed, clipped[:leading], strict=True))
            fineness = min(12, max(0, math.floor(Fraction(score, 2**16) + Fraction(1, 2))))
            total = sum(w * abs(x) for w, x in zip(weights[leading:], clipped[leading:], strict=True))
            choice = sum(total >= t for t in tensor["thresholds"].tolist())
            assert lane == fineness + 16 * choice
            lanes.append(lane)
    assert len({lane % 16 for lane in lanes}) == 13
    assert len({lane // 16 for lane in lanes}) >= 5


@pytest.mark.parametrize("point", [0, 1])
def test_symbols_come_back_from_what_they_decode_to(artifact, point):
    """Lane bytes included, whatever the fineness: a block that was decoded costs no more when it is coded again."""
    profile = KvtcProfile(artifact, point)
    k, v = random_kv(artifact, 300, fresh_seed(), torch.zeros(300, dtype=torch.int64))
    for g, (start, end) in enumerate(artifact.manifest.groups):
        symbols, _ = profile.quantise(g, k[start:end], v[start:end])
        again, _ = profile.quantise(g, *profile.dequantise(g, symbols))
        assert torch.equal(again, symbols)


def test_a_token_is_quantised_alone_to_the_same_bits(artifact):
    """Its error too, to the last bit, or a token next to the bound would be exact in one batch and coded in another."""
    profile = KvtcProfile(artifact, 1)
    k, v = random_kv(artifact, 130, fresh_seed(), torch.zeros(130, dtype=torch.int64))
    symbols, error = profile.quantise(1, k[1:], v[1:])
    for size in (1, 2, 7, 64):
        parts = [profile.quantise(1, k[1:, :, i : i + size], v[1:, :, i : i + size]) for i in range(0, 130, size)]
        assert torch.equal(torch.cat([s for s, _ in parts]), symbols)
        assert torch.equal(torch.cat([e for _, e in parts]), error)


def test_the_error_is_summed_exactly():
    """Any order of the components gives the same bits."""
    generator = np.random.default_rng(fresh_seed())
    terms = torch.from_numpy(generator.exponential(1.0, (40, 3000)) * 2.0 ** generator.uniform(-14, 26, (40, 3000)))
    total = _exact_sum(terms)
    for _ in range(20):
        assert torch.equal(_exact_sum(terms[:, torch.from_numpy(generator.permutation(3000))]), total)
    wanted = [math.fsum(row) for row in terms.tolist()]
    torch.testing.assert_close(total, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=3000 * 2.0**-13)


def test_error_is_the_squared_error_in_units_of_the_calibrated_mean(artifact):
    """At a coarse step: the 16-bit basis is orthonormal to about 1e-5, so of a token's energy that much is unsure."""
    profile = KvtcProfile(artifact, 1)
    k, v = random_kv(artifact, 40, fresh_seed(), torch.zeros(40, dtype=torch.int64))
    symbols, error = profile.quantise(0, k[:1], v[:1])
    k_back, v_back = profile.dequantise(0, symbols)
    mean, weight = (artifact.tensor(f"group0.{name}", torch.float32, -1).double() for name in ("mean", "weight"))
    rows, back = (join_rows(*x).double() for x in ((k[:1], v[:1]), (k_back, v_back)))
    gain = 2 ** ((symbols[:, 0] % 16).double() - 4).div(2)
    lost = ((rows - back) * weight / 0.25).square().sum(dim=1) * gain
    energy = ((rows - mean) * weight / 0.25).square().sum(dim=1) * gain
    calibrated = float(artifact.tensor("group0.point1.error", torch.float32, 1))
    assert ((error * calibrated - lost).abs() <= 0.1 * lost + 1e-4 * energy + 0.5 * gain).all()


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
    symbols = np.zeros((5, 1 + rank), np.int16)
    symbols[:, 0] = 4 + 16 * 8
    if width:
        symbols[1, 1:] = generator.integers(-32768, 32768, rank)
        symbols[3, 1:] = generator.integers(-32768, 32768, rank)
    (payload,) = profile.pack(0, torch.from_numpy(symbols), [5])
    _, found, reserved = struct.unpack_from("<HBB", payload)
    assert (found, reserved) == (width, 0)
    assert torch.equal(profile.unpack(0, [payload], [5]), torch.from_numpy(symbols))


def test_payload_bytes_are_as_the_format_says(profile, artifact):
    symbols = symbols_of(profile, artifact, 3)
    (payload,) = profile.pack(1, symbols, [3])
    lanes = symbols[:, 0].tolist()
    offsets = np.array([2 * (lane // 16 - 8) for lane in lanes], np.int8)
    words, lengths = rans.encode_lanes(
        np.ascontiguousarray(symbols[:, 1:].numpy()), profile.groups[1].classes, profile.tables, offsets, LEADING
    )
    least, spread = int(lengths.min()), lengths - lengths.min()
    width = 1 if spread.max() else 0
    head = struct.pack("<HBB", least, width, 0) + (bytes(spread.astype(np.uint8)) if width else b"")
    assert payload == head + bytes(lanes) + b"\0" * (3 * (width + 1) % 2) + words.astype("<u2").tobytes()


@pytest.mark.parametrize("lane", [13, 14, 15, 16 * 15 + 13, 255])
def test_a_fineness_that_is_not_there_is_refused(profile, artifact, lane):
    symbols = symbols_of(profile, artifact, 4)
    (payload,) = profile.pack(1, symbols, [4])
    at = 4 + 4 * payload[2]
    for token in range(4):
        forged = bytearray(payload)
        forged[at + token] = lane
        with pytest.raises(RecordFormatError, match="fineness is over 12"):
            profile.unpack(1, [bytes(forged)], [4])
    forged[at + 3] = 12 + 16 * (payload[at + 3] // 16)
    assert int(profile.unpack(1, [bytes(forged)], [4])[3, 0]) == forged[at + 3]


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
    wild = torch.from_numpy(generator.integers(20_000, 32768, (1, 1 + len(classes))).astype(np.int16))
    wild[0, 0] = 4 + 16 * 8
    with pytest.raises(ConfigError, match="use more layer groups"):
        profile.pack(0, wild, [1])


def test_no_live_components_decode_to_the_mean():
    artifact = make_artifact(KVShape(2, 1, 8, "float32"), points=(("all", 1e3),), components=6)[2]
    profile = KvtcProfile(artifact, 0)
    assert len(profile.groups[0].classes) == 0
    symbols, _ = profile.quantise(0, torch.zeros(2, 1, 3, 8), torch.zeros(2, 1, 3, 8))
    assert symbols.shape == (3, 1)
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
        ("rank0.point0.shift", torch.full((CLASSES,), 13, dtype=torch.uint8), "operating point 0: shift"),
        ("rank0.point0.rounding", torch.full((CLASSES,), 2**20, dtype=torch.int32), "operating point 0: roundings"),
        ("rank0.point0.centroid", torch.full((CLASSES,), float("nan")), "operating point 0: roundings"),
        ("rank0.point0.activity", torch.full((CLASSES,), -1, dtype=torch.int32), "operating point 0: activity"),
        ("rank0.group0.point0.importance", torch.zeros(2, 25, dtype=torch.int32), "layer group 0: 25 leading"),
        ("rank0.group1.point0.thresholds", torch.arange(15).flip(0), "layer group 1: thresholds"),
        ("rank0.group1.point0.thresholds", torch.arange(16), r"\(16,\)"),
        ("rank0.group1.mean", torch.zeros(127), r"\(127,\)"),
    ]:
        with pytest.raises(ArtifactFormatError, match=told):
            KvtcProfile(Artifact(artifact.manifest, {**tensors, name: value}), 0)
    del tensors["rank0.group1.basis"]
    with pytest.raises(ArtifactFormatError, match=r"has no tensor 'rank0\.group1\.basis'"):
        KvtcProfile(Artifact(artifact.manifest, tensors), 0)
