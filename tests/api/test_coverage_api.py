"""GET /api/v1/coverage: feeds with intervals and gaps, and a problem for every wrong question."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from api import coverage as words
from api.app import create_app
from api.deps import ApiLimits, Deps
from infra import coverage as reading
from infra.coverage import LedgerReader
from infra.coverage_report import report
from processors.coverage import CHANNEL_NAMES
from tests.api.support import ManualClock, MemoryHistory, MemoryKafka, MemorySymbols

PATH = "/api/v1/coverage"
T = 1_700_000_000_000_000
MINUTE = 60_000_000


def row(*values: int, symbol: str = "BTC-USDT") -> bytes:
    """A row as ClickHouse writes it: gap id, start, end, state, evidence, first id, last id, recovered, written."""
    return json.dumps(["binance", symbol, *values]).encode() + b"\n"


LEDGER = (
    row(1, T - 90 * MINUTE, T - 10 * MINUTE, 0, 0, -1, -1, 0, T)
    + row(2, T - 60 * MINUTE, T - 50 * MINUTE - 1, 2, 1, 7, 9, 3, T)
    + row(3, T - 40 * MINUTE, T - 30 * MINUTE - 1, 3, 5, 20, 29, 0, T)
    + row(4, T - 5 * MINUTE, -1, 1, 4, -1, -1, 0, T)
)


@pytest.fixture
async def history() -> MemoryHistory:
    """ClickHouse's answers."""
    return MemoryHistory({"FROM gaps": LEDGER, "DISTINCT exchange": b"", "GROUP BY exchange": b""})


@pytest.fixture
async def http(history: MemoryHistory) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app over stores in memory."""
    deps = Deps(
        history=history,
        symbols=MemorySymbols("binance:BTC-USDT", "binance:ETH-USDT"),
        frames=MemoryKafka(),
        clock=ManualClock(),
        partitions=4,
        limits=ApiLimits(cache_ttl_s=0),
        coverage=LedgerReader(history),
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=create_app(deps)), base_url="http://api") as client:  # type: ignore[arg-type]
        yield client


async def test_a_feed_has_intervals_that_fill_the_range_and_its_gaps(http: httpx.AsyncClient) -> None:
    """Ninety minutes: complete but for what was filled, what is lost, what nobody knows and what is open now."""
    body = (await http.get(PATH, params={"exchange": "binance", "symbol": "BTC-USDT", "start": str(T - 90 * MINUTE)})).json()
    assert (body["channel"], body["end_us"], body["count"]) == ("trades", T, 1)
    (feed,) = body["feeds"]
    found = [((i["end_us"] - i["start_us"]) // MINUTE, i["state"], i["evidence"]) for i in feed["intervals"]]
    assert found == [
        (30, "complete", []),
        (10, "filled", ["id jump"]),
        (10, "complete", []),
        (10, "unfillable", ["restart"]),
        (20, "complete", []),
        (5, "unknown", []),
        (5, "open", ["silence"]),
    ]
    assert abs(feed["covered"] - 70 / 90) < 1e-8
    assert [(gap["state"], gap["first_id"], gap["ids"], gap["recovered"]) for gap in feed["gaps"]] == [
        ("filled", 7, 3, 3),
        ("unfillable", 20, 10, 0),
        ("open", None, None, 0),
    ]
    assert feed["gaps"][2]["end_us"] is None


async def test_a_feed_without_a_ledger_is_unknown_and_what_is_asked_reaches_the_store(
    http: httpx.AsyncClient, history: MemoryHistory
) -> None:
    """By default the last 24 hours; values are parameters, never text of the query."""
    body = (await http.get(PATH, params={"exchange": "binance", "symbol": "ETH-USDT", "channel": "quotes"})).json()
    assert body["end_us"] - body["start_us"] == 86_400_000_000
    sql, parameters, _ = next(query for query in history.queries if "FROM gaps" in query[0])
    assert "ETH" not in sql
    assert (parameters["symbol"], parameters["channel"], parameters["start"]) == ("ETH-USDT", 2, body["start_us"])
    empty = await LedgerReader(MemoryHistory({"FROM gaps": b""})).read(
        words.CoverageQuery(start_us=1, end_us=5, exchange="binance", symbol="ETH-USDT")
    )
    assert [(feed["covered"], [i["state"] for i in feed["intervals"]]) for feed in empty] == [(0.0, ["unknown"])]


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("symbol=BTC-USDT", 422, "missing_parameter"),
        ("exchange=binance&symbol=BTC-USDC", 404, "unknown_symbol"),
        ("exchange=binanse", 404, "unknown_exchange"),
        ("channel=trade", 422, "unknown_channel"),
        ("strat=1", 422, "unknown_parameter"),
        ("start=yesterday", 422, "invalid_time"),
        ("start=2024-01-02&end=2024-01-01", 422, "invalid_range"),
    ],
)
async def test_wrong_questions_are_problems(http: httpx.AsyncClient, query: str, status: int, code: str) -> None:
    """One sentence that names the culprit."""
    answer = await http.get(f"{PATH}?{query}")
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"


async def test_an_answer_that_would_be_too_long_is_refused(http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the remedy."""
    monkeypatch.setattr(reading, "MAX_ROWS", 3)
    answer = await http.get(PATH)
    assert (answer.status_code, "narrow it by symbol" in answer.json()["detail"]) == (422, True)


def test_channels_are_those_of_the_ledger() -> None:
    """The API, which asks, and the algebra, which answers, mean the same."""
    assert {code: name for name, code in words.CHANNELS.items()} == CHANNEL_NAMES


async def test_the_report_stands_alone_and_names_every_gap() -> None:
    """No outside resource; hostile names are text."""
    rows = LEDGER + row(9, T - 80 * MINUTE, T, 0, 0, -1, -1, 0, T, symbol="<script>")
    wanted = words.CoverageQuery(start_us=T - 90 * MINUTE, end_us=T)
    page = report(
        await LedgerReader(MemoryHistory({"FROM gaps": rows})).read(wanted),
        start_us=wanted.start_us,
        end_us=T,
        channel="trades",
        written_us=T,
    )
    assert "http" not in page
    assert "<script>" not in page
    assert page.count("<tr>") == 4
    assert "unfillable (restart): 2023-11-14 21:33:20 to 2023-11-14 21:43:20" in page


def test_the_page_begins_with_the_feeds_that_lost_trades() -> None:
    """Of two hundred feeds the one that needs a person is the first, not the one whose name begins with A."""

    def feed(symbol: str, *states: str) -> dict[str, Any]:
        gap = {"evidence": "id jump", "start_us": T - 5, "end_us": T - 4, "first_id": 1, "last_id": 1, "ids": 1, "recovered": 0}
        gaps = [{**gap, "state": state} for state in states]
        return {"exchange": "binance", "symbol": symbol, "channel": "trades", "covered": 1.0, "shares": {}, "intervals": [], "gaps": gaps}

    feeds = [feed("AAA"), feed("BBB", "filled"), feed("CCC", "open"), feed("DDD", "filled", "unfillable")]
    page = report(feeds, start_us=T - 10, end_us=T, channel="trades", written_us=T)
    listed = page[: page.index("<h2>Gaps</h2>")]
    assert sorted(("AAA", "BBB", "CCC", "DDD"), key=listed.index) == ["DDD", "CCC", "BBB", "AAA"]
