"""Suspects in the bar processor: held back from the bars and counted, told of, released in order, and all of it part of the state."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from processors.bars import BarConfig
from processors.held_book import MAX_HELD, HeldBook
from processors.quality import CONFIRMED, HELD, REASON_PRICE
from schemas.codec import FrameCodec, RowCodec
from schemas.frames import HISTORY, Frame, frame_from_polars
from streams.bar_shard import BarCodecs, BarShard
from streams.quality_records import QualityCodecs
from streams.records import OutRecord
from tests.processors.market_data import binance_capture
from tests.processors.test_quality import KEY, T0, calm, cut, market

QUALITY = QualityCodecs(quality=FrameCodec("quality", 5), quarantine=FrameCodec("quarantine", 6))
UNCHECKED = BarCodecs(
    trades=FrameCodec("trades", 1),
    bars=FrameCodec("bars", 2),
    rows=RowCodec("bars_row", 3),
    deadletter=RowCodec("deadletter", 4),
    fetch_schema={}.__getitem__,
)
CODECS = replace(UNCHECKED, quality=QUALITY)
CONFIG = BarConfig()
STEP_US = 100_000
COUNT = 600
WILD = 305
"""Row of the wild print: its second is the thirtieth."""


def values(prices: np.ndarray, sizes: int = 5, flags: int = 0) -> list[bytes]:
    """Records of a market of one symbol, ten trades a second."""
    return [CODECS.trades.encode(replace(frame, flags=flags)) for frame in cut(market(prices, step_us=STEP_US), sizes)]


def with_print(factor: float = 0.7, count: int = 1) -> np.ndarray:
    """Prices of a calm minute with ``count`` wild prints in a row."""
    prices = calm(COUNT)
    prices[WILD : WILD + count] *= factor
    return prices


def decoded(records: list[OutRecord], topic: str) -> list[Frame]:
    """The frames of a topic among ``records``."""
    codec = {"bars": CODECS.bars, "quarantine": QUALITY.quarantine, "quality": QUALITY.quality}[topic]
    return [codec.decode(record.value) for record in records if record.topic == topic]


def run(shard: BarShard, records: list[bytes]) -> list[OutRecord]:
    """Everything that follows from ``records``."""
    return [out for value in records for out in shard.process(shard.applied_offset + 1, value)]


def newest_bars(records: list[OutRecord], timeframe_s: int = 1) -> dict[int, dict[str, float]]:
    """The newest final row of each bar, by seconds after T0."""
    found: dict[int, dict[str, float]] = {}
    for frame in decoded(records, "bars"):
        columns = frame.columns
        for row in np.flatnonzero((columns["is_final"] == 1) & (columns["timeframe_s"] == timeframe_s)).tolist():
            found[int(columns["open_time_us"][row] - T0) // 1_000_000] = {name: column[row].item() for name, column in columns.items()}
    return found


def test_a_wild_print_is_held_back_told_of_and_counted() -> None:
    """Its bar is the bar without it and says that one trade is held; the other bars are what they would be."""
    records = run(BarShard(2, CONFIG, CODECS), values(with_print()))
    bars, others = newest_bars(records), newest_bars(run(BarShard(2, CONFIG, CODECS), values(calm(COUNT))))
    assert bars[30]["held_count"] == 1
    assert (bars[30]["trade_count"], bars[30]["low"] > 99) == (9, True)
    assert {second for second in bars if bars[second] != others[second]} == {30}
    (told,) = decoded(records, "quarantine")
    assert told.symbols == (KEY,)
    assert (told.source, told.input_offset) == ("binance/ws", WILD // 5)
    row = {name: column[0].item() for name, column in told.columns.items()}
    assert (row["trade_id"], row["reason"], row["state"]) == (WILD + 1, REASON_PRICE, HELD)
    assert row["band_low"] < 100 < row["band_high"]
    rows = [CODECS.rows.decode(record.value) for record in records if record.topic == "bars.rows"]
    assert [row["held_count"] for row in rows if row["timeframe"] == "1s" and row["open_time_us"] == T0 + 30_000_000] == [1]
    assert sum(1 for record in records if record.topic == "bars") == COUNT // 5
    assert not [record for record in records if record.topic == "deadletter"]


def test_a_held_trade_that_comes_again_stays_held_and_is_told_of_once() -> None:
    """By the same source, by another that knows nothing of the market yet, and by a fetched page; a row refused beside it keeps its place."""
    shard = BarShard(0, CONFIG, CODECS)
    first = run(shard, values(with_print()))
    columns = market(with_print(), step_us=STEP_US)
    columns["price"][WILD + 2] = np.nan
    again = [
        CODECS.trades.encode(replace(frame, source=source, flags=flags))
        for source, flags in (("binance/ws", 0), ("binance/ws/1", 0), ("binance/ws/fill", HISTORY))
        for frame in cut({name: column[WILD : WILD + 5] for name, column in columns.items()}, 5)
    ]
    records = run(shard, again)
    assert not decoded(records, "quarantine")
    assert newest_bars(first)[30]["held_count"] == 1
    assert all(bar["low"] > 99 for bar in newest_bars(records, 60).values())
    assert [CODECS.deadletter.decode(record.value)["place"] for record in records if record.topic == "deadletter"] == ["row 2", "row 2"]


def test_a_jump_is_in_the_bars_and_no_count_stays() -> None:
    """Two are held, the third releases them, the bar is whole when it closes."""
    records = run(BarShard(0, CONFIG, CODECS), values(with_print(1.2, COUNT - WILD), 1))
    bars = newest_bars(records)
    assert all((bar["held_count"], bar["trade_count"]) == (0, 10) for bar in bars.values())
    states = [frame.columns["state"].tolist() for frame in decoded(records, "quarantine")]
    assert states == [[HELD], [HELD], [CONFIRMED, CONFIRMED]]


def test_a_suspect_confirmed_after_its_bar_closed_revises_it() -> None:
    """The count was 1 and is 0 again, one revision later."""
    prices = with_print(1.2, COUNT - WILD)
    columns = market(prices, step_us=STEP_US)
    columns["exchange_time_us"][WILD + 1 :] += 5_000_000  # the next trades come five seconds later
    frames = [CODECS.trades.encode(frame) for frame in cut(columns, 1)]
    records = run(BarShard(0, CONFIG, CODECS), frames)
    rows = []
    for frame in decoded(records, "bars"):
        mine = (frame.columns["is_final"] == 1) & (frame.columns["timeframe_s"] == 1) & (frame.columns["open_time_us"] == T0 + 30_000_000)
        rows += [{name: column[row].item() for name, column in frame.columns.items()} for row in np.flatnonzero(mine).tolist()]
    assert [(row["revision"], row["held_count"], row["trade_count"]) for row in rows] == [(0, 1, 5), (1, 0, 6)]


@pytest.mark.parametrize("at", [0, 1, 50, WILD // 5 + 1, 90])
def test_a_restored_shard_goes_on_byte_for_byte(at: int) -> None:
    """Before the first frame, with a suspect waiting, and after."""
    prices = with_print(1.2, 1)
    prices[WILD + 5 :] *= 1.2
    inputs = values(prices)
    whole = BarShard(1, CONFIG, CODECS)
    expected = [whole.process(offset, value) for offset, value in enumerate(inputs)]
    first = BarShard(1, CONFIG, CODECS)
    for offset in range(at):
        first.process(offset, inputs[offset])
    second = BarShard.restore(1, CONFIG, CODECS, first.snapshot())
    assert [second.process(offset, inputs[offset]) for offset in range(at, len(inputs))] == expected[at:]
    assert second.snapshot() == whole.snapshot()


def test_after_a_crash_suspects_and_scores_are_told_again() -> None:
    """Bars already in the topic are not sent twice; the others are, with the same bytes, and the sink knows them by their input offset."""
    inputs = values(with_print())
    whole, again = BarShard(0, CONFIG, CODECS), BarShard(0, CONFIG, CODECS, emitted_offset=len(inputs))
    for offset, value in enumerate(inputs):
        expected = whole.process(offset, value)
        assert again.process(offset, value) == [record for record in expected if record.topic != "bars"]


def test_what_the_engine_refuses_is_a_letter_and_no_suspect() -> None:
    """One vocabulary, no double reporting: the score counts it."""
    columns = market(calm(COUNT), step_us=STEP_US)
    columns["price"][WILD] = np.nan
    columns["size"][WILD + 20] = -1.0
    columns["exchange_time_us"][WILD + 40] = 1
    records = run(BarShard(0, CONFIG, CODECS), [CODECS.trades.encode(frame) for frame in cut(columns, 5)])
    letters = [CODECS.deadletter.decode(record.value)["reason"] for record in records if record.topic == "deadletter"]
    assert letters == ["not_finite", "bad_size", "time_out_of_range"]
    assert not decoded(records, "quarantine")
    scores = decoded(records, "quality")
    assert sum(int(frame.columns["bad_values"].sum()) for frame in scores) == 2
    assert sum(int(frame.columns["bad_times"].sum()) for frame in scores) == 1


def test_the_place_of_a_refused_row_is_that_of_its_frame() -> None:
    """A suspect held before it in the same frame does not shift it."""
    columns = market(with_print(), step_us=STEP_US)
    columns["price"][WILD + 2] = np.nan
    records = run(BarShard(0, CONFIG, CODECS), [CODECS.trades.encode(frame) for frame in cut(columns, 5)])
    assert [CODECS.deadletter.decode(record.value)["place"] for record in records if record.topic == "deadletter"] == ["row 2"]


def test_suspects_of_the_past_are_told_of_and_make_no_bars() -> None:
    """Trades that were fetched later: the repair makes their bars, without those held."""
    records = run(BarShard(0, CONFIG, CODECS), values(with_print(), flags=HISTORY))
    assert [frame.columns["trade_id"].tolist() for frame in decoded(records, "quarantine")] == [[WILD + 1]]
    assert all(frame.row_count == 0 for frame in decoded(records, "bars"))


def test_without_checks_every_trade_is_in_the_bars() -> None:
    """The checks can be left out."""
    shard = BarShard(0, CONFIG, UNCHECKED)
    bars = newest_bars(run(shard, values(with_print())))
    assert bars[30]["low"] < 71
    assert {record.topic for record in run(BarShard(0, CONFIG, UNCHECKED), values(with_print()))} == {"bars", "bars.rows"}


def test_recorded_trades_give_the_same_bars_with_checks_as_without() -> None:
    """Byte for byte: 10,000 trades of Binance."""
    trades = binance_capture("spot_btcusdt_20240809.ws.gz")
    inputs = []
    for start in range(0, len(trades), 100):
        part = trades[start : start + 100]
        newest = int(part["exchange_time_us"].max())  # type: ignore[arg-type]
        inputs.append(CODECS.trades.encode(frame_from_polars(part, source="binance/ws", watermark_us=newest, dtypes=CODECS.trades.dtypes)))
    checked, unchecked = run(BarShard(0, CONFIG, CODECS), inputs), run(BarShard(0, CONFIG, UNCHECKED), inputs)
    assert [record for record in checked if record.topic != "quality"] == unchecked
    assert all((frame.columns["score"] == 1.0).all() for frame in decoded(checked, "quality"))


# The book of held trades.


def test_the_book_counts_held_trades_by_bar_and_is_bounded() -> None:
    """Of several symbols at once; what no bar reaches back to is forgotten."""
    book = HeldBook(1_000)
    for trade_id, time_us in ((1, 5), (2, 15), (3, 16), (4, 30)):
        book.hold("a", trade_id, time_us)
    book.hold("b", 1, 15)
    bars = {
        "symbol_code": np.array([1, 0, 1, 2, 1, 0], np.int32),
        "open_time_us": np.array([0, 10, 10, 10, 30, 40]),
        "close_time_us": np.array([10, 20, 20, 20, 40, 50]),
    }
    counts = book.counts(("b", "a", "c"), bars)
    assert counts is not None
    assert counts.tolist() == [1, 1, 2, 0, 1, 0]
    rows = {"symbol_code": np.array([0, 0, 1, 1, 2], np.int32), "trade_id": np.array([1, 2, 3, 9, 1])}
    known = book.known(("b", "a", "c"), rows)
    assert known is not None
    assert known.tolist() == [True, False, True, False, False]
    assert book.known(("c",), {name: column[4:] * 0 for name, column in rows.items()}) is None
    assert book.known((), {}) is None
    assert book.known(("c",), {"symbol_code": np.zeros(1, np.int32), "trade_id": np.array([-5])}) is None  # an id that cannot be
    book.release("a", 2)
    book.release("b", 1)
    book.release("c", 1)
    again = HeldBook.from_state(1_000, book.to_state())
    assert again.to_state() == book.to_state()
    counts = again.counts(("b", "a", "c"), bars)
    assert counts is not None
    assert counts.tolist() == [1, 0, 1, 0, 1, 0]
    assert again.counts(("b",), {name: column[1:2] for name, column in bars.items()}) is None
    again.hold("a", 9, 5_000)
    assert again.to_state() == [["a", [(9, 5_000)]]]
    for number in range(3 * MAX_HELD):
        book.hold("d", number, 50)
    assert len(dict(book.to_state())["d"]) == MAX_HELD
    with pytest.raises(ValueError, match="contradict"):
        HeldBook.from_state(1_000, [["a", []]])
