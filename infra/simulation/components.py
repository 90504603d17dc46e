"""The real components, each as one simulated process: what ``infra`` wires to Kafka and ClickHouse, wired to the simulated ones.

A function here is what an entry point is on a real machine: it builds the collector, worker, sink or API from the same classes and runs
until it is killed. Everything that decides whether a trade is lost stands in those classes, not here.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from random import Random
from typing import Any, Final
from zlib import crc32

import httpx

from api.deps import Record, StreamLimits
from api.errors import PositionLostError, StoreUnavailableError
from api.live.hub import Hub
from api.metrics import Metrics
from api.stream import StreamApp
from collectors.backoff import BackoffConfig
from collectors.batcher import BatcherConfig
from collectors.binance.collector import BinanceCollector, CollectorConfig
from collectors.binance.feed import venue_of
from collectors.binance.rest import BinanceRest
from collectors.breaker import Breaker, BreakerConfig
from collectors.coverage import Resume
from collectors.errors import BreakerOpenError, VenueError
from collectors.left_off import LeftOff
from infra.clickhouse.schema import TABLES
from infra.kafka import producer_config
from infra.settings import KafkaSettings
from infra.simulation.broker import SimBroker, SimConsumer, SimProducer, SimStateLog
from infra.simulation.disk import SimDisk
from infra.simulation.loop import PROCESS, SimClock, VirtualLoop, WouldBlockError
from infra.simulation.store import SimKnowledge, SimStore
from infra.simulation.trace import Trace
from infra.spool import Spool, SpoolConfig
from infra.spool_sink import SpoolSink, SpoolSinkConfig
from processors.bars import BarConfig
from schemas.codec import FrameCodec, RowCodec, decode_learning
from schemas.errors import DecodeError
from schemas.frames import Frame
from schemas.topics import SCHEMA_NAMES, TOPICS
from streams.bar_shard import BarCodecs
from streams.deadletters import dead_letter
from streams.quality_records import QualityCodecs
from streams.runner import BarRunner
from streams.sink import Batch, Received, TopicSink

EXCHANGE: Final = "binance"
EXCHANGE_PLACE: Final = ("127.0.0.1", 9000)
WORKER_GROUP: Final = "bars"
SINK_GROUP: Final = "sink"


@dataclass(kw_only=True, slots=True)
class Tuning:
    """Rates and waits of the world: what costs time is done rarely, what is tested stays as it is."""

    symbols: int = 2
    rate: float = 6.0
    """Trades a second, all symbols."""
    step_ms: int = 1_000
    partitions: int = 2
    timeframes: tuple[str, ...] = ("1s", "1m")
    linger_ms: float = 250.0
    check_s: float = 0.5
    """Between two looks of the collector at its connection."""
    probe_silence_s: float = 1.5
    """Silence after which the collector pings: longer than the market's step."""
    live_interval_us: int = 2_000_000
    """Between two updates of an open bar."""
    heartbeat_ms: float = 1_000.0
    snapshot_interval_s: float = 5.0
    sink_linger_s: float = 1.0
    api_poll_s: float = 5.0
    spool_idle_s: float = 1.0
    """Between two looks of the spool while it is not needed."""
    page_rows: int = 1_000
    """Trades of one REST page: a few, so that gaps have several."""


@dataclass(slots=True)
class Outside:
    """What every process finds when it starts: the rest of the world."""

    loop: VirtualLoop
    broker: SimBroker
    store: SimStore
    trace: Trace
    tuning: Tuning
    seed: int
    sink_topics: tuple[str, ...] = ("trades", "bars", "gaps", "quarantine", "deadletter")
    disk: SimDisk = field(default_factory=lambda: SimDisk(Random(0)))
    """Of the collector."""
    hooks: dict[str, Any] = field(default_factory=dict)
    """Parts of running processes that the world looks at: collector, runner, stream."""

    def clock(self, name: str) -> SimClock:
        """The clock of a process that starts now."""
        process = PROCESS.get()
        generation, skew_us = (process.generation, process.skew_us) if process is not None else (0, 0)
        return SimClock(self.loop, f"{self.seed}/{name}/{generation}", skew_us)

    def producer(self) -> SimProducer:
        """A producer with the product's own settings."""
        return SimProducer(self.broker, codecs(), producer_config(KafkaSettings(bootstrap="simulated:9092")))

    async def broker_is_up(self) -> None:
        """Return when the broker answers."""
        while not self.broker.up:
            await self.broker.changed(0.2)


@cache
def codecs() -> dict[str, FrameCodec | RowCodec]:
    """A codec for each topic; schema ids as a new registry would give them."""
    found: dict[str, FrameCodec | RowCodec] = {}
    for name, entry in TOPICS.items():
        if entry.kind != "raw":
            number = SCHEMA_NAMES.index(entry.schema) + 1
            found[name] = FrameCodec(entry.schema, number) if entry.kind == "frame" else RowCodec(entry.schema, number)
    return found


def frame_codec(topic: str) -> FrameCodec:
    """The codec of a frame topic."""
    codec = codecs()[topic]
    assert isinstance(codec, FrameCodec)
    return codec


def row_codec(topic: str) -> RowCodec:
    """The codec of a row topic."""
    codec = codecs()[topic]
    assert isinstance(codec, RowCodec)
    return codec


def no_schema(schema_id: int) -> str:
    """The registry knows only what every codec knows already."""
    raise KeyError(schema_id)


# -- collector


class _Letters:
    """`collectors.wire.DeadLetters` straight to the producer."""

    def __init__(self, outlet: SimProducer) -> None:
        self._producer = outlet

    def put(self, *, reason: str, detail: str, exchange: str, symbol: str, place: str, time_us: int, raw: bytes, raw_size: int) -> None:
        """See DeadLetters.put."""
        row = {"reason": reason, "detail": detail, "component": "collector", "exchange": exchange, "symbol": symbol, "topic": ""}
        row |= {"partition": -1, "offset": -1, "place": place, "time_us": time_us, "raw_size": raw_size, "raw": raw}  # type: ignore[dict-item]
        self._producer.produce("deadletter", 0, f"{exchange}:{symbol}".encode(), row_codec("deadletter").encode(row))


def last_positions(broker: SimBroker, store: SimStore) -> dict[str, Resume]:
    """Symbol -> where the collector before left off; read from the topics and the store as ``infra.collector_resume`` does."""
    found = LeftOff(EXCHANGE, broker.partitions)
    for topic in ("trades", "gaps"):
        for partition in range(broker.partitions):
            end = broker.end(topic, partition)
            for _, record in broker.read((topic, partition), max(0, end - 2_000), 2_000):
                try:
                    frame = decode_learning(frame_codec(topic), record.value, no_schema)
                except DecodeError:
                    continue
                if topic == "trades":
                    found.trades(partition, frame)
                else:
                    found.gaps(frame)
    if store.up:
        for key, trade_id, time_us in store.newest_trades():
            found.stored(key, trade_id, time_us)
    return {key.partition(":")[2]: resume for key, resume in found.resumes().items()}


def collector_config(tuning: Tuning) -> CollectorConfig:
    """The collector's configuration under the world's rates."""
    batcher = BatcherConfig(
        partitions=tuning.partitions,
        linger_min_ms=tuning.linger_ms,
        linger_max_ms=tuning.linger_ms,
        heartbeat_ms=tuning.heartbeat_ms,
    )
    return CollectorConfig(
        batcher=batcher,
        backoff=BackoffConfig(initial_s=0.5, maximum_s=2.0),
        breaker=BreakerConfig(failures=20, open_s=2.0),
    )


async def run_collector(outside: Outside) -> None:
    """The collector of all symbols the simulated exchange lists."""
    clock = outside.clock("collector")
    await outside.broker_is_up()
    producer = outside.producer()
    spool = Spool(outside.disk, SpoolConfig(segment_bytes=64 * 1024, min_free_bytes=0))
    spool.open()
    sink = SpoolSink(producer, spool, clock, SpoolSinkConfig(idle_s=outside.tuning.spool_idle_s))
    spooling = asyncio.create_task(sink.run())
    await sink.drained()  # what an earlier process left is sent before the topics are asked where it was
    resume = await asyncio.to_thread(last_positions, outside.broker, outside.store)
    host, port = EXCHANGE_PLACE
    venue = replace(venue_of(EXCHANGE, rest_url=f"http://{host}:{port}", ws_url=f"ws://{host}:{port}"), page_rows=outside.tuning.page_rows)
    async with httpx.AsyncClient(timeout=10.0, trust_env=False, verify=False) as http:
        rest = BinanceRest(venue, http, clock, Breaker("rest", BreakerConfig(failures=20, open_s=2.0)))
        collector = BinanceCollector(
            venue=venue,
            rest=rest,
            sink=sink,
            dead_letters=_Letters(producer),
            clock=clock,
            config=collector_config(outside.tuning),
            resume=resume,
        )
        outside.hooks["collector"] = collector
        running = asyncio.create_task(collector.run())
        while True:
            try:
                await collector.want(set(await collector.listed()))
                break
            except (VenueError, BreakerOpenError):
                await clock.sleep(0.5)
        await asyncio.wait({running, spooling}, return_when=asyncio.FIRST_COMPLETED)
        for task in (running, spooling):
            if task.done():
                task.result()


# -- worker


def bar_codecs() -> BarCodecs:
    """The codecs of a bar shard."""
    return BarCodecs(
        trades=frame_codec("trades"),
        bars=frame_codec("bars"),
        rows=row_codec("bars.rows"),
        deadletter=row_codec("deadletter"),
        fetch_schema=no_schema,
        quality=QualityCodecs(quality=frame_codec("quality"), quarantine=frame_codec("quarantine")),
    )


def emitted_offset(broker: SimBroker, partition: int) -> int:
    """``input_offset`` of the newest worker's record in a bars partition, -1 for none."""
    end = broker.end("bars", partition)
    for offset in range(end - 1, -1, -1):
        [(_, record)] = broker.read(("bars", partition), offset, 1)
        found = frame_codec("bars").decode(record.value).input_offset
        if found >= 0:
            return found
    return -1


async def run_worker(outside: Outside) -> None:
    """The bar worker of all partitions: consume, process, snapshot, commit."""
    clock = outside.clock("worker")
    broker, tuning = outside.broker, outside.tuning
    await outside.broker_is_up()
    runner = BarRunner(
        config=BarConfig(timeframes=tuning.timeframes, live_interval_us=tuning.live_interval_us),
        codecs=bar_codecs(),
        sender=outside.producer(),
        open_log=lambda partition: SimStateLog(broker, partition),
        emitted_offset=lambda partition: emitted_offset(broker, partition),
        clock=clock,
    )
    outside.hooks["runner"] = runner
    positions = {}
    for partition in range(tuning.partitions):
        shard = await runner.shard(partition)
        committed = broker.committed.get((WORKER_GROUP, "trades", partition), 0)
        # the state decides where reading starts: a commit may be ahead of it when a snapshot was lost
        positions[("trades", partition)] = min(committed, shard.applied_offset + 1)
    consumer = SimConsumer(broker, positions)
    snapshots = asyncio.create_task(_snapshots(outside, runner, clock))
    while not snapshots.done():
        for (_, partition), offset, record in await consumer.poll(tuning.api_poll_s):
            await runner.handle(partition, offset, record.value)
    snapshots.result()


async def _snapshots(outside: Outside, runner: BarRunner, clock: SimClock) -> None:
    while True:
        await clock.sleep(outside.tuning.snapshot_interval_s)
        saved = await runner.snapshot()
        if saved:
            outside.broker.commit(WORKER_GROUP, "trades", {partition: offset + 1 for partition, offset in saved.items()})


# -- sink


class SinkProcess:
    """Consume, batch, insert, commit: the loop of ``infra.sink`` in coroutines."""

    def __init__(self, outside: Outside) -> None:
        self._outside = outside
        self._clock = outside.clock("sink")
        self._letters = outside.producer()
        self._sinks = {name: self._topic_sink(name) for name in outside.sink_topics}
        self._pending: dict[str, list[Received]] = {name: [] for name in outside.sink_topics}

    async def run(self) -> None:
        """Until killed."""
        outside, broker = self._outside, self._outside.broker
        await outside.broker_is_up()
        positions = {}
        for name in self._sinks:
            for partition in range(broker.partitions if TOPICS[name].per_partition else 1):
                committed = broker.committed.get((SINK_GROUP, name, partition), 0)
                await self._until_done(partial(self._sinks[name].resume, partition, committed))
                positions[(name, partition)] = committed
        consumer = SimConsumer(broker, positions)
        while True:
            for (name, partition), offset, record in await consumer.poll(outside.tuning.api_poll_s):
                self._pending[name].append(Received(partition, offset, record.value, record.timestamp_us))
            for name, records in self._pending.items():
                if records:
                    self._pending[name] = []
                    await self._flush(name, records)
            await self._clock.sleep(outside.tuning.sink_linger_s)

    async def _flush(self, name: str, records: list[Received]) -> None:
        sink, store = self._sinks[name], self._outside.store
        batches: list[Batch] = await self._until_done(lambda: sink.batches(records))
        for batch in batches:
            await self._until_done(partial(store.insert, batch))
            sink.inserted(batch)
        newest = {record.partition: record.offset + 1 for record in records}
        process = PROCESS.get()
        if process is not None:
            process.touch()
        self._outside.broker.commit(SINK_GROUP, name, newest)

    async def _until_done(self, call: Callable[[], Any]) -> Any:
        wait_s = 0.1
        while True:
            try:
                return call()
            except OSError:
                await self._clock.sleep(wait_s)
                wait_s = min(wait_s * 2, 1.0)

    def _topic_sink(self, name: str) -> TopicSink:
        return TopicSink(name, TABLES[name].time_column, codecs()[name], self._outside.store, no_schema, self._undecodable)

    def _undecodable(self, name: str, record: Received, exc: DecodeError) -> None:
        if name in ("trades", "deadletter"):
            return
        letter = dead_letter(
            reason="undecodable_frame",
            detail=str(exc),
            component="sink",
            raw=record.value,
            time_us=self._clock.now_us(),
            topic=name,
            partition=record.partition,
            offset=record.offset,
        )
        self._letters.produce("deadletter", 0, None, row_codec("deadletter").encode(letter))


async def run_sink(outside: Outside) -> None:
    """The sink of all topics with a table."""
    await SinkProcess(outside).run()


# -- api


class SimFrames:
    """`api.deps.FrameSource` on the simulated broker."""

    WARM_RECORDS: Final = 50

    def __init__(self, outside: Outside) -> None:
        self._outside = outside
        self._task: asyncio.Task[None] | None = None

    async def start(self, deliver: Callable[[Sequence[Record]], None], moved: Callable[[str, int, int], None]) -> None:
        """See FrameSource."""
        self._task = asyncio.create_task(self._follow(deliver, moved))

    async def _follow(self, deliver: Callable[[Sequence[Record]], None], moved: Callable[[str, int, int], None]) -> None:
        outside = self._outside
        await outside.broker_is_up()
        positions = {}
        for topic in ("bars", "trades"):
            for partition in range(outside.broker.partitions):
                start = max(0, outside.broker.end(topic, partition) - self.WARM_RECORDS)
                moved(topic, partition, start)
                positions[(topic, partition)] = start
        consumer = SimConsumer(outside.broker, positions)
        while True:
            found = await consumer.poll(outside.tuning.api_poll_s)
            if found:
                deliver([Record(topic, part, offset, record.timestamp_us // 1000, record.value) for (topic, part), offset, record in found])

    async def stop(self) -> None:
        """See FrameSource."""
        if self._task is not None:
            self._task.cancel()

    def epoch(self, topic: str) -> int | None:
        """See FrameSource."""
        return crc32(topic.encode())

    def decode(self, record: Record) -> Frame:
        """See FrameSource."""
        return decode_learning(frame_codec(record.topic), record.value, no_schema)

    async def read(self, topic: str, partition: int, start: int, stop: int) -> AsyncGenerator[Sequence[Record], None]:
        """See FrameSource."""
        broker = self._outside.broker
        if start > broker.end(topic, partition):
            raise PositionLostError(topic, partition, start)
        position = start
        while position < stop:
            await broker.changed(0.003)
            try:
                batch = broker.read((topic, partition), position, min(100, stop - position))
            except WouldBlockError:
                raise StoreUnavailableError("kafka", "The simulated broker is away.") from None
            if not batch:
                return
            position = batch[-1][0] + 1
            yield [Record(topic, partition, offset, record.timestamp_us // 1000, record.value) for offset, record in batch]

    async def ping(self) -> None:
        """See FrameSource."""


class _EveryInstrument:
    """A catalogue that knows every name."""

    async def check(self, exchange: str, symbol: str) -> None:
        """Nothing is unknown."""


async def run_api(outside: Outside) -> None:
    """The API's live stream; clients come in through ``hooks["stream"]``."""
    clock = outside.clock("api")
    frames = SimFrames(outside)
    knowledge = SimKnowledge(outside.store, clock, outside.tuning.partitions)
    limits = replace(StreamLimits(), heartbeat_s=30.0)
    hub = Hub(frames, knowledge, clock, outside.tuning.partitions, limits)
    await hub.start()
    parts: dict[str, Any] = {"hub": hub, "catalogue": _EveryInstrument(), "metrics": Metrics(), "clock": clock, "limits": limits}
    if "feeds" in StreamApp.__init__.__annotations__:
        parts["feeds"] = None  # nobody subscribes to a session here
    stream = StreamApp(**parts)
    outside.hooks["stream"] = (PROCESS.get(), stream)
    await asyncio.get_running_loop().create_future()


def describe(row: Mapping[str, Any]) -> str:
    """A dead letter as text, for the report of a failing seed."""
    return json.dumps({name: row[name] for name in ("reason", "detail", "component", "exchange", "symbol")})
