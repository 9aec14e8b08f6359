"""The engine's demo as tables, as JSON and as a picture."""

from __future__ import annotations

import json
import platform
import statistics
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from dynamo_kvtc.codec.artifact import load_artifact
from dynamo_kvtc.demo.engine import WAYS, EngineDemoResult, seconds_of
from dynamo_kvtc.demo.report import figure_of
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.evaluate.report import versions

PLACES = ("device", "host", "disk", "computed")
"""Where the context of a second visit came from."""
_COLOURS = {"none": "#E69F00", "raw": "#0072B2", "kvtc": "#009E73"}


def summary(result: EngineDemoResult) -> dict[str, dict[str, Any]]:
    """Per way: medians of the time to the first token (None where there was no such visit), how many second visits
    found their context where, bytes held at the end, and what became of blocks."""
    out = {}
    for way in WAYS:
        r = result.ways[way]
        returns = [v for v in r.visits if v["visit"] == 1]
        out[way] = {
            "answered": sum(bool(v["answer_ids"]) for v in r.visits),
            "first_visit_ttft_seconds": statistics.median(seconds_of(r.visits, 0)),
            "return_ttft_seconds": statistics.median(seconds_of(r.visits, 1)),
            "return_ttft_seconds_by_place": {p: _median(seconds_of(r.visits, 1, p)) for p in PLACES},
            "returns_by_place": {p: sum(v["where"] == p for v in returns) for p in PLACES},
            "held_bytes": r.held["held"],
            "evicted_blocks": r.held["evicted"],
            "stored_blocks": r.held["stored_blocks"],
            "refused_blocks": r.held["refused_blocks"],
            "ratio": r.held["ratio"],
        }
    return out


def settings(result: EngineDemoResult) -> dict[str, Any]:
    """What the numbers depend on."""
    config = result.config
    artifact = load_artifact(result.artifact_path)
    point = artifact.manifest.points[artifact.point_index(config.point)]
    return {
        "model": result.model.identity.model_id,
        "dtype": config.dtype,
        "machine": platform.machine(),
        "sessions": config.sessions,
        "session_tokens_at_most": result.session_tokens,
        "raw_session_bytes": result.session_bytes,
        "device_blocks": result.device_blocks,
        "block_tokens": config.block_tokens,
        "host_bytes": result.host_bytes,
        "disk_bytes": result.disk_bytes,
        "artifact": result.artifact_path.name,
        "operating_point": point.name,
        "expected_ratio": point.expected_ratio,
        "seconds": result.seconds,
        "versions": versions(),
    }


def to_json(result: EngineDemoResult) -> str:
    """Strict JSON: {"settings", "ways": see ``summary``, each with its "visits"}. A visit's answer is text."""
    decode = result.model.tokenizer.decode
    ways: dict[str, Any] = {}
    for way, row in summary(result).items():
        visits = [
            {**{k: x for k, x in v.items() if k != "answer_ids"}, "answer": decode(v["answer_ids"]).strip()}
            for v in result.ways[way].visits
        ]
        ways[way] = {**row, "start_seconds": result.ways[way].start_seconds, "visits": visits}
    return json.dumps({"settings": settings(result), "ways": ways}, indent=1, allow_nan=False) + "\n"


def table(result: EngineDemoResult) -> Table:
    facts = settings(result)
    out = Table(
        title=f"{facts['sessions']} conversations of up to {facts['session_tokens_at_most']} tokens "
        f"({facts['raw_session_bytes'] / 1e6:.0f} MB each, {facts['dtype']}), {facts['model']}; device "
        f"{facts['device_blocks']} blocks of {facts['block_tokens']}, host {facts['host_bytes'] / 1e6:.0f} MB, disk "
        f"{facts['disk_bytes'] / 1e6:.0f} MB",
        caption="seconds to the first token, medians (how many): first visits, and second ones by where their context "
        "was found; MB that the tier holds at the end",
        title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1),
    )  # fmt: skip
    out.add_column("way", no_wrap=True)
    for heading in ("first", *PLACES, "host\nMB", "disk\nMB", "ratio"):
        out.add_column(heading, justify="right", no_wrap=True)
    for way, row in summary(result).items():
        first = len(seconds_of(result.ways[way].visits, 0))
        cells = [_cell(row["first_visit_ttft_seconds"], first)]
        cells += [_cell(row["return_ttft_seconds_by_place"][p], row["returns_by_place"][p]) for p in PLACES]
        held = row["held_bytes"]
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.1f}"
        out.add_row(way, *cells, f"{held['host'] / 1e6:.1f}", f"{held['disk'] / 1e6:.1f}", ratio)
    return out


def picture(result: EngineDemoResult, path: Path) -> None:
    """Two panels: time to first token by place, and where second visits found their context. Raises ConfigError."""
    figure = figure_of((9.5, 4))
    left, right = figure.subplots(1, 2)
    rows = summary(result)
    names = ("first visit", *PLACES)
    for x, (way, row) in enumerate(rows.items()):
        heights = [row["first_visit_ttft_seconds"], *(row["return_ttft_seconds_by_place"][p] for p in PLACES)]
        at = [i + (x - 1) * 0.27 for i in range(len(names))]
        left.bar(at, [h or 0.0 for h in heights], 0.27, color=_COLOURS[way], label=way)
        bottom = 0
        for place, shade in zip(PLACES, (1.0, 0.7, 0.45, 0.0), strict=True):
            count = row["returns_by_place"][place]
            if count:
                colour = _COLOURS[way] if shade else "#FFFFFF"
                right.bar(way, count, bottom=bottom, color=colour, alpha=shade or 1.0, edgecolor="#333333")
                right.annotate(place, (x, bottom + count / 2), ha="center", va="center")
            bottom += count
    left.set_xticks(range(len(names)), names)
    left.set(title="time to first token, medians", ylabel="seconds")
    left.legend(frameon=False)
    right.set(title="where second visits found their context", ylabel="visits")
    try:
        figure.savefig(path, dpi=150)
    except OSError as exc:
        raise ConfigError(f"{path} cannot be written: {exc.strerror}") from exc


def _median(seconds: list[float]) -> float | None:
    return statistics.median(seconds) if seconds else None


def _cell(seconds: float | None, count: int) -> str:
    return "-" if seconds is None else f"{seconds:.2f} ({count})"
