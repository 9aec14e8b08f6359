"""Tasks: examples are cut as said, answers judged as greedy decoding would, intervals are Wilson's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.evaluate import tasks
from dynamo_kvtc.evaluate.codecs import RawCodec
from dynamo_kvtc.evaluate.peers import PEERS
from tests.evaluate.tiny import Tiny, passages


# Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_is_the_published_one(correct: int, n: int, low: float, high: float) -> None:
    assert tasks.wilson_interval(correct, n) == pytest.approx((low, high), abs=5e-5)
    assert tasks.wilson_interval(n - correct, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_interval_refuses_what_is_no_share() -> None:
    for correct, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ConfigError, match=f"{correct} of {n}"):
            tasks.wilson_interval(correct, n)


class Counter:
    """A model that answers each token with the next number, as long as its cache is intact."""

    vocabulary = 64

    def prefill(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k = ids.float()[None, None, :, None]
        return k, k.clone()

    def logits(self, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor, position: int) -> torch.Tensor:
        assert position == k.shape[2]
        intact = bool((k == v).all())
        says = ids + 1 if intact else ids
        return 9 * torch.nn.functional.one_hot(says, self.vocabulary).float()


class Breaker:
    """Codes badly what it may code; notes what it may not."""

    name = "breaker"

    def __init__(self) -> None:
        self.masks: list[torch.Tensor] = []

    def run(self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> Any:
        self.masks.append(mask)
        k = k.clone()
        k[:, :, ~mask] += 1
        return k, v, RawCodec().run(k, v, positions, mask)[2]


def example(fed: list[int], answer: list[int], group: str | None = None) -> tasks.Example:
    return tasks.Example(torch.arange(12), torch.tensor(fed), torch.tensor(answer), group)


def test_an_answer_is_right_if_every_token_is_and_only_sinks_are_exact() -> None:
    examples = [
        example([3, 9, 20], [21, 22, 23], "0.1"),  # right
        example([20], [21], "0.5"),  # right
        example([20], [21, 22, 22], "0.5"),  # last token wrong
        example([20], [20, 21], "0.9"),  # first token wrong
    ]
    breaker = Breaker()
    steps: list[str] = []
    raw, broken = tasks.run_task(Counter(), "passkey", examples, [RawCodec(), breaker], 3, steps.append)
    assert (raw.correct, raw.n, raw.accuracy, raw.kl) == (2, 4, 0.5, 0.0)
    assert raw.by_group == {"0.1": (1, 1), "0.5": (1, 2), "0.9": (0, 1)}
    assert raw.interval == tasks.wilson_interval(2, 4)
    assert broken.correct == 0
    # Mass e^9 / (e^9 + 63) moves from one word to another: KL = (p - r) * 9, r the mass of any other word.
    total = torch.tensor(9.0).exp() + 63
    assert broken.kl == pytest.approx(float((torch.tensor(9.0).exp() - 1) / total * 9), rel=1e-4)
    assert steps == ["raw", "breaker"] * 4
    assert all(mask.tolist() == [True] * 3 + [False] * 9 for mask in breaker.masks)


def test_a_task_without_examples_is_refused() -> None:
    with pytest.raises(ConfigError, match="lambada has no examples"):
        tasks.run_task(Counter(), "lambada", [], [RawCodec()], 4)


def test_a_passage_is_cut_before_its_last_word(tmp_path: Path, byte_tokenizer: Any) -> None:
    file = tmp_path / "p.jsonl"
    texts = ["one two  three \n", 'She said: "I don\'t care about signs"', "third line here"]
    file.write_text("".join(json.dumps({"text": text}) + "\n\n" for text in texts))
    found = tasks.read_passages(file, 2)
    assert found == [("one two", " three"), ("She said: \"I don't care about", ' signs"')]
    cut = tasks.lambada_examples(found, byte_tokenizer, 100, 4)
    assert byte_tokenizer.decode(cut[0].context) == "one tw"
    assert byte_tokenizer.decode(cut[0].fed) == "o"
    assert byte_tokenizer.decode(cut[0].answer) == " three"
    assert len(tasks.read_passages(file)) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a b"}\n{"text": ', "line 2 is not JSON"),
        ('{"txt": "a b"}', 'line 1 has no "text" of at least two words'),
        ('{"text": "word"}', "line 1 has no"),
        ("[1]", "line 1 has no"),
        ("\n", "holds no passage"),
    ],
)
def test_unusable_passages_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=message):
        tasks.read_passages(tmp_path / "p.jsonl")


def test_passages_must_leave_a_token_to_code_and_fit(byte_tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="passage 1 has 5 tokens"):
        tasks.lambada_examples([("abcde", " f")], byte_tokenizer, 100, 4)
    with pytest.raises(ConfigError, match="passage 2 has 7 tokens"):
        tasks.lambada_examples([("abcdef", " f"), ("abcdefg", " f")], byte_tokenizer, 8, 4)
    assert tasks.lambada_examples([("abcdef", " f")], byte_tokenizer, 8, 4)


def test_pass_keys_lie_where_they_should_and_are_the_same_every_time(byte_tokenizer: Any) -> None:
    found = tasks.passkey_examples(byte_tokenizer, 2000)
    again = tasks.passkey_examples(byte_tokenizer, 2000)
    assert len(found) == 27
    assert sorted({e.group for e in found}) == [f"0.{i}" for i in range(1, 10)]
    for a, b in zip(found, again, strict=True):
        assert torch.equal(a.context, b.context)
        assert torch.equal(a.answer, b.answer)
    keys = set()
    for e in found:
        text, answer = byte_tokenizer.decode(e.context), byte_tokenizer.decode(e.answer)
        needle = f" The pass key is{answer}. Remember it."
        assert text.count(needle) == 1
        assert text.index(needle) / len(text) == pytest.approx(float(e.group or 0), abs=0.05)
        total = len(e.context) + len(e.fed) + len(e.answer)
        assert 2000 - 50 < total <= 2000
        assert byte_tokenizer.decode(e.fed).endswith("The pass key is")
        keys.add(answer)
    assert len(keys) > 20
    assert len(tasks.passkey_examples(byte_tokenizer, 10**6, 1)[0].context) <= tasks.PASSKEY_TOKENS


def test_a_model_too_short_for_pass_keys_is_refused(byte_tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="model's 300 positions leave"):
        tasks.passkey_examples(byte_tokenizer, 300)


def test_names_of_tasks(tmp_path: Path) -> None:
    file = passages(tmp_path / "p.jsonl", 1)
    assert tasks.parse_tasks("") == []
    assert [t.kind for t in tasks.parse_tasks(f"passkey, lambada:{file}")] == ["passkey", "lambada"]
    for bad, message in (
        ("lambada", "'lambada' is unknown"),
        ("passkey:3", "'passkey:3' is unknown"),
        ("gsm8k", "known are lambada:FILE and passkey"),
        (f"lambada:{tmp_path}/no.jsonl", "no.jsonl is not a file"),
        ("passkey,passkey", "names a task twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            tasks.parse_tasks(bad)


def test_tasks_run_on_a_model(tiny: Tiny, tmp_path: Path) -> None:
    found = tasks.read_passages(passages(tmp_path / "p.jsonl", 2))
    examples = tasks.lambada_examples(found, tiny.model.tokenizer, 512, 4)
    raw, kivi = tasks.run_task(tiny.model, "lambada", examples, [RawCodec(), PEERS["kivi2"]], 4)
    assert raw.kl == 0.0
    assert kivi.kl > 0
    assert kivi.coded.exact_tokens == 8
