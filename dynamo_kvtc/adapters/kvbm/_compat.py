"""Which KVBM is installed, and whether its private protocol is known. kvbm itself is imported by the modules next door
once this has said yes."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass

from dynamo_kvtc.errors import ConfigError, EngineVersionError, MissingDependencyError

SUPPORTED = ("1.4.2", "1.5.1", "1.6.1")
"""Releases whose leader the tests run for real, and whose recorded traces are in tests/fixtures/kvbm."""

_HOST, _PUB, _ACK = "DYN_KVBM_LEADER_ZMQ_HOST", "DYN_KVBM_LEADER_ZMQ_PUB_PORT", "DYN_KVBM_LEADER_ZMQ_ACK_PORT"


@dataclass(frozen=True)
class Endpoints:
    """Where the leader publishes, and where it takes answers."""

    publish: str
    answer: str


def require_kvbm() -> str:
    """The installed kvbm release. Raises MissingDependencyError, or EngineVersionError for one that is not known."""
    known = ", ".join(SUPPORTED)
    try:
        version = importlib.metadata.version("kvbm")
    except importlib.metadata.PackageNotFoundError as exc:
        raise MissingDependencyError(
            f"kvbm is not installed; this adapter needs one of {known}: pip install kvbm=={SUPPORTED[-1]}"
        ) from exc
    if version not in SUPPORTED:
        raise EngineVersionError(
            f"kvbm {version} is installed; the protocol between its leader and its workers is private, and this "
            f"release knows that of {known}: pip install kvbm=={SUPPORTED[-1]}, or turn this connector off"
        )
    return version


def endpoints() -> Endpoints:
    """The leader's endpoints from the environment variables that the leader itself reads. Raises ConfigError."""
    host = os.environ.get(_HOST, "127.0.0.1")
    publish, answer = _port(_PUB, 56001), _port(_ACK, 56002)
    if publish == answer:
        raise ConfigError(f"{_PUB} and {_ACK} are both {publish}; they must differ")
    return Endpoints(f"tcp://{host}:{publish}", f"tcp://{host}:{answer}")


def _port(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isascii() or not value.isdigit() or not 1 <= int(value) <= 65535:
        raise ConfigError(f"{name} is {value!r}; it must be a port of 1 to 65535 (default {default})")
    return int(value)
