"""READ FIRST: the lines of a report, and which of them a purpose needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_kvtc.doctor import artifact as artifacts
from dynamo_kvtc.doctor import gpu, machine, software
from dynamo_kvtc.doctor.line import Line
from dynamo_kvtc.errors import ConfigError

_CODING = ("Python", "torch")
_TIER = (*_CODING, "prometheus_client", "host memory", "disk tier")
NEEDS: dict[str, tuple[str, ...]] = {
    "cpu": _CODING,
    "gpu": (*_CODING, "GPU", "Triton", "pinned memory"),
    "vllm": (*_TIER, "vLLM"),
    "kvbm": (*_TIER, "vLLM", "KVBM", "pyzmq", "NATS"),
}
"""Lines that must be ok, by purpose. vllm and kvbm run on CPUs, too: add gpu for those on a GPU."""


@dataclass(frozen=True)
class Asked:
    """purposes: keys of NEEDS; what was asked for by an option of its own must be ok without any purpose."""

    purposes: Sequence[str] = ()
    host_gib: float = 0.0
    disk_gib: float = 0.0
    disk_path: str | None = None
    artifact: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class Report:
    """needed: names of the lines that must be ok; able: whether they all are."""

    lines: Sequence[Line]
    needed: frozenset[str]

    @property
    def able(self) -> bool:
        return all(line.status == "ok" for line in self.lines if line.name in self.needed)


def examine(asked: Asked) -> Report:
    """Raises ConfigError for options that do not go together."""
    if asked.model is not None and asked.artifact is None:
        raise ConfigError(f"--model {asked.model} without --artifact: name the artifact that is to serve it")
    if asked.disk_gib and asked.disk_path is None:
        raise ConfigError(f"--disk-gib {asked.disk_gib:g} without --disk-path: name the folder")
    device = gpu.look()
    lines = [
        software.python(), software.torch(), device.line, machine.pinned(device, asked.host_gib), software.triton(),
        software.nvcomp(), software.transformers(), software.metrics(), software.vllm(), software.kvbm(),
        software.zmq(), software.dynamo(), machine.nats(os.environ.get("NATS_SERVER")), machine.memory(asked.host_gib),
        machine.disk(asked.disk_path, asked.disk_gib),
    ]  # fmt: skip
    needed = {*_CODING, *(name for purpose in asked.purposes for name in NEEDS[purpose])}
    needed |= {"host memory"} if asked.host_gib else set()
    needed |= {"disk tier"} if asked.disk_path else set()
    if asked.artifact is not None:
        line, artifact = artifacts.load(asked.artifact)
        lines.append(line)
        needed.add("artifact")
        if artifact is not None and artifact.manifest.profile == "paper" and "gpu" in asked.purposes:
            needed.add("nvCOMP")
        if artifact is not None and asked.model is not None:
            lines.append(artifacts.matches(artifact, asked.model))
            needed.add("model")
    return Report(lines, frozenset(needed))
