"""The sink's store on ClickHouse: Arrow batches in, what is already held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from infra.clickhouse.schema import TABLES
from streams.sink import Batch, LetterKey


class ClickHouseStore:
    """`streams.sink.Store` over a blocking ``clickhouse-connect`` client.

    Args:
        client: from ``infra.clickhouse.client.connect``; the tables are in its database.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    def insert(self, batch: Batch) -> None:
        """Insert as Arrow: exchange and symbol stay dictionaries, numbers are not copied."""
        self._client.insert_arrow(
            f"`{batch.table}`",
            _arrow(batch),
            settings={
                "insert_deduplicate": 1,
                "insert_deduplication_token": batch.token,
                # One block a batch, so that it is stored whole or not at all; the sink keeps batches below these.
                "max_insert_block_size": 2_000_000,
                "min_insert_block_size_rows": 2_000_000,
                "min_insert_block_size_bytes": 1_000_000_000,
            },
        )

    def stored_positions(self, table: str, partition: int, since_offset: int) -> set[tuple[int, int]]:
        """(offset, month) of the rows at or after ``since_offset``; the offset index skips all older parts."""
        time_column = TABLES[table].time_column
        month = f"toRelativeMonthNum(fromUnixTimestamp64Micro({time_column}, 'UTC')) - toRelativeMonthNum(toDate('1970-01-01'))"
        result = self._client.query(
            f"SELECT DISTINCT kafka_offset, {month} FROM `{table}` WHERE kafka_partition = {{p:UInt16}} AND kafka_offset >= {{o:UInt64}}",
            parameters={"p": partition, "o": max(since_offset, 0)},
        )
        return {(int(offset), int(of_month)) for offset, of_month in result.result_rows}

    def largest_ids(self) -> dict[str, int]:
        """Answered from the projection ``extent``, not by reading every trade."""
        result = self._client.query("SELECT exchange, symbol, max(trade_id) FROM trades GROUP BY exchange, symbol")
        return {f"{exchange}:{symbol}": int(largest) for exchange, symbol, largest in result.result_rows}

    def held_ids(self, key: str, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """A range read of the primary key."""
        exchange, _, symbol = key.partition(":")
        result = self._client.query_np(
            "SELECT trade_id FROM trades WHERE exchange = {e:String} AND symbol = {s:String} AND trade_id BETWEEN {a:Int64} AND {b:Int64}",
            parameters={"e": exchange, "s": symbol, "a": int(ids[0]), "b": int(ids[-1])},
        )
        held: npt.NDArray[np.int64] = np.asarray(result, np.int64).reshape(-1)
        return held

    def newest_input_offset(self, table: str, partition: int, before_offset: int) -> int:
        """-1 when there is none."""
        result = self._client.query(
            f"SELECT max(input_offset), count() FROM `{table}` WHERE kafka_partition = {{p:UInt16}} AND kafka_offset < {{o:UInt64}}",
            parameters={"p": partition, "o": max(before_offset, 0)},
        )
        newest, count = result.result_rows[0]
        return int(newest) if count else -1

    def newest_letters(self) -> dict[tuple[str, int], int]:
        """See streams.sink.LetterIndex."""
        result = self._client.query("SELECT topic, partition, max(offset) FROM deadletter WHERE offset >= 0 GROUP BY topic, partition")
        return {(topic, int(partition)): int(offset) for topic, partition, offset in result.result_rows}

    def known_letters(self, keys: Sequence[LetterKey]) -> set[LetterKey]:
        """See streams.sink.LetterIndex."""
        result = self._client.query(
            "SELECT topic, partition, offset, place, reason, origin FROM deadletter"
            " WHERE offset IN {offsets:Array(Int64)} AND topic IN {topics:Array(String)}",
            parameters={"offsets": sorted({key[2] for key in keys}), "topics": sorted({key[0] for key in keys})},
        )
        return set(map(tuple, result.result_rows)) & set(keys)


def _arrow(batch: Batch) -> pa.Table:
    columns = batch.columns
    arrays: dict[str, Any] = {}
    if batch.keys:
        pairs = [key.partition(":") for key in batch.keys]
        codes = columns["symbol_code"]
        arrays["exchange"] = _dictionary(codes, [exchange for exchange, _, _ in pairs])
        arrays["symbol"] = _dictionary(codes, [symbol for _, _, symbol in pairs])
    for name, _ in TABLES[batch.table].columns:
        if name not in arrays:
            column = columns[name]
            # text and bytes come as objects, one a row; a topic of frames has none
            arrays[name] = pa.array(column.tolist(), pa.binary() if name == "raw" else None) if column.dtype == object else pa.array(column)
    return pa.table(arrays)


def _dictionary(codes: npt.NDArray[np.int32], words: list[str]) -> Any:
    """An Arrow dictionary column; ClickHouse refuses one whose dictionary names a word twice (code 117)."""
    place: dict[str, int] = {}
    code_of_word = np.array([place.setdefault(word, len(place)) for word in words], np.int32)
    return pa.DictionaryArray.from_arrays(pa.array(code_of_word[codes]), pa.array(list(place)))
