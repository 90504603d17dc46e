"""The bar processor of one partition: every record gives its answer, bad ones too, and a restored one goes on byte for byte."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest

from processors.bars import BarConfig, BarEngine
from schemas.codec import FrameCodec, RowCodec
from schemas.frames import GAP_FILLED, GAP_OPEN, HISTORY, Frame, GapNotice
from streams.bar_shard import BarCodecs, BarShard
from streams.errors import StateError
from streams.records import OutRecord
from tests.performance import market

CODECS = BarCodecs(
    trades=FrameCodec("trades", 1),
    bars=FrameCodec("bars", 2),
    rows=RowCodec("bars_row", 3),
    deadletter=RowCodec("deadletter", 4),
    fetch_schema={}.__getitem__,
)
CONFIG = BarConfig()


def encoded(count: int = 3_000, rows_per_frame: int = 100, per_second: int = 500) -> list[bytes]:
    """Trades of 20 symbols as records of one partition."""
    keys, columns = market.trades(count, 20, per_second=per_second)
    return [CODECS.trades.encode(frame) for _, frame in market.frames(keys, columns, partitions=1, rows_per_frame=rows_per_frame)]


def frames(records: list[OutRecord]) -> list[Frame]:
    """The decoded bars frames among ``records``."""
    return [CODECS.bars.decode(record.value) for record in records if record.topic == "bars"]


def test_each_record_gives_one_bars_frame_that_names_it() -> None:
    """Input and output go one to one, so that progress can be read from the topic."""
    shard = BarShard(2, CONFIG, CODECS)
    for offset, value in enumerate(encoded()):
        records = shard.process(offset, value)
        assert [frame.input_offset for frame in frames(records)] == [offset]
        assert records[-1].topic == "bars"  # last: when it is there, everything else of that record has been sent
        assert {record.partition for record in records if record.topic != "deadletter"} == {2}


def test_a_record_the_state_covers_gives_nothing() -> None:
    """Delivered again, a record changes nothing."""
    values = encoded()
    shard = BarShard(0, CONFIG, CODECS)
    for offset, value in enumerate(values):
        shard.process(offset, value)
    before = shard.snapshot()
    assert [shard.process(offset, value) for offset, value in enumerate(values)] == [[]] * len(values)
    assert shard.snapshot() == before


@pytest.mark.parametrize("at", [0, 1, 7, 29])
def test_a_restored_shard_goes_on_byte_for_byte(at: int) -> None:
    """State, outputs and the next snapshot are those of a shard that never stopped."""
    values = encoded()
    whole = BarShard(1, CONFIG, CODECS)
    expected = [whole.process(offset, value) for offset, value in enumerate(values)]
    first = BarShard(1, CONFIG, CODECS)
    for offset in range(at):
        first.process(offset, values[offset])
    second = BarShard.restore(1, CONFIG, CODECS, first.snapshot())
    assert second.applied_offset == at - 1
    assert [second.process(offset, values[offset]) for offset in range(at, len(values))] == expected[at:]
    assert second.snapshot() == whole.snapshot()


def test_what_is_already_in_the_topic_is_not_sent_again() -> None:
    """After a crash the frames behind the snapshot are computed again and kept back up to the newest one sent; the compacted twin is sent again."""
    values = encoded()
    whole, again = BarShard(0, CONFIG, CODECS), BarShard(0, CONFIG, CODECS, emitted_offset=9)
    for offset, value in enumerate(values):
        expected, records = whole.process(offset, value), again.process(offset, value)
        assert records == [record for record in expected if offset > 9 or record.topic != "bars"]


def test_open_bars_are_updated_by_live_frames_and_not_by_history() -> None:
    """A frame that covers more than the update interval is a replay or backlog: only final rows leave it."""
    live = BarShard(0, CONFIG, CODECS)
    updates = [
        frame.columns["is_final"] for value in encoded(2_000, 20, 1_000) for frame in frames(live.process(live.applied_offset + 1, value))
    ]
    assert any((final == 0).any() for final in updates)
    history = BarShard(0, CONFIG, CODECS)
    for value in encoded(20_000, 1_000, 1_000):
        for frame in frames(history.process(history.applied_offset + 1, value)):
            assert (frame.columns["is_final"] == 1).all()


def test_garbage_becomes_a_letter_and_an_empty_frame() -> None:
    """An undecodable record is kept with its bytes and place, and the partition goes on."""
    shard = BarShard(3, CONFIG, CODECS)
    letter, frame = shard.process(0, b"garbage")
    row = CODECS.deadletter.decode(letter.value)
    assert (row["reason"], row["topic"], row["partition"], row["offset"], row["raw"]) == ("undecodable_frame", "trades", 3, 0, b"garbage")
    assert frames([frame])[0].row_count == 0
    assert frames(shard.process(1, encoded()[0]))[0].input_offset == 1


def test_a_bad_row_becomes_a_letter_and_its_frame_goes_on() -> None:
    """A price of NaN is refused by row, with reason and place; the other rows make bars."""
    frame = CODECS.trades.decode(encoded()[0])
    price = frame.columns["price"].copy()
    price[5] = np.nan
    bad = Frame(source="s", watermark_us=frame.watermark_us, symbols=frame.symbols, columns={**frame.columns, "price": price})
    shard = BarShard(0, CONFIG, CODECS)
    records = shard.process(0, CODECS.trades.encode(bad))
    letters = [CODECS.deadletter.decode(record.value) for record in records if record.topic == "deadletter"]
    assert [(letter["place"], letter["symbol"][:1]) for letter in letters] == [("row 5", "S")]
    assert shard.trade_count == frame.row_count - 1


@pytest.mark.parametrize("damage", [b"", b"short", b"\0" * 200])
def test_hostile_state_is_a_typed_error(damage: bytes) -> None:
    """Bytes that are no state, and a state of another partition or with a flipped bit, are refused."""
    with pytest.raises(StateError):
        BarShard.restore(0, CONFIG, CODECS, damage)
    state = BarShard(0, CONFIG, CODECS).snapshot()
    with pytest.raises(StateError):
        BarShard.restore(1, CONFIG, CODECS, state)
    with pytest.raises(StateError):
        BarShard.restore(0, CONFIG, CODECS, state[:-1] + bytes([state[-1] ^ 1]))


def with_gap(value: bytes, state: int, *, seconds: tuple[float, float] = (-0.5, 0.5)) -> bytes:
    """The record with a notice of a gap of its first symbol around its last trade."""
    frame = CODECS.trades.decode(value)
    last_us = int(frame.columns["exchange_time_us"].max())
    start_us, end_us = (last_us + int(second * 1_000_000) for second in seconds)
    return CODECS.trades.encode(replace(frame, gaps=(GapNotice(0, 7, start_us, end_us, state),)))


def final_bars(shard: BarShard, values: list[bytes], start: int = 0) -> list[tuple[str, int, int]]:
    """(key, open time, complete) of the final 1 s bars that follow from ``values``."""
    rows = []
    for offset, value in enumerate(values, start):
        for frame in frames(shard.process(offset, value)):
            columns = frame.columns
            found = np.flatnonzero((columns["is_final"] == 1) & (columns["timeframe_s"] == 1)).tolist()
            keys = [frame.symbols[code] for code in columns["symbol_code"][found].tolist()]
            rows += zip(keys, columns["open_time_us"][found].tolist(), columns["complete"][found].tolist(), strict=True)
    return rows


def test_bars_that_touch_an_open_gap_are_not_complete() -> None:
    """Those of that symbol and time only; all else is byte for byte what it was."""
    values = encoded()
    frame = CODECS.trades.decode(values[15])
    told_us = int(frame.columns["exchange_time_us"].max())
    plain = final_bars(BarShard(0, CONFIG, CODECS), values)
    told = final_bars(BarShard(0, CONFIG, CODECS), [*values[:15], with_gap(values[15], GAP_OPEN), *values[16:]])
    differing = [after for before, after in zip(plain, told, strict=True) if before != after]
    assert differing
    assert {key for key, _, _ in differing} == {frame.symbols[0]}
    assert all(complete == 0 and told_us - 1_500_000 < open_us <= told_us + 500_000 for _, open_us, complete in differing)


def test_a_gap_that_was_filled_in_time_leaves_no_trace() -> None:
    """Opened and filled before the bars close: they are complete."""
    values = encoded()
    told = [*values[:15], with_gap(values[15], GAP_OPEN), with_gap(values[16], GAP_FILLED), *values[17:]]
    assert final_bars(BarShard(0, CONFIG, CODECS), told) == final_bars(BarShard(0, CONFIG, CODECS), values)


def test_trades_of_the_past_make_no_bars_and_one_empty_frame() -> None:
    """The engine does not see them: all that follows is what it would be without them, and their notices count."""
    values = encoded()
    history = CODECS.trades.encode(replace(CODECS.trades.decode(values[20]), flags=HISTORY, source="binance/ws/fill", watermark_us=0))
    shard, plain = BarShard(0, CONFIG, CODECS), BarShard(0, CONFIG, CODECS)
    before = final_bars(shard, values[:10])
    records = shard.process(10, history)
    assert [(frame.input_offset, frame.row_count, frame.watermark_us) for frame in frames(records)] == [(10, 0, shard.watermark_us)]
    assert before + final_bars(shard, values[10:], 11) == final_bars(plain, values)
    gap = CODECS.trades.encode(replace(CODECS.trades.decode(with_gap(values[9], GAP_OPEN)), flags=HISTORY))
    shard.process(99, gap)
    assert shard.snapshot() != plain.snapshot()


def test_gaps_outlive_a_restart_byte_for_byte() -> None:
    """The gap opened before the snapshot marks the bars after it."""
    values = encoded()
    values[12] = with_gap(values[12], GAP_OPEN, seconds=(0.0, 2.0))
    whole = BarShard(1, CONFIG, CODECS)
    expected = [whole.process(offset, value) for offset, value in enumerate(values)]
    first = BarShard(1, CONFIG, CODECS)
    for offset in range(14):
        first.process(offset, values[offset])
    second = BarShard.restore(1, CONFIG, CODECS, first.snapshot())
    assert [second.process(offset, values[offset]) for offset in range(14, len(values))] == expected[14:]
    assert second.snapshot() == whole.snapshot()


def test_a_state_of_release_0_1_goes_on() -> None:
    """Version 1 held the bar engine alone."""
    values = encoded()
    whole, engine = BarShard(1, CONFIG, CODECS), BarEngine(CONFIG)
    for offset in range(10):
        whole.process(offset, values[offset])
        engine.process(CODECS.trades.decode(values[offset]))
    body = engine.snapshot()
    restored = BarShard.restore(1, CONFIG, CODECS, struct.pack("<4sHHqII", b"MSBS", 1, 1, 9, len(body), zlib.crc32(body)) + body)
    assert restored.watermark_us == whole.watermark_us
    assert [restored.process(offset, values[offset]) for offset in range(10, 20)] == [
        whole.process(offset, values[offset]) for offset in range(10, 20)
    ]
    assert restored.snapshot() == whole.snapshot()


@pytest.mark.parametrize("table", [b'{"engine": 99}', b'{"mystery": 1}', b'{"engine": -1}', b"[1]", b"{", b'{"engine": true}'])
def test_a_state_whose_table_lies_is_refused(table: bytes) -> None:
    """Sections that are unknown or do not fit, behind a checksum that does."""
    body = struct.pack("<I", len(table)) + table + b"x"
    with pytest.raises(StateError):
        BarShard.restore(0, CONFIG, CODECS, struct.pack("<4sHHqII", b"MSBS", 2, 0, 9, len(body), zlib.crc32(body)) + body)
