"""The simulated exchange through real sockets: `websockets` and `httpx` as clients."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from simulated_support import START_MS, ManualClock, small_config
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from collectors.simulated.errors import SimulationConfigError, UnknownFaultError
from collectors.simulated.exchange import ExchangeConfig
from collectors.simulated.regimes import MarketConfig
from collectors.simulated.server import SimulatedExchange, serve
from infra.seam import SystemClock

SECOND = 1_000


@pytest.fixture
async def rest(exchange: SimulatedExchange) -> AsyncIterator[httpx.AsyncClient]:
    """A REST client of the exchange."""
    async with httpx.AsyncClient(base_url=exchange.rest_url) as client:
        yield client


async def settle(exchange: SimulatedExchange, count: int) -> None:
    """Wait until the server has accepted so many WebSockets."""
    async with asyncio.timeout(5):
        while len(exchange.connections) != count:
            await asyncio.sleep(0.001)


async def received(socket: ClientConnection) -> list[dict[str, Any]]:
    """Every message that is on its way, up to the answer of a marker sent now."""
    await socket.send('{"method":"LIST_SUBSCRIPTIONS","id":987654}')
    messages = []
    async with asyncio.timeout(5):
        while True:
            message = json.loads(await socket.recv())
            if message.get("id") == 987654:
                return messages
            messages.append(message)


def trades_of(messages: list[dict[str, Any]], symbol: str) -> list[int]:
    """Ids of a symbol's trades in the order of arrival."""
    bodies = [message.get("data", message) for message in messages]
    return [body["t"] for body in bodies if body.get("e") == "trade" and body["s"] == symbol]


async def closed_with(socket: ClientConnection) -> int:
    """The close code a client sees, whatever comes before it."""
    async with asyncio.timeout(5):
        try:
            while True:
                await socket.recv()
        except ConnectionClosed:
            return socket.close_code or 0


# Streams.


@pytest.mark.parametrize("kind", ["spot", "usdm"])
async def test_client_gets_exactly_the_true_trades_in_order(exchange: SimulatedExchange, kind: Any) -> None:
    """Ids, prices, sizes, sides and times of two symbols equal ground truth; nothing of a third arrives."""
    base = exchange.ws_url if kind == "spot" else exchange.usdm_ws_url
    before = {symbol: len(exchange.truth(symbol, kind)["trade_id"]) for symbol in ("BTCUSDT", "ETHUSDT")}
    async with connect(f"{base}/stream?streams=btcusdt@trade/ethusdt@trade") as socket:
        exchange.advance(2 * SECOND)
        messages = [message["data"] for message in await received(socket)]
    assert {message["s"] for message in messages} == {"BTCUSDT", "ETHUSDT"}
    for symbol, known in before.items():
        truth = {name: column[known:].tolist() for name, column in exchange.truth(symbol, kind).items()}
        got = [message for message in messages if message["s"] == symbol]
        assert [message["t"] for message in got] == truth["trade_id"] != []
        assert [float(message["p"]) for message in got] == truth["price"]
        assert [float(message["q"]) for message in got] == truth["size"]
        assert [-1 if message["m"] else 1 for message in got] == truth["side"]
        assert [message["T"] * 1_000 for message in got] == truth["exchange_time_us"]


async def test_raw_and_combined_streams_say_the_same(exchange: SimulatedExchange) -> None:
    """`/ws/<stream>` gives bare messages, `/stream` wraps them, `/ws` waits for SUBSCRIBE."""
    async with (
        connect(f"{exchange.ws_url}/ws/btcusdt@trade") as raw,
        connect(f"{exchange.ws_url}/stream?streams=btcusdt@trade") as combined,
        connect(f"{exchange.ws_url}/ws") as later,
    ):
        await later.send('{"method":"SUBSCRIBE","params":["btcusdt@trade"],"id":1}')
        assert json.loads(await later.recv()) == {"result": None, "id": 1}
        exchange.advance(SECOND)
        bare, wrapped, asked = await received(raw), await received(combined), await received(later)
    assert bare == asked == [message["data"] for message in wrapped] != []
    assert {message["stream"] for message in wrapped} == {"btcusdt@trade"}


async def test_many_connections_share_all_symbols_without_loss(exchange: SimulatedExchange) -> None:
    """Twenty symbols sharded over five connections arrive completely, each on its own connection only."""
    names = [symbol.lower() for symbol in exchange.exchange.venues["spot"].wire.universe.symbols]
    before = {symbol: len(exchange.truth(symbol.upper())["trade_id"]) for symbol in names}
    urls = [f"{exchange.ws_url}/stream?streams=" + "/".join(f"{name}@trade" for name in names[part::5]) for part in range(5)]
    sockets = [await connect(url) for url in urls]
    exchange.advance(SECOND)
    for part, socket in enumerate(sockets):
        messages = await received(socket)
        for name in names:
            expected = exchange.truth(name.upper())["trade_id"][before[name] :].tolist() if name in names[part::5] else []
            assert trades_of(messages, name.upper()) == expected
        await socket.close()


async def test_aggregates_quotes_and_candles_stream_along(exchange: SimulatedExchange) -> None:
    """Aggregates cover the trades, quotes bracket them, candles close with the counts REST gives."""
    streams = "btcusdt@trade/btcusdt@aggTrade/btcusdt@bookTicker/btcusdt@kline_1m/btcusdt@kline_1s"
    async with connect(f"{exchange.ws_url}/stream?streams={streams}") as socket, httpx.AsyncClient(base_url=exchange.rest_url) as rest:
        exchange.advance(70 * SECOND)
        messages = [message["data"] for message in await received(socket)]
        klines = (await rest.get("/api/v3/klines", params={"symbol": "BTCUSDT", "interval": "1m"})).json()
    by_type: dict[str, list[dict[str, Any]]] = {}
    for message in messages:
        by_type.setdefault(message.get("e", "bookTicker"), []).append(message)
    covered = [number for body in by_type["aggTrade"] for number in range(body["f"], body["l"] + 1)]
    assert covered == [body["t"] for body in by_type["trade"]]
    assert all(float(body["b"]) < float(body["a"]) for body in by_type["bookTicker"])
    closed = [body["k"] for body in by_type["kline"] if body["k"]["x"] and body["k"]["i"] == "1m"]
    assert [(body["t"], body["o"], body["h"], body["l"], body["c"], body["v"], body["n"], body["q"]) for body in closed] == [
        (row[0], row[1], row[2], row[3], row[4], row[5], row[8], row[7]) for row in klines if row[0] in {body["t"] for body in closed}
    ]
    assert closed
    assert sum(body["k"]["x"] for body in by_type["kline"] if body["k"]["i"] == "1s") > 50


async def test_1024_streams_are_served_and_1025_closed(exchange: SimulatedExchange) -> None:
    """The limit of a connection, by message and by URL; a longer URL than Binance takes is 414."""
    names = [f"s{number}@trade" for number in range(1_024)]
    async with connect(f"{exchange.ws_url}/stream") as socket:
        for number, part in enumerate((names[:512], names[512:])):
            await socket.send(json.dumps({"method": "SUBSCRIBE", "params": part, "id": number}))
            assert json.loads(await socket.recv())["result"] is None
        await socket.send('{"method":"SUBSCRIBE","params":["one@more"],"id":9}')
        assert await closed_with(socket) == 1008
    short = [f"{number:x}@" for number in range(1_025)]
    async with connect(f"{exchange.ws_url}/stream?streams={'/'.join(short)}") as socket:
        assert await closed_with(socket) == 1008
    with pytest.raises(websockets.exceptions.InvalidStatus, match="414"):
        await connect(f"{exchange.ws_url}/stream?streams={'/'.join(names)}")


async def test_more_than_five_messages_a_second_disconnect(exchange: SimulatedExchange) -> None:
    """The sixth message within a second of the clock ends the connection; five are answered."""
    async with connect(f"{exchange.ws_url}/ws") as socket:
        for number in range(6):
            await socket.send(json.dumps({"method": "LIST_SUBSCRIPTIONS", "id": number}))
        assert [json.loads(await socket.recv())["id"] for _ in range(5)] == [0, 1, 2, 3, 4]
        assert await closed_with(socket) == 1008


async def test_server_pings_and_drops_who_does_not_answer(clock: ManualClock) -> None:
    """A ping every 20 s; without a pong the connection ends within a minute, with one it lives; at 24 h it ends anyway."""
    async with serve(small_config(), clock) as exchange:
        silent, writer = await asyncio.open_connection("127.0.0.1", exchange.port)
        writer.write(
            b"GET /ws HTTP/1.1\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        await silent.readuntil(b"\r\n\r\n")
        async with connect(f"{exchange.ws_url}/ws") as socket:
            await settle(exchange, 2)
            for _ in range(85):
                await clock.move(1)
                await asyncio.sleep(0.002)
            data = await asyncio.wait_for(silent.read(), 5)
            assert data[0] == 0x89
            assert b"Pong timeout" in data
            assert len(exchange.connections) == 1
            await clock.move(5)
            clock._now_us += 86_400 * 1_000_000
            await clock.move(3)
            assert await closed_with(socket) == 1001
        writer.close()


async def test_slow_client_is_dropped_once_its_buffer_is_full(clock: ManualClock) -> None:
    """Who does not read loses the connection, not the server its memory."""
    async with (
        serve(small_config(max_buffer_bytes=100_000), clock) as exchange,
        connect(f"{exchange.ws_url}/ws/btcusdt@trade", max_queue=1) as slow,
        connect(f"{exchange.ws_url}/ws") as quick,
    ):
        await settle(exchange, 2)
        async with asyncio.timeout(20):
            while len(exchange.connections) == 2:
                exchange.advance(10 * SECOND)
                await asyncio.sleep(0)
        assert await received(quick) == []
        assert await closed_with(slow) == 1006


async def test_protocol_violation_closes_that_connection_only(exchange: SimulatedExchange) -> None:
    """An unmasked frame is answered with 1002; fragmented control messages with 1003; others go on."""
    async with connect(f"{exchange.ws_url}/ws") as healthy:
        reader, writer = await asyncio.open_connection("127.0.0.1", exchange.port)
        writer.write(
            b"GET /ws HTTP/1.1\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"\x81\x02hi")
        assert (await asyncio.wait_for(reader.read(), 5))[2:4] == (1002).to_bytes(2, "big")
        writer.close()
        async with connect(f"{exchange.ws_url}/ws") as fragmenting:
            await fragmenting.send(iter(['{"method":', '"x"}']))
            assert await closed_with(fragmenting) == 1003
        assert await received(healthy) == []


async def test_unknown_stream_paths_are_404(exchange: SimulatedExchange) -> None:
    """Only /ws and /stream (also under /usdm) can be upgraded."""
    for path in ("/nowhere", "/api/v3/ping", "/usdm/nowhere"):
        with pytest.raises(websockets.exceptions.InvalidStatus, match="404"):
            await connect(exchange.ws_url + path)


# REST.


async def test_paging_by_id_gives_exactly_the_truth(exchange: SimulatedExchange, rest: httpx.AsyncClient) -> None:
    """Old trades and aggregates, walked by fromId, return every kept trade once and in order."""
    exchange.exchange.venues["spot"].limit.limit = 10**9
    exchange.advance(5 * SECOND)
    truth = exchange.truth("BTCUSDT")["trade_id"].tolist()
    pages, following = [], truth[0]
    while True:
        query = {"symbol": "BTCUSDT", "fromId": following, "limit": 1_000}
        page = [row["id"] for row in (await rest.get("/api/v3/historicalTrades", params=query)).json()]
        if not page:
            break
        pages += page
        following = page[-1] + 1
    assert pages == truth
    aggregates, following = [], (await rest.get("/api/v3/aggTrades", params={"symbol": "BTCUSDT", "startTime": 0})).json()[0]["a"]
    while True:
        page = (await rest.get("/api/v3/aggTrades", params={"symbol": "BTCUSDT", "fromId": following, "limit": 1_000})).json()
        if not page:
            break
        aggregates += page
        following = page[-1]["a"] + 1
    assert [number for row in aggregates for number in range(row["f"], row["l"] + 1)] == truth
    assert len(aggregates) < len(truth)


async def test_rest_windows_by_time_and_newest_by_limit(exchange: SimulatedExchange, rest: httpx.AsyncClient) -> None:
    """Times are inclusive on both ends; without bounds the newest come, oldest first."""
    now_ms = exchange.exchange.time_ms
    window = {"symbol": "BTCUSDT", "startTime": now_ms - 1_000, "endTime": now_ms - 500, "limit": 1_000}
    rows = (await rest.get("/api/v3/aggTrades", params=window)).json()
    expected = exchange.truth("BTCUSDT")
    inside = (expected["exchange_time_us"] >= (now_ms - 1_000) * 1_000) & (expected["exchange_time_us"] <= (now_ms - 500) * 1_000)
    assert [number for row in rows for number in range(row["f"], row["l"] + 1)] == expected["trade_id"][inside].tolist()
    newest = (await rest.get("/api/v3/trades", params={"symbol": "BTCUSDT", "limit": 7})).json()
    assert [row["id"] for row in newest] == expected["trade_id"][-7:].tolist()
    aggregates = (await rest.get("/api/v3/aggTrades", params={"symbol": "BTCUSDT", "limit": 7})).json()
    assert len(aggregates) == 7
    assert aggregates[-1]["l"] == expected["trade_id"][-1]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/api/v3/trades", 400, -1102),
        ("/api/v3/trades?symbol=NOPE", 400, -1121),
        ("/api/v3/trades?symbol=btc%20usdt", 400, -1100),
        ("/api/v3/trades?symbol=BTCUSDT&limit=x", 400, -1100),
        ("/api/v3/trades?symbol=BTCUSDT&limit=0", 400, -1130),
        ("/fapi/v1/trades?symbol=BTCUSDT&limit=5000", 400, -1130),
        ("/api/v3/klines?symbol=BTCUSDT", 400, -1102),
        ("/api/v3/klines?symbol=BTCUSDT&interval=7m", 400, -1120),
        ("/fapi/v1/klines?symbol=BTCUSDT&interval=1s", 400, -1120),
        ("/api/v3/aggTrades?symbol=BTCUSDT&fromId=1&startTime=2", 400, -1128),
        ("/api/v3/ticker/24hr?symbols=nope", 400, -1100),
        ("/fapi/v1/depth?symbol=BTCUSDT&limit=7", 400, -4021),
        ("/fapi/v1/historicalTrades?symbol=BTCUSDT", 401, -2014),
        ("/api/v3/nothing", 404, -5000),
        ("/nothing", 404, -5000),
    ],
)
async def test_refusals_carry_binances_codes(rest: httpx.AsyncClient, path: str, status: int, code: int) -> None:
    """Status, code and a sentence for each kind of bad request."""
    reply = await rest.get(path)
    assert (reply.status_code, reply.json()["code"]) == (status, code)
    assert reply.json()["msg"]


async def test_every_symbol_at_once_and_perpetual_routes(rest: httpx.AsyncClient) -> None:
    """Tickers without a symbol are lists of all; funding is every eight hours; a list of symbols is honoured."""
    assert len((await rest.get("/api/v3/ticker/24hr")).json()) == 20
    assert len((await rest.get("/fapi/v1/premiumIndex")).json()) == 5
    chosen = (await rest.get("/api/v3/exchangeInfo", params={"symbols": '["BTCUSDT","ETHUSDT"]'})).json()["symbols"]
    assert [entry["symbol"] for entry in chosen] == ["BTCUSDT", "ETHUSDT"]
    funding = (await rest.get("/fapi/v1/fundingRate", params={"symbol": "BTCUSDT", "limit": 3})).json()
    assert [row["fundingTime"] % 28_800_000 for row in funding] == [0, 0, 0]
    assert funding == (await rest.get("/fapi/v1/fundingRate", params={"symbol": "BTCUSDT", "limit": 3})).json()
    assert float((await rest.get("/fapi/v1/openInterest", params={"symbol": "BTCUSDT"})).json()["openInterest"]) > 0


async def test_weight_header_429_and_418(exchange: SimulatedExchange, rest: httpx.AsyncClient) -> None:
    """Weight adds up in the header; beyond the limit Retry-After; who goes on is banned."""
    assert (await rest.get("/api/v3/ping")).headers["x-mbx-used-weight-1m"] == "1"
    assert (await rest.get("/api/v3/trades?symbol=BTCUSDT")).headers["X-MBX-USED-WEIGHT-1M"] == "26"
    exchange.exchange.venues["spot"].limit.limit = 30
    replies = [await rest.get("/api/v3/trades?symbol=BTCUSDT") for _ in range(12)]
    assert [reply.status_code for reply in replies] == [429] * 10 + [418] * 2
    assert int(replies[0].headers["retry-after"]) == 60 - START_MS // 1_000 % 60
    assert {reply.json()["code"] for reply in replies} == {-1003}
    assert (await rest.get("/fapi/v1/ping")).status_code == 200


# Faults.


async def test_dropped_doubled_and_reordered_trades_are_in_rest(exchange: SimulatedExchange, rest: httpx.AsyncClient) -> None:
    """The wire shows the fault, REST and truth do not; status names the ids."""
    async with connect(f"{exchange.ws_url}/ws/btcusdt@trade") as socket:
        known = len(exchange.truth("BTCUSDT")["trade_id"])
        for fault, count in (("drop", 2), ("duplicate", 2), ("reorder", 3)):
            reply = await rest.post("/sim/faults", json={"fault": fault, "symbol": "BTCUSDT", "count": count})
            assert reply.status_code == 200
        exchange.advance(SECOND)
        sent = trades_of(await received(socket), "BTCUSDT")
    made = exchange.truth("BTCUSDT")["trade_id"][known:].tolist()
    touched = [fault["touched"] for fault in (await rest.get("/sim/status")).json()["faults"]]
    assert sorted([*made, *touched[1]]) == sorted([*sent, *touched[0]])
    assert any(sent[start : start + 3] == touched[2][::-1] for start in range(len(sent)))
    page = (await rest.get("/api/v3/historicalTrades", params={"symbol": "BTCUSDT", "fromId": made[0], "limit": 1_000})).json()
    assert [row["id"] for row in page] == made[:1_000]


async def test_hole_is_in_no_answer(exchange: SimulatedExchange, rest: httpx.AsyncClient) -> None:
    """Ids of a true hole exist nowhere: not on the wire, not in REST."""
    async with connect(f"{exchange.ws_url}/ws/btcusdt@trade") as socket:
        hole = exchange.inject({"fault": "hole", "symbol": "BTCUSDT", "count": 4})
        exchange.advance(SECOND)
        sent = trades_of(await received(socket), "BTCUSDT")
    page = (await rest.get("/api/v3/historicalTrades", params={"symbol": "BTCUSDT", "fromId": hole.touched[0], "limit": 5})).json()
    assert page[0]["id"] == sent[0] == hole.touched[-1] + 1


async def test_malformed_message_reaches_every_connection(exchange: SimulatedExchange) -> None:
    """A text frame that is no JSON, between good ones."""
    async with connect(f"{exchange.ws_url}/ws") as one, connect(f"{exchange.ws_url}/ws") as two:
        await settle(exchange, 2)
        exchange.inject({"fault": "malformed", "count": 2, "text": "{oops"})
        for socket in (one, two):
            assert [await socket.recv(), await socket.recv()] == ["{oops", "{oops"]


async def test_close_gives_1006_and_cut_gives_1001(exchange: SimulatedExchange) -> None:
    """An abnormal end without a close frame, for as many connections as asked; a proper one at the 24 hour mark."""
    async with connect(f"{exchange.ws_url}/ws") as one, connect(f"{exchange.ws_url}/ws") as two:
        await settle(exchange, 2)
        exchange.inject({"fault": "close", "connections": 1})
        assert await closed_with(one) == 1006
        exchange.inject({"fault": "cut_24h"})
        assert await closed_with(two) == 1001


async def test_half_open_connection_stays_but_says_nothing(exchange: SimulatedExchange) -> None:
    """No data, no answer, no pong, and no end: only the client can notice."""
    async with connect(f"{exchange.ws_url}/ws/btcusdt@trade", ping_interval=None, close_timeout=0.05) as socket:
        await settle(exchange, 1)
        exchange.inject({"fault": "half_open"})
        exchange.advance(SECOND)
        await socket.send('{"method":"LIST_SUBSCRIPTIONS","id":1}')
        await socket.ping()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(socket.recv(), 0.2)
        assert socket.state is websockets.State.OPEN


async def test_rate_limit_skew_and_pause_until_cleared(exchange: SimulatedExchange, rest: httpx.AsyncClient) -> None:
    """REST refuses, clocks lie by the asked amount, a symbol is silent; `clear` ends all of it."""
    exchange.inject({"fault": "rate_limit", "seconds": 30, "status": 429})
    refused = await rest.get("/api/v3/time")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "30")
    exchange.inject({"fault": "clear"})
    exchange.inject({"fault": "skew", "milliseconds": -300_000})
    assert (await rest.get("/api/v3/time")).json()["serverTime"] == START_MS - 300_000
    exchange.inject({"fault": "pause", "symbol": "ETHUSDT"})
    async with connect(f"{exchange.ws_url}/stream?streams=btcusdt@trade/ethusdt@trade") as socket:
        start_ms = exchange.exchange.time_ms
        exchange.advance(SECOND)
        messages = [message["data"] for message in await received(socket)]
        assert {message["s"] for message in messages} == {"BTCUSDT"}
        assert all(start_ms <= message["T"] + 300_000 < start_ms + 1_000 for message in messages)
        exchange.inject({"fault": "clear"})
        exchange.advance(SECOND)
        assert trades_of(await received(socket), "ETHUSDT")


async def test_pause_ends_by_itself(exchange: SimulatedExchange) -> None:
    """A pause of one second of market time silences the symbol for that long."""
    exchange.inject({"fault": "pause", "symbol": "BTCUSDT", "seconds": 1})
    known = len(exchange.truth("BTCUSDT")["trade_id"])
    exchange.advance(SECOND)
    assert len(exchange.truth("BTCUSDT")["trade_id"]) == known
    exchange.advance(SECOND)
    assert len(exchange.truth("BTCUSDT")["trade_id"]) > known


async def test_bad_fault_requests_change_nothing(exchange: SimulatedExchange, rest: httpx.AsyncClient) -> None:
    """One sentence and a 400; nothing is remembered."""
    for body in (b"no json", b'{"fault":"drop","symbol":"NOPE"}', b'{"fault":"close","market":"moon"}', b"[1]"):
        reply = await rest.post("/sim/faults", content=body)
        assert reply.status_code == 400
        assert reply.json()["msg"]
    with pytest.raises(UnknownFaultError, match="NOPE"):
        exchange.inject({"fault": "pause", "symbol": "NOPE"})
    assert exchange.status()["faults"] == []


# Controls.


async def test_truth_and_status_over_http(exchange: SimulatedExchange, rest: httpx.AsyncClient) -> None:
    """Truth by id range [from, to) equals the Python side; unknown symbols and markets are named."""
    ids = exchange.truth("BTCUSDT")["trade_id"].tolist()
    reply = (await rest.get("/sim/truth", params={"symbol": "BTCUSDT", "from": ids[3], "to": ids[9]})).json()
    assert reply["id"] == ids[3:9]
    assert [float(price) for price in reply["price"]] == exchange.truth("BTCUSDT")["price"][3:9].tolist()
    assert (await rest.get("/sim/truth", params={"symbol": "NOPE"})).status_code == 400
    assert (await rest.get("/sim/truth", params={"symbol": "BTCUSDT", "market": "moon"})).status_code == 400
    assert (await rest.get("/sim/truth", params={"symbol": "BTCUSDT", "from": "x"})).status_code == 400
    with pytest.raises(KeyError):
        exchange.truth("NOPE")
    status = (await rest.get("/sim/status")).json()
    assert status["markets"]["spot"]["symbols"] == 20
    assert 'simulated_exchange_trades{market="spot"}' in (await rest.get("/metrics")).text
    assert (await rest.get("/livez")).status_code == (await rest.get("/readyz")).status_code == 200


async def test_rate_changes_at_run_time(exchange: SimulatedExchange, rest: httpx.AsyncClient) -> None:
    """Zero silences the market; nonsense is refused."""
    assert (await rest.post("/sim/rate", json={"rate": 0})).json() == {"rate": 0.0}
    made = exchange.exchange.venues["spot"].market.trades_made
    exchange.advance(SECOND)
    assert exchange.exchange.venues["spot"].market.trades_made == made
    for body in ({"rate": "fast"}, {"rate": -1}, {"rate": 1, "market": "moon"}, []):
        assert (await rest.post("/sim/rate", json=body)).status_code == 400


# Time.


async def test_market_keeps_pace_with_the_clock(clock: ManualClock) -> None:
    """Ten seconds of clock are ten seconds of market; after a jump (a laptop that slept) the gap is skipped, not flooded."""
    async with serve(small_config(pace=True), clock) as exchange:
        await clock.move(10)
        assert exchange.exchange.time_ms == pytest.approx(START_MS + 10_000, abs=40)
        made = exchange.exchange.venues["spot"].market.trades_made
        assert made == pytest.approx(30_000, rel=0.3)
        clock._now_us += 3_600 * 1_000_000
        await clock.move(0.1)
        assert exchange.skipped_ms >= 3_590_000
        assert exchange.exchange.venues["spot"].market.trades_made - made < 5_000
        assert exchange.exchange.time_ms == pytest.approx(START_MS + 3_610_100, abs=60)


async def test_max_trades_stops_the_market_but_not_the_server(clock: ManualClock) -> None:
    """Exactly so many trades; then readyz says so, and REST still answers."""
    config = ExchangeConfig(spot=MarketConfig(symbols=5, rate=3_000, step_ms=20), warmup_s=0.0, max_trades=2_000)
    async with serve(small_config(exchange=config, pace=True), clock) as exchange, httpx.AsyncClient(base_url=exchange.rest_url) as rest:
        await clock.move(5)
        await asyncio.wait_for(exchange.finished.wait(), 5)
        symbols = exchange.exchange.venues["spot"].wire.universe.symbols
        assert sum(len(exchange.truth(symbol)["trade_id"]) for symbol in symbols) == 2_000
        assert (await rest.get("/readyz")).status_code == 503
        assert (await rest.get("/api/v3/ping")).status_code == 200


async def test_failure_of_the_market_is_not_silent(clock: ManualClock) -> None:
    """If trading stops with an error, readyz says so, and leaving raises it."""
    with pytest.raises(ZeroDivisionError):
        async with serve(small_config(pace=True), clock) as exchange, httpx.AsyncClient(base_url=exchange.rest_url) as rest:
            exchange.exchange.step = lambda: 1 // 0  # type: ignore[assignment, method-assign, return-value]
            await clock.move(1)
            reply = await rest.get("/readyz")
            assert (reply.status_code, reply.json()["status"]) == (503, "failed")


async def test_live_exchange_feeds_a_client_in_real_time() -> None:
    """With the real clock, trades arrive as they are made: the last within a second of now."""
    async with serve(small_config(pace=True), SystemClock()) as exchange:
        async with connect(f"{exchange.ws_url}/ws/btcusdt@trade") as socket:
            messages = [json.loads(await asyncio.wait_for(socket.recv(), 5)) for _ in range(300)]
        ids = [message["t"] for message in messages]
        assert ids == list(range(ids[0], ids[0] + 300))
        assert abs(messages[-1]["T"] / 1_000 - time.time()) < 1.0


async def test_leaving_closes_connections_and_frees_the_port(clock: ManualClock) -> None:
    """Clients are told 1001; the port can be taken again at once; a taken port is one clear sentence."""
    async with serve(small_config(), clock) as exchange:
        socket = await connect(f"{exchange.ws_url}/ws")
        port = exchange.port
        with pytest.raises(SimulationConfigError, match=f"port {port}"):
            async with serve(small_config(port=port), clock):
                pass
    assert await closed_with(socket) == 1001
    async with serve(small_config(port=port), clock, extra_port=0) as again:
        assert again.port == port


# The process.


async def test_entry_point_serves_until_told_to_stop(tmp_path: Path) -> None:
    """`python -m infra.simulated_exchange` prints its addresses, serves, and leaves with 0 on SIGTERM; bad settings give 2."""
    root = Path(__file__).parents[3]
    ready = tmp_path / "ready.json"
    command = [sys.executable, "-m", "infra.simulated_exchange", "--symbols", "10", "--rate", "500", "--ready-file", str(ready)]
    process = await asyncio.create_subprocess_exec(*command, cwd=root, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    urls = json.loads(await asyncio.wait_for(process.stdout.readline(), 30))
    assert json.loads(ready.read_text()) == urls
    async with connect(f"{urls['ws_url']}/ws/btcusdt@trade") as socket:
        assert json.loads(await asyncio.wait_for(socket.recv(), 5))["s"] == "BTCUSDT"
    async with httpx.AsyncClient(base_url=urls["rest_url"]) as rest:
        assert len((await rest.get("/fapi/v1/exchangeInfo")).json()["symbols"]) == 10
    process.terminate()
    assert await asyncio.wait_for(process.wait(), 10) == 0
    wrong = await asyncio.create_subprocess_exec(*command, "--rate", "-5", cwd=root, stderr=asyncio.subprocess.PIPE)
    _, errors = await asyncio.wait_for(wrong.communicate(), 30)
    assert wrong.returncode == 2
    assert b"rate=-5.0" in errors
