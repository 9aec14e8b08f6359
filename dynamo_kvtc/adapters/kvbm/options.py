"""The connector's options: ``kv_connector_extra_config``, parsed once and strictly.

Budgets are not among them: KVBM's leader and its workers read them from the same variables (budget.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.tier import options as tier_options
from dynamo_kvtc.tier.options import TierOptions

WHERE = "kv_connector_extra_config"
LONGEST_SECONDS = 86_400.0
TIER_MOVER = "dynamo_kvtc.adapters.kvbm.tier_mover:open_mover"
TIER_NAMES = ("artifact", "point", "exact", "sinks", "weights", "queue_mib", "read_seconds", "disk_path")
"""Options of the tier that mean something where KVBM decides what is stored and where."""
_BUDGETS = {"host_gib": "DYN_KVBM_CPU_CACHE_GB", "disk_gib": "DYN_KVBM_DISK_CACHE_GB"}


@dataclass(frozen=True)
class Options:
    """mover: what moves blocks; by default the coding tier, whose options are ``mover_options``.
    handshake_seconds: how long to wait for the leader's handshake at start.
    half_seconds: an operation reaches a worker in two halves, from the leader and through the engine; how long the
        first one waits for the second before the blocks are given up.
    transfer_seconds: how long one transfer may take in the mover.
    """

    mover: str = TIER_MOVER
    mover_options: Mapping[str, Any] = field(default_factory=dict)
    handshake_seconds: float = 300.0
    half_seconds: float = 60.0
    transfer_seconds: float = 30.0


@dataclass(frozen=True)
class CodingOptions:
    """What the coding tier takes of kv_connector_extra_config.

    given: ``TIER_NAMES`` as they were set, checked; block_bytes: what the leader divides its budgets by, in place of
    what is reckoned from the artifact.
    """

    given: Mapping[str, Any]
    block_bytes: int | None = None

    def tier(self, host_bytes: int, disk_bytes: int, disk_path: str | None) -> TierOptions:
        """Raises ConfigError. disk_path: where there is a disk budget and no path was set."""
        gib = tier_options.GIB
        known: dict[str, Any] = {"host_gib": host_bytes / gib, "disk_gib": disk_bytes / gib}
        given = {name: value for name, value in self.given.items() if name != "disk_path" or disk_bytes}
        if disk_bytes:
            known["disk_path"] = disk_path
        return tier_options.parse_options({**known, **given}, WHERE)

    @property
    def queue_is_set(self) -> bool:
        return "queue_mib" in self.given


def parse_options(extra: Mapping[str, Any]) -> Options:
    """Raises ConfigError naming the option, its value and what is allowed."""
    own = {f.name for f in fields(Options)}
    if "mover" not in extra:
        own -= {"mover", "mover_options"}
    coding = {*TIER_NAMES, "block_bytes"} if "mover" not in extra else set()
    unknown = sorted(set(extra) - own - coding)
    if unknown:
        raise ConfigError(
            f"{WHERE} has unknown options {', '.join(unknown)}{_remedy(unknown)}; known are "
            f"{', '.join(sorted(own | coding))}"
        )
    seconds = {name: _seconds(name, extra[name]) for name in extra if name in own and name.endswith("_seconds")}
    if "mover" not in extra:
        given = {name: extra[name] for name in extra if name in coding}
        parse_coding(given)
        return Options(TIER_MOVER, given, **seconds)
    mover = extra["mover"]
    if not isinstance(mover, str) or not mover:
        raise ConfigError(f"{WHERE}.mover is {mover!r}; it must be 'package.module:function'")
    options = extra.get("mover_options", {})
    if not isinstance(options, Mapping):
        raise ConfigError(f"{WHERE}.mover_options is a {type(options).__name__}; it must be an object")
    return Options(mover, dict(options), **seconds)


def parse_coding(given: Mapping[str, Any]) -> CodingOptions:
    """Raises ConfigError."""
    tier = dict(given)
    size = tier.pop("block_bytes", None)
    if size is not None and (type(size) is not int or not 1 <= size < 1 << 40):
        raise ConfigError(f"{WHERE}.block_bytes is {size!r}; it must be a whole number of bytes, 1 or more")
    options = CodingOptions(tier, size)
    # Kinds and ranges are the tier's to judge: with some budget, for the real one is known later.
    options.tier(tier_options.GIB, tier_options.GIB if "disk_path" in tier else 0, None)
    return options


def _remedy(unknown: list[str]) -> str:
    budgets = [f"{name} is set by {_BUDGETS[name]}" for name in unknown if name in _BUDGETS]
    leaders = [
        name
        for name in unknown
        if name in {f.name for f in fields(TierOptions)} - {*TIER_NAMES} and name not in _BUDGETS
    ]
    told = budgets + ([f"{', '.join(leaders)}: KVBM's leader decides what is stored and where"] if leaders else [])
    return f" ({'; '.join(told)})" if told else ""


def _seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= LONGEST_SECONDS:
        raise ConfigError(f"{WHERE}.{name} is {value!r}; it must be seconds above 0 and up to {LONGEST_SECONDS:.0f}")
    return float(value)
