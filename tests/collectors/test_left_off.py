"""What a collector goes on with after a restart, from what it published before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.coverage import OpenGap
from collectors.dedupe import NUMBERING
from collectors.left_off import LeftOff, without
from collectors.wire import TRADE_DTYPES
from schemas.codec import FrameCodec
from schemas.frames import GAP_COMPLETE, GAP_FILLED, GAP_OPEN, GAP_UNFILLABLE, HISTORY, Frame, GapNotice

T = 1_700_000_000_000_000
BTC, ETH = "binance:BTC-USDT", "binance:ETH-USDT"


def trades(rows: list[tuple[str, int]], *, watermark: int = T, flags: int = 0, source: str = "binance/ws/0", at: int = 0) -> Frame:
    """A frame of (key, id); times follow ids."""
    keys = tuple(dict.fromkeys(key for key, _ in rows))
    columns: dict[str, Any] = {name: np.zeros(len(rows), dtype) for name, dtype in TRADE_DTYPES.items()}
    columns["symbol_code"][:] = [keys.index(key) for key, _ in rows]
    columns["trade_id"][:] = [trade_id for _, trade_id in rows]
    columns["exchange_time_us"][:] = [(at or T) + trade_id for _, trade_id in rows]
    return Frame(source=source, watermark_us=watermark, symbols=keys, columns=columns if rows else {}, flags=flags)


def gaps(key: str, *rows: tuple[int, int, int, int, int, int, int]) -> Frame:
    """A frame of the ledger: (gap id, state, first, last, start, end, evidence)."""
    columns: dict[str, Any] = {name: np.zeros(len(rows), dtype) for name, dtype in FrameCodec("gaps", 1).dtypes.items()}
    names = ("gap_id", "state", "first_missing_id", "last_missing_id", "start_time_us", "end_time_us", "evidence")
    for place, name in enumerate(names):
        columns[name][:] = [row[place] for row in rows]
    return Frame(source="binance/ws/0", watermark_us=0, symbols=(key,), columns=columns)


def test_the_newest_trade_and_what_the_feed_promised() -> None:
    """Of each symbol; another collector's frames and rows of the past say nothing about the live feed."""
    made = LeftOff("binance", 1)
    made.trades(0, trades([(BTC, 7), (ETH, 70), (BTC, 8)], watermark=T + 5))
    made.trades(0, trades([], watermark=T + 900))
    made.trades(0, trades([(BTC, 2)], flags=HISTORY, watermark=0, source="binance/ws/0/fill"))
    made.trades(0, trades([(BTC, 99)], source="binance-usdm/ws/0"))
    found = made.resumes()
    assert (found[BTC].trade_id, found[BTC].exchange_time_us, found[BTC].watched_until_us) == (8, T + 8, T + 900)
    assert found[ETH].trade_id == 70
    assert found[BTC].gaps == ()


def test_the_newest_gap_id_counts_also_of_what_is_closed() -> None:
    """Of rows of any state, and of notices whose row was lost: ids after it are fresh."""
    made = LeftOff("binance", 1)
    made.trades(0, replace(trades([(BTC, 100)]), gaps=(GapNotice(0, 12, T, T + 1, GAP_OPEN),)))
    assert made.resumes()[BTC].newest_gap_id == 12
    made.gaps(gaps(BTC, (20, GAP_FILLED, 30, 39, T, T + 9, 5), (15, GAP_COMPLETE, -1, -1, T, T + 9, 0)))
    assert made.resumes()[BTC].newest_gap_id == 20


def test_what_a_new_numbering_began_with_and_was_not_published_is_a_gap() -> None:
    """The row of that gap has no ids, and the process that knew them may be gone. What came later is no gap."""
    made = LeftOff("binance", 1)
    made.trades(0, trades([(BTC, 100)]))
    made.trades(0, trades([(BTC, NUMBERING + 4), (BTC, NUMBERING + 5)]))
    (gap,) = made.resumes()[BTC].gaps
    assert (gap.gap_id, gap.first_id, gap.last_id) == (-1, NUMBERING + 1, NUMBERING + 3)
    assert gap.start_time_us == T + 100
    made.trades(0, trades([(BTC, NUMBERING + number) for number in (1, 2, 3)]))
    assert made.resumes()[BTC].gaps == ()
    made = LeftOff("binance", 1)
    made.trades(0, trades([(BTC, 100)]))
    made.trades(0, trades([(BTC, NUMBERING + 1)]))
    assert made.resumes()[BTC].gaps == ()


def test_a_notice_whose_row_was_lost_is_to_be_withdrawn() -> None:
    """Trades and ledger are records of two topics: a killed collector may have told of a gap in the trades only."""
    made = LeftOff("binance", 1)
    told = [(7, GAP_OPEN), (8, GAP_OPEN), (9, GAP_OPEN), (9, GAP_FILLED), (10, GAP_OPEN)]
    for gap_id, state in told:
        made.trades(0, replace(trades([(BTC, gap_id)]), gaps=(GapNotice(0, gap_id, T + gap_id, -1, state),)))
    made.gaps(gaps(BTC, (8, GAP_OPEN, -1, -1, T + 8, -1, 5)))
    resume = made.resumes()[BTC]
    assert (resume.lost_id, resume.orphans) == (8, ((7, T + 7), (10, T + 10)))


def test_rows_before_an_open_gap_that_were_lost_are_a_gap_of_their_own() -> None:
    """The ledger tells of a jump whose row, and those before it, never arrived."""
    made = LeftOff("binance", 1)
    made.trades(0, trades([(BTC, 100)]))
    made.gaps(gaps(BTC, (2, GAP_OPEN, 121, 130, T + 120, T + 131, 1), (1, GAP_OPEN, 105, 110, T + 104, T + 111, 1)))
    resume = made.resumes()[BTC]
    found = sorted((gap.first_id, gap.last_id, gap.gap_id, gap.start_time_us, gap.end_time_us) for gap in resume.gaps)
    assert found == [
        (101, 104, -1, T + 100, T + 104),
        (105, 110, 1, T + 104, T + 111),
        (111, 120, -1, T + 111, T + 120),
        (121, 130, 2, T + 120, T + 131),
    ]


def test_open_gaps_go_on_and_those_that_ended_do_not() -> None:
    """The newest row of an id counts; a stretch without ids is the one nobody knows of."""
    made = LeftOff("binance", 1)
    made.trades(0, trades([(BTC, 100)]))
    made.gaps(gaps(BTC, (1, GAP_OPEN, 10, 19, T, T + 9, 1), (2, GAP_OPEN, 30, 39, T, T + 9, 5), (3, GAP_OPEN, -1, -1, T + 50, -1, 4)))
    made.gaps(gaps(BTC, (1, GAP_OPEN, 15, 19, T, T + 9, 1), (2, GAP_FILLED, 30, 39, T, T + 9, 5)))
    resume = made.resumes()[BTC]
    assert resume.gaps == (OpenGap(1, 15, 19, T, T + 9, 1),)
    assert (resume.lost_id, resume.lost_since_us) == (3, T + 50)


def test_the_interval_that_reaches_furthest_goes_on() -> None:
    """Under its own id; settled stretches are no intervals."""
    made = LeftOff("binance", 1)
    made.trades(0, trades([(BTC, 100)]))
    made.gaps(gaps(BTC, (1, GAP_COMPLETE, -1, -1, T - 90, T - 50, 0), (2, GAP_COMPLETE, -1, -1, T - 50, T, 0)))
    made.gaps(gaps(BTC, (2, GAP_COMPLETE, -1, -1, T - 50, T + 60, 0), (3, GAP_COMPLETE, -1, -1, T + 60, T + 70, 5)))
    resume = made.resumes()[BTC]
    assert (resume.interval_id, resume.interval_since_us) == (2, T - 50)


def test_a_hole_that_nobody_had_time_to_tell_of_is_open() -> None:
    """Rows after the gap are published, its row of the ledger is not."""
    made = LeftOff("binance", 1)
    made.trades(0, trades([(BTC, 1), (BTC, 2), (BTC, 6)]))
    made.trades(0, trades([(BTC, 4)]))
    made.trades(0, trades([(BTC, 12)]))
    made.gaps(gaps(BTC, (9, GAP_UNFILLABLE, 7, 9, T, T, 1)))
    assert made.resumes()[BTC].gaps == (
        OpenGap(-1, 3, 3, T + 2, T + 6, 0),
        OpenGap(-1, 5, 5, T + 2, T + 6, 0),
        OpenGap(-1, 10, 11, T + 6, T + 12, 0),
    )


def test_on_venues_that_skip_ids_a_hole_is_none() -> None:
    """Nothing is said about what lies between."""
    made = LeftOff("binance", 1, consecutive=False)
    made.trades(0, trades([(BTC, 1), (BTC, 6)]))
    assert made.resumes()[BTC].gaps == ()


def test_ids_that_started_anew_are_the_newest() -> None:
    """The old numbering is no more."""
    made = LeftOff("binance", 1)
    made.trades(0, trades([(BTC, 5_000)]))
    made.trades(0, trades([(BTC, 1), (BTC, 2)], at=T + 3_000_000))
    resume = made.resumes()[BTC]
    assert (resume.trade_id, resume.gaps) == (2, ())


def test_between_two_numberings_there_is_no_hole() -> None:
    """Ids of a new numbering lie far above those of the old: nothing between them was ever traded."""
    made = LeftOff("binance", 1)
    made.trades(0, trades([(BTC, 5_000)]))
    made.trades(0, trades([(BTC, NUMBERING + 1), (BTC, NUMBERING + 2)], at=T + 3_000_000))
    resume = made.resumes()[BTC]
    assert (resume.trade_id, resume.gaps) == (NUMBERING + 2, ())


def test_symbols_that_no_frame_tells_of_come_from_the_store() -> None:
    """The store counts for them only; what is too old starts anew, but its gaps go on."""
    made = LeftOff("binance", 1)
    made.trades(0, trades([(BTC, 100)]))
    made.gaps(gaps(ETH, (1, GAP_OPEN, 10, 19, T, T + 9, 1), (2, GAP_OPEN, -1, -1, T, T + 9, 5)))
    made.stored(BTC, 999, T)
    made.stored(ETH, 50, T - 77)
    assert made.resumes()[BTC].trade_id == 100
    assert made.resumes()[ETH].trade_id == 50
    old = made.resumes(oldest_us=T)[ETH]
    assert (old.trade_id, [gap.gap_id for gap in old.gaps], [gap.gap_id for gap in old.strays]) == (-1, [1], [2])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=6))
def test_what_is_left_of_an_interval(first: int, last: int, told: list[tuple[int, int]]) -> None:
    """Element by element."""
    pairs = sorted((min(pair), max(pair)) for pair in told)
    left = {number for low, high in without(first, last, pairs) for number in range(low, high + 1)}
    assert left == {number for number in range(first, last + 1) if not any(low <= number <= high for low, high in pairs)}


def test_gaps_of_a_numbering_that_is_no_more_are_lost() -> None:
    """Asked for in the new numbering, their ids would be other trades."""
    made = LeftOff("binance", 1)
    made.trades(0, trades([(BTC, 100)]))
    made.gaps(gaps(BTC, (50, GAP_OPEN, 90, 95, T + 89, T + 96, 1)))
    made.trades(0, trades([(BTC, NUMBERING + 97)]))
    resume = made.resumes()[BTC]
    assert all(gap.first_id > NUMBERING for gap in resume.gaps)
    assert [(gap.gap_id, gap.start_time_us, gap.end_time_us) for gap in resume.strays] == [(50, T + 89, T + 96)]
