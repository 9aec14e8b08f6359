"""The result of `kvtc eval`: one row per text and codec, as strict JSON and as tables."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from dynamo_kvtc import __version__
from dynamo_kvtc.codec.policy import ExactCounts
from dynamo_kvtc.evaluate.quality import Quality
from dynamo_kvtc.evaluate.selection import Selected
from dynamo_kvtc.evaluate.tasks import TaskResult

Row = dict[str, Any]


def row(data: str, selected: Selected, quality: Quality, tasks: Sequence[TaskResult], settings: Row) -> Row:
    """One row. A number that is not finite becomes None, since strict JSON has no NaN.

    codec: its name as asked for; data: the text source as given; artifact: None for raw and peers.
    ratio_coded: 16-bit bytes of the coded tokens over the bytes their records take; ratio_total: of all tokens over
    all bytes. kl, kl_stderr: nats per token. exact_by_reason: exact tokens over all sequences.
    bytes_over_entropy: see ``CodedBytes``. tasks: by name, the same in every row of the codec.
    settings: what all rows share (see ``run.settings``).
    """
    return _finite(
        {
            "codec": quality.codec,
            "data": data,
            "artifact": _artifact(selected),
            "ratio_coded": quality.ratio_coded,
            "ratio_total": quality.ratio_total,
            "kl": quality.kl,
            "kl_stderr": quality.kl_stderr,
            "ppl_ratio": quality.ppl_ratio,
            "top1": quality.top1,
            "n_sequences": quality.sequences,
            "scored_tokens": quality.scored_tokens,
            "coded_tokens": quality.coded.coded_tokens,
            "exact_by_reason": counts(quality.coded.exact),
            "bytes_over_entropy": quality.coded.bytes_over_entropy,
            "tasks": {result.task: _task(result) for result in tasks},
            **settings,
        }
    )


def counts(exact: ExactCounts) -> dict[str, int]:
    """Exact tokens by reason."""
    return {"policy": exact.policy, "nonfinite": exact.nonfinite, "error_bound": exact.error_bound}


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    out = {"dynamo-kvtc": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "numpy"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            out[package] = "none"
    return out


def to_json(rows: Sequence[Row]) -> str:
    """Strict JSON (RFC 8259: no NaN, no Infinity), a list of rows."""
    return json.dumps(list(rows), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def tables(rows: Sequence[Row]) -> list[Table]:
    """A table per text, a line per codec; then one of the tasks, if there are any."""
    sources = list(dict.fromkeys(r["data"] for r in rows))
    out = [_quality_table(source, [r for r in rows if r["data"] == source]) for source in sources]
    # Tasks are the same in every row of a codec, so the first text's rows have them all.
    answers = _task_table([r for r in rows if r["data"] == sources[0]])
    return out if answers is None else [*out, answers]


def _quality_table(source: str, rows: Sequence[Row]) -> Table:
    settings = rows[0]
    table = _table(
        f"{source}: {settings['n_sequences']} x {settings['context']} + {settings['continuation']} tokens of "
        f"{settings['model']}, {settings['sinks']} sinks and {settings['window']} last tokens exact",
        "codec", ("ratio", "total", "KL", "+-", "ppl", "top-1", "exact", "size/H"),
    )  # fmt: skip
    table.caption = (
        "ratio: of coded tokens; total: exact ones included; KL: nats per token, +- its standard error; "
        "ppl: perplexity over raw; size/H: bytes over their entropy"
    )
    for r in rows:
        exact = sum(r["exact_by_reason"].values())
        table.add_row(
            r["codec"], _show(r["ratio_coded"], ".2f"), _show(r["ratio_total"], ".2f"), _show(r["kl"], ".5f"),
            _show(r["kl_stderr"], ".5f"), _show(r["ppl_ratio"], ".4f"), _show(r["top1"], ".3f"),
            _show(exact / (exact + r["coded_tokens"]), ".1%"), _show(r["bytes_over_entropy"], ".3f"),
        )  # fmt: skip
    return table


def _task_table(rows: Sequence[Row]) -> Table | None:
    names = list(rows[0]["tasks"])
    if not names:
        return None
    table = _table("right answers after the coded context", "task", ("codec", "accuracy", "95%", "n", "KL", "ratio"))
    for name in names:
        for r in rows:
            t = r["tasks"][name]
            low, high = t["interval"]
            table.add_row(
                name, r["codec"], _show(t["accuracy"], ".3f"), f"{low:.3f}-{high:.3f}", str(t["n"]),
                _show(t["kl"], ".5f"), _show(t["ratio_coded"], ".2f"), end_section=r is rows[-1],
            )  # fmt: skip
    return table


def _table(title: str, first: str, rest: Sequence[str]) -> Table:
    # 80 columns must do: that is what a pipe or a log gives.
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column(first, overflow="fold")
    for heading in rest:
        table.add_column(heading, justify="left" if heading == "codec" else "right", no_wrap=heading != "codec")
    return table


def _artifact(selected: Selected) -> Row | None:
    if selected.source is None:
        return None
    manifest = selected.source.artifact.manifest
    return {
        "file": selected.source.path.name,
        "digest": manifest.digest,
        "profile": manifest.profile,
        "point": selected.point,
        "tp_size": manifest.tp_size,
        "block_tokens": manifest.block_tokens,
    }


def _task(result: TaskResult) -> Row:
    out: Row = {
        "accuracy": result.accuracy,
        "correct": result.correct,
        "n": result.n,
        "interval": list(result.interval),
        "kl": result.kl,
        "ratio_coded": result.coded.ratio_coded,
    }
    if result.by_group:
        out["by_depth"] = {group: {"correct": c, "n": n} for group, (c, n) in sorted(result.by_group.items())}
    return out


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
