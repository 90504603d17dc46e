"""Trades cut into batches, generated trades, and what can be said of any stream of bars."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import polars as pl
from hypothesis import strategies as st

from processors.bars import TRADE_DTYPES, BarBatches, BarEngine, TradeBatch
from schemas.frames import END_OF_SOURCE
from tests.processors.market_data import with_symbol

START_US = 1_723_161_590_000_000
"""2024-08-08T23:59:50Z: ten seconds before midnight, so that every timeframe has a boundary close by."""
SECOND = 1_000_000


def batches(
    trades: pl.DataFrame, *, rows: int, source: str = "test", lateness_us: int = 0, end: bool = True, sizes: Iterable[int] | None = None
) -> Iterator[TradeBatch]:
    """The trades in their order, ``rows`` (or ``sizes``) at a time; the watermark trails the newest by ``lateness_us``."""
    keys = (trades["exchange"] + ":" + trades["symbol"]).to_list()
    symbols = tuple(dict.fromkeys(keys))
    codes = {key: code for code, key in enumerate(symbols)}
    columns: dict[str, Any] = {"symbol_code": np.array([codes[key] for key in keys], np.int32)}
    columns.update({name: trades[name].to_numpy().astype(dtype) for name, dtype in TRADE_DTYPES.items() if name != "symbol_code"})
    cuts = list(np.cumsum(list(sizes))) if sizes is not None else list(range(rows, trades.height, rows))
    watermark_us = 0
    start = 0
    for cut in [*[c for c in cuts if 0 < c < trades.height], trades.height]:
        part = {name: column[start:cut] for name, column in columns.items()}
        watermark_us = max(watermark_us, int(part["exchange_time_us"].max(initial=0)) - lateness_us)
        yield TradeBatch(source=source, watermark_us=watermark_us, symbols=symbols, columns=part)
        start = cut
    if end:
        yield TradeBatch(source=source, watermark_us=watermark_us + lateness_us, symbols=symbols, flags=END_OF_SOURCE)


def play(engine: BarEngine, frames: Iterable[TradeBatch]) -> list[BarBatches]:
    """What the engine gives for each of the frames."""
    return [engine.process(frame) for frame in frames]


def trade(
    trade_id: int,
    time_s: float,
    price: float = 100.0,
    size: float = 1.0,
    side: int = 1,
    symbol: str = "BTC-USDT",
    receive_s: float | None = None,
) -> dict[str, Any]:
    """One trade, its time in seconds after ``START_US``."""
    time_us = START_US + round(time_s * SECOND)
    return {
        "exchange": "binance",
        "symbol": symbol,
        "trade_id": trade_id,
        "price": price,
        "size": size,
        "side": side,
        "exchange_time_us": time_us,
        "receive_time_us": time_us if receive_s is None else START_US + round(receive_s * SECOND),
    }


def frame(
    *trades: dict[str, Any], watermark_s: float = 0.0, source: str = "test", flags: int = 0, symbols: tuple[str, ...] | None = None
) -> TradeBatch:
    """A batch of these trades; ``watermark_s`` in seconds after ``START_US``."""
    names = symbols or tuple(dict.fromkeys(f"{row['exchange']}:{row['symbol']}" for row in trades))
    columns = {
        name: np.array([names.index(f"{row['exchange']}:{row['symbol']}") if name == "symbol_code" else row[name] for row in trades], dtype)
        for name, dtype in TRADE_DTYPES.items()
    }
    return TradeBatch(source=source, watermark_us=START_US + round(watermark_s * SECOND), symbols=names, columns=columns, flags=flags)


def rows_of(batch: BarBatches, *, timeframe_s: int | None = None) -> list[dict[str, Any]]:
    """The rows of an output as dicts, open time in seconds after ``START_US`` as ``at``."""
    rows = []
    for values in zip(*(column.tolist() for column in batch.bars.values()), strict=True):
        row = dict(zip(batch.bars, values, strict=True))
        row["key"] = batch.symbols[row["symbol_code"]]
        row["at"] = (row["open_time_us"] - START_US) / SECOND
        if timeframe_s in (None, row["timeframe_s"]):
            rows.append(row)
    return rows


def flat_bars_fill_every_gap(bars: pl.DataFrame) -> None:
    """Bars of one symbol and timeframe follow each other without a hole, flat ones at the close before them."""
    bars = bars.sort("open_time_us")
    opens = bars["open_time_us"].to_list()
    if len(opens) < 2:
        return
    steps = np.diff(opens)
    assert len(set(steps.tolist())) == 1 and steps[0] > 0
    close = None
    for row in bars.iter_rows(named=True):
        if row["trade_count"] == 0:
            assert row["open"] == row["high"] == row["low"] == row["close"] == row["vwap"] == close
            assert row["volume"] == row["quote_volume"] == row["buy_volume"] == 0.0
            assert row["first_trade_id"] == row["last_trade_id"] == -1
        close = row["close"]


@st.composite
def generated_trades(draw: st.DrawFn, *, max_trades: int = 150, holes: bool = False) -> pl.DataFrame:
    """Trades in time order of up to four symbols, ids ascending per symbol (with holes if wanted), bursts and silences of minutes."""
    count = draw(st.integers(1, max_trades))
    symbols = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pause_s = draw(st.sampled_from([0.01, 0.3, 2.0, 40.0]))
    code = rng.integers(0, symbols, count)
    steps = rng.exponential(pause_s * SECOND, count).astype(np.int64) * rng.integers(0, 2, count)
    time_us = START_US + np.cumsum(steps)
    jump = np.where(rng.random(count) < (0.3 if holes else 0.0), rng.integers(2, 6, count), 1)
    trade_id = np.zeros(count, np.int64)
    for symbol in range(symbols):
        mine = code == symbol
        trade_id[mine] = 1000 + np.cumsum(jump[mine])
    frame = pl.DataFrame(
        {
            "trade_id": trade_id,
            "price": np.round(np.exp(rng.normal(3, 1, count)), 2) + 0.01,
            "size": np.round(rng.lognormal(0, 3, count), 5) + 1e-5,
            "side": rng.choice([-1, 1], count),
            "exchange_time_us": time_us,
            "receive_time_us": time_us + 1500,
        }
    )
    names = pl.Series("symbol", [f"S{symbol}-USDT" for symbol in code.tolist()])
    return with_symbol(frame, "binance", "").with_columns(names)
