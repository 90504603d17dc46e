"""What was seen already: rows of a topic in, a verdict per row out, so that a client gets each trade and each row of a bar once.

Producers deliver at least once and files are replayed twice: the same trade id, the same row of a bar may stand in a topic several times.
The first one counts. Memory is bounded, so a filter knows everything above its ``floor`` and answers UNKNOWN below it; the caller then asks
ClickHouse, which knows all, and tells :meth:`learn`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Final, NamedTuple

MAX_INTERVALS: Final = 2_048
"""Gaps in trade ids a series remembers: 2,048 pairs are 130 kB; ids of most venues have none."""
MAX_BARS: Final = 1_024
"""Final bars whose rows a series remembers: 17 minutes of 1 s bars, well over the window in which bars are revised."""
MAX_LATE: Final = 4_096
"""Rows below the floor that a series admitted itself; the store learns of them within a second, long before they are pushed out."""
_UNSURE: Final = -2
"""In place of an input offset: a row of the snapshot, which does not say who made it."""


class Verdict(Enum):
    """What a row is to the stream."""

    FRESH = 1
    DUPLICATE = 2
    UNKNOWN = 3


class TradeFilter:
    """Trade ids seen, as closed intervals in ascending order.

    Args:
        floor: ids up to and including this one are not known here. ``None``: nothing came before, every id is known to be new.
    """

    def __init__(self, floor: int | None = None) -> None:
        self.floor = floor
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._late: dict[int, None] = {}
        self._learnt: dict[int, bool] = {}

    def judge(self, trade_id: int) -> Verdict:
        """The verdict on an id; changes nothing."""
        if self._ends and trade_id > self._ends[-1]:
            return Verdict.FRESH
        if trade_id in self._late:
            return Verdict.DUPLICATE
        if trade_id in self._learnt:
            return Verdict.DUPLICATE if self._learnt[trade_id] else Verdict.FRESH
        if self.floor is not None and trade_id <= self.floor:
            return Verdict.UNKNOWN
        place = bisect_left(self._ends, trade_id)
        seen = place < len(self._ends) and self._starts[place] <= trade_id
        return Verdict.DUPLICATE if seen else Verdict.FRESH

    def admit(self, trade_id: int) -> bool:
        """Note an id as seen; whether it was fresh. UNKNOWN counts as seen unless it was learnt."""
        ends = self._ends
        if ends and trade_id == ends[-1] + 1:  # nearly every trade
            ends[-1] = trade_id
            return True
        verdict = self.judge(trade_id)
        if verdict is not Verdict.FRESH:
            return False
        if self.floor is not None and trade_id <= self.floor:
            self._late[trade_id] = None
            if len(self._late) > MAX_LATE:
                del self._late[next(iter(self._late))]
            return True
        self._insert(trade_id)
        return True

    def learn(self, asked: Iterable[int], seen: set[int]) -> None:
        """Take over what ClickHouse said about unknown ids; forgets earlier answers, so memory stays bounded by one record."""
        self._learnt = {trade_id: trade_id in seen for trade_id in asked}

    def seed(self, ids: Iterable[int]) -> None:
        """Note ids as seen."""
        for trade_id in sorted(ids):
            if self.floor is None or trade_id > self.floor:
                self._insert(trade_id)

    def _insert(self, trade_id: int) -> None:
        starts, ends = self._starts, self._ends
        if ends and trade_id == ends[-1] + 1:
            ends[-1] = trade_id
            return
        place = bisect_left(ends, trade_id)
        if place < len(ends) and starts[place] <= trade_id:
            return
        joins_left = place > 0 and ends[place - 1] + 1 == trade_id
        joins_right = place < len(starts) and starts[place] == trade_id + 1
        if joins_left and joins_right:
            ends[place - 1] = ends[place]
            del starts[place], ends[place]
        elif joins_left:
            ends[place - 1] = trade_id
        elif joins_right:
            starts[place] = trade_id
        else:
            starts.insert(place, trade_id)
            ends.insert(place, trade_id)
            if len(ends) > MAX_INTERVALS:
                self.floor = ends[0]
                del starts[0], ends[0]


class Shown(NamedTuple):
    """Which final rows of a bar were seen, of their newest revision."""

    revision: int
    input_offset: int = -1
    """An input of the worker's rows; -1: none is the worker's."""
    repaired: bool = False
    """Whether the repair's row is among them."""

    def is_news(self, revision: int, input_offset: int) -> bool:
        """Whether a row that was made of that input (-1: by the repair) was not seen yet, and replaces what was.

        The repair and the worker may publish one revision each: a bar the repair closed while the worker was away. The later one is valid.
        Each sends its own again only as it was: the worker raises the revision of what it changes, the repair looks at what is stored first.
        """
        if revision != self.revision:
            return revision > self.revision
        return self.input_offset < 0 if input_offset >= 0 else not self.repaired


class BarFilter:
    """Rows seen of each final bar, by open time, and the open bar's state.

    Args:
        floor_us: bars that open at or before this time are not known here. ``None``: nothing came before.
    """

    def __init__(self, floor_us: int | None = None) -> None:
        self.floor = floor_us
        self.newest_us: int | None = None
        self._shown: dict[int, Shown] = {}
        self._late: dict[int, Shown] = {}
        self._learnt: dict[int, Shown | None] = {}
        self._open_us = -(2**63)
        self._open_input = -1

    def judge(self, open_time_us: int, revision: int, input_offset: int) -> Verdict:
        """The verdict on a final row; changes nothing."""
        known = self._known(open_time_us)
        if known is not None and not known.is_news(revision, input_offset):
            return Verdict.DUPLICATE
        if open_time_us in self._learnt:
            return Verdict.FRESH
        if open_time_us in self._shown:
            unsure = known is not None and known.input_offset == _UNSURE and known.revision == revision
            return Verdict.UNKNOWN if unsure else Verdict.FRESH
        return Verdict.UNKNOWN if self.floor is not None and open_time_us <= self.floor else Verdict.FRESH

    def admit(self, open_time_us: int, revision: int, input_offset: int) -> bool:
        """Note a final row as seen; whether it was fresh. UNKNOWN counts as seen unless it was learnt."""
        if self.judge(open_time_us, revision, input_offset) is not Verdict.FRESH:
            return False
        row = Shown(revision, max(input_offset, -1), input_offset < 0)
        seen = _joined(self._known(open_time_us), row)
        if self.floor is not None and open_time_us <= self.floor:
            self._late[open_time_us] = seen
            if len(self._late) > MAX_LATE:
                del self._late[next(iter(self._late))]
            return True
        self._note(open_time_us, seen)
        return True

    def admit_open(self, open_time_us: int, input_offset: int) -> bool:
        """Whether a row of an open bar is news: its bar is not final yet and it was made from no older input than the last one shown."""
        if self.newest_us is not None and open_time_us <= self.newest_us:
            return False
        if open_time_us < self._open_us or (open_time_us == self._open_us and input_offset < self._open_input):
            return False
        self._open_us = open_time_us
        self._open_input = input_offset
        return True

    def learn(self, asked: Iterable[int], seen: Mapping[int, Shown]) -> None:
        """Take over what ClickHouse said about unknown open times: rows stored, if any."""
        self._learnt = {open_time_us: seen.get(open_time_us) for open_time_us in asked}

    def seed(self, bars: Iterable[tuple[int, int]]) -> None:
        """Note ``(open_time_us, revision)`` as seen; which rows of the revision they were only the store knows."""
        for open_time_us, revision in bars:
            if self.floor is None or open_time_us > self.floor:
                self._note(open_time_us, Shown(revision, _UNSURE))

    def _known(self, open_time_us: int) -> Shown | None:
        known = self._shown.get(open_time_us) or self._late.get(open_time_us)
        learnt = self._learnt.get(open_time_us)
        return known if learnt is None else _joined(known, learnt)

    def _note(self, open_time_us: int, seen: Shown) -> None:
        self._shown[open_time_us] = seen
        if self.newest_us is None or open_time_us > self.newest_us:
            self.newest_us = open_time_us
        if len(self._shown) > MAX_BARS:
            oldest = next(iter(self._shown))  # first noted; min() would cost 20 us a bar
            self.floor = oldest if self.floor is None else max(self.floor, oldest)
            del self._shown[oldest]


def _joined(known: Shown | None, more: Shown) -> Shown:
    if known is None or known.revision < more.revision:
        return more
    if known.revision > more.revision:
        return known
    return Shown(known.revision, max(known.input_offset, more.input_offset), known.repaired or more.repaired)
