"""Where a collector left off: the newest trade of each symbol among the last frames it published. Topic in, positions out."""

from __future__ import annotations

import logging
from typing import Final

from confluent_kafka import Consumer, KafkaException, TopicPartition

from collectors.coverage import Resume
from infra.kafka import consumer_config, unreachable
from infra.registry_client import RegistryClient
from infra.settings import KafkaSettings
from schemas.codec import decode_learning
from schemas.errors import DecodeError
from schemas.topics import TOPICS

logger = logging.getLogger(__name__)

TAIL_RECORDS: Final = 2_000
"""Records read back per partition: at two heartbeats a second 16 minutes of silence, at 100 frames a second 20 s; 0.3 s of work.
A symbol that did not trade among them starts without a past: what it missed while the collector was away is found by nobody."""
_TIMEOUT_S: Final = 10.0


def last_positions(settings: KafkaSettings, registry: RegistryClient, source_prefix: str) -> dict[str, Resume]:
    """Instrument key -> newest trade that sources named ``source_prefix...`` published. Raises UnreachableError."""
    codec = registry.frame_codec("trades")
    topic_name = TOPICS["trades"].full_name(settings.topic_prefix)
    consumer = Consumer(consumer_config(settings, "collector-resume"))
    found: dict[str, Resume] = {}
    try:
        for partition in range(settings.partitions):
            low, high = consumer.get_watermark_offsets(TopicPartition(topic_name, partition), timeout=_TIMEOUT_S, cached=False)
            position = max(low, high - TAIL_RECORDS)
            if position >= high:
                continue
            consumer.assign([TopicPartition(topic_name, partition, position)])
            while position < high:
                messages = consumer.consume(min(500, high - position), timeout=_TIMEOUT_S)  # more than there are would wait
                if not messages:
                    logger.warning("The tail of %s[%d] cannot be read; its symbols start without a past.", topic_name, partition)
                    break
                for message in messages:
                    if message.error():
                        raise KafkaException(message.error())
                    position = message.offset() + 1
                    _learn(found, codec, registry, message.value(), source_prefix)
    except KafkaException as exc:
        raise unreachable(settings, exc) from exc
    finally:
        consumer.close()
    return found


def _learn(found: dict[str, Resume], codec, registry: RegistryClient, value: bytes, source_prefix: str) -> None:  # type: ignore[no-untyped-def]
    try:
        frame = decode_learning(codec, value, registry.schema)
    except DecodeError:
        return  # the worker dead-letters it; here it only tells nothing
    if not frame.source.startswith(source_prefix) or not frame.row_count:
        return
    columns = frame.columns
    for code, trade_id, time_us in zip(
        columns["symbol_code"].tolist(), columns["trade_id"].tolist(), columns["exchange_time_us"].tolist(), strict=True
    ):
        key = frame.symbols[code]
        before = found.get(key)
        if before is None or trade_id > before.trade_id:
            found[key] = Resume(trade_id, time_us)
