"""What a client asks of a graph: is it there, and one chat completion."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from dynamo_kvtc.errors import EngineError, EngineTimeoutError

ANSWER_SECONDS = 120.0
_LOOK_SECONDS = 2.0
_MOST_BYTES = 16 << 20


@dataclass(frozen=True)
class Answer:
    """ttft_seconds: time to first token; cached_tokens: of the prompt, those not computed (None: not told)."""

    text: str
    ttft_seconds: float
    seconds: float
    prompt_tokens: int
    cached_tokens: int | None


def models(url: str) -> list[str]:
    """Those that the frontend serves; none while it is not there."""
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=_LOOK_SECONDS) as reply:
            told = json.loads(reply.read(_MOST_BYTES))
        return [str(model["id"]) for model in told["data"]]
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return []


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=_LOOK_SECONDS) as reply:
            return bool(reply.status == 200)
    except (OSError, HTTPException):
        return False


def counters(url: str, prefix: str, known: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Of a worker's /metrics: what has counted, by name and labels, of those known; empty if nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=_LOOK_SECONDS) as reply:
            lines = reply.read(_MOST_BYTES).decode(errors="replace").splitlines()
    except (OSError, HTTPException):
        return {}
    found: dict[str, float] = {}
    for line in lines:
        match = re.fullmatch(rf"{re.escape(prefix)}(\w+)_total(?:\{{(.*)\}})? (\S+)", line)
        if match is None or match[1] not in known or not float(match[3]):
            continue
        labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
        name = " ".join([match[1], *(labels.get(label, "") for label in known[match[1]])])
        found[name] = found.get(name, 0.0) + float(match[3])
    return found


def ask(url: str, model: str, text: str, max_tokens: int, timeout: float = ANSWER_SECONDS) -> Answer:
    """Greedy. Raises EngineTimeoutError, or EngineError with what the frontend said."""
    body = {
        "model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": max_tokens,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    began = time.monotonic()
    first: float | None = None
    said: list[str] = []
    usage: dict[str, Any] = {}
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            for line in reply:
                if time.monotonic() - began > timeout:
                    raise EngineTimeoutError(f"{url} has not ended its answer after {timeout:.0f} s")
                if not line.startswith(b"data: ") or b"[DONE]" in line:
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise EngineError(f"{url} answered with an error: {event['error']}")
                usage = event.get("usage") or usage
                for choice in event.get("choices", []):
                    if piece := (choice.get("delta") or {}).get("content"):
                        first = first or time.monotonic() - began
                        said.append(piece)
    except urllib.error.HTTPError as exc:
        raise EngineError(f"{url} answered {exc.code}: {exc.read(2000).decode(errors='replace')}") from exc
    except TimeoutError as exc:
        raise EngineTimeoutError(f"{url} has not answered after {timeout:.0f} s") from exc
    except (OSError, HTTPException, ValueError) as exc:
        raise EngineError(f"{url} could not be asked: {exc}") from exc
    if first is None:
        raise EngineError(f"{url} ended its answer without a token; the workers' logs may say why")
    details = usage.get("prompt_tokens_details") or {}
    return Answer(
        "".join(said), first, time.monotonic() - began, int(usage.get("prompt_tokens", 0)), details.get("cached_tokens")
    )
