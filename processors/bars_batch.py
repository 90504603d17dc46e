"""Bars of a whole history at once, for notebooks and batch work: a DataFrame of trades in, a DataFrame of bars out, by the live kernel.

Each symbol is a source of its own, so adding a symbol never changes the bars of another. Trades are put in order of (time, id) first; the
last, unfinished bar of each symbol comes out as ``complete = false``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import polars as pl

from processors import bars as door
from processors.errors import TradeInputError
from schemas.errors import nearest
from schemas.frames import END_OF_SOURCE
from schemas.timeframes import MAX_TIME_US, MIN_TIME_US, NAME_BY_SECONDS

CHUNK_ROWS: Final = 65_536
REQUIRED: Final = ("exchange", "symbol", "trade_id", "price", "size", "side", "exchange_time_us")
OPTIONAL: Final = ("receive_time_us",)
_MAX_WINDOW_US: Final = 10_000_000


def trade_columns(trades: pl.DataFrame) -> pl.DataFrame:
    """The columns that bars need, in their dtypes, ordered by exchange, symbol, time and id. Raises TradeInputError.

    ``side`` may be text (``buy``, ``sell``) or 1 and -1; ``exchange_time_us`` int64 microseconds, or a Datetime. ``receive_time_us`` is
    optional.
    """
    for name in REQUIRED:
        if name not in trades.columns:
            near = nearest(name, trades.columns)
            hint = f"rename '{near}'" if near else f"it must have {', '.join(REQUIRED)}"
            raise TradeInputError(f"The trades have no column '{name}': {hint}.")
    given = (*REQUIRED, *(name for name in OPTIONAL if name in trades.columns))
    frame = pl.DataFrame([_as_needed(trades[name], name) for name in given])
    if "receive_time_us" not in frame.columns:
        frame = frame.with_columns(receive_time_us=pl.lit(0, pl.Int64))
    _check_values(frame)
    return frame.sort("exchange", "symbol", "exchange_time_us", "trade_id", maintain_order=True)


def _as_needed(column: pl.Series, name: str) -> pl.Series:
    dtype = column.dtype
    if name in ("exchange", "symbol"):
        if dtype == pl.String or isinstance(dtype, pl.Categorical | pl.Enum):
            return _without_nulls(column.cast(pl.String), name)
        raise TradeInputError(f"Column '{name}' is {dtype}: it must be text.")
    if name == "side" and dtype == pl.String:
        known = column.is_in(["buy", "sell"])
        if not known.all() or column.null_count():
            row = int((~known.fill_null(False)).arg_true()[0])
            raise TradeInputError(f"Row {row} has side {column[row]!r}: it must be 'buy' or 'sell'.")
        return (column == "buy").cast(pl.Int8) * 2 - 1
    if name.endswith("_time_us") and isinstance(dtype, pl.Datetime):
        return _without_nulls(column.dt.epoch("us"), name)
    wanted = pl.Float64 if name in ("price", "size") else pl.Int8 if name == "side" else pl.Int64
    if not (dtype.is_integer() or (dtype.is_float() and wanted == pl.Float64)):
        raise TradeInputError(f"Column '{name}' is {dtype}: it must be {wanted.__name__}.")
    return _without_nulls(column, name).cast(wanted)


def _without_nulls(column: pl.Series, name: str) -> pl.Series:
    if column.null_count():
        raise TradeInputError(f"Row {int(column.is_null().arg_true()[0])} has no '{name}': fill it or leave the row out.")
    return column


def _check_values(frame: pl.DataFrame) -> None:
    checks: tuple[tuple[str, pl.Expr, str], ...] = (
        ("price", pl.col("price").is_finite() & (pl.col("price") > 0) & (pl.col("price") < 1e18), "a price is finite and above 0"),
        ("size", pl.col("size").is_finite() & (pl.col("size") >= 0) & (pl.col("size") < 1e18), "a size is finite and not negative"),
        ("trade_id", pl.col("trade_id").is_between(0, 2**62 - 1), "an id is not negative"),
        (
            "exchange_time_us",
            pl.col("exchange_time_us").is_between(MIN_TIME_US, MAX_TIME_US - 1),
            "it must be microseconds since 1970 between 2009 and 2100",
        ),
        (
            "receive_time_us",
            (pl.col("receive_time_us") == 0) | pl.col("receive_time_us").is_between(MIN_TIME_US, MAX_TIME_US - 1),
            "it must be microseconds since 1970 between 2009 and 2100",
        ),
    )
    for name, expression, rule in checks:
        wrong = frame.select((~expression).arg_true()).to_series()
        if len(wrong):
            row = int(wrong[0])
            raise TradeInputError(f"Row {row} has {name} {frame[name][row]}: {rule} ({len(wrong):,} rows of {frame.height:,} break this).")


def build(trades: pl.DataFrame, timeframes: Sequence[str] | Iterable[str], *, max_flat_bars: int = 86_400) -> pl.DataFrame:
    """Final bars of ``trades`` in each of ``timeframes``.

    Args:
        trades: columns exchange, symbol, trade_id, price, size, side, exchange_time_us and, where known, receive_time_us; see
            :func:`trade_columns`. Trades with an id that the symbol had before are dropped.
        timeframes: e.g. ``["1s", "1m", "1d"]``; each is computed as if it were the only one.
        max_flat_bars: flat bars in a row before a silence is left out.

    Returns:
        A row a bar, ordered by exchange, symbol, timeframe and time: exchange, symbol, timeframe, open_time and close_time (Datetime us,
        UTC), open, high, low, close, volume, quote_volume, buy_volume, trade_count, vwap, first_trade_id, last_trade_id, revision, is_final,
        complete.

    Raises:
        VocabularyError: a timeframe is not known; the message names the nearest one.
        TradeInputError: a column is missing or has another dtype, or a value is impossible; the message names the first such row.
    """
    names = [timeframes] if isinstance(timeframes, str) else list(timeframes)
    config = door.BarConfig(
        timeframes=tuple(names),
        revision_window_us=_MAX_WINDOW_US,
        live_interval_us=0,
        max_symbols=1,
        max_flat_bars=max_flat_bars,
        max_flat_rows_per_frame=2**40,
        max_future_us=MAX_TIME_US,
    )
    ordered = trade_columns(trades)
    parts = [_symbol_bars(config, group) for group in ordered.partition_by("exchange", "symbol", maintain_order=True)]
    if not parts:
        return _symbol_bars(config, ordered)
    return pl.concat(parts)


def _symbol_bars(config: door.BarConfig, trades: pl.DataFrame) -> pl.DataFrame:
    """Bars of one symbol, trades in order."""
    engine = door.BarEngine(config)
    exchange, symbol = trades.row(0)[:2] if trades.height else ("", "")
    symbols = (f"{exchange}:{symbol}",)
    inputs: dict[str, npt.NDArray[Any]] = {
        name: trades[name].to_numpy() if name != "symbol_code" else np.zeros(trades.height, np.int32) for name in door.TRADE_DTYPES
    }
    outputs: list[dict[str, npt.NDArray[Any]]] = []
    for start in range(0, max(trades.height, 1), CHUNK_ROWS):
        columns = {name: column[start : start + CHUNK_ROWS] for name, column in inputs.items()}
        last = start + CHUNK_ROWS >= trades.height
        watermark_us = int(columns["exchange_time_us"][-1]) if trades.height else 0
        outputs.append(
            engine.process(
                door.TradeBatch(
                    source="batch", watermark_us=watermark_us, symbols=symbols, columns=columns, flags=END_OF_SOURCE if last else 0
                )
            ).bars
        )
    joined = {name: np.concatenate([output[name] for output in outputs]) for name in door.BAR_COLUMNS}
    return _to_polars(joined, exchange, symbol)


def _to_polars(columns: dict[str, npt.NDArray[Any]], exchange: str, symbol: str) -> pl.DataFrame:
    kept = [
        name
        for name in door.BAR_COLUMNS
        if name not in ("symbol_code", "timeframe_s", "open_time_us", "close_time_us", "last_receive_time_us")
    ]
    seconds = pl.Series("timeframe_s", columns["timeframe_s"])
    times = {
        name: pl.Series(columns[f"{name}_us"]).cast(pl.Datetime("us")).dt.replace_time_zone("UTC") for name in ("open_time", "close_time")
    }
    frame = pl.DataFrame(
        {
            "exchange": pl.Series([exchange], dtype=pl.String).new_from_index(0, len(seconds)),
            "symbol": pl.Series([symbol], dtype=pl.String).new_from_index(0, len(seconds)),
            "timeframe_s": seconds,
            **times,
            **{name: columns[name] for name in kept},
        }
    )
    return (
        frame.sort("timeframe_s", "open_time", maintain_order=True)
        .with_columns(
            timeframe=pl.col("timeframe_s").replace_strict(NAME_BY_SECONDS, return_dtype=pl.String),
            is_final=pl.col("is_final").cast(pl.Boolean),
            complete=pl.col("complete").cast(pl.Boolean),
        )
        .select("exchange", "symbol", "timeframe", "open_time", "close_time", *kept)
    )
