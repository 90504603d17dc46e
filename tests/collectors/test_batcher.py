"""Frames: nothing lost, order kept, watermarks that keep their promise, sizes and heartbeats."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.batcher import Batcher, BatcherConfig
from collectors.errors import BatcherFullError
from collectors.wire import TRADE_DTYPES
from schemas.codec import FrameCodec
from schemas.frames import GAP_FILLED, GAP_OPEN, HISTORY, Frame, GapNotice
from schemas.partitions import partition_of
from tests.collectors.fakes import rows_of, trade_columns

KEYS = [f"binance:S{number}-USDT" for number in range(40)]


def batcher(**config: Any) -> Batcher:
    """A batcher that knows KEYS by code 0..39."""
    made = Batcher("binance/ws/0", TRADE_DTYPES, BatcherConfig(**config))
    assert [made.code_of(key) for key in KEYS] == list(range(len(KEYS)))
    return made


def test_columns_are_those_of_the_trades_schema() -> None:
    """The collector's rows fit the topic."""
    assert dict(FrameCodec("trades", 1).dtypes) == TRADE_DTYPES


def test_each_frame_holds_one_partition_and_its_own_dictionary() -> None:
    """Only symbols that occur are named; every key lives in the frame's partition."""
    made = batcher()
    made.add(trade_columns([3, 17, 3, 8], [1, 1, 2, 1]))
    frames = made.take(0, 5)
    assert sum(frame.row_count for _, frame in frames) == 4
    for partition, frame in frames:
        assert all(partition_of(key, 4) == partition for key in frame.symbols)
        assert len(set(frame.columns["symbol_code"].tolist())) == len(frame.symbols)
        FrameCodec("trades", 1).encode(frame)


def test_a_large_batch_is_cut_and_only_the_last_frame_carries_the_new_watermark() -> None:
    """Rows of the later frames are still to come when the first is read."""
    made = batcher(max_rows=100)
    made.add(trade_columns([0] * 250, list(range(250)), [1_000] * 250))
    first = made.take(0, 900)
    assert [frame.row_count for _, frame in first] == [100, 100, 50]
    assert [frame.watermark_us for _, frame in first] == [0, 0, 900]
    made.add(trade_columns([0] * 150, list(range(250, 400)), [1_500] * 150))
    second = made.take(0, 1_400)
    assert [frame.watermark_us for _, frame in second] == [900, 1_400]


def test_every_partition_gets_a_heartbeat_while_nothing_happens() -> None:
    """Empty frames with the watermark, not more often than asked."""
    made = batcher(heartbeat_ms=500)
    assert made.take(400_000, 1) == []
    beats = made.take(600_000, 2)
    assert [(partition, frame.row_count, frame.watermark_us) for partition, frame in beats] == [(0, 0, 2), (1, 0, 2), (2, 0, 2), (3, 0, 2)]
    assert made.take(900_000, 3) == []
    assert len(made.take(900_000, 3, all_partitions=True)) == 4


def test_no_heartbeat_before_anything_is_known() -> None:
    """Without a watermark there is nothing to promise."""
    assert batcher().take(10**9, None) == []


def test_more_rows_than_the_bound_are_refused_by_name() -> None:
    """The caller must stop reading; nothing is dropped."""
    made = batcher(max_pending_rows=100)
    made.add(trade_columns([0] * 90, list(range(90))))
    with pytest.raises(BatcherFullError, match="101 rows would wait, the limit is 100"):
        made.add(trade_columns([0] * 11, list(range(11))))
    assert made.pending_rows == 90
    assert len(made.take(0, 1)) == 1
    assert made.room == 100


def test_the_linger_grows_with_backlog_and_shrinks_when_quiet() -> None:
    """5 ms while quiet, 20 ms at most."""
    made = batcher()
    assert made.linger_us == 5_000
    for _ in range(10):
        made.add(trade_columns([0] * 1_500, list(range(1_500))))
        made.take(0, 1)
    assert made.linger_us == 20_000
    for _ in range(10):
        made.take(0, 1)
    assert made.linger_us == 5_000
    made.take(0, 1, sink_behind=True)
    assert made.linger_us > 5_000


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 39), max_size=60), st.booleans(), st.integers(0, 400_000)), min_size=1, max_size=25),
    st.integers(1, 50),
)
def test_nothing_is_lost_order_is_kept_and_no_watermark_passes_an_unsent_row(
    rounds: list[tuple[list[int], bool, int]], max_rows: int
) -> None:
    """Any batches, any moments of taking, any frame size."""
    made = batcher(max_rows=max_rows)
    ids: dict[int, int] = {}
    sent: list[tuple[int, Frame]] = []
    now = clock = 0
    for codes, take, pause in rounds:
        now += pause
        numbers = []
        for code in codes:
            ids[code] = ids.get(code, 0) + 1
            numbers.append(ids[code])
        times = [clock + offset for offset in range(len(codes))]
        clock += len(codes)
        made.add(trade_columns(codes, numbers, times))
        if take:
            sent += made.take(now, clock)  # every row so far is older than this
    sent += made.take(now, clock, all_partitions=True)
    got = rows_of(sent)
    assert got == {KEYS[code]: list(range(1, count + 1)) for code, count in ids.items()}
    promised: dict[int, int] = {}
    for partition, frame in sent:
        assert frame.row_count <= max_rows
        if frame.row_count:
            assert int(frame.columns["exchange_time_us"].min()) >= promised.get(partition, -1)
            assert (frame.columns["price"] == frame.columns["trade_id"]).all()
        assert frame.watermark_us >= promised.get(partition, -1)
        promised[partition] = frame.watermark_us


def test_a_round_of_one_row_and_of_many_give_the_same_bytes_per_row() -> None:
    """Whatever the batch, a row's values are its own."""
    made = batcher()
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 40, 500).tolist()
    whole = trade_columns(codes, list(range(500)))
    made.add(whole)
    together = made.take(0, 1)
    for row in range(500):
        made.add({name: column[row : row + 1] for name, column in whole.items()})
    assert rows_of(together) == rows_of(made.take(0, 1))


def test_a_gap_is_told_before_the_rows_after_it_and_its_end_after_the_rows_that_fill_it() -> None:
    """Opened: in the first frame of the partition; filled: in the last; symbols without rows get a place in the dictionary."""
    made = batcher(max_rows=2)
    mine = partition_of(KEYS[3], 4)
    other = next(code for code in range(40) if code != 3 and partition_of(KEYS[code], 4) == mine)
    made.notice(GapNotice(other, 8, 1, 2, GAP_FILLED))
    made.notice(GapNotice(3, 7, 10, 20, GAP_OPEN))
    made.add(trade_columns([3] * 5, [1, 2, 3, 4, 5]))
    frames = [frame for partition, frame in made.take(0, 5) if partition == mine]
    assert [frame.gaps for frame in frames] == [(GapNotice(0, 7, 10, 20, GAP_OPEN),), (), (GapNotice(1, 8, 1, 2, GAP_FILLED),)]
    assert frames[-1].symbols == (KEYS[3], KEYS[other])
    assert [frame.watermark_us for frame in frames] == [0, 0, 5]
    codec = FrameCodec("trades", 1)
    assert codec.decode(codec.encode(frames[-1])).gaps == frames[-1].gaps


def test_a_notice_goes_out_without_rows_and_without_a_watermark() -> None:
    """Nothing was received yet: the frame promises nothing."""
    made = batcher()
    made.notice(GapNotice(3, 7, 10, -1, GAP_OPEN))
    ((partition, frame),) = made.take(0, None)
    assert partition == partition_of(KEYS[3], 4)
    assert (frame.row_count, frame.watermark_us, frame.symbols, len(frame.gaps)) == (0, 0, (KEYS[3],), 1)
    assert made.take(1, None) == []


def test_rows_of_the_past_go_out_first_as_a_source_of_their_own() -> None:
    """They promise nothing and leave what the live source promised as it is."""
    made = batcher()
    made.add(trade_columns([3], [9], [900]))
    made.add(trade_columns([3, 3], [1, 2], [10, 20]), history=True)
    assert made.pending_rows == 3
    first, second = [frame for _, frame in made.take(0, 800) if frame.row_count]
    assert (first.source, first.flags, first.watermark_us) == ("binance/ws/0/fill", HISTORY, 0)
    assert first.columns["trade_id"].tolist() == [1, 2]
    assert (second.source, second.flags, second.watermark_us) == ("binance/ws/0", 0, 800)
    assert made.pending_rows == 0
