"""A page, a stream, `tail` and an export of one session read from the real tables: they show the same bars."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from api.live.filters import Shown
from api.live.series import SeriesKey
from api.queries import Page, known_keys, page_rows
from api.sessions import KNOWN, MARKET, Session
from api.sessions_queries import Place, rows_after
from infra.cli import session_tail
from infra.errors import SettingsError, UnreachableError
from infra.export import _Query
from infra.settings import load_settings
from tests.api.support import ManualClock
from tests.tables import Tables, empty_tables

SECOND = 1_000_000
T0_US = 1_723_161_600_000_000
KEY = SeriesKey("bars", "binance", "BTC-USDT", 60)


@pytest.fixture
def tables() -> Tables:
    """No row in any."""
    return empty_tables()


def bar(minute: int, close: float, offset: int, known_s: int | None, input_offset: int = 1) -> dict[str, Any]:
    """A stored bar of revision 0 that was published so many seconds after T0; None: by a release that did not note it."""
    opened = T0_US + minute * 60 * SECOND
    return {
        "exchange": "binance", "symbol": "BTC-USDT", "timeframe_s": 60, "open_time_us": opened, "close_time_us": opened + 60 * SECOND,
        "close": close, "is_final": 1, "complete": 1, "input_offset": input_offset, "kafka_offset": offset,
        "known_at_us": 0 if known_s is None else T0_US + known_s * SECOND,
    }  # fmt: skip


def session(clock: str, until_s: int) -> Session:
    """From T0 on, at speed max."""
    return Session(
        id="s-a", clock=clock, as_of_us=T0_US, until_us=T0_US + until_s * SECOND, started_us=2 * T0_US, pinned_us=2 * T0_US, speed=0.0
    )


def seen(tables: Tables, one: Session) -> dict[str, list[float]]:
    """The closes that each reader shows of a session at its end; where a bar appears twice, the later one."""
    now_us, end_us, known_us = one.until_us, one.end_us(KEY, one.until_us), one.known_at_us(one.until_us)
    page = Page(key=KEY, start_us=T0_US, end_us=end_us, before=2**62, backward=True, beyond=None, limit=9, known_at_us=known_us)
    paged = tables.query(*page_rows(page, json=False)).named_results()
    streamed = tables.query(*rows_after(one, KEY, Place(T0_US), now_us + 1, 9)).named_results()
    tailed = session_tail._read(tables, "bars", one, (T0_US, 0, "", "", 0, 0), now_us)
    exported = _Query("bars", "binance", "BTC-USDT", "1m", T0_US, end_us, known_us)
    found = {
        "page": paged,
        "stream": streamed,
        "tail": tailed,
        "export": [row for rows in exported.pages(tables) for row in rows.to_dicts()],
    }
    assert exported.count(tables) == len(found["export"])
    return {name: list({row["open_time_us"]: row["close"] for row in rows}.values()) for name, rows in found.items()}


@pytest.mark.parametrize("clock", [KNOWN, MARKET])
def test_of_two_rows_of_one_revision_everybody_shows_the_later_one(tables: Tables, clock: str) -> None:
    """The repair closed the bar while the worker was away; also after the engine has put the rows side by side."""
    rows = [bar(0, 1.0, 10, 100, -1), bar(0, 2.0, 11, 200)]
    for stored in (rows, rows[::-1]):
        tables = empty_tables()
        tables.insert("bars", stored)
        assert set(map(tuple, seen(tables, session(clock, 1_000)).values())) == {(2.0,)}


@pytest.mark.parametrize("clock", [KNOWN, MARKET])
def test_a_bar_of_an_earlier_release_appears_when_it_closes(tables: Tables, clock: str) -> None:
    """When it was published nobody noted, but not before."""
    tables.insert("bars", [bar(0, 1.0, 1, 61), bar(1, 9.0, 2, None)])
    assert set(map(tuple, seen(tables, session(clock, 119)).values())) == {(1.0,)}
    assert set(map(tuple, seen(tables, session(clock, 120)).values())) == {(1.0, 9.0)}


def test_a_bar_that_opened_before_a_session_is_tailed_when_it_closes(tables: Tables) -> None:
    """A bar of an earlier release that closes in the session is part of it, as on the stream."""
    tables.insert("bars", [bar(-1, 7.0, 1, None), bar(-2, 6.0, 0, None)])
    one = session(KNOWN, 100)
    late = session_tail._read(tables, "bars", one, (T0_US - SECOND, 0, "", "", 0, 0), one.until_us)
    assert [row["close"] for row in late] == [7.0]


def test_the_store_knows_who_made_the_rows_of_a_bar(tables: Tables) -> None:
    """Of the newest revision: the worker's largest input, and whether the repair's is among them; only of records before an offset."""
    first, second = bar(0, 1.0, 10, 100, -1), bar(0, 2.0, 11, 200, 5)
    tables.insert("bars", [first, second, bar(0, 3.0, 12, 300, 6) | {"revision": 1}, bar(1, 1.0, 13, 300, 7)])

    def known(before: int) -> dict[int, Shown]:
        rows = tables.query(*known_keys(KEY, [T0_US, T0_US + 60 * SECOND, T0_US + 120 * SECOND], before)).result_rows
        return {one: Shown(revision, made, bool(repaired)) for one, revision, made, repaired in rows}

    assert known(11) == {T0_US: Shown(0, -1, True)}
    assert known(12) == {T0_US: Shown(0, 5, True)}
    assert known(14) == {T0_US: Shown(1, 6, False), T0_US + 60 * SECOND: Shown(0, 7, False)}
    tables.insert("trades", [{"exchange": "binance", "symbol": "BTC-USDT", "trade_id": 7, "kafka_offset": 3}])
    assert tables.query(*known_keys(SeriesKey("trades", "binance", "BTC-USDT"), [7, 8], 4)).result_rows == [(7, 0, -1, 0)]


async def test_a_tail_that_follows_ends_when_its_session_is_stopped(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks every two seconds; a PostgreSQL that is away for a while does not end it."""
    answers: list[Exception] = [UnreachableError("PostgreSQL is away."), SettingsError("Session 's-a' was stopped.")]

    async def find(*_: Any) -> None:
        raise answers.pop(0)

    monkeypatch.setattr(session_tail, "find_session", find)
    monkeypatch.setattr(session_tail, "connect", lambda _: tables)
    clock = ManualClock()
    clock.us = 2 * T0_US
    one = replace(session(MARKET, 3_600), speed=1.0)
    rows = session_tail._rows(load_settings({}), "bars", one, clock, True)
    reading = asyncio.ensure_future(anext(rows))
    while not reading.done():
        await asyncio.sleep(0.001)  # the engine answers from a thread
        await clock.advance(0.01)
    with pytest.raises(SettingsError, match="was stopped"):
        await reading
    assert answers == []
