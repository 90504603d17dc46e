"""How far the worker is, read from topic ``bars``: the newest record that a worker wrote. Records of the repair stand between them and are skipped."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Final, NamedTuple

from confluent_kafka import Consumer, KafkaException, TopicPartition

from infra.kafka import consumer_config, unreachable
from infra.registry_client import RegistryClient
from infra.settings import KafkaSettings
from schemas.codec import FrameCodec, decode_learning
from schemas.errors import DecodeError
from schemas.topics import TOPICS

logger = logging.getLogger(__name__)

_TIMEOUT_S: Final = 10.0
_MOST_AT_ONCE: Final = 1024


class WorkerBars(NamedTuple):
    """The newest record of a worker in a partition of ``bars``."""

    input_offset: int
    """Offset of the trades record it was made from."""
    offset: int
    """Its own offset."""


def newest_worker_bars(settings: KafkaSettings, registry: RegistryClient, codec: FrameCodec, partition: int) -> WorkerBars | None:
    """The newest ``bars`` record that was made from a trades record, None when there is none. Blocks. Raises UnreachableError.

    The repair writes with ``input_offset`` -1. A worker writes at least once a second, so that few of the repair's can follow its newest;
    the way back is walked in steps that double.
    """
    consumer = Consumer(consumer_config(settings, "newest-bars", **{"enable.partition.eof": True}))
    full = TOPICS["bars"].full_name(settings.topic_prefix)
    try:
        low, stop = consumer.get_watermark_offsets(TopicPartition(full, partition), timeout=_TIMEOUT_S, cached=False)
        step = 1
        while stop > low:
            start = max(stop - step, low)
            found = None
            for offset, value in _records(settings, consumer, TopicPartition(full, partition, start), stop):
                try:
                    input_offset = decode_learning(codec, value, registry.schema).input_offset
                except DecodeError as exc:  # no worker's; the sink writes the letter
                    logger.debug("Record %s[%d]@%d cannot be read: %s", full, partition, offset, exc)
                    continue
                if input_offset >= 0:
                    found = WorkerBars(input_offset, offset)
            if found is not None:
                return found
            stop, step = start, min(step * 8, _MOST_AT_ONCE)
        return None
    except KafkaException as exc:
        raise unreachable(settings, exc) from exc
    finally:
        consumer.close()


def _records(settings: KafkaSettings, consumer: Consumer, place: TopicPartition, stop: int) -> Iterator[tuple[int, bytes]]:
    """(offset, value) of the records from ``place`` up to ``stop`` that are still there."""
    consumer.assign([place])
    while True:
        message = consumer.poll(_TIMEOUT_S)
        if message is None:
            raise unreachable(settings, TimeoutError(f"no answer reading {place.topic}[{place.partition}] at {place.offset}"))
        if message.error() or message.offset() >= stop:  # the only error let through is the end of the partition
            return
        yield message.offset(), message.value() or b""
        if message.offset() == stop - 1:
            return
