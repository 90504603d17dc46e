"""The stream gives the bits of the batch: whatever the batch sizes, restarts, duplicates and order of arrival."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processors._bars_kernel import step
from processors.bars import BAR_COLUMNS, BarBatches, BarConfig, BarEngine, TradeBatch
from tests.processors.market_data import assert_same_bars, binance_capture, newest, polars_bars
from tests.processors.trade_batches import SECOND, START_US, batches, generated_trades, play

Array = npt.NDArray[Any]
CONFIG = BarConfig(live_interval_us=0)
VALUES = [name for name in BAR_COLUMNS if name not in ("symbol_code", "revision", "complete")]


def raw(outputs: list[BarBatches]) -> list[Any]:
    """Every byte of a list of outputs."""
    return [
        (o.symbols, [(n, c.dtype.str, c.tobytes()) for n, c in o.bars.items()], [c.tobytes() for c in o.rejected.values()], o.accepted)
        for o in outputs
    ]


def row_count(outputs: list[BarBatches]) -> int:
    """Rows of bars in all outputs."""
    return sum(len(output.bars["open"]) for output in outputs)


@settings(max_examples=60, deadline=None)
@given(trades=generated_trades(), cuts=st.lists(st.integers(1, 40), min_size=1, max_size=30), rows=st.integers(1, 200))
def test_final_bars_have_the_same_bits_in_any_batches(trades: pl.DataFrame, cuts: list[int], rows: int) -> None:
    """Cutting the same rows in another way changes no bit of any final bar, its revision included."""
    one = newest(play(BarEngine(CONFIG), batches(trades, rows=rows)))
    other = newest(play(BarEngine(CONFIG), batches(trades, rows=1000, sizes=cuts)))
    assert one.drop("complete").equals(other.drop("complete"))


@settings(max_examples=60, deadline=None)
@given(trades=generated_trades(holes=True), seed=st.integers(0, 2**32 - 1), late_s=st.floats(0.1, 25.0), rows=st.integers(1, 40))
def test_any_order_within_the_lateness_gives_the_same_bits(trades: pl.DataFrame, seed: int, late_s: float, rows: int) -> None:
    """Trades shuffled by up to the watermark's lateness: not one bit of a bar differs from that of the ordered stream."""
    shifted = trades["exchange_time_us"] + (np.random.default_rng(seed).random(trades.height) * late_s * SECOND).astype(np.int64)
    shuffled = trades.with_columns(order=shifted).sort("order", maintain_order=True).drop("order")
    ordered = newest(play(BarEngine(CONFIG), batches(trades, rows=rows)))
    outputs = play(BarEngine(CONFIG), batches(shuffled, rows=rows, lateness_us=round(late_s * SECOND)))
    assert sum(len(output.rejected["row"]) for output in outputs) == 0
    kept = ["exchange", "symbol", *VALUES]
    assert with_trades(newest(outputs)).select(kept).equals(with_trades(ordered).select(kept))


def with_trades(bars: pl.DataFrame) -> pl.DataFrame:
    """Bars that are not flat: where a symbol's first trade arrives late, flat bars before it may have another beginning."""
    return bars.filter(pl.col("trade_count") > 0)


@settings(max_examples=60, deadline=None)
@given(trades=generated_trades(), seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 30))
def test_late_trades_revise_their_bars_to_the_bits_of_the_ordered_stream(trades: pl.DataFrame, seed: int, rows: int) -> None:
    """The watermark does not wait: trades up to 25 s late come after their bars were published and revise them, flat bars included."""
    shifted = trades["exchange_time_us"] + (np.random.default_rng(seed).random(trades.height) * 25 * SECOND).astype(np.int64)
    shuffled = trades.with_columns(order=shifted).sort("order", maintain_order=True).drop("order")
    outputs = play(BarEngine(CONFIG), batches(shuffled, rows=rows))
    assert sum(len(output.rejected["row"]) for output in outputs) == 0
    ours = newest(outputs)
    ordered = newest(play(BarEngine(CONFIG), batches(trades, rows=rows)))
    kept = ["exchange", "symbol", *VALUES]
    assert ours.select(kept).equals(ordered.select(kept))


@settings(max_examples=30, deadline=None)
@given(trades=generated_trades(), rows=st.integers(1, 30), every=st.integers(1, 5), live_us=st.sampled_from([0, 250_000]))
def test_a_restart_from_a_snapshot_changes_no_byte(trades: pl.DataFrame, rows: int, every: int, live_us: int) -> None:
    """An engine restored after every few batches gives the bytes of one that never stopped: rows, order and snapshots."""
    config = BarConfig(live_interval_us=live_us)
    steady, restarted = BarEngine(config), BarEngine(config)
    shuffled = trades.sample(fraction=1.0, shuffle=True, seed=7) if trades.height < 40 else trades
    for number, batch in enumerate(batches(shuffled, rows=rows, lateness_us=SECOND)):
        if number % every == 0:
            restarted = BarEngine.restore(config, restarted.snapshot())
        assert raw([steady.process(batch)]) == raw([restarted.process(batch)])
        assert steady.snapshot() == restarted.snapshot()


@pytest.mark.parametrize("seed", range(40))
def test_a_state_says_nothing_of_bars_that_are_gone(seed: int) -> None:
    """Trades in any order: a bar that was made empty in the place of an older one has none of its prices, restored or not."""
    random = Random(seed)
    time_us, rows = START_US, []
    for number in range(33):
        time_us += int(random.expovariate(1 / 1.5) * SECOND)
        rows.append((1_001 + number, round(random.uniform(5, 70), 2), round(random.uniform(0.1, 9), 3), time_us))
    random.shuffle(rows)
    trades = pl.DataFrame(rows, schema=["trade_id", "price", "size", "exchange_time_us"], orient="row").with_columns(
        exchange=pl.lit("binance"), symbol=pl.lit("S0-USDT"), side=pl.lit(1, pl.Int8), receive_time_us=pl.col("exchange_time_us")
    )
    steady, restarted = BarEngine(CONFIG), BarEngine(CONFIG)
    for batch in batches(trades, rows=1, lateness_us=SECOND):
        restarted = BarEngine.restore(CONFIG, restarted.snapshot())
        assert raw([steady.process(batch)]) == raw([restarted.process(batch)])
        assert steady.snapshot() == restarted.snapshot()


@settings(max_examples=40, deadline=None)
@given(trades=generated_trades(holes=True), rows=st.integers(1, 30), again=st.integers(1, 30))
def test_a_second_replay_changes_nothing(trades: pl.DataFrame, rows: int, again: int) -> None:
    """Everything sent a second time, in other batches: no row, no reject, every trade counted as a duplicate."""
    engine = BarEngine(CONFIG)
    play(engine, batches(trades, rows=rows))
    second = play(engine, batches(trades, rows=again, source="again"))
    assert row_count(second) == 0
    assert sum(len(output.rejected["row"]) for output in second) == 0
    assert sum(output.duplicates for output in second) == trades.height


@pytest.mark.parametrize("name", ["spot_btcusdt_20240808.ws.gz", "usdm_btcusdt_20240808.ws.gz"])
def test_a_capture_replayed_twice_gives_no_new_row(name: str) -> None:
    """A whole recorded file, a second time, by the same source and by another one."""
    trades = binance_capture(name)
    engine = BarEngine(BarConfig())
    play(engine, batches(trades, rows=700))
    for source in ("test", "other"):
        second = play(engine, batches(trades, rows=511, source=source))
        assert row_count(second) == 0
        assert sum(output.duplicates for output in second) == trades.height


def test_a_capture_interleaved_with_itself_gives_its_bars() -> None:
    """Two connections that carry the same trades, one a second behind, as when a stream is renewed with overlap."""
    trades = binance_capture("spot_btcusdt_20240809.ws.gz")
    engine = BarEngine(CONFIG)
    first = list(batches(trades, rows=100, source="a", lateness_us=SECOND))
    second = list(batches(trades, rows=100, source="b", lateness_us=SECOND))
    outputs = []
    for number, batch in enumerate(first):
        outputs.append(engine.process(batch))
        if number >= 3:
            outputs.append(engine.process(second[number - 3]))
    outputs += play(engine, second[len(first) - 3 :])
    bars = newest(outputs)
    for timeframe, seconds in (("1s", 1), ("1m", 60), ("5m", 300)):
        assert_same_bars(bars.filter(pl.col("timeframe_s") == seconds), polars_bars(trades, timeframe))


def test_ids_with_holes_are_known_exactly_up_to_the_limit() -> None:
    """With more holes than fit, the oldest are forgotten: their ids are refused aloud, never dropped or counted twice."""
    config = BarConfig(live_interval_us=0, id_intervals=16)
    engine = BarEngine(config)
    ids = np.arange(1000, 1000 + 2 * 60, 2)
    rows = pl.DataFrame(
        {
            "exchange": "binance",
            "symbol": "BTC-USDT",
            "trade_id": ids,
            "price": 100.0,
            "size": 1.0,
            "side": 1,
            "exchange_time_us": 1_723_161_600_000_000 + np.arange(60) * 10_000,
            "receive_time_us": 1_723_161_600_000_000 + np.arange(60) * 10_000,
        }
    )
    play(engine, batches(rows, rows=7, end=False))
    again = play(engine, batches(rows, rows=7, end=False))
    duplicates = sum(output.duplicates for output in again)
    refused = sum(len(output.rejected["row"]) for output in again)
    assert row_count(again) == 0
    assert duplicates + refused == 60
    assert duplicates >= 12, "the newest three quarters of the intervals are exact"
    hole = rows.tail(1).with_columns(trade_id=pl.lit(int(ids[-2]) + 1))
    accepted = play(engine, batches(hole, rows=1, end=False))
    assert accepted[0].accepted == 1, "an unseen id in a remembered hole is a late trade"


def test_one_frame_may_hold_hours() -> None:
    """A quiet symbol replayed in one frame: its watermark comes after the rows, and still every bar is there."""
    trades = pl.DataFrame(
        {
            "exchange": "binance",
            "symbol": "BTC-USDT",
            "trade_id": range(50),
            "price": np.linspace(100, 150, 50),
            "size": 1.0,
            "side": 1,
            "exchange_time_us": 1_723_161_600_000_000 + np.arange(50) * 300 * SECOND,
            "receive_time_us": 1_723_161_600_000_000 + np.arange(50) * 300 * SECOND,
        }
    )
    one = newest(play(BarEngine(CONFIG), batches(trades, rows=1000)))
    many = newest(play(BarEngine(CONFIG), batches(trades, rows=1)))
    assert one.equals(many)
    assert one.filter(pl.col("timeframe_s") == 1).height == 49 * 300 + 1


def test_memory_of_a_symbol_is_bounded() -> None:
    """10,000 trades of one symbol with holes and disorder leave the arrays as large as one trade does: at most 32 KiB."""
    config = BarConfig()
    assert config.bytes_per_symbol <= 32 * 1024
    engine = BarEngine(config)
    before = sum(
        array.nbytes for array in (engine._state.hot_i, engine._state.bar_i, engine._state.slot_i, engine._state.slot_f, engine._state.ids)
    )
    assert before <= 16 * config.bytes_per_symbol
    rng = np.random.default_rng(3)
    times = 1_723_161_600_000_000 + np.cumsum(rng.integers(0, 300_000, 10_000))
    rows = pl.DataFrame(
        {
            "exchange": "binance",
            "symbol": "BTC-USDT",
            "trade_id": np.cumsum(rng.integers(1, 4, 10_000)),
            "price": 100.0,
            "size": 1.0,
            "side": 1,
            "exchange_time_us": times,
            "receive_time_us": times,
        }
    )
    play(engine, batches(rows, rows=333))
    after = sum(
        array.nbytes for array in (engine._state.hot_i, engine._state.bar_i, engine._state.slot_i, engine._state.slot_f, engine._state.ids)
    )
    assert after == before
    assert len(engine.snapshot()) < 32 * 1024


def test_symbols_beyond_the_limit_are_refused_and_the_others_go_on() -> None:
    """max_symbols is a bound: the state grows up to it and no further."""
    engine = BarEngine(BarConfig(live_interval_us=0, max_symbols=40))
    keys = tuple(f"binance:S{number}-USDT" for number in range(50))
    count = len(keys)
    columns: dict[str, Any] = {
        "symbol_code": np.arange(count, dtype=np.int32),
        "trade_id": np.ones(count, np.int64),
        "price": np.ones(count),
        "size": np.ones(count),
        "side": np.ones(count, np.int8),
        "exchange_time_us": np.full(count, 1_723_161_600_000_000),
        "receive_time_us": np.full(count, 1_723_161_600_000_000),
    }
    output = engine.process(TradeBatch(source="s", watermark_us=1_723_161_600_000_000, symbols=keys, columns=columns))
    assert output.accepted == 40
    assert output.rejected["row"].tolist() == list(range(40, 50))
    assert engine.symbol_count == 40


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(5)), seed=st.integers(0, 2**32 - 1), rows=st.integers(5, 60), whole=st.booleans())
def test_files_replayed_in_any_order_give_the_bars_of_all_of_them(order: list[int], seed: int, rows: int, whole: bool) -> None:
    """Five stretches of one symbol, minutes apart, each by a source of its own, in any order, and all of them once more."""
    rng = np.random.default_rng(seed)
    files = []
    for number in range(5):
        count = int(rng.integers(20, 120))
        times = START_US + number * 600 * SECOND + np.cumsum(rng.integers(0, SECOND, count))
        files.append(
            pl.DataFrame(
                {
                    "exchange": "binance",
                    "symbol": "BTC-USDT",
                    "trade_id": 1000 * number + np.arange(count),
                    "price": np.round(100 + rng.normal(0, 1, count), 2),
                    "size": np.round(rng.lognormal(0, 2, count), 4) + 1e-4,
                    "side": rng.choice([-1, 1], count),
                    "exchange_time_us": times,
                    "receive_time_us": times,
                }
            )
        )
    config = BarConfig(timeframes=("1s", "1m"), live_interval_us=0)
    engine = BarEngine(config)
    outputs = []
    for number in order:
        outputs += play(engine, batches(files[number], rows=1000 if whole else rows, source=f"file {number}"))
        engine = BarEngine.restore(config, engine.snapshot())
    assert sum(len(output.rejected["row"]) for output in outputs) == 0
    bars = newest(outputs)
    for timeframe, seconds in (("1s", 1), ("1m", 60)):
        assert_same_bars(bars.filter(pl.col("timeframe_s") == seconds), polars_bars(pl.concat(files), timeframe))
    again = [output for number in order for output in play(engine, batches(files[number], rows=rows, source="again"))]
    assert row_count(again) == 0
    assert sum(output.duplicates for output in again) == sum(file.height for file in files)


@settings(max_examples=40, deadline=None)
@given(trades=generated_trades(), cuts=st.lists(st.integers(1, 149), max_size=5), rows=st.integers(1, 60), months=st.integers(1, 3))
def test_older_files_in_a_row_give_the_bars_of_one(trades: pl.DataFrame, cuts: list[int], rows: int, months: int) -> None:
    """A history under newer trades, cut anywhere into files that are replayed in order, across restarts: the bars of the uncut one."""
    ahead = 30 * months * 86_400 * SECOND
    live = trades.with_columns(pl.col("trade_id") + 1_000_000, pl.col("exchange_time_us") + ahead, pl.col("receive_time_us") + ahead)
    edges = [0, *sorted({cut for cut in cuts if cut < trades.height}), trades.height]
    files = [trades[start:end] for start, end in zip(edges, edges[1:], strict=False)]
    engine = BarEngine(CONFIG)
    play(engine, batches(live, rows=500, source="live", end=False))
    outputs = []
    for number, file in enumerate(files):
        outputs += play(engine, batches(file, rows=rows, source=f"file {number}"))
        restored = BarEngine.restore(CONFIG, engine.snapshot())
        assert restored.snapshot() == engine.snapshot()
        engine = restored
    assert sum(len(output.rejected["row"]) for output in outputs) == 0
    bars = newest(outputs)
    for timeframe, seconds in (("1s", 1), ("1m", 60), ("1h", 3600), ("1d", 86_400)):
        assert_same_bars(bars.filter(pl.col("timeframe_s") == seconds), polars_bars(trades, timeframe))
    assert row_count([output for file in files for output in play(engine, batches(file, rows=rows, source="again"))]) == 0


def test_sources_are_bounded() -> None:
    """Beyond max_sources the one that has been silent longest is forgotten; its symbols go on with the next source that brings them."""
    engine = BarEngine(BarConfig(live_interval_us=0, max_sources=2))
    trades = binance_like(6)
    outputs = [
        engine.process(batch)
        for number in range(6)
        for batch in batches(trades.slice(number, 1), rows=10, source=f"connection {number}", end=False)
    ]
    assert len(engine._sources) == 2
    outputs += [engine.process(TradeBatch(source="connection 5", watermark_us=START_US + 60 * SECOND))]
    bars = newest(outputs)
    assert bars.filter(pl.col("timeframe_s") == 1)["trade_count"].sum() == 6


def binance_like(count: int) -> pl.DataFrame:
    """Trades of one symbol, one a second."""
    times = START_US + np.arange(count) * SECOND
    return pl.DataFrame(
        {
            "exchange": "binance",
            "symbol": "BTC-USDT",
            "trade_id": np.arange(count),
            "price": 100.0,
            "size": 1.0,
            "side": 1,
            "exchange_time_us": times,
            "receive_time_us": times,
        }
    )


def test_columns_may_be_read_only_unaligned_or_strided() -> None:
    """As they come out of a decoded record: the same bars, and no second specialisation of the kernel."""
    (batch,) = batches(binance_like(20), rows=100, end=False)
    expected = raw([BarEngine(CONFIG).process(batch)])
    compiled = len(step.signatures)
    for change in (read_only, unaligned, strided):
        columns = {name: change(np.asarray(column)) for name, column in batch.columns.items()}
        other = TradeBatch(source=batch.source, watermark_us=batch.watermark_us, symbols=batch.symbols, columns=columns)
        assert raw([BarEngine(CONFIG).process(other)]) == expected
    assert len(step.signatures) == compiled == 1


def read_only(column: Array) -> Array:
    """A view of immutable bytes."""
    return np.frombuffer(column.tobytes(), column.dtype)


def unaligned(column: Array) -> Array:
    """A view one byte off."""
    return np.frombuffer(b"x" + column.tobytes(), column.dtype, offset=1)


def strided(column: Array) -> Array:
    """Every other element of a larger array."""
    return np.repeat(column, 2)[::2]
