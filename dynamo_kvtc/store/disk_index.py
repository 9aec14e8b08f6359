"""Which record lies where in the file, in SQLite: the one door to it. A row a record; a commit is on the disk.

Rows are numbered in the order they come and keys have no index (the store holds them in memory), so a commit touches
few pages. Write-ahead log, synchronous=FULL: a commit is one fsync, and a killed process or a power cut leaves the last
commit. One connection, one user at a time.
"""

from __future__ import annotations

import contextlib
import sqlite3
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

PAGE_BYTES = 4096
_PLACE = struct.Struct("<II")


class Row(NamedTuple):
    """places: (start, length) in units of the data file; crc: over key and record; used: larger is more recent."""

    id: int
    key: bytes
    nbytes: int
    crc: int
    used: int
    places: list[tuple[int, int]]


class IndexFailure(OSError):
    """What SQLite said; kind: its name for it, "SQLITE_FULL"; damaged: only a new database will do."""

    def __init__(self, exc: sqlite3.Error) -> None:
        super().__init__(str(exc))
        self.kind = getattr(exc, "sqlite_errorname", type(exc).__name__)
        self.damaged = type(exc) is sqlite3.DatabaseError


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as exc:
        raise IndexFailure(exc) from exc


class Index:
    """Raises IndexFailure and other OSErrors throughout. index_bytes, wal_bytes: caps of the database and its log."""

    @_translated()
    def __init__(self, path: Path, index_bytes: int, wal_bytes: int) -> None:
        self.path = path
        self._wal = path.with_name(f"{path.name}-wal")
        self._index_bytes, self._wal_bytes = index_bytes, wal_bytes
        self._cap_pages = index_bytes // PAGE_BYTES
        self.rows_per_commit = wal_bytes // 2 // PAGE_BYTES
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=1)
        try:
            for pragma in (
                f"page_size={PAGE_BYTES}", "locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL",
                "secure_delete=OFF", "wal_autocheckpoint=0", "temp_store=MEMORY", "mmap_size=0",
                f"max_page_count={self._cap_pages}",
            ):  # fmt: skip
                self._db.execute(f"PRAGMA {pragma}").fetchall()
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS records (id INTEGER PRIMARY KEY, key BLOB NOT NULL, "
                "nbytes INTEGER NOT NULL, crc INTEGER NOT NULL, used INTEGER NOT NULL, places BLOB NOT NULL)"
            )
            self._checkpoint()
        except BaseException:
            self._db.close()
            raise

    @_translated()
    def rows(self) -> list[Row]:
        """All, the least recently used first; what is not a row of ours is left out."""
        out = []
        for number, key, nbytes, crc, used, packed in self._db.execute(
            "SELECT id, key, nbytes, crc, used, places FROM records WHERE typeof(key) = 'blob' AND length(key) BETWEEN "
            "16 AND 64 AND typeof(places) = 'blob' AND length(places) % 8 = 0 AND length(places) > 0 AND "
            "typeof(nbytes) = 'integer' AND nbytes BETWEEN 1 AND 4294967295 AND typeof(crc) = 'integer' AND "
            "typeof(used) = 'integer' AND used BETWEEN 0 AND 1 << 62 AND id BETWEEN 0 AND 1 << 62 ORDER BY used, id"
        ):
            places = [_PLACE.unpack(packed)] if len(packed) == 8 else list(_PLACE.iter_unpack(packed))
            out.append(Row(number, key, nbytes, crc, used, places))
        return out

    @_translated()
    def keep_only(self, ids: Iterable[int]) -> None:
        """Deletes every other row."""
        kept = set(ids)
        gone = [number for (number,) in self._db.execute("SELECT id FROM records") if number not in kept]
        for i in range(0, len(gone), self.rows_per_commit):
            self.commit((), gone[i : i + self.rows_per_commit], ())

    @_translated()
    def commit(self, puts: Iterable[Row], deletes: Iterable[int], touches: Iterable[tuple[int, int]]) -> None:
        """All of it or nothing, on the disk. touches: (used, id). At most ``rows_per_commit`` of all three together."""
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            db.executemany("DELETE FROM records WHERE id = ?", [(number,) for number in deletes])
            db.executemany("UPDATE records SET used = ? WHERE id = ?", touches)
            db.executemany(
                "INSERT INTO records VALUES (?, ?, ?, ?, ?, ?)",
                [(r.id, r.key, r.nbytes, r.crc, r.used, b"".join(_PLACE.pack(*p) for p in r.places)) for r in puts],
            )
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        if self._wal.stat().st_size > self._wal_bytes // 2:
            self._checkpoint()

    @_translated()
    def crowded(self) -> bool:
        """Whether the database is about to reach its cap."""
        return self._pages() * 8 > self._cap_pages * 7

    def begun_anew(self, rows: Sequence[Row]) -> Index:
        """Another in its place, with these rows; this one is closed."""
        with contextlib.suppress(OSError):
            self.close()
        forget(self.path)
        index = Index(self.path, self._index_bytes, self._wal_bytes)
        for i in range(0, len(rows), self.rows_per_commit):
            index.commit(rows[i : i + self.rows_per_commit], (), ())
        return index

    def used_bytes(self) -> int:
        """Of the disk: database and log."""
        return sum(p.stat().st_blocks * 512 for p in (self.path, self._wal) if p.exists())

    @_translated()
    def close(self) -> None:
        self._db.close()

    def _pages(self) -> int:
        (count,), (spare,) = (self._db.execute(f"PRAGMA {p}").fetchone() for p in ("page_count", "freelist_count"))
        return count - spare

    def _checkpoint(self) -> None:
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def forget(path: Path) -> None:
    """Deletes an index that cannot be read."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
