"""REST bodies made from candles and quotes: klines, depth, 24-hour, book and price tickers. Pure; JSON text out."""

from __future__ import annotations

import numpy as np

from collectors.simulated.blocks import IntArray
from collectors.simulated.exchange import Venue
from collectors.simulated.history import INTERVAL_MS, Candles, candles_of_trades, regroup

DAY_MS = 86_400_000


def candles_of(venue: Venue, code: int, interval: str) -> Candles:
    """All candles of an interval the exchange still has, the open one last."""
    if interval == "1s":
        return candles_of_trades(venue.ring.of_symbol(code), 1_000)
    minutes = venue.candles.of_symbol(code)
    return minutes if interval == "1m" else regroup(minutes, INTERVAL_MS[interval])


def klines(venue: Venue, code: int, interval: str, *, start_ms: int | None, end_ms: int | None, limit: int) -> str:
    """The body of ``klines``: open times within [start_ms, end_ms]; the newest ``limit`` without a start, else the oldest."""
    candles = candles_of(venue, code, interval)
    first = 0 if start_ms is None else int(candles.open_ms.searchsorted(start_ms))
    last = len(candles) if end_ms is None else int(candles.open_ms.searchsorted(end_ms, side="right"))
    last = max(first, last)
    if start_ms is None:
        first = max(first, last - limit)
    last = min(last, first + limit)
    fields = (getattr(candles, name)[first:last] for name in Candles.__slots__)
    return venue.wire.rest_klines(code, Candles(*fields), INTERVAL_MS[interval])


def depth(venue: Venue, code: int, limit: int, now_ms: int) -> str:
    """The body of ``depth``: ``limit`` levels a side, a tick or more apart."""
    wire, tick = venue.wire, int(venue.market.universe.tick_units[code])
    bids, asks = venue.market.quotes()
    bid, ask = int(bids[code]), int(asks[code])

    def side(start: int, direction: int) -> str:
        prices: IntArray = start + direction * tick * np.arange(limit)
        rows = (
            f'["{wire.price(code, price)}","{wire.size(code, wire.depth_lots(code, price))}"]' for price in prices.tolist() if price > 0
        )
        return "[" + ",".join(rows) + "]"

    update_id = venue.market.time_ms * 1_000 + 999
    times = "" if wire.spot else f'"E":{now_ms},"T":{now_ms},'
    return f'{{"lastUpdateId":{update_id},{times}"bids":{side(bid, -1)},"asks":{side(ask, 1)}}}'


def day_ticker(venue: Venue, code: int, now_ms: int) -> str:
    """The body of ``ticker/24hr`` for one symbol, over what is kept of the last 24 hours."""
    wire = venue.wire
    minutes = venue.candles.of_symbol(code)
    rows = minutes.open_ms > now_ms - DAY_MS
    traded = rows & (minutes.count > 0)
    close = int(minutes.close[-1])
    opened = int(minutes.open[traded][0]) if traded.any() else close
    high = int(minutes.high[traded].max()) if traded.any() else close
    low = int(minutes.low[traded].min()) if traded.any() else close
    volume, quote, count = (int(column[rows].sum()) for column in (minutes.volume, minutes.quote, minutes.count))
    first_id = int(minutes.first_id[traded][0]) if traded.any() else -1
    last_id = int(minutes.last_id[traded][-1]) if traded.any() else -1
    change = close - opened
    percent = f"{100.0 * change / opened:.3f}"
    weighted = wire.price(code, quote // volume if volume else close)
    bids, asks = venue.market.quotes()
    bid, ask = int(bids[code]), int(asks[code])
    sign = "-" if change < 0 else ""
    text = (
        f'{{"symbol":"{wire.universe.symbols[code]}","priceChange":"{sign}{wire.price(code, abs(change))}","priceChangePercent":"{percent}",'
        f'"weightedAvgPrice":"{weighted}",'
    )
    last_size = wire.size(code, wire.depth_lots(code, close))
    if wire.spot:
        text += f'"prevClosePrice":"{wire.price(code, opened)}","lastPrice":"{wire.price(code, close)}","lastQty":"{last_size}",'
        text += f'"bidPrice":"{wire.price(code, bid)}","bidQty":"{wire.size(code, wire.depth_lots(code, bid))}",'
        text += f'"askPrice":"{wire.price(code, ask)}","askQty":"{wire.size(code, wire.depth_lots(code, ask))}",'
    else:
        text += f'"lastPrice":"{wire.price(code, close)}","lastQty":"{last_size}",'
    return text + (
        f'"openPrice":"{wire.price(code, opened)}","highPrice":"{wire.price(code, high)}","lowPrice":"{wire.price(code, low)}",'
        f'"volume":"{wire.size(code, volume)}","quoteVolume":"{wire.quote(code, quote)}","openTime":{now_ms - DAY_MS},"closeTime":{now_ms},'
        f'"firstId":{first_id},"lastId":{last_id},"count":{count}}}'
    )


def book_ticker(venue: Venue, code: int, now_ms: int) -> str:
    """The body of ``ticker/bookTicker`` for one symbol."""
    wire = venue.wire
    bids, asks = venue.market.quotes()
    bid, ask = int(bids[code]), int(asks[code])
    time = "" if wire.spot else f',"time":{now_ms}'
    return (
        f'{{"symbol":"{wire.universe.symbols[code]}","bidPrice":"{wire.price(code, bid)}",'
        f'"bidQty":"{wire.size(code, wire.depth_lots(code, bid))}","askPrice":"{wire.price(code, ask)}",'
        f'"askQty":"{wire.size(code, wire.depth_lots(code, ask))}"{time}}}'
    )


def price_ticker(venue: Venue, code: int, now_ms: int) -> str:
    """The body of ``ticker/price`` for one symbol."""
    wire = venue.wire
    time = "" if wire.spot else f',"time":{now_ms}'
    return f'{{"symbol":"{wire.universe.symbols[code]}","price":"{wire.price(code, int(venue.candles.last_closes()[code]))}"{time}}}'
