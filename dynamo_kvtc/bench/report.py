"""What `kvtc bench codec` measured: as a table, as Markdown for the README, as a picture of the stages."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rich import box
from rich.table import Table

from dynamo_kvtc.errors import ConfigError, MissingDependencyError

Row = dict[str, Any]

_COLUMNS = (
    "shape", "tokens", "ratio", "rank", "raw copy in", "restore", "faster", "first group", "raw copy out", "encode",
    "faster", "prefill", "512 tokens",
)  # fmt: skip
_COLOURS = {
    "checksum": "#56B4E9", "rANS": "#E69F00", "DEFLATE": "#E69F00", "rotations": "#999999", "project": "#009E73",
    "quantise": "#F0E442", "dequantise": "#F0E442", "gather": "#CC79A7", "pack": "#D55E00", "exact": "#000000",
}  # fmt: skip
_LEFT_OUT = ("encode", "decode")
"""Marks between stages: the host's time."""


def table(rows: Sequence[Row]) -> Table:
    """For a terminal."""
    out = Table(box=box.SIMPLE_HEAD)
    for column in _COLUMNS:
        out.add_column(column, justify="left" if column == "shape" else "right")
    for row in rows:
        out.add_row(*_cells(row))
    return out


def markdown(rows: Sequence[Row]) -> str:
    """For the README: the table that its performance section holds, generated, never written by hand."""
    lines = [" | ".join(("", *_COLUMNS, "")).strip(), "|-" * len(_COLUMNS) + "|"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def stages(row: Row) -> list[tuple[str, str, float, float | None]]:
    """(direction, stage, seconds, seconds of its floor or None) of a row, in the order they run."""
    out = []
    for direction in ("decode", "encode"):
        for name, seconds in row[f"{direction}_stages_s"].items():
            if name not in _LEFT_OUT:
                out.append((direction, name, seconds, row["floors_s"].get(f"{direction} {name}")))
    return out


def stage_table(row: Row) -> Table:
    """Each stage against the least it can take."""
    out = Table(title=f"{row['shape']}, {row['tokens']} tokens at {row['ratio']:g}x", box=box.SIMPLE_HEAD)
    for column in ("", "stage", "ms", "floor", "over it"):
        out.add_column(column, justify="left" if column in ("", "stage") else "right")
    for direction, name, seconds, floor in stages(row):
        over = "" if floor is None else f"{seconds / floor:.2f}"
        out.add_row(direction, name, _ms(seconds), "" if floor is None else _ms(floor), over)
    return out


def plot(rows: Sequence[Row], path: Path) -> None:
    """Stacked bars of the stages and the host's time as shares of the raw copy's. Raises ConfigError."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {path}: the ending must be one of .png, .svg, .pdf")
    figure = _matplotlib("figure").Figure(figsize=(4.0 + 2.2 * len(rows), 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, direction, raw in zip(panels, ("decode", "encode"), ("raw_h2d_s", "raw_d2h_s"), strict=True):
        seen: set[str] = set()
        for i, row in enumerate(rows):
            parts = [(name, seconds) for of, name, seconds, _ in stages(row) if of == direction]
            parts.append(("host, launches", max(0.0, row[f"{direction}_s"] - sum(s for _, s in parts))))
            bottom = 0.0
            for name, seconds in parts:
                height = seconds / row[raw]
                label = None if name in seen else name
                panel.bar(i, height, 0.6, bottom=bottom, color=_COLOURS.get(name, "#BBBBBB"), label=label)
                seen.add(name)
                bottom += height
            panel.text(i, bottom + 0.02, f"{_ms(row[f'{direction}_s'])} ms", ha="center", fontsize=8)
        panel.axhline(1.0, color="black", linestyle="--", linewidth=1)
        labels = [f"{_cells(row)[0]}\n{row['tokens']:,} tokens, {row['ratio']:g}x" for row in rows]
        panel.set_xticks(range(len(rows)), labels, fontsize=8)
        panel.set_title({"decode": "records to finished cache", "encode": "cache to records"}[direction])
    panels[0].set_ylabel("time over the raw copy's (dashed)")
    panels[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    try:
        figure.savefig(path, dpi=150)
    except OSError as exc:
        raise ConfigError(f"--plot {path}: cannot be written: {exc.strerror}") from exc


def _cells(row: Row) -> tuple[str, ...]:
    real = row["raw_bytes"] / row["record_bytes"]
    prefill = row.get("prefill_s")
    requests = f"{row['requests']} x " if row["requests"] > 1 else ""
    profile = "" if row["profile"] == "kvtc" else f", {row['profile']}"
    return (
        row["shape"] + profile, f"{requests}{row['tokens'] // row['requests']:,}", f"{real:.1f}",
        " / ".join(str(r) for r in row["rank"]), _ms(row["raw_h2d_s"]), _ms(row["decode_s"]),
        f"{row['raw_h2d_s'] / row['decode_s']:.2f}x", _ms(row["first_group_s"]), _ms(row["raw_d2h_s"]),
        _ms(row["encode_s"]), f"{row['raw_d2h_s'] / row['encode_s']:.2f}x", "" if prefill is None else _ms(prefill),
        _ms(row["small_decode_s"]),
    )  # fmt: skip


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}" if seconds < 0.0995 else f"{1e3 * seconds:,.0f}"


def _matplotlib(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"matplotlib.{name}")
    except ImportError as exc:
        raise MissingDependencyError("the picture needs matplotlib: pip install dynamo-kvtc[model]") from exc
