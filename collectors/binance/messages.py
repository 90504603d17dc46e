"""Binance's wire messages with the venue's own letters.

Documents: "WebSocket Streams for Binance" (spot), "USD-M Futures: Websocket Market Streams" and the REST pages "Recent Trades List",
"Old Trades Lookup", "Compressed/Aggregate Trades List", "Exchange Information". Prices and sizes come as decimal text and are read
straight into float64 (correctly rounded) by a decoder with ``strict=False``. Fields we do not use are skipped by the parser,
which is cheaper than storing them.
"""

from __future__ import annotations

import msgspec


class Trade(msgspec.Struct, tag_field="e", tag="trade", gc=False):
    """One trade: stream ``<symbol>@trade``."""

    t: int  # trade id, per symbol; spot: consecutive, USD-M: with holes
    p: float  # price
    q: float  # quantity, base units
    T: int  # trade time, ms
    m: bool  # is the buyer the market maker? then the taker sold
    X: str = "MARKET"  # USD-M only: MARKET, or INSURANCE_FUND, ADL, NA: not trades of the market


class AggTrade(msgspec.Struct, tag_field="e", tag="aggTrade", gc=False):
    """All fills of one taker order at one price: stream ``<symbol>@aggTrade``."""

    a: int  # aggregate trade id, per symbol, consecutive
    p: float  # price
    q: float  # quantity, base units
    T: int  # trade time, ms
    m: bool  # is the buyer the market maker? then the taker sold


class TradeEnvelope(msgspec.Struct, gc=False):
    """A ``@trade`` message of a combined stream."""

    stream: str  # e.g. btcusdt@trade
    data: Trade


class AggTradeEnvelope(msgspec.Struct, gc=False):
    """An ``@aggTrade`` message of a combined stream."""

    stream: str  # e.g. btcusdt@aggTrade
    data: AggTrade


class ErrorBody(msgspec.Struct):
    """The venue's error."""

    code: int = 0
    msg: str = ""


class AnyMessage(msgspec.Struct):
    """Anything the venue may send; says what it is before its data is looked at."""

    stream: str | None = None  # combined stream event
    data: msgspec.Raw = msgspec.Raw(b"")
    e: str | None = None  # raw stream event: sent when the connection is not in combined mode
    id: int | str | None = None  # answer to SUBSCRIBE or UNSUBSCRIBE
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: ErrorBody | None = None  # refusal of a request, spot
    code: int | None = None  # refusal of a request, USD-M
    msg: str | None = None


class EventKind(msgspec.Struct):
    """Only the type of an event."""

    e: str = ""


class SymbolInfo(msgspec.Struct):
    """One entry of ``exchangeInfo.symbols``."""

    symbol: str  # e.g. BTCUSDT
    status: str = ""  # TRADING, BREAK, HALT, SETTLING, ...
    baseAsset: str = ""  # noqa: N815
    quoteAsset: str = ""  # noqa: N815
    contractType: str = ""  # noqa: N815  # USD-M: PERPETUAL, CURRENT_QUARTER, ...; empty on spot


class ExchangeInfo(msgspec.Struct):
    """``GET exchangeInfo``."""

    symbols: list[SymbolInfo]
    serverTime: int = 0  # noqa: N815  # ms


class RestTrade(msgspec.Struct, gc=False):
    """One row of ``trades`` and ``historicalTrades``."""

    id: int
    price: float
    qty: float
    time: int  # ms
    isBuyerMaker: bool  # noqa: N815


class RestAggTrade(msgspec.Struct, gc=False):
    """One row of ``aggTrades``."""

    a: int  # aggregate trade id
    p: float  # price
    q: float  # quantity
    T: int  # ms
    m: bool  # is the buyer the market maker?
