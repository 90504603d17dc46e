"""Prometheus metrics of the API process. A registry per app, so that tests and several apps in one process do not collide."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Counters, gauges and histograms by name; :meth:`render` is the text Prometheus scrapes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("http_requests", "HTTP requests answered.", ("route", "method", "status"), registry=self.registry)
        self.duration = Histogram(
            "http_request_duration_seconds", "From request to last byte.", ("route",), buckets=_SECONDS, registry=self.registry
        )
        self.cache_hits = Counter("api_cache_hits", "Reads answered from the short-lived cache.", registry=self.registry)
        self.cache_misses = Counter("api_cache_misses", "Reads that went to ClickHouse.", registry=self.registry)
        self.connections = Gauge("websocket_connections", "Open WebSocket connections.", registry=self.registry)
        self.subscriptions = Gauge("websocket_subscriptions", "Subscriptions of all connections.", registry=self.registry)
        self.messages_sent = 0
        """Messages sent to WebSocket clients; a plain number, as Counter.inc takes a lock and 0.5 us."""
        self.conflated = 0
        """Open-bar updates replaced by newer ones."""
        self.closed_slow = Counter("websocket_slow_clients", "Clients closed because they read too slowly.", registry=self.registry)
        self.refused = Counter("websocket_requests_refused", "Stream requests answered with an error.", ("code",), registry=self.registry)
        self.resumes = Counter("websocket_subscribes", "Subscribe requests by how they began.", ("kind",), registry=self.registry)

        self.watch(self._plain)

    def _plain(self) -> list[Metric]:
        sent = CounterMetricFamily("websocket_messages_sent", "Messages sent to WebSocket clients.", value=self.messages_sent)
        conflated = CounterMetricFamily("websocket_updates_conflated", "Open-bar updates replaced by newer ones.", value=self.conflated)
        return [sent, conflated]

    def watch(self, collect: Callable[[], Iterable[Metric]]) -> None:
        """Ask ``collect`` for more metrics at each scrape."""
        self.registry.register(_Watched(collect))

    def render(self) -> bytes:
        """All metrics in Prometheus text format."""
        return generate_latest(self.registry)


class _Watched(Collector):
    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        """The metrics now."""
        return self._collect()

    def describe(self) -> Iterable[Metric]:
        """Nothing: their names are known at the scrape only."""
        return []


def tail_metrics(lag_seconds: dict[tuple[str, int], float], tails: Iterable[tuple[str, int, int, int]]) -> list[Metric]:
    """Gauges of the live tails: ``tails`` are (topic, partition, next offset, unreadable records)."""
    lag = GaugeMetricFamily("api_hub_lag_seconds", "Age of the newest record read.", labels=["topic", "partition"])
    for (topic, partition), seconds in lag_seconds.items():
        lag.add_metric([topic, str(partition)], seconds)
    offset = GaugeMetricFamily("api_hub_next_offset", "Offset the tail reads next.", labels=["topic", "partition"])
    bad = CounterMetricFamily("api_hub_unreadable_records", "Records that could not be decoded.", labels=["topic", "partition"])
    for topic, partition, next_offset, unreadable in tails:
        offset.add_metric([topic, str(partition)], next_offset)
        bad.add_metric([topic, str(partition)], unreadable)
    return [lag, offset, bad]
