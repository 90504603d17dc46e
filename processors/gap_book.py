"""What is known to be missing of each symbol of a partition, and which bars that touches.

Comes in: gap notices of ``trades`` frames. Goes out: the ``complete`` column of bars with 0 where an open or unfillable interval touches one.
Everything follows from the notices in the order of the topic; the book is part of the state of its shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from schemas.frames import GAP_FILLED, GAP_OPEN, GAP_UNFILLABLE, Frame
from schemas.timeframes import MAX_TIME_US

Array = npt.NDArray[Any]

MAX_INTERVALS: Final = 64
"""Intervals remembered per symbol; beyond it the two oldest become one that spans both: rather a bar too many marked than one too few."""

FOLDED: Final = -1
"""Id of an interval that several became."""

MAX_SOURCES: Final = 8
"""Sources per symbol whose newest ended gap is remembered; the one that ended a gap longest ago is forgotten first."""


class Interval(NamedTuple):
    """A stretch of time of which trades are missing."""

    gap_id: int
    start_us: int
    """Time of the last row before it."""
    end_us: int
    """Time of the first row after it; before ``start_us`` while that row has not come."""
    source: str
    """Whose gap it is: what is long past for one source may be the present of another (a replay)."""
    is_lost: bool = False
    """It is unfillable: the last word on it."""


def touches(open_us: Array, close_us: Array, start_us: Array | int, end_us: Array | int) -> Array:
    """Whether bars ``[open, close)`` may lack trades of a gap between rows at ``start_us`` and ``end_us``; bool, shape of the arguments.

    Both ends count: what is missing may have the very time of the row before or after it (venues with millisecond clocks send dozens of
    trades with one time). ``end_us < start_us`` stands for a gap that has no end yet.
    """
    end = np.where(np.asarray(end_us) < np.asarray(start_us), MAX_TIME_US, end_us)
    return (close_us > start_us) & (open_us <= end)


class GapBook:
    """Open and unfillable intervals of the symbols of one partition.

    Frames come again: a spool sends its last ones twice after a crash, a new producer what was sent when an answer was lost. A notice that a
    gap opened would open it for ever where it ended meanwhile. Ids of gaps grow, and a gap is told of when it gets its id: a notice of an id not
    above the newest of its symbol and source that ended, and of no gap that is open, is an old one.

    Args:
        keep_us: an interval is forgotten when a new one of its symbol and source comes and it ended this long before that source's
            watermark: no bar that reaches back to it can be published any more.
    """

    def __init__(self, keep_us: int) -> None:
        self._keep_us = keep_us
        self._held: dict[str, list[Interval]] = {}
        self._ended: dict[str, dict[str, int]] = {}  # key -> source -> the newest id that ended

    def __len__(self) -> int:
        """Symbols of which anything is known."""
        return len(self._held.keys() | self._ended.keys())

    def apply(self, frame: Frame) -> None:
        """Take a frame's notices, in their order. Notices that make no sense (unknown state, a time out of range) change nothing."""
        for notice in frame.gaps:
            if not (0 <= notice.start_time_us < MAX_TIME_US and notice.end_time_us < MAX_TIME_US):
                continue
            key = frame.symbols[notice.symbol_code]
            if notice.state == GAP_FILLED:
                self._drop(key, notice.gap_id)
                self._end(key, frame.source, notice.gap_id)
            elif notice.state == GAP_UNFILLABLE or (notice.state == GAP_OPEN and self._may_open(key, frame.source, notice.gap_id)):
                is_lost = notice.state == GAP_UNFILLABLE
                interval = Interval(notice.gap_id, notice.start_time_us, notice.end_time_us, frame.source, is_lost)
                self._add(key, interval, frame.watermark_us - self._keep_us)
                if is_lost:
                    self._end(key, frame.source, notice.gap_id)

    def complete(self, symbols: tuple[str, ...], bars: dict[str, Array]) -> Array:
        """The ``complete`` column of ``bars`` (int8, shape (n,)), 0 where an interval touches a bar; the same array when none does."""
        column = bars["complete"]
        if not self._held or not len(column):
            return column
        mine = [self._held.get(key, ()) for key in symbols]
        depth = max(map(len, mine), default=0)
        codes, open_us, close_us = bars["symbol_code"], bars["open_time_us"], bars["close_time_us"]
        for level in range(depth):
            # one pass over the bars for all symbols: after a venue was away each of thousands has an interval
            start = np.array([held[level].start_us if level < len(held) else MAX_TIME_US for held in mine], np.int64)
            end = np.array([held[level].end_us if level < len(held) else MAX_TIME_US for held in mine], np.int64)
            column = np.where(touches(open_us, close_us, start[codes], end[codes]), np.int8(0), column)
        return column

    def to_state(self) -> list[list[Any]]:
        """The whole book as plain lists, for the shard's snapshot: [key, intervals, [source, newest id that ended] each]."""
        keys = dict.fromkeys([*self._held, *self._ended])
        return [
            [key, [list(interval) for interval in self._held.get(key, ())], [list(pair) for pair in self._ended.get(key, {}).items()]]
            for key in keys
        ]

    @classmethod
    def from_state(cls, keep_us: int, state: Sequence[Sequence[Any]]) -> GapBook:
        """The book that :meth:`to_state` gave, also before it told of what ended. Raises ValueError for what is none."""
        book = cls(keep_us)
        for key, held, *rest in state:
            intervals = [Interval(int(gap_id), int(start), int(end), str(source), any(lost)) for gap_id, start, end, source, *lost in held]
            ended = {str(source): int(gap_id) for source, gap_id in (rest[0] if rest else ())}
            known = bool(intervals or ended) and len(intervals) <= MAX_INTERVALS and len(ended) <= MAX_SOURCES
            if not isinstance(key, str) or not known or key in book._held or key in book._ended:
                raise ValueError("The gaps of this state contradict themselves.")
            if intervals:
                book._held[key] = intervals
            if ended:
                book._ended[key] = ended
        return book

    def _may_open(self, key: str, source: str, gap_id: int) -> bool:
        """Whether a notice of an open gap is no old one that came again."""
        if gap_id > self._ended.get(key, {}).get(source, -1):
            return True
        return any(interval.gap_id == gap_id and not interval.is_lost for interval in self._held.get(key, ()))

    def _end(self, key: str, source: str, gap_id: int) -> None:
        ended = self._ended.setdefault(key, {})
        ended[source] = max(gap_id, ended.pop(source, -1))  # the one told of last stands last
        if len(ended) > MAX_SOURCES:
            del ended[next(iter(ended))]

    def _drop(self, key: str, gap_id: int) -> None:
        left = [interval for interval in self._held.get(key, ()) if interval.gap_id != gap_id]
        if left:
            self._held[key] = left
        else:
            self._held.pop(key, None)

    def _add(self, key: str, interval: Interval, past_us: int) -> None:
        held = [
            old
            for old in self._held.get(key, ())
            if old.gap_id != interval.gap_id and not (old.source == interval.source and old.start_us <= old.end_us < past_us)
        ]
        held.append(interval)
        if len(held) > MAX_INTERVALS:
            _fold(held)
        self._held[key] = held


def _fold(held: list[Interval]) -> None:
    """Make the two oldest intervals that have an end one, which no notice ends: one of the two may be open when the other is filled.

    Bars it touches stay incomplete until it is too old to matter; the repair makes them anew from the ledger, which has both.
    """
    ended = [place for place, each in enumerate(held) if each.start_us <= each.end_us]
    place, other = ended[:2] if len(ended) > 1 else (0, 1)
    first, second = held[place], held.pop(other)
    ends = [MAX_TIME_US - 1 if each.end_us < each.start_us else each.end_us for each in (first, second)]
    held[place] = Interval(FOLDED, min(first.start_us, second.start_us), max(ends), second.source)
