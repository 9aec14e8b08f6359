"""Engines in processes of their own, with a deadline on every question."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import signal
import subprocess
from pathlib import Path
from typing import Any

from tests.engines import ROOT, python_of


class EngineWorker:
    """``worker("run", prompts)`` is the driver's ``run(prompts)``."""

    def __init__(self, folder: Path, name: str, model: Path, options: dict[str, Any]) -> None:
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.json"
        path.write_text(json.dumps(options))
        self.log = folder / f"{name}.log"
        environment = {n: v for n, v in os.environ.items() if not n.startswith(("DYN_", "VLLM_", "NATS_"))}
        environment.pop("TRITON_INTERPRET", None)
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(lent(folder))])}
        command = [
            str(python_of("vllm")), "-m", "tests.adapters.connector.driver", str(model), str(path),
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log.open("w"), text=True, bufsize=1,
        )  # fmt: skip

    def ready(self, timeout: float = 180) -> EngineWorker:
        assert self._line(timeout) == "ready"
        return self

    def ask(self, *what: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def answer(self, timeout: float = 120) -> Any:
        return json.loads(self._line(timeout))

    def __call__(self, *what: Any, timeout: float = 120) -> Any:
        self.ask(*what)
        return self.answer(timeout)

    def signal(self, how: signal.Signals) -> None:
        os.kill(self.process.pid, how)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(20)

    def _line(self, timeout: float) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        line = self.process.stdout.readline().strip() if ready else ""
        assert line, f"no answer within {timeout} s: {self.log.read_text()[-4000:]}"
        return line


def lent(folder: Path) -> Path:
    """The engine's environment has no NATS client and no NIXL: ours, and nothing else of ours."""
    path = folder / "lent"
    path.mkdir(exist_ok=True)
    for name, parts in (("nats", "nats"), ("nixl_cu12", "nixl*")):
        spec = importlib.util.find_spec(name)
        for found in Path(spec.origin).parent.parent.glob(parts) if spec is not None and spec.origin else ():
            if found.suffix != ".dist-info" and not (path / found.name).exists():
                (path / found.name).symlink_to(found)
    return path
