"""What the conversation needs: a document that calibration has not seen, a chat about it, and an artifact."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dynamo_kvtc.calibrate.run import CalibrationConfig, calibrate
from dynamo_kvtc.calibrate.texts import check_tokens, draw_texts, fit_tokens
from dynamo_kvtc.codec.artifact import Artifact, load_artifact, save_artifact
from dynamo_kvtc.errors import ArtifactError, ConfigError, MissingDependencyError
from dynamo_kvtc.hf.model import Model

Progress = Callable[[str, float], None]

CORPUS = "python"
DOCUMENT = "debugger"
"""The reference topic on pdb. Calibration draws the corpus in a fixed order and stops long before it."""

QUESTIONS = (
    "In one sentence, what is this document about?",
    "How do I start the debugger on a script from the command line?",
    "What does the function pdb.set_trace do?",
    "What happens if I enter a blank line at the debugger's prompt?",
    "What is the file .pdbrc for?",
    "How can several commands be entered on one line?",
    "What does post-mortem debugging mean here?",
    "Which two modules does the extension interface use?",
)

TOPICS_FROM = "d"
"""Documents of many conversations: the reference's topics from this letter on, in order."""

# Shorter lines recur in text of one kind ("See also:", "import sys").
_TELLING_CHARS = 60
_HELD_OUT_SEQUENCES = 4
_ANSWER_MARK = "\u2063ANSWER\u2063"


def document(tokenizer: Any, tokens: int) -> str:
    """The document's beginning, whole paragraphs, at most this many tokens.

    Raises MissingDependencyError if this Python carries no reference topics, ConfigError if nothing fits.
    """
    try:
        text: str = importlib.import_module("pydoc_data.topics").topics[DOCUMENT]
    except (ImportError, KeyError) as exc:
        raise MissingDependencyError(f"this Python carries no pydoc topic {DOCUMENT!r}; the demo needs it") from exc
    kept: list[str] = []
    used = 0
    for paragraph in text.split("\n\n"):
        used += len(tokenizer(paragraph + "\n\n", add_special_tokens=False)["input_ids"])
        if used > tokens:
            break
        kept.append(paragraph)
    if not kept:
        raise ConfigError(f"--document-tokens {tokens} is less than the document's first paragraph; give more")
    return "\n\n".join(kept)


def prompts(tokenizer: Any, text: str, turns: int) -> list[tuple[str, list[int]]]:
    """Per turn the question, and the tokens that the chat template puts before its answer.

    Answers stay the tokens they were generated as: each turn adds only what follows the answer before.
    Raises ConfigError for a number of turns there are no questions for, or a tokenizer without a chat template.
    """
    if not 1 <= turns <= len(QUESTIONS):
        raise ConfigError(f"--turns is {turns}; the demo has 1 to {len(QUESTIONS)} questions")
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the model's tokenizer has no chat template; the demo needs an instruction-tuned model")
    first = f"Here is a document.\n\n{text}\n\nAnswer from the document. {QUESTIONS[0]}"
    out = []
    messages: list[dict[str, str]] = []
    for question in QUESTIONS[:turns]:
        messages.append({"role": "user", "content": question if messages else first})
        rendered: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        added = rendered.rsplit(_ANSWER_MARK, 1)[-1]
        out.append((question, list(tokenizer(added, add_special_tokens=False)["input_ids"])))
        messages.append({"role": "assistant", "content": _ANSWER_MARK})
    return out


def conversations(tokenizer: Any, sessions: int, tokens: int) -> tuple[str, list[tuple[list[int], list[int]]]]:
    """So many chats of two turns, each about a part of the reference: all their text, and per chat the tokens of the
    first turn (at most ``tokens``) and those that the second adds after the answer.

    Raises MissingDependencyError if this Python carries no reference topics, ConfigError if they do not suffice.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as exc:
        raise MissingDependencyError("this Python carries no pydoc topics; the demo needs them") from exc
    room = tokens - sum(len(ids) for _, ids in prompts(tokenizer, "", 1))
    pieces: list[str] = []
    for name in sorted(topics, key=str.lower):
        if name.lower() < TOPICS_FROM or len(pieces) == sessions:
            continue
        ids = tokenizer(topics[name], add_special_tokens=False)["input_ids"]
        # A few tokens less than there is room for: decoded and coded again a text may have one more.
        step = max(1, room - 8)
        parts = [ids[i : i + step] for i in range(0, len(ids), step)]
        pieces += [tokenizer.decode(part) for part in parts if len(part) == step]
        pieces = pieces[:sessions]
    if room < 32 or len(pieces) < sessions:
        raise ConfigError(
            f"--sessions {sessions} of --session-tokens {tokens}: the reference has {len(pieces)} such texts; a first "
            "turn needs 32 tokens beside its question: ask for fewer sessions, or shorter ones (but not that short)"
        )
    out = []
    for text in pieces:
        (_, first), (_, second) = prompts(tokenizer, text, 2)
        out.append((first[:tokens], second))
    return "\n".join(pieces), out


def check_unseen(tokenizer: Any, text: str, sequences: Sequence[Tensor]) -> None:
    """Raises ConfigError if a telling line of the document is in the calibration's sequences."""
    seen = " ".join(tokenizer.decode(ids, skip_special_tokens=True) for ids in sequences)
    for line in text.splitlines():
        if len(line.strip()) >= _TELLING_CHARS and line.strip() in seen:
            raise ConfigError(
                f"the calibration text contains a line of the demo's document ({line.strip()[:40]!r}...), so the "
                f"figures would flatter; use fewer --tokens"
            )


def artifact_for(
    model: Model, path: Path, config: CalibrationConfig, tokens: int, length: int, text: str, progress: Progress,
    say: Callable[[str], None],
) -> tuple[Artifact, bool]:  # fmt: skip
    """The artifact at ``path`` if it is this model's, else a new one, written there; and whether it is new."""
    if path.is_file():
        try:
            artifact = load_artifact(path)
            artifact.check_model(model.identity, model.shape, model.rope)
            return artifact, False
        except ArtifactError as exc:
            say(f"{path.name} is made again: {exc}")
    texts = draw_texts(model, [CORPUS], tokens, length, _HELD_OUT_SEQUENCES)
    check_unseen(model.tokenizer, text, [*texts.fit, *texts.held_out])
    for warning in check_tokens(fit_tokens(texts), tokens, model.shape, config):
        say(f"warning: {warning}")
    manifest, tensors = calibrate(model, texts, config, progress)
    save_artifact(path, manifest, tensors)
    return load_artifact(path), True
