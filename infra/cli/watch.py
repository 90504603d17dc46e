"""Watching a running stack: a live table once a second on a terminal, a JSON line every ten seconds otherwise, until it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Final

from confluent_kafka import OFFSET_END, Consumer, KafkaException, TopicPartition

from infra.cli.live import LiveStats, Snapshot
from infra.cli.output import Output, make_table
from infra.errors import MarketstreamError
from infra.kafka import consumer_config
from infra.progress import lag
from infra.registry_client import RegistryClient
from infra.seam import SystemClock
from infra.settings import Settings
from infra.stack.state import ProcessStatus
from schemas.codec import decode_learning
from schemas.errors import DecodeError
from schemas.timeframes import format_time_us
from schemas.topics import TOPICS

TABLE_EVERY_S: Final = 1.0
LINE_EVERY_S: Final = 10.0
_LAG_EVERY_S: Final = 2.0


class Watcher:
    """Reads ``bars`` and asks for the lag in two threads of its own; what fails is shown, never raised."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._clock = SystemClock()
        self._stats = LiveStats()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.lag: dict[str, int] = {}
        self.trouble = ""
        self._threads = [threading.Thread(target=self._guard, args=(work,), daemon=True) for work in (self._read, self._measure)]

    def start(self) -> None:
        """Begin to watch."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End both threads; returns when they have ended."""
        self._stop.set()
        for thread in self._threads:
            thread.join(5)

    def snapshot(self) -> Snapshot:
        """The figures now."""
        with self._lock:
            return self._stats.snapshot(self._clock.now_us())

    def _guard(self, work: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                work()
            except (MarketstreamError, KafkaException) as exc:
                self.trouble = str(exc)
                self._stop.wait(1)

    def _read(self) -> None:
        full = TOPICS["bars"].full_name(self._settings.kafka.topic_prefix)
        consumer = Consumer(consumer_config(self._settings.kafka, "watch"))
        try:
            with RegistryClient.from_settings(self._settings) as registry:
                codec = registry.frame_codec("bars")
                consumer.assign([TopicPartition(full, partition, OFFSET_END) for partition in range(self._settings.kafka.partitions)])
                while not self._stop.is_set():
                    message = consumer.poll(0.2)  # `consume` would wait until it has as many as asked for, which spoils the latency
                    if message is None or message.error() is not None:
                        continue
                    try:
                        frame = decode_learning(codec, message.value() or b"", registry.schema)
                    except DecodeError:
                        continue  # the sink dead-letters it
                    with self._lock:
                        self._stats.add(frame, self._clock.now_us())
        finally:
            consumer.close()

    def _measure(self) -> None:
        while not self._stop.wait(_LAG_EVERY_S):
            self.lag = lag(self._settings)
            self.trouble = ""


def watch(output: Output, settings: Settings, processes: Callable[[], list[ProcessStatus]], ended: Callable[[float], bool]) -> None:
    """Show what happens until ``ended(seconds)``, which waits that long, says so. Ctrl-C goes through to the caller."""
    watcher = Watcher(settings)
    watcher.start()
    try:
        if output.is_terminal:
            _table(output, watcher, processes, ended)
        else:
            _lines(output, watcher, processes, ended)
    finally:
        watcher.stop()


def _lines(
    output: Output,
    watcher: Watcher,
    processes: Callable[[], list[ProcessStatus]],
    ended: Callable[[float], bool],
    every_s: float = LINE_EVERY_S,
) -> None:
    until = time.monotonic() + every_s
    while not ended(max(until - time.monotonic(), 0.0)):
        until += every_s
        states = {status.name: status.state for status in processes()}
        value: dict[str, Any] = {"time": format_time_us(SystemClock().now_us()), **watcher.snapshot().as_json(), "lag": watcher.lag}
        value["processes"] = states
        if watcher.trouble:
            value["trouble"] = watcher.trouble
        output.emit(value)


def _table(output: Output, watcher: Watcher, processes: Callable[[], list[ProcessStatus]], ended: Callable[[float], bool]) -> None:
    from rich.live import Live

    with Live(console=output.console(), refresh_per_second=4, transient=False) as live:
        while not ended(TABLE_EVERY_S):
            live.update(render(watcher.snapshot(), watcher.lag, processes(), watcher.trouble))


def render(snapshot: Snapshot, lags: dict[str, int], processes: list[ProcessStatus], trouble: str) -> Any:
    """The live table."""
    from rich.console import Group
    from rich.markup import escape

    latency = "-" if snapshot.latency_p50_ms is None else f"{snapshot.latency_p50_ms:,.1f} / {snapshot.latency_p99_ms:,.1f} ms"
    behind = ", ".join(f"{stage} {count:,}" for stage, count in lags.items()) or "-"
    head = [f"trades/s [bold]{snapshot.trades_per_s:,.0f}[/]    latency p50 / p99 [bold]{latency}[/]    lag {escape(behind)}"]
    down = [f"{status.name}: {status.state} {status.detail}" for status in processes if status.state != "ready"]
    head += [f"[red]{escape(line)}[/]" for line in [*down, trouble] if line]
    rows = [
        (bar.instrument, format_time_us(bar.open_time_us)[11:19], bar.open, bar.high, bar.low, bar.close, bar.volume, bar.trade_count)
        for bar in snapshot.bars
    ]
    table = make_table(("last bars (1m)", "from", "open", "high", "low", "close", "volume", "trades"), rows)
    return Group(*head, table, "[dim]Ctrl-C stops everything[/]")
