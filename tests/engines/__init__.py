"""Where the engines are that tests run for real, and how to run a program with one.

``make engines`` puts them into KVTC_ENGINES (default: .engines at the repository's root):

    kvbm-VERSION/   kvbm and its nixl, to be put on PYTHONPATH of any Python 3.10+ that has torch
    stub/           libcuda.so.1 that does nothing: the leader loads one where it moves nothing
    vllm/           a virtual environment with vLLM 0.31 for the CPU, or a link to dynamo
    dynamo/         such a one with Dynamo 1.6.1 and a NATS server
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
VLLM_KVBM = "1.6.1"
"""The kvbm that vLLM 0.31 goes with."""


def engines() -> Path:
    return Path(os.environ.get("KVTC_ENGINES", ROOT / ".engines"))


def python_of(name: str) -> Path:
    """The interpreter of an environment."""
    return engines() / name / "bin" / "python"


def require(*names: str) -> Path:
    """Skips the test where an engine is missing; the folder of engines."""
    for name in names:
        if not (engines() / name / ".made").exists():
            pytest.skip(f"{engines() / name} is not made: run `make engines` (it says what that costs)")
    return engines()


def run_leader(version: str, *arguments: str, timeout: float = 120) -> dict[str, Any]:
    """A scenario of tests/adapters/kvbm/leader_scenarios.py against the real leader of that release; its result."""
    command = [sys.executable, "-m", "tests.adapters.kvbm.leader_driver", *arguments]
    return _run(command, version, timeout)


def play(module: str, cases: Sequence[Sequence[Any]], timeout: float = 900, mount: Path | None = None) -> list[Any]:
    """Scenarios of a driver in tests/adapters, one after the other in one process of vLLM's environment; their results.

    cases: [scenario, model, work, artifact, ...] each. mount: where that process sees a file system of 112 MiB.
    """
    given = json.dumps([[str(x) if isinstance(x, Path) else x for x in case] for case in cases])
    command = [str(python_of("vllm")), "-m", module]
    if mount is not None:
        command = [*MOUNTING, f'mount -t tmpfs -o size=112m none "{mount}" && exec "$@"', "sh", *command]
    return _run(command, VLLM_KVBM, timeout, len(cases), given)


MOUNTING = ["unshare", "-Urm", "sh", "-c"]


def can_mount() -> bool:
    """Whether a file system can be mounted here, for one process alone."""
    tools = [shutil.which(name) for name in ("unshare", "mount")]
    return None not in tools and not subprocess.run([*MOUNTING, "true"], check=False, capture_output=True).returncode


def _free_ports(count: int) -> list[int]:
    """Free now, and below the range from which systems hand out ports: the leader binds them seconds later, when an
    engine has taken some for itself."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(15_000, 30_000)
        # The consolidator of KVBM's events takes the port 1000 above.
        if any(abs(port - other) in (0, 1000) for other in found):
            continue
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
    return found


def environment(version: str, leaders: int) -> dict[str, str]:
    """Of a program with engines. leaders: of KVBM, one after the other; each has ports of its own."""
    ports = _free_ports(3 * leaders)
    publish, answer, metrics = ports[:3]
    made = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("DYN_", "VLLM_"))},
        "PYTHONPATH": os.pathsep.join([str(engines() / f"kvbm-{version}"), str(ROOT)]),
        "LD_LIBRARY_PATH": os.pathsep.join([str(engines() / "stub"), os.environ.get("LD_LIBRARY_PATH", "")]),
        "OMP_NUM_THREADS": "1",
        "DYN_KVBM_LEADER_ZMQ_PUB_PORT": str(publish),
        "DYN_KVBM_LEADER_ZMQ_ACK_PORT": str(answer),
        "DYN_KVBM_METRICS_PORT": str(metrics),
        "KVTC_TEST_PORTS": " ".join(map(str, ports)),
    }
    made.pop("TRITON_INTERPRET", None)
    return made


def _run(command: list[str], version: str, timeout: float, leaders: int = 1, given: str = "") -> Any:
    """The JSON on the program's last line. given: its input."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment(version, leaders), input=given, capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines or lines[-1][0] not in "[{":
        raise AssertionError(
            f"{command[1:]} ended with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
        )
    return json.loads(lines[-1])
