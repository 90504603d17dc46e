"""Kafka clients of every process: producer, consumers, topic creation. Frames and rows in, acknowledged offsets out.

All settings that decide whether a record can be lost stand here, each with its reason.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewTopic

from infra import kafka_topics
from infra.errors import MarketstreamError, UnreachableError
from infra.registry_client import RegistryClient
from infra.seam import SYSTEM
from infra.settings import KafkaSettings
from schemas.codec import MAX_RECORD_BYTES, FrameCodec, RowCodec
from schemas.frames import Frame
from schemas.topics import BROKERS_TIME, TOPICS, Topic

logger = logging.getLogger(__name__)

_TIMEOUT_S: Final = 10.0
_POLL_INTERVAL_S: Final = 0.002
_SENDS_A_POLL: Final = 32
"""Delivery reports are served at least every so many sends: each poll gives the interpreter away, and it takes up to a switch interval
(5 ms) to get it back from another thread."""
_COMPLAIN_EVERY_S: Final = 10.0


class TopicLayoutError(MarketstreamError):
    """A topic exists with another number of partitions than this stack is set to."""


def unreachable(settings: KafkaSettings, exc: Exception) -> UnreachableError:
    """One sentence for a broker that does not answer."""
    error = exc.args[0] if isinstance(exc, KafkaException) and exc.args else None
    detail = error.str() if isinstance(error, KafkaError) else str(exc)  # without librdkafka's codes
    if "Timed out" in detail and settings.security_protocol.endswith("SSL"):
        # what librdkafka has against the certificate it tells a callback that a blocking call does not serve
        detail += ", or its certificate is refused: check MARKETSTREAM_KAFKA_SSL_CA_FILE"
    return UnreachableError(
        f"Kafka at {settings.bootstrap} does not answer ({detail}): start the stack or set MARKETSTREAM_KAFKA_BOOTSTRAP."
    )


class _Complaints:
    """Tells of broker trouble once in ten seconds; librdkafka itself writes a line for each of twenty attempts a second."""

    def __init__(self) -> None:
        self._told: dict[str, float] = {}

    def __call__(self, error: KafkaError) -> None:
        now = SYSTEM.monotonic_s()
        if now - self._told.get(error.name(), -_COMPLAIN_EVERY_S) >= _COMPLAIN_EVERY_S:
            self._told[error.name()] = now
            logger.warning("Kafka: %s", error.str())


SOON: Final = {
    "reconnect.backoff.ms": 50,
    "reconnect.backoff.max.ms": 100,
    "retry.backoff.ms": 50,
    "retry.backoff.max.ms": 100,
}
"""A broker that was killed serves again after two or three seconds. With librdkafka's pauses, up to a second between two requests and ten between
two connections, it was 0.7 to 1.0 s more until it had the next record; with these 0.2. Ten attempts a second cost nothing."""


def _common(settings: KafkaSettings) -> dict[str, Any]:
    return {
        **settings.client_config(),
        **SOON,
        "log.connection.close": False,
        "log_level": 2,  # its own lines go to standard error unformatted; what matters comes through error_cb
        "error_cb": _Complaints(),
    }


def producer_config(settings: KafkaSettings, **overrides: Any) -> dict[str, Any]:
    """Librdkafka settings of a producer that loses and doubles nothing."""
    return {
        **_common(settings),
        "acks": "all",
        "enable.idempotence": True,
        # Never give up on a record: a broker that is away for an hour must not cost one trade. The queue below bounds memory instead.
        "message.timeout.ms": 0,
        "message.max.bytes": MAX_RECORD_BYTES + 64 * 1024,
        "queue.buffering.max.kbytes": 128 * 1024,
        "queue.buffering.max.messages": 200_000,
        # Frames are already batches: waiting for more would only add latency.
        "linger.ms": 0,
        "compression.type": "lz4",
        "socket.nagle.disable": True,
        **overrides,
    }


def consumer_config(settings: KafkaSettings, group: str, **overrides: Any) -> dict[str, Any]:
    """Librdkafka settings of a consumer that decides itself where it reads and when it commits."""
    return {
        **_common(settings),
        "group.id": f"{settings.topic_prefix}{group}",
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "earliest",
        # librdkafka's default is 500 ms: each empty poll of an idle partition would add that to a trade's way.
        "fetch.wait.max.ms": 100,
        "fetch.min.bytes": 1,
        "fetch.message.max.bytes": MAX_RECORD_BYTES + 64 * 1024,
        # Default is 64 MiB a partition: four partitions of two topics would be 512 MiB.
        "queued.max.messages.kbytes": 32 * 1024,
        # Default 500 ms backs off once the queue is full and stalls catch-up.
        "fetch.queue.backoff.ms": 10,
        **overrides,
    }


class FrameProducer:
    """Encodes frames and rows and sends them; knows what the broker has acknowledged.

    One per process, used from one event loop. :meth:`send` returns when the record is queued and waits while the queue is full, so a
    broker that is away slows its caller down instead of growing memory. Acknowledged offsets are in :meth:`acknowledged`.
    """

    def __init__(self, settings: KafkaSettings, registry: RegistryClient, **overrides: Any) -> None:
        self._settings = settings
        self._registry = registry
        self._prefix = settings.topic_prefix
        self._codecs: dict[str, FrameCodec | RowCodec] = {}
        self._producer = Producer(producer_config(settings, **overrides))
        self._acked: dict[tuple[str, int], int] = {}
        self._sent_count: dict[tuple[str, int], int] = {}
        self._acked_count: dict[tuple[str, int], int] = {}
        self._refused: set[tuple[str, int]] = set()
        self._failure: KafkaError | None = None
        self._unpolled = 0

    async def send(self, topic_name: str, partition: int, frame: Frame) -> None:
        """Queue ``frame`` for that partition. Raises EncodeError; UnreachableError when the broker refused an earlier record for good."""
        await self.send_raw(topic_name, partition, None, self.encode(topic_name, frame))

    async def send_row(self, topic_name: str, key: str, row: Mapping[str, Any], partition: int = 0) -> None:
        """Queue one row record. Raises as :meth:`send` does."""
        await self.send_raw(topic_name, partition, key.encode(), self.encode_row(topic_name, row))

    def encode(self, topic_name: str, frame: Frame) -> bytes:
        """Bytes of a frame's record. Raises EncodeError."""
        codec = self._codec(topic_name)
        assert isinstance(codec, FrameCodec)
        return codec.encode(frame)

    def encode_row(self, topic_name: str, row: Mapping[str, Any]) -> bytes:
        """Bytes of a row's record. Raises EncodeError."""
        codec = self._codec(topic_name)
        assert isinstance(codec, RowCodec)
        return codec.encode(row)

    async def send_raw(self, topic_name: str, partition: int, key: bytes | None, value: bytes) -> None:
        """Queue bytes that are already encoded. Delivery reports are served now and then; call :meth:`poll` when done for the moment."""
        while not self.try_send(topic_name, partition, key, value):
            self._producer.poll(0)
            await SYSTEM.sleep(_POLL_INTERVAL_S)

    def try_send(self, topic_name: str, partition: int, key: bytes | None, value: bytes) -> bool:
        """Queue bytes without waiting; False when the queue is full."""
        if self._failure is not None:
            raise unreachable(self._settings, KafkaException(self._failure))
        try:
            self._producer.produce(self._prefix + topic_name, value, key, partition, on_delivery=self._delivered)
        except BufferError:
            return False
        place = (topic_name, partition)
        self._sent_count[place] = self._sent_count.get(place, 0) + 1
        self._unpolled += 1
        if self._unpolled >= _SENDS_A_POLL:
            self.poll()
        return True

    async def flush(self, timeout_s: float = 30.0) -> dict[str, dict[int, int]]:
        """Wait until everything queued is acknowledged; the last acknowledged offset per topic and partition.

        Raises UnreachableError when that takes longer than ``timeout_s``; what is queued stays queued.
        """
        remaining = await asyncio.get_running_loop().run_in_executor(None, self._producer.flush, timeout_s)
        if remaining:
            raise unreachable(self._settings, TimeoutError(f"{remaining} records not acknowledged within {timeout_s:.0f} s"))
        if self._failure is not None:
            raise unreachable(self._settings, KafkaException(self._failure))
        return self.acknowledged()

    async def wait_acknowledged(self) -> None:
        """Wait until everything queued before this call is acknowledged, while others go on sending.

        Records of one partition are acknowledged in the order they were sent (idempotent producer), so counting them is enough.
        Raises UnreachableError when the broker refused one for good.
        """
        mark = dict(self._sent_count)
        while any(self._acked_count.get(place, 0) < count for place, count in mark.items()):
            self._producer.poll(0)
            if self._failure is not None:
                raise unreachable(self._settings, KafkaException(self._failure))
            await SYSTEM.sleep(_POLL_INTERVAL_S)

    def acknowledged(self) -> dict[str, dict[int, int]]:
        """Last acknowledged offset per topic (without prefix) and partition."""
        found: dict[str, dict[int, int]] = {}
        for (topic_name, partition), offset in list(self._acked.items()):
            found.setdefault(topic_name, {})[partition] = offset
        return found

    def sent_count(self, topic_name: str, partition: int) -> int:
        """Records queued for a partition so far."""
        return self._sent_count.get((topic_name, partition), 0)

    def acked_count(self, topic_name: str, partition: int) -> int:
        """How many of these are acknowledged: always the first ones."""
        return self._acked_count.get((topic_name, partition), 0)

    def poll(self) -> None:
        """Serve delivery reports; call it when nothing was sent for a while."""
        self._unpolled = 0
        self._producer.poll(0)

    @property
    def queued(self) -> int:
        """Records not acknowledged yet."""
        return len(self._producer)

    def _codec(self, topic_name: str) -> FrameCodec | RowCodec:
        codec = self._codecs.get(topic_name)
        if codec is None:
            is_frame = TOPICS[topic_name].kind == "frame"
            codec = self._registry.frame_codec(topic_name) if is_frame else self._registry.row_codec(topic_name)
            self._codecs[topic_name] = codec
        return codec

    def _delivered(self, error: KafkaError | None, message: Any) -> None:
        place = (message.topic().removeprefix(self._prefix), message.partition())
        if error is not None:
            logger.error("The broker refused a record of topic %s for good: %s", message.topic(), error)
            self._failure = error
            self._refused.add(place)
            return
        self._acked[place] = message.offset()
        if place in self._refused:  # counts name the first records of a partition: one that came after a refused one must not stand for it
            return
        self._acked_count[place] = self._acked_count.get(place, 0) + 1


def _admin(settings: KafkaSettings) -> AdminClient:
    return AdminClient(_common(settings))


def partition_count(settings: KafkaSettings, entry: Topic) -> int:
    """Partitions a topic is created with."""
    return settings.partitions if entry.per_partition else 1


def ensure_topics(settings: KafkaSettings, topics: Iterable[Topic] = tuple(TOPICS.values())) -> list[str]:
    """Create what is missing; names of the topics created. Topics of an earlier release get the broker's time for records to come.

    Raises UnreachableError; TopicLayoutError when one exists with another partition count: rows of a symbol would be in two places.
    """
    admin = _admin(settings)
    try:
        existing = kafka_topics.listed(admin, _TIMEOUT_S)
    except KafkaException as exc:
        raise unreachable(settings, exc) from exc
    missing: list[NewTopic] = []
    held: list[str] = []
    for entry in topics:
        name, wanted = entry.full_name(settings.topic_prefix), partition_count(settings, entry)
        if name not in existing:
            missing.append(NewTopic(name, num_partitions=wanted, replication_factor=settings.replication, config=entry.config()))
        elif len(existing[name].partitions) != wanted:
            found = len(existing[name].partitions)
            raise TopicLayoutError(
                f"Topic '{name}' has {found} partitions, MARKETSTREAM_KAFKA_PARTITIONS is {wanted}: set it to {found}, or use another MARKETSTREAM_TOPIC_PREFIX."
            )
        else:
            held.append(name)
    if held:
        _take_brokers_time(admin, held)
    if not missing:
        return []
    for name, refusal in kafka_topics.create(_common(settings), missing).items():
        if refusal is not None:
            raise UnreachableError(f"Kafka at {settings.bootstrap} refuses to create topic '{name}': {refusal}") from refusal
    return [entry.topic for entry in missing]


def _take_brokers_time(admin: AdminClient, names: Sequence[str]) -> None:
    """Set ``BROKERS_TIME`` where a topic has it otherwise; a broker that does not let us is one line in the log."""
    asked = [ConfigResource(ConfigResource.Type.TOPIC, name) for name in names]
    changing = []
    try:
        for resource, future in admin.describe_configs(asked, request_timeout=_TIMEOUT_S).items():
            found = future.result()
            wanted = [
                ConfigEntry(option, value, incremental_operation=AlterConfigOpType.SET)
                for option, value in BROKERS_TIME.items()
                if found[option].value != value
            ]
            if wanted:
                changing.append(ConfigResource(ConfigResource.Type.TOPIC, resource.name, incremental_configs=wanted))
        for future in (admin.incremental_alter_configs(changing, request_timeout=_TIMEOUT_S) if changing else {}).values():
            future.result()
    except KafkaException as exc:
        logger.warning("Records of topics %s keep the time of their producers, as the broker says: %s", ", ".join(names), exc)


def end_offsets(settings: KafkaSettings, topic_names: Iterable[str], consumer: Consumer | None = None) -> dict[str, dict[int, int]]:
    """Next offset to be written, per topic (without prefix) and partition. Raises UnreachableError."""
    own = consumer or Consumer(consumer_config(settings, "offsets"))
    try:
        return {
            name: {
                partition: own.get_watermark_offsets(
                    TopicPartition(TOPICS[name].full_name(settings.topic_prefix), partition), timeout=_TIMEOUT_S, cached=False
                )[1]
                for partition in range(partition_count(settings, TOPICS[name]))
            }
            for name in topic_names
        }
    except KafkaException as exc:
        raise unreachable(settings, exc) from exc
    finally:
        if consumer is None:
            own.close()


def committed_offsets(settings: KafkaSettings, group: str, topic_names: Iterable[str]) -> dict[str, dict[int, int]]:
    """Committed offset (next to read) of a group per topic and partition, -1 where it has none. Raises UnreachableError."""
    consumer = Consumer(consumer_config(settings, group))
    try:
        wanted = [
            TopicPartition(TOPICS[name].full_name(settings.topic_prefix), partition)
            for name in topic_names
            for partition in range(partition_count(settings, TOPICS[name]))
        ]
        found: dict[str, dict[int, int]] = {}
        for entry in consumer.committed(wanted, timeout=_TIMEOUT_S):
            name = entry.topic.removeprefix(settings.topic_prefix)
            found.setdefault(name, {})[entry.partition] = max(entry.offset, -1)
        return found
    except KafkaException as exc:
        raise unreachable(settings, exc) from exc
    finally:
        consumer.close()
