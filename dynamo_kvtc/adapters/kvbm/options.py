"""The connector's options: ``kv_connector_extra_config``, parsed once and strictly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dynamo_kvtc.errors import ConfigError

LONGEST_SECONDS = 86_400.0


@dataclass(frozen=True)
class Options:
    """mover: "package.module:function", called with a MoverContext; gives the BlockMover.
    mover_options: passed through to it, checked by it.
    handshake_seconds: how long to wait for the leader's handshake at start.
    half_seconds: an operation reaches a worker in two halves, from the leader and through the engine; how long the
        first one waits for the second before the blocks are given up.
    transfer_seconds: how long one transfer may take in the mover.
    """

    mover: str
    mover_options: Mapping[str, Any] = field(default_factory=dict)
    handshake_seconds: float = 300.0
    half_seconds: float = 60.0
    transfer_seconds: float = 30.0


def parse_options(extra: Mapping[str, Any]) -> Options:
    """Raises ConfigError naming the option, its value and what is allowed."""
    known = {f.name for f in fields(Options)}
    unknown = sorted(set(extra) - known)
    if unknown:
        raise ConfigError(
            f"kv_connector_extra_config has unknown options {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    mover = extra.get("mover")
    if not isinstance(mover, str) or not mover:
        raise ConfigError(f"kv_connector_extra_config.mover is {mover!r}; it must be 'package.module:function'")
    given = extra.get("mover_options", {})
    if not isinstance(given, Mapping):
        raise ConfigError(f"kv_connector_extra_config.mover_options is a {type(given).__name__}; it must be an object")
    seconds = {name: _seconds(name, extra[name]) for name in extra if name.endswith("_seconds")}
    return Options(mover=mover, mover_options=dict(given), **seconds)


def _seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= LONGEST_SECONDS:
        raise ConfigError(
            f"kv_connector_extra_config.{name} is {value!r}; it must be seconds above 0 and up to {LONGEST_SECONDS:.0f}"
        )
    return float(value)
