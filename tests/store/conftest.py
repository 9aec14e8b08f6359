"""Folders for disk stores: in memory where there is such a file system, so that an fsync takes no time."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def folder():
    shm = "/dev/shm"
    roomy = os.access(shm, os.W_OK) and os.statvfs(shm).f_bavail * os.statvfs(shm).f_frsize > 256 << 20
    made = tempfile.mkdtemp(prefix="kvtc-test-", dir=shm if roomy else None)
    yield Path(made)
    shutil.rmtree(made, ignore_errors=True)
