"""What a manifest's components become here: paths, addresses, a CPU's needs; all else as it was."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.up.manifest import Component, Manifest, Mount
from dynamo_kvtc.up.place import Machine, check_port, get_flag, needs_nats, plan, set_flag
from dynamo_kvtc.up.run import told
from dynamo_kvtc.up.settings import EXTRA, FLAG

SETTINGS = {
    "kv_connector": "KvtcOffloadingConnector", "kv_connector_module_path": "dynamo_kvtc.adapters.vllm",
    "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
    EXTRA: {"spec_name": "KvtcOffloadingSpec", "spec_module_path": "dynamo_kvtc.adapters.vllm", "point": "16",
            "artifact": "/art/a.safetensors", "host_gib": 64, "disk_gib": 0.25, "disk_path": "/cache/k"},
}  # fmt: skip
EVENTS = {"enable_kv_cache_events": True, "publisher": "zmq", "topic": "t", "endpoint": "tcp://*:20080"}


def manifest(settings=SETTINGS, replicas=1, **environment):
    front = Component(
        "Front", "frontend", 1, ("python3", "-m", "dynamo.frontend", "--kv-cache-block-size", "16"), {}, ()
    )
    worker = Component(
        "Worker", "worker", replicas,
        ("python3", "-m", "dynamo.vllm", "--model", "/models/m", "--block-size=16", "--tensor-parallel-size", "4",
         "--seed", "7", "--kv-events-config", json.dumps(EVENTS), FLAG, json.dumps(settings)),
        {"KEEP": "/modelsx /models", "DYN_EVENT_PLANE": "nats", **environment},
        (Mount("/models", claim="m"), Mount("/art", claim="a"), Mount("/cache")),
    )  # fmt: skip
    return Manifest(Path("g.yaml"), "g", "ns", (front, worker))


@pytest.fixture
def machine(tmp_path):
    return Machine("/venv/bin/python", tmp_path, {"/models": Path("/here/m"), "/art": Path("/here/a")}, 8123)


def test_a_mount_within_another_is_its_own(machine, tmp_path):
    mounts = {**machine.mounts, "/models/m/cache": Path("/here/c")}
    inner = Machine(machine.python, tmp_path, mounts, 8123)
    worker = plan(manifest(A="/models/m/cache/x /models/m/x"), inner, None).processes[1]
    assert worker.environment["A"] == "/here/c/x /here/m/m/x"


def test_a_worker_keeps_what_need_not_change(machine):
    planned = plan(manifest(), machine, None)
    front, worker = planned.processes
    assert worker.command[:3] == ("/venv/bin/python", "-m", "dynamo.vllm")
    flags = {f: get_flag(worker.command, f) for f in ("--model", "--block-size", "--tensor-parallel-size", "--seed")}
    assert flags == {"--model": "/here/m/m", "--block-size": "32", "--tensor-parallel-size": "1", "--seed": "7"}
    assert get_flag(worker.command, "--enforce-eager") == ""
    assert json.loads(get_flag(worker.command, "--kv-events-config")) == EVENTS | {
        "endpoint": f"ipc://{machine.folder}/Worker.kv"
    }
    settings = json.loads(get_flag(worker.command, FLAG))
    extra = settings.pop(EXTRA)
    assert settings == {name: value for name, value in SETTINGS.items() if name != EXTRA}
    assert extra == SETTINGS[EXTRA] | {
        "artifact": "/here/a/a.safetensors",
        "host_gib": 0.25,
        "disk_path": f"{machine.folder}/mounts/Worker-2/k",
    }
    environment = worker.environment
    assert environment["KEEP"] == "/modelsx /here/m"
    assert environment["DYN_EVENT_PLANE"] == "nats"
    assert environment["DYN_NAMESPACE"] == "ns-g"
    assert environment["DYN_TCP_RPC_HOST"] == "127.0.0.1"
    assert "NATS_SERVER" not in environment
    assert get_flag(front.command, "--http-port") == "8123"
    assert get_flag(front.command, "--http-host") == "127.0.0.1"
    assert get_flag(front.command, "--kv-cache-block-size") == "32"
    assert (planned.url, front.health) == ("http://127.0.0.1:8123", None)
    assert worker.health.endswith(f":{environment['DYN_SYSTEM_PORT']}/health")


def test_every_change_is_told(machine):
    """Nothing differs from the manifest but what the lines say."""
    planned = plan(manifest(), machine, None)
    lines = "\n".join(told(planned))
    before = {c.name: c for c in manifest().components}
    for process in planned.processes:
        component = before[process.name]
        for name, value in process.environment.items():
            if name in ("PATH", "PYTHONPATH") or component.environment.get(name) == value:
                continue
            inherited = name not in component.environment and f"{name}=" not in lines
            assert inherited or f"{name}={value}" in lines or "/models is /here/m" in lines
        for part in process.command[3:]:
            if part.startswith("--") and part not in component.command:
                assert part in lines, part
    assert "--block-size 32 instead of 16" in lines
    assert "host_gib 0.25 instead of 64" in lines
    assert lines.count("DYN_TCP_RPC_HOST=127.0.0.1") == 1


def test_this_shells_engine_settings_do_not_leak_in(machine, monkeypatch):
    for name in ("DYN_EVENT_PLANE", "VLLM_PORT", "NATS_SERVER", "ETCD_ENDPOINTS"):
        monkeypatch.setenv(name, "leaked")
    for process in plan(manifest(), machine, None).processes:
        assert "leaked" not in process.environment.values()


def test_replicas_have_folders_ports_and_sockets_of_their_own(machine):
    _, a, b = plan(manifest(replicas=2), machine, None).processes
    assert (a.name, b.name) == ("Worker-0", "Worker-1")
    for flag in (FLAG, "--kv-events-config"):
        assert get_flag(a.command, flag) != get_flag(b.command, flag)
    assert a.health != b.health


def test_nats_is_ours_where_the_manifest_names_one(machine):
    graph = manifest(NATS_SERVER="nats://cluster:4222")
    assert needs_nats(graph)
    assert not needs_nats(manifest())
    nats, _, worker = plan(graph, machine, "/bin/nats-server").processes
    assert nats.command[:3] == ("/bin/nats-server", "-a", "127.0.0.1")
    assert worker.environment["NATS_SERVER"] == f"nats://127.0.0.1:{nats.command[4]}"


def test_what_is_asked_for_wins(machine, tmp_path):
    asked = Machine(
        machine.python, tmp_path, machine.mounts, 1, {"exact": "all", "host_gib": 2}, {"OMP_NUM_THREADS": "2"}
    )
    worker = plan(manifest(), asked, None).processes[-1]
    extra = json.loads(get_flag(worker.command, FLAG))[EXTRA]
    assert (extra["exact"], extra["host_gib"]) == ("all", 2)
    assert worker.environment["OMP_NUM_THREADS"] == "2"
    unknown = Machine(machine.python, tmp_path, machine.mounts, 1, {"exakt": "all"})
    with pytest.raises(ConfigError, match="unknown options exakt"):
        plan(manifest(), unknown, None)


def test_a_cpu_takes_its_time(machine):
    settings = {
        **SETTINGS, "kv_connector": "KvtcConnector", "kv_connector_module_path": "dynamo_kvtc.adapters.connector",
        EXTRA: {"artifact": "/art/a.safetensors", "host_gib": 0.1, "nats": {}, "pull_seconds": 90},
    }  # fmt: skip
    worker = plan(manifest(settings), machine, None).processes[-1]
    extra = json.loads(get_flag(worker.command, FLAG))[EXTRA]
    assert (extra["handoff_seconds"], extra["pull_seconds"], extra["load_seconds"]) == (60, 90, 120)


def test_kvbm_budgets_and_ports(machine):
    settings = {
        "kv_connector": "DynamoConnector", "kv_connector_module_path": "dynamo_kvtc.adapters.kvbm",
        "kv_load_failure_policy": "recompute", EXTRA: {"artifact": "/art/a.safetensors"},
    }  # fmt: skip
    worker = plan(
        manifest(settings, DYN_KVBM_CPU_CACHE_GB="64", DYN_KVBM_DISK_CACHE_GB="0.1"), machine, None
    ).processes[-1]
    assert worker.environment["DYN_KVBM_CPU_CACHE_GB"] == "0.25"
    assert worker.environment["DYN_KVBM_DISK_CACHE_GB"] == "0.1"
    assert len({worker.environment[n] for n in worker.environment if n.startswith("DYN_KVBM") and "PORT" in n}) == 3
    failing = {**settings, "kv_load_failure_policy": "fail"}
    with pytest.raises(ConfigError, match="kv_load_failure_policy is 'fail'"):
        plan(manifest(failing), machine, None)


@pytest.mark.parametrize(
    ("command", "value", "made"),
    [
        (["a"], "1", ["a", "--f", "1"]),
        (["--f", "0", "a"], "1", ["--f", "1", "a"]),
        (["--f=0", "a"], "1", ["--f", "1", "a"]),
        (["--f", "0", "a", "--f=2"], "1", ["--f", "1", "a"]),
        (["a", "--f"], None, ["a", "--f"]),
        (["a"], None, ["a", "--f"]),
        (["--ff", "0"], "1", ["--ff", "0", "--f", "1"]),
    ],
)
def test_flags(command, value, made):
    assert set_flag(command, "--f", value) == made
    assert get_flag(made, "--f") == (value or "")


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} on 127.0.0.1 is in use .*--port"):
            check_port(port)
    check_port(port)
