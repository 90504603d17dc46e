"""Reconciling stored bars with stored trades: exactly what differs is published, once, and completeness follows from the evidence alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from processors import bars as door
from processors.reconcile import STORED, VALUES, Evidence, dense_runs, joined_runs, merged, rebuild, reconcile

START_US = 1_723_161_540_000_000
"""A minute before midnight, so that every timeframe has a boundary close by."""
END_US = START_US + 200_000_000
TIMEFRAMES = ("1s", "5m", "1d")
SECONDS = (1, 300, 86_400)
TRADES = st.lists(
    st.tuples(st.integers(0, 179_999), st.integers(1, 50), st.integers(1, 9), st.sampled_from([1, -1])), min_size=1, max_size=40
)
"""(ms after START_US, price, size, side)."""
INTERVALS = st.lists(st.tuples(st.integers(-5_000, 185_000), st.integers(-2_000, 90_000)), max_size=3)
"""(start, length), ms; a negative length has no end."""


def columns(trades: list[tuple[int, int, int, int]], keep: Any = None) -> dict[str, Any]:
    """Trades in order of time with ids in that order; only those that ``keep`` (a mask) wants."""
    rows = sorted(trades)
    made = {
        "trade_id": np.arange(100, 100 + len(rows), dtype=np.int64),
        "price": np.array([row[1] for row in rows], np.float64) / 8,
        "size": np.array([row[2] for row in rows], np.float64) / 4,
        "side": np.array([row[3] for row in rows], np.int8),
        "exchange_time_us": np.array([row[0] for row in rows], np.int64) * 1000 + START_US,
        "receive_time_us": np.array([row[0] for row in rows], np.int64) * 1000 + START_US + 250,
    }
    return made if keep is None else {name: column[keep] for name, column in made.items()}


def none_stored() -> dict[str, Any]:
    """An empty table of bars."""
    return {name: np.zeros(0, np.float64 if name in ("open", "vwap") else np.int64) for name in STORED}


def as_stored(*versions: Mapping[str, Any]) -> dict[str, Any]:
    """What the table's newest revisions are after these rows were published in this order."""
    frames = [
        pl.DataFrame({name: part[name] if name in part else np.zeros(len(part["open"]), np.int64) for name in STORED}) for part in versions
    ]
    table = pl.concat([frame.cast({name: pl.Int64 for name in ("timeframe_s", "revision", "complete", "held_count")}) for frame in frames])
    newest = table.sort("revision", maintain_order=True).group_by("timeframe_s", "open_time_us", maintain_order=True).last()
    return {name: newest[name].to_numpy() for name in STORED}


def span(intervals: list[tuple[int, int]]) -> np.ndarray:
    """Intervals in microseconds; a negative length ends before it starts."""
    return np.array([(START_US + at * 1000, START_US + (at + max(length, -1)) * 1000) for at, length in intervals], np.int64).reshape(-1, 2)


@settings(max_examples=60, deadline=None)
@given(trades=TRADES, data=st.data())
def test_after_publishing_the_bars_are_those_of_all_trades_and_nothing_is_left_to_do(
    trades: list[tuple[int, int, int, int]], data: st.DataObject
) -> None:
    """Any part of the trades was there before; each changed bar is published once, one revision up, the others not at all."""
    lost = data.draw(st.lists(st.booleans(), min_size=len(trades), max_size=len(trades)))
    everything = rebuild([columns(trades)], TIMEFRAMES, END_US)
    earlier = rebuild([columns(trades, ~np.array(lost))], TIMEFRAMES, END_US)
    stored = as_stored(earlier)
    first = reconcile(stored, everything, [(START_US, END_US)], Evidence())
    after = as_stored(earlier, first.rows)
    again = reconcile(after, everything, [(START_US, END_US)], Evidence())
    assert len(again.rows["open"]) == 0
    keys = ["timeframe_s", "open_time_us"]
    wanted = pl.DataFrame({name: everything[name] for name in (*keys, *VALUES)}).cast({"timeframe_s": pl.Int64}).sort(keys)
    found = pl.DataFrame({name: after[name] for name in (*keys, *VALUES)}).sort(keys)
    assert_frame_equal(found.join(wanted, on=keys, how="semi"), wanted, check_exact=True)
    before = {(seconds, at): row for row, (seconds, at) in enumerate(zip(stored["timeframe_s"], stored["open_time_us"], strict=True))}
    truth = {(s, at): row for row, (s, at) in enumerate(zip(everything["timeframe_s"], everything["open_time_us"], strict=True))}
    published = list(
        zip(first.rows["timeframe_s"].tolist(), first.rows["open_time_us"].tolist(), first.rows["revision"].tolist(), strict=True)
    )
    for seconds, at, revision in published:
        row = before.get((seconds, at))
        assert revision == (0 if row is None else stored["revision"][row] + 1)
    named = {(seconds, at) for seconds, at, _ in published}
    assert len(named) == len(published)
    for key, row in truth.items():
        old = before.get(key)
        same = old is not None and all(stored[name][old] == everything[name][row] for name in VALUES) and stored["complete"][old] == 1
        assert (key not in named) == same or (old is not None and key not in named and stored["complete"][old] == 0)


@settings(max_examples=60, deadline=None)
@given(trades=TRADES, missing=INTERVALS, covered=INTERVALS, data=st.data())
def test_a_bar_is_complete_where_nothing_is_missing_and_something_vouches_for_it(
    trades: list[tuple[int, int, int, int]], missing: list[tuple[int, int]], covered: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Against the definition, written out bar by bar."""
    ids_held = np.array(data.draw(st.lists(st.booleans(), min_size=len(trades), max_size=len(trades))))
    kept = columns(trades, ids_held)
    bars = rebuild([columns(trades)], TIMEFRAMES, END_US)
    was = data.draw(st.lists(st.sampled_from([0, 1]), min_size=len(bars["open"]), max_size=len(bars["open"])))
    stored = as_stored(bars)
    stored["complete"] = np.array(was)
    evidence = Evidence(missing=span(missing), covered=span(covered), dense=dense_runs(kept["trade_id"], kept["exchange_time_us"]))
    result = reconcile(stored, bars, [(START_US, END_US)], evidence)
    changed = {
        (seconds, at): flag
        for seconds, at, flag in zip(
            result.rows["timeframe_s"].tolist(), result.rows["open_time_us"].tolist(), result.rows["complete"].tolist(), strict=True
        )
    }
    undecided = set()
    for seconds, open_us, close_us, flag in zip(
        *(stored[name].tolist() for name in ("timeframe_s", "open_time_us", "close_time_us", "complete")), strict=True
    ):
        if not (open_us < END_US and close_us > START_US):
            continue
        touched = any(close_us > low and (open_us <= high or high < low) for low, high in evidence.missing.tolist())
        inside = any(low <= open_us and close_us <= high for low, high in merged(evidence.covered).tolist())
        dense = any(low < open_us and close_us <= high for low, high in evidence.dense.tolist())
        wanted = int(not touched and (inside or dense or flag == 1))
        assert changed.get((seconds, open_us), flag) == wanted
        if not touched and not (inside or dense or flag):
            undecided.add(close_us)
    assert set(result.undecided.tolist()) == undecided


def test_only_bars_that_touch_the_range_are_published() -> None:
    """``[start, end)``: a bar that ends at the start or begins at the end has nothing of it."""
    trades = [(ms, 10, 1, 1) for ms in range(0, 60_000, 500)]
    bars = rebuild([columns(trades)], ("1s", "1m"), START_US + 60_000_000)
    found = reconcile(
        none_stored(), bars, [(START_US + 10_000_000, START_US + 11_500_000), (START_US + 11_000_000, START_US + 12_000_000)], Evidence()
    )
    at = [
        (seconds, (time - START_US) // 1_000_000)
        for seconds, time in zip(found.rows["timeframe_s"], found.rows["open_time_us"], strict=True)
    ]
    assert at == [(1, 10), (1, 11), (60, 0)]
    assert found.checked == 3
    point = reconcile(none_stored(), bars, [(START_US + 10_000_000, START_US + 10_000_001)], Evidence())
    assert point.rows["open_time_us"].tolist() == [START_US + 10_000_000, START_US]


def test_trades_held_back_are_counted_in_the_bars_they_would_be_in() -> None:
    """``[open, close)``; a changed count alone is a revision."""
    trades = [(ms, 10, 1, 1) for ms in range(0, 5_000, 100)]
    bars = rebuild([columns(trades)], ("1s",), START_US + 5_000_000)
    stored = as_stored({**bars, "complete": np.ones(5, np.int64)})
    held = np.array([0, 999_999, 1_000_000, 4_000_000], np.int64) + START_US
    found = reconcile(stored, bars, [(START_US, END_US)], Evidence(held_us=held))
    assert found.rows["held_count"].tolist() == [2, 1, 1]
    assert found.rows["revision"].tolist() == [1, 1, 1]


def test_pages_are_rebuilt_as_one_history_and_the_trade_before_gives_the_flat_bars_their_price() -> None:
    """However it is cut; nothing after the end is closed."""
    trades = [(ms, 10 + ms % 7, 1, 1) for ms in range(0, 40_000, 37)]
    whole = columns(trades)
    one = rebuild([whole], ("1s", "5m"), START_US + 50_000_000)
    cut = rebuild(
        [{name: column[i : i + 100] for name, column in whole.items()} for i in range(0, len(trades), 100)],
        ("1s", "5m"),
        START_US + 50_000_000,
    )
    for name in door.BAR_COLUMNS:
        np.testing.assert_array_equal(one[name], cut[name])
    assert one["timeframe_s"].tolist() == [1] * 50
    assert one["trade_count"].tolist()[40:] == [0] * 10
    assert set(one["close"].tolist()[40:]) == {whole["price"][-1]}


def test_bars_are_the_live_ones_bit_for_bit() -> None:
    """The batch door gives the same values."""
    rng = np.random.default_rng(3)
    trades = sorted(
        (int(ms), int(price), int(size), 1)
        for ms, price, size in zip(rng.integers(0, 170_000, 3_000), rng.integers(1, 999, 3_000), rng.integers(1, 99, 3_000), strict=True)
    )
    whole = columns(trades)
    frame = pl.DataFrame({"exchange": "binance", "symbol": "BTC-USDT", **{name: whole[name] for name in whole}})
    batch = door.build(frame, ["1s", "1m"]).filter(pl.col.complete)
    mine = rebuild([whole], ("1s", "1m"), START_US + 170_000_000)
    for name in VALUES[1:]:
        found = {
            (s, t): v for s, t, v in zip(mine["timeframe_s"].tolist(), mine["open_time_us"].tolist(), mine[name].tolist(), strict=True)
        }
        for timeframe, time, value in batch.select("timeframe", pl.col.open_time.dt.epoch("us"), name).iter_rows():
            assert found[({"1s": 1, "1m": 60}[timeframe], time)] == value


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_runs_of_ids_are_joined_across_pages(size: int) -> None:
    """A page ends anywhere."""
    ids = np.array([1, 2, 3, 7, 8, 20, 21, 22, 23, 30], np.int64)
    times = ids * 10
    pages = [(ids[i : i + size], times[i : i + size]) for i in range(0, len(ids), size)]
    assert joined_runs(pages).tolist() == dense_runs(ids, times).tolist() == [[10, 30], [70, 80], [200, 230], [300, 300]]
    assert joined_runs([]).tolist() == []
