"""Memory, disk, and who must be reachable."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from dynamo_kvtc.doctor.gpu import PINNED_BYTES, Device
from dynamo_kvtc.doctor.line import Line, gib, missing, ok, problem
from dynamo_kvtc.doctor.software import version
from dynamo_kvtc.store.disk_file import LOCK, MARKER, MIN_BUDGET_BYTES, free_bytes, used_bytes
from dynamo_kvtc.tier.options import GIB, MIB, TierOptions, available_memory

NATS_SECONDS = 3.0
NATS_PORT = 4222
QUEUE_MIB = TierOptions.queue_mib
"""Of raw blocks that wait to be coded, unless it is set."""


def memory(host_gib: float, free: int | None = None) -> Line:
    free = available_memory() if free is None else free
    if free is None:
        return ok("host memory", "the system does not say how much is available")
    wanted = int(host_gib * GIB) + QUEUE_MIB * MIB
    if host_gib and wanted > free:
        most = max(0.0, (free - QUEUE_MIB * MIB) / GIB)
        told = f"{gib(free)} available, {host_gib:g} GiB and a queue of {QUEUE_MIB} MiB asked for"
        return problem("host memory", told, f"set host_gib to {most:.1f} or less, or queue_mib lower")
    return ok("host memory", f"{gib(free)} available" + (f", {host_gib:g} GiB asked for" if host_gib else ""))


def pinned(device: Device, host_gib: float) -> Line:
    """What a GPU reads in place must be pinned; the limit on locked memory is what usually stands in the way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    told = "no limit" if soft == resource.RLIM_INFINITY else f"limit {soft >> 10} KiB"
    if device.pinned is None:
        return ok("pinned memory", f"{told} on locked memory; nothing is pinned without a GPU")
    if device.pinned == 0:
        return ok("pinned memory", f"{PINNED_BYTES >> 20} MiB pinned as a trial; {told} on locked memory")
    least = "unlimited" if hard == resource.RLIM_INFINITY else "-l unlimited in /etc/security/limits.conf, then"
    return problem(
        "pinned memory", f"CUDA error {device.pinned} while pinning {PINNED_BYTES >> 20} MiB; {told} on locked memory",
        f"ulimit -l {least} (in a container: --ulimit memlock=-1); host_gib {host_gib:g} must fit",
    )  # fmt: skip


def disk(path: str | None, disk_gib: float) -> Line:
    """Leaves nothing behind. path: ``disk_path`` of the tier; in it a folder per rank."""
    if path is None:
        return ok("disk tier", "not asked for (--disk-path, --disk-gib)")
    folder = Path(path).expanduser()
    budget = int(disk_gib * GIB)
    if budget and budget < MIN_BUDGET_BYTES:
        return problem("disk tier", f"disk_gib {disk_gib:g}", f"give it at least {MIN_BUDGET_BYTES / GIB:g}")
    there = folder if folder.is_dir() else folder.parent
    if folder.exists() and not folder.is_dir():
        return problem("disk tier", f"{folder} is no folder", "name a folder")
    if not there.is_dir():
        return problem("disk tier", f"{there} is not there", f"mkdir -p {there}")
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".kvtc-doctor-") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
        room, held = free_bytes(there), 0
        for rank in sorted(folder.glob("rank*")) if folder.is_dir() else ():
            wrong = _taken(rank)
            if wrong is not None:
                return wrong
            held += used_bytes(rank)
    except OSError as exc:
        return problem("disk tier", f"{there}: {exc.strerror}", "name a folder that this user may write")
    told = f"{folder}: writable, {gib(room)} free" + (f", {gib(held)} held by the tier" if held else "")
    if budget > room + held:
        remedy = f"set disk_gib to {(room + held) / GIB:.1f} or less, or name a folder on a larger disk"
        return problem("disk tier", f"{told}; {disk_gib:g} GiB asked for", remedy)
    return ok("disk tier", told)


def nats(address: str | None, answer_seconds: float = NATS_SECONDS) -> Line:
    """address: NATS_SERVER, servers apart by commas. A server says INFO as soon as one connects."""
    client = version("nats-py")
    have = "nats-py not installed" if client is None else f"nats-py {client}"
    if not address:
        return ok("NATS", f"{have}; NATS_SERVER is not set: not used")
    deadline = time.monotonic() + answer_seconds
    wrong = []
    for server in address.split(","):
        found = _greeting(server.strip(), deadline)
        if found.startswith("INFO"):
            if client is None:
                return missing("NATS", "pip install dynamo-kvtc[dynamo]", f"{server} answers; {have}")
            return ok("NATS", f"{server} answers; {have}")
        wrong.append(f"{server}: {found}")
    return problem("NATS", "; ".join(wrong), "start it (nats-server), or set NATS_SERVER to nats://HOST:4222")


def _greeting(server: str, deadline: float) -> str:
    try:
        parts = urlsplit(server if "://" in server else f"nats://{server}")
        host, port = parts.hostname or "", parts.port or NATS_PORT
        left = max(0.1, deadline - time.monotonic())
        with socket.create_connection((host, port), timeout=left) as connection:
            connection.settimeout(max(0.1, deadline - time.monotonic()))
            return connection.recv(64).decode("latin-1").strip() or "closed without a word"
    except (OSError, ValueError) as exc:
        return str(exc) or type(exc).__name__


def _taken(rank: Path) -> Line | None:
    names = {entry.name for entry in rank.iterdir()}
    if MARKER not in names and names - {LOCK}:
        return problem("disk tier", f"{rank} has files of others in it ({', '.join(sorted(names)[:3])})",
                       "name an empty folder")  # fmt: skip
    if LOCK in names:
        fd = os.open(rank / LOCK, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return problem("disk tier", f"{rank} is in use by another process",
                           "give every process a folder of its own, or end that one")  # fmt: skip
        finally:
            os.close(fd)
    return None
