"""What of a feed is new, what came before and what is missing, by trade id. Pure.

Comes in: codes, trade ids and exchange times of a batch in the order of arrival (several connections may overlap). Goes out: a mask
of rows to keep, and the intervals of ids that are missing.

``consecutive`` venues (Binance spot, and aggregate trades everywhere) number trades of a symbol without holes: any jump is a loss.
On others (Binance USD-M single trades) ids skip, because the same counter numbers trades that are not published; there a jump is
suspicious only after the connection broke.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from collectors.growable import grown

Array = np.ndarray[Any, Any]

EVIDENCE_ID_JUMP: Final = 1
EVIDENCE_RESTART: Final = 5
STATE_OPEN: Final = 1
STATE_FILLED: Final = 2
STATE_UNFILLABLE: Final = 3
RESET_AFTER_US: Final = 60_000_000
"""A smaller id on a trade this much newer than the newest is no duplicate: the venue started its ids anew (test networks do)."""
RESET_AFTER_BREAK_US: Final = 1_000_000
"""The same for the first trade after the connection broke: a fresh subscription never repeats old trades."""
MAX_OPEN_GAPS: Final = 64
"""Intervals a symbol may have open at once; the oldest is given up (reported unfillable) when there are more."""


@dataclass(slots=True)
class Gap:
    """An interval of trade ids that did not arrive."""

    code: int
    first_id: int
    last_id: int
    start_time_us: int
    """Exchange time of the last row before it."""
    end_time_us: int
    """Exchange time of the first row after it."""
    evidence: int
    missing: list[tuple[int, int]]
    """What of it is still missing, closed intervals by id."""

    @property
    def missing_ids(self) -> int:
        """How many ids are still missing."""
        return sum(last - first + 1 for first, last in self.missing)

    def fill(self, trade_id: int) -> bool:
        """Mark one id as arrived. Returns False when it was not missing."""
        for index, (first, last) in enumerate(self.missing):
            if first <= trade_id <= last:
                self.missing[index : index + 1] = [part for part in ((first, trade_id - 1), (trade_id + 1, last)) if part[0] <= part[1]]
                return True
        return False


class Sequencer:
    """Newest trade id of every symbol of one feed, and the gaps that are open.

    Args:
        consecutive: whether ids have no holes.
    """

    def __init__(self, *, consecutive: bool) -> None:
        self._consecutive = consecutive
        self._last_id = np.empty(0, np.int64)  # code -> newest id; -1: none yet
        self._last_us = np.empty(0, np.int64)  # code -> its exchange time
        self._broken = np.empty(0, np.bool_)  # code -> the connection broke since
        self._gaps: dict[int, list[Gap]] = {}
        self.duplicates = 0
        self.resets = 0
        self.abandoned: list[Gap] = []
        """Gaps no longer looked at because a symbol had too many; the caller counts and clears them."""

    def add(self, code: int, last_id: int = -1, last_time_us: int = 0) -> None:
        """Make room for a symbol; with ``last_id`` what was stored before a restart is continued (and the break is looked at)."""
        size = code + 1
        self._last_id = grown(self._last_id, size, -1)
        self._last_us = grown(self._last_us, size, 0)
        self._broken = grown(self._broken, size, False)
        if last_id >= 0 and last_id > self._last_id[code]:
            self._last_id[code] = last_id
            self._last_us[code] = last_time_us
            self._broken[code] = True

    def forget(self, code: int) -> None:
        """The symbol is no longer collected: what comes next starts anew, without a gap."""
        if code < len(self._last_id):
            self._last_id[code] = -1
            self._gaps.pop(code, None)

    def connection_broke(self) -> None:
        """No connection delivered for some time: the next jump of each symbol is a gap."""
        self._broken[:] = True

    def last_id(self, code: int) -> int:
        """Newest id of a symbol, -1 for none."""
        return int(self._last_id[code])

    def open_until(self, code: int, newest_id: int, time_us: int) -> Gap | None:
        """The venue's newest trade is ``newest_id``: open a gap from our newest to there. None when we have it, or have none yet."""
        last = int(self._last_id[code])
        if last < 0 or newest_id <= last:
            return None
        self._broken[code] = True
        end_us = max(time_us, int(self._last_us[code]))
        gap = self._open(code, last + 1, newest_id, end_us)
        self._last_id[code] = newest_id
        self._last_us[code] = end_us
        return gap

    def open_gaps(self) -> Iterator[Gap]:
        """Every gap that is open."""
        for gaps in self._gaps.values():
            yield from gaps

    def close(self, gap: Gap) -> None:
        """The gap is dealt with (filled or given up); rows that still arrive inside it are duplicates from now on."""
        gaps = self._gaps.get(gap.code, [])
        if gap in gaps:
            gaps.remove(gap)
        if not gaps:
            self._gaps.pop(gap.code, None)

    def process(self, codes: Array, ids: Array, times_us: Array) -> tuple[Array | None, list[Gap]]:
        """What of a batch to keep.

        Args:
            codes: int32, shape (n,), symbol of each row.
            ids: int64, shape (n,), trade ids.
            times_us: int64, shape (n,), exchange times.

        Returns:
            A bool mask of shape (n,) (None: keep all) and the gaps that opened.
        """
        if len(codes) == 0:
            return None, []
        order = np.argsort(codes, kind="stable")
        sorted_codes, sorted_ids = codes[order], ids[order]
        starts = np.empty(len(codes), np.bool_)
        starts[0] = True
        np.not_equal(sorted_codes[1:], sorted_codes[:-1], out=starts[1:])
        before = np.empty_like(sorted_ids)
        before[1:] = sorted_ids[:-1]
        start_codes = sorted_codes[starts]
        before[starts] = self._last_id[start_codes]
        if self._consecutive:
            good = (sorted_ids == before + 1) | (before < 0)
        else:
            good = sorted_ids > before
            good[starts] &= ~self._broken[start_codes] | (before[starts] < 0) | (sorted_ids[starts] == before[starts] + 1)
        ends = np.append(np.flatnonzero(starts)[1:], len(codes)) - 1
        if good.all():
            self._last_id[start_codes] = sorted_ids[ends]
            self._last_us[start_codes] = times_us[order[ends]]
            self._broken[start_codes] = False
            return None, []
        return self._process_slowly(codes, ids, times_us)

    def _process_slowly(self, codes: Array, ids: Array, times_us: Array) -> tuple[Array, list[Gap]]:
        """Row by row: something in the batch is missing, doubled or out of order."""
        keep = np.ones(len(codes), np.bool_)
        opened: list[Gap] = []
        for row, (code, trade_id, time_us) in enumerate(zip(codes.tolist(), ids.tolist(), times_us.tolist(), strict=True)):
            last = int(self._last_id[code])
            if last >= 0 and trade_id <= last:
                if self._fill(code, trade_id):
                    continue
                if time_us <= self._last_us[code] + (RESET_AFTER_BREAK_US if self._broken[code] else RESET_AFTER_US):
                    keep[row] = False
                    self.duplicates += 1
                    continue
                self.resets += 1
            elif last >= 0 and trade_id > last + 1 and (self._consecutive or self._broken[code]):
                opened.append(self._open(code, last + 1, trade_id - 1, time_us))
            self._last_id[code] = trade_id
            self._last_us[code] = time_us
            self._broken[code] = False
        return keep, opened

    def _open(self, code: int, first: int, last: int, time_us: int) -> Gap:
        evidence = EVIDENCE_RESTART if self._broken[code] else EVIDENCE_ID_JUMP
        gap = Gap(code, first, last, int(self._last_us[code]), time_us, evidence, [(first, last)])
        gaps = self._gaps.setdefault(code, [])
        gaps.append(gap)
        if len(gaps) > MAX_OPEN_GAPS:
            self.abandoned.append(gaps.pop(0))
        return gap

    def _fill(self, code: int, trade_id: int) -> bool:
        return any(gap.fill(trade_id) for gap in self._gaps.get(code, ()))
