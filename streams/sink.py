"""The sink: every topic into its table, each row exactly once, whatever crashes when.

Comes in: records of any frame or row topic. Goes out: columnar batches for a :class:`Store`, one calendar month each, because ClickHouse
inserts one block of one partition atomically and nothing larger. Rows carry the offset they were read from; after a crash the sink reads
again from what its group has committed and drops the (offset, month) pairs the table already holds. Trades are also compared by id, so the
same trade in another record (a reconnect, a second replay) is dropped; what the worker makes (bars, quality, quarantine) by the input offset. Bars of the
repair have none (-1): it publishes a bar again only after it has seen what is stored, so nothing of it comes twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from processors.unseen import group_by_month, unseen_mask
from schemas.codec import FrameCodec, RowCodec, decode_learning
from schemas.errors import DecodeError, UnknownSchemaError
from schemas.frames import concat_columns

logger = logging.getLogger(__name__)

Columns = dict[str, npt.NDArray[Any]]
_NO_ID: Final = np.iinfo(np.int64).min
WORKER_TOPICS: Final = frozenset({"bars", "quality", "quarantine"})
"""Frame topics that the worker makes of trades: each of its records is made of one record of trades and may come twice after a crash."""


class Batch(NamedTuple):
    """Rows of one table and month, ready to insert."""

    table: str
    month: int
    """Months since 1970-01."""
    keys: tuple[str, ...]
    """Instrument keys that ``columns["symbol_code"]`` indexes; empty for tables of row topics."""
    columns: Columns
    token: str
    """The same for the same rows: the store drops a batch it is given twice."""

    @property
    def row_count(self) -> int:
        """Number of rows."""
        return len(self.columns["kafka_offset"])


class Store(Protocol):
    """The history store. Calls block; a failed call is made again with the same arguments."""

    def insert(self, batch: Batch) -> None:
        """Store a batch; when this returns it is durable and readable."""
        ...

    def stored_positions(self, table: str, partition: int, since_offset: int) -> set[tuple[int, int]]:
        """(offset, month) of every row of that partition with ``offset >= since_offset``."""
        ...

    def largest_ids(self) -> dict[str, int]:
        """The largest trade id held, by instrument key."""
        ...

    def held_ids(self, key: str, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Those of ``ids`` (sorted) that the trades of an instrument hold."""
        ...

    def newest_input_offset(self, table: str, partition: int, before_offset: int) -> int:
        """The largest ``input_offset`` in a table's rows of that partition with ``kafka_offset < before_offset``, -1 for none."""
        ...


LetterKey = tuple[str, int, int, str, str, int]
"""(topic, partition, offset, place, reason, origin) of a dead letter about a record: the same key is the same letter."""


class LetterIndex(Protocol):
    """What the table of dead letters holds. Calls block."""

    def newest_letters(self) -> dict[tuple[str, int], int]:
        """The largest offset that letters name, by topic and partition."""
        ...

    def known_letters(self, keys: Sequence[LetterKey]) -> set[LetterKey]:
        """Those of ``keys`` that the table holds."""
        ...


class Received(NamedTuple):
    """One record of a topic."""

    partition: int
    offset: int
    value: bytes
    known_at_us: int = 0
    """The record's own Kafka timestamp, microseconds UTC: when the broker took it; 0 unknown."""


@dataclass(slots=True)
class _Part:
    """Rows of one record, with codes into the batch's own dictionary."""

    columns: Columns
    partition: int
    offset: int
    known_at_us: int


@dataclass(slots=True)
class TopicSink:
    """Turns records of one topic into batches for its table.

    Call :meth:`resume` once a partition before its first record. Not thread-safe.
    """

    topic: str
    time_column: str
    codec: FrameCodec | RowCodec
    store: Store
    fetch_schema: Callable[[int], str]
    on_undecodable: Callable[[str, Received, DecodeError], None]
    letters: LetterIndex | None = None
    """Of topic ``deadletter``: a worker that crashed writes the letters of the records it reads again once more; one is kept."""
    duplicates: int = 0
    """Rows dropped because the table already holds them."""
    _in_doubt: dict[int, set[tuple[int, int]]] = field(default_factory=dict)
    _in_doubt_until: dict[int, int] = field(default_factory=dict)
    _input_offset: dict[int, int] = field(default_factory=dict)
    _largest_id: dict[str, int] | None = None
    _newest_letter: dict[tuple[str, int], int] | None = None

    def resume(self, partition: int, committed_offset: int) -> None:
        """Learn what the table holds of this partition beyond ``committed_offset`` (next to read): the batch a crash left in doubt."""
        held = self.store.stored_positions(self.topic, partition, committed_offset)
        self._in_doubt[partition] = held
        self._in_doubt_until[partition] = max((offset for offset, _ in held), default=-1)
        if self.topic in WORKER_TOPICS:
            self._input_offset[partition] = self.store.newest_input_offset(self.topic, partition, committed_offset)

    def newest_stored(self, partition: int) -> int:
        """Largest offset found in doubt by :meth:`resume`, -1 for none."""
        return self._in_doubt_until.get(partition, -1)

    def batches(self, records: list[Received]) -> list[Batch]:
        """Batches that hold every new row of ``records``, one a month. The same records give the same batches."""
        if isinstance(self.codec, FrameCodec):
            keys, parts = self._frames(records)
        else:
            keys, parts = (), self._rows(records)
        if not parts:
            return []
        columns = concat_columns([part.columns for part in parts])
        counts = [len(next(iter(part.columns.values()))) for part in parts]
        columns["kafka_partition"] = np.repeat(np.array([part.partition for part in parts], np.uint16), counts)
        columns["kafka_offset"] = np.repeat(np.array([part.offset for part in parts], np.uint64), counts)
        columns["known_at_us"] = np.repeat(np.array([part.known_at_us for part in parts], np.int64), counts)
        if self.topic == "trades":
            columns = self._drop_known_trades(keys, columns)
        span = f"{records[0].partition}:{records[0].offset}-{records[-1].partition}:{records[-1].offset}+{len(records)}"
        result = []
        for month, rows in group_by_month(columns[self.time_column]):
            rows = self._drop_in_doubt(month, rows, columns)
            if len(rows):
                selected = (
                    columns if len(rows) == len(columns["kafka_offset"]) else {name: column[rows] for name, column in columns.items()}
                )
                result.append(Batch(self.topic, month, keys, selected, f"{self.topic}/{month}/{span}"))
        return result

    def inserted(self, batch: Batch) -> None:
        """Tell that ``batch`` is stored; its ids are held from now on."""
        if self.topic == "deadletter" and self._newest_letter is not None:
            for place in zip(*(batch.columns[name].tolist() for name in ("topic", "partition", "offset")), strict=True):
                self._newest_letter[place[:2]] = max(self._newest_letter.get(place[:2], -1), place[2])
        if self.topic != "trades" or self._largest_id is None:
            return
        codes, ids = batch.columns["symbol_code"], batch.columns["trade_id"]
        largest = np.full(len(batch.keys), _NO_ID, np.int64)
        np.maximum.at(largest, codes, ids)
        for code in np.unique(codes).tolist():
            key = batch.keys[code]
            self._largest_id[key] = max(self._largest_id.get(key, _NO_ID), int(largest[code]))

    def _frames(self, records: list[Received]) -> tuple[tuple[str, ...], list[_Part]]:
        assert isinstance(self.codec, FrameCodec)
        code_of: dict[str, int] = {}
        parts = []
        for record in records:
            try:
                frame = decode_learning(self.codec, record.value, self.fetch_schema)
            except DecodeError as exc:
                self.on_undecodable(self.topic, record, exc)
                continue
            if not frame.row_count:
                continue
            columns: Columns = dict(frame.columns)
            if self.topic in WORKER_TOPICS:
                if frame.input_offset >= 0:  # below: the repair's, a person's
                    if frame.input_offset <= self._input_offset.get(record.partition, -1):
                        self.duplicates += frame.row_count
                        continue
                    self._input_offset[record.partition] = frame.input_offset
                if self.topic == "bars":
                    final = columns["is_final"] == 1
                    if not final.any():
                        continue
                    columns = {name: column[final] for name, column in columns.items()}
                else:
                    columns["source"] = np.full(frame.row_count, frame.source, object)
                columns["input_offset"] = np.full(len(columns["symbol_code"]), frame.input_offset, np.int64)
            codes = np.array([code_of.setdefault(key, len(code_of)) for key in frame.symbols], np.int32)
            columns["symbol_code"] = codes[columns["symbol_code"]]
            parts.append(_Part(columns, record.partition, record.offset, record.known_at_us))
        return tuple(code_of), parts

    def _rows(self, records: list[Received]) -> list[_Part]:
        assert isinstance(self.codec, RowCodec)
        parts: list[tuple[Mapping[str, Any], Received]] = []
        for record in records:
            try:
                row = self._decode_row(self.codec, record.value)
            except DecodeError as exc:
                self.on_undecodable(self.topic, record, exc)
                continue
            parts.append((row, record))
        if self.letters is not None:
            parts = self._new_letters(parts, self.letters)
        return [
            _Part({name: _one(value) for name, value in row.items()}, record.partition, record.offset, record.known_at_us)
            for row, record in parts
        ]

    def _new_letters(self, parts: list[tuple[Mapping[str, Any], Received]], index: LetterIndex) -> list[tuple[Mapping[str, Any], Received]]:
        """Letters that the table does not hold yet. Only what names a record of a topic can come twice."""
        if self._newest_letter is None:
            self._newest_letter = index.newest_letters()
        newest = self._newest_letter
        keys = [_letter_key(row) for row, _ in parts]
        # a worker writes letters in the order of its input: beyond the newest offset they are new, and the table is not asked
        asked = [key for key in keys if key is not None and key[2] <= newest.get(key[:2], -1)]
        seen = index.known_letters(asked) if asked else set()
        kept = []
        for key, part in zip(keys, parts, strict=True):
            if key is not None:
                if key in seen:
                    self.duplicates += 1
                    continue
                seen.add(key)
            kept.append(part)
        return kept

    def _decode_row(self, codec: RowCodec, value: bytes) -> Mapping[str, Any]:
        try:
            return codec.decode(value)
        except UnknownSchemaError as unknown:
            try:
                text = self.fetch_schema(unknown.schema_id)
            except KeyError:
                raise DecodeError(f"The schema registry has no schema with id {unknown.schema_id}.") from unknown
            codec.add_writer(unknown.schema_id, text)
            return codec.decode(value)

    def _drop_known_trades(self, keys: tuple[str, ...], columns: Columns) -> Columns:
        if self._largest_id is None:
            self._largest_id = self.store.largest_ids()
        largest = np.array([self._largest_id.get(key, _NO_ID) for key in keys], np.int64)
        keep = unseen_mask(columns["symbol_code"], columns["trade_id"], largest, lambda code, ids: self.store.held_ids(keys[code], ids))
        if keep.all():
            return columns
        self.duplicates += int(len(keep) - keep.sum())
        return {name: column[keep] for name, column in columns.items()}

    def _drop_in_doubt(self, month: int, rows: npt.NDArray[Any], columns: Columns) -> npt.NDArray[Any]:
        offsets, partitions = columns["kafka_offset"][rows], columns["kafka_partition"][rows]
        for partition, held in list(self._in_doubt.items()):
            if not held:
                continue
            mine = partitions == partition
            if not mine.any():
                continue
            stored = np.array([offset for offset, of_month in held if of_month == month], np.uint64)
            known = mine & np.isin(offsets, stored)
            self.duplicates += int(known.sum())
            if int(offsets[mine].max()) > self._in_doubt_until[partition]:
                held.clear()  # past the batch in doubt: nothing of this partition is in question any more
            rows, offsets, partitions = rows[~known], offsets[~known], partitions[~known]
        return rows


def _letter_key(row: Mapping[str, Any]) -> LetterKey | None:
    """None for a letter that names no record of a topic."""
    if row["offset"] < 0 or not row["topic"]:
        return None
    return row["topic"], row["partition"], row["offset"], row["place"], row["reason"], row["origin"]


def _one(value: Any) -> npt.NDArray[Any]:
    if isinstance(value, bool):
        return np.array([int(value)], np.uint8)
    if isinstance(value, int):
        return np.array([value], np.int64)
    if isinstance(value, float):
        return np.array([value], np.float64)
    column = np.empty(1, object)
    column[0] = value
    return column
