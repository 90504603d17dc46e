"""One shard's pipeline: bytes in, frames out, by hand-moved time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors import pipeline as pipeline_module
from collectors.batcher import Batcher, BatcherConfig
from collectors.binance.mapper import BinanceMapper
from collectors.coverage import OpenGap, Resume
from collectors.dedupe import EVIDENCE_ID_JUMP, EVIDENCE_RESTART, EVIDENCE_SILENCE, NUMBERING, Gap, Sequencer
from collectors.pipeline import Pipeline, PipelineConfig
from collectors.stale import StaleDetector
from collectors.stats import FeedStats
from collectors.watermark import Watermark
from collectors.wire import TRADE_DTYPES, Reply
from processors.coverage import LedgerRow, shares, timeline
from schemas.codec import FrameCodec
from schemas.frames import GAP_COMPLETE, GAP_FILLED, GAP_OPEN, GAP_UNFILLABLE, HISTORY, Frame
from tests.collectors.fakes import RecordingDeadLetters, capture, rows_of

T_MS = 1_723_161_255_342
STEP = 10_000


class Bench:
    """A pipeline of two symbols with everything it calls recorded."""

    def __init__(self, *, consecutive: bool = True, resumes: dict[str, Resume] | None = None, wall_us: int = 0, **config: Any) -> None:
        self.letters = RecordingDeadLetters()
        self.replies: list[Reply] = []
        self.gaps: list[Gap] = []
        self.now = 1_000_000
        self.frames: list[tuple[int, Frame]] = []
        self.gap_frames: list[Frame] = []
        self.pipeline = Pipeline(
            exchange="binance",
            mapper=BinanceMapper("trade"),
            sequencer=Sequencer(consecutive=consecutive),
            watermark=Watermark(),
            batcher=Batcher("binance/ws/0", TRADE_DTYPES, BatcherConfig()),
            stale=StaleDetector(),
            dead_letters=self.letters,
            stats=FeedStats(),
            on_reply=self.replies.append,
            on_gap=self.gaps.append,
            config=PipelineConfig(**config),
        )
        self.codes = {
            name: self.pipeline.add_symbol(
                f"binance:{name}-USDT",
                f"{name.lower()}usdt@trade",
                self.now,
                resume=(resumes or {}).get(f"binance:{name}-USDT"),
                wall_us=wall_us,
            )
            for name in ("BTC", "ETH")
        }

    def round(self, *messages: bytes, received_us: int | None = None) -> None:
        """Receive, wait a linger, take."""
        if messages:
            self.pipeline.receive(list(messages), T_MS * 1_000 + self.now if received_us is None else received_us)
        before, self.now = self.now, self.now + STEP
        found = self.pipeline.take(self.now, before)
        self.frames += [(partition, frame) for topic, partition, frame in found if topic == "trades"]
        self.pipeline.ledger.sent()
        self.gap_frames += [frame for topic, _, frame in [*found, *self.pipeline.ledger.take_ready()] if topic == "gaps"]

    def ledger(self) -> list[dict[str, Any]]:
        """Rows of the ledger in the order they went out, with the symbol's key."""
        codec = FrameCodec("gaps", 1)
        found = []
        for frame in map(codec.decode, map(codec.encode, self.gap_frames)):
            rows = zip(*(column.tolist() for column in frame.columns.values()), strict=True)
            named = [dict(zip(frame.columns, row, strict=True)) for row in rows]
            found += [{"symbol": frame.symbols[row["symbol_code"]], **row} for row in named]
        return found

    def notices(self) -> list[tuple[int, int]]:
        """(gap id, state) of every notice in the frames of trades."""
        return [(notice.gap_id, notice.state) for _, frame in self.frames for notice in frame.gaps]


def trade(number: int, *, symbol: str = "btc", ms: int | None = None, price: str = "1.5") -> bytes:
    """A message; its time moves with its number."""
    at = T_MS + number if ms is None else ms
    return (
        f'{{"stream":"{symbol}usdt@trade","data":{{"e":"trade","E":{at},"s":"{symbol.upper()}USDT","t":{number},"p":"{price}","q":"2.0",'
        f'"T":{at},"m":false,"M":true}}}}'
    ).encode()


def fetched(numbers: range) -> dict[str, Any]:
    """A page of the venue's REST with these trades of BTC."""
    columns = BinanceMapper("trade")
    columns.bind("btcusdt@trade", 0)
    found = columns.parse([trade(number) for number in numbers]).columns
    return {name: column for name, column in found.items() if name != "symbol_code"}


def test_rows_carry_when_their_chunk_was_received() -> None:
    """Two chunks in one round, each with its own time."""
    made = Bench()
    made.pipeline.receive([trade(1), trade(2)], T_MS * 1_000 + 111)
    made.pipeline.receive([trade(3)], T_MS * 1_000 + 222)
    made.round()
    (frame,) = [frame for _, frame in made.frames if frame.row_count]
    assert (frame.columns["receive_time_us"] - T_MS * 1_000).tolist() == [111, 111, 222]
    assert frame.columns["exchange_time_us"].tolist() == [(T_MS + n) * 1000 for n in (1, 2, 3)]
    assert FrameCodec("trades", 1).decode(FrameCodec("trades", 1).encode(frame)).source == "binance/ws/0"


def test_a_gap_holds_the_watermark_until_it_is_filled() -> None:
    """What is fetched is never older than what was promised."""
    made = Bench()
    made.round(trade(1), trade(2))
    held = made.frames[-1][1].watermark_us
    made.round(trade(2_005))
    (gap,) = made.gaps
    for number in range(50):
        made.round(trade(2_006 + number * 10))
    assert {frame.watermark_us for _, frame in made.frames[1:] if frame.row_count} == {held}
    assert made.pipeline.backfill(gap, fetched(range(3, 2_005)), 5, made.now) == 2_002
    made.pipeline.ledger.done(gap, complete=False)
    made.round()
    opened, filled = [row for row in made.ledger() if row["gap_id"] == gap.gap_id]
    assert (opened["state"], opened["first_missing_id"], opened["last_missing_id"]) == (1, 3, 2_004)
    assert (filled["state"], filled["gap_id"], filled["recovered"]) == (2, opened["gap_id"], 2_002)
    assert [notice for notice in made.notices() if notice[0] == gap.gap_id] == [(gap.gap_id, GAP_OPEN), (gap.gap_id, GAP_FILLED)]
    assert not any(frame.flags & HISTORY for _, frame in made.frames)


def test_what_the_venue_cannot_give_is_told_interval_by_interval() -> None:
    """A partly filled gap: two intervals are lost, each a row with state 3 and narrow times; what was recovered is a row of its own."""
    made = Bench()
    made.round(trade(1))
    made.round(trade(10))
    made.round(trade(5))
    (gap,) = made.gaps
    made.pipeline.ledger.done(gap, complete=False)
    made.round()
    opened, *lost, filled = made.ledger()
    at = [(T_MS + number) * 1000 for number in range(11)]
    assert [(row["first_missing_id"], row["last_missing_id"], row["start_time_us"], row["end_time_us"], row["state"]) for row in lost] == [
        (2, 4, at[1], at[5], GAP_UNFILLABLE),
        (6, 9, at[5], at[10], GAP_UNFILLABLE),
    ]
    assert opened["gap_id"] == lost[0]["gap_id"]
    assert len({row["gap_id"] for row in (*lost, filled)}) == 3
    assert (filled["state"], filled["start_time_us"], filled["end_time_us"], filled["recovered"]) == (GAP_FILLED, at[1], at[10], 1)
    assert made.pipeline.stats.gaps_unfillable == 1
    assert made.pipeline.watermark.holding(made.now) == []
    rows = [LedgerRow(*(row[name] for name in LedgerRow._fields)) for row in made.ledger()]
    assert shares(timeline(rows, at[1], at[10] + 1))["unfillable"] == 1.0


def test_rows_that_come_after_the_hold_are_rows_of_the_past() -> None:
    """The watermark went on without them: frames of the source's fill, which promise nothing; the ledger says filled after they went."""
    made = Bench(hold_gap_ids=2)
    made.round(trade(1), trade(10))
    (gap,) = made.gaps
    made.round(trade(11, ms=T_MS + 30_000))
    assert made.pipeline.backfill(gap, fetched(range(1, 10)), 5, made.now) == 8
    made.pipeline.ledger.done(gap, complete=False)
    made.pipeline.receive([trade(12, ms=T_MS + 30_001)], made.now)
    frames = made.pipeline.take(made.now + STEP, made.now)
    first, second = [frame for topic, _, frame in frames if topic == "trades" and frame.row_count]
    assert (first.source, first.flags) == ("binance/ws/0/fill", HISTORY)
    assert first.columns["trade_id"].tolist() == list(range(2, 10))
    assert (second.flags, [notice.state for notice in second.gaps]) == (0, [GAP_FILLED])
    assert not made.pipeline.ledger.waits  # those frames are not sent yet
    made.pipeline.ledger.sent()
    ((_, _, filled),) = made.pipeline.ledger.take_ready()
    assert filled.columns["state"].tolist() == [GAP_FILLED]


def test_a_lost_feed_is_open_until_each_symbol_is_heard_again() -> None:
    """Nobody knows what BTC and ETH missed: BTC goes on where it was, ETH jumps; only what is missing stays open, under the same id."""
    made = Bench()
    made.round(trade(1), trade(1, symbol="eth"))
    made.pipeline.watermark.hold("down", made.now)
    made.pipeline.connection_lost(EVIDENCE_SILENCE, made.now)
    made.round()
    lost = made.ledger()
    assert [(row["state"], row["first_missing_id"], row["end_time_us"], row["evidence"]) for row in lost] == [(1, -1, -1, 4)] * 2
    assert made.pipeline.ledger.coverage.outages == 2
    made.round(trade(2), trade(5, symbol="eth"))
    made.round()
    rows = made.ledger()[2:]
    (eth,) = [row for row in rows if row["symbol"] == "binance:ETH-USDT"]
    assert (eth["gap_id"], eth["state"], eth["first_missing_id"], eth["evidence"]) == (lost[0]["gap_id"], GAP_OPEN, 2, EVIDENCE_SILENCE)
    (btc,) = [row for row in rows if row["symbol"] == "binance:BTC-USDT"]
    assert (btc["gap_id"], btc["state"]) == (lost[0]["gap_id"], 0)
    assert made.pipeline.ledger.coverage.outages == 0


def test_what_settles_after_bars_may_have_closed_is_told_as_filled() -> None:
    """The watermark moved on while the feed was lost: bars were marked incomplete, and are to be made anew."""
    made = Bench()
    made.round(trade(1))
    made.pipeline.connection_lost(EVIDENCE_RESTART, made.now)
    made.round(trade(7, symbol="eth", ms=T_MS + 5_000))
    made.pipeline.ledger.venue_is_at(made.codes["BTC"], 1, 0, made.now)
    made.round()
    made.round()
    interval, row = [row for row in made.ledger() if row["symbol"] == "binance:BTC-USDT" and row["state"] != GAP_OPEN]
    assert (interval["state"], interval["evidence"], row["state"]) == (0, 0, GAP_FILLED)
    assert interval["end_time_us"] >= row["end_time_us"]
    assert made.notices()[-1][1] == GAP_FILLED


def test_a_restart_goes_on_with_the_interval_and_the_gaps_of_the_process_before() -> None:
    """The symbol is in doubt from where the feed promised last; its old gap is fetched further; its interval keeps its id."""
    made = Bench()
    at_us = (T_MS + 100) * 1000
    old = OpenGap(7, 50, 59, at_us - 60, at_us - 50, EVIDENCE_ID_JUMP, 3)
    resume = Resume(100, at_us, watched_until_us=at_us + 500, interval_id=5, interval_since_us=at_us - 900, gaps=(old,))
    made.pipeline.add_symbol("binance:SOL-USDT", "solusdt@trade", made.now, resume=resume)
    made.pipeline.watermark.hold("down", made.now)
    (gap,) = made.gaps
    assert (gap.gap_id, gap.missing, gap.recovered) == (7, [(50, 59, at_us - 60, at_us - 50)], 3)
    made.round(trade(101, symbol="sol", ms=T_MS + 5_000))
    assert {frame.watermark_us for _, frame in made.frames if frame.row_count} == {at_us + 500}
    made.pipeline.watermark.release("down")
    made.round(trade(102, symbol="sol", ms=T_MS + 9_000))
    made.pipeline.ledger.finish()
    made.round()
    lost, settled, interval = made.ledger()
    assert (lost["state"], lost["start_time_us"], lost["evidence"]) == (GAP_OPEN, at_us + 500, EVIDENCE_RESTART)
    assert (settled["state"], settled["gap_id"]) == (0, lost["gap_id"])
    assert (interval["state"], interval["gap_id"], interval["start_time_us"]) == (0, 5, at_us - 900)
    assert interval["end_time_us"] == (T_MS + 9_000) * 1000 - 500_000


def test_no_gap_gets_an_id_that_an_earlier_process_gave() -> None:
    """The newest row of an id is valid: one that is given again would take back what the first was about. Our clock may have gone back."""
    at_us = (T_MS + 100) * 1000
    resume = Resume(100, at_us, watched_until_us=at_us + 500, lost_id=70, lost_since_us=at_us - 900, lost_ended=True, newest_gap_id=90)
    made = Bench(resumes={"binance:BTC-USDT": resume}, wall_us=80)
    made.round()
    again = made.ledger()[0]
    assert (again["gap_id"], again["state"], again["start_time_us"]) == (91, GAP_OPEN, at_us - 900)
    withdrawn = made.ledger()[1]
    assert (withdrawn["gap_id"], withdrawn["state"]) == (70, 0)
    assert sorted(made.notices()) == [(70, GAP_FILLED), (91, GAP_OPEN)]
    later = Bench(resumes={"binance:BTC-USDT": resume}, wall_us=500)
    later.round()
    assert later.ledger()[0]["gap_id"] == 500
    same = Bench(resumes={"binance:BTC-USDT": replace(resume, lost_ended=False)}, wall_us=500)
    same.round()
    assert [row["gap_id"] for row in same.ledger()] == [70]


def test_a_notice_of_an_earlier_process_without_a_row_is_withdrawn() -> None:
    """Nobody else would ever say that it ended."""
    made = Bench(resumes={"binance:BTC-USDT": Resume(100, T_MS * 1000, orphans=((7, T_MS * 1000),), newest_gap_id=7)})
    made.round()
    assert sorted(made.notices()) == [(7, GAP_FILLED), (8, GAP_OPEN)]
    assert [row["gap_id"] for row in made.ledger()] == [8]


def test_a_gap_beyond_the_newest_published_trade_is_not_found_again_after_a_restart() -> None:
    """The venue had said where it was when the collector died. Two gaps of the same ids: what comes fills one, and the other is called lost."""
    at_us = (T_MS + 100) * 1000
    old = OpenGap(7, 101, 110, at_us, at_us + 10_000, EVIDENCE_RESTART)
    made = Bench(resumes={"binance:BTC-USDT": Resume(100, at_us, gaps=(old,), newest_gap_id=7)})
    made.round(trade(121))
    assert [(gap.first_id, gap.last_id) for gap in made.gaps] == [(101, 110), (111, 120)]
    made.pipeline.backfill(made.gaps[0], fetched(range(101, 121)), made.now, made.now)
    assert [gap.missing for gap in made.gaps] == [[], []]


def test_ids_that_start_anew_are_kept_and_told_as_a_restart() -> None:
    """The venue came back with ids from 1: rows pass, one entry with unknown ids says that nobody knows what the old numbering still had."""
    made = Bench()
    made.round(trade(5_000))
    made.pipeline.connection_lost(EVIDENCE_RESTART, made.now)
    made.round(trade(3, ms=T_MS + 4_000), trade(4, ms=T_MS + 4_001))
    (gap,) = made.gaps
    page = fetched(range(1, 3))
    assert made.pipeline.backfill(gap, {**page, "trade_id": page["trade_id"] + NUMBERING}, 5, made.now) == 2
    made.pipeline.ledger.done(gap, complete=True)
    made.round()
    assert sorted(rows_of(made.frames)["binance:BTC-USDT"]) == [5_000, *(NUMBERING + number for number in (1, 2, 3, 4))]
    last = made.ledger()[-1]
    assert (last["state"], last["evidence"], last["first_missing_id"], last["recovered"]) == (GAP_UNFILLABLE, EVIDENCE_RESTART, -1, 2)
    assert made.pipeline.stats.duplicates == 0


def test_intervals_grow_under_one_id_once_a_minute() -> None:
    """Two symbols, three minutes: three rows each at most, the newest reaching to the watermark; a removed symbol has its last word."""
    made = Bench()
    made.pipeline.subscribed = True
    for number in range(1, 19):
        made.now += 10_000_000
        made.round(trade(number, ms=T_MS + number * 10_000), trade(number, symbol="eth", ms=T_MS + number * 10_000))
    made.pipeline.remove_symbol("binance:ETH-USDT")
    made.round()
    by_symbol = {key: [row for row in made.ledger() if row["symbol"] == key] for key in ("binance:BTC-USDT", "binance:ETH-USDT")}
    assert [len(rows) for rows in by_symbol.values()] in ([2, 3], [3, 4])
    for rows in by_symbol.values():
        assert len({row["gap_id"] for row in rows}) == 1
        assert {row["start_time_us"] for row in rows} == {(T_MS + 10_000) * 1000}
        assert [row["end_time_us"] for row in rows] == sorted({row["end_time_us"] for row in rows})


def test_a_wild_time_is_dead_lettered_and_found_missing() -> None:
    """A trade dated next year: its bytes are kept, its neighbours pass, bars do not close."""
    made = Bench()
    made.round(trade(1))
    wild = trade(2, ms=T_MS + 365 * 86_400_000)
    made.round(wild, trade(3))
    assert made.letters.reasons == ["implausible_time"]
    assert made.letters.items[0]["raw"] == wild
    assert rows_of(made.frames)["binance:BTC-USDT"] == [1, 3]
    assert [(gap.first_id, gap.last_id) for gap in made.gaps] == [(2, 2)]
    assert max(frame.watermark_us for _, frame in made.frames) < (T_MS + 1_000) * 1000


def test_a_machine_that_slept_is_believed_after_three_rounds() -> None:
    """An hour is missing: two rounds are dead-lettered (and fetched as gaps), then the new time holds."""
    made = Bench()
    made.round(trade(1))
    hour = T_MS + 3_600_000
    for number in range(2, 6):
        made.round(trade(number, ms=hour + number))
    assert made.letters.reasons == ["implausible_time"] * 2
    assert rows_of(made.frames)["binance:BTC-USDT"] == [1, 4, 5]


def test_our_wall_clock_may_jump() -> None:
    """Receive times go back an hour; watermarks do not care."""
    made = Bench()
    for number in range(1, 20):
        made.round(trade(number), received_us=10**15 - number * 10**9)
    marks = [frame.watermark_us for _, frame in made.frames]
    assert marks == sorted(marks)
    assert marks[-1] >= (T_MS + 19) * 1000 - 500_000


def test_rejected_bytes_carry_reason_place_and_time() -> None:
    """And the counter of the reason."""
    made = Bench()
    made.round(trade(1), b"\xff\xfe garbage", trade(2), received_us=T_MS * 1_000 + 777)
    (letter,) = made.letters.items
    assert letter["raw"] == b"\xff\xfe garbage"
    assert (letter["reason"], letter["exchange"], letter["place"], letter["time_us"]) == (
        "malformed_message",
        "binance",
        "binance/ws/0",
        T_MS * 1_000 + 777,
    )
    assert made.pipeline.stats.errors == {"malformed_message": 1}
    assert rows_of(made.frames)["binance:BTC-USDT"] == [1, 2]


def test_a_flood_of_garbage_is_kept_in_part_and_counted_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A venue that changed its format does not flood the dead letters."""
    monkeypatch.setattr(pipeline_module, "MAX_REJECTED_A_ROUND", 10)
    made = Bench()
    made.round(*[b"x"] * 25)
    assert len(made.letters.items) == 10
    assert made.pipeline.stats.errors == {"malformed_message": 10, "rejected_not_kept": 15}


def test_staging_says_when_it_is_full_and_when_it_has_room() -> None:
    """Bounded by bytes; the shell stops and starts reading by it."""
    made = Bench(max_staged_bytes=1_000)
    assert made.pipeline.has_room
    made.pipeline.receive([trade(number) for number in range(1, 10)], 1)
    assert made.pipeline.is_full
    made.round()
    assert not made.pipeline.is_full
    assert made.pipeline.has_room


def test_recorded_midnight_goes_through_unchanged() -> None:
    """Both BTCUSDT captures through the whole pipeline in rounds of 40 ms of their own time: 19,904 trades, ids without a hole, none late."""
    made = Bench()
    started = None
    chunk: list[bytes] = []
    for day in ("20240808", "20240809"):
        for received_us, message in capture(f"spot_btcusdt_{day}"):
            if b"@trade" not in message:
                continue
            started = started or received_us
            while received_us - started > made.now - 1_000_000 + 4 * STEP:
                made.now += 3 * STEP
                made.round(*chunk)
                chunk = []
            chunk.append(message)
    made.round(*chunk)
    assert rows_of(made.frames)["binance:BTC-USDT"] == list(range(3_735_683_259, 3_735_703_163))
    promised: dict[int, int] = {}
    for partition, frame in made.frames:
        if frame.row_count:
            assert int(frame.columns["exchange_time_us"].min()) >= promised.get(partition, 0)
        promised[partition] = frame.watermark_us
    assert made.gaps == []
    assert made.letters.items == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.one_of(st.integers(1, 40), st.binary(max_size=8)), max_size=8), max_size=15))
def test_every_message_is_a_row_a_duplicate_or_a_letter(rounds: list[list[int | bytes]]) -> None:
    """Nothing vanishes, whatever order and garbage."""
    made = Bench()
    total = 0
    for items in rounds:
        messages = [trade(item, ms=T_MS) if isinstance(item, int) else item for item in items]
        total += len(messages)
        made.round(*messages)
    rows = sum(len(found) for found in rows_of(made.frames).values())
    stats = made.pipeline.stats
    assert rows + stats.duplicates + len(made.letters.items) + len(made.replies) + stats.ignored == total


def test_what_is_lost_between_times_the_other_way_round_marks_no_later_bar() -> None:
    """The row after a lost trade may carry an older time: the stretch still has an end."""
    made = Bench()
    made.round(trade(100, ms=T_MS))
    made.round(trade(102, ms=T_MS - 1))
    made.pipeline.ledger.done(made.gaps[-1], complete=False)
    made.round()
    (lost,) = [row for row in made.ledger() if row["state"] == GAP_UNFILLABLE]
    assert (lost["start_time_us"], lost["end_time_us"]) == ((T_MS - 1) * 1_000, T_MS * 1_000)
    assert all(notice.start_time_us <= notice.end_time_us for _, frame in made.frames for notice in frame.gaps)


def test_an_open_gap_of_an_earlier_process_has_its_times_in_order() -> None:
    """The same for what a killed process left open."""
    old = OpenGap(gap_id=7, first_id=101, last_id=101, start_time_us=T_MS * 1_000, end_time_us=(T_MS - 1) * 1_000, evidence=1)
    made = Bench(resumes={"binance:BTC-USDT": Resume(102, T_MS * 1_000, gaps=(old,))})
    (gap,) = made.gaps
    assert gap.start_time_us < gap.end_time_us


def test_a_wild_first_time_beside_a_sane_one_is_refused() -> None:
    """Nothing is known of the venue's clock yet; ours is at most an hour off. The watermark stays with the sane rows."""
    made = Bench()
    made.round(trade(100, symbol="eth", ms=T_MS + 86_400_000 * 365), trade(100, ms=T_MS))
    assert made.letters.reasons == ["implausible_time"]
    for number in range(101, 110):
        made.round(trade(number, ms=T_MS + number))
    assert made.pipeline.watermark.value is not None
    assert made.pipeline.watermark.value < (T_MS + 1_000) * 1_000
    published = [trade_id for _, frame in made.frames if frame.row_count for trade_id in frame.columns["trade_id"].tolist()]
    assert published == list(range(100, 110))


def test_a_promise_of_times_to_come_is_not_kept() -> None:
    """An earlier process promised a year ahead for a wild row: bars of today are made all the same."""
    year_us = 365 * 86_400_000_000
    resume = Resume(100, T_MS * 1_000, watched_until_us=T_MS * 1_000 + year_us)
    made = Bench(resumes={"binance:BTC-USDT": resume}, wall_us=T_MS * 1_000)
    made.round(trade(101))
    made.round()
    assert made.frames[-1][1].watermark_us < (T_MS + 1_000) * 1_000


def second_of(made: Bench, second: int, *messages: bytes) -> None:
    """A second of a feed whose ETH trades once in it."""
    made.round(*messages, trade(1_000 + second, symbol="eth", ms=T_MS + second * 1_000))
    made.now += 1_000_000 - STEP


def dead_stream(made: Bench, seconds: int) -> list[int]:
    """BTC trades for 25 s, then never again; ETH goes on. The shell asks for BTC whenever it is stale, and the venue has nothing newer.

    Moments of asking, seconds after BTC's last trade.
    """
    asked: list[int] = []
    made.pipeline.subscribed = True
    for second in range(seconds):
        btc = [trade(100 + second, ms=T_MS + second * 1_000)] if second < 25 else []
        second_of(made, second, *btc)
        if made.pipeline.stale.newly_stale(made.now):
            asked.append(second - 24)
            made.pipeline.ledger.went_silent([made.codes["BTC"]])
            made.round()
            if not made.pipeline.sequencer.doubtful(np.array([made.codes["BTC"]]))[0]:
                continue
            made.pipeline.ledger.venue_is_at(made.codes["BTC"], 124, 0, made.now)
    made.pipeline.ledger.finish()
    made.round()
    made.round()
    return asked


def test_a_stream_that_died_is_asked_for_again_and_again() -> None:
    """Asked once it would pass for a quiet one until the connection is renewed; each silence is asked about when it has trebled, or five minutes later."""
    asked = dead_stream(Bench(), 3_600)
    assert 8 <= len(asked) <= 20
    assert max(later - earlier for earlier, later in zip(asked, asked[1:], strict=False)) <= 301


def test_a_stream_that_died_is_not_called_complete_beyond_the_last_answer() -> None:
    """That others trade says nothing of it."""
    made = Bench()
    asked = dead_stream(made, 3_600)
    intervals = [row for row in made.ledger() if row["symbol"] == "binance:BTC-USDT" and not row["evidence"]]
    last_s = (intervals[-1]["end_time_us"] - T_MS * 1_000) / 1e6 - 24
    assert asked[-1] - 2 <= last_s <= asked[-1] + 2


def test_a_symbol_that_never_traded_and_is_silent_is_not_vouched_for_by_its_first_trade() -> None:
    """No id says what it missed: its interval ends, and the next begins with its first trade."""
    made = Bench()
    made.pipeline.subscribed = True
    for second in range(7_300):
        second_of(made, second)
        if made.pipeline.stale.newly_stale(made.now):
            made.pipeline.ledger.went_silent([made.codes["BTC"]])
    made.round(trade(777, ms=T_MS + 7_300_000))
    made.pipeline.ledger.finish()
    made.round()
    made.round()
    mine = [row for row in made.ledger() if row["symbol"] == "binance:BTC-USDT"]
    assert {row["state"] for row in mine} == {GAP_COMPLETE}
    covered = [(row["start_time_us"], row["end_time_us"]) for row in {row["gap_id"]: row for row in mine}.values()]
    assert not any(start < (T_MS + 5_400_000) * 1_000 < end for start, end in covered)


def test_a_symbol_is_covered_from_its_subscription_on() -> None:
    """The watermark lags by half a second, or by a hold's ten: from before the venue's time now nobody knows what it traded."""
    made = Bench()
    made.pipeline.subscribed = True
    for second in range(60):
        second_of(made, second)
    made.pipeline.watermark.hold("a gap", made.now)
    code = made.pipeline.add_symbol("binance:NEW-USDT", "newusdt@trade", made.now)
    added_us = (T_MS + 60_000) * 1_000
    for second in range(60, 130):
        second_of(made, second)
    made.pipeline.ledger.finish()
    made.round()
    made.round()
    assert code >= 0
    starts = [row["start_time_us"] for row in made.ledger() if row["symbol"] == "binance:NEW-USDT"]
    assert starts and min(starts) >= added_us
