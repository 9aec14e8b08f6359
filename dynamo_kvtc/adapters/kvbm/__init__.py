"""KVBM's Rust leader with a worker of ours: evicted blocks go through a ``BlockMover`` instead of KVBM's own copies.

READ FIRST: connector.py (what vLLM calls), then ledger.py (what a worker owes to whom), protocol.py (the bytes).
KVBM and vLLM are imported when ``DynamoConnector`` is asked for, so the parts can be tested without either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamo_kvtc.adapters.kvbm.connector import DynamoConnector, DynamoConnectorMetadata

__all__ = ["DynamoConnector", "DynamoConnectorMetadata"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dynamo_kvtc.adapters.kvbm import connector

    return getattr(connector, name)
