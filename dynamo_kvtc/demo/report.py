"""The conversation as tables, as JSON and as a picture."""

from __future__ import annotations

import importlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rich import box
from rich.table import Table

from dynamo_kvtc.demo.conversation import Turn, WayTurn
from dynamo_kvtc.errors import ConfigError, MissingDependencyError

# In the order of showing.
_COLOURS = {"recompute": "#E69F00", "raw": "#0072B2", "kvtc": "#009E73"}
_ANSWER_CHARS = 240


def summary(turns: Sequence[Turn]) -> dict[str, dict[str, Any]]:
    """Per way: bytes held (largest, and after the last turn), seconds, KL and top-1 agreement against raw.

    The median of the time to first token and the means of decode and encode leave out the first turn, which begins
    with nothing held in any way. kl (nats per token) and top1 are over all tokens of the turns that have them; None
    for raw.
    """
    out: dict[str, dict[str, Any]] = {}
    for name in (name for name in _COLOURS if name in turns[0].ways):
        of = [turn.ways[name] for turn in turns]
        later = of[1:] or of
        found = [w.divergence for w in of if w.divergence is not None]
        tokens = sum(d.tokens for d in found)
        out[name] = {
            "held_bytes_max": max(w.held_bytes for w in of),
            "held_bytes_end": of[-1].held_bytes,
            "first_token_seconds": [w.first_token_seconds for w in of],
            "first_token_seconds_median": statistics.median(w.first_token_seconds for w in later),
            "restore_seconds_mean": statistics.mean(w.restore_seconds for w in later),
            "keep_seconds_mean": statistics.mean(w.keep_seconds for w in later),
            "kl": sum(d.kl for d in found) / tokens if tokens else None,
            "top1": sum(d.same_top1 for d in found) / tokens if tokens else None,
            "compared_tokens": tokens,
        }
    return out


def to_json(turns: Sequence[Turn], settings: dict[str, Any]) -> str:
    """Strict JSON: {"settings", "ways": see ``summary``, "turns": each with its ways}."""
    rows = [
        {
            "question": turn.question,
            "context_tokens": turn.context_tokens,
            "prompt_tokens": turn.prompt_tokens,
            "ways": {name: _way(way) for name, way in turn.ways.items()},
        }
        for turn in turns
    ]
    content = {"settings": settings, "ways": summary(turns), "turns": rows}
    return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def tables(turns: Sequence[Turn], settings: dict[str, Any]) -> list[Table]:
    """Bytes, times and quality per way; then the answers side by side."""
    held = turns[-1].context_tokens + turns[-1].prompt_tokens
    main = Table(
        title=f"{len(turns)} turns, up to {held} tokens of context; {settings['model']}, {settings['threads']} threads",
        caption="held: between turns; first token: median of turns 2 on, decode included; decode, encode: mean of "
        "those turns; KL (nats per token) and top-1: on the raw way's answers, against it",
        title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1),
    )  # fmt: skip
    main.add_column("way")
    for heading in ("held MB", "at the end", "first token", "decode", "encode", "KL", "top-1"):
        main.add_column(heading, justify="right", no_wrap=True)
    for name, row in summary(turns).items():
        main.add_row(
            name, f"{row['held_bytes_max'] / 1e6:.1f}", f"{row['held_bytes_end'] / 1e6:.1f}",
            f"{row['first_token_seconds_median']:.2f} s", f"{row['restore_seconds_mean']:.2f} s",
            f"{row['keep_seconds_mean']:.2f} s", _show(row["kl"], ".5f"), _show(row["top1"], ".3f"),
        )  # fmt: skip
    by_turn = Table(title="first token by turn, seconds", title_justify="left", box=box.SIMPLE_HEAD)
    by_turn.add_column("way")
    for number in range(len(turns)):
        by_turn.add_column(f"turn {number + 1}", justify="right")
    for name, row in summary(turns).items():
        by_turn.add_row(name, *(f"{seconds:.2f}" for seconds in row["first_token_seconds"]))
    answers = Table(title="answers", title_justify="left", box=box.SIMPLE_HEAD, show_lines=True)
    answers.add_column("question")
    names = list(summary(turns))
    for name in names:
        answers.add_column(name)
    for turn in turns:
        answers.add_row(turn.question, *(_short(turn.ways[name].answer) for name in names))
    return [main, by_turn, answers]


def check_picture() -> None:
    """Raises MissingDependencyError, before there is anything to draw, if matplotlib is absent."""
    _matplotlib("figure")


def figure_of(inches: tuple[float, float]) -> Any:
    """An empty figure of matplotlib's. Raises MissingDependencyError."""
    return _matplotlib("figure").Figure(figsize=inches, layout="constrained")


def picture(turns: Sequence[Turn], path: Path) -> None:
    """Two panels: bytes held at most, and time to first token by turn. Raises ConfigError if it cannot be written."""
    figure = figure_of((9.5, 4))
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    rows = summary(turns)
    for x, (name, row) in enumerate(rows.items()):
        megabytes = row["held_bytes_max"] / 1e6
        left.bar(x, megabytes, color=_COLOURS[name])
        left.annotate(f"{megabytes:.1f}", (x, megabytes), ha="center", va="bottom")
        width = 0.8 / len(rows)
        at = [turn + (x - (len(rows) - 1) / 2) * width for turn in range(1, len(turns) + 1)]
        right.bar(at, row["first_token_seconds"], width, color=_COLOURS[name], label=name)
    left.set_xticks(range(len(rows)), list(rows))
    left.set(title="held between turns, at most", ylabel="MB")
    right.set_xticks(range(1, len(turns) + 1))
    right.set(title="time to first token", xlabel="turn", ylabel="seconds")
    # Room above the bars for the legend.
    right.margins(y=0.25)
    right.legend(frameon=False, ncols=3, loc="upper center")
    try:
        figure.savefig(path, dpi=150)
    except OSError as exc:
        raise ConfigError(f"{path} cannot be written: {exc.strerror}") from exc


def _way(way: WayTurn) -> dict[str, Any]:
    d = way.divergence
    return {
        "first_token_seconds": way.first_token_seconds,
        "restore_seconds": way.restore_seconds,
        "keep_seconds": way.keep_seconds,
        "held_bytes": way.held_bytes,
        "answer": way.answer,
        "kl": d.kl / d.tokens if d else None,
        "top1": d.same_top1 / d.tokens if d else None,
    }


def _short(text: str) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= _ANSWER_CHARS else one_line[: _ANSWER_CHARS - 3] + "..."


def _show(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _matplotlib(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as exc:
        raise MissingDependencyError(
            f"the demo's picture needs the package matplotlib ({exc}); install it with: pip install dynamo-kvtc[model]"
        ) from exc
