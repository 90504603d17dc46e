"""A stretch of one partition as an iterator of records, read with a consumer of its own. Blocking; holds 32 MiB of them at most."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from confluent_kafka import Consumer, KafkaException, TopicPartition

from infra.errors import UnreachableError
from infra.kafka import consumer_config, unreachable
from infra.parity_compare import Record
from infra.settings import Settings
from schemas.topics import TOPICS

_TIMEOUT_S: Final = 10.0
_BATCH: Final = 500


class Stretch:
    """The records ``[begin, stop)`` of one partition, in order; a context manager. Raises UnreachableError, also when a record is gone."""

    def __init__(self, settings: Settings, topic: str, partition: int, begin: int, stop: int) -> None:
        self._settings = settings.kafka
        self._place = TopicPartition(TOPICS[topic].full_name(settings.kafka.topic_prefix), partition, begin)
        self._stop = stop
        self._consumer: Any = None

    def __enter__(self) -> Stretch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._consumer is not None:
            self._consumer.close()

    def __iter__(self) -> Iterator[Record]:
        position = self._place.offset
        if position >= self._stop:
            return
        self._consumer = Consumer(consumer_config(self._settings, "parity", **{"check.crcs": True, "auto.offset.reset": "error"}))
        try:
            self._consumer.assign([self._place])
            while position < self._stop:
                messages = self._consumer.consume(min(_BATCH, self._stop - position), timeout=_TIMEOUT_S)
                if not messages:
                    raise UnreachableError(
                        f"Kafka gave no record of {self._place.topic}[{self._place.partition}] from offset {position} on."
                    )
                for message in messages:
                    if message.error() is not None:
                        raise KafkaException(message.error())
                    if message.offset() >= self._stop:
                        return
                    position = message.offset() + 1
                    yield Record(message.offset(), message.timestamp()[1], message.value() or b"", message.key() or b"")
        except KafkaException as exc:
            raise unreachable(self._settings, exc) from exc
