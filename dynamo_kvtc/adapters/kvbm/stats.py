"""The tier's numbers (tier/metrics.py has the names) on their way into vLLM's own metrics, behind its prefix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from dynamo_kvtc.adapters.engine_model import PREFIX
from dynamo_kvtc.tier.metrics import BUCKETS, COUNTERS, GAUGES, HISTOGRAMS, describe

_NOTED = "noted"


class TierStats(KVConnectorStats):
    """``data``: {"noted": [[kind, name, value, [label values]], ...]}, as ``tier.metrics.Sink`` is told them."""

    def __init__(self, data: Mapping[str, Any] | None = None) -> None:
        super().__init__(data={_NOTED: list((data or {}).get(_NOTED, ()))})

    @classmethod
    def of(cls, noted: Sequence[tuple[str, str, float, tuple[str, ...]]]) -> TierStats | None:
        """None if there is nothing to say."""
        told = [[kind, name, value, list(labels)] for kind, name, value, labels in noted]
        return cls({_NOTED: told}) if told else None

    def reset(self) -> None:
        self.data: dict[str, Any] = {_NOTED: []}

    def is_empty(self) -> bool:
        return not self.data[_NOTED]

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        self.data[_NOTED].extend(other.data.get(_NOTED, ()))
        return self

    def reduce(self) -> dict[str, int | float]:
        """Counters of the interval, for vLLM's log."""
        sums: Counter[str] = Counter()
        for kind, name, value, labels in self.data[_NOTED]:
            if kind == "counter":
                sums[" ".join([name, *labels])] += value
        return dict(sums)


class TierPromMetrics(KVConnectorPromMetrics):
    """Several ranks add up in counters and histograms; a gauge is that of the rank that spoke last."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._all: dict[str, Any] = {}
        kinds = ((self._counter_cls, COUNTERS), (self._gauge_cls, GAUGES), (self._histogram_cls, HISTOGRAMS))
        for make, names in kinds:
            extra: dict[str, Any] = {"buckets": BUCKETS} if names is HISTOGRAMS else {}
            for name, labels in names.items():
                self._all[name] = make(
                    name=PREFIX + name, documentation=describe(name), labelnames=[*labelnames, *labels], **extra
                )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        own = self.per_engine_labelvalues[engine_idx]
        for kind, name, value, labels in transfer_stats_data[_NOTED]:
            metric = self._all[name].labels(*own, *labels)
            if kind == "counter":
                metric.inc(value)
            elif kind == "gauge":
                metric.set(value)
            else:
                metric.observe(value)
