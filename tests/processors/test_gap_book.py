"""The gap book: bars that touch a known hole are not complete, and the book stays bounded."""

from __future__ import annotations

import numpy as np
import pytest

from processors.gap_book import MAX_INTERVALS, MAX_SOURCES, GapBook, touches
from schemas.frames import GAP_FILLED, GAP_OPEN, GAP_UNFILLABLE, Frame, GapNotice

S = 1_000_000
T0 = 1_700_000_000 * S
KEY = "binance:BTC-USDT"
OTHER = "binance:ETH-USDT"


def told(*notices: tuple[int, int, int, int], key: str = KEY, source: str = "binance/ws", watermark_s: int = 0) -> Frame:
    """A frame with notices (gap id, start and end in seconds after T0, state) of one symbol."""
    gaps = tuple(GapNotice(0, gap_id, T0 + start * S, T0 + end * S, state) for gap_id, start, end, state in notices)
    return Frame(source=source, watermark_us=T0 + watermark_s * S, symbols=(key,), gaps=gaps)


def complete(book: GapBook, key: str = KEY, *, count: int = 10, length_s: int = 1) -> list[int]:
    """The complete column of ``count`` bars from T0 on that came as complete."""
    open_us = T0 + np.arange(count) * length_s * S
    bars = {
        "symbol_code": np.zeros(count, np.int32),
        "open_time_us": open_us,
        "close_time_us": open_us + length_s * S,
        "complete": np.ones(count, np.int8),
    }
    column = book.complete((key,), bars)
    assert column.dtype == np.int8
    return column.tolist()


def test_a_bar_touches_a_gap_when_a_missing_trade_could_lie_in_it() -> None:
    """Both ends count: the missing trade may have the very time of the row before or after the hole."""
    opens, closes = np.array([0, 10, 20, 30]), np.array([10, 20, 30, 40])
    assert touches(opens, closes, 12, 25).tolist() == [False, True, True, False]
    assert touches(opens, closes, 12, 30).tolist() == [False, True, True, True]
    assert touches(opens, closes, 20, 20).tolist() == [False, False, True, False]
    assert touches(opens, closes, 20, 0).tolist() == [False, False, True, True]


def test_open_and_unfillable_gaps_mark_their_bars_and_a_filled_one_no_longer_does() -> None:
    """The newest notice of a gap id counts."""
    book = GapBook(100 * S)
    book.apply(told((1, 2, 3, GAP_OPEN), (2, 7, 7, GAP_UNFILLABLE)))
    assert complete(book) == [1, 1, 0, 0, 1, 1, 1, 0, 1, 1]
    book.apply(told((1, 2, 3, GAP_FILLED)))
    assert complete(book) == [1, 1, 1, 1, 1, 1, 1, 0, 1, 1]
    book.apply(told((3, 5, 4, GAP_OPEN)))
    assert complete(book) == [1] * 5 + [0] * 5
    book.apply(told((3, 8, 8, GAP_OPEN)))
    assert complete(book) == [1] * 7 + [0, 0, 1]


def test_an_old_notice_that_comes_again_opens_nothing() -> None:
    """Frames come again after a crash: ids grow, so one not above the newest that ended, and not open, has ended. Others stay as they are."""
    book = GapBook(100 * S)
    first = told((1, 2, 3, GAP_OPEN), (2, 5, 4, GAP_OPEN))
    book.apply(first)
    book.apply(told((3, 7, 7, GAP_OPEN), (2, 5, 6, GAP_FILLED)))
    book.apply(first)
    assert complete(book) == [1, 1, 0, 0, 1, 1, 1, 0, 1, 1]
    book.apply(told((1, 2, 2, GAP_UNFILLABLE), (4, 9, 9, GAP_UNFILLABLE), (3, 7, 7, GAP_FILLED)))
    again = GapBook.from_state(100 * S, book.to_state())
    again.apply(first)
    assert complete(again) == [1, 1, 0, 1, 1, 1, 1, 1, 1, 0]
    again.apply(told((1, 2, 3, GAP_FILLED), (4, 9, 9, GAP_FILLED)))
    assert complete(again) == [1] * 10
    twice = GapBook.from_state(100 * S, again.to_state())  # nothing is open, and yet it knows
    twice.apply(first)
    assert (complete(twice), len(twice)) == ([1] * 10, 1)


def test_an_id_ended_for_its_own_symbol_and_source_only() -> None:
    """A replay tells of ids of its own past; of more sources than are remembered the oldest are forgotten."""
    book = GapBook(100 * S)
    book.apply(told((9, 2, 3, GAP_FILLED)))
    book.apply(told((5, 2, 2, GAP_OPEN), source="replay"))
    book.apply(told((5, 2, 2, GAP_OPEN), key=OTHER))
    assert (complete(book)[2], complete(book, OTHER)[2]) == (0, 0)
    for number in range(100):
        book.apply(told((number, 2, 2, GAP_FILLED), source=f"replay/{number}"))
    assert {key: len(ended) for key, _, ended in book.to_state()} == {KEY: MAX_SOURCES, OTHER: 0}


def test_a_state_without_what_ended_is_read() -> None:
    """The first form: intervals without a state, no ids that ended."""
    book = GapBook.from_state(100 * S, [[KEY, [[1, T0 + 2 * S, T0 + 3 * S, "binance/ws"]]]])
    assert complete(book) == [1, 1, 0, 0, 1, 1, 1, 1, 1, 1]
    book.apply(told((1, 2, 3, GAP_FILLED)))
    assert complete(book) == [1] * 10


def test_a_gap_is_of_one_symbol_only() -> None:
    """Bars of another symbol, and of a symbol without a gap beside one with two, stay as they are."""
    book = GapBook(100 * S)
    book.apply(told((1, 2, 3, GAP_OPEN), (2, 5, 6, GAP_OPEN)))
    assert complete(book, OTHER) == [1] * 10
    open_us = np.array([T0 + 2 * S] * 2)
    bars = {
        "symbol_code": np.array([0, 1], np.int32),
        "open_time_us": open_us,
        "close_time_us": open_us + S,
        "complete": np.ones(2, np.int8),
    }
    assert book.complete((OTHER, KEY), bars).tolist() == [1, 0]


def test_notices_that_make_no_sense_change_nothing() -> None:
    """A state nobody knows, a time out of range, and a filling of what was never open."""
    book = GapBook(100 * S)
    book.apply(told((1, 2, 3, 9), (2, -(10**10), 3, GAP_OPEN), (3, 1, 10**12, GAP_OPEN), (4, 1, 2, GAP_FILLED)))
    assert complete(book) == [1] * 10


def test_the_book_forgets_what_no_bar_reaches_back_to_and_never_grows_beyond_its_limit() -> None:
    """Past gaps go when a new one of the same source comes; beyond the limit the oldest are joined, so that no bar is wrongly complete."""
    book = GapBook(100 * S)
    book.apply(told((1, 1, 2, GAP_UNFILLABLE)))
    book.apply(told((2, 500, 501, GAP_OPEN), source="replay", watermark_s=501))
    assert complete(book)[1] == 0  # of another source: its past may be the present of a replay
    book.apply(told((3, 500, 501, GAP_OPEN), watermark_s=501))
    assert complete(book)[1] == 1
    full = GapBook(10**6 * S)
    for number in range(3 * MAX_INTERVALS):
        full.apply(told((number, 2 * number, 2 * number, GAP_UNFILLABLE)))
    assert len(full.to_state()[0][1]) == MAX_INTERVALS
    marked = complete(full, count=6 * MAX_INTERVALS)
    assert all(marked[second] == 0 for second in range(0, 6 * MAX_INTERVALS, 2))


def test_state_goes_there_and_back() -> None:
    """The restored book is the same; what is no book is refused."""
    book = GapBook(100 * S)
    book.apply(told((1, 2, 3, GAP_OPEN), (2, 5, 4, GAP_OPEN)))
    book.apply(told((1, 2, 3, GAP_OPEN), key=OTHER))
    assert GapBook.from_state(100 * S, book.to_state()).to_state() == book.to_state()
    for state in ([["k", []]], [["k", [[1, 2]]]], [[1, [[1, 2, 3, "s"]]]], [["k", [], []]], [["k", [], [["s"]]]]):
        with pytest.raises(ValueError, match="contradict|unpack"):
            GapBook.from_state(100 * S, state)


def test_an_open_gap_is_not_forgotten_when_the_one_it_was_folded_with_is_filled() -> None:
    """Beyond the limit the two oldest are one; nothing but time ends that."""
    book = GapBook(10**12)
    second = 1_000_000
    for number in range(MAX_INTERVALS + 1):
        start = number * 100 * second
        opened = GapNotice(0, 1_000 + number, start, start + second, GAP_OPEN)
        book.apply(Frame(source="s", watermark_us=0, symbols=("k",), columns={}, gaps=(opened,)))
    notice = GapNotice(0, 1_001, 100 * second, 101 * second, GAP_FILLED)
    book.apply(Frame(source="s", watermark_us=0, symbols=("k",), columns={}, gaps=(notice,)))
    bars = {
        "symbol_code": np.array([0]),
        "open_time_us": np.array([0]),
        "close_time_us": np.array([60 * second]),
        "complete": np.ones(1, np.int8),
    }
    assert book.complete(("k",), bars).tolist() == [0]
