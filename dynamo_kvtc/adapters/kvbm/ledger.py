"""What a worker owes and to whom: the leader's messages and the engine's steps in, acknowledgements, moves and finished
requests out. No sockets, threads or clocks in here: ``now`` is handed in, and every call is made under one lock.

An operation of a request reaches a worker in two halves, in any order: the leader's ``transfer_blocks`` names the
blocks, the engine's step says that the source is computed (a store) or that the pages are free (a load). It starts
when both are there. Whatever happens, three things hold:

1. Every message is answered, for a leader waits for ever. What did not move is acknowledged too, and remembered as not
   present: its load fails.
2. A failed load is reported by its device blocks no later than its request is reported as loaded, so the engine
   recomputes it.
3. Nothing waits longer than its deadline. A load past its deadline may still write into pages: that is the one case in
   which the engine must stop, and ``tick`` raises.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable
from typing import Any

from dynamo_kvtc.adapters.kvbm import protocol
from dynamo_kvtc.adapters.kvbm.actions import Action, Answer, Capacity, Demotion, Move, OpenOperation, Running
from dynamo_kvtc.adapters.kvbm.mover import BlockMove, MoveRequest
from dynamo_kvtc.adapters.kvbm.protocol import Message, Pool, Transfer
from dynamo_kvtc.adapters.kvbm.step import Step
from dynamo_kvtc.errors import EngineProtocolError, EngineTimeoutError

_VOIDS_KEPT = 1 << 16
_GRACE_SECONDS = 5.0
"""What a mover may be late by before its load is called stuck: its own clock and ours are not read at once."""


class Ledger:
    def __init__(
        self, device_blocks: int, bytes_per_block: int, half_seconds: float = 60.0, transfer_seconds: float = 30.0
    ) -> None:
        self.device_blocks = device_blocks
        self.bytes_per_block = bytes_per_block
        self.half_seconds = half_seconds
        self.transfer_seconds = transfer_seconds
        self.capacity: Capacity | None = None
        self.ready = False
        self.outbox: deque[Action] = deque()
        """Actions in the order in which they must be done; whoever holds the socket takes them out."""
        self.counts: defaultdict[str, int] = defaultdict(int)
        self.present: dict[Pool, set[int]] = {Pool.HOST: set(), Pool.DISK: set()}
        self._operations: dict[str, OpenOperation] = {}
        self._running: dict[int, Running] = {}
        self._tokens = 0
        self._void: OrderedDict[str, None] = OrderedDict()
        self._waiting_blocks: dict[str, tuple[int, ...]] = {}
        self._errors: defaultdict[str, set[int]] = defaultdict(set)
        self._loaded: set[str] = set()
        self._closing: set[str] = set()
        self._load_errors: set[int] = set()

    # The leader's side

    def on_message(self, message: Message, now: float) -> None:
        """Raises EngineProtocolError for what no known leader sends."""
        if message.name == "transfer_blocks":
            self._on_transfer(message.id, protocol.decode_transfer(message.payload), now)
            return
        if message.name != "leader_metadata" and message.payload:
            raise EngineProtocolError(f"{message.name!r} with a payload of {len(message.payload)} bytes")
        if message.name == "worker_metadata":
            frames = protocol.encode_worker_metadata(message.id, self.device_blocks, self.bytes_per_block)
            self.outbox.append(Answer(frames))
        elif message.name == "leader_metadata":
            self._on_capacity(Capacity(*protocol.decode_leader_metadata(message.payload)))
            self._acknowledge(message.id)
        elif message.name == "ping":
            # The leader pings once its handshake has come through; before, a ping is some other leader's.
            self.ready = self.capacity is not None
            self._acknowledge(message.id)
        else:
            raise EngineProtocolError(f"message {message.name!r} is not one a known leader sends")

    def _on_capacity(self, capacity: Capacity) -> None:
        # The leader repeats itself until all ranks have answered; a new leader has forgotten what ids meant.
        if capacity != self.capacity or any(self.present.values()):
            self.capacity = capacity
            for ids in self.present.values():
                ids.clear()
            self.outbox.append(capacity)

    def _on_transfer(self, message_id: int, transfer: Transfer, now: float) -> None:
        self._check_ids(transfer)
        if transfer.uuid is None or transfer.request_id is None:
            self._demote(message_id, transfer, now)
            return
        if transfer.target is not Pool.DEVICE:
            self.present[transfer.target].difference_update(target for _, target in transfer.pairs)
        if self._void.pop(transfer.uuid, 0) is None:
            # Given up before: the engine has been told, and its pages are others' by now.
            self.counts["late_halves"] += 1
            self._acknowledge(message_id)
            return
        load = transfer.target is Pool.DEVICE
        op = self._half(transfer.uuid, transfer.request_id, load, now)
        if op.transfer is not None:
            raise EngineProtocolError(f"the leader asks operation {transfer.uuid} of {transfer.request_id!r:.80} twice")
        op.message_id, op.transfer = message_id, transfer
        self._start(op, now)

    def _demote(self, message_id: int, transfer: Transfer, now: float) -> None:
        source, target = self.present[transfer.source], self.present[transfer.target]
        pairs = tuple(pair for pair in transfer.pairs if pair[0] in source)
        target.difference_update(t for _, t in transfer.pairs)
        self.counts["failed_demotions"] += len(transfer.pairs) - len(pairs)
        if not pairs:
            self._acknowledge(message_id)
            return
        token = self._run(message_id, transfer.target, [t for _, t in pairs], frozenset(), None, now)
        self.outbox.append(Demotion(token, pairs))

    # The engine's side

    def on_step(self, step: Step, now: float) -> None:
        """The engine's halves, not yet released. Raises EngineProtocolError."""
        self._closing.update(step.finished)
        for operation in step.operations:
            if operation.uuid in self._void:
                del self._void[operation.uuid]
                self.counts["late_halves"] += 1
                if operation.load:
                    self._errors[operation.request_id].update(step.loading.get(operation.request_id, ()))
                    self._report(operation.request_id)
                continue
            op = self._half(operation.uuid, operation.request_id, operation.load, now)
            if op.operation is not None:
                raise EngineProtocolError(f"operation {operation.uuid} of {operation.request_id!r:.80} comes twice")
            op.operation = operation
            if operation.load:
                self._waiting_blocks[operation.request_id] = step.loading.get(operation.request_id, ())

    @property
    def loading(self) -> bool:
        """Whether a request waits for a load."""
        return bool(self._waiting_blocks)

    def release(self, load: bool, fence: Any, now: float) -> None:
        """The engine has launched what the bound loads (or stores) must be ordered after."""
        for op in list(self._operations.values()):
            if op.operation is not None and op.load == load and not op.released:
                op.released, op.fence = True, fence
                self._start(op, now)

    def unreleased(self, load: bool) -> bool:
        return any(op.operation is not None and op.load == load and not op.released for op in self._operations.values())

    def drop_stores(self, request_ids: Collection[str]) -> bool:
        """Stores of these requests that have not begun are given up; whether the mover is still reading for others."""
        for op in list(self._operations.values()):
            if op.request_id in request_ids and not op.load and op.token is None:
                self._give_up(op)
        return any(
            r.operation is not None and not r.operation.load and r.operation.request_id in request_ids
            for r in self._running.values()
        )

    def abandon_stores(self, request_ids: Collection[str]) -> None:
        """Stores of these requests count as failed whatever the mover says of them later."""
        for token, running in list(self._running.items()):
            op = running.operation
            if op is not None and not op.load and op.request_id in request_ids:
                self.done(token, running.targets)

    def take_finished(self) -> tuple[set[str], set[str]]:
        """(stored, loaded): requests whose device blocks the engine may free, and those it may run."""
        storing = {op.request_id for op in self._operations.values() if not op.load}
        stored = self._closing - storing
        self._closing -= stored
        loaded, self._loaded = self._loaded, set()
        for request_id in loaded:
            self._load_errors |= self._errors.pop(request_id, set())
        return stored, loaded

    def take_load_errors(self) -> set[int]:
        errors, self._load_errors = self._load_errors, set()
        return errors

    # The mover's side

    def done(self, token: int, failed: Collection[int]) -> None:
        """A move has ended. Late ends, after a deadline, change nothing."""
        running = self._running.pop(token, None)
        if running is None:
            return
        bad = running.already_failed | set(failed)
        self._acknowledge(running.message_id)
        kind = "demotions" if running.operation is None else "loads" if running.operation.load else "stores"
        self.counts[kind] += len(set(running.targets) - bad)
        self.counts[f"failed_{kind}"] += len(bad)
        if running.pool is not Pool.DEVICE:
            self.present[running.pool].update(set(running.targets) - bad)
        if running.operation is not None:
            self._close(running.operation, bad)

    # Time

    def tick(self, now: float) -> float | None:
        """Gives up what has waited too long; when to be called next. Raises EngineTimeoutError for a stuck load."""
        for token, running in list(self._running.items()):
            if now < running.deadline + _GRACE_SECONDS:
                continue
            if running.pool is Pool.DEVICE:
                raise EngineTimeoutError(
                    f"a load into {len(running.targets)} device blocks is {now - running.deadline:.0f} s past its "
                    f"deadline and may still write: the engine must stop"
                )
            self.counts["timeouts"] += 1
            self.done(token, running.targets)
        for op in list(self._operations.values()):
            if op.half_missing and now >= op.born + self.half_seconds:
                self.counts["timeouts"] += 1
                self._give_up(op)
        times = [r.deadline + _GRACE_SECONDS for r in self._running.values()]
        times += [op.born + self.half_seconds for op in self._operations.values() if op.half_missing]
        return min(times, default=None)

    def fail_all(self) -> None:
        """At shutdown: answers what is open, so that the leader does not wait for it."""
        for token, running in list(self._running.items()):
            self.done(token, running.targets)
        for op in list(self._operations.values()):
            self._give_up(op)

    @property
    def open(self) -> int:
        """Operations and demotions that have not ended."""
        return len(self._operations) + sum(1 for r in self._running.values() if r.operation is None)

    # Inside

    def _half(self, uuid: str, request_id: str, load: bool, now: float) -> OpenOperation:
        op = self._operations.get(uuid)
        if op is None:
            op = self._operations[uuid] = OpenOperation(request_id, uuid, load, now)
        if (op.request_id, op.load) != (request_id, load):
            raise EngineProtocolError(f"the halves of operation {uuid} do not agree: {op.request_id!r}, {request_id!r}")
        return op

    def _start(self, op: OpenOperation, now: float) -> None:
        if not op.released or op.transfer is None or op.operation is None or op.message_id is None:
            return
        transfer, positions = op.transfer, op.operation.positions
        pool = transfer.source if op.load else transfer.target
        moves: list[BlockMove] = []
        failed: set[int] = set()
        for source, target in transfer.pairs:
            position = positions.get(target if op.load else source)
            # Behind a hole nothing of a load is of use: the engine recomputes from there on.
            if position is None or (op.load and (failed or source not in self.present[pool])):
                failed.add(target)
            else:
                moves.append(BlockMove(source, target, position))
        targets = [target for _, target in transfer.pairs]
        op.token = self._run(op.message_id, transfer.target, targets, frozenset(failed), op, now)
        if moves:
            deadline = self._running[op.token].deadline
            request = MoveRequest(op.request_id, pool, tuple(moves), op.fence, deadline)
            self.outbox.append(Move(op.token, op.load, request))
        else:
            self.done(op.token, ())

    def _run(
        self,
        message_id: int,
        pool: Pool,
        targets: Iterable[int],
        failed: frozenset[int],
        op: OpenOperation | None,
        now: float,
    ) -> int:
        self._tokens += 1
        self._running[self._tokens] = Running(message_id, now + self.transfer_seconds, pool, tuple(targets), failed, op)
        return self._tokens

    def _give_up(self, op: OpenOperation) -> None:
        """An operation that has not begun. Its other half, should it come, finds it void."""
        self.counts["given_up"] += 1
        if op.message_id is not None:
            self._acknowledge(op.message_id)
        if op.half_missing:
            self._void[op.uuid] = None
            while len(self._void) > _VOIDS_KEPT:
                self._void.popitem(last=False)
        known = [target for _, target in op.transfer.pairs] if op.transfer is not None else ()
        self._close(op, {*known, *self._waiting_blocks.get(op.request_id, ())} if op.load else set())

    def _close(self, op: OpenOperation, failed: Collection[int]) -> None:
        del self._operations[op.uuid]
        if not op.load:
            return
        self._errors[op.request_id] |= set(failed)
        # Without the engine's half no request waits for it yet.
        if op.operation is not None:
            self._report(op.request_id)

    def _report(self, request_id: str) -> None:
        """The request is loaded, well or not, once none of its loads is open: the engine names them in one step."""
        if not any(op.load and op.request_id == request_id for op in self._operations.values()):
            self._waiting_blocks.pop(request_id, None)
            self._loaded.add(request_id)

    def _acknowledge(self, message_id: int) -> None:
        self.outbox.append(Answer(protocol.encode_ack(message_id)))

    def _check_ids(self, transfer: Transfer) -> None:
        if self.capacity is None:
            raise EngineProtocolError("transfer_blocks before leader_metadata")
        sizes = {
            Pool.DEVICE: self.device_blocks,
            Pool.HOST: self.capacity.host_blocks,
            Pool.DISK: self.capacity.disk_blocks,
        }
        for side, pool in enumerate((transfer.source, transfer.target)):
            for pair in transfer.pairs:
                if pair[side] >= sizes[pool]:
                    raise EngineProtocolError(f"{pool.value} block {pair[side]}; there are {sizes[pool]}")
