"""Calibration end to end on a tiny random Llama."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dynamo_kvtc.calibrate.collect import SINKS, parts_of, split_layers
from dynamo_kvtc.calibrate.importance import LEADING, component_order
from dynamo_kvtc.calibrate.run import CalibrationConfig, CalibrationTexts, calibrate
from dynamo_kvtc.calibrate.texts import kl_measure
from dynamo_kvtc.codec.artifact import Artifact, load_artifact, save_artifact
from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.codec.policy import ExactPolicy
from dynamo_kvtc.errors import CalibrationError, ConfigError, UnreachableTargetError
from dynamo_kvtc.types import KVShape
from tests.builders import case_seed

NO_LIMIT = ExactPolicy(sinks=0, max_error=float("inf"))


def quiet(phase: str, fraction: float) -> None:
    assert 0 <= fraction <= 1, phase


def texts_of(seed: int, fit: int = 14, held_out: int = 6, length: int = 200) -> CalibrationTexts:
    """Byte sequences with some structure: words out of a small random vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 250, (30, 5), generator=generator)
    drawn = torch.randint(0, 30, (fit + held_out, length // 5), generator=generator)
    sequences = list(words[drawn].reshape(fit + held_out, length))
    return CalibrationTexts(sequences[:fit], sequences[fit:], {"random": len(drawn) * length})


def config(**change: object) -> CalibrationConfig:
    plain = {"groups": 2, "ratios": (8.0, 14.0), "sample_tokens": 800}
    return CalibrationConfig(**{**plain, **change})  # type: ignore[arg-type]


def coded_ratio(artifact: Artifact, point: str, model: object, sequences: list[Tensor]) -> float:
    """Raw bytes over record bytes of the tokens after the sinks, all ranks together."""
    spent = raw = 0
    for ids in sequences:
        k, v = model.prefill(ids)  # type: ignore[attr-defined]
        raw += (len(ids) - SINKS) * artifact.manifest.shape.bytes_per_token
        for rank in range(artifact.manifest.tp_size):
            own = artifact.for_rank(rank)
            heads = slice(rank * own.shape.kv_heads, (rank + 1) * own.shape.kv_heads)
            blocks = BlockCodec(own, point, NO_LIMIT).encode_blocks(
                k[:, heads, SINKS:], v[:, heads, SINKS:], torch.arange(SINKS, len(ids))
            )
            assert sum(block.exact.total for block in blocks) == 0
            spent += sum(len(block.record) for block in blocks)
    return raw / spent


def test_kvtc_keeps_its_promise(tiny_llama, tmp_path):
    seed = case_seed()
    texts = texts_of(seed)
    manifest, tensors = calibrate(tiny_llama, texts, config(), quiet)
    save_artifact(tmp_path / "a.safetensors", manifest, tensors)
    artifact = load_artifact(tmp_path / "a.safetensors")
    assert artifact.digest == manifest.digest
    artifact.check_model(tiny_llama.identity, tiny_llama.shape, tiny_llama.rope)
    assert artifact.manifest.groups == split_layers(3, 2)
    assert [point.name for point in manifest.points] == ["8", "14"]
    assert manifest.points[0].step < manifest.points[1].step
    assert manifest.calibration["tokens"] == 14 * (200 - SINKS)
    losses = []
    for point, asked in zip(manifest.points, (8.0, 14.0), strict=True):
        assert point.expected_kl is None
        assert point.expected_ratio == pytest.approx(asked, rel=0.05)
        measured = coded_ratio(artifact, point.name, tiny_llama, texts.held_out)
        assert measured == pytest.approx(point.expected_ratio, rel=0.05)
        k, v = tiny_llama.prefill(texts.held_out[0])
        codec = BlockCodec(artifact, point.name)
        blocks = codec.encode_blocks(k, v, torch.arange(200))
        records = [block.record for block in blocks]
        k_back, v_back, _ = codec.decode_blocks(records)
        losses.append(float((k_back - k).norm() / k.norm() + (v_back - v).norm() / v.norm()))
        exact = torch.cat([torch.from_numpy(codec.parse(r).header.exact) for r in records])
        assert int(exact.sum()) <= 12
        again = codec.encode_blocks(k_back, v_back, torch.arange(200), exact)
        # FORMAT.md promises the same records of a model with more channels than these.
        assert sum(block.record == record for block, record in zip(again, records, strict=True)) >= 11
    assert losses[0] < losses[1] < 1.4


def test_importance_is_learnt_where_there_are_tokens_enough(tiny_llama):
    """Its weights reach the artifact, and tokens of several finenesses come of it."""
    texts = texts_of(case_seed(), fit=20)
    manifest, tensors = calibrate(tiny_llama, texts, config(ratios=(8.0,), groups=1), quiet)
    weights = tensors["rank0.group0.point0.importance"]
    (part,) = parts_of(tiny_llama.shape, split_layers(tiny_llama.shape.layers, 1), 1)
    assert weights.shape == (2, LEADING + component_order(part.channels)[1])
    assert weights[0, :LEADING].any()
    codec = BlockCodec(Artifact(manifest, tensors), "8", NO_LIMIT)
    k, v = tiny_llama.prefill(texts.held_out[0])
    (symbols,), _ = codec._quantise(k, v, torch.arange(200))
    assert len((symbols[SINKS:, 0] % 16).unique()) >= 3
    few, tensors = calibrate(tiny_llama, texts_of(case_seed(), fit=4), config(ratios=(8.0,), groups=1), quiet)
    assert tensors["rank0.group0.point0.importance"].shape == (2, 0)
    assert few.calibration["fisher_sequences"] == 4


def test_the_same_texts_and_seed_give_the_same_artifact(tiny_llama):
    texts = texts_of(case_seed(), fit=4, held_out=3)
    a, b, c = (calibrate(tiny_llama, texts, config(ratios=(8.0,), seed=s), quiet)[0] for s in (0, 0, 1))
    assert a.digest == b.digest != c.digest


def test_paper_spends_what_it_says(tiny_llama):
    texts = texts_of(case_seed(), fit=8, held_out=4)
    manifest, tensors = calibrate(tiny_llama, texts, config(profile="paper", groups=1, ratios=(4.0, 6.0)), quiet)
    assert [point.name for point in manifest.points] == ["4", "6"]
    artifact = Artifact(manifest, tensors)
    for i, (point, nominal) in enumerate(zip(manifest.points, (4.0, 6.0), strict=True)):
        codec = BlockCodec(artifact, point.name, NO_LIMIT)
        k, v = tiny_llama.prefill(texts.held_out[0])
        (symbols,), error = codec._quantise(k[:, :, SINKS:], v[:, :, SINKS:], torch.arange(SINKS, 200))
        # Nominal counts two bytes a channel; the model's cache has four.
        assert symbols.shape[1] <= 2 * 96 / nominal
        assert point.expected_ratio >= 8 * tiny_llama.shape.bytes_per_token / (8 * symbols.shape[1])
        assert point.expected_ratio == pytest.approx(2 * nominal, rel=0.2)
        assert 0.5 < float(error.mean()) < 2, i


@pytest.mark.parametrize("profile", ["kvtc", "paper"])
def test_ranks_have_their_own_coding(tiny_llama, profile):
    texts = texts_of(case_seed(), fit=6, held_out=3)
    change = {"profile": profile, "tp_size": 2, "groups": 1, "ratios": (5.0,)}
    manifest, tensors = calibrate(tiny_llama, texts, config(**change), quiet)
    assert {name.split(".")[0] for name in tensors} == {"rank0", "rank1"}
    artifact = Artifact(manifest, tensors)
    assert artifact.for_rank(1).shape == KVShape(3, 1, 8, "float32")
    if profile == "kvtc":
        measured = coded_ratio(artifact, "5", tiny_llama, texts.held_out)
        assert measured == pytest.approx(manifest.points[0].expected_ratio, rel=0.05)
    k, v = tiny_llama.prefill(texts.held_out[0])
    for rank in (0, 1):
        codec = BlockCodec(artifact.for_rank(rank), "5")
        own = slice(rank, rank + 1)
        records = [block.record for block in codec.encode_blocks(k[:, own], v[:, own], torch.arange(200))]
        back, _, _ = codec.decode_blocks(records)
        assert float((back - k[:, own]).norm() / k[:, own].norm()) < 0.5


def test_a_target_kl_is_solved_by_what_is_measured(tiny_llama):
    texts = texts_of(case_seed(), fit=6, held_out=4)
    asked: list[str] = []

    def measure(artifact: Artifact, point: str) -> float:
        asked.append(point)
        step = artifact.manifest.points[artifact.point_index(point)].step
        BlockCodec(artifact, point)
        return 0.004 * step**1.8

    settings = config(ratios=(8.0,), kls=(0.05,), groups=1)
    manifest, _ = calibrate(tiny_llama, texts, settings, quiet, measure)
    assert [point.name for point in manifest.points] == ["8", "kl=0.05"]
    for point, target in zip(manifest.points[1:], (0.05,), strict=True):
        assert point.expected_kl == pytest.approx(target, rel=0.031)
        assert point.expected_kl == pytest.approx(0.004 * point.step**1.8)
        assert point.expected_ratio > 1
    assert manifest.points[0].expected_kl == pytest.approx(0.004 * manifest.points[0].step ** 1.8)
    assert len(asked) <= 2 + 9


def test_expected_kl_of_the_model_itself(tiny_llama):
    texts = texts_of(case_seed(), fit=6, held_out=3)
    measure = kl_measure(tiny_llama, texts.held_out)
    manifest, tensors = calibrate(tiny_llama, texts, config(ratios=(6.0, 14.0), groups=1), quiet, measure)
    found = [point.expected_kl for point in manifest.points]
    assert found == [measure(Artifact(manifest, tensors), point.name) for point in manifest.points]
    assert 0 < found[0] < found[1]


def test_a_ratio_out_of_reach_is_refused_with_the_range(tiny_llama):
    texts = texts_of(case_seed(), fit=4, held_out=3)
    with pytest.raises(UnreachableTargetError, match=r"ratio 5000 cannot be reached .* reachable is about"):
        calibrate(tiny_llama, texts, config(ratios=(5000.0,)), quiet)


@pytest.mark.parametrize("profile", ["kvtc", "paper"])
def test_a_model_whose_cache_is_not_finite_is_refused(tiny_llama, profile):
    """A damaged weight must not become an artifact of NaN."""
    broken = tiny_llama

    class Broken:
        shape, rope, identity, device = broken.shape, broken.rope, broken.identity, broken.device

        def prefill(self, ids: Tensor, chunk_tokens: int = 2048) -> tuple[Tensor, Tensor]:
            k, v = broken.prefill(ids, chunk_tokens)
            v[1, 0, 77, 3] = float("nan")
            return k, v

        def fisher_gradients(self, *arguments: object) -> tuple[Tensor, Tensor]:
            k, v = broken.fisher_gradients(*arguments)
            return k * float("nan"), v

    with pytest.raises(CalibrationError, match="NaN or Inf on calibration sequence 0"):
        calibrate(Broken(), texts_of(case_seed(), fit=4, held_out=3), config(profile=profile), quiet)


def test_settings_that_cannot_be_meant(tiny_llama):
    texts = texts_of(1, fit=2, held_out=1)
    for change, told in [
        ({"profile": "zip"}, "'zip' is unknown"),
        ({"ratios": (), "kls": ()}, "no operating point"),
        ({"profile": "paper", "kls": (0.1,)}, "nominal ratios only"),
        ({"ratios": (0.0,)}, "target 0.0"),
        ({"kls": (float("nan"),)}, "target nan"),
        ({"ratios": (float("inf"),)}, "target inf"),
    ]:
        with pytest.raises(ConfigError, match=told):
            config(**change)
    with pytest.raises(ConfigError, match="tp_size 3 does not divide 2"):
        calibrate(tiny_llama, texts, config(tp_size=3), quiet)
    with pytest.raises(ConfigError, match="held-out text to measure"):
        calibrate(tiny_llama, texts, config(kls=(0.1,)), quiet)
    with pytest.raises(CalibrationError, match="4 layer groups asked of a model with 3"):
        calibrate(tiny_llama, texts, config(groups=4), quiet)


@pytest.mark.parametrize(("layers", "groups"), [(1, 1), (30, 2), (7, 3), (5, 5), (64, 7)])
def test_layer_groups_and_parts_cover_everything_once(layers, groups):
    edges = split_layers(layers, groups)
    assert [layer for start, end in edges for layer in range(start, end)] == list(range(layers))
    assert max(end - start for start, end in edges) - min(end - start for start, end in edges) <= 1
    parts = parts_of(KVShape(layers, 6, 4, "float16"), edges, 3)
    seen = [
        (layer, head)
        for part in parts
        for layer in range(part.layers.start, part.layers.stop)
        for head in range(part.heads.start, part.heads.stop)
    ]
    assert sorted(seen) == [(layer, head) for layer in range(layers) for head in range(6)]
    assert sum(part.channels for part in parts) == 2 * layers * 6 * 4
