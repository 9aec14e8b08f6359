"""The GPU, and memory pinned for it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamo_kvtc.doctor.line import Line, gib, missing, ok, problem

ANSWER_SECONDS = 60.0
"""Starting torch and CUDA takes some 10 s on a slow disk."""
PINNED_BYTES = 256 << 20
LEAST_CAPABILITY = (8, 0)

# A driver that is broken hangs, or ends the process: so it is not this one that asks. It pins as the tier does.
_PROBE = f"""
import json, mmap, torch
out = {{"count": torch.cuda.device_count() if torch.cuda.is_available() else 0, "cuda": torch.version.cuda}}
if out["count"]:
    told = torch.cuda.get_device_properties(0)
    out |= {{"name": told.name, "total": told.total_memory, "free": torch.cuda.mem_get_info(0)[0]}}
    out["capability"] = list(torch.cuda.get_device_capability(0))
    arena = mmap.mmap(-1, {PINNED_BYTES})
    view = torch.frombuffer(arena, dtype=torch.uint8)
    out["pinned"] = int(torch.cuda.cudart().cudaHostRegister(view.data_ptr(), view.nbytes, 1))
print(json.dumps(out))
"""


@dataclass(frozen=True)
class Device:
    """pinned: CUDA's error number, 0 for none; None if there is no GPU to ask."""

    line: Line
    pinned: int | None = None


def look(probe: str = _PROBE, answer_seconds: float = ANSWER_SECONDS) -> Device:
    try:
        done = subprocess.run(
            [sys.executable, "-c", probe], capture_output=True, text=True, timeout=answer_seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return Device(problem("GPU", f"no answer from CUDA in {answer_seconds:.0f} s", "see what `nvidia-smi` says"))
    try:
        told = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Device(problem("GPU", f"CUDA cannot be asked: {last}", "see what `nvidia-smi` says"))
    if not told["count"]:
        return Device(_none(told["cuda"]))
    return Device(_found(told), told["pinned"])


def _none(cuda: str | None) -> Line:
    driver = driver_version()
    if driver is None:
        return missing("GPU", "an NVIDIA GPU and its driver (in a container: --gpus all)", "none")
    if cuda is None:
        return missing(
            "GPU", "install a torch built for CUDA: https://pytorch.org", f"driver {driver}, torch has no CUDA"
        )
    return problem(
        "GPU", f"driver {driver}, torch for CUDA {cuda}, no device",
        "see what `nvidia-smi` says; CUDA_VISIBLE_DEVICES must not hide it, nor the driver be older than that CUDA",
    )  # fmt: skip


def _found(told: dict[str, Any]) -> Line:
    found = (
        f"{told['count']} x {told['name']}, {gib(told['total'])} ({gib(told['free'])} free), driver "
        f"{driver_version() or '?'}, CUDA {told['cuda']}"
    )
    if tuple(told["capability"]) < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        return problem("GPU", found, f"kernels are written for compute capability {least} (A100) or newer")
    return ok("GPU", found)


def driver_version(path: str = "/proc/driver/nvidia/version") -> str | None:
    try:
        words = Path(path).read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return None
    return next((w for w in words if w[:1].isdigit() and "." in w), None)
