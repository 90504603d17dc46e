"""The rules of bars, one at a time: closing, flat bars, revisions, ends, older stretches, live rows, bad input."""

from __future__ import annotations

import dataclasses
import math
import struct
import zlib
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processors import _bars_kernel as k
from processors.bars import REJECT_REASONS, BarBatches, BarConfig, BarEngine, TradeBatch, build
from processors.errors import BarConfigError, SnapshotConfigError, SnapshotError, TradeInputError
from schemas.errors import VocabularyError
from schemas.frames import END_OF_SOURCE
from tests.processors.market_data import newest
from tests.processors.trade_batches import START_US, batches, frame, generated_trades, play, rows_of, trade

CONFIG = BarConfig(timeframes=("1s", "1m"), live_interval_us=0)


def engine(**settings: Any) -> BarEngine:
    """An engine of 1s and 1m bars without live rows."""
    return BarEngine(dataclasses.replace(CONFIG, **settings))


def reasons(output: Any) -> list[str]:
    """Names of the reasons of the rejected rows."""
    return [REJECT_REASONS[code][0] for code in output.rejected["reason"].tolist()]


def picked(rows: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    """These columns of the rows."""
    return [tuple(row[name] for name in names) for row in rows]


# Closing.


def test_a_bar_closes_when_the_watermark_reaches_its_end_and_not_before() -> None:
    """[0, 1) is open while the watermark is at 0.999999 and final at 1.0."""
    bars = engine()
    assert rows_of(bars.process(frame(trade(1, 0.2), watermark_s=0.999999))) == []
    closed = rows_of(bars.process(frame(watermark_s=1.0)))
    assert picked(closed, "at", "timeframe_s", "is_final", "revision", "trade_count") == [(0.0, 1, 1, 0, 1)]


def test_a_watermark_never_goes_back() -> None:
    """An older watermark of the same source changes nothing."""
    bars = engine()
    bars.process(frame(trade(1, 0.2), watermark_s=1.5))
    assert rows_of(bars.process(frame(watermark_s=0.1))) == []
    assert bars.watermark_us == START_US + 1_500_000


def test_each_source_closes_only_its_own_symbols() -> None:
    """The clock of a symbol is the largest watermark of the sources that bring it."""
    bars = engine()
    bars.process(frame(trade(1, 0.2, symbol="A"), watermark_s=0.5, source="a"))
    bars.process(frame(trade(1, 0.2, symbol="B"), watermark_s=0.5, source="b"))
    closed = rows_of(bars.process(frame(watermark_s=5.0, source="a")))
    assert {row["key"] for row in closed} == {"binance:A"}
    closed = rows_of(bars.process(frame(trade(2, 0.7, symbol="B"), watermark_s=0.5, source="a")))
    assert picked(closed, "key", "at", "trade_count")[0] == ("binance:B", 0.0, 2), "the source that is ahead brings it now"


def test_a_symbol_brought_by_a_source_that_is_ahead_closes_at_once() -> None:
    """No further boundary is needed: the second source's watermark has passed the bar already."""
    bars = engine()
    bars.process(frame(trade(1, 0.2), watermark_s=0.3, source="slow"))
    bars.process(frame(trade(7, 8.0, symbol="OTHER"), watermark_s=8.5, source="fast"))
    output = rows_of(bars.process(frame(trade(2, 0.4), watermark_s=8.6, source="fast")), timeframe_s=1)
    assert ("binance:BTC-USDT", 0.0, 2) in picked(output, "key", "at", "trade_count")


def test_open_and_close_go_by_time_and_id_not_by_arrival() -> None:
    """Trades of one bar in the wrong order, two of them at the same microsecond."""
    bars = engine()
    bars.process(frame(trade(3, 0.5, 103), trade(5, 0.9, 105), trade(2, 0.5, 102), trade(4, 0.9, 104), watermark_s=0.9))
    (bar,) = rows_of(bars.process(frame(watermark_s=1.0)))
    assert (bar["open"], bar["close"], bar["first_trade_id"], bar["last_trade_id"]) == (102, 105, 2, 5)


def test_sums_are_the_correctly_rounded_exact_sums() -> None:
    """One large and thousands of small sizes: plain addition in this order loses all of the small ones."""
    bars = engine()
    sizes = [2.0**53, *[0.5] * 4096]
    bars.process(frame(*(trade(number, 0.5, 1.0, size) for number, size in enumerate(sizes)), watermark_s=0.5))
    (bar,) = rows_of(bars.process(frame(watermark_s=1.0)))
    assert bar["volume"] == bar["buy_volume"] == bar["quote_volume"] == math.fsum(sizes)
    assert sum(sizes) != math.fsum(sizes)


# Flat bars.


def test_silence_is_filled_with_flat_bars_at_the_previous_close() -> None:
    """Three seconds without trades give three bars; a minute too."""
    bars = engine()
    bars.process(frame(trade(1, 0.1, 100), trade(2, 0.2, 101), watermark_s=0.2))
    flats = rows_of(bars.process(frame(watermark_s=4.0)), timeframe_s=1)[1:]
    assert picked(flats, "at", "open", "close", "vwap", "volume", "trade_count", "first_trade_id", "last_receive_time_us") == [
        (at, 101.0, 101.0, 101.0, 0.0, 0, -1, 0) for at in (1.0, 2.0, 3.0)
    ]


def test_flat_bars_stop_after_the_limit_and_the_break_is_marked() -> None:
    """After max_flat_bars nothing is written until the symbol trades again; that bar is not complete, the next one is."""
    bars = engine(timeframes=("1s",), max_flat_bars=3)
    bars.process(frame(trade(1, 0.1), watermark_s=0.1))
    silent = [rows_of(bars.process(frame(watermark_s=float(second)))) for second in range(1, 9)]
    assert [len(rows) for rows in silent] == [1, 1, 1, 1, 0, 0, 0, 0]
    bars.process(frame(trade(2, 50.5), trade(3, 51.5), watermark_s=51.5))
    assert picked(rows_of(bars.process(frame(watermark_s=52.0))), "at", "complete") == [(51.0, 1)]
    again = engine(timeframes=("1s",), max_flat_bars=3)
    again.process(frame(trade(1, 0.1), watermark_s=0.1))
    jumped = rows_of(again.process(frame(trade(2, 50.5), watermark_s=51.0)))
    assert picked(jumped, "at", "complete", "trade_count") == [(0.0, 0, 1), (1.0, 1, 0), (2.0, 1, 0), (3.0, 1, 0), (50.0, 0, 1)]


def test_months_of_silence_cost_no_more_than_the_limit() -> None:
    """Old data, then today's: the flat bars in between are bounded, per gap and per frame."""
    bars = BarEngine(BarConfig(live_interval_us=0, max_flat_rows_per_frame=10_000))
    bars.process(frame(trade(1, 0.1), watermark_s=0.1))
    output = bars.process(frame(trade(2, 200 * 86_400.0), watermark_s=200 * 86_400.0))
    assert 5_000 < len(output.bars["open"]) < 10_100
    assert output.accepted == 1


def test_a_frame_that_crosses_no_boundary_visits_no_symbol() -> None:
    """Ten thousand symbols, a heartbeat inside the second: nothing is written, and nothing in the state changes but counters."""
    bars = engine()
    count = 10_000
    columns: dict[str, Any] = {
        "symbol_code": np.arange(count, dtype=np.int32),
        "trade_id": np.ones(count, np.int64),
        "price": np.ones(count),
        "size": np.ones(count),
        "side": np.ones(count, np.int8),
        "exchange_time_us": np.full(count, START_US),
        "receive_time_us": np.full(count, START_US),
    }
    keys = tuple(f"binance:S{number}" for number in range(count))
    bars.process(TradeBatch(source="s", watermark_us=START_US, symbols=keys, columns=columns))
    before = bars._state.slot_i.copy()
    assert rows_of(bars.process(frame(watermark_s=0.5, source="s"))) == []
    assert np.array_equal(before, bars._state.slot_i)


# Late trades.


def test_a_late_trade_revises_every_bar_it_touches_once_a_frame() -> None:
    """Two late trades of one second: one new row of the second and one of the minute, revision 1, still final."""
    bars = engine()
    bars.process(frame(trade(1, 9.1, 100), trade(9, 10.5, 110), watermark_s=11.0))
    output = bars.process(frame(trade(2, 9.2, 120), trade(3, 9.3, 90), watermark_s=11.0))
    rows = rows_of(output)
    assert picked(rows, "timeframe_s", "at", "revision", "is_final", "trade_count", "high", "low", "close") == [
        (1, 9.0, 1, 1, 3, 120.0, 90.0, 90.0),
        (60, -50.0, 1, 1, 3, 120.0, 90.0, 90.0),
    ]
    assert (output.accepted, output.late) == (2, 2)


def test_a_late_trade_moves_the_flat_bars_after_it() -> None:
    """A trade in a second that had been flat: it and the flat bars up to the next trade are written again."""
    bars = engine(timeframes=("1s",))
    bars.process(frame(trade(1, 0.1, 100), trade(9, 5.5, 110), watermark_s=6.0))
    rows = rows_of(bars.process(frame(trade(2, 2.2, 105), watermark_s=6.0)))
    assert picked(rows, "at", "revision", "close", "trade_count") == [(2.0, 1, 105.0, 1), (3.0, 1, 105.0, 0), (4.0, 1, 105.0, 0)]
    rows = rows_of(bars.process(frame(trade(3, 3.2, 106), watermark_s=6.0)))
    assert picked(rows, "at", "revision", "close", "trade_count") == [(3.0, 2, 106.0, 1), (4.0, 2, 106.0, 0)]


def test_a_trade_beyond_the_revision_window_is_too_late() -> None:
    """It is refused with its reason, changes nothing, and stays unseen: sent again it is refused again, not taken for a duplicate."""
    bars = engine(revision_window_us=10_000_000)
    bars.process(frame(trade(1, 0.1), trade(5, 60.0), watermark_s=60.0))
    for _ in range(2):
        output = bars.process(frame(trade(2, 49.9), trade(3, 50.1), watermark_s=60.0))
        assert reasons(output) == ["too_late"]
        assert output.rejected["row"].tolist() == [0]
    assert (output.accepted, output.duplicates) == (0, 1)


def test_a_trade_older_than_the_first_makes_the_bars_before_it() -> None:
    """The first trade to arrive need not be the first to have happened."""
    bars = engine(timeframes=("1s",))
    bars.process(frame(trade(5, 5.5, 105), watermark_s=6.0))
    rows = rows_of(bars.process(frame(trade(2, 2.5, 102), watermark_s=6.0)))
    assert picked(rows, "at", "revision", "close", "trade_count") == [(2.0, 0, 102.0, 1), (3.0, 0, 102.0, 0), (4.0, 0, 102.0, 0)]


# Ends.


def test_the_end_of_a_source_publishes_its_open_bars_as_not_complete() -> None:
    """The last bar of every timeframe, unfinished; a second end says nothing new."""
    bars = engine()
    bars.process(frame(trade(1, 10.0), trade(2, 11.3), watermark_s=11.3))
    rows = rows_of(bars.process(frame(watermark_s=11.3, flags=END_OF_SOURCE)))
    assert picked(rows, "at", "timeframe_s", "is_final", "complete", "trade_count") == [(11.0, 1, 1, 0, 1), (10.0, 60, 1, 0, 2)]
    assert rows_of(bars.process(frame(trade(1, 10.0), trade(2, 11.3), watermark_s=11.3, flags=END_OF_SOURCE))) == []


def test_a_bar_goes_on_where_the_next_file_begins_with_the_next_id() -> None:
    """The unfinished bar gets revision 1 and is complete: consecutive ids prove that nothing is missing."""
    bars = engine()
    bars.process(frame(trade(1, 10.0), trade(2, 11.3), watermark_s=11.3, flags=END_OF_SOURCE))
    bars.process(frame(trade(3, 11.4), watermark_s=11.4, source="next"))
    rows = rows_of(bars.process(frame(watermark_s=70.0, source="next")))
    assert picked(rows, "at", "timeframe_s", "revision", "complete", "trade_count")[0] == (11.0, 1, 1, 1, 2)
    assert (10.0, 60, 1, 1, 3) in picked(rows, "at", "timeframe_s", "revision", "complete", "trade_count")
    assert all(row["complete"] for row in rows)


def test_bars_that_touch_a_gap_between_two_files_are_not_complete() -> None:
    """Ids are missing between the end of one source and the next: what lies in between may be wrong, and says so."""
    bars = engine(timeframes=("1s",))
    bars.process(frame(trade(1, 10.0), trade(2, 11.3), watermark_s=11.3, flags=END_OF_SOURCE))
    rows = rows_of(bars.process(frame(trade(9, 13.4), trade(10, 14.5), watermark_s=15.0, source="next")))
    assert picked(rows, "at", "complete", "trade_count", "revision") == [(12.0, 0, 0, 0), (13.0, 0, 1, 0), (14.0, 1, 1, 0)]


def test_a_symbol_that_another_source_still_feeds_stays_open() -> None:
    """Two connections carry it: the end of one is not the end of the bar."""
    bars = engine()
    bars.process(frame(trade(1, 0.1), watermark_s=0.1, source="a"))
    bars.process(frame(trade(1, 0.1), watermark_s=0.1, source="b"))
    assert rows_of(bars.process(frame(watermark_s=0.2, source="a", flags=END_OF_SOURCE))) == []
    assert len(rows_of(bars.process(frame(watermark_s=0.2, source="b", flags=END_OF_SOURCE)))) == 2


def test_complete_means_covered_from_the_start() -> None:
    """The first bar began before the first trade; a symbol that a running source brings later was covered by its watermark."""
    bars = engine(timeframes=("1s",))
    bars.process(frame(trade(1, 0.5, symbol="A"), watermark_s=0.5))
    rows = rows_of(bars.process(frame(trade(2, 1.5, symbol="A"), trade(1, 3.5, symbol="B"), watermark_s=4.0)))
    assert sorted(picked(rows, "key", "at", "complete")) == [
        ("binance:A", 0.0, 0),
        ("binance:A", 1.0, 1),
        ("binance:A", 2.0, 1),
        ("binance:A", 3.0, 1),
        ("binance:B", 3.0, 1),
    ]


# Older stretches.


def stretch(first_id: int, first_s: float, count: int, step_s: float = 0.25) -> list[dict[str, Any]]:
    """Consecutive trades."""
    return [trade(first_id + n, first_s + n * step_s, 100.0 + n % 7, 1.0 + n % 3) for n in range(count)]


def test_an_older_file_after_a_newer_one_gives_its_bars() -> None:
    """Yesterday after today: every bar of the older stretch, complete from its second bar on, and the newer bars untouched."""
    bars = engine()
    newer, older = stretch(5000, 7200.0, 400), stretch(1000, 0.0, 400)
    today = play(bars, batches(pl.DataFrame(newer), rows=50, source="new"))
    yesterday = play(bars, batches(pl.DataFrame(older), rows=50, source="old"))
    assert sum(output.accepted for output in yesterday) == 400
    alone = newest(play(engine(), batches(pl.DataFrame(older), rows=50)))
    assert newest(yesterday).equals(alone)
    assert newest([*today, *yesterday]).height == newest(today).height + alone.height
    again = play(bars, [*batches(pl.DataFrame(older), rows=33, source="old"), *batches(pl.DataFrame(newer), rows=33, source="new")])
    assert sum(len(output.bars["open"]) for output in again) == 0
    assert sum(output.duplicates for output in again) == 800


def test_a_file_between_two_others_replaces_the_flat_bars_of_the_gap() -> None:
    """First, third, second: the bars of the second win over the flat ones that had filled the gap."""
    bars = engine()
    files = [stretch(1000, 0.0, 100), stretch(1100, 300.0, 100), stretch(1200, 600.0, 100)]
    outputs = []
    for number in (0, 2, 1):
        outputs += play(bars, batches(pl.DataFrame(files[number]), rows=30, source=f"file {number}"))
    assert sum(len(output.rejected["row"]) for output in outputs) == 0
    held = newest(outputs)
    in_order = newest([output for number in (0, 1, 2) for output in play(engine(), batches(pl.DataFrame(files[number]), rows=30))])
    kept = ["timeframe_s", "open_time_us", "open", "high", "low", "close", "volume", "quote_volume", "trade_count"]
    middle = in_order.filter(
        (pl.col("trade_count") > 0) & pl.col("open_time_us").is_between(START_US + 300_000_000, START_US + 325_000_000)
    )
    joined = middle.select(kept).join(held.select(kept), on=kept, how="inner")
    assert joined.height == middle.height


def test_two_files_of_one_minute_in_the_wrong_order_share_its_bar() -> None:
    """The later half first, then the earlier half by another source: the minute that both touch holds both."""
    bars = BarEngine(BarConfig(timeframes=("1s", "1m", "1d"), live_interval_us=0, revision_window_us=1_000_000))
    later, earlier = stretch(1200, 62.0, 40, 0.1), stretch(1000, 12.0, 90, 0.1)
    outputs = play(bars, batches(pl.DataFrame(later), rows=30, source="b"))
    outputs += play(bars, batches(pl.DataFrame(earlier), rows=30, source="a"))
    held = newest(outputs)
    whole = newest(play(BarEngine(bars.config), batches(pl.DataFrame([*earlier, *later]), rows=30)))
    kept = ["timeframe_s", "open_time_us", "open", "high", "low", "close", "volume", "quote_volume", "trade_count"]
    ours, theirs = (part.filter(pl.col("trade_count") > 0).select(kept) for part in (held, whole))
    assert ours.equals(theirs)


def ended_stretches(bars: BarEngine, starts: list[tuple[int, float]], symbol: str = "BTC-USDT") -> list[BarBatches]:
    """Older stretches of 40 trades, each by a source of its own that ends: (first id, first second)."""
    files = [pl.DataFrame([{**row, "symbol": symbol} for row in stretch(first_id, first_s, 40)]) for first_id, first_s in starts]
    return [output for n, file in enumerate(files) for output in play(bars, batches(file, rows=15, source=f"{symbol} {n}"))]


def test_an_older_stretch_goes_on_only_where_no_id_is_missing() -> None:
    """The next id joins second and minute; a stretch after missing ids is one of its own, and their first rows stand, not complete."""
    for second_id, trades, seam, complete in ((1040, 80, 5, 1), (1041, 40, 4, 0)):
        bars = engine()
        play(bars, batches(pl.DataFrame(stretch(9000, 9 * 86_400.0, 10)), rows=50, source="new", end=False))
        held = newest(ended_stretches(bars, [(1000, 100.0), (second_id, 109.9)]))
        minute = held.filter(pl.col("timeframe_s") == 60)
        assert (minute["trade_count"].to_list(), minute["complete"].to_list()) == ([trades], [0]), "it began before the first trade"
        second = held.filter((pl.col("timeframe_s") == 1) & (pl.col("open_time_us") == START_US + 109_000_000))
        assert (second["trade_count"].to_list(), second["complete"].to_list()) == ([seam], [complete])


def test_ended_stretches_that_wait_are_bounded_and_make_way() -> None:
    """Two a symbol wait for what follows them; where slots are short they are given to others, and the newest goes on all the same."""
    bars = BarEngine(BarConfig(timeframes=("1s", "1m", "1d"), live_interval_us=0, max_symbols=4))
    day = 86_400.0
    play(bars, batches(pl.DataFrame(stretch(9000, 30 * day, 10)), rows=50, source="new", end=False))
    ended_stretches(bars, [(1000 * n, n * day + 60.0) for n in range(1, 8)])
    kinds = bars._state.slot_i[:4, k.KIND].tolist()
    assert kinds.count(k.LANE) == 2
    others = [{**trade(1, 30 * day), "symbol": f"S{n}-USDT"} for n in range(2)]
    output = bars.process(frame(*others, watermark_s=30 * day, source="new"))
    assert len(output.rejected["row"]) == 0
    restored = BarEngine.restore(bars.config, bars.snapshot())
    for after in (bars, restored):
        held = newest(ended_stretches(after, [(7040, 7 * day + 70.0)]))
        assert held.filter(pl.col("timeframe_s") == 86_400)["trade_count"].to_list() == [80]
    assert restored.snapshot() == bars.snapshot()


def test_a_lone_late_trade_of_a_known_source_opens_no_stretch() -> None:
    """A straggler of the source that feeds the symbol is too late, even where ids have a hole."""
    bars = engine()
    bars.process(frame(trade(1, 0.1), trade(9, 100.0), watermark_s=100.0))
    assert reasons(bars.process(frame(trade(5, 50.0), watermark_s=100.0))) == ["too_late"]


# Live rows.


def test_live_rows_come_with_the_trade_and_then_at_most_each_interval() -> None:
    """Leading edge at once, then nothing for 250 ms, then the rest with the next frame that is due."""
    bars = engine(live_interval_us=250_000)
    first = rows_of(bars.process(frame(trade(1, 0.10, 100), watermark_s=0.1)))
    assert picked(first, "timeframe_s", "is_final", "close") == [(1, 0, 100.0), (60, 0, 100.0)]
    assert rows_of(bars.process(frame(trade(2, 0.11, 101), watermark_s=0.1))) == []
    assert rows_of(bars.process(frame(trade(3, 0.20, 102), watermark_s=0.1))) == []
    trailing = rows_of(bars.process(frame(trade(1, 0.40, 7, symbol="OTHER"), watermark_s=0.1)))
    mine = [row for row in trailing if row["key"] == "binance:BTC-USDT"]
    assert picked(mine, "timeframe_s", "is_final", "close", "trade_count") == [(1, 0, 102.0, 3), (60, 0, 102.0, 3)]


def test_a_heartbeat_brings_the_trailing_live_row() -> None:
    """After a burst the market is silent: the source's heartbeats carry the clock on."""
    bars = engine(live_interval_us=250_000)
    bars.process(frame(trade(1, 0.10, 100), watermark_s=0.1))
    bars.process(frame(trade(2, 0.11, 101), watermark_s=0.11))
    trailing = rows_of(bars.process(frame(watermark_s=0.5)))
    assert picked(trailing, "timeframe_s", "close") == [(1, 101.0), (60, 101.0)]
    assert rows_of(bars.process(frame(watermark_s=0.9))) == []


def test_live_rows_of_a_closed_bar_do_not_follow_it() -> None:
    """The 1s bar closes before its live row was due: only the minute, still open, is written live."""
    bars = engine(live_interval_us=250_000)
    bars.process(frame(trade(1, 0.90, 100), watermark_s=0.9))
    bars.process(frame(trade(2, 0.95, 101), watermark_s=0.95))
    rows = rows_of(bars.process(frame(watermark_s=1.3)))
    assert picked(rows, "timeframe_s", "is_final") == [(1, 1), (60, 0)]


# Bad input.


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"price": math.nan}, "not_finite"),
        ({"size": math.inf}, "not_finite"),
        ({"price": 0.0}, "bad_price"),
        ({"price": -1.0}, "bad_price"),
        ({"price": 1e300}, "bad_price"),
        ({"size": -0.1}, "bad_size"),
        ({"trade_id": -1}, "bad_trade_id"),
        ({"trade_id": 2**63 - 1}, "bad_trade_id"),
        ({"exchange_time_us": 0}, "time_out_of_range"),
        ({"exchange_time_us": -(2**63)}, "time_out_of_range"),
        ({"exchange_time_us": 2**63 - 1}, "time_out_of_range"),
        ({"exchange_time_us": 7_258_118_400_000_000}, "time_out_of_range"),  # the year 2200
        ({"exchange_time_us": START_US + 90_000_000_000}, "time_out_of_range"),  # a day ahead of the watermark
        ({"receive_time_us": 7_258_118_400_000_000}, "time_out_of_range"),
    ],
)
def test_a_bad_row_is_refused_and_its_neighbours_are_not(change: dict[str, Any], reason: str) -> None:
    """One reason a row; the bars are those of the good rows."""
    bars = engine()
    output = bars.process(frame(trade(1, 0.1), {**trade(2, 0.2), **change}, trade(3, 0.3), watermark_s=0.3))
    assert reasons(output) == [reason]
    assert output.rejected["row"].tolist() == [1]
    (bar,) = rows_of(bars.process(frame(watermark_s=1.0)))
    assert bar["trade_count"] == 2


def test_a_symbol_code_outside_the_dictionary_is_refused() -> None:
    """Codes index the frame's symbols; others are hostile."""
    batch = frame(trade(1, 0.1), trade(2, 0.2), watermark_s=0.3)
    batch.columns["symbol_code"][:] = [2**31 - 1, -1]
    assert reasons(engine().process(batch)) == ["bad_symbol_code"] * 2


def test_a_hostile_watermark_does_not_move_the_clock() -> None:
    """A watermark of the year 2099, a day ahead of all that was received: it is not believed."""
    bars = BarEngine(BarConfig())
    bars.process(frame(trade(1, 0.1), watermark_s=0.1))
    output = bars.process(dataclasses.replace(frame(trade(2, 0.2)), watermark_us=4_070_908_800_000_000))
    assert output.accepted == 1
    assert len(rows_of(output)) == 0
    assert bars.watermark_us == START_US + 100_000


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"price": None}, "lacks the column 'price'"),
        ({"price": np.ones(2, np.float32)}, "'price' is 1-dimensional float32"),
        ({"trade_id": np.ones((2, 1), np.int64)}, "'trade_id' is 2-dimensional"),
        ({"size": np.ones(3)}, "'size' has 3 rows, the columns before it have 2"),
    ],
)
def test_a_frame_whose_columns_do_not_fit_is_refused_whole(columns: dict[str, Any], message: str) -> None:
    """A typed error that names the column; the state is as before."""
    bars = engine()
    good = frame(trade(1, 0.1), trade(2, 0.2), watermark_s=0.3)
    bars.process(good)
    before = bars.snapshot()
    merged = {name: value for name, value in {**good.columns, **columns}.items() if value is not None}
    with pytest.raises(TradeInputError, match=message):
        bars.process(dataclasses.replace(good, columns=merged))
    assert bars.snapshot() == before


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_columns_never_break_the_engine(data: st.DataObject) -> None:
    """Values from anywhere in their dtypes: rows are accepted or refused, and what comes out is finite and ordered."""
    bars = engine(live_interval_us=1000, max_flat_bars=50, max_symbols=20)
    for _ in range(3):
        count = data.draw(st.integers(0, 20))
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        near = START_US + rng.integers(-100, 100, count) * 1_000_000
        wild = rng.integers(-(2**63), 2**63 - 1, count, dtype=np.int64)
        columns = {
            "symbol_code": rng.integers(-1, 5, count).astype(np.int32),
            "trade_id": np.where(rng.random(count) < 0.8, rng.integers(0, 50, count), wild),
            "price": np.where(
                rng.random(count) < 0.8, rng.random(count) + 1, rng.choice([np.nan, np.inf, -1.0, 0.0, 1e308, 5e-324], count)
            ),
            "size": np.where(rng.random(count) < 0.8, rng.random(count), rng.choice([np.nan, -np.inf, -1.0, 0.0, 1e308, 5e-324], count)),
            "side": rng.integers(-128, 128, count).astype(np.int8),
            "exchange_time_us": np.where(rng.random(count) < 0.8, near, wild),
            "receive_time_us": np.where(rng.random(count) < 0.8, near, wild),
        }
        watermark_us = data.draw(st.one_of(st.integers(START_US - 10**8, START_US + 10**8), st.integers(-(2**70), 2**70)))
        keys = tuple(f"x:{number}" for number in range(4))
        flags = data.draw(st.integers(0, 1))
        source = data.draw(st.sampled_from(["a", "b"]))
        output = bars.process(TradeBatch(source=source, watermark_us=watermark_us, symbols=keys, columns=columns, flags=flags))
        assert output.accepted + output.duplicates + len(output.rejected["row"]) == count
        for row in rows_of(output):
            assert row["low"] <= row["open"] <= row["high"] and row["low"] <= row["close"] <= row["high"]
            assert row["volume"] >= row["buy_volume"] >= 0
        bars = BarEngine.restore(bars.config, bars.snapshot())


# Settings and snapshots.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"timeframes": ()}, "No timeframe"),
        ({"revision_window_us": 3_600_000_000}, "shorten the window"),
        ({"max_symbols": 0}, "max_symbols is 0"),
        ({"live_interval_us": -1}, "live_interval_us is -1"),
        ({"id_intervals": 1}, "id_intervals is 1"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    """One sentence that names the setting."""
    with pytest.raises(BarConfigError, match=message):
        BarConfig(**values)


def test_an_unknown_timeframe_names_the_nearest_one() -> None:
    """The vocabulary's own error."""
    with pytest.raises(VocabularyError, match="did you mean '15m'"):
        BarConfig(timeframes=("15min",))


def filled() -> BarEngine:
    """An engine with symbols, holes, sealed bars and waiting live rows."""
    bars = BarEngine(BarConfig())
    trades = pl.DataFrame([*stretch(1000, 0.0, 40), *stretch(2000, 11.0, 40)])
    play(bars, batches(trades, rows=7, end=False))
    return bars


def test_a_snapshot_of_a_restored_engine_is_the_same_bytes() -> None:
    """The bytes are a function of the state."""
    data = filled().snapshot()
    assert BarEngine.restore(BarConfig(), data).snapshot() == data


def test_a_snapshot_of_other_settings_is_refused() -> None:
    """Bars of other timeframes or windows cannot be continued."""
    with pytest.raises(SnapshotConfigError, match="other settings"):
        BarEngine.restore(BarConfig(live_interval_us=0), filled().snapshot())


@settings(max_examples=100, deadline=None)
@given(at=st.floats(0, 1), bit=st.integers(0, 7), cut=st.floats(0, 1), kind=st.sampled_from(["flip", "cut", "noise"]))
def test_damaged_snapshots_raise_a_typed_error(at: float, bit: int, cut: float, kind: str) -> None:
    """A flipped bit, a cut end, noise: never a crash, never another exception."""
    data = bytearray(SNAPSHOT)
    if kind == "flip":
        data[int(at * (len(data) - 1))] ^= 1 << bit
    elif kind == "cut":
        data = data[: int(cut * (len(data) - 1))]
    else:
        data = bytearray(np.random.default_rng(int(at * 1e9)).bytes(int(cut * 4000)))
    with pytest.raises(SnapshotError):
        BarEngine.restore(BarConfig(), bytes(data))


@settings(max_examples=100, deadline=None)
@given(word=st.floats(0, 1), value=st.integers(-(2**63), 2**63 - 1))
def test_forged_snapshots_raise_a_typed_error_or_run(word: float, value: int) -> None:
    """Words changed and the checksum made right again: what the kernel would use as an index is checked, the rest is only wrong numbers."""
    head_size = struct.calcsize("<6sHII")
    magic, version, _, length = struct.unpack_from("<6sHII", SNAPSHOT)
    body = bytearray(SNAPSHOT[head_size:])
    words = (len(body) - length) // 8
    struct.pack_into("<q", body, length + 8 * int(word * (words - 1)), value)
    forged = struct.pack("<6sHII", magic, version, zlib.crc32(body), length) + bytes(body)
    try:
        bars = BarEngine.restore(BarConfig(), forged)
    except SnapshotError:
        return
    play(bars, batches(pl.DataFrame(stretch(3000, 30.0, 40)), rows=9))


SNAPSHOT = filled().snapshot()


# The door for notebooks.

GOOD = pl.DataFrame([trade(1, 0.1), trade(2, 0.2)]).with_columns(pl.col("side").cast(pl.Int8))


@pytest.mark.parametrize(
    ("trades", "message"),
    [
        (GOOD.drop("price"), "no column 'price'"),
        (GOOD.rename({"size": "sizes"}), "no column 'size': rename 'sizes'"),
        (GOOD.with_columns(price=pl.lit("x")), "Column 'price' is String: it must be Float64"),
        (GOOD.with_columns(price=pl.lit(math.nan)), r"Row 0 has price nan.*2 rows of 2"),
        (GOOD.with_columns(price=pl.lit(-1.0)), "Row 0 has price -1.0"),
        (GOOD.with_columns(size=pl.lit(None, pl.Float64)), "Row 0 has no 'size'"),
        (GOOD.with_columns(exchange_time_us=pl.col("exchange_time_us") // 1000), "must be microseconds since 1970"),
        (GOOD.with_columns(side=pl.lit("bid")), "Row 0 has side 'bid'"),
    ],
)
def test_bad_trades_are_refused_in_one_sentence(trades: pl.DataFrame, message: str) -> None:
    """The column, the row and what to do."""
    with pytest.raises(TradeInputError, match=message):
        build(trades, ["1m"])


def test_the_batch_door_takes_text_sides_and_datetimes() -> None:
    """As exports and notebooks have them; the columns are those of an export."""
    told = GOOD.with_columns(
        side=pl.when(pl.col("side") > 0).then(pl.lit("buy")).otherwise(pl.lit("sell")),
        exchange_time_us=pl.from_epoch("exchange_time_us", "us"),
    ).drop("receive_time_us")
    bars = build(told, ["1m"])
    assert bars.columns[:5] == ["exchange", "symbol", "timeframe", "open_time", "close_time"]
    assert bars.schema["open_time"] == pl.Datetime("us", "UTC")
    assert bars["volume"].to_list() == [2.0]
    assert bars.equals(build(GOOD, ["1m"]))


def test_no_trades_give_no_bars() -> None:
    """With the columns of bars."""
    empty = build(GOOD.clear(), ["1m", "1h"])
    assert empty.height == 0
    assert empty.schema == build(GOOD, ["1m"]).schema


def test_building_leaves_the_order_of_rows_and_repeats_out_of_account() -> None:
    """Shuffled and repeated trades give the same bars."""
    trades = pl.DataFrame(stretch(1, 0.0, 300))
    assert build(trades, ["1s", "1m"]).equals(build(pl.concat([trades, trades]).sample(fraction=1.0, shuffle=True, seed=1), ["1s", "1m"]))


@settings(max_examples=20, deadline=None)
@given(trades=generated_trades())
def test_another_symbol_never_changes_the_bars_of_one(trades: pl.DataFrame) -> None:
    """Each symbol is built as if it were alone."""
    together = build(trades, ["1s", "1m"])
    for symbol in trades["symbol"].unique().to_list():
        assert build(trades.filter(pl.col("symbol") == symbol), ["1s", "1m"]).equals(together.filter(pl.col("symbol") == symbol))
