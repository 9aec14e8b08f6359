"""What is counted, and by which names.

| name | labels | what |
|-|-|-|
| kvtc_lookup_blocks_total | result (hit, miss, declined), tier (host, disk, none) | blocks that were asked for |
| kvtc_stored_blocks_total | result (stored, known, not_admitted, queue_full, no_room, failed) | blocks offered |
| kvtc_loaded_blocks_total | result (loaded, failed) | blocks that were to be restored |
| kvtc_pulled_blocks_total | result (pulled, failed) | blocks that other workers were to send |
| kvtc_pulled_bytes_total | | coded bytes of those that came |
| kvtc_raw_bytes_total, kvtc_coded_bytes_total | direction (in: stored, out: restored) | those blocks, raw and coded |
| kvtc_ratio | | raw over coded bytes of all that was stored |
| kvtc_encode_seconds, kvtc_decode_seconds | | of a job, without its wait |
| kvtc_fetch_seconds | tier | from asking a store to having the records |
| kvtc_pull_seconds | | from asking other workers to the last answer |
| kvtc_queue_seconds | queue (encode, load) | a job's wait |
| kvtc_queue_bytes | queue | raw bytes that wait or are worked on |
| kvtc_used_bytes, kvtc_budget_bytes, kvtc_records | tier | occupancy |
| kvtc_evictions_total, kvtc_refused_records_total | tier | a full tier's answer |
| kvtc_exact_tokens_total | reason (policy, nonfinite, error_bound) | tokens stored bit-exact |
| kvtc_overlay_blocks_total | result (stored, no_room, hit, moved_on) | exact records beside coded ones |
| kvtc_overlay_bytes | | what they take of the host |
| kvtc_errors_total | kind | what went wrong; kinds of a store start with its tier |

Histograms are in seconds. ``sink`` hears of every change, for engines that carry numbers in their own way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from dynamo_kvtc.errors import MissingDependencyError
from dynamo_kvtc.store import StoreStats

COUNTERS: dict[str, tuple[str, ...]] = {
    "kvtc_lookup_blocks": ("result", "tier"),
    "kvtc_stored_blocks": ("result",),
    "kvtc_loaded_blocks": ("result",),
    "kvtc_pulled_blocks": ("result",),
    "kvtc_pulled_bytes": (),
    "kvtc_raw_bytes": ("direction",),
    "kvtc_coded_bytes": ("direction",),
    "kvtc_evictions": ("tier",),
    "kvtc_refused_records": ("tier",),
    "kvtc_exact_tokens": ("reason",),
    "kvtc_overlay_blocks": ("result",),
    "kvtc_errors": ("kind",),
}
GAUGES: dict[str, tuple[str, ...]] = {
    "kvtc_ratio": (),
    "kvtc_queue_bytes": ("queue",),
    "kvtc_used_bytes": ("tier",),
    "kvtc_budget_bytes": ("tier",),
    "kvtc_records": ("tier",),
    "kvtc_overlay_bytes": (),
}
HISTOGRAMS: dict[str, tuple[str, ...]] = {
    "kvtc_encode_seconds": (),
    "kvtc_decode_seconds": (),
    "kvtc_fetch_seconds": ("tier",),
    "kvtc_pull_seconds": (),
    "kvtc_queue_seconds": ("queue",),
}
BUCKETS = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

Sink = Callable[[str, str, float, tuple[str, ...]], None]
"""("counter", "gauge" or "histogram", name without _total, value, label values)."""


class TierMetrics:
    """registry: a prometheus_client.CollectorRegistry; by default one of its own. Raises MissingDependencyError."""

    def __init__(self, registry: Any = None, sink: Sink | None = None) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as exc:
            raise MissingDependencyError(
                "the tier's metrics need prometheus_client: pip install dynamo-kvtc[engine]"
            ) from exc
        self.registry = prometheus.CollectorRegistry() if registry is None else registry
        self.sink = sink
        self._lock = threading.Lock()
        self._told: dict[tuple[str, tuple[str, ...]], float] = {}
        self._all: dict[str, Any] = {
            **{n: prometheus.Counter(n, describe(n), labels, registry=self.registry) for n, labels in COUNTERS.items()},
            **{n: prometheus.Gauge(n, describe(n), labels, registry=self.registry) for n, labels in GAUGES.items()},
            **{
                n: prometheus.Histogram(n, describe(n), labels, registry=self.registry, buckets=BUCKETS)
                for n, labels in HISTOGRAMS.items()
            },
        }

    def count(self, name: str, value: float = 1, *labels: str) -> None:
        if value:
            self._of(name, labels).inc(value)
            self._tell("counter", name, value, labels)

    def set(self, name: str, value: float, *labels: str) -> None:
        self._of(name, labels).set(value)
        self._tell("gauge", name, value, labels)

    def observe(self, name: str, seconds: float, *labels: str) -> None:
        self._of(name, labels).observe(seconds)
        self._tell("histogram", name, seconds, labels)

    def value(self, name: str, *labels: str) -> float:
        """Of a counter or gauge; 0 before it was ever counted."""
        label_names = (COUNTERS | GAUGES)[name]
        full = f"{name}_total" if name in COUNTERS else name
        return self.registry.get_sample_value(full, dict(zip(label_names, labels, strict=True))) or 0.0

    def totals(self) -> dict[str, float]:
        """Counters and gauges by name and labels, sums and counts of histograms: for a log."""
        return {
            f"{s.name}{list(s.labels.values()) if s.labels else ''}": s.value
            for family in self.registry.collect()
            for s in family.samples
            if not s.name.endswith(("_bucket", "_created"))
        }

    def refresh(self, tiers: Mapping[str, StoreStats], queues: Mapping[str, int]) -> None:
        """What stores and queues count themselves."""
        for tier, stats in tiers.items():
            self.set("kvtc_used_bytes", stats.used_bytes, tier)
            self.set("kvtc_budget_bytes", stats.budget_bytes, tier)
            self.set("kvtc_records", stats.entries, tier)
            self._count_up_to("kvtc_evictions", stats.evictions, tier)
            self._count_up_to("kvtc_refused_records", stats.refused, tier)
            for kind, number in stats.errors.items():
                self._count_up_to("kvtc_errors", number, f"{tier}_{kind}")
        for queue, nbytes in queues.items():
            self.set("kvtc_queue_bytes", nbytes, queue)
        coded = self.value("kvtc_coded_bytes", "in")
        if coded:
            self.set("kvtc_ratio", self.value("kvtc_raw_bytes", "in") / coded)

    def _count_up_to(self, name: str, total: float, *labels: str) -> None:
        with self._lock:
            more = total - self._told.get((name, labels), 0.0)
            self._told[name, labels] = total
        self.count(name, max(more, 0.0), *labels)

    def _of(self, name: str, labels: tuple[str, ...]) -> Any:
        metric = self._all[name]
        return metric.labels(*labels) if labels else metric

    def _tell(self, kind: str, name: str, value: float, labels: tuple[str, ...]) -> None:
        if self.sink is not None:
            self.sink(kind, name, value, labels)


def describe(name: str) -> str:
    """The row of the table above."""
    assert __doc__ is not None
    row = next(line for line in __doc__.splitlines() if line.startswith("|") and name in line.split("|")[1])
    return row.split("|")[3].strip()
