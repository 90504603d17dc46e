"""Where a collector left off: the tails of its topics in; what to go on with, by instrument key, out.

Read are ``trades`` and ``gaps``, and ClickHouse for symbols that are not in them. What the records mean is ``collectors.left_off``'s business.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
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
    gaps = []
    for topic_name, partition, frame in _tails(settings.kafka, registry):
        if topic_name == "trades":
            found.trades(partition, frame)
        else:
            gaps.append(frame)  # a row of the ledger is about trades before it
    for frame in gaps:
        found.gaps(frame)
    try:
        for key, trade_id, time_us in _stored(settings.clickhouse, exchange):
            found.stored(key, trade_id, time_us)
    except UnreachableError as exc:
        logger.warning("%s Symbols that traded long ago start without a past.", exc)
    return found.resumes(now_us - MAX_AGE_US)


def _tails(settings: KafkaSettings, registry: RegistryClient) -> Iterator[tuple[str, int, Frame]]:
    """(topic, partition, frame) of the newest records, those of a partition in order. Raises UnreachableError.

    All at once, and the ends asked for before anything is read: a question waits behind the fetch that is under way, a tenth of a second
    each (1.2 of the 3.3 s in which a killed collector was back).
    """
    codecs = {name: registry.frame_codec(name) for name in TAIL_RECORDS}
    names = {TOPICS[name].full_name(settings.topic_prefix): name for name in TAIL_RECORDS}
    positions: dict[tuple[str, int], int] = {}
    ends: dict[tuple[str, int], int] = {}
    consumer = Consumer(consumer_config(settings, "collector-resume"))
    try:
        for full_name, name in names.items():
            for partition in range(settings.partitions):
                low, high = consumer.get_watermark_offsets(TopicPartition(full_name, partition), timeout=_TIMEOUT_S, cached=False)
                position = max(low, high - TAIL_RECORDS[name])
                if position < high:
                    positions[full_name, partition], ends[full_name, partition] = position, high
        consumer.assign([TopicPartition(*place, position) for place, position in positions.items()])
        while waiting := sum(ends[place] - position for place, position in positions.items()):
            messages = consumer.consume(min(500, waiting), timeout=_TIMEOUT_S)  # more than there are would wait
            if not messages:
                # going on without them would leave the open gaps that they tell of open for ever
                raise unreachable(settings, TimeoutError(f"no record came at {positions} of {ends}"))
            for message in messages:
                if message.error():
                    raise KafkaException(message.error())
                place = message.topic(), message.partition()
                if message.offset() >= ends[place]:
                    continue  # another collector's, meanwhile
                positions[place] = message.offset() + 1
                name = names[place[0]]
                try:
                    yield name, place[1], decode_learning(codecs[name], message.value(), registry.schema)
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
