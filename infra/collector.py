"""Entry point of the collector: ``python -m infra.collector``. Settings in; frames of trades and gaps in Kafka out.

Wires the Binance collector to Kafka, PostgreSQL (which symbols) and the health server. SIGTERM drains: everything received is
acknowledged by the broker before the process ends, within 5 s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import uvloop
from prometheus_client import REGISTRY

from collectors.batcher import BatcherConfig
from collectors.binance.collector import BinanceCollector, CollectorConfig
from collectors.binance.feed import Venue, venue_of
from collectors.binance.mapper import BinanceMapper
from collectors.binance.rest import BinanceRest
from collectors.breaker import Breaker
from collectors.coverage import Resume
from collectors.errors import BlockedError, BreakerOpenError, CollectorError, VenueError
from infra.collector_metrics import CollectorMetrics
from infra.collector_resume import left_off
from infra.ending import on_request_to_end_loop
from infra.errors import MarketstreamError, SettingsError, UnreachableError
from infra.health import HealthServer
from infra.kafka import FrameProducer
from infra.logs import setup_logging
from infra.registry_client import RegistryClient
from infra.seam import SystemClock
from infra.settings import Settings, load_settings
from infra.spool import Spool, SpoolConfig, SpoolFullError
from infra.spool_files import DiskFiles
from infra.spool_sink import SpoolSink
from infra.symbol_store import SymbolStore
from infra.watchdog import Monitor, Waiting
from schemas.errors import SchemaError, VocabularyError
from schemas.symbols import check_symbol

logger = logging.getLogger(__name__)

DRAIN_S: Final = 4.0
"""SIGTERM to exit, before ``infra.ending`` ends the process whatever hangs."""
FLUSH_S: Final = 1.0
"""Of these, how long to wait for acknowledgements; what has none by then is kept on disk and sent at the next start."""
MAX_DEAD_LETTERS: Final = 10_000
"""Dead letters that wait for the broker; more are counted, not kept."""
MAX_DEAD_LETTER_BYTES: Final = 64 * 1024 * 1024
"""The same for their bytes: one may have a megabyte."""
DEFAULT_SYMBOLS: Final = (
    "BTC-USDT", "ETH-USDT", "SOL-USDT", "BNB-USDT", "XRP-USDT", "DOGE-USDT", "ADA-USDT", "AVAX-USDT", "LINK-USDT", "LTC-USDT",
)  # fmt: skip
"""Put into an empty table ``symbols`` for a live venue; a simulated one gets all it lists."""
_RETRY_S: Final = 2.0


class KafkaDeadLetters:
    """`collectors.wire.DeadLetters` into topic ``deadletter``; a bounded queue, so the hot path never waits."""

    def __init__(self, sink: SpoolSink, metrics: CollectorMetrics) -> None:
        self._sink, self._metrics = sink, metrics
        self._queue: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue(MAX_DEAD_LETTERS)
        self._bytes = 0

    def put(self, *, reason: str, detail: str, exchange: str, symbol: str, place: str, time_us: int, raw: bytes, raw_size: int) -> None:
        """See DeadLetters.put."""
        row: dict[str, Any] = {
            "reason": reason,
            "detail": detail,
            "component": "collector",
            "exchange": exchange,
            "symbol": symbol,
            "topic": "",
        }
        row |= {"partition": -1, "offset": -1, "place": place, "time_us": time_us, "raw_size": raw_size, "raw": raw}
        if self._queue.full() or self._bytes + len(raw) > MAX_DEAD_LETTER_BYTES:
            self._metrics.dead_letters_lost += 1
            return
        self._bytes += len(raw)
        self._queue.put_nowait((f"{exchange}:{symbol}", row))

    async def run(self) -> None:
        """Send what comes, until cancelled."""
        while True:
            key, row = await self._queue.get()
            self._bytes -= len(row["raw"])
            try:
                await self._sink.send_row("deadletter", key, row)
            finally:
                self._queue.task_done()

    async def drained(self) -> None:
        """Until everything that was put is handed to the producer."""
        await self._queue.join()


class CollectorProcess:
    """The wired collector. ``run()`` once; ``stop()`` from a signal handler."""

    def __init__(self, settings: Settings, registry: RegistryClient, sink: SpoolSink, metrics: CollectorMetrics) -> None:
        self._settings = settings
        self._registry = registry
        self._sink = sink
        self._metrics = metrics
        self._clock = SystemClock()
        self._stopping = asyncio.Event()
        self._trouble: dict[str, str] = {"start": "The collector is starting."}
        self._collector: BinanceCollector | None = None
        self._fixed: set[str] = set()  # symbols from settings; empty: the table decides
        self._round_us = 0

    def stop(self) -> None:
        """Drain and end."""
        self._stopping.set()

    # infra.watchdog.Work

    verb = "sent or spooled"

    def done(self) -> int:
        """See Work.done; heartbeats count, so a quiet market is progress."""
        return self._sink.taken_records

    def waiting(self) -> Waiting:
        """See Work.waiting: a heartbeat is due every half second while a feed is live."""
        if self._sink.is_full:
            return Waiting(blocked=self._sink.reasons())
        shards = [] if self._collector is None else list(self._collector.shards)
        return Waiting(count=sum(shard.is_live for shard in shards))

    def reasons(self) -> dict[str, str]:
        """Why the collector is not ready."""
        found = dict(self._trouble)
        if self._collector is not None:
            found |= self._collector.reasons()
        found |= self._sink.reasons()
        if self._round_us and self._clock.monotonic_us() - self._round_us > 10_000_000:
            found["loop"] = "The collector's event loop has not run for 10 s."
        return found

    async def run(self) -> None:
        """Collect until stopped; then everything received is acknowledged or in the spool.

        Raises UnreachableError, CollectorError for what no retry can help.
        """
        tasks = {asyncio.create_task(self._sink.run(), name="spool"), asyncio.create_task(self._collect(), name="collect")}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._keep()

    async def _keep(self) -> None:
        try:
            await self._sink.close(FLUSH_S)
        except SpoolFullError as exc:
            logger.error("%s What is not sent yet is fetched by id at the next start.", exc)

    async def sent_before(self) -> bool:
        """Wait until what an earlier process left in the spool is in the topics, where the last positions are read; False when stopped.

        In the topics, not at the producer: a broker that hangs takes megabytes into a socket and tells nothing of them. Positions read then
        were those of an empty topic, and what nobody had listened to was never asked for.
        """
        if self._sink.waiting_bytes or self._sink.is_spooling:
            self._trouble["start"] = "The collector is sending what an earlier one left in its spool."
        either = {asyncio.create_task(self._sink.drained()), asyncio.create_task(self._stopping.wait())}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in either:
                task.cancel()
        return not self._stopping.is_set()

    async def _collect(self) -> None:
        settings = self._settings.collector
        venue = venue_of(settings.exchange, rest_url=settings.rest_url, ws_url=settings.ws_url)
        self._fixed = {check_symbol(symbol) for symbol in settings.symbols}
        for name in ("trades", "gaps", "deadletter"):  # the first frame must not wait for the registry on the event loop
            await asyncio.to_thread(self._registry.register, name)
        if not await self.sent_before():
            return
        resume, _ = await asyncio.gather(
            asyncio.to_thread(self._positions, venue),
            # loads the compiled reader (0.2 s; 2 s to compile where nobody did) before there is anything to read
            asyncio.to_thread(BinanceMapper(venue.kind).parse, [b"{}"]),
        )
        dead_letters = KafkaDeadLetters(self._sink, self._metrics)
        async with httpx.AsyncClient(timeout=10.0, trust_env=not _is_loopback(venue.rest_url)) as http:
            rest = BinanceRest(venue, http, self._clock, Breaker(f"{venue.exchange}/rest"))
            self._collector = self._metrics.collector = BinanceCollector(
                venue=venue,
                rest=rest,
                sink=self._sink,
                dead_letters=dead_letters,
                clock=self._clock,
                config=_config(self._settings),
                resume=resume,
            )
            self._trouble.pop("start", None)
            await self._work(self._collector, dead_letters)

    def _positions(self, venue: Venue) -> dict[str, Resume]:
        found = left_off(self._settings, self._registry, venue.exchange, consecutive=venue.consecutive_ids, now_us=self._clock.now_us())
        if found:
            gaps = sum(len(resume.gaps) for resume in found.values())
            logger.info("Continuing after the last trade of %d symbols, with %d gaps left open.", len(found), gaps)
        return {key.partition(":")[2]: resume for key, resume in found.items()}

    async def _work(self, collector: BinanceCollector, dead_letters: KafkaDeadLetters) -> None:
        letters = asyncio.create_task(dead_letters.run())
        running = asyncio.create_task(collector.run())
        symbols = asyncio.create_task(self._follow_symbols(collector))
        beat = asyncio.create_task(self._beat())
        stopping = asyncio.create_task(self._stopping.wait())
        tasks: set[asyncio.Task[Any]] = {letters, running, symbols, beat, stopping}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopping}:
                task.result()
            symbols.cancel()
            async with asyncio.timeout(DRAIN_S - FLUSH_S):
                await collector.stop()
                await running
                await dead_letters.drained()
        except TimeoutError:
            raise UnreachableError(
                f"Neither Kafka nor the spool took what was received within {DRAIN_S - FLUSH_S:.0f} s; the rest is fetched by id at the next start."
            ) from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _beat(self) -> None:
        while True:
            self._round_us = self._clock.monotonic_us()
            await self._clock.sleep(0.5)

    # Symbols.

    async def _follow_symbols(self, collector: BinanceCollector) -> None:
        """Keep the collector's symbols what settings or PostgreSQL say."""
        while self._fixed:  # again and again: a symbol the venue does not list yet may be listed tomorrow
            await self._apply(collector, self._fixed)
            await self._clock.sleep(60.0)
        store = SymbolStore(self._settings.postgres)
        try:
            while True:
                try:
                    await store.open()
                    await self._follow_table(collector, store)
                except UnreachableError as exc:
                    self._trouble["postgres"] = str(exc)
                    logger.warning("%s The symbols stay as they are.", exc)
                    await self._clock.sleep(_RETRY_S)
        finally:
            await store.close()

    async def _follow_table(self, collector: BinanceCollector, store: SymbolStore) -> None:
        exchange = collector.venue.exchange
        seeded = False
        while True:
            if not seeded:
                seeded = await self._seed(collector, store)
            wanted = await store.active(exchange)
            self._trouble.pop("postgres", None)
            if await self._apply(collector, wanted):
                await store.set_states(exchange, collector.states)
            await store.wait_for_change()

    async def _seed(self, collector: BinanceCollector, store: SymbolStore) -> bool:
        """Fill an empty table; False when the venue did not answer."""
        exchange = collector.venue.exchange
        if await store.states(exchange):
            return True
        try:
            listed = await collector.listed()
        except (VenueError, BreakerOpenError) as exc:
            self._venue_failed(exc)
            return False
        simulated = _is_loopback(collector.venue.rest_url)
        suffix = "-PERP" if exchange.endswith("usdm") else ""
        chosen = listed if simulated else sorted({f"{name}{suffix}" for name in DEFAULT_SYMBOLS} & set(listed))
        if await store.seed(exchange, chosen):
            logger.info("Table symbols had none of %s: %d are collected from now on.", exchange, len(chosen))
        return True

    async def _apply(self, collector: BinanceCollector, wanted: set[str]) -> bool:
        """Tell the collector; tries until the venue answered. Raises BlockedError."""
        while True:
            try:
                await collector.want(wanted)
            except (VenueError, BreakerOpenError) as exc:
                self._venue_failed(exc)
                await self._clock.sleep(_RETRY_S)
                continue
            self._trouble.pop("venue", None)
            return True

    def _venue_failed(self, exc: CollectorError) -> None:
        if isinstance(exc, BlockedError):
            raise exc
        if self._trouble.get("venue") != str(exc):
            logger.warning("%s", exc)
        self._trouble["venue"] = str(exc)


def _config(settings: Settings) -> CollectorConfig:
    linger_ms = settings.collector.linger_ms
    batcher = BatcherConfig(
        partitions=settings.kafka.partitions,
        # 10..20 ms at the default. A frame costs the broker, the worker and the API 1.8 ms of CPU together: at 5 ms, 10,000 trades/s were 650
        # frames a second, which filled two cores, and a bar was late by 24 ms (p50) instead of 16.
        linger_min_ms=linger_ms,
        linger_max_ms=linger_ms * 2,
        max_rows=settings.collector.max_frame_rows,
        max_bytes=max(1024 * 1024, 64 * settings.collector.max_frame_rows),
    )
    return CollectorConfig(batcher=batcher)


def _is_loopback(url: str) -> bool:
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


async def collect(settings: Settings) -> None:
    """Run one collector until SIGTERM or SIGINT. Raises MarketstreamError, CollectorError, SchemaError."""
    metrics = CollectorMetrics(settings.collector.exchange)
    registry = RegistryClient.from_settings(settings)
    producer = FrameProducer(settings.kafka, registry)
    with open_spool(settings) as spool:
        sink = metrics.sink = SpoolSink(producer, spool, SystemClock())
        await _run(CollectorProcess(settings, registry, sink, metrics), settings, registry, metrics)


@contextlib.contextmanager
def open_spool(settings: Settings) -> Iterator[Spool]:
    """This collector's spool, with what an earlier process left in it. Raises DataDirError, DiskFullError."""
    files = DiskFiles(settings.data_dir / "spool" / f"{settings.kafka.topic_prefix}{settings.collector.exchange}")
    try:
        most = settings.collector.spool_max_mb * 1_000_000
        spool = Spool(files, SpoolConfig(max_bytes=most, segment_bytes=min(SpoolConfig().segment_bytes, most // 8)))
        found = spool.open()
        if found.cut_bytes:
            logger.warning("%d bytes of the spool were torn and cut off; what they held is fetched by id.", found.cut_bytes)
        if found.waiting_bytes:
            logger.info("The spool holds %.1f MB of an earlier process, which are sent first.", found.waiting_bytes / 1e6)
        yield spool
    finally:
        files.close()


async def _run(process: CollectorProcess, settings: Settings, registry: RegistryClient, metrics: CollectorMetrics) -> None:
    REGISTRY.register(metrics)
    monitor = Monitor(process, settings.watchdog.stuck_s, SystemClock())
    health = HealthServer(settings.collector.health_port, process.reasons, monitor=monitor).start()
    on_request_to_end_loop(asyncio.get_running_loop(), process.stop)
    try:
        await process.run()
    finally:
        health.stop()
        REGISTRY.unregister(metrics)
        with contextlib.suppress(Exception):
            registry.close()


def main() -> int:
    """Entry point; the exit code."""
    try:
        settings = load_settings()
        setup_logging(settings.log_level, as_json=settings.log_json)
        uvloop.run(collect(settings))
    except MarketstreamError as exc:
        print(exc, file=sys.stderr)
        return exc.exit_code
    except (VocabularyError, SchemaError) as exc:
        print(exc, file=sys.stderr)
        return SettingsError.exit_code
    except CollectorError as exc:
        print(exc, file=sys.stderr)
        return UnreachableError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
