"""The ring of trades and the candles: bounded, and equal to what the trades give."""

from __future__ import annotations

import numpy as np
import pytest

from collectors.simulated.errors import SimulationConfigError
from collectors.simulated.exchange import Exchange, ExchangeConfig
from collectors.simulated.history import TradeRing, candles_of_trades, regroup
from collectors.simulated.regimes import MarketConfig

START_MS = 1_723_161_255_000


def exchange_of(rate: float = 3.0, **changes: object) -> Exchange:
    """A small exchange that has traded for three and a half minutes."""
    config = ExchangeConfig(spot=MarketConfig(symbols=30, rate=rate, seed=2), warmup_s=0.0, **changes)  # type: ignore[arg-type]
    exchange = Exchange(config, start_ms=START_MS)
    for _ in range(25 * 210):
        exchange.step()
    return exchange


def test_ring_keeps_the_newest_trades_in_order() -> None:
    """When full, the ring holds exactly the last trades, each symbol by id."""
    exchange = exchange_of(rate=20.0, history=1_000)
    venue = exchange.venues["spot"]
    kept = [venue.ring.of_symbol(code) for code in range(30)]
    assert sum(len(trades) for trades in kept) == 1_000
    for code, trades in enumerate(kept):
        if len(trades):
            assert (np.diff(trades.trade_id) == 1).all()
            assert trades.trade_id[-1] == venue.market.next_trade_id[code] - 1


def test_minute_candles_equal_the_trades() -> None:
    """Every field of every candle with trades equals what single trades give; the others are flat."""
    venue = exchange_of().venues["spot"]
    flat = 0
    for code in range(30):
        expected = candles_of_trades(venue.ring.of_symbol(code), 60_000)
        candles = venue.candles.of_symbol(code)
        assert (np.diff(candles.open_ms) == 60_000).all()
        traded = candles.count > 0
        for name in candles.__slots__:
            assert getattr(candles, name)[traded].tolist() == getattr(expected, name).tolist(), name
        for row in np.flatnonzero(~traded)[1:]:
            flat += 1
            assert candles.open[row] == candles.close[row] == candles.high[row] == candles.low[row] == candles.close[row - 1]
            assert (candles.volume[row], candles.first_id[row], candles.last_id[row]) == (0, -1, -1)
    assert flat, "choose a lower rate: no minute was empty"


def test_regrouped_candles_equal_candles_of_the_trades() -> None:
    """Five-minute candles from minutes are those from trades, empty minutes inside or not."""
    venue = exchange_of().venues["spot"]
    for code in range(30):
        expected = candles_of_trades(venue.ring.of_symbol(code), 300_000)
        candles = regroup(venue.candles.of_symbol(code), 300_000)
        traded = candles.count > 0
        for name in candles.__slots__:
            assert getattr(candles, name)[traded].tolist() == getattr(expected, name).tolist(), name


def test_candles_survive_a_jump_in_time_and_stay_bounded() -> None:
    """After an outage of an hour the kept minutes are flat, in order and no more than asked for."""
    exchange = exchange_of(kline_minutes=10)
    exchange.jump_to(exchange.time_ms + 3_600_000)
    exchange.step()
    candles = exchange.venues["spot"].candles.of_symbol(0)
    assert len(candles) == 10
    assert (np.diff(candles.open_ms) == 60_000).all()
    assert candles.open_ms[-1] == exchange.time_ms // 60_000 * 60_000


def test_unbounded_history_is_refused() -> None:
    """Memory is bounded by what is asked for, within limits."""
    with pytest.raises(SimulationConfigError, match="history=10"):
        TradeRing(10)
    with pytest.raises(SimulationConfigError, match="warmup_s"):
        ExchangeConfig(warmup_s=1e9)
