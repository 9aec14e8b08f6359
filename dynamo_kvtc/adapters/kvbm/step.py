"""What the scheduler's side tells a worker with every step of the engine: KVBM's own metadata (JSON from the Rust
leader, read here) and ours beside it (JSON, written and read here).

The leader's transfers name blocks, not positions. Ours gives every request that has an operation its block ids in
order, so that a block's first position is known on the worker.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dynamo_kvtc.adapters.kvbm.protocol import (
    MAX_REQUEST_ID_CHARS,
    MAX_UUID_CHARS,
    block_id,
    load_json_object,
    text,
)
from dynamo_kvtc.errors import EngineProtocolError


@dataclass(frozen=True)
class Operation:
    """The engine's half of an operation. ``positions``: first position by device block id of the request."""

    request_id: str
    uuid: str
    load: bool
    positions: Mapping[int, int]


@dataclass(frozen=True)
class Step:
    """finished: requests whose device blocks the engine keeps until their stores are done.
    preempted: requests whose device blocks are about to be given to others.
    loading: device blocks that a request of this step's loads is waiting for, in order.
    """

    operations: tuple[Operation, ...] = ()
    finished: tuple[str, ...] = ()
    preempted: tuple[str, ...] = ()
    loading: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def kvbm_request_ids(metadata: bytes) -> set[str]:
    """The requests with an operation in KVBM's metadata. Raises EngineProtocolError."""
    return {text(op["request_id"], MAX_REQUEST_ID_CHARS, "request_id") for op in _operations(metadata)}


def encode_ours(
    blocks: Mapping[str, Sequence[int]],
    block_tokens: int,
    finished: Iterable[str] = (),
    preempted: Iterable[str] = (),
    loading: Mapping[str, Sequence[int]] | None = None,
) -> bytes:
    """blocks: for each request with an operation, all its device block ids in order, from position 0 on."""
    fields = {
        "block_tokens": block_tokens,
        "requests": [
            {"request_id": request_id, "first_position": 0, "block_ids": list(ids)}
            for request_id, ids in blocks.items()
        ],
        "finished": sorted(finished),
        "preempted": sorted(preempted),
        "loading": {request_id: list(ids) for request_id, ids in (loading or {}).items()},
    }
    return json.dumps(fields, separators=(",", ":")).encode()


def preempted_of(ours: bytes) -> set[str]:
    """The preempted requests alone: asked for before the step is bound. Raises EngineProtocolError."""
    names = load_json_object(ours, "the connector's metadata").get("preempted")
    if not isinstance(names, list):
        raise EngineProtocolError(f"the connector's metadata has preempted {names!r:.80}; it must be a list")
    return {text(name, MAX_REQUEST_ID_CHARS, "request_id") for name in names}


def decode_step(kvbm: bytes, ours: bytes) -> Step:
    """Both halves joined. Raises EngineProtocolError where they do not fit each other."""
    fields = load_json_object(ours, "the connector's metadata")
    size = block_id(fields.get("block_tokens"), "block_tokens")
    positions: dict[str, dict[int, int]] = {}
    for request in fields["requests"]:
        first = block_id(request["first_position"], "first_position")
        # A request's blocks beyond its sequence may be placeholders that share an id: the first place counts.
        places: dict[int, int] = {}
        for i, device_id in enumerate(request["block_ids"]):
            places.setdefault(block_id(device_id, "a device block"), first + i * size)
        positions[request["request_id"]] = places
    operations = []
    for op in _operations(kvbm):
        request_id = text(op["request_id"], MAX_REQUEST_ID_CHARS, "request_id")
        if request_id not in positions:
            raise EngineProtocolError(f"KVBM has an operation for request {request_id!r:.80}, the connector no blocks")
        operations.append(
            Operation(
                request_id,
                text(op["uuid"], MAX_UUID_CHARS, "uuid"),
                load=op["transfer_type"] == "Load",
                positions=positions[request_id],
            )
        )
    return Step(
        tuple(operations),
        finished=tuple(fields["finished"]),
        preempted=tuple(fields["preempted"]),
        loading={request_id: tuple(ids) for request_id, ids in fields["loading"].items()},
    )


def _operations(metadata: bytes) -> list[dict[str, Any]]:
    fields = load_json_object(metadata, "KVBM's metadata")
    if fields.keys() != {"iteration", "new_slots", "operations"} or not isinstance(fields["operations"], list):
        raise EngineProtocolError(
            f"KVBM's metadata has {sorted(fields)}; iteration, new_slots and a list of operations are known"
        )
    for op in fields["operations"]:
        if not isinstance(op, dict) or op.keys() != {"request_id", "uuid", "transfer_type", "request_type"}:
            raise EngineProtocolError(f"an operation of KVBM's metadata is {op!r:.200}")
        kind = (op["transfer_type"], op["request_type"])
        if kind not in (("Load", "Immediate"), ("Store", "Scheduled")):
            raise EngineProtocolError(f"an operation of KVBM's metadata is {kind}; no known leader writes this")
    return fields["operations"]
