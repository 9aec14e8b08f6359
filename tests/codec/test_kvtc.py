"""Profile kvtc: symbols, levels, errors, and an artifact whose numbers cannot be right."""

from __future__ import annotations

import math
from fractions import Fraction

import msgspec
import numpy as np
import pytest
import torch

from dynamo_kvtc.codec.artifact import Artifact
from dynamo_kvtc.codec.channels import from_rows, join_rows, split_rows, to_rows
from dynamo_kvtc.codec.kvtc import KvtcProfile
from dynamo_kvtc.codec.kvtc_point import level_bias
from dynamo_kvtc.errors import ArtifactFormatError
from dynamo_kvtc.ops import quantize
from dynamo_kvtc.types import KVShape
from tests.builders import CLASSES, LEADING, ROUNDING, case_seed, make_artifact, random_kv, same_bits

# At the rough step most inputs are narrow, a few wide; at the others nearly all are wide.
POINTS = (("fine", 0.1), ("coarse", 0.25), ("rough", 2.0))


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    """Of 384 and 768 channels: rounding errors can be kept orthogonal to the components there are."""
    shape = KVShape(3, 3, 64, "float32")
    return make_artifact(shape, groups=((0, 1), (1, 3)), components=64, points=POINTS, seed=case_seed())[2]


@pytest.fixture(scope="module")
def profile(artifact) -> KvtcProfile:
    return KvtcProfile(artifact, 0)


def kv(artifact: Artifact, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return random_kv(artifact, tokens, case_seed(), torch.zeros(tokens, dtype=torch.int64))


def with_tensors(artifact: Artifact, **changes: torch.Tensor) -> Artifact:
    """Names with "__" for each "."."""
    named = {f"rank0.{name.replace('__', '.')}": value for name, value in changes.items()}
    assert set(named) <= set(artifact._tensors)
    return Artifact(artifact.manifest, {**artifact._tensors, **named})


def test_channel_order_is_k_then_v_layer_head_dim():
    k = torch.arange(2 * 3 * 5 * 4).reshape(2, 3, 5, 4)
    rows = to_rows(k)
    assert rows[2].tolist() == k[:, :, 2, :].reshape(-1).tolist()
    assert torch.equal(from_rows(rows, 2, 3, 4), k)
    joined = join_rows(k, k + 1000)
    assert joined.shape == (5, 48)
    assert torch.equal(joined[:, 24:], rows + 1000)
    assert all(torch.equal(a, b) for a, b in zip(split_rows(joined, 2, 3, 4), (k, k + 1000), strict=True))


@pytest.mark.parametrize(("point", "step"), [(0, 0.1), (1, 0.25), (2, 2.0)])
def test_symbols_are_whitened_coefficients_in_the_tokens_own_steps(artifact, point, step):
    """Against float64 linear algebra with the 16-bit basis: no symbol is off by more than one, hardly any by one."""
    profile = KvtcProfile(artifact, point)
    k, v = kv(artifact, 200)
    symbols, error = profile.quantise(1, k[1:], v[1:])
    rows = join_rows(k[1:], v[1:]).double()
    mean, weight, basis = (
        artifact.tensor(f"group1.{name}", dtype, *[-1] * dims).double()
        for name, dtype, dims in (("mean", torch.float32, 1), ("weight", torch.float32, 1), ("wide", torch.int16, 2))
    )
    exact = ((rows - mean) * weight / step) @ (basis[:, : symbols.shape[1] - 1] / 2**14)
    fineness = symbols[:, 0] % 16
    assert len(fineness.unique()) > 5, "the case is meant to have many"
    exact[:, LEADING:] *= 2 ** ((fineness.double() - 4) / 4)[:, None]
    plain = torch.sign(exact) * torch.minimum((exact.abs() + ROUNDING).floor(), profile.groups[1].limits)
    difference = (plain - symbols[:, 1:].double()).abs()
    # A gain is rounded to 8 bits and an input to 1/32 of a common step, an eighth of the finest.
    assert (difference <= 1 + 0.003 * exact.abs()).all()
    assert (difference[fineness <= 4] > 0).double().mean() < 0.08
    assert error.isfinite().all()
    assert 0.5 < float(error.mean()) < 2


@pytest.mark.parametrize("point", [0, 1, 2])
def test_symbols_are_what_the_format_says_in_plain_integers(artifact, point):
    """FORMAT.md's formulas with Python's integers, input to symbol."""
    profile, step, g = KvtcProfile(artifact, point), POINTS[point][1], 0
    k, v = kv(artifact, 6)
    tensor = {name.removeprefix(f"rank0.group{g}."): t for name, t in artifact._tensors.items()}
    own = {name.removeprefix(f"rank0.point{point}."): t for name, t in artifact._tensors.items()}
    gain = (tensor["weight"].double() * (32 / step)).float()
    fixed = ((join_rows(k[:1], v[:1]) - tensor["mean"]) * gain).round().long().tolist()
    wide_input = (tensor["reach"].double() * (32 / step) > 127).tolist()
    classes, width = tensor[f"point{point}.classes"].tolist(), int(tensor[f"point{point}.wide"])
    exponent, scales = int(tensor["exponent"]), tensor["scale"].tolist()
    symbols = profile.quantise(g, k[:1], v[:1])[0].tolist()
    for row, (lane, *found) in zip(fixed, symbols, strict=True):
        clipped = [f if wide else max(-127, min(127, f)) for f, wide in zip(row, wide_input, strict=True)]
        for j, q in enumerate(found):
            column = tensor["wide" if j < width else "narrow"][:, j].tolist()
            c = sum(a * b for a, b in zip(clipped, column, strict=True))
            unit = 2**11 if j < width else scales[j] * 2 ** (25 - exponent)
            g_times_256 = 256 if j < LEADING else round(2 ** ((lane % 16 - 4) / 4) * 256)
            rounding = int(own["rounding"][classes[j]])
            wanted = (abs(c) * unit * g_times_256 + rounding * 2**18) >> 38
            if j >= width:
                bias = min(
                    round(float(own["centroid"][classes[j]]) * scales[j]),
                    math.floor((rounding / 2**20 - 0.2) * scales[j]),
                )
                wanted = min(wanted, (127 + max(bias, 0)) // scales[j])
            assert q == (wanted if c > 0 else -wanted), (j, c)
    assert len(classes) > width, "the case is meant to have narrow components"


@pytest.mark.parametrize("point", [0, 1, 2])
def test_lane_bytes_follow_from_the_symbols_as_the_format_says(artifact, point):
    """Fineness and table choice in plain integers."""
    profile = KvtcProfile(artifact, point)
    k, v = kv(artifact, 300)
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


@pytest.mark.parametrize("point", [0, 1, 2])
def test_symbols_come_back_from_what_they_decode_to(artifact, point):
    """Lane bytes included, whatever the fineness: a block that was decoded costs no more when it is coded again.

    At the finest step tokens of the highest fineness are left out: with leading components of a thousand own steps, the
    little that 24 of 384 directions leak into the narrow ones can reach a fifth of a step.
    """
    profile = KvtcProfile(artifact, point)
    k, v = kv(artifact, 300)
    for g, (start, end) in enumerate(artifact.manifest.groups):
        symbols, _ = profile.quantise(g, k[start:end], v[start:end])
        again, _ = profile.quantise(g, *profile.dequantise(g, symbols))
        sure = symbols[:, 0] % 16 <= (8 if point == 0 else 12)
        assert torch.equal(again[sure], symbols[sure])
        assert sure.double().mean() > 0.5


@pytest.mark.parametrize("fineness", [4, 12])
def test_a_narrow_component_beyond_its_limit_is_clipped_counted_and_comes_back(artifact, fineness):
    none, bias = torch.zeros(2, LEADING, dtype=torch.int32), torch.tensor([fineness << 16], dtype=torch.int32)
    profile = KvtcProfile(with_tensors(artifact, group0__point1__importance=none, group0__point1__bias=bias), 1)
    g = profile.groups[0]
    width = g.wide.shape[1]
    basis = g.wide.double() / 2**14, g.narrow.double() * g.scale / 2**g.exponent
    limit = g.limits[width:].double()
    # One token per narrow component, three quarters beyond its limit, all else next to nothing.
    y = torch.diag(1.75 * limit)
    rows = (y @ basis[1].T * g.synthesis_gain.double() + g.mean.double()).float()
    k, v = split_rows(rows, 1, 3, 64)
    symbols, error = profile.quantise(0, k, v)
    assert (symbols[:, 0] % 16 == fineness).all()
    gain = 2.0 ** ((fineness - 4) / 4)
    assert torch.equal(symbols[:, 1 + width :].double().diagonal(), limit)
    back = profile.dequantise(0, symbols)
    lost = ((join_rows(*back).double() - rows.double()) / g.synthesis_gain.double()).square().sum(dim=1) * gain**2
    torch.testing.assert_close(error * g.mean_error, lost, rtol=0.02, atol=0.5)
    assert (error * g.mean_error > (0.7 * limit * gain) ** 2).all()
    again, _ = profile.quantise(0, *back)
    assert torch.equal(again, symbols)


def test_an_input_beyond_its_reach_is_clipped_and_counted(artifact):
    """A channel that calibration saw within 127 units, at 400: the token's error grows by no less than was cut off."""
    reach = artifact.tensor("group0.reach", torch.float32, 384)
    profile = KvtcProfile(with_tensors(artifact, group0__reach=torch.zeros_like(reach)), 2)
    g = profile.groups[0]
    assert len(g.wide_inputs) == 0
    rows = g.mean.expand(3, -1).clone()
    rows[1, 7] += 100 / g.analysis_gain[7]
    rows[2, 7] += 400 / g.analysis_gain[7]
    symbols, error = profile.quantise(0, *split_rows(rows, 1, 3, 64))
    lost = error * g.mean_error / quantize.gains(symbols[:, 0] % 16, torch.float64) ** 2
    assert lost[0] < 1
    assert lost[2] >= (273 / 32) ** 2
    assert error.isfinite().all()
    seen = KvtcProfile(with_tensors(artifact, group0__reach=torch.full_like(reach, 1e9)), 2)
    assert torch.equal(seen.groups[0].wide_inputs, torch.arange(384))
    assert torch.equal(seen.quantise(0, *split_rows(rows[:2], 1, 3, 64))[0], symbols[:2])


def test_a_token_of_more_energy_than_fits_is_not_coded(artifact):
    """Up to the limit coefficients fit 32 bits; beyond it, nothing of the token may be taken for sound."""
    profile = KvtcProfile(artifact, 0)
    g = profile.groups[0]
    below = math.isqrt(quantize.ENERGY_MAX // 384)
    fixed = torch.tensor([below, below + 1, 32639, -32639], dtype=torch.float64)[:, None].expand(-1, 384)
    rows = (fixed / g.analysis_gain.double()).float()
    profile = KvtcProfile(with_tensors(artifact, group0__mean=torch.zeros(384)), 0)
    symbols, error = profile.quantise(0, *split_rows(rows, 1, 3, 64))
    assert error.isfinite().tolist() == [True, False, False, False]
    assert error[0] > 0
    alone = profile.quantise(0, *split_rows(rows[:1].clone(), 1, 3, 64))
    assert torch.equal(alone[0], symbols[:1])


def test_a_token_is_quantised_alone_to_the_same_bits(artifact):
    """Its error too, to the last bit, or a token next to the bound would be exact in one batch and coded in another."""
    k, v = kv(artifact, 130)
    for point in (0, 2):
        profile = KvtcProfile(artifact, point)
        symbols, error = profile.quantise(1, k[1:], v[1:])
        for size in (1, 2, 7, 64):
            parts = [profile.quantise(1, k[1:, :, i : i + size], v[1:, :, i : i + size]) for i in range(0, 130, size)]
            assert torch.equal(torch.cat([s for s, _ in parts]), symbols)
            assert torch.equal(torch.cat([e for _, e in parts]), error)
            rows = [join_rows(*profile.dequantise(1, s)) for s, _ in parts]
            assert same_bits(torch.cat(rows), join_rows(*profile.dequantise(1, symbols)))


def test_error_is_the_squared_error_in_units_of_the_calibrated_mean(artifact):
    """At a coarse step: the 16-bit basis is orthonormal to about 1e-5, so of a token's energy that much is unsure."""
    profile = KvtcProfile(artifact, 1)
    k, v = kv(artifact, 40)
    symbols, error = profile.quantise(0, k[:1], v[:1])
    k_back, v_back = profile.dequantise(0, symbols)
    mean, weight = (artifact.tensor(f"group0.{name}", torch.float32, -1).double() for name in ("mean", "weight"))
    rows, back = (join_rows(*x).double() for x in ((k[:1], v[:1]), (k_back, v_back)))
    gain = 2 ** ((symbols[:, 0] % 16).double() - 4).div(2)
    lost = ((rows - back) * weight / 0.25).square().sum(dim=1) * gain
    energy = ((rows - mean) * weight / 0.25).square().sum(dim=1) * gain
    calibrated = float(artifact.tensor("group0.point1.error", torch.float32, 1))
    assert ((error * calibrated - lost).abs() <= 0.1 * lost + 1e-4 * energy + 0.5 * gain).all()


def test_decoding_is_what_the_format_says(artifact):
    """In float64 with the document's formulas, at the step where inputs, components and levels are of both kinds."""
    profile, g = KvtcProfile(artifact, 2), 0
    k, v = kv(artifact, 50)
    symbols, _ = profile.quantise(g, k[:1], v[:1])
    tensor = {name.removeprefix(f"rank0.group{g}."): t for name, t in artifact._tensors.items()}
    own = {name.removeprefix("rank0.point2."): t for name, t in artifact._tensors.items()}
    classes, width = tensor["point2.classes"].long(), int(tensor["point2.wide"])
    q = symbols[:, 1:].double()
    gain = quantize.gains(symbols[:, 0] % 16, torch.float64)[:, None]
    rank, scale = q.shape[1], tensor["scale"].double()
    centroid, rounding = own["centroid"].double()[classes], own["rounding"].double()[classes] / 2**20
    level = torch.sign(q) * (q.abs() - centroid)
    level[:, LEADING:] /= gain
    rows = level[:, :width] @ tensor["wide"][:, :width].double().T / 2**14
    bias = torch.minimum((centroid * scale[:rank]).round(), ((rounding - 0.2) * scale[:rank]).floor()).clamp(min=0)
    a = torch.sign(q) * (q.abs() * scale[:rank] - bias).clamp(0, 127)
    rows += a[:, width:] @ tensor["narrow"][:, width:rank].double().T / 2 ** int(tensor["exponent"]) / gain
    rows = rows * 2.0 / tensor["weight"].double() + tensor["mean"].double()
    torch.testing.assert_close(join_rows(*profile.dequantise(g, symbols)).double(), rows, rtol=1e-5, atol=1e-5)


def test_a_narrow_level_stays_a_fifth_of_a_step_inside_its_bin():
    generator = np.random.default_rng(case_seed())
    scale = torch.arange(1, 256, dtype=torch.int32).repeat(20)
    rounding = torch.from_numpy(generator.integers(0, int(0.8 * 2**20), len(scale))).int()
    centroid = torch.from_numpy(generator.uniform(-1, 1, len(scale))).float()
    bias = level_bias(scale, rounding, centroid)
    assert bias.dtype == torch.int32
    below = bias.double() / scale
    assert (bias >= 0).all()
    assert (bias < scale).all()
    # A bias of 0 is inside whatever the rounding: a bin reaches from its number - rounding to + 1 - rounding.
    assert ((bias == 0) | (below <= rounding / 2**20 - 0.2 + 1e-9)).all()
    assert ((bias == 0) | ((below - centroid).abs() <= 0.5 / scale) | (below < centroid)).all()


@pytest.mark.parametrize("lanes", [1, 8])
def test_no_live_components_decode_to_the_mean(lanes):
    artifact = make_artifact(KVShape(2, 1, 8, "float32"), points=(("all", 1e3),), components=6, lanes=lanes)[2]
    profile = KvtcProfile(artifact, 0)
    assert len(profile.groups[0].classes) == 0
    symbols, _ = profile.quantise(0, torch.zeros(2, 1, 3, 8), torch.zeros(2, 1, 3, 8))
    assert symbols.shape == (3, 1)
    (payload,) = profile.pack(0, symbols, [3])
    k, v = profile.dequantise(0, profile.unpack(0, [payload], [3]))
    mean = artifact.tensor("group0.mean", torch.float32, -1)
    assert torch.equal(join_rows(k, v), mean.expand(3, -1))


def test_a_point_without_narrow_or_without_wide_components():
    """No importance and no wide component: fineness is the bias. All wide: the narrow basis is idle."""
    made = make_artifact(KVShape(1, 3, 64, "float32"), components=12, points=(("rough", 2.0),), seed=case_seed())[2]
    k, v = kv(made, 40)
    rank = made.tensor("group0.point0.classes", torch.uint8, -1).shape[0]
    none = torch.zeros(2, 0, dtype=torch.int32)
    for wide, importance in ((0, none), (rank, made.tensor("group0.point0.importance", torch.int32, 2, -1))):
        width = torch.tensor([wide], dtype=torch.int32)
        profile = KvtcProfile(with_tensors(made, group0__point0__wide=width, group0__point0__importance=importance), 0)
        symbols, error = profile.quantise(0, k, v)
        payloads = profile.pack(0, symbols, [40])
        assert torch.equal(profile.unpack(0, payloads, [40]), symbols)
        again, _ = profile.quantise(0, *profile.dequantise(0, symbols))
        sure = (again == symbols).all(dim=1)
        assert sure.all()
        assert error.isfinite().all()


def test_tensors_of_an_unusable_kind_are_named(artifact):
    tensors = dict(artifact._tensors)
    rank = len(tensors["rank0.group0.point0.classes"])
    one = torch.ones(1, dtype=torch.int32)
    for name, value, told in [
        ("rank0.group0.weight", torch.zeros(384), "layer group 0: weights must be positive"),
        ("rank0.group1.mean", torch.full((768,), float("nan")), "layer group 1"),
        ("rank0.group1.reach", torch.full((768,), float("nan")), "layer group 1"),
        ("rank0.group1.reach", torch.full((768,), -1.0), "layer group 1"),
        ("rank0.group1.wide", torch.zeros(768, 3, dtype=torch.int16), "layer group 1: 6 leading .* 3 stored wide"),
        ("rank0.group1.wide", torch.full((768, 64), 32767, dtype=torch.int16), "the basis is too large"),
        ("rank0.group1.narrow", torch.zeros(768, 64), "float32"),
        ("rank0.group1.narrow", torch.zeros(768, 3, dtype=torch.int8), r"\(64,\)"),
        ("rank0.group1.scale", torch.zeros(64, dtype=torch.uint8), "scale is out of range"),
        ("rank0.group1.exponent", 26 * one, "exponent 26"),
        ("rank0.group1.exponent", -one, "exponent -1"),
        ("rank0.group1.exponent", 0 * one, "the basis is too large"),
        ("rank0.group0.point0.wide", 5 * one, "6 leading and 5 wide components"),
        ("rank0.group0.point0.wide", (rank + 1) * one, f"{rank + 1} wide components of {rank}"),
        ("rank0.group0.point0.wide", -one, "-1 wide"),
        ("rank0.group0.point0.wide", 47 * one, f"47 wide components of {rank}; allowed are multiples of 16"),
        ("rank0.point0.shift", torch.full((CLASSES,), 13, dtype=torch.uint8), "operating point 0: shift"),
        ("rank0.point0.rounding", torch.full((CLASSES,), 2**20, dtype=torch.int32), "operating point 0: roundings"),
        ("rank0.point0.centroid", torch.full((CLASSES,), float("nan")), "operating point 0: roundings"),
        ("rank0.point0.activity", torch.full((CLASSES,), -1, dtype=torch.int32), "operating point 0: activity"),
        ("rank0.group0.point0.importance", torch.zeros(2, 65, dtype=torch.int32), "layer group 0: 65 leading"),
        ("rank0.group1.point0.thresholds", torch.arange(15).flip(0), "layer group 1: thresholds"),
        ("rank0.group1.point0.thresholds", torch.arange(16), r"\(16,\)"),
        ("rank0.group1.mean", torch.zeros(127), r"\(127,\)"),
    ]:
        with pytest.raises(ArtifactFormatError, match=told):
            KvtcProfile(Artifact(artifact.manifest, {**tensors, name: value}), 0)
    for name in ("wide", "narrow", "scale", "exponent", "reach", "point0.wide"):
        missing = {key: value for key, value in tensors.items() if key != f"rank0.group1.{name}"}
        with pytest.raises(ArtifactFormatError, match=rf"has no tensor 'rank0\.group1\.{name}'"):
            KvtcProfile(Artifact(artifact.manifest, missing), 0)


@pytest.mark.parametrize("lanes", [0, 3, 16, -1])
def test_a_number_of_lanes_that_there_cannot_be(artifact, lanes):
    points = tuple(msgspec.structs.replace(point, lanes=lanes) for point in artifact.manifest.points)
    manifest = msgspec.structs.replace(artifact.manifest, points=points)
    with pytest.raises(ArtifactFormatError, match=rf"operating point 0: {lanes} lanes a token"):
        KvtcProfile(Artifact(manifest, artifact._tensors), 0)
