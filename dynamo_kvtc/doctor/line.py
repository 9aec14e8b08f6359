"""One line of the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "missing", "problem"]


@dataclass(frozen=True)
class Line:
    """found: what there is; remedy: what to do, empty if all is well."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> Line:
    return Line(name, "ok", found)


def missing(name: str, remedy: str, found: str = "not installed") -> Line:
    return Line(name, "missing", found, remedy)


def problem(name: str, found: str, remedy: str) -> Line:
    return Line(name, "problem", found, remedy)


def gib(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.1f} GiB"
