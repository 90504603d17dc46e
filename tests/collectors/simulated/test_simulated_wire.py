"""Messages on the wire: shaped as Binance's recorded ones, and saying exactly what was traded."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectors.simulated.blocks import TradeBlock
from collectors.simulated.exchange import Exchange, ExchangeConfig
from collectors.simulated.http import Request
from collectors.simulated.regimes import MarketConfig
from collectors.simulated.rest import answer
from collectors.simulated.tickers import candles_of
from collectors.simulated.wire import decimal, frame, product

START_MS = 1_723_161_255_000


@pytest.fixture(scope="module")
def exchange() -> Exchange:
    """Spot and perpetuals with a few seconds of trades."""
    config = ExchangeConfig(
        spot=MarketConfig(symbols=100, rate=5_000), usdm=MarketConfig(kind="usdm", symbols=100, rate=5_000), warmup_s=5.0
    )
    return Exchange(config, start_ms=START_MS)


@pytest.fixture(scope="module")
def blocks(exchange: Exchange) -> dict[str, TradeBlock]:
    """One step of each market."""
    return {venue.market.config.kind: block for venue, block in exchange.step()}


def payload(data: bytes) -> str:
    """The text of one WebSocket frame."""
    size, start = (data[1], 2) if data[1] < 126 else (int.from_bytes(data[2:4], "big"), 4)
    assert data[0] == 0x81
    assert len(data) == start + size
    return data[start:].decode()


def shape(value: Any) -> Any:
    """What a JSON value looks like: keys in order, strings by their kind, the number of decimals left out."""
    if isinstance(value, dict):
        return [(key, shape(entry)) for key, entry in value.items()]
    if isinstance(value, list):
        return [shape(entry) for entry in value[:1]]
    if isinstance(value, str):
        return "number" if re.fullmatch(r"-?\d+(\.\d+)?", value) else "text"
    return type(value).__name__


def decimals(text: str) -> int:
    """Digits after the point."""
    return len(text.partition(".")[2])


# Shapes.


@pytest.mark.parametrize(
    ("kind", "stream", "file"),
    [
        ("spot", "trade", "ws/binance/spot_btcusdt_20240808.ws.gz"),
        ("usdm", "trade", "ws/binance/usdm_btcusdt_20240808.ws.gz"),
        ("spot", "bookTicker", "ws/binance/spot_btcusdt_20240808.ws.gz"),
        ("usdm", "bookTicker", "ws/binance/usdm_btcusdt_20240808.ws.gz"),
        ("spot", "aggTrade", "ws/cryptofeed/BINANCE.ws.1.0.gz"),
        ("usdm", "aggTrade", "ws/cryptofeed/BINANCE_FUTURES.ws.1.0.gz"),
        ("spot", "kline_1m", "ws/cryptofeed/BINANCE.ws.1.0.gz"),
        ("usdm", "kline_1m", "ws/cryptofeed/BINANCE_FUTURES.ws.1.0.gz"),
    ],
)
def test_stream_messages_have_the_recorded_shape(
    exchange: Exchange, blocks: dict[str, TradeBlock], recordings: Any, kind: str, stream: str, file: str
) -> None:
    """Same keys in the same order, same kinds of values, and spot's eight decimals, as in the recorded frames."""
    venue = exchange.venues[kind]  # type: ignore[index]
    bid, ask = venue.market.quotes()
    made = {
        "trade": lambda: venue.wire.trades(blocks[kind], combined=True)[0],
        "aggTrade": lambda: venue.wire.aggregates(blocks[kind], combined=True)[1][0],
        "bookTicker": lambda: venue.wire.book_tickers([0], bid, ask, update_id=7, event_ms=START_MS, combined=True)[0],
        "kline_1m": lambda: venue.wire.kline(0, "1m", 60_000, candles_of(venue, 0, "1m"), event_ms=START_MS, closed=False, combined=True),
    }[stream]()
    ours, recorded = json.loads(payload(made)), recordings.frames(file, stream)[0]
    assert shape(ours) == shape(recorded)
    for field in ("p", "q", "b", "B", "a", "A"):
        if kind == "spot" and isinstance(recorded["data"].get(field), str):
            assert decimals(ours["data"][field]) == decimals(recorded["data"][field]) == 8


def test_bitcoin_perpetual_has_the_recorded_decimals(exchange: Exchange, blocks: dict[str, TradeBlock], recordings: Any) -> None:
    """BTCUSDT perpetual: price with two decimals, quantity with three."""
    block = blocks["usdm"]
    rows = np.flatnonzero(block.code == 0)
    ours = json.loads(payload(exchange.venues["usdm"].wire.trades(block.take(rows), combined=False)[0]))
    recorded = recordings.frames("ws/binance/usdm_btcusdt_20240808.ws.gz", "trade")[0]["data"]
    assert (decimals(ours["p"]), decimals(ours["q"])) == (decimals(recorded["p"]), decimals(recorded["q"])) == (2, 3)


REST_ROUTES = [
    ("/api/v3/trades", "symbol=ETHUSDT"),
    ("/api/v3/historicalTrades", "symbol=ETHUSDT"),
    ("/api/v3/klines", "symbol=ETHUSDT&interval=1m"),
    ("/api/v3/depth", "symbol=ETHUSDT&limit=5"),
    ("/api/v3/ticker/24hr", "symbol=ETHUSDT"),
    ("/api/v3/ticker/bookTicker", "symbol=ETHUSDT"),
    ("/api/v3/ticker/price", "symbol=ETHUSDT"),
    ("/api/v3/aggTrades", "symbol=ETHUSDT"),
    ("/fapi/v1/trades", "symbol=ETHUSDT"),
    ("/fapi/v1/aggTrades", "symbol=ETHUSDT"),
    ("/fapi/v1/klines", "symbol=ETHUSDT&interval=5m"),
    ("/fapi/v1/depth", "symbol=ETHUSDT&limit=5"),
    ("/fapi/v1/openInterest", "symbol=ETHUSDT"),
    ("/fapi/v1/premiumIndex", "symbol=ETHUSDT"),
    ("/fapi/v1/ticker/bookTicker", "symbol=ETHUSDT"),
    ("/fapi/v1/time", ""),
]


def rest(exchange: Exchange, path: str, query: str) -> Any:
    """The decoded body of a REST reply."""
    reply = answer(exchange, Request(method="GET", path=path, params=dict(part.split("=") for part in query.split("&") if part)), START_MS)
    assert reply is not None
    assert reply.status == 200, reply.body
    return json.loads(reply.body)


def unordered(value: Any) -> Any:
    """The shape of a value, keys sorted: the recorder of the REST replies sorted them."""
    if isinstance(value, dict):
        return {key: unordered(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [unordered(entry) for entry in (value[:12] if value and not isinstance(value[0], list | dict) else value[:1])]
    return shape(value)


@pytest.mark.parametrize(("path", "query"), REST_ROUTES)
def test_rest_replies_have_the_recorded_shape(exchange: Exchange, recordings: Any, path: str, query: str) -> None:
    """Same keys and kinds of values as one of the recorded replies of the route."""
    ours = unordered(rest(exchange, path, query))
    assert ours in [unordered(reply["data"]) for reply in recordings.rest(path)]


@pytest.mark.parametrize("path", ["/api/v3/exchangeInfo", "/fapi/v1/exchangeInfo"])
def test_listing_has_what_a_client_reads(exchange: Exchange, recordings: Any, path: str) -> None:
    """Every key we send for a symbol is a recorded one, with tick size and lot size among the filters."""
    ours = rest(exchange, path, "symbol=BTCUSDT")["symbols"][0]
    recorded = recordings.rest(path)[0]["data"]["symbols"][0]
    unknown = set(ours) - set(recorded) - {"permissions"}
    assert not unknown
    assert {"symbol", "status", "baseAsset", "quoteAsset", "filters", "orderTypes"} <= set(ours)
    filters = {entry["filterType"]: entry for entry in ours["filters"]}
    assert Decimal(filters["PRICE_FILTER"]["tickSize"]) == (Decimal("0.01") if path.startswith("/api") else Decimal("0.1"))
    assert Decimal(filters["LOT_SIZE"]["stepSize"]) == (Decimal("0.00001") if path.startswith("/api") else Decimal("0.001"))


# Values.


@pytest.mark.parametrize("kind", ["spot", "usdm"])
@pytest.mark.parametrize("combined", [True, False])
def test_every_trade_reads_back_exactly(exchange: Exchange, blocks: dict[str, TradeBlock], kind: str, combined: bool) -> None:
    """Symbol, id, price, size, time and side of each message are those of its row, over symbols of all precisions."""
    venue, block = exchange.venues[kind], blocks[kind]  # type: ignore[index]
    messages = venue.wire.trades(block, combined=combined, skew_ms=5)
    assert len(messages) == len(block) > 30
    for row, message in enumerate(messages):
        body = json.loads(payload(message))
        code = int(block.code[row])
        if combined:
            assert body["stream"] == venue.wire.universe.symbols[code].lower() + "@trade"
            body = body["data"]
        assert body["s"] == venue.wire.universe.symbols[code]
        assert body["t"] == block.trade_id[row]
        assert Decimal(body["p"]) == Decimal(int(block.price[row])).scaleb(-int(venue.wire.universe.price_decimals[code]))
        assert Decimal(body["q"]) == Decimal(int(block.size[row])).scaleb(-int(venue.wire.universe.size_decimals[code]))
        assert (body["T"], body["E"], body["m"]) == (block.time_ms[row] + 5, block.end_ms + 5, bool(block.buyer_is_maker[row]))


def test_truth_is_the_number_a_parser_reads(exchange: Exchange, blocks: dict[str, TradeBlock]) -> None:
    """Ground truth as float64 equals float() of the text on the wire, bit for bit."""
    venue = exchange.venues["spot"]
    for code in range(100):
        truth = venue.truth(code)
        kept = venue.ring.of_symbol(code)
        assert truth["price"].tolist() == [float(venue.wire.price(code, value)) for value in kept.price.tolist()]
        assert truth["size"].tolist() == [float(venue.wire.size(code, value)) for value in kept.size.tolist()]


def test_aggregates_add_up_to_their_trades(exchange: Exchange, blocks: dict[str, TradeBlock]) -> None:
    """First and last id cover all trades of the step once; sizes add up; order is that of time."""
    venue, block = exchange.venues["spot"], blocks["spot"]
    codes, messages = venue.wire.aggregates(block, combined=False)
    bodies = [json.loads(payload(message)) for message in messages]
    assert [body["s"] for body in bodies] == [venue.wire.universe.symbols[code] for code in codes]
    assert [body["T"] for body in bodies] == sorted(body["T"] for body in bodies)
    covered: dict[str, list[int]] = {}
    for body in bodies:
        covered.setdefault(body["s"], []).extend(range(body["f"], body["l"] + 1))
    for code in np.unique(block.code):
        assert covered[venue.wire.universe.symbols[code]] == block.trade_id[block.code == code].tolist()
    total = sum(Decimal(body["q"]) for body in bodies if body["s"] == "BTCUSDT")
    assert total == Decimal(int(block.size[block.code == 0].sum())).scaleb(-5)


@given(value=st.integers(0, 10**15), places=st.integers(0, 8), extra=st.integers(0, 4))
def test_decimal_text_is_exact(value: int, places: int, extra: int) -> None:
    """An integer count of 10**-n reads back as itself, padded or not."""
    text = decimal(value, places, places + extra)
    assert Decimal(text) == Decimal(value).scaleb(-places)
    assert decimals(text) == places + extra
    assert decimals(product(value, places + extra, places)) == places


@pytest.mark.parametrize("size", [0, 125, 126, 65_535, 65_536])
def test_frame_headers_follow_the_protocol(size: int) -> None:
    """Length in 7, 16 or 64 bits, unmasked (RFC 6455, section 5.2)."""
    data = frame(b"x" * size)
    assert data[:2] == bytes((0x81, size if size < 126 else 126 if size < 65_536 else 127))
    assert len(data) == size + (2 if size < 126 else 4 if size < 65_536 else 10)
