"""Entry point of the sink: ``python -m infra.sink``. Reads every topic with a table and writes ClickHouse; commits what is stored."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from clickhouse_connect.driver.exceptions import ClickHouseError
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from prometheus_client import Counter, Gauge, Histogram

from infra.clickhouse.client import answers, connect
from infra.clickhouse.schema import TABLES
from infra.clickhouse.store import ClickHouseStore
from infra.ending import on_request_to_end
from infra.errors import DataDirError, MarketstreamError
from infra.health import HealthServer
from infra.kafka import consumer_config, partition_count, producer_config, unreachable
from infra.kafka_lag import KafkaLag
from infra.logs import setup_logging
from infra.progress import SINK_GROUP
from infra.registry_client import RegistryClient
from infra.seam import SYSTEM, SystemClock
from infra.settings import Settings, load_settings
from infra.watchdog import Monitor, Waiting
from schemas.errors import DecodeError
from schemas.topics import TOPICS
from streams.deadletters import dead_letter
from streams.sink import Batch, Received, TopicSink

logger = logging.getLogger(__name__)

_POLL_S: Final = 0.1
_RETRY_MAX_S: Final = 5.0
_STORE_TIMEOUT_S: Final = 30
"""An insert takes 0.1 to 2 s; one that hangs longer is tried again, which its token makes harmless."""
_SLOW_STORE_S: Final = 2.0
_COMMIT_AGAIN_S: Final = 1.0
_FETCH: Final = {"fetch.min.bytes": 256 * 1024, "fetch.wait.max.ms": 100}
"""The sink stores batches, so it need not be told of each record at once: at 10,000 trades/s that was 800 fetches a second."""
_APPROXIMATE_ROW_BYTES: Final = 45
"""Encoded size of a trade; a batch is cut by bytes so that it stays below ``sink.max_rows`` rows."""

ROWS = Counter("sink_rows_total", "Rows stored", ["table"])
DUPLICATES = Counter("sink_duplicates_total", "Rows dropped because the table holds them", ["table"])
QUERY_SECONDS = Histogram("db_query_duration_seconds", "Seconds an insert took", ["table"])
FAILURES = Counter("sink_failures_total", "Inserts that failed and were tried again")
LAST_STORED = Gauge("sink_last_stored_timestamp_seconds", "When the last batch was stored")


@dataclass(slots=True)
class _Pending:
    records: list[Received] = field(default_factory=list)
    size: int = 0
    since: float = 0.0


class _StoppedError(Exception):
    """Asked to stop while ClickHouse is away."""


class Sink:
    """The loop: consume, batch, insert, commit. One thread.

    Args:
        settings: of this stack.
        asked_to_end: set from another thread; the sink then ends after what is in hand is stored.
    """

    def __init__(self, settings: Settings, asked_to_end: threading.Event) -> None:
        self._settings = settings
        self._asked_to_end = asked_to_end
        self._trouble: dict[str, str] = {"start": "The sink is starting."}
        self._registry = RegistryClient.from_settings(settings)
        self._client = connect(settings.clickhouse, timeout_s=_STORE_TIMEOUT_S)
        self._store = ClickHouseStore(self._client)
        self._consumer = Consumer(consumer_config(settings.kafka, SINK_GROUP, on_commit=self._committed, **_FETCH))
        self._uncommitted: dict[tuple[str, int], int] = {}
        self._committing_since = 0.0
        self._letters = Producer(producer_config(settings.kafka))
        self._letter_codec = self._registry.row_codec("deadletter")
        self._sinks = {name: self._topic_sink(name) for name in TABLES}
        self._pending = {name: _Pending() for name in TABLES}
        self._lag = KafkaLag(settings.kafka)
        self._positions: dict[tuple[str, int], int] = {}
        self._storing_since = 0.0
        self._stored_records = 0

    # infra.watchdog.Work

    verb = "stored"

    def done(self) -> int:
        """See Work.done."""
        return self._stored_records

    def waiting(self) -> Waiting:
        """See Work.waiting."""
        since = self._storing_since
        if trouble := self._trouble.get("clickhouse"):
            return Waiting(blocked={"clickhouse": trouble})
        if since and SYSTEM.monotonic_s() - since > _SLOW_STORE_S and not answers(self._settings.clickhouse):
            return Waiting(
                blocked={"clickhouse": f"ClickHouse at {self._settings.clickhouse.url} does not answer; an insert waits for it."}
            )
        return self._lag.waiting(dict(self._positions))

    def reasons(self) -> dict[str, str]:
        """Why the sink is not ready."""
        return dict(self._trouble)

    def run(self) -> None:
        """Store until asked to end. Raises UnreachableError when Kafka refuses."""
        try:
            self._run()
        except _StoppedError:
            logger.warning("ClickHouse is away; what is not stored is read again at the next start.")
        self._letters.flush(1)
        if self._uncommitted:
            self._commit_again(asynchronous=False)
        self._consumer.close()

    def _run(self) -> None:
        self._assign()
        self._trouble.clear()
        limit = self._settings.sink.max_rows * _APPROXIMATE_ROW_BYTES
        linger_s = self._settings.sink.flush_interval_ms / 1000
        prefix = self._settings.kafka.topic_prefix
        while not self._asked_to_end.is_set():
            now = SYSTEM.monotonic_s()
            if self._uncommitted and now - self._committing_since > _COMMIT_AGAIN_S:
                self._commit_again(asynchronous=True)
            for message in self._consumer.consume(200, _POLL_S):
                if message.error():
                    self._trouble["kafka"] = str(unreachable(self._settings.kafka, KafkaException(message.error())))
                    continue
                self._trouble.pop("kafka", None)
                pending = self._pending[message.topic().removeprefix(prefix)]
                if not pending.records:
                    pending.since = now
                value = message.value() or b""
                pending.records.append(Received(message.partition(), message.offset(), value, max(message.timestamp()[1], 0) * 1000))
                pending.size += len(value)
            now = SYSTEM.monotonic_s()
            for name, pending in self._pending.items():
                if pending.records and (pending.size >= limit or now - pending.since >= linger_s):
                    self._flush(name, pending)
        for name, pending in self._pending.items():
            if pending.records:
                self._flush(name, pending)

    def _assign(self) -> None:
        kafka = self._settings.kafka
        wanted = [
            TopicPartition(TOPICS[name].full_name(kafka.topic_prefix), partition)
            for name in self._sinks
            for partition in range(partition_count(kafka, TOPICS[name]))
        ]
        try:
            positions = []
            for place in self._consumer.committed(wanted, timeout=10):
                if place.error:
                    raise KafkaException(place.error)
                low, high = self._consumer.get_watermark_offsets(place, timeout=10, cached=False)
                start = max(place.offset, low, 0)
                name = place.topic.removeprefix(kafka.topic_prefix)
                self._sinks[name].resume(place.partition, start)
                self._check_same_topic(name, place.partition, high)
                self._positions[(name, place.partition)] = start
                positions.append(TopicPartition(place.topic, place.partition, start))
        except KafkaException as exc:
            raise unreachable(kafka, exc) from exc
        self._consumer.assign(positions)

    def _check_same_topic(self, name: str, partition: int, high: int) -> None:
        stored = self._sinks[name].newest_stored(partition)
        if stored >= high:
            raise DataDirError(
                f"ClickHouse holds rows of offset {stored} of topic '{name}' partition {partition}, which ends at {high}: the topic was deleted"
                " and made anew. Use another MARKETSTREAM_CLICKHOUSE_DATABASE, or drop the tables."
            )

    def _topic_sink(self, name: str) -> TopicSink:
        codec = self._registry.frame_codec(name) if TOPICS[name].kind == "frame" else self._registry.row_codec(name)
        letters = self._store if name == "deadletter" else None
        return TopicSink(name, TABLES[name].time_column, codec, self._store, self._registry.schema, self._undecodable, letters)

    def _flush(self, name: str, pending: _Pending) -> None:
        sink = self._sinks[name]
        before = sink.duplicates
        batches: list[Batch] = self._until_done(lambda: sink.batches(pending.records))
        for batch in batches:
            with QUERY_SECONDS.labels(name).time():
                self._until_done(lambda batch=batch: self._store.insert(batch))
            sink.inserted(batch)
            ROWS.labels(name).inc(batch.row_count)
            LAST_STORED.set_to_current_time()
        DUPLICATES.labels(name).inc(sink.duplicates - before)
        self._stored_records += len(pending.records)
        self._positions.update({(name, record.partition): record.offset + 1 for record in pending.records})
        while self._letters.flush(_POLL_S):  # the letter is safe before the record is behind us
            if self._asked_to_end.is_set():
                raise _StoppedError
        self._commit(name, pending.records)
        self._pending[name] = _Pending()

    def _commit(self, name: str, records: Iterable[Received]) -> None:
        for record in records:
            self._uncommitted[(name, record.partition)] = record.offset + 1
        self._commit_again(asynchronous=True)

    def _commit_again(self, *, asynchronous: bool) -> None:
        """Commit what is stored. In the loop without waiting: a broker that comes back can leave a commit unanswered for a minute.

        What is stored and not committed is, after a crash, found in doubt and dropped.
        """
        prefix = self._settings.kafka.topic_prefix
        places = [
            TopicPartition(TOPICS[name].full_name(prefix), partition, offset) for (name, partition), offset in self._uncommitted.items()
        ]
        self._committing_since = SYSTEM.monotonic_s()
        try:
            self._consumer.commit(offsets=places, asynchronous=asynchronous)
        except KafkaException as exc:
            logger.warning("Offsets not committed: %s", exc)

    def _committed(self, error: KafkaError | None, places: list[TopicPartition]) -> None:
        """Called while consuming, with the outcome of a commit; what failed is tried again after a second."""
        if error is not None:
            logger.warning("Offsets not committed: %s", error.str())
            return
        prefix = self._settings.kafka.topic_prefix
        for place in places:
            key = (place.topic.removeprefix(prefix), place.partition)
            if place.error is None and self._uncommitted.get(key) == place.offset:
                del self._uncommitted[key]

    def _until_done(self, call: Any) -> Any:
        """The result of ``call``, tried again while ClickHouse is away or refuses: a stored batch is never given up."""
        wait_s = 0.1
        while True:
            self._storing_since = SYSTEM.monotonic_s()
            try:
                result = call()
            except (ClickHouseError, OSError) as exc:
                detail = str(exc).splitlines()[0][:300]
                self._trouble["clickhouse"] = f"ClickHouse at {self._settings.clickhouse.url} does not take rows: {detail}"
                logger.warning("%s; trying again in %.1f s", self._trouble["clickhouse"], wait_s)
                FAILURES.inc()
                self._await_store(wait_s)
                wait_s = min(wait_s * 2, _RETRY_MAX_S)
            else:
                self._trouble.pop("clickhouse", None)
                self._storing_since = 0.0
                return result

    def _await_store(self, wait_s: float) -> None:
        """Until ClickHouse answers a ping: batches sent to a server that hangs would pile up before its door. Raises _StoppedError."""
        while True:
            until = SYSTEM.monotonic_s() + wait_s
            while SYSTEM.monotonic_s() < until:
                if self._asked_to_end.is_set():
                    raise _StoppedError
                SYSTEM.pause(min(0.1, wait_s))
            if answers(self._settings.clickhouse):
                return
            wait_s = min(wait_s * 2, _RETRY_MAX_S)

    def _undecodable(self, name: str, record: Received, exc: DecodeError) -> None:
        logger.error("Undecodable record %s[%d]@%d: %s", name, record.partition, record.offset, exc)
        if name == "trades":  # the worker writes the letter
            return
        letter = dead_letter(
            reason="undecodable_frame",
            detail=str(exc),
            component="sink",
            raw=record.value,
            time_us=SYSTEM.now_us(),
            topic=name,
            partition=record.partition,
            offset=record.offset,
        )
        topic, value = TOPICS["deadletter"].full_name(self._settings.kafka.topic_prefix), self._letter_codec.encode(letter)
        while True:
            try:
                self._letters.produce(topic, value)
                return
            except BufferError:  # letters wait for the broker: so does what they are about
                self._letters.poll(0.1)


def main() -> int:
    """Run the sink until SIGTERM or SIGINT; the process's exit code."""
    try:
        settings = load_settings()
        setup_logging(settings.log_level, as_json=settings.log_json)
        asked = threading.Event()
        on_request_to_end(asked.set)
        sink = Sink(settings, asked)
        monitor = Monitor(sink, settings.watchdog.stuck_s, SystemClock())
        health = HealthServer(settings.sink.health_port, sink.reasons, monitor=monitor).start()
        try:
            sink.run()
        finally:
            health.stop()
    except MarketstreamError as exc:
        print(exc, file=sys.stderr)
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
