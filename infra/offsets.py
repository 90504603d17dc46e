"""Places in topics by time: which offset came first at a moment, and when a record was published. Blocking; raises UnreachableError."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from confluent_kafka import Consumer, KafkaException, TopicPartition

from infra.kafka import consumer_config, partition_count, unreachable
from infra.settings import KafkaSettings
from schemas.topics import TOPICS

Offsets = dict[str, dict[int, int]]
"""Topic (without prefix) -> partition -> offset."""
_TIMEOUT_S: Final = 10.0


@contextmanager
def reader(settings: KafkaSettings) -> Iterator[Consumer]:
    """A consumer without a group's habits; what the broker does wrong inside becomes UnreachableError."""
    consumer = Consumer(consumer_config(settings, "offsets"))
    try:
        yield consumer
    except KafkaException as exc:
        raise unreachable(settings, exc) from exc
    finally:
        consumer.close()


def bounds(settings: KafkaSettings, topic_names: Iterable[str]) -> tuple[Offsets, Offsets]:
    """(offset of the oldest record still there, offset after the newest) of every partition."""
    low: Offsets = {}
    high: Offsets = {}
    with reader(settings) as consumer:
        for name in topic_names:
            low[name], high[name] = {}, {}
            for place in _places(settings, name):
                found = consumer.get_watermark_offsets(place, timeout=_TIMEOUT_S, cached=False)
                low[name][place.partition], high[name][place.partition] = found
    return low, high


def since(settings: KafkaSettings, topic_names: Iterable[str], time_us: int) -> Offsets:
    """Offset of the first record published at or after ``time_us`` (the records' own timestamps, 1 ms apart); the end where there is none."""
    found: Offsets = {}
    with reader(settings) as consumer:
        for name in topic_names:
            asked = [TopicPartition(place.topic, place.partition, time_us // 1000) for place in _places(settings, name)]
            found[name] = {}
            for place in consumer.offsets_for_times(asked, timeout=_TIMEOUT_S):
                offset = place.offset
                if offset < 0:  # nothing that new
                    offset = consumer.get_watermark_offsets(TopicPartition(place.topic, place.partition), timeout=_TIMEOUT_S, cached=False)[
                        1
                    ]
                found[name][place.partition] = offset
    return found


def published_us(settings: KafkaSettings, ends: Mapping[str, Mapping[int, int]]) -> int:
    """When the newest of the records just before ``ends`` was published, microseconds UTC; 0 when none of them is there any more."""
    newest_ms = 0
    with reader(settings) as consumer:
        for name, by_partition in ends.items():
            for partition, end in by_partition.items():
                place = TopicPartition(TOPICS[name].full_name(settings.topic_prefix), partition, end - 1)
                low, high = consumer.get_watermark_offsets(place, timeout=_TIMEOUT_S, cached=False)
                if not low < end <= high:
                    continue
                consumer.assign([place])
                message = consumer.poll(_TIMEOUT_S)
                if message is not None and message.error() is None:
                    newest_ms = max(newest_ms, message.timestamp()[1])
    return newest_ms * 1000


def _places(settings: KafkaSettings, name: str) -> list[TopicPartition]:
    entry = TOPICS[name]
    return [TopicPartition(entry.full_name(settings.topic_prefix), partition) for partition in range(partition_count(settings, entry))]
