"""vLLM's native offloading over the tier: an ``OffloadingSpec`` for its ``OffloadingConnector``.

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config":
        {"spec_name": "KvtcOffloadingSpec", "spec_module_path": "dynamo_kvtc.adapters.vllm",
         "artifact": "model.safetensors", "point": "16", "host_gib": 8}}'

The other options are ``tier.options.TierOptions``'. READ FIRST: manager.py (the scheduler's side), worker.py (the
other), spec.py (what is refused at start), layout.py (where K and V lie in a page), _compat.py (releases' differences).
``KvtcOffloadingConnector`` (kv_connector_module_path: this package) is vLLM's connector that also reports pages a load
could not fill, so that a GPU that finds a record bad leads to a recompute and not to the engine's end.
vLLM does not tell a spec how long a step's tokens took, so nothing feeds the guard against slow loads: where one is
wanted, set ``prefill_tokens_per_second`` (without it no load is declined).
serve_demo.py is a program: the engine of ``kvtc demo --engine vllm``.
vLLM is imported when one of the names is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamo_kvtc.adapters.vllm.connector import KvtcOffloadingConnector
    from dynamo_kvtc.adapters.vllm.spec import KvtcOffloadingSpec

__all__ = ["KvtcOffloadingConnector", "KvtcOffloadingSpec"]


def __getattr__(name: str) -> Any:
    if name == "KvtcOffloadingSpec":
        from dynamo_kvtc.adapters.vllm import spec

        return spec.KvtcOffloadingSpec
    if name == "KvtcOffloadingConnector":
        from dynamo_kvtc.adapters.vllm import connector

        return connector.KvtcOffloadingConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
