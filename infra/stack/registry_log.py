"""The registry's log: a compacted, one-partition topic on the broker. Records in, acknowledged; at the start, all of it out."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, Producer, TopicPartition
from confluent_kafka.cimpl import NewTopic

from infra import kafka_topics
from infra.errors import UnreachableError

logger = logging.getLogger(__name__)

# Small buffers: a registry moves kilobytes, librdkafka's defaults would let it hold a gigabyte.
_SMALL = {"queued.max.messages.kbytes": 4096, "fetch.message.max.bytes": 1_048_576, "queued.min.messages": 100, "fetch.wait.max.ms": 20}
TIMEOUT_S = 10.0


class SchemaLog:
    """One writer's view of the topic.

    Args:
        client: connection part of a librdkafka configuration.
        topic: its name, prefix included.
        replication: copies, for the case that the topic must be made.
    """

    def __init__(self, client: Mapping[str, Any], topic: str, replication: int) -> None:
        self._client = {**client, "log_level": 3, "client.id": "marketstream-registry"}
        self._topic = topic
        self._replication = replication
        self._producer: Producer | None = None

    def ensure_topic(self) -> None:
        """Makes the topic when it is not there.

        Raises:
            UnreachableError: the broker does not answer or refuses.
        """
        config = {"cleanup.policy": "compact", "min.cleanable.dirty.ratio": "0.5"}
        topic = NewTopic(self._topic, num_partitions=1, replication_factor=self._replication, config=config)
        refusal = kafka_topics.create(self._client, [topic])[self._topic]
        if refusal is not None:
            raise UnreachableError(
                f"the broker at {self._client['bootstrap.servers']} did not make the topic {self._topic}: {refusal.args[0].str()}; "
                "check that it runs and MARKETSTREAM_KAFKA_BOOTSTRAP"
            ) from refusal

    def read_all(self) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
        """Every record up to the end there is now, oldest first; records that are not JSON are skipped with a warning.

        Raises:
            UnreachableError: the broker does not answer.
        """
        consumer = Consumer(
            {**self._client, **_SMALL, "group.id": "marketstream-registry", "enable.auto.commit": False, "enable.partition.eof": True}
        )
        try:
            consumer.assign([TopicPartition(self._topic, 0, OFFSET_BEGINNING)])
            until = time.monotonic() + 60
            while time.monotonic() < until:
                message = consumer.poll(1.0)
                if message is None:
                    continue
                error = message.error()
                if error is None:
                    record = _decode(message.key(), message.value(), message.offset() or 0)
                    if record is not None:
                        yield record
                elif error.code() == KafkaError._PARTITION_EOF:
                    return
                elif not error.retriable() and error.fatal():
                    raise UnreachableError(f"cannot read the topic {self._topic}: {error.str()}")
            raise UnreachableError(f"the topic {self._topic} was not read to its end within 60 s; check the broker")
        finally:
            consumer.close()

    def write(self, records: list[tuple[dict[str, Any], dict[str, Any] | None]]) -> None:
        """Returns when every record is acknowledged.

        Raises:
            UnreachableError: not acknowledged in time; the records may or may not be in the log.
        """
        if self._producer is None:
            small = {"queue.buffering.max.kbytes": 16_384, "linger.ms": 0, "message.timeout.ms": int(TIMEOUT_S * 1000)}
            self._producer = Producer({**self._client, **small, "enable.idempotence": True, "acks": "all"})
        failures: list[str] = []
        note: Callable[..., None] = lambda error, _message: failures.append(error.str()) if error else None  # noqa: E731
        for key, value in records:
            body = None if value is None else json.dumps(value, separators=(",", ":")).encode()
            self._producer.produce(self._topic, key=json.dumps(key, separators=(",", ":")).encode(), value=body, on_delivery=note)
        left = self._producer.flush(TIMEOUT_S + 1)
        if failures or left:
            self._producer = None
            reason = failures[0] if failures else "no answer"
            raise UnreachableError(f"the broker did not take a schema record: {reason}")


def _decode(key: bytes | None, value: bytes | None, offset: int) -> tuple[dict[str, Any], dict[str, Any] | None] | None:
    try:
        parsed_key = json.loads(key or b"")
        parsed_value = None if value is None else json.loads(value)
        if not isinstance(parsed_key, dict) or not isinstance(parsed_value, dict | None):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as exc:
        logger.warning("skipped the schema record at offset %s: %s", offset, exc)
        return None
    return parsed_key, parsed_value
