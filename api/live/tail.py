"""The live tail of one partition: records in offset order in, rows to the series that follow it out; keeps the newest records in a ring."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence

from api.deps import Record
from api.live.extract import rows_of
from api.live.openbars import OpenBars
from api.live.series import Series
from schemas.errors import DecodeError
from schemas.frames import Frame

logger = logging.getLogger(__name__)


class Tail:
    """Where the process stands in one partition.

    Args:
        topic, partition: whose tail.
        decode: record -> frame; raises DecodeError.
        ring_bytes: bound of the ring.
        needs_history: called with a series that met rows only ClickHouse can judge, at the record where it did; it follows no longer.
    """

    def __init__(
        self,
        topic: str,
        partition: int,
        decode: Callable[[Record], Frame],
        ring_bytes: int,
        needs_history: Callable[[Series], None],
    ) -> None:
        self.topic = topic
        self.partition = partition
        self.next_offset = -1
        """Offset of the next record; -1 before the first."""
        self.begun = asyncio.Event()
        self.bad_records = 0
        self.newest_ms = -1
        self._decode = decode
        self._needs_history = needs_history
        self._ring: deque[Record] = deque()
        self._ring_bytes = ring_bytes
        self._ring_size = 0
        self._frames: dict[int, tuple[Record, Frame]] = {}
        """Offset -> record of the ring, decoded. Two hundred series that catch up at once read the same records; decoding costs 30-90 us."""
        self._followers: dict[str, dict[int, Series]] = {}
        self._open_bars = OpenBars()

    @property
    def ring_start(self) -> int:
        """Offset of the oldest record in the ring; ``next_offset`` when it is empty."""
        return self._ring[0].offset if self._ring else self.next_offset

    def ring_from(self, offset: int) -> list[Record]:
        """Records of the ring from ``offset`` on."""
        skip = max(0, offset - self.ring_start)
        return [record for place, record in enumerate(self._ring) if place >= skip]

    def begin(self, offset: int) -> None:
        """The tail starts or jumps: forget what was before."""
        self._ring.clear()
        self._frames.clear()
        self._ring_size = 0
        self.next_offset = offset
        self.begun.set()

    def follower(self, instrument: str, timeframe_s: int) -> Series | None:
        """The series that follows live, if any."""
        return self._followers.get(instrument, {}).get(timeframe_s)

    def followers(self) -> list[Series]:
        """All of them."""
        return [series for by_timeframe in self._followers.values() for series in by_timeframe.values()]

    def follow(self, series: Series) -> None:
        """Feed ``series`` from now on; its position is where the tail stands."""
        self._followers.setdefault(series.key.instrument, {})[series.key.timeframe_s] = series

    def unfollow(self, series: Series) -> None:
        """Feed it no longer."""
        by_timeframe = self._followers.get(series.key.instrument, {})
        if by_timeframe.get(series.key.timeframe_s) is series:
            del by_timeframe[series.key.timeframe_s]
            if not by_timeframe:
                del self._followers[series.key.instrument]

    def take(self, record: Record) -> None:
        """One new record, ``record.offset == next_offset``."""
        self.next_offset = record.offset + 1
        self.newest_ms = record.timestamp_ms
        self._ring.append(record)
        self._ring_size += len(record.value)
        while self._ring_size > self._ring_bytes and len(self._ring) > 1:
            old = self._ring.popleft()
            self._ring_size -= len(old.value)
            self._frames.pop(old.offset, None)
        if self._followers or self.topic == "bars":
            frame = self._frame(record)
            if frame is not None:
                self._feed(record, frame, self._followers, live=True)
                if self.topic == "bars":
                    self._open_bars.take(frame)

    def complete(self, series: Series) -> None:
        """Tell a series that stands where the tail stands of its open bar, which may be older than what the series has read."""
        found = self._open_bars.find(series.key.instrument, series.key.timeframe_s) if series.key.timeframe_s else None
        if found is not None:
            series.offer_open(*found)

    def feed(self, record: Record, wanted: dict[str, dict[int, Series]]) -> Sequence[tuple[Series, list[int]]]:
        """Feed one record to ``wanted``; the series that first need ClickHouse's word on some keys are returned, unfed."""
        frame = self._frame(record)
        return [] if frame is None else self._feed(record, frame, wanted)

    def _frame(self, record: Record) -> Frame | None:
        try:
            return self._decode(record)
        except DecodeError as exc:
            self.bad_records += 1
            logger.warning("Record %s[%d]@%d cannot be read and is skipped: %s", self.topic, self.partition, record.offset, exc)
            return None

    def _feed(
        self, record: Record, frame: Frame, wanted: dict[str, dict[int, Series]], *, live: bool = False
    ) -> Sequence[tuple[Series, list[int]]]:
        """As :meth:`feed`; with ``live`` series that need ClickHouse are handed to ``needs_history`` and follow no longer."""
        stuck: list[tuple[Series, list[int]]] = []
        for series, rows in rows_of(frame, self.topic, wanted):
            if record.offset >= series.position.offset and (keys := series.unknown(record.offset, frame.input_offset, rows)):
                stuck.append((series, keys))
                if live:
                    series.advance(record.offset)
                    self.unfollow(series)
                    self._needs_history(series)
                continue
            series.feed(record.offset, frame.input_offset, rows)
        return stuck
