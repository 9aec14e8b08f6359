"""What `kvtc bench pull` measured, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from dynamo_kvtc.bench.pull import PullRow


def table(rows: Sequence[PullRow], title: str = "") -> Table:
    out = Table(box=box.SIMPLE_HEAD, title=title or None)
    for column in ("plane", "record, KB", "MB/s", "over plain TCP", "group 0 after", "CPU"):
        out.add_column(column, justify="left" if column == "plane" else "right")
    for row in rows:
        first = "" if row.first_group is None else f"{row.first_group:.0%}"
        out.add_row(
            f"{row.plane}, whole" if row.whole and row.plane != "plain" else row.plane,
            f"{row.record_bytes / 1e3:g}",
            f"{row.mb_s:.0f}",
            f"{row.over_plain:.2f}",
            first,
            f"{row.cpu:.2f}",
        )
    return out


def link_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Milliseconds."""
    out = Table(box=box.SIMPLE_HEAD, title=title)
    for column in ("Gbit/s", "over", "raw: first group", "raw: all", "coded: first group", "coded: all", "faster"):
        out.add_column(column, justify="left" if column == "over" else "right")
    for row in rows:
        times = [f"{1e3 * row[name]:.1f}" for name in ("raw_first_s", "raw_s", "coded_first_s", "coded_s")]
        out.add_row(f"{row['gbit']:g}", row["over"], *times, f"{row['faster']:.1f}x")
    return out
