"""``kvtc demo --engine vllm``: more conversations than an engine's cache holds, come back to, three ways.

    none: the engine alone; what its own cache lost is computed again
    raw:  the tier keeps blocks as they are, in the same bytes of memory and of disk as
    kvtc: the tier keeps them coded

Each way is a process of its own with a real vLLM, in an interpreter that has it (``adapters/vllm/serve_demo.py``); all
get the same visits. READ FIRST: ``run``.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dynamo_kvtc
from dynamo_kvtc.calibrate.run import CalibrationConfig
from dynamo_kvtc.demo.setting import artifact_for, conversations
from dynamo_kvtc.errors import ConfigError, EngineError, MissingDependencyError
from dynamo_kvtc.hf.model import Model, load_model
from dynamo_kvtc.hf.smollm2 import smollm2_dir

WAYS = ("none", "raw", "kvtc")
PROGRAM = "dynamo_kvtc.adapters.vllm.serve_demo"
ENGINE_SECONDS = 1800.0
"""An engine that takes longer is ended."""
GIB = 1 << 30

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class EngineDemoConfig:
    """What to demonstrate. Small on purpose: some minutes on two CPU cores.

    sessions: conversations; session_tokens: of a first visit at most; answer_tokens: of an answer at most; returns: how
    many come back, of each age: the newest, those in the middle and the oldest; device_sessions: how many the engine's
    own cache has room for; host_sessions: how many *raw* sessions the tier's host budget has room for, of both tiers;
    disk_sessions: the same of the disk budget. tokens, length, groups, ratio: of the calibration, ratio against the
    cache's own dtype. dtype: of arithmetic and cache; float32 because a CPU without bfloat16 arithmetic takes several
    times as long with that.
    """

    out: Path
    engine_python: str | None = None
    model: str = "smollm2"
    dtype: str = "float32"
    tokens: int = 8_000
    length: int = 512
    groups: int = 10
    fisher_sequences: int = 2
    ratio: float = 18.0
    sessions: int = 22
    session_tokens: int = 384
    answer_tokens: int = 16
    returns: int = 2
    device_sessions: float = 2.5
    host_sessions: float = 1.0
    disk_sessions: float = 4.0
    block_tokens: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "sessions", "session_tokens", "answer_tokens", "groups", "returns", "block_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.sessions < 3 * self.returns:
            raise ConfigError(
                f"--sessions is {self.sessions} and --returns {self.returns}: three ages come back, so there must be "
                f"at least {3 * self.returns} sessions"
            )
        for name in ("device_sessions", "host_sessions", "disk_sessions"):
            if not 0.1 <= getattr(self, name) <= 1000:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be 0.1 to 1000")
        if self.device_sessions < 1.25:
            raise ConfigError(f"--device-sessions is {self.device_sessions}; one session must fit, with room: 1.25")

    def calibration(self) -> CalibrationConfig:
        return CalibrationConfig(
            groups=self.groups, ratios=(self.ratio,), fisher_sequences=self.fisher_sequences, seed=self.seed
        )  # fmt: skip

    @property
    def point(self) -> str:
        """As the calibration names it."""
        return f"{self.ratio:g}"

    def artifact_path(self, model_id: str) -> Path:
        return self.out / (
            f"{model_id}-{self.dtype}-{self.tokens}t-{self.groups}g-{self.ratio:g}x-{self.seed}.safetensors"
        )

    def order(self) -> list[int]:
        """Of second visits: the newest are still on the device, then the oldest, then those in between."""
        n, r = self.sessions, self.returns
        middle = (n - r) * 2 // 3
        return [*range(n - 1, n - 1 - r, -1), *range(r), *range(middle, middle + r)]


@dataclass
class WayResult:
    """visits: as the engine's program told them, each with "where" its context was; held: its last line."""

    visits: list[dict[str, Any]] = field(default_factory=list)
    held: dict[str, Any] = field(default_factory=dict)
    start_seconds: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class EngineDemoResult:
    config: EngineDemoConfig
    model: Model
    artifact_path: Path
    device_blocks: int
    host_bytes: int
    disk_bytes: int
    session_tokens: int
    """Of the longest conversation, both visits."""
    session_bytes: int
    """Of its raw cache."""
    ways: dict[str, WayResult]
    seconds: dict[str, float]


def run(config: EngineDemoConfig, progress: Progress, say: Callable[[str], None]) -> EngineDemoResult:
    """Raises KvtcError; that no vLLM is there before anything else."""
    python = engine_python(config.engine_python)
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"--out {config.out} cannot be made: {exc.strerror}") from exc
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    folder = smollm2_dir() if config.model == "smollm2" else Path(config.model)
    if not folder.is_dir():
        raise ConfigError(f"--model is {config.model!r}; the engine's demo needs a folder, or 'smollm2'")
    model = load_model(config.model, dtype=config.dtype)
    text, sessions = conversations(model.tokenizer, config.sessions, config.session_tokens)
    seconds["load the model"] = time.perf_counter() - began

    began = time.perf_counter()
    path = config.artifact_path(model.identity.model_id)
    artifact_for(model, path, config.calibration(), config.tokens, config.length, text, progress, say)
    seconds["calibrate"] = time.perf_counter() - began

    longest = max(len(first) + len(second) for first, second in sessions) + 2 * config.answer_tokens
    session_blocks = -(-longest // config.block_tokens)
    session_bytes = session_blocks * config.block_tokens * model.shape.bytes_per_token
    # vLLM keeps one block for itself.
    device_blocks = int(config.device_sessions * session_blocks) + 1
    host, disk = (int(n * session_bytes) for n in (config.host_sessions, config.disk_sessions))
    ways: dict[str, WayResult] = {}
    for way in WAYS:
        tier: dict[str, Any] | None = None
        with tempfile.TemporaryDirectory(prefix="kvtc-demo-") as scratch:
            if way != "none":
                tier = {
                    "artifact": str(path.resolve()), "point": config.point, "host_gib": host / GIB,
                    "disk_gib": disk / GIB, "disk_path": str(Path(scratch) / "disk"),
                    "exact": "all" if way == "raw" else "sinks",
                    # Bytes held are to be the codec's.
                    "window": 0,
                }  # fmt: skip
            job = {
                "model": str(folder.resolve()), "dtype": config.dtype, "tier": tier, "sessions": sessions,
                "order": config.order(), "answer_tokens": config.answer_tokens,
                "device_blocks": device_blocks, "block_tokens": config.block_tokens,
                "max_tokens": session_blocks * config.block_tokens,
            }  # fmt: skip
            ways[way] = _run_way(python, job, Path(scratch), functools.partial(progress, f"vLLM: {way}"))
        seconds[f"vLLM: {way}"] = ways[way].seconds
    return EngineDemoResult(
        config, model, path, device_blocks, host, disk, longest, session_bytes, ways, seconds
    )  # fmt: skip


def engine_python(given: str | None) -> str:
    """The interpreter that has vLLM. Raises MissingDependencyError, ConfigError."""
    remedy = (
        "`make engines ENGINE_PARTS=vllm` makes one for CPUs, .engines/vllm/bin/python (2.4 GB), which --engine-python "
        "takes; on a machine with a GPU: pip install vllm"
    )
    if given is None:
        if importlib.util.find_spec("vllm") is None:
            raise MissingDependencyError(f"this interpreter ({sys.executable}) has no vLLM: {remedy}")
        return sys.executable
    check = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        done = subprocess.run([given, "-c", check], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise ConfigError(f"--engine-python {given} cannot be run ({exc}): {remedy}") from exc
    if done.returncode:
        raise MissingDependencyError(f"--engine-python {given} has no vLLM: {remedy}")
    return given


def where(visit: dict[str, Any], block_tokens: int) -> str:
    """Where the context of a visit came from: the farthest place that took part, if half of it or more was there."""
    if visit["cached_tokens"] < visit["prompt_tokens"] // 2:
        return "computed"
    if visit["disk_blocks"]:
        return "disk"
    brought = visit["host_blocks"] * block_tokens
    return "host" if brought else "device"


def _run_way(python: str, job: dict[str, Any], scratch: Path, progress: Callable[[float], None]) -> WayResult:
    """Raises EngineError with the end of what the engine said."""
    path, log = scratch / "job.json", scratch / "engine.log"
    path.write_text(json.dumps(job))
    # The engine's interpreter may not have this package installed.
    root = str(Path(dynamo_kvtc.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    result = WayResult()
    began, visits = time.perf_counter(), len(job["sessions"]) + len(job["order"])
    progress(0.0)
    error = None
    with log.open("w") as errors:
        engine = subprocess.Popen(
            [python, "-m", PROGRAM, str(path)], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        # One that hangs says nothing: it is not asked, it is ended.
        limit = threading.Timer(ENGINE_SECONDS, engine.kill)
        limit.start()
        try:
            assert engine.stdout is not None
            for line in engine.stdout:
                if not line.startswith("{"):
                    continue
                told = json.loads(line)
                if "visit" in told:
                    told["where"] = where(told, job["block_tokens"])
                    result.visits.append(told)
                    progress(len(result.visits) / visits)
                elif "held" in told:
                    result.held = told
                elif "started" in told:
                    result.start_seconds = told["started"]
                elif "error" in told:
                    error = told["error"]
            if error is None:
                engine.wait(60)
        except subprocess.TimeoutExpired:
            pass  # Its answers are all here.
        finally:
            limit.cancel()
            engine.kill()
            engine.wait()
    result.seconds = time.perf_counter() - began
    if result.seconds > ENGINE_SECONDS:
        error = f"it has not ended after {ENGINE_SECONDS:.0f} s"
    if error is not None or not result.held:
        said = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
        raise EngineError(f"vLLM's process failed: {error or f'it ended with {engine.returncode}'}\n{said}")
    return result


def seconds_of(visits: Sequence[dict[str, Any]], visit: int, place: str | None = None) -> list[float]:
    """Times to first token of first (0) or second (1) visits, of those whose context came from a place."""
    return [v["ttft_seconds"] for v in visits if v["visit"] == visit and place in (None, v["where"])]
