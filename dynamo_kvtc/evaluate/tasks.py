"""Tasks: does the model still answer right after its context was coded?

An example is a context, some tokens fed after the context's cache was decoded, and the answer's tokens. An answer is
right if teacher-forcing it makes each of its tokens the likeliest, which is what greedy decoding would have written.

Only the sinks stay exact, whatever the window: a lambada passage may be shorter than a window, and a pass key inside
it would not be tested at all.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynamo_kvtc.codec.policy import ExactPolicy
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.evaluate.codecs import CacheCodec, CodedBytes
from dynamo_kvtc.evaluate.quality import CausalModel, OnStep, divergence, log_probabilities

LAMBADA = "lambada"
PASSKEY = "passkey"

PASSKEY_TOKENS = 8192
PASSKEY_PER_DEPTH = 3
DEPTHS = (0.5, 0.1, 0.9, 0.3, 0.7, 0.2, 0.8, 0.4, 0.6)
"""In this order, so that few examples are spread as well."""

# After Mohtashami & Jaggi, "Landmark Attention", arXiv 2305.16300.
_INTRODUCTION = "There is a pass key hidden in a lot of irrelevant text. Find it and memorise it."
_FILLER = (
    " The grass is green.", " The sky is blue.", " The sun is yellow.", " Here we go.", " There and back again.",
)  # fmt: skip
_NEEDLE = " The pass key is {key}. Remember it."
_QUESTION = "\nWhat is the pass key? The pass key is"
_ANSWER = " {key}"


@dataclass(frozen=True)
class TaskName:
    """A task as asked for: "lambada" with its file, or "passkey"."""

    kind: str
    path: Path | None = None


@dataclass(frozen=True)
class Example:
    """context: int64 [T], cached and coded; fed: int64 [>= 1], after it; answer: int64 [>= 1]; group: None or depth."""

    context: Tensor
    fed: Tensor
    answer: Tensor
    group: str | None = None


@dataclass(frozen=True)
class TaskResult:
    """One codec on one task.

    interval: 95% Wilson interval of the accuracy. kl: mean over answer tokens of KL(p_raw || p_coded) in nats, which
    tells codecs apart even where the model fails the task raw. by_group: (correct, n) per group, passkey's depths.
    """

    task: str
    correct: int
    n: int
    kl: float
    coded: CodedBytes
    by_group: dict[str, tuple[int, int]]

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.correct, self.n)


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """95% interval of a share, in [0, 1]. E. B. Wilson, JASA 22 (1927). Raises ConfigError unless 0 <= correct <= n."""
    if not 0 <= correct <= n or n < 1:
        raise ConfigError(f"{correct} of {n} is not a share")
    z = 1.959963984540054  # the normal distribution's 97.5% quantile
    share = correct / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the ends the bound is exact, which rounding would miss by 1e-17.
    low = 0.0 if correct == 0 else (centre - spread) / scale
    high = 1.0 if correct == n else (centre + spread) / scale
    return low, high


def parse_tasks(text: str) -> list[TaskName]:
    """Comma-separated "lambada:FILE" and "passkey". Raises ConfigError, also if the file is not there."""
    names = []
    for part in (part.strip() for part in text.split(",")):
        kind, _, rest = part.partition(":")
        if not part:
            continue
        if kind == PASSKEY and not rest:
            names.append(TaskName(PASSKEY))
        elif kind == LAMBADA and rest:
            path = Path(rest).expanduser()
            if not path.is_file():
                raise ConfigError(f'task {part!r}: {path} is not a file; give JSON lines with a "text" field')
            names.append(TaskName(LAMBADA, path))
        else:
            raise ConfigError(f"task {part!r} is unknown; known are {LAMBADA}:FILE and {PASSKEY}")
    kinds = [name.kind for name in names]
    if len(set(kinds)) != len(kinds):
        raise ConfigError(f"--tasks {text!r} names a task twice")
    return names


def read_passages(path: Path, count: int | None = None) -> list[tuple[str, str]]:
    """(everything before the last word, the last word with its space) of the first ``count`` lines' "text".

    Raises ConfigError, naming the line, if it is not JSON, has no text or fewer than two words.
    """
    passages: list[tuple[str, str]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {exc}") from exc
    for number, line in enumerate(lines, 1):
        if not line.strip() or (count is not None and len(passages) == count):
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as exc:
            raise ConfigError(f"{path} line {number} is not JSON: {exc}") from exc
        text = row.get("text") if isinstance(row, dict) else None
        words = text.split() if isinstance(text, str) else []
        if not isinstance(text, str) or len(words) < 2:
            raise ConfigError(f'{path} line {number} has no "text" of at least two words')
        before = text.rstrip()[: -len(words[-1])].rstrip()
        passages.append((before, " " + words[-1]))
    if not passages:
        raise ConfigError(f"{path} holds no passage")
    return passages


def lambada_examples(passages: Sequence[tuple[str, str]], tokenizer: Any, max_tokens: int, sinks: int) -> list[Example]:
    """LAMBADA (Paperno et al., arXiv 1606.06031): the target is the last word, the rest but its last token is cached.

    Raises ConfigError for a passage longer than max_tokens or too short to have a token coded beside ``sinks``.
    """
    examples = []
    for number, (before, word) in enumerate(passages, 1):
        context, answer = _split_tokens(tokenizer, before, word)
        if len(context) < sinks + 2 or len(context) + len(answer) > max_tokens:
            raise ConfigError(
                f"lambada passage {number} has {len(context)} tokens before its last word; usable are {sinks + 2} "
                f"(sinks, one coded, one fed) to {max_tokens - len(answer)}: leave it out"
            )
        examples.append(Example(context[:-1], context[-1:], answer))
    return examples


def passkey_examples(
    tokenizer: Any, max_positions: int, count: int | None = None, sinks: int = 4, seed: int = 0
) -> list[Example]:
    """``count`` examples over the depths in turn (default: 3 per depth), the same for every run.

    Contexts are as long as whole sentences allow below min(8192, max_positions) minus question and answer.
    Raises ConfigError if the model has too few positions for the needle at different depths.
    """
    count = PASSKEY_PER_DEPTH * len(DEPTHS) if count is None else count
    draw = random.Random(seed)
    begin = begin_ids(tokenizer)
    sentences = [_ids(tokenizer, text) for text in _FILLER]
    opening = begin + _ids(tokenizer, _INTRODUCTION)
    examples = []
    for number in range(count):
        depth = DEPTHS[number % len(DEPTHS)]
        key = str(draw.randint(10_000, 99_999))
        needle = _ids(tokenizer, _NEEDLE.format(key=key))
        question, answer = _split_tokens(tokenizer, _QUESTION, _ANSWER.format(key=key), begin=False)
        room = min(PASSKEY_TOKENS, max_positions) - len(question) - len(answer) - len(opening) - len(needle)
        if room < len(DEPTHS) * max(map(len, sentences)):
            raise ConfigError(
                f"passkey needs a sentence of filler per depth, {len(DEPTHS) * max(map(len, sentences))} tokens; the "
                f"model's {max_positions} positions leave {max(room, 0)}: leave the task out"
            )
        before = _filler(sentences, int(room * depth))
        after = _filler(sentences, room - len(before))
        context = torch.tensor(opening + before + needle + after, dtype=torch.int64)
        if len(context) <= sinks:
            raise ConfigError(f"passkey's context of {len(context)} tokens has no token to code beside {sinks} sinks")
        examples.append(Example(context, question, answer, f"{depth:.1f}"))
    return examples


def run_task(
    model: CausalModel,
    task: str,
    examples: Sequence[Example],
    codecs: Sequence[CacheCodec],
    sinks: int,
    on_step: OnStep | None = None,
) -> list[TaskResult]:
    """Every codec on every example: one result per codec. Raises ConfigError if there are no examples."""
    if not examples:
        raise ConfigError(f"task {task} has no examples; give --task-examples 1 or more")
    policy = ExactPolicy(sinks=sinks)
    correct: list[list[tuple[str | None, bool]]] = [[] for _ in codecs]
    kl = [0.0] * len(codecs)
    coded: list[CodedBytes | None] = [None] * len(codecs)
    for example in examples:
        tokens = len(example.context)
        positions = torch.arange(tokens)
        mask = policy.mask(positions, tokens)
        # The answer's last token is not fed: nothing after it is asked.
        fed = torch.cat([example.fed, example.answer[:-1]])
        first = len(example.fed) - 1
        k, v = model.prefill(example.context)
        reference = log_probabilities(model.logits(k, v, fed, tokens)[first:])
        for i, codec in enumerate(codecs):
            coded_k, coded_v, spent = codec.run(k, v, positions, mask)
            logits = model.logits(coded_k, coded_v, fed, tokens)[first:]
            kl[i] += divergence(reference, logits, example.answer).kl
            correct[i].append((example.group, bool((logits.argmax(dim=-1).cpu() == example.answer).all())))
            total = coded[i]
            coded[i] = spent if total is None else total + spent
            if on_step:
                on_step(codec.name)
    answer_tokens = sum(len(example.answer) for example in examples)
    return [_result(task, correct[i], kl[i] / answer_tokens, coded[i]) for i in range(len(codecs))]


def _result(task: str, outcomes: list[tuple[str | None, bool]], kl: float, coded: CodedBytes | None) -> TaskResult:
    assert coded is not None
    groups: dict[str, tuple[int, int]] = {}
    for group, right in outcomes:
        if group is not None:
            before = groups.get(group, (0, 0))
            groups[group] = (before[0] + right, before[1] + 1)
    return TaskResult(task, sum(right for _, right in outcomes), len(outcomes), kl, coded, groups)


def begin_ids(tokenizer: Any) -> list[int]:
    """The begin token, if the tokenizer puts one before a text by default."""
    begin = getattr(tokenizer, "bos_token_id", None)
    return [begin] if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else []


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _split_tokens(tokenizer: Any, before: str, after: str, begin: bool = True) -> tuple[Tensor, Tensor]:
    """Tokens of a text and of what follows it, cut where the first text's tokens end.

    The whole is tokenised at once, so that ``after`` gets the tokens it has inside a text; if the two parts share a
    token, each is tokenised on its own.
    """
    whole, first = _ids(tokenizer, before + after), _ids(tokenizer, before)
    second = whole[len(first) :] if whole[: len(first)] == first else _ids(tokenizer, after)
    opening = begin_ids(tokenizer) if begin else []
    return torch.tensor(opening + first, dtype=torch.int64), torch.tensor(second, dtype=torch.int64)


def _filler(sentences: list[list[int]], room: int) -> list[int]:
    """Whole sentences in turn, at most ``room`` tokens."""
    out: list[int] = []
    index = 0
    while len(out) + len(sentences[index % len(sentences)]) <= room:
        out += sentences[index % len(sentences)]
        index += 1
    return out
