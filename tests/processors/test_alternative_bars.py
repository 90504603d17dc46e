"""Tick, volume, dollar and imbalance bars against plain loops, and their state across batches and restarts."""

from __future__ import annotations

import inspect
import math
import zlib
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processors import _alternative_kernel as kernel
from processors import _bars_kernel as time_kernel
from processors.alternative_bars import (
    REJECT_REASONS,
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
from schemas.frames import END_OF_SOURCE
from tests.processors.market_data import binance_capture
from tests.processors.trade_batches import batches, frame, generated_trades, trade

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
    """The same bars of one symbol by a plain loop over exact sums, the open one last."""
    bars: list[dict[str, Any]] = []
    open_bar: list[dict[str, Any]] = []
    carried, measures, flows, sign, previous = 0.0, [], [], 1, 0.0
    expected_ticks, expected_flow, expected_absolute, threshold = float(config.initial_ticks), 0.0, 0.0, config.threshold
    alpha = 2.0 / (config.span + 1)
    for row in trades:
        open_bar.append(row)
        measure = {"t": 1.0, "v": row["size"], "d": row["price"] * row["size"]}[config.kind[0]]
        if row["price"] != previous:
            sign = 1 if row["price"] > previous else -1
        previous = row["price"]
        measures.append(measure)
        flows.append(measure * (row["side"] if config.sign == "side" and row["side"] else sign))
        progress = math.fsum(flows if config.is_imbalance else [carried, *measures])
        count = len(open_bar)
        if not config.is_imbalance:
            closes = progress >= threshold
        elif not bars:
            closes = count >= config.initial_ticks
        else:
            closes = (abs(progress) >= threshold and count >= config.min_ticks) or count >= config.max_ticks
        if not closes and row is not trades[-1]:
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
                "imbalance": math.fsum(flows),
                "complete": int(closes),
            }
        )
        if config.is_imbalance:
            weight = 1.0 if len(bars) == 1 else alpha
            expected_ticks = min(max(expected_ticks + alpha * (count - expected_ticks), config.min_ticks), config.max_ticks)
            expected_flow += weight * (progress / count - expected_flow)
            expected_absolute += weight * (sum(measures) / count - expected_absolute)
            threshold = expected_ticks * max(abs(expected_flow), config.min_imbalance * expected_absolute)
        carried = progress % threshold if config.carry_over else 0.0
        measures, flows, open_bar = [], [], []
    return bars


@settings(max_examples=20, deadline=None)
@given(trades=generated_trades())
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.kind}{'+carry' * config.carry_over}")
def test_bars_equal_those_of_a_plain_loop(config: AlternativeBarConfig, trades: pl.DataFrame) -> None:
    """Every column of every bar, for each symbol, sums bit for bit."""
    engine = AlternativeBarEngine(config)
    batch, end = batches(trades, rows=1000)
    bars, last = engine.process(batch).bars, engine.process(end).bars
    assert bars["complete"].all() and not last["complete"].any()
    for code, key in enumerate(batch.symbols):
        expected = by_hand(trades.filter(pl.col("symbol") == key.split(":")[1]).to_dicts(), config)
        got = {
            name: [*bars[name][bars["symbol_code"] == code].tolist(), *last[name][last["symbol_code"] == code].tolist()] for name in bars
        }
        assert got["bar_number"] == list(range(len(expected)))
        for name in expected[0]:
            assert got[name] == [bar[name] for bar in expected], name
        if config.is_imbalance:
            assert got["progress"] == got["imbalance"]


@settings(max_examples=10, deadline=None)
@given(trades=generated_trades(), rows=st.integers(1, 40), every=st.integers(1, 4))
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.kind}{'+carry' * config.carry_over}")
def test_batches_repeats_and_restarts_change_no_bit(config: AlternativeBarConfig, trades: pl.DataFrame, rows: int, every: int) -> None:
    """Any batch sizes, everything sent twice, a restore after every few batches: the bars and the state of one batch."""
    whole = AlternativeBarEngine(config)
    expected = [whole.process(batch).bars for batch in batches(trades, rows=1000)]
    engine = AlternativeBarEngine(config)
    parts = []
    for number, batch in enumerate(batches(trades, rows=rows)):
        if number % every == 0:
            data = engine.snapshot()
            engine = AlternativeBarEngine.restore(config, data)
            assert engine.snapshot() == data
        parts.append(engine.process(batch).bars)
        again = engine.process(batch)
        assert again.duplicates == len(batch.columns.get("price", ()))
        assert not len(again.bars["open"])
    for name in expected[0]:
        assert np.concatenate([part[name] for part in parts]).tobytes() == np.concatenate([part[name] for part in expected]).tobytes()
    assert engine.snapshot() == whole.snapshot()


def test_doors_on_a_capture() -> None:
    """A recorded file: each bar reaches its threshold and would not have without its last trade; the open one comes last."""
    trades = binance_capture("usdm_btcusdt_20240808.ws.gz")
    ticks = build_tick(trades, 100)
    assert set(ticks["trade_count"][:-1]) == {100}
    assert ticks.height == math.ceil(trades.height / 100)
    assert not ticks["complete"][-1]
    volume = build_volume(trades, 5.0)
    assert volume["volume"][:-1].min() >= 5.0  # type: ignore[operator]
    dollar = build_dollar(trades, 1e6, carry_over=True)
    assert abs(dollar["quote_volume"][:-1].mean() / 1e6 - 1) < 0.05  # type: ignore[operator]
    for bars in (ticks, volume, dollar):
        assert bars["complete"][:-1].all()
        assert bars["trade_count"].sum() == trades.height
        assert bars["open_time"].dtype == pl.Datetime("us", "UTC")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.kind}{'+carry' * config.carry_over}")
def test_bars_of_a_capture_hold_every_trade_once(config: AlternativeBarConfig) -> None:
    """Closed bars and the open one follow each other without a hole; their exact sums are those of the recorded trades between their ids."""
    trades = binance_capture("spot_btcusdt_20240808.ws.gz")
    engine = AlternativeBarEngine(config)
    parts = [engine.process(batch).bars for batch in batches(trades, rows=999)]
    bars = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert bars["complete"][:-1].all()
    assert bars["trade_count"].sum() == trades.height
    first = bars["first_trade_id"] - int(trades["trade_id"][0])
    assert first.tolist() == [0, *np.cumsum(bars["trade_count"])[:-1].tolist()]
    size, price = trades["size"].to_numpy(), trades["price"].to_numpy()
    for name, values in (("volume", size), ("quote_volume", size * price), ("buy_volume", size * (trades["side"].to_numpy() > 0))):
        assert bars[name].tolist() == [math.fsum(part) for part in np.split(values, first[1:])], name
        assert math.isclose(math.fsum(bars[name]), math.fsum(values), rel_tol=1e-14)


@pytest.mark.parametrize("kind", ["tick", "volume", "dollar"])
def test_imbalance_bars_of_a_capture_stay_within_their_bounds(kind: Any) -> None:
    """Expectations neither run away nor collapse: some bars, none beyond the bounds, each closed by its imbalance or by the bound."""
    bars = build_imbalance(binance_capture("usdm_btcusdt_20240808.ws.gz"), kind).filter("complete")
    config = AlternativeBarConfig(kind=f"{kind}_imbalance")  # type: ignore[arg-type]
    assert 20 < bars.height < 2_000
    assert bars["trade_count"].min() >= config.min_ticks  # type: ignore[operator]
    assert bars["trade_count"].max() <= config.max_ticks  # type: ignore[operator]
    later = bars.filter((pl.col("bar_number") > 0) & (pl.col("trade_count") < config.max_ticks))
    assert (later["progress"].abs() >= later["threshold"]).all()


FLOWS: dict[str, tuple[Any, Any]] = {
    "one price, one side": (lambda n: 100.0, lambda n: 1),
    "rising, one side": (lambda n: 100.0 + n / 100, lambda n: 1),
    "falling, one side": (lambda n: 1000.0 - n / 100, lambda n: -1),
    "alternating": (lambda n: 100.0 + n % 2, lambda n: 1 if n % 2 else -1),
    "nearly balanced": (lambda n: 100.0 + n % 2, lambda n: 1 if n % 2 or n % 100 == 0 else -1),
    "no size": (lambda n: 100.0, lambda n: 1),
}


@pytest.mark.parametrize("sign", ["side", "tick_rule"])
@pytest.mark.parametrize("kind", ["tick_imbalance", "volume_imbalance", "dollar_imbalance"])
@pytest.mark.parametrize("flow", FLOWS)
def test_constant_and_one_sided_flows_stay_bounded(flow: str, kind: Any, sign: Any) -> None:
    """Flows in which unbounded expectations explode or collapse: bars go on closing, none outside its bounds."""
    price, side = FLOWS[flow]
    config = AlternativeBarConfig(kind=kind, initial_ticks=50, min_ticks=10, max_ticks=400, sign=sign)
    engine = AlternativeBarEngine(config)
    rows = [trade(n, n / 1000, price(n), side=side(n), size=0.0 if flow == "no size" else 1.0) for n in range(20_000)]
    bars = engine.process(frame(*rows)).bars
    assert bars["trade_count"].min() >= config.min_ticks
    assert bars["trade_count"].max() <= config.max_ticks
    assert np.isfinite(bars["threshold"]).all()
    assert 20_000 / config.max_ticks <= len(bars["open"]) <= 20_000 / config.min_ticks
    engine = AlternativeBarEngine.restore(config, engine.snapshot())
    if flow == "one price, one side":
        assert set(bars["trade_count"].tolist()) == {50}, "a steady flow of one side neither shortens nor stretches its bars"


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
    assert REJECT_REASONS[output.rejected["reason"][0]][0] == "no_threshold"


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"kind": "dolar", "threshold": 1}, VocabularyError, "did you mean 'dollar'"),
        ({"kind": "tick"}, BarConfigError, "must be above 0"),
        ({"kind": "volume", "threshold": math.nan}, BarConfigError, "must be above 0"),
        ({"kind": "tick_imbalance", "min_ticks": 0}, BarConfigError, "in this order"),
        ({"kind": "tick_imbalance", "span": 0}, BarConfigError, "span"),
        ({"kind": "tick_imbalance", "sign": "sid"}, VocabularyError, "did you mean 'side'"),
        ({"kind": "tick_imbalance", "thresholds": {"binance:A": 3}}, BarConfigError, "initial_ticks of binance:A"),
        ({"kind": "tick", "threshold": -1, "thresholds": {"binance:A": 3}}, BarConfigError, "must be above 0"),
        ({"kind": "tick", "thresholds": {"threshold": math.inf}}, BarConfigError, "must be above 0"),
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


def test_an_open_bar_comes_incomplete_at_the_end_of_its_source_and_goes_on_after_it() -> None:
    """The end is a heartbeat with no symbols: the open bar is written once, and closes complete under the same number."""
    engine = AlternativeBarEngine(AlternativeBarConfig(kind="tick", threshold=3))
    engine.process(frame(*(trade(n, n / 10, side=side) for n, side in enumerate([1, 1, 1, 1, -1]))))
    end = TradeBatch(source="test", watermark_us=0, flags=END_OF_SOURCE)
    output = engine.process(end)
    assert output.symbols == ("binance:BTC-USDT",)
    wanted = {"symbol_code": 0, "bar_number": 1, "trade_count": 2, "last_trade_id": 4, "complete": 0, "imbalance": 0.0, "progress": 2.0}
    assert {name: output.bars[name].tolist() for name in wanted} == {name: [value] for name, value in wanted.items()}
    assert not len(engine.process(end).bars["open"])
    bars = engine.process(frame(trade(5, 0.6), source="next")).bars
    wanted = {"bar_number": 1, "trade_count": 3, "first_trade_id": 3, "complete": 1, "imbalance": 1.0}
    assert {name: bars[name].tolist() for name in wanted} == {name: [value] for name, value in wanted.items()}
    assert bars["complete"].dtype == np.int8


def test_a_bar_across_a_gap_between_sources_is_not_complete() -> None:
    """Ids missing where one source ended and the next began; the bar after it is complete again."""
    engine = AlternativeBarEngine(AlternativeBarConfig(kind="tick", threshold=2))
    engine.process(frame(trade(1, 0.1), flags=END_OF_SOURCE))
    output = engine.process(frame(trade(5, 0.5), trade(6, 0.6), trade(9, 0.9), source="next"))
    assert output.bars["complete"].tolist() == [0, 1]


def test_the_end_of_a_source_leaves_the_bars_of_others() -> None:
    """Only open bars whose newest trade is of the source that ends; rows of the last frame count, codes fit the keys given."""
    engine = AlternativeBarEngine(AlternativeBarConfig(kind="tick", threshold=9))
    engine.process(frame(trade(1, 0.1, symbol="A"), trade(1, 0.1, symbol="B"), trade(1, 0.1, symbol="C"), source="one"))
    engine.process(frame(trade(2, 0.2, symbol="B"), source="other"))
    output = engine.process(frame(trade(1, 0.3, symbol="D"), source="one", flags=END_OF_SOURCE, symbols=("binance:D", "binance:D")))
    assert [output.symbols[code] for code in output.bars["symbol_code"]] == ["binance:A", "binance:C", "binance:D"]
    output = engine.process(frame(source="other", flags=END_OF_SOURCE))
    assert [output.symbols[code] for code in output.bars["symbol_code"]] == ["binance:B"]


def test_a_late_trade_is_refused_and_not_taken_for_a_duplicate() -> None:
    """Ids left out are remembered; of those too long ago to be remembered it is said that they came too late."""
    engine = AlternativeBarEngine(AlternativeBarConfig(kind="tick", threshold=100))
    output = engine.process(frame(trade(1, 0.1), trade(3, 0.2), trade(2, 0.3), trade(4, 0.4), trade(3, 0.2), trade(2, 0.3)))
    assert (output.accepted, output.duplicates, output.rejected["row"].tolist()) == (3, 1, [2, 5])
    assert {REJECT_REASONS[reason][0] for reason in output.rejected["reason"].tolist()} == {"too_late"}
    engine.process(frame(*(trade(n, n / 10) for n in range(6, 22, 2))))
    output = engine.process(frame(trade(1, 0.1), trade(3, 0.2), trade(4, 0.4), trade(5, 0.5), trade(6, 0.6), trade(20, 2.0)))
    assert output.rejected["row"].tolist() == [0, 3], "1 lies before the oldest of eight holes: it may be either"
    assert output.duplicates == 4


def resealed(data: bytes, body: bytes) -> bytes:
    """A state with another body and the checksum that fits it."""
    return data[:8] + zlib.crc32(body).to_bytes(4, "little") + data[12:16] + body


def some_state(config: AlternativeBarConfig) -> bytes:
    """The state after a few trades with a hole."""
    engine = AlternativeBarEngine(config)
    engine.process(
        frame(*(trade(n, n / 10, 100.0 + n % 3, symbol=symbol) for n in (1, 2, 3, 6, 7, 8, 9, 10, 11, 12, 13) for symbol in "AB"))
    )
    return engine.snapshot()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.kind}{'+carry' * config.carry_over}")
@pytest.mark.parametrize(
    ("array", "column", "value"),
    [
        ("ints", kernel.LAST_SEEN, -1),
        ("ints", kernel.LAST_SEEN, 2**62),
        ("ints", kernel.KNOWN_FROM, 99),
        ("ints", kernel.NUMBER, -1),
        ("ints", kernel.COUNT, -1),
        ("ints", kernel.COUNT, 10**6),
        ("ints", kernel.OPEN_T, 0),
        ("ints", kernel.RECV, -5),
        ("ints", kernel.SIGN, 0),
        ("ints", kernel.SOURCE, -1),
        ("ints", kernel.ENDED, 2),
        ("ints", kernel.HOLES, 9),
        ("ints", kernel.HOLES, 2),
        ("ints", kernel.HOLE, 5_000),
        ("floats", kernel.LOW, -1.0),
        ("floats", kernel.HIGH, 1.0),
        ("floats", kernel.VH, math.nan),
        ("floats", kernel.AL, math.inf),
        ("floats", kernel.THRESHOLD, -3.0),
        ("floats", kernel.E_ABS, -1.0),
    ],
)
def test_a_tampered_state_with_a_right_checksum_is_refused(config: AlternativeBarConfig, array: str, column: int, value: float) -> None:
    """What no trades could have led to is not continued; the sentence names the symbol."""
    data = some_state(config)
    length = 8 * 2 * (kernel.STATE_INTS + kernel.STATE_FLOATS)
    body = bytearray(data[16:])
    ints = np.frombuffer(body, np.int64, 2 * kernel.STATE_INTS, len(body) - length).reshape(2, -1)
    floats = np.frombuffer(body, np.float64, 2 * kernel.STATE_FLOATS, len(body) - length + ints.nbytes).reshape(2, -1)
    (ints if array == "ints" else floats)[1, column] = value
    with pytest.raises(SnapshotError, match="state of binance:B contradicts itself"):
        AlternativeBarEngine.restore(config, resealed(data, bytes(body)))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tampered_state_is_refused_or_goes_on_in_bounds(data: st.DataObject) -> None:
    """Random bytes under a right checksum: SnapshotError, or an engine that goes on and whose own state is fine."""
    config = data.draw(st.sampled_from(CONFIGS))
    state = some_state(config)
    body = bytearray(state[16:])
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(body) - 1), st.integers(0, 255)), min_size=1, max_size=4)):
        body[at] = value
    try:
        engine = AlternativeBarEngine.restore(config, resealed(state, bytes(body)))
    except SnapshotError:
        return
    engine.process(frame(*(trade(n, n / 10, symbol=symbol) for n in range(5, 60) for symbol in "AB"), flags=END_OF_SOURCE))
    AlternativeBarEngine.restore(config, engine.snapshot())


def test_equal_settings_restore_each_other() -> None:
    """A threshold of 7 is one of 7.0; other thresholds are other settings."""
    data = AlternativeBarEngine(AlternativeBarConfig(kind="tick", threshold=7, thresholds={"binance:A": 3})).snapshot()
    AlternativeBarEngine.restore(AlternativeBarConfig(kind="tick", threshold=7.0, thresholds={"binance:A": 3.0}), data)
    with pytest.raises(SnapshotConfigError):
        AlternativeBarEngine.restore(AlternativeBarConfig(kind="tick", threshold=7.0, thresholds={"binance:A": 4.0}), data)
