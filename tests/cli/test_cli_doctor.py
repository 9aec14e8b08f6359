"""``kvtc doctor``: every line's ways to be wrong, each with a remedy; what a purpose needs; no hang, nothing left."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import resource
import socket
import subprocess
import sys
import threading
import time

import pytest
from click.testing import CliRunner

from dynamo_kvtc.cli.main import main
from dynamo_kvtc.codec.artifact import save_artifact
from dynamo_kvtc.doctor import gpu, machine, software
from dynamo_kvtc.doctor import run as doctor
from dynamo_kvtc.doctor.gpu import Device, look
from dynamo_kvtc.doctor.line import missing, ok
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.store.disk import DiskStore
from dynamo_kvtc.types import KVShape
from tests.builders import make_artifact
from tests.store.conftest import folder

__all__ = ["folder"]

NO_GPU = Device(missing("GPU", "a GPU", "none"))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(gpu, "look", lambda: NO_GPU)
    monkeypatch.delenv("NATS_SERVER", raising=False)


def versions(monkeypatch, **known):
    def version(package):
        if known.get(package) is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return known[package]

    monkeypatch.setattr(importlib.metadata, "version", version)


def run(*arguments):
    return CliRunner().invoke(main, ["doctor", *map(str, arguments)])


def test_the_table_and_its_exit_code(quick):
    done = run()
    assert done.exit_code == 0, done.output
    assert "coding and what was asked for: can run" in done.output
    for name in ("Python", "torch", "GPU", "pinned memory", "vLLM", "KVBM", "NATS", "host memory", "disk tier"):
        assert name in done.output
    # Nothing of a remedy is cut or taken for markup.
    assert "pip install dynamo-kvtc[" in done.output
    done = run("--for", "gpu")
    assert done.exit_code == 1
    assert "gpu: cannot run: GPU" in done.output


def test_json(quick, folder):
    done = run("--json", "--for", "cpu", "--for", "gpu", "--disk-path", folder, "--disk-gib", 0.01)
    told = json.loads(done.stdout)
    assert (done.exit_code, told["able"], told["for"]) == (1, False, ["cpu", "gpu"])
    lines = {line["name"]: line for line in told["lines"]}
    assert lines["disk tier"]["status"] == "ok"
    assert {n for n, line in lines.items() if line["needed"]} == {
        "Python", "torch", "GPU", "Triton", "pinned memory", "disk tier",
    }  # fmt: skip
    assert all(line["remedy"] for line in told["lines"] if line["status"] != "ok")
    assert list(folder.iterdir()) == []


def test_options_that_do_not_go_together(quick):
    for arguments, words in (
        (("--model", "x"), "without --artifact"),
        (("--disk-gib", 1), "without --disk-path"),
        (("--for", "amd"), "'amd' is not one of"),
        (("--host-gib", -1), "-1.0 is not in the range"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2
        assert words in done.stderr


@pytest.mark.parametrize(
    ("known", "line", "status", "words"),
    [
        ({}, software.vllm, "missing", "0.25, 0.31"),
        ({"vllm": "0.40.2"}, software.vllm, "problem", "vllm 0.40.2 is installed"),
        ({"vllm": "0.31.0"}, software.vllm, "ok", "0.31.0 (known: 0.25, 0.31)"),
        ({}, software.kvbm, "missing", "pip install kvbm==1.6.1"),
        ({"kvbm": "2.0.0"}, software.kvbm, "problem", "kvbm 2.0.0 is installed"),
        ({"kvbm": "1.5.1"}, software.kvbm, "problem", "--force-reinstall kvbm==1.5.1"),
        ({"triton": "3.5.9"}, software.triton, "problem", "3.6 or newer"),
        ({"triton": "3.6.0"}, software.triton, "ok", "3.6.0"),
        ({"torch": "2.10.0+cu130"}, software.torch, "ok", "2.10.0+cu130"),
        ({"nvidia-nvcomp-cu13": "6.0.1"}, software.nvcomp, "ok", "nvidia-nvcomp-cu13 6.0.1"),
        ({"nvidia-nvcomp-cu12": "5.1"}, software.nvcomp, "problem", "--upgrade dynamo-kvtc[gpu]"),
        ({}, software.dynamo, "missing", "pip install dynamo-kvtc[dynamo]"),
    ],
)
def test_software(monkeypatch, known, line, status, words):
    versions(monkeypatch, **known)
    for name in [n for n in sys.modules if n.startswith("dynamo_kvtc.adapters.vllm")]:
        monkeypatch.delitem(sys.modules, name)
    found = line()
    assert found.status == status
    assert words in found.found + found.remedy
    assert (found.remedy == "") == (status == "ok")


def test_no_engine_is_imported():
    script = (
        "import sys\nfrom dynamo_kvtc.cli.main import main\n"
        "try:\n    main(['doctor', '--json'], standalone_mode=False)\nexcept BaseException: pass\n"
        "assert not {'vllm', 'kvbm', 'dynamo', 'transformers', 'nats', 'triton'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_gpu_answers():
    told = {
        "count": 2,
        "cuda": "13.0",
        "name": "H",
        "total": 140 << 30,
        "free": 1 << 30,
        "capability": [9, 0],
        "pinned": 0,
    }
    good = look(f"print({json.dumps(told)!r})")
    assert (good.line.status, good.pinned) == ("ok", 0)
    assert "2 x H, 140.0 GiB" in good.line.found
    old = look(f"print({json.dumps({**told, 'capability': [7, 5]})!r})")
    assert "8.0 (A100) or newer" in old.line.remedy
    for probe, words in (
        ("import os; os.abort()", "CUDA cannot be asked"),
        ("raise RuntimeError('no driver')", "no driver"),
        ("print('[1')", "CUDA cannot be asked"),
    ):
        found = look(probe).line
        assert found.status == "problem"
        assert words in found.found
    began = time.monotonic()
    assert "no answer from CUDA" in look("import time; time.sleep(60)", 0.3).line.found
    assert time.monotonic() - began < 10


def test_no_gpu_says_why(monkeypatch):
    monkeypatch.setattr(gpu, "driver_version", lambda: None)
    assert gpu._none("13.0").status == "missing"
    monkeypatch.setattr(gpu, "driver_version", lambda: "580.1")
    assert "built for CUDA" in gpu._none(None).remedy
    assert "CUDA_VISIBLE_DEVICES" in gpu._none("13.0").remedy


def test_the_drivers_version(tmp_path):
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun\nGCC\n")
    assert gpu.driver_version(str(tmp_path / "version")) == "580.65.06"
    assert gpu.driver_version(str(tmp_path / "none")) is None


def test_memory_and_pinning(monkeypatch):
    assert machine.memory(4, 8 << 30).status == "ok"
    short = machine.memory(8, 8 << 30)
    assert short.status == "problem"
    assert "host_gib to 7.5 or less" in short.remedy
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64 << 10, resource.RLIM_INFINITY))
    good = ok("GPU", "x")
    assert machine.pinned(Device(good, 0), 1).status == "ok"
    bad = machine.pinned(Device(good, 2), 1)
    assert bad.status == "problem"
    assert "limit 64 KiB" in bad.found
    assert "ulimit -l unlimited" in bad.remedy
    assert machine.pinned(NO_GPU, 1).status == "ok"


def test_the_disk(folder):
    assert machine.disk(None, 0).status == "ok"
    assert machine.disk(str(folder / "new"), 0.01).status == "ok"
    assert not (folder / "new").exists()
    for path, budget, words in (
        (folder / "a" / "b", 0.01, "mkdir -p"),
        (folder, 1 << 20, "on a larger disk"),
        (folder, 0.0001, "at least"),
        ("/proc", 0.01, "this user may write"),
    ):
        found = machine.disk(str(path), budget)
        assert found.status == "problem"
        assert words in found.remedy
    (folder / "file").write_text("x")
    assert machine.disk(str(folder / "file"), 0.01).remedy == "name a folder"
    store = DiskStore(folder / "rank0", 8 << 20)
    assert "in use by another process" in machine.disk(str(folder), 0.01).found
    store.close()
    used = machine.disk(str(folder), 0.01)
    assert used.status == "ok"
    assert "held by the tier" in used.found
    # Looking took no lock that stays.
    with open(folder / "rank0" / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (folder / "rank1").mkdir()
    (folder / "rank1" / "diary").write_text("dear")
    assert "files of others" in machine.disk(str(folder), 0.01).found


def test_nats():
    assert machine.nats(None).status == "ok"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        # Nobody accepts: connected, but without a greeting.
        began = time.monotonic()
        silent = machine.nats(f"nats://127.0.0.1:{port}", 0.3)
        assert silent.status == "problem"
        assert time.monotonic() - began < 3

        def greet():
            for _ in range(2):
                connection = server.accept()[0]
                with connection:
                    connection.sendall(b'INFO {"server_id":"x"}\r\n')

        thread = threading.Thread(target=greet, daemon=True)
        thread.start()
        found = machine.nats(f"nats://127.0.0.1:{port}")
        thread.join(5)
        assert found.status in ("ok", "missing")
        assert "answers" in found.found
    gone = machine.nats(f"127.0.0.1:{port},nats://[bad", 0.5)
    assert gone.status == "problem"
    assert "NATS_SERVER to nats://HOST:4222" in gone.remedy


def test_an_artifact(quick, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    manifest, tensors, _ = make_artifact(KVShape(3, 2, 16, "bfloat16"), seed=1, components=8)
    save_artifact(path, manifest, tensors)
    done = run("--artifact", path)
    assert done.exit_code == 0
    assert "points fine, coarse" in " ".join(done.output.split())
    done = run("--artifact", path, "--model", tmp_path, "--json")
    lines = {line["name"]: line for line in json.loads(done.stdout)["lines"]}
    assert done.exit_code == 1
    assert lines["model"]["status"] == "problem"
    assert "no readable config" in lines["model"]["found"]
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    for wrong in (path, tmp_path / "none"):
        done = run("--artifact", wrong, "--json")
        assert done.exit_code == 1
        assert json.loads(done.stdout)["lines"][-1]["status"] == "problem"


@pytest.mark.model
def test_the_artifacts_model(smollm2_dir, tmp_path):
    from tests.adapters.vllm.artifacts import any_artifact

    path = any_artifact(smollm2_dir, tmp_path / "any.safetensors")
    report = doctor.examine(doctor.Asked(artifact=str(path), model=str(smollm2_dir)))
    assert [line.status for line in report.lines[-2:]] == ["ok", "ok"]


def test_needs_name_lines(quick):
    names = {line.name for line in doctor.examine(doctor.Asked()).lines}
    assert {name for needs in doctor.NEEDS.values() for name in needs} <= names
    with pytest.raises(ConfigError):
        doctor.examine(doctor.Asked(model="x"))
