"""READ FIRST of this room: what happens to the cache between two turns, three ways.

    recompute: nothing is kept, the whole conversation is prefilled again in every turn
    raw:       k and v are kept as they are, in the cache's dtype
    kvtc:      after a turn the cache becomes records and nothing else is kept; before the next they are decoded

All ways follow one history: the questions, and the answers that the raw way gave. So turns compare token by token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dynamo_kvtc.codec.pipeline import BlockCodec
from dynamo_kvtc.codec.policy import ExactPolicy
from dynamo_kvtc.evaluate.quality import Divergence, divergence, log_probabilities
from dynamo_kvtc.hf.model import Model

Progress = Callable[[float], None]
"""Called with the share of the conversation that is over, 0 to 1."""

POLICY = ExactPolicy(sinks=4, window=128)


class Way(Protocol):
    """A way to get from the end of one turn to the start of the next."""

    name: str

    def keep(self, k: Tensor, v: Tensor) -> None:
        """Takes over a turn's cache, [L, H, T, D] in engine form, beginning with the tokens that were restored."""
        ...

    def restore(self) -> tuple[Tensor, Tensor]:
        """The cache that is still there, [L, H, T, D], T 0 if none is."""
        ...

    @property
    def held_bytes(self) -> int:
        """What is held between turns."""
        ...


class Recompute:
    name = "recompute"
    held_bytes = 0

    def __init__(self, model: Model) -> None:
        self._model = model

    def keep(self, k: Tensor, v: Tensor) -> None:
        pass

    def restore(self) -> tuple[Tensor, Tensor]:
        return self._model.empty_cache()


class Raw:
    name = "raw"

    def __init__(self, model: Model) -> None:
        self._cache = model.empty_cache()

    def keep(self, k: Tensor, v: Tensor) -> None:
        self._cache = (k, v)

    def restore(self) -> tuple[Tensor, Tensor]:
        return self._cache

    @property
    def held_bytes(self) -> int:
        return sum(x.nbytes for x in self._cache)


class Coded:
    """Records of blocks; a block is encoded again only while it is incomplete or the exact window still touches it."""

    name = "kvtc"

    def __init__(self, model: Model, codec: BlockCodec, policy: ExactPolicy = POLICY) -> None:
        self._model, self._codec, self._policy = model, codec, policy
        self._records: list[bytes] = []
        self._settled = 0

    def keep(self, k: Tensor, v: Tensor) -> None:
        tokens, block = k.shape[2], self._codec.artifact.manifest.block_tokens
        first = self._settled * block
        positions = torch.arange(first, tokens)
        exact = self._policy.mask(positions, tokens)
        encoded = self._codec.encode_blocks(k[:, :, first:], v[:, :, first:], positions, exact)
        self._records[self._settled :] = [item.record for item in encoded]
        self._settled = max(tokens - self._policy.window, 0) // block

    def restore(self) -> tuple[Tensor, Tensor]:
        if not self._records:
            return self._model.empty_cache()
        k, v, _ = self._codec.decode_blocks(self._records)
        return k.to(self._model.device), v.to(self._model.device)

    @property
    def held_bytes(self) -> int:
        return sum(map(len, self._records))


@dataclass(frozen=True)
class WayTurn:
    """One turn of one way. Seconds are of wall clock.

    first_token_seconds: from the question until the first token of the answer, restore_seconds included.
    restore_seconds: getting the cache back (decoding); keep_seconds: putting it away after the turn (encoding).
    held_bytes: between this turn and the next. answer: what this way answered.
    divergence: over the raw answer's tokens, against the raw way; None for the raw way itself and in the first turn,
    which begins with nothing held in any way.
    """

    first_token_seconds: float
    restore_seconds: float
    keep_seconds: float
    held_bytes: int
    answer: str
    divergence: Divergence | None


@dataclass(frozen=True)
class Turn:
    """context_tokens: tokens before the question's; prompt_tokens: the question's; ways: by name."""

    question: str
    context_tokens: int
    prompt_tokens: int
    ways: dict[str, WayTurn]


def converse(
    model: Model, prompts: Sequence[tuple[str, list[int]]], ways: Sequence[Way], answer_tokens: int, progress: Progress
) -> list[Turn]:
    """Holds the conversation. ways[0] is the reference whose answers make the history.

    prompts: per turn the question and the tokens that the turn adds before its answer; the first has the document's.
    An answer has at most answer_tokens tokens. A turn's tokens begin with what closes the answer before.
    """
    history: list[int] = []
    turns: list[Turn] = []
    steps, done = len(prompts) * len(ways), 0
    for number, (question, prompt) in enumerate(prompts):
        context = len(history)
        # An answer that ended by itself has the end token already.
        added = prompt[1:] if history and prompt[:1] == history[-1:] and prompt[0] in model.end_ids else prompt
        history = history + added
        reference = answer = None
        first: WayTurn | None = None
        results: dict[str, WayTurn] = {}
        for way in ways:
            progress(done / steps)
            done += 1
            if first is None:
                # The first turn is the same work in every way: done once, then each keeps it in its own manner.
                started = _now(model.device)
                k, v = way.restore()
                restored = _now(model.device) - started
                ids, k, v, seconds = model.generate(
                    k, v, torch.tensor(history[k.shape[2] :]), k.shape[2], answer_tokens
                )
            end = len(history) - 1
            if answer is None:
                answer = ids
            fed = torch.tensor([history[-1], *answer[:-1]])
            found: Divergence | None = None
            if number:
                logits = model.logits(k[:, :, :end], v[:, :, :end], fed, end)
                if reference is None:
                    reference = log_probabilities(logits)
                else:
                    found = divergence(reference, logits, torch.tensor(answer))
            if ids != answer:
                # The history goes on with the reference's answer: put its tokens into this cache.
                _, k, v, _ = model.generate(k[:, :, :end], v[:, :, :end], fed, end, 1)
            started = _now(model.device)
            way.keep(k, v)
            kept = _now(model.device) - started
            text = model.tokenizer.decode(ids, skip_special_tokens=True).strip()
            results[way.name] = WayTurn(restored + seconds, restored, kept, way.held_bytes, text, found)
            if not number:
                first = results[way.name]
        assert answer is not None
        history = history + answer
        turns.append(Turn(question, context, len(added), results))
    progress(1.0)
    return turns


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
