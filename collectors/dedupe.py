"""What of a feed is new, what came before and what is missing, by trade id. Pure.

Comes in: codes, trade ids and exchange times of a batch in the order of arrival (several connections may overlap). Goes out: a mask
of rows to keep, and the intervals of ids that are missing.

What a jump of ids means is the venue's to say (:class:`IdPromise`). Ids that start anew (test networks are reset, venues restart) are no
duplicates: the rows are kept, what was open in the old numbering is given up, and a gap of evidence ``restart`` says so. The same for ids that
jump further than a symbol can have traded meanwhile. The ids of the new
numbering are published with ``NUMBERING`` added, so that no trade of it is ever taken for one of the old: everything behind the collector
knows trades by their ids alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, NamedTuple

import numpy as np

from collectors.growable import grown

Array = np.ndarray[Any, Any]

EVIDENCE_ID_JUMP: Final = 1
EVIDENCE_HEARTBEAT: Final = 3
EVIDENCE_SILENCE: Final = 4
EVIDENCE_RESTART: Final = 5
RESET_AFTER_US: Final = 60_000_000
"""A smaller id on a trade this much newer than the newest is no duplicate: the venue started its ids anew (test networks do)."""
RESET_AFTER_BREAK_US: Final = 1_000_000
"""The same after the connection broke, or for an id below half of the newest: a subscription never repeats trades that old."""
NUMBERING: Final = 1 << 48
"""Added to a symbol's ids each time its venue starts them anew. Venues' own ids lie below (Binance: 5e9 in eight years); 31 numberings lie
below 2**53, up to which JSON readers take numbers exactly."""
PLAUSIBLE_IDS: Final = 1_000_000
"""A jump of ids up to this is a loss, however soon it comes: a thousand requests, and an hour of the busiest symbol."""
PLAUSIBLE_IDS_A_SECOND: Final = 500
"""Beyond it, what a symbol may trade while nobody listened (recorded peaks: 1,649 trades in a second, but 60 a second over minutes). A larger
jump is another numbering, e.g. that of another venue under the same name: its ids are not missing, and nobody asks for billions of them."""
MAX_OPEN_GAPS: Final = 1_024
"""Gaps a symbol may have open at once; more are folded into the oldest. 64 were reached by a feed that lost every second trade for 2 s."""
MAX_PIECES: Final = 65_536
"""Intervals one gap may be missing (5 MB); a gap with more is given up and reported unfillable."""


class IdPromise(Enum):
    """What a venue's documents say about the ids of a symbol's trades on one stream."""

    CONSECUTIVE = "consecutive"
    """Each published trade has the id of the one before plus one: any jump is a loss.

    Binance spot, "Trade Streams" (``t``) and "Compressed/Aggregate Trades List" (``a``) of spot and USD-M: aggregate trades are numbered
    without holes. Held against recorded data: 19,904 trades of two days, no hole.
    """
    INCREASING = "increasing"
    """Ids grow, but skip: one counter also numbers what is not published. A jump says nothing while the connection holds; after a break it
    bounds what may be missing, and the venue's REST says what was.

    Binance USD-M single trades: "Recent Trades List" returns market trades only, insurance fund and ADL trades are left out.
    """


class Piece(NamedTuple):
    """Ids ``[first, last]`` that are missing between rows at ``start_us`` and ``end_us``."""

    first: int
    last: int
    start_us: int
    end_us: int


@dataclass(slots=True, eq=False)
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
    missing: list[Piece]
    """What of it is still missing, ascending."""
    gap_id: int = -1
    """Its name in the ledger; given by whoever tells of it."""
    recovered: int = 0
    """Rows that came for it since."""
    anew: bool = False
    """The venue's ids started anew: the ids are those of the new numbering, and what the old one still had nobody can tell."""
    closed: bool = False
    """Dealt with: nobody fetches it any more."""
    opened_us: int = 0
    """Monotonic time it was found; given by whoever tells of it."""

    @property
    def missing_ids(self) -> int:
        """How many ids are still missing."""
        return sum(piece.last - piece.first + 1 for piece in self.missing)

    def fill(self, trade_id: int, time_us: int) -> bool:
        """Mark one id as arrived. Returns False when it was not missing."""
        index = bisect_right(self.missing, trade_id, key=_first_of) - 1
        if index < 0:
            return False
        first, last, start_us, end_us = self.missing[index]
        if trade_id > last:
            return False
        before = Piece(first, trade_id - 1, start_us, max(start_us, time_us))
        after = Piece(trade_id + 1, last, min(time_us, end_us), end_us)
        self.missing[index : index + 1] = [piece for piece in (before, after) if piece.first <= piece.last]
        self.recovered += 1
        return True


class Sequencer:
    """Newest trade id of every symbol of one feed, and the gaps that are open.

    Args:
        consecutive: whether a jump of ids is a loss (IdPromise.CONSECUTIVE).
    """

    def __init__(self, *, consecutive: bool) -> None:
        self._consecutive = consecutive
        self._last_id = np.empty(0, np.int64)  # code -> newest id; -1: none yet
        self._last_us = np.empty(0, np.int64)  # code -> its exchange time
        self._broken = np.empty(0, np.bool_)  # code -> nobody knows yet whether something was missed since
        self._base = np.empty(0, np.int64)  # code -> what its numbering adds to the venue's ids
        self._gaps: dict[int, list[Gap]] = {}  # code -> open gaps, ascending by id
        self.duplicates = 0
        self.resets = 0
        self.given_up: list[Gap] = []
        """Gaps nobody can fill any more: too many pieces, or of a numbering that is no more. The caller reports and clears them."""
        self.folded: list[tuple[Gap, Gap]] = []
        """(gap that took the other in, the other, now closed); the caller reports and clears them."""

    @property
    def consecutive(self) -> bool:
        """Whether a jump of ids is a loss."""
        return self._consecutive

    def add(self, code: int, last_id: int = -1, last_time_us: int = 0) -> None:
        """Make room for a symbol; with ``last_id`` what was stored before a restart is continued (and the break is looked at)."""
        size = code + 1
        self._last_id = grown(self._last_id, size, -1)
        self._last_us = grown(self._last_us, size, 0)
        self._broken = grown(self._broken, size, False)
        self._base = grown(self._base, size, 0)
        if last_id >= 0 and last_id > self._last_id[code]:
            self._base[code] = base_of(last_id)
            self._last_id[code] = last_id
            self._last_us[code] = last_time_us
            self._broken[code] = True

    def numbered(self, codes: Array, ids: Array) -> Array:
        """The venue's ids of rows as they are published: the numbering of each symbol added. The same array where all add nothing."""
        return ids + self._base[codes] if self._base.any() else ids

    def numbered_id(self, code: int, venue_id: int) -> int:
        """One id of the venue as it is published, by the symbol's present numbering; what is no id (-1) stays."""
        return venue_id + int(self._base[code]) if venue_id >= 0 else venue_id

    def forget(self, code: int) -> None:
        """The symbol is no longer collected: what comes next starts anew, without a gap. Gaps of its past stay open."""
        if code < len(self._last_id):
            self._last_id[code] = -1
            self._broken[code] = False

    def connection_broke(self, codes: Array | None = None) -> None:
        """Nothing was delivered for some time, to all symbols or these: something may be missing before the next row of each."""
        if codes is None:
            self._broken[:] = True
        else:
            self._broken[codes] = True

    def confirm(self, codes: Array) -> None:
        """The venue says that nothing was missed of these symbols up to now."""
        self._broken[codes] = False

    def doubtful(self, codes: Array) -> Array:
        """Of ``codes`` the mask of those of which nobody knows yet whether something was missed."""
        return self._broken[codes]

    def last_id(self, code: int) -> int:
        """Newest id of a symbol, -1 for none."""
        return int(self._last_id[code])

    def last_ids(self, codes: Array) -> Array:
        """Newest ids of symbols, -1 for none."""
        return self._last_id[codes]

    def last_times_us(self, codes: Array) -> Array:
        """Exchange times of the newest rows of symbols, 0 for none."""
        return self._last_us[codes]

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
        self._broken[code] = False  # rows that came since subscribing fill the gap or follow it
        return gap

    def reopen(self, gap: Gap) -> None:
        """Go on with a gap of an earlier process, lowest ids first. What it is missing beyond the newest trade is not missed once more."""
        code, newest = gap.code, int(self._last_id[gap.code])
        if 0 <= newest < gap.last_id and (gap.first_id <= newest + 1 or base_of(gap.first_id) > base_of(newest)):
            self._base[code] = base_of(gap.last_id)
            self._last_id[code] = gap.last_id
            self._last_us[code] = max(int(self._last_us[code]), gap.end_time_us)
        gaps = self._gaps.setdefault(gap.code, [])
        gaps.insert(bisect_right(gaps, gap.first_id, key=_first_id_of), gap)

    def open_gaps(self) -> Iterator[Gap]:
        """Every gap that is open."""
        for gaps in self._gaps.values():
            yield from gaps

    def close(self, gap: Gap) -> None:
        """The gap is dealt with (filled or given up); rows that still arrive inside it are duplicates from now on."""
        gap.closed = True
        gaps = self._gaps.get(gap.code, [])
        if gap in gaps:
            gaps.remove(gap)
        if not gaps:
            self._gaps.pop(gap.code, None)

    def process(self, codes: Array, ids: Array, times_us: Array) -> tuple[Array | None, list[Gap]]:
        """What of a batch to keep.

        Args:
            codes: int32, shape (n,), symbol of each row.
            ids: int64, shape (n,), trade ids, :meth:`numbered`. Rows of a numbering that begins in this batch are given theirs in place.
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

    def fill(self, code: int, ids: Array, times_us: Array) -> Array:
        """Rows that were fetched for a symbol: bool mask of those that an open gap was missing; the others came before."""
        keep = np.zeros(len(ids), np.bool_)
        if code in self._gaps:
            for row, (trade_id, time_us) in enumerate(zip(ids.tolist(), times_us.tolist(), strict=True)):
                keep[row] = self._fill(code, trade_id, time_us)
        self.duplicates += int(np.count_nonzero(~keep))
        return keep

    def _process_slowly(self, codes: Array, ids: Array, times_us: Array) -> tuple[Array, list[Gap]]:
        """Row by row: something in the batch is missing, doubled or out of order."""
        keep = np.ones(len(codes), np.bool_)
        opened: list[Gap] = []
        begun: dict[int, int] = {}  # code -> what a numbering that began in this batch adds to the rows after its first
        for row, (code, trade_id, time_us) in enumerate(zip(codes.tolist(), ids.tolist(), times_us.tolist(), strict=True)):
            if code in begun:
                trade_id += begun[code]
                ids[row] = trade_id
            last = int(self._last_id[code])
            if last >= 0 and trade_id <= last:
                if self._fill(code, trade_id, time_us):
                    continue
                if not self._starts_anew(code, trade_id, time_us):
                    keep[row] = False
                    self.duplicates += 1
                    continue
                trade_id += NUMBERING
                ids[row] = trade_id
                begun[code] = begun.get(code, 0) + NUMBERING
                opened.append(self._start_anew(code, trade_id, time_us))
            elif last >= 0 and trade_id > last + 1 and (self._consecutive or self._broken[code]):
                opened.append(self._open(code, last + 1, trade_id - 1, time_us))
            self._last_id[code] = trade_id
            self._last_us[code] = time_us
            self._broken[code] = False
        return keep, opened

    def _starts_anew(self, code: int, trade_id: int, time_us: int) -> bool:
        """Whether a row whose id is not above the newest, and not missing, is the first of a new numbering and none we have."""
        newer_us = time_us - int(self._last_us[code])
        if newer_us > RESET_AFTER_US:
            return True
        base = self._base[code]
        low = 2 * (trade_id - base) <= self._last_id[code] - base
        if self._broken[code]:
            return bool(low or newer_us > RESET_AFTER_BREAK_US)  # low: the clock may go back with the restart
        return bool(low and newer_us > RESET_AFTER_BREAK_US)

    def _start_anew(self, code: int, trade_id: int, time_us: int) -> Gap:
        self.resets += 1
        first = self._base[code] = base_of(trade_id)
        for gap in list(self._gaps.get(code, ())):
            self.close(gap)
            self.given_up.append(gap)
        last_us = int(self._last_us[code])
        start_us, end_us = min(last_us, time_us), max(last_us, time_us)
        wanted = trade_id > first and _is_plausible(trade_id - int(first), end_us - start_us)
        missing = [Piece(int(first), trade_id - 1, start_us, end_us)] if wanted else []
        gap = Gap(code, int(first), trade_id - 1, start_us, end_us, EVIDENCE_RESTART, missing, anew=True)
        self._gaps[code] = [gap]
        return gap

    def _open(self, code: int, first: int, last: int, time_us: int) -> Gap:
        evidence = EVIDENCE_RESTART if self._broken[code] else EVIDENCE_ID_JUMP
        last_us = int(self._last_us[code])
        start_us, end_us = min(last_us, time_us), max(last_us, time_us)  # times of neighbouring ids may lie the other way round
        if _is_plausible(last - first + 1, end_us - start_us):
            gap = Gap(code, first, last, start_us, end_us, evidence, [Piece(first, last, start_us, end_us)])
        else:
            self.resets += 1
            self._base[code] = base_of(last)
            gap = Gap(code, first, last, start_us, end_us, EVIDENCE_RESTART, [], anew=True)
        gaps = self._gaps.setdefault(code, [])
        gaps.append(gap)
        if len(gaps) > MAX_OPEN_GAPS:
            self._fold(gaps)
        return gap

    def _fold(self, gaps: list[Gap]) -> None:
        """Make the two oldest gaps of a symbol one."""
        first, second = gaps[0], gaps.pop(1)
        first.missing += second.missing
        first.last_id = second.last_id
        first.start_time_us = min(first.start_time_us, second.start_time_us)
        first.end_time_us = max(first.end_time_us, second.end_time_us)
        first.recovered += second.recovered
        second.closed = True
        self.folded.append((first, second))
        if len(first.missing) > MAX_PIECES:
            self.close(first)
            self.given_up.append(first)

    def _fill(self, code: int, trade_id: int, time_us: int) -> bool:
        gap = self._gap_at(code, trade_id)
        return gap is not None and gap.fill(trade_id, time_us)

    def _gap_at(self, code: int, trade_id: int) -> Gap | None:
        """The open gap whose ids may hold ``trade_id``."""
        gaps = self._gaps.get(code)
        if gaps is None:
            return None
        index = bisect_right(gaps, trade_id, key=_first_id_of) - 1
        return gaps[index] if index >= 0 else None


def base_of(trade_id: int) -> int:
    """What the numbering of a published id adds to the venue's id."""
    return trade_id // NUMBERING * NUMBERING


def _is_plausible(count: int, within_us: int) -> bool:
    """Whether so many trades of one symbol may have been made in that time."""
    return count <= PLAUSIBLE_IDS or count * 1_000_000 <= PLAUSIBLE_IDS_A_SECOND * within_us


def _first_of(piece: Piece) -> int:
    return piece.first


def _first_id_of(gap: Gap) -> int:
    return gap.first_id
