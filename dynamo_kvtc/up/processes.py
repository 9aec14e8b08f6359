"""Processes that are ended whole: each in a group of its own, its output in a file."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from dynamo_kvtc.errors import EngineError
from dynamo_kvtc.up.place import Process

TERM_SECONDS = 30.0
"""What an orderly end may take; after it SIGKILL."""
LEFT_SECONDS = 5.0
"""What processes may take that outlive the one that made them."""
KILL_SECONDS = 10.0
LAST_LINES = 12


class Running:
    """``with Running(logs) as running``: whatever happens inside, no process is left."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self._started: list[tuple[Process, subprocess.Popen[bytes]]] = []

    def __enter__(self) -> Running:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start(self, process: Process) -> None:
        """Raises EngineError if the program cannot be started."""
        with self.log(process.name).open("wb") as output:
            try:
                started = subprocess.Popen(
                    process.command, env=dict(process.environment), stdin=subprocess.DEVNULL, stdout=output,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            except OSError as exc:
                raise EngineError(f"{process.name}: {process.command[0]} cannot be started: {exc.strerror}") from exc
        self._started.append((process, started))

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def check(self) -> None:
        """Raises EngineError, with the end of what it said, if one has ended."""
        for process, started in self._started:
            code = started.poll()
            if code is not None:
                raise EngineError(
                    f"{process.name} ended with {code}; {self.log(process.name)} ends:\n{self.last(process.name)}"
                )

    def last(self, name: str, lines: int = LAST_LINES) -> str:
        try:
            text = self.log(name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def stop(self) -> None:
        """As Kubernetes does it: the first process of each is told to end, and ends its own; what is left is killed.
        The first that was started is ended when the others have: workers say goodbye to the NATS server."""
        deadline = time.monotonic() + TERM_SECONDS
        for together in (self._started[1:], self._started[:1]):
            for _, started in together:
                if started.poll() is None:
                    started.terminate()
            for _, started in together:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    started.wait(max(0.0, deadline - time.monotonic()))
        deadline = time.monotonic() + LEFT_SECONDS
        for _, started in self._started:
            if started.poll() is not None:
                _wait_for_group(started, deadline)
        deadline = time.monotonic() + KILL_SECONDS
        for _, started in self._started:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(started.pid, signal.SIGKILL)
        for _, started in self._started:
            _wait_for_group(started, deadline)
        self._started.clear()


def alive(groups: Sequence[int]) -> list[int]:
    """Groups that have a process."""
    found = []
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, 0)
            found.append(group)
    return found


def _wait_for_group(started: subprocess.Popen[bytes], deadline: float) -> None:
    """Until its last process is gone, not only the first."""
    while time.monotonic() < deadline:
        started.poll()
        if not alive([started.pid]):
            return
        time.sleep(0.05)
