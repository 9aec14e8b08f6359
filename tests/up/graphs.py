"""Graphs of deploy/, run for real: Dynamo's frontend and workers, vLLM for CPUs, a NATS server."""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from pathlib import Path

from dynamo_kvtc.up.place import free_ports
from dynamo_kvtc.up.run import UpConfig, run
from tests.engines import ROOT, python_of, require

TOKENS = 24
"""Of an answer."""


def question() -> str:
    """Some 30 blocks of 32 tokens."""
    text = importlib.import_module("pydoc_data.topics").topics["debugger"][:3500]
    return f"Here is a document.\n\n{text}\n\nIn one sentence, what is it about?"


def python() -> str:
    require("dynamo")
    return str(python_of("dynamo"))


@contextmanager
def served(manifest: str, logs: Path, **options):
    """A graph in this process's hands."""

    def nothing(*_):
        pass

    (port,) = free_ports(1)
    path = ROOT / "deploy" / f"{manifest}.yaml"
    config = UpConfig(path, python=python(), port=port, logs=logs, answer_tokens=TOKENS, **options)
    with run(config, nothing, nothing, nothing) as up:
        yield up
