"""What a feed covered, symbol by symbol: complete intervals that grow, and stretches of which nobody knows. Pure: time is an argument.

Comes in: when rows came, when the feed was lost and what settled it. Goes out: rows of the coverage ledger (topic ``gaps``) as arrays of
int64, one row a line, :data:`COLUMNS` in order.

A symbol's complete interval begins with its first row (or where an earlier process left off) and grows with the shard's watermark. It keeps
its id for a day, so that a symbol costs one valid row a day; gaps inside it are rows of their own and count for more. While the feed of a
symbol is lost its interval stands still and a row ``open`` with unknown ids says since when, until a row or the venue's REST settles it.

Everything is arrays over symbols: a reconnect of 1,024 streams, or a minute's growth, costs a few numpy calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from collectors.batcher import Batcher
from collectors.dedupe import Array, Gap
from collectors.growable import grown
from schemas.frames import GAP_COMPLETE, GAP_FILLED, GAP_OPEN, Frame

COLUMNS: Final = (
    "symbol_code",
    "first_missing_id",
    "last_missing_id",
    "start_time_us",
    "end_time_us",
    "evidence",
    "state",
    "exchange_time_us",
    "gap_id",
    "recovered",
)
"""Columns of a block of ledger rows; ``symbol_code`` is of the shard's own dictionary until frames are made."""
_DTYPES: Final = {"symbol_code": np.int32, "evidence": np.int8, "state": np.int8}
CHANNEL_TRADES: Final = 1
NO_END: Final = -1
"""``end_time_us`` of what has no end yet: before its start, whatever that is."""
UNKNOWN_ID: Final = -1
SHORTEST_BAR_US: Final = 1_000_000
MAX_FRAME_ROWS: Final = 8_192
"""Rows of one frame of the ledger: 700 kB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CoverageConfig:
    """How often intervals are written."""

    row_every_us: int = 60_000_000
    """At most one row a symbol in this time."""
    row_us_a_symbol: int = 60_000
    """With many symbols less often: 10,000 write every 10 minutes, 17 rows a second, 1.4 M a day."""
    interval_us: int = 86_400_000_000
    """An interval that is older ends, and the next begins where it ended: tables forget old rows by their start."""


class OpenGap(NamedTuple):
    """A gap that an earlier process left open."""

    gap_id: int
    """-1: the ledger does not know it yet."""
    first_id: int
    last_id: int
    start_time_us: int
    end_time_us: int
    evidence: int
    recovered: int = 0


@dataclass(frozen=True, slots=True)
class Resume:
    """What of a symbol was already published before this process began."""

    trade_id: int
    """Newest trade; -1: none is known, only gaps."""
    exchange_time_us: int
    watched_until_us: int = 0
    """What the feed promised last: everything older was published. 0: unknown."""
    interval_id: int = -1
    """Its complete interval, which goes on; -1: none."""
    interval_since_us: int = 0
    lost_id: int = -1
    """The stretch of which nobody knew when the process ended; -1: none."""
    lost_since_us: int = 0
    lost_ended: bool = False
    """Its end was told in the trades, and its row was lost."""
    gaps: tuple[OpenGap, ...] = ()
    """Its open gaps with known ids; they are fetched further."""
    newest_gap_id: int = -1
    """The newest id any gap or interval of it was given; -1: none is known."""
    orphans: tuple[tuple[int, int], ...] = ()
    """(id, start) of gaps that were told open in the trades and never in the ledger: another one speaks of what they were about."""
    strays: tuple[OpenGap, ...] = ()
    """Open entries with unknown ids that nobody will settle: those without an end are withdrawn, the others are lost for good."""


class Coverage:
    """The intervals of one shard's symbols, by code."""

    def __init__(self, config: CoverageConfig | None = None) -> None:
        self._config = config or CoverageConfig()
        self._since = np.empty(0, np.int64)  # code -> start of its interval; -1: none yet
        self._until = np.empty(0, np.int64)  # code -> up to where it was complete when it was last looked at
        self._written = np.empty(0, np.int64)  # code -> its end in the newest row
        self._interval = np.empty(0, np.int64)  # code -> id of its interval; -1: none yet
        self._outage = np.empty(0, np.int64)  # code -> id of the stretch nobody knows of; -1: none
        self._outage_since = np.empty(0, np.int64)
        self._outage_evidence = np.empty(0, np.int64)
        self._watched = np.empty(0, np.bool_)
        self._still = np.empty(0, np.bool_)  # code -> silent beyond its law: its interval grows by what the venue answers only
        self._unbegun = 0  # watched symbols without an interval
        self._stills = 0
        self._ticked_us: int | None = None
        self.outages = 0
        """Symbols that are lost now."""

    def watch(self, code: int, *, since_us: int = -1, interval_id: int = -1) -> None:
        """Begin a symbol; with ``since_us`` an interval of an earlier process goes on."""
        size = code + 1
        for name in ("_since", "_until", "_written", "_interval", "_outage", "_outage_since", "_outage_evidence"):
            setattr(self, name, grown(getattr(self, name), size, -1))
        self._watched = grown(self._watched, size, False)
        self._still = grown(self._still, size, False)
        self._since[code] = self._until[code] = self._written[code] = since_us
        self._interval[code] = interval_id
        self._watched[code] = True
        self._unbegun = self._count_unbegun()

    def doubt(self, codes: Array) -> None:
        """These symbols are silent beyond their law: that others trade says nothing of them any more, until :meth:`heard`."""
        self._still[codes] = True
        self._stills = int(np.count_nonzero(self._still))

    def heard(self, codes: Array) -> None:
        """Rows of these symbols came. ``codes``: of each row."""
        if self._stills:
            self._still[codes] = False
            self._stills = int(np.count_nonzero(self._still))

    def reach(self, codes: Array, until_us: int) -> None:
        """The venue's answer: nothing was missed of these symbols until then."""
        self._until[codes] = np.maximum(self._until[codes], until_us)

    def forget(self, code: int) -> None:
        """The symbol is no longer collected; :meth:`grow` it before."""
        self._watched[code] = self._still[code] = False
        self._since[code] = -1
        self._unbegun = self._count_unbegun()
        if self._outage[code] >= 0:
            self._outage[code] = -1
            self.outages -= 1

    def began(self, codes: Array, times_us: Array) -> None:
        """Rows came; symbols without an interval begin theirs with their first row. ``codes``, ``times_us``: of each row."""
        if not self._unbegun:
            return
        fresh = (self._since[codes] < 0) & self._watched[codes]
        if fresh.any():
            codes, times_us = codes[fresh][::-1], times_us[fresh][::-1]
            self._since[codes] = self._until[codes] = self._written[codes] = times_us  # reversed: the first row is the last to be set
            self._unbegun = self._count_unbegun()

    def began_quietly(self, watermark_us: int) -> None:
        """The feed is live: symbols that have not traded yet are covered from here on."""
        fresh = self._watched & (self._since < 0) & ~self._still
        self._since[fresh] = self._until[fresh] = self._written[fresh] = watermark_us
        self._unbegun = self._count_unbegun()

    def _count_unbegun(self) -> int:
        return int(np.count_nonzero(self._watched & (self._since < 0)))

    @property
    def watched(self) -> Array:
        """Codes that have an interval."""
        return np.flatnonzero(self._watched & (self._since >= 0))

    @property
    def lost(self) -> Array:
        """Codes of symbols that are lost now."""
        return np.flatnonzero(self._outage >= 0) if self.outages else np.empty(0, np.int64)

    def lose(self, codes: Array, since_us: Array, evidence: int, gap_id: int) -> Array:
        """These symbols are lost since then; rows for those that were not already.

        Args:
            codes: symbols with an interval.
            since_us: up to when each is known to be complete; where its interval begins later, from there.
            evidence: how it was noticed.
            gap_id: name of the stretch, the same for all (ids are unique per symbol).
        """
        new = self._outage[codes] < 0
        codes = codes[new]
        since_us = np.maximum(since_us[new], self._since[codes])
        self._outage[codes] = gap_id
        self._outage_since[codes] = since_us
        self._outage_evidence[codes] = evidence
        self._until[codes] = np.maximum(self._until[codes], since_us)
        self.outages += len(codes)
        return block(codes, start_time_us=since_us, end_time_us=NO_END, evidence=evidence, state=GAP_OPEN, gap_id=gap_id)

    def end(self, codes: Array, until_us: int, gap_id: int) -> Array:
        """These intervals end at ``until_us`` for good; rows that say so. The symbols may begin another."""
        rows = self.grow(codes, until_us, gap_id)
        self._since[codes] = self._interval[codes] = -1
        self._unbegun = self._count_unbegun()
        return rows

    def found(self, code: int) -> tuple[int, int] | None:
        """What a lost symbol misses is known now: (id, evidence) of the stretch, which the gap goes on with; None when it is not lost."""
        gap_id = int(self._outage[code])
        if gap_id < 0:
            return None
        self._outage[code] = -1
        self.outages -= 1
        return gap_id, int(self._outage_evidence[code])

    def settle(self, codes: Array, end_us: Array, watermark_us: int) -> Array:
        """Nothing was missed of these lost symbols up to ``end_us``: rows that say so.

        ``filled`` where a bar that was marked incomplete may have closed meanwhile, so that it is made anew: the end of a second lies between the
        stretch's start and the watermark. Else ``complete``.
        """
        start = self._outage_since[codes]
        state = np.where(start // SHORTEST_BAR_US < watermark_us // SHORTEST_BAR_US, GAP_FILLED, GAP_COMPLETE)
        rows = block(
            codes,
            start_time_us=start,
            end_time_us=np.maximum(start, end_us),
            evidence=self._outage_evidence[codes],
            state=state,
            gap_id=self._outage[codes],
        )
        self._outage[codes] = -1
        self.outages -= len(codes)
        return rows

    def tick(self, mono_us: int, watermark_us: int | None, gap_id: int) -> Array | None:
        """Rows for all intervals that grew, once in the configured time; None otherwise."""
        count = int(np.count_nonzero(self._watched))
        every_us = max(self._config.row_every_us, self._config.row_us_a_symbol * count)
        if self._ticked_us is None:
            self._ticked_us = mono_us
        if watermark_us is None or mono_us - self._ticked_us < every_us:
            return None
        self._ticked_us = mono_us
        return self.grow(self.watched, watermark_us, gap_id)

    def grow(self, codes: Array, watermark_us: int | None, gap_id: int) -> Array:
        """Rows for those of ``codes`` whose interval is longer than when it was last written.

        ``gap_id`` names intervals that have no name yet; ``watermark_us``: up to where symbols that are not lost are complete now.
        """
        codes = codes[self._since[codes] >= 0]
        if watermark_us is not None:
            sound = codes[(self._outage[codes] < 0) & ~self._still[codes]]
            self._until[sound] = np.maximum(self._until[sound], watermark_us)
        codes = codes[self._until[codes] > self._written[codes]]
        unnamed = codes[self._interval[codes] < 0]
        self._interval[unnamed] = gap_id
        self._written[codes] = self._until[codes]
        rows = block(
            codes,
            start_time_us=self._since[codes],
            end_time_us=self._until[codes],
            evidence=0,
            state=GAP_COMPLETE,
            gap_id=self._interval[codes],
        )
        old = codes[self._until[codes] - self._since[codes] > self._config.interval_us]
        self._since[old] = self._until[old]
        self._interval[old] = -1
        return rows


def block(codes: Array, **columns: Any) -> Array:
    """Ledger rows of these symbols, int64, shape (n, len(COLUMNS)); ids unknown, nothing recovered and the end's time where not given."""
    rows = np.empty((len(codes), len(COLUMNS)), np.int64)
    filled = {"first_missing_id": UNKNOWN_ID, "last_missing_id": UNKNOWN_ID, "recovered": 0, **columns}
    filled.setdefault("exchange_time_us", np.maximum(columns["start_time_us"], columns["end_time_us"]))
    rows[:, 0] = codes
    for place, name in enumerate(COLUMNS[1:], 1):
        rows[:, place] = filled[name]
    return rows


def gap_row(gap: Gap, state: int, *, first: int, last: int, start_us: int, end_us: int, gap_id: int, recovered: int = 0) -> Array:
    """One ledger row of a gap, shape (1, len(COLUMNS)). A gap of ids that started anew has unknown ids: nobody knows the old ones' end."""
    if gap.anew:
        first = last = UNKNOWN_ID
    return block(
        np.array([gap.code]),
        first_missing_id=first,
        last_missing_id=last,
        start_time_us=start_us,
        end_time_us=end_us,
        evidence=gap.evidence,
        state=state,
        gap_id=gap_id,
        recovered=recovered,
    )


def _newest_of_each_gap(rows: Array) -> Array:
    """Places of the last row of each (symbol, gap_id), ascending."""
    names = rows[::-1][:, [COLUMNS.index("symbol_code"), COLUMNS.index("gap_id")]]
    _, last = np.unique(names, axis=0, return_index=True)
    return np.sort(len(rows) - 1 - last)


def ledger_frames(batcher: Batcher, blocks: Sequence[Array], receive_time_us: int) -> list[tuple[str, int, Frame]]:
    """Frames of topic ``gaps``, one a partition that has rows: (topic, partition, frame).

    Of several rows of a gap only the last goes out: the newest is valid, and readers tell rows of one record apart by nothing.
    """
    rows = np.concatenate(blocks) if blocks else np.empty((0, len(COLUMNS)), np.int64)
    if not len(rows):
        return []
    rows = rows[_newest_of_each_gap(rows)]
    partitions = batcher.partitions_of(rows[:, 0])
    frames = []
    for partition in np.unique(partitions).tolist():
        mine = rows[partitions == partition]
        frames += [
            _frame(batcher, partition, mine[at : at + MAX_FRAME_ROWS], receive_time_us) for at in range(0, len(mine), MAX_FRAME_ROWS)
        ]
    return frames


def _frame(batcher: Batcher, partition: int, mine: Array, receive_time_us: int) -> tuple[str, int, Frame]:
    present, codes = np.unique(mine[:, 0], return_inverse=True)
    columns = {name: np.ascontiguousarray(mine[:, place], _DTYPES.get(name, np.int64)) for place, name in enumerate(COLUMNS)}
    columns["symbol_code"] = codes.astype(np.int32)
    columns["receive_time_us"] = np.full(len(mine), receive_time_us, np.int64)
    columns["channel"] = np.full(len(mine), CHANNEL_TRADES, np.int8)
    symbols = tuple(batcher.key_of(code) for code in present.tolist())
    return "gaps", partition, Frame(source=batcher.source, watermark_us=0, symbols=symbols, columns=columns)
