"""A topic, a store and a clock in memory, implementing the API's interfaces, with the truth a client must end up with."""

# ruff: noqa: D102 - the methods are documented by the interfaces in api.deps
from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from api.deps import Record
from api.errors import PositionLostError, StoreUnavailableError
from api.live.filters import Shown
from api.live.series import Seed, SeriesKey
from api.rows import BAR_FIELDS, TRADE_FIELDS, bar_row, row_json, trade_row
from schemas.codec import FrameCodec
from schemas.frames import Frame

EPOCH = 0xABCDEF0123456789
CODECS = {"bars": FrameCodec("bars", 1), "trades": FrameCodec("trades", 2)}


def trades_frame(key: str, ids: Sequence[int], *, others: Sequence[str] = ()) -> Frame:
    """Trades of ``key`` with these ids, mixed with one trade of each of ``others``."""
    symbols = (key, *others)
    codes = [0] * len(ids) + list(range(1, len(symbols)))
    all_ids = [*ids, *(7_000_000 + place for place in range(len(others)))]
    count = len(codes)
    columns = {
        "symbol_code": np.array(codes, np.int32),
        "trade_id": np.array(all_ids, np.int64),
        "price": np.array([100.0 + one / 8 for one in all_ids]),
        "size": np.ones(count),
        "side": np.array([1 if one % 2 else -1 for one in all_ids], np.int8),
        "exchange_time_us": np.array([1_700_000_000_000_000 + one * 1000 for one in all_ids], np.int64),
        "receive_time_us": np.array([1_700_000_000_000_000 + one * 1000 + 500 for one in all_ids], np.int64),
    }
    return Frame(source="test", watermark_us=0, symbols=symbols, columns=columns)


def bars_frame(key: str, bars: Sequence[tuple[int, int, int]], *, timeframe_s: int = 60, input_offset: int = 0) -> Frame:
    """Bars ``(number, revision, is_final)`` of ``key``; number n opens at n timeframes after a fixed time."""
    count = len(bars)
    step = timeframe_s * 1_000_000
    opens = np.array([1_700_000_040_000_000 + number * step for number, _, _ in bars], np.int64)
    floats = {name: np.full(count, 100.5) for name in ("open", "high", "low", "close", "volume", "quote_volume", "buy_volume", "vwap")}
    columns = floats | {
        "symbol_code": np.zeros(count, np.int32),
        "timeframe_s": np.full(count, timeframe_s, np.int32),
        "open_time_us": opens,
        "close_time_us": opens + step,
        "trade_count": np.array([number for number, _, _ in bars], np.int64),
        "first_trade_id": np.zeros(count, np.int64),
        "last_trade_id": np.zeros(count, np.int64),
        "revision": np.array([revision for _, revision, _ in bars], np.int32),
        "is_final": np.array([final for _, _, final in bars], np.int8),
        "complete": np.ones(count, np.int8),
        "last_receive_time_us": np.zeros(count, np.int64),
    }
    return Frame(source="test", watermark_us=0, symbols=(key,), columns=columns, input_offset=input_offset)


def bar_open_us(number: int, timeframe_s: int = 60) -> int:
    """Open time of bar ``number`` of :func:`bars_frame`."""
    return 1_700_000_040_000_000 + number * timeframe_s * 1_000_000


class ManualClock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.us = 1_700_000_000_000_000
        self._random = Random(1)
        self._sleepers: list[tuple[int, asyncio.Event]] = []

    @property
    def random(self) -> Random:
        return self._random

    def now_us(self) -> int:
        return self.us

    def monotonic_us(self) -> int:
        return self.us

    async def sleep(self, seconds: float) -> None:
        event = asyncio.Event()
        self._sleepers.append((self.us + int(seconds * 1e6), event))
        await event.wait()

    async def advance(self, seconds: float) -> None:
        """Move on and let everybody who is due run."""
        self.us += int(seconds * 1e6)
        due = [entry for entry in self._sleepers if entry[0] <= self.us]
        self._sleepers = [entry for entry in self._sleepers if entry[0] > self.us]
        for _, event in due:
            event.set()
        for _ in range(5):
            await asyncio.sleep(0)


@dataclass
class MemoryKafka:
    """`api.deps.FrameSource` over lists. ``handed`` says how far the tail is; :meth:`hand` moves it on."""

    partitions: int = 1
    epoch_value: int | None = EPOCH
    low: int = 0
    reachable: bool = True
    logs: dict[tuple[str, int], list[bytes]] = field(default_factory=dict)
    handed: dict[tuple[str, int], int] = field(default_factory=dict)
    _deliver: Callable[[Sequence[Record]], None] = lambda _: None
    _moved: Callable[[str, int, int], None] = lambda *_: None

    def log(self, topic: str, partition: int = 0) -> list[bytes]:
        return self.logs.setdefault((topic, partition), [])

    def append(self, topic: str, frame: Frame, partition: int = 0) -> int:
        """Produce a frame; its offset."""
        log = self.log(topic, partition)
        log.append(CODECS[topic].encode(frame))
        return len(log) - 1

    def frame(self, topic: str, offset: int) -> Frame:
        """What was produced at an offset of the first partition."""
        return CODECS[topic].decode(self.log(topic)[offset])

    def hand(self, topic: str, partition: int = 0, count: int | None = None) -> None:
        """Deliver the next ``count`` records of the partition (all by default) to the hub."""
        log, place = self.log(topic, partition), (topic, partition)
        first = self.handed[place]
        last = len(log) if count is None else min(len(log), first + count)
        self.handed[place] = last
        self._deliver([self._record(topic, partition, offset) for offset in range(first, last)])

    def move(self, topic: str, partition: int, offset: int) -> None:
        """The tail jumps."""
        self.handed[(topic, partition)] = offset
        self._moved(topic, partition, offset)

    def _record(self, topic: str, partition: int, offset: int) -> Record:
        return Record(topic, partition, offset, 1_700_000_000_000, self.log(topic, partition)[offset])

    async def start(self, deliver: Callable[[Sequence[Record]], None], moved: Callable[[str, int, int], None]) -> None:
        self._deliver, self._moved = deliver, moved
        for topic in ("bars", "trades"):
            for partition in range(self.partitions):
                offset = self.handed.setdefault((topic, partition), len(self.log(topic, partition)))
                moved(topic, partition, offset)

    async def stop(self) -> None:
        self._deliver, self._moved = lambda _: None, lambda *_: None

    def epoch(self, topic: str) -> int | None:
        return self.epoch_value

    def decode(self, record: Record) -> Frame:
        return CODECS[record.topic].decode(record.value)

    async def read(self, topic: str, partition: int, start: int, stop: int) -> AsyncGenerator[Sequence[Record], None]:
        if start < self.low:
            raise PositionLostError(topic, partition, start)
        for first in range(start, stop, 3):
            await asyncio.sleep(0)
            yield [self._record(topic, partition, offset) for offset in range(first, min(first + 3, stop))]

    async def ping(self) -> None:
        if not self.reachable:
            raise StoreUnavailableError("kafka", "Kafka is away.")


class MemoryStore:
    """What a sink has stored of a MemoryKafka: first occurrence of each key, up to ``stored`` records per partition."""

    def __init__(self, kafka: MemoryKafka) -> None:
        self.kafka = kafka
        self.stored: dict[str, int] = {"bars": 0, "trades": 0}
        self.reachable = True

    def catch_up(self, topic: str, count: int | None = None) -> None:
        """The sink stores the next ``count`` records (all by default)."""
        end = len(self.kafka.log(topic))
        self.stored[topic] = end if count is None else min(end, self.stored[topic] + count)

    def rows(self, key: SeriesKey, before: int) -> list[tuple[int, int, int, str]]:
        """(key, revision, offset, JSON) of final rows stored, each once, in topic order."""
        return [row for row in truth(self.kafka, key) if row[2] < min(before, self.stored[key.channel])]

    async def seed(self, key: SeriesKey, before: int | None, rows: int) -> Seed:
        await self._answer()
        offset = self.stored[key.channel] if before is None else min(before, self.stored[key.channel])
        newest: dict[int, tuple[int, int, str]] = {}
        for one, revision, _, text in self.rows(key, offset):
            if one not in newest or revision >= newest[one][1]:
                newest[one] = (one, revision, text)
        listed = [newest[one] for one in sorted(newest)]
        return Seed(offset, listed[-rows:], len(listed) <= rows)

    async def known(self, key: SeriesKey, keys: Sequence[int], before: int) -> dict[int, Shown]:
        await self._answer()
        found: dict[int, Shown] = {}
        for one, revision, offset, _ in self.rows(key, before):
            if one in keys:
                found[one] = seen(found.get(one), revision, self.kafka.frame(key.channel, offset).input_offset)
        return found

    async def after(self, key: SeriesKey, floor_key: int, until_us: int, before: int, limit: int) -> list[tuple[int, str]]:
        await self._answer()
        time = "open_time_us" if key.timeframe_s else "exchange_time_us"
        newest: dict[int, tuple[int, str]] = {}
        for one, revision, _, text in self.rows(key, before):
            if one > floor_key and json.loads(text)[time] >= until_us and (one not in newest or revision >= newest[one][0]):
                newest[one] = (revision, text)
        return [(one, newest[one][1]) for one in sorted(newest)][:limit]

    async def _answer(self) -> None:
        await asyncio.sleep(0)
        if not self.reachable:
            raise StoreUnavailableError("clickhouse", "ClickHouse is away.")


def seen(before: Shown | None, revision: int, input_offset: int) -> Shown:
    """What is known of a bar after a further row of it."""
    if before is None or before.revision < revision:
        return Shown(revision, input_offset, input_offset < 0)
    return Shown(revision, max(before.input_offset, input_offset), before.repaired or input_offset < 0)


def truth(kafka: MemoryKafka, key: SeriesKey, partition: int = 0) -> list[tuple[int, int, int, str]]:
    """(key, revision, offset, JSON) of every final row of a series in topic order, without what was sent again."""
    known: dict[int, Shown] = {}
    found = []
    names = BAR_FIELDS if key.timeframe_s else TRADE_FIELDS
    for offset, value in enumerate(kafka.log(key.channel, partition)):
        frame = CODECS[key.channel].decode(value)
        columns = [frame.columns[name].tolist() for name in names]
        for place, values in enumerate(zip(*columns, strict=True)):
            if frame.symbols[frame.columns["symbol_code"][place]] != key.instrument:
                continue
            if key.timeframe_s and (frame.columns["timeframe_s"][place] != key.timeframe_s or not values[14]):
                continue
            revision = values[13] if key.timeframe_s else 0
            before = known.get(values[0])
            if before is not None and not (key.timeframe_s and before.is_news(revision, frame.input_offset)):
                continue
            known[values[0]] = seen(before, revision, frame.input_offset)
            text = row_json(bar_row(values) if key.timeframe_s else trade_row(values))
            found.append((values[0], revision, offset, text))
    return found


class MemoryHistory:
    """`api.deps.HistoryStore` that answers with what it was given; ``queries`` records what was asked."""

    def __init__(self, answers: Mapping[str, bytes] | None = None) -> None:
        self.answers = dict(answers or {})
        self.queries: list[tuple[str, Mapping[str, Any], str]] = []
        self.reachable = True
        self.hangs = "nothing"
        """A query that holds this never answers."""

    async def fetch(self, sql: str, parameters: Mapping[str, Any], fmt: str) -> bytes:
        self.queries.append((sql, parameters, fmt))
        await asyncio.sleep(0)
        if self.hangs in sql:
            await asyncio.sleep(3600)
        if not self.reachable:
            raise StoreUnavailableError("clickhouse", "ClickHouse is away.")
        return next((answer for part, answer in self.answers.items() if part in sql), b"")

    @asynccontextmanager
    async def stream(self, sql: str, parameters: Mapping[str, Any], fmt: str) -> AsyncIterator[AsyncIterator[bytes]]:
        answer = await self.fetch(sql, parameters, fmt)

        async def pieces() -> AsyncIterator[bytes]:
            yield answer

        yield pieces()

    async def ping(self) -> None:
        await self.fetch("SELECT 1", {}, "TSV")


class MemorySymbols:
    """`api.deps.SymbolStore` over a list."""

    def __init__(self, *keys: str) -> None:
        self.rows = [{"exchange": key.split(":")[0], "symbol": key.split(":")[1], "active": True} for key in keys]
        self.reachable = True

    async def symbols(self) -> Sequence[Mapping[str, Any]]:
        if not self.reachable:
            raise StoreUnavailableError("postgres", "PostgreSQL is away.")
        return self.rows

    async def ping(self) -> None:
        await self.symbols()
