"""What `kvtc up` refuses before it starts anything, and that what it started is ended whole."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from dynamo_kvtc.cli import main
from dynamo_kvtc.errors import ArtifactError, ConfigError, EngineError, EngineTimeoutError, MissingDependencyError
from dynamo_kvtc.up import processes, run, supply
from dynamo_kvtc.up.client import ask, counters, healthy, models
from dynamo_kvtc.up.manifest import read_manifest
from dynamo_kvtc.up.place import Plan, Process
from dynamo_kvtc.up.processes import Running, alive
from dynamo_kvtc.up.run import UpConfig
from tests.engines import ROOT

AGG = ROOT / "deploy" / "agg-offloading.yaml"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('there', flush=True); time.sleep(600)"
)


def process(name, code, health=None):
    return Process(name, "worker", (sys.executable, "-c", code), dict(os.environ), health)


def wait_for(text, running, name, seconds=20.0):
    deadline = time.monotonic() + seconds
    while text not in running.last(name):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_orderly_end_reaches_the_first_process_alone(tmp_path):
    """It ends its own, as in a container; what would be told twice ends in the middle of its work."""
    code = (
        "import signal, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {STUBBORN.replace('SIG_IGN', 'SIG_DFL')!r}])\n"
        "def end(*_): print('told', child.poll(), flush=True); child.terminate(); child.wait(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\nprint('up', flush=True)\ntime.sleep(600)"
    )
    with Running(tmp_path) as running:
        running.start(process("a", code))
        wait_for("there", running, "a")
        wait_for("up", running, "a")
        groups = [started.pid for _, started in running._started]
    assert "told None" in (tmp_path / "a.log").read_text()
    assert not alive(groups)


def test_the_first_that_was_started_ends_after_the_others(tmp_path):
    """Workers say goodbye to the NATS server: it must be there."""
    code = (
        "import signal, sys, time\n"
        "def end(*_): time.sleep({wait}); print(time.monotonic(), flush=True); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\nprint('up', flush=True)\ntime.sleep(600)"
    )
    with Running(tmp_path) as running:
        for name, wait in (("nats", 0), ("frontend", 0.2), ("worker", 0.5)):
            running.start(process(name, code.format(wait=wait)))
            wait_for("up", running, name)
    ends = {name: float(running.last(name).splitlines()[-1]) for name in ("nats", "frontend", "worker")}
    assert ends["nats"] == max(ends.values())


def test_what_does_not_end_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "TERM_SECONDS", 0.3)
    monkeypatch.setattr(processes, "LEFT_SECONDS", 0.3)
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}]); exec({STUBBORN!r})"
    orphan = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}])"
    running = Running(tmp_path)
    with contextlib.suppress(ZeroDivisionError), running:
        running.start(process("a", code))
        running.start(process("b", orphan))
        for name in "ab":
            wait_for("there", running, name)
        groups = [started.pid for _, started in running._started]
        raise ZeroDivisionError
    assert len(groups) == 2
    assert not alive(groups)


def test_an_end_is_noticed_with_its_last_words(tmp_path):
    with Running(tmp_path) as running:
        running.start(process("a", "print('last words'); raise SystemExit(3)"))
        running._started[0][1].wait(20)
        with pytest.raises(EngineError, match=r"a ended with 3; .*a.log ends:\nlast words"):
            running.check()
        with pytest.raises(EngineError, match="absent cannot be started"):
            running.start(Process("b", "worker", ("/absent",), {}))


class Frontend(http.server.BaseHTTPRequestHandler):
    served: list = []  # noqa: RUF012
    events: list = []  # noqa: RUF012

    def do_GET(self):
        self._say(200, {"/v1/models": json.dumps({"data": self.served}), "/metrics": METRICS}.get(self.path, "ok"))

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self._say(
            200 if self.events else 503, "".join(f"data: {json.dumps(e)}\n\n" for e in self.events) or "no worker"
        )

    def _say(self, code, text):
        self.send_response(code)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


METRICS = """# HELP vllm:kvtc_hits_total x
vllm:kvtc_hits_total{engine="0",model_name="m",tier="host"} 3.0
vllm:kvtc_hits_total{engine="0",model_name="m",tier="disk"} 0.0
vllm:kvtc_pulled_bytes_total{engine="0",model_name="m"} 1.5e+06
vllm:other_total{engine="0"} 4.0
"""


KNOWN = {"kvtc_hits": ("tier",), "kvtc_pulled_bytes": ()}


@pytest.fixture
def frontend():
    kind = type("One", (Frontend,), {"served": [], "events": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield kind, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_the_client(frontend):
    kind, url = frontend
    assert models(url) == []
    kind.served = [{"id": "m"}]
    assert models(url) == ["m"]
    assert healthy(url + "/health")
    assert counters(url + "/metrics", "vllm:", KNOWN) == {"kvtc_hits host": 3.0, "kvtc_pulled_bytes": 1.5e6}
    with pytest.raises(EngineError, match="answered 503: no worker"):
        ask(url, "m", "hello", 4)
    kind.events = [
        {"choices": [{"delta": {"role": "assistant"}}]},
        {"choices": [{"delta": {"content": "Hel"}}]},
        {"choices": [{"delta": {"content": "lo"}}]},
        {"choices": [], "usage": {"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4}}},
    ]
    answer = ask(url, "m", "hello", 4)
    assert (answer.text, answer.prompt_tokens, answer.cached_tokens) == ("Hello", 7, 4)
    assert 0 < answer.ttft_seconds <= answer.seconds
    kind.events = [{"error": "boom"}]
    with pytest.raises(EngineError, match="boom"):
        ask(url, "m", "hello", 4)
    kind.events = [{"choices": []}]
    with pytest.raises(EngineError, match="without a token"):
        ask(url, "m", "hello", 4)
    with pytest.raises(EngineError, match="could not be asked"):
        ask("http://127.0.0.1:9", "m", "hello", 4)


def test_readiness_is_the_workers_and_the_frontends(frontend, tmp_path):
    kind, url = frontend
    sleeper = process("Worker", "print('starting', flush=True); import time; time.sleep(600)", f"{url}/health")
    front = Process("Front", "frontend", (sys.executable, "-c", "import time; time.sleep(600)"), dict(os.environ))
    planned = Plan((sleeper, front), (), url)
    seen = []
    config = UpConfig(AGG, ready_seconds=1)
    with Running(tmp_path) as running:
        for one in planned.processes:
            running.start(one)
        with pytest.raises(EngineTimeoutError, match=r"not ready after 1 s: the frontend \(it names no model\)"):
            run._wait_until_ready(config, planned, running, seen.append)
        kind.served = [{"id": "m"}]
        assert run._wait_until_ready(config, planned, running, seen.append) == "m"
    assert seen[-1] == {"Worker": "ready", "Front": "runs"}


def test_without_dynamo(tmp_path):
    with pytest.raises(MissingDependencyError, match=r"has no Dynamo.*make engines ENGINE_PARTS=dynamo"):
        run.dynamo_python(sys.executable)
    with pytest.raises(ConfigError, match=r"--python /absent cannot be run.*make engines"):
        run.dynamo_python("/absent")


def no_progress(*_):
    pass


def test_volumes_that_were_given(tmp_path):
    manifest = read_manifest(AGG)
    with pytest.raises(ConfigError, match=r"--mount /model: .* it has /artifacts, /cache, /models"):
        supply.supply(manifest, tmp_path, {"/model": tmp_path}, no_progress, print)
    with pytest.raises(ConfigError, match=r"--model /models/model: there is no model in .*model"):
        supply.supply(manifest, tmp_path, {"/models": tmp_path}, no_progress, print)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="an artifact of your own model takes a calibration of your own"):
        supply.supply(manifest, tmp_path, {"/models": tmp_path}, no_progress, print)
    given = {"/models": tmp_path, "/artifacts": tmp_path}
    with pytest.raises(ArtifactError, match=r"there is no artifact .*model.safetensors.*kvtc calibrate"):
        supply.supply(manifest, tmp_path, given, no_progress, print)
    (tmp_path / "model.safetensors").write_text("")
    assert supply.supply(manifest, tmp_path, given, no_progress, print) == given


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tier", "exact"], "--tier 'exact' is no NAME=VALUE"),
        (["--tier", "exakt=all"], "unknown options exakt"),
        (["--tier", "host_gib=much"], "host_gib is 'much'; it must be a number"),
        (["--port", "0"], "--port is 0; it must be 1 to 65535"),
        (["--ready-seconds", "0"], "--ready-seconds is 0"),
        (["--python", sys.executable], "has no Dynamo"),
    ],
)
def test_the_command_ends_with_one_line(arguments, told):
    done = CliRunner().invoke(main.main, ["up", str(AGG), *arguments])
    assert done.exit_code == main.EXIT_ERROR
    assert told in done.output
    assert "Traceback" not in done.output


def test_a_wrong_manifest_is_refused_first(tmp_path):
    path = tmp_path / "g.yaml"
    path.write_text(AGG.read_text().replace("replicas:", "replica:"))
    done = subprocess.run(
        [sys.executable, "-m", "dynamo_kvtc.cli.main", "up", str(path)], cwd=ROOT, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == main.EXIT_ERROR
    assert "unknown field 'replica' in spec.components[0]; did you mean replicas?" in done.stderr
    assert not list(Path(tmp_path).glob("*.log"))
