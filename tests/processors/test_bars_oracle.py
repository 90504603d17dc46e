"""Bars against second opinions: polars on recorded and generated trades, and an exchange's own candles."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processors.bars import BarConfig, BarEngine, build
from schemas.timeframes import TIMEFRAMES, timeframe_seconds
from tests.processors.market_data import (
    assert_same_bars,
    binance_capture,
    kraken_candles,
    kraken_trades,
    newest,
    polars_bars,
)
from tests.processors.trade_batches import batches, flat_bars_fill_every_gap, generated_trades, play

CAPTURES = (
    "spot_btcusdt_20240808.ws.gz",
    "spot_btcusdt_20240809.ws.gz",
    "spot_ethusdt_20240808.ws.gz",
    "spot_ethusdt_20240809.ws.gz",
    "usdm_btcusdt_20240808.ws.gz",
)


def with_open_time_us(bars: pl.DataFrame) -> pl.DataFrame:
    """The bars with integer open times."""
    return bars.with_columns(open_time_us=pl.col("open_time").dt.epoch("us"))


@pytest.mark.parametrize("name", CAPTURES)
def test_a_capture_gives_the_bars_that_polars_gives(name: str) -> None:
    """Every timeframe of every recorded Binance capture: prices, counts and ids exactly, sums to 1e-12."""
    trades = binance_capture(name)
    bars = with_open_time_us(build(trades, list(TIMEFRAMES)))
    for timeframe in TIMEFRAMES:
        ours = bars.filter(pl.col("timeframe") == timeframe)
        assert_same_bars(ours, polars_bars(trades, timeframe))
        flat_bars_fill_every_gap(ours)
        assert not ours["complete"][-1], "the last bar is unfinished"


def test_two_captures_in_a_row_are_whole_over_midnight() -> None:
    """The second file goes on with the next trade id: the bars around midnight are complete, at every timeframe that began in the first."""
    first, second = binance_capture("spot_btcusdt_20240808.ws.gz"), binance_capture("spot_btcusdt_20240809.ws.gz")
    engine = BarEngine(BarConfig(live_interval_us=0))
    outputs = [*play(engine, batches(first, rows=500, source="a")), *play(engine, batches(second, rows=500, source="b"))]
    bars = newest(outputs)
    both = pl.concat([first, second])
    for timeframe in TIMEFRAMES:
        seconds = {"1s": 1, "1m": 60, "5m": 300, "15m": 900, "30m": 1800, "1h": 3600, "4h": 14400, "1d": 86400}[timeframe]
        assert_same_bars(bars.filter(pl.col("timeframe_s") == seconds), polars_bars(both, timeframe))
    incomplete = bars.filter((pl.col("timeframe_s") == 1) & (pl.col("complete") == 0))
    assert incomplete.height == 2, "only the first and the last second are not whole"


def test_two_older_captures_in_a_row_are_whole_over_midnight_under_live_trades() -> None:
    """Live trades are months newer; the older files still share the bars at their edge, also across restarts, and once more change nothing."""
    first, second = binance_capture("spot_btcusdt_20240808.ws.gz"), binance_capture("spot_btcusdt_20240809.ws.gz")
    day_us = 86_400_000_000
    live = second.head(100).with_columns(
        pl.col("trade_id") + 10_000_000, pl.col("exchange_time_us") + 90 * day_us, pl.col("receive_time_us") + 90 * day_us
    )
    both = pl.concat([first, second])
    config = BarConfig(live_interval_us=0)
    engine, restarted = BarEngine(config), BarEngine(config)
    frames = [
        *batches(live, rows=500, source="live", end=False),
        *batches(first, rows=500, source="a"),
        *batches(second, rows=500, source="b"),
    ]
    outputs = []
    for number, batch in enumerate(frames):
        outputs.append(engine.process(batch))
        assert len(outputs[-1].rejected["row"]) == 0
        restarted.process(batch)
        if number % 20 == 0 or batch.flags:
            restarted = BarEngine.restore(config, restarted.snapshot())
            assert restarted.snapshot() == engine.snapshot()
    bars = newest(outputs).filter(pl.col("open_time_us") < live["exchange_time_us"][0] - 2 * day_us)
    for timeframe in TIMEFRAMES:
        ours = bars.filter(pl.col("timeframe_s") == timeframe_seconds(timeframe))
        assert_same_bars(ours, polars_bars(both, timeframe))
        flat_bars_fill_every_gap(ours)
        opens = ours["open_time_us"]
        assert ours.filter(pl.col("complete") == 0)["open_time_us"].to_list() == sorted({opens[0], opens[-1]}), "those at the ends"
    again = [*play(engine, batches(first, rows=700, source="a")), *play(engine, batches(second, rows=700, source="b"))]
    assert sum(len(output.bars["open"]) for output in again) == 0
    assert sum(output.duplicates for output in again) == both.height


def test_kraken_agrees_with_its_own_candles() -> None:
    """All 272 comparable minutes of Kraken's recorded trades equal the candles that Kraken itself served."""
    bars = with_open_time_us(build(kraken_trades(), ["1m"]))
    by_open = {row["open_time_us"] // 1_000_000: row for row in bars.iter_rows(named=True)}
    first, last = min(by_open), max(by_open)
    compared = 0
    for time, open_, high, low, close, _vwap, volume, count in kraken_candles():
        if not first < time < last:
            continue
        bar = by_open[time]
        assert bar["close"] == float(close)
        assert bar["trade_count"] == count
        if count:
            compared += 1
            assert (bar["open"], bar["high"], bar["low"]) == (float(open_), float(high), float(low))
            assert bar["volume"] == pytest.approx(float(volume), rel=1e-12)
        else:
            assert (bar["open"], bar["high"], bar["low"], bar["volume"]) == (float(close), float(close), float(close), 0.0)
    assert compared == 272


@settings(max_examples=60, deadline=None)
@given(trades=generated_trades(), rows=st.integers(1, 50))
def test_any_trades_in_any_batches_give_the_bars_of_polars(trades: pl.DataFrame, rows: int) -> None:
    """Generated trades of several symbols, streamed in batches of any size."""
    bars = newest(play(BarEngine(BarConfig(live_interval_us=0)), batches(trades, rows=rows)))
    for timeframe, seconds in (("1s", 1), ("1m", 60), ("1h", 3600), ("1d", 86_400)):
        ours = bars.filter(pl.col("timeframe_s") == seconds)
        assert_same_bars(ours, polars_bars(trades, timeframe))
        for _, symbol in ours.group_by("symbol", maintain_order=True):
            flat_bars_fill_every_gap(symbol)


@settings(max_examples=30, deadline=None)
@given(trades=generated_trades(), chosen=st.sets(st.sampled_from(TIMEFRAMES), min_size=1))
def test_a_timeframe_has_the_same_bits_whatever_others_are_made(trades: pl.DataFrame, chosen: set[str]) -> None:
    """Sums do not depend on which smaller timeframes they were merged from."""
    everything = build(trades, list(TIMEFRAMES))
    alone = build(trades, sorted(chosen))
    assert alone.equals(everything.filter(pl.col("timeframe").is_in(list(chosen))))
