"""`kvtc up` for real: Dynamo's frontend and workers, vLLM for CPUs, a NATS server, the manifests of deploy/.

KVTC_ENGINES has them (tests/engines). The first run calibrates the demo's model on a few thousand tokens, once.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynamo_kvtc.up.place import free_ports
from tests.engines import ROOT, require
from tests.up.graphs import TOKENS, python, question, served

pytestmark = [pytest.mark.engine, pytest.mark.model]
SECONDS = 600


def with_environment(text: str) -> list[int]:
    """Processes that have a text in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if text.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def command(manifest: str, logs: Path, *more: str) -> tuple[str, list[str]]:
    """The answer's text and the lines after it, of a run of the command; that nothing of it is left."""
    (port,) = free_ports(1)
    done = subprocess.run(
        [sys.executable, "-m", "dynamo_kvtc.cli.main", "up", f"deploy/{manifest}.yaml", "--python", python(),
         "--ask", question(), "--exit", "--port", str(port), "--logs", str(logs),
         "--answer-tokens", str(TOKENS), *more],
        cwd=ROOT, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    folder = re.search(r"DYN_FILE_KV=(\S+)/discovery", done.stderr)[1]
    assert not Path(folder).exists()
    assert not with_environment(folder)
    text, _, after = done.stdout.partition("\nfirst token after ")
    assert {"nats.log", "Frontend.log"} < {path.name for path in logs.iterdir()}
    return text, after.splitlines()


@pytest.fixture(scope="module")
def aggregated(tmp_path_factory):
    return command("agg-offloading", tmp_path_factory.mktemp("agg"), "--tier", "exact=all")


@pytest.mark.long
def test_agg_offloading(aggregated):
    text, (times, told) = aggregated
    assert text
    assert "cached 0" in times
    assert told.startswith("Worker: lookup blocks miss none")


@pytest.mark.long
def test_agg_kvbm(tmp_path):
    engines = require("dynamo", "kvbm-1.6.1", "stub")
    environment = {"PYTHONPATH": str(engines / "kvbm-1.6.1"), "LD_LIBRARY_PATH": str(engines / "stub")}
    with served("agg-kvbm", tmp_path, environment=environment) as up:
        answer = up.ask(question())
        assert answer.text
        stored, deadline = 0.0, time.monotonic() + 60
        # An engine tells what was counted when it computes.
        while stored < (answer.prompt_tokens - 1) // 32:
            assert time.monotonic() < deadline, up.counters()
            up.ask("Say hello.")
            stored = up.counters()["Worker"].get("kvtc_stored_blocks stored", 0.0)


@pytest.mark.long
def test_disagg_answers_as_one_worker_does(aggregated, tmp_path):
    """Every token exact; the first layers are computed before the last ones' are decoded."""
    trace = tmp_path / "trace.jsonl"
    with served("disagg", tmp_path, tier={"exact": "all", "trace": str(trace)}) as up:
        answer = up.ask(question())
        assert up.counters()["Decode"]["kvtc_pulled_blocks pulled"] == (answer.prompt_tokens - 1) // 32
    assert answer.text == aggregated[0]
    check_overlap(trace)


def test_disagg(tmp_path):
    """Coded: all that one hop of the network carries is a twelfth of the raw cache's bytes, and the first layers are
    computed before the last ones' are decoded."""
    trace = tmp_path / "trace.jsonl"
    alone = ["unshare", "-Urn"] if can_be_alone() else []
    done = subprocess.run(
        [*alone, sys.executable, "-m", "tests.up.wire", "disagg", str(tmp_path), json.dumps({"trace": str(trace)})],
        cwd=ROOT, input=question(), capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    answer, decode = told["answer"], told["decode"]
    print(told)
    blocks = (answer["prompt_tokens"] - 1) // 32
    assert answer["text"]
    assert decode["kvtc_pulled_blocks pulled"] == blocks
    raw = blocks * 32 * 2 * 30 * 3 * 64 * 4
    assert decode["kvtc_pulled_bytes"] <= raw / 12
    if alone:
        # To the NATS server and from it: what went through it crossed the loopback twice.
        assert decode["kvtc_pulled_bytes"] < told["wire"] / 2 <= raw / 12
    check_overlap(trace)


def check_overlap(trace: Path) -> None:
    """Attention of the first layers before the last layer group was decoded. On one machine's loopback all may have
    arrived by then: told, not demanded (tests/adapters/connector does)."""
    steps = [json.loads(line) for line in trace.read_text().splitlines()]
    first = {what: min(step["at"] for step in steps if step["what"] == what) for what in ("arrived", "attention")}
    last = {what: max(step["at"] for step in steps if step["what"] == what) for what in ("arrived", "loaded")}
    print({what: at - first["arrived"] for what, at in [*last.items(), ("attention", first["attention"])]})
    assert first["attention"] < last["loaded"]


def can_be_alone() -> bool:
    """Whether a process can have a network of its own here."""
    tool = shutil.which("unshare")
    return tool is not None and not subprocess.run([tool, "-Urn", "true"], check=False, capture_output=True).returncode
