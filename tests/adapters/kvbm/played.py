"""What a leader writes, for tests that play it."""

from __future__ import annotations

import json
from typing import Any

from dynamo_kvtc.adapters.kvbm.protocol import Message, Transfer


def encode_message(message: Message) -> list[bytes]:
    """Its frames."""
    frames = [message.id.to_bytes(8, "big"), message.name.encode("ascii")]
    return [*frames, message.payload] if message.payload else frames


def encode_transfer(transfer: Transfer) -> bytes:
    """The payload."""
    fields: dict[str, Any] = {
        "from_pool": transfer.source.value,
        "to_pool": transfer.target.value,
        "blocks": [list(pair) for pair in transfer.pairs],
    }
    if transfer.uuid is not None:
        fields["connector_req"] = {
            "request_id": transfer.request_id,
            "uuid": transfer.uuid,
            "requirement": None,
            "request_type": "Scheduled" if transfer.scheduled else "Immediate",
        }
    return json.dumps(fields, separators=(",", ":")).encode()
