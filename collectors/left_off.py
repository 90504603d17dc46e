"""Where a collector left off, from what it published: the newest frames of ``trades`` and ``gaps`` in; what to go on with, by symbol, out. Pure.

Of every symbol: its newest trade, up to where its feed was promised to be complete, its growing interval, the stretch of which nobody knew,
and its open gaps. A hole among the published ids that no row of the ledger speaks of (the collector died between the rows after a gap and
the gap's own row) is an open gap as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

from collectors.coverage import UNKNOWN_ID, OpenGap, Resume
from collectors.dedupe import RESET_AFTER_BREAK_US, RESET_AFTER_US, base_of
from schemas.frames import GAP_COMPLETE, GAP_OPEN, HISTORY, Frame
from schemas.partitions import partition_of

MAX_HOLES: Final = 4_096
"""Holes remembered per symbol; the oldest of more are no longer looked for."""


class _Run(NamedTuple):
    """Published ids ``[first, last]`` without a hole, and the times of both."""

    first: int
    last: int
    first_us: int
    last_us: int


@dataclass(slots=True)
class _Symbol:
    """What is known of a symbol."""

    trade_id: int = -1
    time_us: int = 0
    holes: list[_Run] = field(default_factory=list)  # ids that were jumped over, between the times of their neighbours
    open: dict[int, OpenGap] = field(default_factory=dict)
    told: list[tuple[int, int]] = field(default_factory=list)  # ids that rows of the ledger speak of, or that were published later
    interval: tuple[int, int, int] = (-1, 0, 0)  # id, start, end
    newest_gap_id: int = -1  # of rows and notices of any state
    noticed: dict[int, int] = field(default_factory=dict)  # gaps told open in the trades and not ended there: their starts
    ended: set[int] = field(default_factory=set)  # gaps whose end was told in the trades
    named: set[int] = field(default_factory=set)  # gaps the ledger has a row of


class LeftOff:
    """Learns from frames in the order of their offsets.

    Args:
        exchange: only sources ``<exchange>/ws/...`` are looked at.
        partitions: of the topics.
        consecutive: whether a hole in published ids is a loss.
    """

    def __init__(self, exchange: str, partitions: int, *, consecutive: bool = True) -> None:
        self._prefix = f"{exchange}/ws/"
        self._partitions = partitions
        self._consecutive = consecutive
        self._symbols: dict[str, _Symbol] = {}
        self._promised: dict[int, dict[str, int]] = {}  # partition -> source -> its newest watermark

    def trades(self, partition: int, frame: Frame) -> None:
        """A frame of topic ``trades``."""
        if not frame.source.startswith(self._prefix):
            return
        if not frame.flags & HISTORY:
            promised = self._promised.setdefault(partition, {})
            promised[frame.source] = max(frame.watermark_us, promised.get(frame.source, 0))
        for notice in frame.gaps:
            symbol = self._of(frame.symbols[notice.symbol_code])
            symbol.newest_gap_id = max(symbol.newest_gap_id, notice.gap_id)
            if notice.state == GAP_OPEN:
                symbol.noticed[notice.gap_id] = notice.start_time_us
            else:
                symbol.noticed.pop(notice.gap_id, None)
                symbol.ended.add(notice.gap_id)
        if not frame.row_count:
            return
        codes, ids, times = frame.columns["symbol_code"], frame.columns["trade_id"], frame.columns["exchange_time_us"]
        order = np.lexsort((ids, codes))
        codes, ids, times = codes[order], ids[order], times[order]
        breaks = np.flatnonzero((codes[1:] != codes[:-1]) | (ids[1:] > ids[:-1] + 1)) + 1
        starts, ends = np.concatenate(([0], breaks)), np.concatenate((breaks, [len(codes)])) - 1
        for code, first, last, first_us, last_us in zip(
            codes[starts].tolist(), ids[starts].tolist(), ids[ends].tolist(), times[starts].tolist(), times[ends].tolist(), strict=True
        ):
            self._run(self._of(frame.symbols[code]), _Run(first, last, first_us, last_us), past=bool(frame.flags & HISTORY))

    def gaps(self, frame: Frame) -> None:
        """A frame of topic ``gaps``."""
        if not frame.source.startswith(self._prefix):
            return
        names = (
            "symbol_code",
            "gap_id",
            "first_missing_id",
            "last_missing_id",
            "start_time_us",
            "end_time_us",
            "evidence",
            "state",
            "recovered",
        )
        for code, gap_id, first, last, start, end, evidence, state, recovered in zip(
            *(frame.columns[name].tolist() for name in names), strict=True
        ):
            if gap_id < 0:
                continue
            symbol = self._of(frame.symbols[code])
            symbol.newest_gap_id = max(symbol.newest_gap_id, gap_id)
            symbol.named.add(gap_id)
            if first >= 0:  # neighbours in ids may be the other way round in time; only what has no ids may have no end
                start, end = min(start, end), max(start, end)
            if state == GAP_OPEN:
                symbol.open[gap_id] = OpenGap(gap_id, first, last, start, end, evidence, recovered)
            else:
                symbol.open.pop(gap_id, None)
            if state == GAP_COMPLETE and not evidence and end >= symbol.interval[2]:
                symbol.interval = gap_id, start, end
            if first >= 0:
                symbol.told.append((first, last))

    def stored(self, key: str, trade_id: int, time_us: int) -> None:
        """The newest trade of an instrument in the store; counts for symbols of which no frame told."""
        symbol = self._of(key)
        if symbol.trade_id < 0:
            symbol.trade_id, symbol.time_us = trade_id, time_us

    def resumes(self, oldest_us: int = 0) -> dict[str, Resume]:
        """What to go on with, by instrument key. A symbol whose newest trade is older than ``oldest_us`` starts anew; its gaps go on."""
        return {
            key: self._resume(key, symbol, oldest_us)
            for key, symbol in self._symbols.items()
            if symbol.trade_id >= 0 or symbol.open or symbol.newest_gap_id >= 0
        }

    def _of(self, key: str) -> _Symbol:
        symbol = self._symbols.get(key)
        if symbol is None:
            symbol = self._symbols[key] = _Symbol()
        return symbol

    def _run(self, symbol: _Symbol, run: _Run, *, past: bool) -> None:
        newer_us = run.last_us - symbol.time_us
        if symbol.trade_id >= 0 and base_of(run.first) > base_of(symbol.trade_id):
            symbol.holes.clear()  # a numbering of its own: between the two there is no hole, but before its first may be one
            first = base_of(run.first) + 1
            if first < run.first:
                symbol.holes.append(_Run(first, run.first - 1, symbol.time_us, run.first_us))
            symbol.trade_id = -1
        anew = newer_us > RESET_AFTER_US or (newer_us > RESET_AFTER_BREAK_US and 2 * run.last <= symbol.trade_id)
        if run.last < symbol.trade_id and anew and not past:
            symbol.holes.clear()  # the venue's ids started anew
            symbol.trade_id = -1
        if symbol.holes and run.first <= symbol.trade_id:
            symbol.told.append((run.first, run.last))
        if past or run.last <= symbol.trade_id:
            return
        if 0 <= symbol.trade_id < run.first - 1:
            symbol.holes.append(_Run(symbol.trade_id + 1, run.first - 1, symbol.time_us, run.first_us))
            del symbol.holes[:-MAX_HOLES]
        symbol.trade_id, symbol.time_us = run.last, run.last_us

    def _resume(self, key: str, symbol: _Symbol, oldest_us: int) -> Resume:
        orphans = tuple((gap_id, start_us) for gap_id, start_us in symbol.noticed.items() if gap_id not in symbol.named)
        # what a numbering that is no more still lacked nobody can be asked for
        past = {gap.gap_id for gap in symbol.open.values() if 0 <= gap.first_id < base_of(max(symbol.trade_id, 0))}
        known = [gap for gap in symbol.open.values() if gap.first_id >= 0 and gap.gap_id not in past]
        unknown = sorted((gap for gap in symbol.open.values() if gap.first_id < 0 or gap.gap_id in past), key=lambda gap: gap.start_time_us)
        if symbol.trade_id < 0 or symbol.time_us < oldest_us:
            return Resume(-1, 0, newest_gap_id=symbol.newest_gap_id, orphans=orphans, gaps=tuple(known), strays=tuple(unknown))
        lost = next((gap for gap in unknown if gap.end_time_us < gap.start_time_us), None)
        promised = self._promised.get(partition_of(key, self._partitions), {})
        interval_id, since_us, _ = symbol.interval
        return Resume(
            symbol.trade_id,
            symbol.time_us,
            watched_until_us=min(promised.values(), default=0),
            interval_id=interval_id if since_us <= symbol.time_us else -1,
            interval_since_us=since_us,
            lost_id=lost.gap_id if lost else -1,
            lost_since_us=lost.start_time_us if lost else 0,
            lost_ended=lost is not None and lost.gap_id in symbol.ended,
            newest_gap_id=symbol.newest_gap_id,
            orphans=orphans,
            gaps=tuple(sorted([*known, *self._untold(symbol), *_between(symbol, known)], key=lambda gap: gap.first_id)),
            strays=tuple(gap for gap in unknown if gap is not lost),
        )

    def _untold(self, symbol: _Symbol) -> Iterable[OpenGap]:
        """Holes among the published ids that no row of the ledger speaks of."""
        if not self._consecutive:
            return
        told = sorted(symbol.told)
        for hole in symbol.holes:
            for first, last in without(hole.first, hole.last, told):
                yield OpenGap(UNKNOWN_ID, first, last, hole.first_us, hole.last_us, 0)


def _between(symbol: _Symbol, known: list[OpenGap]) -> Iterable[OpenGap]:
    """What lies before open gaps that begin after the newest published trade: the process before had it, and did not get it out."""
    newest, time_us = symbol.trade_id, symbol.time_us
    for gap in sorted(known, key=lambda gap: gap.first_id):
        if gap.last_id <= newest:
            continue
        first = newest + 1 if base_of(gap.first_id) == base_of(newest) else base_of(gap.first_id) + 1
        if first < gap.first_id:
            yield OpenGap(UNKNOWN_ID, first, gap.first_id - 1, time_us, gap.start_time_us, 0)
        newest, time_us = gap.last_id, gap.end_time_us


def without(first: int, last: int, told: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """``[first, last]`` without the intervals of ``told`` (sorted), as intervals."""
    found = []
    for low, high in told:
        if high < first or low > last:
            continue
        if low > first:
            found.append((first, low - 1))
        first = max(first, high + 1)
    if first <= last:
        found.append((first, last))
    return found
