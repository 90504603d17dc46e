"""What the exchange remembers: a ring of recent trades and one-minute candles, both bounded.

Comes in: :class:`~collectors.simulated.market.TradeBlock`, one a step. Goes out: columns of one symbol's trades by id or time, candles of
any interval. Memory is bounded by ``capacity`` trades (43 bytes each) and ``minutes`` candles a symbol (88 bytes each); pages are touched
only as they fill.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from collectors.simulated.blocks import IntArray, TradeBlock
from collectors.simulated.errors import SimulationConfigError
from collectors.simulated.market import Market

MINUTE_MS: Final = 60_000

INTERVAL_MS: Final[dict[str, int]] = {
    "1s": 1_000, "1m": 60_000, "3m": 180_000, "5m": 300_000, "15m": 900_000, "30m": 1_800_000, "1h": 3_600_000, "2h": 7_200_000,
    "4h": 14_400_000, "6h": 21_600_000, "8h": 28_800_000, "12h": 43_200_000, "1d": 86_400_000,
}  # fmt: skip
"""Kline intervals of fixed length; Binance's 3d, 1w and 1M are not simulated."""


@dataclass(frozen=True, slots=True)
class Trades:
    """Trades of one symbol in id order, parallel arrays (units as in :class:`TradeBlock`)."""

    trade_id: IntArray
    price: IntArray
    size: IntArray
    time_ms: IntArray
    buyer_is_maker: npt.NDArray[np.bool_]
    agg_id: IntArray

    def __len__(self) -> int:
        return len(self.trade_id)

    def cut(self, start: int, stop: int) -> Trades:
        """Rows ``[start, stop)``."""
        rows = slice(start, stop)
        return Trades(
            self.trade_id[rows], self.price[rows], self.size[rows], self.time_ms[rows], self.buyer_is_maker[rows], self.agg_id[rows]
        )

    def where(self, mask: npt.NDArray[np.bool_]) -> Trades:
        """Rows whose ``mask`` is set."""
        return Trades(
            self.trade_id[mask], self.price[mask], self.size[mask], self.time_ms[mask], self.buyer_is_maker[mask], self.agg_id[mask]
        )

    def columns(self) -> tuple[IntArray, IntArray, IntArray, IntArray, npt.NDArray[np.bool_], IntArray]:
        """The columns in the order of the fields."""
        return self.trade_id, self.price, self.size, self.time_ms, self.buyer_is_maker, self.agg_id


@dataclass(frozen=True, slots=True)
class Candles:
    """Candles of one symbol and interval, oldest first, int64; volumes in lots and in price units x lots, exact.

    An interval without trades repeats the previous close, with volumes, count 0 and ids -1.
    """

    open_ms: IntArray
    open: IntArray
    high: IntArray
    low: IntArray
    close: IntArray
    volume: IntArray
    quote: IntArray
    buy_volume: IntArray
    buy_quote: IntArray
    count: IntArray
    first_id: IntArray
    last_id: IntArray

    def __len__(self) -> int:
        return len(self.open_ms)


class TradeRing:
    """The last ``capacity`` trades of all symbols together, in the order they were made.

    Args:
        capacity: trades kept. A symbol that trades rarely is kept as long as the busy ones.

    Raises:
        SimulationConfigError: capacity outside 1,000..100,000,000.
    """

    def __init__(self, capacity: int) -> None:
        if not 1_000 <= capacity <= 100_000_000:
            raise SimulationConfigError(f"history={capacity}: keep 1,000 to 100,000,000 trades")
        self.capacity = capacity
        self._code = np.full(capacity, -1, dtype=np.int16)
        self._id, self._price, self._size, self._time, self._agg = (np.empty(capacity, dtype=np.int64) for _ in range(5))
        self._maker = np.empty(capacity, dtype=np.bool_)
        self._next = 0
        self.total = 0

    def append(self, block: TradeBlock) -> None:
        """Keep a block; the oldest trades make room."""
        start = 0
        count = len(block)
        while start < count:
            take = min(count - start, self.capacity - self._next)
            into, rows = slice(self._next, self._next + take), slice(start, start + take)
            self._code[into] = block.code[rows]
            self._id[into] = block.trade_id[rows]
            self._price[into] = block.price[rows]
            self._size[into] = block.size[rows]
            self._time[into] = block.time_ms[rows]
            self._maker[into] = block.buyer_is_maker[rows]
            self._agg[into] = block.agg_id[rows]
            self._next = (self._next + take) % self.capacity
            start += take
        self.total += count

    def of_symbol(self, code: int) -> Trades:
        """All trades of a symbol that are still kept, by id. Linear in the ring: 0.2 ms for 500,000."""
        used = min(self.total, self.capacity)
        rows = np.flatnonzero(self._code[:used] == code)
        if self.total > self.capacity:
            split = int(np.searchsorted(rows, self._next))
            rows = np.concatenate((rows[split:], rows[:split]))
        return Trades(self._id[rows], self._price[rows], self._size[rows], self._time[rows], self._maker[rows], self._agg[rows])


class MinuteCandles:
    """One-minute candles of every symbol for the last ``minutes`` minutes.

    Args:
        market: whose symbols and first quotes the candles start from.
        minutes: how many are kept, 2..10,080.
    """

    def __init__(self, market: Market, *, minutes: int) -> None:
        if not 2 <= minutes <= 10_080:
            raise SimulationConfigError(f"kline_minutes={minutes}: keep 2 to 10,080 minutes")
        symbols = len(market.universe)
        self.minutes = minutes
        # Fields in the order of Candles after open_ms; zeros() touches no page before it is written.
        self._rows = np.zeros((minutes, 11, symbols), dtype=np.int64)
        self._open_ms = np.zeros(minutes, dtype=np.int64)
        self._slot = 0
        self._filled = 1
        self._begin(market.time_ms - market.time_ms % MINUTE_MS, market.quotes()[0])

    def _begin(self, open_ms: int, price: IntArray) -> None:
        """Open a minute: flat at ``price`` until something trades."""
        row = self._rows[self._slot]
        row[0:4] = price
        row[4:9] = 0
        row[9:11] = -1
        self._open_ms[self._slot] = open_ms

    def roll(self, time_ms: int) -> bool:
        """Open every minute up to the one that holds ``time_ms``; True if at least one was opened."""
        target = time_ms - time_ms % MINUTE_MS
        rolled = False
        while int(self._open_ms[self._slot]) < target:
            close = self._rows[self._slot, 3].copy()
            open_ms = max(int(self._open_ms[self._slot]) + MINUTE_MS, target - (self.minutes - 1) * MINUTE_MS)
            self._slot = (self._slot + 1) % self.minutes
            self._filled = min(self._filled + 1, self.minutes)
            self._begin(open_ms, close)
            rolled = True
        return rolled

    def add(self, block: TradeBlock) -> None:
        """Add a block whose trades all lie in the open minute (steps divide a minute, so a block never spans two)."""
        if not len(block):
            return
        order, start, codes = block.by_symbol, block.group_start, block.group_code
        price, size = block.price[order], block.size[order]
        quote = price * size
        taker_buys = ~block.buyer_is_maker[order]
        ids = block.trade_id[order]
        last = np.append(start[1:], len(order)) - 1
        row = self._rows[self._slot]
        fresh = row[8, codes] == 0
        row[0, codes] = np.where(fresh, price[start], row[0, codes])
        high, low = np.maximum.reduceat(price, start), np.minimum.reduceat(price, start)
        row[1, codes] = np.where(fresh, high, np.maximum(row[1, codes], high))
        row[2, codes] = np.where(fresh, low, np.minimum(row[2, codes], low))
        row[3, codes] = price[last]
        row[4, codes] += np.add.reduceat(size, start)
        row[5, codes] += np.add.reduceat(quote, start)
        row[6, codes] += np.add.reduceat(size * taker_buys, start)
        row[7, codes] += np.add.reduceat(quote * taker_buys, start)
        row[8, codes] += last - start + 1
        row[9, codes] = np.where(fresh, ids[start], row[9, codes])
        row[10, codes] = ids[last]

    def of_symbol(self, code: int) -> Candles:
        """All one-minute candles of a symbol that are kept, the open one last."""
        slots = (np.arange(self._filled) + self._slot + 1 - self._filled) % self.minutes
        fields = self._rows[slots, :, code].T
        return Candles(self._open_ms[slots], *fields)

    def last_closes(self) -> IntArray:
        """The last price of every symbol, price units."""
        closes: IntArray = self._rows[self._slot, 3].copy()
        return closes


def regroup(candles: Candles, interval_ms: int) -> Candles:
    """Candles of a longer interval from shorter ones (``interval_ms`` a multiple of theirs); the first may be partial."""
    if not len(candles):
        return candles
    bucket = candles.open_ms - candles.open_ms % interval_ms
    start = np.flatnonzero(np.append(True, bucket[1:] != bucket[:-1]))
    last = np.append(start[1:], len(bucket)) - 1
    far = np.iinfo(np.int64).max
    # Minutes without a trade repeat the previous close; they must not widen or open a candle that has trades.
    traded = candles.count > 0
    count = np.add.reduceat(candles.count, start)
    flat = count == 0
    first_id = np.minimum.reduceat(np.where(traded, candles.first_id, far), start)
    first_traded = np.minimum.reduceat(np.where(traded, np.arange(len(bucket)), len(bucket) - 1), start)
    high = np.maximum.reduceat(np.where(traded, candles.high, -1), start)
    low = np.minimum.reduceat(np.where(traded, candles.low, far), start)
    close = candles.close[last]
    return Candles(
        bucket[start],
        np.where(flat, close, candles.open[first_traded]),
        np.where(flat, close, high),
        np.where(flat, close, low),
        close,
        np.add.reduceat(candles.volume, start),
        np.add.reduceat(candles.quote, start),
        np.add.reduceat(candles.buy_volume, start),
        np.add.reduceat(candles.buy_quote, start),
        count,
        np.where(flat, -1, first_id),
        np.maximum.reduceat(candles.last_id, start),
    )


def candles_of_trades(trades: Trades, interval_ms: int) -> Candles:
    """Candles of the intervals that hold a trade, from single trades (used for intervals below a minute)."""
    bucket = trades.time_ms - trades.time_ms % interval_ms
    if not len(trades):
        none = np.zeros(0, dtype=np.int64)
        return Candles(*([none] * 12))
    start = np.flatnonzero(np.append(True, bucket[1:] != bucket[:-1]))
    last = np.append(start[1:], len(bucket)) - 1
    quote = trades.price * trades.size
    buys = ~trades.buyer_is_maker
    return Candles(
        bucket[start],
        trades.price[start],
        np.maximum.reduceat(trades.price, start),
        np.minimum.reduceat(trades.price, start),
        trades.price[last],
        np.add.reduceat(trades.size, start),
        np.add.reduceat(quote, start),
        np.add.reduceat(trades.size * buys, start),
        np.add.reduceat(quote * buys, start),
        last - start + 1,
        trades.trade_id[start],
        trades.trade_id[last],
    )
