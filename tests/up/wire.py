"""A program: a graph that is asked once. Prints JSON: the answer, what the decode worker counted, and the bytes that
went over the loopback meanwhile, in a network of its own (``unshare -Urn``), where nothing else is: all protocols'.

    python -m tests.up.wire MANIFEST LOGS TIER      the question comes on the standard input
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import socket
import struct
import sys
from pathlib import Path

from tests.up.graphs import served

_SIOCSIFFLAGS, _UP_AND_RUNNING = 0x8914, 0x41


def main(manifest: str, logs: str, tier: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _UP_AND_RUNNING))
    with served(manifest, Path(logs), tier=json.loads(tier)) as up:
        before = _received()
        answer = up.ask(sys.stdin.read())
        wire = _received() - before
        print(json.dumps({"answer": dataclasses.asdict(answer), "decode": up.counters()["Decode"], "wire": wire}))


def _received() -> int:
    (line,) = [x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[0])


main(*sys.argv[1:])
