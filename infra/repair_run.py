"""One symbol's jobs worked through: which bars are due, what of them differs, piece by piece of a day at most. Blocking, no Kafka.

A bar is due when no late trade can reach it any more: the worker revises bars itself for 30 s. What is not due yet (an hour that is still
open) is left to the next look. Everything is read after the sink has stored what was published before, so nothing is published twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from infra.repair_jobs import Job
from infra.repair_reader import RepairReader
from processors.bars import BarConfig
from processors.reconcile import rebuild, reconcile
from schemas.timeframes import US_PER_SECOND, timeframe_seconds

Columns = dict[str, npt.NDArray[Any]]

SETTLE_US: Final = BarConfig().revision_window_us + 5 * US_PER_SECOND
"""The worker revises a bar this long after it closed, and 5 s for its frames to be stored."""
_STILL_US: Final = 10 * US_PER_SECOND
"""A symbol whose newest bar was published longer ago is not moving: its source has ended or is away."""
_PRESENT_US: Final = 300 * US_PER_SECOND
_OF_PEOPLE: Final = ("replay", "backfill", "request")
_VOUCHER_US: Final = 150 * US_PER_SECOND
"""The ledger grows once a minute, a quiet symbol's next trade may take as long: younger bars that nobody vouches for yet wait."""
_NEXT_TRADE_US: Final = 86_400 * US_PER_SECOND
"""Flat bars carry the last price on until the next trade: a job goes that far, and waits so long for it, but no farther than a day. A trade
with a time of years ago would have it fill years with flat bars."""
_DAY_US: Final = 86_400 * US_PER_SECOND
_FAR_US: Final = 2**62


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Bars to compare in one go, all of one day."""

    spans: dict[int, list[tuple[int, int]]]
    """Timeframe in seconds -> ``[open of the first, end of the last)`` of stretches of bars."""
    start_us: int
    end_us: int
    done_us: int
    """Afterwards every bar of the plan that ends at or before this is compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a piece gave."""

    rows: Columns
    """Bars to publish, without ``symbol_code``."""
    newest: list[Columns]
    """The newest bar of each timeframe in ``rows`` whose rows are older than it: last word of the compacted twin."""
    checked: int
    waits_us: int | None
    """Bars that end at or after this wait for somebody to vouch for them; None: none does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What can be done now for some jobs of a symbol."""

    ranges: dict[int, tuple[int, int]]
    """Job id -> ``[start, end)``: its own, up to the next trade and no farther than there are bars."""
    starts: dict[int, int]
    """Job id -> bars that end at or before this are done."""
    limit_us: int
    """Bars that end at or before this are due."""
    moving: bool
    endless: frozenset[int]
    """Jobs whose next trade has not come yet."""


class SymbolRun:
    """One look at the jobs of a symbol.

    Args:
        reader: of that symbol.
        timeframes: those the worker makes.
        now_us: wall clock.
    """

    def __init__(self, reader: RepairReader, timeframes: tuple[str, ...], now_us: int) -> None:
        self._reader = reader
        self._names = {timeframe_seconds(name): name for name in timeframes}
        self._now_us = now_us

    def plan(self, jobs: Sequence[Job]) -> Plan:
        """What of the jobs is due."""
        reader, now = self._reader, self._now_us
        extent = reader.extent()
        clock = reader.clock(min(self._names))
        moving = clock.close_us > 0 and now - clock.known_at_us < _STILL_US
        if clock.close_us < now - _PRESENT_US and all(job.reason in _OF_PEOPLE for job in jobs):
            moving = False  # a person has just put the past there and is done with it
        limit_us = (clock.close_us if moving else now) - SETTLE_US
        ranges: dict[int, tuple[int, int]] = {}
        endless: set[int] = set()
        for job in jobs:
            if extent is None:
                ranges[job.id] = (job.start_us, job.start_us)
                continue
            after = reader.after_in_bars(job.end_us)
            last_us = max(extent[1] + 1, clock.close_us)
            end_us = max(job.end_us, min(after.time_us, job.end_us + _NEXT_TRADE_US)) if after is not None else last_us
            if after is None and moving and now - job.created_us < _NEXT_TRADE_US:
                endless.add(job.id)
            ranges[job.id] = (max(job.start_us, extent[0]), min(end_us, last_us))
        return Plan(
            ranges=ranges, starts={job.id: job.until_us for job in jobs}, limit_us=limit_us, moving=moving, endless=frozenset(endless)
        )

    def pieces(self, plan: Plan) -> Iterator[Piece]:
        """What is due, day by day in order of time."""
        days = sorted({day for start, end in plan.ranges.values() if start < end for day in range(start // _DAY_US, -(-end // _DAY_US))})
        for day in days:
            low, high = day * _DAY_US, (day + 1) * _DAY_US
            spans: dict[int, list[tuple[int, int]]] = {}
            for seconds in self._names:
                width = seconds * US_PER_SECOND
                found = []
                for job, (start, end) in plan.ranges.items():
                    first = max(max(start, low, plan.starts[job]) // width * width, low)
                    last = min(-(-min(end, high) // width) * width, plan.limit_us // width * width)
                    if first < last and start < high and end > low:
                        found.append((first, last))
                if found:
                    spans[seconds] = sorted(found)
            if spans:
                edges = [edge for found in spans.values() for edge in found]
                start_us, end_us = min(first for first, _ in edges), max(last for _, last in edges)
                yield Piece(spans=spans, start_us=start_us, end_us=end_us, done_us=min(high, plan.limit_us))

    def work(self, piece: Piece, *, patient: bool) -> Outcome:
        """Compare the bars of one piece. ``patient``: young bars that nobody vouches for yet wait (a live symbol's ledger grows)."""
        reader = self._reader
        seed, after = reader.before(piece.start_us), reader.after(piece.end_us)
        held_ids, held_us = reader.held_back(piece.start_us, piece.end_us)
        seconds = tuple(piece.spans)
        pages = reader.trades(piece.start_us, piece.end_us, seed, held_ids)
        rebuilt = rebuild(pages, tuple(self._names[one] for one in seconds), piece.end_us)
        stored = reader.stored(piece.start_us, piece.end_us, seconds)
        evidence = reader.evidence(piece.start_us, piece.end_us, seed, after, held_us)
        parts: list[Columns] = []
        checked, waiting = 0, []
        for one, spans in piece.spans.items():
            mine = {name: column[rebuilt["timeframe_s"] == one] for name, column in rebuilt.items()}
            found = reconcile(stored, mine, spans, evidence)
            parts.append(found.rows)
            checked += found.checked
            waiting.append(found.undecided[found.undecided > self._now_us - (_VOUCHER_US if patient else 0)])
        rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        undecided = np.concatenate(waiting)
        waits_us = int(undecided.min()) if len(undecided) else None
        if waits_us is not None:
            rows = {name: column[rows["close_time_us"] < waits_us] for name, column in rows.items()}
        return Outcome(rows=rows, newest=self._newest(rows), checked=checked, waits_us=waits_us)

    def left(self, job: Job, plan: Plan, done_us: int) -> int | None:
        """End of the job's next bar that is not done, microseconds; None when it has none left. ``done_us``: as in :class:`Piece`."""
        start, end = plan.ranges[job.id]
        if start >= end:
            return None
        waiting = _FAR_US
        for seconds in self._names:
            width = seconds * US_PER_SECOND
            first = max(start, done_us) // width * width
            if first < -(-end // width) * width:
                waiting = min(waiting, first + width)
        if job.id in plan.endless:
            waiting = min(waiting, max(end, done_us) + US_PER_SECOND)
        return None if waiting == _FAR_US else waiting

    def _newest(self, rows: Columns) -> list[Columns]:
        found = []
        for seconds in np.unique(rows["timeframe_s"]).tolist():
            newest = self._reader.newest_bar(seconds)
            mine = rows["open_time_us"][rows["timeframe_s"] == seconds]
            if len(newest["open"]) and newest["open_time_us"][0] > mine.max():
                found.append(newest)
        return found
