"""The catalogue of topics: names, key and value types, partitions and retention. The only list of topic names.

Frame topics are keyed by nothing (the partition says whose rows they are), row topics by ``exchange:symbol[:timeframe]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from schemas.codec import MAX_RECORD_BYTES
from schemas.errors import VocabularyError

_DAY_MS: Final = 86_400_000
_MIB: Final = 1024 * 1024


BROKERS_TIME: Final = {"message.timestamp.type": "LogAppendTime"}
"""A record's time is when the broker took it, not when its producer queued it: nobody knew what waited while the broker was away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Topic:
    """One topic as it is created on the broker."""

    name: str
    kind: Literal["frame", "row", "raw"]
    """``frame``: columnar micro-batches; ``row``: one Avro record a row; ``raw``: bytes of ours, no schema."""
    schema: str = ""
    """Name of the ``.avsc``; empty for ``raw``."""
    key: str = ""
    """What the Kafka key holds; empty for none."""
    per_partition: bool = True
    """Partitioned as ``trades`` is (``settings.kafka.partitions``); otherwise one partition."""
    compacted: bool = False
    retention_ms: int = 7 * _DAY_MS
    """Age at which a segment is deleted; -1 never. ClickHouse keeps history, topics keep what a consumer may still want to replay."""
    retention_bytes: int = -1
    """Bytes a partition keeps at most; -1 unbounded by size."""
    segment_bytes: int = 64 * _MIB
    """Segments are deleted and compacted whole: smaller ones follow the limits more closely."""

    def full_name(self, prefix: str) -> str:
        """The name on the broker: ``prefix`` (``settings.kafka.topic_prefix``) and the name."""
        return f"{prefix}{self.name}"

    def config(self) -> dict[str, str]:
        """Broker settings of the topic."""
        return {
            "cleanup.policy": "compact" if self.compacted else "delete",
            "retention.ms": str(-1 if self.compacted else self.retention_ms),
            "retention.bytes": str(self.retention_bytes),
            "segment.bytes": str(self.segment_bytes),
            "max.message.bytes": str(MAX_RECORD_BYTES + 64 * 1024),
            "min.cleanable.dirty.ratio": "0.2",
            **BROKERS_TIME,
        }


_ALL: Final = (
    Topic(name="trades", kind="frame", schema="trades", retention_bytes=8 * 1024 * _MIB),
    Topic(name="quotes", kind="frame", schema="quotes", retention_bytes=2 * 1024 * _MIB),
    Topic(name="funding", kind="frame", schema="funding"),
    Topic(name="open_interest", kind="frame", schema="open_interest"),
    Topic(name="onchain", kind="row", schema="onchain", key="chain:asset"),
    Topic(name="gaps", kind="frame", schema="gaps", retention_ms=90 * _DAY_MS),
    Topic(name="quality", kind="frame", schema="quality", retention_ms=30 * _DAY_MS),
    Topic(name="quarantine", kind="frame", schema="quarantine", retention_ms=90 * _DAY_MS),
    Topic(name="bars", kind="frame", schema="bars", retention_bytes=4 * 1024 * _MIB),
    Topic(name="bars.rows", kind="row", schema="bars_row", key="exchange:symbol:timeframe", compacted=True, segment_bytes=16 * _MIB),
    # 192 MiB hold several snapshots of 10,000 symbols; the newest one is never in the oldest segment
    Topic(name="bars.state", kind="raw", retention_ms=-1, retention_bytes=192 * _MIB, segment_bytes=32 * _MIB),
    Topic(name="deadletter", kind="row", schema="deadletter", key="exchange:symbol", per_partition=False, retention_ms=90 * _DAY_MS),
)

TOPICS: Final[dict[str, Topic]] = {topic.name: topic for topic in _ALL}
"""Every topic by its name without prefix, upstream first."""

SCHEMA_NAMES: Final = tuple(topic.schema for topic in _ALL if topic.schema)
"""Schemas in the order in which a new registry gets them, so that ids are the same on every new stack."""


def topic(name: str) -> Topic:
    """The topic of that name (without prefix). Raises VocabularyError with the nearest known one."""
    try:
        return TOPICS[name]
    except KeyError:
        raise VocabularyError("topic", name, TOPICS) from None


def subject(schema_name: str, prefix: str = "") -> str:
    """Registry subject of a topic's value schema, by Confluent's default TopicNameStrategy: ``<topic>-value``."""
    for entry in _ALL:
        if entry.schema == schema_name:
            return f"{entry.full_name(prefix)}-value"
    raise VocabularyError("schema", schema_name, SCHEMA_NAMES)
