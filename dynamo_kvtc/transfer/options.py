"""What an operator may set of a transfer: checked when it is made, with the value and what is allowed."""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.store import MAX_RECORD_BYTES

MIB = 1 << 20


@dataclass(frozen=True)
class Peers:
    """Who belongs together: a holder answers askers of its own namespace and model key, and no others."""

    namespace: str
    model: str

    def __post_init__(self) -> None:
        for name in ("namespace", "model"):
            value = getattr(self, name)
            if not isinstance(value, str) or not 1 <= len(value) <= 256:
                raise ConfigError(f"{name} is {value!r}; it must be a text of 1 to 256 characters")


@dataclass(frozen=True)
class ServeOptions:
    """leased_bytes: of records on lease for askers, all asks together. asks: answered at once; more are told to come
    back. stall_seconds: how long an asker may take no frame before it is given up and its leases end; ask_seconds: how
    long an answer may take in all."""

    leased_bytes: int = 256 * MIB
    asks: int = 32
    stall_seconds: float = 2.0
    ask_seconds: float = 30.0

    def __post_init__(self) -> None:
        _at_least("leased_bytes", self.leased_bytes, MAX_RECORD_BYTES)
        _at_least("asks", self.asks, 1)
        _above_zero(self, "stall_seconds", "ask_seconds")


@dataclass(frozen=True)
class PullOptions:
    """in_flight_bytes: asked for and not here yet, all pulls together. ask_bytes: of one ask at most; lanes: asks at
    once of one pull to one holder. record_bytes, pull_bytes: what a record and a pull may have at most.
    connect_seconds, silence_seconds, ask_seconds: how long a holder may take to be reached, to send the next frame, and
    to answer an ask. attempts: of a piece with one holder. avoid_seconds: how long a holder that failed, or its plane
    that did not connect, comes last."""

    in_flight_bytes: int = 64 * MIB
    ask_bytes: int = 8 * MIB
    lanes: int = 1
    record_bytes: int = MAX_RECORD_BYTES
    pull_bytes: int = 1024 * MIB
    connect_seconds: float = 1.0
    silence_seconds: float = 1.0
    ask_seconds: float = 10.0
    attempts: int = 4
    avoid_seconds: float = 5.0

    def __post_init__(self) -> None:
        for name in ("ask_bytes", "lanes", "record_bytes", "attempts"):
            _at_least(name, getattr(self, name), 1)
        _at_least("in_flight_bytes", self.in_flight_bytes, self.record_bytes)
        _at_least("pull_bytes", self.pull_bytes, self.record_bytes)
        if self.record_bytes > MAX_RECORD_BYTES:
            raise ConfigError(f"record_bytes is {self.record_bytes}; a store takes at most {MAX_RECORD_BYTES}")
        _above_zero(self, "connect_seconds", "silence_seconds", "ask_seconds", "avoid_seconds")


def _at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {least}")


def _above_zero(options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ConfigError(f"{name} is {value!r}; it must be a number of seconds above 0")
