"""Binance over REST: what is listed, and trades by id for gaps. A thin shell: rate limit and breaker are pure parts.

Documents: "Exchange Information", "Old Trades Lookup", "Recent Trades List", "Compressed/Aggregate Trades List", "24hr Ticker Price
Change Statistics", "Limits" (429, 418, Retry-After, X-MBX-USED-WEIGHT-1M).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any, Final

import httpx
import msgspec
import numpy as np

from collectors.binance.feed import Venue
from collectors.binance.messages import ErrorBody, ExchangeInfo, RestAggTrade, RestTrade, SymbolInfo
from collectors.breaker import Breaker
from collectors.errors import AnswerError, BannedError, BlockedError, RateLimitedError, RefusedError, UnavailableError, VenueError
from collectors.rate_limit import RateLimit, RateLimitConfig, retry_after_s
from collectors.wire import Array
from schemas.seam import Clock
from schemas.timeframes import MAX_TIME_US, MIN_TIME_US

logger = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 64 * 1024 * 1024
"""exchangeInfo of spot is 15 MB; nothing we ask for is larger than this."""
ATTEMPTS: Final = 3
"""Tries of one request while the venue is unavailable or asks to slow down."""
PATIENCE_S: Final = 20.0
"""A request does not wait longer than this for the rate limit; what waits for it (a gap, a symbol) tells its own story meanwhile."""
SHORTEST_WAIT_S: Final = 0.001
"""So that the microsecond a clock may leave of a wait is not waited for again and again."""
BACKGROUND_RESERVE: Final = 0.5
"""Share of the budget that background requests leave: 2,400 weight of spot are 96 pages for gaps that hold the feed."""
KEY_CODES: Final = (-2014, -2015, -1022)
"""The venue wants an API key for this route."""
_FAULTS: Final = (msgspec.DecodeError, ValueError, OverflowError)


@dataclass(frozen=True, slots=True)
class VenueSymbol:
    """One market the venue lists."""

    raw: str
    """The venue's name, e.g. BTCUSDT."""
    symbol: str
    """Ours, e.g. BTC-USDT, BTC-USDT-PERP."""
    status: str
    """TRADING, or why not."""


class BinanceRest:
    """REST client of one venue.

    Args:
        venue: which exchange and where.
        http: client to use; its owner closes it.
        clock: time and sleep.
        breaker: opened by failures of the venue, not by refusals of a wrong request.
        api_key: sent where the venue wants one (USD-M ``historicalTrades``); empty: none.
    """

    def __init__(self, venue: Venue, http: httpx.AsyncClient, clock: Clock, breaker: Breaker, *, api_key: str = "") -> None:
        self.venue = venue
        self.breaker = breaker
        # after an outage every symbol needs a request at once: the whole minute's share may go in a burst, the venue's own count
        # (X-MBX-USED-WEIGHT-1M) keeps what follows within the minute
        limit = RateLimitConfig(weight_per_minute=venue.weight_per_minute)
        self.limit = RateLimit(replace(limit, burst=limit.weight_per_minute * limit.share))
        self.errors = 0
        self._http, self._clock = http, clock
        self._headers = {"X-MBX-APIKEY": api_key} if api_key else {}
        self._spot = venue.rest_path.startswith("/api/")

    async def symbols(self) -> dict[str, VenueSymbol]:
        """Everything listed, by our name. Raises VenueError, BreakerOpenError."""
        body = await self._get("exchangeInfo", {}, weight=20 if self._spot else 1)
        try:
            info = msgspec.json.decode(body, type=ExchangeInfo)
        except _FAULTS as exc:
            raise AnswerError(f"{self.venue.rest_url} answers exchangeInfo with something else: {exc}") from exc
        found = {}
        for entry in info.symbols:
            name = canonical(entry)
            if name:
                found[name] = VenueSymbol(entry.symbol, name, entry.status)
        return found

    async def last_ids(self) -> dict[str, tuple[int, int]]:
        """(id of the newest single trade, the venue's time then, us) of every symbol, by the venue's name.

        One call tells who traded while we were away. The time is 0 where the venue does not say it.
        """
        body = await self._get("ticker/24hr", {}, weight=80 if self._spot else 40)
        try:
            rows = msgspec.json.decode(body, type=list[_Ticker])
        except _FAULTS as exc:
            raise AnswerError(f"{self.venue.rest_url} answers ticker/24hr with something else: {exc}") from exc
        return {row.symbol: (row.lastId, row.closeTime * 1000) for row in rows if row.lastId >= 0}

    async def trades(self, raw: str, first_id: int, last_id: int, *, max_rows: int) -> AsyncIterator[dict[str, Array]]:
        """Pages of trades with ``first_id <= id <= last_id`` that the venue still has, oldest first, at most about ``max_rows``.

        Columns: trade_id, price, size, side, exchange_time_us. Ends early when the venue has no more. Raises VenueError,
        BreakerOpenError.
        """
        position = first_id
        while position <= last_id and position - first_id < max_rows:
            page, exhausted = await self.page(raw, position)
            ids = page["trade_id"]
            if len(ids) == 0:
                return
            wanted = (ids >= position) & (ids <= last_id)
            if wanted.any():
                yield {name: column[wanted] for name, column in page.items()}
            newest = int(ids.max())
            if newest < position or exhausted:
                return
            position = newest + 1

    async def first_since(self, raw: str, time_us: int) -> tuple[int, int] | None:
        """(id, time) of the first trade at or after ``time_us`` that the venue still has; None when there was none since.

        Aggregate trades can be asked for by time (``startTime``), and each names the first single trade in it: one request. Where that
        answers with nothing (the venue looks an hour ahead only), the id is searched by halves: some thirty requests. Raises VenueError,
        BreakerOpenError.
        """
        params = {"symbol": raw, "startTime": str(-(-time_us // 1000)), "limit": "1"}
        body = await self._get("aggTrades", params, weight=4 if self._spot else 20)
        found = [row for row in _rows(body, list[_Aggregate]) if time_us <= 1000 * row.T]
        if found:
            row = min(found, key=lambda one: one.a)
            number = row.a if self.venue.kind == "aggTrade" else row.f
            if number >= 0:
                return number, row.T * 1000
        return await self._search(raw, time_us)

    async def at_or_after(self, raw: str, trade_id: int) -> tuple[int, int] | None:
        """(id, time) of the first trade with this id or a larger one that the venue still has. Raises VenueError, BreakerOpenError."""
        page, _ = await self.page(raw, trade_id, rows=1)
        for number, time_us in zip(page["trade_id"].tolist(), page["exchange_time_us"].tolist(), strict=True):
            if number >= trade_id:
                return number, time_us
        return None

    async def _search(self, raw: str, time_us: int) -> tuple[int, int] | None:
        agg = self.venue.kind == "aggTrade"
        body = await self._get("aggTrades" if agg else "trades", {"symbol": raw, "limit": "1"}, weight=25 if self._spot else 20)
        page = _agg_columns(body) if agg else _columns(body)
        if not len(page["trade_id"]) or int(page["exchange_time_us"][-1]) < time_us:
            return None
        low, high = -1, int(page["trade_id"][-1])
        best = high, int(page["exchange_time_us"][-1])
        while high - low > 1:
            middle = (low + high) // 2
            row = await self.at_or_after(raw, middle)
            if row is None or row[1] >= time_us:
                high, best = middle, best if row is None else row
            else:
                low = max(row[0], middle)
        return best

    async def page(self, raw: str, from_id: int, *, rows: int | None = None, background: bool = False) -> tuple[dict[str, Array], bool]:
        """One page of trades from ``from_id`` on, oldest first; and whether asking further is of no use.

        ``rows``: how many at most, by default as many as the venue gives. ``background``: half of the budget stays unspent, for gaps that hold the feed. Raises VenueError, BreakerOpenError.
        """
        rows, reserve = rows or self.venue.page_rows, BACKGROUND_RESERVE if background else 0.0
        params = {"symbol": raw, "fromId": str(from_id), "limit": str(rows)}
        if self.venue.kind == "aggTrade":
            return _agg_columns(await self._get("aggTrades", params, weight=4 if self._spot else 20, reserve=reserve)), False
        try:
            return _columns(await self._get("historicalTrades", params, weight=25 if self._spot else 20, reserve=reserve)), False
        except RefusedError as exc:
            if exc.code not in KEY_CODES:
                raise
        # without a key only the newest thousand are to be had
        params = {"symbol": raw, "limit": "1000"}
        return _columns(await self._get("trades", params, weight=25 if self._spot else 5, reserve=reserve)), True

    async def _get(self, route: str, params: dict[str, str], *, weight: float, reserve: float = 0.0) -> bytes:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._once(route, params, weight, reserve)
            except (UnavailableError, RateLimitedError) as exc:
                if attempt == ATTEMPTS or exc.retry_after_s > PATIENCE_S:
                    raise
                await self._clock.sleep(max(exc.retry_after_s, 0.2 * 2**attempt * self._clock.random.random()))
        raise AssertionError("unreachable")

    async def _once(self, route: str, params: dict[str, str], weight: float, reserve: float) -> bytes:
        clock = self._clock
        # asked again after each wait: meanwhile another request may have been refused, and its Retry-After is for all
        while (wait_s := self.limit.wait_s(weight, clock.monotonic_us(), reserve_share=reserve)) > 0:
            if wait_s > PATIENCE_S:
                raise RateLimitedError(
                    f"The budget for {self.venue.rest_url} is spent for {wait_s:.0f} s.", status=429, retry_after_s=wait_s
                )
            await clock.sleep(max(wait_s, SHORTEST_WAIT_S))
        self.breaker.check(clock.monotonic_us())
        self.limit.take(weight, clock.monotonic_us())
        url = f"{self.venue.rest_url}{self.venue.rest_path}/{route}"
        try:
            answer = await self._http.get(url, params=params, headers=self._headers)
        except httpx.HTTPError as exc:
            self._failed()
            raise UnavailableError(f"{url} cannot be reached: {type(exc).__name__} {exc}") from exc
        except BaseException:
            self.breaker.abandoned()
            raise
        now = clock.monotonic_us()
        self.limit.observe(answer.headers, now)
        if answer.status_code == 200:
            if len(answer.content) > MAX_BODY_BYTES:
                self._failed()
                raise AnswerError(f"{url} answers with {len(answer.content):,} bytes, which nothing we ask for has.", status=200)
            self.breaker.succeeded(now)
            return answer.content
        error = refusal(url, answer.status_code, answer.headers, answer.content)
        if isinstance(error, RateLimitedError | BannedError):
            self.limit.block(error.retry_after_s, now)
        if isinstance(error, RefusedError):
            self.breaker.succeeded(now)  # the venue works, our request was wrong
        else:
            self._failed()
        raise error

    def _failed(self) -> None:
        self.errors += 1
        self.breaker.failed(self._clock.monotonic_us())


class _Aggregate(msgspec.Struct):
    a: int
    T: int  # ms
    f: int = -1  # id of the first single trade in it


class _Ticker(msgspec.Struct):
    symbol: str
    lastId: int = -1  # noqa: N815  # -1: no trade in 24 hours
    closeTime: int = 0  # noqa: N815  # ms; end of the 24 hours: the venue's now


def refusal(url: str, status: int, headers: Any, body: bytes) -> VenueError:
    """Our error for an answer that is no 200."""
    try:
        said = msgspec.json.decode(body, type=ErrorBody)
    except _FAULTS:
        said = ErrorBody(msg=body[:100].decode("utf-8", "replace"))
    sentence = f"{url} answers {status}: {said.code} {said.msg}".rstrip()
    if status == 429:
        return RateLimitedError(sentence, status=status, code=said.code, retry_after_s=retry_after_s(headers, 10.0))
    if status == 418:
        return BannedError(sentence, status=status, code=said.code, retry_after_s=retry_after_s(headers, 120.0))
    if status in (403, 451):
        hint = "The venue does not serve this address or region: use another network, or --source sim."
        return BlockedError(f"{sentence} {hint}", status=status, code=said.code)
    if 400 <= status < 500:
        return RefusedError(sentence, status=status, code=said.code)
    return UnavailableError(sentence, status=status, code=said.code)


def canonical(entry: SymbolInfo) -> str:
    """Our name of a market: BTC-USDT, BTC-USDT-PERP, BTC-USDT-250627 (delivery); empty when it has none (names outside A-Z 0-9)."""
    base, quote = entry.baseAsset.upper(), entry.quoteAsset.upper()
    if not (base and quote and base.isascii() and quote.isascii() and base.isalnum() and quote.isalnum()):
        return ""
    if not entry.contractType:
        return f"{base}-{quote}"
    if "PERPETUAL" in entry.contractType:
        return f"{base}-{quote}-PERP"
    delivery = entry.symbol.partition("_")[2]
    return f"{base}-{quote}-{delivery}" if delivery.isalnum() else ""


def _columns(body: bytes) -> dict[str, Array]:
    rows = _rows(body, list[RestTrade])
    return _checked(
        [r.id for r in rows], [r.price for r in rows], [r.qty for r in rows], [r.isBuyerMaker for r in rows], [r.time for r in rows]
    )


def _agg_columns(body: bytes) -> dict[str, Array]:
    rows = _rows(body, list[RestAggTrade])
    return _checked([r.a for r in rows], [r.p for r in rows], [r.q for r in rows], [r.m for r in rows], [r.T for r in rows])


def _rows(body: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(body, type=kind, strict=False)
    except _FAULTS as exc:
        raise AnswerError(f"The venue answers a page of trades with something else: {exc}") from exc


def _checked(ids: list[int], price: list[float], size: list[float], maker: list[bool], time_ms: list[int]) -> dict[str, Array]:
    """Columns by id; rows with impossible values are left out (the gap they belong to stays open for them)."""
    try:
        columns: dict[str, Array] = {
            "trade_id": np.array(ids, np.int64),
            "price": np.array(price, np.float64),
            "size": np.array(size, np.float64),
            "side": 1 - 2 * np.array(maker, np.int8),
            "exchange_time_us": np.array(time_ms, np.int64),
        }
    except OverflowError as exc:
        raise AnswerError("The venue answers a page of trades with numbers beyond 64 bits.") from exc
    time = columns["exchange_time_us"]
    good = (columns["price"] > 0) & (columns["price"] < np.inf) & (columns["size"] > 0) & (columns["size"] < np.inf)
    good &= (time >= MIN_TIME_US // 1000) & (time < MAX_TIME_US // 1000) & (columns["trade_id"] >= 0)
    columns["exchange_time_us"] = time * 1000
    order = np.argsort(columns["trade_id"][good], kind="stable")
    return {name: column[good][order] for name, column in columns.items()}
