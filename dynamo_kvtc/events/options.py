"""Where the NATS server is, and how this process proves who it is. Environment first where Dynamo has a name for it."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dynamo_kvtc.errors import ConfigError

REQUIRED, DEGRADED = "required", "degraded"
TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What may stand between two dots of a subject: a namespace, a model key, a worker."""


@dataclass(frozen=True)
class NatsOptions:
    """servers: URLs, nats:// or tls://. Secrets are read from files (credentials, nkey_seed) or, as Dynamo does it,
    from the environment (NATS_AUTH_PASSWORD, NATS_AUTH_TOKEN); never from configuration.

    when_absent: "required" raises within connect_seconds, "degraded" serves locally and goes on trying to connect.
    pending_mib: bytes that wait to be sent at most; a publisher waits, or is refused, beyond.
    inbox_prefix: where answers arrive. Give each user one of its own, and permission for no other's, and nobody can
        read the answers to somebody else.
    """

    servers: tuple[str, ...] = ("nats://127.0.0.1:4222",)
    namespace: str = "dynamo"
    credentials: str | None = None
    nkey_seed: str | None = None
    user: str | None = None
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    connect_seconds: float = 10.0
    when_absent: str = REQUIRED
    pending_mib: int = 32
    inbox_prefix: str = "_INBOX"

    def __post_init__(self) -> None:
        if not self.servers:
            raise ConfigError("servers is empty; name a server, as nats://host:4222")
        for server in self.servers:
            if not re.fullmatch(r"(nats|tls)://[^\s/]+", server):
                raise ConfigError(f"server {server!r} is no NATS address; write nats://host:4222 or tls://host:4222")
        if not TOKEN.fullmatch(self.namespace):
            raise ConfigError(f"namespace is {self.namespace!r}; it must be 1 to 64 letters, digits, - or _")
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", self.inbox_prefix) or ".." in f".{self.inbox_prefix}.":
            raise ConfigError(f"inbox_prefix is {self.inbox_prefix!r}; it must be a subject without wildcards")
        if self.when_absent not in (REQUIRED, DEGRADED):
            raise ConfigError(f"when_absent is {self.when_absent!r}; it must be {REQUIRED!r} or {DEGRADED!r}")
        if not 0.1 <= self.connect_seconds <= 600:
            raise ConfigError(f"connect_seconds is {self.connect_seconds}; it must be 0.1 to 600 s")
        if not 1 <= self.pending_mib <= 4096:
            raise ConfigError(f"pending_mib is {self.pending_mib}; it must be 1 to 4096 MiB")
        if self.credentials and self.nkey_seed:
            raise ConfigError("credentials and nkey_seed are both set; a connection has one identity: set one of them")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError("tls_cert and tls_key go together; set both or neither")
        for name in ("credentials", "nkey_seed", "tls_ca", "tls_cert", "tls_key"):
            path = getattr(self, name)
            if path is not None and not (Path(path).is_file() and os.access(path, os.R_OK)):
                raise ConfigError(f"{name} is {path!r}, which is no file that can be read")

    @property
    def pending_bytes(self) -> int:
        return self.pending_mib << 20

    @property
    def tls(self) -> bool:
        return bool(self.tls_ca or self.tls_cert) or any(s.startswith("tls://") for s in self.servers)

    @property
    def told_servers(self) -> str:
        """For messages: no password in it."""
        return ", ".join(f"{s.partition('://')[0]}://{s.partition('://')[2].rpartition('@')[2]}" for s in self.servers)

    def for_client(self) -> dict[str, Any]:
        """What the client's library is told of it. Raises ConfigError if the TLS files are none."""
        made: dict[str, Any] = {
            "servers": [s.replace("nats://", "tls://", 1) if self.tls else s for s in self.servers],
            "inbox_prefix": self.inbox_prefix,
        }
        if self.credentials:
            made["user_credentials"] = self.credentials
        elif self.nkey_seed:
            made["nkeys_seed"] = self.nkey_seed
        elif self.user:
            made["user"], made["password"] = self.user, os.environ.get("NATS_AUTH_PASSWORD", "")
        elif os.environ.get("NATS_AUTH_TOKEN"):
            made["token"] = os.environ["NATS_AUTH_TOKEN"]
        if self.tls:
            try:
                context = ssl.create_default_context(cafile=self.tls_ca)
                if self.tls_cert:
                    context.load_cert_chain(self.tls_cert, self.tls_key)
            except (OSError, ssl.SSLError) as exc:
                raise ConfigError(f"the TLS files tls_ca, tls_cert, tls_key cannot be used: {exc}") from exc
            made["tls"] = context
        return made


@dataclass(frozen=True)
class EventOptions:
    """Of what a worker tells, and of what it remembers of others.

    heartbeat_ttl_seconds: a worker that was not heard of for so long is gone from every index; batch_events,
        batch_bytes, linger_seconds: a batch is sent when one of them is reached; queue_events: what waits to be sent at
        most, more is dropped and healed later; stream_*: what the server keeps for those who come late, and replicas of
        it in a cluster of servers; index_mib: memory of the index, about 18,000 entries in each MiB.
    """

    heartbeat_ttl_seconds: float = 6.0
    batch_events: int = 1024
    batch_bytes: int = 256 << 10
    linger_seconds: float = 0.005
    queue_events: int = 100_000
    stream_mib: int = 256
    stream_seconds: float = 3600.0
    stream_messages: int = 1_000_000
    replicas: int = 1
    index_mib: int = 64

    def __post_init__(self) -> None:
        for name, (least, most) in _EVENT_RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise ConfigError(f"{name} is {value!r}; it must be {least:g} to {most:g}")


_EVENT_RANGES: dict[str, tuple[float, float]] = {
    "heartbeat_ttl_seconds": (0.2, 3600), "batch_events": (1, 4096), "batch_bytes": (1024, 1 << 19),
    "linger_seconds": (0, 10), "queue_events": (16, 1 << 24), "stream_mib": (1, 1 << 20),
    "stream_seconds": (1, 1e7), "stream_messages": (1, 1 << 40), "replicas": (1, 5), "index_mib": (1, 1 << 16),
}  # fmt: skip

_KINDS: dict[str, tuple[type, ...]] = {
    "namespace": (str,), "credentials": (str,), "nkey_seed": (str,), "user": (str,), "tls_ca": (str,),
    "tls_cert": (str,), "tls_key": (str,), "connect_seconds": (int, float), "when_absent": (str,),
    "pending_mib": (int,), "inbox_prefix": (str,),
}  # fmt: skip
_ENVIRONMENT = {
    "servers": "NATS_SERVER", "namespace": "DYN_NAMESPACE", "credentials": "NATS_AUTH_CREDENTIALS_FILE",
    "user": "NATS_AUTH_USERNAME",
}  # fmt: skip


def parse_nats(given: Mapping[str, Any], where: str, environment: Mapping[str, str] | None = None) -> NatsOptions:
    """``where`` names the mapping in errors. What it lacks comes from NATS_SERVER, DYN_NAMESPACE,
    NATS_AUTH_CREDENTIALS_FILE and NATS_AUTH_USERNAME, where they are set. Raises ConfigError."""
    environment = os.environ if environment is None else environment
    known = [f.name for f in fields(NatsOptions)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(f"{where} has unknown options {', '.join(unknown)}; known are {', '.join(known)}")
    values = {name: environment[var] for name, var in _ENVIRONMENT.items() if environment.get(var)} | dict(given)
    try:
        if "servers" in values:
            values["servers"] = _servers(values["servers"])
        for name, kinds in _KINDS.items():
            value = values.get(name)
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                raise ConfigError(f"{name} is {value!r}; it must be a {' or '.join(k.__name__ for k in kinds)}")
        return NatsOptions(**values)
    except ConfigError as exc:
        raise ConfigError(f"{where}: {exc}") from exc


def _servers(value: Any) -> tuple[str, ...]:
    listed = value.split(",") if isinstance(value, str) else value
    if not isinstance(listed, list | tuple) or not all(isinstance(s, str) for s in listed):
        raise ConfigError(f"servers is {value!r}; it must be a text, with commas between several, or a list of texts")
    return tuple(s if "://" in s else f"nats://{s}" for s in (one.strip() for one in listed) if s)
