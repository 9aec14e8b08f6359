"""Records what goes into a worker's ledger and what comes out of it, and plays it again without a leader."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

from dynamo_kvtc.adapters.kvbm import ledger as ledger_module
from dynamo_kvtc.adapters.kvbm import worker as worker_module
from dynamo_kvtc.adapters.kvbm.actions import Action, Answer, Capacity, Demotion
from dynamo_kvtc.adapters.kvbm.ledger import Ledger
from dynamo_kvtc.adapters.kvbm.protocol import Message
from dynamo_kvtc.adapters.kvbm.step import Operation, Step


def written(action: Action) -> list[Any]:
    """An action as JSON, without the times that a replay cannot repeat."""
    if isinstance(action, Answer):
        return ["answer", *(frame.hex() for frame in action.frames)]
    if isinstance(action, Capacity):
        return ["capacity", action.host_blocks, action.disk_blocks]
    if isinstance(action, Demotion):
        return ["demotion", action.token, [list(pair) for pair in action.pairs]]
    request = action.request
    moves = [[m.source, m.target, m.first_position] for m in request.moves]
    return ["load" if action.load else "store", action.token, request.request_id, request.pool.value, moves]


def record(path: str, version: str) -> None:
    """From now on the first worker of this process writes its trace to ``path``, a JSON line per event."""
    Path(path).write_text("")

    def line(*fields: Any) -> None:
        with open(path, "a") as file:
            file.write(json.dumps(fields) + "\n")

    class Outbox(deque[Action]):
        def append(self, action: Action) -> None:
            super().append(action)
            line("out", *written(action))

    class Recording(Ledger):
        def __init__(self, device_blocks: int, bytes_per_block: int, *args: Any) -> None:
            super().__init__(device_blocks, bytes_per_block, *args)
            line("ledger", version, device_blocks, bytes_per_block)
            self.outbox = Outbox()

        def on_message(self, message: Message, now: float) -> None:
            line("message", message.id, message.name, message.payload.decode("latin-1"))
            super().on_message(message, now)

        def on_step(self, step: Step, now: float) -> None:
            operations = [[o.request_id, o.uuid, o.load, sorted(o.positions.items())] for o in step.operations]
            loading = {request_id: list(ids) for request_id, ids in step.loading.items()}
            if operations or step.finished or step.preempted:
                line("step", operations, list(step.finished), list(step.preempted), loading)
            super().on_step(step, now)

        def release(self, load: bool, fence: Any, now: float) -> None:
            line("release", load)
            super().release(load, fence, now)

        def done(self, token: int, failed: Any) -> None:
            line("done", token, sorted(failed))
            super().done(token, failed)

        def take_finished(self) -> tuple[set[str], set[str]]:
            stored, loaded = super().take_finished()
            if stored or loaded:
                line("finished", sorted(stored), sorted(loaded))
            return stored, loaded

    worker_module.Ledger = Recording  # type: ignore[misc]


def replay(path: Path) -> tuple[str, Ledger]:
    """Plays a trace into a fresh ledger and asserts that it answers as recorded; the leader's version."""
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    kind, version, device_blocks, bytes_per_block = lines[0]
    assert kind == "ledger"
    ledger = ledger_module.Ledger(device_blocks, bytes_per_block)
    for number, (event, *fields) in enumerate(lines[1:], 2):
        where = f"{path.name}:{number}"
        if event == "message":
            ledger.on_message(Message(fields[0], fields[1], fields[2].encode("latin-1")), 0.0)
        elif event == "step":
            operations = tuple(Operation(r, u, bool(load), dict(at)) for r, u, load, at in fields[0])
            loading = {request_id: tuple(ids) for request_id, ids in fields[3].items()}
            ledger.on_step(Step(operations, tuple(fields[1]), tuple(fields[2]), loading), 0.0)
        elif event == "release":
            ledger.release(fields[0], None, 0.0)
        elif event == "done":
            ledger.done(fields[0], fields[1])
        elif event == "finished":
            assert [sorted(names) for names in ledger.take_finished()] == fields, where
        else:
            assert event == "out", where
            assert ledger.outbox, where
            assert written(ledger.outbox.popleft()) == fields, where
    assert not ledger.outbox
    return version, ledger
