"""GET /api/v1/quality/{symbol}: feeds with their scores, suspects in words, and a problem for every wrong question."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from api import quality as words
from api.app import create_app
from api.deps import ApiLimits, Deps
from infra.seam import SystemClock
from processors import quality as processor
from tests.api.support import MemoryHistory, MemoryKafka, MemorySymbols

PATH = "/api/v1/quality/BTC-USDT"
ZEROS = dict.fromkeys(words.ANOMALIES, 0)


def score(source: str, time_us: int, value: float, **counts: Any) -> bytes:
    """A row of ``quality`` as ClickHouse writes it."""
    row = {"exchange": "binance", "symbol": "BTC-USDT", "source": source, "time_us": time_us, "score": value}
    row |= {"checks_passed": 10, "checks_failed": 0, **ZEROS, "band_low": 99.0, "band_high": 101.0} | counts
    return json.dumps(row).encode() + b"\n"


SUSPECT = {
    "exchange": "binance", "symbol": "BTC-USDT", "trade_id": 7, "price": 70.0, "size": 1.0, "side": -1, "exchange_time_us": 5,
    "receive_time_us": 6, "reason": 1, "band_low": 99.0, "band_high": 101.0, "state": 1, "source": "binance/ws", "known_at_us": 7,
}  # fmt: skip


@pytest.fixture
async def history() -> MemoryHistory:
    """ClickHouse's answers."""
    rows = score("binance/replay", 10, 1.0, band_low=-1.0, band_high=-1.0)
    rows += score("binance/ws", 30, 0.98, held=2, checks_failed=2) + score("binance/ws", 20, 1.0, volume_spikes=1)
    return MemoryHistory(
        {
            "FROM quality": rows,
            "countIf(state = 1)": b'{"exchange":"binance","held":2}\n',
            "FROM quarantine": json.dumps(SUSPECT).encode() + b"\n",
            "DISTINCT exchange": b"",
            "GROUP BY exchange": b"",
        }
    )


@pytest.fixture
async def http(history: MemoryHistory) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app over stores in memory."""
    symbols = MemorySymbols("binance:BTC-USDT", "kraken:BTC-USDT", "binance:ETH-USDT")
    limits = ApiLimits(cache_ttl_s=0)
    app = create_app(Deps(history=history, symbols=symbols, frames=MemoryKafka(), clock=SystemClock(), partitions=4, limits=limits))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://api") as client:  # type: ignore[arg-type]
        yield client


async def test_feeds_have_their_newest_score_and_what_they_did_wrong(http: httpx.AsyncClient) -> None:
    """By source; anomalies are summed over the scores given, an unknown band is null."""
    body = (await http.get(PATH)).json()
    assert (body["symbol"], body["count"], body["held_now"]) == ("BTC-USDT", 2, {"binance": 2})
    replay, live = body["feeds"]
    assert (replay["source"], replay["score"], replay["band_low"]) == ("binance/replay", 1.0, None)
    assert (live["source"], live["score"], live["time_us"]) == ("binance/ws", 0.98, 30)
    assert live["anomalies"] == ZEROS | {"held": 2, "volume_spikes": 1}
    assert (live["checks_passed"], live["checks_failed"]) == (20, 2)
    assert [row["time_us"] for row in live["history"]] == [30, 20]
    (suspect,) = body["suspects"]
    assert (suspect["trade_id"], suspect["state"], suspect["reason"], suspect["side"]) == (7, "held", "price", "sell")


async def test_what_is_asked_reaches_the_store_as_parameters(http: httpx.AsyncClient, history: MemoryHistory) -> None:
    """Exchange, source, range and limit."""
    answer = await http.get(
        PATH, params={"exchange": "binance", "source": "x' OR 1", "start": "2024-01-01", "end": "2024-01-02", "limit": 5}
    )
    assert answer.status_code == 200
    sql, parameters, _ = next(query for query in history.queries if "FROM quality" in query[0])
    assert "OR 1" not in sql
    assert parameters == {
        "symbol": "BTC-USDT",
        "exchange": "binance",
        "source": "x' OR 1",
        "start": 1_704_067_200_000_000,
        "end": 1_704_153_600_000_000,
        "limit": 5,
    }


@pytest.mark.parametrize(
    ("path", "code", "said"),
    [
        ("/api/v1/quality/BTC-USDX", "unknown_symbol", "did you mean 'BTC-USDT'"),
        ("/api/v1/quality/btcusdt", "unknown_symbol", ""),
        (f"{PATH}?exchange=binanse", "unknown_exchange", "binance"),
        (f"{PATH}?exchange=coinbase", "unknown_symbol", "coinbase"),
        (f"{PATH}?exchnge=binance", "unknown_parameter", "did you mean 'exchange'"),
        (f"{PATH}?limit=0", "invalid_limit", "1 to 8,640"),
        (f"{PATH}?limit=9999999999999", "invalid_limit", "1 to 8,640"),
        (f"{PATH}?start=yesterday", "invalid_time", "'start'"),
        (f"{PATH}?start=2024-01-02&end=2024-01-01", "invalid_range", "start is not before end"),
    ],
)
async def test_wrong_questions_get_their_problem(http: httpx.AsyncClient, path: str, code: str, said: str) -> None:
    """With one sentence that names the culprit."""
    answer = await http.get(path)
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == code
    assert said in answer.json()["detail"]


async def test_a_store_that_is_away_is_a_503(http: httpx.AsyncClient, history: MemoryHistory) -> None:
    """As for every route."""
    history.reachable = False
    answer = await http.get(PATH)
    assert (answer.status_code, answer.json()["code"]) == (503, "clickhouse_unavailable")


async def test_the_document_describes_it(http: httpx.AsyncClient) -> None:
    """OpenAPI names the path and its parameters."""
    entry = (await http.get("/openapi.json")).json()["paths"]["/api/v1/quality/{symbol}"]["get"]
    assert [parameter["name"] for parameter in entry["parameters"]] == ["symbol", "exchange", "source", "start", "end", "session", "limit"]


def test_words_and_codes_are_those_of_the_processor() -> None:
    """The API imports no arithmetic, so the vocabulary stands in both."""
    assert words.STATES == processor.STATE_NAMES
    assert words.REASONS == processor.REASON_NAMES
