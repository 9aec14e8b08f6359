"""Pulling records from another process over each plane, against a plain TCP copy of the same bytes in the same run; and
what that makes of links that this machine does not have.

Every plane is proven first: what it brings is compared with the holder's bytes. Then planes and plain copy are timed in
turn. The medians' ratios mean something on a busy machine, single rates do not.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dynamo_kvtc.bench.pull_holder import PEERS, SAYS, TOKENS, Plain, identity, make_plane, records_of
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.events.server import LocalServer
from dynamo_kvtc.transfer.arriving import Expected
from dynamo_kvtc.transfer.options import PullOptions
from dynamo_kvtc.transfer.pull import Puller, Wanted

_START_SECONDS = 120.0
_PULL_SECONDS = 120.0
_NEAR, _FAR = "10.231.91.1", "10.231.91.2"


@dataclass(frozen=True)
class PullCase:
    """planes: names; record_bytes: of each record; megabytes: pulled at once; rounds: timed, after the proof.
    shaped_gbit: the holder is put behind a link of that rate, in a network namespace (Linux, root)."""

    planes: tuple[str, ...] = ("tcp", "nats")
    record_bytes: int = 55_000
    megabytes: int = 32
    groups: int = 4
    rounds: int = 5
    nats_url: str | None = None
    shaped_gbit: float | None = None

    def __post_init__(self) -> None:
        if not 200 <= self.record_bytes <= 1 << 20 or not 1 <= self.groups <= 16:
            raise ConfigError(f"records of {self.record_bytes} bytes, {self.groups} groups: 200 to 1048576, 1 to 16")
        if not 1 <= self.megabytes <= 512 or self.rounds < 1:
            raise ConfigError(f"{self.megabytes} MB, {self.rounds} rounds: 1 to 512 MB, at least 1 round")


@dataclass(frozen=True)
class PullRow:
    """whole: record by record, not layer group by layer group; mb_s: median; over_plain: of the plain copy's median;
    first_group: median share of the time until layer group 0 of all records was here and proven; cpu: seconds of this
    process's CPU for a second of the pull."""

    plane: str
    whole: bool
    record_bytes: int
    mb_s: float
    over_plain: float
    first_group: float | None
    cpu: float


def measure(case: PullCase, say: Callable[[str], None] = lambda told: None) -> list[PullRow]:
    """The plain copy's row first. Raises ConfigError, MissingDependencyError."""
    count = max(1, case.megabytes * 1_000_000 // case.record_bytes)
    with ExitStack() as stack:
        near, far, prefix = "127.0.0.1", "127.0.0.1", []
        if case.shaped_gbit is not None:
            near, far, prefix = _NEAR, _FAR, stack.enter_context(_shaped(case.shaped_gbit))
        url = case.nats_url
        if "nats" in case.planes and url is None:
            url = stack.enter_context(LocalServer(near)).url
        told = {"seed": 1, "count": count, "record_bytes": case.record_bytes, "groups": case.groups, "host": far,
                "nats_url": url, "planes": list(case.planes)}  # fmt: skip
        say(f"{count} records of {case.record_bytes} bytes over {', '.join(case.planes)} ...")
        where = stack.enter_context(_holder(told, prefix))
        records = records_of(1, count, case.record_bytes, case.groups)
        whole = b"".join(records.values())
        wanted = [
            Wanted(key, len(record), ("holder",), TOKENS, TOKENS * i) for i, (key, record) in enumerate(records.items())
        ]
        slots = [memoryview(bytearray(len(record))) for record in records.values()]
        pullers = {}
        for name in case.planes:
            plane = make_plane(name, near, url, "asker")
            stack.callback(plane.close)
            options = PullOptions(connect_seconds=10, silence_seconds=10, ask_seconds=60)
            pullers[name] = Puller(
                [plane], lambda _: where["addresses"], PEERS, Expected(identity(case.groups)), options
            )
            stack.callback(pullers[name].close)
        plain = Plain(where["plain"], len(whole))
        plain.copy()
        if plain.into != whole:
            raise ConfigError("the plain copy does not bring the holder's bytes")
        for name, puller in pullers.items():
            for way in (False, True):
                for slot in slots:
                    slot[:] = bytes(len(slot))
                _pull(puller, wanted, slots, way)
                if any(slot != record for slot, record in zip(slots, records.values(), strict=True)):
                    raise ConfigError(f"plane {name} does not bring the holder's bytes")
        seconds: dict[tuple[str, bool], list[tuple[float, float | None, float]]] = {}
        for _ in range(case.rounds):
            begin, cpu = time.perf_counter(), time.process_time()
            plain.copy()
            took = time.perf_counter() - begin
            seconds.setdefault(("plain", True), []).append((took, None, (time.process_time() - cpu) / took))
            for name, puller in pullers.items():
                for way in (False, True):
                    seconds.setdefault((name, way), []).append(_pull(puller, wanted, slots, way))
    base = statistics.median(took for took, _, _ in seconds["plain", True])
    return [_row(name, way, case, len(whole), took, base) for (name, way), took in seconds.items()]


def _row(
    name: str, whole: bool, case: PullCase, nbytes: int, took: Sequence[tuple[float, float | None, float]], base: float
) -> PullRow:
    middle = statistics.median(seconds for seconds, _, _ in took)
    firsts = [first / seconds for seconds, first, _ in took if first is not None]
    first = statistics.median(firsts) if firsts else None
    cpu = statistics.median(cpu for _, _, cpu in took)
    return PullRow(name, whole, case.record_bytes, nbytes / middle / 1e6, base / middle, first, cpu)


def _pull(
    puller: Puller, wanted: Sequence[Wanted], slots: Sequence[memoryview], whole: bool
) -> tuple[float, float | None, float]:
    """Seconds in all, to layer group 0 where they come apart, and of CPU for a second. Raises ConfigError."""
    begin, cpu = time.perf_counter(), time.process_time()
    pull = puller.pull(wanted, _PULL_SECONDS, slots, whole=whole)
    first = whole or all(pull.wait_group(0, _PULL_SECONDS))
    at = None if whole else time.perf_counter() - begin
    told = pull.result()
    took = time.perf_counter() - begin
    if not first or any(told):
        raise ConfigError(f"a pull failed: {next((why for why in told if why), 'layer group 0')}")
    return took, at, (time.process_time() - cpu) / took


def links(
    codec: Mapping[str, Any], gbits: Sequence[float], delay_ms: float, rates: Mapping[str, float | None]
) -> list[dict[str, Any]]:  # fmt: skip
    """Seconds until the first layer group and all of them are in the cache, raw and coded, by arithmetic.

    codec: a row of `kvtc bench codec --json`: raw and coded bytes, seconds of the copy to the GPU and of decoding, in
    all and to the first group. rates: bytes a second that a way of sending reaches at most, by name; None: the link's.
    Raw blocks are sent in the order of layers and copied to the GPU as they come; coded ones in the order of layer
    groups, each decoded when it is here and the one before is done.
    """
    raw, coded, groups = codec["raw_bytes"], codec["record_bytes"], codec["groups"]
    copy, decode, first = codec["raw_h2d_s"], codec["decode_s"], codec["first_group_s"]
    rest = (decode - first) / max(1, groups - 1)
    out = []
    for gbit in gbits:
        for name, most in rates.items():
            rate = min(gbit * 1e9 / 8, most or float("inf"))
            begin = delay_ms / 1e3
            ready = first_ready = begin + coded / groups / rate + first
            for g in range(1, groups):
                ready = max(ready, begin + (g + 1) * coded / groups / rate) + rest
            share = raw / groups / rate
            raw_first = begin + share + copy / groups
            raw_ready = max(begin + raw / rate + copy / groups, begin + share + copy)
            out.append(
                {"gbit": gbit, "over": name, "raw_first_s": raw_first, "raw_s": raw_ready, "coded_first_s": first_ready,
                 "coded_s": ready, "faster": raw_ready / ready}
            )  # fmt: skip
    return out


@contextmanager
def _holder(case: Mapping[str, Any], prefix: Sequence[str]) -> Iterator[dict[str, Any]]:
    command = [*prefix, sys.executable, "-m", "dynamo_kvtc.bench.pull_holder", json.dumps(case)]
    root = str(Path(__file__).parent.parent.parent)
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        deadline = time.monotonic() + _START_SECONDS
        for line in process.stdout:
            if line.startswith(SAYS):
                yield json.loads(line[len(SAYS) :])
                return
            if time.monotonic() > deadline:
                break
        raise ConfigError("the holder's process did not start; its messages are above")
    finally:
        process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)


@contextmanager
def _shaped(gbit: float) -> Iterator[list[str]]:
    """A namespace behind a link of this rate both ways; what starts a process in it. Raises ConfigError."""
    name = f"kvtc{os.getpid()}"
    near, far = f"{name[-8:]}n", f"{name[-8:]}f"
    inside = ["ip", "netns", "exec", name]
    shape = ["root", "tbf", "rate", f"{gbit:g}gbit", "burst", "1mb", "latency", "50ms"]
    steps = [
        ["ip", "netns", "add", name],
        ["ip", "link", "add", near, "type", "veth", "peer", "name", far],
        ["ip", "link", "set", far, "netns", name],
        ["ip", "addr", "add", f"{_NEAR}/30", "dev", near],
        ["ip", "link", "set", near, "up"],
        [*inside, "ip", "addr", "add", f"{_FAR}/30", "dev", far],
        [*inside, "ip", "link", "set", far, "up"],
        ["tc", "qdisc", "add", "dev", near, *shape],
        [*inside, "tc", "qdisc", "add", "dev", far, *shape],
    ]
    try:
        for step in steps:
            try:
                subprocess.run(step, check=True, capture_output=True, text=True, timeout=20)
            except (OSError, subprocess.SubprocessError) as exc:
                told = getattr(exc, "stderr", "") or exc
                raise ConfigError(f"no shaped link here ({' '.join(step)}: {told}); leave --shaped-gbit out") from exc
        yield inside
    finally:
        for step in (["ip", "link", "del", near], ["ip", "netns", "del", name]):
            subprocess.run(step, capture_output=True, timeout=20, check=False)


def as_json(rows: Sequence[PullRow], linked: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"rows": [asdict(row) for row in rows], "links": list(linked)}
