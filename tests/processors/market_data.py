"""Recorded trades as DataFrames, and polars as the second opinion on bars."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest

from schemas.timeframes import US_PER_SECOND, timeframe_seconds

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
TIMEFRAMES = ("1s", "1m", "5m", "15m", "30m", "1h", "4h", "1d")


class _Trade(msgspec.Struct):
    e: str = ""
    t: int = -1
    p: str = ""
    q: str = ""
    T: int = 0
    m: bool = False


class _Message(msgspec.Struct):
    data: _Trade | None = None


_DECODER = msgspec.json.Decoder(_Message)


def data_file(*parts: str) -> Path:
    """A recorded file, or a skip that says which one is missing."""
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"recorded data is not here: {'/'.join(parts)}")
    return path


def binance_capture(name: str) -> pl.DataFrame:
    """Trades of a raw Binance capture, in the order received."""
    path = data_file("ws", "binance", name)
    kind, pair, _ = name.split("_", 2)
    rows: list[tuple[int, float, float, int, int, int]] = []
    with gzip.open(path, "rb") as lines:
        for line in lines:
            received_ns, _, raw = line.partition(b" ")
            if b'"e":"trade"' not in raw:
                continue
            trade = _DECODER.decode(raw).data
            assert trade is not None
            rows.append((trade.t, float(trade.p), float(trade.q), -1 if trade.m else 1, trade.T * 1000, int(received_ns) // 1000))
    symbol = f"{pair[:-4].upper()}-USDT" + ("-PERP" if kind == "usdm" else "")
    names = ("trade_id", "price", "size", "side", "exchange_time_us", "receive_time_us")
    frame = pl.DataFrame(rows, schema=list(names), orient="row")
    return with_symbol(frame, "binance-usdm" if kind == "usdm" else "binance", symbol)


def kraken_trades() -> pl.DataFrame:
    """Kraken's recorded XBTUSDT trades."""
    with gzip.open(data_file("trades", "kraken_XBTUSDT_trades.json.gz"), "rt") as text:
        result = json.load(text)["result"]
    rows = next(value for key, value in result.items() if key != "last")
    columns = {
        "trade_id": [row[6] for row in rows],
        "price": [float(row[0]) for row in rows],
        "size": [float(row[1]) for row in rows],
        "side": [1 if row[3] == "b" else -1 for row in rows],
        "exchange_time_us": [round(row[2] * 1_000_000) for row in rows],
        "receive_time_us": [round(row[2] * 1_000_000) for row in rows],
    }
    return with_symbol(pl.DataFrame(columns), "kraken", "BTC-USDT")


def kraken_candles() -> list[list[Any]]:
    """Kraken's own one-minute candles: time, open, high, low, close, vwap, volume, count."""
    with gzip.open(data_file("trades", "kraken_XBTUSDT_ohlc_1m.json.gz"), "rt") as text:
        result = json.load(text)["result"]
    return list(next(value for key, value in result.items() if key != "last"))


def with_symbol(frame: pl.DataFrame, exchange: str, symbol: str) -> pl.DataFrame:
    """The same rows with their dtypes and names of exchange and symbol."""
    return frame.select(
        pl.lit(exchange).alias("exchange"),
        pl.lit(symbol).alias("symbol"),
        pl.col("trade_id").cast(pl.Int64),
        pl.col("price").cast(pl.Float64),
        pl.col("size").cast(pl.Float64),
        pl.col("side").cast(pl.Int8),
        pl.col("exchange_time_us").cast(pl.Int64),
        pl.col("receive_time_us").cast(pl.Int64),
    )


def polars_bars(trades: pl.DataFrame, timeframe: str) -> pl.DataFrame:
    """Bars with trades as polars computes them, ordered by exchange, symbol and open time."""
    length = timeframe_seconds(timeframe) * US_PER_SECOND
    return (
        trades.unique(["exchange", "symbol", "trade_id"])
        .sort("exchange_time_us", "trade_id")
        .with_columns(open_time_us=pl.col("exchange_time_us") - pl.col("exchange_time_us") % length, quote=pl.col("price") * pl.col("size"))
        .group_by("exchange", "symbol", "open_time_us")
        .agg(
            open=pl.col("price").first(),
            high=pl.col("price").max(),
            low=pl.col("price").min(),
            close=pl.col("price").last(),
            volume=pl.col("size").sum(),
            quote_volume=pl.col("quote").sum(),
            buy_volume=pl.col("size").filter(pl.col("side") > 0).sum(),
            trade_count=pl.len().cast(pl.Int64),
            first_trade_id=pl.col("trade_id").first(),
            last_trade_id=pl.col("trade_id").last(),
        )
        .sort("exchange", "symbol", "open_time_us")
    )


EXACT = ("open_time_us", "open", "high", "low", "close", "trade_count", "first_trade_id", "last_trade_id")
SUMS = ("volume", "quote_volume", "buy_volume")


def assert_same_bars(ours: pl.DataFrame, theirs: pl.DataFrame) -> None:
    """Equal prices, counts and ids; sums to 1e-12 relative. Flat bars of ours are left out."""
    ours = ours.filter(pl.col("trade_count") > 0).sort("exchange", "symbol", "open_time_us")
    assert ours.height == theirs.height
    for name in ("exchange", "symbol", *EXACT):
        assert ours[name].to_list() == theirs[name].to_list(), name
    for name in SUMS:
        np.testing.assert_allclose(ours[name].to_numpy(), theirs[name].to_numpy(), rtol=1e-12, atol=0, err_msg=name)


def newest(batches: Iterable[Any]) -> pl.DataFrame:
    """The newest revision of every final bar in these outputs, as a consumer that keeps the last one holds it."""
    parts = []
    for batch in batches:
        columns = dict(batch.bars)
        codes = columns.pop("symbol_code")
        keys = [batch.symbols[code].partition(":") for code in codes.tolist()]
        parts.append(
            pl.DataFrame(
                {
                    "exchange": pl.Series([key[0] for key in keys], dtype=pl.String),
                    "symbol": pl.Series([key[2] for key in keys], dtype=pl.String),
                    **columns,
                }
            )
        )
    rows = pl.concat(parts).filter(pl.col("is_final") == 1)
    key = ["exchange", "symbol", "timeframe_s", "open_time_us"]
    return rows.sort([*key, "revision"]).unique(key, keep="last", maintain_order=True)
