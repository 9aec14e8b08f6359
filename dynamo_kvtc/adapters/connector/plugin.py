"""vLLM's entry point ``vllm.general_plugins``, called in each of its processes: Dynamo learns how this connector hands
a request from a prefill worker to a decode worker. Where there is no Dynamo, or one that knows of no protocols, nothing
happens."""

from __future__ import annotations

import importlib
import logging

NAME = "KvtcConnector"

log = logging.getLogger(__name__)


def register() -> None:
    try:
        protocols = importlib.import_module("dynamo.vllm.kv_connector_protocols")
        base, known = protocols.NixlConnectorProtocol, protocols.KV_CONNECTOR_PROTOCOLS
    except (ImportError, AttributeError) as exc:
        log.debug("no Dynamo to register %s with: %s", NAME, exc)
        return
    # The same on the wire: do_remote_decode to the prefill worker, what that one answers to the decode worker.
    known.setdefault(NAME, type("KvtcProtocol", (base,), {"__doc__": "KvtcConnector's hand-off."}))
