"""kill -9 of a real vLLM while its tier writes to the disk, and a restart on the same folder: what was said to be there
is found again, and the answers are right.

KVTC_KILLS says how often (3; `make soak`: 20).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.adapters.vllm.lives import WRITE_SECONDS, read
from tests.builders import case_seed
from tests.engines import ROOT, VLLM_KVBM, environment, python_of

pytestmark = [pytest.mark.engine, pytest.mark.model]
KILLS = int(os.environ.get("KVTC_KILLS", "3"))
CHECKS = 8
"""Prompts that a life asks again: of lives before, the disk may have let go."""
LIFE_SECONDS = 240


def test_killed_while_it_writes(model, any_artifact, tmp_path):
    rng = random.Random(case_seed())
    told, log = tmp_path / "told", (tmp_path / "log").open("wb")
    command = [python_of("vllm"), "-m", "tests.adapters.vllm.lives", model, tmp_path, any_artifact]
    lives = subprocess.Popen(
        [str(x) for x in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT,
        env=environment(VLLM_KVBM, 1),
    )  # fmt: skip
    # Whatever is waited for below ends then.
    watchdog = threading.Timer(LIFE_SECONDS * (KILLS + 2), lives.kill)
    watchdog.start()
    pid = 0
    try:
        first = came_back = 0
        for life in range(KILLS + 1):
            size = told.stat().st_size if told.exists() else 0
            lives.stdin.write(f"{first} {told} {CHECKS}\n")
            lives.stdin.flush()
            pid = int(lives.stdout.readline())

            def lines(name: str, since: int = size) -> int:
                return told.read_bytes()[since:].count(b'{"%s": ' % name.encode()) if told.exists() else 0

            # The last one has only to look.
            wanted = {
                "checked": 1,
                **({"flushed": rng.randint(1, 3), "writing": rng.randint(2, 16)} if life < KILLS else {}),
            }
            deadline = time.monotonic() + LIFE_SECONDS
            while any(lines(name) < count for name, count in wanted.items()):
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-4000:]
                assert Path(f"/proc/{pid}").exists(), (tmp_path / "log").read_text()[-4000:]
                time.sleep(0.002)
            time.sleep(rng.random() * 3 * WRITE_SECONDS)
            os.kill(pid, signal.SIGKILL)
            assert lives.stdout.readline() == "dead\n"
            pid = 0
            known = read(told)
            checks = [line for line in known if "checked" in line]
            assert len(checks) == life + 1
            checked = checks[-1]
            assert checked["lost"] == 0, "said to be on disk, and is not there"
            assert checked["missed"] == [], "flushed, and not found again"
            assert checked["wrong"] == []
            assert checked["torn_right"]
            assert not checked["errors"]
            came_back += checked["kept"]
            first = max((line["answered"] for line in known if "answered" in line), default=first) + 1
            print(checked)
        assert came_back >= KILLS
    finally:
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        watchdog.cancel()
        lives.stdin.close()
        lives.wait(20)
        log.close()
