"""The connector's options: ``kv_connector_extra_config``, parsed once and strictly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.events.options import EventOptions, NatsOptions, parse_nats
from dynamo_kvtc.tier.options import MIB, TierOptions, parse_options
from dynamo_kvtc.transfer.options import PullOptions, ServeOptions
from dynamo_kvtc.transfer.plane import PLANES
from dynamo_kvtc.transfer.tcp import TcpOptions

WHERE = "kv_connector_extra_config"
ASYNC, LAYERWISE = "async", "layerwise"
_SECONDS = {"pull_seconds": (0.05, 600.0), "load_seconds": (0.1, 600.0), "handoff_seconds": (0.05, 600.0)}
_OWN = ("load", "trace", "nats", "planes", "tcp", "in_flight_mib", "leased_mib", "index_mib", "heartbeat_ttl_seconds")
_CLUSTER = (*_OWN[3:], "pull_seconds", "handoff_seconds")
_TCP = tuple(f.name for f in fields(TcpOptions))


@dataclass(frozen=True)
class ConnectorOptions:
    """The tier's own options (``tier.options.TierOptions``; no window), and beside them:

    load: "async": a request waits until all of its blocks are in the pages, others compute meanwhile. "layerwise": its
        first layers are computed while the last layer groups are still on their way; the step it is in waits for them.
    nats: where the cluster's NATS is (``events.options.NatsOptions``; what is missing is read from NATS_SERVER and
        DYN_NAMESPACE). Without it there is no cluster: the tier is this worker's alone.
    planes: how records travel, the one that is liked best first; tcp: of that plane (``transfer.tcp.TcpOptions``).
    pull_seconds: a block that has not come from other workers by then is computed; load_seconds: the same of getting
        blocks from the tier into the pages; handoff_seconds: how long a decode worker waits to hear what its prefill
        worker has.
    in_flight_mib: asked of others and not here yet; leased_mib: on lease for others; index_mib: of who holds what.
    heartbeat_ttl_seconds: a worker that is not heard of for so long is forgotten.
    trace: a file that a line of JSON is written to for each layer group that comes and each layer that is computed
        in a layerwise load; for tests and for looking.
    """

    tier: TierOptions
    load: str = ASYNC
    trace: str | None = None
    nats: NatsOptions | None = None
    planes: tuple[str, ...] = ("tcp", "nats")
    tcp: Mapping[str, Any] = field(default_factory=dict)
    pull_seconds: float = 5.0
    load_seconds: float = 30.0
    handoff_seconds: float = 2.0
    pull: PullOptions = field(default_factory=PullOptions)
    serve: ServeOptions = field(default_factory=ServeOptions)
    events: EventOptions = field(default_factory=EventOptions)


def parse_connector(extra: Mapping[str, Any]) -> ConnectorOptions:
    """Raises ConfigError naming the option, its value and what is allowed."""
    own = {name: value for name, value in extra.items() if name in _OWN or name in _SECONDS}
    tier = {name: value for name, value in extra.items() if name not in own}
    names = {f.name for f in fields(TierOptions)}
    unknown = sorted(set(tier) - names)
    if unknown:
        known = sorted((names - {"window"}) | set(_OWN) | set(_SECONDS))
        raise ConfigError(f"{WHERE} has unknown options {', '.join(unknown)}; known are {', '.join(known)}")
    if tier.get("window"):
        raise ConfigError(
            f"{WHERE}.window is {tier['window']!r}; this connector keeps no exact copies beside records: leave it out"
        )
    made: dict[str, Any] = {"tier": parse_options({**tier, "window": 0}, WHERE)}
    load = own.get("load", ASYNC)
    if load not in (ASYNC, LAYERWISE):
        raise ConfigError(f"{WHERE}.load is {load!r}; it must be {ASYNC!r} or {LAYERWISE!r}")
    made["load"] = load
    trace = own.get("trace")
    if trace is not None and (not isinstance(trace, str) or not trace):
        raise ConfigError(f"{WHERE}.trace is {trace!r}; it must be the path of a file to be written")
    made["trace"] = trace
    for name, (least, most) in _SECONDS.items():
        if name in own:
            made[name] = _number(name, own[name], least, most)
    if own.get("nats") is None:
        alone = sorted(set(own) & set(_CLUSTER))
        if alone:
            raise ConfigError(
                f"{WHERE} has {', '.join(alone)}, but no nats: without NATS no worker knows of others. Set nats "
                "({} takes NATS_SERVER and DYN_NAMESPACE), or leave them out"
            )
        return ConnectorOptions(**made)
    return ConnectorOptions(**made, **_cluster(own))


def _cluster(own: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(own["nats"], Mapping):
        raise ConfigError(f'{WHERE}.nats is {own["nats"]!r}; it must be an object such as {{"servers": "..."}}')
    out: dict[str, Any] = {"nats": parse_nats(own["nats"], f"{WHERE}.nats")}
    if "planes" in own:
        planes = own["planes"]
        named = isinstance(planes, list | tuple) and planes and all(p in PLANES for p in planes)
        if not named or len(set(planes)) != len(planes):
            raise ConfigError(f"{WHERE}.planes is {planes!r}; it must be a list of {', '.join(PLANES)}, each once")
        out["planes"] = tuple(planes)
    if "tcp" in own:
        tcp = own["tcp"]
        if not isinstance(tcp, Mapping) or set(tcp) - set(_TCP):
            raise ConfigError(f"{WHERE}.tcp is {tcp!r}; it must be an object of {', '.join(_TCP)}")
        if "tcp" not in out.get("planes", ("tcp",)):
            raise ConfigError(f"{WHERE}.tcp is set, and planes has no tcp: add it, or leave tcp out")
        out["tcp"] = dict(tcp)
    if "in_flight_mib" in own:
        pull = PullOptions()
        nbytes = int(_number("in_flight_mib", own["in_flight_mib"], 4, 1 << 16)) * MIB
        out["pull"] = replace(pull, in_flight_bytes=nbytes, ask_bytes=min(pull.ask_bytes, nbytes))
    if "leased_mib" in own:
        out["serve"] = ServeOptions(leased_bytes=int(_number("leased_mib", own["leased_mib"], 4, 1 << 16)) * MIB)
    events: dict[str, Any] = {}
    if "index_mib" in own:
        events["index_mib"] = int(_number("index_mib", own["index_mib"], 1, 1 << 16))
    if "heartbeat_ttl_seconds" in own:
        events["heartbeat_ttl_seconds"] = _number("heartbeat_ttl_seconds", own["heartbeat_ttl_seconds"], 0.2, 3600)
    if events:
        out["events"] = EventOptions(**events)
    return out


def _number(name: str, value: Any, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ConfigError(f"{WHERE}.{name} is {value!r}; it must be a number from {least:g} to {most:g}")
    return float(value)
