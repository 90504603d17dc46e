"""Kafka for the API: one consumer without a group follows every partition of ``bars`` and ``trades``; bounded re-reads on the side.

A thread polls (librdkafka wakes it when something comes, so an idle stack costs nothing) and hands whole batches to the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Final

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient

from api.deps import Record
from api.errors import PositionLostError, StoreUnavailableError
from infra.errors import MarketstreamError
from infra.kafka import consumer_config
from infra.kafka_lag import KafkaLag
from infra.registry_client import RegistryClient
from infra.settings import Settings
from infra.watchdog import Waiting
from schemas.codec import HEADER_BYTES, FrameCodec
from schemas.errors import DecodeError
from schemas.frames import Frame
from schemas.topics import TOPICS

logger = logging.getLogger(__name__)

FOLLOWED: Final = ("bars", "trades")
_WARM_RECORDS: Final = 500
"""How far before the end the tail begins: enough to bridge what the sink has not stored yet (0.2 s) and to know the open bars."""
_TIMEOUT_S: Final = 5.0
_RETRY_S: Final = 1.0
_PING_S: Final = 1.5
_POLL_S: Final = 0.5
_BATCH: Final = 500
_MOST_HANDED: Final = 20_000
"""Records on their way to the event loop at most; beyond it the thread waits, and Kafka holds the rest."""
_JUMP_ERRORS: Final = frozenset({KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE})  # noqa: SLF001 - its public name


class KafkaFrames:
    """`api.deps.FrameSource` over librdkafka.

    Args:
        settings: broker, registry, prefix, partitions.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.kafka
        self._prefix = settings.kafka.topic_prefix
        self._registry = RegistryClient.from_settings(settings)
        self._codecs: dict[str, FrameCodec] = {}
        self._known_schemas: set[tuple[str, int]] = set()
        self._epochs: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._deliver: Callable[[Sequence[Record]], None] = lambda _: None
        self._moved: Callable[[str, int, int], None] = lambda *_: None
        self._handed = threading.Semaphore(_MOST_HANDED // _BATCH)
        self._failure = "Kafka has not answered yet."
        self._admin: AdminClient | None = None
        self._positions: dict[tuple[str, int], tuple[int, int]] = {}
        self._lag = KafkaLag(settings.kafka)
        self._standing = self._failure

    # -- infra.watchdog.Work

    verb = "handed to subscribers"

    def done(self) -> int:
        """See Work.done."""
        return sum(offset for _, offset in list(self._positions.values()))

    def waiting(self) -> Waiting:
        """See Work.waiting."""
        if self._standing:
            return Waiting(blocked={"kafka": self._standing})
        return self._lag.waiting({place: offset for place, (_, offset) in list(self._positions.items())})

    # -- api.deps.FrameSource

    async def start(self, deliver: Callable[[Sequence[Record]], None], moved: Callable[[str, int, int], None]) -> None:
        """See FrameSource.start."""
        self._deliver, self._moved = deliver, moved
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._follow, name="frames", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """See FrameSource.stop."""
        self._stop.set()
        self._deliver, self._moved = lambda _: None, lambda *_: None
        if self._thread is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join, _TIMEOUT_S)
        self._registry.close()

    def epoch(self, topic: str) -> int | None:
        """See FrameSource.epoch."""
        return self._epochs.get(topic)

    def decode(self, record: Record) -> Frame:
        """See FrameSource.decode."""
        codec = self._codecs.get(record.topic)
        if codec is None:
            raise DecodeError(f"The schema registry has not answered yet, so topic '{record.topic}' cannot be read.")
        return codec.decode(record.value)

    async def read(self, topic: str, partition: int, start: int, stop: int) -> AsyncGenerator[Sequence[Record], None]:
        """See FrameSource.read."""
        loop = asyncio.get_running_loop()
        consumer = Consumer(self._config("resume", **{"enable.partition.eof": True}))
        try:
            place = TopicPartition(self._prefix + topic, partition, start)
            low, high = await loop.run_in_executor(None, self._watermarks, consumer, place)
            if start < low or start > high:
                raise PositionLostError(topic, partition, start)
            consumer.assign([place])
            position = start
            while position < min(stop, high):
                batch = await loop.run_in_executor(None, self._poll, consumer, _TIMEOUT_S)
                records = [record for record in batch if position <= record.offset < stop]
                if not batch:
                    raise StoreUnavailableError("kafka", f"Kafka gave nothing of topic '{topic}' for {_TIMEOUT_S:g} s.")
                if records:
                    position = records[-1].offset + 1
                    yield records
                if batch[-1].offset >= stop - 1:
                    return
        except KafkaException as exc:
            raise StoreUnavailableError("kafka", f"Kafka does not answer as it should ({exc}).") from exc
        finally:
            await loop.run_in_executor(None, consumer.close)

    async def ping(self) -> None:
        """See FrameSource.ping."""
        admin = self._admin
        if admin is None:
            raise StoreUnavailableError("kafka", self._failure)
        try:
            await asyncio.get_running_loop().run_in_executor(None, lambda: admin.list_topics(self._prefix + FOLLOWED[0], _PING_S))
        except KafkaException as exc:
            raise StoreUnavailableError("kafka", f"Kafka at {self._settings.bootstrap} does not answer ({exc}).") from exc

    # -- the thread

    def _follow(self) -> None:
        while not self._stop.is_set():
            consumer = Consumer(self._config("tail"))
            try:
                self._prepare()
                self._assign(consumer)
                self._standing = ""
                self._run(consumer)
            except (KafkaException, MarketstreamError) as exc:
                self._standing = self._failure = f"Kafka does not answer as it should ({exc})."
                logger.warning("The live tail stands still: %s", self._failure)
                self._stop.wait(_RETRY_S)
            finally:
                consumer.close()

    def _prepare(self) -> None:
        """Codecs and epochs. Raises KafkaException, UnreachableError."""
        for topic in FOLLOWED:
            codec = self._registry.frame_codec(topic)
            self._codecs[topic] = codec
            self._known_schemas.add((topic, codec.schema_id))
        admin = AdminClient({**self._settings.client_config(), "log.connection.close": False})
        names = {TOPICS[topic].full_name(self._prefix): topic for topic in FOLLOWED}
        for name, future in admin.describe_topics(TopicCollection(list(names)), request_timeout=_TIMEOUT_S).items():
            identity = future.result().topic_id
            high, low = identity.get_most_significant_bits(), identity.get_least_significant_bits()
            self._epochs[names[name]] = (high ^ low) & (2**64 - 1)

        self._admin = admin

    def _assign(self, consumer: Consumer) -> None:
        """Begin near the end, or go on where the tail stood when that place is still there."""
        places, moved = [], []
        for topic in FOLLOWED:
            for partition in range(self._settings.partitions):
                place = TopicPartition(self._prefix + topic, partition)
                low, high = self._watermarks(consumer, place)
                epoch, position = self._positions.get((topic, partition), (-1, -1))
                if epoch == self._epochs[topic] and low <= position <= high:
                    place.offset = position
                else:
                    place.offset = max(low, high - _WARM_RECORDS)
                    moved.append(place)
                places.append(place)
        for place in moved:
            self._tell(place.topic, place.partition, place.offset)
        consumer.assign(places)
        for place in places:
            topic = place.topic[len(self._prefix) :]
            self._positions[(topic, place.partition)] = (self._epochs[topic], place.offset)

    def _run(self, consumer: Consumer) -> None:
        """Hand batches over until stopped. Raises KafkaException where the tail must begin anew."""
        while not self._stop.is_set():
            records = self._poll(consumer, _POLL_S)
            if not records:
                continue
            while not self._handed.acquire(timeout=_POLL_S):
                if self._stop.is_set():
                    return
            self._on_loop(self._hand_over, records)
            for record in records:
                self._positions[(record.topic, record.partition)] = (self._epochs[record.topic], record.offset + 1)

    def _hand_over(self, records: Sequence[Record]) -> None:
        self._handed.release()
        self._deliver(records)

    def _poll(self, consumer: Consumer, timeout_s: float) -> list[Record]:
        """Records that are there, waiting for the first one only: ``consume(n, t)`` alone waits until it has n."""
        first = consumer.poll(timeout_s)
        if first is None:
            return []
        records: list[Record] = []
        for message in (first, *consumer.consume(_BATCH - 1, 0)):
            error = message.error()
            if error is None:
                records.append(self._record(message))
            elif error.code() in _JUMP_ERRORS:
                raise KafkaException(error)
            elif error.code() != KafkaError._PARTITION_EOF:  # noqa: SLF001 - its public name
                logger.warning("Kafka: %s", error.str())
        return records

    def _record(self, message: Any) -> Record:
        topic = message.topic()[len(self._prefix) :]
        value = message.value() or b""
        self._learn(topic, value)
        return Record(topic, message.partition(), message.offset(), message.timestamp()[1], value)

    def _learn(self, topic: str, value: bytes) -> None:
        """Ask the registry about a schema id that was not met before, here and not on the event loop, as asking blocks."""
        if len(value) < HEADER_BYTES:
            return
        schema_id = int.from_bytes(value[1:HEADER_BYTES], "big")
        if (topic, schema_id) in self._known_schemas:
            return
        self._known_schemas.add((topic, schema_id))
        try:
            self._codecs[topic].add_writer(schema_id, self._registry.schema(schema_id))
        except (KeyError, DecodeError, MarketstreamError) as exc:
            logger.warning("Schema %d of topic '%s' cannot be had; its records are skipped: %s", schema_id, topic, exc)

    def _watermarks(self, consumer: Consumer, place: TopicPartition) -> tuple[int, int]:
        low, high = consumer.get_watermark_offsets(place, timeout=_TIMEOUT_S, cached=False)
        return low, high

    def _tell(self, full_name: str, partition: int, offset: int) -> None:
        self._on_loop(lambda: self._moved(full_name[len(self._prefix) :], partition, offset))

    def _on_loop(self, work: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(work, *arguments)

    def _config(self, name: str, **overrides: Any) -> dict[str, Any]:
        return consumer_config(self._settings, f"api-{name}", **{"auto.offset.reset": "error", "check.crcs": False, **overrides})
