"""Cursors: what goes in comes out, and nothing else is taken for one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.cursors import LEAST, NOTHING_DUE, LiveCursor, PageCursor, Position, decode_live, decode_page, series_code
from api.errors import CursorError

INT64 = st.integers(LEAST, NOTHING_DUE)
LIVE = st.builds(
    LiveCursor,
    topic=st.sampled_from(["bars", "trades"]),
    partition=st.integers(0, 1023),
    offset=st.integers(0, NOTHING_DUE),
    row=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 2**64 - 1),
    floor_key=INT64,
    until_us=INT64,
)
PAGE_FIELDS = {
    "topic": st.sampled_from(["bars", "trades"]),
    "series": st.integers(0, 2**32 - 1),
    "backward": st.booleans(),
    "start_us": INT64,
    "end_us": INT64,
    "snapshot_offset": INT64,
    "last": INT64,
}
PAGE = st.builds(PageCursor, **PAGE_FIELDS, known_at_us=st.none() | INT64) | st.builds(
    PageCursor, **PAGE_FIELDS, known_at_us=INT64, open_end=st.just(True)
)


@settings(deadline=None)
@given(live=LIVE, page=PAGE)
def test_cursors_survive_their_text_form(live: LiveCursor, page: PageCursor) -> None:
    """Every field comes back, and the text fits a URL and a header as it is."""
    for text in (live.encode(), page.encode()):
        assert text.replace("-", "").replace("_", "").isalnum()
        assert len(text) < 100
    assert decode_live(live.encode()) == live
    assert decode_page(page.encode()) == page


@settings(deadline=None)
@given(live=LIVE, place=st.integers(0, 200), char=st.sampled_from("AZaz09-_"))
def test_one_changed_character_is_noticed(live: LiveCursor, place: int, char: str) -> None:
    """Damage never turns into another position."""
    text = live.encode()
    place %= len(text)
    damaged = text[:place] + char + text[place + 1 :]
    if damaged != text:
        try:
            assert decode_live(damaged) == live  # the last character has spare bits
        except CursorError as exc:
            assert exc.code == "invalid_cursor"


@settings(deadline=None)
@given(text=st.one_of(st.text(max_size=200), st.text("ABCabc019-_=", max_size=130)))
def test_any_other_text_is_refused_with_one_code(text: str) -> None:
    """Whatever is sent, the answer is CursorError ``invalid_cursor``."""
    for decode in (decode_live, decode_page):
        with pytest.raises(CursorError) as refused:
            decode(text)
        assert refused.value.code == "invalid_cursor"


def test_a_cursor_of_the_other_kind_is_told_from_a_broken_one() -> None:
    """Who mixes up ``next`` and ``live`` is told so."""
    live = LiveCursor(topic="bars", partition=0, offset=1)
    page = PageCursor(topic="bars", series=1, backward=False, start_us=0, end_us=1, snapshot_offset=0, last=0)
    with pytest.raises(CursorError, match="page cursor.*wanted is a stream cursor"):
        decode_live(page.encode())
    with pytest.raises(CursorError, match="stream cursor.*wanted is a page cursor"):
        decode_page(live.encode())


def test_positions_order_by_offset_then_row() -> None:
    """A row inside a record stands after the record's start and before the next record."""
    assert Position(4, 9) < Position(5) < Position(5, 1)


def test_series_codes_tell_series_apart() -> None:
    """Channel, exchange, symbol and timeframe all count."""
    codes = {
        series_code("bars", "binance", "BTC-USDT", 60),
        series_code("bars", "binance", "BTC-USDT", 300),
        series_code("bars", "binance", "ETH-USDT", 60),
        series_code("bars", "kraken", "BTC-USDT", 60),
        series_code("trades", "binance", "BTC-USDT"),
    }
    assert len(codes) == 5


def test_a_page_cursor_of_an_earlier_release_is_still_read() -> None:
    """A reader between two pages survives the upgrade: without ``known_at`` the text is what it always was."""
    page = PageCursor(topic="bars", series=7, backward=True, start_us=1, end_us=2, snapshot_offset=3, last=4)
    assert page.encode() == "QQEBAAAABwAAAAAAAAABAAAAAAAAAAIAAAAAAAAAAwAAAAAAAAAE" + page.encode()[52:]
    assert decode_page(page.encode()).known_at_us is None
