"""Who may import whom, read from the source of every module; and what a bare import must not pull in."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dynamo_kvtc"

# A room imports itself and rooms to its left. `__init__` is the package's own version number.
ROOMS = [
    "__init__", "errors", "types", "config", "progress", "ops", "store", "events", "codec", "transfer", "tier", "hf",
    "evaluate", "calibrate", "demo", "bench", "adapters", "doctor", "cli",
]  # fmt: skip

# Third parties and the modules (path prefixes inside the package) that may import them.
DOORS = {
    "transformers": ["hf/"],
    "tokenizers": ["hf/"],
    "gguf": ["hf/"],
    "accelerate": ["hf/"],
    "datasets": ["hf/"],
    "huggingface_hub": ["hf/"],
    "matplotlib": ["evaluate/plot.py", "demo/report.py", "bench/report.py"],
    "safetensors": ["codec/artifact.py", "hf/"],
    "msgspec": ["codec/", "events/", "transfer/wire.py", "calibrate/run.py", "cli/inspect.py"],
    "zlib": ["ops/deflate/", "ops/checksum/reference.py"],
    "click": ["cli/", "progress"],
    "rich": [
        "cli/",
        "progress",
        "evaluate/report.py",
        "demo/report.py",
        "demo/engine_report.py",
        "bench/report.py",
        "bench/store_report.py",
        "bench/pull_report.py",
    ],
    "triton": ["ops/*/triton.py", "ops/project/hopper.py"],
    "nvidia": ["ops/deflate/"],
    "vllm": ["adapters/vllm", "adapters/kvbm"],
    "kvbm": ["adapters/kvbm"],
    "dynamo": ["adapters/kvbm"],
    "zmq": ["adapters/kvbm/worker.py"],
    "prometheus_client": ["tier/metrics.py"],
    "nats": ["events/nats_client.py"],
    "nkeys": ["events/nats_client.py"],
    "nixl": ["transfer/nixl.py"],
    # What the store uses, and what it is measured against.
    "sqlite3": ["store/disk_index.py", "bench/store_engines.py"],
    "lmdb": ["bench/store_engines.py"],
    "rocksdict": ["bench/store_engines.py"],
    "diskcache": ["bench/store_engines.py"],
}
NUMBA = ["reference.py", "cpu.py"]
NUMBA_OUTSIDE = ["calibrate/allocate.py", "calibrate/programme.py", "codec/header_scan.py"]
HEAVY = [
    "transformers", "datasets", "gguf", "triton", "vllm", "kvbm", "zmq", "nats", "matplotlib", "click", "rich",
    "prometheus_client",
]  # fmt: skip

MODULES = sorted(PACKAGE.rglob("*.py"))


def inside(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(dotted: str) -> str:
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> Iterator[str]:
    """Dotted names that the module imports; "a.b" for ``from a import b``, and names given to import_module."""
    tree = ast.parse(path.read_text(), str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{inside(path)}:{node.lineno}: write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "_import",
            "importorskip",
        ):
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))


def allowed(path: str, places: list[str]) -> bool:
    return any(path.startswith(place) or Path(path).match(place) for place in places)


@pytest.mark.parametrize("path", MODULES, ids=inside)
def test_a_room_imports_itself_and_rooms_to_its_left(path):
    room = inside(path).split("/")[0].removesuffix(".py")
    assert room in ROOMS, f"{room} is a new room: give it a place in ROOMS"
    for name in imports(path):
        if name.split(".")[0] != "dynamo_kvtc":
            continue
        other = room_of(name)
        if other not in ROOMS:
            # ``from dynamo_kvtc import __version__``: a name of the package itself.
            other = "__init__"
        assert ROOMS.index(other) <= ROOMS.index(room), f"{inside(path)} imports {name}: {other} is right of {room}"


@pytest.mark.parametrize("path", [p for p in MODULES if inside(p).startswith("ops/")], ids=inside)
def test_an_op_never_imports_another_op(path):
    own = inside(path).split("/")[1]
    for name in imports(path):
        parts = name.split(".")
        if parts[:2] == ["dynamo_kvtc", "ops"]:
            assert len(parts) > 2, f"{inside(path)} imports {name}"
            assert parts[2] == own, f"{inside(path)} imports {name}"


SIBLINGS = ["ops", "store"]


@pytest.mark.parametrize("path", [p for p in MODULES if inside(p).split("/")[0] in SIBLINGS], ids=inside)
def test_siblings_do_not_know_each_other(path):
    """``store`` has bytes, no tensors; no op stores anything."""
    own = inside(path).split("/")[0]
    for name in imports(path):
        other = room_of(name) if name.startswith("dynamo_kvtc.") else name.split(".")[0]
        assert other not in SIBLINGS or other == own, f"{inside(path)} imports {name}"
        assert own != "store" or other not in ("torch", "numpy"), f"{inside(path)} imports {name}"


@pytest.mark.parametrize(
    ("module", "not_these"),
    [
        ("codec/kvtc.py", ["paper", "pipeline", "policy"]),
        ("codec/kvtc_point.py", ["kvtc", "paper", "pipeline", "policy", "record"]),
        ("codec/lanes.py", ["artifact", "kvtc", "kvtc_point", "paper", "pipeline", "policy"]),
        ("codec/paper.py", ["kvtc", "pipeline", "policy"]),
        ("codec/record.py", ["artifact", "kvtc", "paper", "pipeline", "policy"]),
        ("codec/artifact.py", ["kvtc", "paper", "pipeline", "policy"]),
        ("codec/policy.py", ["artifact", "kvtc", "paper", "pipeline", "record"]),
        ("codec/channels.py", ["artifact", "kvtc", "paper", "pipeline", "record", "policy"]),
    ],
)
def test_parts_of_the_codec_do_not_know_each_other(module, not_these):
    found = {name.split(".")[2] for name in imports(PACKAGE / module) if name.startswith("dynamo_kvtc.codec.")}
    assert not found & set(not_these)


@pytest.mark.parametrize("path", MODULES, ids=inside)
def test_third_parties_enter_at_one_door(path):
    place = inside(path)
    for name in imports(path):
        top = name.split(".")[0]
        if top in DOORS:
            assert allowed(place, DOORS[top]), f"{place} imports {name}; its door is {', '.join(DOORS[top])}"
        if top == "numba":
            in_op = place.startswith("ops/") and Path(place).name in NUMBA
            assert in_op or place in NUMBA_OUTSIDE, f"{place} imports numba"


def test_deflate_is_in_one_place():
    """The checksum may take zlib's crc32 and no more."""
    tree = ast.parse((PACKAGE / "ops/checksum/reference.py").read_text())
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "zlib"}
    assert used == {"crc32"}


@pytest.mark.parametrize(
    "module",
    ["dynamo_kvtc", "dynamo_kvtc.codec.pipeline", "dynamo_kvtc.tier.tier", "dynamo_kvtc.adapters.vllm",
     "dynamo_kvtc.adapters.kvbm"],
)  # fmt: skip
def test_a_bare_import_pulls_in_nothing_heavy(module):
    code = f"import sys, {module}; print(' '.join(sorted(name.split('.')[0] for name in sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent, timeout=300
    )
    loaded = set(done.stdout.split())
    assert "dynamo_kvtc" in loaded
    assert not loaded & set(HEAVY), f"import {module} pulled in {sorted(loaded & set(HEAVY))}"


def test_the_rules_see_what_they_look_for(tmp_path):
    """The parser itself: every way of importing is noticed."""
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import a.b\nfrom c import d\ndef f():\n    import e\n    import importlib\n    importlib.import_module('g')\n"
    )
    assert {"a.b", "c.d", "e", "g"} <= set(imports(probe))
