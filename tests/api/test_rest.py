"""REST in process: what is asked reaches the store as one pinned query, every wrong request gets its problem, outages get 503."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from api.app import Api, create_app
from api.cursors import LEAST, NOTHING_DUE, PageCursor, decode_live, decode_page, series_code
from api.deps import ApiLimits, Deps
from api.errors import CODES
from api.sessions import Session
from infra.seam import SystemClock
from schemas.timeframes import MAX_TIME_US
from tests.api.support import EPOCH, MemoryHistory, MemoryKafka, MemorySymbols, bar_open_us

BARS = "/api/v1/bars/binance/BTC-USDT"
TRADES = "/api/v1/trades/binance/BTC-USDT"


EMPTY = {"DISTINCT exchange": b"", "GROUP BY exchange": b""}
"""What the catalogue asks: nothing has traded."""


def _bars(*numbers: int) -> bytes:
    return b"".join(b'{"open_time_us":%d,"revision":0}\n' % bar_open_us(number) for number in numbers)


class Running:
    """An app over stores in memory and its in-process client."""

    def __init__(self, limits: ApiLimits, **stores: Any) -> None:
        self.history = MemoryHistory(EMPTY | {"max(kafka_offset)": b"41\n", "FROM bars WHERE exchange": _bars(0, 1, 2)})
        self.kafka = MemoryKafka()
        self.symbols = MemorySymbols("binance:BTC-USDT", "binance:ETH-USDT")
        self.api: Api = create_app(
            Deps(history=self.history, symbols=self.symbols, frames=self.kafka, clock=SystemClock(), partitions=4, limits=limits, **stores)
        )
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app=self.api), base_url="http://api")  # type: ignore[arg-type]

    async def problem(self, path: str, code: str, **options: Any) -> dict[str, Any]:
        """The problem a request gets; status and code agree and the members of RFC 9457 are there."""
        answer = await self.http.request(options.pop("method", "GET"), path, **options)
        assert answer.headers["content-type"] == "application/problem+json"
        found: dict[str, Any] = answer.json()
        assert found["code"] == code, found
        assert found["status"] == answer.status_code == CODES[code][0]
        assert {"type", "title", "detail", "instance"} <= set(found)
        return found


class SessionsInMemory:
    """One session."""

    def __init__(self, held: Session) -> None:
        self._held = held

    async def session(self, name: str) -> Session | None:
        """See SessionStore."""
        return self._held if name == self._held.id else None


@pytest.fixture
async def run() -> AsyncIterator[Running]:
    """The app with a cache too short to matter."""
    running = Running(ApiLimits(cache_ttl_s=0, ping_timeout_s=0.2, request_timeout_s=0.3))
    async with running.http:
        yield running


async def test_a_page_has_rows_and_both_cursors(run: Running) -> None:
    """Body, Link header and cursors agree; the live cursor stands after what is stored."""
    answer = await run.http.get(BARS, params={"start": "2023-11-14", "limit": 2, "timeframe": "1m"})
    body = answer.json()
    assert [row["open_time_us"] for row in body["bars"]] == [bar_open_us(0), bar_open_us(1)]
    assert (body["exchange"], body["symbol"], body["timeframe"], body["count"]) == ("binance", "BTC-USDT", "1m", 2)
    page = decode_page(body["next"])
    assert (page.last, page.snapshot_offset, page.backward) == (bar_open_us(1), 42, False)
    live = decode_live(body["live"])
    assert (live.offset, live.epoch, live.floor_key, live.until_us) == (42, EPOCH, bar_open_us(1), LEAST)
    assert answer.headers["x-live-cursor"] == body["live"]
    assert answer.links["next"]["url"].endswith(body["next"])
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = await run.http.get(answer.links["next"]["url"])
    sql, parameters, _ = run.history.queries[-1]
    assert again.status_code == 200
    assert parameters["beyond"] == bar_open_us(1)
    assert parameters["before"] == 42
    assert "open_time_us > {beyond:Int64}" in sql


@pytest.mark.parametrize("form", ["json", "csv"])
async def test_every_page_of_an_answer_shows_what_was_known_at_its_time(run: Running, form: str) -> None:
    """``known_at`` reaches the query, the cursor carries it on, and there is no stream that would continue the past."""
    run.history.answers = {"SELECT max(k)": f"{bar_open_us(1)}\t2\t3\n".encode()} | run.history.answers
    asked = {"start": "2023-11-14", "limit": 2, "known_at": "2024-02-03T04:05:06Z", "format": form}
    answer = await run.http.get(BARS, params=asked)
    known_at_us = 1_706_933_106_000_000
    cursor = answer.headers["x-next-cursor"]
    assert decode_page(cursor).known_at_us == known_at_us
    assert "x-live-cursor" not in answer.headers
    if form == "json":
        body = answer.json()
        assert (body["known_at_us"], body["live"], body["next"]) == (known_at_us, None, cursor)
    for address in (None, answer.links["next"]["url"]):
        if address is not None:
            run.history.queries.clear()
            assert (await run.http.get(address)).status_code == 200
        for sql, parameters, _ in run.history.queries:
            if "FROM bars WHERE" in sql and "max(kafka_offset)" not in sql and "DISTINCT" not in sql:
                assert "known_at_us <= {known_at:Int64}" in sql
                assert parameters["known_at"] == known_at_us


async def test_without_start_the_newest_rows_come_and_the_live_cursor_owes_nothing(run: Running) -> None:
    """The page runs backward from the present, listed oldest first; the stream goes on after it."""
    run.history.answers = EMPTY | {"max(kafka_offset)": b"41\n", "FROM bars": _bars(7, 8, 9)}
    body = (await run.http.get(BARS + "?limit=2")).json()
    assert [row["open_time_us"] for row in body["bars"]] == [bar_open_us(8), bar_open_us(9)]
    assert decode_page(body["next"]).backward
    assert decode_live(body["live"]).floor_key == NOTHING_DUE
    body = (await run.http.get(BARS + f"?limit=3&end={bar_open_us(10)}")).json()
    live = decode_live(body["live"])
    assert (live.until_us, live.floor_key < 0) == (bar_open_us(10), True)


@pytest.mark.parametrize(
    ("path", "code", "word"),
    [
        (f"{BARS}?timeframe=1M", "unknown_timeframe", "'1m'"),
        (f"{BARS}?timeframe=7m", "unknown_timeframe", "7m"),
        (f"{BARS}?start=2024-01-02&end=2024-01-01", "invalid_range", "2024-01-02"),
        (f"{BARS}?start=2024-01-01&end=2024-01-01", "invalid_range", "[start, end)"),
        (f"{BARS}?start=yesterday", "invalid_time", "yesterday"),
        (f"{BARS}?start=12", "invalid_time", "12"),
        (f"{BARS}?known_at=tomorrow", "invalid_time", "known_at"),
        (f"{BARS}?knownat=2024-01-01", "unknown_parameter", "'known_at'"),
        (f"{BARS}?limit=0", "invalid_limit", "1 to 5,000"),
        (f"{BARS}?limit=5001", "invalid_limit", "arrow and csv"),
        (f"{BARS}?limit=-1", "invalid_limit", "-1"),
        (f"{BARS}?limit=abc", "invalid_limit", "abc"),
        (f"{BARS}?limit=1000001&format=csv", "invalid_limit", "1,000,000"),
        (f"{BARS}?cursor=broken", "invalid_cursor", "broken"),
        (f"{BARS}?cursor=", "invalid_cursor", "empty"),
        (f"{BARS}?strat=1", "unknown_parameter", "'start'"),
        (f"{TRADES}?timeframe=1m", "unknown_parameter", "timeframe"),
        (f"{BARS}?limit=1&limit=2", "repeated_parameter", "limit"),
        (f"{BARS}?format=cvs", "unknown_format", "'csv'"),
        ("/api/v1/bars/binanse/BTC-USDT", "unknown_exchange", "'binance'"),
        ("/api/v1/bars/binance/BTC-USDC", "unknown_symbol", "'BTC-USDT'"),
        ("/api/v1/bars/binance/btcusdt%00", "unknown_symbol", "btcusdt"),
        ("/api/v1/bars/binance", "not_found", "GET /"),
        ("/nowhere", "not_found", "GET /"),
    ],
)
async def test_wrong_requests_get_their_code_and_a_sentence_that_names_the_culprit(run: Running, path: str, code: str, word: str) -> None:
    """Each with the remedy: the nearest known word, the allowed range, how to go on."""
    assert word in (await run.problem(path, code))["detail"]


async def test_methods_sizes_and_formats_are_refused_before_anything_is_read(run: Running) -> None:
    """405 with what is allowed, 413, 414, 406."""
    answer = await run.http.post(BARS, content=b"x")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    await run.problem(BARS, "request_too_large", method="POST", content=b"x" * 100_000)
    await run.problem(BARS + "?cursor=" + "x" * 5000, "uri_too_long")
    await run.problem(BARS, "unknown_format", headers={"accept": "image/png"})
    head = await run.http.head(BARS)
    assert (head.status_code, head.content, int(head.headers["content-length"]) > 0) == (200, b"", True)


async def test_a_cursor_is_good_for_its_own_series_and_range_only(run: Running) -> None:
    """Of another series: ``cursor_mismatch``; beside a start: ``invalid_cursor``."""
    cursor = PageCursor(
        topic="bars",
        series=series_code("bars", "binance", "ETH-USDT", 60),
        backward=False,
        start_us=0,
        end_us=MAX_TIME_US,
        snapshot_offset=1,
        last=0,
    ).encode()
    await run.problem(f"{BARS}?cursor={cursor}", "cursor_mismatch")
    await run.problem(f"{BARS}?cursor={cursor}&start=2024-01-01", "invalid_cursor")
    await run.problem(f"{BARS}?cursor={cursor}&known_at=2024-01-01", "invalid_cursor")


@pytest.mark.parametrize(
    ("text", "us"),
    [
        ("2024-08-08T23:54:13Z", 1_723_161_253_000_000),
        ("2024-08-09T01:54:13%2B02:00", 1_723_161_253_000_000),
        ("2024-08-09T01:54:13+02:00", 1_723_161_253_000_000),
        ("2024-08-08 23:54:13", 1_723_161_253_000_000),
        ("1723161253", 1_723_161_253_000_000),
        ("1723161253000", 1_723_161_253_000_000),
        ("1723161253000000", 1_723_161_253_000_000),
        ("1723161253000000000", 1_723_161_253_000_000),
    ],
)
async def test_times_are_read_in_every_notation(run: Running, text: str, us: int) -> None:
    """ISO with and without zone, and epochs in any unit, mean the same."""
    await run.http.get(f"{TRADES}?start={text}")
    assert run.history.queries[-1][1]["start"] == us


async def test_accept_and_format_choose_the_representation(run: Running) -> None:
    """format= wins over Accept; quality values count; CSV and Arrow are ClickHouse's own bytes."""
    run.history.answers = EMPTY | {"max(kafka_offset)": b"41\n", "count()": b"5\t1\t1\n", "FROM trades": b"bytes of ClickHouse"}
    for headers, query, fmt, media in (
        ({"accept": "text/csv"}, "", "CSVWithNames", "text/csv; charset=utf-8"),
        (
            {"accept": "application/json;q=0.1, application/vnd.apache.arrow.stream"},
            "",
            "ArrowStream",
            "application/vnd.apache.arrow.stream",
        ),
        ({"accept": "application/json"}, "?format=csv", "CSVWithNames", "text/csv; charset=utf-8"),
    ):
        answer = await run.http.get(TRADES + query, headers=headers)
        assert (answer.headers["content-type"], answer.content) == (media, b"bytes of ClickHouse")
        assert run.history.queries[-1][2] == fmt
        assert "x-live-cursor" in answer.headers


async def test_gzip_is_used_when_asked_for_and_worth_it(run: Running) -> None:
    """Large JSON shrinks, small answers stay as they are."""
    run.history.answers["FROM bars WHERE exchange"] = _bars(*range(400))
    async with run.http.stream("GET", BARS, headers={"accept-encoding": "gzip"}) as answer:
        packed = b"".join([piece async for piece in answer.aiter_raw()])
        assert answer.headers["content-encoding"] == "gzip"
    assert len(json.loads(gzip.decompress(packed))["bars"]) == 400
    plain = await run.http.get("/livez", headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in plain.headers


async def test_outages_are_503_with_the_name_of_who_is_away(run: Running) -> None:
    """Readiness lists every dependency with its reason; routes answer with what they need only."""
    assert (await run.http.get("/readyz")).status_code == 200
    run.kafka.reachable = run.symbols.reachable = False
    ready = await run.http.get("/readyz")
    checks = ready.json()["checks"]
    assert ready.status_code == 503
    assert [name for name, check in checks.items() if not check["ok"]] == ["kafka", "postgres"]
    assert checks["kafka"]["reason"] == "Kafka is away."
    run.history.answers["DISTINCT exchange"] = b'{"exchange":"binance","symbol":"BTC-USDT"}\n'
    assert (await run.http.get(BARS)).status_code == 200
    await run.problem("/api/v1/symbols", "postgres_unavailable")
    run.kafka.epoch_value = None
    body = (await run.http.get(BARS)).json()
    assert body["live"] is None
    run.history.reachable = False
    found = await run.problem(BARS, "clickhouse_unavailable")
    assert "away" in found["detail"]
    await run.problem(BARS + "?format=csv", "clickhouse_unavailable")
    assert (await run.http.get("/livez")).status_code == 200


async def test_a_store_that_hangs_is_a_timeout_never_a_hang(run: Running) -> None:
    """Queries have a deadline, readiness a shorter one."""
    await run.http.get(BARS)
    run.history.hangs = "SELECT"
    await run.problem(BARS, "timeout")
    ready = (await run.http.get("/readyz")).json()
    assert "did not answer within" in ready["checks"]["clickhouse"]["reason"]


async def test_a_bug_is_a_500_without_its_secrets(run: Running) -> None:
    """What went wrong stays in the log."""
    run.history.answers["FROM bars WHERE exchange"] = b"not json at all\n"
    found = await run.problem(BARS, "internal")
    assert "not json" not in json.dumps(found)


async def test_identical_reads_share_one_query_for_a_moment() -> None:
    """Twenty clients asking for the same page at once cost one query; a failure is not remembered."""
    run = Running(ApiLimits(cache_ttl_s=60))
    async with run.http:
        run.history.reachable = False
        assert (await run.http.get(BARS)).status_code == 503
        run.history.reachable = True
        answers = await asyncio.gather(*(run.http.get(BARS) for _ in range(20)))
        assert {answer.content for answer in answers} == {answers[0].content}
        assert sum("FROM bars WHERE exchange" in sql for sql, _, _ in run.history.queries) == 2  # near the present, then all of it


async def test_more_waiting_queries_than_allowed_are_refused_at_once() -> None:
    """The line before ClickHouse is bounded."""
    run = Running(ApiLimits(cache_ttl_s=0, max_concurrent_queries=1, max_waiting_queries=2, request_timeout_s=0.2))
    async with run.http:
        await run.http.get(BARS)
        run.history.hangs = "FROM trades WHERE exchange"
        answers = await asyncio.gather(*(run.http.get(f"{TRADES}?limit={n}") for n in range(1, 9)))
        codes = sorted(answer.json()["code"] for answer in answers)
        assert codes.count("too_many_requests") == 6
        assert codes.count("timeout") == 2


async def test_metrics_root_and_openapi_describe_the_service(run: Running) -> None:
    """Prometheus text with the promised names; every documented path exists and every link answers."""
    await run.http.get(BARS)
    text = (await run.http.get("/metrics")).text
    for name in ("http_requests_total", "http_request_duration_seconds_bucket", "websocket_connections", "websocket_messages_sent_total"):
        assert name in text
    assert 'http_requests_total{method="GET",route="bars",status="200"} 1.0' in text
    root = (await run.http.get("/")).json()
    document = (await run.http.get(root["links"]["openapi"])).json()
    assert document["openapi"].startswith("3.1")
    run.history.answers = {**run.history.answers, "FROM deadletter": b'{"id":7,"raw_base64":""}\n'}
    for path in document["paths"]:
        answer = await run.http.get(path.replace("{exchange}", "binance").replace("{symbol}", "BTC-USDT").replace("{id}", "7"))
        assert answer.status_code == 200, path
    assert set(document["components"]["schemas"]) >= {"BarsPage", "TradesPage", "BarRow", "TradeRow", "ProblemDocument", "SymbolsList"}


async def test_symbols_join_what_is_listed_with_what_has_traded(run: Running) -> None:
    """An instrument that has not traded yet has a count of 0; one that only has data is listed as inactive."""
    run.history.answers = {
        "FROM trades": b'{"exchange":"binance","symbol":"BTC-USDT","first_trade_time_us":1,"last_trade_time_us":2,"trade_count":3}\n'
        b'{"exchange":"kraken","symbol":"BTC-USD","first_trade_time_us":1,"last_trade_time_us":2,"trade_count":1}\n'
    }
    body = (await run.http.get("/api/v1/symbols")).json()
    rows = {row["symbol"]: (row["active"], row["trade_count"], row["last_trade_time_us"]) for row in body["symbols"]}
    assert rows == {"BTC-USDT": (True, 3, 2), "ETH-USDT": (True, 0, None), "BTC-USD": (False, 1, 2)}
    only = (await run.http.get("/api/v1/symbols?exchange=kraken")).json()
    assert only["count"] == 1


@pytest.mark.parametrize("clock", ["known", "market"])
async def test_the_last_page_of_a_session_ends_in_a_cursor_of_its_stream(clock: str) -> None:
    """As one page of all rows does; one with an end of its own has none, nor have the pages before the last."""
    one = Session(
        id="s-a", clock=clock, as_of_us=bar_open_us(0), until_us=bar_open_us(9), started_us=0, pinned_us=bar_open_us(900), speed=60.0
    )
    run = Running(ApiLimits(cache_ttl_s=0), sessions=SessionsInMemory(one))
    asked = {"start": "2023-11-14", "session": one.id}
    async with run.http:
        whole = (await run.http.get(BARS, params=asked)).json()
        first = (await run.http.get(BARS, params=asked | {"limit": 2})).json()
        last = (await run.http.get(BARS, params={"cursor": first["next"], "session": one.id})).json()
        ended = (await run.http.get(BARS, params=asked | {"limit": 2, "end": str(bar_open_us(5))})).json()
        ended_last = (await run.http.get(BARS, params={"cursor": ended["next"], "session": one.id})).json()
    assert decode_live(whole["live"]).until_us == one.until_us + 1
    assert (first["live"], last["live"], last["next"]) == (None, whole["live"], None)
    assert (ended["live"], ended_last["live"]) == (None, None)
