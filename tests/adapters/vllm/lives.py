"""A real vLLM that lives again and again on one folder: ``python -m tests.adapters.vllm.lives MODEL FOLDER ARTIFACT``,
in vLLM's environment. A line "FIRST TOLD CHECKS" on its input begins a life, in a process of its own so that vLLM is
imported once; its answers are the process's id and, in the end, "dead".

A life first asks what the lives before it computed (TOLD: their lines of JSON, the last of which may be torn), and
tells what came back; then it computes prompts from number FIRST on until it is killed, and tells each answer, and how
far the disk has it all. Each write to the disk is told, and takes its time: a kill may be aimed.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.adapters.engine_driver import Case, forget, prompt_of, run, same, set_environment
from tests.adapters.vllm.driver import FAILURES_ARE_TOLD, engine, settle, shared

TOKENS = 4
WRITE_SECONDS = 0.02


def live(case: Case, first: int, told: Path, checks: int) -> None:
    before = read(told)
    out = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def tell(**what: Any) -> None:
        os.write(out, json.dumps(what).encode() + b"\n")

    tier = {"point": "fine", "exact": "all", "host_gib": 0.05, "disk_gib": 0.5, "disk_path": str(case.work / "disk"),
            "write_through": True}  # fmt: skip
    llm = engine(case, tier, 40, FAILURES_ARE_TOLD)
    disk = shared().tier._store.disk

    def ask(number: int, params: dict[str, Any] | None = None) -> list[Any]:
        return run(llm, [prompt_of(number, 129)], TOKENS, [params])[0]

    on_disk = [bytes.fromhex(line["durable"]) for line in before if "durable" in line]
    answered = {line["answered"]: line["answer"] for line in before if "answered" in line}
    flushed = max((line["flushed"] for line in before if "flushed" in line), default=-1)
    asked = [number for number in answered if number >= first - checks]
    found = {number: ask(number) for number in asked}
    # The prompt that was being computed: what is on disk of it, against what it gives by itself.
    torn = ask(first)
    forget(llm, settle)
    ask(first, {"kvtc": "off"})
    alone = ask(first, {"kvtc": "off"})

    def right(number: int) -> bool:
        """Bit for bit where it all came from below; what was computed anew may differ in its last digits."""
        given, known = found[number], answered[number]
        return same([given], [known])[0] if given[2] == known[2] else given[0] == known[0]

    kept = [number for number in asked if number <= flushed]
    tell(
        checked=len(asked), lost=sum(not disk.durable(key) for key in on_disk[-4 * checks :]),
        kept=len(kept), missed=[n for n in kept if found[n][2] != answered[n][2]],
        wrong=[n for n in asked if not right(n)], torn_cached=torn[2], torn_right=torn[0] == alone[0],
        errors=dict(disk.stats().errors),
    )  # fmt: skip

    write = disk._data.write

    def slow_write(offset: int, data: Any) -> None:
        tell(writing=len(data))
        half = len(data) // 2
        write(offset, data[:half])
        time.sleep(WRITE_SECONDS)
        write(offset + half, data[half:])
        time.sleep(WRITE_SECONDS)

    disk._data.write = slow_write
    disk.on_stored = lambda key: tell(durable=key.hex())
    for number in itertools.count(first + 1):
        ask(number)
        tell(answered=number, answer=ask(number))
        if number % 2:
            settle()
            tell(flushed=number)


def read(told: Path) -> list[dict[str, Any]]:
    """Its whole lines. Cuts a torn one off, once its writer is dead."""
    if not told.exists():
        return []
    lines = told.read_bytes()
    whole = lines[: lines.rfind(b"\n") + 1]
    if len(whole) < len(lines):
        os.truncate(told, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def main() -> None:
    set_environment()
    from vllm import LLM  # noqa: F401

    case = Case(sys.argv[1], Path(sys.argv[2]), sys.argv[3], ())
    for line in sys.stdin:
        first, told, checks = line.split()
        pid = os.fork()
        if not pid:
            # vLLM's messages belong to the other stream.
            os.dup2(2, 1)
            try:
                live(case, int(first), Path(told), int(checks))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        print(pid, flush=True)
        os.waitpid(pid, 0)
        print("dead", flush=True)


if __name__ == "__main__":
    main()
