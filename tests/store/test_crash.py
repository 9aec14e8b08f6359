"""kill -9 at any moment: what was said to be on the disk is there, whole; nothing torn is served.

KVTC_KILLS says how often (10; `make soak`: 100).
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import pytest

from dynamo_kvtc.store.disk_file import used_bytes
from tests.store.stores import MIB, disk, key_of, record_of, size_of

KILLS = int(os.environ.get("KVTC_KILLS", "10"))

CHILD = """
import os, sys
from dynamo_kvtc.store.disk import DiskStore
from tests.store.stores import key_of, record_of, size_of
folder, budget, first = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
told = lambda key: os.write(1, b"%d\\n" % int.from_bytes(key, "big"))
store = DiskStore(folder, budget, queue_bytes=1 << 20, on_stored=told)
os.write(1, b"open\\n")
n = first
while True:
    if store.put(key_of(n), record_of(n, size_of(n))):
        if n % 7 == 3:
            store.touch([key_of(n - 3)])
        if n % 11 == 5:
            store.remove(key_of(n - 4))
        n += 1
"""


@pytest.mark.parametrize("budget", [8 * MIB, 128 * MIB])
def test_killed(folder, budget):
    rng, path = random.Random(), folder / "s"
    told: list[int] = []
    first = 0
    for _ in range(-(-KILLS // 2)):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(path), str(budget), str(first)], stdout=subprocess.PIPE
        )  # fmt: skip
        assert child.stdout is not None
        assert child.stdout.readline() == b"open\n"
        time.sleep(rng.choice((0.0, 0.02, 0.1, 0.3)) * rng.random())
        child.kill()
        out = child.stdout.read()
        child.wait(10)
        # The last line may be torn, the records must not.
        now = [int(line) for line in out[: out.rfind(b"\n") + 1].split()]
        told += now
        first = max(told, default=-1) + 2000

        store = disk(path, budget)
        try:
            assert used_bytes(path) <= budget
            here = {n for n in range(first) if store.contains(key_of(n))}
            for n in sorted(here):
                lease = store.get(key_of(n))
                assert lease is not None
                assert lease.record == record_of(n, size_of(n))
            assert not store.stats().errors
            # The child removed some; with the small budget older ones were evicted.
            lasting = [n for n in now[-60:] if (n + 4) % 11 != 5]
            assert set(lasting) <= here
            if budget > 8 * MIB and store.stats().used_bytes < budget // 2:
                assert {n for n in told if (n + 4) % 11 != 5} <= here
        finally:
            assert store.close()
