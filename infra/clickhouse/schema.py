"""Tables of ClickHouse: one a topic, made from the topic's own schema, plus the position each row was read from.

``kafka_partition`` and ``kafka_offset`` stand in every row: they are how the sink knows after a crash what it already holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from schemas.codec import frame_dtypes, frame_fills, schema_text
from schemas.topics import TOPICS, Topic
from streams.sink import WORKER_TOPICS

_FRAME_TYPES: Final = {"<f8": "Float64", "<i8": "Int64", "<i4": "Int32", "|i1": "Int8"}
_ROW_TYPES: Final = {"string": "String", "long": "Int64", "int": "Int32", "double": "Float64", "bytes": "String", "boolean": "UInt8"}
_KEY_COLUMNS: Final = (("exchange", "LowCardinality(String)"), ("symbol", "LowCardinality(String)"))
_POSITION_COLUMNS: Final = (("kafka_partition", "UInt16"), ("kafka_offset", "UInt64"), ("known_at_us", "Int64"))
"""Where a row was read, and when its record was published (the record's Kafka timestamp, the broker's): what was known at a time is what is not above it."""

_ORDER_BY: Final = {
    # by id, not time: history pages by id, and "do we hold this trade" is a range read of the primary key
    "trades": "exchange, symbol, trade_id",
    "bars": "exchange, symbol, timeframe_s, open_time_us, revision",
    "deadletter": "time_us",
    "onchain": "chain, exchange_time_us",
    "gaps": "exchange, symbol, start_time_us",
    # by id: the newest row of a trade is valid
    "quarantine": "exchange, symbol, trade_id",
}
_TIME_COLUMN: Final = {"bars": "open_time_us", "deadletter": "time_us", "gaps": "start_time_us"}
# Delta halves ids and times that grow steadily; Gorilla was larger than plain ZSTD on recorded prices
_CODECS: Final = {"Int64": "CODEC(Delta, ZSTD(1))", "UInt64": "CODEC(Delta, ZSTD(1))", "Float64": "CODEC(ZSTD(1))"}


_BY_KNOWN: Final = "INDEX by_known known_at_us TYPE minmax GRANULARITY 1"
"""Sessions read rows in the order in which they were known: what was known in a minute lies in few granules of a series."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """One table: its topic, name and columns in order."""

    topic: str
    name: str
    columns: tuple[tuple[str, str], ...]
    """(name, ClickHouse type)."""
    time_column: str
    """Microseconds UTC; partitions are its months, TTLs count from it."""
    order_by: str
    fills: Mapping[str, int] = field(default_factory=dict)
    """What a column holds in rows of a release that had no such column, other than 0."""

    def ddl(self, database: str, ttl_days: int = 0) -> str:
        """``CREATE TABLE IF NOT EXISTS`` for it."""
        lines = [f"{self._declared(name, kind)} {_CODECS.get(kind, '')}".rstrip() for name, kind in self.columns]
        # After a crash the sink asks for the newest offsets of a partition; parts are written in offset order, so min/max skips the rest.
        lines.append("INDEX by_offset kafka_offset TYPE minmax GRANULARITY 4")
        if self.name in ("trades", "bars"):
            # How far the table is, for cursors of the API: 4 ms instead of 76 for its first query over 20 M trades.
            lines.append("PROJECTION applied (SELECT kafka_partition, max(kafka_offset) GROUP BY kafka_partition)")
            lines.append(_BY_KNOWN)
        if self.name == "trades":
            lines.append("INDEX by_time exchange_time_us TYPE minmax GRANULARITY 1")
            lines.append(
                "PROJECTION extent (SELECT exchange, symbol, min(trade_id), max(trade_id), min(exchange_time_us), max(exchange_time_us), count()"
                " GROUP BY exchange, symbol)"
            )
        moment = f"fromUnixTimestamp64Micro({self.time_column}, 'UTC')"
        ttl = f"\nTTL toDateTime({moment}) + INTERVAL {ttl_days} DAY" if ttl_days else ""
        body = ",\n    ".join(lines)
        return (
            f"CREATE TABLE IF NOT EXISTS `{database}`.`{self.name}` (\n    {body}\n) ENGINE = MergeTree\n"
            f"PARTITION BY toYYYYMM({moment})\nORDER BY ({self.order_by}){ttl}\n"
            # A batch that is sent again after a lost answer carries the same token and is dropped by the server.
            "SETTINGS non_replicated_deduplication_window = 1000"
        )

    def additions(self, database: str) -> list[str]:
        """``ALTER TABLE`` statements that give a table of an earlier release the columns it lacks; rows it holds get the fill or 0 there."""
        alter = f"ALTER TABLE `{database}`.`{self.name}` ADD"
        found = [f"{alter} COLUMN IF NOT EXISTS {self._declared(name, kind)}" for name, kind in self.columns]
        if self.name in ("trades", "bars"):
            found.append(f"{alter} {_BY_KNOWN.replace('INDEX', 'INDEX IF NOT EXISTS')}")
        return found

    def _declared(self, name: str, kind: str) -> str:
        """Name, type and what rows have there whose writer, an earlier release or its sink, does not know the column."""
        return f"`{name}` {kind} DEFAULT {self.fills[name]}" if self.fills.get(name) else f"`{name}` {kind}"


def _table(entry: Topic) -> Table:
    text = schema_text(entry.schema)
    if entry.kind == "frame":
        columns = [*_KEY_COLUMNS]
        columns += [(name, _FRAME_TYPES[dtype.str]) for name, dtype in frame_dtypes(text).items() if name != "symbol_code"]
        if entry.name in WORKER_TOPICS:
            columns.append(("input_offset", "Int64"))
            if entry.name != "bars":
                columns.append(("source", "LowCardinality(String)"))
    else:
        columns = [(field["name"], _row_type(field["type"])) for field in json.loads(text)["fields"]]
    return Table(
        topic=entry.name,
        name=entry.name,
        columns=(*columns, *_POSITION_COLUMNS),
        time_column=_TIME_COLUMN.get(entry.name, "exchange_time_us"),
        order_by=_ORDER_BY.get(entry.name, "exchange, symbol, exchange_time_us"),
        fills=frame_fills(text) if entry.kind == "frame" else _row_fills(text),
    )


def _row_fills(text: str) -> dict[str, int]:
    """Numbers that a row's fields default to."""
    return {field["name"]: field["default"] for field in json.loads(text)["fields"] if isinstance(field.get("default"), int)}


def _row_type(kind: object) -> str:
    if isinstance(kind, list):
        inner = next(part for part in kind if part != "null")
        return f"Nullable({_row_type(inner)})"
    assert isinstance(kind, str)
    return _ROW_TYPES[kind]


TABLES: Final[dict[str, Table]] = {
    entry.name: _table(entry) for entry in TOPICS.values() if entry.kind != "raw" and not entry.name.endswith(".rows")
}
"""Every table by its topic. A row twin holds nothing its frame topic does not, so it has none."""


def statements(database: str, ttl_days: dict[str, int]) -> list[str]:
    """All DDL for a new database, idempotent, in order."""
    return [
        f"CREATE DATABASE IF NOT EXISTS `{database}`",
        *(table.ddl(database, ttl_days.get(table.name, 0)) for table in TABLES.values()),
        *(statement for table in TABLES.values() for statement in table.additions(database)),
    ]
