"""Frames in time: watermarks, sizes, speeds and heartbeats, on a clock that only moves when slept on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from replay_files import BTC, T0_MS, FakeClock, Result, dump, recorded, replay, write

from collectors.replay.feed import Replay, content_hash
from collectors.replay.order import LookAhead
from collectors.replay.pacing import parse_speed
from collectors.replay.seen import SeenIds
from schemas.codec import FrameCodec
from schemas.frames import END_OF_SOURCE


def _watermarks_hold(result: Result) -> None:
    """Watermarks never go back, and no row of a later frame is older than one, save the rows counted as late."""
    marks = [frame.watermark_us for frame in result.frames]
    assert marks == sorted(marks)
    late, mark = 0, 0
    for frame in result.frames:
        if frame.row_count:
            late += int((frame.columns["exchange_time_us"] < mark).sum())
        mark = frame.watermark_us
    assert late == result.stats.late


async def test_at_full_speed_frames_are_full_and_watermarks_are_the_next_row_s_time(tmp_path: Path) -> None:
    """4,000 rows a frame, nothing slept, the last frame empty with END_OF_SOURCE at the newest time."""
    clock = FakeClock()
    result = await replay(write(tmp_path / "x.csv", dump(10_000)), clock=clock)
    assert [frame.row_count for frame in result.frames] == [4_000, 4_000, 2_000, 0]
    assert [frame.watermark_us for frame in result.frames] == [(T0_MS + row * 10) * 1000 for row in (4_000, 8_000, 9_999, 9_999)]
    assert [frame.flags for frame in result.frames] == [0, 0, 0, END_OF_SOURCE]
    assert clock.slept == []
    assert {(frame.source, frame.symbols) for frame in result.frames} == {(result.replay.source, ("binance:BTC-USDT",))}


async def test_frames_fit_the_codec(tmp_path: Path) -> None:
    """Every frame, the empty ones too, encodes and decodes as the trades topic's schema has it."""
    codec = FrameCodec("trades", 1)
    for frame in (await replay(write(tmp_path / "x.csv", dump(50)), speed=1.0)).frames:
        back = codec.decode(codec.encode(frame))
        assert (back.source, back.watermark_us, back.flags, back.row_count) == (
            frame.source,
            frame.watermark_us,
            frame.flags,
            frame.row_count,
        )


@pytest.mark.parametrize("speed", [1.0, 60.0])
async def test_at_a_finite_speed_rows_leave_when_they_fall_due(tmp_path: Path, speed: float) -> None:
    """Each row leaves within 25 ms after its time, never before it."""
    result = await replay(write(tmp_path / "x.csv", dump(2_000, step_ms=7)), speed=speed)
    for frame, sent_us in zip(result.frames, result.sent_us, strict=True):
        if frame.row_count:
            due_us = (frame.columns["exchange_time_us"] - T0_MS * 1000) / speed
            assert due_us[-1] <= sent_us + 1
            assert due_us[0] >= sent_us - 25_000
    assert result.ids == list(range(100, 2_100))
    assert abs(result.sent_us[-1] - 1_999 * 7_000 / speed) < 25_000
    _watermarks_hold(result)


async def test_at_wall_speed_a_quiet_market_gets_a_heartbeat_a_second(tmp_path: Path) -> None:
    """Between two trades ten seconds apart an empty frame leaves each second, its watermark the replayed time."""
    result = await replay(write(tmp_path / "x.csv", dump(2, step_ms=10_000)), speed=1.0)
    beats = [(sent, frame.watermark_us) for frame, sent in zip(result.frames, result.sent_us, strict=True) if not frame.row_count]
    assert len(beats) in (10, 11)
    gaps = np.diff(result.sent_us)
    assert gaps.max() <= 1_030_000
    for sent, watermark_us in beats[:-1]:
        assert watermark_us == T0_MS * 1000 + sent


async def test_a_slow_taker_is_caught_up_with_by_fuller_frames(tmp_path: Path) -> None:
    """When the broker holds the replay up for five seconds, the next frame holds five seconds."""
    clock = FakeClock()
    path = write(tmp_path / "x.csv", dump(2_000, step_ms=10))

    async def never(_: object) -> None:
        raise AssertionError

    sizes = []
    async for frame in Replay(path, BTC, speed=1.0, clock=clock, on_rejected=never).frames():
        sizes.append(frame.row_count)
        if len(sizes) == 3:
            clock.time_us += 5_000_000
    assert sizes[3] == pytest.approx(500, abs=5)
    assert sum(sizes) == 2_000


@pytest.mark.parametrize("rows", [1, 700, 4_000])
async def test_a_recorded_capture_keeps_its_watermarks(rows: int) -> None:
    """Whatever the frame size, no row follows a watermark it is older than."""
    result = await replay(recorded("ws/binance/usdm_btcusdt_20240808.ws.gz"), max_frame_rows=rows, window_rows=2_000)
    _watermarks_hold(result)
    assert result.stats.late == 0
    assert result.stats.published == 21_313


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations(range(60)) | st.lists(st.integers(0, 80), max_size=120),
    window=st.integers(1, 70),
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=20),
)
def test_look_ahead_depends_on_the_rows_alone(order: list[int], window: int, cuts: list[int]) -> None:
    """However the rows are cut into blocks: the same groups, every row once, watermarks never back, late rows counted."""
    times = np.array(order, np.int64)
    columns = {"exchange_time_us": times, "trade_id": np.arange(len(times), dtype=np.int64)}

    def run(sizes: list[int]) -> tuple[list[tuple[list[int], int]], int]:
        look_ahead, groups, start, turn = LookAhead(window), [], 0, 0
        while start < len(times):
            size = sizes[turn % len(sizes)]
            groups += look_ahead.push({name: column[start : start + size] for name, column in columns.items()})
            start, turn = start + size, turn + 1
        groups += look_ahead.finish()
        return [(group.columns["trade_id"].tolist(), group.watermark_us) for group in groups], look_ahead.late_rows

    groups, late = run(cuts)
    assert (groups, late) == run([1_000])
    assert sorted(row for rows, _ in groups for row in rows) == list(range(len(times)))
    marks = [mark for _, mark in groups]
    assert marks == sorted(marks)
    followed_late = sum(int((times[rows] < marks[index]).sum()) for index, (rows, _) in enumerate(groups[1:]))
    assert late == followed_late


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 60), max_size=30), max_size=12))
def test_seen_ids_says_what_a_set_says(batches: list[list[int]]) -> None:
    """The first of each id is new, in whatever order and batches they come."""
    seen, known = SeenIds(), set()
    for batch in batches:
        expected = []
        for item in batch:
            expected.append(item not in known)
            known.add(item)
        fresh = seen.new(np.array(batch, np.int64))
        assert (fresh.tolist() if fresh is not None else [True] * len(batch)) == expected


def test_seen_ids_keeps_a_run_for_ids_without_a_gap() -> None:
    """Blocks that join are one run, whichever comes first."""
    seen = SeenIds()
    for start in (0, 1_000, 3_000, 2_000):
        assert seen.new(np.arange(start, start + 1_000)) is None
    assert (seen._first.tolist(), seen._last.tolist()) == ([0], [3_999])


async def test_rows_of_one_time_come_by_id(tmp_path: Path) -> None:
    """Trades of one matching share their time; the id says which was first."""
    lines = dump(200, step_ms=0)
    assert (await replay(write(tmp_path / "x.csv", lines[::-1]))).ids == list(range(100, 300))


async def test_an_abandoned_replay_can_still_be_ended(tmp_path: Path) -> None:
    """What is sent after Ctrl-C: the end of the source, at the watermark it had reached."""

    async def never(_: object) -> None:
        raise AssertionError

    made = Replay(write(tmp_path / "x.csv", dump(9_000)), BTC, clock=FakeClock(), on_rejected=never)
    frames = made.frames()
    first = await anext(frames)
    await frames.aclose()  # type: ignore[attr-defined]
    end = made.end_frame()
    assert (end.flags, end.watermark_us, end.row_count, end.source) == (END_OF_SOURCE, first.watermark_us, 0, made.source)


def test_seen_ids_is_bounded() -> None:
    """Ids with a gap after each take a run each; beyond the limit the smallest are forgotten, not the newest."""
    seen = SeenIds(max_runs=100)
    seen.new(np.arange(0, 1_000, 2))
    assert seen.new(np.array([998])) is not None
    assert seen.new(np.array([0])) is None
    assert len(seen._first) == 100


def test_the_source_is_that_of_the_content(tmp_path: Path) -> None:
    """The same bytes under another name are the same source, other bytes another; a change anywhere in a large file is seen mostly."""
    first = write(tmp_path / "a.csv", dump(50))
    again = write(tmp_path / "b.csv", dump(50))
    other = write(tmp_path / "c.csv", dump(51))
    assert content_hash(first) == content_hash(again) != content_hash(other)
    assert len(content_hash(first)) == 8


async def test_a_second_replay_gives_byte_identical_frames(tmp_path: Path) -> None:
    """Two replays of one file: the same records, so a second one adds nothing."""
    codec, path = FrameCodec("trades", 1), write(tmp_path / "x.csv", dump(9_000))
    runs = [[codec.encode(frame) for frame in (await replay(path)).frames] for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(("text", "speed"), [("max", None), (None, None), ("1", 1.0), ("60", 60.0), ("0.5x", 0.5), (2, 2.0)])
def test_speeds(text: str | float | None, speed: float | None) -> None:
    """Words and numbers a user may write."""
    assert parse_speed(text) == speed
