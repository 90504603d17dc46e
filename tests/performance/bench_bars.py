"""The bar kernel, nanoseconds of CPU a trade, 6 timeframes, 10 to 10,000 symbols, beside polars ``group_by`` and a dict of bars.

All take the same trades. ``ours`` is the whole of ``BarEngine.process`` on frames of 2,000 rows: checks, de-duplication by id, revisions,
closing, output columns. ``polars`` groups all trades at once for each timeframe, with nothing to continue from, no ids checked and no flat
bars. ``dict of bars`` is a plain Python loop over rows.

Two densities. ``dense``: a million trades a second of exchange time, as a backlog is caught up; ``even``: 10 trades a second for each
symbol, so that 10 and 10,000 symbols write equally many bars a trade: one 1s bar for ten. CPU time of the process, threads of polars included, so that other
programs on the machine do not count. The rounds of all contenders are interleaved.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import polars as pl

from processors.bars import BarConfig, BarEngine, TradeBatch
from schemas.timeframes import TIMEFRAME_SECONDS, US_PER_SECOND
from tests.performance import market
from tests.performance.statistics import ratio, summary

ROUNDS = int(os.environ.get("MARKETSTREAM_BENCH_ROUNDS", "5"))
TIMEFRAMES = ("1s", "1m", "5m", "15m", "1h", "1d")
SYMBOLS = (10, 100, 1_000, 10_000)
TRADES = 400_000
LOOP_TRADES = 40_000
ROWS = 2_000
DENSITIES: dict[str, Callable[[int], int]] = {"dense": lambda symbols: 1_000_000, "even": lambda symbols: 10 * symbols}

Columns = dict[str, npt.NDArray[Any]]


def batches(keys: tuple[str, ...], columns: Columns) -> list[TradeBatch]:
    """The trades in frames of 2,000 rows, one source."""
    result = []
    for start in range(0, TRADES, ROWS):
        part = {name: column[start : start + ROWS].copy() for name, column in columns.items()}
        result.append(TradeBatch(source="bench", watermark_us=int(part["exchange_time_us"][-1]), symbols=keys, columns=part))
    return result


def cpu_ns_per(count: int, work: Callable[[], object]) -> float:
    """CPU nanoseconds of this process for each of ``count``."""
    gc.collect()
    start = time.process_time_ns()
    work()
    return (time.process_time_ns() - start) / count


def run_ours(frames: list[TradeBatch], live_interval_us: int) -> float:
    """Nanoseconds a trade once every symbol is known: the first quarter of the frames is not measured."""
    engine = BarEngine(BarConfig(timeframes=TIMEFRAMES, live_interval_us=live_interval_us))
    warm = len(frames) // 4
    for frame in frames[:warm]:
        engine.process(frame)

    def work() -> None:
        for frame in frames[warm:]:
            engine.process(frame)

    return cpu_ns_per((len(frames) - warm) * ROWS, work)


def run_polars(columns: Columns) -> float:
    """Nanoseconds a trade of one ``group_by`` for each timeframe."""
    frame = pl.DataFrame(columns)

    def work() -> None:
        for name in TIMEFRAMES:
            length = TIMEFRAME_SECONDS[name] * US_PER_SECOND
            (
                frame.lazy()
                .group_by("symbol_code", (pl.col("exchange_time_us") // length).alias("bar"))
                .agg(
                    open=pl.col("price").first(),
                    high=pl.col("price").max(),
                    low=pl.col("price").min(),
                    close=pl.col("price").last(),
                    volume=pl.col("size").sum(),
                    quote_volume=(pl.col("price") * pl.col("size")).sum(),
                    buy_volume=(pl.col("size") * (pl.col("side") > 0)).sum(),
                    trade_count=pl.len(),
                    first_trade_id=pl.col("trade_id").first(),
                    last_trade_id=pl.col("trade_id").last(),
                )
                .collect()
            )

    return cpu_ns_per(TRADES, work)


def run_dict(columns: Columns) -> float:
    """Nanoseconds a trade of a loop that keeps the open bar of each symbol and timeframe in a dict."""
    lists = [columns[name][:LOOP_TRADES].tolist() for name in ("symbol_code", "trade_id", "price", "size", "side", "exchange_time_us")]
    lengths = [TIMEFRAME_SECONDS[name] * US_PER_SECOND for name in TIMEFRAMES]

    def work() -> int:
        open_bars: dict[tuple[int, int], list[Any]] = {}
        closed = 0
        for code, trade_id, price, size, side, time_us in zip(*lists, strict=True):
            quote = price * size
            buy = size if side > 0 else 0.0
            for length in lengths:
                start = time_us - time_us % length
                bar = open_bars.get((code, length))
                if bar is None or bar[0] != start:
                    closed += bar is not None
                    open_bars[code, length] = [start, price, price, price, price, size, quote, buy, 1, trade_id, trade_id]
                    continue
                if price > bar[2]:
                    bar[2] = price
                if price < bar[3]:
                    bar[3] = price
                bar[4] = price
                bar[5] += size
                bar[6] += quote
                bar[7] += buy
                bar[8] += 1
                bar[10] = trade_id
        return closed

    return cpu_ns_per(LOOP_TRADES, work)


def start_up() -> dict[str, float]:
    """Seconds to make an engine that has run once, in this process: what a restarted worker pays with the compiled code cached."""
    start = time.perf_counter()
    BarEngine(BarConfig()).process(TradeBatch(source="bench", watermark_us=market.START_US))
    return {"first_frame_s": round(time.perf_counter() - start, 3)}


def run() -> dict[str, Any]:
    """Figures (nanoseconds a trade) and ratios of all contenders."""
    warm_up = start_up()
    rounds: dict[str, list[float]] = {}
    inputs = {}
    for density, per_second in DENSITIES.items():
        for symbols in SYMBOLS:
            keys, columns = market.trades(TRADES, symbols, per_second=per_second(symbols))
            inputs[density, symbols] = (batches(keys, columns), columns)
    for _ in range(ROUNDS):
        for (density, symbols), (frames, columns) in inputs.items():
            rounds.setdefault(f"ours {density} {symbols}", []).append(run_ours(frames, 0))
            if symbols == 1_000:
                rounds.setdefault(f"ours {density} {symbols} with live rows", []).append(run_ours(frames, 250_000))
            if density == "dense":
                rounds.setdefault(f"polars {symbols}", []).append(run_polars(columns))
                rounds.setdefault(f"dict of bars {symbols}", []).append(run_dict(columns))
    ratios = {
        "10,000 symbols over 10, dense": ratio(rounds["ours dense 10000"], rounds["ours dense 10"]),
        "10,000 symbols over 10, even": ratio(rounds["ours even 10000"], rounds["ours even 10"]),
        "polars over ours, 1,000 symbols": ratio(rounds["polars 1000"], rounds["ours dense 1000"]),
        "dict of bars over ours, 1,000 symbols": ratio(rounds["dict of bars 1000"], rounds["ours dense 1000"]),
    }
    figures: dict[str, Any] = dict(summary(rounds, "ns/trade"))
    engine = BarEngine(BarConfig(timeframes=TIMEFRAMES))
    for frame in inputs["dense", 10_000][0]:
        engine.process(frame)
    figures["state"] = {
        "median": round(engine.config.bytes_per_symbol / 1024, 1),
        "unit": "KiB/symbol",
        "snapshot_bytes_per_symbol": len(engine.snapshot()) // engine.symbol_count,
    }
    figures["start"] = {"median": warm_up["first_frame_s"], "unit": "s"}
    return {"figures": figures, "ratios": ratios}


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
