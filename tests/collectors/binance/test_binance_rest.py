"""REST: recorded listings, paging by id, and every way a venue refuses; time is moved by hand."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.binance.feed import venue_of
from collectors.binance.messages import SymbolInfo
from collectors.binance.rest import BinanceRest, canonical
from collectors.breaker import Breaker, BreakerState
from collectors.errors import (
    AnswerError,
    BannedError,
    BlockedError,
    BreakerOpenError,
    CollectorError,
    RateLimitedError,
    RefusedError,
    UnavailableError,
    VenueError,
)
from tests.collectors.fakes import HandClock, recorded

Handler = Callable[[httpx.Request], httpx.Response]


def client(handler: Handler, exchange: str = "binance", kind: str | None = None) -> tuple[BinanceRest, HandClock, list[httpx.Request]]:
    """A client whose venue is ``handler``."""
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return handler(request)

    clock = HandClock()
    venue = venue_of(exchange, kind=kind)  # type: ignore[arg-type]
    http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    return BinanceRest(venue, http, clock, Breaker("rest")), clock, asked


def trades_from(first: int, last: int, limit: int) -> list[dict[str, object]]:
    """Rows of ``historicalTrades``."""
    return [
        {"id": number, "price": f"{number}.5", "qty": "2", "time": 1_723_161_255_342 + number, "isBuyerMaker": number % 2 == 0}
        for number in range(first, min(last, first + limit - 1) + 1)
    ]


async def pages(rest: BinanceRest, first: int, last: int, max_rows: int = 50_000) -> list[list[int]]:
    """Ids of each page."""
    return [page["trade_id"].tolist() async for page in rest.trades("BTCUSDT", first, last, max_rows=max_rows)]


async def test_recorded_listings_get_our_names() -> None:
    """Spot and USD-M exchangeInfo as they were served in 2021: 1,500 and more markets, none without a name of ours."""
    for name, exchange, expected in (
        ("BINANCE.0.gz", "binance", {"BTC-USDT": "BTCUSDT", "NKN-USDT": "NKNUSDT", "LRC-BTC": "LRCBTC"}),
        ("BINANCE_FUTURES.0.gz", "binance-usdm", {"BTC-USDT-PERP": "BTCUSDT", "SUSHI-USDT-PERP": "SUSHIUSDT"}),
    ):
        with gzip.open(recorded(f"cryptofeed/{name}"), "rt") as stream:
            body = next(line for line in stream if "exchangeInfo" in line).partition(" -> ")[2].partition(": ")[2]
        rest, _, _ = client(lambda request, body=body: httpx.Response(200, text=body), exchange)
        listed = await rest.symbols()
        assert len(listed) == len(json.loads(body)["symbols"])
        for symbol, raw in expected.items():
            assert listed[symbol].raw == raw
            assert listed[symbol].status == "TRADING"


@pytest.mark.parametrize(
    ("base", "quote", "contract", "raw", "expected"),
    [
        ("BTC", "USDT", "", "BTCUSDT", "BTC-USDT"),
        ("1000SHIB", "USDT", "PERPETUAL", "1000SHIBUSDT", "1000SHIB-USDT-PERP"),
        ("BTC", "USDT", "CURRENT_QUARTER", "BTCUSDT_250627", "BTC-USDT-250627"),
        ("TSLA", "USDT", "TRADIFI_PERPETUAL", "TSLAUSDT", "TSLA-USDT-PERP"),
        ("币安人生", "USDT", "", "币安人生USDT", ""),
        ("", "USDT", "", "USDT", ""),
    ],
)
def test_names(base: str, quote: str, contract: str, raw: str, expected: str) -> None:
    """Spot, perpetual, delivery; a name outside A-Z 0-9 has none here."""
    assert canonical(SymbolInfo(symbol=raw, baseAsset=base, quoteAsset=quote, contractType=contract)) == expected


async def test_trades_are_paged_by_id() -> None:
    """2,500 ids are three pages, asked for one after the other, nothing beyond the gap."""
    rest, _, asked = client(lambda request: httpx.Response(200, json=trades_from(int(request.url.params["fromId"]), 10_000, 1_000)))
    assert [ids for page in await pages(rest, 101, 2_600) for ids in page] == list(range(101, 2_601))
    assert [request.url.params["fromId"] for request in asked] == ["101", "1101", "2101"]
    assert all(request.url.path == "/api/v3/historicalTrades" for request in asked)


async def test_a_gap_is_fetched_up_to_its_bound() -> None:
    """A gap of a million ids does not keep us busy for an hour."""
    rest, _, asked = client(lambda request: httpx.Response(200, json=trades_from(int(request.url.params["fromId"]), 10**9, 1_000)))
    assert sum(len(page) for page in await pages(rest, 1, 10**6, max_rows=3_000)) == 3_000
    assert len(asked) == 3


async def test_without_a_key_the_newest_thousand_are_taken() -> None:
    """USD-M wants a key for old trades; what the recent list still has is used."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/historicalTrades"):
            return httpx.Response(401, json={"code": -2014, "msg": "API-key format invalid."})
        return httpx.Response(200, json=trades_from(9_000, 9_999, 1_000))

    rest, _, asked = client(answer, "binance-usdm", "trade")
    assert [ids for page in await pages(rest, 8_990, 9_020) for ids in page] == list(range(9_000, 9_021))
    assert [request.url.path for request in asked] == ["/fapi/v1/historicalTrades", "/fapi/v1/trades"]
    assert rest.breaker.state is BreakerState.CLOSED


async def test_aggregate_trades_are_paged_by_their_own_ids() -> None:
    """The stream's ids decide which route fills its gaps."""
    row = {"a": 7, "p": "1.5", "q": "2", "f": 1, "l": 2, "T": 1_723_161_255_342, "m": True, "M": True}
    rest, _, asked = client(lambda request: httpx.Response(200, json=[row]), "binance-usdm")
    assert await pages(rest, 7, 7) == [[7]]
    assert asked[0].url.path == "/fapi/v1/aggTrades"


async def test_impossible_rows_are_left_out() -> None:
    """Their gap stays open for them and is reported."""
    rows = trades_from(1, 5, 10)
    rows[1]["price"] = "0"
    rows[2]["time"] = 17
    rows[3]["qty"] = "nan"
    rest, _, _ = client(lambda request: httpx.Response(200, json=rows if request.url.params["fromId"] == "1" else []))
    assert await pages(rest, 1, 5) == [[1, 5]]


@pytest.mark.parametrize(
    ("status", "headers", "body", "kind"),
    [
        (429, {"Retry-After": "60"}, {"code": -1003, "msg": "Too many requests"}, RateLimitedError),
        (418, {"Retry-After": "300"}, {"code": -1003, "msg": "banned"}, BannedError),
        (451, {}, {"code": 0, "msg": "Service unavailable from a restricted location"}, BlockedError),
        (403, {}, "<html>waf</html>", BlockedError),
        (400, {}, {"code": -1121, "msg": "Invalid symbol."}, RefusedError),
        (500, {}, "", UnavailableError),
        (503, {}, {"code": -1008, "msg": "overloaded"}, UnavailableError),
        (200, {}, "not json", AnswerError),
        (200, {}, {"symbols": "none"}, AnswerError),
        (200, {}, [1, 2], AnswerError),
    ],
)
async def test_each_refusal_has_its_error(status: int, headers: dict[str, str], body: object, kind: type[VenueError]) -> None:
    """Status, code and waiting time as attributes, the venue's words in the sentence."""

    def answer(request: httpx.Request) -> httpx.Response:
        if isinstance(body, str):
            return httpx.Response(status, headers=headers, text=body)
        return httpx.Response(status, headers=headers, json=body)

    rest, _, _ = client(answer)
    with pytest.raises(kind) as caught:
        await rest.symbols()
    assert type(caught.value) is kind
    if isinstance(body, dict) and "code" in body:
        assert caught.value.code == body["code"]
        assert str(body["msg"]) in str(caught.value)
    if "Retry-After" in headers:
        assert caught.value.retry_after_s == float(headers["Retry-After"])


async def test_a_short_rate_limit_is_waited_for_and_a_ban_is_obeyed() -> None:
    """429 for 3 s: asked again after 3 s. 418: nothing is sent until it is over."""
    answers = [httpx.Response(429, headers={"Retry-After": "3"}), httpx.Response(200, json={"symbols": []})]
    rest, clock, asked = client(lambda request: answers.pop(0))
    begin = clock.monotonic_us()
    assert await rest.symbols() == {}
    assert clock.monotonic_us() - begin >= 3_000_000
    assert len(asked) == 2
    answers.append(httpx.Response(418, headers={"Retry-After": "600"}))
    with pytest.raises(BannedError):
        await rest.symbols()
    with pytest.raises(RateLimitedError, match="budget"):
        await rest.symbols()
    assert len(asked) == 3


async def test_a_refusal_of_another_request_is_obeyed_by_one_that_waits_for_its_budget() -> None:
    """Two requests wait for weight; the first is told 429 for 5 s while the second still waits: it is sent after those, not before."""
    rest, clock, _ = client(lambda request: httpx.Response(200, json={"symbols": []}))
    rest.limit.take(4_800.0 - 10.0, clock.monotonic_us())  # half of what exchangeInfo costs is left
    begin = clock.monotonic_us()
    sleep, told = clock.sleep, []

    async def sleep_and_be_refused(seconds: float) -> None:
        await sleep(seconds)
        if not told:
            told.append(clock.monotonic_us())
            rest.limit.block(5.0, clock.monotonic_us())

    clock.sleep = sleep_and_be_refused  # type: ignore[method-assign]
    await rest.symbols()
    assert 0 < told[0] - begin < 1_000_000
    assert clock.monotonic_us() - told[0] >= 5_000_000


async def test_a_venue_that_fails_opens_the_breaker_and_a_wrong_request_does_not() -> None:
    """Five failures; then nothing is sent for a minute."""

    def fail(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    rest, clock, asked = client(fail)
    with pytest.raises(UnavailableError, match="cannot be reached"):
        await rest.symbols()
    with pytest.raises((UnavailableError, BreakerOpenError)):
        await rest.symbols()
    assert rest.breaker.state is BreakerState.OPEN
    sent = len(asked)
    with pytest.raises(BreakerOpenError):
        await rest.symbols()
    assert len(asked) == sent
    clock.advance(61_000_000)
    with pytest.raises(CollectorError):
        await rest.symbols()
    assert len(asked) == sent + 1

    rest, _, _ = client(lambda request: httpx.Response(400, json={"code": -1121, "msg": "Invalid symbol."}))
    for _ in range(8):
        with pytest.raises(RefusedError):
            await rest.symbols()
    assert rest.breaker.state is BreakerState.CLOSED


async def test_newest_ids_of_all_symbols_in_one_request() -> None:
    """-1: no trade in a day."""
    body = [{"symbol": "BTCUSDT", "lastId": 7, "count": 3, "closeTime": 1700000000000}, {"symbol": "DEADUSDT", "lastId": -1}]
    rest, _, asked = client(lambda request: httpx.Response(200, json=body))
    assert await rest.last_ids() == {"BTCUSDT": (7, 1_700_000_000_000_000)}
    assert asked[0].url.path == "/api/v3/ticker/24hr"


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "price", "qty", "time", "isBuyerMaker", "symbols"]), inner, max_size=5), max_leaves=8)))  # fmt: skip
async def test_any_answer_is_rows_or_one_of_our_errors(answer: object) -> None:
    """Bytes and JSON of any shape."""
    content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    rest, _, _ = client(lambda request: httpx.Response(200, content=content))
    try:
        await pages(rest, 1, 5)
        await rest.symbols()
        await rest.last_ids()
    except CollectorError:
        pass


def market(request: httpx.Request, times: dict[int, int], *, by_time: bool = True) -> httpx.Response:
    """A venue with these trades (id -> ms): the routes that page and search them, each aggregate two trades."""
    params = request.url.params
    ids = sorted(times)
    route = request.url.path.rpartition("/")[2]
    if "startTime" in params:
        wanted = [number for number in ids if times[number] >= int(params["startTime"])] if by_time else []
    else:
        wanted = [number for number in ids if number >= int(params.get("fromId", ids[-1]))]
    rows = wanted[: int(params["limit"])]
    if route == "aggTrades":
        return httpx.Response(200, json=[{"a": n // 2, "p": "1", "q": "1", "f": n, "l": n, "T": times[n], "m": True} for n in rows])
    return httpx.Response(200, json=[{"id": n, "price": "1", "qty": "1", "time": times[n], "isBuyerMaker": True} for n in rows])


@pytest.mark.parametrize("by_time", [True, False])
@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 5)), min_size=1, max_size=60), asked=st.integers(-2, 120))
async def test_the_first_trade_since_a_time_is_found(by_time: bool, steps: list[tuple[int, int]], asked: int) -> None:
    """By time where the venue answers, by halves of the ids where it does not; ids may have holes, several trades one time."""
    times, number, ms = {}, 0, 1_723_161_255_000
    for skip, wait in steps:
        number, ms = number + skip, ms + wait
        times[number] = ms
    rest, _, asks = client(lambda request: market(request, times, by_time=by_time))
    since_ms = 1_723_161_255_000 + asked
    expected = min((number for number in times if times[number] >= since_ms), default=None)
    found = await rest.first_since("BTCUSDT", since_ms * 1000)
    assert found == (None if expected is None else (expected, times[expected] * 1000))
    assert len(asks) <= (3 if by_time else 12)
    if expected is not None:
        assert await rest.at_or_after("BTCUSDT", expected) == found
