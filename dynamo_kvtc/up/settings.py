"""``--kv-transfer-config`` of a manifest's workers, judged before anything starts by the parsers it is for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from dynamo_kvtc.adapters.connector.options import parse_connector
from dynamo_kvtc.adapters.kvbm.options import parse_options as parse_kvbm
from dynamo_kvtc.adapters.vllm.options import parse_options as parse_offloading
from dynamo_kvtc.errors import ConfigError

FLAG = "--kv-transfer-config"
EXTRA = "kv_connector_extra_config"
OURS = "dynamo_kvtc.adapters."
CONNECTOR = OURS + "connector"
KVBM = OURS + "kvbm"


def read_settings(text: str, where: str) -> dict[str, Any]:
    """The object that the flag's value is, its options checked if the connector is one of ours. Raises ConfigError."""
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise ConfigError(f"{where}: {FLAG} is no JSON: {exc}") from exc
    if not isinstance(value, dict) or not isinstance(value.get(EXTRA, {}), dict):
        raise ConfigError(f"{where}: {FLAG} and its {EXTRA} must be objects")
    parser = _parser(value)
    if parser is not None:
        try:
            parser(value.get(EXTRA, {}))
        except ConfigError as exc:
            raise ConfigError(f"{where}: {FLAG}: {exc}") from exc
        policed = value.get("kv_connector_module_path", "").startswith(OURS)
        if policed and value.get("kv_load_failure_policy") != "recompute":
            raise ConfigError(
                f"{where}: kv_load_failure_policy is {value.get('kv_load_failure_policy', 'fail')!r}: a block that "
                "cannot be loaded would end its request; set it to 'recompute'"
            )
    return value


def module_of(settings: Mapping[str, Any]) -> str:
    """Of this package's adapters, or something else."""
    extra = settings.get(EXTRA, {})
    return str(settings.get("kv_connector_module_path") or extra.get("spec_module_path") or "")


def artifact_of(settings: Mapping[str, Any]) -> str | None:
    artifact = settings.get(EXTRA, {}).get("artifact")
    return artifact if isinstance(artifact, str) and module_of(settings).startswith(OURS) else None


def _parser(settings: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any] | None:
    module = module_of(settings)
    if module == KVBM:
        return parse_kvbm
    if module == CONNECTOR:
        return parse_connector
    return parse_offloading if module.startswith(OURS + "vllm") else None
