"""What a manifest's components become on this machine: processes, and every change that makes them fit, told.

Arguments and environment are the manifest's own, but for

    paths       of mounted volumes, which are folders here
    network     everything listens on the loopback interface, on free ports; discovery goes through a folder, and where
                the manifest names NATS it is a server that is started here
    CPU         what a build of vLLM for CPUs needs, and budgets that fit beside other programs
    asked for   what the command line sets
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.up.manifest import Component, Manifest
from dynamo_kvtc.up.settings import CONNECTOR, EXTRA, FLAG, module_of, read_settings

LOOPBACK = "127.0.0.1"
BLOCK_TOKENS = "32"
WORKER, FRONTEND = "dynamo.vllm", "dynamo.frontend"
CPU_FLAGS = {
    # Compiled CPU runs of this release gave a wrong answer.
    "--enforce-eager": None,
    # A CPU's blocks are a multiple of 32 tokens.
    "--block-size": BLOCK_TOKENS,
    # Many CPUs have no bfloat16 arithmetic, and take several times as long with it.
    "--dtype": "float32",
    "--max-model-len": "2048",
    "--max-num-seqs": "4",
    "--distributed-executor-backend": "uni",
    "--tensor-parallel-size": "1",
}
ONLY_IF_THERE = ("--tensor-parallel-size",)
CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    # With "uni": the worker beside the scheduler, as on one GPU; native offloading needs it there. On CPUs it is a
    # process of its own otherwise.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
LOCAL = {
    "DYN_TCP_RESPONSE_STREAM_HOST": LOOPBACK, "DYN_TCP_RPC_HOST": LOOPBACK, "DYN_SYSTEM_HOST": LOOPBACK,
    "VLLM_HOST_IP": LOOPBACK, "VLLM_LOOPBACK_IP": LOOPBACK,
}  # fmt: skip
BUDGETS = {"host_gib": 0.25, "disk_gib": 0.5}
# What a GPU codes in milliseconds takes a CPU seconds, and the first time it compiles.
PATIENCE = {"handoff_seconds": 60.0, "pull_seconds": 60.0, "load_seconds": 120.0}
KVBM_BUDGETS = {"DYN_KVBM_CPU_CACHE_GB": 0.25, "DYN_KVBM_DISK_CACHE_GB": 0.5}
KVBM_PORTS = ("DYN_KVBM_LEADER_ZMQ_PUB_PORT", "DYN_KVBM_LEADER_ZMQ_ACK_PORT", "DYN_KVBM_METRICS_PORT")
_INHERITED_NOT = ("DYN_", "VLLM_", "NATS_", "ETCD_", "KV_")


@dataclass(frozen=True)
class Machine:
    """python: the interpreter that has Dynamo; folder: of this run alone, short (sockets are in it); mounts: path in
    the container -> folder here; tier: options of kv_connector_extra_config that were asked for; environment: variables
    that were asked for, given to every component; python_path: before its own PYTHONPATH: this package."""

    python: str
    folder: Path
    mounts: Mapping[str, Path]
    port: int
    tier: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    python_path: tuple[str, ...] = ()


@dataclass(frozen=True)
class Process:
    """health: where it says whether it is ready, if it does."""

    name: str
    type: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    health: str | None = None


@dataclass(frozen=True)
class Plan:
    """changes: (process, all that is another here than in the manifest)."""

    processes: tuple[Process, ...]
    changes: tuple[tuple[str, tuple[str, ...]], ...]
    url: str
    """Of the frontend."""


def plan(manifest: Manifest, machine: Machine, nats_binary: str | None) -> Plan:
    """nats_binary: of nats-server, where the manifest needs one (``needs_nats``). Raises ConfigError."""
    made: list[Process] = []
    changes: list[tuple[str, tuple[str, ...]]] = []
    nats_url = None
    if nats_binary is not None:
        (port,) = free_ports(1)
        nats_url = f"nats://{LOOPBACK}:{port}"
        command = (nats_binary, "-a", LOOPBACK, "-p", str(port), "-js", "-sd", str(machine.folder / "nats"))
        made.append(Process("nats", "nats", command, _inherited()))
    for component in manifest.components:
        for replica in range(component.replicas):
            name = component.name if component.replicas == 1 else f"{component.name}-{replica}"
            told: dict[str, None] = {}
            made.append(_process(component, name, manifest, machine, nats_url, told))
            changes.append((name, tuple(told)))
    return Plan(tuple(made), tuple(changes), f"http://{LOOPBACK}:{machine.port}")


def needs_nats(manifest: Manifest) -> bool:
    return any("NATS_SERVER" in component.environment for component in manifest.components)


def free_ports(count: int) -> list[int]:
    """Free now, and below the range from which systems hand out ports: engines bind them seconds later."""
    found: list[int] = []
    for _ in range(1000):
        port = random.randrange(15_000, 30_000)
        # KVBM's consolidator of events takes the port 1000 above another.
        if any(abs(port - other) in (0, 1000) for other in found):
            continue
        with contextlib.suppress(OSError), socket.create_server((LOOPBACK, port)):
            found.append(port)
        if len(found) == count:
            return found
    raise ConfigError(f"there are no {count} free ports between 15000 and 30000 on {LOOPBACK}")


def check_port(port: int) -> None:
    """Raises ConfigError where something listens already."""
    try:
        socket.create_server((LOOPBACK, port)).close()
    except OSError as exc:
        why = os.strerror(exc.errno or 0)
        raise ConfigError(f"port {port} on {LOOPBACK} is in use ({why}): choose another with --port") from exc


def get_flag(command: Sequence[str], flag: str) -> str | None:
    """The last one's value counts, as argparse has it; "" for one without a value."""
    found = None
    for place, part in enumerate(command):
        if part == flag:
            following = command[place + 1 : place + 2]
            found = following[0] if following and not following[0].startswith("--") else ""
        elif part.startswith(flag + "="):
            found = part[len(flag) + 1 :]
    return found


def set_flag(command: list[str], flag: str, value: str | None) -> list[str]:
    """The flag set to the value, where it stands or at the end; value None: a flag that takes none."""
    made: list[str] = []
    skip = False
    for place, part in enumerate(command):
        if skip:
            skip = False
            continue
        if part == flag:
            skip = value is not None and place + 1 < len(command)
        elif not part.startswith(flag + "="):
            made.append(part)
            continue
        if flag not in made:
            made += [flag] if value is None else [flag, value]
    return made if flag in made else [*made, flag, *([] if value is None else [value])]


def _process(
    component: Component, name: str, manifest: Manifest, machine: Machine, nats_url: str | None, told: dict[str, None]
) -> Process:
    command, environment = list(component.command), dict(component.environment)
    module = _module(command)
    if command[0] in ("python", "python3"):
        command[0] = machine.python
    mounts = _own_folders(component, machine.folder, name) | dict(machine.mounts)
    # A mount within another before that one.
    for path, folder in sorted(mounts.items(), key=lambda mount: len(mount[0]), reverse=True):
        command = [_moved(part, path, folder) for part in command]
        moved = {key: _moved(value, path, folder) for key, value in environment.items()}
        if moved != environment or any(str(folder) in part for part in command):
            told[f"{path} is {folder}"] = None
        environment = moved
    wanted: dict[str, str | None] = {}
    if module == FRONTEND:
        wanted |= {"--http-host": LOOPBACK, "--http-port": str(machine.port)}
        if get_flag(command, "--kv-cache-block-size") is not None:
            wanted["--kv-cache-block-size"] = BLOCK_TOKENS
    elif module == WORKER:
        wanted |= {f: v for f, v in CPU_FLAGS.items() if f not in ONLY_IF_THERE or get_flag(command, f) is not None}
        if (events := get_flag(command, "--kv-events-config")) is not None:
            wanted["--kv-events-config"] = _own_socket(events, machine.folder / f"{name}.kv", name)
        if (settings := get_flag(command, FLAG)) is not None:
            wanted[FLAG] = _settings(settings, machine, name, told)
    for flag, value in wanted.items():
        before = get_flag(command, flag)
        if before != (value or ""):
            command = set_flag(command, flag, value)
            if flag == "--kv-events-config":
                told["endpoint of --kv-events-config is a socket"] = None
            elif flag != FLAG:
                told[f"{flag}{'' if value is None else ' ' + value}" + (f" instead of {before}" if before else "")] = (
                    None
                )
    local = LOCAL | QUIET | {
        "DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": str(machine.folder / "discovery"),
        "DYN_NAMESPACE": manifest.dynamo_namespace,
    }  # fmt: skip
    health = None
    if module == WORKER:
        local |= CPU_ENVIRONMENT
        # As the operator has it, to know when a worker serves.
        (port,) = free_ports(1)
        local |= {"DYN_SYSTEM_PORT": str(port), "DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS": '["generate"]'}
        health = f"http://{LOOPBACK}:{port}/health"
        local |= _kvbm(environment)
    if nats_url is not None and "NATS_SERVER" in environment:
        local["NATS_SERVER"] = nats_url
    for key, value in local.items():
        if key not in machine.environment:
            told[f"{key}={value}"] = None
    environment |= {k: v for k, v in local.items() if k not in machine.environment}
    environment |= machine.environment
    paths = [*machine.python_path, environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    path = os.pathsep.join([str(Path(machine.python).parent), os.environ.get("PATH", os.defpath)])
    return Process(name, component.type, tuple(command), _inherited() | {"PATH": path} | environment, health)


def _own_folders(component: Component, folder: Path, name: str) -> dict[str, Path]:
    """Of a replica: its volumes that start empty."""
    made = {}
    for number, mount in enumerate(component.mounts):
        if mount.claim is None and mount.files is None:
            made[mount.path] = folder / "mounts" / f"{name}-{number}"
            made[mount.path].mkdir(parents=True, exist_ok=True)
    return made


def _inherited() -> dict[str, str]:
    """This shell's environment without what would configure an engine."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_INHERITED_NOT)}


def _module(command: Sequence[str]) -> str | None:
    return command[command.index("-m") + 1] if "-m" in command[:-1] else None


def _moved(text: str, path: str, folder: Path) -> str:
    """A mounted path, alone or the beginning of one, also inside JSON."""
    return re.sub(rf"(?<![\w./-]){re.escape(path.rstrip('/'))}(?=/|[\"'\s,]|$)", lambda _: str(folder), text)


def _own_socket(text: str, path: Path, where: str) -> str:
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise ConfigError(f"{where}: --kv-events-config is no JSON: {exc}") from exc
    if isinstance(value, dict) and "endpoint" in value:
        value["endpoint"] = f"ipc://{path}"
    return json.dumps(value)


def _settings(text: str, machine: Machine, where: str, told: dict[str, None]) -> str:
    value = read_settings(text, where)
    extra = value.setdefault(EXTRA, {})
    fitting = {n: most for n, most in BUDGETS.items() if isinstance(extra.get(n), int | float) and extra[n] > most}
    if module_of(value) == CONNECTOR and "nats" in extra:
        fitting |= {n: least for n, least in PATIENCE.items() if extra.get(n, 0) < least}
    for name, option in (fitting | dict(machine.tier)).items():
        if extra.get(name) != option:
            before = f" instead of {extra[name]}" if name in extra else ""
            told[f"{name} {json.dumps(option)}{before} in {EXTRA}"] = None
            extra[name] = option
    made = json.dumps(value)
    read_settings(made, where)
    return made


def _kvbm(environment: Mapping[str, str]) -> dict[str, str]:
    if not any(name in environment for name in KVBM_BUDGETS):
        return {}
    made = {name: str(most) for name, most in KVBM_BUDGETS.items() if _number(environment.get(name)) > most}
    return made | dict(zip(KVBM_PORTS, map(str, free_ports(len(KVBM_PORTS))), strict=True))


def _number(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:
        return 0.0
