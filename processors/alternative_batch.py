"""Tick, volume, dollar and imbalance bars of a whole history at once: a DataFrame of trades in, a DataFrame of bars out, by the live kernel.

The order of trades decides which trade closes a bar, so a history must have one order: ids that rise with time. Rows may stand in any order.
The same trade twice (as two connections record it) counts once; anything else that would cost a trade is refused by row and id.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import polars as pl

from processors.alternative_bars import AlternativeBarConfig, AlternativeBarEngine
from processors.bars import TRADE_DTYPES, TradeBatch
from processors.bars_batch import CHUNK_ROWS, trade_columns
from processors.errors import TradeInputError
from schemas.frames import END_OF_SOURCE

_log = logging.getLogger(__name__)

_KEY: Final = ("exchange", "symbol")
_SAME: Final = (*_KEY, "trade_id", "price", "size", "side", "exchange_time_us")
COLUMNS: Final = (
    "bar_number",
    "open_time",
    "close_time",
    "open",
    "high",
    "low",
    "close",
    "volume",
    "quote_volume",
    "buy_volume",
    "vwap",
    "imbalance",
    "progress",
    "threshold",
    "trade_count",
    "first_trade_id",
    "last_trade_id",
    "complete",
)


def build(trades: pl.DataFrame, config: AlternativeBarConfig) -> pl.DataFrame:
    """Bars of ``trades``; see the doors in ``processors.alternative_bars`` for columns and errors."""
    ordered = _in_one_order(trades)
    keys = ordered.select(key=pl.concat_str(*_KEY, separator=":"))["key"]
    symbols = tuple(keys.unique(maintain_order=True).to_list())
    codes = keys.replace_strict(symbols, list(range(len(symbols))), return_dtype=pl.Int32) if symbols else keys.cast(pl.Int32)
    columns: dict[str, npt.NDArray[Any]] = {
        name: (codes if name == "symbol_code" else ordered[name]).to_numpy().astype(dtype, copy=False)
        for name, dtype in TRADE_DTYPES.items()
    }
    # the bound on symbols protects the memory of a stream; a history is in memory already
    engine = AlternativeBarEngine(replace(config, max_symbols=max(config.max_symbols, len(symbols))))
    parts = []
    for start in range(0, max(ordered.height, 1), CHUNK_ROWS):
        chunk = {name: column[start : start + CHUNK_ROWS] for name, column in columns.items()}
        flags = END_OF_SOURCE if start + CHUNK_ROWS >= ordered.height else 0
        output = engine.process(TradeBatch(source="batch", watermark_us=0, symbols=symbols, columns=chunk, flags=flags))
        lost = len(chunk["price"]) - output.accepted
        if lost:  # the checks above leave no way to get here; should there be one, no trade vanishes in silence
            raise TradeInputError(
                f"{lost:,} of {len(chunk['price']):,} trades cannot be put in bars, reasons {set(output.rejected['reason'].tolist())}."
            )
        parts.append(output.bars)
    bars = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return _to_polars(bars, symbols, config)


def _in_one_order(trades: pl.DataFrame) -> pl.DataFrame:
    """The trades by symbol and id, each once. Raises TradeInputError where ids do not rise with time or one id has two meanings."""
    ordered = trade_columns(trades)
    count = ordered.height
    ordered = ordered.unique(_SAME, keep="first", maintain_order=True)
    if ordered.height < count:
        _log.info("%s of %s rows repeat a trade: each trade counts once", count - ordered.height, count)
    step = pl.col("trade_id").diff().over(*_KEY)
    wrong = ordered.select((step <= 0).fill_null(False).arg_true()).to_series()
    if not len(wrong):
        return ordered
    at = int(wrong[0])
    exchange, symbol, trade_id, time_us = ordered.select(*_KEY, "trade_id", "exchange_time_us").row(at)
    before = ordered.row(at - 1, named=True)
    ours = (
        (pl.col("exchange").cast(pl.String) == exchange) & (pl.col("symbol").cast(pl.String) == symbol) & (pl.col("trade_id") == trade_id)
    )
    place = f"Row {int(trades.select(ours.arg_true()).to_series()[-1])} ({exchange}:{symbol})"
    if before["trade_id"] == trade_id:
        raise TradeInputError(f"{place}: trade id {trade_id} stands in another row with other values: correct or leave out one of them.")
    raise TradeInputError(
        f"{place}: trade id {trade_id} is {time_us - before['exchange_time_us']:,} us later than id {before['trade_id']}; ids must rise with "
        f"time: correct the row or leave it out ({len(wrong):,} of {ordered.height:,} rows break this)."
    )


def _to_polars(bars: dict[str, npt.NDArray[Any]], symbols: tuple[str, ...], config: AlternativeBarConfig) -> pl.DataFrame:
    names = pl.Series("key", symbols, dtype=pl.String).gather(bars["symbol_code"])
    parts = names.str.splitn(":", 2).struct.unnest()
    frame = pl.DataFrame({name: column for name, column in bars.items() if name not in ("symbol_code", "last_receive_time_us")})
    frame = frame.with_columns(pl.col("complete").cast(pl.Boolean))
    times = [pl.from_epoch(f"{name}_us", "us").dt.replace_time_zone("UTC").alias(name) for name in ("open_time", "close_time")]
    return (
        frame.with_columns(exchange=parts.to_series(0), symbol=parts.to_series(1), kind=pl.lit(config.kind))
        .with_columns(times)
        .select(*_KEY, "kind", *COLUMNS)
        .sort(*_KEY, "bar_number")
    )
