"""Faults while conversations go on: what comes back is right, no call waits, the books balance, and it all goes on."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
import time

import pytest

from dynamo_kvtc.codec.artifact import save_artifact
from dynamo_kvtc.errors import ArtifactError, ArtifactFormatError, ArtifactMismatchError
from dynamo_kvtc.tier.build import open_tier
from dynamo_kvtc.tier.options import TierOptions
from tests.builders import case_seed, make_artifact
from tests.soak_tier import soak
from tests.tier.parts import MIB_OF_GIB, SHAPE, Engine, load, store
from tests.tier.traffic import Traffic, World, check_nothing_is_held

SMALL_HOST = {"host_gib": 0.05 * MIB_OF_GIB}
WAITS_FOR_NOTHING = 10.0
"""Seconds a call on the engine's thread may take: it takes milliseconds, but on a busy machine others have the
interpreter. What waited for a broken disk would take longer."""


@pytest.fixture
def world():
    return World(case_seed())


def calm(traffic, faults=False):
    traffic.check_at_rest(faults)
    assert max(client.slowest_call for client in traffic.clients) < WAITS_FOR_NOTHING


@pytest.mark.parametrize(
    ("what", "number"), [("write", errno.ENOSPC), ("sync", errno.EIO), ("write", errno.EROFS), ("read", errno.EIO)]
)
def test_a_disk_that_fails(world, folder, what, number):
    tier = world.engine.tier(folder / "tier", **SMALL_HOST)
    traffic = Traffic(world, tier, case_seed())
    data = tier._store.disk._data
    good = {name: getattr(data, name) for name in ("write", "sync", "read", "read_cached")}

    def bad(*what):
        raise OSError(number, os.strerror(number))

    for name in ("read", "read_cached") if what == "read" else (what,):
        setattr(data, name, bad)
    for _ in range(40):
        traffic.run(60, turns=6)
        tier.refresh()
        if tier.metrics.value("kvtc_errors", f"disk_{what if what == 'read' else 'write'}_{errno.errorcode[number]}"):
            break
    else:
        pytest.fail("the disk was never asked")
    for name, door in good.items():
        setattr(data, name, door)
    tier.flush(60)  # says once that something was lost
    tier._store.disk._queue.refuse_until = 0.0
    traffic.run(60, turns=12)
    calm(traffic)
    assert tier.close()


def test_a_slow_disk(world, folder):
    """A hundred times what it takes here: 20 ms for a record. Reads past their deadline are misses."""
    tier = world.engine.tier(folder / "tier", write_through=True, read_seconds=0.1, **SMALL_HOST)
    traffic = Traffic(world, tier, case_seed())
    traffic.run(60, turns=8)
    tier.flush()
    data = tier._store.disk._data
    quick = data.write, data.read

    def slow(door, seconds):
        return lambda *what: (time.sleep(seconds), door(*what))[1]

    data.read_cached = lambda *what: False
    data.write, data.read = slow(data.write, 0.02), slow(data.read, 0.02)
    traffic.run(60, turns=12)
    assert traffic.counted()["load"] > 0
    data.read = slow(data.read, 1.0)
    traffic.run(60, turns=6)
    data.write, data.read = quick
    time.sleep(1.1)  # until the readers that were left behind are back
    traffic.run(60, turns=12)
    calm(traffic)
    assert tier.close()


def test_threads_that_raise(world, folder):
    tier = world.engine.tier(folder / "tier", **SMALL_HOST)
    traffic = Traffic(world, tier, case_seed())
    rng = random.Random(case_seed())

    def shaky(door, name):
        def call(*what):
            if rng.random() < 0.2:
                raise RuntimeError(f"{name}, on purpose")
            return door(*what)

        return call

    owners = {"stage": tier.transcoder, "encode": tier.transcoder, "promise": tier.transcoder, "load": tier.transcoder,
              "put_many": tier._store}  # fmt: skip
    for name, owner in owners.items():
        setattr(owner, name, shaky(getattr(owner, name), name))
    traffic.run(60, turns=40)
    for name, owner in owners.items():
        delattr(owner, name)
    m = tier.metrics
    for kind in ("encode_RuntimeError", "promise_RuntimeError", "load_RuntimeError"):
        assert m.value("kvtc_errors", kind) > 0
    loaded = m.value("kvtc_loaded_blocks", "loaded")
    traffic.run(60, turns=15)
    assert m.value("kvtc_loaded_blocks", "loaded") > loaded
    calm(traffic, faults=True)
    assert tier.close()


@pytest.mark.parametrize("hangs", [False, True])
def test_the_end_comes_in_the_middle(world, folder, hangs):
    """Every callback still comes, no client is left waiting, and no thread of the tier is left behind but one that
    hangs."""
    tier = world.engine.tier(folder / "tier", write_through=True, **SMALL_HOST)
    traffic = Traffic(world, tier, case_seed())
    traffic.run(60, turns=4)
    before = threading.active_count()
    beside = traffic.behind()
    gate = threading.Event()
    if hangs:
        load_ = tier.transcoder.load
        tier.transcoder.load = lambda *what: (gate.wait(60), load_(*what))[1]
    time.sleep(0.5)
    began = time.monotonic()
    ended = tier.close(3.0)
    assert time.monotonic() - began < 20
    if hangs:
        gate.set()
    else:
        assert ended
    beside.join(100)
    assert not beside.is_alive()
    assert traffic.failure is None
    assert threading.active_count() < before
    check_nothing_is_held(tier)


def test_the_artifact_at_start(folder):
    """Missing, damaged, another model's: refused, saying so, and nothing on disk is lost by it."""
    engine = Engine(case_seed())
    path = folder / "artifact.safetensors"
    m = engine.artifact.manifest
    manifest, tensors = m, engine.artifact._tensors
    save_artifact(path, manifest, tensors)
    options = TierOptions(
        str(path), point="fine", host_gib=2 * MIB_OF_GIB, disk_gib=16 * MIB_OF_GIB, disk_path=str(folder / "tier"),
        write_through=True,
    )  # fmt: skip

    def opened(cache=None):
        return open_tier(options, cache or engine.cache(), engine.pages)

    tier = opened()
    blocks = engine.sequence(tier, 6)
    assert store(tier, blocks) == []
    assert tier.close()
    good = path.read_bytes()
    path.write_bytes(good[:-3])
    with pytest.raises(ArtifactFormatError):
        opened()
    path.unlink()
    with pytest.raises(ArtifactError, match="make one with `kvtc calibrate`"):
        opened()
    other = make_artifact(SHAPE, groups=((0, 1), (1, 3)), seed=99, components=20)
    save_artifact(path, *other[:2])
    replaced = opened()
    assert replaced.lookup([replaced.key(b"x" * 32), *(b.key for b in engine.sequence(replaced, 6))]) == []
    replaced.close()
    wrong = engine.cache(model=m.model.__class__("m", m.model.revision, "22" * 32, m.model.architecture))
    with pytest.raises(ArtifactMismatchError):
        opened(wrong)
    path.write_bytes(good)
    again = opened()
    assert again.lookup([b.key for b in blocks]) == ["disk"] * 6
    assert load(again, blocks) == []
    again.close()


FULL = """
import os, sys
from pathlib import Path
from dynamo_kvtc.errors import ConfigError
from tests.tier.parts import MIB_OF_GIB
from tests.tier.traffic import Traffic, World
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
world = World(seed)
try:
    world.engine.tier(folder / "large", disk_gib=64 * MIB_OF_GIB)
except ConfigError as exc:
    assert "lower the budget" in str(exc), exc
tier = world.engine.tier(folder / "tier", disk_gib=8 * MIB_OF_GIB, write_through=True, host_gib=0.05 * MIB_OF_GIB)
traffic = Traffic(world, tier, seed)
ballast = open(folder / "ballast", "wb", buffering=0)
try:
    while True:
        ballast.write(bytes(4096))
except OSError:
    pass
for _ in range(60):
    traffic.run(60, turns=8)
    tier.refresh()
    kinds = [s.labels["kind"] for f in tier.metrics.registry.collect() for s in f.samples
             if s.name == "kvtc_errors_total" and s.labels["kind"].startswith("disk_write")]
    if kinds:
        break
assert kinds, "the disk was never too full"
ballast.truncate(0)
tier.flush(60)
tier._store.disk._queue.refuse_until = 0.0
before = tier._store.disk.stats().entries
traffic.run(60, turns=20)
traffic.check_at_rest()
assert tier._store.disk.stats().entries > before
assert tier.close()
print("went on after", *kinds)
"""


def test_a_disk_that_is_full(folder):
    """A file system of 9 MiB, full to the last page: the records' file has its room, the index does not."""
    tools = [shutil.which(name) for name in ("unshare", "mount")]
    if None in tools or subprocess.run(["unshare", "-Urm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted without privileges here")
    script = folder / "full.py"
    script.write_text(FULL)
    (folder / "disk").mkdir()
    mounted = (
        f"mount -t tmpfs -o size=9m none {folder}/disk && exec {sys.executable} {script} {folder}/disk {case_seed()}"
    )
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", mounted], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in ("", *sys.path) if p) or "."}, cwd=os.getcwd(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "went on after disk_write" in done.stdout


def test_a_short_soak(folder):
    figures = soak(folder, 20.0, 4, case_seed(), growth_bytes=64 << 20)
    assert figures["host_evictions"] > 0
    assert figures["blocks_loaded"] > 0
