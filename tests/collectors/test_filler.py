"""Gaps are fetched: live ones first, long ones whole, and none is lost to a venue that is away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.errors import CollectorError, RefusedError, UnavailableError
from collectors.filler import FillerConfig, GapFiller
from schemas.frames import GAP_FILLED, GAP_OPEN, GAP_UNFILLABLE, HISTORY
from tests.collectors.fakes import HandClock, rows_of
from tests.collectors.test_pipeline import T_MS, Bench, trade


class StepClock(HandClock):
    """Sleeping moves the clock and lets the others run."""

    async def sleep(self, seconds: float) -> None:
        """See Clock.sleep."""
        await super().sleep(seconds)
        await asyncio.sleep(0)


class Venue:
    """Pages of trades up to ``newest``, without those it lost; ``faults`` are raised one a request."""

    def __init__(self, newest: int, lost: frozenset[int] = frozenset(), page_rows: int = 1_000) -> None:
        self.newest, self.lost, self.page_rows = newest, lost, page_rows
        self.faults: list[CollectorError] = []
        self.asked: list[tuple[int, bool]] = []

    async def page(self, key: str, from_id: int, *, background: bool) -> tuple[dict[str, np.ndarray[Any, Any]], bool]:
        """See FetchPage."""
        await asyncio.sleep(0)
        self.asked.append((from_id, background))
        if self.faults:
            raise self.faults.pop(0)
        ids = [trade_id for trade_id in range(max(from_id, 1), self.newest + 1) if trade_id not in self.lost][: self.page_rows]
        count = len(ids)
        return {
            "trade_id": np.array(ids, np.int64),
            "price": np.full(count, 1.5),
            "size": np.full(count, 2.0),
            "side": np.ones(count, np.int8),
            "exchange_time_us": (T_MS + np.array(ids, np.int64)) * 1000,
        }, False


async def fill(made: Bench, venue: Venue, until: Callable[[], bool], config: FillerConfig | None = None) -> None:
    """Fetch what is open until ``until()``, rounds going on meanwhile."""
    clock = StepClock()
    filler = GapFiller(venue.page, clock, config)
    for gap in made.gaps:
        filler.add(made.pipeline, gap)
    running = asyncio.create_task(filler.run())
    try:
        for _ in range(5_000):
            await asyncio.sleep(0)
            made.now = max(made.now, clock.mono)
            made.round()
            if until():
                made.round()
                return
        raise AssertionError(made.pipeline.stats)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def done(made: Bench) -> bool:
    """No gap is open."""
    return not list(made.pipeline.sequencer.open_gaps())


@settings(max_examples=30, deadline=None)
@given(
    st.sets(st.integers(2, 299), max_size=60),
    st.sets(st.integers(2, 299), max_size=8),
    st.integers(1, 50),
    st.lists(st.sampled_from(["away", "slow"]), max_size=6),
)
def test_what_was_dropped_is_fetched_and_what_the_venue_lost_is_named(
    dropped: set[int], lost: set[int], page_rows: int, faults: list[str]
) -> None:
    """Any ids dropped, any lost by the venue, pages of any size, a venue that is away now and then: each id is there once or named as lost."""
    made = Bench()
    made.round(*(trade(number) for number in range(1, 301) if number not in dropped | lost))
    venue = Venue(300, frozenset(lost), page_rows)
    venue.faults = [UnavailableError("away") if fault == "away" else UnavailableError("slow", retry_after_s=2.0) for fault in faults]
    asyncio.run(fill(made, venue, lambda: done(made)))
    assert sorted(rows_of(made.frames)["binance:BTC-USDT"]) == [number for number in range(1, 301) if number not in lost]
    named: dict[int, set[int]] = {GAP_OPEN: set(), GAP_FILLED: set(), GAP_UNFILLABLE: set()}
    newest: dict[int, dict[str, Any]] = {}
    for row in made.ledger():
        newest[row["gap_id"]] = row
        if row["state"] == GAP_OPEN:
            named[GAP_OPEN] |= set(range(row["first_missing_id"], row["last_missing_id"] + 1))
    for row in newest.values():
        named.setdefault(row["state"], set()).update(range(row["first_missing_id"], row["last_missing_id"] + 1))
    assert named[GAP_OPEN] == dropped | lost
    assert named[GAP_UNFILLABLE] == lost
    assert all(row["state"] != GAP_OPEN for row in newest.values())


async def test_a_long_gap_is_fetched_whole_behind_live_ones() -> None:
    """Twelve thousand ids, oldest first, as rows of the past; the hole of one id that opened after it is closed before it is."""
    made = Bench()
    made.round(trade(1))
    made.round(trade(12_002, ms=T_MS + 60_000), trade(12_004, ms=T_MS + 60_001))
    long, live = made.gaps
    venue = Venue(12_004)
    await fill(made, venue, lambda: done(made), FillerConfig(workers=2))
    assert sorted(rows_of(made.frames)["binance:BTC-USDT"]) == list(range(1, 12_005))
    past = [frame for _, frame in made.frames if frame.flags & HISTORY]
    assert sum(frame.row_count for frame in past) >= 10_000  # the first pages came while the live gap held the watermark
    ids = [trade_id for frame in past for trade_id in frame.columns["trade_id"].tolist()]
    assert ids == sorted(ids)
    closed = [row["gap_id"] for row in made.ledger() if row["state"] == GAP_FILLED]
    assert closed == [live.gap_id, long.gap_id]
    assert {background for from_id, background in venue.asked if from_id == 12_003} == {False}
    assert {background for from_id, background in venue.asked if from_id < 12_000} == {True}


async def test_a_long_gap_tells_how_far_it_is() -> None:
    """A process that takes over fetches from there."""
    made = Bench()
    made.round(trade(1), trade(12_002, ms=T_MS + 60_000))
    venue = Venue(12_002)
    await fill(made, venue, lambda: made.pipeline.stats.backfilled >= 5_000, FillerConfig(progress_us=0))
    made.round()
    told = [row for row in made.ledger() if row["state"] == GAP_OPEN]
    assert told[-1]["first_missing_id"] > 4_000
    assert told[-1]["last_missing_id"] == 12_001
    assert told[-1]["recovered"] == told[-1]["first_missing_id"] - 2
    assert {(row["start_time_us"], row["end_time_us"]) for row in told} == {((T_MS + 1) * 1000, (T_MS + 60_000) * 1000)}


async def test_a_refusal_ends_a_gap_only_when_it_is_repeated() -> None:
    """The market is gone: unfillable after as many refusals as tries."""
    made = Bench()
    made.round(trade(1), trade(5))
    venue = Venue(5)
    venue.faults = [RefusedError("no such market") for _ in range(4)]
    await fill(made, venue, lambda: done(made))
    assert [row["state"] for row in made.ledger()] == [GAP_OPEN, GAP_UNFILLABLE]
    assert made.pipeline.stats.errors == {"backfill_failed": 4}


async def test_a_venue_that_is_away_for_long_loses_no_gap() -> None:
    """A hundred failed requests later it is back, and the gap is filled."""
    made = Bench()
    made.round(trade(1), trade(5))
    venue = Venue(5)
    venue.faults = [UnavailableError("away") for _ in range(100)]
    await fill(made, venue, lambda: done(made))
    assert [row["state"] for row in made.ledger()] == [GAP_OPEN, GAP_FILLED]


async def test_rest_that_lags_the_stream_is_asked_again() -> None:
    """It does not have the newest trades yet: the gap stays open and is filled by a later request."""
    made = Bench()
    made.round(trade(1), trade(9))
    venue = Venue(5)
    clock_rounds = 0

    def catches_up() -> bool:
        nonlocal clock_rounds
        clock_rounds += 1
        if len(venue.asked) >= 2:
            venue.newest = 9
        return done(made)

    await fill(made, venue, catches_up)
    assert sorted(rows_of(made.frames)["binance:BTC-USDT"]) == list(range(1, 10))


@pytest.mark.parametrize("page_rows", [1, 3, 1_000])
async def test_ids_that_may_have_holes_are_filled_by_what_the_venue_shows(page_rows: int) -> None:
    """After a break on a venue that skips ids: every second id exists, and nothing is lost."""
    made = Bench(consecutive=False)
    made.round(trade(1))
    made.pipeline.connection_lost(5, made.now)
    made.round(trade(21))
    venue = Venue(21, frozenset(range(2, 21, 2)), page_rows)
    await fill(made, venue, lambda: done(made))
    assert sorted(rows_of(made.frames)["binance:BTC-USDT"]) == list(range(1, 22, 2))
    assert {row["state"] for row in made.ledger() if row["first_missing_id"] >= 0} == {GAP_OPEN, GAP_FILLED}
    assert made.ledger()[-1]["state"] == GAP_FILLED


async def test_fetched_rows_leave_room_for_what_the_feed_brings() -> None:
    """A sink that was blocked for long: what waits in the socket finds room once it goes on, however much is fetched meanwhile."""
    made = Bench()
    made.round(trade(1))
    made.round(trade(300_000, ms=T_MS + 5_000))
    venue = Venue(300_000)
    clock = StepClock()
    filler = GapFiller(venue.page, clock)
    filler.add(made.pipeline, made.gaps[0])
    working = asyncio.create_task(filler.run())
    for _ in range(20_000):
        await asyncio.sleep(0)
    assert made.pipeline.batcher.room >= 170_000
    made.pipeline.receive([trade(number, ms=T_MS + 6_000) for number in range(300_001, 300_001 + 20_000)], T_MS * 1_000)
    made.round()
    working.cancel()
    assert sum(frame.row_count for _, frame in made.frames) > 20_000
