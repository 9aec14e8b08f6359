"""kill -9 of an engine's process while its tier writes, and a start on the same folder: what was said to be on disk is
found and right, and nothing else than right is ever loaded.

KVTC_KILLS says how often (30; `make soak`: 100).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

from dynamo_kvtc.tier.transcode import Block
from tests.builders import case_seed
from tests.tier.parts import BLOCK_TOKENS, MIB_OF_GIB, load
from tests.tier.traffic import World

KILLS = int(os.environ.get("KVTC_KILLS", "30"))
DISK_MIB = 24
TIER = {"host_gib": 0.05 * MIB_OF_GIB, "disk_gib": DISK_MIB * MIB_OF_GIB, "write_through": True}

# Imports once, then a process of its own for every life: "FIRST FILE" is answered by its pid, then by "dead". Torch's
# threads do not outlive a fork: it must not have computed anything before.
LIVES = """
import os, sys
from tests.tier.test_killed import live
for line in sys.stdin:
    first, told = line.split()
    pid = os.fork()
    if not pid:
        live(int(sys.argv[1]), sys.argv[2], int(first), told)
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""


def live(seed: int, folder: str, first: int, told: str) -> None:
    """Stores one conversation after the other, and writes down which blocks are said to be on disk, until it is
    killed."""
    out = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    world = World(seed)
    tier = world.engine.tier(folder, **TIER)
    # Whether or not the host has it, too.
    tier._store.disk.on_stored = lambda key: os.write(out, key.hex().encode() + b"\n")
    os.write(out, b"open\n")
    pages = world.engine.order
    for name in range(first, 1 << 40):
        keys = world.keys(tier, name, world.blocks)
        world.compute(name, list(enumerate(pages[: world.blocks])))
        wanted = [i for i, yes in enumerate(tier.admit(keys)) if yes]
        tier.store([Block(keys[i], pages[i], i * BLOCK_TOKENS) for i in wanted], tail=keys[-2:])
        if name % 3 == 0:
            tier.flush()


def test_killed(folder):
    seed, rng = case_seed(), random.Random(case_seed())
    world, told_all, first = World(seed), {}, 0
    lives = subprocess.Popen(
        [sys.executable, "-c", LIVES, str(seed), str(folder / "tier")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        for life in range(KILLS):
            told = folder / f"told-{life}"
            lives.stdin.write(f"{first} {told}\n")
            lives.stdin.flush()
            pid = int(lives.stdout.readline())
            deadline = time.monotonic() + 120
            # One in six dies before its first record is there.
            lines = 1 if life % 6 == 5 else 2
            while not told.exists() or told.read_bytes().count(b"\n") < lines:
                assert time.monotonic() < deadline, "it does not start"
                time.sleep(0.002)
            time.sleep(rng.choice((0.0, 0.05, 0.3)) * rng.random())
            os.kill(pid, signal.SIGKILL)
            assert lives.stdout.readline() == "dead\n"
            # The last line may be torn.
            now = [bytes.fromhex(x) for x in told.read_text().split("\n")[:-1] if x != "open"]
            first = check(world, folder / "tier", first, now, told_all, rng)
    finally:
        lives.stdin.close()
        lives.wait(20)
    assert len(told_all) > 5 * KILLS


def check(world, path, first, now, told_all, rng) -> int:
    """Opens the tier as a restart does. told_all: key -> (conversation, block) of what was ever said to be there.
    Where the next life begins."""
    tier = world.engine.tier(path, **TIER)
    disk = tier._store.disk
    known = {
        key: (name, i)
        for name in range(first, first + 400)
        for i, key in enumerate(world.keys(tier, name, world.blocks))
    }
    told = {key: known[key] for key in now}
    told_all |= told
    lasting = list(told_all) if disk.stats().used_bytes < (DISK_MIB << 20) // 2 else now[-60:]
    assert all(disk.durable(key) for key in lasting), "said to be on disk, and is not there"
    here = {key: at for key, at in known.items() if disk.contains(key)}
    older = [key for key in told_all if key not in here and disk.contains(key)]
    here |= {key: told_all[key] for key in rng.sample(older, min(40, len(older)))}
    pages = world.engine.order
    listed = list(here.items())
    for at in range(0, len(listed), len(pages)):
        some = listed[at : at + len(pages)]
        blocks = [Block(key, page, i * BLOCK_TOKENS) for (key, (_, i)), page in zip(some, pages, strict=False)]
        world.engine.wipe([b.block_id for b in blocks])
        assert load(tier, blocks) == []
        for (_, (name, i)), b in zip(some, blocks, strict=True):
            assert world.right(name, i, b.block_id), f"{name}/{i} is wrong"
    assert not disk.stats().errors
    assert tier.close()
    return max((name for name, _ in told.values()), default=first) + 20
