"""``kvtc up``: READ FIRST ``run``.

1. the manifest is read and judged, whole, before anything starts
2. an interpreter with Dynamo, a port and memory are looked for
3. the volumes get their folders: a model, an artifact
4. nats-server, frontend and workers start, each with a log
5. ready: every worker says so, and the frontend names the model
6. one question, if there is one; then until somebody ends it, or at once
7. everything is ended, whatever happened
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dynamo_kvtc
from dynamo_kvtc.adapters.engine_model import PREFIX
from dynamo_kvtc.errors import ConfigError, EngineTimeoutError, MissingDependencyError
from dynamo_kvtc.events.server import server_binary
from dynamo_kvtc.tier.metrics import COUNTERS
from dynamo_kvtc.tier.options import available_memory
from dynamo_kvtc.up.client import Answer, ask, counters, healthy, models
from dynamo_kvtc.up.manifest import Manifest, read_manifest
from dynamo_kvtc.up.place import Machine, Plan, check_port, get_flag, needs_nats, plan
from dynamo_kvtc.up.processes import Running
from dynamo_kvtc.up.settings import CONNECTOR, EXTRA, FLAG, KVBM, module_of, read_settings
from dynamo_kvtc.up.supply import supply

WORKER_BYTES = 3 << 30
"""What a worker with the demo's model takes, its cache included."""
PLUGINS = "vllm.general_plugins"
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class UpConfig:
    """manifest: a YAML file; python: the interpreter that has Dynamo (None: this one); mounts: path in the container ->
    folder here; tier, environment: see ``place.Machine``; ready_seconds: what the start may take; logs: a folder."""

    manifest: Path
    python: str | None = None
    port: int = 8000
    mounts: Mapping[str, Path] = field(default_factory=dict)
    tier: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    logs: Path = Path("up-out")
    ready_seconds: float = 300.0
    answer_tokens: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.port < 1 << 16:
            raise ConfigError(f"--port is {self.port}; it must be 1 to 65535")
        if not 1 <= self.ready_seconds <= 86_400:
            raise ConfigError(f"--ready-seconds is {self.ready_seconds:g}; it must be 1 to 86400")
        if not 1 <= self.answer_tokens <= 1024:
            raise ConfigError(f"--answer-tokens is {self.answer_tokens}; it must be 1 to 1024")


@dataclass(frozen=True)
class Up:
    """A graph that runs and is ready."""

    config: UpConfig
    plan: Plan
    model: str
    seconds: float
    running: Running

    def ask(self, text: str) -> Answer:
        self.running.check()
        return ask(self.plan.url, self.model, text, self.config.answer_tokens)

    def counters(self) -> dict[str, dict[str, float]]:
        """Worker -> what its tier has counted: names of ``tier.metrics``, with their labels. An engine tells when it
        computes: what came after its last step is missing."""
        workers = [process for process in self.plan.processes if process.health is not None]
        return {p.name: counters(str(p.health).replace("/health", "/metrics"), PREFIX, COUNTERS) for p in workers}

    def wait(self) -> None:
        """Until it is interrupted. Raises EngineError when a component ends."""
        while True:
            self.running.check()
            time.sleep(_POLL_SECONDS)


Watch = Callable[[Mapping[str, str]], None]
"""Told, again and again, what each component is doing."""


@contextmanager
def run(
    config: UpConfig, progress: Callable[[str, float], None], say: Callable[[str], None], watch: Watch
) -> Iterator[Up]:
    """Raises KvtcError; nothing has been started for what can be known before."""
    manifest = read_manifest(config.manifest, config.environment)
    _check_settings(manifest, config.tier)
    python = dynamo_python(config.python)
    nats = server_binary(python) if needs_nats(manifest) else None
    _check_machine(manifest, python, config)
    check_port(config.port)
    with tempfile.TemporaryDirectory(prefix="kvtc-up-") as scratch:
        folder = Path(scratch)
        mounts = supply(manifest, folder, config.mounts, progress, say)
        root = str(Path(dynamo_kvtc.__file__).parents[1])
        machine = Machine(
            python, folder, mounts, config.port, config.tier, config.environment, (_entry_points(folder), root)
        )
        planned = plan(manifest, machine, nats)
        for line in told(planned):
            say(line)
        try:
            config.logs.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise ConfigError(f"--logs {config.logs} cannot be made: {exc.strerror}; name another folder") from exc
        with Running(config.logs) as running:
            began = time.monotonic()
            for process in planned.processes:
                running.start(process)
            model = _wait_until_ready(config, planned, running, watch)
            yield Up(config, planned, model, time.monotonic() - began, running)


def _entry_points(folder: Path) -> str:
    """A folder for PYTHONPATH that says to vLLM what an installed package would: which plugin it brings."""
    made = folder / "site" / f"dynamo_kvtc-{dynamo_kvtc.__version__}.dist-info"
    made.mkdir(parents=True)
    (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dynamo-kvtc\nVersion: {dynamo_kvtc.__version__}\n")
    (made / "entry_points.txt").write_text(f"[{PLUGINS}]\nkvtc = {CONNECTOR}.plugin:register\n")
    return str(made.parent)


def told(planned: Plan) -> list[str]:
    """The changes, those that all processes share first and once."""
    common = [c for c in planned.changes[0][1] if all(c in changes for _, changes in planned.changes)]
    own = [(name, [c for c in changes if c not in common]) for name, changes in planned.changes]
    return [
        f"{name}, other than in the manifest: {'; '.join(changes)}"
        for name, changes in [("all", common), *own]
        if changes
    ]


def dynamo_python(given: str | None) -> str:
    """An interpreter that has Dynamo and vLLM for CPUs. Raises MissingDependencyError, ConfigError."""
    remedy = "`make engines ENGINE_PARTS=dynamo` makes one, .engines/dynamo/bin/python (2.8 GB), which --python takes"
    python = given or sys.executable
    code = (
        "import importlib.metadata as m, importlib.util as u, json\n"
        "v = lambda n: m.version(n) if n in {d.metadata['Name'] for d in m.distributions()} else None\n"
        "print(json.dumps([v('vllm') if u.find_spec('vllm') else None, v('ai-dynamo')]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, timeout=60, check=False, env=environment
        )
        vllm, dynamo = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired, ValueError) as exc:
        raise ConfigError(f"--python {python} cannot be run ({exc}): {remedy}") from exc
    if dynamo is None or vllm is None:
        what = " and ".join(name for name, version in (("Dynamo", dynamo), ("vLLM", vllm)) if version is None)
        raise MissingDependencyError(f"{python} has no {what}: {remedy}")
    if "+cpu" not in vllm:
        raise ConfigError(f"{python} has vLLM {vllm}; `kvtc up` runs a build for CPUs, as 0.31.0+cpu: {remedy}")
    return python


def _check_settings(manifest: Manifest, tier: Mapping[str, Any]) -> None:
    """As they stand, and with what was asked for."""
    found = False
    for component in manifest.components:
        if (text := get_flag(component.command, FLAG)) is not None:
            value = read_settings(text, component.name)
            value[EXTRA] = {**value.get(EXTRA, {}), **tier}
            read_settings(json.dumps(value), component.name)
            found = True
    if tier and not found:
        raise ConfigError(f"--tier {', '.join(tier)}: no component of the manifest has {FLAG}")


def _check_machine(manifest: Manifest, python: str, config: UpConfig) -> None:
    workers = [c for c in manifest.components if c.type != "frontend"]
    count = sum(c.replicas for c in workers)
    free = available_memory()
    if free is not None and count * WORKER_BYTES > free:
        raise ConfigError(
            f"{count} workers take about {count * WORKER_BYTES >> 30} GiB; {free >> 30} GiB are available here: "
            "lower their replicas, or end other programs"
        )
    settings = [read_settings(text, c.name) for c in workers if (text := get_flag(c.command, FLAG)) is not None]
    if any(module_of(value) == KVBM for value in settings):
        _check_kvbm(python, config.environment)


def _check_kvbm(python: str, environment: Mapping[str, str]) -> None:
    """Its leader needs a libcuda to load, even where it moves nothing."""
    code = "import ctypes, importlib.util as u; print(u.find_spec('kvbm') is not None); ctypes.CDLL('libcuda.so.1')"
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, timeout=60, check=False,
        env={n: v for n, v in os.environ.items() if n != "PYTHONPATH"} | dict(environment),
    )  # fmt: skip
    remedy = (
        "`make engines ENGINE_PARTS=kvbm` makes both: --env PYTHONPATH=.engines/kvbm-1.6.1 --env "
        "LD_LIBRARY_PATH=.engines/stub"
    )
    if done.stdout.strip() != "True":
        raise MissingDependencyError(f"{python} has no kvbm, which the manifest's connector needs: {remedy}")
    if done.returncode:
        raise MissingDependencyError(f"there is no libcuda.so.1, and KVBM's leader loads one even on CPUs: {remedy}")


def _wait_until_ready(config: UpConfig, planned: Plan, running: Running, watch: Watch) -> str:
    """The model's name. Raises EngineError if a component ends, EngineTimeoutError if they take too long."""
    began = time.monotonic()
    waiting = {p.name: p for p in planned.processes if p.health is not None}
    state = {p.name: "runs" if p.name not in waiting else "starts" for p in planned.processes}
    while True:
        running.check()
        for name, process in list(waiting.items()):
            if healthy(str(process.health)):
                del waiting[name]
                state[name] = "ready"
        served = models(planned.url) if not waiting else []
        watch(dict(state))
        if served:
            return served[0]
        if time.monotonic() - began > config.ready_seconds:
            late = ", ".join(waiting) or "the frontend (it names no model)"
            name = next(iter(waiting), None) or next(p.name for p in planned.processes if p.type == "frontend")
            raise EngineTimeoutError(
                f"not ready after {config.ready_seconds:.0f} s: {late}; {running.log(name)} ends:\n{running.last(name)}"
            )
        time.sleep(_POLL_SECONDS)
