"""Tick, volume, dollar and imbalance bars against plain loops, and their state across batches and restarts."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processors import _alternative_kernel as kernel
from processors import _bars_kernel as time_kernel
from processors.alternative_bars import (
    AlternativeBarConfig,
    AlternativeBarEngine,
    Kind,
    build_dollar,
    build_imbalance,
    build_tick,
    build_volume,
)
from processors.bars import TradeBatch
from processors.errors import BarConfigError, SnapshotConfigError, SnapshotError, TradeInputError
from schemas.errors import VocabularyError
from tests.processors.market_data import binance_capture
from tests.processors.streams import batches, frame, generated_trades, trade

CONFIGS: list[AlternativeBarConfig] = [
    AlternativeBarConfig(kind="tick", threshold=7),
    AlternativeBarConfig(kind="volume", threshold=12.5),
    AlternativeBarConfig(kind="volume", threshold=12.5, carry_over=True),
    AlternativeBarConfig(kind="dollar", threshold=900.0),
    AlternativeBarConfig(kind="tick_imbalance", initial_ticks=5, min_ticks=2, max_ticks=30, span=3, sign="tick_rule"),
    AlternativeBarConfig(kind="volume_imbalance", initial_ticks=5, min_ticks=2, max_ticks=30, span=3, sign="side"),
    AlternativeBarConfig(kind="dollar_imbalance", initial_ticks=5, min_ticks=2, max_ticks=30, span=3, sign="tick_rule"),
]


def by_hand(trades: list[dict[str, Any]], config: AlternativeBarConfig) -> list[dict[str, Any]]:
    """The same bars of one symbol by a plain loop over exact sums."""
    bars: list[dict[str, Any]] = []
    open_bar: list[dict[str, Any]] = []
    carried, flows, sign, previous = 0.0, [], 1, 0.0
    expected_ticks, expected_flow, expected_absolute, threshold = float(config.initial_ticks), 0.0, 0.0, config.threshold
    alpha = 2.0 / (config.span + 1)
    for row in trades:
        open_bar.append(row)
        measure = {"t": 1.0, "v": row["size"], "d": row["price"] * row["size"]}[config.kind[0]]
        if config.is_imbalance:
            if row["price"] != previous:
                sign = 1 if row["price"] > previous else -1
            previous = row["price"]
            measure *= row["side"] if config.sign == "side" and row["side"] else sign
        flows.append(measure)
        progress = math.fsum([carried, *flows])
        count = len(open_bar)
        if not config.is_imbalance:
            closes = progress >= threshold
        elif not bars:
            closes = count >= config.initial_ticks
        else:
            closes = (abs(progress) >= threshold and count >= config.min_ticks) or count >= config.max_ticks
        if not closes:
            continue
        bars.append(
            {
                "open": open_bar[0]["price"],
                "high": max(each["price"] for each in open_bar),
                "low": min(each["price"] for each in open_bar),
                "close": open_bar[-1]["price"],
                "volume": math.fsum(each["size"] for each in open_bar),
                "quote_volume": math.fsum(each["price"] * each["size"] for each in open_bar),
                "buy_volume": math.fsum(each["size"] for each in open_bar if each["side"] > 0),
                "trade_count": count,
                "first_trade_id": open_bar[0]["trade_id"],
                "last_trade_id": open_bar[-1]["trade_id"],
            }
        )
        if config.is_imbalance:
            weight = 1.0 if len(bars) == 1 else alpha
            expected_ticks = min(max(expected_ticks + alpha * (count - expected_ticks), config.min_ticks), config.max_ticks)
            expected_flow += weight * (progress / count - expected_flow)
            expected_absolute += weight * (sum(map(abs, flows)) / count - expected_absolute)
            threshold = expected_ticks * max(abs(expected_flow), config.min_imbalance * expected_absolute)
        carried = progress % threshold if config.carry_over else 0.0
        flows, open_bar = [], []
    return bars


@settings(max_examples=20, deadline=None)
@given(trades=generated_trades())
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.kind}{'+carry' * config.carry_over}")
def test_bars_equal_those_of_a_plain_loop(config: AlternativeBarConfig, trades: pl.DataFrame) -> None:
    """Every column of every bar, for each symbol, sums bit for bit."""
    engine = AlternativeBarEngine(config)
    (batch,) = batches(trades, rows=1000, end=False)
    output = engine.process(batch)
    for code, key in enumerate(batch.symbols):
        expected = by_hand(trades.filter(pl.col("symbol") == key.split(":")[1]).to_dicts(), config)
        mine = output.bars["symbol_code"] == code
        assert output.bars["bar_number"][mine].tolist() == list(range(len(expected)))
        for name in expected[0] if expected else ():
            assert output.bars[name][mine].tolist() == [bar[name] for bar in expected], name


@settings(max_examples=10, deadline=None)
@given(trades=generated_trades(), rows=st.integers(1, 40), every=st.integers(1, 4))
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.kind}{'+carry' * config.carry_over}")
def test_batches_repeats_and_restarts_change_no_bit(config: AlternativeBarConfig, trades: pl.DataFrame, rows: int, every: int) -> None:
    """Any batch sizes, everything sent twice, a restore after every few batches: the bars of one batch."""
    (whole,) = batches(trades, rows=1000, end=False)
    expected = AlternativeBarEngine(config).process(whole).bars
    engine = AlternativeBarEngine(config)
    parts = []
    for number, batch in enumerate(batches(trades, rows=rows, end=False)):
        if number % every == 0:
            data = engine.snapshot()
            engine = AlternativeBarEngine.restore(config, data)
            assert engine.snapshot() == data
        parts.append(engine.process(batch).bars)
        assert engine.process(batch).duplicates == len(batch.columns["price"])
    for name, column in expected.items():
        assert np.concatenate([part[name] for part in parts]).tobytes() == column.tobytes()


def test_doors_on_a_capture() -> None:
    """A recorded file: each bar reaches its threshold and would not have without its last trade; together they hold every closed trade."""
    trades = binance_capture("usdm_btcusdt_20240808.ws.gz")
    ticks = build_tick(trades, 100)
    assert set(ticks["trade_count"]) == {100}
    assert ticks.height == trades.height // 100
    volume = build_volume(trades, 5.0)
    assert volume["volume"].min() >= 5.0  # type: ignore[operator]
    dollar = build_dollar(trades, 1e6, carry_over=True)
    assert abs(dollar["quote_volume"].mean() / 1e6 - 1) < 0.05  # type: ignore[operator]
    for bars in (ticks, volume, dollar):
        assert (bars["first_trade_id"][1:] == bars["last_trade_id"][:-1] + 1).all()
        assert bars["open_time"].dtype == pl.Datetime("us", "UTC")


@pytest.mark.parametrize("kind", ["tick", "volume", "dollar"])
def test_imbalance_bars_of_a_capture_stay_within_their_bounds(kind: Any) -> None:
    """Expectations neither run away nor collapse: some bars, none beyond the bounds, each closed by its imbalance or by the bound."""
    bars = build_imbalance(binance_capture("usdm_btcusdt_20240808.ws.gz"), kind)
    config = AlternativeBarConfig(kind=f"{kind}_imbalance")  # type: ignore[arg-type]
    assert 20 < bars.height < 2_000
    assert bars["trade_count"].min() >= config.min_ticks  # type: ignore[operator]
    assert bars["trade_count"].max() <= config.max_ticks  # type: ignore[operator]
    later = bars.filter((pl.col("bar_number") > 0) & (pl.col("trade_count") < config.max_ticks))
    assert (later["progress"].abs() >= later["threshold"]).all()


def test_one_huge_trade_closes_one_bar_and_carries_less_than_a_threshold() -> None:
    """A trade is not split and does not close bars without trades."""
    engine = AlternativeBarEngine(AlternativeBarConfig(kind="volume", threshold=10.0, carry_over=True))
    output = engine.process(frame(trade(1, 0.1, size=1034.0), trade(2, 0.2, size=5.0), trade(3, 0.3, size=1.0)))
    assert output.bars["volume"].tolist() == [1034.0, 6.0]


def test_bad_rows_are_refused_with_their_reason() -> None:
    """NaN, a bad price, an id below the first, a code outside the dictionary, a symbol too many."""
    engine = AlternativeBarEngine(AlternativeBarConfig(kind="tick", threshold=2, max_symbols=1))
    rows = [
        trade(5, 0.1),
        trade(6, 0.2, price=math.nan),
        trade(7, 0.3, price=-1.0),
        trade(4, 0.4),
        trade(8, 0.5, symbol="B"),
        trade(9, 0.6),
    ]
    output = engine.process(frame(*rows))
    assert list(zip(output.rejected["row"].tolist(), output.rejected["reason"].tolist(), strict=True)) == [(1, 2), (2, 3), (3, 7), (4, 8)]
    assert output.bars["last_trade_id"].tolist() == [9]


def test_thresholds_may_differ_by_symbol() -> None:
    """Each symbol has its own; one without any is refused."""
    engine = AlternativeBarEngine(AlternativeBarConfig(kind="tick", thresholds={"binance:A": 1, "binance:B": 2}))
    output = engine.process(
        frame(trade(1, 0.1, symbol="A"), trade(1, 0.1, symbol="B"), trade(1, 0.1, symbol="C"), trade(2, 0.2, symbol="B"))
    )
    assert output.bars["trade_count"].tolist() == [1, 2]
    assert output.rejected["row"].tolist() == [2]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"kind": "dolar", "threshold": 1}, VocabularyError, "did you mean 'dollar'"),
        ({"kind": "tick"}, BarConfigError, "must be above 0"),
        ({"kind": "volume", "threshold": math.nan}, BarConfigError, "must be above 0"),
        ({"kind": "tick_imbalance", "min_ticks": 0}, BarConfigError, "in this order"),
        ({"kind": "tick_imbalance", "span": 0}, BarConfigError, "span"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], error: type[Exception], message: str) -> None:
    """One sentence that names the setting."""
    with pytest.raises(error, match=message):
        AlternativeBarConfig(**values)


def test_damaged_and_foreign_states_are_refused() -> None:
    """Cut, flipped or made with other settings."""
    config = AlternativeBarConfig(kind="tick", threshold=3)
    engine = AlternativeBarEngine(config)
    engine.process(frame(trade(1, 0.1), trade(2, 0.2, symbol="B")))
    data = engine.snapshot()
    for broken in (b"", data[:-1], data[:20], data[:-1] + bytes([data[-1] ^ 1]), bytes(len(data))):
        with pytest.raises(SnapshotError):
            AlternativeBarEngine.restore(config, broken)
    other: Kind = "volume"
    with pytest.raises(SnapshotConfigError):
        AlternativeBarEngine.restore(AlternativeBarConfig(kind=other, threshold=3), data)


def test_a_key_that_stands_twice_in_a_dictionary_is_one_symbol() -> None:
    """Both of its codes lead to the same bar, and the next new symbol has a bar of its own."""
    engine = AlternativeBarEngine(AlternativeBarConfig(kind="tick", threshold=3))
    twice = TradeBatch(
        source="test",
        watermark_us=0,
        symbols=("binance:A", "binance:A"),
        columns={**frame(trade(1, 0.1), trade(2, 0.2)).columns, "symbol_code": np.array([0, 1], np.int32)},
    )
    engine.process(twice)
    output = engine.process(frame(trade(1, 0.3, symbol="B"), trade(3, 0.4, symbol="A")))
    assert output.bars["trade_count"].tolist() == [3]
    assert output.symbols[output.bars["symbol_code"][0]] == "binance:A"


def test_a_refused_row_takes_no_room() -> None:
    """Room for one symbol is not taken by one whose only trade is refused."""
    engine = AlternativeBarEngine(AlternativeBarConfig(kind="tick", threshold=1, max_symbols=1))
    output = engine.process(frame(trade(1, 0.1, price=math.nan, symbol="A"), trade(1, 0.2, symbol="B"), trade(2, 0.3, symbol="A")))
    assert list(zip(output.rejected["row"].tolist(), output.rejected["reason"].tolist(), strict=True)) == [(0, 2), (2, 8)]
    assert output.bars["symbol_code"].tolist() == [1]


def test_equal_state_has_equal_bytes_however_the_trades_came() -> None:
    """The order of a dictionary and the cuts between batches leave no trace in the state."""
    config = AlternativeBarConfig(kind="tick", threshold=5)
    rows = [trade(1, 0.1, symbol="B"), trade(1, 0.2, symbol="A"), trade(2, 0.3, symbol="B")]
    whole, single = AlternativeBarEngine(config), AlternativeBarEngine(config)
    whole.process(frame(*rows, symbols=("binance:A", "binance:B", "binance:C")))
    for row in rows:
        single.process(frame(row))
    assert whole.snapshot() == single.snapshot()


def test_trades_of_unknown_side_take_the_sign_of_the_tick_rule() -> None:
    """Side 0 is a buy when the price rose, a sell when it fell, and like the last change when it stayed."""
    engine = AlternativeBarEngine(AlternativeBarConfig(kind="tick_imbalance", initial_ticks=6, sign="side", min_ticks=1))
    prices, sides = [10.0, 11.0, 11.0, 12.0, 12.0, 11.0], [0, 0, 0, -1, 0, 0]
    output = engine.process(
        frame(*(trade(n + 1, n / 10, price, side=side) for n, (price, side) in enumerate(zip(prices, sides, strict=True))))
    )
    assert output.bars["progress"].tolist() == [1 + 1 + 1 - 1 + 1 - 1]


def test_the_takers_side_is_the_default_sign() -> None:
    """Where nothing is said, the signs of trades are what the exchange says."""
    assert AlternativeBarConfig(kind="tick_imbalance").sign == "side"


def test_copied_constants_equal_those_of_time_bars() -> None:
    """The kernel holds its own copies, because numba's cache looks at the kernel's own file only."""
    names = [name for name in vars(kernel) if name.startswith("R_")] + ["MAX64", "MAX_VALUE"]
    assert len(names) == 10
    assert {name: getattr(kernel, name) for name in names} == {name: getattr(time_kernel, name) for name in names}
    assert not [name for name, value in vars(kernel).items() if inspect.ismodule(value) and value.__name__.startswith("processors")]


def test_ids_that_contradict_times_are_refused_by_name() -> None:
    """The order of trades makes these bars: where ids and times disagree, no order is right, and no trade may vanish."""
    rows = pl.DataFrame([trade(1, 0.1), trade(3, 0.2), trade(2, 0.3), trade(4, 0.4)])
    for door in (
        lambda: build_tick(rows, 2),
        lambda: build_volume(rows, 2.0),
        lambda: build_dollar(rows, 9.0),
        lambda: build_imbalance(rows),
    ):
        with pytest.raises(TradeInputError, match=r"Row 2 .*binance:BTC-USDT.* id 2 .* id 3.*must rise with time"):
            door()


def test_an_id_with_two_meanings_is_refused_by_name() -> None:
    """Two different trades cannot have one id."""
    rows = pl.DataFrame([trade(2, 0.2), trade(1, 0.1), trade(2, 0.2, price=101.0)])
    with pytest.raises(TradeInputError, match=r"Row 2 .*id 2 .*other values"):
        build_tick(rows, 1)


def test_batch_doors_take_rows_in_any_order_and_each_trade_once() -> None:
    """Rows are put in order; the same trade twice, received at another time, counts once."""
    ordered = pl.DataFrame([trade(number, number // 3 / 10, 100.0 + number, symbol=symbol) for number in range(20) for symbol in "AB"])
    again = ordered.with_columns(receive_time_us=pl.col("receive_time_us") + 7)
    expected = build_tick(ordered, 5)
    assert expected["trade_count"].sum() == 40
    assert build_tick(pl.concat([ordered, again]).sample(fraction=1.0, shuffle=True, seed=5), 5).equals(expected)


def test_batch_doors_take_any_number_of_symbols() -> None:
    """The bound on a partition's symbols is one of the stream: here it would only lose trades."""
    config = AlternativeBarConfig(kind="tick_imbalance", initial_ticks=1, min_ticks=1, max_symbols=1)
    rows = pl.DataFrame([trade(1, 0.1, symbol=symbol) for symbol in "ABC"])
    assert build_imbalance(rows, config=config)["symbol"].to_list() == ["A", "B", "C"]
    assert build_tick(rows.clear(), 5).is_empty()
