"""Repaired bars beside the trades ClickHouse holds: frames of the repair in; what became of their bars, symbol by symbol and day by day, out.

Nothing of the frames is kept but their symbols and days. The bars are read and made anew as the repair reads and makes them: a day of one
symbol at a time, its trades in pages. Blocking; may raise ClickHouseError.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from infra.parity_compare import LiveRecord
from infra.parity_repaired import (
    KNOWN_LATER,
    NOT_RETAINED,
    REPAIRED,
    TAKEN_AWAY,
    Columns,
    RepairedFindings,
    Wrong,
    compare_repaired,
    newest_of,
    only,
)
from infra.parity_repairs import Answer, Answers
from infra.parity_rows import Difference, RowKey
from infra.repair_reader import RepairReader
from processors.reconcile import Evidence, rebuild
from schemas.timeframes import MAX_TIME_US, NAME_BY_SECONDS, TIMEFRAMES, US_PER_SECOND

MOST_DIFFERENCES: Final = 50
_DAY_US: Final = 86_400 * US_PER_SECOND
_WRONG: Final = "was published by the repair and is not the bar of its trades"
_NO_BAR: Final = "was published by the repair, and no trade stored makes such a bar"
_NO_JOB: Final = ", and no job answers for what changed them since"


class Day(NamedTuple):
    """Bars of one symbol that open on one day."""

    partition: int
    instrument: str
    """``exchange:symbol``."""
    day: int
    """Since the epoch."""


class Stretch(NamedTuple):
    """Records of ``bars`` of one partition: ``[first, stop)``."""

    first: int
    stop: int


class RepairedDays:
    """Notes which days of which symbols the repair touched in a run; 100 bytes each."""

    def __init__(self) -> None:
        self.days: set[Day] = set()
        self.stretches: dict[int, Stretch] = {}
        """Partition -> the run's records that ClickHouse holds."""
        self.unstored = 0
        """Rows that the sink has not stored yet."""

    def begin(self, partition: int, first: int, stop: int, stored: int) -> Callable[[LiveRecord], None]:
        """Takes the records of a partition's run ``[first, stop)``, in order; those from ``stored`` on are not in ClickHouse yet."""
        held = Stretch(max(first, 0), max(min(stop, stored), 0))
        self.stretches[partition] = held

        def take(live: LiveRecord) -> None:
            frame = live.frame
            if frame.input_offset >= 0 or live.offset >= stop or not frame.row_count:
                return
            if live.offset >= held.stop:
                self.unstored += frame.row_count
                return
            days = frame.columns["open_time_us"] // _DAY_US
            pairs = np.unique(np.stack([frame.columns["symbol_code"].astype(np.int64), days], axis=1), axis=0)
            self.days.update(Day(partition, frame.symbols[code], day) for code, day in pairs.tolist())

        return take


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What a comparison works with."""

    reader: Callable[[Day, int | None], RepairedReader]
    """Makes the reader of a day's symbol, as of a time (as if nothing had been published later), or None: as of now."""
    answers: Answers
    """How far the jobs of the repair are with a bar."""
    stretches: Mapping[int, Stretch]
    """Partition -> records of the run."""
    kept_from_us: int
    """Older trades may have been deleted by their age; 0: none is."""


def check_days(look: Look, days: Iterable[Day]) -> dict[Day, RepairedFindings]:
    """The findings of each day, in order."""
    return {day: check_day(look, day) for day in sorted(days)}


def check_day(look: Look, day: Day) -> RepairedFindings:
    """What became of the bars of one day."""
    reader = look.reader(day, None)
    published = reader.repaired(day.day * _DAY_US, (day.day + 1) * _DAY_US, day.partition, look.stretches[day.partition])
    found = RepairedFindings(bars=len(published["open"]))
    if not found.bars:
        return found
    made, evidence = _truth(reader, published)
    wrong = compare_repaired(published, made, evidence)
    found.equal = found.bars - len(wrong)
    if not wrong:
        return found
    states = {one.row: _answered(look, day, published, one.row) for one in wrong}
    then = _right_then(look, day, published, made, wrong, states)
    gone = _not_comparable(look, day, published, wrong)
    for one in wrong:
        reason = gone.get(one.row, "")
        if not reason and one.row in then and not one.in_values:
            reason = KNOWN_LATER
        if states[one.row].is_open and one.row in then:
            found.pending += 1
        elif reason:
            found.explained[reason] += 1
        else:
            found.unexplained += 1
            if len(found.differences) < MOST_DIFFERENCES:
                found.differences.append(_difference(day, published, one, late=one.row in then))
    return found


def _answered(look: Look, day: Day, published: Columns, row: int) -> Answer:
    flat = int(published["trade_count"][row]) == 0
    return look.answers(day.instrument, int(published["open_time_us"][row]), _close_us(published, row), flat)


def _right_then(look: Look, day: Day, published: Columns, made: Columns, wrong: list[Wrong], states: Mapping[int, Answer]) -> set[int]:
    """Rows that were right by what was known when they were published, or when the newest job that is done with them was ordered.

    The repair sees all that was known when its job was ordered; what was learned until it published it may have seen.
    """
    asked: dict[int, list[Wrong]] = {}
    for one in wrong:
        ordered_us, is_open = states[one.row]
        published_us = int(published["known_at_us"][one.row])
        for time_us in {published_us} if is_open else {ordered_us, max(ordered_us, published_us)} - {0}:
            asked.setdefault(time_us, []).append(one)
    right: set[int] = set()
    for time_us, some in asked.items():
        reader, rows = look.reader(day, time_us), only(published, (one.row for one in some))
        if any(one.in_values for one in some):
            bars, evidence = _truth(reader, rows)
        else:
            bars, evidence = made, _evidence(reader, *_span(rows))
        left = {one.row for one in compare_repaired(rows, bars, evidence)}
        right |= {one.row for place, one in enumerate(some) if place not in left}
    return right


def _not_comparable(look: Look, day: Day, published: Columns, wrong: list[Wrong]) -> dict[int, str]:
    """Row -> why the trades cannot tell what the bar should be; rows of which they can are left out."""
    gone = {one.row: NOT_RETAINED for one in wrong if published["open_time_us"][one.row] < look.kept_from_us}
    closes = {one.row: _close_us(published, one.row) for one in wrong if not one.columns and one.row not in gone}
    if not closes:
        return gone
    reader, asked = look.reader(day, None), sorted(set(closes.values()))
    place = bisect_left(asked, True, key=lambda close_us: reader.before(close_us) is not None)  # seventeen questions for a day of seconds
    first_us = asked[place] if place < len(asked) else MAX_TIME_US
    _, held_us = reader.held_back(0, asked[-1])
    for row, close_us in closes.items():
        if close_us >= first_us:
            continue
        if look.kept_from_us and published["trade_count"][row] == 0:
            gone[row] = NOT_RETAINED  # the trade whose price it carries on was older still
        elif len(held_us) and held_us.min() < close_us:
            gone[row] = TAKEN_AWAY
    return gone


def _difference(day: Day, published: Columns, wrong: Wrong, *, late: bool) -> Difference:
    row = wrong.row
    seconds, open_us, revision = (int(published[name][row]) for name in ("timeframe_s", "open_time_us", "revision"))
    key = RowKey(day.instrument, seconds, open_us, revision, 1)
    what = (_WRONG if wrong.columns else _NO_BAR) + (_NO_JOB if late else "")
    place = {"bars_offset": int(published["kafka_offset"][row]), "input_offset": int(published["input_offset"][row])}
    return Difference(what=what, partition=day.partition, key=key, columns=wrong.columns, **place)


def _close_us(published: Columns, row: int) -> int:
    return int(published["open_time_us"][row]) + int(published["timeframe_s"][row]) * US_PER_SECOND


class RepairedReader(RepairReader):
    """Reads what the repair reads, and what it published."""

    def repaired(self, start_us: int, end_us: int, partition: int, stretch: Stretch) -> Columns:
        """Columns ``REPAIRED`` of the bars opening in ``[start_us, end_us)`` of which the repair published a row in that stretch."""
        names = ", ".join(name for name in REPAIRED if name != "was_complete")
        rows = "FROM bars WHERE {of} AND open_time_us >= {a:Int64} AND open_time_us < {b:Int64}"
        mine = "input_offset < 0 AND kafka_partition = {p:UInt16} AND kafka_offset >= {first:UInt64} AND kafka_offset < {stop:UInt64}"
        found = self._columns(
            f"SELECT {names} {rows} AND (timeframe_s, open_time_us) IN (SELECT timeframe_s, open_time_us {rows} AND {mine})"
            " ORDER BY timeframe_s, open_time_us, revision DESC, kafka_offset DESC LIMIT 2 BY timeframe_s, open_time_us",
            a=start_us,
            b=end_us,
            p=partition,
            first=stretch.first,
            stop=max(stretch.stop, 0),
        )
        return newest_of(found)


def _truth(reader: RepairReader, published: Columns) -> tuple[Columns, Evidence]:
    """(bars of the trades, evidence) over the time of these bars."""
    start_us, end_us = _span(published)
    held_ids, _ = reader.held_back(start_us, end_us)
    names = tuple(NAME_BY_SECONDS[one] for one in np.unique(published["timeframe_s"]).tolist() if one in NAME_BY_SECONDS)
    pages = reader.trades(start_us, end_us, reader.before(start_us), held_ids)
    return rebuild(pages, names or TIMEFRAMES[:1], end_us), _evidence(reader, start_us, end_us)


def _evidence(reader: RepairReader, start_us: int, end_us: int) -> Evidence:
    _, held_us = reader.held_back(start_us, end_us)
    return reader.evidence(start_us, end_us, reader.before(start_us), reader.after(end_us), held_us)


def _span(published: Columns) -> tuple[int, int]:
    """From the open of the first bar to the end of the last, whatever ends the rows themselves name."""
    width_us = published["timeframe_s"].astype(np.int64) * US_PER_SECOND
    return int((published["open_time_us"] // width_us * width_us).min()), int((published["open_time_us"] + width_us).max())
