"""What a collector exports: its plain counters as Prometheus metrics, read when they are scraped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from collectors.binance.collector import BinanceCollector
from collectors.breaker import Breaker
from collectors.session import Shard
from infra.spool_sink import SpoolSink

_COUNTERS = (
    ("trades_received", "Trades handed on, duplicates left out", "trades"),
    ("collector_messages", "Messages received", "messages"),
    ("collector_frames", "Frames sent, heartbeats included", "frames"),
    ("collector_duplicates", "Trades dropped because they came before", "duplicates"),
    ("collector_ignored", "Valid messages that are no trades of the market", "ignored"),
    ("collector_backfilled", "Trades that came over REST", "backfilled"),
    ("websocket_reconnections", "Connections that were lost and made again", "reconnections"),
    ("websocket_renewals", "Connections replaced before the venue cuts them", "renewals"),
    ("collector_stale_reconnects", "Connections given up because they were silent", "stale_reconnects"),
    ("collector_backpressure_pauses", "Times reading stopped because Kafka could not take more", "pauses"),
    ("collector_gaps_opened", "Gaps found in trade ids", "gaps_opened"),
    ("collector_gaps_filled", "Gaps filled", "gaps_filled"),
    ("collector_gaps_unfillable", "Gaps the venue could not fill", "gaps_unfillable"),
)


class CollectorMetrics(Collector):
    """Registered once; asks the running collector at every scrape, from the health server's thread."""

    def __init__(self, exchange: str) -> None:
        self._exchange = exchange
        self.collector: BinanceCollector | None = None
        self.sink: SpoolSink | None = None
        self.dead_letters_lost = 0

    def collect(self) -> Iterable[Metric]:
        """All metrics."""
        shards = list(self.collector.shards) if self.collector is not None else []
        for name, text, field in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["exchange", "shard"])
            for shard in shards:
                counter.add_metric([self._exchange, shard.name], getattr(shard.pipeline.stats, field))
            yield counter
        yield from self._errors(shards)
        yield from self._gauges(shards)
        yield from self._breakers(shards)
        yield from self._spool()

    def _spool(self) -> Iterator[Metric]:
        sink = self.sink
        if sink is None:
            return
        for name, text, value in (
            ("collector_unacknowledged_bytes", "Records in memory that the broker has not acknowledged", sink.waiting_bytes),
            ("collector_spool_bytes", "Records in the disk spool that the broker has not acknowledged", sink.spool_bytes),
            ("collector_spool_disk_bytes", "What the spool takes on disk", sink.disk_bytes),
            ("collector_spool_oldest_seconds", "Age of the oldest record that is not acknowledged", sink.oldest_age_s()),
            ("collector_spool_full", "1: neither broker nor disk takes more, reading has stopped", float(sink.is_full)),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["exchange"])
            gauge.add_metric([self._exchange], value)
            yield gauge
        for name, text, count in (
            ("collector_spooled_records", "Records written to the disk spool", sink.spooled_records),
            ("collector_spool_full_waits", "Times a record had to wait because the spool was full", sink.full_waits),
        ):
            counter = CounterMetricFamily(name, text, labels=["exchange"])
            counter.add_metric([self._exchange], count)
            yield counter

    def _errors(self, shards: list[Shard]) -> Iterator[Metric]:
        errors = CounterMetricFamily("collector_errors", "What went wrong, by reason", labels=["exchange", "shard", "reason"])
        for shard in shards:
            for reason, count in list(shard.pipeline.stats.errors.items()):
                errors.add_metric([self._exchange, shard.name, reason], count)
        if self.collector is not None:
            errors.add_metric([self._exchange, "rest", "rest_failed"], self.collector.rest.errors)
        errors.add_metric([self._exchange, "deadletter", "dead_letters_lost"], self.dead_letters_lost)
        yield errors

    def _gauges(self, shards: list[Shard]) -> Iterator[Metric]:
        labels = ["exchange", "shard"]
        status = GaugeMetricFamily("collector_status", "1: connected and subscribed, 0: not", labels=labels)
        last = GaugeMetricFamily("last_trade_timestamp", "Exchange time of the newest trade, seconds", labels=labels)
        delay = GaugeMetricFamily("collector_receive_delay_seconds", "Receive time minus exchange time, clock skew included", labels=labels)
        symbols = GaugeMetricFamily("collector_symbols", "Streams wanted", labels=labels)
        stale = GaugeMetricFamily("collector_stale_symbols", "Symbols silent beyond their own rate", labels=labels)
        gaps = GaugeMetricFamily("collector_gaps_open", "Gaps open now", labels=labels)
        oldest = GaugeMetricFamily("collector_oldest_gap_seconds", "Since the oldest of them was found; 0: none", labels=labels)
        lost = GaugeMetricFamily("collector_symbols_lost", "Symbols of which nobody knows now whether something is missed", labels=labels)
        for shard in shards:
            stats, place = shard.pipeline.stats, [self._exchange, shard.name]
            gaps.add_metric(place, stats.gaps_open)
            oldest.add_metric(place, stats.oldest_gap_us / 1e6)
            lost.add_metric(place, stats.symbols_lost)
            status.add_metric(place, 1.0 if shard.is_live else 0.0)
            last.add_metric(place, stats.last_exchange_time_us / 1e6)
            delay.add_metric(place, (stats.last_receive_time_us - stats.last_exchange_time_us) / 1e6)
            symbols.add_metric(place, len(shard.streams))
            stale.add_metric(place, stats.stale_symbols)
        yield from (status, last, delay, symbols, stale, gaps, oldest, lost)

    def _breakers(self, shards: list[Shard]) -> Iterator[Metric]:
        breakers: list[Breaker] = [shard.breaker for shard in shards]
        if self.collector is not None:
            breakers.append(self.collector.rest.breaker)
        state = GaugeMetricFamily("circuit_breaker_state", "0 closed, 0.5 half-open, 1 open", labels=["name"])
        transitions = CounterMetricFamily("circuit_breaker_transitions", "Changes of state", labels=["name"])
        failures = CounterMetricFamily("circuit_breaker_failures", "Failures seen", labels=["name"])
        for breaker in breakers:
            state.add_metric([breaker.name], breaker.state.value)
            transitions.add_metric([breaker.name], breaker.transitions_total)
            failures.add_metric([breaker.name], breaker.failures_total)
        yield from (state, transitions, failures)
