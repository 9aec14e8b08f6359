"""What an operator may set: parsed once, refused at start, with the value, what is allowed and the remedy."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from dynamo_kvtc.errors import ConfigError

GIB, MIB = 1 << 30, 1 << 20
EXACT = ("sinks", "all")
WEIGHTS = "verify"


@dataclass(frozen=True)
class TierOptions:
    """artifact: path of the calibration artifact; point: its operating point (default: its only one).
    exact: "sinks" stores the first ``sinks`` tokens of a sequence bit-exact, "all" every token (nothing is lost).
    window: tokens at a sequence's end that are kept bit-exact beside their coded records while the host has memory that
        nothing else wants (0: none). None: 128 where an adapter knows where a sequence ends and a record holds a block.
    host_gib, disk_gib: hard budgets, at least one above 0; disk_path: a folder of this process alone.
    write_through: what is stored goes to disk at once, so that a restart finds it; else only what leaves the host does.
    promote_on: 1 or 2, the hit on disk that brings a record to the host.
    queue_mib: of raw blocks that wait to be coded; a full queue refuses.
    min_tokens: shorter sequences are not stored; store_on_use: a block is stored when it is offered this often.
    prefill_tokens_per_second: what the engine computes; with it a load that would take longer than computing is
        declined. None: never declined.
    read_seconds: when a read from disk is given up; close_seconds: what an orderly end may take.
    weights: "verify" compares the model's weights with the artifact's at start; or their digest, if it is known.
    """

    artifact: str
    point: str | None = None
    exact: str = "sinks"
    sinks: int = 4
    window: int | None = None
    host_gib: float = 0.0
    disk_gib: float = 0.0
    disk_path: str | None = None
    write_through: bool = False
    promote_on: int = 1
    queue_mib: int = 512
    min_tokens: int = 0
    store_on_use: int = 1
    prefill_tokens_per_second: float | None = None
    read_seconds: float = 1.0
    close_seconds: float = 10.0
    weights: str = WEIGHTS

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            _check_kind(name, getattr(self, name), kind)
        for name, (least, most, unit) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ConfigError(f"{name} is {value}; it must be {least:g} to {most:g}{unit}")
        if self.exact not in EXACT:
            raise ConfigError(f"exact is {self.exact!r}; it must be one of {', '.join(map(repr, EXACT))}")
        if self.weights != WEIGHTS and not _is_digest(self.weights):
            raise ConfigError(
                f"weights is {self.weights!r}; it must be {WEIGHTS!r} or a sha256 of 64 hex digits, as `kvtc inspect` "
                "shows it"
            )
        if not self.host_gib and not self.disk_gib:
            raise ConfigError("host_gib and disk_gib are both 0: give the tier memory, disk or both")
        if self.window and (not self.host_gib or self.exact == "all"):
            raise ConfigError(
                f"window is {self.window}, host_gib {self.host_gib:g} and exact {self.exact!r}: exact copies are kept "
                "in host memory, beside coded records: give the host memory, or set window to 0"
            )
        if bool(self.disk_gib) != (self.disk_path is not None):
            raise ConfigError(
                f"disk_gib is {self.disk_gib:g} and disk_path is {self.disk_path!r}: a disk tier needs both, no disk "
                "tier neither"
            )

    @property
    def host_bytes(self) -> int:
        return int(self.host_gib * GIB)

    @property
    def disk_bytes(self) -> int:
        return int(self.disk_gib * GIB)

    @property
    def queue_bytes(self) -> int:
        return self.queue_mib * MIB


_KINDS: dict[str, type] = {
    "artifact": str, "point": str, "exact": str, "disk_path": str, "weights": str, "write_through": bool,
    "sinks": int, "window": int, "promote_on": int, "queue_mib": int, "min_tokens": int, "store_on_use": int,
    "host_gib": float, "disk_gib": float, "prefill_tokens_per_second": float, "read_seconds": float,
    "close_seconds": float,
}  # fmt: skip
_OPTIONAL = ("point", "window", "disk_path", "prefill_tokens_per_second")
_RANGES: dict[str, tuple[float, float, str]] = {
    "sinks": (0, 1024, " tokens"), "window": (0, 1 << 16, " tokens"), "host_gib": (0, 1 << 20, " GiB"),
    "disk_gib": (0, 1 << 20, " GiB"),
    "promote_on": (1, 2, ""), "queue_mib": (1, 1 << 20, " MiB"), "min_tokens": (0, 1 << 24, " tokens"),
    "store_on_use": (1, 16, " uses"), "prefill_tokens_per_second": (1, 1e9, ""), "read_seconds": (0.01, 60, " s"),
    "close_seconds": (0.1, 600, " s"),
}  # fmt: skip


def parse_options(given: Mapping[str, Any], where: str) -> TierOptions:
    """``where`` names the mapping in errors. Raises ConfigError: unknown, missing, of a wrong kind or out of range."""
    known = {f.name for f in fields(TierOptions)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ConfigError(f"{where} has unknown options {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    missing = [f.name for f in fields(TierOptions) if f.default is MISSING and f.name not in given]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}: the path of an artifact made by `kvtc calibrate`")
    try:
        values: dict[str, Any] = {n: float(v) if _KINDS[n] is float and _whole(v) else v for n, v in given.items()}
        return TierOptions(**values)
    except ConfigError as exc:
        raise ConfigError(f"{where}: {exc}") from exc


def check_memory(options: TierOptions, available_bytes: int | None = None) -> None:
    """Raises ConfigError if the host budget is more than what this machine has free."""
    free = available_memory() if available_bytes is None else available_bytes
    if free is not None and options.host_bytes + options.queue_bytes > free:
        raise ConfigError(
            f"host_gib {options.host_gib:g} and queue_mib {options.queue_mib} are {options.host_bytes >> 20} + "
            f"{options.queue_mib} MiB; this machine has {free >> 20} MiB available: lower them"
        )


def available_memory() -> int | None:
    """Bytes that can be taken without swapping, the process's control group considered; None if nobody says."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
        most, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        if most != "max":
            found.append(int(most) - int(used))
    except (OSError, ValueError, IndexError):
        pass
    return min(found, default=None)


def disk_folder(options: TierOptions, rank: int) -> Path:
    """The folder of a rank's disk tier: each has one of its own. Raises ConfigError if it cannot be made."""
    assert options.disk_path is not None
    path = Path(options.disk_path).expanduser()
    try:
        path.mkdir(exist_ok=True)
    except OSError as exc:
        raise ConfigError(
            f"disk_path {path}: {os.strerror(exc.errno or 0)}; name a folder that can be written"
        ) from exc
    return path / f"rank{rank}"


def _check_kind(name: str, value: Any, kind: type) -> None:
    if value is None and name in _OPTIONAL:
        return
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind is float:
        fits = _whole(value) or (isinstance(value, float) and math.isfinite(value))
    if not fits:
        raise ConfigError(f"{name} is {value!r}; it must be {_TOLD[kind]}")


_TOLD = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_digest(text: str) -> bool:
    return len(text) == 64 and all(c in "0123456789abcdef" for c in text)
