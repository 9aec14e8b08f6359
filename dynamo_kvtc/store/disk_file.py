"""The folder of a disk store: a marker that says whose it is, a lock, and one file of records of a fixed size.

``DataFile`` is the lowest door to the disk: what goes wrong there is an OSError. Records are read with pread into
memory of their own, never through a map: an I/O error or a truncated file under a map is a SIGBUS, the end of the
engine.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path

from dynamo_kvtc.errors import ConfigError

FORMAT = "dynamo_kvtc record store"
VERSION = 1
MARKER, LOCK, DATA, INDEX = "kvtc-store.json", "lock", "records", "index.sqlite"
UNIT_BYTES = 4096
"""The file system's page: a record that starts and ends on one never makes it read before it writes."""
MIN_BUDGET_BYTES = 8 << 20


class Folder:
    """Locked from construction to ``unlock``. Raises ConfigError, naming the path and the remedy."""

    def __init__(self, path: Path, budget_bytes: int) -> None:
        self.path = path
        if budget_bytes < MIN_BUDGET_BYTES:
            raise ConfigError(f"{path}: a disk budget of {budget_bytes} bytes; give it at least {MIN_BUDGET_BYTES}")
        try:
            path.mkdir(exist_ok=True)
            names = {entry.name for entry in path.iterdir()}
            if MARKER in names:
                self._check_marker()
            elif names - {LOCK, f"{MARKER}.new"}:
                raise ConfigError(
                    f"{path} has files of others in it ({', '.join(sorted(names)[:3])}) and no {MARKER}: name an empty "
                    "folder"
                )
            self._lock_fd = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise ConfigError(
                f"{path}: {exc.strerror}; name a folder this process may write, in one that exists"
            ) from exc
        try:
            self._lock()
            self._check_space(budget_bytes)
            self._write_marker()
        except BaseException:
            os.close(self._lock_fd)
            raise

    def unlock(self) -> None:
        os.close(self._lock_fd)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            if exc.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise ConfigError(f"{self.path} cannot be locked: {exc.strerror}; name a local folder") from exc
            raise ConfigError(
                f"{self.path} is locked by another process; give every process a folder of its own, or end that one"
            ) from exc

    def _check_marker(self) -> None:
        marker = self.path / MARKER
        try:
            told = json.loads(marker.read_text(encoding="utf-8"))
            ours, version = told.get("format") == FORMAT, told.get("version")
        except (ValueError, AttributeError) as exc:
            raise ConfigError(f"{marker} is damaged; empty the folder or name another") from exc
        if not ours:
            raise ConfigError(f"{marker} is not a record store's; name another folder")
        if version != VERSION:
            raise ConfigError(
                f"{self.path} is a record store of version {version}; this release has version {VERSION}: empty the "
                "folder or name another"
            )

    def _write_marker(self) -> None:
        new = self.path / f"{MARKER}.new"
        try:
            new.write_text(json.dumps({"format": FORMAT, "version": VERSION, "unit_bytes": UNIT_BYTES}) + "\n")
            new.replace(self.path / MARKER)
        except OSError as exc:
            raise ConfigError(f"{self.path}: {exc.strerror}; name a folder that can be written") from exc

    def _check_space(self, budget_bytes: int) -> None:
        room = free_bytes(self.path) + used_bytes(self.path)
        if room < budget_bytes:
            raise ConfigError(
                f"{self.path}: a budget of {budget_bytes} bytes, but its file system has {room} for it; lower the "
                "budget or name a folder on a larger disk"
            )


class DataFile:
    """One preallocated file: its size is what it takes of the disk, full or empty."""

    def __init__(self, path: Path, nbytes: int) -> None:
        """Raises ConfigError if there is no room for it."""
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise ConfigError(f"{path}: {exc.strerror}; name a folder that can be written") from exc
        try:
            os.ftruncate(self._fd, min(nbytes, os.fstat(self._fd).st_size))
            os.posix_fallocate(self._fd, 0, nbytes)
        except OSError as exc:
            os.close(self._fd)
            raise ConfigError(f"{path}: no room for {nbytes} bytes ({exc.strerror}); lower the disk budget") from exc

    def write(self, offset: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(self._fd, data, offset)
            offset, data = offset + written, data[written:]

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def read_cached(self, offset: int, into: memoryview) -> bool:
        """Without waiting for the disk, from the system's cache: False if it is not there, or that cannot be asked."""
        try:
            return os.preadv(self._fd, [into], offset, os.RWF_NOWAIT) == into.nbytes
        except OSError as exc:
            if exc.errno not in (errno.EAGAIN, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
            return False

    def read(self, offset: int, into: memoryview) -> bool:
        """True: all of it, however long it takes."""
        while into:
            got = os.preadv(self._fd, [into], offset)
            if not got:
                raise OSError(errno.EIO, f"the file ends before byte {offset + into.nbytes}")
            offset, into = offset + got, into[got:]
        return True

    def close(self) -> None:
        os.close(self._fd)


def free_bytes(path: Path) -> int:
    """What this user may still write to the file system."""
    told = os.statvfs(path)
    return told.f_bavail * told.f_frsize


def used_bytes(path: Path) -> int:
    """What the folder's files take of the disk, as the file system sees it."""
    total = 0
    for entry in path.iterdir():
        try:
            total += entry.stat().st_blocks * 512
        except FileNotFoundError:  # SQLite's files come and go
            continue
    return total
