"""Codecs: exact tokens untouched, bytes counted as records have them, names found."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dynamo_kvtc.codec.artifact import load_artifact
from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.codec.policy import ExactCounts, ExactPolicy
from dynamo_kvtc.codec.record import parse_record
from dynamo_kvtc.errors import ArtifactError, ConfigError
from dynamo_kvtc.evaluate.codecs import CodedBytes, RawCodec, RecordCodec
from dynamo_kvtc.evaluate.peers import PEERS
from dynamo_kvtc.evaluate.selection import open_artifacts, parse_codecs, point_value, select
from tests.builders import same_bits
from tests.evaluate.tiny import STEPS, Tiny, write_artifact

TOKENS = 70


def cache(tiny: Tiny) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    k, v = tiny.model.prefill(tiny.sequences(1, TOKENS)[0])
    positions = torch.arange(TOKENS)
    return k, v, positions, ExactPolicy(sinks=3, window=5).mask(positions, TOKENS)


def all_codecs(tiny: Tiny) -> list:
    artifact = load_artifact(tiny.artifact)
    return [RawCodec(), *PEERS.values(), *(RecordCodec(f"kvtc:{name}", artifact, name) for name, _ in STEPS)]


@pytest.mark.parametrize("which", ["tiny", "tiny_bf16"])
def test_exact_tokens_are_untouched_and_the_others_are_near(which: str, request: pytest.FixtureRequest) -> None:
    tiny = request.getfixturevalue(which)
    k, v, positions, mask = cache(tiny)
    before = k.clone(), v.clone()
    for codec in all_codecs(tiny):
        out_k, out_v, spent = codec.run(k, v, positions, mask)
        for x, y in ((k, out_k), (v, out_v)):
            assert same_bits(x[:, :, mask], y[:, :, mask]), codec.name
            assert y.dtype == x.dtype
            assert y.shape == x.shape
            relative = float((y - x).float().square().mean() / x.float().square().mean())
            assert 0 < relative < 0.2 or codec.name == "raw", (codec.name, relative)
        assert spent.coded_tokens + spent.exact_tokens == TOKENS
        assert spent.exact.policy == 8
    assert same_bits(k, before[0]), "a codec wrote into its input"
    assert same_bits(v, before[1]), "a codec wrote into its input"


def test_raw_has_ratio_one_in_any_dtype(tiny: Tiny, tiny_bf16: Tiny) -> None:
    for model in (tiny, tiny_bf16):
        spent = RawCodec().run(*cache(model))[2]
        assert (spent.ratio_coded, spent.ratio_total) == (1.0, 1.0)
        assert spent.raw_bytes + spent.exact_bytes == TOKENS * 3 * 2 * 2 * 8 * 2


def test_record_bytes_are_the_records_own(tiny_bf16: Tiny) -> None:
    k, v, positions, mask = cache(tiny_bf16)
    artifact = load_artifact(tiny_bf16.artifact)
    blocks = BlockCodec(artifact, "30").encode_blocks(k, v, positions, mask)
    spent = RecordCodec("x", artifact, "30").run(k, v, positions, mask)[2]
    token = 3 * 2 * 2 * 8 * 2
    records = sum(len(block.record) for block in blocks)
    exact = sum(block.exact.total for block in blocks)
    assert spent.coded_bytes + spent.exact_bytes == records
    assert spent.exact_bytes == exact * token
    assert spent.ratio_total == pytest.approx(TOKENS * token / records)
    assert spent.ratio_coded == pytest.approx((TOKENS - exact) * token / (records - exact * token))


def test_a_float32_cache_counts_two_bytes_a_value(tiny: Tiny) -> None:
    k, v, positions, mask = cache(tiny)
    artifact = load_artifact(tiny.artifact)
    blocks = BlockCodec(artifact, "8").encode_blocks(k, v, positions, mask)
    spent = RecordCodec("x", artifact, "8").run(k, v, positions, mask)[2]
    stored = 3 * 2 * 2 * 8 * 4
    assert spent.coded_bytes == sum(len(b.record) - b.exact.total * stored for b in blocks)
    assert spent.exact_bytes == spent.exact_tokens * stored // 2
    assert spent.raw_bytes == spent.coded_tokens * stored // 2


def test_entropy_is_the_symbols_cost_under_the_tables(tiny: Tiny) -> None:
    k, v, positions, mask = cache(tiny)
    artifact = load_artifact(tiny.artifact)
    codec = BlockCodec(artifact, "30")
    records = [block.record for block in codec.encode_blocks(k, v, positions, mask)]
    tables = codec.profile.point.tables
    bits = 0.0
    for g, group in enumerate(codec.profile.groups):
        for record in map(parse_record, records):
            payload = record.section(g)
            layers = artifact.manifest.groups[g][1] - artifact.manifest.groups[g][0]
            exact = int(record.header.exact.sum()) * layers * 2 * 2 * 8 * 4
            symbols = codec.profile.unpack(g, [payload[exact:]], [record.header.coded_tokens]).numpy()
            shift = 2 * (symbols[:, :1] // 16 - 8) * (np.arange(len(group.classes)) >= group.leading)
            classes = np.clip(group.classes + shift, 0, len(tables.shift) - 1)
            for c, q in zip(classes.ravel(), symbols[:, 1:].ravel(), strict=True):
                index = (int(q) >> int(tables.shift[c])) + tables.alphabet
                row = tables.frequencies[c]
                if 0 <= index < len(row) - 1 and row[index]:
                    bits += math.log2(4096 / row[index]) + int(tables.shift[c])
                else:
                    bits += math.log2(4096 / row[-1]) + 16
    spent = RecordCodec("x", artifact, "30").run(k, v, positions, mask)[2]
    assert spent.entropy_bits == pytest.approx(bits, rel=1e-6)
    assert spent.bytes_over_entropy == pytest.approx(8 * spent.coded_bytes / bits)
    assert spent.bytes_over_entropy > 1


def test_ranks_code_their_own_heads(tiny: Tiny, tmp_path: Path) -> None:
    write_artifact(tmp_path / "two.safetensors", tiny.model, tp_size=2)
    opened = open_artifacts([tmp_path / "two.safetensors"])
    codec = select(parse_codecs("kvtc:8"), opened)[0].build(ExactPolicy(), "cpu")
    k, v, positions, mask = cache(tiny)
    out_k, out_v, spent = codec.run(k, v, positions, mask)
    for rank, artifact in enumerate(opened[0].ranks):
        one = slice(rank, rank + 1)
        block = BlockCodec(artifact, "8")
        records = [b.record for b in block.encode_blocks(k[:, one], v[:, one], positions, mask)]
        want_k, want_v, _ = block.decode_blocks(records)
        assert same_bits(out_k[:, one], want_k)
        assert same_bits(out_v[:, one], want_v)
    assert spent.exact.policy == 2 * 8
    assert spent.raw_bytes + spent.exact_bytes == TOKENS * 3 * 2 * 2 * 8 * 2
    with pytest.raises(ConfigError, match="2 tensor-parallel rank"):
        RecordCodec("alone", opened[0].artifact, "8")


def test_sums_add_up_and_keep_entropy_only_where_all_have_it() -> None:
    a = CodedBytes(10, 20, 160, 5, ExactCounts(1, 2, 3), 64.0)
    b = CodedBytes(30, 0, 160, 5, ExactCounts(1, 0, 0), 16.0)
    total = a + b
    assert total == CodedBytes(40, 20, 320, 10, ExactCounts(2, 2, 3), 80.0)
    assert (total.ratio_coded, total.ratio_total, total.bytes_over_entropy) == (8.0, 340 / 60, 4.0)
    assert (a + CodedBytes(1, 1, 1, 1)).entropy_bits is None


def test_points_are_compared_as_numbers() -> None:
    assert point_value("16") == point_value("16.0") == ("", 16.0)
    assert point_value("kl=0.005") == point_value("kl=5e-3") == ("kl", 0.005)
    for bad in ("fine", "kl=", "x=3", "nan", "-1", "inf", ""):
        assert point_value(bad) is None


def test_the_first_artifact_with_the_point_is_taken_unless_one_is_named(tiny: Tiny, tmp_path: Path) -> None:
    write_artifact(tmp_path / "other.safetensors", tiny.model, steps=(("8.0", 0.1), ("99", 0.3)))
    opened = open_artifacts([tiny.artifact, tmp_path / "other.safetensors"])
    chosen = select(parse_codecs("raw, kvtc:8,kvtc:99.0,kvtc@other:8,kvtc:kl=5e-3"), opened)
    found = [(s.source and s.source.path.stem, s.point) for s in chosen]
    assert found == [(None, ""), ("tiny", "8"), ("other", "99"), ("other", "8.0"), ("tiny", "kl=0.005")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zip", "codec 'zip' is unknown; known are raw, fp8, nvfp4, kivi2"),
        ("kvtc", "codec 'kvtc' is unknown"),
        ("lzma:4", "codec 'lzma:4' is unknown"),
        ("kvtc:best", "'best' is neither a ratio nor kl=NUMBER"),
        ("raw,fp8,raw", "names raw twice"),
        (" , ", "names no codec"),
    ],
)
def test_bad_names_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_codecs(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kvtc:31", r"no artifact has operating point '31'; tiny.safetensors has 8, 30, kl=0.005"),
        ("kvtc:kl=8", "operating point 'kl=8'"),
        ("paper:8", r"needs a paper artifact; artifacts given: tiny \(kvtc\)"),
        ("kvtc@big:8", "of file stem 'big'; artifacts given: tiny"),
    ],
)
def test_missing_points_name_those_there_are(tiny: Tiny, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select(parse_codecs(text), open_artifacts([tiny.artifact]))


def test_a_missing_artifact_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nothing\.safetensors"):
        open_artifacts([tmp_path / "nothing.safetensors"])
