"""What of a time range was collected: the algebra of the coverage ledger's intervals. Pure.

Comes in: rows of topic ``gaps`` of ONE instrument and channel, in the order they were published (Kafka offset). Goes out: sorted, disjoint
intervals that fill a range without a hole, each with its state and evidence, and ``unknown`` where nobody watched.

The newest row of a ``gap_id`` is valid; rows from before there were ids (``gap_id`` -1) each stand for themselves. A row of state
``complete`` covers ``[start, end)``. A gap covers both its ends: what is missing may have the very time of the row before or after it
(venues with millisecond clocks send dozens of trades with one time). A gap whose end lies before its start has no end yet.

Where rows overlap the worst counts: unfillable, then open, then filled, then complete. A gap inside an interval that is said to be
complete is thus a gap until it is filled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from schemas.frames import GAP_COMPLETE, GAP_FILLED, GAP_OPEN, GAP_UNFILLABLE
from schemas.timeframes import MAX_TIME_US

UNKNOWN: Final = -1
"""State of a stretch that no row speaks of: nobody watched."""
STATE_NAMES: Final = {UNKNOWN: "unknown", GAP_COMPLETE: "complete", GAP_OPEN: "open", GAP_FILLED: "filled", GAP_UNFILLABLE: "unfillable"}
EVIDENCE_NAMES: Final = {
    1: "id jump",
    2: "sequence",
    3: "heartbeat",
    4: "silence",
    5: "restart",
    6: "checksum",
    7: "request",
}
CHANNEL_NAMES: Final = {1: "trades", 2: "quotes", 3: "funding", 4: "open_interest"}

_RANK: Final = (GAP_UNFILLABLE, GAP_OPEN, GAP_FILLED, GAP_COMPLETE)
"""Which state counts where several rows speak of one moment, the first that is there."""
_HELD: Final = frozenset({GAP_COMPLETE, GAP_FILLED})

IntArray = npt.NDArray[np.int64]


class LedgerRow(NamedTuple):
    """One row of topic ``gaps`` of an instrument and channel; times in microseconds UTC."""

    gap_id: int
    start_time_us: int
    end_time_us: int
    """Before ``start_time_us``: no end yet."""
    state: int
    evidence: int = 0
    first_missing_id: int = -1
    last_missing_id: int = -1
    recovered: int = 0
    receive_time_us: int = 0
    """When it was written, by the collector's clock."""


class Interval(NamedTuple):
    """A stretch ``[start_us, end_us)`` of one state."""

    start_us: int
    end_us: int
    state: int
    evidence: tuple[int, ...] = ()
    """Codes of the gaps that give it its state, ascending; empty for complete and unknown."""

    @property
    def state_name(self) -> str:
        """``complete``, ``open``, ``filled``, ``unfillable`` or ``unknown``."""
        return STATE_NAMES[self.state]


def newest(rows: Iterable[LedgerRow]) -> list[LedgerRow]:
    """The valid rows: the last of each ``gap_id``, and every row without an id. Rows of a state nobody knows are left out."""
    named: dict[int, LedgerRow] = {}
    nameless: list[LedgerRow] = []
    for row in rows:
        if row.gap_id < 0:
            nameless.append(row)
        else:
            named[row.gap_id] = row
    return [row for row in (*nameless, *named.values()) if row.state in STATE_NAMES and row.state != UNKNOWN]


def extent(row: LedgerRow) -> tuple[int, int]:
    """``[start, end)`` of what a row speaks of, microseconds; a gap without an end reaches to the end of time."""
    if row.state == GAP_COMPLETE:
        return row.start_time_us, max(row.start_time_us, row.end_time_us)
    return row.start_time_us, MAX_TIME_US if row.end_time_us < row.start_time_us else row.end_time_us + 1


def timeline(rows: Iterable[LedgerRow], start_us: int, end_us: int) -> list[Interval]:
    """Intervals that fill ``[start_us, end_us)`` exactly, sorted, neighbours differing in state or evidence.

    Args:
        rows: of one instrument and channel, in the order they were published.
        start_us, end_us: microseconds UTC; an empty range gives no interval.
    """
    if end_us <= start_us:
        return []
    edges: dict[int, list[tuple[int, LedgerRow]]] = {}
    for row in newest(rows):
        low, high = extent(row)
        low, high = max(low, start_us), min(high, end_us)
        if low < high:
            edges.setdefault(low, []).append((1, row))
            edges.setdefault(high, []).append((-1, row))
    active: dict[int, Counter[int]] = {state: Counter() for state in _RANK}  # state -> evidence -> rows
    found: list[Interval] = []
    position = start_us
    for edge in sorted(edges.keys() | {end_us}):
        if edge > position:
            _append(found, Interval(position, edge, *_verdict(active)))
            position = edge
        for step, row in edges.get(edge, ()):
            counter = active[row.state]
            counter[row.evidence] += step
            if not counter[row.evidence]:
                del counter[row.evidence]
    return found


def _verdict(active: dict[int, Counter[int]]) -> tuple[int, tuple[int, ...]]:
    for state in _RANK:
        if active[state]:
            return state, tuple(sorted(active[state])) if state != GAP_COMPLETE else ()
    return UNKNOWN, ()


def _append(found: list[Interval], interval: Interval) -> None:
    if found and found[-1].state == interval.state and found[-1].evidence == interval.evidence:
        found[-1] = found[-1]._replace(end_us=interval.end_us)
    else:
        found.append(interval)


def covered(rows: Iterable[LedgerRow], start_us: int, end_us: int) -> bool:
    """Whether everything traded in ``[start_us, end_us)`` is known to be held.

    Complete or filled throughout: no gap that is open or unfillable touches it, and somebody watched all the time. An empty range is covered.
    """
    return bool(covered_ranges(rows, np.array([start_us], np.int64), np.array([end_us], np.int64))[0])


def covered_ranges(rows: Iterable[LedgerRow], start_us: IntArray, end_us: IntArray) -> npt.NDArray[np.bool_]:
    """:func:`covered` of many ranges (the bars of a symbol) at the price of one timeline.

    Args:
        rows: of one instrument and channel, in the order they were published.
        start_us, end_us: int64, shape (n,), microseconds UTC: ``[start, end)`` of each range.

    Returns:
        bool, shape (n,).
    """
    if not len(start_us):
        return np.empty(0, np.bool_)
    held = spans(timeline(rows, int(start_us.min()), int(end_us.max())), _HELD)
    lows = np.array([low for low, _ in held], np.int64)
    highs = np.array([high for _, high in held], np.int64)
    place = np.searchsorted(lows, start_us, side="right") - 1
    inside = place >= 0
    inside[inside] = end_us[inside] <= highs[place[inside]]
    return inside | (end_us <= start_us)


def spans(intervals: Sequence[Interval], states: Iterable[int]) -> list[tuple[int, int]]:
    """``[start, end)`` of the stretches whose state is one of ``states``, neighbours joined."""
    wanted = frozenset(states)
    found: list[tuple[int, int]] = []
    for interval in intervals:
        if interval.state in wanted:
            if found and found[-1][1] == interval.start_us:
                found[-1] = found[-1][0], interval.end_us
            else:
                found.append((interval.start_us, interval.end_us))
    return found


def shares(intervals: Sequence[Interval]) -> dict[str, float]:
    """State name -> its share of the time of ``intervals``, 0..1; ``covered`` is what is complete or filled. No intervals: all 0."""
    lengths: Counter[int] = Counter()
    for interval in intervals:
        lengths[interval.state] += interval.end_us - interval.start_us
    total = sum(lengths.values())
    found = {name: lengths[state] / total if total else 0.0 for state, name in STATE_NAMES.items()}
    return {"covered": sum(lengths[state] for state in _HELD) / total if total else 0.0, **found}


def gaps_within(rows: Iterable[LedgerRow], start_us: int, end_us: int) -> list[LedgerRow]:
    """Valid rows of gaps (open, filled, unfillable) that touch ``[start_us, end_us)``, by start time."""
    found = []
    for row in newest(rows):
        low, high = extent(row)
        if row.state in (GAP_OPEN, GAP_FILLED, GAP_UNFILLABLE) and low < end_us and high > start_us:
            found.append(row)
    return sorted(found, key=lambda row: (row.start_time_us, row.gap_id))
