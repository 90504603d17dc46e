"""What has to be published so that the bars stored are the bars of the trades stored, and are complete exactly where nothing is missing.

Comes in: the newest stored revision of each bar, the same bars rebuilt from the stored trades, and the evidence of what is missing.
Goes out: the rows that differ, with the next revision. Nothing differs: no rows, so doing it again publishes nothing. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from processors import bars as door
from processors.gap_book import touches
from schemas.timeframes import MAX_TIME_US, US_PER_SECOND

Array = npt.NDArray[Any]
Columns = dict[str, Array]

_NO_VALUES: Final = ("symbol_code", "timeframe_s", "open_time_us", "revision", "is_final", "complete", "last_receive_time_us")
VALUES: Final = tuple(name for name in door.BAR_COLUMNS if name not in _NO_VALUES)
"""Columns that follow from the trades alone. ``last_receive_time_us`` is no value: trades that were fetched have another one."""
STORED: Final = ("timeframe_s", "open_time_us", *VALUES, "revision", "complete", "held_count")
"""Columns of stored bars that are compared."""
_BATCH_ROWS: Final = 65_536
_WINDOW_US: Final = 10 * US_PER_SECOND
_NONE: Final = np.zeros((0, 2), np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What is known about the trades of one symbol over a stretch of time. Intervals: int64, shape (n, 2), microseconds."""

    missing: Array = field(default_factory=_NONE.copy)
    """Open and unfillable: (time of the last row before, time of the first row after; before the first: no end yet)."""
    covered: Array = field(default_factory=_NONE.copy)
    """Complete and filled intervals of the ledger, ``[start, end)``."""
    dense: Array = field(default_factory=_NONE.copy)
    """(time of the first, time of the last) of trades whose ids follow each other without a hole: nothing can be missing between them."""
    held_us: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    """Times of the trades held back as suspect, ascending."""


class Reconciled(NamedTuple):
    """What came of a comparison."""

    rows: Columns
    """Bars to publish: the columns of a bars frame without ``symbol_code``; by timeframe, then time."""
    checked: int
    """Bars compared."""
    undecided: Array
    """Close times of bars that would be complete if somebody vouched for them: nothing is known to be missing, and not that nothing is."""


def rebuild(pages: Iterable[Mapping[str, Array]], timeframes: tuple[str, ...], end_us: int) -> Columns:
    """Bars of one symbol up to ``end_us``, by the kernel that makes them live.

    Args:
        pages: trades (``processors.bars.TRADE_DTYPES`` without ``symbol_code``), each page and all of them in order of (time, id). The first
            may be the last trade before the stretch that matters: flat bars need its price.
        timeframes: any of the known ones.
        end_us: every bar that ends at or before this is closed.

    Returns:
        The columns of a bars frame, final bars only.
    """
    config = door.BarConfig(
        timeframes=timeframes,
        revision_window_us=_WINDOW_US,
        live_interval_us=0,
        max_symbols=1,
        max_flat_rows_per_frame=2**40,
        max_future_us=MAX_TIME_US,
    )
    engine = door.BarEngine(config)
    symbols = ("repair:bars",)
    made: list[Columns] = []
    for columns in _batches(pages, end_us):
        watermark_us = int(columns["exchange_time_us"][-1])
        made.append(engine.process(door.TradeBatch(source="repair", watermark_us=watermark_us, symbols=symbols, columns=columns)).bars)
    made.append(engine.process(door.TradeBatch(source="repair", watermark_us=end_us, symbols=symbols)).bars)
    joined = {name: np.concatenate([part[name] for part in made]) for name in door.BAR_COLUMNS}
    final = (joined["is_final"] == 1) & (joined["close_time_us"] <= end_us)
    return {name: column[final] for name, column in joined.items()}


def _batches(pages: Iterable[Mapping[str, Array]], end_us: int) -> Iterator[Columns]:
    for page in pages:
        count = int(np.searchsorted(page["exchange_time_us"], end_us))  # later trades are of bars that are not asked for
        for start in range(0, count, _BATCH_ROWS):
            cut = slice(start, min(start + _BATCH_ROWS, count))
            codes = np.zeros(cut.stop - cut.start, np.int32)
            yield {"symbol_code": codes, **{name: page[name][cut] for name in door.TRADE_DTYPES if name != "symbol_code"}}


def reconcile(
    stored: Mapping[str, Array], rebuilt: Mapping[str, Array], ranges: Iterable[tuple[int, int]], evidence: Evidence
) -> Reconciled:
    """The bars touching any of ``ranges`` that must be published anew.

    Args:
        stored: ``STORED`` columns, the newest revision of each bar; may hold more bars than those in question.
        rebuilt: from :func:`rebuild`, of all trades of every bar in question; may hold more bars too.
        ranges: the times in question, ``[start, end)`` microseconds each.
        evidence: what is missing and what is not.

    A bar that is stored as complete stays so unless something is known to be missing; one that is stored and cannot be rebuilt (the only
    trades before it were taken away) stands as it is.
    """
    wanted = np.zeros(len(rebuilt["open"]), np.bool_)
    for start_us, end_us in ranges:
        wanted |= (rebuilt["open_time_us"] < end_us) & (rebuilt["close_time_us"] > start_us)
    rows = np.flatnonzero(wanted)
    rows = rows[np.lexsort((rebuilt["open_time_us"][rows], rebuilt["timeframe_s"][rows]))]
    bars: Columns = {name: column[rows] for name, column in rebuilt.items() if name != "symbol_code"}
    place = places(stored, bars)
    known = place >= 0
    before = {name: np.where(known, stored[name][place] if len(stored[name]) else 0, 0) for name in STORED}
    sound, vouched = completeness(bars, evidence)
    trusted = vouched | (known & (before["complete"] == 1))
    bars["complete"] = (sound & trusted).astype(np.int8)
    bars["held_count"] = held_counts(bars, evidence.held_us)
    differs = ~known
    for name in (*VALUES, "complete", "held_count"):
        differs |= bars[name] != before[name]
    bars["revision"] = np.where(known, before["revision"] + 1, 0).astype(np.int32)
    bars["is_final"] = np.ones(len(rows), np.int8)
    return Reconciled(
        {name: column[differs] for name, column in bars.items()}, len(rows), np.unique(bars["close_time_us"][sound & ~trusted])
    )


def dense_runs(ids: Array, times_us: Array) -> Array:
    """``Evidence.dense`` of trades in the order of their ids: (first time, last time) of each run of ids without a hole, shape (n, 2)."""
    if not len(ids):
        return _NONE.copy()
    cuts = np.flatnonzero(np.diff(ids) != 1)
    first, last = np.concatenate([[0], cuts + 1]), np.concatenate([cuts, [len(ids) - 1]])
    return np.stack([times_us[first], times_us[last]], axis=1)


def joined_runs(parts: Iterable[tuple[Array, Array]]) -> Array:
    """As :func:`dense_runs`, of pages (ids, times) in the order of the ids."""
    runs: list[Array] = []
    last_id = -2
    for ids, times_us in parts:
        found = dense_runs(ids, times_us)
        if len(found) and runs and int(ids[0]) == last_id + 1:
            found[0, 0] = runs[-1][-1, 0]
            runs[-1] = runs[-1][:-1]
        if len(found):
            last_id = int(ids[-1])
            runs.append(found)
    return np.concatenate(runs) if runs else _NONE.copy()


def places(stored: Mapping[str, Array], bars: Columns) -> Array:
    """Row of each of ``bars`` in ``stored``, -1 where it is not."""
    held, asked = _keys(stored), _keys(bars)
    if not len(held):
        return np.full(len(asked), -1, np.int64)
    order = np.argsort(held, kind="stable")
    spot = np.minimum(np.searchsorted(held[order], asked), len(held) - 1)
    found = order[spot]
    return np.where(held[found] == asked, found, -1)


def _keys(bars: Mapping[str, Array]) -> Array:
    # bars open at whole seconds: 2**33 s reach to 2242, the longest timeframe is below 2**17 s
    keys: Array = bars["timeframe_s"].astype(np.int64) << 40 | bars["open_time_us"] // US_PER_SECOND
    return keys


def completeness(bars: Columns, evidence: Evidence) -> tuple[Array, Array]:
    """(nothing is known to be missing, something vouches that nothing is) for each bar; bool."""
    open_us, close_us = bars["open_time_us"], bars["close_time_us"]
    sound = np.ones(len(open_us), np.bool_)
    for start_us, end_us in evidence.missing.tolist():
        sound &= ~touches(open_us, close_us, start_us, end_us)
    vouched = np.zeros(len(open_us), np.bool_)
    covered = merged(evidence.covered)
    if len(covered):
        # the interval that begins last at or before the bar's open is the only one that can hold it
        spot = np.searchsorted(covered[:, 0], open_us, "right") - 1
        vouched |= (spot >= 0) & (covered[spot, 1] >= close_us)
    dense = evidence.dense[np.argsort(evidence.dense[:, 0], kind="stable")]
    if len(dense):
        spot = np.searchsorted(dense[:, 0], open_us, "left") - 1
        vouched |= (spot >= 0) & (dense[spot, 1] >= close_us)
    return sound, vouched


def merged(intervals: Array) -> Array:
    """Intervals ``[start, end)`` that overlap or meet as one each; int64, shape (n, 2), ascending."""
    found: list[list[int]] = []
    for start_us, end_us in sorted(intervals.tolist()):
        if end_us <= start_us:
            continue
        if found and start_us <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end_us)
        else:
            found.append([start_us, end_us])
    return np.array(found, np.int64).reshape(-1, 2)


def held_counts(bars: Columns, held_us: Array) -> Array:
    """Trades held back within each bar; ``held_us``: their times, ascending."""
    return np.searchsorted(held_us, bars["close_time_us"], "left") - np.searchsorted(held_us, bars["open_time_us"], "left")
