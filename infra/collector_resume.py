"""Where a collector left off: the tails of its topics in; what to go on with, by instrument key, out.

Read are ``trades`` and ``gaps``, and ClickHouse for symbols that are not in them. What the records mean is ``collectors.left_off``'s business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Final

from clickhouse_connect.driver.exceptions import ClickHouseError
from confluent_kafka import Consumer, KafkaException, TopicPartition

from collectors.coverage import Resume
from collectors.left_off import LeftOff
from infra.clickhouse.client import connect
from infra.errors import UnreachableError
from infra.kafka import consumer_config, unreachable
from infra.registry_client import RegistryClient
from infra.settings import ClickHouseSettings, KafkaSettings, Settings
from schemas.codec import decode_learning
from schemas.errors import DecodeError
from schemas.frames import Frame
from schemas.topics import TOPICS

logger = logging.getLogger(__name__)

TAIL_RECORDS: Final = {"trades": 2_000, "gaps": 5_000}
"""Records read back per partition. Trades: at two heartbeats a second 16 minutes of silence, at 100 frames a second 20 s; 0.3 s of work.
Gaps: at 1,024 symbols a minute's growth is one record a partition and shard; open gaps tell of themselves while they are fetched."""
MAX_AGE_US: Final = 7 * 86_400_000_000
"""A symbol whose newest trade is older starts anew: a week of trades would be fetched before anything else it misses."""
_TIMEOUT_S: Final = 10.0
_STORE_TIMEOUT_S: Final = 5


def left_off(settings: Settings, registry: RegistryClient, exchange: str, *, consecutive: bool, now_us: int) -> dict[str, Resume]:
    """Instrument key -> what to go on with. Raises UnreachableError when Kafka does not answer; ClickHouse may be away."""
    found = LeftOff(exchange, settings.kafka.partitions, consecutive=consecutive)
    takers: dict[str, Callable[[int, Frame], None]] = {"trades": found.trades, "gaps": lambda _, frame: found.gaps(frame)}
    for topic_name, take in takers.items():
        for partition, frame in _tail(settings.kafka, registry, topic_name):
            take(partition, frame)
    try:
        for key, trade_id, time_us in _stored(settings.clickhouse, exchange):
            found.stored(key, trade_id, time_us)
    except UnreachableError as exc:
        logger.warning("%s Symbols that traded long ago start without a past.", exc)
    return found.resumes(now_us - MAX_AGE_US)


def _tail(settings: KafkaSettings, registry: RegistryClient, topic_name: str) -> Iterator[tuple[int, Frame]]:
    """(partition, frame) of the newest records of a topic, in order. Raises UnreachableError."""
    codec = registry.frame_codec(topic_name)
    full_name = TOPICS[topic_name].full_name(settings.topic_prefix)
    consumer = Consumer(consumer_config(settings, "collector-resume"))
    try:
        for partition in range(settings.partitions):
            low, high = consumer.get_watermark_offsets(TopicPartition(full_name, partition), timeout=_TIMEOUT_S, cached=False)
            position = max(low, high - TAIL_RECORDS[topic_name])
            if position >= high:
                continue
            consumer.assign([TopicPartition(full_name, partition, position)])
            while position < high:
                messages = consumer.consume(min(500, high - position), timeout=_TIMEOUT_S)  # more than there are would wait
                if not messages:
                    # going on without it would leave the open gaps that it tells of open for ever
                    raise unreachable(settings, TimeoutError(f"{full_name}[{partition}] gives no record at {position} of {high}"))
                for message in messages:
                    if message.error():
                        raise KafkaException(message.error())
                    position = message.offset() + 1
                    try:
                        yield partition, decode_learning(codec, message.value(), registry.schema)
                    except DecodeError:
                        continue  # the worker dead-letters it; here it only tells nothing
    except KafkaException as exc:
        raise unreachable(settings, exc) from exc
    finally:
        consumer.close()


def _stored(settings: ClickHouseSettings, exchange: str) -> list[tuple[str, int, int]]:
    """(key, newest trade id, its time) of every symbol in the store; from the projection ``extent``. Raises UnreachableError."""
    client = connect(settings, timeout_s=_STORE_TIMEOUT_S)
    try:
        result = client.query(
            "SELECT symbol, max(trade_id), max(exchange_time_us) FROM trades WHERE exchange = {e:String} GROUP BY symbol",
            parameters={"e": exchange},
        )
        return [(f"{exchange}:{symbol}", int(trade_id), int(time_us)) for symbol, trade_id, time_us in result.result_rows]
    except (ClickHouseError, OSError) as exc:
        raise UnreachableError(f"ClickHouse cannot be asked for the newest trades: {exc}") from exc
    finally:
        client.close()
