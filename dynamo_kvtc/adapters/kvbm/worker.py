"""The worker of one rank: a thread that answers KVBM's leader, and the calls the engine makes on its own thread.

All sockets belong to the thread, and it alone calls the mover, in the order in which the ledger decided. The engine's
and the mover's threads change the ledger under its lock and wake the thread up.

Reconnecting is ZeroMQ's: the worker may be there long before its leader binds, and the leader repeats its handshake
until every rank has answered. A leader that comes back hands out ids anew (``Ledger``).
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Collection

import zmq

from dynamo_kvtc.adapters.engine_model import EMPTY_STEP_SECONDS
from dynamo_kvtc.adapters.kvbm._compat import Endpoints
from dynamo_kvtc.adapters.kvbm.actions import Action, Answer, Capacity, Demotion
from dynamo_kvtc.adapters.kvbm.ledger import Ledger
from dynamo_kvtc.adapters.kvbm.mover import BlockMover, Done
from dynamo_kvtc.adapters.kvbm.options import Options
from dynamo_kvtc.adapters.kvbm.protocol import MAX_PAYLOAD_BYTES, decode_message
from dynamo_kvtc.adapters.kvbm.step import Step
from dynamo_kvtc.errors import ConfigError, EngineError, EngineTimeoutError, KvtcError

log = logging.getLogger(__name__)

_LONGEST_WAIT_SECONDS = 1.0
_SEND_SECONDS = 5.0
_LINGER_MS = 1000


class KvbmWorker:
    """Start it before or after its leader. Methods but ``start`` raise what has stopped the thread, if anything has."""

    def __init__(self, endpoints: Endpoints, device_blocks: int, mover: BlockMover, options: Options) -> None:
        size = mover.bytes_per_block
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 1 << 63:
            raise ConfigError(f"the mover's bytes_per_block is {size!r}; it must be a positive integer")
        self._endpoints = endpoints
        self.mover = mover
        self._options = options
        self._ledger = Ledger(device_blocks, size, options.half_seconds, options.transfer_seconds)
        self._lock = threading.Condition()
        self._failure: BaseException | None = None
        self._asked = 0.0
        self._stopping = False
        self._ready = False
        self._wake_read, self._wake_write = socket.socketpair()
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="kvbm-worker", daemon=True)

    # Life

    def start(self) -> None:
        self._thread.start()

    def wait_ready(self, timeout_seconds: float) -> None:
        """Until the leader's handshake has come through and its last question is answered: whoever waits here next asks
        the leader, which holds the GIL until it has that answer. Raises EngineTimeoutError."""
        deadline = time.monotonic() + timeout_seconds
        with self._lock:
            while not self._ready:
                self._check()
                left = deadline - time.monotonic()
                if left <= 0:
                    raise EngineTimeoutError(
                        f"no handshake with KVBM's leader at {self._endpoints.publish} and {self._endpoints.answer} "
                        f"within {timeout_seconds:.0f} s; the engine and its workers must agree on "
                        f"DYN_KVBM_LEADER_ZMQ_HOST, _PUB_PORT and _ACK_PORT"
                    )
                self._lock.wait(min(left, _LONGEST_WAIT_SECONDS))

    def shutdown(self, timeout_seconds: float = 10.0) -> None:
        """Ends the mover and the thread. What is open is answered as failed; safe to call twice."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        self._wake()
        if self._thread.ident is not None:
            self._thread.join(timeout_seconds)
        self.mover.shutdown(timeout_seconds)
        if self._thread.is_alive():
            raise EngineTimeoutError(f"the worker's thread did not end within {timeout_seconds:.0f} s")
        self._wake_read.close()
        self._wake_write.close()

    # The engine's thread

    def begin_step(self, step: Step) -> None:
        """The engine's step has begun: its operations are known, not yet allowed."""
        with self._lock:
            self._check()
            self._ledger.on_step(step, time.monotonic())

    def release_loads(self) -> None:
        """The pages of this step's loads are free, behind what the engine has launched."""
        self._release(load=True)

    def release_stores(self) -> None:
        """The engine has launched the forward pass that computes this step's stores."""
        self._release(load=False)

    def drop_stores(self, request_ids: Collection[str]) -> None:
        """The device blocks of these requests are about to be given to others: waits for what is being read."""
        deadline = time.monotonic() + self._options.transfer_seconds
        with self._lock:
            while self._ledger.drop_stores(request_ids):
                self._check()
                if time.monotonic() >= deadline:
                    # The store reads pages that change under it: what it stores is not present for us.
                    log.warning("stores of preempted requests are past their deadline")
                    self._ledger.abandon_stores(request_ids)
                    break
                self._lock.wait(_LONGEST_WAIT_SECONDS)
        self._wake()

    def take_finished(self) -> tuple[set[str], set[str]]:
        """(stored, loaded) requests, each named once; the load errors of ``loaded`` are in ``take_load_errors``."""
        with self._lock:
            self._check()
            stored, loaded = self._ledger.take_finished()
            # An engine that only asks again keeps the interpreter from the thread that it waits for.
            empty = time.monotonic() - self._asked < EMPTY_STEP_SECONDS
            if empty and self._ledger.loading and not stored and not loaded:
                self._lock.wait(EMPTY_STEP_SECONDS)
                stored, loaded = self._ledger.take_finished()
            self._asked = time.monotonic()
            return stored, loaded

    def take_load_errors(self) -> set[int]:
        with self._lock:
            return self._ledger.take_load_errors()

    def counts(self) -> dict[str, int]:
        with self._lock:
            return dict(self._ledger.counts)

    @property
    def open(self) -> int:
        with self._lock:
            return self._ledger.open

    def _release(self, load: bool) -> None:
        with self._lock:
            self._check()
            if not self._ledger.unreleased(load):
                return
        fence = self.mover.fence()
        with self._lock:
            self._ledger.release(load, fence, time.monotonic())
        self._wake()

    def _check(self) -> None:
        if self._failure is not None:
            error = self._failure if isinstance(self._failure, KvtcError) else EngineError(repr(self._failure))
            raise error from self._failure

    # The worker's thread

    def _run(self) -> None:
        context = zmq.Context()
        try:
            with context.socket(zmq.SUB) as leader, context.socket(zmq.PUSH) as answers:
                leader.setsockopt(zmq.SUBSCRIBE, b"")
                # A message that is dropped is a leader that waits for ever.
                leader.setsockopt(zmq.RCVHWM, 0)
                leader.setsockopt(zmq.MAXMSGSIZE, MAX_PAYLOAD_BYTES)
                leader.setsockopt(zmq.LINGER, 0)
                answers.setsockopt(zmq.LINGER, _LINGER_MS)
                answers.setsockopt(zmq.SNDTIMEO, int(_SEND_SECONDS * 1000))
                leader.connect(self._endpoints.publish)
                answers.connect(self._endpoints.answer)
                self._loop(leader, answers)
        except BaseException as exc:
            # Whatever it is, the engine's next call raises it: a worker that is gone must not be waited for.
            log.exception("the worker of KVBM's leader stops")
            with self._lock:
                self._failure = exc
                self._lock.notify_all()
        finally:
            context.destroy(linger=_LINGER_MS)

    def _loop(self, leader: zmq.Socket[bytes], answers: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(leader, zmq.POLLIN)
        poller.register(self._wake_read.fileno(), zmq.POLLIN)
        while True:
            with self._lock:
                now = time.monotonic()
                next_tick = self._ledger.tick(now)
                stopping, ready = self._stopping, self._ledger.ready
                if stopping:
                    self._ledger.fail_all()
                actions = list(self._ledger.outbox)
                self._ledger.outbox.clear()
                self._lock.notify_all()
            for action in actions:
                self._do(action, answers)
            if stopping:
                return
            with self._lock:
                if ready and not self._ready:
                    self._ready = True
                    self._lock.notify_all()
                if self._ledger.outbox:
                    continue
            wait = _LONGEST_WAIT_SECONDS if next_tick is None else min(_LONGEST_WAIT_SECONDS, next_tick - now)
            poller.poll(max(0, math.ceil(wait * 1000)))
            with contextlib.suppress(BlockingIOError):
                self._wake_read.recv(4096)
            self._receive(leader)

    def _receive(self, leader: zmq.Socket[bytes]) -> None:
        while True:
            try:
                frames = leader.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            message = decode_message(frames)
            with self._lock:
                self._ledger.on_message(message, time.monotonic())

    def _do(self, action: Action, answers: zmq.Socket[bytes]) -> None:
        if isinstance(action, Answer):
            answers.send_multipart(action.frames)
        elif isinstance(action, Capacity):
            self.mover.set_capacity(action.host_blocks, action.disk_blocks)
        elif isinstance(action, Demotion):
            self._ask(action.token, [t for _, t in action.pairs], lambda done: self.mover.demote(action.pairs, done))
        else:
            ask = self.mover.load if action.load else self.mover.store
            targets = [move.target for move in action.request.moves]
            self._ask(action.token, targets, lambda done: ask(action.request, done))

    def _ask(self, token: int, targets: list[int], ask: Callable[[Done], None]) -> None:
        """A mover that raises instead of starting has failed that move, and no more."""

        def done(failed: Collection[int]) -> None:
            with self._lock:
                self._ledger.done(token, failed)
                self._lock.notify_all()
            self._wake()

        try:
            ask(done)
        except Exception:
            log.exception("the mover refused a move of %d blocks", len(targets))
            done(targets)

    def _wake(self) -> None:
        # A full pipe wakes the thread up as well; a closed one has no thread behind it.
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_write.send(b"\0")
