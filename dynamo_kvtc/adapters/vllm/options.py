"""``kv_connector_extra_config`` of vLLM's OffloadingConnector with our spec: parsed without vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamo_kvtc.tier.options import TierOptions
from dynamo_kvtc.tier.options import parse_options as parse_tier

CONNECTORS_OWN = ("spec_name", "spec_module_path", "offload_prompt_only", "self_describing_kv_events")
"""Options that vLLM's connector reads; the others are the tier's."""


def parse_options(extra: Mapping[str, Any]) -> TierOptions:
    """Raises ConfigError."""
    return parse_tier({n: v for n, v in extra.items() if n not in CONNECTORS_OWN}, "kv_connector_extra_config")
