"""Whole tables against an undisturbed run: what ClickHouse holds of a symbol, and the bars the live kernel makes of the market's own trades.

Sums are error-free and the kernel is the same, so every value is compared for equality. For markets that go on :func:`undisturbed` and
:func:`closed_bars` look at the bars that closed before a time up to which all trades are known.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import polars as pl

from infra.settings import Settings
from processors.bars import build
from processors.reconcile import VALUES
from schemas.timeframes import TIMEFRAME_SECONDS, TIMEFRAMES
from tests.integration.fault_chain import table

BAR_KEY = ("timeframe_s", "open_time_us")
BAR_COLUMNS = (*BAR_KEY, *VALUES)
"""What is compared of a bar: its place and all that follows from the trades alone."""
TRADE_COLUMNS = ("trade_id", "price", "size", "side", "exchange_time_us")


def batch_bars(trades: pl.DataFrame, symbol: str, exchange: str = "binance") -> pl.DataFrame:
    """Bars of all timeframes that an undisturbed batch makes of ``trades``: :data:`BAR_COLUMNS` and ``complete``, by place."""
    made = build(trades.with_columns(exchange=pl.lit(exchange), symbol=pl.lit(symbol)), TIMEFRAMES)
    times = [pl.col(f"{name}_time").dt.epoch("us").alias(f"{name}_time_us") for name in ("open", "close")]
    placed = made.with_columns(*times, timeframe_s=pl.col("timeframe").replace_strict(TIMEFRAME_SECONDS, return_dtype=pl.Int32))
    return placed.select(*BAR_COLUMNS, "complete").sort(BAR_KEY)


def final_bars(settings: Settings, symbol: str, exchange: str = "binance") -> pl.DataFrame:
    """The newest revision of every final bar; no revision may be there twice, and none may be left out before it."""
    rows = table(settings, f"SELECT * FROM bars WHERE exchange = '{exchange}' AND symbol = '{symbol}'")
    counted = rows.group_by(BAR_KEY).agg(n=pl.len(), distinct=pl.col("revision").n_unique(), newest=pl.col("revision").max())
    wrong = counted.filter((pl.col("n") != pl.col("distinct")) | (pl.col("newest") != pl.col("n") - 1))
    assert not len(wrong), f"{symbol}: revisions are there twice, or not all of them: {wrong.to_dicts()[:5]}"
    newest = rows.sort("revision").group_by(BAR_KEY, maintain_order=True).last()
    return newest.filter(pl.col("is_final") == 1).with_columns(pl.col("complete").cast(pl.Boolean)).sort(BAR_KEY)


def undisturbed(trades: pl.DataFrame, symbol: str, until_us: int, dark: Iterable[tuple[int, int]] = ()) -> pl.DataFrame:
    """Bars of all timeframes that close by ``until_us``, as ``trades`` make them: complete but where they touch a stretch of ``dark``.

    ``dark``: (start, end) of what nobody has, us. As :func:`closed_bars` has it, what opened before the first trade counts as complete.
    """
    touched = [(pl.col("close_time_us") > start_us) & (pl.col("open_time_us") <= end_us) for start_us, end_us in dark]
    complete = _began(trades) | ~pl.any_horizontal(pl.lit(False), *touched)
    return batch_bars(trades, symbol).filter(pl.col("close_time_us") <= until_us).with_columns(complete=complete)


def closed_bars(settings: Settings, symbol: str, until_us: int, trades: pl.DataFrame) -> pl.DataFrame:
    """The stored bars that :func:`undisturbed` is to be compared with.

    Before the first trade nobody knows what there was: bars that opened before it are compared but for ``complete``.
    """
    bars = final_bars(settings, symbol).filter(pl.col("close_time_us") <= until_us)
    return bars.with_columns(complete=_began(trades) | pl.col("complete")).select(*BAR_COLUMNS, "complete")


def _began(trades: pl.DataFrame) -> pl.Expr:
    return pl.col("open_time_us") < trades["exchange_time_us"].min()


def difference(found: pl.DataFrame, wanted: pl.DataFrame, key: Iterable[str]) -> str:
    """The first rows that only one of two tables has, and how many; empty when they are equal to the bit. ``wanted`` says columns and types."""
    found = found.select(wanted.columns).cast(dict(wanted.schema))
    if found.equals(wanted):
        return ""
    mine, theirs = (rows.join(others, on=wanted.columns, how="anti") for rows, others in ((found, wanted), (wanted, found)))
    return f"{len(mine)} rows differ from the {len(theirs)} wanted: {mine.sort(key).to_dicts()[:2]} in place of {theirs.sort(key).to_dicts()[:2]}"


def sha256(tables: Iterable[pl.DataFrame]) -> str:
    """SHA-256 of tables, one after the other."""
    digest = hashlib.sha256()
    for rows in tables:
        digest.update(rows.write_csv(float_scientific=False).encode())
    return digest.hexdigest()


__all__ = ["BAR_COLUMNS", "BAR_KEY", "TRADE_COLUMNS", "batch_bars", "closed_bars", "difference", "final_bars", "sha256", "undisturbed"]
