"""Quality: raw is perfect, finer is better, and the sums are those of the definitions."""

from __future__ import annotations

import math

import pytest
import torch

from dynamo_kvtc.codec.artifact import load_artifact
from dynamo_kvtc.codec.policy import ExactPolicy
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.evaluate.codecs import RawCodec, RecordCodec
from dynamo_kvtc.evaluate.peers import PEERS
from dynamo_kvtc.evaluate.quality import continuation_kl, divergence, log_probabilities, measure
from dynamo_kvtc.evaluate.selection import open_artifacts, parse_codecs, select
from dynamo_kvtc.hf.model import load_model
from tests.builders import case_seed
from tests.evaluate.tiny import Tiny

POLICY = ExactPolicy(sinks=4, window=8)
CONTEXT = 96


@pytest.mark.parametrize("which", ["tiny", "tiny_bf16"])
def test_raw_is_perfect_and_a_finer_step_is_nearer(which: str, request: pytest.FixtureRequest) -> None:
    tiny = request.getfixturevalue(which)
    artifact = load_artifact(tiny.artifact)
    points = ("8", "kl=0.005", "30")
    codecs = [RawCodec(), *(RecordCodec(f"kvtc:{p}", artifact, p) for p in points), PEERS["fp8"]]
    steps: list[str] = []
    raw, fine, middle, coarse, fp8 = measure(
        tiny.model, tiny.sequences(3, CONTEXT + 40), CONTEXT, codecs, POLICY, steps.append
    )
    assert (raw.kl, raw.ppl_ratio, raw.top1, raw.ratio_coded, raw.ratio_total) == (0.0, 1.0, 1.0, 1.0, 1.0)
    assert 0 < fine.kl < middle.kl < coarse.kl
    assert fine.ratio_coded < middle.ratio_coded < coarse.ratio_coded
    assert fine.top1 > coarse.top1
    assert fp8.kl > 0
    assert fp8.coded.exact.policy == 3 * 12
    assert raw.scored_tokens == 3 * 39
    assert raw.sequences == 3
    assert steps == [codec.name for codec in codecs] * 3


def test_one_codec_alone_measures_the_same(tiny: Tiny) -> None:
    sequences = tiny.sequences(2, CONTEXT + 20)
    codec = RecordCodec("kvtc:30", load_artifact(tiny.artifact), "30")
    together = measure(tiny.model, sequences, CONTEXT, [PEERS["kivi2"], codec], POLICY)[1]
    assert continuation_kl(tiny.model, sequences, CONTEXT, codec, POLICY) == together


def test_the_numbers_are_the_definitions(tiny: Tiny) -> None:
    ids = tiny.sequences(1, CONTEXT + 30)[0]
    codec = PEERS["kivi2"]
    quality = continuation_kl(tiny.model, [ids], CONTEXT, codec, POLICY)
    k, v = tiny.model.prefill(ids[:CONTEXT])
    positions = torch.arange(CONTEXT)
    mask = (positions < 4) | (positions >= CONTEXT - 8)
    coded_k, coded_v, _ = codec.run(k, v, positions, mask)
    # All 30 tokens fed; the prediction after the last has no label and is not scored.
    p, q = (
        torch.log_softmax(tiny.model.logits(a, b, ids[CONTEXT:], CONTEXT)[:-1].double(), dim=-1)
        for a, b in ((k, v), (coded_k, coded_v))
    )
    labels = ids[CONTEXT + 1 :, None]
    assert quality.scored_tokens == 29
    assert quality.kl == pytest.approx(float((p.exp() * (p - q)).sum(dim=-1).mean()), rel=1e-4)
    assert quality.ppl_ratio == pytest.approx(math.exp(float((p.gather(1, labels) - q.gather(1, labels)).mean())), 1e-5)
    assert quality.top1 == pytest.approx(float((p.argmax(dim=1) == q.argmax(dim=1)).double().mean()))
    assert quality.kl_stderr is None


def test_divergence_in_chunks_is_the_whole() -> None:
    generator = torch.Generator().manual_seed(case_seed())
    rows, words = 300, 17  # more than two chunks
    a, b = (3 * torch.randn(rows, words, generator=generator) for _ in range(2))
    labels = torch.randint(0, words, (rows,), generator=generator)
    found = divergence(log_probabilities(a.clone()), b, labels)
    p, q = torch.log_softmax(a.double(), -1), torch.log_softmax(b.double(), -1)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-5)
    index = torch.arange(rows)
    assert found.nll_gain == pytest.approx(float((p[index, labels] - q[index, labels]).sum()), rel=1e-4, abs=1e-3)
    assert found.same_top1 == int((a.argmax(1) == b.argmax(1)).sum())
    assert found.tokens == rows


def test_words_the_model_rules_out_add_nothing() -> None:
    a = torch.tensor([[1.0, 2.0, -math.inf]])
    assert divergence(log_probabilities(a.clone()), a.clone(), torch.tensor([1])).kl == 0.0


def test_standard_error_is_that_of_the_mean(tiny: Tiny) -> None:
    sequences = tiny.sequences(3, CONTEXT + 20)
    alone = [continuation_kl(tiny.model, [ids], CONTEXT, PEERS["nvfp4"], POLICY).kl for ids in sequences]
    quality = continuation_kl(tiny.model, sequences, CONTEXT, PEERS["nvfp4"], POLICY)
    assert quality.kl == pytest.approx(sum(alone) / 3)
    assert quality.kl_stderr == pytest.approx(float(torch.tensor(alone).double().std()) / math.sqrt(3), rel=1e-5)


@pytest.mark.parametrize(
    ("lengths", "context", "policy", "message"),
    [
        ([], 10, ExactPolicy(0), "nothing to measure"),
        ([40], 12, ExactPolicy(4, 8), "a context of 12 tokens with 4 sinks and a window of 8"),
        ([40], 39, ExactPolicy(4, 8), "a continuation of 1 tokens"),
        ([40, 41], 20, ExactPolicy(4, 8), "sequences of 40 to 41 tokens"),
    ],
)
def test_unusable_lengths_are_refused_before_the_model_runs(
    lengths: list[int], context: int, policy: ExactPolicy, message: str
) -> None:
    sequences = [torch.zeros(n, dtype=torch.int64) for n in lengths]
    with pytest.raises(ConfigError, match=message):
        measure(None, sequences, context, [RawCodec()], policy)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpu_measures_what_the_cpu_does(tiny: Tiny) -> None:
    there = load_model(str(tiny.folder), "cuda")
    selected = select(parse_codecs("raw,fp8,nvfp4,kivi2,kvtc:8,kvtc:30"), open_artifacts([tiny.artifact]))
    sequences = tiny.sequences(2, CONTEXT + 40)
    here, on_gpu = (
        measure(m, sequences, CONTEXT, [s.build(POLICY, m.device) for s in selected], POLICY)
        for m in (tiny.model, there)
    )
    assert on_gpu[0].kl < 1e-6
    for cpu, gpu in zip(here[1:], on_gpu[1:], strict=True):
        # Matrix products of the model differ in their last places, which moves a few values over a quantiser's edge.
        assert gpu.kl == pytest.approx(cpu.kl, rel=0.1)
        assert gpu.ratio_coded == pytest.approx(cpu.ratio_coded, rel=0.01)
        assert gpu.coded.exact.policy == cpu.coded.exact.policy
