"""A simulated broker: logs, producers, consumers and committed offsets, with everything a real one may lose.

What it promises is what Kafka promises: a record acknowledged with ``acks=all`` survives; records of an idempotent producer stand once and
in order however often they were sent; everything else (records not yet synced, answers, commits just made) may go either way in a crash.
The producer's settings are the product's own (``infra.kafka.producer_config``), so a setting that loses records loses them here too.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final, NamedTuple

from infra.simulation.loop import PROCESS, KilledError, Process, VirtualLoop, WouldBlockError
from infra.simulation.trace import Trace
from schemas.codec import FrameCodec, RowCodec
from schemas.frames import Frame
from schemas.topics import TOPICS

RETRY_US: Final = 100_000
"""A producer whose request failed sends it again after this."""
MAX_BATCH: Final = 500
MAX_QUEUED: Final = 1_000
"""Records that wait in a producer; it takes no more then."""
Place = tuple[str, int]
"""(topic, partition)."""


class Record(NamedTuple):
    """One record of a log."""

    key: bytes | None
    value: bytes
    timestamp_us: int
    """When the broker took it; 0 before."""
    producer: int
    sequence: int


@dataclass(slots=True)
class Log:
    """One partition."""

    records: list[Record] = field(default_factory=list)
    synced: int = 0
    """Records before this offset survive a crash; only they are shown to consumers."""
    sequences: dict[int, int] = field(default_factory=dict)
    """Producer -> newest sequence number appended."""


class Request(NamedTuple):
    """Records of one producer on their way."""

    producer: SimProducer
    place: Place
    records: list[Record]


class SimBroker:
    """The broker.

    Args:
        loop, random, trace: as named.
        partitions: of topics that have them.
    """

    def __init__(self, loop: VirtualLoop, random: Random, trace: Trace, partitions: int) -> None:
        self.loop = loop
        self.random = random
        self.trace = trace
        self.partitions = partitions
        self.up = True
        self.latency_us = 300
        self.sync_us = self.fast_sync_us = 500
        """A record is durable this long after it arrived."""
        self.lost_answers = 0.0
        """Share of acknowledgements that get lost although the records are kept."""
        self.logs: dict[Place, Log] = {}
        for name, entry in TOPICS.items():
            for partition in range(partitions if entry.per_partition else 1):
                self.logs[(name, partition)] = Log()
        self.committed: dict[tuple[str, str, int], int] = {}
        self._committed_synced: dict[tuple[str, str, int], int] = {}
        self._unsynced: dict[Place, None] = {}
        self._answers: list[tuple[Request, list[int]]] = []
        self._syncing = False
        self._era = 0
        self._waiting: list[tuple[Collection[Place] | None, asyncio.Future[None]]] = []
        self._producers = 0
        self._context = copy_context()

    # -- what everybody may ask

    def end(self, topic: str, partition: int) -> int:
        """Offset after the newest record a consumer can see."""
        return self.logs[(topic, partition)].synced

    def values(self, topic: str, partition: int) -> list[bytes]:
        """Every value, for the checks at the end."""
        log = self.logs[(topic, partition)]
        return [record.value for record in log.records[: log.synced]]

    def reachable(self) -> bool:
        """Whether the calling process reaches the broker."""
        return self.up

    def inject(self, place: Place, value: bytes) -> None:
        """A record by somebody else."""
        if self.up:
            log = self.logs[place]
            log.records.append(Record(None, value, self.loop.now_us // 1000 * 1000, 0, 0))
            self.trace.note("append", *place, len(log.records) - 1, data=value)
            self._unsynced[place] = None
            self._sync_soon()

    # -- crash

    def crash(self) -> None:
        """Kill it: of what was not synced some prefix survives, answers on their way are lost."""
        self.up = False
        self._era += 1
        self._syncing = False
        for place in self._unsynced:
            log = self.logs[place]
            kept = log.synced + self.random.randint(0, len(log.records) - log.synced)
            del log.records[kept:]
            log.synced = kept
            log.sequences = {}
            for record in log.records:
                log.sequences[record.producer] = record.sequence
        self._unsynced.clear()
        self.committed = dict(self._committed_synced)
        answers, self._answers = self._answers, []
        for request, _ in answers:
            request.producer.failed(request)
        self.trace.note("broker", "crash")

    def restart(self) -> None:
        """Come back with what survived."""
        self.up = True
        self.trace.note("broker", "restart", *(f"{name}/{p}={log.synced}" for (name, p), log in self.logs.items() if log.synced))
        self._wake(None)

    # -- producing

    def new_producer(self) -> int:
        """An id nobody had."""
        self._producers += 1
        return self._producers

    def submit(self, request: Request) -> None:
        """A request leaves its producer."""
        when_us = self.loop.now_us + self.latency_us + self.random.randrange(self.latency_us)
        self.loop.call_at_us(when_us, self._receive, request, context=self._context)

    def _receive(self, request: Request) -> None:
        if not self.up:
            request.producer.failed(request)
            return
        log = self.logs[request.place]
        offsets = []
        for record in request.records:
            newest = log.sequences.get(record.producer, -1)
            if request.producer.idempotent and record.sequence <= newest:
                offsets.append(-1)
                continue
            offsets.append(len(log.records))
            log.records.append(record._replace(timestamp_us=self.loop.now_us // 1000 * 1000))
            log.sequences[record.producer] = record.sequence
            self.trace.note("append", *request.place, len(log.records) - 1, data=record.value)
        self._unsynced[request.place] = None
        if not request.producer.waits_for_sync:
            self._answer(request, offsets)
        else:
            self._answers.append((request, offsets))
        self._sync_soon()

    def _sync_soon(self) -> None:
        if not self._syncing:
            self._syncing = True
            self.loop.call_at_us(self.loop.now_us + self.sync_us, self._sync, self._era, context=self._context)

    def _sync(self, era: int) -> None:
        if era != self._era:
            return
        self._syncing = False
        grown, self._unsynced = self._unsynced, {}
        for place in grown:
            self.logs[place].synced = len(self.logs[place].records)
        self._committed_synced = dict(self.committed)
        answers, self._answers = self._answers, []
        for request, offsets in answers:
            self._answer(request, offsets)
        self._wake(grown)

    def _answer(self, request: Request, offsets: list[int]) -> None:
        producer = request.producer
        if self.lost_answers and self.random.random() < self.lost_answers:
            self.trace.note("broker", "answer lost", *request.place)
            producer.failed(request)
            return
        when_us = self.loop.now_us + self.latency_us
        self.loop.call_at_us(when_us, producer.acknowledged, request, offsets, context=producer.context)

    # -- consuming

    async def changed(self, timeout_s: float, places: Collection[Place] | None = None) -> None:
        """Return when records were appended (to one of ``places``) or the broker came back, or after a while."""
        future = self.loop.create_future()
        self._waiting.append((places, future))
        timer = self.loop.call_later(timeout_s, _resolve, future)
        try:
            await future
        finally:
            timer.cancel()

    def _wake(self, grown: Collection[Place] | None) -> None:
        waiting, self._waiting = self._waiting, []
        for places, future in waiting:
            if grown is None or places is None or any(place in places for place in grown):
                _resolve(future)
            elif not future.done():
                self._waiting.append((places, future))

    def read(self, place: Place, start: int, most: int) -> list[tuple[int, Record]]:
        """Records from ``start`` on that are synced. Raises WouldBlockError while the broker is away."""
        if not self.up:
            raise WouldBlockError
        log = self.logs[place]
        stop = min(log.synced, start + most)
        return [(offset, log.records[offset]) for offset in range(max(start, 0), stop)]

    def commit(self, group: str, topic: str, offsets: Mapping[int, int]) -> bool:
        """Remember what a group has done; durable at the next sync. False while the broker is away."""
        if not self.up:
            return False
        for partition, offset in offsets.items():
            self.committed[(group, topic, partition)] = offset
            self.trace.note("commit", group, topic, partition, offset)
        self._sync_soon()
        return True


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class SimProducer:
    """`streams.runner.Sender`, `collectors.wire.FrameSink` and what `infra.kafka.FrameProducer` offers besides, on a simulated broker.

    Args:
        broker: where to.
        codecs: by topic name.
        settings: librdkafka's, as the product sets them; ``acks`` and ``enable.idempotence`` count.
    """

    def __init__(self, broker: SimBroker, codecs: Mapping[str, FrameCodec | RowCodec], settings: Mapping[str, Any]) -> None:
        self.broker = broker
        self.idempotent = bool(settings.get("enable.idempotence"))
        self.waits_for_sync = str(settings.get("acks")) in ("all", "-1")
        self.context = copy_context()
        self.process: Process | None = PROCESS.get()
        self._codecs = codecs
        self._id = broker.new_producer()
        self._sequence: dict[Place, int] = {}
        self._queues: dict[Place, deque[Record]] = {}
        self._in_flight: dict[Place, Request] = {}
        self._leaving: set[Place] = set()
        self._sent: dict[Place, int] = {}
        self._acked: dict[Place, int] = {}
        self._waiters: list[asyncio.Future[None]] = []

    # -- as FrameProducer

    def encode(self, topic_name: str, frame: Frame) -> bytes:
        """See Outlet."""
        codec = self._codecs[topic_name]
        assert isinstance(codec, FrameCodec)
        return codec.encode(frame)

    def encode_row(self, topic_name: str, row: Mapping[str, Any]) -> bytes:
        """See Outlet."""
        codec = self._codecs[topic_name]
        assert isinstance(codec, RowCodec)
        return codec.encode(row)

    def try_send(self, topic_name: str, partition: int, key: bytes | None, value: bytes) -> bool:
        """See Outlet."""
        if self.queued >= MAX_QUEUED:
            return False
        self.produce(topic_name, partition, key, value)
        return True

    def sent_count(self, topic_name: str, partition: int) -> int:
        """See Outlet."""
        return self._sent.get((topic_name, partition), 0)

    def acked_count(self, topic_name: str, partition: int) -> int:
        """See Outlet."""
        return self._acked.get((topic_name, partition), 0)

    async def send(self, topic_name: str, partition: int, frame: Frame) -> None:
        """See FrameSink."""
        self.produce(topic_name, partition, None, self.encode(topic_name, frame))

    async def send_raw(self, topic_name: str, partition: int, key: bytes | None, value: bytes) -> None:
        """See Sender."""
        self.produce(topic_name, partition, key, value)

    async def wait_acknowledged(self) -> None:
        """See Sender."""
        mark = dict(self._sent)
        while any(self._acked.get(place, 0) < count for place, count in mark.items()):
            waiter = self.broker.loop.create_future()
            self._waiters.append(waiter)
            await waiter

    def poll(self) -> None:
        """See Sender; reports come by themselves."""

    async def flush(self, timeout_s: float = 30.0) -> None:
        """Wait until everything is acknowledged."""
        async with asyncio.timeout(timeout_s):
            await self.wait_acknowledged()

    @property
    def queued(self) -> int:
        """Records not acknowledged yet."""
        return sum(self._sent.values()) - sum(self._acked.values())

    # -- the wire

    def produce(self, topic: str, partition: int, key: bytes | None, value: bytes) -> None:
        """Queue a record."""
        process = self.process
        if process is not None:
            process.touch()
        place = (topic, partition)
        sequence = self._sequence[place] = self._sequence.get(place, -1) + 1
        self._sent[place] = self._sent.get(place, 0) + 1
        queue = self._queues.get(place)
        if queue is None:
            queue = self._queues[place] = deque()
        queue.append(Record(key, value, 0, self._id, sequence))
        if place not in self._in_flight and place not in self._leaving:
            # librdkafka sends from a thread of its own: what is queued dies with the process
            self._leaving.add(place)
            loop = self.broker.loop
            loop.call_at_us(loop.now_us + self.broker.random.randrange(1_000), self._submit, place, context=self.context)

    def _submit(self, place: Place) -> None:
        self._leaving.discard(place)
        queue = self._queues[place]
        if not queue or place in self._in_flight:
            return
        records = [queue.popleft() for _ in range(min(len(queue), MAX_BATCH))]
        request = self._in_flight[place] = Request(self, place, records)
        self.broker.submit(request)

    def acknowledged(self, request: Request, offsets: Sequence[int]) -> None:
        """The broker has them."""
        place = request.place
        if self._in_flight.get(place) is not request:
            return
        del self._in_flight[place]
        self._acked[place] = self._acked.get(place, 0) + len(request.records)
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            _resolve(waiter)
        self._submit(place)

    def failed(self, request: Request) -> None:
        """No answer came: send the same again, as librdkafka does."""
        delay_us = RETRY_US + self.broker.random.randrange(RETRY_US)
        loop = self.broker.loop
        loop.call_at_us(loop.now_us + delay_us, self._again, request, context=self.context)

    def _again(self, request: Request) -> None:
        if self._in_flight.get(request.place) is request:
            self.broker.submit(request)


class SimConsumer:
    """Reads partitions from positions it is told.

    Args:
        broker: where from.
        positions: first offset of each place.
    """

    def __init__(self, broker: SimBroker, positions: Mapping[Place, int]) -> None:
        self.positions = dict(positions)
        self._broker = broker

    async def poll(self, timeout_s: float, most: int = 500) -> list[tuple[Place, int, Record]]:
        """Records that are there; waits for the first one at most ``timeout_s``."""
        found = self._take(most)
        if not found:
            await self._broker.changed(timeout_s, self.positions)
            found = self._take(most)
        return found

    def _take(self, most: int) -> list[tuple[Place, int, Record]]:
        found: list[tuple[Place, int, Record]] = []
        if not self._broker.up:
            return found
        for place, position in self.positions.items():
            if self._broker.logs[place].synced > position:
                records = self._broker.read(place, position, most - len(found))
                found += [(place, offset, record) for offset, record in records]
                self.positions[place] = position + len(records)
                if len(found) >= most:
                    break
        return found


class SimStateLog:
    """`streams.state_store.StateLog` on one partition of ``bars.state``; a call while the broker is away is made again later."""

    def __init__(self, broker: SimBroker, partition: int) -> None:
        self._broker = broker
        self._place = ("bars.state", partition)
        self._process = PROCESS.get()

    def append(self, key: bytes, value: bytes) -> int:
        """Durable when it returns."""
        process = self._process
        if process is not None:
            process.touch()
        if not self._broker.up:
            raise WouldBlockError
        log = self._broker.logs[self._place]
        log.records.append(Record(key, value, self._broker.loop.now_us, 0, 0))
        log.synced = len(log.records)
        self._broker.trace.note("append", *self._place, len(log.records) - 1, data=value)
        if process is not None:
            process.touch()
        return len(log.records) - 1

    def bounds(self) -> tuple[int, int]:
        """Oldest offset and the one after the newest."""
        if not self._broker.up:
            raise WouldBlockError
        return 0, self._broker.logs[self._place].synced

    def read(self, start: int, stop: int) -> list[tuple[int, bytes, bytes]]:
        """Records in ``[start, stop)``."""
        return [(offset, record.key or b"", record.value) for offset, record in self._broker.read(self._place, start, stop - start)]


async def replayed(broker: SimBroker, place: Place, start: int, stop: int) -> AsyncGenerator[list[tuple[int, Record]], None]:
    """Records ``[start, stop)`` in batches, each some time after the other."""
    position = start
    while position < stop:
        await broker.changed(0.002)
        batch = broker.read(place, position, min(500, stop - position))
        if not batch:
            return
        position = batch[-1][0] + 1
        yield batch


__all__ = ["KilledError", "Log", "Record", "SimBroker", "SimConsumer", "SimProducer", "SimStateLog", "replayed"]
