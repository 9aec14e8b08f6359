"""A vLLM connector of our own: the tier, and what other workers of a cluster hold.

    --kv-transfer-config '{"kv_connector": "KvtcConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "dynamo_kvtc.adapters.connector", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"artifact": "model.safetensors", "point": "16", "host_gib": 8,
                                      "nats": {"servers": "nats://host:4222", "namespace": "dynamo"}}}'

READ FIRST: connector.py (vLLM's hooks), then scheduler.py (what is loaded and stored), loads.py (how it comes),
worker.py (when it is waited for), cluster.py (the others), handoff.py and params.py (from a prefill worker to a decode
worker), options.py (all that can be set). kv_load_failure_policy must be "recompute": a pull is a hope, not a promise.
vLLM is imported when ``KvtcConnector`` is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamo_kvtc.adapters.connector.connector import KvtcConnector

__all__ = ["KvtcConnector"]


def __getattr__(name: str) -> Any:
    if name == "KvtcConnector":
        from dynamo_kvtc.adapters.connector import connector

        return connector.KvtcConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
