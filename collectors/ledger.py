"""What a shard's feed is known to be missing, told as it is found out. Pure: time is an argument.

Comes in: gaps that opened, were filled or given up, and when the feed was lost or heard again. Goes out: notices for the frames of trades
(through the batcher, in the order of the rows) and rows of the coverage ledger (topic ``gaps``).

Rows wait in three steps: ``urgent`` ones go out with the next frames; the others (what became of a gap, how intervals grew) only after
those frames were sent and are safe, because they say that something is held.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import numpy as np

from collectors.batcher import Batcher
from collectors.coverage import NO_END, Coverage, OpenGap, Resume, block, gap_row, ledger_frames
from collectors.dedupe import EVIDENCE_RESTART, EVIDENCE_SILENCE, Gap, Piece, Sequencer
from collectors.stats import FeedStats
from collectors.watermark import Watermark
from collectors.wire import Array
from schemas.frames import GAP_COMPLETE, GAP_FILLED, GAP_OPEN, GAP_UNFILLABLE, Frame, GapNotice

logger = logging.getLogger(__name__)

EVIDENCE_WORDS: Final = {1: "id jump", 2: "sequence", 3: "heartbeat", 4: "silence", 5: "restart", 6: "checksum"}
MAX_LOGGED_GAPS: Final = 5
"""Gaps open at once beyond which they are no longer logged one by one."""
MAX_NOTICES_A_GAP: Final = 64
"""A gap that is lost in more pieces is told as one stretch in the frames of trades; the ledger has them all."""
STATS_EVERY_US: Final = 1_000_000


class Ledger:
    """One shard's.

    Args:
        sequencer, watermark, batcher, coverage, stats: this shard's own.
        on_gap: called with each gap that opens; the shell fetches it and calls :meth:`done`.
        hold_gap_ids: longer gaps do not hold the watermark.
    """

    def __init__(
        self,
        *,
        sequencer: Sequencer,
        watermark: Watermark,
        batcher: Batcher,
        coverage: Coverage,
        stats: FeedStats,
        on_gap: Callable[[Gap], None],
        hold_gap_ids: int,
    ) -> None:
        self.coverage = coverage
        self._sequencer = sequencer
        self._watermark = watermark
        self._batcher = batcher
        self._stats = stats
        self._on_gap = on_gap
        self._hold_gap_ids = hold_gap_ids
        self._wall_us = 0  # the newest wall-clock time heard of
        self._gap_id = 0  # the newest id given
        self._urgent: list[Array] = []  # rows that go out with the next frames
        self._closing: list[Array] = []  # rows that wait until the next frames are sent
        self._leaving: list[Array] = []  # the same, of the frames being sent
        self._ready: list[Array] = []  # the same, whose frames are sent
        self._counted_us = 0
        self.losses = 0
        """How often the feed was lost: an answer to what was asked before the last time says nothing of the time after it."""

    def clock(self, wall_us: int) -> None:
        """The wall-clock time now; gaps get their ids from it."""
        self._wall_us = wall_us

    # Symbols.

    def add(self, code: int) -> None:
        """A symbol begins, without a past."""
        self._sequencer.add(code)
        self.coverage.watch(code)

    def resume(self, code: int, resume: Resume, mono_us: int) -> None:
        """Go on where an earlier process left off: what was traded since is in doubt, its open gaps are fetched further."""
        self._sequencer.add(code, resume.trade_id, resume.exchange_time_us)
        named = (gap.gap_id for gap in (*resume.gaps, *resume.strays))
        self._gap_id = max(self._gap_id, resume.newest_gap_id, resume.lost_id, resume.interval_id, *named)
        if resume.trade_id < 0:
            self.coverage.watch(code)
        else:
            since_us = resume.exchange_time_us if resume.lost_id < 0 else min(resume.exchange_time_us, resume.lost_since_us)
            since_us = resume.interval_since_us if resume.interval_id >= 0 else since_us
            self.coverage.watch(code, since_us=since_us, interval_id=resume.interval_id)
            self._watermark.resume(resume.watched_until_us, self._wall_us)
            lost_us = resume.lost_since_us if resume.lost_id >= 0 else max(resume.exchange_time_us, resume.watched_until_us)
            # the same stretch goes on under its id; one whose end was told in the trades under another, as an id that ended does not open again
            goes_on = resume.lost_id >= 0 and not resume.lost_ended
            self._lose(np.array([code]), np.array([lost_us]), EVIDENCE_RESTART, resume.lost_id if goes_on else self._next_gap_id())
            if resume.lost_ended:
                self._withdraw(code, resume.lost_id, lost_us, EVIDENCE_RESTART)
        for old in resume.gaps:
            self._reopen(code, old, mono_us)
        for gap_id, start_us in resume.orphans:
            self._batcher.notice(GapNotice(code, gap_id, start_us, start_us, GAP_FILLED))
        for old in resume.strays:
            bounds = (old.start_time_us, old.end_time_us)
            if old.end_time_us < old.start_time_us:
                self._withdraw(code, old.gap_id, old.start_time_us, old.evidence)
                continue
            self._batcher.notice(GapNotice(code, old.gap_id, *bounds, GAP_UNFILLABLE))
            self._closing.append(
                block(
                    np.array([code]),
                    start_time_us=bounds[0],
                    end_time_us=bounds[1],
                    evidence=old.evidence,
                    state=GAP_UNFILLABLE,
                    gap_id=old.gap_id,
                )
            )

    def _withdraw(self, code: int, gap_id: int, since_us: int, evidence: int) -> None:
        """A stretch without an end that another one goes on with."""
        self._batcher.notice(GapNotice(code, gap_id, since_us, since_us, GAP_FILLED))
        rows = block(np.array([code]), start_time_us=since_us, end_time_us=since_us, evidence=evidence, state=GAP_COMPLETE, gap_id=gap_id)
        self._closing.append(rows)

    def _reopen(self, code: int, old: OpenGap, mono_us: int) -> None:
        """Go on with a gap of an earlier process; one that it had no time to tell of is told now."""
        first, last = old.first_id, old.last_id
        start_us, end_us = sorted((old.start_time_us, old.end_time_us))  # of neighbours in ids, which may be the other way round in time
        gap = Gap(code, first, last, start_us, end_us, old.evidence or EVIDENCE_RESTART, [Piece(first, last, start_us, end_us)])
        gap.gap_id, gap.recovered, gap.opened_us = old.gap_id, old.recovered, mono_us
        self._sequencer.reopen(gap)
        if gap.gap_id >= 0:
            self._on_gap(gap)
            return
        gap.gap_id = self._next_gap_id()
        self._announce(gap)

    def remove(self, code: int) -> None:
        """A symbol is no longer collected: the last word on its interval."""
        codes = np.array([code])
        self._closing.append(self.coverage.grow(codes, self._watermark.value, self._next_gap_id()))
        self._end_outages(np.intersect1d(self.coverage.lost, codes), np.zeros(1, np.int64), -1)
        self.coverage.forget(code)
        self._sequencer.forget(code)

    # What is missing.

    def lost(self, evidence: int, heard_us: int) -> None:
        """The feed is down, or believed so: nobody knows what came after ``heard_us``, until a row or the venue settles it."""
        self.losses += 1
        self._sequencer.connection_broke()
        codes = self._heard_of(self.coverage.watched, heard_us)
        self._lose(codes, np.maximum(self._sequencer.last_times_us(codes), heard_us), evidence, self._next_gap_id())

    def went_silent(self, codes: list[int]) -> None:
        """These symbols are silent beyond their own law: since their last row nobody knows."""
        chosen = np.intersect1d(self.coverage.watched, np.array(codes, np.int64))
        self.coverage.doubt(chosen)
        watermark_us = self._watermark.value
        chosen = self._heard_of(chosen, 0 if watermark_us is None else watermark_us)
        self._sequencer.connection_broke(chosen)
        self._lose(chosen, self._sequencer.last_times_us(chosen), EVIDENCE_SILENCE, self._next_gap_id())

    def _heard_of(self, codes: Array, until_us: int) -> Array:
        """Those of which a trade is known. No id will tell what the others missed: their intervals end at ``until_us``."""
        unheard = self._sequencer.last_ids(codes) < 0
        if unheard.any():
            self._closing.append(self.coverage.end(codes[unheard], until_us, self._next_gap_id()))
        return codes[~unheard]

    def venue_is_at(self, code: int, last_id: int, time_us: int, mono_us: int) -> None:
        """The venue says that its newest trade of a symbol is ``last_id``: what we do not have up to there is a gap.

        ``time_us``: that trade's time or a later one of the venue, where the gap ends; 0 unknown: our clock's time is taken.
        """
        gap = self._sequencer.open_until(code, last_id, time_us or max(self._wall_us, self._stats.last_exchange_time_us))
        if gap is not None:
            self.opened(gap, mono_us)
        elif last_id == self._sequencer.last_id(code):
            self._sequencer.confirm(np.array([code]))

    def holds(self, gap: Gap, mono_us: int) -> bool:
        """Whether a gap holds the watermark now."""
        return gap_hold(gap) in self._watermark.holding(mono_us)

    def progress(self, gap: Gap) -> None:
        """Tell how far a long gap is: after a crash it is fetched from there."""
        if gap.missing and not gap.closed:
            self._closing.append(self._open_row(gap, gap.missing[0].first, gap.missing[-1].last))

    def done(self, gap: Gap, *, complete: bool) -> None:
        """Close a gap: release the watermark and say what became of it.

        ``complete``: everything the venue has was delivered; otherwise what is still missing is lost.
        """
        self._sequencer.close(gap)
        self._watermark.release(gap_hold(gap))
        if gap.anew:
            self._stats.gaps_unfillable += 1
            bounds = (gap.start_time_us, gap.end_time_us)
            self._tell(gap, gap.gap_id, *bounds, GAP_UNFILLABLE)
            row = gap_row(gap, GAP_UNFILLABLE, first=-1, last=-1, start_us=bounds[0], end_us=bounds[1], gap_id=gap.gap_id)
            row[:, -1] = gap.recovered
            self._closing.append(row)
        elif complete or not gap.missing:
            self._stats.gaps_filled += 1
            self._log("%s: trades %d..%d are here, %d of them fetched or late.", gap, gap.first_id, gap.last_id, gap.recovered)
            self._tell(gap, gap.gap_id, gap.start_time_us, gap.end_time_us, GAP_FILLED)
            self._closing.append(self._filled_row(gap, gap.gap_id))
        else:
            self._stats.gaps_unfillable += 1
            self._tell_unfillable(gap)

    def _tell_unfillable(self, gap: Gap) -> None:
        """Each piece that is lost under an id of its own (the first keeps the gap's), and what was recovered as one filled row."""
        ids = [gap.gap_id] + [self._next_gap_id() for _ in gap.missing[1:]]
        for gap_id, piece in zip(ids, gap.missing, strict=True):
            self._closing.append(
                gap_row(
                    gap, GAP_UNFILLABLE, first=piece.first, last=piece.last, start_us=piece.start_us, end_us=piece.end_us, gap_id=gap_id
                )
            )
        if gap.recovered:
            self._closing.append(self._filled_row(gap, self._next_gap_id()))
        if len(ids) <= MAX_NOTICES_A_GAP:
            for gap_id, piece in zip(ids, gap.missing, strict=True):
                self._tell(gap, gap_id, piece.start_us, piece.end_us, GAP_UNFILLABLE)
        else:
            self._tell(gap, gap.gap_id, gap.missing[0].start_us, gap.missing[-1].end_us, GAP_UNFILLABLE)

    def opened(self, gap: Gap, mono_us: int) -> None:
        """A gap was found: name it, tell of it, and have it fetched."""
        known = self.coverage.found(gap.code)
        if known is None:
            gap.gap_id = self._next_gap_id()
        else:
            gap.gap_id, evidence = known
            gap.evidence = gap.evidence if gap.anew else evidence
        gap.opened_us = mono_us
        if 0 < gap.missing_ids <= self._hold_gap_ids:
            self._watermark.hold(gap_hold(gap), mono_us)
        self._announce(gap)

    def _announce(self, gap: Gap) -> None:
        self._stats.gaps_opened += 1
        self._log("%s: trades %d..%d are missing (%s); fetching.", gap, gap.first_id, gap.last_id, EVIDENCE_WORDS[gap.evidence])
        self._urgent.append(self._open_row(gap, gap.first_id, gap.last_id))
        self._tell(gap, gap.gap_id, gap.start_time_us, gap.end_time_us, GAP_OPEN)
        self._on_gap(gap)

    def report_given_up(self) -> None:
        """Tell of gaps that became one, and of those the sequencer gave up."""
        sequencer = self._sequencer
        for kept, folded in sequencer.folded:
            self._watermark.release(gap_hold(folded))
            self._tell(folded, folded.gap_id, folded.start_time_us, folded.end_time_us, GAP_FILLED)
            self._tell(kept, kept.gap_id, kept.start_time_us, kept.end_time_us, GAP_OPEN)
            start_us = folded.start_time_us
            self._closing.append(self._open_row(kept, kept.first_id, kept.last_id))
            self._closing.append(gap_row(folded, GAP_COMPLETE, first=-1, last=-1, start_us=start_us, end_us=start_us, gap_id=folded.gap_id))
        sequencer.folded.clear()
        for gap in sequencer.given_up:
            self._stats.error("gap_given_up")
            self.done(gap, complete=False)
        sequencer.given_up.clear()

    def _lose(self, codes: Array, since_us: Array, evidence: int, gap_id: int) -> None:
        rows = self.coverage.lose(codes, since_us, evidence, gap_id)
        if len(rows):
            self._urgent.append(rows)
            for code, since in zip(rows[:, 0].tolist(), rows[:, 3].tolist(), strict=True):
                self._batcher.notice(GapNotice(code, gap_id, since, NO_END, GAP_OPEN))

    def settle(self) -> None:
        """Say of lost symbols that nothing was missed, where that is known by now."""
        if self.coverage.outages:
            lost = self.coverage.lost
            codes = lost[~self._sequencer.doubtful(lost)]
            watermark_us = self._watermark.value
            self._end_outages(codes, self._sequencer.last_times_us(codes), -1 if watermark_us is None else watermark_us)

    def _end_outages(self, codes: Array, end_us: Array, watermark_us: int) -> None:
        if len(codes):
            rows = self.coverage.settle(codes, end_us, watermark_us)
            self.coverage.reach(codes, watermark_us)
            again = rows[rows[:, 6] == GAP_FILLED, 0]
            if len(again):  # bars are made anew: their interval vouches for them, which would be told within a minute only
                self._closing.append(self.coverage.grow(again, watermark_us, self._next_gap_id()))
            self._closing.append(rows)
            for code, start, end, gap_id in rows[:, [0, 3, 4, 8]].tolist():
                self._batcher.notice(GapNotice(code, gap_id, start, end, GAP_FILLED))

    def _log(self, text: str, gap: Gap, *values: object) -> None:
        """A line for a few gaps; after a long absence every symbol has one, and the topic and the metrics say it all."""
        level = logging.INFO if self._stats.gaps_open < MAX_LOGGED_GAPS else logging.DEBUG
        logger.log(level, text, self._batcher.key_of(gap.code), *values)

    def _tell(self, gap: Gap, gap_id: int, start_us: int, end_us: int, state: int) -> None:
        self._batcher.notice(GapNotice(gap.code, gap_id, start_us, end_us, state))

    def _open_row(self, gap: Gap, first: int, last: int) -> Array:
        start_us, end_us = gap.start_time_us, gap.end_time_us
        row = gap_row(gap, GAP_OPEN, first=first, last=last, start_us=start_us, end_us=end_us, gap_id=gap.gap_id)
        row[:, -1] = gap.recovered
        return row

    def _filled_row(self, gap: Gap, gap_id: int) -> Array:
        return block(
            np.array([gap.code]),
            first_missing_id=gap.first_id,
            last_missing_id=gap.last_id,
            start_time_us=gap.start_time_us,
            end_time_us=gap.end_time_us,
            evidence=gap.evidence,
            state=GAP_FILLED,
            gap_id=gap_id,
            recovered=gap.recovered,
        )

    def _next_gap_id(self) -> int:
        """A fresh id: the wall clock's microseconds, moved on where that was given before."""
        self._gap_id = max(self._gap_id + 1, self._wall_us)
        return self._gap_id

    # Going out.

    def take_urgent(self) -> list[tuple[str, int, Frame]]:
        """Frames of topic ``gaps`` that go out with the frames of trades taken now. Call :meth:`sent` when all are handed on."""
        urgent, self._urgent = self._urgent, []
        self._leaving += self._closing
        self._closing = []
        return ledger_frames(self._batcher, urgent, self._wall_us) if urgent else []

    def sent(self) -> None:
        """The frames that were taken with :meth:`take_urgent` are handed on."""
        if self._leaving:
            self._ready += self._leaving
            self._leaving = []

    @property
    def waits(self) -> bool:
        """Whether :meth:`take_ready` has rows."""
        return bool(self._ready)

    def take_ready(self) -> list[tuple[str, int, Frame]]:
        """Frames of topic ``gaps`` that say what became of gaps and how intervals grew.

        They are to be sent after everything that was sent before this call is acknowledged: they say that it is held.
        """
        ready, self._ready = self._ready, []
        return ledger_frames(self._batcher, ready, self._wall_us)

    def finish(self) -> None:
        """No more rows will come: the last word on every interval. They are ready once the next frames are sent."""
        self.settle()
        self._closing.append(self.coverage.grow(self.coverage.watched, self._watermark.value, self._next_gap_id()))

    def tick(self, mono_us: int, watermark_us: int | None, *, subscribed: bool) -> None:
        """Let intervals grow when it is time; ``subscribed``: everything wanted is, now."""
        if subscribed and watermark_us is not None:
            rows = self.coverage.tick(mono_us, watermark_us, self._gap_id + 1)
            if rows is not None:
                self._next_gap_id()
                # the watermark lags: from before a symbol was subscribed nobody knows what it traded
                self.coverage.began_quietly(max(watermark_us, self._watermark.venue_us(mono_us)))
                self._closing.append(rows)
        if mono_us - self._counted_us >= STATS_EVERY_US:
            self._counted_us = mono_us
            opened = [gap.opened_us for gap in self._sequencer.open_gaps()]
            self._stats.gaps_open = len(opened)
            self._stats.oldest_gap_us = mono_us - min(opened) if opened else 0
            self._stats.symbols_lost = self.coverage.outages


def gap_hold(gap: Gap) -> str:
    """Name under which a gap holds the watermark."""
    return f"gap {gap.code} {gap.gap_id}"
