"""Blocks of trades in a file's order in, trades by time out, each group with the newest time that no later row is older than.

Files are sorted by id, and nearly so by time: on Binance the times of neighbouring ids differ in order by milliseconds. Rows are held
back until ``window_rows`` more have been read, and given out sorted by (time, id). A row further out of place than that comes after a
watermark it should have preceded: it is counted as late, and the bars treat it as any late trade.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from schemas.frames import concat_columns

Array = np.ndarray[Any, Any]
Columns = dict[str, Array]

WINDOW_ROWS: Final = 64_000
"""40 s of the busiest second recorded (1,649 trades/s), 8 MB held. A multiple of a frame, so that full frames leave."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ordered:
    """Rows by (exchange_time_us, trade_id)."""

    columns: Columns
    watermark_us: int
    """No row after these is older, as far as the window sees; never goes back."""


class LookAhead:
    """Sorts within a window. What comes out depends on the rows alone, not on how they were cut into blocks."""

    def __init__(self, window_rows: int = WINDOW_ROWS) -> None:
        self._window_rows = window_rows
        self._parts: list[Columns] = []
        self._held_rows = 0
        self._watermark_us = -(2**63)
        self.late_rows = 0
        """Rows given out that are older than a watermark given out before."""

    def push(self, columns: Columns) -> Iterator[Ordered]:
        """Add rows in the file's order; yields groups of exactly ``window_rows`` rows whenever two windows are full."""
        start, count = 0, len(columns["trade_id"])
        while start < count:
            # taken up to exactly two windows, so that the sort sees the same rows however the caller cuts them
            stop = min(count, start + 2 * self._window_rows - self._held_rows)
            self._parts.append({name: column[start:stop] for name, column in columns.items()} if stop - start < count else columns)
            self._held_rows += stop - start
            start = stop
            if self._held_rows == 2 * self._window_rows:
                rows = self._sorted()
                out = {name: column[: self._window_rows] for name, column in rows.items()}
                self._parts = [{name: column[self._window_rows :] for name, column in rows.items()}]
                self._held_rows = self._window_rows
                yield self._give(out, int(self._parts[0]["exchange_time_us"][0]))

    def finish(self) -> Iterator[Ordered]:
        """Yield what is held; its watermark is its newest time."""
        if self._held_rows:
            rows = self._sorted()
            self._parts, self._held_rows = [], 0
            yield self._give(rows, int(rows["exchange_time_us"][-1]))

    def _sorted(self) -> Columns:
        rows = concat_columns(self._parts)
        times, ids = rows["exchange_time_us"], rows["trade_id"]
        step = np.diff(times)
        if bool(((step > 0) | ((step == 0) & (np.diff(ids) > 0))).all()):
            return rows
        order = np.lexsort((ids, times))
        return {name: column[order] for name, column in rows.items()}

    def _give(self, columns: Columns, next_us: int) -> Ordered:
        self.late_rows += int(np.searchsorted(columns["exchange_time_us"], self._watermark_us))
        self._watermark_us = max(self._watermark_us, next_us)
        return Ordered(columns=columns, watermark_us=self._watermark_us)
