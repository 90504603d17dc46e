"""Nothing is missing silently: what a feed did not publish is never inside a stretch the ledger calls covered."""

from __future__ import annotations

import asyncio

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.coverage import Coverage, CoverageConfig
from collectors.dedupe import EVIDENCE_HEARTBEAT
from collectors.left_off import LeftOff
from processors.coverage import LedgerRow, covered, timeline
from schemas.frames import GAP_COMPLETE, GAP_FILLED, GAP_OPEN
from tests.collectors.fakes import rows_of
from tests.collectors.test_filler import Venue, fill
from tests.collectors.test_pipeline import T_MS, Bench, trade

KEY = "binance:BTC-USDT"
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("trade"), st.integers(1, 4)),
        st.tuples(st.just("drop"), st.integers(1, 3)),
        st.tuples(st.just("lose"), st.integers(0, 3)),
        st.tuples(st.just("silent"), st.just(0)),
        st.tuples(st.just("late"), st.integers(1, 2)),
        st.tuples(st.just("ask"), st.just(0)),
        st.tuples(st.just("minute"), st.just(0)),
        st.tuples(st.just("kill"), st.integers(0, 7)),
    ),
    min_size=2,
    max_size=25,
)


def restarted(made: Bench, numbers: list[int], *, rows_arrive: bool, ledger_arrives: bool) -> Bench:
    """Kill -9 in the round in which ``numbers`` came, and the process after it. Of that round the broker has the trades, or nothing.

    Rows of the ledger that go out beside trades may be lost on their own: they are other partitions' records.
    """
    made.pipeline.receive([trade(number) for number in numbers], made.now)
    found = made.pipeline.take(made.now + 10_000, made.now)
    if rows_arrive:
        made.frames += [(partition, frame) for topic, partition, frame in found if topic == "trades"]
        made.gap_frames += [frame for topic, _, frame in found if topic == "gaps" and ledger_arrives]
    left_off = LeftOff("binance", 4)
    for partition, frame in made.frames:
        left_off.trades(partition, frame)
    for frame in made.gap_frames:
        left_off.gaps(frame)
    again = Bench(resumes=left_off.resumes())
    again.now, again.frames, again.gap_frames = made.now + 1_000_000, made.frames, made.gap_frames
    again.pipeline.receive([], again.now)
    again.pipeline.subscribed = True
    return again


def ledger(made: Bench) -> list[LedgerRow]:
    """Rows of BTC as published."""
    return [LedgerRow(*(row[name] for name in LedgerRow._fields)) for row in made.ledger() if row["symbol"] == KEY]


@settings(max_examples=100, deadline=None)
@given(STEPS, st.sets(st.integers(1, 60), max_size=5))
def test_what_is_missing_is_never_called_covered_and_is_fetched(steps: list[tuple[str, int]], lost: set[int]) -> None:
    """Any mix of losses, breaks, silence, late rows, answers of the venue and kills: before and after the gaps are fetched."""
    made = Bench()
    made.pipeline.subscribed = True
    made.round(trade(1))
    newest, late = 1, list[int]()
    for step, count in steps:
        made.now += 61_000_000 if step == "minute" else 20_000
        numbers = list(range(newest + 1, newest + 1 + count)) if step in ("trade", "drop", "lose", "late") else []
        newest += len(numbers)
        if step == "trade":
            made.round(*map(trade, [*late, *numbers]))
            late = []
        elif step == "late":
            late += numbers
        elif step == "lose":
            made.pipeline.connection_lost(EVIDENCE_HEARTBEAT, made.now)
            late = []
            made.pipeline.subscribed = True
        elif step == "silent":
            made.pipeline.ledger.went_silent([made.codes["BTC"]])
        elif step == "kill":
            numbers = list(range(newest + 1 + count % 2, newest + 2 + count % 2))
            newest = numbers[-1]
            made = restarted(made, [*late, *numbers], rows_arrive=bool(count & 2), ledger_arrives=bool(count & 4))
            late = []
        elif step == "ask":
            made.pipeline.ledger.venue_is_at(made.codes["BTC"], newest, (T_MS + newest) * 1000, made.now)
        made.round()
    made.round(trade(newest + 1))
    newest += 1
    _check(made, newest)
    asyncio.run(fill(made, Venue(newest, frozenset(lost)), lambda: not list(made.pipeline.sequencer.open_gaps())))
    made.pipeline.ledger.finish()
    made.round()
    made.round()
    _check(made, newest)
    assert set(range(1, newest + 1)) - set(rows_of(made.frames)[KEY]) <= lost
    assert made.pipeline.ledger.coverage.outages == 0
    assert all(interval.state != GAP_OPEN for interval in timeline(ledger(made), 0, 2**60))


def _check(made: Bench, newest: int) -> None:
    rows = ledger(made)
    published = rows_of(made.frames)[KEY]
    for number in set(range(1, newest + 1)) - set(published):
        at_us = (T_MS + number) * 1000
        assert not covered(rows, at_us, at_us + 1), (number, rows)


def test_ten_thousand_symbols_cost_arrays_not_rows() -> None:
    """A minute's growth, a loss of all and its end: one block each, whatever the symbols; with so many a row every ten minutes."""
    made = Coverage(CoverageConfig())
    codes = np.arange(10_000)
    for code in codes.tolist():
        made.watch(code)
    made.began(codes, np.full(len(codes), 1_000))
    assert made.tick(0, 5_000, 1) is None
    assert made.tick(599_000_000, 5_000, 1) is None
    rows = made.tick(600_000_000, 5_000, 1)
    assert rows is not None
    assert (len(rows), set(rows[:, 4].tolist()), set(rows[:, 8].tolist())) == (10_000, {5_000}, {1})
    lost = made.lose(codes, np.full(len(codes), 4_000), EVIDENCE_HEARTBEAT, 2)
    assert (len(lost), made.outages) == (10_000, 10_000)
    assert len(made.lose(codes, np.full(len(codes), 4_500), EVIDENCE_HEARTBEAT, 3)) == 0
    quiet = made.settle(codes[:10], np.full(10, 6_000), 5_000)
    assert set(quiet[:, 6].tolist()) == {GAP_COMPLETE}
    late = made.settle(codes[10:], np.full(9_990, 6_000), 1_000_000)
    assert set(late[:, 6].tolist()) == {GAP_FILLED}
    assert made.outages == 0


def test_an_interval_begins_anew_every_day() -> None:
    """The next begins where it ended, under another id."""
    made = Coverage(CoverageConfig(interval_us=1_000))
    made.watch(0)
    made.began(np.array([0, 0]), np.array([100, 900]))
    first = made.grow(made.watched, 2_000, 7)
    second = made.grow(made.watched, 2_500, 8)
    assert first[0, [3, 4, 8]].tolist() == [100, 2_000, 7]
    assert second[0, [3, 4, 8]].tolist() == [2_000, 2_500, 8]


def test_a_symbol_that_does_not_trade_is_covered_while_the_feed_is_live() -> None:
    """From the moment everything was subscribed."""
    made = Coverage()
    made.watch(0)
    assert len(made.watched) == 0
    made.began_quietly(500)
    assert made.grow(made.watched, 900, 1)[0, [3, 4]].tolist() == [500, 900]
