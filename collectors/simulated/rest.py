"""REST: what Binance's public market-data routes answer, for spot (``/api/v3``) and USD-M (``/fapi/v1``).

Comes in: a :class:`~collectors.simulated.http.Request` and the time. Goes out: a reply with Binance's body, error codes and weight headers.
Reads the :class:`~collectors.simulated.exchange.Exchange`, changes nothing in it but the request weight.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from collectors.simulated.derivatives import funding_rate, open_interest, premium_index
from collectors.simulated.errors import ApiError
from collectors.simulated.exchange import Exchange, Venue
from collectors.simulated.history import INTERVAL_MS, Trades
from collectors.simulated.http import Request, Response, as_json
from collectors.simulated.listing import exchange_info
from collectors.simulated.tickers import book_ticker, day_ticker, depth, klines, price_ticker

_SYMBOL: Final = re.compile(r"[A-Z0-9-_.]{1,20}")
_NUMBER: Final = re.compile(r"[0-9]{1,20}")

Handler = Callable[["Call"], str]


class Call:
    """One request to one market: parameters checked the way Binance checks them.

    Args:
        exchange: the exchange.
        venue: the market asked.
        request: the request.
        now_ms: the exchange's clock, its error included.
    """

    def __init__(self, exchange: Exchange, venue: Venue, request: Request, now_ms: int) -> None:
        self.exchange = exchange
        self.venue = venue
        self.params = request.params
        self.headers = request.headers
        self.now_ms = now_ms
        self.spot = venue.wire.spot

    def rows(self, default: int, most: int) -> int:
        """``limit`` of a page of trades, no more than a shortened page holds."""
        # Refusals end by the machine's clock, not by the exchange's wrong one.
        return self.venue.trouble.rows(self.limit(default, most), self.now_ms - self.exchange.skew_ms)

    def code(self) -> int:
        """The symbol asked for.

        Raises:
            ApiError: missing (-1102), ill-formed (-1100) or not listed (-1121).
        """
        return self._code_of(self._required("symbol"))

    def codes(self) -> list[int] | None:
        """The symbols asked for by ``symbol`` or ``symbols``; None: all."""
        if "symbol" in self.params:
            return [self.code()]
        if "symbols" not in self.params or not self.spot:
            return None
        try:
            names = json.loads(self.params["symbols"])
        except ValueError:
            names = None
        if not isinstance(names, list) or not names:
            raise ApiError(-1100, "Illegal characters found in parameter 'symbols'; legal range is '^\\[(\"[A-Z0-9-_.]{1,20}\"(,)?)+\\]$'.")
        return [self._code_of(str(name)) for name in names]

    def _code_of(self, symbol: str) -> int:
        if not _SYMBOL.fullmatch(symbol):
            raise ApiError(-1100, "Illegal characters found in parameter 'symbol'; legal range is '^[A-Z0-9-_.]{1,20}$'.")
        code = self.venue.market.code(symbol)
        if code is None:
            raise ApiError(-1121, "Invalid symbol.")
        return code

    def _required(self, name: str) -> str:
        value = self.params.get(name, "")
        if not value:
            raise ApiError(-1102, f"Mandatory parameter '{name}' was not sent, was empty/null, or malformed.")
        return value

    def number(self, name: str) -> int | None:
        """A whole number, or None where it was not sent."""
        value = self.params.get(name)
        if value is None:
            return None
        if not _NUMBER.fullmatch(value):
            raise ApiError(-1100, f"Illegal characters found in parameter '{name}'; legal range is '^[0-9]{{1,20}}$'.")
        return int(value)

    def limit(self, default: int, most: int) -> int:
        """``limit``: spot cuts it to ``most``, USD-M refuses what is beyond."""
        value = self.number("limit")
        if value is None:
            return default
        if value < 1 or (value > most and not self.spot):
            raise ApiError(-1130, "Data sent for parameter 'limit' is not valid.")
        return min(value, most)

    def interval(self) -> str:
        """A kline interval of fixed length.

        Raises:
            ApiError: missing (-1102) or not known (-1120).
        """
        interval = self._required("interval")
        if interval not in INTERVAL_MS or (interval == "1s" and not self.spot):
            raise ApiError(-1120, "Invalid interval.")
        return interval


def _trades(call: Call) -> str:
    code = call.code()
    limit = call.rows(500, 1_000)
    kept = call.venue.known(code)
    return call.venue.wire.rest_trades(code, kept.cut(max(0, len(kept) - limit), len(kept)), skew_ms=call.exchange.skew_ms)


def _historical_trades(call: Call) -> str:
    if not call.spot and len(call.headers.get("x-mbx-apikey", "")) < 1:
        raise ApiError(-2014, "API-key format invalid.", status=401)
    code = call.code()
    limit = call.rows(500, 1_000 if call.spot else 500)
    from_id = call.number("fromId")
    kept = call.venue.known(code)
    start = max(0, len(kept) - limit) if from_id is None else int(kept.trade_id.searchsorted(from_id))
    return call.venue.wire.rest_trades(code, kept.cut(start, start + limit), skew_ms=call.exchange.skew_ms)


def _agg_trades(call: Call) -> str:
    code = call.code()
    limit = call.rows(500, 1_000)
    from_id, start_ms, end_ms = call.number("fromId"), call.number("startTime"), call.number("endTime")
    if from_id is not None and (start_ms is not None or end_ms is not None):
        raise ApiError(-1128, "Combination of optional parameters invalid.")
    skew_ms = call.exchange.skew_ms
    ring = call.venue.ring
    kept = call.venue.known(code)
    if ring.total > ring.capacity:
        kept = without_oldest_aggregate(kept)
    first, last = 0, len(kept)
    if from_id is not None:
        first = int(kept.agg_id.searchsorted(from_id))
    if start_ms is not None:
        first = int(kept.time_ms.searchsorted(start_ms - skew_ms))
    if end_ms is not None:
        last = int(kept.time_ms.searchsorted(end_ms - skew_ms, side="right"))
    kept = kept.cut(first, max(first, last))
    if len(kept):
        # Aggregates are numbered without gaps, so the limit is a bound on the id.
        newest_only = from_id is None and start_ms is None
        if newest_only:
            kept = kept.cut(int(kept.agg_id.searchsorted(kept.agg_id[-1] - limit, side="right")), len(kept))
        else:
            kept = kept.cut(0, int(kept.agg_id.searchsorted(kept.agg_id[0] + limit)))
    return call.venue.wire.rest_aggregates(code, kept, skew_ms=skew_ms)


def without_oldest_aggregate(trades: Trades) -> Trades:
    """Without the oldest aggregate, of which a full ring may have dropped a part."""
    if not len(trades):
        return trades
    return trades.cut(int(trades.agg_id.searchsorted(trades.agg_id[0], side="right")), len(trades))


def _klines(call: Call) -> str:
    code, interval = call.code(), call.interval()
    limit = call.limit(500, 1_000 if call.spot else 1_500)
    start_ms, end_ms = call.number("startTime"), call.number("endTime")
    return klines(call.venue, code, interval, start_ms=start_ms, end_ms=end_ms, limit=limit)


def _depth(call: Call) -> str:
    code = call.code()
    if call.spot:
        return depth(call.venue, code, call.limit(100, 5_000), call.now_ms)
    limit = call.limit(500, 1_000)
    if limit not in (5, 10, 20, 50, 100, 500, 1_000):
        raise ApiError(-4021, f"'{limit}' is not valid depth limit.")
    return depth(call.venue, code, limit, call.now_ms)


def _per_symbol(one: Callable[[Venue, int, int], str]) -> Handler:
    """A route that answers an object for ``symbol`` and a list otherwise."""

    def handle(call: Call) -> str:
        codes = call.codes()
        if codes is not None and "symbol" in call.params:
            return one(call.venue, codes[0], call.now_ms)
        rows = (one(call.venue, code, call.now_ms) for code in codes or range(len(call.venue.wire.universe)))
        return "[" + ",".join(rows) + "]"

    return handle


def _funding_rate(call: Call) -> str:
    codes = call.codes()
    limit = call.limit(100, 1_000)
    start_ms, end_ms = call.number("startTime"), call.number("endTime")
    return funding_rate(call.venue, codes, start_ms=start_ms, end_ms=end_ms, limit=limit, now_ms=call.now_ms)


def _info(call: Call) -> str:
    return exchange_info(call.venue, call.codes(), call.now_ms)


_ROUTES: Final[dict[str, Handler]] = {
    "ping": lambda call: "{}",
    "time": lambda call: f'{{"serverTime":{call.now_ms}}}',
    "exchangeInfo": _info,
    "trades": _trades,
    "historicalTrades": _historical_trades,
    "aggTrades": _agg_trades,
    "klines": _klines,
    "depth": _depth,
    "ticker/24hr": _per_symbol(day_ticker),
    "ticker/bookTicker": _per_symbol(book_ticker),
    "ticker/price": _per_symbol(price_ticker),
}

_USDM_ROUTES: Final[dict[str, Handler]] = _ROUTES | {
    "fundingRate": _funding_rate,
    "premiumIndex": _per_symbol(premium_index),
    "openInterest": lambda call: open_interest(call.venue, call.code(), call.now_ms),
}

_TRADE_PAGES: Final = ("trades", "historicalTrades", "aggTrades")

# Weight with one symbol, and without: Binance's tables of 2025.
_SPOT_WEIGHT: Final = {
    "ping": (1, 1), "time": (1, 1), "exchangeInfo": (20, 20), "trades": (25, 25), "historicalTrades": (25, 25), "aggTrades": (4, 4),
    "klines": (2, 2), "ticker/24hr": (2, 80), "ticker/bookTicker": (2, 4), "ticker/price": (2, 4),
}  # fmt: skip
_USDM_WEIGHT: Final = {
    "ping": (1, 1), "time": (1, 1), "exchangeInfo": (1, 1), "trades": (5, 5), "historicalTrades": (20, 20), "aggTrades": (20, 20),
    "ticker/24hr": (1, 40), "ticker/bookTicker": (2, 5), "ticker/price": (1, 2), "premiumIndex": (1, 10), "openInterest": (1, 1),
    "fundingRate": (0, 0),
}  # fmt: skip


def weight_of(*, spot: bool, route: str, params: Any) -> int:
    """Request weight of a route with these parameters (limits decide for depth and USD-M klines)."""
    limit_text = params.get("limit", "")
    limit = int(limit_text) if _NUMBER.fullmatch(limit_text) else 0
    if route == "depth":
        steps = ((100, 5), (500, 25), (1_000, 50), (5_000, 250)) if spot else ((50, 2), (100, 5), (500, 10), (1_000, 20))
        return next((weight for most, weight in steps if (limit or (100 if spot else 500)) <= most), steps[-1][1])
    if route == "klines" and not spot:
        return next((weight for most, weight in ((99, 1), (499, 2), (1_000, 5)) if (limit or 500) <= most), 10)
    single, every = (_SPOT_WEIGHT if spot else _USDM_WEIGHT).get(route, (1, 1))
    return single if "symbol" in params else every


def answer(exchange: Exchange, request: Request, now_ms: int) -> Response | None:
    """The reply to a request under ``/api/v3/`` or ``/fapi/v1/``; None for any other path."""
    if request.path.startswith("/api/v3/"):
        venue, route, routes = exchange.venues["spot"], request.path[8:], _ROUTES
    elif request.path.startswith("/fapi/v1/") and "usdm" in exchange.venues:
        venue, route, routes = exchange.venues["usdm"], request.path[9:], _USDM_ROUTES
    else:
        return None
    handler = routes.get(route)
    if handler is None:
        return Response(status=404, body=json.dumps({"code": -5000, "msg": f"Path {request.path}, Method {request.method} is invalid"}))
    if request.method != "GET":
        return as_json({"code": -1000, "msg": f"Request method '{request.method}' not supported."}, status=405)
    limit, trouble = venue.limit, venue.trouble
    delay_s = trouble.delay(now_ms)
    if now_ms < trouble.error_until_ms:
        return replace(
            as_json({"code": -1001, "msg": "Internal error; unable to process your request."}, status=trouble.error_status), delay_s=delay_s
        )
    verdict = limit.admit(weight_of(spot=venue.wire.spot, route=route, params=request.params), now_ms)
    headers = {"X-MBX-USED-WEIGHT": str(verdict.used), "X-MBX-USED-WEIGHT-1M": str(verdict.used)}
    if verdict.status != 200:
        return _refusal(verdict.status, limit.limit, verdict.banned_until_ms, headers | {"Retry-After": str(verdict.retry_after_s)})
    try:
        body = handler(Call(exchange, venue, request, now_ms + exchange.skew_ms))
        return Response(body=trouble.shorten(body) if route in _TRADE_PAGES else body, headers=headers, delay_s=delay_s)
    except ApiError as error:
        body = json.dumps({"code": error.code, "msg": error.msg}, separators=(",", ":"))
        return Response(status=error.status, body=body, headers=headers)


def _refusal(status: int, limit: int, banned_until_ms: int, headers: dict[str, str]) -> Response:
    if status == 418:
        sentence = f"Way too much request weight used; IP banned until {banned_until_ms}. Please use WebSocket Streams for live updates to avoid bans."
    else:
        sentence = (
            f"Too much request weight used; current limit is {limit} request weight per 1 MINUTE. "
            "Please use WebSocket Streams for live updates to avoid polling the API."
        )
    return Response(status=status, body=json.dumps({"code": -1003, "msg": sentence}, separators=(",", ":")), headers=headers)
