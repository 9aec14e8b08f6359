"""What `kvtc bench store` measured, as a table and as Markdown for the README."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from dynamo_kvtc.bench.store import StoreRow

_COLUMNS = ("engine", "fill", "come and go", "get", "get, cold", "64 at once", "space", "reopen, s")


def table(rows: Sequence[StoreRow]) -> Table:
    out = Table(box=box.SIMPLE_HEAD)
    for column in _COLUMNS:
        out.add_column(column, justify="left" if column == "engine" else "right")
    for row in rows:
        out.add_row(*_cells(row))
    return out


def markdown(rows: Sequence[StoreRow]) -> str:
    """For the README."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|-" * len(_COLUMNS) + "|"]
    return "\n".join(lines + ["| " + " | ".join(_cells(row)) + " |" for row in rows]) + "\n"


def _cells(row: StoreRow) -> tuple[str, ...]:
    many = "" if row.get_many is None else f"{row.get_many:.2f}"
    return (
        row.engine, f"{row.fill:.2f}", f"{row.churn:.2f}", f"{row.get:.2f}", f"{row.get_cold:.2f}", many,
        f"{row.space:.2f}", f"{row.reopen_seconds:.2f}",
    )  # fmt: skip
