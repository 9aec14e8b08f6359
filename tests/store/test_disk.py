"""The disk tier: its budget as the system counts it, restarts, damage, full and slow disks, folders of others."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import sqlite3
import subprocess
import sys
import threading

import pytest

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.store import disk_file
from dynamo_kvtc.store.disk_file import DATA, INDEX, MARKER, MIN_BUDGET_BYTES, DataFile, used_bytes
from tests.store.stores import MIB, disk, key_of, record_of, size_of
from tests.waiting import until


@pytest.fixture
def stores(folder):
    """``stores(**options)``: one in the folder, opened again and again; closed at the end."""
    made = []

    def make(budget: int = 8 * MIB, **options):
        made.append(disk(folder / "s", budget, **options))
        return made[-1]

    yield make
    for store in made:
        store.close()


def taken(store, number: int) -> bytes | None:
    lease = store.get(key_of(number))
    return None if lease is None else bytes(lease.record)


@pytest.mark.parametrize("sizes", ["small", "usual", "large"])
def test_the_systems_count_stays_within_the_budget(stores, sizes):
    store = stores()
    peak = 0
    for i in range({"small": 4000, "usual": 700, "large": 60}[sizes]):
        size = {"small": 1000, "usual": size_of(i), "large": 600_000}[sizes]
        assert store.put(key_of(i, 64), bytes(size))
        if i % 16 == 0:
            store.flush()
            peak = max(peak, used_bytes(store.path))
    assert store.flush()
    stats = store.stats()
    assert max(peak, used_bytes(store.path)) <= store.budget_bytes == stats.budget_bytes
    assert stats.evictions > 0
    assert not stats.errors
    # Full it is, but for the index's and log's share of a budget this small, and padding to pages.
    assert stats.entries * -(-size // 4096) * 4096 > 0.65 * store.budget_bytes or sizes != "small"
    assert stats.used_bytes > 0.65 * store.budget_bytes


def test_found_again_in_order_of_use(stores):
    store = stores()
    for i in range(100):
        store.put(key_of(i), record_of(i, 20_000))
    store.flush()
    store.touch([key_of(i) for i in range(50)])
    assert store.close()
    store = stores()
    assert store.stats().entries == 100
    assert [taken(store, i) for i in (0, 99)] == [record_of(0, 20_000), record_of(99, 20_000)]
    for i in range(100, 360):
        store.put(key_of(i), bytes(20_000))
    store.flush()
    here = [i for i in range(100) if store.contains(key_of(i))]
    assert here
    assert set(here) <= {*range(50), 99}, "what was touched before the restart went last"


def test_removed_stays_removed(stores):
    store = stores()
    for i in range(10):
        store.put(key_of(i), b"x")
    store.flush()
    store.remove(key_of(3))
    store.flush()
    store.put(key_of(4), b"x")
    store.close()
    store = stores()
    assert [i for i in range(10) if store.contains(key_of(i))] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    store.clear()
    store.close()
    assert stores().stats().entries == 0


def test_another_budget_at_the_next_start(stores):
    store = stores(16 * MIB)
    for i in range(300):
        store.put(key_of(i), record_of(i, 30_000))
    store.close()
    for budget in (8 * MIB, 24 * MIB):
        store = stores(budget)
        assert used_bytes(store.path) <= budget
        here = [i for i in range(300) if store.contains(key_of(i))]
        assert 100 < len(here) < 300
        assert all(taken(store, i) == record_of(i, 30_000) for i in here)
        for i in range(1000, 1100):
            assert store.put(key_of(i), bytes(30_000))
        store.flush()
        store.clear()
        for i in range(300):
            store.put(key_of(i), record_of(i, 30_000))
        assert store.close()


@pytest.mark.parametrize("seed", range(8))
def test_flipped_bytes_are_never_served(stores, seed):
    store, rng = stores(), random.Random(seed)
    for i in range(150):
        store.put(key_of(i), record_of(i, size_of(i) // 2))
    store.close()
    for name in (DATA, INDEX):
        with open(store.path / name, "r+b") as file:
            size = file.seek(0, os.SEEK_END)
            for _ in range(60 if name == DATA else seed):
                at = rng.randrange(size)
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1 << rng.randrange(8)]))
    lost = []
    store = stores(on_lost=lost.append)
    there = [i for i in range(150) if store.contains(key_of(i))]
    got = {i: taken(store, i) for i in there}
    bad = [i for i in there if got[i] is None]
    assert all(got[i] == record_of(i, size_of(i) // 2) for i in there if i not in bad)
    assert store.stats().errors.get("corrupt", 0) == len(bad) == len(lost)
    assert not any(store.contains(key_of(i)) for i in bad)
    # An index that turns out to be damaged is begun anew; what was being written then is lost.
    for n in (1000, 2000, 3000):
        assert all(store.put(key_of(n + i), record_of(n + i, 20_000)) for i in range(100))
        if store.flush():
            assert taken(store, n + 99) == record_of(n + 99, 20_000)
    assert store.stats().errors.get("index_damaged", 0) <= 2
    assert taken(store, 3099) == record_of(3099, 20_000)


@pytest.mark.parametrize("name", [DATA, INDEX])
def test_truncated_while_open_and_while_closed(stores, name):
    store = stores()
    for i in range(100):
        store.put(key_of(i), record_of(i, 30_000))
    store.flush()
    if name == DATA:
        os.truncate(store.path / name, MIB)
        for i in range(100):
            assert taken(store, i) in (None, record_of(i, 30_000))
        assert store.stats().errors["read_EIO"] > 0
    store.close()
    os.truncate(store.path / name, 5000)
    store = stores()
    for i in range(100):
        assert taken(store, i) in (None, record_of(i, 30_000))
    assert store.put(key_of(500), b"x")
    assert store.flush()


def test_an_index_of_rubbish_starts_empty(stores):
    store = stores()
    store.put(key_of(1), b"x")
    store.close()
    (store.path / INDEX).write_bytes(os.urandom(50_000))
    store = stores()
    assert store.stats().entries == 0
    assert store.stats().errors == {"index_damaged": 1}
    assert store.put(key_of(1), b"x")
    assert store.flush()


def test_an_index_damaged_while_open_is_begun_anew(stores):
    store = stores()
    for i in range(150):
        store.put(key_of(i), record_of(i, 9000))
    assert store.flush()
    store._writer.index._checkpoint()
    pages = (store.path / INDEX).stat().st_size // 4096
    with open(store.path / INDEX, "r+b") as file:
        file.seek(2 * 4096)
        file.write(b"\xff" * 4096 * (pages - 2))
    store._writer.index._db.execute("PRAGMA shrink_memory")
    store._writer.index._db.execute("PRAGMA cache_size=1")
    for i in range(150):
        store.remove(key_of(i)) if i % 2 else store.touch([key_of(i)])
    store.flush()
    assert store.stats().errors.get("index_damaged") == 1
    assert store.put(key_of(200), b"x")
    assert store.flush()
    assert store.close()
    store = stores()
    assert [i for i in range(201) if store.contains(key_of(i))] == [*range(0, 150, 2), 200]
    assert all(taken(store, i) == record_of(i, 9000) for i in range(0, 150, 2))


def test_rows_that_lie_are_left_out(stores):
    store = stores()
    for i in range(5):
        store.put(key_of(i), record_of(i, 9000))
    store.close()
    with sqlite3.connect(store.path / INDEX) as db:
        rows = db.execute("SELECT * FROM records ORDER BY id").fetchall()
        for number, places in ((1, b"\0" * 7), (2, b"\xff" * 8), (3, rows[0][5])):
            db.execute("UPDATE records SET places = ? WHERE id = ?", (places, rows[number][0]))
    db.close()
    store = stores()
    assert [i for i in range(5) if store.contains(key_of(i))] in ([0, 4], [3, 4])
    assert taken(store, 4) == record_of(4, 9000)
    assert taken(store, 3) is None


def broken(monkeypatch, what: str, number: int):
    """From now on DataFile's ``what`` fails."""

    def fail(self, *args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(DataFile, what, fail)


@pytest.mark.parametrize(("what", "number"), [("write", errno.ENOSPC), ("sync", errno.EIO), ("write", errno.EROFS)])
def test_a_disk_that_cannot_be_written(stores, monkeypatch, what, number):
    lost = []
    store = stores(on_lost=lost.append)
    store.put(key_of(1), record_of(1, 30_000))
    assert store.flush()
    broken(monkeypatch, what, number)
    for i in range(2, 7):
        store.put(key_of(i), record_of(i, 30_000))
        assert store.flush() == (i > 4)
    stats = store.stats()
    assert stats.errors == {f"write_{errno.errorcode[number]}": 3}, "then it refuses for a while"
    assert stats.refused == 2
    assert sorted(lost) == [key_of(i) for i in (2, 3, 4)]
    assert taken(store, 1) == record_of(1, 30_000)
    assert taken(store, 2) is None
    used = stats.used_bytes
    monkeypatch.undo()
    until(lambda: store.put(key_of(9), b"x"))
    assert store.flush()
    assert store.stats().used_bytes <= used + 2 * 4096 + 65536, "no room was lost to the failures"
    assert store.close()


def test_an_index_that_cannot_be_written(stores, monkeypatch):
    store = stores()
    index = store._writer.index
    store.put(key_of(1), b"x")
    assert store.flush()
    index._db.execute("PRAGMA query_only=ON")
    store.put(key_of(2), b"x")
    assert not store.flush()
    assert store.remove(key_of(1))
    assert not store.flush()
    assert sum(store.stats().errors.values()) == 2
    index._db.execute("PRAGMA query_only=OFF")
    assert store.put(key_of(3), b"x")
    assert store.flush()
    assert taken(store, 3) == b"x"
    assert taken(store, 2) is None


def test_a_slow_disk_keeps_nobody_waiting(stores, monkeypatch):
    gate = threading.Event()
    write = DataFile.write
    monkeypatch.setattr(DataFile, "write", lambda self, *args: (gate.wait(30), write(self, *args)))
    store = stores(queue_bytes=100_000)
    accepted = [store.put(key_of(i), record_of(i, 20_000)) for i in range(20)]
    assert accepted == [True] * 5 + [False] * 15
    assert store.stats().refused == 15
    assert taken(store, 4) == record_of(4, 20_000), "out of the queue"
    assert not store.durable(key_of(4))
    assert not store.flush(timeout=0.05)
    gate.set()
    assert store.flush()
    assert store.durable(key_of(4))
    assert store.put(key_of(30), b"x")


def test_a_read_that_hangs_is_given_up(stores, monkeypatch):
    store = stores(read_seconds=0.1, readers=2)
    for i in range(4):
        store.put(key_of(i), record_of(i, 5000))
    store.flush()
    gate = threading.Event()
    read = DataFile.read
    monkeypatch.setattr(DataFile, "read_cached", lambda self, *args: False)
    monkeypatch.setattr(DataFile, "read", lambda self, *args: gate.wait(30) and read(self, *args))
    assert [taken(store, i) for i in range(4)] == [None] * 4
    assert store.stats().errors["read_timeout"] == 4
    assert store.remove(key_of(0))
    gate.set()
    until(lambda: not store._readers.stuck)
    assert [taken(store, i) for i in range(4)] == [None, *(record_of(i, 5000) for i in range(1, 4))]


def test_close_has_a_deadline(stores, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(DataFile, "sync", lambda self: gate.wait(30))
    store = stores()
    store.put(key_of(1), b"x")
    assert not store.close(timeout=0.1)
    with pytest.raises(ConfigError, match="locked"):
        stores()
    gate.set()
    store._writer.thread.join(10)


def test_removed_while_it_is_written(stores, monkeypatch):
    gate, there = threading.Event(), threading.Event()
    monkeypatch.setattr(DataFile, "sync", lambda self: (there.set(), gate.wait(30)))
    stored = []
    store = stores(on_stored=stored.append)
    store.put(key_of(1), b"old")
    assert there.wait(10)
    assert store.remove(key_of(1))
    assert store.put(key_of(1), b"new")
    gate.set()
    assert store.flush()
    assert taken(store, 1) == b"new"
    assert stored == [key_of(1)]
    assert store.stats().entries == 1


def test_callbacks_that_fail_are_counted(stores):
    store = stores(on_stored=lambda key: 1 / 0)
    store.put(key_of(1), b"x")
    assert store.flush()
    assert store.stats().errors == {"callback": 1}


def test_folders_that_cannot_be(folder, stores, monkeypatch):
    store = stores()
    with pytest.raises(ConfigError, match="locked by another process"):
        disk(store.path)
    store.close()
    marker = store.path / MARKER
    told = json.loads(marker.read_text())
    for text, says in (
        (json.dumps(told | {"version": 2}), "version 2"), (json.dumps(told | {"format": "x"}), "not a record store"),
        ("{", "damaged"), ("[]", "damaged"),
    ):  # fmt: skip
        marker.write_text(text)
        with pytest.raises(ConfigError, match=says) as info:
            disk(store.path)
        assert str(store.path) in str(info.value)
    other = folder / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        disk(other)
    assert [p.name for p in other.iterdir()] == ["thesis.tex"], "and nothing was touched"
    with pytest.raises(ConfigError, match="No such file"):
        disk(folder / "no" / "parent")
    with pytest.raises(ConfigError, match=str(MIN_BUDGET_BYTES)):
        disk(folder / "small", MIN_BUDGET_BYTES - 1)
    with pytest.raises(ConfigError, match="larger disk"):
        disk(folder / "large", 1 << 60)
    with pytest.raises(ConfigError, match="positive"):
        disk(folder / "x", readers=0)
    monkeypatch.setattr(disk_file, "free_bytes", lambda path: 1 << 62)
    with pytest.raises(ConfigError, match="no room"):
        disk(folder / "lie", 1 << 43)
    disk(folder / "lie").close()


def test_a_read_only_folder(folder):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    folder.chmod(0o500)
    with pytest.raises(ConfigError, match="may write"):
        disk(folder)
    folder.chmod(0o700)


def test_a_limit_on_file_size(folder):
    """A disk that is full for real, as far as the kernel tells it apart: no file may pass 4 MiB."""
    code = (
        "import sys\nfrom dynamo_kvtc.store.disk import DiskStore\nfrom dynamo_kvtc.errors import ConfigError\n"
        "try:\n    DiskStore(sys.argv[1], 8 << 20)\nexcept ConfigError as exc:\n    print(exc)\n"
    )
    limit = 4 * MIB
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "s")], capture_output=True, text=True, timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert "lower the disk budget" in done.stdout, done.stderr
