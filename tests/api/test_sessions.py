"""Sessions without a store: where the virtual now is, what may be seen at it, and which requests are refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from api.cursors import decode_live
from api.deps import ApiLimits, StreamLimits
from api.errors import Problem
from api.history import History
from api.live.client import Client, Subscription
from api.live.series import SeriesKey
from api.metrics import Metrics
from api.params import parse_range
from api.sessions import Session, Sessions
from api.sessions_feed import SessionFeeds
from api.sessions_queries import Place, place_of, rows_after, session_cursor
from infra.names import speakable
from tests.api.support import ManualClock, MemoryHistory

US = 1_000_000
T = 1_700_000_000_000_000
BARS = SeriesKey("bars", "binance", "BTC-USDT", 60)
TRADES = SeriesKey("trades", "binance", "BTC-USDT")


def session(**changes: object) -> Session:
    """An hour as of T, a minute a second."""
    held = {
        "id": "s-calm-otter-01",
        "clock": "known",
        "as_of_us": T,
        "until_us": T + 3_600 * US,
        "started_us": 2 * T,
        "pinned_us": 2 * T,
        "speed": 60.0,
    }
    return Session(**{**held, **changes})  # type: ignore[arg-type]


def test_virtual_now_runs_at_its_pace_and_stops_at_the_end() -> None:
    """As-of at the start, 60 s a second, never beyond until, never before the start whatever the wall clock says."""
    one = session()
    assert [one.now_us(2 * T + seconds * US) - T for seconds in (-5, 0, 1, 59, 61)] == [0, 0, 60 * US, 3_540 * US, 3_600 * US]
    assert one.begin_us(2 * T + US) == T + 60 * US


def test_waiting_ends_when_the_virtual_now_is_due() -> None:
    """What is due is due: the wait leads exactly there, and is nothing afterwards."""
    one = session(speed=7.0)
    for due_us in (T, T + 1, T + 1_234_567, T + 3_000 * US):
        wait_s = one.wait_s(due_us, 2 * T)
        assert one.now_us(2 * T + round(wait_s * US) + 1) >= due_us
        assert one.wait_s(due_us, 2 * T + round(wait_s * US) + 1) == 0


def test_a_session_without_a_pace_waits_for_nothing() -> None:
    """Questions are answered as of its end, streams begin at its beginning."""
    one = session(speed=0.0)
    assert (one.now_us(2 * T), one.begin_us(2 * T), one.wait_s(T + 5, 2 * T)) == (one.until_us, T, 0.0)


def narrowed(one: Session, channel: str, query: bytes = b"", seconds: int = 1) -> tuple[int, int | None]:
    """(end, known-at) of a request, seconds after the session was made."""
    asked = one.narrow(parse_range(channel, "binance", "BTC-USDT", query, "", ApiLimits()), 2 * T + seconds * US)
    return asked.end_us, asked.known_at_us


def test_a_known_session_hides_what_was_published_or_happened_later() -> None:
    """Both bounds are the virtual now; an earlier end of the request stays."""
    assert narrowed(session(), "bars") == (T + 60 * US + 1, T + 60 * US)
    assert narrowed(session(), "trades", b"end=%d" % (T + 5)) == (T + 5, T + 60 * US)


def test_a_market_session_hides_bars_that_have_not_closed() -> None:
    """A bar is seen from its close on, with the knowledge of when the session was made."""
    one = session(clock="market", pinned_us=3 * T)
    assert narrowed(one, "bars") == (T + 1, 3 * T)  # 1m bars that open at T or before have closed at T + 60 s
    assert narrowed(one, "trades") == (T + 60 * US + 1, 3 * T)


def test_the_next_page_needs_no_narrowing() -> None:
    """Its cursor holds the range and what was known, so that all pages show one state."""
    asked = parse_range("trades", "binance", "BTC-USDT", b"", "", ApiLimits())
    assert session().seen_until_us(session().narrow(asked, 2 * T + US)) == T + 60 * US


def test_known_at_beside_a_session_is_refused() -> None:
    """The session says what was known."""
    with pytest.raises(Problem, match="known_at"):
        parse_range("bars", "binance", "BTC-USDT", b"session=s-x&known_at=%d" % T, "", ApiLimits())


def test_cursors_of_a_session_are_its_own() -> None:
    """They read back, and those of another session or of the live stream do not."""
    place = Place(T + 5, 77, 3)
    cursor = decode_live(session_cursor(session(), BARS, 2, place))
    assert (cursor.topic, cursor.partition) == ("bars", 2)
    assert place_of(session(), cursor) == place
    assert place_of(session(id="s-calm-otter-02"), cursor) is None


@pytest.mark.parametrize("clock", ["known", "market"])
@pytest.mark.parametrize("key", [BARS, TRADES])
def test_queries_bind_every_value(clock: str, key: SeriesKey) -> None:
    """Each placeholder has its parameter and no value stands in the text."""
    sql, parameters = rows_after(session(clock=clock), key, Place(T, 5, 0), T + 60 * US, 100)
    named = {part.partition(":")[0] for part in sql.split("{")[1:]}
    assert named == set(parameters)
    assert "BTC" not in sql
    assert str(T)[:8] not in sql


class Store:
    """Sessions in memory, counting how often they are asked for."""

    def __init__(self, *held: Session) -> None:
        self.held = {one.id: one for one in held}
        self.asked = 0

    async def session(self, name: str) -> Session | None:
        """See SessionStore."""
        self.asked += 1
        return self.held.get(name)


async def test_sessions_are_remembered_for_a_second() -> None:
    """A thousand readers cost PostgreSQL one question a second, and a stopped session is refused soon."""
    store, clock = Store(session()), ManualClock()
    sessions = Sessions(store, clock)
    for _ in range(100):
        assert (await sessions.find("s-calm-otter-01")).speed == 60
    assert store.asked == 1
    store.held["s-calm-otter-01"] = session(stopped=True)
    await clock.advance(1.1)
    with pytest.raises(Problem) as caught:
        await sessions.find("s-calm-otter-01")
    assert (caught.value.code, caught.value.status) == ("session_ended", 404)


class Writer:
    """A peer that takes everything."""

    def __init__(self) -> None:
        self.texts: list[bytes] = []

    def ready(self) -> bool:
        """Always."""
        return True

    def on_ready(self, callback: Callable[[], None]) -> None:
        """Never."""

    def write(self, texts: Sequence[bytes]) -> None:
        """Keep them."""
        self.texts += texts


@pytest.mark.parametrize("speed", [0.0, 60.0])
async def test_a_stream_that_waits_for_nothing_ends_when_its_session_is_stopped(speed: float) -> None:
    """At speed max, and where it is far behind its pace."""
    store, clock, writer = Store(session(speed=speed)), ManualClock(), Writer()
    clock.us = 3 * T
    sessions = Sessions(store, clock)
    feeds = SessionFeeds(sessions, History(MemoryHistory(), clock, 1, ApiLimits()), lambda _: 0, StreamLimits())
    opened = await feeds.open("s-calm-otter-01", BARS, decode_live(session_cursor(session(), BARS, 0, Place(T))))
    store.held["s-calm-otter-01"] = session(speed=speed, stopped=True)
    await clock.advance(1.1)
    with pytest.raises(Problem, match="was stopped"):
        await feeds.run(opened, Subscription(1, BARS, Client(writer, 1_000_000, Metrics()), 10))
    await asyncio.sleep(0)
    assert writer.texts == []


@pytest.mark.parametrize("name", ["", "x" * 65, "s-no-such-00"])
async def test_an_unknown_session_is_refused(name: str) -> None:
    """One sentence, 404."""
    with pytest.raises(Problem) as caught:
        await Sessions(Store(), ManualClock()).find(name)
    assert (caught.value.code, caught.value.status) == ("unknown_session", 404)


def test_ids_can_be_said() -> None:
    """Two words and a number; a thousand draws hardly repeat."""
    random = ManualClock().random
    drawn = {speakable(random) for _ in range(1_000)}
    assert len(drawn) > 990
    assert all(len(name.split("-")) == 3 and name.isascii() for name in drawn)
