"""Packages and their versions, read off their metadata."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from importlib.util import find_spec

from dynamo_kvtc.doctor.line import Line, missing, ok, problem
from dynamo_kvtc.errors import EngineVersionError, MissingDependencyError

_NVCOMP = ("nvidia-nvcomp-cu12", "nvidia-nvcomp-cu13")


def python() -> Line:
    found = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    if sys.platform != "linux":
        return problem("Python", found, "stores and engines need Linux; calibrate, eval and inspect run here, too")
    return ok("Python", found)


def torch() -> Line:
    return _at_least("torch", "torch", (2, 6), "pip install 'torch>=2.6'")


def triton() -> Line:
    return _at_least("Triton", "triton", (3, 6), "pip install dynamo-kvtc[gpu]")


def nvcomp() -> Line:
    """Only profile paper on a GPU asks for it."""
    for package in _NVCOMP:
        found = version(package)
        if found is None:
            continue
        if _numbers(found) < (6,):
            return problem("nvCOMP", f"{package} {found}", "pip install --upgrade dynamo-kvtc[gpu]")
        return ok("nvCOMP", f"{package} {found}")
    return missing("nvCOMP", "pip install dynamo-kvtc[gpu] (only profile paper on a GPU needs it)")


def transformers() -> Line:
    """For calibrate, eval and demo; an engine brings its own."""
    return _at_least("transformers", "transformers", (5,), "pip install dynamo-kvtc[model]")


def metrics() -> Line:
    return _at_least("prometheus_client", "prometheus-client", (0, 19), "pip install dynamo-kvtc[engine]")


def zmq() -> Line:
    return _at_least("pyzmq", "pyzmq", (25,), "pip install dynamo-kvtc[dynamo]")


def dynamo() -> Line:
    return _at_least("ai-dynamo", "ai-dynamo", (1, 4), "pip install dynamo-kvtc[dynamo]")


def vllm() -> Line:
    try:
        from dynamo_kvtc.adapters.vllm._compat import SUPPORTED, require_vllm

        require_vllm()
    except MissingDependencyError as exc:
        return missing("vLLM", f"{_after_colon(exc)}: pip install 'vllm==0.31.*'")
    except EngineVersionError as exc:
        return problem("vLLM", version("vllm") or "?", str(exc))
    return ok("vLLM", f"{version('vllm')} (known: {', '.join(f'{a}.{b}' for a, b in SUPPORTED)})")


def kvbm() -> Line:
    from dynamo_kvtc.adapters.kvbm._compat import SUPPORTED, require_kvbm

    try:
        found = require_kvbm()
    except MissingDependencyError as exc:
        return missing("KVBM", str(exc))
    except EngineVersionError as exc:
        return problem("KVBM", version("kvbm") or "?", str(exc))
    if find_spec("kvbm") is None:
        return problem("KVBM", f"{found}, but it cannot be found", f"pip install --force-reinstall kvbm=={found}")
    return ok("KVBM", f"leader {found} (known: {', '.join(SUPPORTED)})")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _at_least(name: str, package: str, least: tuple[int, ...], remedy: str) -> Line:
    found = version(package)
    if found is None:
        return missing(name, remedy)
    if _numbers(found)[: len(least)] < least:
        told = ".".join(map(str, least))
        return problem(name, found, f"{remedy} ({told} or newer is needed)")
    return ok(name, found)


def _numbers(told: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", told.split("+")[0])[:3])


def _after_colon(exc: Exception) -> str:
    return str(exc).partition("; ")[2] or str(exc)
