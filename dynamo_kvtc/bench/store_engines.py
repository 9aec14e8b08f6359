"""Embedded stores that could hold records on disk, each in its quickest crash-safe setting, for `kvtc bench store`.

An engine is only what is measured: no eviction, no checksums, no budget. SQLite is what ``store/disk.py`` uses; the
others are here so that the choice can be measured again. They are no dependencies: one that is not installed is
skipped.
"""

from __future__ import annotations

import importlib
import os
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from dynamo_kvtc.errors import MissingDependencyError

Item = tuple[bytes, bytes]


class Engine(Protocol):
    """``write`` puts and deletes in one durable step; opening a folder again finds what was written."""

    def write(self, puts: Sequence[Item], deletes: Sequence[bytes]) -> None: ...

    def read(self, key: bytes) -> bytes | None: ...

    def close(self) -> None: ...


class PlainFile:
    """The reference: appends to one file, an fsync a step; reads with pread. It never frees anything."""

    def __init__(self, path: Path, capacity_bytes: int) -> None:
        self._fd = os.open(path / "plain", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self._places: dict[bytes, tuple[int, int]] = {}
        self._end = 0

    def write(self, puts: Sequence[Item], deletes: Sequence[bytes]) -> None:
        for key, value in puts:
            os.write(self._fd, value)
            self._places[key] = (self._end, len(value))
            self._end += len(value)
        for key in deletes:
            del self._places[key]
        os.fdatasync(self._fd)

    def read(self, key: bytes) -> bytes | None:
        place = self._places.get(key)
        return None if place is None else os.pread(self._fd, place[1], place[0])

    def close(self) -> None:
        os.close(self._fd)


class Sqlite:
    """Write-ahead log, one fsync a step (synchronous=FULL)."""

    def __init__(self, path: Path, capacity_bytes: int, page_bytes: int = 16384) -> None:
        self._db = sqlite3.connect(path / "db", isolation_level=None)
        for pragma in (
            f"page_size={page_bytes}", "journal_mode=WAL", "synchronous=FULL", "secure_delete=OFF",
            "cache_size=-16384", "wal_autocheckpoint=0",
        ):  # fmt: skip
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute("CREATE TABLE IF NOT EXISTS names (key BLOB PRIMARY KEY, id INTEGER) WITHOUT ROWID")
        self._db.execute("CREATE TABLE IF NOT EXISTS records (id INTEGER PRIMARY KEY, record BLOB)")
        self._ids: dict[bytes, int] = dict(self._db.execute("SELECT key, id FROM names"))
        self._next = max(self._ids.values(), default=0) + 1

    def write(self, puts: Sequence[Item], deletes: Sequence[bytes]) -> None:
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        gone = [(self._ids.pop(key),) for key in deletes]
        db.executemany("DELETE FROM records WHERE id = ?", gone)
        db.executemany("DELETE FROM names WHERE key = ?", [(key,) for key in deletes])
        for key, value in puts:
            self._ids[key] = self._next
            db.execute("INSERT INTO records VALUES (?, ?)", (self._next, value))
            db.execute("INSERT INTO names VALUES (?, ?)", (key, self._next))
            self._next += 1
        db.execute("COMMIT")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def read(self, key: bytes) -> bytes | None:
        number = self._ids.get(key)
        row = self._db.execute("SELECT record FROM records WHERE id = ?", (number,)).fetchone()
        return None if row is None else row[0]

    def close(self) -> None:
        self._db.close()


class Lmdb:
    """Copy-on-write B+tree; two fsyncs a step. No WRITEMAP: a full disk would then be a SIGBUS."""

    def __init__(self, path: Path, capacity_bytes: int) -> None:
        self._env = _library("lmdb").open(str(path), map_size=4 * capacity_bytes)

    def write(self, puts: Sequence[Item], deletes: Sequence[bytes]) -> None:
        with self._env.begin(write=True) as txn:
            for key in deletes:
                txn.delete(key)
            for key, value in puts:
                txn.put(key, value)

    def read(self, key: bytes) -> bytes | None:
        with self._env.begin() as txn:
            return txn.get(key)

    def close(self) -> None:
        self._env.close()


class RocksDb:
    """Values in blob files, collected from 25% of the oldest on; the write-ahead log synced a step."""

    def __init__(self, path: Path, capacity_bytes: int) -> None:
        self._lib = _library("rocksdict")
        options = self._lib.Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_enable_blob_files(True)
        options.set_min_blob_size(512)
        options.set_blob_file_size(64 << 20)
        options.set_enable_blob_gc(True)
        options.set_blob_gc_age_cutoff(0.25)
        options.set_blob_gc_force_threshold(0.3)
        self._db = self._lib.Rdict(str(path / "db"), options)
        self._synced = self._lib.WriteOptions()
        self._synced.sync = True

    def write(self, puts: Sequence[Item], deletes: Sequence[bytes]) -> None:
        batch = self._lib.WriteBatch(raw_mode=True)
        for key in deletes:
            batch.delete(key)
        for key, value in puts:
            batch.put(key, value)
        self._db.write(batch, self._synced)

    def read(self, key: bytes) -> bytes | None:
        return self._db.get(key)

    def close(self) -> None:
        self._db.close()


class DiskCache:
    """A file a value, named in SQLite. It never syncs the files."""

    def __init__(self, path: Path, capacity_bytes: int) -> None:
        self._cache = _library("diskcache").Cache(str(path), size_limit=1 << 50, eviction_policy="none")

    def write(self, puts: Sequence[Item], deletes: Sequence[bytes]) -> None:
        with self._cache.transact():
            for key in deletes:
                del self._cache[key]
            for key, value in puts:
                self._cache[key] = value

    def read(self, key: bytes) -> bytes | None:
        return self._cache.get(key)

    def close(self) -> None:
        self._cache.close()


ENGINES: dict[str, Callable[[Path, int], Any]] = {
    "plain": PlainFile,
    "sqlite": Sqlite,
    "lmdb": Lmdb,
    "rocksdict": RocksDb,
    "diskcache": DiskCache,
}


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        raise MissingDependencyError(f"to measure {name}: pip install {name}") from exc
