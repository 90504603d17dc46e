"""One series read at one place: rows of records in, encoded messages out to its subscriptions.

A series is a channel (``bars``, ``trades``), an instrument and, for bars, a timeframe. It knows what it has seen (filters), what a newcomer
must be shown (snapshot) and the last messages (log), so that a reconnect needs neither ClickHouse nor Kafka.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from api.cursors import LiveCursor, Position
from api.live.filters import BarFilter, Shown, TradeFilter, Verdict
from api.rows import BarRow, TradeRow, bar_row, rows_json, trade_row
from schemas.timeframes import timeframe_name

START: Final = Position(-1, 0)
Row = BarRow | TradeRow | msgspec.Raw
"""A row as it is kept: encoded when it is sent; those of ClickHouse are JSON already."""


@dataclass(frozen=True, slots=True)
class SeriesKey:
    """What a subscription is about; ``timeframe_s`` is 0 for trades."""

    channel: str
    exchange: str
    symbol: str
    timeframe_s: int = 0

    @property
    def instrument(self) -> str:
        """``exchange:symbol``."""
        return f"{self.exchange}:{self.symbol}"

    @property
    def fields(self) -> dict[str, Any]:
        """The envelope's members that name it."""
        named: dict[str, Any] = {"channel": self.channel, "exchange": self.exchange, "symbol": self.symbol}
        return named | ({"timeframe": timeframe_name(self.timeframe_s)} if self.timeframe_s else {})


class Message(NamedTuple):
    """One message for every subscriber of a series, encoded once; the writer puts a subscription's head before it."""

    start: Position
    """Place of its first row."""
    end: Position
    """Place after its last row: its cursor."""
    tail: bytes
    """``,"cursor":...,"type":...,"data":...}``."""
    cursor: str
    """The text of ``end``."""
    kind: str
    """``open`` (update of an open bar: a newer one makes it worthless), ``update``, ``corrected``, ``snapshot``, ``heartbeat``, ``reset``."""


class Subscriber(Protocol):
    """Who gets the messages. Called on the event loop, must not block or raise."""

    def push(self, message: Message) -> None:
        """Take one message."""
        ...


class Seed(NamedTuple):
    """What ClickHouse knows of a series before ``offset``: newest rows first known, oldest first listed."""

    offset: int
    """Rows of records before this offset are accounted for."""
    rows: list[tuple[int, int, str]]
    """(key, revision, JSON) ascending: open_time_us of final bars, trade_id of trades (revision 0)."""
    complete: bool
    """Nothing older than these is stored."""


class Series:
    """State of one series up to ``position``; rows are fed in topic order. Not thread-safe: lives on the event loop.

    Args:
        key: what it is.
        encode_cursor: text of a place in its partition.
        snapshot_rows: rows a snapshot shows.
        log_messages, log_bytes: bounds of the log.
    """

    def __init__(
        self,
        key: SeriesKey,
        encode_cursor: Callable[[Position], str],
        *,
        snapshot_rows: int,
        log_messages: int,
        log_bytes: int,
    ) -> None:
        self.key = key
        self.position = START
        """Everything before it was fed."""
        self.deliver_from = START
        """Rows before it are noted, not delivered: the reader of a cursor has them."""
        self.subscribers: set[Subscriber] = set()
        self.dropped_duplicates = 0
        self.idle_since_us = 0
        self._encode_cursor = encode_cursor
        self._snapshot_rows = snapshot_rows
        self._log_messages, self._log_bytes = log_messages, log_bytes
        self._log: deque[Message] = deque()
        self._log_size = 0
        self.log_start = START
        self._bars = BarFilter()
        self._trades = TradeFilter()
        self._learnt_offset = -1
        self._recent: dict[int, Row] = {}
        """Newest final rows by key, a few more than a snapshot shows, in no order."""
        self._open: tuple[int, Row] | None = None

    # -- what came before

    def seed(self, seed: Seed) -> None:
        """Begin at ``seed.offset`` with what ClickHouse knows."""
        keys = [key for key, _, _ in seed.rows]
        floor = None if seed.complete else min(keys, default=2**63 - 1)
        if self.key.timeframe_s:
            self._bars = BarFilter(floor)
            self._bars.seed((key, revision) for key, revision, _ in seed.rows)
        else:
            self._trades = TradeFilter(floor)
            self._trades.seed(keys)
        self._recent = {key: msgspec.Raw(text) for key, _, text in seed.rows}
        self.position = Position(seed.offset)
        self.log_start = max(self.position, self.deliver_from)

    def unknown(self, offset: int, input_offset: int, rows: Iterable[tuple[int, Sequence[Any]]]) -> list[int]:
        """Keys of final rows of the record at ``offset`` that only ClickHouse can judge; none after it was asked about this record."""
        if offset == self._learnt_offset:
            return []
        self.learn(offset, (), {})
        self._learnt_offset = -1
        if self.key.timeframe_s:
            judge = self._bars.judge
            return [row[0] for _, row in rows if row[14] and judge(row[0], row[13], input_offset) is Verdict.UNKNOWN]
        floor, judge_trade = self._trades.floor, self._trades.judge
        if floor is None:
            return []
        return [row[0] for _, row in rows if row[0] <= floor and judge_trade(row[0]) is Verdict.UNKNOWN]

    def learn(self, offset: int, asked: Sequence[int], seen: Mapping[int, Shown]) -> None:
        """What ClickHouse said about those keys of the record at ``offset``: stored ones with the rows of their newest revision."""
        self._learnt_offset = offset
        if self.key.timeframe_s:
            self._bars.learn(asked, seen)
        else:
            self._trades.learn(asked, set(seen))

    # -- what comes

    def advance(self, offset: int) -> None:
        """Everything before ``offset`` holds nothing more for it."""
        if offset > self.position.offset:
            self.position = Position(offset)

    def feed(self, offset: int, input_offset: int, rows: Sequence[tuple[int, Sequence[Any]]]) -> None:
        """Rows ``(index in the record, values in the order of api.rows)`` of the record at ``offset``; the record is done afterwards."""
        if offset < self.position.offset:
            return
        if self.key.timeframe_s:
            self._feed_bars(offset, input_offset, rows)
        else:
            self._feed_trades(offset, rows)
        self.position = Position(offset + 1)

    def offer_open(self, input_offset: int, values: Sequence[Any]) -> None:
        """The newest update of the open bar that was seen at all; counts unless the series knows better."""
        if self._open is None and self._bars.admit_open(values[0], input_offset):
            self._open = (values[0], bar_row(values))

    def _feed_bars(self, offset: int, input_offset: int, rows: Sequence[tuple[int, Sequence[Any]]]) -> None:
        group: list[Row] = []
        kind, first, last = "", 0, 0
        silent_below = self._silent_below(offset)
        for index, values in rows:
            open_time_us, revision, final = values[0], values[13], values[14] != 0
            fresh = self._bars.admit(open_time_us, revision, input_offset) if final else self._bars.admit_open(open_time_us, input_offset)
            if not fresh:
                self.dropped_duplicates += final
                continue
            row = bar_row(values)
            if final:
                self._remember(open_time_us, row)
            else:
                self._open = (open_time_us, row)
            if index < silent_below:
                continue
            row_kind = "open" if not final else "corrected" if revision else "update"
            if group and row_kind != kind:
                self._emit(kind, Position(offset, first), Position(offset, last + 1), group)
                group = []
            if not group:
                kind, first = row_kind, index
            last = index
            group.append(row)
        if group:
            self._emit(kind, Position(offset, first), Position(offset + 1), group)

    def _feed_trades(self, offset: int, rows: Sequence[tuple[int, Sequence[Any]]]) -> None:
        group: list[Row] = []
        first = 0
        silent_below = self._silent_below(offset)
        admit, recent = self._trades.admit, self._recent
        for index, values in rows:
            trade_id = values[0]
            if not admit(trade_id):
                self.dropped_duplicates += 1
                continue
            row = recent[trade_id] = trade_row(values)
            if index >= silent_below:
                if not group:
                    first = index
                group.append(row)
        self._cut_recent()
        if group:
            self._emit("update", Position(offset, first), Position(offset + 1), group)

    def _silent_below(self, offset: int) -> int:
        """Rows of the record at ``offset`` with a lower index are noted only."""
        start = self.deliver_from
        return 0 if offset > start.offset else start.row if offset == start.offset else 2**31

    def _remember(self, key: int, row: Row) -> None:
        self._recent[key] = row
        self._cut_recent()
        if self._open is not None and self._open[0] <= key:
            self._open = None

    def _cut_recent(self) -> None:
        if len(self._recent) > 2 * self._snapshot_rows:  # rarely: sorting at each row would cost more than the rows
            self._recent = dict(sorted(self._recent.items(), key=_key)[-self._snapshot_rows :])

    def _emit(self, kind: str, start: Position, end: Position, rows: Sequence[Row]) -> None:
        message = self._message(start, end, kind, rows_json(rows))
        if kind != "open":
            self._log.append(message)
            self._log_size += len(message.tail)
            while self._log and (len(self._log) > self._log_messages or self._log_size > self._log_bytes):
                old = self._log.popleft()
                self._log_size -= len(old.tail)
                self.log_start = old.end
        for subscriber in self.subscribers:
            subscriber.push(message)

    def _message(self, start: Position, end: Position, kind: str, data: bytes) -> Message:
        cursor = self._encode_cursor(end)
        tail = b',"cursor":"%b","type":"%b","data":%b}' % (cursor.encode(), b"update" if kind == "open" else kind.encode(), data)
        return Message(start, end, tail, cursor, kind)

    # -- what a newcomer gets

    def snapshot(self, limit: int) -> Message:
        """The newest ``limit`` final rows, oldest first, then the open bar where there is one; its cursor is where the series stands."""
        rows = [row for _, row in sorted(self._recent.items(), key=_key)[-limit:]] if limit else []
        if self._open is not None:
            rows.append(self._open[1])
        return self._message(self.position, self.position, "snapshot", rows_json(rows))

    def holds(self, place: Position) -> bool:
        """Whether the log has everything after ``place``."""
        return place >= self.log_start

    def replay(self, place: Position) -> list[Message]:
        """Every message at or after ``place``, then the open bar. Only where :meth:`holds` says so."""
        found = [message for message in self._log if message.start >= place]
        if self._open is not None and self.position > place:
            found.append(self._message(self.position, self.position, "open", rows_json([self._open[1]])))
        return found

    def announce(self, kind: str, data: bytes) -> Message:
        """A message about the series itself (``heartbeat``, ``reset``) with the cursor of where it stands."""
        return self._message(self.position, self.position, kind, data)

    def history(self, rows: Sequence[str], after: LiveCursor) -> Message:
        """Rows that ClickHouse holds before the series' place but after a page's end, for the reader of that page."""
        text = after.encode()
        tail = f',"cursor":"{text}","type":"update","data":[{",".join(rows)}]}}'
        return Message(self.deliver_from, self.deliver_from, tail.encode(), text, "update")


def _key(item: tuple[int, Row]) -> int:
    return item[0]
